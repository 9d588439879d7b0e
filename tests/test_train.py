"""The training loop's parts; whole runs: test_end_to_end.py, test_stops.py."""

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config

from contrastseg_jax import distributed, processes
from contrastseg_jax import evaluate as evaluate_module
from contrastseg_jax import train as train_module
from contrastseg_jax.structs import TrainState
from contrastseg_jax.train import is_due, take_steps


def test_is_due_every_period_and_at_the_end():
    assert [step for step in range(1, 8) if is_due(step, 3, 7)] == [3, 6, 7]


@pytest.mark.parametrize(
    ("of_batch", "of_step", "idle"),
    [(0.1, 0.4, 0.0), (0.5, 0.4, 0.1), (0.8, 0.4, 0.4)],
    ids=["computing is slower", "data is a little slower", "data takes twice as long"],
)
def test_waiting_for_data_is_what_no_step_hides(monkeypatch, of_batch, of_step, idle):
    """Seconds that a batch and a step take, and that the devices then wait in each step."""

    def batches():
        for _ in range(5):
            time.sleep(of_batch)
            yield make_batch(size=2)

    device, computing = ThreadPoolExecutor(1), []  # the device takes one step after the other

    def step_fn(state, _):
        computing.append(device.submit(time.sleep, of_step))
        loss = jnp.asarray(len(computing) - 1, jnp.float32)
        return state.replace(step=state.step + 1), {"loss": loss}

    def wait(metrics):
        computing[int(metrics["loss"])].result()

    monkeypatch.setattr(jax, "block_until_ready", wait)
    mesh = distributed.make_mesh(jax.devices()[:1])
    state = TrainState(jnp.zeros((), jnp.int32), *[None] * 5)
    taken = list(take_steps(step_fn, state, batches(), mesh))
    assert [int(state.step) for state, _, _ in taken] == [1, 2, 3, 4, 5]
    waited = [seconds for _, _, seconds in taken]
    assert waited[0] == pytest.approx(of_batch, abs=0.08)  # nothing was in flight
    np.testing.assert_allclose(np.median(waited[2:]), idle, atol=0.08)


def test_a_stop_during_an_evaluation_gives_it_up_and_the_next_start_makes_up_for_it(
    tmp_path, monkeypatch
):
    config = make_config(f"data.prepared_dir={tmp_path / 'prepared'}", "train.eval_steps=3")
    come = threading.Event()

    @contextlib.contextmanager
    def noted_sigterm():
        yield come.is_set

    def evaluate(*arguments, **settings):
        come.set()
        return evaluate_module.evaluate(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "noted_sigterm", noted_sigterm)
        patch.setattr(train_module, "evaluate", evaluate)
        with pytest.raises(SystemExit) as stopped:
            train_module.train(config, tmp_path / "run")
    assert stopped.value.code == 143
    workdir = tmp_path / "run"
    assert not (workdir / "eval" / "3" / "metrics.json").exists()
    assert (workdir / "checkpoints" / "3").is_dir()

    train_module.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/mean_iou" in line] == [3, 6]
