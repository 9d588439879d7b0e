"""Resolve a config to a Setup: the only place where what it names is built."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from contrastseg_jax.config.load import inherit_image_format
from contrastseg_jax.config.rules import LEFT_OPEN, micro_batch_size, uses_contrast
from contrastseg_jax.config.tree import Config, leaves, replaced
from contrastseg_jax.contrast.contrast_step import num_anchors as anchors_of_map
from contrastseg_jax.data.dataset import dataset_spec, label_map
from contrastseg_jax.data.spec import Preprocessing
from contrastseg_jax.losses.segmentation import CLASS_WEIGHTED, PIXEL_LOSSES, Term
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.objectives import pixel_contrast
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.logging import log
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import ImageFormat
from contrastseg_jax.weights import load, pretrained
from contrastseg_jax.weights.spec import image_format


def resolve(config: Config, devices: Sequence[Any] | None = None) -> Setup:
    """The Setup of a checked config on `devices`, by default all devices of all processes."""
    data, mesh = dataset_spec(config), sharding.make_mesh(devices)
    classes = label_map(data)
    model, images = build_model(config, len(classes.names)), image_format(config)
    return Setup(
        config=config,
        data=data,
        classes=classes,
        image_format=images,
        preprocessing=Preprocessing(
            classes, pad_color(images), config.data.short_side, data.decoding
        ),
        model=model,
        class_weights=config.loss.class_weights,
        terms=build_terms(config, config.loss.class_weights),
        objective=build_objective(config, model, mesh),
        mesh=mesh,
    )


def build_terms(config: Config, class_weights: Sequence[float]) -> tuple[Term, ...]:
    """The losses that the segmentation loss is the sum of, with their settings."""
    terms = []
    for name, loss in PIXEL_LOSSES.items():
        weight, settings = config.loss.terms[name], dict(config.loss.get(name, {}))
        if name in CLASS_WEIGHTED:
            settings["class_weights"] = tuple(class_weights)
        if weight:
            terms.append(Term(name, weight, functools.partial(loss, **settings)))
    return tuple(terms)


def build_objective(config: Config, model: Segmenter, mesh: Mesh) -> Objective | None:
    """The objective to add to the segmentation loss, if any."""
    if not uses_contrast(config):
        return None
    return pixel_contrast.pixel_contrast(
        config, num_classes=model.num_classes, proj_dim=model.proj_dim, mesh=mesh
    )


def pad_color(image_format: ImageFormat) -> tuple[int, int, int]:
    """The padding colour: the mean, which is about 0 after normalisation."""
    red, green, blue = (round(value) for value in image_format.mean)
    return red, green, blue


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The network; without pixel contrast it has no projection head."""
    rate = config.model.dropout_rate
    return zoo.build_model(
        config.model.name,
        num_classes=num_classes,
        proj_dim=config.model.proj_dim if uses_contrast(config) else 0,
        proj_input=config.model.proj_input,
        dropout_rate=None if rate < 0 else rate,
        dtype=config.model.dtype,
        remat=tuple(config.model.remat),
        freeze=tuple(config.model.freeze),
    )


def training_shapes(config: Config, model: Segmenter) -> segmenter.TrainingShapes:
    """Shapes in the network for what is computed at once of the config's training batch."""
    images = micro_batch_size(config), *config.augment.crop_size
    return segmenter.training_shapes(model, images)  # pyright: ignore[reportArgumentType]


def num_cells(config: Config, model: Segmenter) -> int:
    """Cells of the embedding map of one training image, from which anchors are sampled."""
    return math.prod(training_shapes(config, model).output_size)


def num_anchors(config: Config, model: Segmenter) -> int:
    """Anchors sampled from each training image."""
    map_size = training_shapes(config, model).output_size
    return anchors_of_map(config.contrast.anchors_per_image, map_size)


def adopt_image_format(config: Config, run: Config | None) -> Config:
    """The config, with unset image format settings taken from the weights in `model.init_from`.

    `run`: the config of a run being resumed, used if the weights no longer exist.
    """
    net = config.model
    if not net.init_from:
        return config
    folder = Path(net.init_from)
    is_gone = not pretrained.is_there(folder)
    if run is not None and run.model.init_from == net.init_from and is_gone:
        return inherit_image_format(config, run)
    expected = pretrained.read(folder, net.name).image_format
    log.info(f"image format of {folder}: {pretrained.describe_image_format(expected)}")
    values = expected.mean, expected.std, expected.channel_order
    of_weights: dict[str, Any] = dict(zip(LEFT_OPEN, values, strict=True))
    given = {path: value for path, value in leaves(config) if path in LEFT_OPEN and value}
    overridden = [f"{path} = {v!r}" for path, v in given.items() if v != of_weights[path]]
    if overridden:
        log.info(f"overridden by the config: {', '.join(overridden)}")
    return replaced(config, of_weights | given)


def initial_variables(setup: Setup, *, strict: bool = False) -> Variables:
    """Initial variables: random, or the pretrained weights in `model.init_from`.

    `strict`: raise an InputError if these lack anything that the logits depend on.
    """
    net = setup.config.model
    fresh = segmenter.init_variables(setup.model, setup.config.seed)
    if not net.init_from:
        return fresh
    names = setup.classes.names
    return pretrained.start_from(Path(net.init_from), net.name, names, fresh, strict=strict)


def load_network(setup: Setup, workdir: Path, checkpoint: str) -> tuple[Variables, int]:
    """Load the checkpoint "latest", "best" or of a step onto the mesh: its variables and step.

    "init": the initial variables; does not need a run.
    """
    if checkpoint == "init":
        variables = initial_variables(setup, strict=True)
        if setup.objective and setup.objective.logits:
            variables = variables | {"memory": setup.objective.init()}
        return load.on_mesh(variables, setup.mesh, step=0), 0
    shapes = segmenter.variable_shapes(setup.model)
    if setup.objective and setup.objective.logits:
        shapes = shapes | {"memory": jax.eval_shape(setup.objective.init)}
    return load.load(workdir, checkpoint, shapes, setup.mesh)
