"""One example, an image and its mask: read it, and say what is wrong with it.

Preparing a data set and the audit both ask here, so that they cannot disagree.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from contrastseg_jax.data.image_files import FormatError, check_checksums
from contrastseg_jax.data.images import (
    AS_STORED,
    Decoding,
    decode_image,
    decode_mask,
    file_format,
    is_turned,
    mask_colors,
)
from contrastseg_jax.data.labels import LabelMap, to_train_ids
from contrastseg_jax.errors import InputError

ReadMask = Callable[[bytes, str], UInt8[np.ndarray, "h w"]]
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 64  # results of `in_parallel` that may wait: bounds the memory they take


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file, or with a data set."""

    kind: str  # which rule is broken, e.g. "unpaired"
    file: str
    message: str  # names the file, what was found and the rule
    is_error: bool = True  # training would stop, or learn what is wrong; else a warning


@dataclass(frozen=True)
class Checked:
    """An example as read, as far as it could be, and all that is wrong with it."""

    name: str
    image_file: str
    mask_file: str
    image_data: bytes = b""
    mask_format: str = ""  # e.g. "PNG L"
    image: UInt8[np.ndarray, "h w 3"] | None = None
    mask: UInt8[np.ndarray, "h2 w2"] | None = None  # pixel values as stored
    # Colours (0xRRGGBB) and the pixels of each, where the mask has colour channels.
    mask_colors: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class RawSplit:
    """A split as it is before it is prepared."""

    checks: Sequence[Callable[[], Checked]]  # an example each, read when called
    findings: Sequence[Finding] = ()  # what is wrong with files that make no example
    elsewhere: Sequence[str] = ()  # of an absent split: what lies where it may be meant


Splits = Mapping[str, RawSplit]  # by name


def check_files(
    name: str,
    image: Path,
    mask: Path,
    label_map: LabelMap,
    read_mask: ReadMask = decode_mask,
    decoding: Decoding = AS_STORED,
) -> Checked:
    """Reads the two files of an example to their ends."""
    image_data, mask_data = _content(image), _content(mask)
    no_image = isinstance(image_data, FileNotFoundError)
    no_mask = isinstance(mask_data, FileNotFoundError)
    if no_image and no_mask:
        missing = Finding("unpaired", str(image), f"{image}: neither it nor its mask {mask} exists")
    elif no_mask:
        message = f"{image}: image without mask ({mask} does not exist)"
        missing = Finding("unpaired", str(image), message)
    elif no_image:
        message = f"{mask}: mask without image ({image} does not exist)"
        missing = Finding("unpaired", str(mask), message)
    else:
        return check_encoded(
            name, image_data, mask_data, str(image), str(mask), label_map, read_mask, decoding
        )
    return Checked(name, str(image), str(mask), findings=(missing,))


def check_encoded(
    name: str,
    image_data: bytes | OSError,
    mask_data: bytes | OSError,
    image_file: str,
    mask_file: str,
    label_map: LabelMap,
    read_mask: ReadMask = decode_mask,
    decoding: Decoding = AS_STORED,
) -> Checked:
    """Decodes an example.

    Args:
        name: of the example.
        image_data: the image file's content, or why it could not be read.
        mask_data: likewise the mask's.
        image_file: what findings call the image.
        mask_file: what findings call the mask.
        label_map: the values that masks may hold.
        read_mask: the mask's content and name to pixel values.
        decoding: how images become pixels.
    """
    findings, image, mask, colors, turned = [], None, None, None, False
    applied = decoding.exif_orientation == "applied"
    try:
        content = _readable(image_data, image_file)
        image = decode_image(content, image_file, decoding)
        turned = is_turned(content, image_file)
        if turned:
            use = "and it is turned" if applied else "but it is used as stored"
            message = (
                f"{image_file}: EXIF data ask viewers to turn it, {use}"
                f" (data.exif_orientation = {decoding.exif_orientation})"
            )
            findings.append(Finding("turned", image_file, message, is_error=False))
    except FormatError as error:
        findings.append(Finding("image_format", image_file, str(error)))
    except InputError as error:
        findings.append(Finding(_reason(image_data), image_file, str(error)))
    try:
        mask = read_mask(_readable(mask_data, mask_file), mask_file)
    except FormatError as error:
        findings.append(Finding("mask_format", mask_file, str(error)))
        colors = _colors(mask_data, mask_file)
    except InputError as error:
        findings.append(Finding(_reason(mask_data), mask_file, str(error)))
    mask_format = "" if mask is None else _format(mask_data, mask_file)
    if mask is not None:
        if mask_format != "other" and is_turned(_readable(mask_data, mask_file), mask_file):
            message = (
                f"{mask_file}: EXIF data ask viewers to turn this mask, but masks are used as"
                " stored; it may not have been drawn on the image as it is used"
            )
            findings.append(Finding("turned", mask_file, message, is_error=False))
        try:
            to_train_ids(mask, label_map, mask_file)
        except InputError as error:
            findings.append(Finding("unknown_value", mask_file, str(error)))
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        message = (
            f"{mask_file}: mask of {mask_width}x{mask_height} pixels for an image of "
            f"{width}x{height} ({image_file})"
        )
        if mask.shape == (width, height) and turned:
            other = "stored" if applied else "applied"
            message += (
                f", which EXIF data ask viewers to turn: the other way round they fit,"
                f" --config.data.exif_orientation={other}"
            )
        findings.append(Finding("size", mask_file, message))
    return Checked(
        name=name,
        image_file=image_file,
        mask_file=mask_file,
        image_data=b"" if isinstance(image_data, OSError) else image_data,
        mask_format=mask_format,
        image=image,
        mask=mask,
        mask_colors=colors,
        findings=tuple(findings),
    )


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], title: str
) -> Iterator[Result]:
    """The results in order, computed in threads a little ahead, with a progress bar.

    Unlike `Executor.map` it does not take all items at once: they may be records, not names.
    """
    bar = tqdm(items, title, leave=False, disable=None)
    waiting = deque()
    with ThreadPoolExecutor() as pool:
        for item in bar:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _content(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def _readable(data: bytes | OSError, file: str) -> bytes:
    """The content of a file, if there is one and it is what was written."""
    if isinstance(data, OSError):
        raise InputError(f"{file}: cannot be read ({data.strerror})")
    check_checksums(data, file)
    return data


def _reason(data: bytes | OSError) -> str:
    """The kind of finding that a file which cannot be read or decoded is."""
    return "permission" if isinstance(data, PermissionError) else "unreadable"


def _colors(
    data: bytes | OSError, file: str
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None:
    """Those of a mask that should have none; None: it has none, or cannot be read even for them."""
    try:
        return mask_colors(_readable(data, file), file)
    except InputError:
        return None


def _format(data: bytes | OSError, file: str) -> str:
    """Format and mode of a mask that could be read; "other" if it is no picture, as MATLAB's."""
    try:
        return file_format(_readable(data, file), file)
    except InputError:
        return "other"
