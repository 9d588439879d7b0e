"""One example, an image and its mask: decode it, and find everything that is wrong with it.

Preparing a data set and auditing it both use this, so that they cannot disagree.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from contrastseg_jax.data.image_files import FormatError, check_checksums
from contrastseg_jax.data.images import (
    decode_image,
    decode_mask,
    file_format,
    has_exif_orientation,
    mask_colors,
)
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.spec import AS_STORED, Decoding, LabelMap
from contrastseg_jax.errors import InputError

ReadMask = Callable[[bytes, str], UInt8[np.ndarray, "h w"]]
ColorCounts = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]  # 0xRRGGBB, pixels of each
Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_PENDING = 64  # results that `in_parallel` computes ahead: bounds the memory they take


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file, or with a data set."""

    kind: str  # which rule is broken, e.g. "unpaired"
    file: str
    message: str  # names the file, what was found and the rule
    is_error: bool = True  # training would stop, or learn something wrong; else a warning


@dataclass(frozen=True)
class RawFormat:
    """How the files of a data set are read before it is prepared."""

    label_map: LabelMap  # the values that masks may hold
    read_mask: ReadMask = decode_mask  # content and name of a mask file to pixel values
    decoding: Decoding = AS_STORED  # of images
    # What each colour (0xRRGGBB) means, of masks that are read by their colours.
    color_names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedExample:
    """The two files of an example: the content of each, or why it could not be read."""

    name: str
    image_file: str
    mask_file: str
    image_data: bytes | OSError
    mask_data: bytes | OSError


@dataclass(frozen=True)
class CheckedExample:
    """An example, as far as it could be decoded, and everything that is wrong with it."""

    name: str
    image_file: str
    mask_file: str
    image_data: bytes = b""
    mask_format: str = ""  # e.g. "PNG L"
    image: UInt8[np.ndarray, "h w 3"] | None = None
    mask: UInt8[np.ndarray, "h2 w2"] | None = None  # pixel values as stored
    mask_colors: ColorCounts | None = None  # of a mask that could not be read for its colours
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class RawSplit:
    """A split before it is prepared."""

    checks: Sequence[Callable[[], CheckedExample]]  # one per example, which is read when called
    findings: Sequence[Finding] = ()  # files that make no example
    hints: Sequence[str] = ()  # of an absent split: files elsewhere that may be meant for it
    drawn: str = ""  # of how many it was drawn, and by which setting; empty: its files are given
    color_names: Mapping[int, str] = field(default_factory=dict)  # as RawFormat has it


Splits = Mapping[str, RawSplit]  # by name


def check_files(name: str, image: Path, mask: Path, raw_format: RawFormat) -> CheckedExample:
    """Reads and decodes the two files of an example."""
    example = EncodedExample(name, str(image), str(mask), _content(image), _content(mask))
    no_image = isinstance(example.image_data, FileNotFoundError)
    no_mask = isinstance(example.mask_data, FileNotFoundError)
    if no_image and no_mask:
        missing = Finding("unpaired", str(image), f"{image}: neither it nor its mask {mask} exists")
    elif no_mask:
        message = f"{image}: image without mask ({mask} does not exist)"
        missing = Finding("unpaired", str(image), message)
    elif no_image:
        message = f"{mask}: mask without image ({image} does not exist)"
        missing = Finding("unpaired", str(mask), message)
    else:
        return check_encoded(example, raw_format)
    return CheckedExample(name, str(image), str(mask), findings=(missing,))


def check_encoded(example: EncodedExample, raw_format: RawFormat) -> CheckedExample:
    """Decodes an example, and compares the sizes of image and mask."""
    image, has_orientation, findings = _check_image(example, raw_format.decoding)
    mask, mask_format, mask_findings = _check_mask(example, raw_format)
    findings += mask_findings
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        message = (
            f"{example.mask_file}: mask of {mask_width}x{mask_height} pixels for an image of "
            f"{width}x{height} ({example.image_file})"
        )
        if mask.shape == (width, height) and has_orientation:
            message += _orientation_remedy(raw_format.decoding)
        findings.append(Finding("size", example.mask_file, message))
    in_color = any(finding.kind == "mask_format" for finding in mask_findings)
    return CheckedExample(
        name=example.name,
        image_file=example.image_file,
        mask_file=example.mask_file,
        image_data=b"" if isinstance(example.image_data, OSError) else example.image_data,
        mask_format=mask_format,
        image=image,
        mask=mask,
        mask_colors=_mask_colors(example, raw_format) if in_color else None,
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
            if len(waiting) > MAX_PENDING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_image(
    example: EncodedExample, decoding: Decoding
) -> tuple[UInt8[np.ndarray, "h w 3"] | None, bool, list[Finding]]:
    """The image, whether it has an EXIF orientation, and what is wrong with it."""
    file = example.image_file
    try:
        content = _verified(example.image_data, file)
        image = decode_image(content, file, decoding)
        has_orientation = has_exif_orientation(content, file)
    except InputError as error:
        return None, False, [_decoding_finding(error, "image_format", example.image_data, file)]
    if not has_orientation:
        return image, False, []
    use = "applied" if decoding.exif_orientation == "applied" else "ignored"
    message = (
        f"{file}: has an EXIF orientation, which is {use}"
        f" (data.exif_orientation = {decoding.exif_orientation})"
    )
    return image, True, [Finding("exif_orientation", file, message, is_error=False)]


def _check_mask(
    example: EncodedExample, raw_format: RawFormat
) -> tuple[UInt8[np.ndarray, "h w"] | None, str, list[Finding]]:
    """The pixel values of the mask, the format of its file, and what is wrong with it."""
    file = example.mask_file
    try:
        content = _verified(example.mask_data, file)
        mask = raw_format.read_mask(content, file)
    except InputError as error:
        return None, "", [_decoding_finding(error, "mask_format", example.mask_data, file)]
    try:
        mask_format = file_format(content, file)
        has_orientation = has_exif_orientation(content, file)
    except InputError:  # not a picture, but e.g. a MATLAB file
        mask_format, has_orientation = "other", False
    findings = []
    if has_orientation:
        message = (
            f"{file}: has an EXIF orientation, which is ignored: masks are used as stored, so it"
            " may not fit its image"
        )
        findings.append(Finding("exif_orientation", file, message, is_error=False))
    try:
        to_train_ids(mask, raw_format.label_map, file)
    except InputError as error:
        findings.append(Finding("unknown_value", file, str(error)))
    return mask, mask_format, findings


def _decoding_finding(
    error: InputError, format_kind: str, data: bytes | OSError, file: str
) -> Finding:
    """The finding that an error of reading or decoding a file makes."""
    if isinstance(error, FormatError):
        return Finding(format_kind, file, str(error))
    kind = "permission" if isinstance(data, PermissionError) else "unreadable"
    return Finding(kind, file, str(error))


def _orientation_remedy(decoding: Decoding) -> str:
    """What makes an image fit a mask that has its width for height."""
    other = "stored" if decoding.exif_orientation == "applied" else "applied"
    return (
        "; the image has an EXIF orientation, and they fit with"
        f" --config.data.exif_orientation={other}"
    )


def _mask_colors(example: EncodedExample, raw_format: RawFormat) -> ColorCounts | None:
    """The colours of a mask; None: they are not what is wrong, or cannot even be decoded."""
    file, of_indices = example.mask_file, raw_format.read_mask is decode_mask
    if not (of_indices or raw_format.color_names):
        return None
    try:
        found = mask_colors(_verified(example.mask_data, file), file, of_indices=of_indices)
    except InputError:
        return None
    if found is None or all(code in raw_format.color_names for code in found[0].tolist()):
        return None
    return found


def _content(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def _verified(data: bytes | OSError, file: str) -> bytes:
    """The content of a file that could be read and whose checksums are right.

    Raises:
        InputError: otherwise.
    """
    if isinstance(data, OSError):
        raise InputError(f"{file}: cannot be read ({data.strerror})")
    check_checksums(data, file)
    return data
