"""Lists the files below a folder, with the same rules for training data and for prediction."""

import os
from collections.abc import Iterator
from pathlib import Path

from contrastseg_jax.data.audit.examples import Finding


def files_below(
    folder: Path, findings: list[Finding], *, parents: tuple[str, ...] = ()
) -> Iterator[Path]:
    """The files below a folder, sorted, each by the path that leads to it.

    Links are followed, except to a folder that contains them (`parents`: the real paths of the
    folders above). Hidden files and folders are left out, and so are pipes and devices. A broken
    link counts as a file, which cannot be read. A folder that cannot be read is appended to
    `findings`; one that does not exist has no files.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        names = sorted(os.listdir(folder))
        os.stat(os.path.join(folder, "."))  # a folder may be listed but not entered
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        findings.append(unreadable(folder, error))
        return
    for path in (folder / name for name in names if not name.startswith(".")):
        if os.path.isdir(path):
            yield from files_below(path, findings, parents=(*parents, real))
        elif os.path.isfile(path) or os.path.islink(path):
            yield path


def unreadable(path: Path, error: OSError) -> Finding:
    """The finding for a path, or for a folder above it that may not be entered."""
    closed = next((p for p in reversed(path.parents) if not os.access(p, os.X_OK)), path)
    kind = "permission" if isinstance(error, PermissionError) else "unreadable"
    return Finding(kind, str(closed), f"{closed}: cannot be read ({error.strerror})")
