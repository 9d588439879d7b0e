"""Batches are split over the mesh, everything else is on every device."""

import jax
import jax.numpy as jnp
import numpy as np
from small import make_batch

from contrastseg_jax import distributed


def test_each_device_holds_its_rows_of_a_batch():
    mesh = distributed.make_mesh()
    assert mesh.size == jax.device_count() == 2
    batch = make_batch(size=4)
    image = distributed.to_devices(batch, mesh).image
    for index, shard in enumerate(image.addressable_shards):
        np.testing.assert_array_equal(shard.data, batch.image[2 * index : 2 * index + 2])
    np.testing.assert_array_equal(image, batch.image)


def test_replicate_gathers_inside_jit():
    mesh = distributed.make_mesh()
    rows = jax.device_put(jnp.arange(4), distributed.split(mesh))
    gathered = jax.jit(lambda x: distributed.replicate((x,), mesh))(rows)[0]
    assert gathered.sharding.is_fully_replicated
    np.testing.assert_array_equal(gathered, np.arange(4))
    assert isinstance(distributed.fetch(gathered), np.ndarray)


def test_a_mesh_of_some_devices():
    assert distributed.make_mesh(jax.devices()[:1]).size == 1
