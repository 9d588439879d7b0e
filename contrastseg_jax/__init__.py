"""Pixel-contrast semantic segmentation in JAX (Wang et al., ICCV 2021)."""
