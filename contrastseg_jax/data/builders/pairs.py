"""Pairs the image files and the mask files of a split, and finds files that make no clear pair.

Files are found by their names, in folders or in lists; only the lists are opened.
"""

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contrastseg_jax.data.audit.examples import Finding
from contrastseg_jax.data.images import IMAGE_SUFFIXES
from contrastseg_jax.data.walk import files_below, unreadable


@dataclass(frozen=True)
class Pair:
    """The paths of an image file and its mask file; one of the files may be missing."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split: clear pairs, and what is wrong with files that make none."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    hints: list[str] = field(
        default_factory=list
    )  # if there are no files: others that may be meant
    drawn: str = ""  # of how many it was drawn, and by which setting; empty: its files are given


def match_files(
    images: Path,
    masks: Path,
    *,
    image_endings: tuple[str, ...] = IMAGE_SUFFIXES,
    mask_ending: str = ".png",
) -> SplitFiles:
    """Pairs of equal path without ending below the two folders, sorted by that path.

    Names that differ only in their Unicode form (NFC, NFD) are the same. Links to folders are
    followed, hidden files and folders left out. An image or mask alone is a pair too, whose other
    file will be found missing. Findings are folders that are absent or cannot be read, images of
    which none has a mask, names that two images share or that are not UTF-8, and files of another
    suffix where one is missing.
    """
    findings: list[Finding] = []
    image_side = _read_side("images", images, image_endings, findings)
    mask_side = _read_side("masks", masks, (mask_ending,), findings)
    if findings:  # a missing file may lie in a folder that cannot be read
        names = image_side.files.keys() & mask_side.files.keys()
    else:
        names = image_side.files.keys() | mask_side.files.keys()
        if missing := _missing_folder(image_side, mask_side):
            return SplitFiles(findings=[missing])
    pairs = []
    image_ending = image_endings[0] if len(image_endings) == 1 else ".*"
    for name in sorted(names):
        faults = _name_findings(name, image_side, mask_side)
        if not faults:
            image = image_side.files.get(name, [images / f"{name}{image_ending}"])[0]
            mask = mask_side.files.get(name, [masks / f"{name}{mask_ending}"])[0]
            pairs.append(Pair(name, image, mask))
        findings += faults
    return SplitFiles(pairs, findings)


def list_files(
    listing: Path,
    images: Path,
    masks: Path,
    *,
    image_ending: str,
    mask_ending: str,
    parse_name: Callable[[str], str] = str,
) -> SplitFiles:
    """The pairs whose names a list has, in its order; `parse_name` finds the name in a line."""
    lines, findings = read_lines(listing)
    names = [parse_name(line) for line in lines if line]
    pairs = [
        Pair(
            unicodedata.normalize("NFC", name),
            find_path(images, f"{name}{image_ending}"),
            find_path(masks, f"{name}{mask_ending}"),
        )
        for name in names
    ]
    return SplitFiles(pairs, findings)


def find_path(folder: Path, name: str) -> Path:
    """The path of a name in a list, whose Unicode form (NFC, NFD) may differ from the file's."""
    path = folder / name
    if name.isascii() or os.path.exists(path):
        return path
    path = folder
    for part in Path(name).parts:
        spellings = [path / unicodedata.normalize(form, part) for form in ("NFC", "NFD")]
        path = next((spelling for spelling in spellings if os.path.exists(spelling)), path / part)
    return path


def read_lines(path: Path) -> tuple[list[str], list[Finding]]:
    """The lines of a list, and why it cannot be read; neither if there is no such list."""
    try:  # with or without a byte order mark
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines()], []
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except PermissionError as error:
        return [], [unreadable(path, error)]
    except UnicodeDecodeError as error:
        message = f"{path}: must be text in UTF-8, byte {error.start} is not"
        return [], [Finding("encoding", str(path), message)]


@dataclass(frozen=True)
class _Side:
    """The images of a split, or its masks."""

    kind: str  # "images" or "masks"
    folder: Path
    endings: tuple[str, ...]
    files: dict[str, list[Path]]  # by path below the folder without ending; several: ambiguous
    others: dict[str, Path]  # files of another suffix


def _read_side(kind: str, folder: Path, endings: tuple[str, ...], findings: list[Finding]) -> _Side:
    """The files below a folder by name; appends to `findings`."""
    side = _Side(kind, folder, endings, {}, {})
    for path in files_below(folder, findings):
        below = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        ending = next((e for e in endings if below.lower().endswith(e.lower())), "")
        if ending:
            side.files.setdefault(below[: -len(ending)], []).append(path)
        elif path.suffix:
            stem = below[: below.rindex(".")]
            base = endings[0][: endings[0].rindex(".")]  # "_L" of "_L.png"
            if stem.endswith(base):
                side.others.setdefault(stem.removesuffix(base), path)
    return side


def _missing_folder(image_side: _Side, mask_side: _Side) -> Finding | None:
    """The finding where images have no masks at all, or masks no folder of images."""
    images, masks = image_side.folder, mask_side.folder
    convertible = mask_side.others.keys() & image_side.files.keys()
    if image_side.files and not (mask_side.files or convertible):
        first = masks / f"{min(image_side.files)}{mask_side.endings[0]}"
        state = f"holds none such as {first}" if masks.is_dir() else "no such folder"
        message = (
            f"{masks}: {state}, for the masks of {images}; images without masks can be predicted,"
            " not trained on or scored"
        )
        return Finding("no_masks", str(masks), message)
    if mask_side.files and not images.is_dir():
        message = f"{images}: no such folder, for the images of {masks}"
        return Finding("unpaired", str(images), message)
    return None


def _name_findings(name: str, *sides: _Side) -> list[Finding]:
    """Why the files of a name make no clear pair."""
    if name.encode(errors="ignore").decode() != name:
        files = [file for side in sides for file in side.files.get(name, [])]
        texts = [os.fsencode(file).decode(errors="backslashreplace") for file in files]
        return [Finding("encoding", text, f"{text}: the name must be UTF-8") for text in texts]
    findings = []
    for side in sides:
        files = side.files.get(name, [])
        for file in files[1:]:
            message = f"{file}: same name without suffix as {files[0]}"
            if file.with_suffix("") != files[0].with_suffix(""):
                message = f"{file}: same name as {files[0]} in another Unicode form (NFC, NFD)"
            findings.append(Finding("layout", str(file), message))
        if not files and name in side.others:
            file = side.others[name]
            message = f"{file}: is a {file.suffix}; {side.kind} must be {', '.join(side.endings)}"
            findings.append(Finding("suffix", str(file), message))
    return findings
