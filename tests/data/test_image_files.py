"""What cameras, scanners and GIS programs write: EXIF orientations, 16 bits, many bands."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from picture_files import PNG_SIGNATURE, chunk, exif, interlaced_png, png, saved, tiff
from PIL import Image, ImageOps
from raw_data import noise

from contrastseg_jax.data.image_files import FormatError
from contrastseg_jax.data.images import (
    decode_image,
    decode_mask,
    file_format,
    has_exif_orientation,
    image_size,
)
from contrastseg_jax.data.spec import Decoding
from contrastseg_jax.errors import InputError

APPLIED = Decoding(exif_orientation="applied")
FORMATS = {
    "TIFF": dict(),
    "TIFF of libtiff": dict(suffix="TIFF", compression="tiff_lzw"),
    "JPEG": dict(quality=95),
    "MPO": dict(save_all=True, quality=95),
    "PNG": dict(),
    "WEBP": dict(lossless=True),
}


def file_with_orientation(pixels, kind, orientation):
    settings = dict(suffix=kind) | FORMATS[kind]
    if kind == "MPO":
        settings["append_images"] = [Image.fromarray(pixels)]
    return saved(Image.fromarray(pixels), exif=exif(orientation), **settings)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_an_orientation_is_applied_or_not_whatever_the_format(kind, orientation):
    """Pillow's `exif_transpose` is the measure; JPEGs lose the same in both."""
    pixels = noise(1, (6, 9, 3))
    data = file_with_orientation(pixels, kind, orientation)
    plain = decode_image(file_with_orientation(pixels, kind, 1), "a")
    note = exif(orientation)
    upright = Image.fromarray(plain)
    upright.info["exif"] = note.tobytes()
    expected = np.array(ImageOps.exif_transpose(upright))
    if kind not in ("JPEG", "MPO"):
        np.testing.assert_array_equal(plain, pixels)
    np.testing.assert_array_equal(decode_image(data, "a"), plain)
    np.testing.assert_array_equal(decode_image(data, "a", APPLIED), expected)
    assert image_size(data, "a") == (6, 9)
    assert image_size(data, "a", APPLIED) == expected.shape[:2]
    assert has_exif_orientation(data, "a") == (orientation > 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "settings", [dict(), dict(compression="tiff_lzw"), dict(suffix="PNG")], ids=str
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_has_the_pixels_that_are_stored(dtype, settings, orientation):
    mask = noise(2, (6, 9), 5).astype(dtype)
    data = saved(Image.fromarray(mask), **(dict(suffix="TIFF") | settings), exif=exif(orientation))
    np.testing.assert_array_equal(decode_mask(data, "a"), mask)
    assert image_size(data, "a") == (6, 9)
    assert has_exif_orientation(data, "a") == (orientation > 1)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_deep_images_is_applied_too(orientation, order):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    data = tiff(deep, 2, order=order, tags=[(274, [orientation])])
    np.testing.assert_array_equal(decode_image(data, "a"), deep >> 8)
    upright = Image.fromarray((deep >> 8).astype(np.uint8))
    upright.info["exif"] = exif(orientation).tobytes()
    expected = np.array(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(decode_image(data, "a", APPLIED), expected)


def test_a_png_may_have_its_exif_data_after_the_pixels():
    pixels = noise(0)
    data = png(pixels, 8, after=chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")))
    assert has_exif_orientation(data, "a") and image_size(data, "a", APPLIED) == (8, 6)
    np.testing.assert_array_equal(decode_image(data, "a", APPLIED), np.rot90(pixels, -1))


def test_exif_data_after_damaged_pixels_do_not_hide_the_damage():
    """Pillow raises an error of a broken stream once; then the image is what there was of it."""
    data = bytearray(png(noise(0, (60, 80, 3)), 8, after=chunk(b"tEXt", b"a\0b")))
    start = data.index(b"IDAT") + 4
    data[start + 2000 : start + 2100] = bytes(100)
    for read in (decode_image, has_exif_orientation):
        with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
            read(bytes(data), "a.png")


@pytest.mark.parametrize("note", [b"Exif\0\0damaged", b"", exif(0).tobytes(), exif(9).tobytes()])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_are_ignored(kind, note):
    data = saved(Image.fromarray(noise(0)), kind, exif=note)
    assert not has_exif_orientation(data, "a")
    np.testing.assert_array_equal(decode_image(data, "a"), decode_image(data, "a", APPLIED))


# --- First rows ----------------------------------------------------------------------------------

PIXELS = noise(3, (300, 200, 3))  # more than one IDAT chunk
CUT = {
    "RGB": saved(Image.fromarray(PIXELS)),
    "RGBA": saved(Image.fromarray(PIXELS).convert("RGBA")),
    "grey": saved(Image.fromarray(PIXELS).convert("L")),
    "grey and alpha": saved(Image.fromarray(PIXELS).convert("LA")),
}
WHOLE = {
    "palette": saved(Image.fromarray(PIXELS).quantize(40)),
    "palette of 4 bits": saved(Image.fromarray(PIXELS).quantize(9), bits=4),
    "2 bits": png(noise(0, (300, 200), 4), 2),
    "orientation 1 behind the pixels": png(PIXELS, 8, after=chunk(b"tEXt", b"a\0b")),
    "interlaced": interlaced_png(PIXELS),
    "turned": saved(Image.fromarray(PIXELS), exif=exif(6)),
    "16 bits": png(PIXELS.astype(np.uint16) << 8, 16),
    "animated": saved(
        Image.fromarray(PIXELS), save_all=True, append_images=[Image.fromarray(PIXELS[::-1])]
    ),
    "JPEG": saved(Image.fromarray(PIXELS), "JPEG"),
    "TIFF": saved(Image.fromarray(PIXELS), "TIFF"),
}


@pytest.mark.parametrize("num_rows", [1, 7, 150, 299, 300])
@pytest.mark.parametrize("kind", CUT | WHOLE)
def test_the_first_rows_are_those_of_the_whole_image(kind, num_rows):
    data = (CUT | WHOLE)[kind]
    whole = decode_image(data, "a", APPLIED)
    rows = decode_image(data, "a", APPLIED, num_rows=num_rows)
    np.testing.assert_array_equal(rows[:num_rows], whole[:num_rows])
    assert len(rows) == (num_rows if kind in CUT else len(whole))
    if kind in CUT:
        np.testing.assert_array_equal(whole, Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("num_rows", [100, 299])
def test_a_png_that_is_cut_short_is_refused_whatever_is_needed_of_it(num_rows):
    with pytest.raises(InputError, match=r"^a\.png: unreadable image file \("):
        decode_image(CUT["RGB"][:-1000], "a.png", num_rows=num_rows)


# --- Deep files ----------------------------------------------------------------------------------

DEEP = {
    "grey PNG": lambda v: png(v[..., :1], 16),
    "grey and alpha PNG": lambda v: png(np.dstack([v[..., :1], opaque(v)]), 16),
    "RGB PNG": lambda v: png(v, 16),
    "RGBA PNG": lambda v: png(np.dstack([v, opaque(v)]), 16),
    "grey TIFF": lambda v: tiff(v[..., :1], 1),
    "grey TIFF of Macintosh": lambda v: tiff(v[..., :1], 1, order=">"),
    "packed grey TIFF": lambda v: tiff(v[..., :1], 1, deflate=True),
    "RGB TIFF": lambda v: tiff(v, 2),
    "RGB TIFF of Macintosh": lambda v: tiff(v, 2, order=">"),
    "packed RGB TIFF": lambda v: tiff(v, 2, deflate=True),
    "packed RGB TIFF of Macintosh": lambda v: tiff(v, 2, order=">", deflate=True),
    "RGBA TIFF": lambda v: tiff(np.dstack([v, opaque(v)]), 2, extra=[2]),
    "RGB and infrared TIFF": lambda v: tiff(np.dstack([v, opaque(v)]), 2, extra=[0]),
}


def opaque(values):
    return np.full_like(values[..., :1], 65535)


def deep_values(largest):
    """Of 5x8 pixels, the darkest and brightest in all channels."""
    values = np.random.default_rng(0).integers(0, largest + 1, (5, 8, 3)).astype(np.uint16)
    values[0, 0], values[1, 1] = 0, largest
    return values


def as_rgb(kind, values):
    return np.dstack([values[..., 0]] * 3) if "grey" in kind else values


@pytest.mark.parametrize("kind", DEEP)
def test_of_16_bits_the_upper_8_are_kept(kind):
    for largest in (65535, 16384):
        values = deep_values(largest)
        expected = as_rgb(kind, values >> 8)
        np.testing.assert_array_equal(decode_image(DEEP[kind](values), "a"), expected)
        data = DEEP[kind](values)
        np.testing.assert_array_equal(decode_image(data, "a", Decoding(bit_depth=16)), expected)


@pytest.mark.parametrize(
    ("largest", "depth"), [(1, 8), (255, 8), (256, 10), (1023, 10), (4080, 12), (16383, 14)]
)
@pytest.mark.parametrize("kind", DEEP)
def test_values_of_fewer_bits_in_16_are_refused_until_bit_depth_is_set(kind, largest, depth):
    values = deep_values(largest)
    data = DEEP[kind](values)
    with pytest.raises(FormatError) as error:
        decode_image(data, "a.x")
    assert str(error.value) == (
        f"a.x: has values in 0..{largest} of 65535, which are dark if they have 16 bits;"
        f" set data.bit_depth = {depth} if they have {depth}, or = 16 to take them as they are"
    )
    decoded = decode_image(data, "a", Decoding(bit_depth=depth))
    np.testing.assert_array_equal(decoded, as_rgb(kind, values >> (depth - 8)))
    decoded = decode_image(data, "a", Decoding(bit_depth=16))
    np.testing.assert_array_equal(decoded, as_rgb(kind, values >> 8))


@pytest.mark.parametrize("kind", DEEP)
def test_values_above_the_depth_are_refused(kind):
    data = DEEP[kind](deep_values(5000))
    message = r"a\.x: has values in 0\.\.5000, above the 4095 of data\.bit_depth = 12"
    with pytest.raises(FormatError, match=f"^{message}$"):
        decode_image(data, "a.x", Decoding(bit_depth=12))


@pytest.mark.parametrize("bit_depth", [0, 8, 12, 16])
@pytest.mark.parametrize("kind", DEEP)
def test_black_is_black(kind, bit_depth):
    data = DEEP[kind](deep_values(0))
    assert not decode_image(data, "a", Decoding(bit_depth=bit_depth)).any()


@pytest.mark.parametrize("bit_depth", [0, 8, 10, 12, 16])
def test_a_depth_says_nothing_of_files_with_8_bits_or_fewer(bit_depth):
    decoding = Decoding(bit_depth=bit_depth)
    dark = noise(0, (6, 8, 3), 4)
    for data in (png(dark, 8), tiff(dark, 2), saved(Image.fromarray(dark), "BMP")):
        np.testing.assert_array_equal(decode_image(data, "a", decoding), dark)
    for bits in (1, 2, 4):
        few = noise(0, (6, 8), 1 << bits)
        expected = np.dstack([few * (255 // ((1 << bits) - 1))] * 3)
        np.testing.assert_array_equal(decode_image(png(few, bits), "a", decoding), expected)
        packed = tiff(few[..., None], 1, bits=bits)
        np.testing.assert_array_equal(decode_image(packed, "a", decoding), expected)


def test_a_tiff_that_has_12_bits_says_so():
    values = deep_values(4095)[..., :1]
    data = tiff(values, 1, bits=12)
    for bit_depth in (0, 12, 16):
        decoded = decode_image(data, "a", Decoding(bit_depth=bit_depth))
        np.testing.assert_array_equal(decoded, np.dstack([values[..., 0] >> 4] * 3))
    with pytest.raises(FormatError, match=r"values in 0\.\.255 of 4095, .* data\.bit_depth = 8 if"):
        decode_image(tiff(values >> 4, 1, bits=12), "a")


def test_significant_bits_of_a_png_are_the_upper_ones():
    """As PNG has it: values of 12 bits are scaled up, and a part notes how many there were."""
    values = deep_values(4095)
    scaled = values << 4 | values >> 8
    data = png(scaled, 16).replace(PNG_SIGNATURE, b"")
    data = PNG_SIGNATURE + data[:25] + chunk(b"sBIT", bytes([12] * 3)) + data[25:]
    np.testing.assert_array_equal(decode_image(data, "a"), values >> 4)


def test_cmyk_and_white_is_zero():
    deep = deep_values(65535)
    inks = np.dstack([deep, deep_values(20000)[..., :1]])
    expected = Image.fromarray((inks >> 8).astype(np.uint8), "CMYK").convert("RGB")
    for deflate in (False, True):
        data = tiff(inks, 5, deflate=deflate)
        np.testing.assert_array_equal(decode_image(data, "a"), np.array(expected))
    negative = tiff(deep[..., :1], 0)
    grey = np.dstack([(65535 - deep[..., 0]) >> 8] * 3)
    np.testing.assert_array_equal(decode_image(negative, "a"), grey)


def test_deep_masks_have_the_values_that_are_stored():
    values = noise(0, (5, 8), 19).astype(np.uint16)
    files = png(values, 16), tiff(values[..., None], 1), tiff(values[..., None], 1, order=">")
    for data in (*files, tiff(values[..., None], 1, bits=12)):
        np.testing.assert_array_equal(decode_mask(data, "a"), values)
    few = noise(0, (5, 8), 4)
    for bits in (2, 4):
        for data in (png(few, bits), tiff(few[..., None], 1, bits=bits)):
            np.testing.assert_array_equal(decode_mask(data, "a"), few)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_numbers_of_no_known_range_are_refused(dtype):
    values = np.arange(12).reshape(3, 4, 1).astype(dtype)
    with pytest.raises(FormatError, match=r"^a\.tif: its pixels are .* numbers, in 0\.\.11; "):
        decode_image(tiff(values, 1), "a.tif")


# --- Bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32])
@pytest.mark.parametrize("photometric", [1, 2])
def test_bands_are_read_as_they_were_written_or_named(
    dtype, bands, planes, order, deflate, photometric
):
    """Never as other colours: of files that Pillow reads some come out as one band, or as noise."""
    of_colour = 3 if photometric == 2 else 1
    if bands < of_colour:
        return
    values = np.random.default_rng(0).integers(0, 200, (6, 8, bands)).astype(dtype)
    values = values << 8 if dtype == np.uint16 else values
    bits = 8 * values.dtype.itemsize
    for extra in {(), (0,) * (bands - of_colour)}:
        data = tiff(values, photometric, order=order, planes=planes, deflate=deflate, extra=extra)
        try:
            decoded = decode_image(data, "a.tif")
        except FormatError as error:
            named = rf"is a TIFF of {bands} .*bands? of {bits} bits{' in planes' if planes else ''}"
            is_of_numbers = re.search(r"pixels are .* numbers, in -?\d", str(error)) and bands == 1
            assert is_of_numbers or re.search(named, str(error)), str(error)
            assert is_of_numbers or "gdal_translate" in str(error)
        else:
            eight = values >> 8 if dtype == np.uint16 else values
            assert np.array_equal(decoded, eight[..., [0] * 3 if of_colour == 1 else [0, 1, 2]])
            assert bands <= 2 or of_colour == 3


@pytest.mark.parametrize(("dtype", "bands"), [(np.uint8, 3), (np.uint16, 3), (np.uint8, 4)])
def test_bands_without_colours_say_how_they_become_readable(dtype, bands):
    values = noise(0, (6, 8, bands)).astype(dtype)
    extra = (0,) * (bands - 1)
    for data in (tiff(values, 1), tiff(values, 1, extra=extra, planes=True, deflate=True)):
        for read in (decode_image, decode_mask, image_size, file_format, has_exif_orientation):
            with pytest.raises(FormatError) as error:
                read(data, "sat.tif")
            assert re.fullmatch(
                rf"sat\.tif: is a TIFF of {bands} bands of {8 * values.dtype.itemsize} bits"
                r"( in planes)?, which is not read as a picture; choose bands and range for red,"
                r" green and blue, e\.g\. gdal_translate -of PNG -ot Byte -scale -b 1 -b 2 -b 3"
                r" IN\.tif OUT\.png",
                str(error.value),
            )


def test_colours_and_readable_bands_are_read():
    rgb = noise(0, (6, 8, 4))
    for data in (
        tiff(rgb[..., :3], 2),
        tiff(rgb[..., :3], 2, planes=True),
        tiff(rgb, 2, extra=[0]),
        tiff(rgb, 2, extra=[2], order=">"),
        tiff(rgb.astype(np.uint16) * 257, 2, extra=[0], deflate=True),
    ):
        np.testing.assert_array_equal(decode_image(data, "a"), rgb[..., :3])


def test_what_is_a_picture_of_another_kind_is_named():
    heic = b"\0\0\0\x18ftypheic" + bytes(20)
    for read in (decode_image, decode_mask, image_size):
        with pytest.raises(InputError, match=r"\(HEIF, or a video; save it as JPEG or PNG\)$"):
            read(heic, "a.jpg")
        with pytest.raises(InputError, match=r"\(TIFF with a damaged header\)$"):
            read(b"II*\0" + bytes(40), "a.tif")
        with pytest.raises(InputError, match=r"\(not an image\)$"):
            read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.jpg")


def test_a_jpeg_whose_header_lies_takes_no_memory():
    data = bytearray(saved(Image.fromarray(noise(0, (16, 16, 3))), "JPEG", progressive=True))
    start = data.index(b"\xff\xc2") + 5
    data[start : start + 4] = b"\x40\x00\x40\x00"  # 16384x16384
    with pytest.raises(InputError, match=r"\(\d+ bytes are too few for 16384x16384 pixels\)$"):
        decode_image(bytes(data), "a.jpg")


# --- What decoders say ---------------------------------------------------------------------------

DECODE = """
import sys
from pathlib import Path
from contrastseg_jax.data.images import decode_image, decode_mask, image_size, has_exif_orientation
from contrastseg_jax.errors import InputError
for path in Path(sys.argv[1]).iterdir():
    for read in (decode_image, decode_mask, image_size, has_exif_orientation):
        try:
            read(path.read_bytes(), path.name)
        except InputError as error:
            assert str(error).startswith(path.name + ": "), error
"""


def odd_files():
    """Files about which libpng, libjpeg, libtiff, OpenCV or Pillow would write a line."""
    pixels = noise(0, (32, 40, 3))
    plain, deep = png(pixels, 8), png(pixels.astype(np.uint16) * 257, 16)
    jpeg = saved(Image.fromarray(pixels), "JPEG")
    packed = bytearray(saved(Image.fromarray(pixels), "TIFF", compression="tiff_lzw"))
    packed[len(packed) // 2 : len(packed) // 2 + 20] = bytes(20)
    for name, data in (("plain", plain), ("deep", deep)):
        yield f"{name}_cut.png", data[: len(data) // 2]
        yield f"{name}_no_end.png", data[:-12]
        yield f"{name}_sbit.png", data[:33] + chunk(b"sBIT", b"\x99") + data[33:]
        yield f"{name}_profile.png", data[:33] + chunk(b"iCCP", b"x\0\0damaged") + data[33:]
        yield f"{name}_checksum.png", data[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"!" + data[33:]
        yield f"{name}_pixels.png", data[:-20] + b"!" + data[-19:]
        yield f"{name}_short.png", data.replace(data[16:24], (2 * data[16:24])[4:12])
    yield "cut.jpg", jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    yield "zeros.jpg", jpeg[:-200] + bytes(100) + jpeg[-100:]
    yield "exif.jpg", saved(Image.fromarray(pixels), "JPEG", exif=b"Exif\0\0II*\0damaged")
    yield "lzw.tif", bytes(packed)
    yield "bands.tif", tiff(pixels[..., :1], 1, tags=[(277, [4000])])
    yield "tag.tif", tiff(pixels, 2, deflate=True, tags=[(65000, [1] * 4), (256, [40, 2])])
    yield "order.tif", tiff(pixels, 2, deflate=True, tags=[(65001, [1]), (301, [7] * 5)])
    yield "cut.webp", saved(Image.fromarray(pixels), "WEBP")[:100]
    yield "cut.gif", saved(Image.fromarray(pixels), "GIF")[:300]


def test_decoders_write_no_lines_of_their_own(tmp_path):
    for name, data in odd_files():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
