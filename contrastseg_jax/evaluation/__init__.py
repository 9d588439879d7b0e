"""Evaluation on a split, and predictions for image files."""
