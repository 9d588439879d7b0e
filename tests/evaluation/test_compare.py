"""Comparisons of the workdirs that runs leave, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
from evaluated_runs import CLASSES, IMAGES, confusions, write_evaluation, write_run
from small import setup_of

from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation.compare import arm_names, compare_runs, group_runs
from contrastseg_jax.evaluation.evaluate import evaluate_run
from contrastseg_jax.evaluation.runs import read_runs
from contrastseg_jax.report.image_counts import read_image_counts
from contrastseg_jax.run.several import find_workdirs


@pytest.fixture
def runs(tmp_path):
    """Two arms of two seeds, and what of each was scored at the end, by arm and seed."""
    return {
        (arm, seed): write_run(
            tmp_path / arm / f"seed_{seed}", seed=seed, rightness=rightness, variant=arm
        )
        for arm, rightness in (("ce", 0.5), ("memory", 0.6))
        for seed in (0, 1)
    }


def compare(tmp_path, *names, checkpoint="latest", split="val"):
    given = [str(tmp_path / name) for name in names or ("ce", "memory")]
    compare_runs(given, checkpoint, split, tmp_path / "out")
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def refused(tmp_path, *names, **settings):
    """The message, without the folder's name."""
    with pytest.raises(InputError) as error:
        compare(tmp_path, *names, **settings)
    assert not (tmp_path / "out").exists()
    return str(error.value).replace(f"{tmp_path}/", "")


# --- What is compared -----------------------------------------------------------------------------


def test_runs_that_start_from_runs_of_one_kind_are_one_arm(tmp_path):
    """Each seed goes on from a run of its own."""
    for seed in (0, 1, 2):
        first = tmp_path / "first" / f"seed_{seed}"
        write_run(first, seed=seed, rightness=0.3, variant="pretrain")
        then = f"model.init_from={first}"
        write_run(tmp_path / "then" / f"seed_{seed}", then, seed=seed, rightness=0.6)
        write_run(tmp_path / "ce" / f"seed_{seed}", seed=seed, rightness=0.5)
    values = compare(tmp_path, "ce", "then")
    assert [arm["seeds"] for arm in values["arms"]] == [[0, 1, 2]] * 2


def test_scores_are_those_of_the_evaluations(runs, tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    values = compare(tmp_path)
    assert [arm["name"] for arm in values["arms"]] == ["candidates=none", "candidates=both"]
    for arm, name in zip(values["arms"], ("ce", "memory"), strict=True):
        of_seeds = [runs[name, seed] for seed in (0, 1)]
        assert arm["by_seed"]["mean_iou"] == pytest.approx([x["mean_iou"] for x in of_seeds])
        assert arm["mean"]["pixel_accuracy"] == pytest.approx(
            np.mean([x["pixel_accuracy"] for x in of_seeds])
        )
        for label in CLASSES:
            expected = [x["iou"][label] for x in of_seeds]
            assert arm["by_seed"]["iou"][label] == pytest.approx(expected)
        assert arm["runs"] == [str(tmp_path / name / f"seed_{seed}") for seed in (0, 1)]
        assert arm["steps"] == [6, 6] and arm["learning_curve"]["steps"] == [4, 6]
        assert arm["learning_curve"]["mean"][1] == pytest.approx(arm["mean"]["mean_iou"])
    assert "| candidates=none | 2 | " in caplog.text
    assert "| candidates=both | mIoU | 2 | +0." in caplog.text
    assert f"written: {tmp_path}/out/comparison.md" in caplog.text


def test_the_order_given_is_that_of_the_arms(runs, tmp_path):
    assert compare(tmp_path, "memory", "ce")["baseline"] == "candidates=both"
    order = ("memory/seed_1", "ce/seed_1", "memory/seed_0", "ce/seed_0")
    values = compare(tmp_path, *order)  # single workdirs
    assert [arm["seeds"] for arm in values["arms"]] == [[0, 1], [0, 1]]
    assert values["baseline"] == "candidates=both"


def test_operational_settings_make_no_arm(runs, tmp_path):
    write_run(tmp_path / "ce" / "seed_2", "train.eval_steps=3", "data.root=/mnt", seed=2)
    write_run(tmp_path / "memory" / "seed_2", "data.num_threads=9", seed=2, variant="memory")
    assert [arm["seeds"] for arm in compare(tmp_path)["arms"]] == [[0, 1, 2], [0, 1, 2]]


def test_training_data_may_differ(tmp_path):
    for number in (6, 60):
        write_run(tmp_path / f"of_{number}", f"data.synthetic.num_examples=({number}, 3)")
    values = compare(tmp_path, "of_6", "of_60")
    names = [arm["name"] for arm in values["arms"]]
    assert names == ["num_examples=(6, 3)", "num_examples=(60, 3)"]


def test_who_was_trained_on_the_split_is_noted(runs, tmp_path):
    for seed in (0, 1):
        splits = "data.train_splits=('train', 'val')"
        write_run(tmp_path / "both" / f"seed_{seed}", splits, seed=seed)
    assert compare(tmp_path)["notes"] == []
    name = "train_splits=('train', 'val')"
    (note,) = compare(tmp_path, "ce", "both")["notes"]
    assert note == f"{name} was trained on val as well: its scores tell how well it was learnt."


@pytest.mark.parametrize(("checkpoint", "step"), [("latest", 6), ("best", 4), ("4", 4), ("6", 6)])
def test_a_checkpoint_is_chosen_as_elsewhere(runs, tmp_path, checkpoint, step):
    for arm, seed in runs:
        write_evaluation(tmp_path / arm / f"seed_{seed}", 4, 0.9, seed)
    values = compare(tmp_path, checkpoint=checkpoint)
    assert [arm["steps"] for arm in values["arms"]] == [[step] * 2] * 2


def test_the_best_is_one_that_was_saved(runs, tmp_path):
    for arm, seed in runs:
        workdir = tmp_path / arm / f"seed_{seed}"
        write_evaluation(workdir, 4, 0.9, seed)
        (workdir / "checkpoints" / "6").mkdir(parents=True)
    assert compare(tmp_path, checkpoint="best")["arms"][0]["steps"] == [6, 6]


def test_another_split_is_compared_by_the_best_of_val(runs, tmp_path):
    for arm, seed in runs:
        workdir = tmp_path / arm / f"seed_{seed}"
        write_evaluation(workdir, 6, 0.5 if arm == "ce" else 0.7, seed, split="test")
    for checkpoint in ("latest", "best"):
        values = compare(tmp_path, split="test", checkpoint=checkpoint)
        assert values["split"] == "test"
        expected = write_evaluation(tmp_path / "x", 6, 0.5, 0)["mean_iou"]
        assert values["arms"][0]["by_seed"]["mean_iou"][0] == pytest.approx(expected)


def test_seeds_that_are_missing_are_named(runs, tmp_path, caplog):
    write_run(tmp_path / "ce" / "seed_7", seed=7)
    write_run(tmp_path / "ce" / "seed_8", seed=8)
    shutil.rmtree(tmp_path / "memory" / "seed_0")
    values = compare(tmp_path)
    note = (
        "candidates=both lacks seeds 0, 7, 8 of candidates=none: their difference is over seed 1."
    )
    single = "candidates=both and candidates=none share a single seed, which gives no interval"
    assert values["notes"][0] == note and values["notes"][1].startswith(single)
    assert note in caplog.text and note in (tmp_path / "out" / "comparison.html").read_text()
    assert values["differences"][0]["seeds"] == [1]
    assert values["differences"][0]["seed_interval"]["mean_iou"] == [None, None]


def test_curves_are_optional(runs, tmp_path):
    for arm, seed in runs:
        (tmp_path / arm / f"seed_{seed}" / "metrics.jsonl").unlink()
    (tmp_path / "ce" / "seed_0" / "metrics.jsonl").write_text(
        '{"step": 2, "val/mean_iou": 0.5}\n{"'
    )
    curves = [arm["learning_curve"]["mean"] for arm in compare(tmp_path)["arms"]]
    assert curves == [[0.5], []]


# --- Names of arms --------------------------------------------------------------------------------


def names_of(tmp_path, *settings):
    for index, of_run in enumerate(settings):
        write_run(tmp_path / "runs" / str(index), *of_run, variant="memory")
    workdirs = find_workdirs([str(tmp_path / "runs")])
    return [*arm_names(group_runs(read_runs(workdirs, "latest", "val")))]


NO_CONTRAST = ("contrast.candidates=none",)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (((), ("optim.momentum=0.5",)), ["momentum=0.9", "momentum=0.5"]),
        (
            ((), (*NO_CONTRAST, "contrast.temperature=0.5", "memory.pixel_size=2")),
            ["candidates=both, temperature=0.1, pixel_size=16", "candidates=none"],
        ),
        (
            ((), NO_CONTRAST, (*NO_CONTRAST, "contrast.temperature=0.5")),
            [f"candidates='{c}', temperature={t}" for c, t in (("both", 0.1), ("none", 0.1))]
            + ["candidates='none', temperature=0.5"],
        ),
        (
            ((), ("contrast.warmup_steps=2",), ("optim.warmup_steps=2",)),
            [
                f"contrast.warmup_steps={a}, optim.warmup_steps={b}"
                for a, b in ((1, 0), (2, 0), (1, 2))
            ],
        ),
        (
            (
                (),
                ("optim.momentum=0.5", "optim.weight_decay=0.1", "seed=3", "train.num_steps=5"),
                ("optim.momentum=0.5", "augment.flip_rate=0.1", "train.num_steps=5"),
            ),
            [
                "flip_rate=0.5, momentum=0.9, …",
                "flip_rate=0.5, momentum=0.5, …",
                "flip_rate=0.1, momentum=0.5, …",
            ],
        ),
        (
            (("model.init_from=/a/first",), ("model.init_from=/a/second",)),
            ["init_from=first", "init_from=second"],
        ),
        (
            (("model.init_from=/a/same",), ("model.init_from=/b/same",)),
            ["init_from='/a/same'", "init_from='/b/same'"],
        ),
    ],
)
def test_arms_are_named_by_what_differs(tmp_path, settings, names):
    assert names_of(tmp_path, *settings) == names


# --- What is refused ------------------------------------------------------------------------------


def test_a_comparison_takes_two_arms(runs, tmp_path):
    assert refused(tmp_path, "ce/seed_0") == (
        "--runs=ce/seed_0: is a single run; a comparison needs at least two"
    )
    assert refused(tmp_path, "ce") == (
        "--runs: all 2 runs differ in their seeds alone; a comparison needs runs with other"
        " settings as well"
    )


def test_a_run_counts_once(runs, tmp_path):
    assert refused(tmp_path, "ce", "memory", "ce/seed_1") == (
        "--runs=ce/seed_1: the run ce/seed_1 is given twice, by --runs=ce as well"
    )
    (tmp_path / "link").symlink_to(tmp_path / "ce" / "seed_0")
    assert "the run link is given twice, by --runs=ce as well" in refused(tmp_path, "ce", "link")
    shutil.copytree(tmp_path / "ce" / "seed_0", tmp_path / "copy")
    assert refused(tmp_path, "ce", "memory", "copy") == (
        "--runs: ce/seed_0 and copy have the same settings and the same seed, 0; leave out one"
    )


def test_arms_without_a_common_seed(runs, tmp_path):
    shutil.rmtree(tmp_path / "memory" / "seed_0")
    shutil.rmtree(tmp_path / "ce" / "seed_1")
    assert refused(tmp_path) == (
        "--runs: candidates=both (seed 1) shares no seed with the baseline candidates=none"
        " (seed 0); differences are taken between runs of the same seed"
    )


def test_runs_without_an_evaluation_are_all_listed(runs, tmp_path):
    shutil.rmtree(tmp_path / "ce" / "seed_0" / "eval" / "6")
    shutil.rmtree(tmp_path / "memory" / "seed_0" / "eval")
    (tmp_path / "memory" / "seed_0" / "checkpoints").mkdir()
    (tmp_path / "memory" / "seed_1" / "eval" / "6" / "image_counts.npz").unlink()
    assert refused(tmp_path).splitlines() == [
        "3 problems in the runs to compare:",
        "  ce/seed_0: its last evaluation of val is of step 4 of 6; finish its training, then"
        " evaluate it: --mode=eval --workdir=ce/seed_0 --checkpoint=latest",
        "  memory/seed_0: has no evaluation of val; evaluate it: --mode=eval"
        " --workdir=memory/seed_0 --checkpoint=latest",
        "  memory/seed_1/eval/6: has no image_counts.npz; evaluate it again: --mode=eval"
        " --workdir=memory/seed_1 --checkpoint=6",
    ]
    message = refused(tmp_path, "ce/seed_1", "memory/seed_1", split="test")
    assert "no evaluation of test; evaluate it: --mode=eval --workdir=ce/seed_1" in message
    assert "--checkpoint=latest --split=test" in message


def test_a_step_that_was_not_evaluated(runs, tmp_path):
    assert "--checkpoint=5: ce/seed_0 has evaluations of val at 4, 6" in refused(
        tmp_path, checkpoint="5"
    )
    for checkpoint in ("init", "lastest", "-1"):
        message = f"--checkpoint={checkpoint}: must be latest, best or a step"
        assert refused(tmp_path, checkpoint=checkpoint) == message


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", None])
def test_damaged_counts_are_named(runs, tmp_path, content):
    path = tmp_path / "ce" / "seed_0" / "eval" / "6" / "image_counts.npz"
    if content is None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
    path.write_bytes(content)
    message = refused(tmp_path)
    assert re.search(r"ce/seed_0/eval/6/image_counts.npz: is damaged .*; --mode=eval w", message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.short_side=40", "data.short_side = 0 in A; 40 in B"),
        ("eval.pad_multiple=64", "eval.pad_multiple = 32 in A; 64 in B"),
        ("data.exif_orientation=applied", "data.exif_orientation = 'stored' in A; 'applied' in B"),
        ("data.ignore_values=(0,)", "data.ignore_values = (255,) in A; (0,) in B"),
        ("data.tfds.val_split=test", "data.tfds.val_split = 'validation' in A; 'test' in B"),
        ("data.name=landcover", "data.name = 'synthetic' in A; 'landcover' in B"),
    ],
)
def test_runs_that_were_evaluated_otherwise(runs, tmp_path, settings, message):
    for seed in (0, 1):
        write_run(tmp_path / "b" / str(seed), settings, seed=seed, variant="memory")
    expected = message.replace("A", "ce/seed_0, ce/seed_1").replace("B", "b/0, b/1")
    assert refused(tmp_path, "ce", "b").splitlines() == [
        "1 problem in the runs to compare, which were not evaluated alike:",
        f"  {expected}",
    ]


OTHER_LABELS = confusions(0.5, 0)[::-1].sum(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"protocol": "flipped"},
            "protocol = 'whole_image' in ce/seed_0, ce/seed_1; 'flipped' in b",
        ),
        (
            {"class_names": ("road", "tree", "sky")},
            "classes = 3 (road, tree, a|b_<c>) in ce/seed_0, ce/seed_1; 3 (road, tree, sky) in b",
        ),
        ({"image_names": IMAGES[::-1]}, "images: b has them in another order than ce/seed_0"),
        (
            {"labelled": OTHER_LABELS},
            "labels: b has other numbers of labelled pixels than ce/seed_0 in 4 of 5 images, e.g."
            " image_0",
        ),
    ],
)
def test_evaluations_of_other_things(runs, tmp_path, changes, message):
    write_run(tmp_path / "b", variant="memory", **changes)
    assert refused(tmp_path, "ce", "b").splitlines()[1:] == [f"  {message}"]


def test_evaluations_of_other_images(runs, tmp_path):
    write_run(tmp_path / "c", variant="memory", image_names=(*IMAGES[:3], "x", "y"))
    assert refused(tmp_path, "ce/seed_0", "c").splitlines()[1:] == [
        "  images: c lacks 2 that ce/seed_0 has, e.g. image_3",
        "  images: c has 2 that ce/seed_0 lacks, e.g. x",
    ]
    more = {key: np.zeros((6, 3), np.int64) for key in ("intersection", "labelled", "predicted")}
    write_run(tmp_path / "b", variant="memory", image_names=(*IMAGES, "z"), **more)
    expected = "  images: b has 1 that ce/seed_0 lacks, e.g. z"
    assert refused(tmp_path, "ce", "b").splitlines()[1:] == [expected]


def test_classes_that_differ_in_the_middle_of_a_long_list(tmp_path):
    for variant, name in (("ce", "cat"), ("memory", "dog")):
        names = ("x" * 100, name, "y" * 100)
        write_run(tmp_path / variant, variant=variant, class_names=names)
    assert "  classes = 3 (xxx" in refused(tmp_path, "ce", "memory")


# --- Runs that were trained -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_run_has_counts_that_sum_to_its_scores(trained, tmp_path):
    """Of the evaluations while it trained and of those by --mode=eval."""
    config, workdir = trained
    evaluate_run(setup_of(config), workdir, "latest", "train", tmp_path / "train")
    for folder, number in ((workdir / "eval" / "6", 3), (tmp_path / "train", 6)):
        counts = read_image_counts(folder)
        scores = json.loads((folder / "metrics.json").read_text())
        confusion = np.array(scores["confusion"])
        assert counts.image_names == tuple(f"{i:06d}" for i in range(number))
        assert counts.class_names == tuple(scores["iou"]) and counts.split == scores["split"]
        assert counts.protocol == "whole_image"
        np.testing.assert_array_equal(counts.intersection.sum(0), np.diag(confusion))
        np.testing.assert_array_equal(counts.labelled.sum(0), confusion.sum(1))
        np.testing.assert_array_equal(counts.predicted.sum(0), confusion.sum(0))


@pytest.mark.slow
def test_a_trained_run_is_compared(trained, tmp_path):
    _, workdir = trained
    shutil.copytree(workdir, tmp_path / "a")
    shutil.copytree(workdir, tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    path.write_text(path.read_text().replace('"temperature": 0.1', '"temperature": 0.2'))
    values = compare(tmp_path, "a", "b")
    assert values["num_images"] == 3
    (difference,) = values["differences"]
    assert difference["mean"]["mean_iou"] == 0 and difference["seeds"] == [0]
    assert difference["image_interval"]["mean_iou"] == [0, 0]
    scores = json.loads((workdir / "eval" / "6" / "metrics.json").read_text())
    for arm in values["arms"]:
        assert arm["mean"]["mean_iou"] == scores["mean_iou"]
        assert arm["mean"]["iou"] == pytest.approx(scores["iou"])
