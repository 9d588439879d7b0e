"""Which candidates are taken: against the paper's words, taken literally."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import pixel_contrast_loss_literal

from contrastseg_jax.contrast.anchors import batch_candidates
from contrastseg_jax.contrast.devices import Split
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.contrast.pairs import Rows, Side, columns_of, is_selected
from contrastseg_jax.contrast.selection import CandidateSets, Selection, select, shuffle
from contrastseg_jax.structs import Anchors, Candidates

pytestmark = pytest.mark.slow

SCALE = {"temperature": 0.1, "base_temperature": 0.07}
CHOSEN = ("positives", "negatives", "num_positives", "num_negatives", "approximate")
STATIC = (*CHOSEN, "chunk_size", *SCALE)
contrast = jax.jit(pixel_contrast_loss, static_argnames=STATIC)


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@jax.jit
def masks(rows, candidates, rngs, number):
    """What 64 rows of class 0 take of their negatives and positives, for every key."""
    tile = Rows(rows, jnp.zeros(len(rows), jnp.int32), jnp.arange(len(rows)))
    num_candidates = candidates.label.size

    def taken(strategy, side, rng):
        order = shuffle((candidates,), rng)
        (ranks,) = order.ranks
        sets = CandidateSets(
            columns=(columns_of(candidates, ranks),),
            shapes=((1, num_candidates),),
            order=order,
            longest=jnp.ones(()),
            chunk_size=1024,
            split=Split.NOTHING,
        )
        selection = Selection(side, strategy, number.size, approximate=False)
        (some,), limits = select(tile, sets, selection)
        similarity = jnp.matmul(rows, some.embedding.T)
        inside = is_selected(tile, some, similarity, limits, side)
        # Back from the pool to all candidates, which the ranks tell apart.
        where = jnp.argsort(ranks)[jnp.clip(some.rank, 0, num_candidates - 1)]
        return jnp.zeros((len(rows), num_candidates), bool).at[:, where].max(inside)

    return {
        (strategy, side is Side.POSITIVES): jax.lax.map(
            functools.partial(taken, strategy, side), rngs
        )
        for strategy in ("all", "random", "hardest", "semi_hard")
        for side in Side
    }


@pytest.fixture(scope="module")
def drawn():
    """400 draws of 10 out of 1,000 candidates, a third of them positives, a tenth invalid."""
    rng = np.random.default_rng(0)
    rows, embedding = unit_rows(rng, 64, 8), unit_rows(rng, 1000, 8)
    label, valid = rng.integers(3, size=1000), rng.random(1000) < 0.9
    candidates = Candidates(
        jnp.asarray(embedding), jnp.asarray(label, jnp.int32), jnp.asarray(valid)
    )
    rngs = jax.random.split(jax.random.key(0), 400)
    found = masks(jnp.asarray(rows), candidates, rngs, jnp.zeros(10))
    usable = {False: valid & (label != 0), True: valid & (label == 0)}
    return rows @ embedding.T, usable, jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("positive", [False, True])
def test_all_takes_all_and_random_as_many_as_asked(drawn, positive):
    _, usable, found = drawn
    assert (found["all", positive] == usable[positive]).all()
    random = found["random", positive]
    assert (random.sum(-1) == 10).all()
    assert (random <= usable[positive]).all()
    share = random[:, 0].mean(0)[usable[positive]]
    expected = 10 / usable[positive].sum()
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected / 400)  # 5 sigma of a binomial


@pytest.mark.parametrize("positive", [False, True])
def test_hardest_is_the_top_of_a_sort(drawn, positive):
    similarity, usable, found = drawn
    hardness = np.where(usable[positive], -similarity if positive else similarity, -np.inf)
    top = np.argsort(-hardness, axis=1)[:, :10]
    expected = np.zeros_like(usable[positive], shape=similarity.shape)
    np.put_along_axis(expected, top, True, axis=1)
    assert (found["hardest", positive] == expected).all()


@pytest.mark.parametrize("positive", [False, True])
def test_semi_hard_is_like_k_at_random_of_the_hardest_tenth(drawn, positive):
    """The paper's way, drawn literally, against the pool: number, where, and how hard they are."""
    similarity, usable, found = drawn
    semi_hard = found["semi_hard", positive]
    hardness = np.where(usable[positive], -similarity if positive else similarity, -np.inf)
    order = np.argsort(-hardness, axis=1)
    number = usable[positive].sum()
    # Similarities that differ by less than they are rounded count as equally hard.
    assert semi_hard.sum(-1).min() == 10
    assert (semi_hard.sum(-1) > 10).mean() < 1e-3
    assert (semi_hard <= usable[positive]).all()
    # Share of draws in which each candidate is taken, by its place among the hardest.
    share = np.mean([semi_hard[:, i, order[i]] for i in range(64)], axis=(0, 1))
    tenth = number // 10
    literal = np.where(np.arange(len(share)) < tenth, 10 / tenth, 0)
    # The edge of the tenth is soft, as wide as the number in a pool of 100 varies.
    edge = 3 * int(np.sqrt(10) * number / 100)
    inner, outer = slice(0, max(tenth - edge, 1)), slice(tenth + edge, None)
    np.testing.assert_allclose(share[inner].mean(), literal[inner].mean(), rtol=0.05)
    assert share[outer].max() < 0.01
    rng = np.random.default_rng(0)
    drawn_literally = [
        similarity[i, rng.choice(order[i, :tenth], 10, replace=False)].mean()
        for i in range(64)
        for _ in range(100)
    ]
    ours = (np.broadcast_to(similarity, semi_hard.shape) * semi_hard).sum(-1) / 10
    np.testing.assert_allclose(ours.mean(), np.mean(drawn_literally), rtol=0.02)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.sampled_from([1, 3, 50]))
def test_the_loss_of_the_hardest_is_that_of_a_literal_choice(seed, number):
    """One anchor at a time, for a choice differs from anchor to anchor."""
    rng = np.random.default_rng(seed)
    rows, label = unit_rows(rng, 12, 8), rng.integers(3, size=12)
    anchors = Anchors(
        jnp.asarray(rows)[None], jnp.asarray(label, jnp.int32)[None], jnp.ones((1, 12), bool)
    )
    chosen = {"positives": "hardest", "negatives": "hardest"}
    numbers = {"num_positives": number, "num_negatives": number}
    loss, _ = contrast(anchors, (batch_candidates(anchors),), **chosen, **numbers, **SCALE)
    costs = []
    for i in range(12):
        similarity = rows @ rows[i]
        same = label == label[i]
        positives = np.flatnonzero(same & (np.arange(12) != i))
        positives = positives[np.argsort(similarity[positives])][:number]
        negatives = np.flatnonzero(~same)
        negatives = negatives[np.argsort(-similarity[negatives])][:number]
        if len(positives):
            taken = np.concatenate([positives, negatives])
            every = np.ones(len(taken), bool)
            costs.append(
                pixel_contrast_loss_literal(
                    *(rows[i : i + 1], label[i : i + 1], every[:1]),
                    *(rows[taken], label[taken], every, False),
                    **SCALE,
                )
            )
    np.testing.assert_allclose(loss, np.mean(costs) if costs else 0, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["random", "hardest"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_anchor_is_not_one_of_its_positives(strategy, number):
    """Though it is in its class's pool: every anchor has as many others as were asked for."""
    rng = np.random.default_rng(0)
    label = jnp.asarray(np.arange(40) % 2, jnp.int32)[None]
    anchors = Anchors(jnp.asarray(unit_rows(rng, 1, 40, 8)), label, jnp.ones((1, 40), bool))
    _, metrics = contrast(
        *(anchors, (batch_candidates(anchors),), jax.random.key(0)),
        positives=strategy,
        num_positives=number,
        **SCALE,
    )
    assert metrics["positives_per_anchor"] == number


@pytest.mark.parametrize("chunk_size", [3, 40, 1024])
@pytest.mark.parametrize("strategy", ["hardest", "semi_hard"])
def test_a_limit_holds_for_similarities_near_0(strategy, chunk_size):
    """Where they are rounding alone: the one positive is orthogonal to the anchors."""
    rng = np.random.default_rng(0)
    away, rows = unit_rows(rng, 256), unit_rows(rng, 512, 256).astype(np.float64)
    rows -= (rows @ away)[:, None] * away
    rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    label, valid = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512), bool)
    anchors = Anchors(jnp.asarray(rows)[None], label, valid)
    queue, of_slots, written = (
        unit_rows(rng, 2, 500, 256),
        np.broadcast_to([[0], [1]], (2, 500)),
        np.ones((2, 500), bool),
    )
    queue[0, 250], written[0] = away, np.arange(500) == 250
    candidates = Candidates(
        jnp.asarray(queue), jnp.asarray(of_slots, jnp.int32), jnp.asarray(written)
    )

    @jax.jit
    @jax.grad
    def gradient(rows):
        chosen = {"positives": strategy, "num_positives": 16, "chunk_size": chunk_size}
        return contrast(
            anchors.replace(embedding=rows), (candidates,), jax.random.key(0), **chosen, **SCALE
        )[0]

    lost = ~np.abs(gradient(anchors.embedding)[0]).any(-1)
    assert not lost.any(), f"{lost.sum()} anchors have lost their positive"


@pytest.mark.parametrize("strategy", ["random", "semi_hard", "hardest"])
def test_gradients_of_a_selection_are_those_of_finite_differences(strategy):
    """Along a random direction; what is taken does not change on so short a way."""
    rng = np.random.default_rng(0)
    label = jnp.asarray(rng.integers(3, size=(1, 40)), jnp.int32)
    rows, way = (jnp.asarray(unit_rows(rng, 1, 40, 8)) for _ in range(2))

    def loss(rows):
        anchors = Anchors(rows, label, jnp.ones((1, 40), bool))
        sets = (batch_candidates(anchors),)
        chosen = {"positives": strategy, "negatives": strategy}
        numbers = {"num_positives": 4, "num_negatives": 6}
        return contrast(anchors, sets, jax.random.key(1), **chosen, **numbers, **SCALE)[0]

    slope = jnp.vdot(jax.grad(loss)(rows), way)
    step = 3e-3
    expected = (loss(rows + step * way) - loss(rows - step * way)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-2)


def test_the_approximate_choice_is_exact_where_there_is_no_such_hardware():
    rng = np.random.default_rng(0)
    label = jnp.asarray(rng.integers(3, size=(1, 40)), jnp.int32)
    anchors = Anchors(jnp.asarray(unit_rows(rng, 1, 40, 8)), label, jnp.ones((1, 40), bool))
    chosen = {"positives": "hardest", "negatives": "semi_hard", "num_negatives": 3}
    exact, approximate = (
        contrast(
            *(anchors, (batch_candidates(anchors),), jax.random.key(0)),
            **chosen,
            **SCALE,
            approximate=approximate,
        )[0]
        for approximate in (False, True)
    )
    np.testing.assert_allclose(approximate, exact, rtol=1e-6)
