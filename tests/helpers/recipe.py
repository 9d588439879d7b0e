"""Weights that are a function of a tensor's name and shape, so that none have to be stored.

The recipe of the stored figures of the original, and the image for those of torchvision and timm.
"""

import zlib

import numpy as np


def recipe_array(name, shape):
    """The tensor `name` of a PyTorch state dict, in PyTorch's layout."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        array = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        array = rng.normal(0.0, 0.1, shape)
    elif len(shape) == 1 and name.endswith("weight"):
        array = rng.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        array = rng.normal(0.0, 0.05, shape)
    else:
        array = rng.normal(0.0, np.sqrt(0.6 / np.prod(shape[1:])), shape)
    return array.astype(np.float32)


def recipe_tensors(shapes):
    """A whole state dict."""
    return {name: recipe_array(name, shape) for name, shape in shapes.items()}


def image():
    """Two images in this project's layout, of sides that are odd and even at stride 2 (33, 48)."""
    rng = np.random.Generator(np.random.PCG64(7))
    return rng.normal(size=(2, 65, 95, 3)).astype(np.float32)
