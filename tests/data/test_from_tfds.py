"""Any data set of TFDS with an image and a mask."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from raw_data import classes_of, names

from contrastseg_jax.data.dataset import open_split, open_splits, raw_splits
from contrastseg_jax.data.images import decode_image, encode_jpeg, encode_png
from contrastseg_jax.errors import InputError


class TinyMasks(tfds.core.GeneratorBasedBuilder):
    """What a data set of TFDS may look like."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, num_examples):
        for i in range(num_examples):
            image = encode_jpeg(np.full((2, 3, 3), 50 * i, np.uint8), 95)
            mask = cv2.imencode(".png", np.full((2, 3), 1 + i % 3, np.uint8))[1].tobytes()
            yield i, {"image": image, "segmentation_mask": mask, "file_name": f"{i}.jpg"}


@pytest.fixture
def tfds_spec(spec_of):
    return lambda **changes: spec_of(
        "tfds",
        **{
            "dataset": "tiny_masks",
            "label_feature": "segmentation_mask",
            "train_split": "train[:75%]",
            "val_split": "test",
            "class_names": ("pet", "background", "border"),
            "ignore_values": (0, 255),
            **changes,
        },
    )


def test_a_data_set_of_tfds_by_its_name(tfds_spec):
    spec = tfds_spec()
    train, val = open_split(spec, "train"), open_split(spec, "val")
    assert (names(train), len(val)) == (["000000", "000001", "000002"], 2)
    found = sorted(classes_of(spec, record)[0][0] for record in val)
    assert found == [0, 1]
    assert decode_image(train[0]["image"], "a").shape == (2, 3, 3)
    assert train[0]["image"].startswith(b"\xff\xd8")  # as it was, not decoded and encoded again


def test_a_prepared_data_set_of_tfds_is_used_as_it_is(tfds_spec, raw):
    tfds.builder("tiny_masks", data_dir=raw).download_and_prepare(file_format="array_record")
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*") if path.is_file()}
    assert len(open_split(tfds_spec(train_split="train"), "train")) == 4
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*") if path.is_file()} == before


def test_images_and_masks_of_tfds_are_checked_as_files_are(tfds_spec, monkeypatch):
    def generate(self, num_examples):
        for i, example in whole(self, num_examples):
            if i == 0:
                example["image"] = example["image"][:-30]
            if i == 1:
                example["segmentation_mask"] = encode_png(np.ones((1, 3), np.uint8))
            yield i, example

    whole = TinyMasks._generate_examples
    monkeypatch.setattr(TinyMasks, "_generate_examples", generate)
    splits = raw_splits(tfds_spec(train_split="train"))
    found = [finding for check in splits["train"].checks for finding in check().findings]
    assert sorted(finding.kind for finding in found) == ["size", "unreadable"]
    with pytest.raises(InputError, match="4 problems") as error:
        open_splits(tfds_spec(train_split="train"), ("train", "val"))
    for finding in found:
        assert finding.message in str(error.value)
        assert finding.message.startswith("tiny_masks/1.0.0 train, example 00000")


def test_a_changed_data_set_of_tfds_is_prepared_again(tfds_spec, raw, monkeypatch):
    spec = tfds_spec(train_split="train")
    before = open_split(spec, "train")[0]["image"]
    assert open_split(spec, "train")[0]["image"] == before
    folder = Path(spec.prepared_dir) / "from_tfds"
    assert len(list(folder.glob("*/1.0.0"))) == 1

    shutil.rmtree(raw)
    monkeypatch.setattr("test_from_tfds.encode_jpeg", lambda pixels, _: encode_png(pixels))
    assert open_split(spec, "train")[0]["image"] != before
    assert len(list(folder.glob("*/1.0.0"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "no_such_data"}, r"data\.tfds\.dataset = 'no_such_data': .*not found"),
        (
            {"label_feature": "file_name"},
            r"data\.tfds\.label_feature = 'file_name': .* pictures, image, segmentation_mask",
        ),
        ({"val_split": "valid"}, "tiny_masks/1.0.0 of TFDS, valid: Unknown split 'valid'"),
        ({"class_names": ("pet",)}, r"test, example 00000\d, mask: unknown mask value\(s\)"),
    ],
)
def test_what_tfds_does_not_have_is_an_error_that_names_the_setting(changes, message, tfds_spec):
    with pytest.raises(InputError, match=message):
        open_splits(tfds_spec(**changes), ("train", "val"))
    prepared = Path(tfds_spec().prepared_dir)
    assert {path.name for path in prepared.rglob("*") if path.is_file()} <= {".lock"}


def spoil(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in a record
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "*train*",
            Path.unlink,
            r"3 problems .*\n.*train\[:75%\], example 000000: cannot be re",
        ),
        ("*train*", spoil, r"1 problem .*\n.*cannot be read, what TFDS has prepared is damaged"),
        (
            "*test*",
            lambda path: path.write_bytes(b""),
            r"2 problems .*\n.*test, example 000000: can",
        ),
        ("dataset_info.json", lambda path: path.write_bytes(b"{"), "what TFDS has of it in .*raw"),
        ("*", Path.unlink, "lacks its json files; delete that folder"),
    ],
)
def test_damage_in_what_tfds_has_is_an_error_and_left_as_it_is(
    name, damage, message, tfds_spec, raw
):
    tfds.builder("tiny_masks", data_dir=raw).download_and_prepare(file_format="array_record")
    for path in raw.rglob("*/1.0.0/" + name):
        damage(path)
    left = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        open_splits(tfds_spec(), ("train", "val"))
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == left
