"""Collectives are found in HLO, and counted as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastseg_jax.parallel import sharding
from contrastseg_jax.planning import hlo
from contrastseg_jax.planning.hlo import Collective, collectives, num_bytes, total_bytes


def module(entry, *computations):
    body = "\n".join(f"  {line}" for line in entry)
    return "\n".join([*computations, f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}"])


def computation(name, *lines):
    return f"%{name} (x: f32[4]) -> f32[4] {{\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n"


P4 = "%p = f32[4]{0} parameter(0)"
REDUCE = "ROOT %r = f32[4]{0} all-reduce(%p), channel_id=7, to_apply=%add"


@pytest.mark.parametrize(
    ("types", "size"),
    [
        ("f32[8,4]{1,0:T(8,128)(2,1)S(1)}", 128),
        ("(f32[8,4]{1,0}, /*index=5*/pred[])", 129),
        ("bf16[3]", 6),
        ("s4[3]", 2),
        ("f8e4m3fn[10]", 10),
        ("c64[2]", 16),
        ("token[]", 0),
        ("f32[0,5]", 0),
    ],
)
def test_bytes_of_types(types, size):
    assert num_bytes(types) == size


@pytest.mark.parametrize(
    ("lines", "kind", "size"),
    [
        (["%r = (f32[4]{0}, f32[4]{0}) all-reduce(%p, %p), to_apply=%add"], "all-reduce", 32),
        (["%r = f32[32]{0} all-gather(%p), dimensions={0}"], "all-gather", 128),
        (["%r = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%a"], "reduce-scatter", 16),
        (["%r = f32[4]{0} collective-permute(%p)"], "collective-permute", 16),
        (["%r = f32[4]{0} all-to-all(%p), dimensions={0}"], "all-to-all", 16),
        (
            [
                "%s = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}",
                "%d = f32[32]{0} all-gather-done(%s)",
            ],
            "all-gather",
            128,
        ),
        (
            [
                "%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p)",
                "%d = f32[4]{0} collective-permute-done(%s)",
            ],
            "collective-permute",
            16,
        ),
        (
            [
                "%s = f32[4]{0} all-reduce-start(f32[4]{0} %p), to_apply=%add",
                "%d = f32[4]{0} all-reduce-done(%s)",
            ],
            "all-reduce",
            16,
        ),
    ],
)
def test_each_kind_counts_once_with_what_it_moves(lines, kind, size):
    assert collectives(module([P4, *lines])) == [Collective(kind, size)]


def test_an_asynchronous_computation_counts_once():
    wrapped = computation("wrapped", P4, "ROOT %r = f32[2]{0} reduce-scatter(%p), to_apply=%add")
    entry = [
        P4,
        "%s = ((f32[4]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[4]{0}), f32[2]{0}, u32[]) async-update(%s), calls=%wrapped",
        "%d = f32[2]{0} async-done(%u), calls=%wrapped",
    ]
    assert collectives(module(entry, wrapped)) == [Collective("reduce-scatter", 16)]


def test_a_collective_that_a_tpu_spreads_over_fusions_is_one():
    names = ("first", "async_collective_fusion.2", "last")
    fusions = ("async-collective-start", "fusion.8", "async-collective-done.1")
    parts = [computation(name, P4, REDUCE) for name in names]
    calls = zip(fusions, names, strict=True)
    entry = [P4, *(f"%{fusion} = f32[4]{{0}} fusion(%p), calls=%{name}" for fusion, name in calls)]
    assert collectives(module(entry, *parts)) == [Collective("all-reduce", 16)]


@pytest.mark.parametrize(
    ("config", "times", "in_loop"),
    [
        (', backend_config={"known_trip_count":{"n":"5"}}', 5, False),
        (', backend_config={"other":{"n":"5"}}', 1, True),
    ],
)
def test_loops_count_their_rounds_where_they_are_known(config, times, in_loop):
    body = computation("body", P4, REDUCE)
    entry = [P4, f"%w = f32[4]{{0}} while(%p), condition=%cond, body=%body{config}"]
    found = collectives(module(entry, body))
    assert found == [Collective("all-reduce", 16, times, in_loop)]
    assert total_bytes(found) == 16 * times


def test_loops_in_loops_multiply():
    inner = computation("inner", P4, REDUCE)
    known = 'backend_config={{"known_trip_count":{{"n":"{}"}}}}'
    loop = "%w = f32[4]{{0}} while(%p), condition=%c, body=%{}, " + known
    outer = computation("outer", P4, loop.format("inner", 3))
    assert total_bytes(collectives(module([P4, loop.format("outer", 2)], inner, outer))) == 96


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%few, %much}", "true_computation=%much, false_computation=%few"],
)
def test_of_a_conditional_the_branch_that_moves_most_counts(branches):
    few = computation("few", P4, "ROOT %r = f32[4]{0} all-reduce(%p), channel_id=1, to_apply=%add")
    much = computation("much", P4, "ROOT %r = f32[32]{0} all-gather(%p), channel_id=2")
    entry = [P4, f"%c = f32[32]{{0}} conditional(%p, %p, %p), {branches}"]
    assert collectives(module(entry, few, much)) == [Collective("all-gather", 128)]


def test_a_real_program():
    """A sum over the devices in each of three rounds, one gathering, one exchange."""
    mesh = sharding.make_mesh(jax.devices()[:2])
    split = PartitionSpec("data")

    def program(x):
        for_all = jax.lax.fori_loop(0, 3, lambda _, y: y * jax.lax.psum(y, "data"), x)
        whole = jax.lax.all_gather(x, "data").sum(0)
        return for_all + whole + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    mapped = jax.shard_map(program, mesh=mesh, in_specs=split, out_specs=split)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((20, 6), jnp.float32)).compile()
    found = {c.kind: c for c in collectives(compiled.as_text())}
    size = 10 * 6 * 4
    assert found == {
        "all-reduce": Collective("all-reduce", size, times=3),
        "all-gather": Collective("all-gather", 2 * size),
        "collective-permute": Collective("collective-permute", size),
    }
    assert set(found) < set(hlo.KINDS)
    x = np.ones((20, 6), np.float32)
    np.testing.assert_allclose(
        compiled(jax.device_put(x, sharding.batch_sharding(mesh))), 128 + 2 + 1
    )
