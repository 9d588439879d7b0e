"""The contract of an objective, by one of a few lines: nothing else has to know of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import make_config, setup_of

from contrastseg_jax.evaluation.evaluate import evaluate_run
from contrastseg_jax.evaluation.predict import predict_run
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.training.train import train

pytestmark = pytest.mark.slow


def prototypes(num_classes, proj_dim):
    """A prototype of each class: the mean of its embeddings; inference takes the nearest one's.

    That of class 2 is set to be nearest to everything, so that a test can see it.
    """

    def loss(state, output, label, image_rng, rng):
        nearest = jnp.einsum("bhwd,kd->bhwk", output.embedding, state["prototype"])
        return jnp.mean(jnp.square(nearest)), {"nearness": jnp.mean(nearest)}

    def extract(output, label, image_rng):
        member = jax.nn.one_hot(label, num_classes)
        return jnp.einsum("bhwk,bhwd->bkd", member, output.embedding) / label[0].size

    def update(state, means, is_taken):
        steps = state["steps"] + 1
        return {"prototype": means.mean(0), "steps": steps}, {"steps": steps.astype(jnp.float32)}

    def logits(state, output):
        chosen = jnp.arange(num_classes) == 2
        scores = jnp.where(chosen, state["steps"].astype(jnp.float32), -1.0)
        return 0.0 * output.embedding[..., :1] + scores[None, None, None]

    return Objective(
        loss_weight=0.5,
        warmup_steps=2,
        init=lambda: {
            "prototype": jnp.zeros((num_classes, proj_dim)),
            "steps": jnp.zeros((), jnp.int32),
        },
        loss=loss,
        extract=extract,
        update=update,
        sharding=sharding.replicated_tree,
        logits=logits,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A setup with another objective, and the workdir in which it was trained."""
    folder = tmp_path_factory.mktemp("run")
    setup = setup_of(make_config(f"data.prepared_dir={folder / 'prepared'}"))
    objective = prototypes(setup.model.num_classes, setup.model.proj_dim)
    setup = dataclasses.replace(setup, objective=objective)
    train(setup, folder / "run")
    return setup, folder / "run"


def test_it_is_trained_after_its_warmup_and_carries_a_state(run):
    setup, workdir = run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    assert [line["train/steps"] for line in lines] == [1.5, 3.5, 5.5]  # means over two steps
    assert lines[0]["train/contrast"] == 0 < lines[1]["train/contrast"]
    for line in lines:
        total = line["train/cross_entropy"] + 0.5 * line["train/contrast"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)


def test_its_state_is_restored_for_inference(run):
    setup, workdir = run
    variables, step = load_network(setup, workdir, "latest")
    assert step == variables["memory"]["steps"] == 6
    assert np.abs(variables["memory"]["prototype"]).max() > 0


def test_its_logits_are_those_that_evaluation_and_prediction_take(run, tmp_path):
    setup, workdir = run
    evaluate_run(setup, workdir, "latest", "val", tmp_path / "scores")
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scores["never_predicted"] == ["class_0", "class_1"]
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    alone = dataclasses.replace(setup, mesh=sharding.make_mesh(jax.devices()[:1]))
    predict_run(alone, workdir, "latest", [str(tmp_path / "x.png")], tmp_path / "out")
    with Image.open(tmp_path / "out" / "masks" / "x.png") as mask:
        assert (np.asarray(mask) == 2).all()


def test_without_training_its_state_is_that_of_the_start(run, tmp_path):
    setup, _ = run
    variables, step = load_network(setup, tmp_path, "init")
    assert step == variables["memory"]["steps"] == 0
