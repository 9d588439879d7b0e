"""The weights of a run, as training of another starts from them."""

import dataclasses
from pathlib import Path

import jax

from contrastseg_jax.config.rules import uses_contrast
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.checkpoint_files import find_step
from contrastseg_jax.run.workdir import read_config
from contrastseg_jax.weights.load import load
from contrastseg_jax.weights.spec import Weights, class_names, image_format


def describe(workdir: Path) -> Weights:
    """What its config says of a run's weights.

    Raises:
        InputError: the config is damaged, or there is no checkpoint.
    """
    find_step(workdir, "latest")
    run = read_config(workdir)
    names = class_names(run)
    net = run.model
    return Weights(
        networks=(net.name,),
        num_classes=len(names),
        proj_dim=net.proj_dim if uses_contrast(run) else 0,
        class_names=names,
        image_format=image_format(run),
        source=workdir.absolute().name,
        sha256="",
    )


def restore(workdir: Path, checkpoint: str) -> tuple[Variables, Weights]:
    """The variables of a checkpoint on the host, and their description, which names the step.

    The EMA if the run keeps one; without optimiser and bank.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
        FloatingPointError: a value is not finite.
    """
    weights, run = describe(workdir), read_config(workdir)
    model = zoo.build_model(
        weights.networks[0],
        num_classes=weights.num_classes,
        proj_dim=weights.proj_dim,
        proj_input=run.model.proj_input,
        dropout_rate=0.0,
        dtype="float32",
        remat=(),
    )
    mesh = sharding.make_mesh(jax.local_devices()[:1])
    variables, step = load(workdir, checkpoint, segmenter.variable_shapes(model), mesh)
    named = dataclasses.replace(weights, source=f"{weights.source}, step {step}")
    return jax.device_get(variables), named
