"""One mesh axis, `data`: shards batches and, optionally, the memory bank and the parameters."""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from contrastseg_jax.contrast.devices import AXIS
from contrastseg_jax.structs import Batch, MemoryBank

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # abstract: a number of devices to plan for

MIN_SPLIT_SIZE = 2**14  # elements; sharding smaller arrays would gain nothing


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A 1-D mesh of the given devices, or of all devices of all processes.

    Ordered by process, as that determines which rows of a batch a process reads.
    `jax.make_mesh` would follow the TPU topology, in which processes alternate.
    """
    devices = jax.devices() if devices is None else devices
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(in_order), (AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The leading axis sharded over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicated_tree(mesh: AnyMesh, tree: Any) -> Any:
    """Every array of a tree replicated."""
    return jax.tree.map(lambda _: replicated(mesh), tree)


def fsdp_sharding(mesh: AnyMesh, tree: Any) -> Any:
    """Every large array of a tree sharded, small ones replicated."""
    return jax.tree.map(lambda x: _longest_axis(mesh, x.shape), tree)


def bank_sharding(mesh: AnyMesh, bank: MemoryBank) -> MemoryBank:
    """The slots of each queue sharded, the counters replicated."""
    slots: Any = NamedSharding(mesh, PartitionSpec(None, AXIS))
    names = ("pixel", "pixel_age", "segment", "segment_age")
    return replicated_tree(mesh, bank).replace(**dict.fromkeys(names, slots))


def _longest_axis(mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """A large array sharded along its longest axis divisible by the number of devices."""
    even = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
    if math.prod(shape) < MIN_SPLIT_SIZE or not even:
        return replicated(mesh)
    longest = max(even, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch, from this process's rows."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), batch
    )


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Inside `jit`: replicate every array of the tree (an all-gather if it is sharded)."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array sharded over all devices."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def all_rows(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The rows of all processes, in each of them; all have equally many, a multiple of devices."""
    if jax.process_count() == 1:
        return rows
    array = jax.make_array_from_process_local_data(batch_sharding(mesh), rows)
    return np.asarray(_all_gather(mesh)(array))


@functools.cache
def _all_gather(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda rows: rows, out_shardings=replicated(mesh))


def any_process(flag: bool, mesh: Mesh) -> jax.Array:
    """Whether `flag` is set in any process: the same answer in all, computed asynchronously."""
    flags = jax.make_array_from_process_local_data(
        batch_sharding(mesh), np.full(len(mesh.local_devices), flag)
    )
    return _any(mesh)(flags)


@functools.cache
def _any(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(jnp.any, out_shardings=replicated(mesh))


def is_finite(tree: Any) -> jax.Array:
    """Inside `jit`: whether all values of a tree are finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def all_finite(tree: Any, mesh: Mesh) -> jax.Array:
    """Whether all values of arrays on the mesh are finite: the same answer in all processes."""
    return _all_finite(mesh)(tree)


@functools.cache
def _all_finite(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(is_finite, out_shardings=replicated(mesh))


def fetch(tree: Any) -> Any:
    """Replicated device arrays as NumPy arrays."""
    return jax.device_get(tree)
