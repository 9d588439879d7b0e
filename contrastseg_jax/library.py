"""Training and evaluation from Python, as --mode=train and --mode=eval do them.

What they say goes to the logger "contrastseg_jax", which is silent until logging is set up.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastseg_jax.config.rules import PROTOCOL
from contrastseg_jax.config.tree import Config
from contrastseg_jax.evaluation.evaluate import evaluate_run
from contrastseg_jax.run.workdir import find_run, read_config
from contrastseg_jax.setup import preflight
from contrastseg_jax.training.train import train as train_setup

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
