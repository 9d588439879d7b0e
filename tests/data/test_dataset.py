"""Data sets by name: preparing, reading, what stops it and what it leaves."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from raw_data import names, prepared_files, problems, write_pair

from contrastseg_jax.data import dataset
from contrastseg_jax.data.builders import base
from contrastseg_jax.data.builders import folder as folder_module
from contrastseg_jax.data.dataset import dataset_names, open_split, open_splits
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Two examples to train on, one to validate, of different sizes, one in a sub-folder."""
    root = tmp_path / "raw"
    images, labels = root / "images", root / "labels"
    write_pair(images / "train" / "b.jpg", labels / "train" / "b.png", seed=0)
    write_pair(images / "train" / "x" / "a.png", labels / "train" / "x" / "a.png", seed=1)
    write_pair(images / "val" / "v.1.jpeg", labels / "val" / "v.1.png", size=(9, 4), seed=2)
    return DatasetSpec(
        name="folder",
        root=str(root),
        prepared_dir=str(tmp_path / "prepared"),
        class_names=("one", "two", "three"),
    )


# Records


def test_dataset_names():
    assert dataset_names() == (
        *("landcover", "cityscapes", "pascal_context", "coco_stuff10k", "coco_stuff164k"),
        *("camvid", "ade20k", "folder", "tfds", "synthetic"),
    )


def test_records_hold_the_files_as_they_are(folder):
    root = Path(folder.root)
    records = open_split(folder, "train")
    assert names(records) == ["b", "x/a"]
    assert records[1]["image"] == (root / "images" / "train" / "x" / "a.png").read_bytes()
    assert records[1]["label"] == (root / "labels" / "train" / "x" / "a.png").read_bytes()
    assert names(open_split(folder, "val")) == ["v.1"]


def test_the_home_folder_may_be_written_as_a_tilde(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = dataclasses.replace(folder, root="~/raw", prepared_dir="~/cache")
    assert len(open_split(spec, "train")) == 2
    assert (tmp_path / "cache" / "folder").is_dir()


def test_preparing_happens_once_and_again_after_a_change(folder):
    open_splits(folder, ("train", "val"))
    first = {path: path.stat().st_mtime_ns for path in prepared_files(folder)}
    open_split(folder, "train")
    open_split(folder, "val")
    assert {path: path.stat().st_mtime_ns for path in prepared_files(folder)} == first

    mask = Path(folder.root) / "labels" / "train" / "b.png"
    mask.write_bytes(encode_png(np.full((6, 8), 2, np.uint8)))
    assert open_split(folder, "train")[0]["label"] == mask.read_bytes()
    write_pair(mask.parents[2] / "images" / "train" / "c.jpg", mask.with_name("c.png"))
    assert names(open_split(folder, "train")) == ["b", "c", "x/a"]


def test_a_changed_time_or_label_setting_prepares_again(folder):
    open_split(folder, "train")
    folders = Path(folder.prepared_dir) / "folder"
    assert len(list(folders.glob("*/1.0.0"))) == 1
    os.utime(Path(folder.root) / "images" / "train" / "b.jpg", ns=(0, 10**18))
    open_split(folder, "train")
    assert len(list(folders.glob("*/1.0.0"))) == 2
    open_split(dataclasses.replace(folder, ignore_values=(255, 3)), "train")
    assert len(list(folders.glob("*/1.0.0"))) == 3


def test_an_absent_split_is_an_error_that_lists_the_others(folder):
    message = f"'folder' in {folder.root} has no split 'test', only train, val; .*--mode=audit"
    with pytest.raises(InputError, match=message):
        open_split(folder, "test")


def test_nothing_stays_behind_when_preparing_is_cut_off(folder, monkeypatch):
    def fail(self, records):
        yield next(original(self, records))
        raise RuntimeError("cut off")

    original = base.RecordBuilder._generate_examples
    monkeypatch.setattr(base.RecordBuilder, "_generate_examples", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        open_split(folder, "train")
    assert prepared_files(folder) == []
    monkeypatch.undo()
    assert len(open_split(folder, "train")) == 2


def test_of_two_at_once_one_prepares_and_the_other_waits(folder, monkeypatch):
    started, checked, check_splits = threading.Event(), [], dataset.check_splits

    def check_slowly(*args):
        checked.append(args)
        started.set()
        time.sleep(0.5)
        check_splits(*args)

    monkeypatch.setattr(dataset, "check_splits", check_slowly)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(names(open_split(folder, "train"))))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert found == [["b", "x/a"]] * 2
    assert len(checked) == 1


def test_only_the_splits_asked_for_are_looked_through_and_each_once(folder, monkeypatch):
    found, split_config = [], folder_module.split_config
    monkeypatch.setattr(
        folder_module,
        "split_config",
        lambda spec, split: found.append(split) or split_config(spec, split),
    )
    assert [names(source) for source in open_splits(folder, ("train", "val"))] == [
        *(["b", "x/a"], ["v.1"])
    ]
    assert found == ["train", "val"]


def test_preparing_logs_no_warning(folder, caplog):
    open_split(folder, "train")
    assert caplog.records == []


def test_no_tensorflow_is_imported(folder):
    code = (
        "import sys\n"
        "from contrastseg_jax.data.spec import DatasetSpec\n"
        "from contrastseg_jax.data.spec import Decoding\n"
        "from contrastseg_jax.data.dataset import open_split\n"
        f"open_split({folder!r}, 'train')[0]\n"
        "import contrastseg_jax.data.pipeline\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Faults of raw data


def test_all_problems_come_in_one_error_the_first_of_them_spelt_out(folder):
    masks = Path(folder.root) / "labels" / "train"
    for i in range(23):
        write_pair(Path(folder.root) / "images" / "train" / f"{i:02d}.jpg", masks / f"{i:02d}.png")
        (masks / f"{i:02d}.png").write_bytes(b"")
    (Path(folder.root) / "images" / "train" / "00.jpg").write_bytes(b"")
    lines = problems(folder).splitlines()
    assert lines[0] == f"24 problems in the data of {folder.root}:"
    assert len(lines) == 1 + 20 + 2
    assert lines[-2].strip() == "and 4 more"
    assert lines[-1].startswith("--mode=audit lists all")


def test_hidden_files_are_left_out(folder):
    (Path(folder.root) / "images" / "train" / "._b.jpg").write_bytes(b"")
    assert names(open_split(folder, "train")) == ["b", "x/a"]


@pytest.mark.parametrize("name", ["camvid", "folder"])
@pytest.mark.parametrize("root", ["", "no/such/folder"])
def test_missing_data_says_layout_and_setting(name, root, tmp_path):
    spec = DatasetSpec(name=name, root=root, prepared_dir=str(tmp_path), class_names=("a",))
    with pytest.raises(InputError) as error:
        open_split(spec, "train")
    for part in (f"'{name}'", f"data.root = '{root}'", "--config.data.root=FOLDER", "train", "val"):
        assert part in str(error.value)


# Preparing: nothing half-done is taken for whole


def test_a_full_disk_is_an_error_and_leaves_nothing_that_counts(tmp_path):
    """A limit on the size of files makes the real writer fail, in the middle of a file."""
    spec = DatasetSpec(name="landcover", prepared_dir=str(tmp_path))
    code = (
        "import resource\n"
        "from contrastseg_jax.data.spec import DatasetSpec\n"
        "from contrastseg_jax.data.spec import Decoding\n"
        "from contrastseg_jax.data.dataset import open_split\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        f"open_split({spec!r}, 'train')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    text = result.stderr.decode()
    assert f"InputError: data.prepared_dir = '{tmp_path}': preparing data set 'landcover'" in text
    assert "write() failed" in text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
    assert len(open_split(spec, "train")) == 27


def test_no_space_left_names_the_setting(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorflow_datasets.core.writer.Writer.finalize", fail)
    with pytest.raises(InputError, match=r"data\.prepared_dir = .*No space left on device"):
        open_split(folder, "train")
    monkeypatch.undo()
    assert len(open_split(folder, "train")) == 2


def test_a_killed_preparation_starts_again(folder):
    root = Path(folder.root)
    code = (
        "import time\n"
        "from contrastseg_jax.data.builders import base\n"
        "from contrastseg_jax.data.spec import DatasetSpec\n"
        "from contrastseg_jax.data.spec import Decoding\n"
        "from contrastseg_jax.data.dataset import open_split\n"
        "whole = base.RecordBuilder._generate_examples\n"
        "def slow(self, records):\n"
        "    for index, example in whole(self, records):\n"
        "        yield index, example\n"
        "        if index == 1:\n"
        f"            open({str(root.parent / 'half')!r}, 'w')\n"
        "            time.sleep(300)\n"
        "base.RecordBuilder._generate_examples = slow\n"
        f"open_split({folder!r}, 'train')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (root.parent / "half").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert list(Path(folder.prepared_dir).rglob("*incomplete*"))
    # So it is another folder that is prepared now.
    write_pair(root / "images" / "train" / "c.jpg", root / "labels" / "train" / "c.png")
    assert len(open_split(folder, "train")) == 3
    assert len(open_split(folder, "val")) == 1
    assert list(Path(folder.prepared_dir).rglob("*incomplete*")) == []
