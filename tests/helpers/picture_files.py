"""Files that no library at hand writes: PNGs of any depth, TIFFs of any bands, notes of cameras."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by channels: grey, with alpha, RGB, RGBA


def saved(image, suffix="PNG", **settings):
    file = io.BytesIO()
    image.save(file, suffix, **settings)
    return file.getvalue()


def exif(orientation):
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = orientation
    return note


def chunk(kind, part):
    """A part of a PNG."""
    return struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))


def png(values, bits, size=None, after=b""):
    """A PNG of `[h w]` or `[h w c]` with so many bits per channel.

    `size`: of the image, as its header has it; `after`: parts behind the pixels.
    """
    values = values.reshape(*values.shape[:2], -1)
    height, width = size or values.shape[:2]
    places = np.arange(bits)[::-1]
    rows = np.packbits((values[..., None] >> places & 1).reshape(len(values), -1), axis=1)
    color_type = COLOR_TYPES[values.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")
    return PNG_SIGNATURE + parts


def interlaced_png(values):
    """A PNG of `u8[h w 3]` in Adam7's seven passes."""
    height, width = values.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    rows = [
        b"\0" + row.tobytes()
        for top, left, down, right in [*passes, (1, 0, 2, 1)]
        for row in values[top::down, left::right]
        if row.size
    ]
    header = struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[3], 0, 0, 1)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")
    return PNG_SIGNATURE + b"".join(chunk(*part) for part in parts)


def tiff(
    values, photometric, *, order="<", planes=False, deflate=False, extra=(), bits=None, tags=()
):
    """A TIFF of `[h w c]`: 8, 16 or 32 bits in one strip, or one for each plane.

    `photometric`: 0 and 1 are grey (white or black is 0), 2 RGB, 5 CMYK. `extra`: what the bands
    beyond those are. `bits`: of the values, if they are to be packed. `tags`: more of them.
    """
    height, width, bands = values.shape
    parts = list(np.moveaxis(values, -1, 0)) if planes else [values]
    if bits:
        places = np.arange(bits)[::-1]
        parts = [
            np.packbits((part.reshape(height, -1, 1) >> places & 1), axis=None) for part in parts
        ]
    strips = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    depth, kind = bits or 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    at = 8 + np.cumsum([0, *map(len, strips)])
    entries = {
        **{256: [width], 257: [height], 258: [depth] * bands, 259: [8 if deflate else 1]},
        **{262: [photometric], 273: [int(start) for start in at[:-1]], 277: [bands]},
        **{278: [height], 279: [*map(len, strips)], 284: [2 if planes else 1]},
        **({338: [*extra]} if extra else {}),
        **({339: [kind] * bands} if kind > 1 else {}),
        **dict(tags),
    }
    out = b"".join(strips)
    table = b""
    for tag, numbers in sorted(entries.items()):
        numbers = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 4:
            place = struct.pack(f"{order}I", 8 + len(out))
            out += numbers
        else:
            place = numbers
        table += struct.pack(f"{order}HHI", tag, 4, len(numbers) // 4) + place
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(out))
    return head + out + struct.pack(f"{order}H", len(entries)) + table + bytes(4)
