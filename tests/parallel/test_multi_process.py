"""Several processes, through `main.py`: how they meet, and what must be the same in all."""

import functools
import json
import shutil
import textwrap

import jax
import numpy as np
import pytest
from paths import ROOT
from program import TOY, TRAIN, command, ended, run
from small import SETTINGS

from contrastseg_jax.report.image_counts import read_image_counts
from contrastseg_jax.weights import run_weights

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("of_process", "message"),
    [
        (
            {1: ["--config.optim.learning_rate=0.5"]},
            "optim.learning_rate: process 0 has 0.01, process 1 has 0.5",
        ),
        ({1: ["--workdir=ELSEWHERE"]}, "process 1 does not see what process 0 writes there"),
        (
            {i: ["--config.train.batch_size=3"] for i in (0, 1)},
            "train.batch_size = 3: must be a multiple of the 2 devices, e.g. 2 or 4",
        ),
        (
            {1: ["--config.data.synthetic.num_examples=(7, 3)"]},
            "data.synthetic.num_examples: process 0 has [6, 3], process 1 has [7, 3]",
        ),
    ],
    ids=["settings", "workdir", "batch size", "data"],
)
def test_what_differs_between_processes_is_named_by_all(
    prepared_dir, tmp_path, start, of_process, message
):
    elsewhere = str(tmp_path / "elsewhere")
    of_process = {
        index: [text.replace("ELSEWHERE", elsewhere) for text in texts]
        for index, texts in of_process.items()
    }
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    statuses, messages = ended(start(arguments, 2, of_process=of_process))
    assert statuses == [1, 1]
    for index, text in enumerate(messages):
        assert f"error: process {index} of 2: " in text and message in text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_code_that_differs_is_named_by_all(prepared_dir, tmp_path, start):
    for name in ("contrastseg_jax", "configs", "main.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "contrastseg_jax" / "losses.py").open("a") as file:
        file.write("# other\n")
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    other = [arguments[0], str(tmp_path / "main.py"), *arguments[2:]]
    group = start([arguments, other], num_processes=2)
    statuses, messages = ended(group)
    assert statuses == [1, 1]
    for text in messages:
        assert "code: process 0 has" in text and "process 1 has" in text and "Traceback" not in text


def test_numbers_of_devices_and_processes_that_differ(prepared_dir, tmp_path, start):
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    statuses, messages = ended(start(arguments, num_processes=2, devices_of={1: 2}))
    assert statuses == [1, 1]
    for text in messages:
        assert "devices per process: process 0 has 1, process 1 has 2" in text

    group = start(arguments, num_processes=2, of_process={1: ["--num_processes=3"]})
    statuses, messages = ended(group)
    assert all(statuses)
    assert "--num_processes=3: process 0 was started with 2" in messages[1]
    assert not (tmp_path / "run").exists()


def test_a_process_without_the_others_gives_up(prepared_dir, tmp_path, start):
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    group = start(arguments, num_processes=2, timeout=4)
    group[1].kill()
    statuses, messages = ended(group)
    assert statuses[0] == 1
    assert "process 0 of 2: not all processes connected to localhost" in messages[0]
    assert "within --start_timeout=4 s" in messages[0]

    result = run(
        [*arguments, "--coordinator=localhost:1", "--num_processes=2", "--process_id=1"]
        + ["--start_timeout=4"]
    )
    assert result.returncode == 1
    assert "process 1 of 2: not all processes connected to localhost:1 within" in result.stderr
    assert not (tmp_path / "run").exists()


FAILING = """
    import os, runpy, sys
    from contrastseg_jax.data import pipeline
    from contrastseg_jax.errors import InputError

    eval_batches = pipeline.eval_batches

    def failing(*arguments, **settings):
        yield next(iter(eval_batches(*arguments, **settings)))
        raise InputError("x.png: is damaged")

    pipeline.eval_batches = failing
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_evaluation_that_fails_in_one_process_ends_none(prepared_dir, tmp_path, start):
    workdir = tmp_path / "run"
    arguments = command(prepared_dir, workdir, *TOY)
    failing = [arguments[0], "-c", textwrap.dedent(FAILING), *arguments[1:]]
    statuses, messages = ended(start([arguments, failing], num_processes=2))
    assert statuses == [0, 0], messages
    for text in messages:
        assert "step 6: evaluation failed, training continues: in process 1: x.png" in text
    saved = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "6" in saved and not (workdir / "eval" / "6" / "metrics.json").exists()


def test_images_of_all_processes_are_counted(prepared_dir, tmp_path, start):
    """Three images in batches of two: the second has a row that fills it up."""
    workdir = tmp_path / "run"
    arguments = command(prepared_dir, workdir, *TOY)
    statuses, messages = ended(start(arguments, num_processes=2))
    assert statuses == [0, 0], messages
    counts = read_image_counts(workdir / "eval" / "6")
    confusion = np.array(
        json.loads((workdir / "eval" / "6" / "metrics.json").read_text())["confusion"]
    )
    assert counts.image_names == ("000000", "000001", "000002")
    np.testing.assert_array_equal(counts.intersection.sum(0), np.diag(confusion))
    np.testing.assert_array_equal(counts.predicted.sum(0), confusion.sum(0))
    assert (counts.labelled.sum(1) > 0).all()

    alone = [
        *arguments[:2],
        f"--workdir={workdir}",
        "--mode=eval",
        f"--output={tmp_path / 'alone'}",
    ]
    result = run(alone, num_devices=2)
    assert result.returncode == 0, result.stderr
    expected = read_image_counts(tmp_path / "alone")
    for name in ("labelled", "intersection", "predicted"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(expected, name))


@pytest.fixture(scope="module")
def first_run(prepared_dir, tmp_path_factory):
    """The workdir of a finished run of one process."""
    workdir = tmp_path_factory.mktemp("first") / "first"
    result = run(command(prepared_dir, workdir, *TOY))
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_run_of_two_processes_starts_from_a_run(prepared_dir, tmp_path, start, first_run):
    """A step that is next to none leaves the weights as they came."""
    tiny = ("train.num_steps=2", "optim.learning_rate=1e-7", "optim.weight_decay=0.0")
    arguments = command(prepared_dir, tmp_path / "run", *TOY, settings=(*SETTINGS, *tiny))
    group = start([*arguments, f"--config.model.init_from={first_run}"], num_processes=2)
    statuses, messages = ended(group)
    assert statuses == [0, 0], messages
    assert f"initialised from first, step 6 ({first_run})" in messages[0]
    (given, _), (found, _) = (
        run_weights.restore(workdir, "latest") for workdir in (first_run, tmp_path / "run")
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), found["params"], given["params"]
    )


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "/nowhere",
            "in process 1: 1 problem in the config:\n  model.init_from = '/nowhere': must",
        ),
        ("", "model.init_from: process 0 has "),
    ],
)
def test_a_run_to_start_from_that_one_process_lacks(
    prepared_dir, tmp_path, start, first_run, folder, message
):
    arguments = command(prepared_dir, tmp_path / "run", *TOY)
    arguments.append(f"--config.model.init_from={first_run}")
    of_process = {1: [f"--config.model.init_from={folder}"]}
    statuses, messages = ended(start(arguments, num_processes=2, of_process=of_process))
    assert statuses == [1, 1]
    for text in messages:
        assert message in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
