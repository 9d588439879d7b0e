"""Data sets of two folders per split: their pairs, and hints on files in the wrong folder."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from contrastseg_jax.data.builders.base import data_root
from contrastseg_jax.data.builders.pairs import SplitFiles, match_files
from contrastseg_jax.data.images import IMAGE_SUFFIXES
from contrastseg_jax.data.spec import DatasetSpec

Folders = Mapping[str, tuple[str, str]]  # by split: images, masks, below the root

IMAGES, MASKS = BOTH = (0, 1)  # indices in a pair of folders
# How names of such folders begin, and those of splits, in lower case.
SIDE_PREFIXES = (
    ("image", "img", "jpegimages", "leftimg8bit", "photo", "picture", "rgb", "input"),
    ("label", "mask", "annot", "gt", "ground", "segm", "target"),
)
SPLIT_PREFIXES = {"train": ("train", "trn"), "val": ("val", "dev", "eval"), "test": ("test", "tst")}
MAX_DEPTH = 2  # of the folders that are searched for misplaced files
MAX_FOLDERS = 200  # that are searched


def match_folders(spec: DatasetSpec, folders: Folders, split: str) -> SplitFiles:
    """The pairs of a split; where images or masks are absent, hints on files elsewhere."""
    root = data_root(spec)
    images, masks = folders[split]
    found = match_files(root / images, root / masks)
    if not found.pairs and not found.findings:
        return replace(found, hints=_misplaced_hints(root, folders, split, BOTH))
    sides = {str(root / images): IMAGES, str(root / masks): MASKS}
    findings = []
    for finding in found.findings:
        side, message = sides.get(finding.file), finding.message
        if side is not None and finding.kind in ("no_masks", "unpaired"):
            message = "\n".join([message, *_misplaced_hints(root, folders, split, (side,))])
        findings.append(replace(finding, message=message))
    return replace(found, findings=findings)


def _misplaced_hints(root: Path, folders: Folders, split: str, sides: tuple[int, ...]) -> list[str]:
    """A line for each folder whose files may be meant for the split."""
    lines = []
    for path, number in _image_folders(root):
        below = path.relative_to(root).parts
        names = [part.lower() for part in below]
        side = next((s for n in names for s in BOTH if n.startswith(SIDE_PREFIXES[s])), None)
        named_split = next(
            (s for n in names for s in SPLIT_PREFIXES if n.startswith(SPLIT_PREFIXES[s])), None
        )
        text = os.fsencode(path).decode(errors="backslashreplace")
        files = f"{number} {'masks' if side == MASKS else 'images'} lie in {text}"
        if named_split is None and (side in sides or side is None and sides == BOTH):
            expected = " and ".join(folders[s][side or IMAGES] for s in folders if s != "test")
            lines.append(f"{files} itself; they must lie in {expected}")
        elif named_split == split and side in sides and below != Path(folders[split][side]).parts:
            lines.append(f"{files}; did you mean {folders[split][side]}?")
        elif named_split == split and side is None and IMAGES in sides:
            lines.append(f"{files}; images must lie in {folders[split][IMAGES]}")
    return lines


def _image_folders(root: Path) -> Iterator[tuple[Path, int]]:
    """Folders that hold images, which may be masks, and how many each holds directly."""
    waiting, seen = [(root, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        (folder, depth), seen = waiting.pop(0), seen + 1
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError:
            continue
        number = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        if number:
            yield folder, number
        if depth < MAX_DEPTH:
            waiting += [(folder / n, depth + 1) for n in names if os.path.isdir(folder / n)]
