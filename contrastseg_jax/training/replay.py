"""A step of a run taken again: its batch, and what of its loss and gradients is not finite."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit.statistics import Example
from contrastseg_jax.errors import InputError, best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.models import segmenter
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint_reader
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import saved_steps
from contrastseg_jax.setup.resolve import initial_variables
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import IGNORE_LABEL, Batch, TrainState
from contrastseg_jax.text import count_of
from contrastseg_jax.training.feed import make_batches, step_images, take_steps
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.start import open_data, weigh_classes
from contrastseg_jax.training.state import abstract_state, init_state, state_sharding
from contrastseg_jax.training.train_step import batch_gradients, compile_step

MOST_NAMED = 3  # arrays in a line of the log


def replay(setup: Setup, workdir: Path, step: int) -> None:
    """Take the steps of a run again up to `step`, and write to `replay/STEP` what it finds there.

    They begin at the newest checkpoint before it, or where the run began, and give the same numbers
    on the same devices. Nothing else of the run is written.

    Raises:
        InputError: the run has no such step.
    """
    if not 1 <= step <= setup.config.train.num_steps:
        raise InputError(f"--replay={step}: must be in 1..{setup.config.train.num_steps}")
    data = open_data(setup)
    setup = weigh_classes(setup, data.source)
    tx, _ = build_optimizer(setup.config)
    begin, state = _state_before(setup, tx, workdir, step)
    log.info(f"taking the steps from {begin + 1} to {step} again")
    # The last batch is kept apart: the step would give the state it is examined with away.
    batches = make_batches(setup, data.source, begin)
    before = itertools.islice(batches, step - 1 - begin)
    for after, *_ in take_steps(compile_step(setup, tx), state, before, setup.mesh):
        state = after
    batch, names = next(batches), step_images(setup, data.source, step)
    batches.close()
    found = examine(setup, state, batch) | {"step": step, "images": _describe(batch, names)}
    folder = workdir / "replay" / str(step)
    write_atomically(folder / "replay.json", to_json(found) + "\n")
    content = io.BytesIO()
    np.savez(content, image=batch.image, label=batch.label, example_id=batch.example_id)
    write_atomically(folder / "batch.npz", content.getvalue())
    examples = [Example(*row) for row in zip(names, batch.image, batch.label, strict=True)]
    with best_effort(str(folder / "batch.png")):
        pictures.save_sheet(folder / "batch.png", examples, setup.classes, f"step {step}")
    for line in _summary(found):
        log.info(line)
    log.info(f"batch and figures: {folder}")


def examine(setup: Setup, state: TrainState, batch: Batch) -> dict[str, Any]:
    """The metrics of a batch, and the names of the arrays that are not finite, by kind.

    `state`: before the step.
    """

    @jax.jit
    def of_step(state: TrainState, batch: Batch) -> Any:
        (grads, _), batch_stats, metrics, _ = batch_gradients(setup, state, batch)
        trees = {"gradients": grads, "batch_stats": batch_stats}
        return metrics, jax.tree.map(lambda x: jnp.isfinite(x).all(), trees)

    metrics, is_finite = jax.device_get(of_step(state, sharding.to_devices(batch, setup.mesh)))
    wrong = {
        kind: ["/".join(path) for path, is_fine in segmenter.flatten(tree).items() if not is_fine]
        for kind, tree in is_finite.items()
    }
    return {"metrics": {name: float(x) for name, x in metrics.items()}, "not_finite": wrong}


def _state_before(
    setup: Setup, tx: optax.GradientTransformation, workdir: Path, step: int
) -> tuple[int, TrainState]:
    """The newest checkpoint before a step, or the state at the run's start, and its step."""
    abstract = abstract_state(setup, tx)
    where = state_sharding(setup, abstract, setup.mesh)
    saved = [number for number in saved_steps(workdir) if number < step]
    if not saved:
        state = init_state(setup, tx, initial_variables(setup))
        return 0, jax.device_put(state, where)
    begin = checkpoint_reader.find_intact(workdir, str(saved[-1]))
    return begin, checkpoint_reader.restore(workdir, begin, abstract, where)


def _describe(batch: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each image of a batch is, as the network sees it."""
    return [
        {
            "name": name,
            "mean": float(image.mean()),
            "range": [int(image.min()), int(image.max())],
            "classes": [int(value) for value in np.unique(label) if value != IGNORE_LABEL],
            "labelled": float((label != IGNORE_LABEL).mean()),
        }
        for name, image, label in zip(names, batch.image, batch.label, strict=True)
    ]


def _summary(found: Mapping[str, Any]) -> list[str]:
    """What was found, in lines of the log."""
    lines = [", ".join(f"{name} {value:.4g}" for name, value in found["metrics"].items())]
    for kind, names in found["not_finite"].items():
        shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
        words = kind.replace("_", " ")
        text = f"{count_of(len(names), 'array')} not finite: {shown}" if names else "all finite"
        lines.append(f"{words}: {text}")
    for image in found["images"]:
        lines.append(
            f"image {image['name']}: {image['labelled']:.0%} labelled, classes {image['classes']},"
            f" values {image['range'][0]} to {image['range'][1]}"
        )
    return lines
