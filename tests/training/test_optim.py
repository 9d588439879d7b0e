"""The optimiser against PyTorch's rule written out, the schedule against the original's formula."""

import json

import jax
import jax.numpy as jnp
import needs
import numpy as np
import optax
import pytest
from paths import STORED
from small import make_config, setup_of

from contrastseg_jax.losses.cross_entropy import cross_entropy
from contrastseg_jax.models import segmenter
from contrastseg_jax.setup.resolve import build_model
from contrastseg_jax.structs import Batch
from contrastseg_jax.training.micro_batches import MEAN, in_micro_batches, label_weight, loss_share
from contrastseg_jax.training.optim import build_optimizer, learning_rates, update_ema

CASES = sorted(path.stem for path in (STORED / "optim").glob("*.npz"))


def stored(case):
    """The problem, PyTorch's parameters after each step, and the config that means the same."""
    with np.load(STORED / "optim" / f"{case}.npz") as arrays:
        arrays = dict(arrays)
    settings = json.loads(str(arrays.pop("meta")))["settings"]
    batch_size = "train.batch_size=32"
    return arrays, make_config(batch_size, *(f"{key}={value}" for key, value in settings.items()))


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_pytorch(case):
    """Schedule, warm-up, decay, groups, clipping, accumulation, SGD and AdamW."""
    arrays, config = stored(case)
    setup, (tx, _) = setup_of(config, num_devices=1), build_optimizer(config)
    names = [name for name in arrays if "/" in name]
    params = {"backbone": {}, "cls_head": {}}
    for module, _, leaf in (name.partition("/") for name in names):
        params[module][leaf] = jnp.asarray(arrays[f"{module}/{leaf}"], jnp.float32)
    x = jnp.asarray(arrays["x"], jnp.float32)
    label = jnp.asarray(arrays["label"], jnp.uint8)[:, None, None]
    total = label_weight(setup, label)

    def loss(params, x, label):
        backbone, head = params["backbone"], params["cls_head"]
        hidden = jnp.tanh(
            (x @ backbone["kernel"]) * backbone["scale"][None] + backbone["bias"][None]
        )
        logits = hidden @ head["kernel"] + head["bias"][None]
        weights = config.loss.class_weights
        mean = cross_entropy(logits[:, None, None], label, class_weights=weights)
        share = loss_share(setup, label, total)
        return mean if share is None else mean * share

    @jax.jit
    def step(params, opt_state):
        def of_part(part, _):
            return jax.grad(loss)(params, part.image, part.label)

        rows = jnp.arange(32, dtype=jnp.int32)
        grads = in_micro_batches(of_part, setup, MEAN)(Batch(x, label, rows, rows >= 0), rows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    assert len(arrays["params"]) == 20
    for expected in arrays["params"]:
        params, opt_state = step(params, opt_state)
        got = [
            params[module][leaf].ravel() for module, _, leaf in (n.partition("/") for n in names)
        ]
        np.testing.assert_allclose(np.concatenate(got), expected, rtol=2e-5, atol=2e-6)


@needs.torch
@pytest.mark.parametrize("case", CASES)
def test_the_stored_steps_are_what_pytorch_computes(case):
    needs.package("torch")
    from make_optimizers import CASES, run

    np.testing.assert_allclose(stored(case)[0]["params"], run(*CASES[case]), rtol=1e-9)


def test_the_state_of_the_default_is_that_of_earlier_versions():
    """Or their checkpoints could not be restored."""
    params = {"backbone": {"kernel": np.ones(2)}, "cls_head": {"bias": np.ones(1)}}
    for multiplier in (1.0, 10.0):
        tx, _ = build_optimizer(make_config(f"optim.head_lr_multiplier={multiplier}"))
        paths = [jax.tree_util.keystr(at) for at, _ in jax.tree.leaves_with_path(tx.init(params))]
        trace = "[1][0].trace"
        assert paths == [
            f"{trace}['backbone']['kernel']",
            f"{trace}['cls_head']['bias']",
            "[1][1].count",
        ]


@pytest.mark.parametrize("multiplier", [1.0, 10.0])
def test_sgd_is_that_of_pytorch_with_two_groups_of_parameters(multiplier):
    """v <- momentum·v + (g + decay·p); p <- p - lr·v, with an lr for all but the backbone."""
    rng = np.random.default_rng(0)
    settings = ("optim.weight_decay=0.01", "train.num_steps=5", "contrast.warmup_steps=0")
    tx, _ = build_optimizer(make_config(*settings, f"optim.head_lr_multiplier={multiplier}"))
    rates = {"backbone": 0.01, "cls_head": 0.01 * multiplier, "proj_head": 0.01 * multiplier}
    expected = {name: rng.normal(size=4) for name in rates}
    velocity = dict.fromkeys(rates, np.zeros(4))
    params = {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in expected.items()}
    opt_state = tx.init(params)
    for step in range(5):
        grads = {name: rng.normal(size=4) for name in rates}
        updates, opt_state = tx.update(
            {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in grads.items()},
            opt_state,
            params,
        )
        params = optax.apply_updates(params, updates)
        for name, rate in rates.items():
            velocity[name] = 0.9 * velocity[name] + grads[name] + 0.01 * expected[name]
            expected[name] = expected[name] - rate * (1 - step / 5) ** 0.9 * velocity[name]
            np.testing.assert_allclose(params[name]["kernel"], expected[name], rtol=1e-5)


def test_poly_schedule_falls_to_zero_and_rises_in_the_warmup():
    settings = {"learning_rate": 2.0, "num_steps": 100, "poly_power": 0.9, "warmup_steps": 4}
    schedule = learning_rates("poly", **settings)
    got = [float(schedule(jnp.asarray(step))) for step in (0, 1, 3, 50, 100)]
    poly = [2 * (1 - step / 100) ** 0.9 for step in (0, 1, 3, 50, 100)]
    rise = [1 / 4, 2 / 4, 1, 1, 1]
    assert got == pytest.approx([a * b for a, b in zip(poly, rise, strict=True)], abs=1e-6)


def test_cosine_falls_to_zero_and_constant_stays():
    settings = {"learning_rate": 2.0, "num_steps": 100, "poly_power": 0.9, "warmup_steps": 4}
    cosine, constant = (learning_rates(name, **settings) for name in ("cosine", "constant"))
    steps = (0, 3, 25, 50, 100)
    falling = [1 + np.cos(np.pi * step / 100) for step in steps]
    rise = [1 / 4, 1, 1, 1, 1]
    got = [float(cosine(step)) for step in steps]
    assert got == pytest.approx([a * b for a, b in zip(falling, rise, strict=True)], abs=1e-6)
    assert [float(constant(step)) for step in steps] == pytest.approx([2 * a for a in rise])


def test_norms_and_biases_need_not_decay():
    """Nor the scales of a ConvNeXt's layers; without gradient, what moves is what decays."""
    config = make_config("model.name=fcn_convnext_tiny", "optim.decayed=kernels")
    tx, _ = build_optimizer(config)
    shapes = segmenter.variable_shapes(build_model(config, 3))["params"]
    ones = jax.tree.map(lambda x: np.ones((), np.float32), shapes)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, ones), tx.init(ones), ones)
    moved = {path[-1]: bool(x) for path, x in segmenter.flatten(updates).items()}
    assert moved == {"kernel": True, "bias": False, "scale": False, "layer_scale": False}


def test_ema_follows_fast_at_first():
    ema, params = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}
    first = update_ema(ema, params, jnp.asarray(0), ema_decay=0.99)
    late = update_ema(ema, params, jnp.asarray(10_000), ema_decay=0.99)
    np.testing.assert_allclose(first["x"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(late["x"], 0.01, rtol=1e-4)
