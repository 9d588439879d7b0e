"""Does contrast help? Runs on CamVid in rounds, each a table of arms, subsets and seeds.

    python benchmarks/study.py --camvid=CAMVID --output=runs/study                # all rounds
    python benchmarks/study.py --camvid=CAMVID --output=runs/study --rounds=weight
    python benchmarks/study.py --camvid=CAMVID --rounds=weight --arms=ce-lr0.2,contrast-w0.5-lr0.05

Each run is `main.py` with configs/camvid.py at a short side of 120, from nothing. Settings are
chosen on a development split: runs train on four fifths of the training images and are scored on
the rest, the last fifth of each drive. What was chosen is confirmed on the published split with new
seeds, each scored once on val. The score is that of the last step: nothing is selected by it.

Runs that have finished are not repeated, and one that was stopped resumes, so the command can be
given again at any time, or several times at once: each trains runs that no other does. It ends with
a table of each round, and where a round has several seeds with their comparison, as
`--mode=compare` makes it, in OUTPUT/ROUND/SUBSET/comparison.
"""

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import app, flags

from contrastseg_jax.errors import InputError
from contrastseg_jax.files import lock
from contrastseg_jax.run.workdir import read_score

ROOT = Path(__file__).parents[1]

FLAGS = flags.FLAGS
flags.DEFINE_string("camvid", None, "Folder of CamVid, as SegNet published it.", required=True)
flags.DEFINE_string("output", "runs/study", "Folder of the runs.")
flags.DEFINE_list("rounds", [], "Rounds to run; empty: all, in the order of the table.")
flags.DEFINE_list("arms", [], "Arms of these rounds to run; empty: all.")

NUM_STEPS = 800
# Small enough for two cores. The learning rate is a part of the study.
BASE = (
    *("data.short_side=120", "augment.crop_size=(120,160)", "data.num_threads=2"),
    *("data.cache_size=400", "model.proj_dim=128", "contrast.anchors_per_image=128"),
    *("optim.ema_decay=0.98", "train.batch_size=8", "eval.num_pictures=0"),
    *("contrast.warmup_steps=100", f"train.checkpoint_steps={NUM_STEPS}"),
)
# Share of the class in the training pixels to the power of -1/3, with a mean of 1 over the pixels.
CLASS_WEIGHTS = "loss.class_weights=(0.95,0.85,2.44,0.77,1.47,1.14,2.3,2.33,1.34,2.81,3.66)"


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    variant: str  # of the recipe: ce, contrast, memory or pretrain
    settings: tuple[str, ...] = ()
    model: str = "hrnet_tiny"
    num_steps: int = NUM_STEPS
    start: "Arm | None" = None  # whose run this one starts from


@dataclass(frozen=True)
class Round:
    """Arms to compare on the same images with the same seeds."""

    arms: tuple[Arm, ...]
    subsets: tuple[str, ...]  # of data.train_subset
    seeds: tuple[int, ...]
    published: bool = False  # trained and scored on CamVid's own split


def cross_entropy(rate: float, *settings: str, name: str = "", num_steps: int = NUM_STEPS) -> Arm:
    """Cross entropy alone at a learning rate."""
    settings = (f"optim.learning_rate={rate}", *settings)
    return Arm(f"ce-lr{rate}{name}", "ce", settings, num_steps=num_steps)


def contrast(weight: float, *settings: str, rate: float = 0.05, name: str = "") -> Arm:
    """Contrast in the batch with a weight."""
    settings = (f"optim.learning_rate={rate}", f"contrast.loss_weight={weight}", *settings)
    return Arm(f"contrast-w{weight}-lr{rate}{name}", "contrast", settings)


def memory(name: str, *settings: str) -> Arm:
    """Contrast with the bank at the weight and rate that the first round found."""
    return Arm(f"memory{name}", "memory", (*CHOSEN, *BANK, *settings))


RAMP = "contrast.ramp_steps=400"
# Of 46 images; the recipe's are of 367.
BANK = ("memory.pixel_size=460", "memory.segment_size=46")
CHOSEN = ("optim.learning_rate=0.05", "contrast.loss_weight=0.5")
BATCH = Arm("contrast", "contrast", CHOSEN)
EMA_KEYS = "memory.key_network=ema"
CORRECT_KEYS = "memory.key_pixels=correct"
DISTORTED = "augment.color_distortion=1.0"
HALF = NUM_STEPS // 2


def halves(name: str, first: Arm) -> Arm:
    """A first half of any kind, then cross entropy on the whole network."""
    return Arm(name, "ce", ("optim.learning_rate=0.05",), num_steps=HALF, start=first)


# Seven trials for either side. The long arm takes the wall time of contrast.
WEIGHT = (
    *(cross_entropy(rate) for rate in (0.05, 0.1, 0.025, 0.2, 0.4)),
    cross_entropy(0.05, CLASS_WEIGHTS, name="-class-weights"),
    cross_entropy(0.05, name="-long", num_steps=1000),
    *(contrast(weight) for weight in (0.5, 0.1, 1.0, 0.25, 1.5)),
    *(contrast(weight, RAMP, name="-ramp") for weight in (0.5, 1.0)),
)
ROUNDS = {
    "weight": Round(WEIGHT, subsets=("46",), seeds=(0,)),
    # Both sides at the rate and with the class weights that cross entropy prefers.
    "rate": Round(
        (
            cross_entropy(0.2, CLASS_WEIGHTS, name="-class-weights"),
            contrast(0.5, rate=0.2),
            contrast(1.0, rate=0.2),
            contrast(0.5, CLASS_WEIGHTS, name="-class-weights"),
            contrast(0.5, CLASS_WEIGHTS, rate=0.2, name="-class-weights"),
        ),
        subsets=("46",),
        seeds=(0,),
    ),
    # The class weights at the rates beside it, as many trials for either side.
    "rate-class-weights": Round(
        (
            cross_entropy(0.1, CLASS_WEIGHTS, name="-class-weights"),
            cross_entropy(0.4, CLASS_WEIGHTS, name="-class-weights"),
            contrast(1.0, CLASS_WEIGHTS, rate=0.2, name="-class-weights"),
        ),
        subsets=("46",),
        seeds=(0,),
    ),
    # The best of either side.
    "confirm": Round(
        (
            cross_entropy(0.2, CLASS_WEIGHTS, name="-class-weights"),
            contrast(0.5, CLASS_WEIGHTS, rate=0.2, name="-class-weights"),
        ),
        subsets=("46", ""),
        seeds=(10, 11, 12, 13, 14),
        published=True,
    ),
    "bank": Round(
        (
            BATCH,
            memory(""),
            memory("-correct", CORRECT_KEYS),
            memory("-ema", EMA_KEYS),
            memory("-correct-ema", CORRECT_KEYS, EMA_KEYS),
            memory("-filled-first", "contrast.warmup_steps=400"),
            memory("-pixels", "memory.segment_size=0"),
        ),
        subsets=("46",),
        seeds=(0, 1),
    ),
    "pretrain": Round(
        (
            halves("contrast-first", Arm("pretrain", "pretrain", CHOSEN, num_steps=HALF)),
            halves("ce-first", cross_entropy(0.05, DISTORTED, name="-half", num_steps=HALF)),
            cross_entropy(0.05, DISTORTED, name="-distorted"),
        ),
        subsets=("46",),
        seeds=(0, 1),
    ),
    "temperature": Round(
        tuple(
            Arm(f"temperature-{t}", "contrast", (*CHOSEN, f"contrast.temperature={t}"))
            for t in (0.05, 0.07, 0.1, 0.2, 0.3, 0.4)
        ),
        subsets=("46",),
        seeds=(0,),
    ),
}


def main(_: list[str]) -> None:
    """Run what has not been run, then print the tables in Markdown."""
    names = FLAGS.rounds or list(ROUNDS)
    for name in names:
        for arm, subset, seed in cells(ROUNDS[name]):
            with contextlib.suppress(InputError), lock(lock_file(name, arm, subset, seed)):
                train(name, arm, subset, seed)
    for name in names:
        print_table(name)
        if len(ROUNDS[name].seeds) > 1:
            compare(name)


def cells(plan: Round) -> Iterator[tuple[Arm, str, int]]:
    """The runs of a round: every arm of a seed before the next seed."""
    for subset, seed, arm in itertools.product(plan.subsets, plan.seeds, plan.arms):
        if not FLAGS.arms or arm.name in FLAGS.arms:
            yield arm, subset, seed


def workdir(name: str, arm: Arm, subset: str, seed: int) -> Path:
    """The folder of a run."""
    return Path(FLAGS.output) / name / (subset or "all") / arm.name / f"seed{seed}"


def lock_file(name: str, arm: Arm, subset: str, seed: int) -> Path:
    """Locked while a run is trained."""
    folder = workdir(name, arm, subset, seed)
    return folder.with_name(f"{folder.name}.lock")


def train(name: str, arm: Arm, subset: str, seed: int) -> None:
    """Start or resume a run."""
    folder = workdir(name, arm, subset, seed)
    if read_score(folder, arm.num_steps) > -math.inf:
        return
    if arm.start:
        train(name, arm.start, subset, seed)
    camvid = Path(FLAGS.camvid).resolve()
    root = camvid if ROUNDS[name].published else development_split(camvid)
    settings = (
        *BASE,
        *(f"data.root={root}", f"data.train_subset={subset}", f"seed={seed}"),
        *(f"train.num_steps={arm.num_steps}", f"train.eval_steps={arm.num_steps}"),
        *(f"data.prepared_dir={Path(FLAGS.output).resolve() / 'prepared'}",),
        *(f"parallel.compilation_cache={Path(FLAGS.output).resolve() / 'compiled'}",),
        *arm.settings,
    )
    if arm.start:
        settings += (f"model.init_from={workdir(name, arm.start, subset, seed).resolve()}",)
    command = [
        *(sys.executable, str(ROOT / "main.py"), f"--workdir={folder}"),
        f"--config={ROOT}/configs/camvid.py:{arm.model},{arm.variant}",
        *(f"--config.{setting}" for setting in settings),
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        status = subprocess.run(command, check=False, stdout=log, stderr=log).returncode
    failed = f" (failed: {folder}.log)" if status else ""  # an arm may diverge
    print(f"{folder}: {read_score(folder, arm.num_steps):.4f}{failed}", flush=True)


def development_split(published: Path) -> Path:
    """A folder whose val images are the last fifth of each drive's training images.

    Neighbouring frames of a drive show nearly the same, so a random fifth would be known by heart.
    """
    root = Path(FLAGS.output).resolve() / "development"
    drives = defaultdict(list)
    for line in (published / "train.txt").read_text().splitlines():
        drives[Path(line.split()[0]).name.split("_")[0]].append(line)
    parts: dict[str, list[str]] = {"train": [], "val": []}
    for lines in drives.values():
        end = len(lines) - len(lines) // 5
        parts["train"] += lines[:end]
        parts["val"] += lines[end:]
    root.mkdir(parents=True, exist_ok=True)
    for folder in ("train", "trainannot"):
        if not os.path.lexists(root / folder):
            (root / folder).symlink_to(published / folder)
    for split, lines in parts.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def compare(name: str) -> None:
    """Compare the arms of a round with its first one, subset by subset."""
    plan = ROUNDS[name]
    for subset in plan.subsets:
        folders = [
            folder
            for arm, seed in itertools.product(plan.arms, plan.seeds)
            if read_score(folder := workdir(name, arm, subset, seed), arm.num_steps) > -math.inf
        ]
        output = Path(FLAGS.output) / name / (subset or "all") / "comparison"
        runs = (f"--runs={folder}" for folder in folders)
        command = (sys.executable, str(ROOT / "main.py"), "--mode=compare", *runs)
        subprocess.run((*command, f"--output={output}"), check=False)


def print_table(name: str) -> None:
    """Mean and standard deviation of the val mIoU of each arm, and the score of each seed."""
    plan = ROUNDS[name]
    for subset in plan.subsets:
        print(f"\n{name}, {subset or 'all'} images\n")
        print("| arm | mean | " + " | ".join(f"seed {seed}" for seed in plan.seeds) + " |")
        print("| --- " * (len(plan.seeds) + 2) + "|")
        for arm in plan.arms:
            folders = [workdir(name, arm, subset, seed) for seed in plan.seeds]
            print_row(arm.name, [read_score(folder, arm.num_steps) for folder in folders])


def print_row(name: str, scores: Sequence[float]) -> None:
    """A line of a table in Markdown."""
    spread = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
    cells = (f"{np.mean(scores):.4f}{spread}", *(f"{score:.4f}" for score in scores))
    print("|", " | ".join((f"`{name}`", *cells)), "|", flush=True)


if __name__ == "__main__":
    app.run(main)
