"""Audits a data set: a summary to read, `audit.json` with all of it, and a sheet of examples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from contrastseg_jax import report
from contrastseg_jax.build import dataset_spec
from contrastseg_jax.config import Config
from contrastseg_jax.data.audit import (
    SplitAudit,
    audit_split,
    enet_weights,
    examples_to_show,
    general_findings,
    median_frequency_weights,
    missing_splits,
)
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.checks import Finding
from contrastseg_jax.data.dataset import label_map, raw_splits
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.structs import IGNORE_LABEL

NUM_SHOWN = 20  # examples on the sheet
NUM_NAMED = 3  # findings of a kind that the summary spells out

# What each kind of finding is called, and what mends it.
KINDS = {
    "no_data": ("data that cannot be opened", "do what the message says"),
    "layout": ("files that make no clear pairs", "bring the files into the layout of the data set"),
    "permission": ("files and folders without permission", "get the right to read them"),
    "encoding": ("names and lists that are not UTF-8", "rename the files, save the lists anew"),
    "suffix": ("files of another format than expected", "convert them; renaming does not"),
    "no_split": ("missing splits", "give each split some images; its layout is in README.md"),
    "unpaired": ("images without mask, masks without image", "add what is missing, or delete both"),
    "unreadable": ("files that cannot be read", "copy or export them again, or delete the pair"),
    "image_format": ("images of unsuitable formats", "do as the message says"),
    "mask_format": ("masks that are no index masks", "convert them as the message says"),
    "size": ("masks of another size than their image", "export them again at the image's size"),
    "unknown_value": ("masks with values that are no class", "correct the masks"),
    "unlabelled": ("splits without a labelled pixel", "see whether the ignored values are right"),
    "absent_class": ("classes that never occur", "nothing can be learnt of them, or scored"),
    "turned": ("files that viewers turn", "see in overlays.png whether image and mask fit"),
    "duplicate": ("images in two splits", "delete one; scores on seen images are too good"),
}


def audit_run(config: Config, workdir: Path, split: str | None) -> None:
    """Audit the data set of a config, all splits or one; prepares nothing.

    Prints a summary and writes `audit.json` and `overlays.png` into WORKDIR/audit.

    Raises:
        InputError: training would go wrong, or there is no such split.
    """
    spec = dataset_spec(config)
    classes, folder = label_map(spec), workdir / "audit"
    findings, splits = [], {}
    try:
        splits = raw_splits(spec)
    except (InputError, OSError) as error:
        findings.append(Finding("no_data", spec.root, str(error)))
    if split is not None and splits:
        if split not in splits:
            raise InputError(
                f"--split={split}: data set '{spec.name}' has only {', '.join(splits)}"
            )
        splits = {split: splits[split]}
    audits = {name: audit_split(raw, classes, name) for name, raw in splits.items()}
    if split is None and not findings:
        findings += missing_splits(audits)
    findings += [finding for audit in audits.values() for finding in audit.findings]
    audits = {name: audit for name, audit in audits.items() if audit.num_examples}
    findings += general_findings(audits, classes)
    findings = list(dict.fromkeys(findings))  # a folder that is closed is so to every split

    results = audit_results(spec, classes, audits, findings)
    write_atomically(folder / "audit.json", to_json(results) + "\n")
    sheet = folder / "overlays.png"
    sheet.unlink(missing_ok=True)  # of an earlier audit
    print("\n".join(summary(results)))
    examples = examples_to_show(splits, audits, classes, NUM_SHOWN)
    if examples:
        report.save_sheet(sheet, examples, classes, f"{spec.name} {spec.root}")
    print(f"written: {folder / 'audit.json'}" + (f", {sheet}" if examples else ""))
    if results["num_errors"]:
        number = results["num_errors"]
        raise InputError(
            f"{number} error{'s' if number > 1 else ''} in the data; training would go wrong"
        )


def audit_results(
    spec: DatasetSpec,
    classes: LabelMap,
    audits: Mapping[str, SplitAudit],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """All that is in `audit.json`."""
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
        size = len(classes.names)
        weights = {
            "median_frequency": median_frequency_weights(audits[split], size),
            "enet": enet_weights(audits[split], size),
        }
        results["class_weights"] = {
            "split": split,
            **{rule: [float(f"{weight:.4g}") for weight in w] for rule, w in weights.items()},
        }
    return results


def split_results(audit: SplitAudit, classes: LabelMap) -> dict[str, Any]:
    """Numbers of a split. Shares are those of all pixels, the ignored ones included."""
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
    """What mends findings of a kind."""
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
        lines += ["", *_table(_split_rows(splits)), "", *_table(_class_rows(results))]
        weights = results["class_weights"]
        for rule, title in (("median_frequency", "median frequency"), ("enet", "ENet's formula")):
            values = ", ".join(f"{weight:g}" for weight in weights[rule])
            lines += [
                "",
                f"class weights by {title}, of {weights['split']}:",
                f'  --config.loss.class_weights="({values})"',
            ]
    for level, is_error in (("errors", True), ("warnings", False)):
        found = [f for f in results["findings"] if f["is_error"] == is_error]
        lines += ["", f"{level}: {len(found) or 'none'}"]
        for kind in dict.fromkeys(finding["kind"] for finding in found):
            messages = [finding["message"] for finding in found if finding["kind"] == kind]
            lines.append(f"  {KINDS[kind][0]}: {len(messages)}")
            lines.append(f"  -> {results['remedies'][kind]}")
            lines += [f"    {message}" for message in messages[:NUM_NAMED]]
            if len(messages) > NUM_NAMED:
                lines.append(f"    and {len(messages) - NUM_NAMED} more in audit.json")
    return [*lines, ""]


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
                _most(split["image_sizes"]),
                _most(split["mask_formats"]),
            ]
        )
    return rows


def _class_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row per class: its mask values, and in each split share of the pixels and images."""
    splits = results["splits"]
    rows = [["class", "mask values", *(f"{s} {x}" for s in splits for x in ("pixels", "images"))]]
    for name, values in results["classes"].items():
        row = [name, " ".join(map(str, values[:4])) + (" ..." if len(values) > 4 else "")]
        for split in splits.values():
            found = split["classes"][name]
            row += [f"{found['share']:.1%}", f"{found['images']}"]
        rows.append(row)
    return rows


def _most(counts: Mapping[str, int]) -> str:
    """The most frequent three of some names, with their numbers if there are others."""
    if len(counts) == 1:
        return next(iter(counts))
    named = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3])
    return f"{named}, {len(counts) - 3} more" if len(counts) > 3 else named


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
