"""The paper's data sets on small folders of the layout in which each is downloaded."""

import io
import logging

import numpy as np
import pytest
from PIL import Image
from raw_data import classes_of, names, write, write_image, write_mask
from scipy.io import savemat

from contrastseg_jax.data import dataset
from contrastseg_jax.data.audit.statistics import audit_split, dataset_findings
from contrastseg_jax.data.builders import coco_stuff, pascal_context
from contrastseg_jax.data.dataset import label_map, open_split, open_splits, raw_splits
from contrastseg_jax.data.images import decode_mask
from contrastseg_jax.data.labels import to_mask_values, to_train_ids
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

BENCHMARKS = {
    "cityscapes": 19,
    "pascal_context": 59,
    "coco_stuff10k": 171,
    "coco_stuff164k": 171,
    "camvid": 11,
    "ade20k": 150,
}


def palette_png(values):
    """Such as people make of masks to look at them."""
    image, file = Image.fromarray(np.array(values, np.uint8), "P"), io.BytesIO()
    image.putpalette([7 * i % 256 for i in range(768)])
    image.save(file, "PNG")
    return file.getvalue()


def mat(**variables):
    file = io.BytesIO()
    savemat(file, variables, do_compression=True)
    return file.getvalue()


def named(spec, value):
    """The class of a mask value by name, or None."""
    found = label_map(spec)
    class_id = found.train_ids[value]
    return None if class_id == IGNORE_LABEL else found.names[class_id]


# All of them


@pytest.mark.parametrize(
    ("name", "num_classes"), [*BENCHMARKS.items(), ("landcover", 8), ("synthetic", 5)]
)
def test_label_maps_have_the_published_number_of_classes(name, num_classes):
    found = label_map(DatasetSpec(name=name))
    assert len(found.names) == len(set(found.names)) == num_classes
    assert len(found.palette) == len(set(found.palette)) == num_classes
    assert set(found.train_ids.values()) == {*range(num_classes), IGNORE_LABEL}
    assert all(0 <= value <= 255 for value in found.train_ids)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_class_has_a_mask_value_that_leads_back_to_it(name):
    """D35: the original's CamVid relabelling has a value for 11 of its 12 classes."""
    found = label_map(DatasetSpec(name=name))
    label = np.array([[*range(len(found.names)), IGNORE_LABEL]], np.uint8)
    mask = to_mask_values(label, found)
    np.testing.assert_array_equal(to_train_ids(mask, found, "a"), label)


def test_known_entries_of_the_label_maps():
    for name, entries in {
        "cityscapes": {7: "road", 8: "sidewalk", 23: "sky", 26: "car", 31: "train", 33: "bicycle"},
        "pascal_context": {1: "aeroplane", 2: "bag", 37: "person", 47: "sky", 59: "wood"},
        "coco_stuff10k": {1: "person", 13: "stop sign", 92: "banner", 149: "road", 182: "wood"},
        "coco_stuff164k": {0: "person", 12: "stop sign", 91: "banner", 148: "road", 181: "wood"},
        "camvid": {0: "Sky", 3: "Road", 9: "Pedestrian", 10: "Bicyclist"},
        "ade20k": {1: "wall", 3: "sky", 13: "person", 90: "television", 150: "flag"},
    }.items():
        spec = DatasetSpec(name=name)
        assert {value: named(spec, value) for value in entries} == entries


@pytest.mark.parametrize("name", ["coco_stuff10k", "coco_stuff164k"])
def test_ids_without_a_class_are_ignored(name):
    """D34: the original makes 254 of them, which it takes for a class."""
    first = 1 if name == "coco_stuff10k" else 0
    mask = np.array([[label - 1 + first for label in coco_stuff.WITHOUT_MASKS]], np.uint8)
    label = to_train_ids(mask, label_map(DatasetSpec(name=name)), "a")
    assert set(label.ravel().tolist()) == {IGNORE_LABEL}


@pytest.mark.parametrize(
    ("name", "last", "ignored"), [("coco_stuff10k", 182, 0), ("coco_stuff164k", 181, 255)]
)
def test_the_last_class_is_the_171st_and_no_label_is_none(name, last, ignored):
    """D36: the original drops the last class and scores a class 0 of unlabelled pixels."""
    found = label_map(DatasetSpec(name=name))
    mask = np.array([[last, ignored]], np.uint8)
    label = to_train_ids(mask, found, "a")
    assert label.tolist() == [[170, IGNORE_LABEL]]
    assert to_mask_values(label[:, :1], found).tolist() == [[last]]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_data_shows_the_layout(name, spec_of, raw):
    for state in ("is not a folder", "holds none"):
        with pytest.raises(InputError, match=f"data set '{name}'.* {state}") as error:
            open_split(spec_of(name), "train")
        assert "Its layout:\n" in str(error.value)
        raw.mkdir(exist_ok=True)


def test_a_split_of_another_length_than_published_is_worth_a_warning(
    spec_of, raw, caplog, monkeypatch
):
    for i in range(3):
        write_image(raw / "images" / "validation" / f"ADE_val_{i:08d}.jpg")
        write_mask(raw / "annotations" / "validation" / f"ADE_val_{i:08d}.png", [[0, 1, 150]] * 2)
    caplog.set_level(logging.INFO, "contrastseg_jax")
    assert len(open_split(spec_of("ade20k"), "val")) == 3
    *_, warning = caplog.records  # the others are of classes that do not occur
    assert warning.levelname == "WARNING"
    assert "'ade20k', split 'val': 3 examples, not the 2000 of the publ" in warning.getMessage()
    caplog.clear()
    monkeypatch.setitem(dataset.SPLIT_SIZES, "ade20k", {"val": 3})
    open_split(spec_of("ade20k"), "val")
    assert caplog.records == []


# cityscapes


def write_cityscapes(raw, split, city, *, annotation="gtFine", values=(7, 8, 33, 4, 29, 255)):
    stem = f"{city}_000000_000019"
    write_image(raw / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
    folder = raw / annotation / split / city
    write_mask(folder / f"{stem}_{annotation}_labelIds.png", np.reshape(values, (2, 3)))
    write_image(folder / f"{stem}_{annotation}_color.png")  # beside what is read
    write_mask(folder / f"{stem}_{annotation}_instanceIds.png", [[1]])
    write(folder / f"{stem}_{annotation}_polygons.json", b"{}")


def test_cityscapes_has_a_folder_per_city_and_ids_of_its_own(spec_of, raw):
    write_cityscapes(raw, "train", "zurich")
    write_cityscapes(raw, "train", "aachen")
    write_cityscapes(raw, "val", "munster")
    spec = spec_of("cityscapes")
    records = open_split(spec, "train")
    assert names(records) == ["aachen/aachen_000000_000019", "zurich/zurich_000000_000019"]
    mask = raw / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    assert records[0]["label"] == mask.read_bytes()
    assert classes_of(spec, records[0]) == [[0, 1, 18], [255, 255, 255]]
    with pytest.raises(InputError, match="no split 'test', only train, val"):
        open_split(spec, "test")


def test_cityscapes_coarse_and_test_are_splits_of_their_own(spec_of, raw):
    write_cityscapes(raw, "train", "aachen")
    write_cityscapes(raw, "train_extra", "erlangen", annotation="gtCoarse")
    write_cityscapes(raw, "test", "berlin", values=(0, 1, 2, 3, 0, 0))
    write_mask(
        raw / "gtCoarse" / "train" / "aachen" / "aachen_000000_000019_gtCoarse_labelIds.png", [[7]]
    )
    spec = spec_of("cityscapes")
    assert classes_of(spec, open_split(spec, "train")[0]) == [[0, 1, 18], [255, 255, 255]]
    assert names(open_split(spec, "train_extra")) == ["erlangen/erlangen_000000_000019"]
    # What is published of the test split's masks is ignored altogether.
    assert np.unique(classes_of(spec, open_split(spec, "test")[0])).tolist() == [IGNORE_LABEL]


def test_cityscapes_without_the_extra_images_is_whole(spec_of, raw):
    write_cityscapes(raw, "train", "aachen")
    folder = raw / "gtCoarse" / "train_extra" / "erlangen"
    write_mask(folder / "erlangen_000000_000000_gtCoarse_labelIds.png", [[7]])
    assert len(open_split(spec_of("cityscapes"), "train")) == 1
    with pytest.raises(InputError, match="no split 'train_extra'"):
        open_split(spec_of("cityscapes"), "train_extra")


def test_the_masks_of_cityscapes_test_have_no_classes_which_is_no_error(spec_of, raw):
    """As downloaded: of `test` there are ids 0 to 3 alone."""
    for split, city in (("train", "aachen"), ("val", "munster"), ("test", "berlin")):
        values = (0, 1, 2, 3, 0, 0) if split == "test" else (7, 8, 33, 4, 29, 255)
        write_cityscapes(raw, split, city, values=values)
    classes = label_map(spec_of("cityscapes"))
    audits = {
        split: audit_split(checks, classes, split)
        for split, checks in raw_splits(spec_of("cityscapes")).items()
    }
    assert [audit.num_examples for audit in audits.values()] == [1, 1, 1]
    for needed, is_error in ((("train", "val"), False), (("train", "val", "test"), True)):
        (found,) = (f for f in dataset_findings(audits, classes, needed) if f.kind == "unlabelled")
        assert (found.file, found.is_error) == ("test", is_error)


def test_cityscapes_without_its_masks_names_their_folder(spec_of, raw):
    for split in ("train", "val", "test"):
        write_image(raw / "leftImg8bit" / split / "aachen" / "aachen_0_0_leftImg8bit.png")
    with pytest.raises(InputError, match=f"2 problems.*\n.*{raw}/gtFine/train: no such folder"):
        open_splits(spec_of("cityscapes"), ("train", "val"))


def test_an_image_whose_mask_is_missing_is_named_as_it_should_be(spec_of, raw):
    write_cityscapes(raw, "train", "aachen")
    write_cityscapes(raw, "train", "zurich")
    mask = raw / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    mask.unlink()
    with pytest.raises(InputError, match=rf"image without mask \({mask} does not exist\)"):
        open_split(spec_of("cityscapes"), "train")


# pascal_context


def test_pascal_context_by_pngs(spec_of, raw):
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        write_image(raw / "JPEGImages" / f"{name}.jpg")
        write(
            raw / "SegmentationClassContext" / f"{name}.png", palette_png([[0, 1, 2], [58, 59, 0]])
        )
    lists = raw / "ImageSets" / "SegmentationContext"
    write(lists / "train.txt", b"2008_000007\n2008_000002\n")
    write(lists / "val.txt", b"2008_000003\n\n")
    spec = spec_of("pascal_context")
    records = open_split(spec, "train")
    assert names(records) == ["2008_000007", "2008_000002"]
    assert classes_of(spec, records[0]) == [[255, 0, 1], [57, 58, 255]]
    assert names(open_split(spec, "val")) == ["2008_000003"]


def write_context_mat(raw, label_map):
    write_image(raw / "JPEGImages" / "2008_000002.jpg")
    write(raw / "trainval" / "2008_000002.mat", mat(LabelMap=np.array(label_map, np.uint16)))
    write(raw / "ImageSets" / "Main" / "train.txt", b"2008_000002\n")


def test_pascal_context_by_the_official_files(spec_of, raw):
    """Among the 459 labels, 2 is aeroplane, 397 table, 458 wood; 1 accordion, 431 unknown."""
    write_context_mat(raw, [[2, 397, 458], [1, 431, 459]])
    spec = spec_of("pascal_context")
    (record,) = open_split(spec, "train")
    found = label_map(spec).names
    expected = [[found.index(name) for name in ("aeroplane", "table", "wood")], [255] * 3]
    assert classes_of(spec, record) == expected
    values = [found.index("table") + 1]
    np.testing.assert_array_equal(decode_mask(record["label"], "a")[0, 1], values[0])


def test_pascal_context_counts_in_the_order_of_the_459_labels():
    numbers = list(pascal_context.CLASSES.values())
    assert numbers == sorted(set(numbers)) and numbers[-1] < pascal_context.NUM_LABELS
    assert list(pascal_context.CLASSES) == sorted(pascal_context.CLASSES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mat(LabelMap=np.full((2, 3), 460, np.uint16)), r"must lie in 0\.\.459, found 460\.\.460"),
        (mat(labels=np.zeros((2, 3))), "has no variable LabelMap"),
        (mat(LabelMap=np.zeros((2, 4), np.uint16)), "mask of 4x2 pixels for an image of 3x2"),
        (b"", "unreadable MATLAB file"),
    ],
)
def test_faults_of_matlab_files_are_named(data, message, spec_of, raw):
    write_context_mat(raw, [[0]])
    path = raw / "trainval" / "2008_000002.mat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        open_split(spec_of("pascal_context"), "train")


# coco_stuff


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_coco_stuff10k_by_its_lists(dtype, spec_of, raw):
    values = np.array([[0, 1, 182], [12, 13, 91]], dtype)
    for name in ("COCO_train2014_000000000077", "COCO_train2014_000000000349"):
        write_image(raw / "images" / f"{name}.jpg")
        regions = np.ones((2, 3), np.uint16)
        write(raw / "annotations" / f"{name}.mat", mat(S=values, regionMapStuff=regions))
    write(raw / "imageLists" / "train.txt", b"COCO_train2014_000000000349\n")
    write(raw / "imageLists" / "test.txt", b"COCO_train2014_000000000077\n")
    spec = spec_of("coco_stuff10k")
    (record,) = open_split(spec, "train")
    assert record["name"] == b"COCO_train2014_000000000349"
    assert classes_of(spec, record) == [[255, 0, 170], [255, 11, 255]]
    np.testing.assert_array_equal(decode_mask(record["label"], "a"), values)
    assert names(open_split(spec, "val")) == ["COCO_train2014_000000000077"]


def test_coco_stuff164k_by_its_folders(spec_of, raw):
    for split, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        write_image(raw / "images" / split / f"{name}.jpg")
        write_mask(raw / "annotations" / split / f"{name}.png", [[255, 0, 181], [11, 12, 90]])
        write_mask(raw / "annotations" / split / f"{name}_labelTrainIds.png", [[255, 0, 170]])
    spec = spec_of("coco_stuff164k")
    (record,) = open_split(spec, "train")
    assert record["name"] == b"000000000009"
    assert classes_of(spec, record) == [[255, 0, 170], [255, 11, 255]]
    assert names(open_split(spec, "val")) == ["000000000139"]


# ade20k


def test_ade20k_ignores_zero(spec_of, raw):
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(raw / "images" / split / f"{name}.jpg")
        write_mask(raw / "annotations" / split / f"{name}.png", [[0, 1, 2], [149, 150, 0]])
    spec = spec_of("ade20k")
    (record,) = open_split(spec, "train")
    assert classes_of(spec, record) == [[255, 0, 1], [148, 149, 255]]
    assert names(open_split(spec, "val")) == ["ADE_val_00000001"]
