"""TFDS builders; `dataset.py` says which one is which data set in the config."""
