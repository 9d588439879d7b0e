"""Data sets, label maps, augmentation and batches. NumPy, OpenCV, TFDS and Grain; no JAX."""
