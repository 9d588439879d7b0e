"""Map the names of PyTorch state dicts to Flax variables.

Backbones keep the names of their state dicts, with indices joined by `_`: `backbone.layer1.0.conv1`
is `backbone/layer1_0/conv1`. Exceptions are in the backbone's file, as `TorchNames`; the tables
below are for the heads.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from contrastseg_jax.errors import listed
from contrastseg_jax.models import zoo
from contrastseg_jax.models.backbones.contract import Table, TorchNames
from contrastseg_jax.models.segmenter import LeafPath, Variables, flatten, unflatten

# The BN of a `BNReLU` is element 0 of an element, hence `.1.0`.
ORIGINAL: Table = (
    (r"proj_head\.proj\.0", "proj_head.conv1"),
    (r"proj_head\.proj\.1\.0", "proj_head.bn1"),
    (r"proj_head\.proj\.2", "proj_head.conv2"),
    (r"(aux_head|dsn_head|decoder\.layer_dsn)\.0", "aux_head.conv1"),
    (r"(aux_head|dsn_head|decoder\.layer_dsn)\.1\.0", "aux_head.bn1"),
    (r"(aux_head|dsn_head|decoder\.layer_dsn)\.[23]", "aux_head.conv2"),
    (r"cls_head\.0", "cls_head.conv1"),
    (r"cls_head\.1\.0", "cls_head.bn1"),
    (r"cls_head\.3", "cls_head.conv2"),
    (r"decoder\.layer_aspp\.(b[0-3]|project)\.(\d)(\.0)?", r"cls_head.aspp.\1_\2"),
    (r"decoder\.layer_aspp\.b4\.1", "cls_head.aspp.b4_0"),
    (r"decoder\.layer_aspp\.b4\.2\.0", "cls_head.aspp.b4_1"),
    (r"decoder\.refine\.(\d)", r"cls_head.refine_\1"),
    (r"conv_?3x3\.(\d)(\.0)?", r"cls_head.conv3x3_\1"),
    (
        r"(?:ocr_distri|spatial_ocr)_head\.(?:object_context_block\.)?(\w+)\.(\d)(\.0)?",
        r"cls_head.\1_\2",
    ),
    (r"cls_head|head", "cls_head.classifier"),  # of OCR
)

TORCHVISION_AUX: Table = (
    (r"aux_classifier\.0", "aux_head.conv1"),
    (r"aux_classifier\.1", "aux_head.bn1"),
    (r"aux_classifier\.4", "aux_head.conv2"),
)

TORCHVISION_FCN: Table = (
    (r"classifier\.0", "cls_head.conv1"),
    (r"classifier\.1", "cls_head.bn1"),
    (r"classifier\.4", "cls_head.conv2"),
    *TORCHVISION_AUX,
)

TORCHVISION_DEEPLAB: Table = (
    (r"classifier\.0\.convs\.([0-3])\.(\d)", r"cls_head.aspp.b\1_\2"),
    (r"classifier\.0\.convs\.4\.1", "cls_head.aspp.b4_0"),
    (r"classifier\.0\.convs\.4\.2", "cls_head.aspp.b4_1"),
    (r"classifier\.0\.project\.(\d)", r"cls_head.aspp.project_\1"),
    (r"classifier\.1", "cls_head.refine_0"),
    (r"classifier\.2", "cls_head.refine_1"),
    (r"classifier\.4", "cls_head.refine_2"),
    *TORCHVISION_AUX,
)

# Layers of the heads that compute logits or embeddings; the first one that a head has counts.
LAST_LAYERS = ("classifier", "refine_2", "conv3", "conv2")

# Prefixes of wrapped models: DistributedDataParallel, torch.compile, the usual attributes of a
# Lightning module, and the original's model with memory.
WRAPPERS = re.compile(r"((module|_orig_mod|model|net|network|encoder_q)\.)*")

# Tensors not used, for any backbone: counters, ImageNet classifiers, the original's memory.
UNUSED = re.compile(
    r".*\.num_batches_tracked|(fc|classifier)\.(weight|bias)|(segment|pixel)_queue(_ptr)?"
)

# Permutations of PyTorch's axes, by their number: kernels of convolutions (depthwise too),
# per-channel scales, kernels of linear layers.
CHANNELS_LAST = {4: (2, 3, 1, 0), 3: (1, 2, 0), 2: (1, 0)}


@dataclass(frozen=True)
class StateDict:
    """The tensors of a PyTorch state dict and their Flax variables, by the state dict's keys."""

    tensors: dict[str, np.ndarray]  # the tensors that are used, in PyTorch's layouts
    names: dict[str, str]  # of each, without WRAPPERS
    paths: dict[str, LeafPath]  # of each, the path of its Flax variable
    leaves: dict[LeafPath, Float[np.ndarray, "..."]]  # Flax variables, in Flax's layouts
    unused: dict[str, str]  # the kind of each tensor that is not used


def locate(tensors: Mapping[str, np.ndarray]) -> StateDict:
    """Map each tensor of a state dict to a variable.

    Unknown tensors keep their names, which match no variable of any network.
    """
    names = {key: WRAPPERS.sub("", key, count=1) for key in tensors}
    family = _backbone_family(names.values())
    unused = {key: kind for key, name in names.items() if (kind := _unused_kind(name, family))}
    names = {key: name for key, name in names.items() if key not in unused}
    renamed, heads = family.renamed(names.values()), _head_table(names.values())
    paths = {}
    for key, name in names.items():
        module, _, leaf = name.rpartition(".")
        if family.modules.fullmatch(name):
            module = f"backbone.{_module_name(module, renamed)}"
        if module.startswith("backbone."):
            module = re.sub(r"\.(\d+)", r"_\1", module)
        else:
            module = _module_name(module, heads)
        paths[key] = _leaf_path(module, leaf, tensors[key].ndim)
    return StateDict(
        tensors={key: tensors[key] for key in paths},
        names=names,
        paths=paths,
        leaves={path: _flax_layout(tensors[key]) for key, path in paths.items()},
        unused=unused,
    )


def mismatches(state: StateDict, expected: Variables) -> list[str]:
    """Missing and unexpected tensors, and shapes that differ.

    In PyTorch's layouts and names; but for missing tensors of heads, which have several, in ours.

    `expected`: arrays or shapes, as `segmenter.variable_shapes` gives them.
    """
    filled: dict[LeafPath, str] = {}
    problems, wanted = [], flatten(expected)
    for key, path in state.paths.items():
        shape = state.tensors[key].shape
        if path not in wanted:
            problems.append(f"- {key} {shape}: unexpected, the network has no such tensor")
        elif path in filled:
            problems.append(f"- {key}: duplicate of {filled[path]}")
        elif shape != _torch_shape(wanted[path].shape):
            problems.append(f"! {key}: is {shape}, must be {_torch_shape(wanted[path].shape)}")
        filled[path] = key
    return problems + [
        f"+ {_torch_name(path)} {_torch_shape(leaf.shape)}: missing"
        for path, leaf in wanted.items()
        if path not in filled
    ]


def merge(
    given: Variables, fresh: Variables, *, parts: Sequence[str] | None, source: str
) -> tuple[Variables, dict[str, str]]:
    """`fresh` variables replaced by those `given`, and by name the reason what was not replaced.

    `parts`: the parts of a network (backbone, cls_head, …) to replace; None: all that both have.
    Parts that are not given stay fresh, and so does one of LAST_LAYERS with another width: another
    number of classes or embedding dimension.

    Raises:
        InputError: for any other difference; it lists all. `source` is the folder name in it.
    """
    source_leaves, merged = flatten(given), flatten(fresh)
    known = {path: x for path, x in source_leaves.items() if parts is None or path[1] in parts}
    given_parts, taken = {path[1] for path in source_leaves}, {path[1] for path in known}
    kept, problems = {}, []
    for path, leaf in merged.items():
        part, name = path[1], "/".join(path)
        shape = known[path].shape if path in known else None
        is_last = part != "backbone" and path[2] in LAST_LAYERS
        if shape == leaf.shape:
            merged[path] = known[path]
        elif shape is None and part not in taken and part != "backbone":
            kept[part] = "of another network" if part in given_parts else "missing"
        elif shape is not None and is_last and shape[:-1] == leaf.shape[:-1]:
            kept["/".join(path[1:-1])] = f"size {leaf.shape[-1]}, weights have {shape[-1]}"
        else:
            problems.append(f"{name}: is {shape or 'missing'}, must be {leaf.shape}")
    parts_here = {path[1] for path in merged}
    problems += [
        f"{'/'.join(path)}: unexpected, the network has no such variable"
        for path in sorted(known.keys() - merged.keys())
        if path[1] in parts_here
    ]
    if problems:
        raise listed(source, problems)
    return unflatten(merged), kept


def _backbone_family(names: Collection[str]) -> TorchNames:
    """The backbone family whose module names match most of the tensors."""
    bare = [name.removeprefix("backbone.") for name in names]
    return max(
        zoo.backbone_families(),
        key=lambda family: sum(family.modules.fullmatch(name) is not None for name in bare),
    )


def _unused_kind(name: str, family: TorchNames) -> str:
    """The kind of a tensor that is not used; empty if it is used."""
    name = name.removeprefix("backbone.")
    if not (UNUSED.fullmatch(name) or family.unused.fullmatch(name)):
        return ""
    is_counter = name.endswith("num_batches_tracked")
    return "num_batches_tracked" if is_counter else name.split(".")[0]


def _head_table(names: Iterable[str]) -> Table:
    """The table of head names: the original's or torchvision's."""
    of_classifier = [name for name in names if name.startswith("classifier.0.")]
    if not of_classifier:
        return ORIGINAL
    is_deeplab = any(name.startswith("classifier.0.convs.") for name in of_classifier)
    return TORCHVISION_DEEPLAB if is_deeplab else TORCHVISION_FCN


def _module_name(module: str, table: Table) -> str:
    for pattern, name in table:
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(name)
    return module


def _leaf_path(module: str, tensor: str, ndim: int) -> LeafPath:
    modules = tuple(module.split("."))
    if tensor.startswith("running_"):
        return "batch_stats", *modules, tensor.removeprefix("running_")
    weight = "kernel" if ndim > 1 else "scale"
    return "params", *modules, weight if tensor == "weight" else tensor


def _torch_name(path: LeafPath) -> str:
    _, part, *modules, leaf = path
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    if part == "backbone":
        modules = [re.sub(r"_(\d+)", r".\1", module) for module in modules]
    return ".".join([part, *modules, names.get(leaf, leaf)])


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = CHANNELS_LAST.get(len(shape), range(len(shape)))
    return tuple(size for _, size in sorted(zip(axes, shape, strict=True)))


def _flax_layout(array: np.ndarray) -> Float[np.ndarray, "..."]:
    array = array.astype(np.float32, copy=False)
    return array.transpose(CHANNELS_LAST.get(array.ndim, range(array.ndim)))
