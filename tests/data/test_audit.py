"""The audit of data sets; of bad files: test_bad_files.py."""

import json
import re

import needs
import numpy as np
import pytest
from audited import NAMES, folder_spec, prepare, run, settings
from PIL import Image
from raw_data import REAL_CAMVID, noise, write_example
from small import make_config

from contrastseg_jax.data.audit import examples, report
from contrastseg_jax.data.audit.statistics import (
    audit_split,
    sheet_examples,
)
from contrastseg_jax.data.class_weights import (
    ClassCounts,
    enet_weights,
    median_frequency_weights,
)
from contrastseg_jax.data.dataset import label_map, open_split, raw_splits
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError
from contrastseg_jax.setup.preflight import check

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
        report.audit_run(make_config(*settings(root)), root.parent / "other", "test")


def test_records_without_files_are_audited_and_not_prepared(tmp_path):
    config = make_config(f"data.prepared_dir={tmp_path / 'prepared'}")
    report.audit_run(config, tmp_path / "run", None)
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
    mask.save(root / "labels" / "train" / "a.png")
    results = run(root)
    assert results["findings"] == []
    assert results["splits"]["train"]["mask_formats"] == {"PNG L": 2, "PNG P": 1}


def test_the_summary_is_printed_even_if_the_sheet_cannot_be_drawn(
    root, monkeypatch, capsys, caplog
):
    def fail(*_):
        raise TypeError("no such letter")

    monkeypatch.setattr("contrastseg_jax.data.pictures.save_sheet", fail)
    run(root)
    assert "errors: none" in capsys.readouterr().out
    assert "overlays.png: TypeError: no such letter" in caplog.text


# The data set as a whole


def test_an_empty_split_is_an_error(root):
    for path in (*(root / "images" / "val").iterdir(), *(root / "labels" / "val").iterdir()):
        path.unlink()
    (found,) = run(root)["findings"]
    assert found["message"] == "split 'val': has no examples, training needs some"
    with pytest.raises(InputError, match="no split 'val', only train"):
        open_split(folder_spec(root), "val")


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


def test_what_is_worth_a_warning_is_logged_when_the_data_are_prepared(root, caplog):
    """A mask of 0 and 255 is the usual export of two classes; 255 is none here."""
    for name in "abc":
        mask = np.array([[0] * 8, [255] * 8] * 3, np.uint8)
        write_example(root, "train", name, ord(name), mask=mask)
    prepare(root)
    assert [record.getMessage() for record in caplog.records] == [
        "split 'train': has no pixel of road, tree; mask values that occur and mean no class: [255]"
    ]


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
        examples.check_encoded(
            examples.EncodedExample(
                "x", "i", "m", encode_png(noise(0, (10, 10, 3))), encode_png(m)
            ),
            examples.RawFormat(label_map(folder_spec(root))),
        )
        for m in masks
    ]
    raw = examples.RawSplit([lambda c=c: c for c in made])
    found = audit_split(raw, label_map(folder_spec(root)), "train")
    counts = ClassCounts(found.class_pixels[:4], found.class_image_pixels[:4])
    np.testing.assert_allclose(median_frequency_weights(counts), [0.9, 9.0, 1.0, 1.0])
    expected = 1 / np.log([1.02 + 0.5, 1.02 + 0.05, 1.02 + 0.45, 1.02])
    np.testing.assert_allclose(enet_weights(counts), expected)
    nothing = ClassCounts(np.zeros(3, np.int64), np.zeros(3, np.int64))
    assert np.isfinite(enet_weights(nothing)).all()
    np.testing.assert_array_equal(median_frequency_weights(nothing), 1)


def test_printed_weights_can_be_pasted(root, capsys):
    run(root)
    pasted = re.findall(r'--config\.(loss\.class_weights)="(.*)"', capsys.readouterr().out)
    assert len(pasted) == 2
    for path, value in pasted:
        config = make_config(*settings(root), f"{path}={value}")
        check(config, mode="audit")
        assert len(config.loss.class_weights) == 3


# The sheet of examples


def test_examples_of_the_sheet_are_spread_over_their_split(tmp_path):
    spec = DatasetSpec(name="synthetic", prepared_dir=str(tmp_path), num_examples=(41, 3))
    splits, classes = raw_splits(spec), label_map(spec)
    audits = {name: audit_split(raw, classes, name) for name, raw in splits.items()}
    shown = sheet_examples(splits, audits, classes, 10)
    names = [example.name for example in shown]
    assert names == [f"train {i:06d}" for i in (0, 10, 20, 30, 40)] + [
        f"val {i:06d}" for i in range(3)
    ]


def test_sheet_leaves_out_what_does_not_fit(root):
    (root / "images" / "train" / "a.jpg").write_bytes(b"")
    write_example(root, "train", "b", 1, mask=np.zeros((9, 9), np.uint8))
    spec = folder_spec(root)
    splits, classes = raw_splits(spec), label_map(spec)
    audits = {name: audit_split(raw, classes, name) for name, raw in splits.items()}
    shown = sheet_examples(splits, audits, classes, 20)
    assert [example.name for example in shown] == ["train c", "val d", "val e"]


def test_reading_runs_ahead_by_a_bounded_number():
    started = []
    results = examples.in_parallel(lambda i: i, (started.append(i) or i for i in range(500)), "x")
    for index, result in enumerate(results):
        assert result == index and len(started) <= index + examples.MAX_PENDING + 1


# CamVid


@pytest.mark.slow
@needs.camvid
def test_shares_of_the_real_camvid(tmp_path):
    config = make_config("data.name=camvid", f"data.root={REAL_CAMVID}")
    report.audit_run(config, tmp_path, "train")
    results = json.loads((tmp_path / "audit" / "audit.json").read_text())
    shares = [100 * found["share"] for found in results["splits"]["train"]["classes"].values()]
    # To a tenth: 16.8 23.3 1.0 31.7 4.5 9.7 1.2 1.1 5.9 0.6 0.3, void 3.9.
    expected = [16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95]
    np.testing.assert_allclose(shares, expected, atol=0.005)
