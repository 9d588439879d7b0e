"""What the original computes, as far as it is stored beside this project; tests skip without it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[2] / "shared/reference/golden"


def needs_golden():
    """Skip the test where the stored figures are not."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")


def keys(name):
    """The original's state dict: dtype and shape by key."""
    needs_golden()
    return json.loads((GOLDEN / f"models/{name}.keys.json").read_text())["state"]


def outputs(name):
    """Stored outputs of the recipe's weights, in PyTorch's layout."""
    needs_golden()
    with np.load(GOLDEN / f"models/{name}.npz") as arrays:
        return dict(arrays)


def recipe_array(name, shape, dtype="float32"):
    """The recipe's weights: a function of the name and shape of a tensor."""
    needs_golden()
    spec = importlib.util.spec_from_file_location("recipe", GOLDEN / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.recipe_array(name, shape, dtype)


def recipe_tensors(name):
    """A whole state dict of the recipe's weights."""
    return {key: recipe_array(key, shape, dtype) for key, (dtype, shape) in keys(name).items()}


def image():
    """The input of the stored outputs, in this project's layout."""
    image = np.random.Generator(np.random.PCG64(11)).normal(size=(2, 3, 64, 96))
    return image.astype(np.float32).transpose(0, 2, 3, 1)


def to_torch(x):
    return np.asarray(x).transpose(0, 3, 1, 2)
