"""Weights & Biases, for runs that name a project there: numbers, pictures and the config."""

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from contrastseg_jax.config.tree import Config
from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import write_atomically
from contrastseg_jax.run.board import Sink

ID_FILE = "wandb_id.txt"  # in the workdir: a run that is resumed is the same one there


def is_installed() -> bool:
    """Whether the package `wandb`, an optional one, is there."""
    return importlib.util.find_spec("wandb") is not None


@contextlib.contextmanager
def open_sinks(workdir: Path, config: Config) -> Iterator[tuple[Sink, ...]]:
    """The sink of the project `train.wandb_project`, if there is one; a failure is a warning."""
    with contextlib.ExitStack() as stack:
        sinks: tuple[Sink, ...] = ()
        if config.train.wandb_project:
            with best_effort("Weights & Biases"):
                sinks = (stack.enter_context(open_wandb(workdir, config)),)
        yield sinks


@contextlib.contextmanager
def open_wandb(workdir: Path, config: Config) -> Iterator[Sink]:
    """A sink that logs to a run of the project, offline where WANDB_MODE says so."""
    import wandb

    file = workdir / ID_FILE
    if not file.exists():
        write_atomically(file, secrets.token_hex(4))
    run = wandb.init(
        project=config.train.wandb_project,
        id=file.read_text(),
        name=workdir.name,
        dir=workdir,
        config=config.to_dict(),
        resume="allow",
    )

    def log(step: int, values: Mapping[str, float], pictures: Sequence[Path]) -> None:
        images = {f"val/{path.stem}": wandb.Image(str(path)) for path in pictures}
        run.log({**values, **images}, step=step)

    try:
        yield log
    finally:
        run.finish()
