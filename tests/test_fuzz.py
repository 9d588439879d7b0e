"""Whatever a file or a setting holds, what is wrong with it is an InputError.

Both fuzzers draw the same examples in every run; more: `HYPOTHESIS_EXAMPLES=20000 pytest
tests/test_fuzz.py`.
"""

import os
import struct
import zlib

import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from picture_files import exif, png, saved, tiff
from PIL import Image
from raw_data import noise

from contrastseg_jax import cli, commands
from contrastseg_jax.config.load import from_json, override, schema, to_json
from contrastseg_jax.config.rules import broken_rules
from contrastseg_jax.config.tree import leaves
from contrastseg_jax.data.image_files import check_checksums
from contrastseg_jax.data.images import (
    decode_image,
    decode_mask,
    file_format,
    has_exif_orientation,
    image_size,
)
from contrastseg_jax.data.spec import Decoding
from contrastseg_jax.errors import InputError

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))


def fuzzed(examples):
    """Settings of a fuzzer: the same examples each time, and those that fail can be pasted."""
    return settings(
        max_examples=ROUNDS or examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


# --- Files ---------------------------------------------------------------------------------------


def small_files():
    """A whole file of each kind, with the parts that plugins read."""
    rgb, grey = noise(0, (9, 12, 3)), noise(1, (9, 12))
    deep = rgb.astype(np.uint16) * 257
    color, index, inks = Image.fromarray(rgb), Image.fromarray(grey, "P"), Image.fromarray(rgb)
    index.putpalette([value for value in range(256) for _ in "RGB"])
    note = exif(6)
    yield png(rgb, 8)
    yield png(grey >> 4, 4)
    yield png(deep, 16)
    yield png(np.dstack([deep[..., :1], deep[..., :1]]), 16)
    yield saved(index, transparency=bytes(range(256)), exif=note, icc_profile=bytes(128))
    yield saved(color, "JPEG", exif=note, icc_profile=bytes(128))
    yield saved(color, "JPEG", progressive=True)
    yield saved(inks.convert("CMYK"), "JPEG")
    yield saved(color, "MPO", save_all=True, append_images=[color], exif=note)
    for compression in (None, "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        yield saved(color, "TIFF", compression=compression, exif=note)
    yield saved(index, "TIFF")
    yield saved(Image.fromarray(grey > 99), "TIFF", compression="group4")
    yield tiff(deep, 2, order=">", tags=[(274, [3])])
    yield tiff(grey[..., None].astype(np.uint16), 1)
    yield tiff(rgb, 2, planes=True, deflate=True)
    for lossless in (False, True):
        yield saved(color, "WEBP", lossless=lossless, exif=note)
    yield saved(color, "WEBP", save_all=True, append_images=[color.rotate(90)])
    yield saved(color, "BMP")
    yield saved(index, "BMP")
    yield saved(index, "GIF", save_all=True, append_images=[index.rotate(90)], transparency=3)


FILES = tuple(small_files())
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 16, 127, 128, 255, 256, 0x4000, 0x7FFF, 0xFFFF, 1 << 24, 2**31, -1)


def with_checksums(data):
    """A PNG whose parts are whole, whatever is in them, so that decoders read on."""
    data, start = bytearray(data), 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[start + 4 : end]))
        start = end + 4
    return bytes(data)


def with_tag(data, number, kind, count, value):
    """A classic TIFF one of whose tags has another type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(f"{order}I", data, 4)[0]
    if data[:2] not in (b"II", b"MM") or start + 2 > len(data):
        return data
    entries = struct.unpack_from(f"{order}H", data, start)[0] or 1
    at = start + 2 + 12 * (number % entries)
    if at + 12 > len(data):
        return data
    tag, *old = struct.unpack_from(f"{order}HHII", data, at)
    new = [
        o if n is None else n & 0xFFFFFFFF for o, n in zip(old, (kind, count, value), strict=True)
    ]
    return data[:at] + struct.pack(f"{order}HHII", tag, *new) + data[at + 12 :]


@st.composite
def mutated_files(draw):
    data = draw(st.sampled_from(FILES))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        # Headers are short, and what plugins trip over.
        at = at % 64 if draw(st.booleans()) else at
        way = draw(st.sampled_from(("byte", "number", "cut", "insert", "splice", "tag", "tag")))
        if way == "byte":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif way == "number":
            code = draw(st.sampled_from(("<H", ">H", "<I", ">I")))
            size = struct.calcsize(code)
            number = draw(st.sampled_from(NUMBERS)) & (1 << 8 * size) - 1
            data = data[:at] + struct.pack(code, number) + data[at + size :]
        elif way == "cut":
            data = data[:at]
        elif way == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:]
        elif way == "splice":
            other = draw(st.sampled_from(FILES))
            data = data[:at] + other[draw(st.integers(0, len(other))) :]
        else:
            optional = st.one_of(st.none(), st.sampled_from(NUMBERS))
            kinds = st.one_of(st.none(), st.integers(0, 18))
            numbers = draw(st.integers(0, 30)), draw(kinds), draw(optional), draw(optional)
            data = with_tag(data, *numbers) if len(data) > 8 else data
    return with_checksums(data) if data[:4] == b"\x89PNG" and draw(st.booleans()) else data


def fractional_orientation():
    """The type of a TIFF's tag is that of fractions: Pillow's comparison of it is a TypeError."""
    data = saved(Image.fromarray(noise(0, (9, 12, 3))), "TIFF")
    for number in range(20):
        yield with_tag(data, number, 5, None, None)


APPLIED = Decoding(exif_orientation="applied", bit_depth=12)
READS = {
    "image": decode_image,
    "image applied": lambda data, name: decode_image(data, name, APPLIED),
    "mask": decode_mask,
    "size": image_size,
    "size applied": lambda data, name: image_size(data, name, APPLIED),
    "format": file_format,
    "orientation": has_exif_orientation,
    "checksums": check_checksums,
}


def read(data):
    """What each function gives; an error must be an InputError that names the file."""
    results = {}
    for what, function in READS.items():
        try:
            results[what] = function(data, "a.file")
        except InputError as error:
            assert str(error).startswith("a.file: ") and "\n" not in str(error), str(error)
            assert "object at 0x" not in str(error), str(error)
    for what, decoding in (("image", "size"), ("image applied", "size applied")):
        if what in results:
            assert results[what].shape[:2] == results[decoding]
    return results


@pytest.mark.parametrize("index", range(len(FILES)))
def test_the_files_that_are_mutated_are_read(index):
    assert {"size", "format", "orientation", "checksums"} <= read(FILES[index]).keys()


@fuzzed(1500)
@given(mutated_files())
def test_whatever_a_file_holds_its_fault_is_an_input_error(data):
    read(data)


def test_a_tag_of_a_fractional_type_is_an_input_error():
    for data in fractional_orientation():
        read(data)


# --- Settings ------------------------------------------------------------------------------------

DEFAULT = schema()
KNOWN = dict(leaves(DEFAULT))
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
VALUES = st.one_of(
    TEXTS,
    st.sampled_from(
        (
            *("nan", "inf", "-inf", "1e999", "-0.0", "1j", "9" * 400, "1" * 5000, "True", "None"),
            *("()", "((),)", "[[]]", "{}", "{[]: 1}", "(1, 'a')", "('a', 'a')", "b'a'", "..."),
            *("\0", "a\0b", "\ud800", "~\ud800", "~/\0", "(" * 300, "-" * 300 + "1", "[" * 3000),
            *("gs://a", "(1, " + "9" * 400 + ")", "(1, nan)", "(0.5, 2)", "f'{a}'", "lambda: 0"),
        )
    ),
    st.integers().map(str),
    st.floats().map(repr),
    st.lists(st.one_of(st.integers(), st.floats(), TEXTS), max_size=4).map(
        lambda v: repr(tuple(v))
    ),
)
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(sorted(KNOWN)), VALUES).map("=".join),
    st.tuples(TEXTS, VALUES).map("=".join),
    TEXTS,
)


@fuzzed(1500)
@given(st.lists(OVERRIDES, min_size=1, max_size=4))
@example(["data.root=\0"])
@example(["model.init_from=\ud800"])
@example(["augment.scale_range=(1, 1" + "0" * 400 + ")"])
def test_whatever_a_setting_holds_its_fault_is_an_input_error(overrides):
    try:
        config = override(DEFAULT, overrides)
    except InputError:
        return
    broken = broken_rules(config, choices={}, num_devices=1)
    assert all(isinstance(line, str) for line in broken)
    if not broken:
        assert from_json(to_json(config), "config.json") == config


PATHS = st.one_of(TEXTS, st.sampled_from(("\0", "a\0", "\ud800", "\udcff/x", "~\ud800", "n" * 300)))
MODES = {
    "train": ("workdir",),
    "eval": ("workdir", "config"),
    "audit": ("workdir",),
    "predict": ("workdir", "input", "output"),
    "plan": ("output", "config"),
    "convert": ("input", "output"),
}


@fuzzed(400)
@given(st.sampled_from(sorted(MODES)), st.lists(PATHS, min_size=3, max_size=3))
@example("train", ["a\0", "", ""])
@example("predict", ["a", "\ud800", "b"])
def test_whatever_a_path_on_the_command_line_holds_its_fault_is_an_error(mode, paths):
    """Of the kinds that `main` prints: the system says itself that a name is too long."""
    arguments = [f"--{name}={path}" for name, path in zip(MODES[mode], paths, strict=False)]
    with flagsaver.flagsaver():
        try:
            cli.FLAGS(["main.py", f"--mode={mode}", *arguments])
            understood = cli.read_arguments([])
            if mode != "convert":
                commands.config_for(understood)
        except (InputError, OSError) as error:
            assert f"{error}"
