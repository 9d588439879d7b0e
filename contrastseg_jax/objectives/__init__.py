"""What is trained beside the segmentation loss, each with a state of its own."""
