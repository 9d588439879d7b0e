"""The numbers of a split: every file of a data set read once, and what training will find in it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import combinations
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from contrastseg_jax.data.audit.examples import (
    CheckedExample,
    ColorCounts,
    Finding,
    RawSplit,
    Splits,
    in_parallel,
)
from contrastseg_jax.data.labels import train_id_table, unknown_values, value_counts
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.structs import IGNORE_LABEL
from contrastseg_jax.text import count_of

MAX_LISTED_CLASSES = 10  # in a message
MAX_COLORS = 256  # counted in the masks of a split; masks with more show no classes
MAX_LISTED_COLORS = 30
TILE_SIDE = 480  # pixels, the longer side of an example on the sheet


@dataclass(frozen=True)
class ExampleSummary:
    """What is kept of an example once its pixels are counted."""

    name: str
    image_file: str
    mask_file: str
    image_hash: bytes  # of the file; empty: it could not be read
    mask_format: str
    size: tuple[int, int] | None  # height, width of the image
    value_counts: Int64[np.ndarray, "256"] | None  # pixels of each mask value
    mask_colors: ColorCounts | None
    findings: tuple[Finding, ...]


def _zeros() -> Int64[np.ndarray, "256"]:
    return np.zeros(256, np.int64)


@dataclass
class SplitAudit:
    """What a split holds. Pixels are those of masks that could be decoded."""

    num_examples: int = 0
    findings: list[Finding] = field(default_factory=list)
    # Per mask value.
    value_pixels: Int64[np.ndarray, "256"] = field(default_factory=_zeros)
    value_images: Int64[np.ndarray, "256"] = field(default_factory=_zeros)
    # Per class id; at IGNORE_LABEL the pixels without class.
    class_pixels: Int64[np.ndarray, "256"] = field(default_factory=_zeros)
    class_images: Int64[np.ndarray, "256"] = field(default_factory=_zeros)
    # All pixels of the images in which a class occurs.
    class_image_pixels: Int64[np.ndarray, "256"] = field(default_factory=_zeros)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    mask_formats: Counter[str] = field(default_factory=Counter)
    unknown: list[tuple[str, int, int]] = field(default_factory=list)  # file, value, pixels
    # Of masks that could not be read for their colours: the files, and per 0xRRGGBB, for
    # MAX_COLORS + 1 at most, pixels and masks.
    color_mask_files: list[str] = field(default_factory=list)
    color_mask_pixels: int = 0
    color_pixels: Counter[int] = field(default_factory=Counter)
    color_masks: Counter[int] = field(default_factory=Counter)
    color_names: Mapping[int, str] = field(default_factory=dict)  # as RawSplit has it
    file_by_hash: dict[bytes, str] = field(default_factory=dict)  # of an image -> its first file
    drawable: list[int] = field(default_factory=list)  # examples whose image and mask fit


@dataclass(frozen=True)
class Example:
    """A small version of an image with its class ids, to look at."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    label: UInt8[np.ndarray, "h w"]


def audit_split(
    raw: RawSplit,
    label_map: LabelMap,
    split: str,
    too_large: Callable[[tuple[int, int]], str] = lambda size: "",
) -> SplitAudit:
    """Reads every example of a split once, in threads. Memory does not grow with the images.

    `too_large`: why an image of (height, width) cannot be evaluated; empty: it can. In the split to
    train on, train and the like, which is cut into crops, that is a warning.
    """
    audit = SplitAudit(findings=[*raw.findings], color_names=raw.color_names)
    table = train_id_table(label_map)
    for index, example in enumerate(in_parallel(_summarize, raw.checks, f"Reading {split}")):
        audit.num_examples += 1
        audit.findings += example.findings
        if example.image_hash:
            audit.file_by_hash.setdefault(example.image_hash, example.image_file)
        if example.size:
            audit.sizes[example.size] += 1
            if problem := too_large(example.size):
                file, is_error = example.image_file, not split.startswith("train")
                found = Finding("too_large", file, f"{file}: {problem}", is_error=is_error)
                audit.findings.append(found)
        if example.mask_colors is not None:
            _add_colors(audit, example.mask_file, *example.mask_colors)
        if example.value_counts is not None:
            audit.mask_formats[example.mask_format] += 1
            unknown = unknown_values(example.value_counts, label_map)
            audit.unknown += [(example.mask_file, value, unknown[value]) for value in unknown]
            _add_pixels(audit, example.value_counts, table)
            if example.size and not any(finding.kind == "size" for finding in example.findings):
                audit.drawable.append(index)
    return audit


def dataset_findings(
    audits: Mapping[str, SplitAudit], label_map: LabelMap, splits_of_training: Sequence[str]
) -> list[Finding]:
    """What no single file shows: splits and classes without a pixel, images in two splits.

    That a split has no labelled pixel at all is an error only in those that training reads: the
    labels of a test split may be secret.
    """
    class_findings = [
        finding
        for split, audit in audits.items()
        for finding in _absent_classes(split, audit, label_map, split in splits_of_training)
    ]
    return [*class_findings, *_duplicates(audits)]


def _absent_classes(
    split: str, audit: SplitAudit, label_map: LabelMap, is_needed: bool
) -> list[Finding]:
    """Classes that never occur in a split; `is_needed`: that none does is an error."""
    if not audit.value_pixels.any():  # no mask could be decoded, which has findings of its own
        return []
    num_classes = len(label_map.names)
    absent = np.flatnonzero(audit.class_pixels[:num_classes] == 0)
    if len(absent) == num_classes:
        message = f"split '{split}': no pixel has a class"
        return [Finding("unlabelled", split, message, is_error=is_needed)]
    if not len(absent):
        return []
    names = [label_map.names[class_id] for class_id in absent]
    num_more = len(names) - MAX_LISTED_CLASSES
    more = f" and {num_more} more" if num_more > 0 else ""
    message = f"split '{split}': has no pixel of {', '.join(names[:MAX_LISTED_CLASSES])}{more}"
    ignored = [
        value
        for value in np.flatnonzero(audit.value_pixels).tolist()
        if label_map.train_ids.get(value) == IGNORE_LABEL
    ]
    if ignored:
        message += f"; mask values that occur and mean no class: {ignored}"
    return [Finding("absent_class", split, message, is_error=False)]


def _duplicates(audits: Mapping[str, SplitAudit]) -> list[Finding]:
    """Image files that two splits have in common."""
    findings = []
    for split, other in combinations(audits, 2):
        first, second = audits[split].file_by_hash, audits[other].file_by_hash
        for key in first:
            if key in second:
                message = (
                    f"{second[key]}: in '{other}', is the same file as {first[key]} in '{split}'"
                )
                findings.append(Finding("duplicate", second[key], message, is_error=False))
    return findings


def missing_split_findings(
    audits: Mapping[str, SplitAudit], splits_of_training: Sequence[str], hints: Sequence[str]
) -> list[Finding]:
    """A finding for each split that training needs and that is missing.

    `hints`: files elsewhere that may be meant for them; the first finding lists them.
    """
    missing = [split for split in splits_of_training if split not in audits]
    messages = [f"split '{split}': has no examples, training needs some" for split in missing]
    if hints and messages:
        messages[0] = "\n".join([messages[0], *hints])
    return [Finding("no_split", *found) for found in zip(missing, messages, strict=True)]


def allow_missing_masks(audit: SplitAudit) -> SplitAudit:
    """The audit of a split that training does not read: that it has no mask at all is a warning."""
    findings = [
        replace(finding, is_error=finding.is_error and finding.kind != "no_masks")
        for finding in audit.findings
    ]
    return replace(audit, findings=findings)


def color_results(audit: SplitAudit) -> dict[str, Any]:
    """What masks hold that could not be read for their colours, the most frequent colour first.

    `class`: what a colour means by `data.palette`; None: nothing.
    """
    return {
        "by_palette": bool(audit.color_names),
        "masks": len(audit.color_mask_files),
        "too_many": len(audit.color_pixels) > MAX_COLORS,
        "colors": [
            {
                "color": [color >> 16, color >> 8 & 255, color & 255],
                "pixels": pixels,
                "share": pixels / audit.color_mask_pixels,
                "masks": audit.color_masks[color],
                "class": audit.color_names.get(color),
            }
            for color, pixels in audit.color_pixels.most_common(MAX_COLORS)
        ],
        "files": audit.color_mask_files,
    }


def color_table(split: str, results: Mapping[str, Any]) -> str:
    """`color_results` as text."""
    colors, by_palette = results["colors"], results["by_palette"]
    number = f"in {len(colors)} colours"
    if results["too_many"]:
        number = (
            f"in more than {MAX_COLORS} colours; these are not masks of classes, or were saved as"
            " JPEG or with soft edges"
        )
    kind = "not read by data.palette" if by_palette else "with colour channels"
    masks = f"{count_of(results['masks'], 'mask')} {kind}"
    if results["masks"] > 1:
        masks += f" ({results['files'][0]}, ...)"
    rows = [
        "    #{:02x}{:02x}{:02x} ".format(*found["color"])
        + f"{'({}, {}, {})'.format(*found['color']):16}{found['share']:7.2%} of the pixels, in"
        f" {found['masks']} of {results['masks']}"
        + (f": {found['class'] or 'not in data.palette'}" if by_palette else "")
        for found in colors[:MAX_LISTED_COLORS]
    ]
    more = len(colors) - MAX_LISTED_COLORS
    rows += [f"    and {more} more in audit.json"] if more > 0 else []
    title = f"split '{split}': {masks}, {number}"
    return "\n".join([title, *rows])


def merge_color_findings(audit: SplitAudit, split: str) -> list[Finding]:
    """The findings of a split; those of several colour masks are merged into one."""
    if len(audit.color_mask_files) < 2:
        return audit.findings
    rest = [found for found in audit.findings if found.file not in {*audit.color_mask_files}]
    return [*rest, Finding("mask_format", split, color_table(split, color_results(audit)))]


def sheet_examples(
    splits: Splits, audits: Mapping[str, SplitAudit], label_map: LabelMap, number: int
) -> list[Example]:
    """At most `number` examples, shared out evenly over the splits and spread evenly over each."""
    table, examples = train_id_table(label_map), []
    parts = np.array_split(np.arange(number), len(audits)) if audits else []
    for (split, audit), part in zip(audits.items(), parts, strict=True):
        places = np.linspace(0, len(audit.drawable) - 1, min(len(part), len(audit.drawable)))
        chosen = sorted({audit.drawable[place] for place in places.round().astype(int)})
        examples += [_thumbnail(splits[split].checks[index](), table, split) for index in chosen]
    return examples


def _summarize(check: Callable[[], CheckedExample]) -> ExampleSummary:
    checked = check()
    return ExampleSummary(
        name=checked.name,
        image_file=checked.image_file,
        mask_file=checked.mask_file,
        image_hash=sha256(checked.image_data).digest() if checked.image_data else b"",
        mask_format=checked.mask_format,
        size=None if checked.image is None else (checked.image.shape[0], checked.image.shape[1]),
        value_counts=None if checked.mask is None else value_counts(checked.mask),
        mask_colors=checked.mask_colors,
        findings=checked.findings,
    )


def _add_pixels(
    audit: SplitAudit, counts: Int64[np.ndarray, "256"], table: UInt8[np.ndarray, "256"]
) -> None:
    """Add the pixels of one mask."""
    by_class = np.zeros(256, np.int64)
    np.add.at(by_class, table, counts)
    audit.value_pixels += counts
    audit.value_images += counts > 0
    audit.class_pixels += by_class
    audit.class_images += by_class > 0
    audit.class_image_pixels[by_class > 0] += counts.sum()


def _add_colors(
    audit: SplitAudit, file: str, colors: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> None:
    """Add the colours of one mask, the most frequent first, as long as they are few."""
    audit.color_mask_files.append(file)
    audit.color_mask_pixels += int(counts.sum())
    for i in np.argsort(-counts, kind="stable")[: MAX_COLORS + 1]:
        color = int(colors[i])
        if color in audit.color_pixels or len(audit.color_pixels) <= MAX_COLORS:
            audit.color_pixels[color] += int(counts[i])
            audit.color_masks[color] += 1


def _thumbnail(checked: CheckedExample, table: UInt8[np.ndarray, "256"], split: str) -> Example:
    if checked.image is None or checked.mask is None:
        raise OSError(f"{checked.image_file}: was readable before, and no longer is")
    height, width = checked.mask.shape
    scale = min(1, TILE_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Example(
        name=f"{split} {checked.name}",
        image=cv2.resize(checked.image, size, interpolation=cv2.INTER_AREA),
        label=cv2.resize(cv2.LUT(checked.mask, table), size, interpolation=cv2.INTER_NEAREST_EXACT),
    )
