"""Bad files of every kind: the audit lists them, and preparing stops with the same words."""

import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from audited import NAMES, prepare, run
from picture_files import exif, png, saved
from PIL import Image
from raw_data import noise, without_capabilities, write, write_example, write_pair

from contrastseg_jax.data import image_files, preprocess
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.errors import InputError


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
        bad(IMAGE, data=saved(Image.fromarray(noise(3)[..., 0].astype(np.uint16)))),
        "image_format",
        IMAGE,
        r"has values in \d+\.\.\d+ of 65535, .* set data\.bit_depth = 8 if",
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
    "alpha": (
        bad(MASK, data=saved(rgba(INDEX))),
        "mask_format",
        MASK,
        r"4 channels \(RGBA\) .*save one",
    ),
    "grey with alpha": (
        bad(MASK, data=saved(rgba(INDEX).convert("LA"))),
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
    "truncated JPEG, as a mask": (
        bad(MASK, data=saved(Image.fromarray(noise(0, (60, 80, 3))), "JPEG")[:3000]),
        "mask_format",
        MASK,
        "a mask saved as JPEG",
    ),
    "too many pixels": (
        bad(MASK, data=png(np.zeros((1, 8), np.uint8), 1, size=(16385, 16384))),
        "mask_format",
        MASK,
        "has 16384x16385 pixels; at most 268,435,456 are read",
    ),
    "16 bits, scaled up": (
        bad(MASK, data=saved(Image.fromarray(INDEX.astype(np.uint16) * 257))),
        "mask_format",
        MASK,
        r"must lie in 0\.\.255, found 0\.\.514; all are multiples of 257, divide by it",
    ),
    "16 bits": (
        bad(MASK, data=saved(Image.fromarray(INDEX.astype(np.uint16) + 400))),
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
    monkeypatch.setattr(image_files, "MAX_PIXELS", 50)
    write(root / IMAGE, encode_png(noise(0, (6, 9, 3))))
    (found,) = run(root)["findings"]
    assert (found["kind"], found["file"]) == ("image_format", str(root / IMAGE))
    message = f"{root / IMAGE}: has 9x6 pixels; at most 50 are read, cut it into tiles"
    assert found["message"] == message
    assert "-> do as the message says" in capsys.readouterr().out
    with pytest.raises(InputError, match=re.escape(message)):
        prepare(root)


@pytest.mark.parametrize(("split", "is_error"), [("val", True), ("train", False)])
def test_an_image_that_resizing_makes_too_large_is_named(root, split, is_error, monkeypatch):
    """Training, which cuts crops, can use it; evaluation, which takes it whole, cannot."""
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 64 * 64)
    file = root / "images" / split / "strip.png"
    write_pair(file, root / "labels" / split / "strip.png", size=(3, 50))
    (found,) = run(root, "data.short_side=16")["findings"]
    assert (found["kind"], found["file"], found["is_error"]) == ("too_large", str(file), is_error)
    assert found["message"] == (
        f"{file}: has 50x3 pixels, resized by data.short_side = 16 to 267x16, padded by"
        " eval.pad_multiple = 32 to 288x32; at most 4,096 pixels are evaluated, cut it into tiles"
    )
    assert run(root)["findings"] == []


@pytest.mark.parametrize("rule", ["stored", "applied"])
@pytest.mark.parametrize(
    ("kind", "note", "has_orientation"),
    [
        ("JPEG", exif(6), True),
        ("MPO", exif(3), True),
        ("PNG", exif(4), True),
        ("WEBP", exif(8), True),
        ("TIFF", exif(3), True),
        ("JPEG", exif(1), False),
        ("JPEG", exif(0), False),  # not set
        ("JPEG", b"Exif\0\0damaged", False),
    ],
)
def test_an_image_with_an_exif_orientation_is_a_warning_that_says_how_it_is_used(
    root, kind, note, has_orientation, rule
):
    pixels = Image.fromarray(noise(0, (6, 6, 3)))
    more = {"save_all": True, "append_images": [pixels]} if kind == "MPO" else {}
    write(root / IMAGE, saved(pixels, kind, exif=note, **more))
    write(root / MASK, encode_png(noise(0, (6, 6), 3)))
    setting = f"data.exif_orientation={rule}"
    findings = run(root, setting)["findings"]
    expected = [("exif_orientation", str(root / IMAGE), False)] if has_orientation else []
    assert [(f["kind"], f["file"], f["is_error"]) for f in findings] == expected
    use = {"stored": "ignored", "applied": "applied"}[rule]
    for found in findings:
        assert f"which is {use} (data.exif_orientation = {rule})" in found["message"]
    assert len(prepare(root, setting)) == 3


@pytest.mark.parametrize(("rule", "other"), [("stored", "applied"), ("applied", "stored")])
def test_a_mask_that_fits_with_the_other_orientation_says_so(root, rule, other):
    """Drawn on the image as viewers show it, or else on the pixels as stored."""
    write(root / IMAGE, saved(Image.fromarray(noise(0)), "JPEG", exif=exif(6)))
    write(root / MASK, encode_png(noise(0, (8, 6) if rule == "stored" else (6, 8), 3)))
    results = run(root, f"data.exif_orientation={rule}")
    (message,) = [found["message"] for found in results["findings"] if found["is_error"]]
    shape = "mask of 6x8 pixels for an image of 8x6"
    assert (shape if rule == "stored" else "mask of 8x6 pixels for an image of 6x8") in message
    remedy = f"--config.data.exif_orientation={other}"
    assert message.endswith(f"has an EXIF orientation, and they fit with {remedy}")
    assert run(root, f"data.exif_orientation={other}")["num_errors"] == 0
    with pytest.raises(InputError, match=re.escape(remedy)):
        prepare(root, f"data.exif_orientation={rule}")
    assert len(prepare(root, f"data.exif_orientation={other}")) == 3


@pytest.mark.parametrize("rule", ["stored", "applied"])
def test_a_mask_with_an_orientation_is_used_as_stored_with_a_warning(root, rule):
    write(root / MASK, saved(Image.fromarray(INDEX), exif=exif(6)))
    (found,) = run(root, f"data.exif_orientation={rule}")["findings"]
    assert (found["kind"], found["file"], found["is_error"]) == (
        "exif_orientation",
        str(root / MASK),
        False,
    )
    assert "masks are used as stored" in found["message"]


def test_images_of_fewer_bits_than_their_files_are_errors_until_bit_depth_is_set(root):
    for seed, path in enumerate(list(root.glob("images/*/*.jpg"))):
        grey = noise(seed, (6, 8)).astype(np.uint16) * 16
        write(path.with_suffix(".png"), saved(Image.fromarray(grey)))
        path.unlink()
    findings = run(root)["findings"]
    assert {found["kind"] for found in findings} == {"image_format"} and len(findings) == 5
    assert all("set data.bit_depth = 12 if they have 12" in f["message"] for f in findings)
    assert run(root, "data.bit_depth=12")["findings"] == []
    with pytest.raises(InputError, match="data.bit_depth = 12"):
        prepare(root)
    assert len(prepare(root, "data.bit_depth=12")) == 3


def test_unknown_values_are_listed_and_the_remedy_works(root):
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
        f"{root}/labels/val: no such folder, for the masks of {root}/images/val; images without"
        " masks can be predicted, not trained on or scored"
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


def test_names_that_are_not_utf8_are_findings_that_can_be_printed(root, capsys):
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
def test_a_folder_without_permission_is_not_taken_for_a_missing_one(root, kind, monkeypatch):
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
