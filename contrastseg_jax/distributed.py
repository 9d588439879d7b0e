"""One mesh axis, `data`: batches are split over it, everything else is replicated."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from contrastseg_jax.structs import Batch

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


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch of which this process holds its own rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Inside `jit`: bring every array of the tree to all devices (an all-gather if split)."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def fetch(tree: Any) -> Any:
    """Replicated device arrays as NumPy arrays."""
    return jax.device_get(tree)
