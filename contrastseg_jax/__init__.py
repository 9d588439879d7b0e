"""Pixel-contrast semantic segmentation in JAX (Wang et al., ICCV 2021).

For programs of your own (docs/library.md): the loss and the memory bank, other losses, networks,
training, evaluation, and trained networks. Names are imported lazily, on first use; importing the
package imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; at run time `_MODULES`
    from contrastseg_jax.config.load import load_config as load_config
    from contrastseg_jax.contrast.anchors import batch_candidates as batch_candidates
    from contrastseg_jax.contrast.anchors import sample_anchors as sample_anchors
    from contrastseg_jax.contrast.contrast_step import contrast_step as contrast_step
    from contrastseg_jax.contrast.loss import pixel_contrast_loss as pixel_contrast_loss
    from contrastseg_jax.contrast.memory_bank import enqueue as enqueue
    from contrastseg_jax.contrast.memory_bank import init_memory as init_memory
    from contrastseg_jax.contrast.memory_bank import memory_candidates as memory_candidates
    from contrastseg_jax.contrast.memory_bank import pixel_keys as pixel_keys
    from contrastseg_jax.contrast.memory_bank import segment_keys as segment_keys
    from contrastseg_jax.contrast.unit_length import to_unit_length as to_unit_length
    from contrastseg_jax.evaluation.loaded_network import LoadedNetwork as LoadedNetwork
    from contrastseg_jax.library import evaluate as evaluate
    from contrastseg_jax.library import load as load
    from contrastseg_jax.library import train as train
    from contrastseg_jax.losses.cross_entropy import cross_entropy as cross_entropy
    from contrastseg_jax.losses.dice import dice as dice
    from contrastseg_jax.losses.focal import focal as focal
    from contrastseg_jax.losses.lovasz import lovasz as lovasz
    from contrastseg_jax.losses.ohem import ohem as ohem
    from contrastseg_jax.losses.rmi import rmi as rmi
    from contrastseg_jax.models.zoo import build_model as build_model
    from contrastseg_jax.ops.resize import label_at_stride as label_at_stride
    from contrastseg_jax.ops.resize import resize_bilinear as resize_bilinear
    from contrastseg_jax.structs import Anchors as Anchors
    from contrastseg_jax.structs import Batch as Batch
    from contrastseg_jax.structs import Candidates as Candidates
    from contrastseg_jax.structs import MemoryBank as MemoryBank
    from contrastseg_jax.structs import SegmentationOutput as SegmentationOutput
    from contrastseg_jax.structs import TrainState as TrainState

__version__ = "0.1.0"

_MODULES = {
    "batch_candidates": "contrast.anchors",
    "sample_anchors": "contrast.anchors",
    "contrast_step": "contrast.contrast_step",
    "pixel_contrast_loss": "contrast.loss",
    "enqueue": "contrast.memory_bank",
    "init_memory": "contrast.memory_bank",
    "memory_candidates": "contrast.memory_bank",
    "pixel_keys": "contrast.memory_bank",
    "segment_keys": "contrast.memory_bank",
    "to_unit_length": "contrast.unit_length",
    "cross_entropy": "losses.cross_entropy",
    "dice": "losses.dice",
    "focal": "losses.focal",
    "lovasz": "losses.lovasz",
    "ohem": "losses.ohem",
    "rmi": "losses.rmi",
    "label_at_stride": "ops.resize",
    "resize_bilinear": "ops.resize",
    "build_model": "models.zoo",
    "load_config": "config.load",
    "LoadedNetwork": "evaluation.loaded_network",
    "load": "library",
    "evaluate": "library",
    "train": "library",
    "Anchors": "structs",
    "Batch": "structs",
    "Candidates": "structs",
    "MemoryBank": "structs",
    "SegmentationOutput": "structs",
    "TrainState": "structs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
