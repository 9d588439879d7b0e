"""Data sets of two folders per split: what is in them, and what lies elsewhere by mistake."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from contrastseg_jax.data.builders.base import DatasetSpec, data_root
from contrastseg_jax.data.builders.pairs import Found, match_files
from contrastseg_jax.data.images import IMAGE_SUFFIXES

Folders = Mapping[str, tuple[str, str]]  # of each split: images, masks, below the root

IMAGES, MASKS = BOTH = (0, 1)  # places in a pair of folders
# What people call these folders, and those of splits: beginnings, in lower case.
SIDES = (
    ("image", "img", "jpegimages", "leftimg8bit", "photo", "picture", "rgb", "input"),
    ("label", "mask", "annot", "gt", "ground", "segm", "target"),
)
STEMS = {"train": ("train", "trn"), "val": ("val", "dev", "eval"), "test": ("test", "tst")}
DEPTH = 2  # of the folders that are looked through for what is misplaced
MANY = 200  # folders, of which no more are looked through


def match_folders(spec: DatasetSpec, folders: Folders, split: str) -> Found:
    """The pairs of a split; where images or masks are absent, what lies where they may be meant."""
    root = data_root(spec)
    images, masks = folders[split]
    found = match_files(root / images, root / masks)
    if not found.pairs and not found.findings:
        return replace(found, elsewhere=_misplaced(root, folders, split, BOTH))
    side_of = {str(root / images): IMAGES, str(root / masks): MASKS}
    findings = []
    for finding in found.findings:
        side, message = side_of.get(finding.file), finding.message
        if side is not None and finding.kind in ("no_masks", "unpaired"):
            message = "\n".join([message, *_misplaced(root, folders, split, (side,))])
        findings.append(replace(finding, message=message))
    return replace(found, findings=findings)


def _misplaced(root: Path, folders: Folders, split: str, sides: tuple[int, ...]) -> list[str]:
    """A line for each folder whose files may be those of the split."""
    lines, flat = [], set()
    for path, number in _folders_of_files(root):
        below = path.relative_to(root).parts
        side = next((s for part in below for s in BOTH if _is_called(part, SIDES[s])), None)
        theirs = next((s for part in below for s in STEMS if _is_called(part, STEMS[s])), None)
        shown = os.fsencode(path).decode(errors="backslashreplace")
        files = f"{number} {'masks' if side == MASKS else 'images'} lie in {shown}"
        if theirs is None and (side in sides or side is None and sides == BOTH):
            flat.add(side)
            expected = " and ".join(folders[s][side or IMAGES] for s in folders if s != "test")
            lines.append(f"{files} itself; they must lie in {expected}")
        elif theirs == split and side in sides and below != Path(folders[split][side]).parts:
            lines.append(f"{files}; did you mean {folders[split][side]}?")
        elif theirs == split and side is None and IMAGES in sides:
            lines.append(f"{files}; images must lie in {folders[split][IMAGES]}")
    if flat == {*BOTH}:
        lines += ["To take every tenth for val and the others for train:", *_example(root, folders)]
    return lines


def _folders_of_files(root: Path) -> Iterator[tuple[Path, int]]:
    """Folders with the number of images that lie in each itself; they may be masks as well."""
    waiting, seen = [(root, 0)], 0
    while waiting and seen < MANY:
        (folder, depth), seen = waiting.pop(0), seen + 1
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError:
            continue
        number = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        if number:
            yield folder, number
        if depth < DEPTH:
            waiting += [(folder / n, depth + 1) for n in names if os.path.isdir(folder / n)]


def _is_called(part: str, stems: tuple[str, ...]) -> bool:
    return part.lower().startswith(stems)


def _example(root: Path, folders: Folders) -> list[str]:
    """Two lines for a shell that deal out pairs which lie in one folder of images, one of masks."""
    (images, train), (masks, _) = (Path(path).parts for path in folders["train"])
    val = Path(folders["val"][0]).name
    made = " ".join(f"{side}/{split}" for side in (images, masks) for split in (train, val))
    return [
        f"  cd {shlex.quote(str(root))} && mkdir -p {made} && i=0",
        f"  for m in {masks}/*.png; do s={train}; [ $((i % 10)) -eq 0 ] && s={val}; i=$((i + 1));"
        f' mv {images}/"$(basename "$m" .png)".* {images}/$s/; mv "$m" {masks}/$s/; done',
    ]
