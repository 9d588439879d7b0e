"""Frozen parts: constants, their statistics too, without gradient or optimiser state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, setup_of, start

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.freezing import trained, with_frozen
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import build_model
from contrastseg_jax.structs import IMAGENET
from contrastseg_jax.training.train_step import batch_shape

pytestmark = pytest.mark.slow

NETWORKS = ("hrnet_tiny", "fcn_r18", "deeplabv3_r18", "fcn_convnext_tiny")


def model_of(name, freeze):
    return build_model(make_config(f"model.name={name}", f"model.freeze={freeze}"), 3)


def modules_of(tree):
    """The modules of a backbone of which something is left."""
    return {path[1] for path, leaf in segmenter.flatten(tree).items() if leaf is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_belongs_to_one_part(name):
    shapes = segmenter.variable_shapes(model_of(name, ()))
    modules = modules_of({"backbone": shapes["params"]["backbone"]})
    frozen = []
    for part in zoo.part_names(name)[1:]:
        left = trained(model_of(name, (part,)), {"backbone": shapes["params"]["backbone"]})
        frozen += modules - modules_of(left)
    assert sorted(frozen) == sorted(modules)
    whole = trained(model_of(name, ("backbone",)), shapes)
    assert {path[1] for path, leaf in segmenter.flatten(whole).items() if leaf is not None} >= {
        "cls_head"
    }
    assert not jax.tree.leaves(whole["params"]["backbone"])
    filled = with_frozen(whole, shapes)
    assert jax.tree.structure(filled) == jax.tree.structure(shapes)


def test_frozen_parts_do_not_change():
    """Nor do their statistics or their running average; all else does."""
    name, freeze = "toy", ("stem",)
    settings = ("optim.ema_decay=0.9", "optim.learning_rate=0.1", "contrast.candidates=none")
    settings += ("train.accumulation_steps=2", "optim.weight_decay=0.01")
    config = make_config(f"model.name={name}", f"model.freeze={freeze}", *settings, variant="ce")
    step_fn, state, mesh = start(config)
    before = sharding.fetch(state)
    for _ in range(2):
        state, _ = step_fn(state, sharding.to_devices(make_batch(), mesh))
    after, model = sharding.fetch(state), setup_of(config).model
    first = {"params": before.params, "batch_stats": before.batch_stats}
    last = {"params": after.params, "batch_stats": after.batch_stats}
    moving = segmenter.flatten(trained(model, first))
    assert any(leaf is None for leaf in moving.values())
    for path, old in segmenter.flatten(first).items():
        new, averaged = (segmenter.flatten(tree)[path] for tree in (last, after.ema))
        if moving[path] is None:
            np.testing.assert_array_equal(new, old, err_msg=str(path))
            np.testing.assert_array_equal(averaged, old, err_msg=str(path))
        else:
            assert np.any(new != old), path


@pytest.mark.parametrize(
    ("name", "freeze"),
    [
        *(("fcn_r18", ("stem", "layer2")), ("deeplabv3_r18", ("layer1",))),
        *(("fcn_r18", ("backbone",)), ("hrnet_tiny", ("stem", "stage3"))),
    ],
)
def test_frozen_statistics_do_not_move(name, freeze):
    model = model_of(name, freeze)
    shapes = segmenter.variable_shapes(model)
    values = {"params": 0.01, "batch_stats": 0.5}  # which no BatchNorm would make of its features
    variables = {
        kind: jax.tree.map(lambda x, value=value: np.full(x.shape, value, x.dtype), shapes[kind])
        for kind, value in values.items()
    }
    image = normalize(jnp.asarray(make_batch(size=2).image), IMAGENET)
    _, moved = jax.jit(
        lambda variables, image: model.apply(
            variables,
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
    )(variables, image)
    statistics = {"batch_stats": moved["batch_stats"]}
    moving = segmenter.flatten(trained(model, statistics))
    for path, new in segmenter.flatten(statistics).items():
        assert np.all(new == 0.5) == (moving[path] is None), path


def test_frozen_parts_cost_neither_operations_nor_state():
    """Of the train step as written: without the backward pass of all that lies before."""
    operations, state_bytes = {}, {}
    for freeze in ((), ("stem", "layer1"), ("backbone",)):
        config = make_config("model.name=fcn_r18", f"model.freeze={freeze}", variant="ce")
        step_fn, state, _ = start(config, num_devices=1)
        lowered = step_fn.lower(state, batch_shape(setup_of(config, 1)))
        operations[freeze] = lowered.cost_analysis()["flops"]
        state_bytes[freeze] = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    plain, some, whole = operations.values()
    assert some < 0.97 * plain and whole < 0.65 * plain
    plain, some, whole = state_bytes.values()
    assert whole < 0.3 * plain < some < plain
