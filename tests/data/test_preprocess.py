"""Sizes of whole images, and what lies around them."""

import cv2
import numpy as np
import pytest
from raw_data import noise

from contrastseg_jax.data.preprocess import pad, padded_size, resize_image, resized_size


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((90, 130), 0, (90, 130)), ((90, 130), 45, (45, 65)), ((130, 90), 180, (260, 180))],
)
def test_short_side(size, short_side, expected):
    assert resized_size(size, short_side) == expected


def test_padded_sizes_are_multiples():
    assert padded_size((64, 65), 32) == (64, 96)
    assert padded_size((1, 33), 1) == (1, 33)


def test_resizing_to_any_size():
    image = noise(0, (90, 130, 3))
    np.testing.assert_array_equal(resize_image(image, (90, 130)), image)
    assert resize_image(image, (31, 57)).shape == (31, 57, 3)
    halved = resize_image(image, (45, 65))
    expected = cv2.resize(image, (65, 45), interpolation=cv2.INTER_CUBIC)  # as the original
    np.testing.assert_array_equal(halved, expected)


@pytest.mark.parametrize("offset", [(0, 0), (1, 3)])
def test_padding_surrounds_an_array_with_one_value(offset):
    top, left = offset
    around = ((top, 5 - 3 - top), (left, 9 - 4 - left))
    label, image = noise(0, (3, 4)), noise(1, (3, 4, 3))
    expected = np.pad(label, around, constant_values=255)
    np.testing.assert_array_equal(pad(label, (5, 9), 255, offset=offset), expected)
    padded = pad(image, (5, 9), (1, 2, 3), offset=offset)
    for channel in range(3):
        expected = np.pad(image[..., channel], around, constant_values=channel + 1)
        np.testing.assert_array_equal(padded[..., channel], expected)


def test_an_array_that_has_the_size_is_not_copied():
    label = noise(0, (3, 4))
    assert pad(label, (3, 4), 255) is label
