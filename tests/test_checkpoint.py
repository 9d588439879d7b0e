"""What is saved comes back bit for bit; what cannot be read is named."""

import contextlib

import jax
import numpy as np
import pytest
from small import make_config, start

from contrastseg_jax import build, checkpoint, distributed
from contrastseg_jax.errors import InputError


@pytest.fixture(scope="module")
def run():
    config = make_config(
        *("memory.dtype=bfloat16", "optim.ema_decay=0.9", "optim.head_lr_multiplier=10")
    )
    _, state, mesh = start(config)
    return config, state, mesh


def abstract(config, num_classes=3):
    model, (tx, _) = build.build_model(config, num_classes), build.build_optimizer(config)
    return build.abstract_state(config, model, tx)


def save_all(workdir, state, scores, keep_checkpoints=2):
    with contextlib.closing(
        checkpoint.open_manager(workdir, keep_checkpoints=keep_checkpoints)
    ) as manager:
        for step, score in scores.items():
            checkpoint.save(manager, step, state, score)


def test_a_state_comes_back_bit_for_bit(run, tmp_path):
    config, state, mesh = run
    state = state.replace(step=state.step + 3)
    save_all(tmp_path, state, {3: None})
    with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
        restored = checkpoint.restore(manager, 3, abstract(config), distributed.replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), restored, state)


def test_a_bank_may_be_restored_to_another_layout(tmp_path):
    config = make_config("memory.sharding=slots")
    _, state, mesh = start(config)
    assert not state.memory.pixel.is_fully_replicated
    everywhere, split = (
        distributed.state_sharding(mesh, state, split_memory=split, fsdp=False)
        for split in (False, True)
    )
    with contextlib.closing(checkpoint.open_manager(tmp_path, keep_checkpoints=1)) as manager:
        checkpoint.save(manager, 0, state, None)
        manager.wait_until_finished()
        whole = checkpoint.restore(manager, 0, abstract(config), everywhere)
        again = checkpoint.restore(manager, 0, abstract(config), split)
    assert whole.memory.pixel.is_fully_replicated
    assert again.memory.pixel.sharding == state.memory.pixel.sharding
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_the_newest_and_the_best_are_kept(run, tmp_path):
    scores = {1: None, 2: 0.4, 3: 0.6, 4: None, 5: 0.5, 6: float("nan"), 7: None}
    save_all(tmp_path, run[1], scores)
    with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
        assert sorted(manager.all_steps()) == [3, 6, 7]
        assert checkpoint.find_step(manager, "best") == 3
        assert checkpoint.find_step(manager, "latest") == 7
        assert checkpoint.find_step(manager, "6") == 6
        for which in ("5", "newest", "-1"):
            with pytest.raises(
                InputError,
                match=f"--checkpoint={which}: must be latest, best or one of 3, 6, 7",
            ):
                checkpoint.find_step(manager, which)


def test_missing_checkpoints(run, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoints"):
        checkpoint.open_reader(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
        with pytest.raises(InputError, match="no finished checkpoint"):
            checkpoint.find_step(manager, "latest")


def test_a_foreign_checkpoint_is_named(run, tmp_path):
    config, state, mesh = run
    save_all(tmp_path, state, {3: None})
    for other in (make_config(variant="ce"), make_config("model.proj_dim=8")):
        with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
            with pytest.raises(InputError, match="checkpoints/3: cannot be read"):
                checkpoint.restore(manager, 3, abstract(other), distributed.replicated(mesh))


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    config, state, mesh = run
    save_all(tmp_path, state, {3: None})
    for path in (tmp_path / "checkpoints" / "3" / "default").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
        with pytest.raises(InputError, match="checkpoints/3: cannot be read"):
            checkpoint.restore(manager, 3, abstract(config), distributed.replicated(mesh))


def test_a_damaged_score_and_a_renamed_folder_are_named(run, tmp_path):
    config, state, mesh = run
    save_all(tmp_path, state, {2: 0.5, 4: 0.6})  # the state itself is that of step 0
    with contextlib.closing(checkpoint.open_reader(tmp_path)) as manager:
        with pytest.raises(InputError, match="checkpoints/4: holds the state after 0 steps"):
            checkpoint.restore(manager, 4, abstract(config), distributed.replicated(mesh))
    score = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
    score.write_text(score.read_text()[:5])
    with pytest.raises(InputError, match="checkpoints/2/metrics/metrics: is damaged"):
        checkpoint.open_reader(tmp_path)
    with pytest.raises(InputError, match="remove the folder .*checkpoints/2"):
        checkpoint.open_manager(tmp_path, keep_checkpoints=1)
