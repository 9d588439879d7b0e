"""A whole network by name: backbone and heads."""

import difflib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from contrastseg_jax.errors import InputError
from contrastseg_jax.models.heads import (
    DeepLabV3Head,
    DeepLabV3PlusHead,
    DeepLabV3PlusNeck,
    FCNHead,
    ProjectionHead,
)
from contrastseg_jax.models.hrnet import HRNET_SPECS, HRNet, HRNetSpec
from contrastseg_jax.models.ocr import OCRHead
from contrastseg_jax.models.resnet import RESNET_SPECS, ResNet, ResNetSpec
from contrastseg_jax.structs import SegmentationOutput

Variables = dict[str, Any]  # what a network's `apply` takes: params and batch_stats


@dataclass(frozen=True)
class NetworkSpec:
    """Everything in which one network differs from another: backbone and heads."""

    backbone: HRNetSpec | ResNetSpec
    cls_head: Callable[..., nn.Module] = FCNHead
    neck: Callable[[], nn.Module] | None = None  # joins layer1 to what both heads read
    aux_head: Callable[..., nn.Module] | None = None
    aux_input: str = "last"  # the features that the auxiliary head reads
    dropout_rate: float = 0.1  # in front of the logits, as the network's original has it
    aux_dropout: float = 0.0  # the auxiliary head's share of it
    aux_guides: bool = False  # cls_head reads the auxiliary logits too


def _of_hrnet(name: str, spec: HRNetSpec) -> dict[str, NetworkSpec]:
    ocr_aux = partial(FCNHead, use_bias=(True, True))
    return {
        name: NetworkSpec(spec),
        f"{name}_ocr": NetworkSpec(
            spec, OCRHead, aux_head=ocr_aux, aux_guides=True, dropout_rate=0.05
        ),
    }


def _of_resnet(name: str, spec: ResNetSpec) -> dict[str, NetworkSpec]:
    """The original's networks, with its stem and max-pool, and the standard ones."""
    channels = 2048 if spec.block == "bottleneck" else 512
    stride_8 = replace(spec, output_stride=8)
    original = replace(stride_8, stem="deep", ceil_mode=True)
    # torchvision's heads; its FCN drops single values, these whole channels.
    fcn = partial(FCNHead, width=channels // 4, use_bias=(False, True))
    fcn_aux = partial(FCNHead, width=channels // 8, use_bias=(False, True))
    deeplab = partial(DeepLabV3Head, width=256, project_size=1, refine_relu=True)
    dsn = partial(FCNHead, width=256, use_bias=(True, True))
    ocr_dsn = partial(FCNHead, width=512, use_bias=(True, True))
    return {
        f"fcn_{name}": NetworkSpec(
            stride_8, fcn, aux_head=fcn_aux, aux_input="layer3", aux_dropout=1.0
        ),
        f"deeplabv3_{name}": NetworkSpec(
            original, DeepLabV3Head, aux_head=dsn, aux_input="layer3", dropout_rate=0.0
        ),
        f"deeplabv3_{name}_torchvision": NetworkSpec(
            stride_8,
            deeplab,
            aux_head=fcn_aux,
            aux_input="layer3",
            dropout_rate=0.5,
            aux_dropout=0.2,
        ),
        f"deeplabv3plus_{name}": NetworkSpec(
            replace(spec, output_stride=16), DeepLabV3PlusHead, neck=DeepLabV3PlusNeck
        ),
        f"ocr_{name}": NetworkSpec(
            original,
            OCRHead,
            aux_head=ocr_dsn,
            aux_input="layer3",
            dropout_rate=0.05,
            aux_dropout=1.0,
            aux_guides=True,
        ),
    }


NETWORKS: dict[str, NetworkSpec] = {}
for _name, _spec in HRNET_SPECS.items():
    NETWORKS |= _of_hrnet(_name, _spec)
for _name, _spec in RESNET_SPECS.items():
    NETWORKS |= _of_resnet(_name, _spec)


class Segmenter(nn.Module):
    """A backbone with a segmentation head and, for training, a projection head.

    The original's `lib/models/nets/`: `HRNet_W48_CONTRAST`, `HRNet_W48_OCR_CONTRAST`,
    `DeepLabV3Contrast`, `SpatialOCRNet`.
    """

    backbone: nn.Module
    neck: nn.Module | None
    cls_head: nn.Module
    aux_head: nn.Module | None
    aux_input: str
    aux_guides: bool
    num_classes: int
    proj_dim: int  # 0: no projection head
    dtype: str  # in which it computes; results are float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> SegmentationOutput:
        """Logits, and in training embeddings, at the network's stride; `image` is normalised.

        What only training needs is left out otherwise: the projection head, and the auxiliary head
        unless the logits depend on it.
        """
        training = train or self.is_initializing()
        features = self.backbone(image.astype(self.dtype), train=train)
        x = features["last"]
        if self.neck is not None:
            x = self.neck(x, features["layer1"], train=train)
        aux_logits = embedding = None
        if self.aux_head is not None and (training or self.aux_guides):
            aux_logits = self.aux_head(features[self.aux_input], train=train).astype(jnp.float32)
        guide = (aux_logits,) if self.aux_guides else ()
        logits = self.cls_head(x, *guide, train=train).astype(jnp.float32)
        if self.proj_dim and training:
            embedding = ProjectionHead(self.proj_dim, name="proj_head")(x, train=train)
        return SegmentationOutput(logits=logits, embedding=embedding, aux_logits=aux_logits)


def model_names() -> tuple[str, ...]:
    """Every name that `build` knows."""
    return tuple(NETWORKS)


def sharing_backbone(name: str) -> tuple[str, ...]:
    """Every network whose backbone has the same weights; strides and dilations have none."""

    def with_weights(spec: HRNetSpec | ResNetSpec) -> HRNetSpec | ResNetSpec:
        if isinstance(spec, HRNetSpec):
            return spec
        return replace(spec, output_stride=32, ceil_mode=False, multi_grid=())

    backbone = with_weights(NETWORKS[name].backbone)
    return tuple(n for n, spec in NETWORKS.items() if with_weights(spec.backbone) == backbone)


def stage_names(name: str) -> tuple[str, ...]:
    """The stages of a network's backbone that `remat` may name."""
    return (HRNet if isinstance(NETWORKS[name].backbone, HRNetSpec) else ResNet).STAGES


def build(
    name: str,
    *,
    num_classes: int,
    proj_dim: int,
    dropout_rate: float,
    dtype: str = "float32",
    remat: tuple[str, ...] = (),
) -> Segmenter:
    """The network `name`; an InputError with the nearest names where there is none.

    `remat`: stages of the backbone (`stage_names`) whose insides are computed again for the
    gradient instead of kept.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, model_names()) or model_names()
        raise InputError(f"model.name = {name!r}: no such network; nearest: {', '.join(near)}")
    spec = NETWORKS[name]
    if isinstance(spec.backbone, HRNetSpec):
        backbone = HRNet(spec.backbone, remat)
    else:
        backbone = ResNet(spec.backbone, remat)
    neck = spec.neck() if spec.neck else None
    cls_head = spec.cls_head(num_classes=num_classes, dropout_rate=dropout_rate)
    aux_head = None
    if spec.aux_head:
        aux_rate = spec.aux_dropout * dropout_rate
        aux_head = spec.aux_head(num_classes=num_classes, dropout_rate=aux_rate)
    return Segmenter(
        backbone=backbone,
        neck=neck,
        cls_head=cls_head,
        aux_head=aux_head,
        aux_input=spec.aux_input,
        aux_guides=spec.aux_guides,
        num_classes=num_classes,
        proj_dim=proj_dim,
        dtype=dtype,
    )


def variable_shapes(model: nn.Module) -> Any:
    """Shapes and types of `params` and `batch_stats`: what a file of weights has to fill."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    return jax.eval_shape(lambda rng, x: model.init(rng, x, train=False), jax.random.key(0), image)


class TrainingShapes(NamedTuple):
    """What the size of a training batch makes of a network."""

    output_size: tuple[int, int]  # rows and columns of the maps of logits and embeddings
    num_values: dict[str, int]  # by BatchNorm: how many a channel's mean and variance are taken of


@cache
def training_shapes(model: Segmenter, image_shape: tuple[int, int, int]) -> TrainingShapes:
    """Shapes in training on `image_shape`: images of the global batch, height, width.

    Traced, which takes a second or so; nothing is computed.
    """
    num_values = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            num_values["/".join(context.module.path)] = math.prod(args[0].shape[:-1])
        return call(*args, **kwargs)

    def outputs(rng: Array, image: Array) -> SegmentationOutput:
        rngs = {"params": rng, "dropout": rng}
        return cast(SegmentationOutput, model.init_with_output(rngs, image, train=True)[0])

    image = jax.ShapeDtypeStruct((*image_shape, 3), "float32")
    with nn.intercept_methods(note):
        logits = jax.eval_shape(outputs, jax.random.key(0), image).logits
    return TrainingShapes(logits.shape[1:3], num_values)


def init_variables(model: nn.Module, seed: int) -> Variables:
    """Fresh variables as NumPy arrays, for the caller to place on devices.

    He's normal distribution over the fan-in for kernels, 1 for scales and variances, 0 for biases
    and means. (The original's DeepLab decoder and projection head have it; its HRNet leaves
    PyTorch's defaults, to be overwritten by ImageNet weights.)

    Drawn on the host because compiling a generator for each kernel takes 43 s for HRNet-W48.
    Each array has its own stream, so that networks share the values of the parts they share.
    """

    def initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key != "kernel":
            ones = path[-1].key in ("scale", "var")
            return np.full(leaf.shape, 1.0 if ones else 0.0, leaf.dtype)
        stream = zlib.crc32(jax.tree_util.keystr(path).encode())
        kernel = np.random.default_rng((seed, stream)).standard_normal(leaf.shape, leaf.dtype)
        return kernel * np.float32(math.sqrt(2 / math.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(initial, variable_shapes(model))
