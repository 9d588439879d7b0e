"""What is saved comes back bit for bit; what cannot be read, or is another, is named."""

import contextlib
import errno
import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small import make_config, setup_of, start

from contrastseg_jax import files
from contrastseg_jax.errors import InputError
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint_files, checkpoint_reader, checkpoint_writer
from contrastseg_jax.run.workdir import evaluation_folder
from contrastseg_jax.structs import TrainState
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state

LARGE = 2**14  # elements of the arrays of `tiny_state`: more than Orbax keeps beside their names


@pytest.fixture(scope="module")
def run():
    config = make_config(
        *("memory.dtype=bfloat16", "optim.ema_decay=0.9", "optim.head_lr_multiplier=10"),
        "memory.segment_size=0",
    )
    _, state, mesh = start(config)
    return config, state, mesh


def abstract(config):
    return abstract_state(setup_of(config), build_optimizer(config)[0])


def tiny_state(step, mesh=None):
    """A state of noise, with an array of each type that one may have; of none of them for ever."""
    noise = np.random.default_rng(step).normal(size=LARGE).astype(np.float32)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"a": noise.reshape(2, -1), "b": jnp.zeros((0, 3)), "on": noise > 0},
        batch_stats={"c": noise.reshape(-1, 4).astype(jnp.bfloat16)},
        opt_state=({}, {"count": np.int32(step)}),
    )
    return jax.device_put(state, split_of(state, mesh or sharding.make_mesh()))


def split_of(state, mesh):
    """Large arrays lie in parts on the devices, as with parallel.fsdp."""
    return jax.tree.map(
        lambda x: sharding.batch_sharding(mesh) if x.size == LARGE else sharding.replicated(mesh),
        state,
    )


def save_all(workdir, steps, keep_checkpoints=2, state_of=tiny_state):
    with checkpoint_writer.open_writer(workdir, keep_checkpoints=keep_checkpoints) as writer:
        for step in steps:
            checkpoint_writer.save(writer, step, state_of(step))


def set_score(workdir, step, text):
    folder = evaluation_folder(workdir, step)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(text)


def path_of(workdir, step):
    return workdir / "checkpoints" / str(step)


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def data_file(workdir, step):
    """The largest file of a checkpoint: it has the elements of its arrays."""
    files = [path for path in path_of(workdir, step).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    """Somewhere in the middle: Orbax reads it and notices nothing."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_state_comes_back_bit_for_bit(run, tmp_path):
    config, state, mesh = run
    state = state.replace(step=state.step + 3)
    assert state.memory.segment.size == 0  # a queue that is left out
    save_all(tmp_path, [3], state_of=lambda _: state)
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 3
    restored = checkpoint_reader.restore(tmp_path, 3, abstract(config), sharding.replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(), restored, state)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:  # as Orbax alone would
        alone = manager.restore(3, args=ocp.args.StandardRestore())
    kernel = ("backbone", "conv1", "kernel")
    for collection in (alone["params"], state.params):
        kernel = collection["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(alone["params"]["backbone"]["conv1"]["kernel"], kernel)


def test_arrays_of_all_types_come_back_on_other_devices(tmp_path):
    state = tiny_state(7)
    assert not state.params["a"].is_fully_replicated
    save_all(tmp_path, [7])
    mesh = sharding.make_mesh(jax.devices()[:1])
    assert checkpoint_reader.find_intact(tmp_path, "7") == 7
    restored = checkpoint_reader.restore(tmp_path, 7, state, sharding.replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    assert restored.params["a"].sharding == sharding.replicated(mesh)


def test_replicas_may_differ_in_their_last_bits(tmp_path):
    """As on processes whose programs round differently: the first replica is saved, whole."""
    state, mesh = tiny_state(7), sharding.make_mesh()
    first, second = np.ones((2, LARGE), np.float32)
    second = np.nextafter(second, 2)
    replicas = [jax.device_put(x, d) for x, d in zip((first, second), mesh.devices, strict=True)]
    array = jax.make_array_from_single_device_arrays(
        first.shape, sharding.replicated(mesh), replicas
    )
    save_all(tmp_path, [7], state_of=lambda _: state.replace(ema={"x": array}))
    assert checkpoint_reader.find_intact(tmp_path, "7") == 7


def test_a_bank_may_be_restored_to_another_layout(tmp_path):
    config = make_config("memory.sharding=slots")
    _, state, mesh = start(config)
    assert not state.memory.pixel.is_fully_replicated
    everywhere = sharding.replicated_tree(mesh, state)
    split = everywhere.replace(memory=sharding.bank_sharding(mesh, state.memory))
    save_all(tmp_path, [0], state_of=lambda _: state)
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 0
    whole = checkpoint_reader.restore(tmp_path, 0, abstract(config), everywhere)
    again = checkpoint_reader.restore(tmp_path, 0, abstract(config), split)
    assert whole.memory.pixel.is_fully_replicated
    assert again.memory.pixel.sharding == state.memory.pixel.sharding
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {2: "0.4", 3: "0.6", 5: "0.5", 6: "null"}
    with checkpoint_writer.open_writer(tmp_path, keep_checkpoints=2) as writer:
        for step in range(1, 8):
            checkpoint_writer.save(writer, step, tiny_state(step))
            if step in scores:  # after it was saved, as in training
                set_score(tmp_path, step, f'{{"mean_iou": {scores[step]}}}')
    assert names(tmp_path) == ["3", "6", "7"]
    assert checkpoint_files.find_step(tmp_path, "best") == 3
    assert checkpoint_files.find_step(tmp_path, "latest") == 7
    assert checkpoint_files.find_step(tmp_path, "6") == 6
    for which in ("5", "newest", "-1"):
        with pytest.raises(
            InputError, match=f"--checkpoint={which}: must be latest, best or one of 3, 6, 7"
        ):
            checkpoint_files.find_step(tmp_path, which)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"mean_iou": "high"}', "{}"])
def test_a_damaged_score_is_that_of_no_evaluation(tmp_path, text, caplog):
    save_all(tmp_path, [1, 2])
    set_score(tmp_path, 1, '{"mean_iou": 0.1}')
    set_score(tmp_path, 2, text)
    assert checkpoint_files.find_step(tmp_path, "best") == 1
    save_all(tmp_path, [3, 4], keep_checkpoints=1)
    assert names(tmp_path) == ["1", "4"]
    assert caplog.text.count("eval/2/metrics.json: is damaged") == 1


def test_a_score_of_the_last_checkpoint_counts(tmp_path):
    with checkpoint_writer.open_writer(tmp_path, keep_checkpoints=1) as writer:
        for step, score in ((1, 0.1), (2, 0.2)):
            checkpoint_writer.save(writer, step, tiny_state(step))
            set_score(tmp_path, step, json.dumps({"mean_iou": score}))
    assert names(tmp_path) == ["2"]


def test_missing_checkpoints(tmp_path):
    with pytest.raises(InputError, match="no finished checkpoint; train a run there first"):
        checkpoint_reader.find_intact(tmp_path, "latest")
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4.damaged").mkdir()
    with pytest.raises(InputError, match="no finished checkpoint"):
        checkpoint_files.find_step(tmp_path, "latest")
    checkpoint_writer.prepare(tmp_path, tiny_state(0))
    assert names(tmp_path) == ["4.damaged"]


def test_a_foreign_checkpoint_is_named(run, tmp_path):
    _, state, mesh = run
    save_all(tmp_path, [0], state_of=lambda _: state)
    for other in (make_config(variant="ce"), make_config("model.proj_dim=8")):
        with pytest.raises(InputError, match="checkpoints/0: cannot be read as a checkpoint of"):
            checkpoint_reader.restore(tmp_path, 0, abstract(other), sharding.replicated(mesh))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip_a_bit, cut, empty, os.remove])
def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, caplog, spoil):
    save_all(tmp_path, [1, 2, 3], keep_checkpoints=3)
    spoil(data_file(tmp_path, 2))
    spoil(data_file(tmp_path, 3))
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 1  # as an evaluation looks for it
    assert f"{path_of(tmp_path, 3)}: is damaged (" in caplog.text
    assert "using step 1 instead" in caplog.text
    assert names(tmp_path) == ["1", "2", "3"]
    for which in ("3", "best"):
        with pytest.raises(InputError, match="checkpoints/3: is damaged"):
            checkpoint_reader.find_intact(tmp_path, which)

    (tmp_path / "checkpoints" / "3.damaged").mkdir()  # from another time
    assert checkpoint_reader.find_intact(tmp_path, "latest", resume=True) == 1
    assert names(tmp_path) == ["1", "2.damaged", "3.damaged", "3.damaged.2"]
    assert "renamed to 3.damaged.2" in caplog.text
    save_all(tmp_path, [2], keep_checkpoints=3)
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 2

    spoil(data_file(tmp_path, 1))
    spoil(data_file(tmp_path, 2))
    with pytest.raises(
        InputError, match="(?s)2 problems in .*checkpoints, which contains no intact"
    ):
        checkpoint_reader.find_intact(tmp_path, "latest", resume=True)
    assert {"1", "2"} < set(names(tmp_path))


def test_orbax_alone_does_not_notice_a_bit(tmp_path):
    """Else the digests were for nothing, and the test above would be of another kind of damage."""
    save_all(tmp_path, [1])
    flip_a_bit(data_file(tmp_path, 1))
    state = tiny_state(1)
    restored = checkpoint_reader.restore(tmp_path, 1, state, split_of(state, sharding.make_mesh()))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), restored, state)
    assert not all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "default/_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("spoil", [cut, empty, os.remove])
def test_a_file_beside_the_arrays_is_damaged(tmp_path, name, spoil):
    save_all(tmp_path, [1, 2])
    for path in path_of(tmp_path, 2).rglob(name.rpartition("/")[2]):
        spoil(path)
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 1


def test_a_renamed_checkpoint_is_named(tmp_path):
    save_all(tmp_path, [1])
    shutil.copytree(path_of(tmp_path, 1), path_of(tmp_path, 4))
    with pytest.raises(InputError, match="checkpoints/4: is damaged .it holds the state after 1 s"):
        checkpoint_reader.find_intact(tmp_path, "4")


def test_a_checkpoint_without_digests_is_read_with_a_warning(tmp_path, caplog):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        state = jax.tree.map(lambda x: x if x.size else None, tiny_state(2))
        manager.save(2, args=ocp.args.StandardSave(state))
    assert checkpoint_reader.find_intact(tmp_path, "latest") == 2
    assert "checkpoints/2: has no digests, so damaged arrays would go unnoticed" in caplog.text


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, caplog):
    """ENOSPC of Orbax's thread, with the text that TensorStore has for it."""
    text = "RESOURCE_EXHAUSTED: Error writing x: No space left on device [os_error_code='28']\n"
    finalize = ocp.CompositeCheckpointHandler.finalize

    def fail(handler, directory):
        if "2.orbax" in str(directory):
            raise ValueError(text)
        return finalize(handler, directory)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", fail)
    with checkpoint_writer.open_writer(tmp_path, keep_checkpoints=2) as writer:
        for step in (1, 2, 3):
            checkpoint_writer.save(writer, step, tiny_state(step))
    message = f"{path_of(tmp_path, 2)}: could not be saved (No space left on device); the last"
    assert message in caplog.text and "checkpoint is step 1" in caplog.text
    assert names(tmp_path) == ["1", "3"]

    with pytest.raises(InputError, match="the last checkpoint is missing: .*/2: could not be sav"):
        save_all(tmp_path, [2])
    assert names(tmp_path) == ["1", "3"]


def test_without_room_nothing_is_begun(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    save_all(tmp_path, [1])
    with checkpoint_writer.open_writer(tmp_path, keep_checkpoints=2) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
            checkpoint_writer.save(writer, 2, tiny_state(2))
            with pytest.raises(InputError, match="checkpoint would not fit: No space .* 1,000 are"):
                checkpoint_writer.prepare(tmp_path, tiny_state(2))
        assert "could not be saved (No space left on device: " in caplog.text
        assert "1,000 are free" in caplog.text
        checkpoint_writer.save(writer, 3, tiny_state(3))
    assert names(tmp_path) == ["1", "3"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_orbax_writes(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_writer, "require_disk_space", lambda *_: None)
    save_all(small_disk, [1])
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    with checkpoint_writer.open_writer(small_disk, keep_checkpoints=2) as writer:
        checkpoint_writer.save(writer, 2, tiny_state(2))
        checkpoint_writer._wait(writer)
        assert f"{path_of(small_disk, 2)}: could not be saved (No space left" in caplog.text
        assert names(small_disk) == ["1"]
        os.remove(small_disk / "other")
        checkpoint_writer.save(writer, 3, tiny_state(3))
    assert names(small_disk) == ["1", "3"]
    assert checkpoint_reader.find_intact(small_disk, "latest") == 3


def test_what_does_not_come_back_does_not_count(tmp_path, monkeypatch, caplog):
    save_all(tmp_path, [1])
    with monkeypatch.context() as patch, contextlib.suppress(InputError):
        patch.setattr(checkpoint_writer.digests, "state_digests", lambda _: {"params.a": "another"})
        save_all(tmp_path, [2], keep_checkpoints=1)
    assert "checkpoints/2: could not be saved (read back, params.a" in caplog.text
    assert names(tmp_path) == ["1", "2.damaged"]


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "a?b", "{a}", "a%20b #", "a\nb", "[!a]", "写真"])
def test_folders_with_any_name_hold_checkpoints(tmp_path, name):
    workdir = tmp_path / name
    checkpoint_writer.prepare(workdir, tiny_state(0))
    save_all(workdir, [1])
    assert checkpoint_reader.find_intact(workdir, "latest") == 1
    state = tiny_state(1)
    restored = checkpoint_reader.restore(workdir, 1, state, split_of(state, sharding.make_mesh()))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_place_that_cannot_work_is_found_before_training(tmp_path, monkeypatch):
    workdir = tmp_path / "a\\b"  # of which TensorStore makes a/b
    with pytest.raises(InputError, match="checkpoints cannot be stored there"):
        checkpoint_writer.prepare(workdir, tiny_state(0))
    assert names(workdir) == []

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(InputError, match=r"could not be read back \(Input/output error\)"):
        checkpoint_writer.prepare(tmp_path / "other", tiny_state(0))
