"""The audit against bad files of every kind, and against what preparing says of the same ones."""

import ctypes
import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from small import make_config

from contrastseg_jax import audit, build
from contrastseg_jax.data import checks, images
from contrastseg_jax.data.audit import (
    SplitAudit,
    audit_split,
    enet_weights,
    examples_to_show,
    median_frequency_weights,
)
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.dataset import label_map, open_split, raw_splits
from contrastseg_jax.data.images import encode_jpeg, encode_png
from contrastseg_jax.errors import InputError

REAL_CAMVID = Path(__file__).parents[1].parent / "shared" / "camvid"
NAMES = ("sky", "road", "tree")


def noise(seed, size=(6, 8, 3), high=256):
    return np.random.default_rng(seed).integers(0, high, size, dtype=np.uint8)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, Image.Image):
        data.save(path, "PNG")
    else:
        path.write_bytes(data)


def write_example(root, split, name, seed, mask=None):
    write(root / "images" / split / f"{name}.jpg", encode_jpeg(noise(seed), 95))
    mask = noise(seed, (6, 8), 3) if mask is None else mask
    write(root / "labels" / split / f"{name}.png", encode_png(mask))


@pytest.fixture
def root(tmp_path):
    """Three sound examples to train on, two to validate."""
    for seed, (split, name) in enumerate(
        [("train", n) for n in "abc"] + [("val", n) for n in "de"]
    ):
        write_example(tmp_path / "raw", split, name, seed)
    return tmp_path / "raw"


def settings(root, class_names=NAMES, ignore_values=(255,)):
    return (
        "data.name=folder",
        f"data.root={root}",
        f"data.class_names={class_names}",
        f"data.ignore_values={ignore_values}",
        f"data.prepared_dir={root.parent / 'prepared'}",
    )


def spec_of(root):
    return build.dataset_spec(make_config(*settings(root)))


def run(root, *overrides, split=None, **changed):
    """What `audit.json` has; the error, if any, must be the summary's."""
    config = make_config(*settings(root, **changed), *overrides)
    workdir = root.parent / "run"
    try:
        audit.audit_run(config, workdir, split)
        failed = False
    except InputError as error:
        assert "training would go wrong" in str(error)
        failed = True
    results = json.loads((workdir / "audit" / "audit.json").read_text())
    assert failed == (results["num_errors"] > 0)
    assert not (root.parent / "prepared").exists()
    assert [path.name for path in workdir.iterdir()] == ["audit"]
    return results


def prepare(root):
    return open_split(spec_of(root), "train")


# Sound data


def test_counts_are_those_of_the_masks(root, capsys):
    write_example(root, "train", "f", 9, mask=np.array([[0] * 8, [255] * 8] * 3, np.uint8))
    results = run(root)
    assert results["findings"] == [] and results["remedies"] == {}
    files = sorted((root / "labels" / "train").glob("*.png"))
    masks = [np.array(Image.open(file)) for file in files]
    pixels = np.concatenate([mask.ravel() for mask in masks])
    train = results["splits"]["train"]
    assert train["num_examples"] == 4 and train["num_pixels"] == pixels.size == 192
    for class_id, name in [*enumerate(NAMES), (255, "no class")]:
        found = train["classes"][name]
        assert found["pixels"] == (pixels == class_id).sum()
        assert found["share"] == pytest.approx(np.mean(pixels == class_id))
        assert found["images"] == sum((mask == class_id).any() for mask in masks)
        assert train["values"][str(class_id)] == {k: found[k] for k in ("pixels", "images")}
    assert train["image_sizes"] == {"8x6": 4} and train["mask_formats"] == {"PNG L": 4}
    printed = capsys.readouterr().out
    assert "errors: none" in printed and "warnings: none" in printed
    tables = [
        line for line in printed.splitlines() if re.match(r"sky |road |no class |class +mask", line)
    ]
    assert len({len(line) for line in tables}) == 1  # columns are aligned


def test_one_split_alone(root):
    assert set(run(root, split="val")["splits"]) == {"val"}
    with pytest.raises(InputError, match="--split=test: .* has only train, val"):
        audit.audit_run(make_config(*settings(root)), root.parent / "other", "test")


def test_records_without_files_are_audited_and_not_prepared(tmp_path):
    config = make_config(f"data.prepared_dir={tmp_path / 'prepared'}")
    audit.audit_run(config, tmp_path / "run", None)
    results = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())
    assert [split["num_examples"] for split in results["splits"].values()] == [6, 3]
    assert not (tmp_path / "prepared").exists()


def test_names_may_have_spaces_and_any_letters(tmp_path):
    root = tmp_path / "rät sel" / "データ"
    for seed, split in enumerate(("train", "val")):
        write_example(root, split, f"été à la mer/写真 {seed} (1)", seed)
    results = run(root)
    assert results["num_errors"] == 0
    assert prepare(root)[0]["name"].decode() == "été à la mer/写真 0 (1)"


def test_palette_masks_count_by_index(root):
    mask = Image.fromarray(noise(0, (6, 8), 3), "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    write(root / "labels" / "train" / "a.png", mask)
    results = run(root)
    assert results["findings"] == []
    assert results["splits"]["train"]["mask_formats"] == {"PNG L": 2, "PNG P": 1}


# Bad files


def bad(path, *, data=None, change=None):
    def spoil(root):
        file = root / path
        write(file, change(file.read_bytes()) if change else data)

    return spoil


def with_wrong_checksum(png):
    """That of the pixels, which can still be decoded."""
    data = bytearray(png)
    data[png.index(b"IEND") - 5] ^= 1
    return bytes(data)


def rgba(mask):
    return Image.fromarray(np.dstack([mask] * 3 + [np.full_like(mask, 255)]))


IMAGE, MASK, OTHER_IMAGE = "images/train/a.jpg", "labels/train/a.png", "images/train/a.png"
INDEX = noise(3, (6, 8), 3)
COLORS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
FAULTS = {
    "truncated JPEG": (bad(IMAGE, change=lambda data: data[:-40]), "unreadable", IMAGE, ""),
    "truncated PNG": (bad(MASK, change=lambda data: data[:50]), "unreadable", MASK, ""),
    "damaged PNG": (bad(MASK, change=with_wrong_checksum), "unreadable", MASK, "damaged"),
    "16-bit image of 8-bit values": (
        bad(IMAGE, data=Image.fromarray(noise(3)[..., 0].astype(np.uint16))),
        "image_format",
        IMAGE,
        r"16 bits per channel, but values in \d+\.\.\d+ alone",
    ),
    "empty image": (bad(IMAGE, data=b""), "unreadable", IMAGE, r"\(empty\)"),
    "empty mask": (bad(MASK, data=b""), "unreadable", MASK, r"\(empty\)"),
    "text": (bad(IMAGE, data=b"Hello"), "unreadable", IMAGE, r"\(not an image\)"),
    "mask gone": (lambda root: (root / MASK).unlink(), "unpaired", IMAGE, "image without mask"),
    "image gone": (lambda root: (root / IMAGE).unlink(), "unpaired", MASK, "mask without image"),
    "other size": (
        bad(MASK, data=encode_png(INDEX[:, :7])),
        "size",
        MASK,
        "mask of 7x6 pixels for an image of 8x6",
    ),
    "colours": (
        bad(MASK, data=encode_png(COLORS[INDEX])),
        "mask_format",
        MASK,
        r"3 channels \(RGB\) in 3 colours: .*\(128, 0, 0\) \d+\.\d%.*the class id of each colour",
    ),
    "grey as RGB": (
        bad(MASK, data=encode_png(np.dstack([INDEX] * 3))),
        "mask_format",
        MASK,
        "colours are grey, so save one channel",
    ),
    "alpha": (bad(MASK, data=rgba(INDEX)), "mask_format", MASK, r"4 channels \(RGBA\) .*save one"),
    "grey with alpha": (
        bad(MASK, data=rgba(INDEX).convert("LA")),
        "mask_format",
        MASK,
        r"2 channels \(LA\) .*save one",
    ),
    "JPEG": (
        bad(MASK, data=cv2.imencode(".jpg", INDEX)[1].tobytes()),
        "mask_format",
        MASK,
        "a mask saved as JPEG has other values than were drawn.* again from its source as PNG",
    ),
    "16 bits, scaled up": (
        bad(MASK, data=Image.fromarray(INDEX.astype(np.uint16) * 257)),
        "mask_format",
        MASK,
        r"must lie in 0\.\.255, found 0\.\.514; all are multiples of 257, divide by it",
    ),
    "16 bits": (
        bad(MASK, data=Image.fromarray(INDEX.astype(np.uint16) + 400)),
        "mask_format",
        MASK,
        r"found 400\.\.402; renumber",
    ),
    "class list too short": (
        bad(MASK, data=encode_png(np.full((6, 8), 3, np.uint8))),
        "unknown_value",
        MASK,
        r"unknown mask value\(s\) 3 in 48 of 48 pixels; allowed: 0\.\.2, 255",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_with_its_rule_and_stops_preparing_too(root, fault, capsys):
    spoil, kind, file, message = FAULTS[fault]
    spoil(root)
    results = run(root)
    (found,) = results["findings"]
    assert (found["kind"], found["file"], found["is_error"]) == (kind, str(root / file), True)
    assert found["message"].startswith(f"{root / file}: ")
    assert re.search(message, found["message"])
    assert found["message"] in capsys.readouterr().out
    with pytest.raises(InputError) as error:
        prepare(root)
    assert found["message"] in str(error.value)
    assert [path.name for path in (root.parent / "prepared").rglob("*.*")] == [".lock"]


def test_the_audit_stops_at_no_fault(root):
    for seed, fault in enumerate(FAULTS):
        spoil, *_ = FAULTS[fault]
        write_example(root, "train", "a", 10 + seed)
        spoil(root)
        for kind, suffix in (("images", "jpg"), ("labels", "png")):
            file = root / kind / "train" / f"a.{suffix}"
            if file.exists():
                file.rename(file.with_name(f"{fault}.{suffix}"))
    results = run(root)
    assert len(results["findings"]) == len(FAULTS)
    assert results["splits"]["train"]["num_examples"] == 2 + len(FAULTS)
    assert (root.parent / "run" / "audit" / "overlays.png").exists()


def test_an_image_that_is_too_large_is_to_be_cut_not_exported_again(root, monkeypatch, capsys):
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    write(root / IMAGE, encode_png(noise(0, (6, 9, 3))))
    (found,) = run(root)["findings"]
    assert (found["kind"], found["file"]) == ("image_format", str(root / IMAGE))
    message = f"{root / IMAGE}: has 9x6 pixels; at most 50 are read, cut it into tiles"
    assert found["message"] == message
    assert "-> convert them as the message says" in capsys.readouterr().out
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(root)


def test_unknown_values_are_listed_and_the_remedy_mends_them(root):
    write_example(root, "val", "d", 3, mask=np.array([[0] * 8, [7] * 8, [4] * 8] * 2, np.uint8))
    results = run(root)
    file = str(root / "labels" / "val" / "d.png")
    assert results["splits"]["val"]["unknown_values"] == [
        {"file": file, "value": value, "pixels": 16} for value in (4, 7)
    ]
    remedy = results["remedies"]["unknown_value"]
    assert "name the classes up to value 7 in data.class_names, which has 3" in remedy
    pasted = re.search(r'--config\.data\.ignore_values="(.*)"', remedy)[1]
    assert run(root, ignore_values=pasted)["num_errors"] == 0
    names = (*NAMES, *"34567")
    assert run(root, class_names=names)["num_errors"] == 0


def test_duplicate_stems_end_in_a_finding(root):
    write(root / OTHER_IMAGE, encode_png(noise(0)))
    (found,) = run(root)["findings"]
    assert found["kind"] == "layout"
    assert re.search(r"a\.png: same name without suffix as .*a\.jpg", found["message"])
    with pytest.raises(InputError, match="same name without suffix"):
        prepare(root)


def test_what_makes_no_clear_pair_is_listed_and_the_rest_is_read(root, capsys):
    for name in "ab":
        write(root / "images" / "train" / f"{name}.png", encode_png(noise(0)))
    write_example(root, "train", "c", 2, mask=np.zeros((5, 8), np.uint8))
    write_example(root, "train", "g", 7)
    for name, suffix in (("h", "bmp"), ("i", "PNM")):
        write_example(root, "val", name, 8)
        mask = root / "labels" / "val" / f"{name}.png"
        mask.rename(mask.with_suffix(f".{suffix}"))
    results = run(root)
    messages = [found["message"] for found in results["findings"]]
    assert [found["kind"] for found in results["findings"]] == [
        *("layout", "layout", "size", "suffix", "suffix")
    ]
    assert f"{root}/labels/val/h.bmp: is a .bmp; masks must be .png" in messages
    assert [split["num_examples"] for split in results["splits"].values()] == [2, 2]
    assert (root.parent / "run" / "audit" / "overlays.png").exists()
    assert "errors: 5" in capsys.readouterr().out
    with pytest.raises(InputError) as error:
        prepare(root)
    assert all(message in str(error.value) for message in messages)


def test_an_image_of_another_suffix_is_named(root):
    (root / IMAGE).rename(root / "images" / "train" / "a.gif")
    (found,) = run(root)["findings"]
    assert found["message"] == (
        f"{root}/images/train/a.gif: is a .gif; images must be"
        " .jpg, .jpeg, .png, .bmp, .tif, .tiff, .webp"
    )


def test_a_missing_folder_is_named_once(root):
    (root / "labels" / "val").rename(root / "elsewhere")
    (found,) = run(root)["findings"]
    assert found["message"] == (
        f"{root}/labels/val: no such folder, for the masks of {root}/images/val"
    )


def test_links_to_folders_are_followed_but_not_in_circles(root):
    for kind in ("images", "labels"):
        (root / kind / "train" / "more").symlink_to(root / kind / "val")
        (root / kind / "val" / "round").symlink_to(root / kind / "train")
        (root / kind / "val" / "self").symlink_to("self")
    results = run(root)
    assert results["num_errors"] == 0
    assert [split["num_examples"] for split in results["splits"].values()] == [5, 5]
    assert [record["name"] for record in prepare(root)] == [
        *(b"a", b"b", b"c", b"more/d", b"more/e")
    ]


def test_names_that_are_no_utf8_are_findings_that_can_be_printed(root, capsys):
    for kind, name in (("images", b"caf\xe9.jpg"), ("labels", b"caf\xe9.png")):
        folder = os.fsencode(root / kind / "train")
        os.rename(folder + b"/a" + name[-4:], folder + b"/" + name)
    found = run(root)["findings"]
    assert {finding["kind"] for finding in found} == {"encoding"}
    message = rf"{root}/images/train/caf\xe9.jpg: the name must be UTF-8"
    assert found[0]["message"] == message
    assert message.encode() in capsys.readouterr().out.encode()
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(root)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_folder_that_may_not_be_read_is_told_apart(root, kind, monkeypatch):
    """What lies in it is not called missing; `test_without_permission` needs another user."""
    write_example(root, "train", "sub/g", 7)
    listdir = os.listdir

    def refuse(path):
        if path == root / kind / "train" / "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    results = run(root)
    (found,) = results["findings"]
    assert found["kind"] == "permission"
    assert found["message"] == f"{root / kind}/train/sub: cannot be read (Permission denied)"
    assert results["splits"]["train"]["num_examples"] == 3
    with pytest.raises(InputError, match=re.escape(found["message"])):
        prepare(root)


def test_the_summary_is_printed_even_if_the_sheet_cannot_be_drawn(root, monkeypatch, capsys):
    def fail(*_):
        raise TypeError("no such letter")

    monkeypatch.setattr("contrastseg_jax.report.save_sheet", fail)
    with pytest.raises(TypeError):
        run(root)
    assert "errors: none" in capsys.readouterr().out


def test_a_file_that_may_not_be_read_is_named(root, monkeypatch):
    read_bytes = Path.read_bytes

    def refuse(path):
        if path == root / IMAGE:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (found,) = run(root)["findings"]
    assert found["message"] == f"{root / IMAGE}: cannot be read (Permission denied)"
    assert found["kind"] == "permission"


def without_capabilities(function, *args):
    """Calls it in a thread to which permissions apply even if root runs the tests."""

    def call():
        version = struct.pack("Ii", 0x20080522, 0)  # and this thread
        assert ctypes.CDLL(None).capset(version, bytes(24)) == 0
        return function(*args)

    with ThreadPoolExecutor() as pool:  # threads that it starts inherit what it may
        return pool.submit(call).result()


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("path", ["images/train/sub", "labels/train", "images", MASK])
def test_without_permission(root, path):
    write_example(root, "train", "sub/g", 7)
    (root / path).chmod(0)
    try:
        results = without_capabilities(run, root)
        with pytest.raises((InputError, OSError)) as error:
            without_capabilities(prepare, root)
    finally:
        (root / path).chmod(0o755)
    (found,) = results["findings"]
    assert found["kind"] == "permission"
    for message in (found["message"], str(error.value)):
        assert str(root / path) in message and "ermission denied" in message


# The data set as a whole


def test_an_empty_split_is_an_error(root):
    for path in (*(root / "images" / "val").iterdir(), *(root / "labels" / "val").iterdir()):
        path.unlink()
    (found,) = run(root)["findings"]
    assert found["message"] == "split 'val': has no examples, training needs some"
    with pytest.raises(InputError, match="no split 'val', only train"):
        open_split(spec_of(root), "val")


def test_missing_data_is_an_error_that_shows_the_layout(tmp_path):
    (found,) = run(tmp_path / "nowhere")["findings"]
    assert found["kind"] == "no_data" and "images/train/" in found["message"]


def test_classes_that_do_not_occur_are_warnings_and_no_class_at_all_is_an_error(root):
    for name in "de":
        write_example(root, "val", name, ord(name), mask=np.full((6, 8), 1, np.uint8))
    (found,) = run(root)["findings"]
    assert found["message"] == "split 'val': has no pixel of sky, tree"
    assert not found["is_error"]
    for name in "de":
        write_example(root, "val", name, ord(name), mask=np.full((6, 8), 255, np.uint8))
    (found,) = run(root)["findings"]
    assert found["message"] == "split 'val': no pixel has a class" and found["is_error"]


def test_an_image_in_two_splits_is_a_warning(root):
    data = (root / "images" / "train" / "b.jpg").read_bytes()
    (root / "images" / "val" / "e.jpg").write_bytes(data)
    (found,) = run(root)["findings"]
    assert (found["kind"], found["is_error"]) == ("duplicate", False)
    assert "e.jpg" in found["message"] and "b.jpg" in found["message"]


# Class weights


def test_weights_follow_their_formulas(root):
    """Class 0 fills an image of 100 pixels, class 1 a tenth of another, class 2 its rest."""
    masks = np.zeros((2, 10, 10), np.uint8)
    masks[1] = 2
    masks[1, 0] = 1
    made = [
        checks.check_encoded(
            "x", encode_png(noise(0, (10, 10, 3))), encode_png(m), "i", "m", classes
        )
        for classes in [label_map(spec_of(root))]
        for m in masks
    ]
    raw = checks.RawSplit([lambda c=c: c for c in made])
    found = audit_split(raw, label_map(spec_of(root)), "train")
    np.testing.assert_allclose(median_frequency_weights(found, 4), [0.9, 9.0, 1.0, 1.0])
    expected = 1 / np.log([1.02 + 0.5, 1.02 + 0.05, 1.02 + 0.45, 1.02])
    np.testing.assert_allclose(enet_weights(found, 4), expected)
    assert np.isfinite(enet_weights(SplitAudit(), 3)).all()
    np.testing.assert_array_equal(median_frequency_weights(SplitAudit(), 3), 1)


def test_printed_weights_can_be_pasted(root, capsys):
    run(root)
    pasted = re.findall(r'--config\.(loss\.class_weights)="(.*)"', capsys.readouterr().out)
    assert len(pasted) == 2
    for path, value in pasted:
        config = make_config(*settings(root), f"{path}={value}")
        build.check(config, mode="audit")
        assert len(config.loss.class_weights) == 3


# The sheet of examples


def test_examples_to_show_are_spread_over_their_split(tmp_path):
    spec = DatasetSpec(name="synthetic", prepared_dir=str(tmp_path), num_examples=(41, 3))
    splits, classes = raw_splits(spec), label_map(spec)
    audits = {name: audit_split(raw, classes, name) for name, raw in splits.items()}
    shown = examples_to_show(splits, audits, classes, 10)
    names = [example.name for example in shown]
    assert names == [f"train {i:06d}" for i in (0, 10, 20, 30, 40)] + [
        f"val {i:06d}" for i in range(3)
    ]


def test_sheet_leaves_out_what_does_not_fit(root):
    (root / IMAGE).write_bytes(b"")
    write_example(root, "train", "b", 1, mask=np.zeros((9, 9), np.uint8))
    spec = spec_of(root)
    splits, classes = raw_splits(spec), label_map(spec)
    audits = {name: audit_split(raw, classes, name) for name, raw in splits.items()}
    shown = examples_to_show(splits, audits, classes, 20)
    assert [example.name for example in shown] == ["train c", "val d", "val e"]


# Preparing: nothing half-done is taken for whole


def test_reading_runs_ahead_by_a_bounded_number():
    started = []
    results = checks.in_parallel(lambda i: i, (started.append(i) or i for i in range(500)), "x")
    for index, result in enumerate(results):
        assert result == index and len(started) <= index + checks.AHEAD + 1


def test_a_full_disk_is_an_error_and_leaves_nothing_that_counts(tmp_path):
    """A limit on the size of files makes the real writer fail, in the middle of a file."""
    spec = DatasetSpec(name="landcover", prepared_dir=str(tmp_path))
    code = (
        "import resource\n"
        "from contrastseg_jax.data.builders.base import DatasetSpec\n"
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


def test_no_space_left_names_the_setting(root, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorflow_datasets.core.writer.Writer.finalize", fail)
    with pytest.raises(InputError, match=r"data\.prepared_dir = .*No space left on device"):
        prepare(root)
    monkeypatch.undo()
    assert len(prepare(root)) == 3


def test_a_killed_preparation_starts_again(root):
    spec = dataclasses.replace(spec_of(root), prepared_dir=str(root.parent / "prepared"))
    code = (
        "import time\n"
        "from contrastseg_jax.data.builders import base\n"
        "from contrastseg_jax.data.builders.base import DatasetSpec\n"
        "from contrastseg_jax.data.dataset import open_split\n"
        "whole = base.PairsBuilder._generate_examples\n"
        "def slow(self, pairs):\n"
        "    for example in whole(self, pairs):\n"
        "        yield example\n"
        "        if len(pairs) == 2:\n"  # of val; train is written by then
        "            open(pairs[0].image.parents[3] / 'half', 'w')\n"
        "            time.sleep(300)\n"
        "base.PairsBuilder._generate_examples = slow\n"
        f"open_split({spec!r}, 'train')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (root.parent / "half").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert list(Path(spec.prepared_dir).rglob("*incomplete*/*train*"))
    write_example(root, "train", "f", 9)  # so it is another folder that is prepared now
    assert len(prepare(root)) == 4
    assert len(open_split(spec, "val")) == 2
    assert list(Path(spec.prepared_dir).rglob("*incomplete*")) == []


# CamVid


@pytest.mark.skipif(not REAL_CAMVID.exists(), reason="the real CamVid is not here")
def test_shares_of_the_real_camvid(tmp_path):
    config = make_config("data.name=camvid", f"data.root={REAL_CAMVID}")
    audit.audit_run(config, tmp_path, "train")
    results = json.loads((tmp_path / "audit" / "audit.json").read_text())
    shares = [100 * found["share"] for found in results["splits"]["train"]["classes"].values()]
    # To a tenth: 16.8 23.3 1.0 31.7 4.5 9.7 1.2 1.1 5.9 0.6 0.3, void 3.9.
    expected = [16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95]
    np.testing.assert_allclose(shares, expected, atol=0.005)
