"""What the bank is filled with: of which pixels, and of which network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_config

from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.objectives.pixel_contrast import extract_keys, pixel_contrast, update_bank
from contrastseg_jax.parallel.sharding import make_mesh
from contrastseg_jax.structs import IGNORE_LABEL, SegmentationOutput

CLASSES, DIM = 3, 4


def scene():
    """Embeddings that name their pixel, predictions of which about half are correct."""
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, IGNORE_LABEL], size=(2, 5, 7)).astype(np.int32)
    prediction = np.where(rng.random(label.shape) < 0.5, label % CLASSES, rng.integers(0, 3))
    embedding = rng.normal(size=(*label.shape, DIM)).astype(np.float32)
    logits = jax.nn.one_hot(jnp.asarray(prediction), CLASSES)
    return SegmentationOutput(logits, jnp.asarray(embedding)), label, prediction


@pytest.mark.parametrize("only_correct", [False, True])
def test_keys_are_those_of_all_pixels_or_of_correct_ones(only_correct):
    output, label, prediction = scene()
    empty = memory_bank.init_memory(
        num_classes=CLASSES, pixel_size=40, segment_size=2, proj_dim=DIM, dtype="float32"
    )
    keys = jax.random.split(jax.random.key(0), 2)
    settings = {"num_classes": CLASSES, "pixels_per_class": 20, "only_correct": only_correct}
    given = extract_keys(output, jnp.asarray(label), keys, **settings)
    on_devices = {"mesh": make_mesh(), "split": False}
    skipped, _ = update_bank(empty, given, jnp.asarray(False), **on_devices)
    assert not np.any(skipped.pixel) and not np.any(skipped.segment_count)
    bank, metrics = update_bank(empty, given, jnp.asarray(True), **on_devices)
    embedding = np.asarray(output.embedding)
    used = (label == prediction) if only_correct else (label != IGNORE_LABEL)
    for cls in range(CLASSES):
        stored = np.asarray(bank.pixel[cls, : int(bank.pixel_count[cls])])
        expected = embedding[used & (label == cls)]
        np.testing.assert_array_equal(np.unique(stored, axis=0), np.unique(expected, axis=0))
        means = [embedding[i][(used & (label == cls))[i]].mean(0) for i in range(2)]
        means = [mean / np.linalg.norm(mean) for mean in means]
        np.testing.assert_allclose(bank.segment[cls], means, rtol=1e-4, atol=1e-6)
    right = 1.0 if only_correct else np.mean((label == prediction)[label != IGNORE_LABEL])
    np.testing.assert_allclose(metrics["correct_keys"], right, rtol=1e-6)


@pytest.mark.parametrize(("pixels", "only_correct"), [("all", False), ("correct", True)])
def test_the_setting_reaches_the_keys(pixels, only_correct):
    config = make_config(f"memory.key_pixels={pixels}")
    objective = pixel_contrast(config, num_classes=CLASSES, proj_dim=DIM, mesh=make_mesh())
    assert objective.extract.keywords["only_correct"] is only_correct


def test_contrast_alone_waits_for_no_warm_up():
    """There is nothing else to train by; recipes set a warm-up for variants that have it."""
    alone = make_config("contrast.warmup_steps=3", "loss.segmentation_weight=0.0")
    beside = make_config("contrast.warmup_steps=3")
    settings = {"num_classes": CLASSES, "proj_dim": DIM, "mesh": make_mesh()}
    assert pixel_contrast(alone, **settings).warmup_steps == 0
    assert pixel_contrast(beside, **settings).warmup_steps == 3
