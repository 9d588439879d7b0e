"""The training loop's parts; whole runs: test_end_to_end.py, test_stops.py."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from small import make_batch, make_config, setup_of

from contrastseg_jax.config.tree import replaced
from contrastseg_jax.data import pictures, pipeline
from contrastseg_jax.data.dataset import open_splits
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import evaluate as evaluate_module
from contrastseg_jax.parallel import processes, sharding
from contrastseg_jax.report import curves
from contrastseg_jax.run import workdir as run_workdir
from contrastseg_jax.structs import TrainState
from contrastseg_jax.training import feed, score
from contrastseg_jax.training import train as train_module
from contrastseg_jax.training.feed import take_steps
from contrastseg_jax.training.start import is_due

pytestmark = pytest.mark.slow


def test_is_due_every_period_and_at_the_end():
    assert [step for step in range(1, 8) if is_due(step, 3, 7)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("of_batch", "of_step", "idle"),
    [(1, 4, 0), (5, 4, 1), (8, 4, 4)],
    ids=["computing is slower", "data is a little slower", "data takes twice as long"],
)
def test_waiting_for_data_is_what_no_step_hides(monkeypatch, of_batch, of_step, idle):
    """Seconds that a batch and a step take, and that the devices then wait in each step.

    By a clock of its own, which a busy machine does not disturb.
    """
    now, ends = [0.0], []  # of each step, which the device begins after the one before

    def batches():
        for _ in range(5):
            now[0] += of_batch
            yield make_batch(size=2)

    def step_fn(state, _):
        ends.append(max(now[0], ends[-1] if ends else 0.0) + of_step)
        return state.replace(step=state.step + 1), {"loss": jnp.asarray(len(ends) - 1)}

    class Thread:
        """Looks at the clock when a step has ended; whoever wants to know waits until then."""

        def submit(self, _, *of_step):
            end = ends[int(of_step[0]["loss"])] if of_step else now[0]

            def result():
                now[0] = max(now[0], end)
                return end

            return SimpleNamespace(result=result)

    thread = contextlib.nullcontext(Thread())
    monkeypatch.setattr(feed, "ThreadPoolExecutor", lambda _: thread)
    monkeypatch.setattr(feed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mesh = sharding.make_mesh(jax.devices()[:1])
    state = TrainState(jnp.zeros((), jnp.int32), *[None] * 5)
    taken = list(take_steps(step_fn, state, batches(), mesh))
    assert [int(state.step) for state, _, _ in taken] == [1, 2, 3, 4, 5]
    assert [seconds for _, _, seconds in taken] == [of_batch, *[idle] * 4]


def config_of(tmp_path, *settings):
    """Its programs are compiled once for all tests."""
    return make_config(
        *(f"data.prepared_dir={tmp_path / 'prepared'}", *settings),
        f"parallel.compilation_cache={ROOT / '.cache' / 'jax'}",
    )


def test_a_stop_during_an_evaluation_gives_it_up_and_the_next_start_makes_up_for_it(
    tmp_path, monkeypatch
):
    config = config_of(tmp_path, "train.eval_steps=3")
    come = threading.Event()

    @contextlib.contextmanager
    def deferred_signals():
        yield come.is_set

    def evaluate(*arguments, **settings):
        come.set()
        return evaluate_module.evaluate(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "deferred_signals", deferred_signals)
        patch.setattr(score, "evaluate", evaluate)
        with pytest.raises(SystemExit) as stopped:
            train_module.train(setup_of(config), tmp_path / "run")
    assert stopped.value.code == 143
    workdir = tmp_path / "run"
    assert not (workdir / "eval" / "3" / "metrics.json").exists()
    assert (workdir / "checkpoints" / "3").is_dir()

    train_module.train(setup_of(config), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/mean_iou" in line] == [3, 6]


def val_steps(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "val/mean_iou" in line]


def test_an_evaluation_that_fails_is_a_warning_and_comes_after_the_checkpoint(
    tmp_path, monkeypatch, caplog
):
    config = config_of(tmp_path, "train.eval_steps=3")
    workdir, saved = tmp_path / "run", []

    def bad_batches(*arguments, **settings):
        saved.append({path.name[:1] for path in (workdir / "checkpoints").iterdir()})
        yield from ()
        raise InputError("x.png: is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "eval_batches", bad_batches)
        train_module.train(setup_of(config), workdir)
        train_module.train(setup_of(config), workdir)  # tries again, and does not end either
    assert "step 3: evaluation failed, training continues: x.png: is damaged" in caplog.text
    assert caplog.text.count("step 6: evaluation failed") == 2
    assert "3" in saved[0] and "6" in saved[1]  # at least begun
    assert val_steps(workdir) == []

    train_module.train(setup_of(config), workdir)
    assert val_steps(workdir) == [6]
    assert not list((workdir / "checkpoints").glob("*damaged*"))


def test_a_state_that_a_step_has_lost_is_not_saved(tmp_path, monkeypatch):
    """Its loss, of the weights before, is finite."""
    config, workdir = config_of(tmp_path), tmp_path / "run"

    def spoilt_steps(*arguments):
        for state, metrics, waited in take_steps(*arguments):
            if state.step == 6:
                state.params["proj_head"]["conv2"]["bias"] += jnp.inf
            yield state, metrics, waited

    monkeypatch.setattr(train_module, "take_steps", spoilt_steps)
    with pytest.raises(FloatingPointError, match="the state after step 6 is not finite"):
        train_module.train(setup_of(config), workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4"}


def test_pictures_and_curves_that_fail_are_warnings(tmp_path, monkeypatch, caplog):
    config = config_of(tmp_path, "train.num_steps=3")

    def fail(*_):
        raise ValueError("no picture")

    monkeypatch.setattr(pictures, "save_panel", fail)
    monkeypatch.setattr(curves, "save_curves", fail)
    workdir = tmp_path / "run"
    train_module.train(setup_of(config), workdir)
    assert val_steps(workdir) == [3]
    for name in ("eval/3/000000.png", "curves.png"):
        assert f"{workdir / name}: ValueError: no picture; continuing without it" in caplog.text
    assert "<img" not in (workdir / "eval" / "3" / "index.html").read_text()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_the_same(trained, tmp_path):
    config, whole = trained
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)  # with its compiled programs
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]
    shutil.rmtree(workdir / "eval" / "6")
    files = [path for path in (workdir / "checkpoints" / "6").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train_module.train(setup_of(config), workdir)
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"4", "6", "6.damaged"}
    digests = [
        json.loads((run / "checkpoints" / "6" / "_CHECKPOINT_METADATA").read_text())
        for run in (whole, workdir)
    ]
    assert digests[0]["custom_metadata"] == digests[1]["custom_metadata"]
    assert val_steps(workdir) == [4, 6]


# --- Steps that are not finite --------------------------------------------------------------------

SPOILT = 7  # no class: a label that makes the loss NaN


def spoil(setup, monkeypatch, *steps):
    """The setup, with a loss that is NaN for the batches of some steps."""

    (term,) = setup.terms

    def pixel_loss(logits, label):
        loss = term.loss(logits, label)
        return jnp.where((label == SPOILT).any(), jnp.nan, loss)

    def spoilt_steps(step_fn, state, batches, mesh):
        def spoilt():
            for step, batch in enumerate(batches, 1):
                if step in steps:
                    batch.label[0, 0, 0] = SPOILT
                yield batch

        yield from take_steps(step_fn, state, spoilt(), mesh)

    monkeypatch.setattr(train_module, "take_steps", spoilt_steps)
    return dataclasses.replace(setup, terms=(term._replace(loss=pixel_loss),))


def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, monkeypatch, caplog):
    setup = spoil(setup_of(config_of(tmp_path)), monkeypatch, 3)
    workdir = tmp_path / "run"
    with jax.debug_nans(False):
        train_module.train(setup, workdir)
    names = re.search(r"step 3 was skipped: .* --replay=3 .* images: (.*)", caplog.text)
    source = open_splits(setup.data, ("train",))[0]
    ids = next(itertools.islice(feed.make_batches(setup, source, start_step=2), 1)).example_id
    assert names and names[1] == ", ".join(source[int(i)]["name"].decode() for i in ids)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line["train/skipped"] for line in lines if "train/skipped" in line}
    assert skipped == {2: 0, 4: 1, 6: 0}
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
    assert val_steps(workdir)[-1] == 6


def test_a_run_of_skipped_steps_stops_with_the_last_good_state_saved(tmp_path, monkeypatch):
    config = config_of(tmp_path, "train.max_skipped_steps=3", "train.checkpoint_steps=100")
    setup, workdir = spoil(setup_of(config), monkeypatch, 2, 3, 4), tmp_path / "run"
    message = r"the 3 steps up to step 4 were skipped.*max_skipped_steps = 3.*--replay=2 shows"
    with jax.debug_nans(False), pytest.raises(FloatingPointError, match=message):
        train_module.train(setup, workdir)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
    train_module.train(setup_of(config), workdir)
    assert val_steps(workdir)[-1] == 6


# --- The end of a run -----------------------------------------------------------------------------


def test_a_run_ends_early_when_scores_do_not_rise_and_goes_on_with_more_patience(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "contrastseg_jax")
    config = config_of(tmp_path, "train.eval_steps=1", "train.patience=2", "train.num_steps=6")
    workdir, scores = tmp_path / "run", {1: 0.5, 2: 0.4, 3: 0.5}
    monkeypatch.setattr(run_workdir, "read_score", lambda _, step: scores.get(step, 0.1))
    train_module.train(setup_of(config), workdir)
    assert "ending at step 3 of 6: train.patience = 2" in caplog.text
    train_module.train(setup_of(config), workdir)
    assert "training already finished, at step 3" in caplog.text
    train_module.train(setup_of(replaced(config, {"train.patience": 0})), workdir)
    assert val_steps(workdir) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_goes_on_with_more_steps_but_not_with_fewer(trained, tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    config, whole = trained
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    with pytest.raises(InputError, match=r"num_steps = 5: the run .* checkpoint of step 6"):
        train_module.train(setup_of(replaced(config, {"train.num_steps": 5})), workdir)
    train_module.train(setup_of(replaced(config, {"train.num_steps": 8})), workdir)
    rate = 0.01 * (1 - 6 / 8) ** 0.9
    assert f"8 instead of 6; the learning rate goes on at {rate:.2e}" in caplog.text
    assert val_steps(workdir)[-1] == 8
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 8
