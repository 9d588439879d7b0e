"""PyTorch state dicts of networks here, spelt with the names that files have."""

import re
import zlib

import numpy as np
from flax.traverse_util import flatten_dict

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.weights.torch_names import locate, mismatches

ORIGINAL_FCN = {  # modules here and in the original's HRNet
    "cls_head/conv1": "cls_head.0",
    "cls_head/bn1": "cls_head.1.0",
    "cls_head/conv2": "cls_head.3",
    "proj_head/conv1": "proj_head.proj.0",
    "proj_head/bn1": "proj_head.proj.1.0",
    "proj_head/conv2": "proj_head.proj.2",
}


def empty(path, shape):
    """An array of any size that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def drawn(path, shape):
    """Values of a size that a network bears, each leaf with its own."""
    rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
    if path[-1] in ("scale", "var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)


def spelt_out(name, rename, *, num_classes=19, proj_dim=0, values=empty):
    """A state dict of the names that `rename` gives to the modules of a network here."""
    model = zoo.build_model(name, num_classes=num_classes, proj_dim=proj_dim, dropout_rate=0.0)
    tensors = {}
    for path, leaf in flatten_dict(segmenter.variable_shapes(model)).items():
        shape = leaf.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) > 1:  # of a linear layer, or the scale of a map's channels
            shape = (shape[-1], *shape[:-1])
        tensor = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
        tensor = tensor.get(path[-1], path[-1].replace("var", "running_var"))
        tensors[f"{rename('/'.join(path[1:-1]))}.{tensor}"] = values(path, shape)
    return tensors


def bare_name(path):
    """The name of a backbone's module in a file of the backbone alone."""
    name = path.removeprefix("backbone/").replace("/", ".")
    return re.sub(r"_(\d)", r".\1", name)


def original_name(path):
    """The name of a module in the original's HRNet with its plain head."""
    return ORIGINAL_FCN.get(path) or f"backbone.{bare_name(path)}"


def tiny(**settings):
    """The state dict of `hrnet_tiny` as the original would have saved it."""
    return spelt_out("hrnet_tiny", original_name, values=drawn, **settings)


def backbone_of(name):
    """The state dict of a backbone on its own."""
    tensors = spelt_out(name, bare_name, values=drawn)
    return {key: array for key, array in tensors.items() if not re.match(r"\w+_head|neck", key)}


def filled(tensors, expected):
    """The variables that a state dict is, which fill `expected`: every leaf and nothing else."""
    assert mismatches(locate(tensors), expected) == []
    return flax_variables(tensors)


def flax_variables(tensors):
    """The variables that a state dict is, whatever network they fit."""
    return segmenter.unflatten(locate(tensors).leaves)
