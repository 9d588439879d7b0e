"""Cross entropy against the original's figures."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import golden_cases

from contrastseg_jax.losses.cross_entropy import cross_entropy
from contrastseg_jax.losses.segmentation import Term, segmentation_loss
from contrastseg_jax.structs import IGNORE_LABEL, SegmentationOutput

INPUTS = next(path for path in golden_cases("seg") if path.stem.startswith("inputs"))
CASES = [
    path
    for path in golden_cases("seg")
    if path.stem.removesuffix("_s0") in ("ce", "ce_noweight", "ce_all_ignored", "auxce")
]


def terms(class_weights):
    """Cross entropy alone."""
    return (Term("cross_entropy", 1.0, partial(cross_entropy, class_weights=class_weights)),)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_cross_entropy_matches_the_original(path):
    case, inputs = np.load(path), np.load(INPUTS)
    meta = json.loads(str(case["meta"]))
    target = meta["inputs"]["target"]
    label = inputs["labels"] if target == "labels" else np.full_like(inputs["labels"], -1)
    label = jnp.asarray(np.where(label < 0, IGNORE_LABEL, label), jnp.uint8)
    logits = jnp.asarray(inputs["full"].transpose(0, 2, 3, 1), jnp.float32)
    aux = None
    if meta["inputs"]["aux"]:
        aux = jnp.asarray(inputs["aux"].transpose(0, 2, 3, 1), jnp.float32)
    weights = tuple(meta["config"].get("ce_weight") or ())

    def loss_of(logits):
        output = SegmentationOutput(logits, None, aux)
        return segmentation_loss(terms(weights), output, label, aux_weight=0.4)[0]

    loss, grad = jax.value_and_grad(loss_of)(logits)
    if "all_ignored" in path.stem:
        assert float(loss) == 0 and not np.any(grad)
        return
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5)
    if "grad_logits" in case:
        np.testing.assert_allclose(
            np.transpose(grad, (0, 3, 1, 2)), case["grad_logits"], rtol=1e-3, atol=1e-8
        )
    else:
        np.testing.assert_allclose(np.linalg.norm(grad), case["grad_logits_l2"], rtol=1e-5)


def test_ignored_pixels_change_nothing():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 4, 5, 3)).astype(np.float32)
    label = rng.integers(3, size=(1, 4, 5)).astype(np.uint8)
    label[0, 1] = IGNORE_LABEL
    other = logits.copy()
    other[0, 1] = 1e4
    losses = [
        float(cross_entropy(jnp.asarray(x), jnp.asarray(label), class_weights=(1.0, 2.0, 3.0)))
        for x in (logits, other)
    ]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_pixels_that_count_can_spoil_the_loss(value):
    """Not those that are ignored or of a class of weight 0, nor a head of weight 0."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(1, 4, 5, 3)).astype(np.float32)
    label = rng.integers(2, size=(1, 4, 5)).astype(np.uint8)
    label[0, 0], label[0, 1] = IGNORE_LABEL, 2

    def loss_and_grad(logits, aux, aux_weight=0.4):
        def loss_of(logits):
            return segmentation_loss(
                terms((1.0, 2.0, 0.0)),
                SegmentationOutput(logits, None, jnp.asarray(aux)),
                jnp.asarray(label),
                aux_weight=aux_weight,
            )[0]

        with jax.debug_nans(False):
            return jax.value_and_grad(loss_of)(jnp.asarray(logits))

    spoilt, lost = clean.copy(), clean.copy()
    spoilt[0, :2], lost[0, 3, 2] = value, value
    loss, grad = loss_and_grad(clean, clean)
    same, same_grad = loss_and_grad(spoilt, spoilt)
    assert same == loss > 0
    np.testing.assert_array_equal(same_grad, grad)
    assert np.isfinite(loss_and_grad(clean, lost, aux_weight=0.0)[0])
    for logits in ((lost, clean), (clean, lost)):
        assert not np.isfinite(loss_and_grad(*logits)[0])


def test_logits_are_brought_to_the_size_of_the_label():
    """Not the label to the logits, as the original's DeepLabV3 baseline does (D21)."""
    label = jnp.zeros((1, 8, 8), jnp.uint8).at[0, 0, 0].set(1)
    output = SegmentationOutput(jnp.zeros((1, 2, 2, 2)).at[0, 0, 0, 1].set(5.0))

    def loss_of(logits):
        output = SegmentationOutput(logits)
        return segmentation_loss(terms(()), output, label, aux_weight=0.4)[0]

    # The class-1 pixel is 1 of 64; on labels shrunk by 4 it would be 1 of 4.
    grad = jax.grad(loss_of)(jnp.zeros_like(output.logits))
    np.testing.assert_allclose(grad[..., 1].sum(), 0.5 - 1 / 64, rtol=1e-5)
