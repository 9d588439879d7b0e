"""Writing checkpoints: in the background, by Orbax, and verified by reading them back."""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from contrastseg_jax.errors import InputError, best_effort, reason
from contrastseg_jax.files import require_disk_space
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import digests
from contrastseg_jax.run.checkpoint_files import (
    ITEM,
    LiteralPath,
    best_step,
    checkpoint_folder,
    clear_leftovers,
    find_damage,
    set_aside,
    without_empty,
)
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import saved_steps
from contrastseg_jax.structs import TrainState


@dataclass
class Writer:
    """Writes checkpoints in the background, one at a time."""

    workdir: Path
    keep_checkpoints: int
    orbax: ocp.AsyncCheckpointer
    thread: ThreadPoolExecutor  # waits for Orbax, and verifies what it has written
    saving: Future[str] | None = None  # its result becomes `problem`
    problem: str = ""  # why the newest checkpoint could not be saved; empty: it was


def prepare(workdir: Path, state: TrainState) -> None:
    """Clean up after a killed run, and test that checkpoints can be written and read back.

    `state`: the arrays that will be saved, or their shapes and dtypes.

    Raises:
        InputError: the test failed, or the disk has no space for one.
    """
    size = _num_bytes(state)
    processes.sync_errors(
        lambda: _prepare(checkpoint_folder(workdir), size) if processes.is_first() else None
    )


@contextlib.contextmanager
def open_writer(workdir: Path, *, keep_checkpoints: int) -> Iterator[Writer]:
    """Keeps the newest checkpoints and the best by val mIoU; on exit, waits for pending writes.

    Raises:
        InputError: on exit, the newest checkpoint could not be saved.
    """
    if processes.is_first():
        checkpoint_folder(workdir).mkdir(parents=True, exist_ok=True)
    options = ocp.AsyncOptions(create_directories_asynchronously=False)  # fails at once
    orbax = ocp.AsyncCheckpointer(_first_replicas_handler(), async_options=options)
    with (
        _cleared_at_end(checkpoint_folder(workdir)),
        ThreadPoolExecutor(1) as thread,
        contextlib.closing(orbax),
    ):
        writer = Writer(workdir, keep_checkpoints, orbax, thread)
        try:
            yield writer
        finally:
            _wait(writer)
        if writer.problem:
            raise InputError(f"the last checkpoint is missing: {writer.problem}")
        if processes.is_first():
            _delete_old(writer)  # again, as the newest may have been evaluated since


def save(writer: Writer, step: int, state: TrainState) -> None:
    """Start saving in the background, atomically.

    Once the checkpoint is verified, older ones are deleted. A failure is a warning, and the last
    intact checkpoint is kept.
    """
    _wait(writer)
    path, stored = checkpoint_folder(writer.workdir) / str(step), without_empty(state)
    size = _num_bytes(state)
    try:
        # Orbax would fail on a full disk too, but its threads keep writing after that.
        processes.sync_errors(
            lambda: require_disk_space(path.parent, size) if processes.is_first() else None
        )
        writer.orbax.save(
            LiteralPath(path),
            args=ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(stored)}),
            custom_metadata={"digests": digests.state_digests(stored)},
        )
    except Exception as error:
        if processes.count() > 1 and not isinstance(error, InputError):
            raise  # the others wait for this one
        writer.problem = _not_saved(path, reason(error))
        return
    writer.saving = writer.thread.submit(_finish_save, writer, path)


def _prepare(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    try:
        require_disk_space(folder, size)
    except OSError as error:
        raise InputError(f"a checkpoint would not fit: {reason(error)}") from error
    path, arrays = folder / "probe.deleted", {"probe": np.arange(1000, dtype=np.float32)}
    notes = {"digests": {name: digests.array_digest(array) for name, array in arrays.items()}}
    try:
        with _single_process_checkpointer() as orbax:
            args = ocp.args.Composite(**{ITEM: ocp.args.StandardSave(arrays)})
            orbax.save(LiteralPath(path), args=args, custom_metadata=notes)
        problem = find_damage(path)
    except Exception as error:
        problem = reason(error)
    shutil.rmtree(path, ignore_errors=True)
    if problem:
        raise InputError(
            f"{folder}: checkpoints cannot be stored there; a small test one could not be read back"
            f" ({problem})"
        )


def _finish_save(writer: Writer, path: Path) -> str:
    """Wait until Orbax has written a checkpoint, and verify it; the problem, if any."""
    try:
        writer.orbax.wait_until_finished()
    except Exception as error:
        if processes.count() > 1:
            raise
        return _not_saved(path, reason(error))
    if processes.is_first():
        if problem := find_damage(path):
            return _not_saved(path, f"read back, {problem}; renamed to {set_aside(path).name}")
        _delete_old(writer)
    return ""


def _wait(writer: Writer) -> None:
    """Wait for the checkpoint being written."""
    if writer.saving:
        writer.problem, writer.saving = writer.saving.result(), None


def _not_saved(path: Path, why: str) -> str:
    for partial in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
    problem = f"{path}: could not be saved ({why})"
    steps = saved_steps(path.parents[1])
    last = f"the last checkpoint is step {steps[-1]}" if steps else "there is no other"
    log.warning(f"{problem}; {last}")
    return problem


@contextlib.contextmanager
def _cleared_at_end(folder: Path) -> Iterator[None]:
    """Clear leftovers on exit: Orbax's threads may keep writing after a failure until closed."""
    try:
        yield
    finally:
        if processes.is_first():
            clear_leftovers(folder)


def _delete_old(writer: Writer) -> None:
    clear_leftovers(
        checkpoint_folder(writer.workdir)
    )  # Orbax's threads may keep writing after a failure
    steps = saved_steps(writer.workdir)
    kept = {
        *steps[-writer.keep_checkpoints :],
        *([best_step(writer.workdir, steps)] if steps else []),
    }
    for step in set(steps) - kept:
        path = checkpoint_folder(writer.workdir) / str(step)
        with best_effort(f"deleting {path}"):
            shutil.rmtree(path.rename(path.with_name(f"{step}.deleted")))


def _first_replicas_handler() -> ocp.CompositeCheckpointHandler:
    """Writes the first replica of each array, which is the one the digests are computed from.

    By default every process writes a part of each replicated array. But replicas may differ in the
    last bits, where different hosts or compilation caches led to different programs.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    state: Any = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return ocp.CompositeCheckpointHandler(**{ITEM: state})


def _single_process_checkpointer() -> ocp.Checkpointer:
    """An Orbax checkpointer for this process alone, without barriers."""
    index = processes.index()
    options = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _num_bytes(state: TrainState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
