"""Masks in colours, where class ids are expected: what the audit and preparing say of them."""

import json
import re

import cv2
import numpy as np
import pytest
from audited import prepare, run
from PIL import Image
from raw_data import noise, write, write_example

from contrastseg_jax.data.audit import report
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
    assert "5 masks with colour channels" in printed and "in 8 colours; write the class" in printed
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


def test_grey_in_three_channels_has_its_own_remedy(root, capsys):
    for name in "ab":
        paint(root, "train", name, noise(1, (6, 8), 3), [[i] * 3 for i in range(3)])
    run(root)
    assert "all are grey, so save one channel of them alone" in capsys.readouterr().out


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
