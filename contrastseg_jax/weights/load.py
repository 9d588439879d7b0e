"""Load a network's variables from a checkpoint or train state, without optimiser and bank."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint_reader
from contrastseg_jax.run.logging import log
from contrastseg_jax.structs import TrainState


def load(workdir: Path, name: str, shapes: Any, mesh: Mesh) -> tuple[Variables, int]:
    """Load the checkpoint "latest", "best" or of a step onto the mesh: its variables and step.

    The EMA if the run keeps one. Nothing else of the checkpoint is read. `shapes`: `params` and
    `batch_stats`, and `memory` if inference needs the objective's state too.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or from another network.
        FloatingPointError: a value is not finite.
    """
    step = checkpoint_reader.find_intact(workdir, name, fields=tuple(shapes))
    variables = checkpoint_reader.restore_variables(
        workdir, step, shapes, sharding.replicated(mesh)
    )
    log.info(f"{workdir / 'checkpoints' / str(step)}: restored, step {step}")
    require_finite(variables, step)
    return variables, step


def on_mesh(variables: Variables, mesh: Mesh, *, step: int) -> Variables:
    """Variables replicated on the mesh; a FloatingPointError if a value is not finite."""
    require_finite(variables, step)
    return jax.device_put(variables, sharding.replicated(mesh))


def inference_variables(state: TrainState, objective: Objective | None) -> Variables:
    """The variables for inference: the EMA if the run keeps one.

    Includes the state of an objective that changes the logits, as `memory`.
    """
    variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
    if objective and objective.logits:
        return variables | {"memory": state.memory}
    return variables


def require_finite(variables: Variables, step: int) -> None:
    """Raise a FloatingPointError for a diverged network: argmax of NaN is the first class."""
    arrays = jax.tree_util.tree_leaves_with_path(variables)
    broken = [path for path, x in arrays if not np.isfinite(np.asarray(x)).all()]
    if broken:
        name = jax.tree_util.keystr(broken[0], simple=True, separator="/")
        raise FloatingPointError(
            f"the network has diverged after step {step}: {len(broken)} of its {len(arrays)}"
            f" arrays have values that are not finite, e.g. {name}; use an earlier checkpoint"
        )
