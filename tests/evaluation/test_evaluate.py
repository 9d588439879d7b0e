"""Whole-image evaluation is exact whatever the batches, and its pages say what was measured."""

import html
import json
import re
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import setup_of

from contrastseg_jax.config.load import override
from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit.report import audit_run
from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.images import decode_image, decode_mask, encode_png
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.preprocess import resize_image
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import evaluate as evaluate_module
from contrastseg_jax.evaluation.evaluate import (
    evaluate,
    evaluate_run,
    make_evaluator,
    network_logits,
    score,
)
from contrastseg_jax.evaluation.protocols import whole_image
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.parallel import device_memory, sharding
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.structs import Batch, TrainState
from contrastseg_jax.weights.load import inference_variables

SIZES = [(48, 64), (40, 75), (45, 61), (71, 33)]  # the first and the third share a batch


@pytest.mark.parametrize("short_side", [0, 37])
def test_confusion_is_that_of_each_image_alone(trained, tmp_path, short_side):
    """Images of several sizes in batches of two, against one image at a time in NumPy."""
    config, workdir = trained
    setup = setup_of(override(config, [f"data.short_side={short_side}"]))
    variables, step = load_network(setup, workdir, "latest")
    (record, *_) = open_split(setup.data, "val")
    source = [
        record
        | {
            "image": encode_png(resize_image(decode_image(record["image"], ""), size)),
            "label": encode_png(
                cv2.resize(decode_mask(record["label"], ""), size[::-1], interpolation=0)
            ),
        }
        for size in SIZES
    ]
    evaluator = make_evaluator(setup, source, "val")
    assert [group.example_ids for group in evaluator.groups] == [[0, 2], [1], [3]]
    results = evaluate(evaluator, variables, step, folder=tmp_path, workdir=tmp_path)
    expected = np.zeros((3, 3), int)
    logits_of = jax.jit(lambda x: network_logits(variables, x, setup=setup, protocol=whole_image))
    for record in source:
        image = decode_image(record["image"], "")
        scale = short_side / min(image.shape[:2]) if short_side else 1
        height, width = (round(side * scale) for side in image.shape[:2])
        padded_size = -(-height // 32) * 32, -(-width // 32) * 32
        padded = np.zeros((1, *padded_size, 3), np.uint8) + np.uint8([124, 116, 104])
        padded[0, :height, :width] = cv2.resize(image, (width, height), interpolation=2)
        logits = resize_bilinear(logits_of(padded), padded_size)[:, :height, :width]
        prediction = np.argmax(resize_bilinear(logits, image.shape[:2]), -1)[0]
        label = to_train_ids(decode_mask(record["label"], ""), setup.classes, "")
        seen = label < 3
        np.add.at(expected, (label[seen], prediction[seen]), 1)
    difference = np.abs(expected - results["confusion"]).sum()
    assert expected.sum() == np.sum(results["confusion"]) > 0
    assert difference <= 4, "more than two pixels changed class with the batch"
    assert results["num_images"] == len(source)
    with Image.open(tmp_path / "000000.png") as panel:
        assert panel.size[0] > 500


def test_resized_evaluations_send_nothing_but_their_counts(trained):
    """Rows of a batch are brought to the size of their labels where they are."""
    mesh = setup_of(trained[0]).mesh
    split, sizes = sharding.batch_sharding(mesh), np.full((2, 2), 20, np.int32)
    label = np.zeros((2, 40, 40), np.uint8)
    image, row = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int32)
    batch = Batch(image, label, row, row >= 0, sizes, sizes)
    shardings = split, sharding.replicated(mesh), split
    score_fn = jax.jit(score, in_shardings=split, out_shardings=shardings)
    text = score_fn.lower(np.zeros((2, 8, 8, 3), np.float32), batch).compile().as_text()
    assert "all-reduce" in text  # of the confusion matrix
    assert "all-gather" not in text and "all-to-all" not in text


def test_the_projection_head_is_not_computed(trained):
    config, workdir = trained
    setup = setup_of(config)
    variables, _ = load_network(setup, workdir, "latest")
    assert "proj_head" in variables["params"]
    image = np.zeros((2, 64, 64, 3), np.uint8)
    text = jax.jit(
        lambda variables, image: network_logits(variables, image, setup=setup, protocol=whole_image)
    ).lower(variables, image)
    assert "proj_head" not in text.as_text(debug_info=True)


def test_a_network_that_is_lost_is_not_scored(trained, tmp_path):
    """Its logits are NaN, of which argmax makes class 0."""
    config, workdir = trained
    setup = setup_of(config)
    variables, step = load_network(setup, workdir, "latest")
    evaluator = make_evaluator(setup, open_split(setup.data, "val"), "val")
    for value in (np.nan, np.inf):
        variables["params"]["cls_head"]["conv2"]["kernel"] = np.full((1, 1, 4, 3), value)
        with pytest.raises(FloatingPointError, match="after step 6: 1 of its .*cls_head/conv2"):
            evaluate(evaluator, variables, step, folder=tmp_path, workdir=workdir)
    assert not list(tmp_path.iterdir())


def test_averaged_parameters_are_used_where_kept():
    state = TrainState(0, {"x": 1}, {"y": 2}, None)
    assert inference_variables(state, None) == {"params": {"x": 1}, "batch_stats": {"y": 2}}
    averages = {"params": {"x": 3}, "batch_stats": {"y": 4}}
    assert inference_variables(state.replace(ema=averages), None) == averages


def test_evaluate_run_writes_scores_and_pictures(trained, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    config, workdir = trained
    evaluate_run(setup_of(config), workdir, "best", "train")
    assert "ignored: 255\n  0->0->0 class_0  1->1->1 class_1" in caplog.text
    assert "train: 6 images to evaluate in 3 batches" in caplog.text
    assert "compiling the network for 1 image size" in caplog.text
    (folder,) = workdir.glob("eval/*_train")
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["split"] == "train" and scores["num_images"] == 6
    assert set(scores["iou"]) == {"class_0", "class_1", "class_2"}
    page = (folder / "index.html").read_text()
    assert f"{scores['mean_iou']:.4f}" in page and "000000.png" in page
    assert (folder / "000000.png").stat().st_size > 5000


def test_an_evaluation_says_what_ails_contrast_as_training_did(trained, tmp_path):
    config, run = trained
    workdir = shutil.copytree(run, tmp_path / "run")
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    aged = [x | ({"train/memory_age": 2e3} if "train/loss" in x else {}) for x in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in aged))
    for split, folder in (("val", "6"), ("train", "6_train")):
        evaluate_run(setup_of(config), workdir, "latest", split)
        page = (workdir / "eval" / folder / "index.html").read_text()
        assert "the rows of the memory bank are 2000 steps old on average" in page


def contents(folder):
    """Every file and folder below, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_an_evaluation_with_an_output_leaves_the_workdir_as_it_is(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    config, workdir = trained
    before, output = contents(workdir), tmp_path / "scores"
    evaluate_run(setup_of(config), workdir, "latest", "val", output)
    assert contents(workdir) == before
    names = {"metrics.json", "per_class.csv", "per_image.csv", "image_counts.npz"}
    names |= {"record.json", "index.html", "000000.png"}
    assert {path.name for path in output.iterdir()} == names
    scores = json.loads((output / "metrics.json").read_text())
    assert scores == json.loads((workdir / "eval" / "6" / "metrics.json").read_text())


def test_a_misspelt_checkpoint_is_named_before_data_are_read(trained, monkeypatch):
    config, workdir = trained
    monkeypatch.setattr(evaluate_module, "open_split", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match="--checkpoint=lastest: must be latest, best or one of"):
        evaluate_run(setup_of(config), workdir, "lastest", "val")


@pytest.mark.parametrize("audited", [False, True])
def test_classes_that_are_never_predicted_are_named_with_weights(
    trained, tmp_path, monkeypatch, caplog, audited
):
    """A network that only knows class 0, and labels of all three."""
    caplog.set_level("INFO", "contrastseg_jax")
    config, run = trained
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    if audited:
        audit_run(config, workdir, None)
        audit = json.loads((workdir / "audit" / "audit.json").read_text())
        weights = ", ".join(map(str, audit["class_weights"]["median_frequency"]))

    def logits(variables, image, **_):
        return jnp.zeros((*image.shape[:3], 3)).at[..., 0].set(1.0)

    monkeypatch.setattr(evaluate_module, "network_logits", logits)
    evaluate_run(setup_of(config), workdir, "latest", "train")
    (line,) = [line for line in caplog.messages if "never predicted" in line]
    assert line.startswith("labelled but never predicted: class_1, class_2; class weights may help")
    advice = f'--config.loss.class_weights="({weights})"' if audited else "--mode=audit"
    assert advice in line
    folder = workdir / "eval" / "6_train"
    assert html.escape(line) in (folder / "index.html").read_text()
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["never_predicted"] == ["class_1", "class_2"]


def test_a_split_that_is_absent_is_named(trained):
    config, workdir = trained
    with pytest.raises(InputError, match="no split 'test', only train, val"):
        evaluate_run(setup_of(config), workdir, "latest", "test")
    assert not list(workdir.glob("eval/*_test"))


def test_an_image_for_which_memory_is_missing_is_named_before_all_work(trained, monkeypatch):
    config, workdir = trained
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 1000)
    with pytest.raises(InputError) as error:
        evaluate_run(setup_of(config), workdir, "latest", "train")
    assert re.fullmatch(
        r"train, image 000000: evaluating 2 at a time, padded to 64x64 pixels, needs 0\.\d GiB"
        r" of memory, 0\.0 GiB are free; lower eval\.batch_size or data\.short_side, or cut it"
        r" into tiles",
        str(error.value),
    )


@pytest.mark.parametrize(("split", "choice"), [("val", ", and the best checkpoint"), ("train", "")])
def test_scores_of_a_split_that_is_trained_on_say_so(trained, tmp_path, caplog, split, choice):
    config, workdir = trained
    setup = setup_of(override(config, ["data.train_splits=('train', 'val')"]))
    evaluate_run(setup, workdir, "latest", split, tmp_path / "scores")
    note = f"{split} is one of data.train_splits: its scores tell how well it was learnt, not more"
    assert note + choice in caplog.text
    assert note + choice in (tmp_path / "scores" / "index.html").read_text()
    caplog.clear()
    evaluate_run(setup_of(config), workdir, "latest", "val", tmp_path / "plain")
    assert "data.train_splits" not in caplog.text + (tmp_path / "plain" / "index.html").read_text()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_network_is_loaded_on_any_devices(trained, num_devices):
    config, workdir = trained
    setup = setup_of(config, num_devices)
    variables, step = load_network(setup, workdir, "4")
    assert step == 4 and setup.mesh.size == num_devices
    assert set(variables) == {"params", "batch_stats"}
    leaf = jax.tree.leaves(variables)[0]
    assert leaf.sharding == sharding.replicated(setup.mesh)


def test_pictures_that_fail_are_not_tried_again_with_every_batch(trained, tmp_path, monkeypatch):
    config, workdir = trained
    tried = []

    def fail(path, *_):
        tried.append(path.name)
        raise OSError("no picture")

    monkeypatch.setattr(pictures, "save_panel", fail)
    evaluate_run(setup_of(config), workdir, "latest", "train", tmp_path / "scores")
    assert tried == ["000000.png"]
