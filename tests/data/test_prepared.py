"""Prepared data sets that were damaged: noticed and prepared again; raw data are let be."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
from audited import folder_spec
from raw_data import names, prepared_files, without_capabilities
from test_pipeline import train

from contrastseg_jax.data import prepared
from contrastseg_jax.data.dataset import label_map, open_splits
from contrastseg_jax.errors import InputError

SPLITS = ("train", "val")
SPLIT_FILES = ["dataset_info.json", "features.json", "files.json", "folder-train.array_record"]


@pytest.fixture
def spec(root):
    """Of a data set that was prepared."""
    spec = folder_spec(root)
    open_splits(spec, SPLITS)
    return spec


def folder_of(spec, split="train"):
    (folder,) = Path(spec.prepared_dir).glob(f"folder/{split}_*/1.0.0")
    return folder


def file_of(spec, name):
    (file,) = folder_of(spec).glob(f"{name}*")
    return file


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def written(spec):
    """Which prepared files were written, and when."""
    return {path: path.stat().st_mtime_ns for path in prepared_files(spec)}


def spoil(path):
    """One bit, in the middle; size and time stay as they were."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[1000 if len(data) > 2000 else len(data) // 2] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def on_records(function):
    return lambda folder: function(next(folder.glob("*.array_record*")))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def put_file_in_place(folder):
    shutil.rmtree(folder)
    folder.write_text("a note")


FAULTS = {
    "records gone": (
        on_records(Path.unlink),
        r"folder-train\.array_record-0.* is missing",
    ),
    "records cut": (on_records(cut), r"of-00001 has \d+ bytes instead of \d+"),
    "records spoilt": (on_records(spoil), "of-00001 has other bytes than were written"),
    "info empty": (change("dataset_info.json", b""), "dataset_info.json has 0 bytes instead of"),
    "info garbled": (change("dataset_info.json", b"{"), "dataset_info.json has 1 bytes"),
    "info spoilt": (
        lambda folder: spoil(folder / "dataset_info.json"),
        "info.json has other",
    ),
    "features gone": (
        lambda folder: (folder / "features.json").unlink(),
        "features.json is miss",
    ),
    "features empty": (change("features.json", b""), "features.json has 0 bytes instead of"),
    "list gone": (lambda folder: (folder / "files.json").unlink(), "it has no files.json"),
    "list empty": (change("files.json", b""), "files.json is garbled"),
    "list of none": (change("files.json", b"{}"), "files.json is garbled"),
    "list of others": (change("files.json", b'{"a": [1]}'), "files.json is garbled"),
    "list no text": (change("files.json", b"\xff\xfe"), "files.json is garbled"),
    "folder empty": (empty, "it has no files.json"),
    "no folder": (put_file_in_place, "files.json cannot be read: Not a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_prepared_again_and_the_log_says_why(spec, root, fault, caplog):
    damage, reason = FAULTS[fault]
    raw, expected = contents(root), [dict(record) for record in open_splits(spec, SPLITS)[0]]
    of_val = {path: time for path, time in written(spec).items() if "val_" in str(path)}
    folder = folder_of(spec)
    caplog.clear()
    damage(folder)
    records, _ = open_splits(spec, SPLITS)
    assert [dict(record) for record in records] == expected
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{folder}: prepared again, because ")
    assert re.search(reason, message)
    assert sorted(path.name.split("-0")[0] for path in folder.iterdir()) == SPLIT_FILES
    assert contents(root) == raw
    assert of_val.items() <= written(spec).items()
    caplog.clear()
    before = written(spec)
    open_splits(spec, SPLITS)
    assert caplog.records == [] and written(spec) == before


def test_a_link_in_the_place_of_a_prepared_folder_is_replaced_not_what_it_leads_to(spec, root):
    folder = folder_of(spec)
    shutil.rmtree(folder)
    folder.symlink_to(root / "images")
    raw = contents(root)
    assert names(open_splits(spec, SPLITS)[0]) == ["a", "b", "c"]
    assert contents(root) == raw and not folder.is_symlink()


def test_a_copy_with_other_times_is_read_once_and_trusted(spec, caplog, monkeypatch):
    folder = folder_of(spec)
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    caplog.clear()
    monkeypatch.setattr(prepared, "ALWAYS_HASHED_SIZE", 0)
    read, stamp = [], prepared._stamp
    monkeypatch.setattr(prepared, "_stamp", lambda path: read.append(path.name) or stamp(path))
    assert names(open_splits(spec, SPLITS)[0]) == ["a", "b", "c"]
    assert len(read) == 3 and caplog.records == []
    open_splits(spec, SPLITS)
    assert len(read) == 3


def test_the_manifest_has_size_time_and_digest_of_each_file(spec):
    folder = folder_of(spec)
    listed = json.loads((folder / "files.json").read_text())
    assert {*listed, "files.json"} == {path.name for path in folder.iterdir()}
    for name, stamp in listed.items():
        status, data = (folder / name).stat(), (folder / name).read_bytes()
        assert stamp["sha256"] == hashlib.sha256(data).hexdigest()
        assert (stamp["size"], stamp["mtime_ns"]) == (len(data), status.st_mtime_ns)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_that_shows_while_reading_is_one_error_in_threads_and_workers(
    spec, root, num_workers, monkeypatch, caplog
):
    """Of size and time as they were, in a file that is too large to be read at each start."""
    monkeypatch.setattr(prepared, "ALWAYS_HASHED_SIZE", 0)
    (source, _) = open_splits(spec, SPLITS)
    settings = dict(label_map=label_map(spec), num_steps=4, num_workers=num_workers)
    with contextlib.closing(train(source, **settings)) as batches:
        spoil(file_of(spec, "folder-train"))  # now, as the checks of types read records, too
        assert prepared.find_fault(folder_of(spec)) == ""
        with pytest.raises(InputError) as error:
            list(batches)
    (line,) = str(error.value).splitlines()
    folder = folder_of(spec)
    assert line == (
        f"{folder}: this prepared data set is damaged (folder-train.array_record-00000-of-00001 has"
        " other bytes than were written); start again, and it is prepared anew"
    )
    (source, _) = open_splits(spec, SPLITS)
    assert [record["image"] for record in source] == [
        (root / "images" / "train" / f"{name}.jpg").read_bytes() for name in "abc"
    ]
    assert "prepared again, because folder-train" in caplog.text


def test_a_record_that_cannot_be_read_though_nothing_is_damaged_is_not_called_so(spec, monkeypatch):
    def fail(*_):
        raise OSError("no handle is left")

    (source, _) = open_splits(spec, SPLITS)
    file = file_of(spec, "folder-train")
    anew = pickle.dumps(source)  # as a worker has it, with no file open
    file.rename(file.with_name("away"))
    with pytest.raises(InputError, match=r"is damaged \(folder-train.* is missing\); start again"):
        pickle.loads(anew)[0]
    file.with_name("away").rename(file)
    assert pickle.loads(anew)[0] == source[0]  # nothing was deleted
    monkeypatch.setattr(type(source.encoded), "__getitem__", fail)
    with pytest.raises(InputError) as error:
        source[0]
    assert str(error.value) == f"{source.folder}: record 0 cannot be read: no handle is left"


def test_records_are_a_sequence(spec):
    (source, _) = open_splits(spec, SPLITS)
    assert names(source) == names([source[-3], source[-2], source[-1]]) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        source[3]
    assert len(pickle.dumps(source)) < 10_000  # no list of raw files travels to workers


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_without_permission_is_prepared_again(spec, caplog):
    folder = folder_of(spec)
    folder.chmod(0)
    source, _ = without_capabilities(open_splits, spec, SPLITS)
    assert names(source) == ["a", "b", "c"]
    assert "prepared again, because files.json cannot be read: Permission denied" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_an_undamaged_folder_can_be_read_where_nothing_may_be_written(spec):
    home = Path(spec.prepared_dir)
    files = [file_of(spec, name) for name in SPLIT_FILES]
    places = [*(path for path in home.rglob("*") if path.is_dir()), home]
    for path in files[:3]:
        os.utime(path, ns=(0, 10**18))  # as a copy
    for place in places:
        place.chmod(0o555)
    try:
        assert names(without_capabilities(open_splits, spec, SPLITS)[0]) == ["a", "b", "c"]
        spoil(files[0])
        with pytest.raises(InputError, match=r"data\.prepared_dir = .*ermission denied"):
            without_capabilities(open_splits, spec, SPLITS)
    finally:
        for place in places[::-1]:
            place.chmod(0o755)


@pytest.mark.parametrize("name", ["exp[1]", "a*b?", "{SPLIT} %s", "x#1@2", "写真"])
def test_any_name_serves_for_the_folder_of_prepared_data(root, name):
    config = folder_spec(root)
    spec = type(config)(**{**vars(config), "prepared_dir": str(root.parent / name)})
    for _ in range(2):
        assert [names(source) for source in open_splits(spec, SPLITS)] == [[*"abc"], [*"de"]]
