"""What the train step sends between 2, 8, 32 and 128 devices, by kind of collective: one table.

    python benchmarks/collectives.py

Virtual devices of the CPU, one image on each; the figures are those of the compiled program, by
`main.py --mode=plan`. With the bank whole on each device and in parts, and once with the parameters
in parts as well. Beside them what the plan computes without compiling.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).parents[1]
SLOTS = "memory.sharding=slots"
LAYOUTS = {"whole": (), "in parts": (SLOTS,), "in parts, `fsdp`": (SLOTS, "parallel.fsdp=True")}
SETTINGS = (
    *("augment.crop_size=(128, 128)", "memory.pixel_size=4096", "memory.segment_size=4096"),
    *("memory.pixels_per_class=4", "contrast.anchors_per_image=64"),
)
COLUMNS = (
    *("devices", "bank", "bank of a device", "all-reduce", "all-gather", "reduce-scatter"),
    *("others", "largest", "sum", "computed"),
)

FLAGS = flags.FLAGS
flags.DEFINE_list("devices", ["2", "8", "32", "128"], "Numbers of devices.")
flags.DEFINE_string("model", "hrnet_w18_small", "The network.")


def main(_: list[str]) -> None:
    """Prints the table in Markdown; bytes are those of one device and step, in MB."""
    print(f"{FLAGS.model}, MB\n\n| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    for number in map(int, FLAGS.devices):
        for layout, settings in LAYOUTS.items():
            plan = plan_of(number, settings)
            by_kind = {kind: c["bytes"] for kind, c in plan["compiled"]["collectives"].items()}
            largest = max(c["largest"] for c in plan["compiled"]["collectives"].values())
            sums = [by_kind.pop(kind, 0) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
            others = sum(by_kind.values())
            computed = sum(plan["bytes_sent"].values())
            sizes = plan["bytes_held"]["bank"], *sums, others, largest, sum(sums) + others, computed
            cells = f"{number}", layout, *(f"{size / 1e6:.2f}" for size in sizes)
            print(f"| {' | '.join(cells)} |", flush=True)


def plan_of(num_devices: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """The figures of `--mode=plan` with one image on each device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        subprocess.run(  # its status is 1 where all these devices do not fit this machine
            [
                *(sys.executable, str(ROOT / "main.py"), "--mode=plan"),
                f"--config={ROOT / 'configs' / 'cityscapes.py'}:{FLAGS.model},memory",
                f"--config.train.batch_size={num_devices}",
                *(f"--config.{setting}" for setting in (*SETTINGS, *settings)),
                *(f"--topology=cpu:{num_devices}", f"--output={path}"),
            ],
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
            check=False,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(path.read_text())


if __name__ == "__main__":
    app.run(main)
