"""One mesh axis, `data`: batches are split over it, and the memory bank's slots where asked."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from contrastseg_jax.structs import Batch, MemoryBank, TrainState

Tree = TypeVar("Tree")


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The given devices, or all devices of all processes, in one row."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def split(mesh: Mesh) -> NamedSharding:
    """Leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, *, split_memory: bool) -> Any:
    """Where a `TrainState` lies: all of it on every device, or each queue's slots split over them.

    A prefix of the state's tree, as `jit`, `device_put` and `checkpoint.restore` take it.
    """
    everywhere: Any = replicated(mesh)
    if not split_memory:
        return everywhere
    slots: Any = NamedSharding(mesh, PartitionSpec(None, "data"))
    counters = {
        f"{queue}_{counter}": everywhere
        for queue in ("pixel", "segment")
        for counter in ("head", "count")
    }
    bank = MemoryBank(pixel=slots, segment=slots, **counters)
    return TrainState(everywhere, everywhere, everywhere, everywhere, everywhere, bank)


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch of which this process holds its own rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Inside `jit`: bring every array of the tree to all devices (an all-gather if split)."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def device_bytes() -> int:
    """Memory of one device; devices of the CPU share that of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", of_machine // jax.local_device_count())


def fetch(tree: Any) -> Any:
    """Replicated device arrays as NumPy arrays."""
    return jax.device_get(tree)
