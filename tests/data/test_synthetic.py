"""The generated data set."""

import numpy as np
import pytest

from contrastseg_jax.data.builders import synthetic
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.images import decode_image, decode_mask
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL


def test_synthetic_has_the_size_classes_and_length_asked_for(tmp_path):
    spec = DatasetSpec(
        name="synthetic",
        prepared_dir=str(tmp_path),
        image_size=(40, 56),
        num_classes=3,
        num_examples=(5, 2),
    )
    splits = {split: list(open_split(spec, split)) for split in ("train", "val")}
    assert [len(records) for records in splits.values()] == [5, 2]
    images = [record["image"] for records in splits.values() for record in records]
    assert len(set(images)) == 7
    found = label_map(spec)
    seen = set()
    for records in splits.values():
        for record in records:
            assert decode_image(record["image"], "a").shape == (40, 56, 3)
            seen |= set(np.unique(to_train_ids(decode_mask(record["label"], "a"), found, "a")))
    assert seen == {0, 1, 2, IGNORE_LABEL}


def test_synthetic_scenes_are_the_same_every_time():
    for drawn, again in zip(
        *(synthetic.draw_scene(np.random.default_rng(7), (30, 40), 4) for _ in range(2)),
        strict=True,
    ):
        np.testing.assert_array_equal(drawn, again)


def test_synthetic_without_val_has_only_train(tmp_path):
    spec = DatasetSpec(name="synthetic", prepared_dir=str(tmp_path), num_examples=(2, 0))
    with pytest.raises(InputError, match="no split 'val', only train"):
        open_split(spec, "val")
