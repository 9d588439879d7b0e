"""What the step is fed with."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from raw_data import write_pair
from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.subset import image_names
from contrastseg_jax.errors import InputError
from contrastseg_jax.training.feed import make_batches
from contrastseg_jax.training.start import open_data


def test_every_variant_sees_the_same_batches(tmp_path):
    """So that runs of one seed can be compared pair by pair."""
    seen = {}
    for variant in ("ce", "contrast", "memory"):
        prepared = f"data.prepared_dir={tmp_path / 'prepared'}"
        setup = setup_of(make_config(prepared, "train.num_steps=5", variant=variant))
        with closing(make_batches(setup, open_split(setup.data, "train"), 2)) as batches:
            seen[variant] = list(islice(batches, 3))
    for others in (seen["contrast"], seen["memory"]):
        for batch, other in zip(seen["ce"], others, strict=True):
            for field in ("image", "label", "example_id"):
                np.testing.assert_array_equal(getattr(batch, field), getattr(other, field))


def test_training_reads_the_part_that_is_named(tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    prepared = f"data.prepared_dir={tmp_path / 'prepared'}"
    whole = open_data(setup_of(make_config(prepared)))
    part = open_data(setup_of(make_config(prepared, "data.train_subset=4")))
    drawn = image_names(part.source)
    assert len(drawn) == 4 and set(drawn) < set(image_names(whole.source))
    assert not any(whole.lists.values())
    assert {name: images for name, images in part.lists.items() if images} == {
        "train_images": drawn
    }
    assert len(part.evaluator.source) == 3
    assert "4 training images of 6, by data.train_subset = '4'; 3 validation" in caplog.text
    with pytest.raises(InputError, match="data.train_subset = '7': must be at most 6"):
        open_data(setup_of(make_config(prepared, "data.train_subset=7")))


def test_training_reads_the_splits_that_are_named(tmp_path, caplog):
    """In their order; the part is drawn of all of them, and val is scored as before."""
    caplog.set_level("INFO", "contrastseg_jax")
    prepared = f"data.prepared_dir={tmp_path / 'prepared'}"
    splits = "data.train_splits=('train', 'val')"
    plain = open_data(setup_of(make_config(prepared)))
    assert "data.train_splits" not in caplog.text
    train, val = plain.source, plain.evaluator.source
    setup = setup_of(make_config(prepared, splits))
    both = open_data(setup)
    assert [*both.source] == [*train, *val] and len(both.source) == 9
    assert [*both.evaluator.source] == [*val]
    assert "9 training images, of train (6), val (3); 3 validation images" in caplog.text
    assert "val is one of data.train_splits: its scores tell how well it was learnt" in caplog.text
    part = open_data(setup_of(make_config(prepared, splits, "data.train_subset=7")))
    assert len(part.source) == 7 and "7 training images of 9, by data.train_subset" in caplog.text
    backwards = setup_of(make_config(prepared, "data.train_splits=('val', 'train')"))
    assert [*open_data(backwards).source] == [*val, *train]
    with closing(make_batches(setup, both.source, 0)) as batches:
        seen = {int(i) for batch in batches for i in batch.example_id}
    assert seen == set(range(9))  # 6 steps of 4


def test_a_folder_without_val_is_trained_on_and_its_lists_are_kept(tmp_path):
    for i in range(8):
        name = f"{'ab'[i // 4]}_{i}"
        image, label = tmp_path / "raw" / "images", tmp_path / "raw" / "labels"
        write_pair(image / f"{name}.png", label / f"{name}.png", size=(40, 40), seed=i)
    data = open_data(
        setup_of(
            make_config(
                f"data.prepared_dir={tmp_path / 'prepared'}",
                "data.name=folder",
                f"data.root={tmp_path / 'raw'}",
                "data.class_names=('a', 'b', 'c')",
                "data.val_fraction=0.5",
                "data.train_subset=3",
            )
        )
    )
    train, val = data.lists["split/train"], data.lists["split/val"]
    assert val == image_names(data.evaluator.source) and len(train) == len(val) == 4
    assert set(data.lists["train_images"]) < set(train) and not {*train} & {*val}
