"""The audit of a data set: a printed summary, `audit.json` in full, and a sheet of examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit.encodings import binary_remedy, color_remedy
from contrastseg_jax.data.audit.examples import Finding, Splits
from contrastseg_jax.data.audit.statistics import (
    SplitAudit,
    allow_missing_masks,
    audit_split,
    color_results,
    color_table,
    dataset_findings,
    missing_split_findings,
    sheet_examples,
)
from contrastseg_jax.data.class_weights import CLASS_WEIGHTS, ClassCounts, computed_weights
from contrastseg_jax.data.dataset import dataset_spec, label_map, misplaced_hints, raw_splits
from contrastseg_jax.data.preprocess import too_large
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError, best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.structs import IGNORE_LABEL
from contrastseg_jax.text import table

SHEET_SIZE = 20  # examples in overlays.png
MAX_MESSAGES = 3  # of a kind of finding, in the summary

# Title and remedy of each kind of finding.
KINDS = {
    "no_data": ("data that cannot be opened", "do as the message says"),
    "layout": ("files that make no clear pairs", "arrange the files in the layout of the data set"),
    "permission": ("files and folders without permission", "obtain permission to read them"),
    "encoding": ("names and lists that are not UTF-8", "rename the files, save the lists again"),
    "suffix": ("files of another format than expected", "convert them; renaming does not"),
    "no_split": ("missing splits", "give each split some images; its layout is in docs/data.md"),
    "no_masks": (
        "images without any mask",
        "add masks; without them, images can only be predicted",
    ),
    "unpaired": ("images without mask, masks without image", "add what is missing, or delete both"),
    "unreadable": ("files that cannot be read", "copy or export them again, or delete the pair"),
    "image_format": ("images of unsuitable formats", "do as the message says"),
    "mask_format": ("masks that are not read", "convert them as the messages say"),
    "size": ("masks of another size than their image", "export them again at the image's size"),
    "too_large": (
        "images too large to evaluate",
        "cut them into tiles, or resize them to fewer pixels",
    ),
    "unknown_value": ("masks with values that mean no class", "correct the masks"),
    "unlabelled": ("splits without a labelled pixel", "check whether the ignored values are right"),
    "absent_class": ("classes that never occur", "they can be neither learned nor scored"),
    "exif_orientation": (
        "files with an EXIF orientation",
        "check in overlays.png that image and mask fit",
    ),
    "duplicate": (
        "images in two splits",
        "delete one; scores on images seen in training are too good",
    ),
}


def audit_run(config: Config, workdir: Path, split: str | None) -> None:
    """Audit the data set of a config, all splits or one; prepares nothing.

    Prints a summary and writes `audit.json` and `overlays.png` into WORKDIR/audit.

    Raises:
        InputError: training would go wrong, or there is no such split.
    """
    spec, folder = dataset_spec(config), workdir / "audit"
    classes = label_map(spec)
    splits, findings = _find_splits(spec, split)
    audits = _audit_splits(config, splits, classes)
    needed = spec.splits_of_training
    audits |= {name: allow_missing_masks(audits[name]) for name in audits if name not in needed}
    if split is None and not findings:
        findings += missing_split_findings(audits, needed, misplaced_hints(spec, needed))
    findings += [finding for audit in audits.values() for finding in audit.findings]
    audits = {name: audit for name, audit in audits.items() if audit.num_examples}
    findings += dataset_findings(audits, classes, needed)
    findings = list(dict.fromkeys(findings))  # splits may share a folder that cannot be read

    results = audit_results(spec, classes, audits, findings)
    write_atomically(folder / "audit.json", to_json(results) + "\n")
    sheet = folder / "overlays.png"
    sheet.unlink(missing_ok=True)  # of an earlier audit
    drawn = [f"{name}: {raw.drawn}" for name, raw in splits.items() if raw.drawn]
    print("\n".join([*drawn, *summary(results)]))
    examples = sheet_examples(splits, audits, classes, SHEET_SIZE)
    if examples:
        with best_effort(str(sheet)):
            pictures.save_sheet(sheet, examples, classes, f"{spec.name} {spec.root}")
    print(f"written: {folder / 'audit.json'}" + (f", {sheet}" if sheet.exists() else ""))
    if number := results["num_errors"]:
        outcome = _outcome(findings, {name: audits[name] for name in audits if name not in needed})
        raise InputError(f"{number} error{'s' if number > 1 else ''} in the data; {outcome}")


def _find_splits(spec: DatasetSpec, split: str | None) -> tuple[Splits, list[Finding]]:
    """The splits to audit, all or one, and why there are none."""
    try:
        splits = raw_splits(spec)
    except (InputError, OSError) as error:
        return {}, [Finding("no_data", spec.root, str(error))]
    if split is None:
        return splits, []
    if split not in splits:
        raise InputError(f"--split={split}: data set '{spec.name}' has only {', '.join(splits)}")
    return {split: splits[split]}, []


def _audit_splits(config: Config, splits: Splits, classes: LabelMap) -> dict[str, SplitAudit]:
    limit = partial(
        too_large, short_side=config.data.short_side, pad_multiple=config.eval.pad_multiple
    )
    return {name: audit_split(raw, classes, name, limit) for name, raw in splits.items()}


def _outcome(findings: Sequence[Finding], optional: Mapping[str, SplitAudit]) -> str:
    """What the errors among the findings would stop; `optional`: splits training does not read."""
    harmless = {found for audit in optional.values() for found in audit.findings}
    if any(found.is_error and found not in harmless for found in findings):
        return "training would go wrong"
    return f"evaluating {', '.join(optional)} would fail, which training does not read"


def audit_results(
    spec: DatasetSpec,
    classes: LabelMap,
    audits: Mapping[str, SplitAudit],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """The content of `audit.json`."""
    num_errors = sum(finding.is_error for finding in findings)
    kinds = dict.fromkeys(finding.kind for finding in findings)
    results = {
        "data": spec.name,
        "root": spec.root,
        "num_errors": num_errors,
        "num_warnings": len(findings) - num_errors,
        "findings": [asdict(finding) for finding in findings],
        "remedies": {kind: remedy(kind, spec, audits) for kind in kinds},
        "classes": {
            name: [value for value, i in sorted(classes.train_ids.items()) if i == class_id]
            for class_id, name in [*enumerate(classes.names), (IGNORE_LABEL, "no class")]
        },
        "splits": {split: split_results(audit, classes) for split, audit in audits.items()},
    }
    if audits:
        split = "train" if "train" in audits else next(iter(audits))
        results["class_weights"] = class_weights(audits[split], split, len(classes.names))
    return results


def class_weights(audit: SplitAudit, split: str, num_classes: int) -> dict[str, Any]:
    """Class weights by each formula, if at least half of the masks could be read."""
    num_read = audit.mask_formats.total()
    results = {"split": split, "masks_read": num_read, "masks": audit.num_examples}
    if 2 * num_read < max(audit.num_examples, 1):
        return results
    counts = ClassCounts(audit.class_pixels[:num_classes], audit.class_image_pixels[:num_classes])
    return results | {formula: [*computed_weights(counts, formula)] for formula in CLASS_WEIGHTS}


def audited_class_weights(workdir: Path, class_names: Sequence[str]) -> list[float] | None:
    """Median-frequency weights that an audit left in a workdir; None: it left none for the classes.

    `class_names`: in the order of their ids.
    """
    try:
        results = json.loads((workdir / "audit" / "audit.json").read_bytes())
        same_classes = list(results["classes"])[: len(class_names)] == list(class_names)
        return results["class_weights"]["median_frequency"] if same_classes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split_results(audit: SplitAudit, classes: LabelMap) -> dict[str, Any]:
    """The numbers of a split. Shares are of all pixels, ignored ones included."""
    num_pixels = int(audit.value_pixels.sum())
    share = audit.class_pixels / max(num_pixels, 1)
    return {
        "num_examples": audit.num_examples,
        "num_faulty_files": len({finding.file for finding in audit.findings if finding.is_error}),
        "num_pixels": num_pixels,
        "ignored_share": float(share[IGNORE_LABEL]),
        "image_sizes": {f"{w}x{h}": n for (h, w), n in audit.sizes.most_common()},
        "mask_formats": dict(audit.mask_formats.most_common()),
        "classes": {
            name: {
                "pixels": int(audit.class_pixels[class_id]),
                "share": float(share[class_id]),
                "images": int(audit.class_images[class_id]),
            }
            for class_id, name in [*enumerate(classes.names), (IGNORE_LABEL, "no class")]
        },
        "mask_colors": color_results(audit) if audit.color_mask_files else None,
        "values": {
            str(value): {
                "pixels": int(audit.value_pixels[value]),
                "images": int(audit.value_images[value]),
            }
            for value in np.flatnonzero(audit.value_pixels)
        },
        "unknown_values": [
            {"file": file, "value": value, "pixels": pixels}
            for file, value, pixels in audit.unknown
        ],
    }


def remedy(kind: str, spec: DatasetSpec, audits: Mapping[str, SplitAudit]) -> str:
    """How to fix findings of a kind."""
    if kind == "mask_format":
        return color_remedy(spec, audits) or KINDS[kind][1]
    about_values = kind in ("unknown_value", "unlabelled", "absent_class")
    if about_values and (settings := binary_remedy(spec, audits)):
        return settings
    if kind != "unknown_value" or not spec.class_names:
        return KINDS[kind][1]
    values = sorted({value for audit in audits.values() for _, value, _ in audit.unknown})
    ignored = tuple(sorted({*spec.ignore_values, *values}))
    return (
        f"name the classes up to value {values[-1]} in data.class_names, which has"
        f" {len(spec.class_names)}, or ignore the values:"
        f' --config.data.ignore_values="{ignored}"'
    )


def summary(results: Mapping[str, Any]) -> list[str]:
    """The lines to print."""
    splits: dict[str, Any] = results["splits"]
    lines = [f"{results['data']} {results['root']}".rstrip()]
    if splits:
        lines += ["", *table(_split_rows(splits)), "", *table(_class_rows(results))]
        lines += _weight_lines(results["class_weights"])
    for level, is_error in (("errors", True), ("warnings", False)):
        found = [f for f in results["findings"] if f["is_error"] == is_error]
        lines += ["", f"{level}: {len(found) or 'none'}"]
        for kind in dict.fromkeys(finding["kind"] for finding in found):
            lines += _kind_lines(kind, [f for f in found if f["kind"] == kind], results)
    return [*lines, ""]


def _kind_lines(
    kind: str, findings: Sequence[Mapping[str, Any]], results: Mapping[str, Any]
) -> list[str]:
    """The title of a kind, its remedy, and the first of its messages."""
    remedy = results["remedies"][kind].replace("\n", "\n     ")
    lines = [f"  {KINDS[kind][0]}: {len(findings)}", *f"  -> {remedy}".splitlines()]
    texts = []
    if kind == "mask_format":  # colours are those of a split, not of each mask
        colors = {split: found["mask_colors"] for split, found in results["splits"].items()}
        colors = {split: found for split, found in colors.items() if found}
        texts = [color_table(split, found) for split, found in colors.items()]
        merged = {
            file for found in colors.values() if found["masks"] > 1 for file in found["files"]
        }
        findings = [finding for finding in findings if finding["file"] not in merged]
    texts += [finding["message"] for finding in findings[:MAX_MESSAGES]]
    lines += [f"    {line}" for text in texts for line in text.splitlines()]
    if len(findings) > MAX_MESSAGES:
        lines.append(f"    and {len(findings) - MAX_MESSAGES} more in audit.json")
    return lines


def _weight_lines(weights: Mapping[str, Any]) -> list[str]:
    """Class weights to paste, and how many masks they are computed from."""
    read, masks = weights["masks_read"], weights["masks"]
    number = "" if read == masks else f" ({read} of {masks} masks, the others could not be read)"
    lines = []
    for rule, title in (("median_frequency", "median frequency"), ("enet", "ENet's formula")):
        if rule in weights:
            values = ", ".join(f"{weight:g}" for weight in weights[rule])
            lines += [
                "",
                f"class weights by {title}, of {weights['split']}{number}:",
                f'  --config.loss.class_weights="({values})"',
            ]
    if not lines:
        text = f"no class weights: {read} of {masks} masks of {weights['split']} could be read"
        lines = ["", f"{text}, at least half are needed"]
    return lines


def _split_rows(splits: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        ["split", "images", "faulty files", "megapixels", "no class", "image sizes", "mask files"]
    ]
    for name, split in splits.items():
        rows.append(
            [
                name,
                f"{split['num_examples']}",
                f"{split['num_faulty_files']}",
                f"{split['num_pixels'] / 1e6:.3g}",
                f"{split['ignored_share']:.1%}",
                _most_frequent(split["image_sizes"]),
                _most_frequent(split["mask_formats"]),
            ]
        )
    return rows


def _class_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row per class: its mask values, and for each split its share of pixels and its images."""
    splits = results["splits"]
    rows = [["class", "mask values", *(f"{s} {x}" for s in splits for x in ("pixels", "images"))]]
    for name, values in results["classes"].items():
        row = [name, " ".join(map(str, values[:4])) + (" ..." if len(values) > 4 else "")]
        for split in splits.values():
            found = split["classes"][name]
            row += [f"{found['share']:.1%}", f"{found['images']}"]
        rows.append(row)
    return rows


def _most_frequent(counts: Mapping[str, int]) -> str:
    """The three most frequent names, with their counts unless there is only one."""
    if len(counts) == 1:
        return next(iter(counts))
    first = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3])
    return f"{first}, {len(counts) - 3} more" if len(counts) > 3 else first
