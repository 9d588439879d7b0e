"""A whole network: a backbone and heads."""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from contrastseg_jax.models.heads.projection import ProjectionHead
from contrastseg_jax.models.layers import unwatched
from contrastseg_jax.ops.probe import probe
from contrastseg_jax.structs import SegmentationOutput

Variables = dict[str, Any]  # what a network's `apply` takes: params and batch_stats
LeafPath = tuple[str, ...]  # collection, modules, leaf

# What leaves that are no kernels start from; others, biases and means, from 0. The blocks of a
# ConvNeXt add next to nothing at first.
CONSTANTS = {"scale": 1.0, "var": 1.0, "layer_scale": 1e-6}


class Probes(NamedTuple):
    """Scalars whose gradients are sums of squares of gradients inside a network (`ops.probe`)."""

    logits: Float[Array, ""]  # of the gradient that the segmentation head sends
    embedding: Float[Array, ""]  # of the projection head's


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
    proj_input: str  # what the projection head reads: features, as cls_head, or its last ones
    dtype: str  # in which it computes; results are float32
    frozen: tuple[str, ...] = ()  # how the names of the backbone's modules begin that are constants

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        *,
        train: bool,
        embed: bool = False,
        probes: Probes | None = None,
    ) -> SegmentationOutput:
        """Logits, and in training embeddings, at the network's stride; `image` is normalised.

        What only training needs is left out otherwise: the projection head, and the auxiliary head
        unless the logits depend on it. `embed`: embeddings are needed outside training too.
        `probes`: where the gradients are probed that both heads send into what both read.
        """
        on_logits = on_embedding = unwatched
        if probes is not None:
            on_logits = partial(probe, square=probes.logits)
            on_embedding = partial(probe, square=probes.embedding)
        training = train or self.is_initializing()
        features = self.backbone(image.astype(self.dtype), train=train)
        if self.neck is not None:
            features = features | {"neck": self.neck(features, train=train)}
        x = features["last" if self.neck is None else "neck"]
        # What feeds the logits, and all of it: an auxiliary head may read the same features.
        watched = x if self.proj_input == "last" else on_logits(x)
        aux_logits = embedding = None
        if self.aux_head is not None and (training or self.aux_guides):
            aux_x = features[self.aux_input]
            aux_logits, _ = self.aux_head(watched if aux_x is x else aux_x, train=train)
            aux_logits = aux_logits.astype(jnp.float32)
        guide = (aux_logits,) if self.aux_guides else ()
        watch = on_logits if self.proj_input == "last" else unwatched
        logits, last = self.cls_head(watched, *guide, train=train, watch=watch)
        shared = last if self.proj_input == "last" else x
        if self.proj_dim and (training or embed):
            head = ProjectionHead(self.proj_dim, name="proj_head")
            embedding = head(on_embedding(shared), train=train)
        return SegmentationOutput(
            logits=logits.astype(jnp.float32),
            embedding=embedding,
            aux_logits=aux_logits,
            features=last.astype(jnp.float32),
        )


def describe_pixels(
    model: Segmenter, variables: Variables, image: Float[Array, "b h w 3"]
) -> tuple[Float[Array, "b hs ws d"] | None, Float[Array, "b hs ws c"]]:
    """What a network knows of each pixel, outside training, at its stride; `image` is normalised.

    The embeddings, None without a projection head, and the features of which the segmentation
    head's last convolution makes the logits.
    """
    output = cast(SegmentationOutput, model.apply(variables, image, train=False, embed=True))
    return output.embedding, cast(Array, output.features)


def flatten(variables: Variables) -> dict[LeafPath, Any]:
    """Each leaf of a network's variables by its path."""
    return flatten_dict(variables)


def unflatten(leaves: Mapping[LeafPath, Any]) -> Variables:
    """The variables of which these are the leaves."""
    return unflatten_dict(leaves)


def variable_shapes(model: nn.Module) -> Any:
    """Shapes and types of `params` and `batch_stats`: what a file of weights has to fill."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    return jax.eval_shape(lambda rng, x: model.init(rng, x, train=False), jax.random.key(0), image)


class TrainingShapes(NamedTuple):
    """What the size of a training batch makes of a network."""

    output_size: tuple[int, int]  # rows and columns of the maps of logits and embeddings
    # By BatchNorm, unless it is frozen: how many a channel's mean and variance are taken of.
    num_values: dict[str, int]


@cache
def training_shapes(model: Segmenter, image_shape: tuple[int, int, int]) -> TrainingShapes:
    """Shapes in training on `image_shape`: images of the global batch, height, width.

    Traced, which takes a second or so; nothing is computed.
    """
    num_values = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_call = isinstance(module, nn.BatchNorm) and context.method_name == "__call__"
        if is_call and not module.use_running_average:
            num_values["/".join(module.path)] = math.prod(args[0].shape[:-1])
        return call(*args, **kwargs)

    def outputs(rng: Array, image: Array) -> SegmentationOutput:
        rngs = {"params": rng, "dropout": rng}
        return cast(SegmentationOutput, model.init_with_output(rngs, image, train=True)[0])

    image = jax.ShapeDtypeStruct((*image_shape, 3), "float32")
    with nn.intercept_methods(note):
        logits = jax.eval_shape(outputs, jax.random.key(0), image).logits
    return TrainingShapes(logits.shape[1:3], num_values)


def map_size(model: Segmenter, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the maps of images of a size (height, width), outside training.

    Traced; nothing is computed.
    """
    image = jax.ShapeDtypeStruct((1, *image_size, 3), "float32")
    evaluate = partial(model.apply, train=False)
    output = cast(SegmentationOutput, jax.eval_shape(evaluate, variable_shapes(model), image))
    return output.logits.shape[1], output.logits.shape[2]


def init_variables(model: nn.Module, seed: int) -> Variables:
    """Fresh variables as NumPy arrays, for the caller to place on devices.

    He's normal distribution over the fan-in for kernels, CONSTANTS for the rest. (The original's
    DeepLab decoder and projection head have it; its HRNet leaves PyTorch's defaults, to be
    overwritten by ImageNet weights.)

    Drawn on the host because compiling a generator for each kernel takes 43 s for HRNet-W48.
    Each array has its own stream, so that networks share the values of the parts they share.
    """

    def initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key != "kernel":
            return np.full(leaf.shape, CONSTANTS.get(path[-1].key, 0.0), leaf.dtype)
        stream = zlib.crc32(jax.tree_util.keystr(path).encode())
        kernel = np.random.default_rng((seed, stream)).standard_normal(leaf.shape, leaf.dtype)
        return kernel * np.float32(math.sqrt(2 / math.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(initial, variable_shapes(model))
