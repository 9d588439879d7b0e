"""Is the data right? Every file of a data set read once, and what training will find in it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import combinations
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from contrastseg_jax.data.audit.examples import Checked, Finding, RawSplit, Splits, in_parallel
from contrastseg_jax.data.labels import LabelMap, train_id_table, unknown_values, value_counts
from contrastseg_jax.structs import IGNORE_LABEL

NEEDED = ("train", "val")  # splits that training reads
NAMED = 10  # classes that a message names
MAX_COLORS = 256  # of the masks of a split; more are no classes
COLORS_NAMED = 30
TILE_SIDE = 480  # pixels, the longer side of an example to show


@dataclass(frozen=True)
class Examined:
    """What stays of an example when its pixels are counted."""

    name: str
    image_file: str
    mask_file: str
    image_hash: bytes  # of the file; empty: it could not be read
    mask_format: str
    size: tuple[int, int] | None  # height, width of the image
    value_counts: Int64[np.ndarray, "256"] | None  # pixels of each mask value
    # Colours and their pixels, of a mask that has some.
    mask_colors: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None
    findings: tuple[Finding, ...]


@dataclass
class SplitAudit:
    """What a split holds. Pixels are those of masks that could be read."""

    num_examples: int = 0
    value_pixels: Int64[np.ndarray, "256"] = field(default_factory=partial(np.zeros, 256, np.int64))
    value_images: Int64[np.ndarray, "256"] = field(default_factory=partial(np.zeros, 256, np.int64))
    # By class id, and at IGNORE_LABEL what has none.
    class_pixels: Int64[np.ndarray, "256"] = field(default_factory=partial(np.zeros, 256, np.int64))
    class_images: Int64[np.ndarray, "256"] = field(default_factory=partial(np.zeros, 256, np.int64))
    # All pixels of the images in which a class occurs.
    pixels_around: Int64[np.ndarray, "256"] = field(
        default_factory=partial(np.zeros, 256, np.int64)
    )
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    mask_formats: Counter[str] = field(default_factory=Counter)
    in_color: list[str] = field(default_factory=list)  # masks that have colour channels
    color_pixels: Counter[int] = field(default_factory=Counter)  # by 0xRRGGBB, of MAX_COLORS + 1
    color_masks: Counter[int] = field(default_factory=Counter)
    pixels_in_color: int = 0
    findings: list[Finding] = field(default_factory=list)
    unknown: list[tuple[str, int, int]] = field(default_factory=list)  # file, value, pixels
    first_of: dict[bytes, str] = field(default_factory=dict)  # image's hash -> its first file
    to_show: list[int] = field(default_factory=list)  # examples whose image and mask fit


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

    `too_large`: why an image of (height, width) cannot be evaluated; empty: it can. Training, which
    takes crops, can use it all the same.
    """
    table, audit = train_id_table(label_map), SplitAudit(findings=[*raw.findings])
    for index, example in enumerate(in_parallel(_examine, raw.checks, f"Reading {split}")):
        audit.num_examples += 1
        audit.findings += example.findings
        if example.size:
            audit.sizes[example.size] += 1
            if problem := too_large(example.size):
                message, is_error = f"{example.image_file}: {problem}", split != "train"
                found = Finding("too_large", example.image_file, message, is_error=is_error)
                audit.findings.append(found)
        if example.image_hash:
            audit.first_of.setdefault(example.image_hash, example.image_file)
        if example.mask_colors is not None:
            _count_colors(audit, example.mask_file, *example.mask_colors)
        if example.value_counts is None:
            continue
        audit.mask_formats[example.mask_format] += 1
        unknown = unknown_values(example.value_counts, label_map)
        audit.unknown += [(example.mask_file, value, unknown[value]) for value in unknown]
        _count(audit, example.value_counts, table)
        if example.size and not any(finding.kind == "size" for finding in example.findings):
            audit.to_show.append(index)
    return audit


def general_findings(audits: Mapping[str, SplitAudit], label_map: LabelMap) -> list[Finding]:
    """What no single file shows: splits and classes that are empty, images in two splits.

    Only what is trained on or chosen by needs labels: those of a test split may be secret.
    """
    findings = []
    for split, audit in audits.items():
        if not audit.value_pixels.any():  # no mask could be read, which is told
            continue
        num_classes = len(label_map.names)
        absent = np.flatnonzero(audit.class_pixels[:num_classes] == 0)
        if len(absent) == num_classes:
            message = f"split '{split}': no pixel has a class"
            is_error = split in NEEDED
            findings.append(Finding("unlabelled", split, message, is_error=is_error))
        elif len(absent):
            names = [label_map.names[class_id] for class_id in absent]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            message = f"split '{split}': has no pixel of {', '.join(names[:NAMED])}{more}"
            ignored = [
                value
                for value in np.flatnonzero(audit.value_pixels).tolist()
                if label_map.train_ids.get(value) == IGNORE_LABEL
            ]
            if ignored:
                message += f"; mask values that occur and are no class: {ignored}"
            findings.append(Finding("absent_class", split, message, is_error=False))
    for split, other in combinations(audits, 2):
        first, second = audits[split].first_of, audits[other].first_of
        findings += [
            Finding(
                "duplicate",
                second[key],
                f"{second[key]}: in '{other}', is the same file as {file} in '{split}'",
                is_error=False,
            )
            for key, file in first.items()
            if key in second
        ]
    return findings


def missing_splits(audits: Mapping[str, SplitAudit], elsewhere: Sequence[str]) -> list[Finding]:
    """One finding for each split that training needs and that is not there.

    `elsewhere`: what is found in places that may be meant for them, told with the first.
    """
    missing = [split for split in NEEDED if split not in audits]
    messages = [f"split '{split}': has no examples, training needs some" for split in missing]
    if elsewhere and messages:
        messages[0] = "\n".join([messages[0], *elsewhere])
    return [Finding("no_split", *found) for found in zip(missing, messages, strict=True)]


def with_optional_masks(audit: SplitAudit, split: str) -> SplitAudit:
    """The audit where a split that training does not read may lack its masks altogether."""
    if split in NEEDED:
        return audit
    findings = [
        replace(finding, is_error=finding.is_error and finding.kind != "no_masks")
        for finding in audit.findings
    ]
    return replace(audit, findings=findings)


def color_results(audit: SplitAudit) -> dict[str, Any]:
    """The colours of the masks that have some, by their pixels."""
    return {
        "masks": len(audit.in_color),
        "too_many": len(audit.color_pixels) > MAX_COLORS,
        "colors": [
            {
                "color": [color >> 16, color >> 8 & 255, color & 255],
                "pixels": pixels,
                "share": pixels / audit.pixels_in_color,
                "masks": audit.color_masks[color],
            }
            for color, pixels in audit.color_pixels.most_common(MAX_COLORS)
        ],
        "files": audit.in_color,
    }


def color_table(split: str, results: Mapping[str, Any]) -> str:
    """What `color_results` found, to read, with what mends it."""
    colors = results["colors"]
    number = f"{len(colors)} colours"
    remedy = "write the class id of each colour into one channel"
    if results["too_many"]:
        number = f"more than {MAX_COLORS} colours"
        remedy = (
            "these are no masks of classes, or were saved as JPEG or with soft edges; export them"
            " again from their source"
        )
    elif all(len({*found["color"]}) == 1 for found in colors):
        remedy = "all are grey, so save one channel of them alone"
    masks = f"{results['masks']} mask{'s' if results['masks'] > 1 else ''} with colour channels"
    if results["masks"] > 1:
        masks += f" ({results['files'][0]}, ...)"
    rows = [
        f"    {'({}, {}, {})'.format(*found['color']):16}{found['share']:7.2%} of the pixels, in"
        f" {found['masks']} of {results['masks']}"
        for found in colors[:COLORS_NAMED]
    ]
    more = len(colors) - COLORS_NAMED
    rows += [f"    and {more} more in audit.json"] if more > 0 else []
    title = f"split '{split}': {masks}, in {number}; {remedy}"
    return "\n".join([title, *rows])


def told_once(audit: SplitAudit, split: str) -> list[Finding]:
    """The findings of a split, those of its colour masks together as one if there are several."""
    if len(audit.in_color) < 2:
        return audit.findings
    rest = [found for found in audit.findings if found.file not in {*audit.in_color}]
    return [*rest, Finding("mask_format", split, color_table(split, color_results(audit)))]


def median_frequency_weights(audit: SplitAudit, num_classes: int) -> Float[np.ndarray, " k"]:
    """Class weights median(f) / f_c (Eigen & Fergus, ICCV 2015, section 4.3.2).

    f_c: pixels of class c over all pixels of the images in which c occurs. A class that never
    occurs has the weight 1.
    """
    pixels = audit.class_pixels[:num_classes].astype(np.float64)
    occurs: Bool[np.ndarray, " k"] = pixels > 0
    weights = np.ones(num_classes)
    if occurs.any():
        frequency = pixels[occurs] / audit.pixels_around[:num_classes][occurs]
        weights[occurs] = np.median(frequency) / frequency
    return weights


def enet_weights(audit: SplitAudit, num_classes: int) -> Float[np.ndarray, " k"]:
    """Class weights 1 / ln(1.02 + p_c) (Paszke et al., ENet, 2016), p_c: share of labelled pixels.

    They lie between 1.4 and 50.5.
    """
    pixels = audit.class_pixels[:num_classes]
    return 1 / np.log(1.02 + pixels / max(pixels.sum(), 1))


def examples_to_show(
    splits: Splits, audits: Mapping[str, SplitAudit], label_map: LabelMap, number: int
) -> list[Example]:
    """At most `number` examples, as many of each split, spread evenly over its length."""
    table, shown = train_id_table(label_map), []
    parts = np.array_split(np.arange(number), len(audits)) if audits else []
    for (split, audit), part in zip(audits.items(), parts, strict=True):
        places = np.linspace(0, len(audit.to_show) - 1, min(len(part), len(audit.to_show)))
        chosen = sorted({audit.to_show[place] for place in places.round().astype(int)})
        shown += [_small(splits[split].checks[index](), table, split) for index in chosen]
    return shown


def _examine(check: Callable[[], Checked]) -> Examined:
    checked = check()
    return Examined(
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


def _count(
    audit: SplitAudit, counts: Int64[np.ndarray, "256"], table: UInt8[np.ndarray, "256"]
) -> None:
    """Add the pixels of one mask."""
    by_class = np.zeros(256, np.int64)
    np.add.at(by_class, table, counts)
    audit.value_pixels += counts
    audit.value_images += counts > 0
    audit.class_pixels += by_class
    audit.class_images += by_class > 0
    audit.pixels_around[by_class > 0] += counts.sum()


def _count_colors(
    audit: SplitAudit, file: str, colors: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> None:
    """Add the colours of one mask, the most frequent first, as long as they are few."""
    audit.in_color.append(file)
    audit.pixels_in_color += int(counts.sum())
    for i in np.argsort(-counts, kind="stable")[: MAX_COLORS + 1]:
        color = int(colors[i])
        if color in audit.color_pixels or len(audit.color_pixels) <= MAX_COLORS:
            audit.color_pixels[color] += int(counts[i])
            audit.color_masks[color] += 1


def _small(checked: Checked, table: UInt8[np.ndarray, "256"], split: str) -> Example:
    if checked.image is None or checked.mask is None:
        raise OSError(f"{checked.image_file}: could be read before, and cannot now")
    height, width = checked.mask.shape
    scale = min(1, TILE_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Example(
        name=f"{split} {checked.name}",
        image=cv2.resize(checked.image, size, interpolation=cv2.INTER_AREA),
        label=cv2.resize(cv2.LUT(checked.mask, table), size, interpolation=cv2.INTER_NEAREST_EXACT),
    )
