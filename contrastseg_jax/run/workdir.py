"""The workdir of a run: its config, checkpoint steps and scores.

Does not import JAX.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contrastseg_jax.config.load import from_json, override, to_json
from contrastseg_jax.config.rules import DURATION, LEFT_OPEN, OPERATIONAL
from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.errors import InputError, listed, warn_once
from contrastseg_jax.files import write_atomically

# Lists of images in a workdir, files without suffix, and the setting that chose them.
IMAGE_LISTS = {
    "train_images": "data.train_subset",
    "split/train": "data.val_fraction",
    "split/val": "data.val_fraction",
}


def is_run(folder: Path) -> bool:
    """Whether a folder is a workdir: it has a config, and checkpoints or evaluations."""
    has_results = any((folder / name).is_dir() for name in ("checkpoints", "eval"))
    return has_results and (folder / "config.json").is_file()


def read_config(
    workdir: Path, overrides: Sequence[str] = (), *, may_differ: Sequence[str] = ()
) -> Config:
    """The config of the run in a workdir; only OPERATIONAL and `may_differ` settings may differ."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"--workdir={workdir}: has no config.json; train a run there first")
    run = from_json(path.read_text(), str(path))
    config = override(run, overrides)
    require_same_config(config, run, workdir, may_differ=may_differ)
    return config


def record_config(workdir: Path, config: Config, *, write: bool = True) -> None:
    """Record the config in the workdir, unless it contains a run of another config.

    `write`: only process 0 writes; the others only check.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: is a file, not a folder")
    run = find_run(workdir)
    if run is not None:
        require_same_config(config, run, workdir, may_differ=DURATION)
        if (last := saved_steps(workdir)[-1]) > config.train.num_steps:
            raise InputError(
                f"train.num_steps = {config.train.num_steps}: the run in {workdir} has a checkpoint"
                f" of step {last}; it can be raised, or lowered as far as that"
            )
    if write:
        write_atomically(workdir / "config.json", to_json(config))


def record_images(workdir: Path, lists: Mapping[str, Sequence[str]], *, resume: bool) -> None:
    """Keep the names of the images that IMAGE_LISTS have, each where its setting is used.

    `resume`: the run goes on, which it does with the images it has begun with.

    Raises:
        InputError: it has begun with others.
    """
    for name, setting in IMAGE_LISTS.items():
        file, text = workdir / f"{name}.txt", "".join(f"{image}\n" for image in lists.get(name, ()))
        if not resume:
            file.unlink(missing_ok=True)
            if text:
                write_atomically(file, text)
        elif file.exists() and file.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{file}: the run has begun with other images than {setting} now gives; use another"
                " workdir"
            )


def recorded_images(workdir: Path, name: str) -> list[str] | None:
    """The images of a list that the run has begun with; None: it has no such list."""
    try:
        return (workdir / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None


def find_run(workdir: Path) -> Config | None:
    """The config of the run in a workdir, if there is one.

    A run has a finished checkpoint: one that stopped before may be restarted with other settings.
    """
    path = workdir / "config.json"
    if not saved_steps(workdir):
        return None
    if not path.exists():
        raise InputError(f"--workdir={workdir}: has checkpoints but no config.json")
    return from_json(path.read_text(), str(path))


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the finished checkpoints, in order."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def evaluation_folder(workdir: Path, step: int, split: str = "val") -> Path:
    """The folder for scores and pictures of a checkpoint."""
    return workdir / "eval" / (str(step) if split == "val" else f"{step}_{split}")


def evaluated_steps(workdir: Path, split: str = "val") -> list[int]:
    """The steps of the evaluations of a split, in order."""
    names = {path.parent.name for path in workdir.glob("eval/*/metrics.json")}
    numbers = {name.partition("_")[0] for name in names}
    steps = sorted(int(number) for number in numbers if number.isdecimal())
    return [step for step in steps if evaluation_folder(workdir, step, split).name in names]


def read_score(workdir: Path, step: int) -> float:
    """The val mIoU, by which "best" is chosen; -inf for a checkpoint without a score."""
    path = evaluation_folder(workdir, step) / "metrics.json"
    try:
        score = json.loads(path.read_text())["mean_iou"]
        return -math.inf if score is None else float(score)
    except FileNotFoundError:
        return -math.inf
    except (OSError, ValueError, LookupError, TypeError) as error:
        warn_once(str(path), f"{path}: is damaged ({error!r}); step {step} counts as not evaluated")
        return -math.inf


def has_stalled(workdir: Path, patience: int, step: int) -> bool:
    """Whether the last `patience` evaluations of val, up to `step`, are none of them the best.

    Of equals the first is the best. With a patience of 0 they never are.
    """
    steps = [other for other in evaluated_steps(workdir) if other <= step]
    scores = [read_score(workdir, other) for other in steps]
    return bool(patience and scores) and len(scores) - 1 - scores.index(max(scores)) >= patience


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` as far as they were logged; a kill may have truncated one."""
    path, lines = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def require_same_config(
    config: Config, run: Config, workdir: Path, *, may_differ: Sequence[str] = ()
) -> None:
    """Raise an InputError listing the settings, except OPERATIONAL ones, that differ.

    `may_differ`: paths of further settings that may differ.
    """
    values = dict(leaves(run))
    other_weights = config.model.init_from != run.model.init_from
    of_weights = LEFT_OPEN if other_weights else ()  # settings that follow the weights
    ignored = (*OPERATIONAL, *may_differ, *of_weights)
    different = [
        f"{path} = {value!r}: the run has {values[path]!r}"
        for path, value in leaves(config)
        if path not in ignored and value != values[path]
    ]
    if different:
        raise listed(f"--workdir={workdir}, which contains a run of another config", different)
