"""Whole-image evaluation is exact whatever the batches, and its pages say what was measured."""

import json

import jax
import numpy as np
import pytest

from contrastseg_jax import config as config_lib
from contrastseg_jax import distributed
from contrastseg_jax.build import dataset_spec, image_format
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.images import decode_image, decode_mask
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluate import (
    compile_eval_step,
    evaluate,
    evaluate_run,
    inference_variables,
    load_run,
    predict_step,
)
from contrastseg_jax.structs import ImageFormat, TrainState


def test_confusion_is_that_of_each_image_alone(trained, tmp_path):
    """Three images in batches of two, against one image at a time in NumPy."""
    config, workdir = trained
    model, variables, step, mesh = load_run(config, workdir, "latest")
    step_fn = compile_eval_step(config, model, mesh)
    spec = dataset_spec(config)
    results = evaluate(
        *(config, step_fn, variables, open_split(spec, "val"), "val", step),
        **{"mesh": mesh, "folder": tmp_path},
    )
    expected = np.zeros((3, 3), int)
    predict = jax.jit(
        lambda image: predict_step(variables, image, model=model, image_format=image_format(config))
    )
    for record in open_split(spec, "val"):
        padded = np.zeros((1, 64, 64, 3), np.uint8) + np.uint8([124, 116, 104])
        padded[0, :48] = decode_image(record["image"], "")
        prediction = np.argmax(predict(padded), -1)[0, :48]
        label = to_train_ids(decode_mask(record["label"], ""), label_map(spec), "")
        seen = label < 3
        np.add.at(expected, (label[seen], prediction[seen]), 1)
    difference = np.abs(expected - results["confusion"]).sum()
    assert expected.sum() == np.sum(results["confusion"])
    assert difference <= 4, "more than two pixels changed class with the batch"
    assert results["num_images"] == 3


def test_the_projection_head_is_not_computed(trained):
    config, workdir = trained
    model, variables, _, mesh = load_run(config, workdir, "latest")
    assert "proj_head" in variables["params"]
    image = np.zeros((2, 64, 64, 3), np.uint8)
    text = jax.jit(
        lambda variables, image: predict_step(
            variables, image, model=model, image_format=ImageFormat((0.0,) * 3, (1.0,) * 3)
        )
    ).lower(variables, image)
    assert "proj_head" not in text.as_text(debug_info=True)


def test_averaged_parameters_are_used_where_kept():
    state = TrainState(0, {"x": 1}, {"y": 2}, None)
    assert inference_variables(state) == {"params": {"x": 1}, "batch_stats": {"y": 2}}
    averages = {"params": {"x": 3}, "batch_stats": {"y": 4}}
    assert inference_variables(state.replace(ema=averages)) == averages


def test_evaluate_run_writes_scores_and_pictures(trained, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    config, workdir = trained
    evaluate_run(config, workdir, "best", "train")
    assert "ignored: 255\n  0->0->0 class_0  1->1->1 class_1" in caplog.text
    (folder,) = workdir.glob("eval/*_train")
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["split"] == "train" and scores["num_images"] == 6
    assert set(scores["iou"]) == {"class_0", "class_1", "class_2"}
    page = (folder / "index.html").read_text()
    assert f"{scores['mean_iou']:.4f}" in page and "000000.png" in page
    assert (folder / "000000.png").stat().st_size > 5000


def test_a_split_that_is_absent_is_named(trained):
    config, workdir = trained
    with pytest.raises(InputError, match="no split 'test', only train, val"):
        evaluate_run(config, workdir, "latest", "test")
    assert not list(workdir.glob("eval/*_test"))


def test_load_run_restores_on_other_devices(trained):
    config, workdir = trained
    settings = ["eval.batch_size=1"]
    _, variables, step, mesh = load_run(config_lib.override(config, settings), workdir, "4")
    assert step == 4 and mesh.size == 2
    leaf = jax.tree.leaves(variables)[0]
    assert leaf.sharding == distributed.replicated(mesh)
