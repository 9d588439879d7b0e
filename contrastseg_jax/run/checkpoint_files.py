"""Checkpoints as they lie on the disk: which there are, and whether their arrays are intact.

checkpoints/STEP/          a finished one: Orbax renames it once it is complete
checkpoints/STEP.damaged/  one whose arrays are not what was saved; kept, but ignored
"""

import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tensorstore
from etils import epath

from contrastseg_jax.errors import InputError, reason, warn_once
from contrastseg_jax.run import digests
from contrastseg_jax.run.workdir import read_score, saved_steps

ITEM = "default"  # the folder of the state within a checkpoint
METADATA = "_CHECKPOINT_METADATA"  # the file within a checkpoint with the digests
CACHE_BYTES = 2**27  # for the index of arrays, which TensorStore reads repeatedly
NETWORK = ("params", "batch_stats")  # the fields of a state that the EMA replaces
LEFTOVERS = (".orbax-checkpoint-tmp", ".deleted")  # suffixes of what a killed run leaves behind


class LiteralPath(type(epath.Path("/"))):
    """A path that Orbax takes literally: `[`, `*`, `?` are characters, `/s3` is a local folder."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """Treat only `pattern` as a pattern, not the path before it."""
        return (self / name for name in glob.glob(pattern, root_dir=self))

    @property
    def _uri_scheme(self) -> None:
        return None


def checkpoint_folder(workdir: Path) -> Path:
    """The folder of a run's checkpoints, as an absolute path."""
    return (workdir / "checkpoints").absolute()


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step of "latest", "best" or a number."""
    steps = saved_steps(workdir)
    if not steps:
        folder = checkpoint_folder(workdir)
        raise InputError(f"{folder}: contains no finished checkpoint; train a run there first")
    if checkpoint == "latest":
        return steps[-1]
    if checkpoint == "best":
        return best_step(workdir, steps)
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"--checkpoint={checkpoint}: must be latest, best or one of {known}")
    return int(checkpoint)


def best_step(workdir: Path, steps: list[int]) -> int:
    """The newest of equals; so the latest if none was evaluated."""
    return max(steps, key=lambda step: (read_score(workdir, step), step))


def find_damage(path: Path, fields: Sequence[str] = ()) -> str:
    """What in a checkpoint is not as it was saved; empty if intact. One process may call it alone.

    Reads every array, or those of some `fields` as in `find_intact`, one after the other. Of a
    checkpoint without digests, from an earlier version, it only checks that they can be read.
    """
    try:
        notes = json.loads((path / METADATA).read_text())["custom_metadata"] or {}
        arrays = _open_arrays(path / ITEM, fields)
        found = {
            name: digests.array_digest(array.read().result()) for name, array in arrays.items()
        }
        step = int(arrays["step"].read().result()) if "step" in arrays else None
    except Exception as error:
        return reason(error)
    if "digests" not in notes:
        warn_once(str(path), f"{path}: has no digests, so damaged arrays would go unnoticed")
    saved = notes.get("digests", found)
    names = found if fields else saved | found
    wrong = [name for name in names if saved.get(name) != found.get(name)]
    if wrong:
        others = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"{', '.join(wrong[:3])}{others} not as saved"
    if step is not None and path.name != str(step):
        return f"it holds the state after {step} steps, so it was renamed or belongs to another run"
    return ""


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is ignored."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged.{number}")
    return path.rename(target)


def clear_leftovers(folder: Path) -> None:
    """Delete what a kill or a failed save left behind; not while saving."""
    for path in folder.iterdir():
        if path.name.endswith(LEFTOVERS):
            shutil.rmtree(path, ignore_errors=True)


def array_names(item: Path, *, with_empty: bool = False) -> list[str]:
    """The names of the stored arrays of a state; `with_empty`: and of those without elements."""
    nodes = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [
        ".".join(part["key"] for part in node["key_metadata"])
        for node in nodes
        if with_empty or not node["value_metadata"]["skip_deserialize"]  # else it is None
    ]


def stored_fields(names: Sequence[str], fields: Sequence[str]) -> set[str]:
    """The stored fields to read for the given ones: the EMA for the network, if kept."""
    has_ema = any(name.startswith("ema.") for name in names)
    return {"ema" if has_ema and field in NETWORK else field for field in fields}


def without_empty(tree: Any) -> Any:
    """The tree without empty arrays, which Orbax does not store."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def _open_arrays(item: Path, fields: Sequence[str]) -> dict[str, tensorstore.TensorStore]:
    """The stored arrays of a state, or of some of its fields, by name."""
    names = array_names(item)
    if fields:
        stored = {"step", *stored_fields(names, fields)}
        names = [name for name in names if name.partition(".")[0] in stored]
    cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    files = {"driver": "file", "path": f"{item}/"}
    stores = [{"driver": "ocdbt", "base": files, "path": name} for name in names]
    opened = [
        tensorstore.open({"driver": "zarr", "kvstore": store}, read=True, context=cache)
        for store in stores
    ]
    return {name: array.result() for name, array in zip(names, opened, strict=True)}
