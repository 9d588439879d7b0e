"""What is said where memory runs out, of errors that the real libraries raise."""

import errno
import os
import re
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_config, setup_of

from contrastseg_jax.config.tree import leaves
from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit import report
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.evaluation import evaluate
from contrastseg_jax.evaluation.loaded_network import of_setup
from contrastseg_jax.out_of_memory import PACKAGE, WORK, explanation

TOO_MANY_BYTES = 2**45


def of_numpy(*_, **__):
    np.empty(TOO_MANY_BYTES, np.uint8)


def of_opencv():
    cv2.resize(np.zeros((1, 1)), (2_000_000, 2_000_000))


def of_jax():
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(TOO_MANY_BYTES, jnp.uint8))())


def of_the_system():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def without_a_word():
    raise MemoryError


def explained(function, *arguments):
    """What is said of the error that a function raises."""
    try:
        function(*arguments)
    except Exception as error:
        return explanation(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        (of_numpy, "out of memory: Unable to allocate 32.0 TiB"),
        (of_opencv, "out of memory: .*Failed to allocate 32000000000000 bytes \\(29802.3 GiB\\)"),
        (of_jax, "out of device memory: RESOURCE_EXHAUSTED: Out of memory"),
        (of_the_system, "out of memory: .*Cannot allocate memory"),
        (without_a_word, "out of memory: an allocation failed"),
    ],
)
def test_every_library_is_understood(allocate, message):
    assert re.match(message, explained(allocate))


def test_other_errors_are_not_of_memory():
    assert explained(lambda: [][0]) is None
    assert explained(lambda: Path("/no/such/file").read_text()) is None


def test_advice_fits_what_was_being_done(monkeypatch):
    """The innermost work counts: what evaluation draws is not what the network needs."""
    config, image = make_config(), np.zeros((8, 8, 3), np.uint8)
    setup = setup_of(config)
    classes = LabelMap(("a",), default_palette(1), {0: 0})

    text = explained(of_setup(setup, of_numpy).predict, image)
    assert text.startswith("out of memory while predicting: Unable")
    assert "image is too large" in text and "batch_size" not in text

    monkeypatch.setattr(evaluate, "make_evaluator", of_numpy)
    monkeypatch.setattr(evaluate, "open_split", lambda *_: [])
    text = explained(evaluate.evaluate_run, setup, Path(), "init", "val")
    assert "while evaluating" in text and "Lower eval.batch_size" in text
    assert "crop_size" not in text

    monkeypatch.setattr(pictures, "save_figure", of_numpy)
    label = image[:, :, 0]
    text = explained(pictures.save_panel, Path(), image, label, label, classes, "x")
    assert "while drawing pictures" in text and "eval.num_pictures" in text

    monkeypatch.setattr(report, "raw_splits", of_numpy)
    assert "while auditing" in explained(report.audit_run, config, Path(), None)


def test_files_and_settings_that_are_named_exist():
    settings = {path for path, _ in leaves(make_config())}
    for file, (_, remedy) in WORK.items():
        assert (PACKAGE / file).is_file()
        assert set(re.findall(r"\b(?:data|eval|train|augment)\.\w+", remedy)) <= settings
