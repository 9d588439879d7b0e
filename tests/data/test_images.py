"""Decoding and encoding: every kind of file people have, and clear errors for the rest."""

import io
import math

import cv2
import numpy as np
import pytest
from picture_files import png, saved
from PIL import Image, PngImagePlugin
from scipy.io import savemat

from contrastseg_jax.data.image_files import MAX_PIXELS, FormatError, check_checksums
from contrastseg_jax.data.images import (
    decode_image,
    decode_mask,
    decode_mat,
    encode_jpeg,
    encode_png,
    image_size,
)
from contrastseg_jax.errors import InputError


def picture(height=12, width=17, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth_picture(height=200, width=300):
    ramp = np.linspace(0, 255, width)[None] * np.ones((height, 1))
    return np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 90)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "TIFF"])
def test_rgb_comes_back_as_it_was(suffix):
    rgb = picture()
    data = saved(Image.fromarray(rgb), suffix)
    np.testing.assert_array_equal(decode_image(data, "a"), rgb)
    assert image_size(data, "a") == (12, 17)


def test_other_color_models_become_rgb():
    rgb, grey = picture(), picture()[..., 0]
    rgba = np.dstack([rgb, grey])
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(rgba)), "a"), rgb)
    three_times = np.dstack([grey] * 3)
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(grey)), "a"), three_times)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_images_keep_their_upper_8_bits(suffix):
    deep = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    grey = np.ascontiguousarray(deep[..., 0])
    decoded = decode_image(cv2.imencode(suffix, deep[..., ::-1])[1].tobytes(), "a")
    np.testing.assert_array_equal(decoded, deep >> 8)
    decoded = decode_image(cv2.imencode(suffix, grey)[1].tobytes(), "a")
    np.testing.assert_array_equal(decoded, np.dstack([grey >> 8] * 3))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float32, r"its pixels are floating-point numbers, in 0\.25\.\.1;"),
        (np.int32, r"its pixels are signed or 32-bit numbers, in 0\.\.1;"),
    ],
)
def test_images_of_numbers_without_a_range_are_refused(dtype, message):
    values = np.array([[0.25, 0.5, 1]]).astype(dtype)
    with pytest.raises(FormatError, match=rf"^a\.tif: {message} .* save it with 8 bits"):
        decode_image(saved(Image.fromarray(values), "TIFF"), "a.tif")


def test_a_mask_of_floating_point_numbers_is_refused():
    values = Image.fromarray(np.array([[0, 1.5, 2]], np.float32))
    with pytest.raises(FormatError, match=r"^a\.tif: .* whole numbers .* found .* in 0\.\.2;"):
        decode_mask(saved(values, "TIFF"), "a.tif")


def test_palette_image_gives_its_colors_even_with_transparency():
    indices = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    indices.putpalette([10, 20, 30, 200, 150, 100])
    data = saved(indices, transparency=bytes([0, 255]))
    colors = np.array([[10, 20, 30], [200, 150, 100]])
    np.testing.assert_array_equal(decode_image(data, "a"), colors[[[0, 1], [1, 0]]])


def test_masks_of_every_single_channel_mode():
    values = np.array([[0, 7], [255, 3]], np.uint8)
    palette = Image.fromarray(values, "P")
    palette.putpalette([i for value in range(256) for i in (value, 0, 255 - value)])
    for image in (
        Image.fromarray(values),
        palette,
        Image.fromarray(values.astype(np.uint16)),
        Image.fromarray(values.astype(np.int32)),
    ):
        suffix = "TIFF" if image.mode == "I" else "PNG"
        np.testing.assert_array_equal(decode_mask(saved(image, suffix), "a"), values)
    binary = Image.fromarray(values > 5)
    np.testing.assert_array_equal(decode_mask(saved(binary), "a"), values > 5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_keep_their_values_with_and_without_palette(bits):
    values = np.random.default_rng(0).integers(0, 1 << bits, (7, 13), dtype=np.uint8)
    data = png(values, bits)
    check_checksums(data, "a")
    np.testing.assert_array_equal(decode_mask(data, "a"), values)
    palette = Image.fromarray(values, "P")
    palette.putpalette([9, 9, 9] * (1 << bits))
    np.testing.assert_array_equal(decode_mask(saved(palette, bits=bits), "a"), values)
    white = np.full((7, 13), (1 << bits) - 1)
    assert (decode_image(png(white, bits), "a") == 255).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_color_mask_is_refused(channels):
    data = saved(Image.fromarray(picture(channels=channels)))
    with pytest.raises(
        ValueError, match=rf"m\.png: an index mask is expected .*{channels} channels"
    ):
        decode_mask(data, "m.png")


def test_mask_values_above_255_are_refused():
    data = saved(Image.fromarray(np.array([[0, 300]], np.uint16)))
    with pytest.raises(
        ValueError, match=r"m\.png: mask values must lie in 0\.\.255, found 0\.\.300"
    ):
        decode_mask(data, "m.png")


def saved_mat(array):
    file = io.BytesIO()
    savemat(file, {"S": array}, do_compression=True)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_masks_of_matlab_files(dtype):
    values = np.array([[0, 7, 182], [1, 2, 3]], dtype)
    np.testing.assert_array_equal(decode_mat(saved_mat(values), "a.mat", "S", 182), values)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 183]]), r"must lie in 0\.\.182, found 0\.\.183"),
        (np.array([[-1, 2]]), r"must lie in 0\.\.182, found -1\.\.2"),
        (np.array([[0.5, 2]]), "S must be a picture of whole numbers"),
        (np.zeros((2, 2, 3)), "S must be a picture of whole numbers"),
        (np.zeros((0, 0)), "S must be a picture of whole numbers"),
        (np.array([["a"]]), "S must be a picture of whole numbers"),
        (np.array([[np.nan]]), "S must be a picture of whole numbers"),
    ],
)
def test_variables_of_matlab_files_that_are_not_masks_are_refused(array, message):
    with pytest.raises(InputError, match=rf"^a\.mat: .*{message}"):
        decode_mat(saved_mat(array), "a.mat", "S", 182)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_truncated_matlab_file_is_refused(share):
    data = saved_mat(np.random.default_rng(0).integers(0, 183, (40, 50), dtype=np.uint8))
    with pytest.raises(InputError, match=r"^a\.mat: unreadable MATLAB file \("):
        decode_mat(data[: int(len(data) * share)], "a.mat", "S", 182)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.99])
def test_truncated_jpeg_is_refused(share, progressive):
    data = saved(Image.fromarray(smooth_picture()), "JPEG", progressive=progressive)
    with pytest.raises(InputError, match=r"^a\.jpg: unreadable image file \("):
        decode_image(data[: int(len(data) * share)], "a.jpg")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_truncated_png_is_refused(share):
    data = encode_png(picture(60, 60))
    with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
        decode_image(data[: int(len(data) * share)], "a.png")
    data = encode_png(picture(60, 60)[..., 0])
    with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
        decode_mask(data[: int(len(data) * share)], "a.png")


@pytest.mark.parametrize(
    "settings",
    [
        dict(suffix="PNG"),
        dict(suffix="PNG", transparency=(3, 4, 5)),
        dict(suffix="PNG", pnginfo="gamma"),
        dict(suffix="JPEG", quality=75),
        dict(suffix="JPEG", quality=90, progressive=True),
        dict(suffix="JPEG", quality=95, subsampling=0),
        dict(suffix="JPEG", restart_marker_rows=2),
    ],
    ids=str,
)
def test_pixels_are_those_of_opencv(settings):
    """Odd sides, where chroma is subsampled, and chunks that a decoder may be tempted to apply."""
    rgb = cv2.GaussianBlur(picture(61, 83), (5, 5), 0)
    if settings.get("pnginfo"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add(b"gAMA", (100_000).to_bytes(4, "big"))
        exif = Image.Exif()
        exif[0x0112] = 6
        settings = settings | dict(pnginfo=chunks, exif=exif.tobytes())
    for pixels, decode in ((rgb, decode_image), (rgb[..., 0], decode_mask)):
        if decode is decode_mask and settings["suffix"] == "JPEG":
            continue  # is refused
        if pixels.ndim == 2 and settings.get("transparency"):
            settings = settings | dict(transparency=3)
        data = saved(Image.fromarray(pixels), **settings)
        flag = cv2.IMREAD_COLOR_RGB if pixels.ndim == 3 else cv2.IMREAD_GRAYSCALE
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        np.testing.assert_array_equal(decode(data, "a"), expected)


def test_a_jpeg_with_a_tail_is_read_and_one_of_cmyk_as_pillow_has_it():
    data = saved(Image.fromarray(smooth_picture()), "JPEG")
    np.testing.assert_array_equal(decode_image(data + bytes(7), "a"), decode_image(data, "a"))
    inks = Image.fromarray(smooth_picture()).convert("CMYK")
    data = saved(inks, "JPEG")
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, "a"), expected)


def test_a_png_with_a_damaged_byte_is_refused():
    data = bytearray(encode_png(picture(60, 60)))
    data[len(data) // 2] ^= 255
    for read in (decode_image, check_checksums):
        with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
            read(bytes(data), "a.png")


def test_no_bit_of_a_png_can_change_without_notice():
    """Of a flat mask, whose few bytes are other masks when one of them is wrong."""
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 10:50], mask[45:, 60:] = 1, 2
    whole = encode_png(mask)
    check_checksums(whole, "a.png")
    check_checksums(whole + b"a tail", "a.png")
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
            check_checksums(bytes(data), "a.png")
            decode_mask(bytes(data), "a.png")


@pytest.mark.parametrize("megabytes", [2, 80])
def test_a_png_with_a_long_text_is_read(megabytes):
    """ImageMagick keeps profiles in such."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type 8bim", "0" * (megabytes << 20), zip=True)
    for pixels, decode in ((picture(), decode_image), (picture()[..., 0], decode_mask)):
        data = saved(Image.fromarray(pixels), pnginfo=text)
        np.testing.assert_array_equal(decode(data, "a"), pixels)


def test_a_png_with_a_short_header_is_refused():
    data = bytearray(encode_png(picture()))
    data[11] = 12  # bytes of IHDR, which are 13
    for read in (decode_image, decode_mask, image_size):
        with pytest.raises(InputError, match=r"^a\.png: unreadable image file \(.*IHDR"):
            read(bytes(data), "a.png")


def test_a_large_image_is_read_without_a_warning_and_a_larger_one_is_to_be_cut():
    """Warnings are errors here. The pixels of the largest are not drawn: 0.8 GB."""
    side = math.isqrt(MAX_PIXELS)
    row = np.zeros((1, 8), np.uint8)
    assert image_size(png(row, 1, size=(side, side)), "a") == (side, side)
    data = png(row, 1, size=(side + 1, side))
    for read in (decode_image, decode_mask, image_size):
        with pytest.raises(
            FormatError,
            match=r"^a\.png: has 16384x16385 pixels; at most 268,435,456 are read, cut it into",
        ):
            read(data, "a.png")


def test_files_that_are_not_images_are_refused():
    for read in (decode_image, decode_mask, image_size):
        with pytest.raises(InputError, match=r"^notes\.txt: unreadable image file \("):
            read(b"not an image", "notes.txt")


def test_encoding_keeps_channel_order():
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_array_equal(decode_image(encode_png(red), "a"), red)
    assert np.abs(decode_image(encode_jpeg(red, 95), "a").astype(int) - red).max() <= 3
    mask = picture()[..., 0]
    np.testing.assert_array_equal(decode_mask(encode_png(mask), "a"), mask)


def test_jpeg_quality_is_a_trade():
    rgb = cv2.GaussianBlur(picture(64, 64), (5, 5), 0)
    fine, coarse = (encode_jpeg(rgb, quality) for quality in (95, 50))
    assert len(fine) > len(coarse)
    error = [np.abs(decode_image(data, "a").astype(int) - rgb).mean() for data in (fine, coarse)]
    assert error[0] < error[1]
