"""Training, evaluation and trained networks from Python, as the modes of the program have them.

What they say goes to the logger "contrastseg_jax", which is silent until logging is set up.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastseg_jax.config.load import schema
from contrastseg_jax.config.rules import PROTOCOL
from contrastseg_jax.config.tree import Config, replaced
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation.evaluate import evaluate_run
from contrastseg_jax.evaluation.loaded_network import LoadedNetwork, load_setup
from contrastseg_jax.export.export import is_export, load_export
from contrastseg_jax.run.workdir import find_run, is_run, read_config
from contrastseg_jax.setup import preflight
from contrastseg_jax.training.train import train as train_setup
from contrastseg_jax.weights import pretrained

Folder = str | os.PathLike[str]


def train(config: Config, workdir: Folder) -> None:
    """Train in a workdir, or resume the run in it; the config is `load_config`'s.

    Raises:
        InputError: the config is wrong, or the workdir has a run of another one.
    """
    folder = Path(os.path.expanduser(workdir))
    train_setup(preflight.set_up(config, mode="train", run=find_run(folder)), folder)


def evaluate(
    workdir: Folder,
    *,
    checkpoint: str = "best",
    split: str = "val",
    overrides: Sequence[str] = (),
    output: Folder | None = None,
) -> dict[str, Any]:
    """The scores of a run's checkpoint on a split, which are also written to its `eval/STEP/`.

    `checkpoint`: "best" by the mIoU of val, "latest", or a step. `overrides`: settings of the
    machine and the protocol, e.g. "eval.batch_size=1" or "eval.flip=True". `output`: where to write
    instead, which another protocol than the run's needs.

    Raises:
        InputError: there is no such run, checkpoint or split.
    """
    folder = Path(os.path.expanduser(workdir))
    config = read_config(folder, overrides, may_differ=PROTOCOL)
    target = None if output is None else Path(os.path.expanduser(output))
    return evaluate_run(preflight.set_up(config, mode="eval"), folder, checkpoint, split, target)


def load(source: Folder, *, checkpoint: str = "best") -> LoadedNetwork:
    """Load a trained network: that of a run, or of a folder of --mode=convert or --mode=export.

    `checkpoint`: of a run "best" by the mIoU of val, "latest", or a step. The network is placed on
    one device.

    Raises:
        InputError: there is no such run, folder or checkpoint, it is damaged, or the weights are
            those of a backbone alone.
        FloatingPointError: a value is not finite.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if is_export(folder):
        return load_export(folder)
    of_run = is_run(folder)
    config = read_config(folder) if of_run else _config_of_weights(folder)
    setup = preflight.set_up(config, mode="predict", from_init=not of_run)
    return load_setup(setup, folder, checkpoint if of_run else "init")


def _config_of_weights(folder: Path) -> Config:
    """A config of which converted weights are the network, without contrast."""
    weights = pretrained.describe(folder)
    if not weights.num_classes:
        raise InputError(
            f"{folder}: {weights.source} has the weights of a backbone alone; train a network that"
            f" starts from them, --config.model.init_from={folder}"
        )
    names = weights.class_names or tuple(f"class {i}" for i in range(weights.num_classes))
    settings = {
        "data.name": "folder",
        "data.class_names": names,
        "model.name": weights.networks[0],
        "model.init_from": str(folder.absolute()),
        "contrast.candidates": "none",
    }
    return replaced(schema(), settings)
