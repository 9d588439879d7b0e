"""Scores on a split, and predictions for files."""
