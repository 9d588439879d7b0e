"""The data set of the package."""

import numpy as np

from contrastseg_jax.data.builders import landcover
from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.images import decode_image, decode_mask, image_size
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.structs import IGNORE_LABEL


def test_landcover_is_small_enough_to_ship():
    files = [path for path in landcover.FOLDER.rglob("*") if path.suffix in (".jpg", ".png")]
    assert len(files) == 2 * (27 + 9)
    assert sum(path.stat().st_size for path in files) <= 4_000_000


def test_landcover_blocks_hold_allowed_values_and_follow_the_rules(tmp_path):
    spec = DatasetSpec(name="landcover", prepared_dir=str(tmp_path))
    for split, length, held_out in (("train", 27, False), ("val", 9, True)):
        records = open_split(spec, split)
        assert len(records) == length
        for record in records:
            row, column = (int(part[1:]) for part in record["name"].decode().split("_"))
            assert ((column // 512 + row // 512) % 4 == 0) == held_out
            mask = decode_mask(record["label"], "a")
            assert image_size(record["image"], "a") == mask.shape
            assert max(mask.shape) <= 512
            assert set(np.unique(mask)) <= {*range(8), IGNORE_LABEL}
            assert np.mean(mask == 0) <= 0.98


def test_landcover_splits_have_every_class():
    for split in ("train", "val"):
        masks = [path.read_bytes() for path in (landcover.FOLDER / "labels" / split).glob("*.png")]
        values = np.unique(np.concatenate([decode_mask(mask, "a").ravel() for mask in masks]))
        assert values.tolist() == [*range(8), IGNORE_LABEL]


def test_landcover_image_and_mask_are_aligned():
    """Water is bluer than land on both sides of the coast."""
    water, land = [], []
    for path in (landcover.FOLDER / "labels" / "train").glob("*.png"):
        mask = decode_mask(path.read_bytes(), "a")
        photo = landcover.FOLDER / "images" / "train" / f"{path.stem}.jpg"
        image = decode_image(photo.read_bytes(), "a").astype(int)
        blueness = image[..., 2] - image[..., 0]
        coast = np.zeros(mask.shape, bool)
        coast[:, 3:-3] = (mask[:, :-6] == 0) != (mask[:, 6:] == 0)
        water.append(blueness[coast & (mask == 0)])
        land.append(blueness[coast & (mask != 0)])
    assert np.median(np.concatenate(water)) > np.median(np.concatenate(land)) + 40
