"""Pixel-contrast semantic segmentation in JAX (Wang et al., ICCV 2021).

For use in your own code: the loss, the memory bank and the structs they take (docs/method.md).
Names are imported lazily, on first use; importing the package imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; at run time `_MODULES`
    from contrastseg_jax.contrast.anchors import batch_candidates as batch_candidates
    from contrastseg_jax.contrast.anchors import sample_anchors as sample_anchors
    from contrastseg_jax.contrast.loss import pixel_contrast_loss as pixel_contrast_loss
    from contrastseg_jax.contrast.memory_bank import enqueue as enqueue
    from contrastseg_jax.contrast.memory_bank import init_memory as init_memory
    from contrastseg_jax.contrast.memory_bank import memory_candidates as memory_candidates
    from contrastseg_jax.contrast.memory_bank import pixel_keys as pixel_keys
    from contrastseg_jax.contrast.memory_bank import segment_keys as segment_keys
    from contrastseg_jax.ops.resize import label_at_stride as label_at_stride
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
    "pixel_contrast_loss": "contrast.loss",
    "enqueue": "contrast.memory_bank",
    "init_memory": "contrast.memory_bank",
    "memory_candidates": "contrast.memory_bank",
    "pixel_keys": "contrast.memory_bank",
    "segment_keys": "contrast.memory_bank",
    "label_at_stride": "ops.resize",
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
