"""What a config makes: the data set's spec, the network, the optimiser, the state at step 0."""

import jax
import jax.numpy as jnp
import optax

from contrastseg_jax import memory
from contrastseg_jax.config import Config, broken_rules, uses_contrast, uses_memory
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.dataset import dataset_names, label_map
from contrastseg_jax.errors import listed
from contrastseg_jax.models import segmenter
from contrastseg_jax.models.segmenter import Segmenter, model_names
from contrastseg_jax.optim import Schedule, poly_schedule, sgd
from contrastseg_jax.structs import TrainState


def check(config: Config, *, mode: str) -> None:
    """Raise one error for all settings that do not fit each other, this package or the machine."""
    problems = broken_rules(
        config,
        choices={"model.name": model_names(), "data.name": dataset_names()},
        num_devices=jax.device_count() if mode == "train" else 1,
    )
    weights = config.loss.class_weights
    if weights and not any(problem.startswith("data.") for problem in problems):
        classes = label_map(dataset_spec(config)).names
        if len(weights) != len(classes):
            problems.append(
                f"loss.class_weights has {len(weights)} numbers: must have one for each of the"
                f" {len(classes)} classes {', '.join(classes)}, or none"
            )
    if problems:
        raise listed("the config", problems)


def dataset_spec(config: Config) -> DatasetSpec:
    """Which data set, with the settings that it reads."""
    data = config.data
    return DatasetSpec(
        name=data.name,
        prepared_dir=data.prepared_dir,
        root=data.root,
        class_names=data.class_names,
        ignore_values=data.ignore_values,
        **data.synthetic,
    )


def pad_color(config: Config) -> tuple[int, int, int]:
    """What surrounds an image: the mean colour, which normalisation turns into about 0."""
    red, green, blue = (round(value) for value in config.model.image_mean)
    return red, green, blue


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The network; without pixel contrast it has no projection head."""
    return segmenter.build(
        config.model.name,
        num_classes=num_classes,
        proj_dim=config.model.proj_dim if uses_contrast(config) else 0,
        dropout_rate=config.model.dropout_rate,
    )


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its learning-rate schedule."""
    optim = config.optim
    schedule = poly_schedule(
        learning_rate=optim.learning_rate,
        num_steps=config.train.num_steps,
        poly_power=optim.poly_power,
        warmup_steps=optim.warmup_steps,
    )
    return sgd(schedule, momentum=optim.momentum, weight_decay=optim.weight_decay), schedule


def splits_memory(config: Config) -> bool:
    """Whether each device holds a part of the bank's slots instead of the whole bank."""
    return uses_memory(config) and config.memory.sharding == "slots"


def init_state(config: Config, model: Segmenter, tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0: fresh parameters, an empty bank."""
    params, batch_stats = segmenter.init_variables(model, config.seed)
    variables = {"params": params, "batch_stats": batch_stats}
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
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, variables) if config.optim.ema_decay else None,
        memory=bank,
    )
