"""Label maps: mask values to class ids, class ids to colours."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from contrastseg_jax.data import pictures
from contrastseg_jax.data.builders import coco_stuff
from contrastseg_jax.data.dataset import label_map
from contrastseg_jax.data.labels import (
    colorize,
    default_palette,
    label_table,
    split_names,
    to_mask_values,
    to_train_ids,
)
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LABEL_MAP = LabelMap(("sky", "road"), ((1, 2, 3), (4, 5, 6)), {7: 0, 9: 1, 0: IGNORE_LABEL})


def test_each_value_becomes_its_class():
    mask = np.array([[7, 9], [0, 7]], np.uint8)
    np.testing.assert_array_equal(to_train_ids(mask, LABEL_MAP, "a.png"), [[0, 1], [255, 0]])


def test_every_value_agrees_with_the_mapping():
    values = np.random.default_rng(0).permutation(256)[:60].tolist()
    train_ids = {value: i for i, value in enumerate(values)}
    label_map = LabelMap(tuple(map(str, range(60))), default_palette(60), train_ids)
    mask = np.random.default_rng(1).choice(values, size=(31, 17)).astype(np.uint8)
    expected = [[train_ids[value] for value in row] for row in mask.tolist()]
    np.testing.assert_array_equal(to_train_ids(mask, label_map, "a.png"), expected)


def test_unknown_values_are_named_with_file_count_and_rule():
    mask = np.array([[7, 9, 3], [4, 4, 200]], np.uint8)
    with pytest.raises(InputError) as error:
        to_train_ids(mask, LABEL_MAP, "masks/a.png")
    assert str(error.value) == (
        "masks/a.png: unknown mask value(s) 3..4, 200 in 4 of 6 pixels; allowed: 0, 7, 9"
    )


def test_mask_values_are_the_way_back():
    label = np.array([[0, 1], [IGNORE_LABEL, 1]], np.uint8)
    mask = to_mask_values(label, LABEL_MAP)
    np.testing.assert_array_equal(mask, [[7, 9], [0, 9]])
    np.testing.assert_array_equal(to_train_ids(mask, LABEL_MAP, "a.png"), label)


def test_of_several_mask_values_the_lowest_comes_back():
    label_map = LabelMap(("a",), default_palette(1), {8: 0, 3: 0, 5: 0})
    assert to_mask_values(np.zeros((1, 1), np.uint8), label_map) == 3


def test_table_shows_values_classes_and_what_is_ignored():
    label_map = LabelMap(
        ("sky", "road"), LABEL_MAP.palette, {**LABEL_MAP.train_ids, 8: 0, 255: 255}
    )
    assert label_table(label_map) == (
        "mask values -> 2 class ids -> values written; ignored: 0, 255\n"
        "  7..8->0->7 sky  9->1->9 road"
    )


def test_table_of_many_classes_has_each_of_them():
    """The ids of COCO-Stuff 164k have gaps, so the values are not the ids."""
    label_map = coco_stuff.label_map(DatasetSpec(name="coco_stuff164k"))
    title, *lines = label_table(label_map).splitlines()
    assert title.startswith("mask values -> 171 class ids -> values written; ignored: 11, 25, 28..")
    cells = [cell for line in lines for cell in line.strip().split("  ") if cell]
    written = {class_id: value for value, class_id in label_map.train_ids.items()}
    assert [cell.strip() for cell in cells] == [
        f"{written[i]}->{i}->{written[i]} {name}" for i, name in enumerate(label_map.names)
    ]
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


def test_names_are_split_at_commas_over_lines():
    assert split_names("\nbed, pool table,\ncar\n") == ("bed", "pool table", "car")


def cielab(rgb):
    """CIE 1976 L*a*b* of 8-bit sRGB under D65, as the standards have it (IEC 61966-2-1, CIE 15)."""
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / (0.95047, 1.0, 1.08883)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def closest_pair(palette):
    return pdist(cielab(palette)).min()


def laid_over(palette, grey):
    """The palette as an overlay shows it on an image of one grey."""
    classes = LabelMap(tuple(map(str, range(len(palette)))), palette, {})
    label = np.arange(len(palette))[None]
    return pictures.overlay(np.full((*label.shape, 3), grey, np.uint8), label, classes)[0]


@pytest.mark.parametrize(("num_classes", "bound"), [(2, 160), (3, 160), (5, 75), (8, 54), (12, 45)])
def test_the_fewer_the_classes_the_further_apart_their_colors(num_classes, bound):
    assert closest_pair(default_palette(num_classes)) >= bound


def test_no_two_colors_of_up_to_21_classes_are_alike():
    """The colours of PASCAL VOC come as close as 8.8, 6.4 of them under an overlay."""
    for num_classes in range(2, 22):
        palette = default_palette(num_classes)
        assert closest_pair(palette) >= 43
        for grey in (0, 64, 128, 192, 255):
            assert closest_pair(laid_over(palette, grey)) >= 27
    from_black, from_white = (cdist(cielab(palette), cielab([[v] * 3])).min() for v in (0, 255))
    assert from_black >= 41 and from_white >= 30  # no class in labels, and in the audit's sheet


def test_the_colors_of_many_classes_differ_and_begin_with_those_of_few():
    palette = default_palette(255)
    assert len(set(palette)) == 255 and np.min(palette) >= 0 and np.max(palette) <= 255
    assert closest_pair(palette) >= 9.5
    assert closest_pair(laid_over(palette, 128)) >= 7
    assert cdist(cielab(palette), cielab([[0] * 3])).min() >= 9.5
    for num_classes in (3, 21, 22, 150):
        assert default_palette(num_classes) == palette[:num_classes]


@pytest.mark.parametrize(
    ("name", "bound"), [("cityscapes", 15), ("camvid", 23), ("landcover", 30), ("ade20k", 10)]
)
def test_published_colors_are_kept_and_others_lie_apart(name, bound):
    palette = label_map(DatasetSpec(name=name)).palette
    assert bound <= closest_pair(palette) < bound + 1
    if name == "cityscapes":
        assert palette[0] == (128, 64, 128)


def test_colorize_paints_classes_and_leaves_ignored_pixels_black():
    label = np.array([[0, 1, IGNORE_LABEL]], np.uint8)
    np.testing.assert_array_equal(colorize(label, LABEL_MAP), [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]])
