"""Checkpoints of the whole `TrainState`: written by Orbax, and read back before they count.

checkpoints/STEP/          a whole one: Orbax puts it there once all of it is written
checkpoints/STEP.damaged/  one whose arrays are not what was saved; kept, and read by nobody
"""

import contextlib
import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from contrastseg_jax.errors import InputError, best_effort, listed, reason, warn_once
from contrastseg_jax.files import require_disk_space
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import digests
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import read_score, saved_steps
from contrastseg_jax.structs import TrainState

ITEM = "default"  # the folder of the state, in that of a checkpoint
METADATA = "_CHECKPOINT_METADATA"  # the file, there, of what Orbax notes, and of the digests
CACHE_BYTES = 2**27  # of what TensorStore reads again and again: which array lies where
NETWORK = ("params", "batch_stats")  # the fields of a state that running averages stand in for
LEFTOVERS = (".orbax-checkpoint-tmp", ".deleted")  # what a kill leaves behind ends so


class LiteralPath(type(epath.Path("/"))):
    """A path for Orbax in which `[`, `*` and `?` are letters, and `/s3` is a folder like others."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """Without this, what stands before `pattern` would be one too."""
        return (self / name for name in glob.glob(pattern, root_dir=self))

    @property
    def _uri_scheme(self) -> None:
        return None


@dataclass
class Writer:
    """Writes checkpoints in the background, one at a time."""

    workdir: Path
    keep_checkpoints: int
    orbax: ocp.AsyncCheckpointer
    thread: ThreadPoolExecutor  # waits for Orbax, and reads back what it has written
    saving: Future[str] | None = None  # its result: as `problem`
    problem: str = ""  # why the newest checkpoint could not be saved; empty: it could


def prepare(workdir: Path, state: TrainState) -> None:
    """Clear away what a kill has left, and see that checkpoints written there come back.

    `state`: arrays, or their shapes and dtypes, as large as those that will be saved.

    Raises:
        InputError: they do not come back, or the disk has no room for one.
    """
    size = _num_bytes(state)
    processes.sync_errors(
        lambda: _prepare(_folder(workdir), size) if processes.is_first() else None
    )


@contextlib.contextmanager
def open_writer(workdir: Path, *, keep_checkpoints: int) -> Iterator[Writer]:
    """Keeps the newest checkpoints and the best by val mIoU; all are written when it ends.

    Raises:
        InputError: at its end, the newest checkpoint could not be saved.
    """
    if processes.is_first():
        _folder(workdir).mkdir(parents=True, exist_ok=True)
    options = ocp.AsyncOptions(create_directories_asynchronously=False)  # fails at once
    orbax = ocp.AsyncCheckpointer(_first_replicas_handler(), async_options=options)
    with (
        _cleared_at_end(_folder(workdir)),
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
            _delete_old(writer)  # once more, as the newest may have been evaluated since


def save(writer: Writer, step: int, state: TrainState) -> None:
    """Start saving; the checkpoint appears whole or not at all.

    Once it was read back, older ones are given up. What goes wrong is a warning, and the last whole
    checkpoint stays.
    """
    _wait(writer)
    path, stored = _folder(writer.workdir) / str(step), _without_empty(state)
    size = _num_bytes(state)
    try:
        # Orbax would find a full disk too, but its threads go on writing after it has.
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


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step that "latest", "best" or a number names."""
    steps = saved_steps(workdir)
    if not steps:
        raise InputError(
            f"{_folder(workdir)}: holds no finished checkpoint; train a run there first"
        )
    if checkpoint == "latest":
        return steps[-1]
    if checkpoint == "best":
        return _best(workdir, steps)
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"--checkpoint={checkpoint}: must be latest, best or one of {known}")
    return int(checkpoint)


def find_intact(
    workdir: Path, checkpoint: str, *, resume: bool = False, fields: Sequence[str] = ()
) -> int:
    """As `find_step`, of a checkpoint whose arrays are what was saved; all processes must ask.

    In place of the latest, the newest whole one is taken, with a warning. `resume`: as by the run
    itself, which will save those steps again: the damaged ones are moved aside. `fields`: those
    that will be restored by `restore_variables`, where not the whole state will be.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    # As process 0 sees it: a run beside this one may save another at any moment.
    found = processes.sync_errors(
        lambda: _find_intact(workdir, checkpoint, resume, fields) if processes.is_first() else None
    )
    return int(processes.gather(str(found))[0])


def restore(workdir: Path, step: int, state: TrainState, sharding: Any) -> TrainState:
    """The state saved at a step, laid out as `sharding` says (a prefix of the state's tree).

    `state` has its structure, shapes and dtypes; it may have been saved with another layout.
    """
    abstract = _with_sharding(state, sharding)
    stored = _without_empty(abstract)
    restored = _read(_folder(workdir) / str(step), ocp.args.StandardRestore(stored))
    return jax.tree.map(_or_empty, abstract, cast(TrainState, restored))


def restore_variables(workdir: Path, step: int, variables: Any, sharding: Any) -> Any:
    """`params` and `batch_stats` of a checkpoint: the running averages where the run keeps them.

    Nothing else is read, but what else `variables` has: shapes and dtypes by the state's fields.
    """
    path, abstract = _folder(workdir) / str(step), _with_sharding(variables, sharding)
    tree = {name: abstract[name] for name in abstract if name not in NETWORK}
    network = {name: abstract[name] for name in NETWORK}
    has_ema = "ema" in _stored_fields(_array_names(path / ITEM), NETWORK)
    stored = _without_empty(tree | ({"ema": network} if has_ema else network))
    arrays = ocp.checkpoint_utils.construct_restore_args(stored)
    restored = _read(path, ocp.args.PyTreeRestore(stored, arrays, partial_restore=True))
    restored |= restored.pop("ema", {})
    return jax.tree.map(_or_empty, abstract, restored)


def _with_sharding(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes of a tree, where `sharding`, a prefix of it, says."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        jax.tree.broadcast(sharding, tree),
    )


def _read(path: Path, args: Any) -> Any:
    """What Orbax restores of a state; an InputError where it cannot be read."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            return orbax.restore(LiteralPath(path), args=ocp.args.Composite(**{ITEM: args}))[ITEM]
    except Exception as error:
        if processes.is_peer_failure(error):
            raise
        raise InputError(
            f"{path}: cannot be read as a checkpoint of this config ({reason(error)})"
        ) from error


def find_damage(path: Path, fields: Sequence[str] = ()) -> str:
    """What of a checkpoint is not as it was saved; empty if all is. One process is enough to ask.

    Reads every array, or those of some `fields` as `find_intact` has them, one after the other, and
    those of a checkpoint without digests, as former versions have written it, for nothing but
    whether they can be read.
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
        warn_once(str(path), f"{path}: has no digests, so damage in its arrays would not show")
    saved = notes.get("digests", found)
    names = found if fields else saved | found
    wrong = [name for name in names if saved.get(name) != found.get(name)]
    if wrong:
        others = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"{', '.join(wrong[:3])}{others} not as saved"
    if step is not None and path.name != str(step):
        return f"it holds the state after {step} steps, so it was renamed, or is of another run"
    return ""


def _folder(workdir: Path) -> Path:
    return (workdir / "checkpoints").absolute()


def _find_intact(workdir: Path, checkpoint: str, resume: bool, fields: Sequence[str]) -> int:
    folder, damaged = _folder(workdir), {}
    while True:
        left = [step for step in saved_steps(workdir) if step not in damaged]
        if damaged and not left:
            problems = [f"{step}: {problem}" for step, problem in damaged.items()]
            remedy = "put one back from a copy, or train in another --workdir"
            raise listed(f"{folder}, which holds no whole checkpoint ({remedy})", problems)
        step = left[-1] if damaged else find_step(workdir, checkpoint)
        problem = find_damage(folder / str(step), fields)
        if not problem:
            break
        if not (folder / str(step)).exists():
            continue  # a run beside this one has given it up
        if checkpoint != "latest":
            raise InputError(f"{folder / str(step)}: is damaged ({problem})")
        damaged[step] = problem
    for other, problem in damaged.items():
        path, moved = folder / str(other), ""
        if resume:
            moved = f"; it is now {_set_aside(path).name}"
        log.warning(f"{path}: is damaged ({problem}): step {step} is taken instead{moved}")
    return step


def _best(workdir: Path, steps: list[int]) -> int:
    """Of equals the newest, so of none that was evaluated the latest."""
    return max(steps, key=lambda step: (read_score(workdir, step), step))


def _num_bytes(state: TrainState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _prepare(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
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
            f"{folder}: checkpoints cannot be kept there; a small one, written to try, did not come"
            f" back ({problem})"
        )


def _finish_save(writer: Writer, path: Path) -> str:
    """Wait until Orbax has written a checkpoint, and let it count."""
    try:
        writer.orbax.wait_until_finished()
    except Exception as error:
        if processes.count() > 1:
            raise
        return _not_saved(path, reason(error))
    if processes.is_first():
        if problem := find_damage(path):
            return _not_saved(path, f"read back, {problem}; it is now {_set_aside(path).name}")
        _delete_old(writer)
    return ""


def _wait(writer: Writer) -> None:
    """Wait for the checkpoint that is being written."""
    if writer.saving:
        writer.problem, writer.saving = writer.saving.result(), None


def _not_saved(path: Path, why: str) -> str:
    for partial in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
    problem = f"{path}: could not be saved ({why})"
    steps = saved_steps(path.parents[1])
    last = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no other"
    log.warning(f"{problem}; {last}")
    return problem


def _clear_leftovers(folder: Path) -> None:
    """Delete what a kill, or a save that failed, has left; while nothing is being saved."""
    for path in folder.iterdir():
        if path.name.endswith(LEFTOVERS):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _cleared_at_end(folder: Path) -> Iterator[None]:
    """As Orbax's threads may write on after a failure, until Orbax is closed."""
    try:
        yield
    finally:
        if processes.is_first():
            _clear_leftovers(folder)


def _delete_old(writer: Writer) -> None:
    _clear_leftovers(_folder(writer.workdir))  # Orbax's threads may write on after a failure
    steps = saved_steps(writer.workdir)
    kept = {*steps[-writer.keep_checkpoints :], *([_best(writer.workdir, steps)] if steps else [])}
    for step in set(steps) - kept:
        path = _folder(writer.workdir) / str(step)
        with best_effort(f"deleting {path}"):
            shutil.rmtree(path.rename(path.with_name(f"{step}.deleted")))


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts as one."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged.{number}")
    return path.rename(target)


def _first_replicas_handler() -> ocp.CompositeCheckpointHandler:
    """Writes the first replica of each array, of which the digests are.

    By default every process writes a part of what all of them hold. Processes whose machines or
    caches gave them programs of their own hold arrays that differ in their last bits, though.
    """
    handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    state: Any = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    return ocp.CompositeCheckpointHandler(**{ITEM: state})


def _single_process_checkpointer() -> ocp.Checkpointer:
    """Orbax for this process, which waits for no other."""
    index = processes.index()
    options = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    composite = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _array_names(item: Path) -> list[str]:
    """The names of the arrays of a state, as they are stored."""
    nodes = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [
        ".".join(part["key"] for part in node["key_metadata"])
        for node in nodes
        if not node["value_metadata"]["skip_deserialize"]  # else it is None
    ]


def _stored_fields(names: Sequence[str], fields: Sequence[str]) -> set[str]:
    """The fields of a stored state in which the wanted ones are, running averages where kept."""
    has_ema = any(name.startswith("ema.") for name in names)
    return {"ema" if has_ema and field in NETWORK else field for field in fields}


def _open_arrays(item: Path, fields: Sequence[str]) -> dict[str, tensorstore.TensorStore]:
    """The arrays of a state, or of some of its fields, as they are stored, by their names."""
    names = _array_names(item)
    if fields:
        stored = {"step", *_stored_fields(names, fields)}
        names = [name for name in names if name.partition(".")[0] in stored]
    cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    files = {"driver": "file", "path": f"{item}/"}
    stores = [{"driver": "ocdbt", "base": files, "path": name} for name in names]
    opened = [
        tensorstore.open({"driver": "zarr", "kvstore": store}, read=True, context=cache)
        for store in stores
    ]
    return {name: array.result() for name, array in zip(names, opened, strict=True)}


def _without_empty(tree: Any) -> Any:
    """The arrays that have elements; Orbax stores no others."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def _or_empty(abstract: jax.ShapeDtypeStruct, restored: jax.Array | None) -> jax.Array:
    if restored is not None:
        return restored
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
