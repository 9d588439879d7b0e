"""Cross entropy, contrast and memory on the embedded photographs, over seeds: one table.

    python benchmarks/variants.py --workdir=runs/variants --seeds=3

Each run is `main.py` with configs/quickstart.py; the score is that of the last step, so nothing is
selected on the held-out blocks. Runs that have finished are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[1]
VARIANTS = ("ce", "contrast", "memory")

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/variants", "Folder of the runs.")
flags.DEFINE_integer("seeds", 3, "Number of seeds.")


def main(_: list[str]) -> None:
    """Runs what has not been run, then prints the table in Markdown."""
    scores: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for seed in range(FLAGS.seeds):  # every variant of a seed before the next seed
        for variant in VARIANTS:
            scores[variant].append(last_scores(variant, seed))
    classes = list(scores["ce"][0]["iou"])
    print("| variant | mIoU | " + " | ".join(classes) + " |")
    print("| --- " * (len(classes) + 2) + "|")
    for variant, runs in scores.items():
        mean = np.array([run["mean_iou"] for run in runs])
        columns = [f"{np.mean([run['iou'][name] for run in runs]):.2f}" for name in classes]
        spread = f" ± {mean.std(ddof=1):.3f}" if len(mean) > 1 else ""
        print(f"| `{variant}` | {mean.mean():.3f}{spread} | " + " | ".join(columns) + " |")


def last_scores(variant: str, seed: int) -> dict:
    """The evaluation after the last step of a run."""
    workdir = Path(FLAGS.workdir) / f"{variant}_{seed}"
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}"),
            f"--config={ROOT}/configs/quickstart.py:hrnet_tiny,{variant}",
            f"--config.seed={seed}",
        ],
        check=True,
    )
    folder = max((workdir / "eval").iterdir(), key=lambda path: int(path.name))
    return json.loads((folder / "metrics.json").read_text())


if __name__ == "__main__":
    app.run(main)
