"""The record of a run: what its numbers come from, for whoever finds them later.

`record.json` of a workdir has an entry for each start; each evaluation has a record of its own.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from contrastseg_jax import __version__
from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.parallel import processes

FILE_NAME = "record.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGE = Path(__file__).parents[1]
GIT_SECONDS = 10


def environment(mesh: Mesh) -> dict[str, Any]:
    """When and on what the program runs: versions, revision of the code, devices."""
    devices = mesh.devices.flat
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "contrastseg_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "code": {"revision": git_revision(), "digest": processes.code_digest()},
        "devices": {
            "kind": devices[0].device_kind,
            "count": mesh.size,
            "processes": processes.count(),
        },
    }


def git_revision(folder: Path = PACKAGE) -> str:
    """The commit of the code, "-dirty" behind it if files have changed; empty: not a checkout."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # not installed inside another
        return _git(folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout.strip()


def add_start(workdir: Path, entry: Mapping[str, Any], *, resume: bool) -> None:
    """Add the entry of a start to the record of the run; a new run begins a new record."""
    path = workdir / FILE_NAME
    with best_effort(str(path)):
        starts = read_starts(workdir) if resume else []
        write_atomically(path, to_json({"starts": [*starts, dict(entry)]}) + "\n")


def save_evaluation_record(folder: Path, facts: Mapping[str, Any], workdir: Path) -> None:
    """Write the record of an evaluation: its `facts`, and the starts of the run of the workdir."""
    path = folder / FILE_NAME
    with best_effort(str(path)):
        write_atomically(path, to_json({**facts, "starts": read_starts(workdir)}) + "\n")


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a run's starts, oldest first; none: it has no record, or a damaged one."""
    try:
        return list(json.loads((workdir / FILE_NAME).read_text())["starts"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
