"""Heads: logits and embeddings from features."""
