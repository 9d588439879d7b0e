"""Counts of a prepared split against its masks."""

import logging

import numpy as np
import pytest
from audited import folder_spec

from contrastseg_jax.data import class_weights
from contrastseg_jax.data.class_weights import CACHE, count_classes
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.images import decode_mask
from contrastseg_jax.data.joined import joined
from contrastseg_jax.data.subset import Subset
from contrastseg_jax.structs import IGNORE_LABEL


def literal(records, classes):
    masks = [decode_mask(record["label"], "m") for record in records]
    ids = [np.vectorize(lambda v: classes.train_ids.get(v, IGNORE_LABEL))(mask) for mask in masks]
    pixels = [sum((x == c).sum() for x in ids) for c in range(len(classes.names))]
    held = [sum(x.size for x in ids if (x == c).any()) for c in range(len(classes.names))]
    return pixels, held


def test_counts_are_those_of_the_masks_and_kept(root, caplog, monkeypatch):
    spec = folder_spec(root)
    records, classes = open_split(spec, "train"), label_map(spec)
    with caplog.at_level(logging.INFO, logger="contrastseg_jax"):
        twice = joined([records, records])
        for source in (records, Subset(records, (2,)), twice, Subset(twice, (1, 3))):
            found = count_classes(source, classes)
            pixels, held = literal(source, classes)
            np.testing.assert_array_equal(found.pixels, pixels)
            np.testing.assert_array_equal(found.image_pixels, held)
    assert caplog.text.count("counting the classes in 3 masks") == 1
    monkeypatch.setattr(class_weights, "decode_mask", None)
    count_classes(records, classes)  # reads none


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_damaged_counts_are_counted_again(root, content):
    spec = folder_spec(root)
    records, classes = open_split(spec, "train"), label_map(spec)
    expected = count_classes(records, classes)
    (records.folder / CACHE).write_bytes(content)
    np.testing.assert_array_equal(count_classes(records, classes).pixels, expected.pixels)
