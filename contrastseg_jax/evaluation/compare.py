"""The program that compares runs: groups them into arms, and writes the comparison."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contrastseg_jax.config.rules import FOLDERS, OPERATIONAL
from contrastseg_jax.config.tree import leaves
from contrastseg_jax.data.pictures import shortened
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation.runs import Run, read_runs, require_comparable
from contrastseg_jax.report.comparison import Arm, ArmCounts, compare, paired_seeds
from contrastseg_jax.report.comparison_page import NAMES, markdown_table, save_comparison
from contrastseg_jax.report.comparison_tables import Evaluated, overall_tables
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.several import find_workdirs
from contrastseg_jax.run.workdir import is_run, read_config
from contrastseg_jax.text import count_of

MAX_NAMED = 3  # settings in the name of an arm
VALUE_LENGTH = 24  # letters of a setting's value there


def compare_runs(given: Sequence[str], checkpoint: str, split: str, output: Path) -> None:
    """Compare runs, and write the comparison to a folder.

    Args:
        given: workdirs, and folders that contain such; the first is of the baseline.
        checkpoint: "latest", "best" or a step: the evaluation of each run that counts.
        split: that was evaluated.
        output: folder for comparison.md, comparison.json and comparison.html.

    Raises:
        InputError: a run has no such evaluation, they were not evaluated alike, or they are not at
            least two arms that share seeds.
    """
    workdirs = find_workdirs(given)
    if len(workdirs) == 1:
        raise InputError(f"--runs={given[0]}: is a single run; a comparison needs at least two")
    runs = read_runs(workdirs, checkpoint, split)
    require_comparable(runs)
    members = group_runs(runs)
    arms = [arm_of(name, found, members) for name, found in arm_names(members).items()]
    notes = require_pairs(arms) + seen_notes(arms, members, split)
    for note in notes:
        log.warning(note)
    first = runs[0]  # the others have the same data, images and labels
    log.info(
        f"comparing {count_of(len(runs), 'run')} in {count_of(len(arms), 'arm')} on"
        f" {count_of(len(first.counts.image_names), 'image')}"
    )
    counts = [counts_of(found) for found in members]
    comparison = compare(arms, counts, first.counts.labelled, first.counts.class_names)
    evaluated = Evaluated(first.settings["data.name"], split, checkpoint, tuple(notes))
    save_comparison(output, comparison, evaluated)
    for table in overall_tables(comparison):
        for line in ("", table.title, "", *markdown_table(table)):
            log.info(line)
    log.info("")
    log.info(f"written: {', '.join(str(output / name) for name in NAMES)}")


def counts_of(runs: Sequence[Run]) -> ArmCounts:
    """What the runs of an arm counted."""
    return ArmCounts(
        np.stack([run.counts.intersection for run in runs]),
        np.stack([run.counts.predicted for run in runs]),
    )


# --- Arms -----------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed and in OPERATIONAL settings alone, by seed; in order.

    Raises:
        InputError: there is a single group, or one has two runs of a seed.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(experiment(run).values()), []).append(run)
    members = [sorted(found, key=seed_of) for found in groups.values()]
    for found in members:
        for run, other in zip(found, found[1:], strict=False):
            if seed_of(run) == seed_of(other):
                raise InputError(
                    f"--runs: {run.workdir} and {other.workdir} have the same settings and the same"
                    f" seed, {seed_of(run)}; leave out one"
                )
    if len(members) == 1:
        raise InputError(
            f"--runs: all {len(runs)} runs differ in their seeds alone; a comparison needs runs"
            " with other settings as well"
        )
    return members


def experiment(run: Run) -> dict[str, Any]:
    """The settings of a run that make its arm."""
    return _arm_settings(run.settings)


def _arm_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All but the seed and what is of the machine.

    A run that this one starts from counts by its own such settings: each seed has its own.
    """
    left_out = {"seed", *OPERATIONAL}
    kept = {path: value for path, value in settings.items() if path not in left_out}
    start = Path(settings["model.init_from"] or os.devnull)
    if is_run(start):
        first = _arm_settings(dict(leaves(read_config(start))))
        digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
        kept["model.init_from"] = f"run {digest[:6]}"
    return kept


def seed_of(run: Run) -> int:
    """The seed of a run."""
    return run.settings["seed"]


def arm_names(members: Sequence[Sequence[Run]]) -> dict[str, Sequence[Run]]:
    """The groups by a name of the settings in which they differ.

    With more than MAX_NAMED of these, the first that tell the groups apart, and an ellipsis.
    """
    settings = [experiment(found[0]) for found in members]
    paths = differing_paths(settings)
    named = paths if len(paths) <= MAX_NAMED else telling_paths(settings, paths)
    keys = short_keys(named)
    rest = ["…"] if len(named) < len(paths) else []
    names = [
        ", ".join([f"{keys[p]}={value_text(p, x[p])}" for p in named if takes_part(p, x)] + rest)
        for x in settings
    ]
    if len({*names}) < len(names):  # they differ in what was shortened, or takes no part
        names = [", ".join([f"{keys[p]}={x[p]!r}" for p in named] + rest) for x in settings]
    return dict(zip(names, members, strict=True))


def takes_part(path: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting does anything beside the others: not those of a contrast without one."""
    group, candidates = path.partition(".")[0], settings["contrast.candidates"]
    of_contrast = group == "contrast" and path != "contrast.candidates"
    has_contrast, has_memory = candidates != "none", candidates in ("memory", "both")
    return not (of_contrast and not has_contrast) and not (group == "memory" and not has_memory)


def differing_paths(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of which there are several values, in the order of the schema."""
    return [path for path in settings[0] if len({values[path] for values in settings}) > 1]


def telling_paths(settings: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> list[str]:
    """The first of the paths whose values are, taken together, different in all."""
    chosen: list[str] = []
    for path in paths:
        number = len({tuple(values[p] for p in chosen) for values in settings})
        if number == len(settings):
            break
        if len({tuple(values[p] for p in (*chosen, path)) for values in settings}) > number:
            chosen.append(path)
    return chosen


def short_keys(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or the whole of it where another ends alike."""
    ends = [path.rpartition(".")[2] for path in paths]
    return {
        path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)
    }


def value_text(path: str, value: Any) -> str:
    """A setting's value in the name of an arm; of a folder its last part."""
    if path in FOLDERS and value:
        value = Path(value).name
    return shortened(value if isinstance(value, str) and value else repr(value), VALUE_LENGTH)


def arm_of(name: str, runs: Sequence[Run], members: Sequence[Sequence[Run]]) -> Arm:
    """The arm of a group of runs."""
    paths = differing_paths([experiment(found[0]) for found in members])
    return Arm(
        name=name,
        settings={path: runs[0].settings[path] for path in paths},
        workdirs=tuple(str(run.workdir) for run in runs),
        seeds=tuple(map(seed_of, runs)),
        steps=tuple(run.step for run in runs),
        curves=tuple(run.curve for run in runs),
    )


def require_pairs(arms: Sequence[Arm]) -> list[str]:
    """What to say of arms that lack seeds of each other.

    Raises:
        InputError: an arm shares no seed with the baseline, the first.
    """
    baseline, notes = arms[0], []
    for arm in arms[1:]:
        pairs = paired_seeds(arm, baseline)
        if not pairs.seeds:
            raise InputError(
                f"--runs: {arm.name} ({seeds_text(arm.seeds)}) shares no seed with the baseline"
                f" {baseline.name} ({seeds_text(baseline.seeds)}); differences are taken between"
                " runs of the same seed"
            )
        lacking = [
            f"{one.name} lacks {seeds_text(missing)} of {other.name}"
            for one, other in ((arm, baseline), (baseline, arm))
            if (missing := sorted({*other.seeds} - {*one.seeds}))
        ]
        if lacking:
            notes.append(
                f"{'; '.join(lacking)}: their difference is over {seeds_text(pairs.seeds)}."
            )
        if len(pairs.seeds) == 1:
            notes.append(
                f"{arm.name} and {baseline.name} share a single seed, which gives no interval over"
                " seeds."
            )
    return notes


def seen_notes(arms: Sequence[Arm], members: Sequence[Sequence[Run]], split: str) -> list[str]:
    """What to say of arms that were trained on the split; of train one expects it."""
    if split == "train":
        return []
    return [
        f"{arm.name} was trained on {split} as well: its scores tell how well it was learnt."
        for arm, found in zip(arms, members, strict=True)
        if split in found[0].settings["data.train_splits"]
    ]


def seeds_text(seeds: Sequence[int]) -> str:
    """The seeds in words: "seed 1", "seeds 1, 2"."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
