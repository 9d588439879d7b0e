"""Heads: logits and embeddings from features.

A segmentation head ends in a 1x1 convolution, and sows what that reads as `layers.LAST_FEATURES`.
"""
