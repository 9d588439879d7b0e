"""Checkpoints of the whole `TrainState`: written by Orbax, and verified by reading them back.

checkpoints/STEP/          a finished one: Orbax renames it once it is complete
checkpoints/STEP.damaged/  one whose arrays are not what was saved; kept, but ignored
"""

import contextlib
import glob
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
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
        lambda: _prepare(_folder(workdir), size) if processes.is_first() else None
    )


@contextlib.contextmanager
def open_writer(workdir: Path, *, keep_checkpoints: int) -> Iterator[Writer]:
    """Keeps the newest checkpoints and the best by val mIoU; on exit, waits for pending writes.

    Raises:
        InputError: on exit, the newest checkpoint could not be saved.
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
            _delete_old(writer)  # again, as the newest may have been evaluated since


def save(writer: Writer, step: int, state: TrainState) -> None:
    """Start saving in the background, atomically.

    Once the checkpoint is verified, older ones are deleted. A failure is a warning, and the last
    intact checkpoint is kept.
    """
    _wait(writer)
    path, stored = _folder(writer.workdir) / str(step), _without_empty(state)
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


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step of "latest", "best" or a number."""
    steps = saved_steps(workdir)
    if not steps:
        raise InputError(
            f"{_folder(workdir)}: contains no finished checkpoint; train a run there first"
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
    """`find_step` for checkpoints whose arrays are intact; all processes must call it.

    If the latest is damaged, the newest intact one is used instead, with a warning. `resume`: the
    run itself will continue and save those steps again, so the damaged ones are renamed. `fields`:
    the only fields to check, as `restore_variables` will restore no others.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    # Decided by process 0: a concurrent run may save another at any moment.
    found = processes.sync_errors(
        lambda: _find_intact(workdir, checkpoint, resume, fields) if processes.is_first() else None
    )
    return int(processes.gather(str(found))[0])


def restore(workdir: Path, step: int, state: TrainState, sharding: Any) -> TrainState:
    """The state saved at a step, with the given `sharding` (a prefix of the state's tree).

    `state`: its structure, shapes and dtypes. It may have been saved with another sharding, and by
    a version whose objective counted less: such counters begin at 0.
    """
    path, abstract = _folder(workdir) / str(step), _with_sharding(state, sharding)

    def args() -> Any:
        names = _array_names(path / ITEM, with_empty=True)
        known = {at: x for at, x in _memory_leaves(abstract).items() if f"memory.{at}" in names}
        memory = None if abstract.memory is None else _nested(known)
        return ocp.args.StandardRestore(_without_empty(_with_memory(abstract, memory)))

    restored = cast(TrainState, _read(path, args))
    if abstract.memory is not None:
        found = _memory_leaves(restored)
        leaves = [_or_empty(x, found.get(at)) for at, x in _memory_leaves(abstract).items()]
        memory = jax.tree.unflatten(jax.tree.structure(abstract.memory), leaves)
        restored = _with_memory(restored, memory)
    return jax.tree.map(_or_empty, abstract, restored)


def _memory_leaves(state: TrainState) -> dict[str, Any]:
    """The arrays of the objective's state by their names."""
    leaves = jax.tree_util.tree_leaves_with_path(state.memory)
    return {jax.tree_util.keystr(at, simple=True, separator="."): x for at, x in leaves}


def _with_memory(state: TrainState, memory: Any) -> TrainState:
    return cast(Any, state).replace(memory=memory)


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Folders of names, as Orbax stores them, from names with dots."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


def restore_variables(workdir: Path, step: int, variables: Any, sharding: Any) -> Any:
    """`params` and `batch_stats` of a checkpoint: their EMA if the run keeps one.

    `variables`: shapes and dtypes by field of the state. Its other fields are restored too, nothing
    else is read.
    """
    path, abstract = _folder(workdir) / str(step), _with_sharding(variables, sharding)
    tree = {name: abstract[name] for name in abstract if name not in NETWORK}
    network = {name: abstract[name] for name in NETWORK}

    def partial_args() -> Any:
        has_ema = "ema" in _stored_fields(_array_names(path / ITEM), NETWORK)
        stored = _without_empty(tree | ({"ema": network} if has_ema else network))
        arrays = ocp.checkpoint_utils.construct_restore_args(stored)
        return ocp.args.PyTreeRestore(stored, arrays, partial_restore=True)

    restored = _read(path, partial_args)
    restored |= restored.pop("ema", {})
    return jax.tree.map(_or_empty, abstract, restored)


def _with_sharding(tree: Any, sharding: Any) -> Any:
    """Shapes and dtypes of a tree with shardings; `sharding` is a prefix of the tree."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        jax.tree.broadcast(sharding, tree),
    )


def _read(path: Path, make_args: Callable[[], Any]) -> Any:
    """The state restored by Orbax; an InputError if it cannot be read."""
    try:
        args = make_args()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            return orbax.restore(LiteralPath(path), args=ocp.args.Composite(**{ITEM: args}))[ITEM]
    except Exception as error:
        if processes.is_peer_failure(error):
            raise
        raise InputError(
            f"{path}: cannot be read as a checkpoint of this config ({reason(error)})"
        ) from error


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


def _folder(workdir: Path) -> Path:
    return (workdir / "checkpoints").absolute()


def _find_intact(workdir: Path, checkpoint: str, resume: bool, fields: Sequence[str]) -> int:
    folder, damaged = _folder(workdir), {}
    while True:
        left = [step for step in saved_steps(workdir) if step not in damaged]
        if damaged and not left:
            problems = [f"{step}: {problem}" for step, problem in damaged.items()]
            remedy = "restore one from a backup, or train in another --workdir"
            raise listed(f"{folder}, which contains no intact checkpoint ({remedy})", problems)
        step = left[-1] if damaged else find_step(workdir, checkpoint)
        problem = find_damage(folder / str(step), fields)
        if not problem:
            break
        if not (folder / str(step)).exists():
            continue  # deleted by a concurrent run
        if checkpoint != "latest":
            raise InputError(f"{folder / str(step)}: is damaged ({problem})")
        damaged[step] = problem
    for other, problem in damaged.items():
        path, moved = folder / str(other), ""
        if resume:
            moved = f"; renamed to {_set_aside(path).name}"
        log.warning(f"{path}: is damaged ({problem}): using step {step} instead{moved}")
    return step


def _best(workdir: Path, steps: list[int]) -> int:
    """The newest of equals; so the latest if none was evaluated."""
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
            return _not_saved(path, f"read back, {problem}; renamed to {_set_aside(path).name}")
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


def _clear_leftovers(folder: Path) -> None:
    """Delete what a kill or a failed save left behind; not while saving."""
    for path in folder.iterdir():
        if path.name.endswith(LEFTOVERS):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _cleared_at_end(folder: Path) -> Iterator[None]:
    """Clear leftovers on exit: Orbax's threads may keep writing after a failure until closed."""
    try:
        yield
    finally:
        if processes.is_first():
            _clear_leftovers(folder)


def _delete_old(writer: Writer) -> None:
    _clear_leftovers(_folder(writer.workdir))  # Orbax's threads may keep writing after a failure
    steps = saved_steps(writer.workdir)
    kept = {*steps[-writer.keep_checkpoints :], *([_best(writer.workdir, steps)] if steps else [])}
    for step in set(steps) - kept:
        path = _folder(writer.workdir) / str(step)
        with best_effort(f"deleting {path}"):
            shutil.rmtree(path.rename(path.with_name(f"{step}.deleted")))


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is ignored."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged.{number}")
    return path.rename(target)


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


def _array_names(item: Path, *, with_empty: bool = False) -> list[str]:
    """The names of the stored arrays of a state; `with_empty`: and of those without elements."""
    nodes = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    return [
        ".".join(part["key"] for part in node["key_metadata"])
        for node in nodes
        if with_empty or not node["value_metadata"]["skip_deserialize"]  # else it is None
    ]


def _stored_fields(names: Sequence[str], fields: Sequence[str]) -> set[str]:
    """The stored fields to read for the given ones: the EMA for the network, if kept."""
    has_ema = any(name.startswith("ema.") for name in names)
    return {"ema" if has_ema and field in NETWORK else field for field in fields}


def _open_arrays(item: Path, fields: Sequence[str]) -> dict[str, tensorstore.TensorStore]:
    """The stored arrays of a state, or of some of its fields, by name."""
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
    """The tree without empty arrays, which Orbax does not store."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def _or_empty(abstract: jax.ShapeDtypeStruct, restored: jax.Array | None) -> jax.Array:
    if restored is not None:
        return restored
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
