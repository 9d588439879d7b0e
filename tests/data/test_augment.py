"""Augmentation against the original's way: resize the whole image, then crop, flip, shift, pad."""

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from contrastseg_jax.data.augment import (
    Augmentation,
    augment,
    blur,
    distort_colors,
    erase,
    mix_classes,
)
from contrastseg_jax.data.preprocess import Example
from contrastseg_jax.structs import IGNORE_LABEL

PAD_COLOR = (124, 116, 104)
SETTINGS = dict(
    short_side=0,
    scale_range=(0.5, 2.0),
    aspect_range=(0.9, 1.1),
    flip_rate=0.5,
    brightness=10,
    color_distortion=0.0,
    class_uniform_rate=0.0,
    blur_rate=0.0,
    erase_rate=0.0,
    class_mix_rate=0.0,
)
STILL = SETTINGS | dict(
    scale_range=(1.0, 1.0),
    aspect_range=(1.0, 1.0),
    flip_rate=0.0,
    brightness=0,
)
# What `reference` takes.
REFERENCE = ("short_side", "scale_range", "aspect_range", "flip_rate", "brightness")


def view_of(image, label, rng, *, short_side, **settings):
    """`augment` with its settings in one dict, as `reference` has them."""
    example = Example(lambda num_rows: image[:num_rows], label)
    augmentation = Augmentation(**settings)
    return augment(example, rng, augmentation, short_side=short_side, pad_color=PAD_COLOR)


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    label = cv2.resize(rng.integers(0, 5, (9, 13), dtype=np.uint8), (130, 90), interpolation=0)
    return image, label


def reference(
    image, label, rng, *, crop_size, short_side, scale_range, aspect_range, flip_rate, brightness
):
    """The original's steps, drawing the same numbers in the same order."""
    if short_side:
        ratio = short_side / min(label.shape)
        size = tuple(int(round(side * ratio)) for side in label.shape[::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    scale = rng.uniform(*scale_range)
    aspect = rng.uniform(*aspect_range)
    height, width = label.shape
    size = int(width * scale * np.sqrt(aspect)), int(height * scale / np.sqrt(aspect))
    image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    padding, cut = [], []
    for length, crop in zip(label.shape, crop_size, strict=True):
        offset = rng.integers(0, abs(crop - length), endpoint=True)
        cut.append(slice(offset, offset + crop) if length > crop else slice(None))
        padding.append((offset, crop - length - offset) if length < crop else (0, 0))
    image, label = image[tuple(cut)], label[tuple(cut)]
    if rng.random() < flip_rate:
        image, label = image[:, ::-1], label[:, ::-1]
    image = np.clip(image.astype(int) + rng.integers(-brightness, brightness + 1), 0, 255)
    channels = [
        np.pad(image[..., i], padding, constant_values=color) for i, color in enumerate(PAD_COLOR)
    ]
    return np.stack(channels, axis=-1), np.pad(label, padding, constant_values=IGNORE_LABEL)


@pytest.mark.parametrize("crop_size", [(48, 64), (100, 140), (60, 200), (300, 300)])
def test_equals_resize_then_crop(scene, crop_size):
    settings = {key: SETTINGS[key] for key in REFERENCE}
    for seed in range(12):
        view = view_of(*scene, np.random.default_rng(seed), crop_size=crop_size, **SETTINGS)
        rng = np.random.default_rng(seed)
        image, label = reference(*scene, rng, crop_size=crop_size, **settings)
        assert np.abs(view[0] - image).mean() <= 0.5
        assert np.abs(view[0] - image).max() <= 16
        assert np.mean(view[1] != label) <= 0.01


@pytest.mark.parametrize("short_side", [52, 90, 171])
@pytest.mark.parametrize("crop_size", [(48, 64), (300, 300)])
def test_equals_resize_to_the_short_side_then_resize_then_crop(scene, short_side, crop_size):
    """One resampling instead of two, of the same places: slopes keep theirs through any number."""
    slopes = [slope * 255 / slope.max() for slope in np.indices((90, 130))]
    image = np.stack([*slopes, cv2.GaussianBlur(scene[0][..., 0], (0, 0), 4)], -1).astype(np.uint8)
    settings = SETTINGS | {"short_side": short_side}
    plain = {key: settings[key] for key in REFERENCE}
    moved = []
    for seed in range(12):
        for numbers in np.indices((90, 130), dtype=np.uint8):
            rng = np.random.default_rng(seed)
            view, shown = view_of(image, numbers, rng, crop_size=crop_size, **settings)
            rng = np.random.default_rng(seed)
            other, expected = reference(image, numbers, rng, crop_size=crop_size, **plain)
            np.testing.assert_array_equal(shown == IGNORE_LABEL, expected == IGNORE_LABEL)
            moved.append(np.ravel(shown.astype(int) - expected))
        difference = np.abs(view.astype(int) - other)
        assert difference.mean() <= 1 and np.percentile(difference, 99) <= 4
    moved = np.concatenate(moved)  # by less than a pixel of each resized image
    assert np.abs(moved).max() <= 1 + max(90 / short_side, 1) and abs(moved.mean()) < 0.1


def geometry(way, size, crop_size, seed, **settings):
    """What a view shows, from labels that number the rows and the columns of an image."""
    image, view = np.zeros((*size, 3), np.uint8), []
    for numbers in np.indices(size, dtype=np.uint8):
        rng = np.random.default_rng(seed)
        view.append(way(image, numbers, rng, crop_size=crop_size, **settings)[1])
    inside = view[0] != IGNORE_LABEL
    corner = np.argwhere(inside).min(axis=0)
    extent = np.argwhere(inside).max(axis=0) - corner + 1
    shown = [numbers[inside] for numbers in view]
    flipped = float(view[1][inside][0] > view[1][inside][-1])
    # Twenty at a time: for a place just between two pixels, which is the nearest is a convention.
    seen = [
        len(np.intersect1d(numbers, part)) / 20
        for n, numbers in zip(size, shown, strict=True)
        for part in np.split(np.arange(n), n // 20)
    ]
    area, aspect = np.prod(extent / size), extent[1] / extent[0]
    borders = [border for numbers in shown for border in (numbers.min(), numbers.max())]
    return np.array([np.sqrt(area), aspect, flipped, *corner, *extent, *borders, *seen])


@pytest.mark.parametrize("crop_size", [(130, 220), (40, 64)], ids=["all of it", "a part"])
def test_distribution_is_that_of_resize_then_crop(crop_size):
    """Means of scale, aspect, flips, offsets, borders and coverage, over views drawn apart."""
    num_views, size = 600, (60, 100)
    plain = {key: SETTINGS[key] for key in REFERENCE}
    ours = [geometry(view_of, size, crop_size, (0, i), **SETTINGS) for i in range(num_views)]
    theirs = [geometry(reference, size, crop_size, (1, i), **plain) for i in range(num_views)]
    spread = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / num_views)
    difference = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert np.all(difference <= 4 * spread + 1e-9)
    if crop_size == (130, 220):  # the image is seen whole
        scale, aspect = np.mean(ours, axis=0)[:2]
        assert abs(scale - 1.25) < 0.05
        assert abs(aspect - 100 / 60) < 0.02


def test_is_a_function_of_the_generator(scene):
    for image_or_label in (0, 1):
        views = [
            view_of(*scene, np.random.default_rng(seed), crop_size=(32, 32), **SETTINGS)
            for seed in (3, 3, 4)
        ]
        np.testing.assert_array_equal(views[0][image_or_label], views[1][image_or_label])
        assert np.any(views[0][image_or_label] != views[2][image_or_label])


def test_nothing_to_do_gives_the_image_back(scene):
    view = view_of(*scene, np.random.default_rng(0), crop_size=(90, 130), **STILL)
    for given, result in zip(scene, view, strict=True):
        np.testing.assert_array_equal(result, given)


def test_flip_is_exact(scene):
    settings = STILL | {"flip_rate": 1.0}
    view = view_of(*scene, np.random.default_rng(0), crop_size=(90, 130), **settings)
    for given, result in zip(scene, view, strict=True):
        np.testing.assert_array_equal(result, given[:, ::-1])


def test_small_images_are_padded_at_any_offset(scene):
    corners = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        image, label = view_of(*scene, rng, crop_size=(94, 133), **STILL)
        rows, columns = np.nonzero(label != IGNORE_LABEL)
        corners.add((int(rows.min()), int(columns.min())))
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (90, 130)
        assert np.all(image[label == IGNORE_LABEL] == PAD_COLOR)
    assert corners == {(row, column) for row in range(5) for column in range(4)}


def test_crops_reach_every_border(scene):
    image = np.zeros((40, 40, 3), np.uint8)
    label = np.arange(40, dtype=np.uint8)[:, None] * np.ones((1, 40), np.uint8)
    rng = np.random.default_rng(0)
    first = {
        int(view_of(image, label, rng, crop_size=(35, 35), **STILL)[1][0, 0]) for _ in range(99)
    }
    assert first == set(range(6))


def test_brightness_shifts_all_channels_by_one_integer_and_saturates(scene):
    image = np.full((8, 8, 3), (1, 128, 254), np.uint8)
    shifts = set()
    for seed in range(300):
        settings = STILL | {"brightness": 10}
        rng = np.random.default_rng(seed)
        view, _ = view_of(image, np.zeros((8, 8), np.uint8), rng, crop_size=(8, 8), **settings)
        low, middle, high = view[0, 0].astype(int)
        shifts.add(int(middle - 128))
        assert (low, high) == (max(0, 1 + middle - 128), min(255, 254 + middle - 128))
    assert shifts == set(range(-10, 11))


def test_no_color_distortion_at_zero_strength(scene):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(distort_colors(scene[0], rng, strength=0.0), scene[0])


def test_distortion_of_grey_is_brightness_and_contrast():
    grey = np.full((2, 2, 3), 100, np.uint8)
    levels = []
    for seed in range(600):
        view = distort_colors(grey, np.random.default_rng((1, seed)), strength=1.0)
        assert np.all(view == view[0, 0, 0])
        levels.append(int(view[0, 0, 0]))
    assert 0.5 * (100 - 32) <= min(levels) < 50 and 160 < max(levels) <= 1.5 * (100 + 32)
    assert abs(np.mean(np.array(levels) == 100) - 1 / 4) < 0.07  # neither, half and half of times


def test_distortion_shifts_hue_and_scales_saturation():
    color = np.full((1, 1, 3), (120, 60, 60), np.uint8)  # far from where it would saturate
    hues, saturations = [], []
    for seed in range(600):
        view = distort_colors(color, np.random.default_rng(seed), strength=1.0)
        hue, saturation, _ = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)[0, 0].astype(int)
        hues.append((hue + 90) % 180 - 90)
        saturations.append(saturation)
    assert -20 <= min(hues) < -15 and 15 < max(hues) <= 20  # steps of 2 degrees
    assert abs(np.mean(np.abs(hues) <= 1) - (1 / 2 + 1 / 2 * 3 / 37)) < 0.07
    assert min(saturations) < 0.6 * 128 and max(saturations) > 1.4 * 128


def test_strength_bounds_the_distortion(scene):
    weak, strong = (
        np.mean(
            [
                np.abs(
                    distort_colors(scene[0], np.random.default_rng(i), strength=s) - 0.0 - scene[0]
                )
                for i in range(30)
            ]
        )
        for s in (0.1, 1.0)
    )
    assert 0 < weak < strong / 5


def test_options_leave_the_other_draws_as_they_are(scene):
    def view(seed, **options):
        rng = np.random.default_rng(seed)
        return view_of(*scene, rng, crop_size=(32, 32), **(SETTINGS | options))

    same = []
    for seed in range(60):
        plain, distorted = view(seed), view(seed, color_distortion=1.0)
        np.testing.assert_array_equal(plain[1], distorted[1])
        balanced = view(seed, class_uniform_rate=0.5)
        both = view(seed, class_uniform_rate=0.5, color_distortion=1.0)
        np.testing.assert_array_equal(balanced[1], both[1])
        blurred, erased = view(seed, blur_rate=1.0), view(seed, erase_rate=1.0)
        np.testing.assert_array_equal(plain[1], blurred[1])
        kept = np.any(erased[0] != PAD_COLOR, axis=-1)
        for of_plain, of_erased in zip(plain, erased, strict=True):
            np.testing.assert_array_equal(of_plain[kept], of_erased[kept])
        same.append(np.array_equal(plain[0], balanced[0]))
    assert 15 < sum(same) < 45  # the other half are other crops


def test_class_uniform_crops_by_hand():
    """A crop of 16 that holds pixel i of a row of 4 holds pixel j in 16 - |i - j| of 16 places."""
    label = np.full((60, 80), IGNORE_LABEL, np.uint8)
    label[30:34, 40:44] = 1
    settings = STILL | {"class_uniform_rate": 1.0}
    counts = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        _, view = view_of(
            np.zeros((60, 80, 3), np.uint8), label, rng, crop_size=(16, 16), **settings
        )
        counts.append(np.sum(view == 1))
    assert min(counts) >= 1
    expected = (4 - 5 / 16) ** 2  # the mean over i of the sum over j of |i - j| is 5
    assert abs(np.mean(counts) - expected) < 4 * np.std(counts) / np.sqrt(len(counts))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_class_uniform_crops_show_rare_classes_more_often(rate):
    """How many crops hold a pixel of the rare class, against all places of a crop counted out."""
    size, crop, num_crops = (40, 100), 16, 2000
    label = np.zeros(size, np.uint8)
    label[20:24, 50:54] = 1
    plain = around = 1.0
    for length, first in zip(size, (20, 50), strict=True):
        starts = np.arange(length - crop + 1)
        holds = (starts > first - crop) & (starts < first + 4)
        of_pixel = np.abs(2 * (np.arange(length)[:, None] - starts) - crop + 1) < crop
        plain *= holds.mean()
        around *= (of_pixel @ holds.astype(int) / of_pixel.sum(axis=1)).mean()
    around = (around * label.size - 16) / (label.size - 16)  # around a pixel of the common class
    expected = (1 - rate) * plain + rate * (1 + around) / 2
    found = 0
    for seed in range(num_crops):
        settings = STILL | {"class_uniform_rate": rate}
        rng = np.random.default_rng(seed)
        _, view = view_of(
            np.zeros((*size, 3), np.uint8), label, rng, crop_size=(16, 16), **settings
        )
        found += 1 in view
    assert abs(found / num_crops - expected) < 4 * np.sqrt(expected * (1 - expected) / num_crops)


def test_class_uniform_crops_of_labels_without_class(scene):
    image, label = scene[0], np.full_like(scene[1], IGNORE_LABEL)
    views = [
        view_of(
            image,
            label,
            np.random.default_rng(0),
            crop_size=(32, 32),
            **(SETTINGS | {"class_uniform_rate": rate}),
        )
        for rate in (0.0, 1.0)
    ]
    np.testing.assert_array_equal(views[0][0], views[1][0])


@pytest.mark.parametrize("crop_size", [(32, 32), (150, 40), (300, 300)])
def test_class_uniform_crops_at_any_scale_and_size(scene, crop_size):
    image, label = scene
    label = np.where(label == 0, IGNORE_LABEL, 3).astype(np.uint8)
    for seed in range(40):
        settings = SETTINGS | {"class_uniform_rate": 1.0}
        rng = np.random.default_rng(seed)
        _, view = view_of(image, label, rng, crop_size=crop_size, **settings)
        assert view.shape == crop_size
        assert 3 in view


def test_scales_cover_the_range_and_aspect_is_width_over_height():
    label = np.zeros((200, 200), np.uint8)
    image = np.zeros((200, 200, 3), np.uint8)
    sizes = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        _, view = view_of(image, label, rng, crop_size=(450, 450), **SETTINGS)
        inside = view != IGNORE_LABEL
        sizes.append((inside.any(axis=1).sum(), inside.any(axis=0).sum()))
    heights, widths = np.array(sizes).T
    scale, aspect = np.sqrt(heights * widths) / 200, widths / heights
    assert 0.49 < scale.min() < 0.55 and 1.95 < scale.max() < 2.01
    assert abs(scale.mean() - 1.25) < 0.1
    assert 0.88 < aspect.min() < 0.92 and 1.08 < aspect.max() < 1.12


def test_labels_are_never_blended(scene):
    image, label = scene
    for seed in range(20):
        rng = np.random.default_rng(seed)
        _, view = view_of(image, label * 50, rng, crop_size=(64, 64), **SETTINGS)
        assert set(np.unique(view)) <= {0, 50, 100, 150, 200, IGNORE_LABEL}


def test_one_pixel_images_survive():
    image, label = np.full((1, 1, 3), 9, np.uint8), np.zeros((1, 1), np.uint8)
    _, view = view_of(image, label, np.random.default_rng(0), crop_size=(4, 4), **SETTINGS)
    assert np.sum(view == 0) >= 1


def test_blur_is_a_gaussian_of_every_sigma(scene):
    sigmas = []
    for seed in range(30):
        sigma = np.random.default_rng(seed).uniform(0.1, 2.0)
        expected = [
            gaussian_filter(scene[0][..., c].astype(float), sigma, mode="mirror") for c in range(3)
        ]
        blurred = blur(scene[0], np.random.default_rng(seed))
        np.testing.assert_allclose(blurred, np.stack(expected, -1), atol=2)
        sigmas.append(sigma)
    assert min(sigmas) < 0.3 and max(sigmas) > 1.8


@pytest.mark.parametrize("setting", ["blur_rate", "erase_rate"])
def test_padding_is_neither_blurred_nor_erased(scene, setting):
    def view(seed, **options):
        rng = np.random.default_rng(seed)
        return view_of(*scene, rng, crop_size=(99, 150), **(STILL | options))

    changed = 0
    for seed in range(9):
        (image, label), (plain, plain_label) = view(seed, **{setting: 1.0}), view(seed)
        padding = plain_label == IGNORE_LABEL
        assert np.all(image[padding] == PAD_COLOR)
        changed += np.any(image[~padding] != plain[~padding])
        assert np.any(label[~padding] == IGNORE_LABEL) == (setting == "erase_rate")
    assert changed > 0


@pytest.mark.parametrize("setting", ["blur_rate", "erase_rate"])
def test_rates_are_shares_of_the_views(scene, setting):
    changed = {}
    for rate in (0.0, 0.3, 1.0):
        views = [
            view_of(
                *scene,
                np.random.default_rng(seed),
                crop_size=(90, 130),
                **(STILL | {setting: rate}),
            )
            for seed in range(300)
        ]
        changed[rate] = sum(np.any(image != scene[0]) for image, _ in views)
    assert changed[0.0] == 0 and changed[1.0] >= 300 * 0.85  # a sigma of 0.2 changes nothing
    assert abs(changed[0.3] / changed[1.0] - 0.3) <= 4 * np.sqrt(0.3 * 0.7 / 300)


@pytest.mark.parametrize("size", [(90, 130), (20, 200)])
def test_erased_are_rectangles_of_the_papers_areas_and_aspects(size):
    """Against a literal draw of algorithm 1, whose sides are cut to those of the image."""
    image, label = np.full((*size, 3), 7, np.uint8), np.full(size, 3, np.uint8)
    shares, aspects, touched = [], [], set()
    for seed in range(400):
        erased, erased_label = erase(image, label, np.random.default_rng(seed), color=PAD_COLOR)
        hidden = erased_label == IGNORE_LABEL
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        assert (
            hidden.sum()
            == len(rows) * len(columns)
            == np.ptp(rows) * np.ptp(columns) + (np.ptp(rows) + np.ptp(columns) + 1)
        )
        assert np.all(erased[hidden] == PAD_COLOR) and np.all(erased[~hidden] == 7)
        assert np.all(erased_label[~hidden] == 3)
        shares.append(hidden.mean())
        aspects.append(len(rows) / len(columns))
        edges = (rows[0], columns[0], size[0] - 1 - rows[-1], size[1] - 1 - columns[-1])
        touched |= {side for side, distance in enumerate(edges) if distance <= 1}
    assert np.all(image == 7) and np.all(label == 3)  # what was given is not written to
    assert touched == {0, 1, 2, 3}
    rng = np.random.default_rng(1)
    area = rng.uniform(0.02, 0.4, 20_000) * np.prod(size)
    aspect = rng.uniform(0.3, 1 / 0.3, 20_000)
    height = np.minimum(np.sqrt(area * aspect), size[0])
    width = np.minimum(np.sqrt(area / aspect), size[1])
    for found, expected in ((shares, height * width / np.prod(size)), (aspects, height / width)):
        assert (
            abs(np.mean(found) - expected.mean()) < 4 * np.std(found) / 20 + 0.01 * expected.mean()
        )
        assert expected.min() * 0.8 < min(found) and max(found) < expected.max() * 1.2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 2)])
def test_the_smallest_images_can_be_blurred_and_erased(size):
    image, label = np.full((*size, 3), 9, np.uint8), np.zeros(size, np.uint8)
    for seed in range(30):
        assert blur(image, np.random.default_rng(seed)).shape == image.shape
        _, erased = erase(image, label, np.random.default_rng(seed), color=PAD_COLOR)
        assert 1 <= np.sum(erased == IGNORE_LABEL)


def test_mixing_pastes_half_of_the_classes_whole(scene):
    """Every pixel is that of the one view or of the other, with its label."""
    image, label = scene
    other, other_label = 255 - image, np.roll(label, 31, axis=1)
    other_label[:9] = IGNORE_LABEL
    drawn = set()
    for seed in range(60):
        mixed, mixed_label = mix_classes(
            image, label, other, other_label, np.random.default_rng(seed)
        )
        assert mixed.dtype == mixed_label.dtype == np.uint8
        classes = {
            c for c in range(5) if np.all(mixed[other_label == c] == other[other_label == c])
        }
        assert len(classes) == 2  # of five
        pasted = np.zeros(label.shape, bool)
        for c in classes:
            pasted |= other_label == c
        np.testing.assert_array_equal(mixed_label[pasted], other_label[pasted])
        np.testing.assert_array_equal(mixed_label[~pasted], label[~pasted])
        np.testing.assert_array_equal(mixed[~pasted], image[~pasted])
        drawn |= classes
    assert drawn == set(range(5))


@pytest.mark.parametrize("values", [[IGNORE_LABEL], [2], [2, IGNORE_LABEL]])
def test_a_view_of_less_than_two_classes_pastes_nothing(scene, values):
    image, label = scene
    other_label = np.resize(np.array(values, np.uint8), label.shape)
    mixed = mix_classes(image, label, 255 - image, other_label, np.random.default_rng(0))
    for given, result in zip(scene, mixed, strict=True):
        np.testing.assert_array_equal(given, result)
