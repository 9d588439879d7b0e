"""Which image file and which mask file of a data set belong together, and which to no other.

Files are found by their names, in folders or in lists; none is opened but the lists.
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
    """An image file and its mask file, as they should be: one of them may be missing."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Found:
    """The files of a split: clear pairs, and what is wrong with those that make none."""

    pairs: list[Pair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # of none: what lies where it may be meant


def match_files(
    images: Path,
    masks: Path,
    *,
    image_endings: tuple[str, ...] = IMAGE_SUFFIXES,
    mask_ending: str = ".png",
) -> Found:
    """Pairs of equal path without ending below the two folders, sorted by that path.

    Letters with accents may be written in one character or in two (Unicode's NFC and NFD): for
    names these are the same. Links to folders are followed, hidden files and folders left out.
    An image or mask alone is a pair too, whose other file will be found missing. What makes no pair
    is a finding: folders that are absent or cannot be read, images none of which has a mask, names
    that two images share or that are no UTF-8, files of another suffix where one is missing.
    """
    findings: list[Finding] = []
    of_images = _read_side("images", images, image_endings, findings)
    of_masks = _read_side("masks", masks, (mask_ending,), findings)
    names = of_images.files.keys() | of_masks.files.keys()
    convertible = of_masks.others.keys() & of_images.files.keys()
    if of_images.files and not (findings or of_masks.files or convertible):
        first = masks / f"{min(of_images.files)}{mask_ending}"
        state = f"holds none such as {first}" if masks.is_dir() else "no such folder"
        message = (
            f"{masks}: {state}, for the masks of {images}; images without masks can be predicted,"
            " not trained on or scored"
        )
        return Found(findings=[Finding("no_masks", str(masks), message)])
    if findings:  # what is missing may lie in a folder that cannot be read
        names = of_images.files.keys() & of_masks.files.keys()
    if names and not findings and not images.is_dir():
        message = f"{images}: no such folder, for the images of {masks}"
        return Found(findings=[Finding("unpaired", str(images), message)])
    missing = image_endings[0] if len(image_endings) == 1 else ".*"
    pairs = []
    for name in sorted(names):
        faults = _faults(name, of_images, of_masks)
        if not faults:
            image = of_images.files.get(name, [images / f"{name}{missing}"])[0]
            mask = of_masks.files.get(name, [masks / f"{name}{mask_ending}"])[0]
            pairs.append(Pair(name, image, mask))
        findings += faults
    return Found(pairs, findings)


def list_files(
    listing: Path,
    images: Path,
    masks: Path,
    *,
    image_ending: str,
    mask_ending: str,
    name_of: Callable[[str], str] = str,
) -> Found:
    """The pairs whose names a list has, in its order; `name_of` is the name in a line."""
    lines, findings = read_lines(listing)
    names = [name_of(line) for line in lines if line]
    pairs = [
        Pair(
            unicodedata.normalize("NFC", name),
            on_disk(images, f"{name}{image_ending}"),
            on_disk(masks, f"{name}{mask_ending}"),
        )
        for name in names
    ]
    return Found(pairs, findings)


def on_disk(folder: Path, name: str) -> Path:
    """The file of a name in a list, which may be written in another Unicode form than on disk."""
    path = folder / name
    if name.isascii() or os.path.exists(path):
        return path
    path = folder
    for part in Path(name).parts:
        spellings = [path / unicodedata.normalize(form, part) for form in ("NFC", "NFD")]
        path = next((spelling for spelling in spellings if os.path.exists(spelling)), path / part)
    return path


def read_lines(path: Path) -> tuple[list[str], list[Finding]]:
    """The lines of a list of files, and why it cannot be read; neither if there is no such list."""
    try:  # with or without the mark that some editors put first
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

    what: str  # "images" or "masks"
    folder: Path
    endings: tuple[str, ...]
    files: dict[str, list[Path]]  # by path below the folder without ending; more than one: unclear
    others: dict[str, Path]  # of another suffix


def _read_side(what: str, folder: Path, endings: tuple[str, ...], findings: list[Finding]) -> _Side:
    """Sorts the files below a folder; appends to `findings`."""
    side = _Side(what, folder, endings, {}, {})
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


def _faults(name: str, *sides: _Side) -> list[Finding]:
    """Why the files of a name make no clear pair."""
    if name.encode(errors="ignore").decode() != name:
        files = [file for side in sides for file in side.files.get(name, [])]
        shown = [os.fsencode(file).decode(errors="backslashreplace") for file in files]
        return [Finding("encoding", file, f"{file}: the name must be UTF-8") for file in shown]
    faults = []
    for side in sides:
        files = side.files.get(name, [])
        for file in files[1:]:
            message = f"{file}: same name without suffix as {files[0]}"
            if file.with_suffix("") != files[0].with_suffix(""):
                message = f"{file}: same name as {files[0]} in another Unicode form (NFC, NFD)"
            faults.append(Finding("layout", str(file), message))
        if not files and name in side.others:
            file = side.others[name]
            message = f"{file}: is a {file.suffix}; {side.what} must be {', '.join(side.endings)}"
            faults.append(Finding("suffix", str(file), message))
    return faults
