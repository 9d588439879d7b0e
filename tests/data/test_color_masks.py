"""Masks in colours, where class ids are expected: what the audit and preparing say of them."""

import json
import re
import shlex

import cv2
import numpy as np
import pytest
from audited import prepare, run
from PIL import Image
from raw_data import noise, write, write_example

from contrastseg_jax.config.load import load_config
from contrastseg_jax.data.audit import report
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.errors import InputError

COLORS = noise(5, (9, 3))


def paint(root, split, name, indices, colors=COLORS):
    write_example(root, split, name, 100 + ord(name))
    pixels = np.asarray(colors, np.uint8)[indices]
    Image.fromarray(pixels).save(root / "labels" / split / f"{name}.png")
    return pixels


@pytest.fixture
def painted(root):
    """All masks in nine colours, of which each has at most seven."""
    rng = np.random.default_rng(0)
    masks = {
        split: [paint(root, split, name, rng.integers(i, i + 7, (6, 8))) for name in names]
        for i, (split, names) in enumerate({"train": "abcg", "val": "de"}.items())
    }
    masks["train"].append(paint(root, "train", "h", np.full((6, 8), 8)))
    return root, masks


def test_the_audit_lists_the_colours_of_a_split(painted, capsys):
    root, masks = painted
    results = run(root)
    printed = capsys.readouterr().out
    for split, pictures in masks.items():
        found = results["splits"][split]["mask_colors"]
        pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        assert {tuple(entry["color"]): entry["pixels"] for entry in found["colors"]} == {
            tuple(color): count for color, count in zip(colors.tolist(), counts, strict=True)
        }
        assert [entry["pixels"] for entry in found["colors"]] == sorted(counts)[::-1]
        for entry in found["colors"]:
            in_masks = sum((picture == entry["color"]).all(-1).any() for picture in pictures)
            assert entry["masks"] == in_masks
            assert entry["share"] == pytest.approx(entry["pixels"] / len(pixels))
            line = f"{str(tuple(entry['color'])):16}{entry['share']:7.2%} of the pixels, in"
            assert line in printed
        assert not found["too_many"]
        assert len(found["files"]) == found["masks"] == len(pictures)
    assert printed.count("masks with colour channels") == 2
    assert "5 masks with colour channels (" in printed and "in 8 colours\n" in printed
    assert printed.count("an index mask is expected") == 0  # not the same sentence for each mask
    assert results["num_errors"] == len(results["findings"]) == 7  # but each is in audit.json
    assert {finding["kind"] for finding in results["findings"]} == {"mask_format"}


def test_preparing_says_the_same_once(painted):
    root, _ = painted
    with pytest.raises(InputError) as error:
        prepare(root)
    text = str(error.value)
    assert text.startswith(f"2 problems in the data of {root}:\n  split 'train': 5 masks with")
    assert text.count("of the pixels, in") == 8 + 7
    assert f"({root}/labels/train/a.png, ...)" in text


def test_one_mask_in_colours_is_named_with_all_its_colours(root, capsys):
    paint(root, "train", "a", np.arange(48).reshape(6, 8) % 9)
    (found,) = run(root)["findings"]
    printed = capsys.readouterr().out
    assert found["message"] in printed
    assert printed.count("of the pixels, in 1 of 1") == 9


def pasted(printed):
    """The settings of the only line that shows some, as a shell reads them."""
    (line,) = {*re.findall(r"^ +\"?(?:--config\.data\.\S+=.*)$", printed, re.MULTILINE)}
    return [text.removeprefix("--config.") for text in shlex.split(line)]


def test_the_audit_shows_settings_that_read_the_colours(painted, capsys):
    root, masks = painted
    names = tuple(map(str, range(9)))
    run(root, class_names=names)
    settings = pasted(capsys.readouterr().out)
    pixels = np.concatenate([mask.reshape(-1, 3) for found in masks.values() for mask in found])
    colors, counts = np.unique(pixels, axis=0, return_counts=True)
    palette = load_config("folder", settings).data.palette
    assert {*palette} == {"#{:02x}{:02x}{:02x}".format(*color) for color in colors.tolist()}
    by_color = dict(zip(map(bytes, colors), counts, strict=True))
    in_order = [by_color[bytes.fromhex(color[1:])] for color in palette]
    assert in_order == sorted(counts)[::-1]
    results = run(root, *settings, class_names=names)
    assert results["num_errors"] == 0
    found = results["splits"]["train"]["classes"]
    assert sum(entry["pixels"] for entry in found.values()) == 5 * 48


@pytest.mark.parametrize(("names", "expected"), [(3, "#000000"), (2, None)])
def test_black_is_ignored_where_it_alone_has_no_name(root, names, expected, capsys):
    colors = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    for split, files in (("train", "abc"), ("val", "de")):
        for name in files:
            paint(root, split, name, np.arange(48).reshape(6, 8) % 3, colors)
    class_names = ("a", "b", "c")[:names]
    run(root, class_names=class_names)
    settings = pasted(capsys.readouterr().out)
    config = load_config("folder", settings)
    assert config.data.palette[: names - 2] == (("#000000",) if expected else ())
    assert config.data.ignore_colors == (() if expected else ("#000000",))
    assert run(root, *settings, class_names=class_names)["num_errors"] == 0


def test_grey_in_three_channels_is_proposed_in_the_order_of_its_levels(root, capsys):
    for split, files in (("train", "abc"), ("val", "de")):
        for name in files:
            paint(root, split, name, noise(1, (6, 8), 3), [[i] * 3 for i in range(3)])
    run(root)
    settings = pasted(capsys.readouterr().out)
    assert load_config("folder", settings).data.palette == ("#000000", "#010101", "#020202")
    assert run(root, *settings)["num_errors"] == 0


@pytest.mark.parametrize("ignore_values", [(255,), ()])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_of_two_values_are_proposed_as_binary(root, channels, ignore_values, capsys):
    white = np.stack([np.eye(6, 8, dtype=np.uint8) * 255] * channels, axis=-1).squeeze()
    for path in root.glob("labels/*/*.png"):
        write(path, encode_png(white))
    names = {"class_names": ("cell", "wall")}
    results = run(root, **names, ignore_values=ignore_values)
    assert (results["num_errors"] > 0) == (channels == 3 or ignore_values == ())
    settings = {*pasted(capsys.readouterr().out)}
    assert "data.mask_encoding=binary" in settings
    results = run(root, *settings, **names)
    assert results["num_errors"] == results["num_warnings"] == 0
    assert results["splits"]["train"]["classes"]["wall"]["pixels"] == 3 * 6


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_more_colours_than_classes_can_be(root, suffix, capsys):
    """As soft edges have, or a JPEG; no more of them are kept than can be of use."""
    for seed in range(2):
        write_example(root, "train", f"{seed}", seed)
        pixels = cv2.resize(COLORS[noise(seed, (5, 5), 9)], (60, 40), interpolation=cv2.INTER_CUBIC)
        image = cv2.resize(noise(seed), (60, 40))
        write(root / "images" / "train" / f"{seed}.jpg", cv2.imencode(".jpg", image)[1].tobytes())
        mask = cv2.imencode(suffix, pixels)[1].tobytes()
        write(root / "labels" / "train" / f"{seed}.png", mask)
    found = run(root)["splits"]["train"]["mask_colors"]
    assert found["too_many"] and len(found["colors"]) == 256
    printed = capsys.readouterr().out
    assert "in more than 256 colours; these are not masks of classes, or were saved as" in printed
    assert "and 226 more in audit.json" in printed


# Class weights


@pytest.mark.parametrize(("num_bad", "title"), [(0, ", of train:"), (2, "(3 of 5 masks, the")])
def test_class_weights_say_of_how_many_masks_they_are(root, num_bad, title, capsys):
    for seed, name in enumerate("gh"):
        write_example(root, "train", name, seed + 10)
        if num_bad:
            paint(root, "train", name, np.zeros((6, 8), int))
    weights = run(root)["class_weights"]
    assert (weights["masks_read"], weights["masks"]) == (5 - num_bad, 5)
    printed = capsys.readouterr().out
    assert len(re.findall(r"--config\.loss\.class_weights", printed)) == 2
    assert printed.count(title) == 2


@pytest.mark.parametrize("readable", [0, 1])
def test_no_class_weights_where_most_masks_could_not_be_read(root, readable, capsys):
    for name in "abc"[readable:]:
        paint(root, "train", name, np.zeros((6, 8), int))
    assert not {"median_frequency", "enet"} & run(root)["class_weights"].keys()
    printed = capsys.readouterr().out
    assert "class_weights=" not in printed
    text = f"no class weights: {readable} of 3 masks of train could be read, at least half are need"
    assert text in printed


def test_results_are_json_and_their_summary_needs_nothing_else(painted, capsys):
    root, _ = painted
    results = run(root)
    printed = capsys.readouterr().out
    assert "\n".join(report.summary(json.loads(json.dumps(results)))) in printed
