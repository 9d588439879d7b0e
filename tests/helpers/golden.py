"""What the networks of the original compute with the weights of `recipe.py`."""

import gzip
import json

import numpy as np
from paths import STORED
from recipe import recipe_array

DATA = STORED / "networks"


def shapes(name):
    """The shape of each tensor in the original's state dict of a network."""
    stored = json.loads(gzip.decompress((DATA / "state_dicts.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in stored[name].items()}


def tensors(name):
    """That state dict, with the recipe's weights."""
    return {key: recipe_array(key, shape) for key, shape in shapes(name).items()}


def outputs(name):
    """What was stored of a network's outputs and gradients, in PyTorch's layout."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def image():
    """The input of the stored outputs, in this project's layout."""
    image = np.random.Generator(np.random.PCG64(11)).normal(size=(2, 3, 64, 96))
    return image.astype(np.float32).transpose(0, 2, 3, 1)


def to_torch(x):
    return np.asarray(x).transpose(0, 3, 1, 2)
