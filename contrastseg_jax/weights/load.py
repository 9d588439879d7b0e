"""The variables of a network: fresh, converted, or those of a run's checkpoint."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from contrastseg_jax.config.rules import splits_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.dataset import dataset_spec, label_map
from contrastseg_jax.models import segmenter
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint
from contrastseg_jax.run.logging import log
from contrastseg_jax.setup.setup import build_model
from contrastseg_jax.structs import TrainState
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state
from contrastseg_jax.weights import pretrained


def inference_variables(state: TrainState) -> Variables:
    """What a network needs to predict: the running averages where the run keeps them."""
    if state.ema is not None:
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


def require_finite(variables: Variables, step: int) -> None:
    """Raise an error for a network that is lost: argmax would make the first class of its NaN."""
    arrays = jax.tree_util.tree_leaves_with_path(variables)
    lost = [path for path, x in arrays if not np.isfinite(np.asarray(x)).all()]
    if lost:
        name = jax.tree_util.keystr(lost[0], simple=True, separator="/")
        raise FloatingPointError(
            f"the network after {step} steps predicts nothing: {len(lost)} of its {len(arrays)}"
            f" arrays hold values that are not finite, e.g. {name}; take an earlier checkpoint"
        )


def load_run(config: Config, workdir: Path, which: str) -> tuple[Segmenter, Variables, int, Mesh]:
    """The network of a run with the parameters of a checkpoint: "latest", "best" or a step.

    "init": those that training starts from; of a run there may be nothing yet.
    """
    mesh = sharding.make_mesh()
    model = build_model(config, len(label_map(dataset_spec(config)).names))
    if which == "init":
        variables = jax.device_put(
            initial_variables(config, model, whole=True), sharding.replicated(mesh)
        )
        require_finite(variables, 0)
        return model, variables, 0, mesh
    tx, _ = build_optimizer(config)
    state = abstract_state(config, model, tx)
    # Laid out as in training, where the devices at hand allow it: whole it may not fit.
    uneven = (config.memory.pixel_size % mesh.size, config.memory.segment_size % mesh.size)
    of_state = sharding.state_sharding(
        mesh,
        state,
        split_memory=splits_memory(config) and not any(uneven),
        fsdp=config.parallel.fsdp,
    )
    step = checkpoint.find_whole(workdir, which)
    state = checkpoint.restore(workdir, step, state, of_state)
    log.info(f"{workdir / 'checkpoints' / str(step)}: {config.model.name} after {step} steps")
    variables = jax.device_put(inference_variables(state), sharding.replicated(mesh))
    require_finite(variables, step)
    return model, variables, step, mesh


def initial_variables(config: Config, model: Segmenter, *, whole: bool = False) -> Variables:
    """What the network starts from: fresh ones, or those of `model.init_from`.

    `whole`: raise an InputError where these leave out what the logits depend on.
    """
    net, fresh = config.model, segmenter.init_variables(model, config.seed)
    if not net.init_from:
        return fresh
    class_names = label_map(dataset_spec(config)).names
    return pretrained.start_from(Path(net.init_from), net.name, class_names, fresh, whole=whole)
