"""Batches are split over the mesh, everything else is on every device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from small import make_batch, make_config, setup_of, start

from contrastseg_jax.parallel import sharding
from contrastseg_jax.training.state import state_sharding


def test_each_device_holds_its_rows_of_a_batch():
    mesh = sharding.make_mesh()
    assert mesh.size == jax.device_count() == 2
    batch = make_batch(size=4)
    image = sharding.to_devices(batch, mesh).image
    for index, shard in enumerate(image.addressable_shards):
        np.testing.assert_array_equal(shard.data, batch.image[2 * index : 2 * index + 2])
    np.testing.assert_array_equal(image, batch.image)


def test_replicate_gathers_inside_jit():
    mesh = sharding.make_mesh()
    rows = jax.device_put(jnp.arange(4), sharding.batch_sharding(mesh))
    gathered = jax.jit(lambda x: sharding.replicate((x,), mesh))(rows)[0]
    assert gathered.sharding.is_fully_replicated
    np.testing.assert_array_equal(gathered, np.arange(4))
    assert isinstance(sharding.fetch(gathered), np.ndarray)


def test_a_mesh_of_some_devices():
    assert sharding.make_mesh(jax.devices()[:1]).size == 1


@dataclass(frozen=True)
class Device:
    """What there is of a device that is not here."""

    process_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_the_mesh_has_the_order_of_processes():
    """`make_array_from_process_local_data` gives a device the rows of its place in the mesh."""
    there = [Device(process_index=i // 2 % 2, id=i) for i in range(8)]
    mesh = sharding.make_mesh(there[::-1])
    assert [device.id for device in mesh.devices] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_large_parameters_are_split_along_their_longest_axis():
    mesh = sharding.make_mesh()
    _, state, _ = start(make_config())
    whole = state_sharding(setup_of(make_config()), state, mesh)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(whole))
    in_parts = make_config("memory.sharding=slots", "parallel.fsdp=True")
    parts = state_sharding(setup_of(in_parts), state, mesh)
    for x, place in _pairs(state.params, parts.params):
        shard = place.shard_shape(x.shape)
        if x.size < sharding.MIN_SPLIT_SIZE:
            assert shard == x.shape
        else:
            longest = x.shape.index(max(n for n in x.shape if n % 2 == 0))
            assert shard[longest] * 2 == x.shape[longest]
    large = [(x, p) for x, p in _pairs(state.opt_state, parts.opt_state) if x.size > 2**14]
    assert large and all(2 * np.prod(p.shard_shape(x.shape)) == x.size for x, p in large)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(parts.batch_stats))
    assert parts.memory.pixel.shard_shape(state.memory.pixel.shape)[1] == 8


def _pairs(tree, other):
    return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


def test_rows_and_flags_of_this_process():
    mesh = sharding.make_mesh()
    rows = jax.device_put(jnp.arange(6).reshape(6, 1), sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(sharding.local_rows(rows), rows)
    for flag in (False, True):
        assert bool(sharding.any_process(flag, mesh)) is flag
