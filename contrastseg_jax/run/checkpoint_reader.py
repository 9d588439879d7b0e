"""Reading checkpoints: the newest intact one, and its arrays in a given sharding."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from contrastseg_jax.errors import InputError, listed, reason
from contrastseg_jax.parallel import processes
from contrastseg_jax.run.checkpoint_files import (
    ITEM,
    NETWORK,
    LiteralPath,
    array_names,
    checkpoint_folder,
    find_damage,
    find_step,
    set_aside,
    stored_fields,
    without_empty,
)
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import saved_steps
from contrastseg_jax.structs import TrainState


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
    path, abstract = checkpoint_folder(workdir) / str(step), _with_sharding(state, sharding)

    def args() -> Any:
        names = array_names(path / ITEM, with_empty=True)
        known = {at: x for at, x in _memory_leaves(abstract).items() if f"memory.{at}" in names}
        memory = None if abstract.memory is None else _nested(known)
        return ocp.args.StandardRestore(without_empty(_with_memory(abstract, memory)))

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
    path, abstract = checkpoint_folder(workdir) / str(step), _with_sharding(variables, sharding)
    tree = {name: abstract[name] for name in abstract if name not in NETWORK}
    network = {name: abstract[name] for name in NETWORK}

    def partial_args() -> Any:
        has_ema = "ema" in stored_fields(array_names(path / ITEM), NETWORK)
        stored = without_empty(tree | ({"ema": network} if has_ema else network))
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


def _find_intact(workdir: Path, checkpoint: str, resume: bool, fields: Sequence[str]) -> int:
    folder, damaged = checkpoint_folder(workdir), {}
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
            moved = f"; renamed to {set_aside(path).name}"
        log.warning(f"{path}: is damaged ({problem}): using step {step} instead{moved}")
    return step


def _or_empty(abstract: jax.ShapeDtypeStruct, restored: jax.Array | None) -> jax.Array:
    if restored is not None:
        return restored
    return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
