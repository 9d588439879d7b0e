"""What a config means: the network, the optimiser, how images are taken."""

import math
from pathlib import Path
from typing import Any

from contrastseg_jax.config.load import filled_in
from contrastseg_jax.config.rules import LEFT_OPEN, uses_contrast
from contrastseg_jax.config.tree import Config, leaves, replaced
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.run.logging import log
from contrastseg_jax.structs import IMAGENET, ImageFormat
from contrastseg_jax.weights import pretrained


def image_format(config: Config) -> ImageFormat:
    """How the network takes images; ImageNet's way where the config leaves it open."""
    net = config.model
    return ImageFormat(
        mean=net.image_mean or IMAGENET.mean,
        std=net.image_std or IMAGENET.std,
        channel_order=net.channel_order or IMAGENET.channel_order,
    )


def pad_color(config: Config) -> tuple[int, int, int]:
    """What surrounds an image: the mean colour, which normalisation turns into about 0."""
    red, green, blue = (round(value) for value in image_format(config).mean)
    return red, green, blue


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The network; without pixel contrast it has no projection head."""
    rate = config.model.dropout_rate
    if rate < 0:
        rate = zoo.NETWORKS[config.model.name].dropout_rate
    return zoo.build(
        config.model.name,
        num_classes=num_classes,
        proj_dim=config.model.proj_dim if uses_contrast(config) else 0,
        dropout_rate=rate,
        dtype=config.model.dtype,
        remat=tuple(config.model.remat),
    )


def training_shapes(config: Config, model: Segmenter) -> segmenter.TrainingShapes:
    """What the network makes of the config's training batch."""
    images = config.train.batch_size, *config.augment.crop_size
    return segmenter.training_shapes(model, images)  # pyright: ignore[reportArgumentType]


def num_cells(config: Config, model: Segmenter) -> int:
    """Cells of the map of embeddings of one training image, of which anchors are sampled."""
    return math.prod(training_shapes(config, model).output_size)


def num_anchors(config: Config, model: Segmenter) -> int:
    """Anchors of each image: as many as the config says, else by the size of the map.

    A sixteenth of its cells, at least 16 and at most 512. The cost of the contrast loss grows with
    their square, that of the network with the cells.
    """
    given = config.contrast.anchors_per_image
    return given or min(max(num_cells(config, model) // 16, 16), 512)


def follow_weights(config: Config, run: Config | None) -> Config:
    """The config with images as the weights of `model.init_from` need them, where that is open.

    `run`: the config of a run that goes on. It has noted this, for when the weights are gone.
    """
    net = config.model
    if not net.init_from:
        return config
    folder = Path(net.init_from)
    if run is not None and run.model.init_from == net.init_from and not folder.exists():
        return filled_in(config, run)
    needed = pretrained.read(folder, net.name).image_format
    log.info(f"images as {folder} needs them: {pretrained.described(needed)}")
    values = needed.mean, needed.std, needed.channel_order
    of_weights: dict[str, Any] = dict(zip(LEFT_OPEN, values, strict=True))
    said = {path: value for path, value in leaves(config) if path in LEFT_OPEN and value}
    overruled = [f"{path} = {v!r}" for path, v in said.items() if v != of_weights[path]]
    if overruled:
        log.info(f"but {', '.join(overruled)}, as the config says")
    return replaced(config, of_weights | said)
