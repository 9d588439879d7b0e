"""Checkpoints of the whole `TrainState`, with Orbax."""

import json
import math
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from contrastseg_jax import processes
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import TrainState


def open_manager(workdir: Path, *, keep_checkpoints: int) -> ocp.CheckpointManager:
    """Saves in the background; keeps the newest checkpoints and the best by val mIoU."""
    folder = (workdir / "checkpoints").absolute()
    _require_readable_scores(folder)
    keep = [
        policies.LatestN(keep_checkpoints),
        policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=_score,
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def open_reader(workdir: Path) -> ocp.CheckpointManager:
    """Finds checkpoints and leaves the folder as it is, so also beside a run that goes on."""
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        raise InputError(f"--workdir={workdir}: holds no checkpoints; train a run there first")
    _require_readable_scores(folder)
    options = ocp.CheckpointManagerOptions(best_fn=_score, read_only=True, create=False)
    return ocp.CheckpointManager(folder, options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, mean_iou: float | None
) -> None:
    """Start saving; the checkpoint appears whole or not at all."""
    metrics = {} if mean_iou is None else {"mean_iou": mean_iou}
    manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)


def find_step(manager: ocp.CheckpointManager, which: str) -> int:
    """The step that "latest", "best" or a number names."""
    steps = sorted(manager.all_steps())
    if not steps:
        raise InputError(f"{manager.directory}: holds no finished checkpoint")
    if which == "latest":
        return steps[-1]
    if which == "best":
        return manager.best_step() or steps[-1]
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"--checkpoint={which}: must be latest, best or one of {known}")
    return int(which)


def restore(
    manager: ocp.CheckpointManager, step: int, state: TrainState, sharding: Any
) -> TrainState:
    """The state saved at a step, laid out as `sharding` says (a prefix of the state's tree).

    `state` has its structure, shapes and dtypes; it may have been saved with another layout.
    """
    abstract = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        jax.tree.broadcast(sharding, state),
    )
    try:
        restored = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        if processes.is_of_another(error):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{manager.directory / str(step)}: cannot be read as a checkpoint of this config"
            f" ({type(error).__name__}: {reason}); it is damaged or of another config: remove it,"
            " and the one before it is taken"
        ) from error
    state = cast(TrainState, restored)
    if int(state.step) != step:
        raise InputError(
            f"{manager.directory / str(step)}: holds the state after {int(state.step)} steps, so it"
            " is a folder that was renamed or of another run; remove it"
        )
    return state


def _require_readable_scores(folder: Path) -> None:
    """Orbax reads the scores of all checkpoints when it opens any: name the one that is damaged."""
    for path in folder.glob("[0-9]*/metrics/metrics"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise InputError(
                f"{path}: is damaged ({error}); remove the folder {path.parents[1]}"
            ) from error


def _score(metrics: dict[str, float]) -> float:
    """What "best" means; a checkpoint that was not evaluated, or on no pixel, is worst."""
    score = metrics.get("mean_iou", math.nan)
    return -1.0 if math.isnan(score) else score
