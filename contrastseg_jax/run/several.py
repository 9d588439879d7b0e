"""Several runs side by side: finding them, and that all are of the same data.

Does not import JAX.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from contrastseg_jax.config.rules import decides_evaluation
from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.run.workdir import is_run, read_config, saved_steps


def find_workdirs(given: Sequence[str]) -> list[Path]:
    """The workdirs that --runs names, and those in the folders that it names, in order.

    Raises:
        InputError: a folder does not exist or contains no run, or a run is given twice.
    """
    given_by: dict[str, str] = {}  # by real path
    workdirs = []
    for text in given:
        folder = Path(os.path.expanduser(text))
        if not folder.is_dir():
            raise InputError(f"--runs={text}: no such folder")
        found = list(workdirs_below(folder))
        if not found:
            raise InputError(
                f"--runs={text}: contains no run, a folder with config.json and checkpoints or eval"
            )
        for workdir in found:
            real = os.path.realpath(workdir)
            if real in given_by:
                raise InputError(
                    f"--runs={text}: the run {workdir} is given twice, by --runs={given_by[real]}"
                    " as well"
                )
            given_by[real] = text
        workdirs += found
    return workdirs


def workdirs_below(folder: Path, parents: tuple[str, ...] = ()) -> Iterator[Path]:
    """The folder if it is a workdir, or else those below it, sorted.

    Links are followed, except to a folder that contains them (`parents`: the real paths of the
    folders above). Hidden folders are left out.
    """
    if is_run(folder):
        yield folder
        return
    real = os.path.realpath(folder)
    if real in parents:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from workdirs_below(path, (*parents, real))


def read_configs(workdirs: Sequence[Path]) -> list[Config]:
    """The configs of runs that have a checkpoint, finished or not.

    Raises:
        InputError: a run has no checkpoint, or they are of different data.
    """
    for workdir in workdirs:
        if not saved_steps(workdir):
            raise InputError(f"--runs={workdir}: contains no finished checkpoint; train it first")
    configs = [read_config(workdir) for workdir in workdirs]
    require_same_data(workdirs, configs)
    return configs


def require_same_data(workdirs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Raise an InputError that lists the settings in which a run's images or labels differ."""
    first, *others = (_data_settings(config) for config in configs)
    problems = [
        f"{path} = {value!r} in {workdirs[0]}, {other[path]!r} in {workdir}"
        for workdir, other in zip(workdirs[1:], others, strict=True)
        for path, value in first.items()
        if other[path] != value
    ]
    if problems:
        given = " ".join(f"--runs={workdir}" for workdir in workdirs)
        raise listed(f"{given}, whose data differ", problems)


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """What to call the runs: the names of their folders, or where those are equal, the paths."""
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def _data_settings(config: Config) -> dict[str, object]:
    """The settings of a run's data, as they are seen in an evaluation."""
    settings = {
        path: value
        for path, value in leaves(config)
        if path.startswith("data.") and decides_evaluation(path)
    }
    place = os.path.realpath(config.data.root) if config.data.root else ""
    return settings | {"data.root": place, "eval.pad_multiple": config.eval.pad_multiple}
