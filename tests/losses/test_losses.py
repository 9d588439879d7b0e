"""Every loss against the original's figures, NumPy or PyTorch, and in what all have alike."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import golden_cases

from contrastseg_jax.losses.segmentation import CLASS_WEIGHTED, PIXEL_LOSSES
from contrastseg_jax.ops import row_blocks
from contrastseg_jax.structs import IGNORE_LABEL

GOLDEN = {path.stem.removesuffix("_s0"): path for path in golden_cases("seg")}
# Each is small enough for several of its pixels to count whatever `min_kept` is.
LOSSES = PIXEL_LOSSES | {
    "ohem": partial(PIXEL_LOSSES["ohem"], min_kept=7),
    "smoothed": partial(PIXEL_LOSSES["cross_entropy"], label_smoothing=0.2),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def example(seed=0, size=(12, 15), num_classes=4, logits_size=None):
    """Logits and labels of two images, some pixels without a class."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, *(logits_size or size), num_classes), scale=2)
    label = rng.integers(num_classes, size=(2, *size)).astype(np.uint8)
    label[:, :3, :5] = IGNORE_LABEL
    return jnp.asarray(logits, jnp.float32), jnp.asarray(label)


def value_and_grad(loss, logits, label):
    return jax.jit(jax.value_and_grad(loss))(logits, label)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# The original's figures


def of_original(config):
    """The loss that a figure of the original is of, from its settings."""
    weights = {"class_weights": tuple(config.get("ce_weight") or ())}
    if "ohem_thresh" in config:
        chosen = {"threshold": config["ohem_thresh"], "min_kept": config["ohem_minkeep"]}
        return partial(PIXEL_LOSSES["ohem"], **weights, **chosen)
    if "rmi" in config:
        pool_size, share = config["rmi"]["rmi_pool_size"], config["rmi"]["loss_weight_lambda"]
        if config["rmi"]["lambda_way"]:
            return partial(PIXEL_LOSSES["rmi"], pool_size=pool_size, bce_share=share)
        # BCE + λ RMI, which is (1 + λ) times one whose shares add up to 1.
        rmi = partial(PIXEL_LOSSES["rmi"], pool_size=pool_size, bce_share=1 / (1 + share))
        return lambda *arguments: (1 + share) * rmi(*arguments)
    return PIXEL_LOSSES["lovasz"]


@pytest.mark.parametrize(
    "name", ["lovasz", "ohem_thresh", "ohem_minkeep", "ohem_minkeep_all", "rmi", "rmi_lambda0"]
)
def test_value_and_gradient_are_the_original_s(name):
    case, inputs = np.load(GOLDEN[name]), np.load(GOLDEN["inputs"])
    label = np.where(inputs["labels"] < 0, IGNORE_LABEL, inputs["labels"]).astype(np.uint8)
    logits = jnp.asarray(inputs["full"].transpose(0, 2, 3, 1), jnp.float32)
    loss = of_original(json.loads(str(case["meta"]))["config"])
    value, grad = value_and_grad(loss, logits, jnp.asarray(label))
    grad = np.transpose(grad, (0, 3, 1, 2))
    tolerance = 1e-4 if name.startswith("rmi") else 1e-5
    np.testing.assert_allclose(value, case["loss"], rtol=tolerance)
    # Of differences of float32 numbers near 1 in the original; exact in `test_lovasz_…`.
    tolerance = 5e-5 if name == "lovasz" else tolerance
    if "grad_logits" in case:
        assert relative(grad, case["grad_logits"]) < tolerance
    else:
        np.testing.assert_allclose(np.linalg.norm(grad), case["grad_logits_l2"], rtol=tolerance)
        assert relative(grad[:, :, :6, :6], case["grad_logits_crop"]) < tolerance


# What all have alike


@every_loss
def test_nothing_labelled_is_exactly_zero(name):
    logits, label = example()
    with jax.debug_nans(False):
        for spoilt in (logits, jnp.full_like(logits, jnp.nan)):
            value, grad = value_and_grad(LOSSES[name], spoilt, jnp.full_like(label, IGNORE_LABEL))
            assert value == 0 and not np.any(grad)


@every_loss
def test_only_labelled_pixels_matter(name):
    logits, label = example()
    is_ignored = (label == IGNORE_LABEL)[..., None]
    value, grad = value_and_grad(LOSSES[name], logits, label)
    assert value != 0 and np.any(grad) and value.dtype == jnp.float32
    with jax.debug_nans(False):
        for spoilt in (jnp.nan, jnp.inf, 1e4):
            other = jnp.where(is_ignored, spoilt, logits)
            same, same_grad = value_and_grad(LOSSES[name], other, label)
            assert same == value
            np.testing.assert_array_equal(same_grad, grad)
        assert not np.any(np.where(is_ignored, grad, 0))
        lost = logits.at[1, 8, 8, 1].set(jnp.nan)
        assert np.isnan(value_and_grad(LOSSES[name], lost, label)[0])


@pytest.mark.parametrize("name", CLASS_WEIGHTED)
def test_class_weights_matter_where_they_are_said_to(name):
    logits, label = example()
    weighted = partial(LOSSES[name], class_weights=(1.0, 2.0, 0.5, 0.0))
    value, grad = value_and_grad(weighted, logits, label)
    assert value != LOSSES[name](logits, label)
    spoilt = jnp.where((label == 3)[..., None], jnp.nan, logits)
    with jax.debug_nans(False):
        same, same_grad = value_and_grad(weighted, spoilt, label)
    assert same == value
    np.testing.assert_array_equal(same_grad, grad)


@every_loss
def test_a_gradient_is_that_of_finite_differences(name):
    logits, label = example(logits_size=(6, 8))
    loss = LOSSES[name]
    if name == "ohem":  # as long as the set of kept pixels does not change
        loss = partial(loss, threshold=1.0)
    _, grad = value_and_grad(loss, logits, label)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=logits.shape), jnp.float32)
    step = 1e-2
    ends = [float(loss(logits + sign * step * direction, label)) for sign in (1, -1)]
    # RMI is not smooth where a maximum changes, nor Lovasz where the order of errors does.
    tolerance = {"rmi": 0.1, "lovasz": 0.05}.get(name, 0.01)
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose((grad * direction).sum(), expected, rtol=tolerance)


@every_loss
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    logits, label = example(size=(33, 40), logits_size=(9, 10))
    value, grad = value_and_grad(LOSSES[name], logits, label)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 8 * 40 * 4 * 4)
    blocked, blocked_grad = value_and_grad(lambda *a: LOSSES[name](*a), logits, label)
    np.testing.assert_allclose(blocked, value, rtol=2e-6)
    assert relative(blocked_grad, grad) < 1e-5


# Literal NumPy


def softmax64(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


cases = given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 5), share=st.floats(0, 1))


def drawn(seed, num_classes, share):
    """As `example`, with `share` of the pixels ignored and not every class present."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 4, 5, num_classes), scale=2).astype(np.float32)
    label = rng.integers(rng.integers(1, num_classes + 1), size=(2, 4, 5)).astype(np.uint8)
    label[rng.random(label.shape) < share] = IGNORE_LABEL
    return logits, label


@cases
@settings(max_examples=30, deadline=None)
def test_lovasz_is_that_of_the_paper(seed, num_classes, share):
    """The IoU of growing sets of errors (algorithm 1), and its gradient in the logits."""
    logits, label = drawn(seed, num_classes, share)
    labelled = label < num_classes
    p, y = softmax64(logits)[labelled], label[labelled]
    losses, slope = [], np.zeros_like(p)
    for c in np.unique(y):
        error = np.abs((y == c) - p[:, c])
        wrong, previous, total = set(), 0.0, 0.0
        for i in np.argsort(-error):
            wrong.add(i)
            true = {j for j in range(len(y)) if y[j] == c}
            jaccard = 1 - len(true - wrong) / len(true | wrong)
            total += error[i] * (jaccard - previous)
            slope[i, c] = (jaccard - previous) * (-1 if y[i] == c else 1)
            previous = jaccard
        losses.append(total)
    expected = np.mean(losses) if losses else 0.0
    found, grad = value_and_grad(PIXEL_LOSSES["lovasz"], logits, label)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    slope = p * (slope - (slope * p).sum(-1, keepdims=True)) / max(len(losses), 1)
    np.testing.assert_allclose(np.asarray(grad)[labelled], slope, rtol=1e-4, atol=1e-7)


@cases
@settings(max_examples=30, deadline=None)
def test_ohem_keeps_what_a_sort_says(seed, num_classes, share):
    logits, label = drawn(seed, num_classes, share)
    weights = np.linspace(0.5, 2, num_classes)
    labelled = label < num_classes
    y = label[labelled].astype(int)
    p = np.take_along_axis(softmax64(logits)[labelled], y[:, None], 1)[:, 0]
    for threshold, min_kept in ((0.3, 5), (0.9, 0), (0.0, 12), (0.0, 1000)):
        expected = 0.0
        if len(p):
            raised = max(np.sort(p)[min(min_kept, len(p) - 1)], threshold)
            kept = p < raised
            # In float32 neighbours of the threshold may change sides, where they are all but equal.
            if (np.abs(p - raised) < 1e-6).sum() > 1:
                continue
            if kept.any():
                expected = (-np.log(p) * weights[y])[kept].mean()
        chosen = {"threshold": threshold, "min_kept": min_kept}
        found = PIXEL_LOSSES["ohem"](
            jnp.asarray(logits), jnp.asarray(label), class_weights=tuple(weights), **chosen
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


# PyTorch


def in_torch(loss, logits, label):
    """The value and gradient of a loss of (logits [b k h w], label) written in PyTorch."""
    torch = needs.package("torch")
    x = torch.tensor(np.asarray(logits).transpose(0, 3, 1, 2), requires_grad=True)
    value = loss(x, torch.tensor(np.asarray(label).astype(np.int64)))
    value.backward()
    return value.item(), x.grad.numpy().transpose(0, 2, 3, 1)


@needs.torch
@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 2.0, 3.0)])
def test_label_smoothing_is_pytorch_s(weights):
    import torch

    logits, label = example()
    value, grad = in_torch(
        lambda x, y: torch.nn.functional.cross_entropy(
            x,
            y,
            weight=torch.tensor(weights) if weights else None,
            ignore_index=IGNORE_LABEL,
            label_smoothing=0.1,
        ),
        logits,
        label,
    )
    loss = partial(PIXEL_LOSSES["cross_entropy"], class_weights=weights, label_smoothing=0.1)
    found, found_grad = value_and_grad(loss, logits, label)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert relative(found_grad, grad) < 1e-5


@needs.torch
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_kornia_s(gamma):
    """-(1 - p)^γ log p of the softmax, the mean over labelled pixels."""
    import torch

    def literal(x, y):
        labelled = y != IGNORE_LABEL
        log_p = torch.log_softmax(x, 1).gather(1, (y * labelled)[:, None])[:, 0][labelled]
        return (-((1 - log_p.exp()) ** gamma) * log_p).mean()

    logits, label = example()
    value, grad = in_torch(literal, logits, label)
    found, found_grad = value_and_grad(partial(PIXEL_LOSSES["focal"], gamma=gamma), logits, label)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert relative(found_grad, grad) < 1e-5


@needs.torch
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_is_that_of_segmentation_models_pytorch(smooth):
    """Its `DiceLoss("multiclass", …, ignore_index=255)`, line by line; one class is absent."""
    import torch

    def literal(x, y):
        mask = y != IGNORE_LABEL
        p = x.log_softmax(dim=1).exp().flatten(2) * mask.flatten(1)[:, None]
        truth = torch.nn.functional.one_hot((y * mask).flatten(1), x.shape[1])
        truth = truth.permute(0, 2, 1) * mask.flatten(1)[:, None]
        intersection, cardinality = (p * truth).sum((0, 2)), (p + truth).sum((0, 2))
        score = (2.0 * intersection + smooth) / (cardinality + smooth).clamp_min(1e-7)
        return ((1 - score) * (truth.sum((0, 2)) > 0)).mean()

    logits, label = example()
    label = jnp.where(label == 2, 1, label).astype(jnp.uint8)
    value, grad = in_torch(literal, logits, label)
    found, found_grad = value_and_grad(partial(PIXEL_LOSSES["dice"], smooth=smooth), logits, label)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert relative(found_grad, grad) < 1e-5


@needs.torch
@pytest.mark.parametrize("certainty", [0.3, 4.0])
def test_rmi_is_stable_in_float32(certainty):
    """In float64, on regions of one class, which leave covariances without an inverse."""
    import torch

    size, num_classes = (96, 128), 3
    blocks = np.random.default_rng(0).integers(num_classes, size=(1, 3, 4))
    label = blocks.repeat(32, 1).repeat(32, 2).astype(np.uint8)
    label[:, :32] = 1
    noise = np.random.default_rng(1).normal(size=(1, *size, num_classes))
    logits = certainty * (2 * np.eye(num_classes)[label] - 1) + 0.1 * noise

    def squares(x):
        x = torch.nn.functional.max_pool2d(x, 3, 3, 1)
        h, w = x.shape[2] - 2, x.shape[3] - 2
        parts = [x[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        x = torch.stack(parts, 2).flatten(3)
        return x - x.mean(3, keepdim=True)

    def literal(x, y):
        truth = torch.nn.functional.one_hot(y, num_classes).double().permute(0, 3, 1, 2)
        y, p = squares(truth), squares(torch.sigmoid(x) + 1e-6)
        ridge = 1e-3 * torch.eye(9).double()
        cross = y @ p.mT
        rest = y @ y.mT - cross @ torch.linalg.inv(p @ p.mT + ridge) @ cross.mT
        return torch.logdet(rest + ridge).mean(0).sum() / 18

    value, grad = in_torch(literal, logits, label)
    loss = partial(PIXEL_LOSSES["rmi"], bce_share=0.0)
    found, found_grad = value_and_grad(loss, jnp.asarray(logits, jnp.float32), jnp.asarray(label))
    np.testing.assert_allclose(found, value, rtol=1e-4)
    assert relative(found_grad, grad) < 1e-2
