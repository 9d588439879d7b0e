"""Backbones: features from images."""
