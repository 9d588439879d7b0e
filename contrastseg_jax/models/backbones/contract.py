"""What a backbone's file says of it, so that nobody else need know which backbone it is."""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from contrastseg_jax.structs import IMAGENET, ImageFormat

Table = tuple[tuple[str, str], ...]  # patterns of PyTorch's modules, and their names here
Shapes = Mapping[tuple[str, ...], tuple[int, ...]]  # of a backbone's leaves by path below it


@dataclass(frozen=True)
class TorchNames:
    """How PyTorch's files name the tensors of a family of backbones.

    The names are those of the modules here, indices joined by `_`: `layer1.0.conv1.weight` is
    `layer1_0/conv1/kernel`. A file of a whole network has `backbone.` in front of them.
    """

    family: str  # for people
    modules: re.Pattern[str]  # those at the top of a file of the backbone alone
    unused: re.Pattern[str] = re.compile(r"(?!)")  # tensors besides: classifiers of ImageNet
    # Of a file with these tensors, the modules at its top that have other names here.
    renamed: Callable[[Collection[str]], Table] = lambda _: ()


@dataclass(frozen=True)
class Peer:
    """The same backbone in a library of PyTorch's, to compare outputs with."""

    library: str  # "timm" or "torchvision"
    name: str
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # timm's of `create_model`, torchvision's of `create_feature_extractor`


@dataclass(frozen=True)
class Backbone:
    """One backbone: what networks, memory settings and files of weights need to know of it.

    `build(remat, freeze)` gives a Linen module, whose `__call__(image, *, train)` returns
    `layers.Features`. It computes the insides of the stages in `remat` again for their gradient;
    the parts in `freeze` it computes in training as outside it. Modules of a stage are called as
    the stage is, with an index behind it.
    """

    build: Callable[[tuple[str, ...], tuple[str, ...]], nn.Module]
    stages: tuple[str, ...]
    # What may be frozen, from the image on: how the names of its modules begin. A stage has with it
    # what leads there from the one before. Every module belongs to one.
    parts: Mapping[str, tuple[str, ...]]
    weights: Hashable  # equal for backbones that the same weights fit: strides have none
    torch_names: TorchNames
    recognizes: Callable[[Shapes], bool]  # by a few leaves; all of them are checked afterwards
    image_format: ImageFormat = IMAGENET  # of weights that were trained on ImageNet
    whole_format: ImageFormat = IMAGENET  # of weights in a file of a whole network
    peer: Peer | None = None


def count_modules(shapes: Shapes, stage: str) -> int:
    """How many modules of a stage there are."""
    return len({path[0] for path in shapes if path[0].startswith(f"{stage}_")})


def kernel_width(shapes: Shapes, *module: str) -> int:
    """How many channels come out of a layer; 0 if there is none."""
    return shapes.get((*module, "kernel"), (0,))[-1]
