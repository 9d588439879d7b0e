"""The variables of a network, from a training state or a checkpoint: neither optimiser nor bank."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint
from contrastseg_jax.run.logging import log
from contrastseg_jax.structs import TrainState


def load(workdir: Path, name: str, shapes: Any, mesh: Mesh) -> tuple[Variables, int]:
    """The variables of the checkpoint "latest", "best" or of a step, on the mesh, and its step.

    Running averages where the run keeps them. Nothing else of the checkpoint is read. `shapes`:
    `params` and `batch_stats`, and `memory` where inference needs the objective's state too.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another network.
        FloatingPointError: a value is not finite.
    """
    step = checkpoint.find_intact(workdir, name, fields=tuple(shapes))
    variables = checkpoint.restore_variables(workdir, step, shapes, sharding.replicated(mesh))
    log.info(f"{workdir / 'checkpoints' / str(step)}: restored, after {step} steps of training")
    require_finite(variables, step)
    return variables, step


def on_mesh(variables: Variables, mesh: Mesh, *, step: int) -> Variables:
    """Variables on every device; a FloatingPointError where one is not finite."""
    require_finite(variables, step)
    return jax.device_put(variables, sharding.replicated(mesh))


def inference_variables(state: TrainState, objective: Objective | None) -> Variables:
    """What a network needs to predict: the running averages where the run keeps them.

    And the state of an objective that changes the logits, as `memory`.
    """
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    if objective and objective.logits:
        return variables | {"memory": state.memory}
    return variables


def require_finite(variables: Variables, step: int) -> None:
    """Raise an error for a diverged network: argmax would predict the first class for its NaN."""
    arrays = jax.tree_util.tree_leaves_with_path(variables)
    broken = [path for path, x in arrays if not np.isfinite(np.asarray(x)).all()]
    if broken:
        name = jax.tree_util.keystr(broken[0], simple=True, separator="/")
        raise FloatingPointError(
            f"the network after {step} steps predicts nothing: {len(broken)} of its {len(arrays)}"
            f" arrays hold values that are not finite, e.g. {name}; take an earlier checkpoint"
        )
