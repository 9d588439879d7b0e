"""The files below a folder: one walk for training and prediction."""

import os
from collections.abc import Iterator
from pathlib import Path

from contrastseg_jax.data.audit.examples import Finding


def files_below(
    folder: Path, findings: list[Finding], *, above: tuple[str, ...] = ()
) -> Iterator[Path]:
    """The files below a folder, sorted, each by the path that leads to it.

    Links are followed, but not back to a folder that they lie in (`above`: those on the way, by
    their real paths). Hidden files and folders are left out, and so are pipes and devices. A link
    to nothing is a file that cannot be read. A folder that cannot be read is appended to
    `findings`; one that does not exist has no files.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
        os.stat(os.path.join(folder, "."))  # the names may be readable and the files not
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        findings.append(unreadable(folder, error))
        return
    for path in (folder / name for name in names if not name.startswith(".")):
        if os.path.isdir(path):
            yield from files_below(path, findings, above=(*above, real))
        elif os.path.isfile(path) or os.path.islink(path):
            yield path


def unreadable(path: Path, error: OSError) -> Finding:
    """Names the folder on the way that may not be entered, or else the path itself."""
    closed = next((p for p in reversed(path.parents) if not os.access(p, os.X_OK)), path)
    kind = "permission" if isinstance(error, PermissionError) else "unreadable"
    return Finding(kind, str(closed), f"{closed}: cannot be read ({error.strerror})")
