"""Splits that nobody asked for, and files that lie elsewhere than a layout has them."""

import re

import numpy as np
import pytest
from audited import folder_spec, prepare, run
from raw_data import names, write, write_example, write_image, write_mask, write_pair

from contrastseg_jax.data.audit import report
from contrastseg_jax.data.dataset import open_split, open_splits
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError

# Splits nobody asked for


@pytest.mark.parametrize("masks", ["absent", "an empty folder", "a readme"])
def test_a_test_split_without_masks_stops_no_training(root, masks, caplog, capsys):
    """As contests publish them: an error when the split is asked for, a warning in the audit."""
    for name in "xy":
        write_image(root / "images" / "test" / f"{name}.jpg")
    if masks != "absent":
        (root / "labels" / "test").mkdir()
    if masks == "a readme":
        write(root / "labels" / "test" / "README.txt", b"secret")
    (found,) = run(root)["findings"]
    assert (found["kind"], found["is_error"]) == ("no_masks", False)
    assert found["file"] == str(root / "labels" / "test")
    assert "images without masks can be predicted, not trained on or scored" in found["message"]
    assert "images without any mask: 1" in capsys.readouterr().out
    assert names(prepare(root)) == ["a", "b", "c"] and caplog.records == []
    with pytest.raises(InputError) as error:
        open_split(folder_spec(root), "test")
    assert found["message"] in str(error.value)


def test_a_test_split_that_is_trained_on_needs_masks(root):
    write_image(root / "images" / "test" / "x.jpg")
    splits = "data.train_splits=('train', 'test')"
    (found,) = run(root, splits)["findings"]
    assert (found["kind"], found["is_error"]) == ("no_masks", True)
    write_example(root, "test", "x", 7)
    assert run(root, splits)["num_errors"] == 0
    (root / "images" / "test" / "x.jpg").unlink()
    (root / "labels" / "test" / "x.png").unlink()
    (found,) = run(root, splits)["findings"]
    assert found["message"] == "split 'test': has no examples, training needs some"


def test_faults_of_a_split_count_when_it_is_asked_for_alone(root):
    write_example(root, "test", "t", 7)
    write(root / "images" / "test" / "t.jpg", b"damaged")
    assert len(prepare(root)) == 3
    with pytest.raises(InputError, match=r"1 problem .*\n.*t\.jpg: unreadable"):
        open_split(folder_spec(root), "test")
    with pytest.raises(InputError, match=r"1 problem .*\n.*t\.jpg: unreadable"):
        open_splits(folder_spec(root), ("val", "test"))


def test_the_audit_says_which_errors_training_does_not_meet(root):
    from test_audit import make_config, settings

    write_example(root, "test", "t", 7)
    write(root / "images" / "test" / "t.jpg", b"damaged")
    config, workdir = make_config(*settings(root)), root.parent / "run"
    message = "1 error in the data; evaluating test would fail, which training does not read"
    with pytest.raises(InputError, match=message):
        report.audit_run(config, workdir, None)
    write(root / "images" / "val" / "d.jpg", b"damaged")
    with pytest.raises(InputError, match="2 errors in the data; training would go wrong"):
        report.audit_run(config, workdir, None)


def test_what_changes_in_a_split_prepares_that_split_alone(root):
    def prepared():
        return {path.name.split("_")[0]: path for path in home.iterdir() if path.is_dir()}

    home = root.parent / "prepared" / "folder"
    prepare(root)
    before = prepared()
    assert set(before) == {"train", "val"}
    write_example(root, "test", "t", 7)
    prepare(root)
    assert prepared() == before
    assert names(open_split(folder_spec(root), "test")) == ["t"]
    assert prepared().keys() - before == {"test"}
    write_example(root, "val", "f", 8)
    prepare(root)
    assert len([path for path in home.iterdir() if path.is_dir()]) == 4


def test_an_image_in_train_and_val_is_a_warning_also_if_one_of_them_changed(root, caplog):
    prepare(root)
    data = (root / "images" / "train" / "b.jpg").read_bytes()
    write(root / "images" / "val" / "e.jpg", data)
    prepare(root)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"val/e\.jpg: in 'val', is the same file as .*train/b\.jpg in 'train'", message
    )


def of_cityscapes(raw, split, frame):
    name = f"{split}/a/{frame}"
    mask = raw / "gtFine" / f"{name}_gtFine_labelIds.png"
    return raw / "leftImg8bit" / f"{name}_leftImg8bit.png", mask


def of_camvid(raw, split, frame):
    return raw / split / f"{frame}.png", raw / f"{split}annot" / f"{frame}.png"


def of_listed_camvid(raw, split, frame):
    write(raw / f"{split}.txt", f"{split}/{frame}.png {split}annot/{frame}.png".encode())
    return of_camvid(raw, split, frame)


def of_original_camvid(raw, _, frame):
    return (
        raw / "701_StillsRaw_full" / f"{frame}.png",
        raw / "LabeledApproved_full" / f"{frame}_L.png",
    )


@pytest.mark.parametrize(
    ("name", "files_of"),
    [
        ("cityscapes", of_cityscapes),
        ("camvid", of_camvid),
        ("camvid", of_listed_camvid),
        ("camvid", of_original_camvid),
    ],
)
def test_other_data_sets_may_lack_the_masks_of_test_too(name, files_of, spec_of, raw):
    frames = {"train": "0001TP_006690", "val": "0016E5_07959", "test": "Seq05VD_f00000"}
    for seed, (split, frame) in enumerate(frames.items()):
        image, mask = files_of(raw, split, frame)
        write_image(image, seed=seed)
        if split != "test":  # 7 is a class of both, grey the sky of the original
            is_colored = files_of is of_original_camvid
            write_mask(mask, np.full((2, 3, 3), 128) if is_colored else np.full((2, 3), 7))
    assert [len(source) for source in open_splits(spec_of(name), ("train", "val"))] == [1, 1]
    with pytest.raises(InputError, match=r"1 problem in the data of .*\n.*(for the|without) mask"):
        open_split(spec_of(name), "test")


# Files that lie elsewhere


def no_data(root):
    """The audit's one finding and what training says must be the same."""
    (found,) = run(root)["findings"]
    with pytest.raises(InputError) as error:
        prepare(root)
    assert found["kind"] in ("no_data", "no_split", "no_masks")
    return found["message"], str(error.value)


def test_images_beside_the_folders_of_splits_are_counted_and_what_is_advised_works(raw):
    for i in range(12):
        name = f"it's {i:02d}"
        write_pair(raw / "images" / f"{name}.jpg", raw / "labels" / f"{name}.png", seed=i)
    for message in no_data(raw):
        for side, number in (("images", "12 images"), ("labels", "12 masks")):
            hint = (
                f"{number} lie in {raw}/{side} itself; they must lie in {side}/train and {side}/val"
            )
            assert hint in message
        advice = message.split("Give the folder")[0]
        (drawing,) = re.findall(r"--config\.(data\.val_fraction=\S+)$", advice, re.MULTILINE)
        assert "--config.data.root=FOLDER" in message
    with pytest.raises(InputError, match="taken for one sequence") as error:
        prepare(raw, drawing)
    (single,) = re.findall(r"--config\.(data\.val_unit=\S+)$", str(error.value), re.MULTILINE)
    assert run(raw, drawing, single)["num_errors"] == 0
    train, val = open_splits(folder_spec(raw, drawing, single), ("train", "val"))
    assert (len(train), len(val)) == (11, 1)


@pytest.mark.parametrize(
    ("layout", "hints"),
    [
        (
            ("images/training", "labels/training", "images/validation", "labels/validation"),
            ("images/training; did you mean images/train?", "labels/validation; did you mean la"),
        ),
        (
            ("images/Train", "labels/Train", "images/val2017", "labels/val2017"),
            ("images/Train; did you mean images/train?", "val2017; did you mean images/val?"),
        ),
        (
            ("train/images", "train/masks", "valid/images", "valid/masks"),
            ("train/images; did you mean images/train?", "valid/masks; did you mean labels/val?"),
        ),
        (
            ("JPEGImages", "SegmentationClass", "JPEGImages", "SegmentationClass"),
            ("JPEGImages itself; they must lie in images/train and images/val",),
        ),
        (("", "masks", "", "masks"), ("{raw} itself; they must lie in images/train and images/",)),
        (("train", "masks", "val", "masks"), ("{raw}/train; images must lie in images/train",)),
    ],
)
def test_folders_of_other_names_are_asked_about(layout, hints, raw):
    for side, suffix, path in zip((0, 1, 0, 1), (".jpg", ".png") * 2, layout, strict=True):
        for i in range(2):
            write_image(raw / path / f"{i}{suffix}", seed=side)
    for message in no_data(raw):
        for hint in hints:
            assert hint.format(raw=raw) in message


def test_masks_of_another_name_are_asked_about(root):
    (root / "labels").rename(root / "masks")
    with pytest.raises(InputError) as error:
        prepare(root)
    for split, number in (("train", 3), ("val", 2)):
        hint = f"{number} masks lie in {root}/masks/{split}; did you mean labels/{split}?"
        assert hint in str(error.value)


def test_an_absent_split_names_what_may_be_meant(root):
    (root / "images" / "val").rename(root / "images" / "validation")
    (root / "labels" / "val").rename(root / "labels" / "validation")
    for message in no_data(root):
        assert f"2 images lie in {root}/images/validation; did you mean images/val?" in message
        assert "did you mean images/train" not in message


@pytest.mark.parametrize(
    ("name", "meant"), [("ade20k", "images/training"), ("coco_stuff164k", "images/train2017")]
)
def test_published_data_sets_ask_about_the_names_of_other_layouts(name, meant, spec_of, raw):
    write_image(raw / "images" / "train" / "a.jpg")
    with pytest.raises(InputError, match=rf"images/train; did you mean {meant}\?"):
        open_split(spec_of(name), "train")


def test_a_folder_without_images_has_no_hints(tmp_path):
    spec = DatasetSpec(name="folder", root=str(tmp_path), class_names=("a",))
    with pytest.raises(InputError) as error:
        open_split(spec, "train")
    assert " lie in" not in str(error.value).split("Give the folder")[0]
