"""PyTorch state dicts as Flax variables: which name there is which here.

Backbones carry the names of their state dicts, indices joined by `_`: `backbone.layer1.0.conv1` is
`backbone/layer1_0/conv1`. What else is to be known of them their files say, as `TorchNames`; the
tables below are for what stands on them.
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

# Of the heads, that give logits or embeddings; in this order, for a head may have more than one.
LAST_LAYERS = ("classifier", "refine_2", "conv3", "conv2")

# Around a whole model: of DistributedDataParallel, of torch.compile, the usual names of a Lightning
# module's network, and of the original's model with memory.
WRAPPERS = re.compile(r"((module|_orig_mod|model|net|network|encoder_q)\.)*")

# What has no place here by rule, of any backbone: counters, ImageNet classifiers, the original's
# memory.
UNUSED = re.compile(
    r".*\.num_batches_tracked|(fc|classifier)\.(weight|bias)|(segment|pixel)_queue(_ptr)?"
)

# PyTorch's axes in the order they have here, by their number: kernels of convolutions (depthwise
# ones too), scales of the channels of a map, kernels of linear layers.
CHANNELS_LAST = {4: (2, 3, 1, 0), 3: (1, 2, 0), 2: (1, 0)}


@dataclass(frozen=True)
class StateDict:
    """What is known of the tensors of a PyTorch state dict, by the keys they have in it."""

    tensors: dict[str, np.ndarray]  # all that have a place here, in PyTorch's layouts
    names: dict[str, str]  # of each, without what wraps the model
    paths: dict[str, LeafPath]  # of each, where it lives among a network's variables
    leaves: dict[LeafPath, Float[np.ndarray, "..."]]  # what lives there, in the layouts here
    unused: dict[str, str]  # the tensors without a place by rule, and the kind of each


def locate(tensors: Mapping[str, np.ndarray]) -> StateDict:
    """Where each tensor of a state dict lives.

    One that no table knows keeps its name, under which no network has a place for it.
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
    """Every leaf that is not filled, every tensor without a place, every shape that is another one.

    In PyTorch's layouts and names; only of heads, whose names there are many, leaves have ours.

    `expected`: arrays or shapes, as `segmenter.variable_shapes` gives them.
    """
    filled: dict[LeafPath, str] = {}
    problems, wanted = [], flatten(expected)
    for key, path in state.paths.items():
        shape = state.tensors[key].shape
        if path not in wanted:
            problems.append(f"- {key} {shape}: the network has no place for it")
        elif path in filled:
            problems.append(f"- {key}: its place is that of {filled[path]} too")
        elif shape != _torch_shape(wanted[path].shape):
            problems.append(f"! {key}: is {shape}, must be {_torch_shape(wanted[path].shape)}")
        filled[path] = key
    return problems + [
        f"+ {_torch_name(path)} {_torch_shape(leaf.shape)}: no tensor fills it"
        for path, leaf in wanted.items()
        if path not in filled
    ]


def merge(
    given: Variables, fresh: Variables, *, parts: Sequence[str] | None, source: str
) -> tuple[Variables, dict[str, str]]:
    """`fresh` variables with the values `given`, and by name and reason what stayed fresh.

    `parts`: the parts of a network (backbone, cls_head, …) to take; None: all that both have. A
    part that is not given stays fresh, and of LAST_LAYERS one of another width: it has another
    number of classes, or length of embeddings.

    Raises:
        InputError: any other difference; it lists them all. `source` is the folder it names.
    """
    there, merged = flatten(given), flatten(fresh)
    known = {path: x for path, x in there.items() if parts is None or path[1] in parts}
    parts_there, taken = {path[1] for path in there}, {path[1] for path in known}
    kept, problems = {}, []
    for path, leaf in merged.items():
        part, name = path[1], "/".join(path)
        shape = known[path].shape if path in known else None
        is_last = part != "backbone" and path[2] in LAST_LAYERS
        if shape == leaf.shape:
            merged[path] = known[path]
        elif shape is None and part not in taken and part != "backbone":
            kept[part] = "there of another network" if part in parts_there else "not there"
        elif shape is not None and is_last and shape[:-1] == leaf.shape[:-1]:
            kept["/".join(path[1:-1])] = f"{leaf.shape[-1]} wide, there {shape[-1]}"
        else:
            problems.append(f"{name}: is {shape or 'missing'}, must be {leaf.shape}")
    parts_here = {path[1] for path in merged}
    problems += [
        f"{'/'.join(path)}: has no place in the network"
        for path in sorted(known.keys() - merged.keys())
        if path[1] in parts_here
    ]
    if problems:
        raise listed(source, problems)
    return unflatten(merged), kept


def _backbone_family(names: Collection[str]) -> TorchNames:
    """The family of backbones to whose modules most of the tensors belong."""
    bare = [name.removeprefix("backbone.") for name in names]
    return max(
        zoo.backbone_families(),
        key=lambda family: sum(family.modules.fullmatch(name) is not None for name in bare),
    )


def _unused_kind(name: str, family: TorchNames) -> str:
    """What kind of tensor it is if it has no place by rule, else nothing."""
    name = name.removeprefix("backbone.")
    if not (UNUSED.fullmatch(name) or family.unused.fullmatch(name)):
        return ""
    is_counter = name.endswith("num_batches_tracked")
    return "num_batches_tracked" if is_counter else name.split(".")[0]


def _head_table(names: Iterable[str]) -> Table:
    """The original's names, or torchvision's."""
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
