"""Workdirs as trained and evaluated runs leave them, without training."""

import json

import numpy as np
from small import make_config

from contrastseg_jax.evaluation.metrics import segmentation_scores
from contrastseg_jax.report.evaluation import save_evaluation
from contrastseg_jax.report.image_counts import ImageCounts, save_image_counts
from contrastseg_jax.run.workdir import evaluation_folder, record_config

CLASSES = ("road", "tree", "a|b_<c>")
IMAGES = tuple(f"image_{i}" for i in range(5))


def confusions(rightness, seed):
    """A confusion matrix for each image, of the same labels for every seed."""
    rng, labels = np.random.default_rng(seed), np.random.default_rng(99)
    found = np.zeros((len(IMAGES), 3, 3), np.int64)
    for image in found:
        truth = labels.choice(3, p=[0.6, 0.35, 0.05], size=500)
        guess = np.where(rng.random(500) < rightness, truth, rng.integers(3, size=500))
        np.add.at(image, (truth, guess), 1)
    return found


def counts_of(matrices, **changes):
    """What an evaluation counts."""
    values = {
        "split": "val",
        "protocol": "whole_image",
        "image_names": IMAGES,
        "class_names": CLASSES,
        "intersection": np.diagonal(matrices, axis1=1, axis2=2),
        "labelled": matrices.sum(2),
        "predicted": matrices.sum(1),
    }
    return ImageCounts(**(values | changes))


def write_evaluation(workdir, step, rightness, seed, split="val", **changes):
    """Scores and counts of an evaluation; `changes`: fields of the counts."""
    matrices = confusions(rightness, seed)
    folder = evaluation_folder(workdir, step, split)
    scores = segmentation_scores(matrices.sum(0), CLASSES)
    results = {"data": "synthetic", "split": split, "step": step, **scores}
    save_evaluation(folder, results, [])
    save_image_counts(folder, counts_of(matrices, split=split, **changes))
    return results


def write_run(workdir, *settings, seed=0, rightness=0.5, variant="ce", **changes):
    """A run of 6 steps, evaluated at 4 and 6; returns its last scores."""
    config = make_config(f"seed={seed}", *settings, variant=variant)
    record_config(workdir, config)
    results = [
        write_evaluation(workdir, step, rightness - (6 - step) / 20, (seed, step), **changes)
        for step in (4, 6)
    ]
    lines = [{"step": x["step"], "val/mean_iou": x["mean_iou"]} for x in results]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return results[-1]
