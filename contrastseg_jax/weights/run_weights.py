"""The weights of a run, as training of another starts from them."""

import dataclasses
from pathlib import Path

import jax

from contrastseg_jax.config.rules import uses_contrast
from contrastseg_jax.data.dataset import dataset_spec, label_map
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.workdir import find_run, read_config
from contrastseg_jax.weights.load import load
from contrastseg_jax.weights.spec import Weights, image_format


def is_run(folder: Path) -> bool:
    """Whether a folder is the workdir of a run that has saved a checkpoint."""
    return (folder / "checkpoints").is_dir() and find_run(folder) is not None


def describe(workdir: Path) -> Weights:
    """What its config says of a run's weights.

    Raises:
        InputError: the config is damaged.
    """
    run = read_config(workdir)
    names = label_map(dataset_spec(run)).names
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
    model = zoo.build(
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
