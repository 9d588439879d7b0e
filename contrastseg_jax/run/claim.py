"""Locking a workdir: it belongs to one run, and one program at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from contrastseg_jax.config.tree import Config
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import lock
from contrastseg_jax.parallel import processes
from contrastseg_jax.run.workdir import find_run, record_config


def resumes(workdir: Path) -> bool:
    """Whether the workdir contains a run to resume: the same answer in all processes."""
    return processes.sync_errors(lambda: find_run(workdir)) is not None


@contextlib.contextmanager
def claimed(workdir: Path, config: Config, *, resume: bool) -> Iterator[None]:
    """Lock the workdir for this run, and record its config.

    `resume`: what `resumes` has said of it.

    Creates the folder, so everything that may fail is done before.

    Raises:
        InputError: in all processes, if the workdir contains a run of another config, another
            program trains there, or the processes do not see the same folder.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            if processes.is_first():
                stack.enter_context(lock(workdir / ".lock"))
                if (find_run(workdir) is not None) != resume:
                    raise InputError(f"{workdir}: another process has just trained here; try again")
            record_config(workdir, config, write=processes.is_first())

        processes.sync_errors(claim)
        processes.require_shared(workdir)
        yield
