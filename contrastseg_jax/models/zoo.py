"""Networks by name: which backbone with which heads."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import flax.linen as nn

from contrastseg_jax.errors import InputError
from contrastseg_jax.models.backbones import convnext, hrnet, resnet
from contrastseg_jax.models.backbones.contract import Backbone, TorchNames
from contrastseg_jax.models.backbones.convnext import CONVNEXT_SPECS, ConvNeXtSpec
from contrastseg_jax.models.backbones.hrnet import HRNET_SPECS, HRNetSpec
from contrastseg_jax.models.backbones.resnet import RESNET_SPECS, ResNetSpec
from contrastseg_jax.models.heads.deeplab import DeepLabV3Head, DeepLabV3PlusHead, DeepLabV3PlusNeck
from contrastseg_jax.models.heads.fcn import FCNHead
from contrastseg_jax.models.heads.fusion import FusionNeck
from contrastseg_jax.models.heads.ocr import OCRHead
from contrastseg_jax.models.segmenter import Segmenter


@dataclass(frozen=True)
class NetworkSpec:
    """Everything in which one network differs from another: backbone and heads."""

    backbone: Backbone
    cls_head: Callable[..., nn.Module] = FCNHead
    neck: Callable[[], nn.Module] | None = None  # makes one map of the features of several layers
    aux_head: Callable[..., nn.Module] | None = None
    aux_input: str = "last"  # the features that the auxiliary head reads; or "neck"
    dropout_rate: float = 0.1  # in front of the logits, as the network's original has it
    aux_dropout: float = 0.0  # the auxiliary head's share of it
    aux_guides: bool = False  # cls_head reads the auxiliary logits too


def _of_hrnet(name: str, spec: HRNetSpec) -> dict[str, NetworkSpec]:
    backbone, ocr_aux = hrnet.backbone(spec), partial(FCNHead, use_bias=(True, True))
    return {
        name: NetworkSpec(backbone),
        f"{name}_ocr": NetworkSpec(
            backbone, OCRHead, aux_head=ocr_aux, aux_guides=True, dropout_rate=0.05
        ),
    }


def _of_resnet(name: str, spec: ResNetSpec) -> dict[str, NetworkSpec]:
    """The original's networks, with its stem and max-pool, and the standard ones."""
    channels = 2048 if spec.block == "bottleneck" else 512
    stride_8 = resnet.backbone(replace(spec, output_stride=8))
    stride_16 = resnet.backbone(replace(spec, output_stride=16))
    original = resnet.backbone(replace(spec, output_stride=8, stem="deep", ceil_mode=True))
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
        f"deeplabv3plus_{name}": NetworkSpec(stride_16, DeepLabV3PlusHead, neck=DeepLabV3PlusNeck),
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


def _of_convnext(name: str, spec: ConvNeXtSpec) -> dict[str, NetworkSpec]:
    """Heads at stride 4, for the last features are of stride 32, which no dilation refines."""
    backbone, ocr_aux = convnext.backbone(spec), partial(FCNHead, use_bias=(True, True))
    # Rates for output stride 32: half of those for 16.
    joined = partial(DeepLabV3PlusNeck, rates=(3, 6, 9))
    return {
        f"fcn_{name}": NetworkSpec(backbone, neck=FusionNeck),
        f"deeplabv3plus_{name}": NetworkSpec(backbone, DeepLabV3PlusHead, neck=joined),
        f"ocr_{name}": NetworkSpec(
            backbone,
            OCRHead,
            neck=FusionNeck,
            aux_head=ocr_aux,
            aux_input="neck",
            aux_guides=True,
            dropout_rate=0.05,
        ),
    }


NETWORKS: dict[str, NetworkSpec] = {}
for _name, _spec in HRNET_SPECS.items():
    NETWORKS |= _of_hrnet(_name, _spec)
for _name, _spec in RESNET_SPECS.items():
    NETWORKS |= _of_resnet(_name, _spec)
for _name, _spec in CONVNEXT_SPECS.items():
    NETWORKS |= _of_convnext(_name, _spec)


def model_names() -> tuple[str, ...]:
    """Every name that `build_model` knows."""
    return tuple(NETWORKS)


def sharing_backbone(name: str) -> tuple[str, ...]:
    """Every network whose backbone has the same weights; strides and dilations have none."""
    weights = NETWORKS[name].backbone.weights
    return tuple(n for n, spec in NETWORKS.items() if spec.backbone.weights == weights)


def stage_names(name: str) -> tuple[str, ...]:
    """The stages of a network's backbone that `remat` may name."""
    return NETWORKS[name].backbone.stages


def part_names(name: str) -> tuple[str, ...]:
    """What `freeze` may name: the whole backbone of a network, or its parts."""
    return ("backbone", *NETWORKS[name].backbone.parts)


def backbone_families() -> tuple[TorchNames, ...]:
    """Each family of backbones once."""
    return tuple({spec.backbone.torch_names: None for spec in NETWORKS.values()})


def build_model(
    name: str,
    *,
    num_classes: int,
    proj_dim: int = 0,
    dropout_rate: float | None = None,
    proj_input: str = "features",
    dtype: str = "float32",
    remat: tuple[str, ...] = (),
    freeze: tuple[str, ...] = (),
) -> Segmenter:
    """The network `name`; an InputError with the nearest names where there is none.

    `proj_dim`: length of the embeddings that a projection head makes in training; 0: it has none.
    `dropout_rate`: None for the network's own. `proj_input`: what that head reads, the features
    or "last". `remat`: stages of the backbone (`stage_names`) whose insides are computed again for
    the gradient instead of kept. `freeze`: parts of the backbone (`part_names`) that are not
    trained.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, model_names()) or model_names()
        raise InputError(f"model.name = {name!r}: no such network; nearest: {', '.join(near)}")
    spec = NETWORKS[name]
    dropout_rate = spec.dropout_rate if dropout_rate is None else dropout_rate
    neck = spec.neck() if spec.neck else None
    cls_head = spec.cls_head(num_classes=num_classes, dropout_rate=dropout_rate)
    aux_head = None
    if spec.aux_head:
        aux_rate = spec.aux_dropout * dropout_rate
        aux_head = spec.aux_head(num_classes=num_classes, dropout_rate=aux_rate)
    parts = spec.backbone.parts
    freeze = tuple(parts) if "backbone" in freeze else freeze
    return Segmenter(
        backbone=spec.backbone.build(remat, freeze),
        neck=neck,
        cls_head=cls_head,
        aux_head=aux_head,
        aux_input=spec.aux_input,
        aux_guides=spec.aux_guides,
        num_classes=num_classes,
        proj_dim=proj_dim,
        proj_input=proj_input,
        dtype=dtype,
        frozen=tuple(beginning for part in freeze for beginning in parts[part]),
    )
