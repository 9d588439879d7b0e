"""The original's state dict as Flax variables: the names of HRNet with its two heads."""

import re

from flax.traverse_util import unflatten_dict

HEADS = {
    "cls_head.0": "cls_head.conv1",
    "cls_head.1.0": "cls_head.bn1",
    "cls_head.3": "cls_head.conv2",
    "proj_head.proj.0": "proj_head.conv1",
    "proj_head.proj.1.0": "proj_head.bn1",
    "proj_head.proj.2": "proj_head.conv2",
}


def flax_path(key, ndim):
    """Where the tensor `key` lives: collection, modules, leaf."""
    module, tensor = key.rsplit(".", 1)
    if tensor.startswith("running_"):
        collection, leaf = "batch_stats", tensor.removeprefix("running_")
    else:
        weight = "kernel" if ndim == 4 else "scale"
        collection, leaf = "params", weight if tensor == "weight" else tensor
    modules = re.sub(r"\.(\d+)", r"_\1", HEADS.get(module, module))
    return collection, *modules.split("."), leaf


def flax_variables(tensors):
    """Variables from `{key: array}`; PyTorch's OIHW kernels become HWIO."""
    return unflatten_dict(
        {
            flax_path(key, array.ndim): array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
            for key, array in tensors.items()
            if not key.endswith("num_batches_tracked")
        }
    )
