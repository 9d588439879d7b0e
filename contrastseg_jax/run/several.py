"""Several runs side by side: that each is one, and that all are of the same data.

Does not import JAX.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from contrastseg_jax.config.rules import decides_evaluation
from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.run.workdir import read_config, saved_steps


def read_runs(workdirs: Sequence[Path]) -> list[Config]:
    """The configs of runs that have a checkpoint, finished or not.

    Raises:
        InputError: a folder holds no run or no checkpoint, is named twice, or the runs are of
            different data.
    """
    places = [os.path.realpath(workdir) for workdir in workdirs]
    for number, workdir in enumerate(workdirs):
        if places[number] in places[:number]:
            raise InputError(f"--runs={workdir}: is named twice")
        if not (workdir / "config.json").is_file():
            raise InputError(f"--runs={workdir}: is not the folder of a run (no config.json)")
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
