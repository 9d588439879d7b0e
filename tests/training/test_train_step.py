"""The train step: what it computes, and how often; on other devices: test_multi_device.py."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, run_steps, setup_of, start

from contrastseg_jax.contrast import contrast_step, memory_bank
from contrastseg_jax.contrast.anchors import sample_anchors
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import initial_variables
from contrastseg_jax.training import train_step
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state, state_sharding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def warming_up():
    """Three steps of the small run: state, metrics of each step, the compiled step."""
    return run_steps(make_config())


# Contrast from the first step, and a first step that moves parameters by the gradient alone.
PLAIN = (
    *("contrast.warmup_steps=0", "optim.momentum=0.0", "optim.weight_decay=0.0"),
    *("optim.learning_rate=0.1", "train.num_steps=100"),
)


def normalized(config, batch):
    return normalize(batch.image, setup_of(config).image_format)


def test_the_loss_falls_on_one_batch():
    step_fn, state, mesh = start(make_config(*PLAIN))
    losses = []
    for _ in range(20):
        state, metrics = step_fn(state, sharding.to_devices(make_batch(), mesh))
        losses.append(float(metrics["cross_entropy"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


def test_many_batches_are_one_trace(warming_up):
    assert warming_up[2]._cache_size() == 1


def test_contrast_counts_after_its_warmup_and_the_bank_fills_before(warming_up):
    state, history, _ = warming_up
    assert history[0]["contrast"] == 0
    assert history[0]["loss"] == history[0]["cross_entropy"]
    assert history[0]["memory_fill"] > 0
    assert history[1]["contrast"] > 0
    np.testing.assert_allclose(
        history[1]["loss"], history[1]["cross_entropy"] + 0.1 * history[1]["contrast"], rtol=1e-6
    )
    assert int(state.step) == 3
    lengths = np.linalg.norm(state.memory.pixel, axis=-1)
    written = np.arange(16)[None] < state.memory.pixel_count[:, None]
    np.testing.assert_allclose(lengths[written], 1, rtol=1e-5)
    assert not lengths[~written].any()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count_of_steps(where):
    """Of batches with the label 7, which is no class."""
    config = make_config("optim.ema_decay=0.9", "contrast.warmup_steps=0")
    setup = setup_of(config)

    (term,) = setup.terms

    def pixel_loss(logits, label):
        loss, is_bad = term.loss(logits, label), (label == 7).any()
        if where == "loss":
            return jnp.where(is_bad, jnp.nan, loss)
        # The root of 0 is finite, its gradient infinite, times 0.
        return loss + jnp.sqrt(jnp.where(is_bad, 0.0 * logits.sum(), 1.0))

    tx, _ = build_optimizer(config)
    state = init_state(setup, tx, initial_variables(setup))
    state = jax.device_put(state, state_sharding(setup, state, setup.mesh))
    step_fn = train_step.compile_step(
        dataclasses.replace(setup, terms=(term._replace(loss=pixel_loss),)), tx
    )
    with jax.debug_nans(False):
        state, metrics = step_fn(state, sharding.to_devices(make_batch(0), setup.mesh))
        assert metrics["skipped"] == 0
        before, batch = sharding.fetch(state), make_batch(1)
        batch.label[0, 0, 0] = 7
        state, metrics = step_fn(state, sharding.to_devices(batch, setup.mesh))
        assert metrics["skipped"] == 1 and np.isfinite(metrics["loss"]) == (where == "gradient")
        after = sharding.fetch(state)
        state, metrics = step_fn(state, sharding.to_devices(make_batch(2), setup.mesh))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    names = {
        jax.tree_util.keystr(path)
        for path, is_changed in jax.tree_util.tree_leaves_with_path(changed)
        if is_changed
    }
    counts = {name for name in names if name.endswith("count") and "opt_state" in name}
    ages = {".memory.pixel_age", ".memory.segment_age"}  # go on
    assert names - counts - ages == {".step"} and counts


def test_both_weights_rise_in_equal_steps():
    config = make_config(
        *("loss.segmentation_weight=2.0", "loss.ramp_steps=4", "contrast.loss_weight=0.5"),
        *("contrast.warmup_steps=1", "contrast.ramp_steps=2", "train.num_steps=10"),
    )
    _, history, _ = run_steps(config, num_steps=4)
    parts = [(m["cross_entropy"], m["contrast"]) for m in history]
    weights = [(0.5, 0.0), (1.0, 0.25), (1.5, 0.5), (2.0, 0.5)]
    for metrics, (cross_entropy, contrast), (first, second) in zip(
        history, parts, weights, strict=True
    ):
        expected = first * cross_entropy + second * contrast
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_contrast_alone_leaves_the_head_to_weight_decay():
    settings = ("loss.segmentation_weight=0.0", "optim.weight_decay=0.0", "contrast.warmup_steps=0")
    config = make_config(*settings)
    _, before, _ = start(config)
    before = jax.device_get(before.params)
    state, history, _ = run_steps(config, num_steps=2)
    np.testing.assert_allclose(history[1]["loss"], 0.1 * history[1]["contrast"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before["cls_head"], state.params["cls_head"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    assert any(jax.tree.leaves(moved))


def test_keys_come_from_the_network_or_from_its_average():
    """With an average that does not move, those of a second step are the first weights'."""
    settings = ("optim.ema_decay=0.999", "memory.pixels_per_class=40", "optim.learning_rate=0.1")
    banks = {}
    for network in ("online", "ema"):
        config = make_config(*settings, f"memory.key_network={network}")
        step_fn, state, mesh = start(config)
        batch = sharding.to_devices(make_batch(), mesh)
        first = jax.device_get(state.ema)
        state, _ = step_fn(state, batch)
        banks[network] = np.asarray(state.memory.segment[:, 0])
        if network == "ema":
            output = train_step.output_of(setup_of(config), state.ema, normalized(config, batch))
            moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, state.ema)
            assert max(jax.tree.leaves(moved)) > 0
            label = train_step.output_label(output, batch.label)
            rows, _ = memory_bank.segment_keys(output.embedding, label, num_classes=3)
            np.testing.assert_allclose(banks["ema"], rows[0, :, 0], atol=1e-4)
    assert np.abs(banks["online"] - banks["ema"]).max() > 1e-2


@pytest.mark.parametrize("name", ["toy", "toy_ocr"])
@pytest.mark.parametrize("proj_input", ["features", "last"])
def test_the_gradient_ratio_is_that_of_the_losses_where_the_heads_part(name, proj_input):
    """Differentiated for each loss alone, with what the heads read given from outside.

    The auxiliary head of `toy_ocr` reads the features too, and its logits guide those of the other.
    """
    settings = (f"model.name={name}", f"model.proj_input={proj_input}", "contrast.loss_weight=0.3")
    config = make_config(*PLAIN, *settings)
    setup = setup_of(config)
    step_fn, state, mesh = start(config)
    batch = sharding.to_devices(make_batch(), mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    image = normalized(config, batch)
    rng = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), 4)
    image_rng = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng[1], batch.example_id)

    def losses(shifts):
        """The two losses, of features that are shifted on their way to either head."""

        def shifted(call, args, kwargs, context):
            head = context.module.name
            shift = shifts.get("cls_head" if head == "aux_head" else head)
            if context.method_name != "__call__" or shift is None:
                return call(*args, **kwargs)
            if head == "cls_head" and proj_input == "last":
                return call(*args, **kwargs | {"watch": lambda x: x + shift})
            if head == "aux_head" and proj_input == "last":
                return call(*args, **kwargs)
            return call(args[0] + shift, *args[1:], **kwargs)

        with nn.intercept_methods(shifted):
            output, _ = setup.model.apply(
                *(variables, image), train=True, mutable=["batch_stats"], rngs={"dropout": rng[0]}
            )
        loss, metrics = train_step.total_loss(setup, state, output, batch.label, image_rng, rng[3])
        return metrics["cross_entropy"], 0.3 * metrics["contrast"]

    shape = jax.eval_shape(
        lambda: (
            setup.model.apply(
                *(variables, image), train=True, mutable=["batch_stats"], rngs={"dropout": rng[0]}
            )[0].features
        )
    ).shape
    width = shape if proj_input == "last" else (*shape[:3], features_width(state))
    shifts = {name: jnp.zeros(width) for name in ("cls_head", "proj_head")}
    of_segmentation = jax.grad(lambda x: losses(x)[0])(shifts)["cls_head"]
    of_contrast = jax.grad(lambda x: losses(x)[1])(shifts)["proj_head"]
    expected = np.linalg.norm(of_contrast) / np.linalg.norm(of_segmentation)
    assert expected > 0
    _, metrics = step_fn(state, batch)
    np.testing.assert_allclose(metrics["gradient_ratio"], expected, rtol=1e-3)


def features_width(state):
    """Channels of the features that the projection head reads."""
    return state.params["proj_head"]["conv1"]["kernel"].shape[2]


def test_as_many_anchors_are_sampled_as_the_map_has_sixteenths(monkeypatch):
    sampled = []

    def sample(*arguments, **settings):
        sampled.append(sample_anchors(*arguments, **settings))
        return sampled[-1]

    monkeypatch.setattr(contrast_step, "sample_anchors", sample)
    config = make_config("contrast.anchors_per_image=0", "augment.crop_size=(64, 128)")
    step_fn, state, mesh = start(config)
    jax.eval_shape(step_fn, state, train_step.batch_shape(setup_of(config)))
    assert {anchors.embedding.shape for anchors in sampled} == {(4, 16 * 32 // 16, 16)}


def test_warmup_computes_no_contrast():
    """D18: a bank that would make the loss NaN does not matter until the contrast counts."""
    step_fn, state, mesh = start(make_config("contrast.warmup_steps=1"))
    with jax.debug_nans(False):
        bank = state.memory.replace(
            pixel=jnp.full_like(state.memory.pixel, np.nan),
            pixel_count=jnp.full_like(state.memory.pixel_count, 16),
        )
        state, first = step_fn(state.replace(memory=bank), sharding.to_devices(make_batch(0), mesh))
        assert np.isfinite(first["loss"])
        _, second = step_fn(state, sharding.to_devices(make_batch(1), mesh))
        assert np.isnan(second["loss"])


def test_cross_entropy_alone_has_neither_projection_nor_bank():
    config = make_config("optim.ema_decay=0.9", variant="ce")
    _, state, _ = start(config)
    assert "proj_head" not in state.params
    assert state.memory is None
    jax.tree.map(np.testing.assert_array_equal, state.ema["params"], state.params)


def test_bank_alone_trains_on_what_it_holds():
    config = make_config("contrast.candidates=memory", "memory.dtype=bfloat16")
    state, history, _ = run_steps(config, num_steps=2)
    assert history[1]["contrast"] > 0
    assert state.memory.pixel.dtype == jnp.bfloat16


def test_diagnostics_are_logged_with_the_loss(warming_up):
    metrics = warming_up[1][2]
    assert 0 < metrics["hard_anchors"] < 1
    assert metrics["ignored_pixels"] == 1 / 32
    assert metrics["positives_per_anchor"] > 1
    assert -1 <= metrics["negative_similarity"] < metrics["positive_similarity"] <= 1
    first = warming_up[1][0]
    assert 0 < first["memory_fill_min"] <= first["memory_fill"] < 1


def test_a_step_depends_on_seed_and_step_alone():
    config = make_config()
    step_fn, state, mesh = start(config)
    again = jax.tree.map(jnp.copy, state)
    first, _ = step_fn(state, sharding.to_devices(make_batch(), mesh))
    second, _ = step_fn(again, sharding.to_devices(make_batch(), mesh))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    "name", ["hrnet_tiny_ocr", "deeplabv3_r18", "deeplabv3plus_r18", "ocr_r18"]
)
def test_every_kind_of_network_can_be_trained_with_memory(name):
    """Traced, not compiled: sizes and types of logits, embeddings and labels fit each other."""
    config = make_config(f"model.name={name}", "model.dtype=bfloat16", "model.remat=('layer1',)")
    step_fn, state, _ = start(config)
    after, metrics = jax.eval_shape(step_fn, state, make_batch())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "contrast", "cross_entropy", "memory_fill"} <= metrics.keys()


def test_an_auxiliary_head_is_trained():
    """Its loss counts, so that its parameters move, and with weight 0 they do not."""
    for aux_weight, moves in ((0.4, True), (0.0, False)):
        plain = ("optim.weight_decay=0.0", "contrast.candidates=none")
        config = make_config(
            "model.name=fcn_r18", f"loss.aux_weight={aux_weight}", *plain, variant="ce"
        )
        step_fn, state, mesh = start(config, num_devices=1)
        before = sharding.fetch(state.params["aux_head"])
        state, metrics = step_fn(state, sharding.to_devices(make_batch(size=2), mesh))
        assert np.isfinite(metrics["loss"])
        after = sharding.fetch(state.params["aux_head"])
        assert np.any(before["conv2"]["kernel"] != after["conv2"]["kernel"]) == moves
