"""Masks in colours and masks of zero or not, as data sets of one's own have them."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from audited import NAMES, folder_spec, prepare, run
from picture_files import exif, png, saved
from PIL import Image
from raw_data import classes_of, noise, write

from contrastseg_jax.data.dataset import label_map, open_split, open_splits
from contrastseg_jax.data.images import encode_jpeg, encode_png
from contrastseg_jax.data.masks import (
    color_values,
    decode_binary_mask,
    decode_color_mask,
    look_up,
    mask_reader,
)
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

COLORS = ((0, 0, 0), (255, 0, 0), (16, 32, 64))
VALUES = {color: class_id for class_id, color in enumerate(COLORS)} | {(9, 9, 9): IGNORE_LABEL}
RGB = ("data.mask_encoding=rgb", f"data.palette={COLORS}", "data.ignore_colors=('#090909',)")
INDICES = noise(3, (6, 8), 4)  # 3: of the ignored colour
EXPECTED = np.where(INDICES == 3, IGNORE_LABEL, INDICES)
PIXELS = np.array([*VALUES], np.uint8)[INDICES]


def test_the_value_of_each_colour_is_that_of_the_table():
    pixels = noise(0, (40, 50, 3), 3)  # of 27 colours
    values = {(0, 1, 2): 7, (2, 1, 0): 9, (2, 2, 2): IGNORE_LABEL}
    expected = [[values.get(tuple(pixel), 254) for pixel in row] for row in pixels.tolist()]
    np.testing.assert_array_equal(look_up(pixels, values), expected)


def palette_png():
    image = Image.fromarray(INDICES, "P")
    image.putpalette(np.array([*VALUES], np.uint8).ravel().tolist())
    return saved(image)


def with_alpha(alpha):
    return np.dstack([PIXELS, np.full(INDICES.shape, alpha, np.uint8)])


@pytest.mark.parametrize(
    "data",
    [
        encode_png(PIXELS),
        palette_png(),
        saved(Image.fromarray(with_alpha(255))),
        png(PIXELS.astype(np.uint16) * 257, 16),
        saved(Image.fromarray(PIXELS), exif=exif(6)),
    ],
    ids=["RGB", "palette", "opaque RGBA", "16 bits", "EXIF"],
)
def test_colours_are_read_from_every_kind_of_png(data):
    np.testing.assert_array_equal(decode_color_mask(data, "m.png", values=VALUES), EXPECTED)


def test_a_mask_that_a_tool_has_saved_as_grey_has_its_colour():
    """ImageMagick and optipng write one channel, or one bit, where all colours are grey."""
    black = saved(Image.new("1", (8, 6)))
    assert not decode_color_mask(black, "m.png", values=VALUES).any()
    ignored = encode_png(np.full((6, 8), 9, np.uint8))
    assert (decode_color_mask(ignored, "m.png", values=VALUES) == IGNORE_LABEL).all()


def changed(*colors):
    pixels = PIXELS.copy()
    for row, color in enumerate(colors):
        pixels[row, : row + 1] = color
    return encode_png(pixels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed((1, 2, 3)), r"a colour of no class: #010203 in 1 of 48 pixels; each must be in"),
        (changed((1, 2, 3), (255, 0, 1)), r"colours of no class: #ff0001 in 2, #010203 in 1 of 48"),
        (encode_png(noise(0)), r"and \d+ more of 48 pixels; .*; soft edges have many"),
        (
            encode_png(noise(0, (6, 8), 3)),
            r"#0[12]0.*has one channel.*data\.mask_encoding = 'index'",
        ),
        (saved(Image.fromarray(with_alpha(254))), "48 of 48 pixels are transparent"),
        (encode_jpeg(PIXELS, 95), "a mask saved as JPEG"),
        (encode_png(PIXELS)[:60], "unreadable"),
    ],
)
def test_other_colours_are_refused(data, message):
    with pytest.raises(InputError, match=rf"(?s)m\.png.*{message}"):
        decode_color_mask(data, "m.png", values=VALUES)


@pytest.mark.parametrize(
    "data",
    [
        encode_png(INDICES),
        encode_png(np.where(INDICES, 255, 0).astype(np.uint8)),
        saved(Image.fromarray(INDICES != 0)),
        png(np.where(INDICES, 65535, 0), 16),
        palette_png(),
        encode_png(PIXELS),
        saved(Image.fromarray(with_alpha(255))),
    ],
    ids=["0..3", "0, 255", "1 bit", "16 bits", "palette", "RGB", "RGBA"],
)
def test_all_but_zero_is_the_second_class(data):
    np.testing.assert_array_equal(decode_binary_mask(data, "m.png"), INDICES != 0)


@pytest.mark.parametrize("data", [encode_jpeg(PIXELS, 95), saved(Image.fromarray(with_alpha(0)))])
def test_binary_masks_that_are_refused(data):
    with pytest.raises(InputError, match=r"m\.png: .*(JPEG|transparent)"):
        decode_binary_mask(data, "m.png")


def test_each_encoding_has_its_classes():
    rgb = DatasetSpec(
        name="folder", class_names=NAMES, mask_encoding="rgb", palette=COLORS, ignore_colors=()
    )
    assert label_map(rgb).palette == COLORS
    assert label_map(rgb).train_ids == {0: 0, 1: 1, 2: 2, 255: 255}
    assert color_values(rgb) == dict(zip(COLORS, range(3), strict=True))
    binary = DatasetSpec(name="folder", class_names=("a", "b"), mask_encoding="binary")
    assert label_map(binary).train_ids == {0: 0, 1: 1}
    assert mask_reader(binary) is decode_binary_mask


@pytest.fixture
def in_colors(root):
    for path in root.glob("labels/*/*.png"):
        write(path, encode_png(PIXELS))
    return root


def test_prepared_masks_hold_class_ids(in_colors):
    """So training, evaluation and class weights read them as all others."""
    spec = folder_spec(in_colors, *RGB)
    np.testing.assert_array_equal(classes_of(spec, prepare(in_colors, *RGB)[0]), EXPECTED)
    other = (*RGB[:1], f"data.palette={COLORS[::-1]}", RGB[2])
    swapped = np.array([2, 1, 0, IGNORE_LABEL])[INDICES]
    found = classes_of(folder_spec(in_colors, *other), prepare(in_colors, *other)[0])
    np.testing.assert_array_equal(found, swapped)  # prepared again, for the other table


def test_the_audit_counts_classes_and_names_colours_of_none(in_colors, capsys):
    results = run(in_colors, *RGB)
    assert results["num_errors"] == 0
    counts = results["splits"]["val"]["classes"]
    assert [counts[name]["pixels"] for name in NAMES] == [
        2 * (INDICES == i).sum() for i in range(3)
    ]
    assert counts["no class"]["pixels"] == 2 * (INDICES == 3).sum()

    for name in "ab":
        write(in_colors / "labels" / "train" / f"{name}.png", changed((1, 2, 3)))
    capsys.readouterr()
    results = run(in_colors, *RGB)
    printed = capsys.readouterr().out
    assert "split 'train': 2 masks not read by data.palette" in printed
    assert re.search(r"#010203 \(1, 2, 3\) +2\.08% .* in 2 of 2: not in data.palette", printed)
    assert re.search(r"#ff0000 .* in 2 of 2: road", printed)
    assert re.search(r"#090909 .* in 2 of 2: no class", printed)
    (line,) = re.findall(r"--config\.(data\.ignore_colors=.*)\"", printed)
    assert line == "data.ignore_colors=('#090909', '#010203')"
    assert run(in_colors, *RGB[:2], line)["num_errors"] == 0


def test_the_audit_knows_numbers_of_classes_under_rgb(in_colors, capsys):
    for path in in_colors.glob("labels/*/*.png"):
        write(path, encode_png(noise(0, (6, 8), 3)))
    assert run(in_colors, *RGB)["num_errors"] == 5
    assert "--config.data.mask_encoding=index" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [RGB, ("data.mask_encoding=binary", "data.class_names=('a', 'b')")]
)
def test_the_audit_says_so_where_not_the_colours_are_wrong(in_colors, settings, capsys):
    for path in in_colors.glob("labels/*/*.png"):
        write(path, saved(Image.fromarray(with_alpha(7))))
    assert run(in_colors, *settings)["num_errors"] == 5
    printed = capsys.readouterr().out
    assert printed.count("48 of 48 pixels are transparent") == 3 and "and 2 more" in printed
    assert "of the pixels, in" not in printed


def test_masks_of_two_values_are_trained_on(root):
    values = np.where(INDICES, 255, 0).astype(np.uint8)
    for path in root.glob("labels/*/*.png"):
        write(path, encode_png(values))
    settings = "data.mask_encoding=binary", "data.class_names=('cell', 'wall')"
    found = classes_of(folder_spec(root, *settings), prepare(root, *settings)[0])
    np.testing.assert_array_equal(found, INDICES != 0)


class ColorMasks(tfds.core.GeneratorBasedBuilder):
    """A data set of TFDS whose masks are in colours."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {"image": tfds.features.Image(), "mask": tfds.features.Image()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "val": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": encode_png(noise(0)), "mask": encode_png(PIXELS)}


def test_colours_of_a_data_set_of_tfds(spec_of):
    settings = {"dataset": "color_masks", "label_feature": "mask", "val_split": "val"}
    colors = {"mask_encoding": "rgb", "palette": COLORS, "ignore_colors": ((9, 9, 9),)}
    spec = spec_of("tfds", class_names=NAMES, **settings, **colors)
    train, val = open_splits(spec, ("train", "val"))
    np.testing.assert_array_equal(classes_of(spec, train[0]), EXPECTED)
    assert train[0]["label"] == val[0]["label"]
    with pytest.raises(InputError, match=r"mask: a colour of no class: #090909 in"):
        open_split(
            spec_of("tfds", class_names=NAMES, **settings, **colors | {"ignore_colors": ()}),
            "train",
        )
