"""Heads: logits and embeddings from features.

A segmentation head ends in a 1x1 convolution; `watch` sees what that reads.
"""
