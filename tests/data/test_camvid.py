"""CamVid as SegNet published it, and as its authors did."""

from pathlib import Path

import needs
import numpy as np
import pytest
from raw_data import (
    REAL_CAMVID,
    classes_of,
    names,
    problems,
    write,
    write_image,
    write_mask,
    write_pair,
)

from contrastseg_jax.data import dataset
from contrastseg_jax.data.builders import camvid
from contrastseg_jax.data.dataset import label_map, open_split, open_splits, raw_splits
from contrastseg_jax.data.images import decode_image, decode_mask, encode_png
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL


def write_camvid(root, split, stems):
    for seed, stem in enumerate(stems):
        image, mask = root / split / f"{stem}.png", root / f"{split}annot" / f"{stem}.png"
        write_pair(image, mask, seed=seed, num_values=12)


@pytest.fixture
def camvid_spec(tmp_path):
    root = tmp_path / "camvid"
    write_camvid(root, "train", ["0001", "0002"])
    write_camvid(root, "val", ["0016"])
    return DatasetSpec(name="camvid", root=str(root), prepared_dir=str(tmp_path / "prepared"))


def test_camvid_by_folders(camvid_spec):
    assert names(open_split(camvid_spec, "train")) == ["0001", "0002"]
    assert names(open_split(camvid_spec, "val")) == ["0016"]
    with pytest.raises(InputError, match="only train, val"):
        open_split(camvid_spec, "test")


@pytest.mark.parametrize("prefix", ["", camvid.HISTORICAL_PREFIX])
def test_camvid_by_lists(camvid_spec, prefix):
    root = Path(camvid_spec.root)
    (root / "train.txt").write_text(f"{prefix}train/0002.png {prefix}trainannot/0002.png\n\n")
    records = open_split(camvid_spec, "train")
    assert names(records) == ["0002"]
    assert records[0]["label"] == (root / "trainannot" / "0002.png").read_bytes()
    assert names(open_split(camvid_spec, "val")) == ["0016"]


def test_camvid_lists_may_have_a_mark_first_and_spaces_in_names(camvid_spec):
    root = Path(camvid_spec.root)
    write_pair(root / "train" / "a b 1.PNG", root / "trainannot" / "a b 1.png")
    text = "train/a b 1.PNG \ttrainannot/a b 1.png\ntrain/0002.png trainannot/0002.png\n"
    (root / "train.txt").write_text(text, encoding="utf-8-sig")
    assert names(open_split(camvid_spec, "train")) == ["a b 1", "0002"]


def test_camvid_void_is_ignored(camvid_spec):
    mask = decode_mask(open_split(camvid_spec, "train")[0]["label"], "a")
    expected = np.where(mask == 11, IGNORE_LABEL, mask)
    np.testing.assert_array_equal(to_train_ids(mask, label_map(camvid_spec), "a"), expected)


def test_camvid_list_faults_are_named(camvid_spec):
    root = Path(camvid_spec.root)
    listing = root / "train.txt"
    listing.write_text("train/0001.png trainannot/0001.png\ntrain/0002.png\n")
    (root / "val.txt").write_text("val/0016.png\n")
    text = problems(camvid_spec)
    assert f'{listing}, line 2: "image mask" is expected, found "train/0002.png"' in text
    assert f'{root}/val.txt, line 1: "image mask" is expected' in text
    (root / "val.txt").write_bytes(b"val/caf\xe9.png valannot/caf\xe9.png")
    assert f"{root}/val.txt: must be text in UTF-8, byte 7 is not" in problems(camvid_spec)
    (root / "val.txt").unlink()
    listing.write_text("train/0003.png trainannot/0001.png\ntrain/0002.png trainannot/0009.png\n")
    text = problems(camvid_spec)
    assert f"{root}/train/0003.png does not exist" in text
    assert f"{root}/trainannot/0009.png does not exist" in text


@pytest.mark.slow
@needs.camvid
def test_the_real_camvid(tmp_path):
    spec = DatasetSpec(name="camvid", root=str(REAL_CAMVID), prepared_dir=str(tmp_path))
    train, val = open_split(spec, "train"), open_split(spec, "val")
    assert (len(train), len(val)) == (367, 101)
    assert names(train)[0] == "0001TP_006690"
    assert decode_image(val[0]["image"], "a").shape == (360, 480, 3)
    label = to_train_ids(decode_mask(val[0]["label"], "a"), label_map(spec), "a")
    assert set(np.unique(label)) <= {*range(11), IGNORE_LABEL}


def write_original_camvid(raw, *stems, colors=((128, 128, 128), (0, 0, 192), (0, 0, 0))):
    for stem in stems:
        write_image(raw / "701_StillsRaw_full" / f"{stem}.png")
        mask = np.array([colors, colors], np.uint8)
        write(raw / "LabeledApproved_full" / f"{stem}_L.png", encode_png(mask))


def test_the_original_camvid_becomes_segnets_classes_and_splits(spec_of, raw):
    write_original_camvid(
        *(raw, "0001TP_006690", "0001TP_008520", "0001TP_008550", "0006R0_f00930", "0016E5_00390"),
        *("0016E5_07959", "0016E5_08159", "0016E5_08250", "Seq05VD_f00000"),
    )
    spec = spec_of("camvid")
    train, val, test = (open_split(spec, split) for split in ("train", "val", "test"))
    assert names(train) == [
        *("0001TP_006690", "0001TP_008520", "0006R0_f00930", "0016E5_00390", "0016E5_08250")
    ]
    assert names(val) == ["0016E5_07959", "0016E5_08159"]
    assert names(test) == ["0001TP_008550", "Seq05VD_f00000"]
    assert classes_of(spec, train[0]) == [[0, 4, 255]] * 2
    assert decode_mask(train[0]["label"], "a").tolist() == [[0, 4, camvid.VOID]] * 2


@pytest.mark.parametrize("line", ["Seq05VD_f00000", "test/Seq05VD_f00000.png testannot/x.png"])
def test_lists_decide_the_original_camvids_splits(line, spec_of, raw):
    write_original_camvid(raw, "Seq05VD_f00000", "elsewhere")
    (raw / "train.txt").write_text(f"{line}\n")
    (raw / "val.txt").write_text("elsewhere.png\n")
    assert names(open_split(spec_of("camvid"), "train")) == ["Seq05VD_f00000"]
    assert names(open_split(spec_of("camvid"), "val")) == ["elsewhere"]
    for name in ("train", "val"):
        (raw / f"{name}.txt").unlink()
    with pytest.raises(InputError, match=r"elsewhere\.png: not a frame of CamVid .*train\.txt"):
        open_split(spec_of("camvid"), "train")


def test_faults_of_the_original_camvids_test_frames_stop_no_training(spec_of, raw):
    write_original_camvid(raw, "0001TP_006690", "0016E5_07959", "Seq05VD_f00000")
    for suffix in ("jpg", "tif"):  # two images of one frame
        write_image(raw / "701_StillsRaw_full" / f"Seq05VD_f00000.{suffix}")
    assert len(open_splits(spec_of("camvid"), ("train", "val"))) == 2
    with pytest.raises(InputError, match=r"2 problems(.*\n)+.*same name without suffix as"):
        open_split(spec_of("camvid"), "test")


def test_frames_of_no_split_stop_the_preparing_and_not_the_audit(spec_of, raw):
    write_original_camvid(raw, "0001TP_006690", "0016E5_07959", "stray", "other")
    splits = raw_splits(spec_of("camvid"))
    assert {split: len(found.checks) for split, found in splits.items()} == {"train": 1, "val": 1}
    assert [Path(found.file).stem for found in splits["train"].findings] == ["other", "stray"]
    assert splits["val"].findings == []
    with pytest.raises(InputError, match="2 problems"):
        open_split(spec_of("camvid"), "train")


def test_the_32_colors_are_each_of_one_class():
    assert list(camvid.COLORS) == [*camvid.CLASSES, "Void"]
    assert list(camvid.COLORS).index("Void") == camvid.VOID
    colors = [color for group in camvid.COLORS.values() for color in group.values()]
    assert len(colors) == len(set(colors)) == 32
    mask = camvid.read_color_mask(encode_png(np.array([colors], np.uint8)), "a")
    names = list(camvid.COLORS)
    expected = [names.index(name) for name, group in camvid.COLORS.items() for _ in group]
    assert mask.tolist() == [expected]


def test_changed_colors_prepare_again(spec_of, raw, monkeypatch):
    write_original_camvid(raw, "0001TP_006690")
    assert classes_of(spec_of("camvid"), open_split(spec_of("camvid"), "train")[0])[0][0] == 0
    sky, building = camvid.COLORS["Sky"], camvid.COLORS["Building"]
    monkeypatch.setattr(camvid, "COLORS", {**camvid.COLORS, "Sky": building, "Building": sky})
    assert classes_of(spec_of("camvid"), open_split(spec_of("camvid"), "train")[0])[0][0] == 1


def test_a_few_unknown_colors_are_void_and_many_an_error():
    """The published Seq05VD_f02610_L.png has 175 of them in 691,200."""
    mask = np.full((720, 960, 3), 128, np.uint8)
    mask[0, :175] = 26
    values = camvid.read_color_mask(encode_png(mask), "a.png")
    assert np.bincount(values.ravel()).tolist() == [691_200 - 175, *[0] * 10, 175]
    mask[:10] = 26
    with pytest.raises(InputError, match=r"a\.png: 9600 of 691200 pixels have a colour of none"):
        camvid.read_color_mask(encode_png(mask), "a.png")


def test_masks_are_never_taken_for_images(spec_of, raw):
    """D37: the original's loader takes every folder below `test` for images, labels too."""
    for folder in ("train", "test"):
        write_image(raw / folder / "0001TP_008550.png")
        write_mask(raw / f"{folder}annot" / "0001TP_008550.png", [[0, 3, 11]] * 2)
    (record,) = open_split(spec_of("camvid"), "test")
    assert record["image"] == (raw / "test" / "0001TP_008550.png").read_bytes()
    assert decode_image(record["image"], "a").shape == (2, 3, 3)


@needs.camvid
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_rule_of_segnets_split_agrees_with_its_lists(split):
    lines = (REAL_CAMVID / f"{split}.txt").read_text().splitlines()
    assert len(lines) == dataset.SPLIT_SIZES["camvid"][split]
    assert {camvid.split_of(Path(line.split()[0]).stem) for line in lines} == {split}
