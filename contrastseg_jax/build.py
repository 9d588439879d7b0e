"""What a config makes: the data set's spec, the network, the optimiser, the state at step 0."""

import math
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from contrastseg_jax import distributed, memory, pretrained
from contrastseg_jax.config import (
    LEFT_OPEN,
    Config,
    filled_in,
    leaves,
    replaced,
    splits_memory,
    uses_contrast,
    uses_memory,
)
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.dataset import label_map
from contrastseg_jax.data.images import Decoding
from contrastseg_jax.logging import log
from contrastseg_jax.models import segmenter
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.optim import Schedule, poly_schedule, sgd
from contrastseg_jax.structs import IMAGENET, ImageFormat, TrainState


def dataset_spec(config: Config) -> DatasetSpec:
    """Which data set, with the settings that it reads."""
    data = config.data
    return DatasetSpec(
        name=data.name,
        prepared_dir=data.prepared_dir,
        root=data.root,
        exif_orientation=data.exif_orientation,
        bit_depth=data.bit_depth,
        class_names=data.class_names,
        ignore_values=data.ignore_values,
        **data.tfds,
        **data.synthetic,
    )


def decoding(config: Config) -> Decoding:
    """How image files become pixels."""
    return dataset_spec(config).decoding


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
        rate = segmenter.NETWORKS[config.model.name].dropout_rate
    return segmenter.build(
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


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its learning-rate schedule."""
    optim = config.optim
    schedule = poly_schedule(
        learning_rate=optim.learning_rate,
        num_steps=config.train.num_steps,
        poly_power=optim.poly_power,
        warmup_steps=optim.warmup_steps,
    )
    tx = sgd(
        schedule,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        head_lr_multiplier=optim.head_lr_multiplier,
    )
    return tx, schedule


def initial_variables(config: Config, model: Segmenter, *, whole: bool = False) -> Variables:
    """What the network starts from: fresh ones, or those of `model.init_from`.

    `whole`: raise an InputError where these leave out what the logits depend on.
    """
    net, fresh = config.model, segmenter.init_variables(model, config.seed)
    if not net.init_from:
        return fresh
    class_names = label_map(dataset_spec(config)).names
    return pretrained.start_from(Path(net.init_from), net.name, class_names, fresh, whole=whole)


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


def init_state(
    config: Config, model: Segmenter, tx: optax.GradientTransformation, variables: Variables
) -> TrainState:
    """The state at step 0: what the network starts from, and an empty bank."""
    bank = None
    if uses_memory(config):
        bank = memory.init_memory(
            num_classes=model.num_classes,
            pixel_size=config.memory.pixel_size,
            segment_size=config.memory.segment_size,
            proj_dim=config.model.proj_dim,
            dtype=config.memory.dtype,
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if config.optim.ema_decay else None,
        memory=bank,
    )


def state_sharding(config: Config, state: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of the state lies, as the config asks for; `state` may be its shapes."""
    return distributed.state_sharding(
        mesh, state, split_memory=splits_memory(config), fsdp=config.parallel.fsdp
    )


def keep_compiled(config: Config, workdir: Path | None) -> None:
    """Keep compiled programs where the environment or the config says, else in the workdir."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or config.parallel.compilation_cache
    if not folder and workdir:
        folder = str(workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)
    _shorten_warnings(folder)


def _shorten_warnings(folder: str) -> None:
    """JAX warns of each program that it cannot read or write in its folder: log the first alone."""
    show, logged = warnings.showwarning, False

    def show_or_log(message: Warning | str, *details: Any) -> None:
        nonlocal logged
        text = str(message)
        if "persistent compilation cache entry" not in text:
            show(message, *details)
        elif not logged:
            logged = True
            reason = text.partition(": ")[2]
            log.warning(f"{folder}: compiled programs are not kept, or not found there ({reason})")

    warnings.showwarning = show_or_log


def abstract_state(
    config: Config, model: Segmenter, tx: optax.GradientTransformation
) -> TrainState:
    """Shapes and types of `init_state`, whatever the network starts from."""
    return jax.eval_shape(
        lambda variables: init_state(config, model, tx, variables),
        segmenter.variable_shapes(model),
    )
