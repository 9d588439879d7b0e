"""A whole network by name: backbone and heads."""

import difflib
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from contrastseg_jax.errors import InputError
from contrastseg_jax.models.heads import FCNHead, ProjectionHead
from contrastseg_jax.models.hrnet import HRNET_SPECS, HRNet
from contrastseg_jax.structs import SegmentationOutput


class Segmenter(nn.Module):
    """A backbone with a segmentation head and, for training, a projection head.

    The original's `HRNet_W48_CONTRAST` in `lib/models/nets/hrnet.py`.
    """

    backbone: nn.Module
    num_classes: int
    proj_dim: int  # 0: no projection head
    dropout_rate: float

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> SegmentationOutput:
        """Logits, and in training embeddings, at the backbone's stride; `image` is normalised."""
        features = self.backbone(image, train=train)
        cls_head = FCNHead(self.num_classes, self.dropout_rate, name="cls_head")
        logits = cls_head(features, train=train)
        embedding = None
        if self.proj_dim and (train or self.is_initializing()):
            embedding = ProjectionHead(self.proj_dim, name="proj_head")(features, train=train)
        return SegmentationOutput(logits=logits, embedding=embedding)


def model_names() -> tuple[str, ...]:
    """Every name that `build` knows."""
    return tuple(HRNET_SPECS)


def build(name: str, *, num_classes: int, proj_dim: int, dropout_rate: float) -> Segmenter:
    """The network `name`; an InputError with the nearest names where there is none."""
    if name not in HRNET_SPECS:
        near = difflib.get_close_matches(name, model_names()) or model_names()
        raise InputError(f"model.name = {name!r}: no such network; nearest: {', '.join(near)}")
    return Segmenter(HRNet(HRNET_SPECS[name]), num_classes, proj_dim, dropout_rate)


def init_variables(model: nn.Module, seed: int) -> tuple[Any, Any]:
    """Fresh `params` and `batch_stats` as NumPy arrays, for the caller to place on devices.

    He's normal distribution over the fan-in for kernels, 1 for scales and variances, 0 for biases
    and means. (The original's DeepLab decoder and projection head have it; its HRNet leaves
    PyTorch's defaults, to be overwritten by ImageNet weights.)

    Drawn on the host because compiling a generator for each kernel takes 43 s for HRNet-W48.
    Each array has its own stream, so that networks share the values of the parts they share.
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    shapes = jax.eval_shape(
        lambda rng, x: model.init(rng, x, train=False), jax.random.key(0), image
    )

    def initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key != "kernel":
            ones = path[-1].key in ("scale", "var")
            return np.full(leaf.shape, 1.0 if ones else 0.0, leaf.dtype)
        stream = zlib.crc32(jax.tree_util.keystr(path).encode())
        kernel = np.random.default_rng((seed, stream)).standard_normal(leaf.shape, leaf.dtype)
        return kernel * np.float32(math.sqrt(2 / math.prod(leaf.shape[:-1])))

    variables = jax.tree_util.tree_map_with_path(initial, shapes)
    return variables["params"], variables["batch_stats"]
