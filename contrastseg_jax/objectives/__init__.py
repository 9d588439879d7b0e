"""Auxiliary objectives trained along with the segmentation loss, each with its own state."""
