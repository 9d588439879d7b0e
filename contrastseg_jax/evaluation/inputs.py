"""Finding the images to predict, and naming their results."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from contrastseg_jax.data.audit.examples import Finding
from contrastseg_jax.data.images import IMAGE_SUFFIXES
from contrastseg_jax.data.walk import files_below
from contrastseg_jax.errors import InputError
from contrastseg_jax.text import count_of

RESULTS = ("masks", "overlays", "legend.png")  # what a prediction writes to its output


@dataclass(frozen=True)
class Inputs:
    """The files to predict, and what was skipped."""

    files: dict[str, Path]  # by the name of their result
    others: Counter[str]  # files that are not images, by suffix
    problems: list[str]  # folders that cannot be read
    renamed: int  # files whose results got a longer name, as another file has the same


def find_images(inputs: Sequence[str], output: Path) -> Inputs:
    """Images of files, folders and patterns, without the results of an earlier prediction.

    A file is used whatever its suffix; from folders and patterns, only files with an image suffix.
    Links are followed, but keep their own name. Results are named by the path relative to the
    folder, or from the pattern's wildcard on, without suffix. Files whose names would collide keep
    their suffixes, or if those are equal, their paths relative to the common parent of all inputs.

    Raises:
        InputError: an input does not exist or contains no image, or the results would be written
            among the images.
    """
    findings: list[Finding] = []
    found: dict[Path, Path] = {}  # paths, and the relative paths that name the results
    others: Counter[str] = Counter()
    results = [Path(os.path.realpath(output / name)) for name in RESULTS]
    for text in inputs:
        is_empty, num_earlier = True, len(findings)
        skipped: Counter[str] = Counter()
        for path, start, suffixes in _matches(text):
            if path.is_dir():
                _require_separate_output(path, output)
            for file in files_below(path, findings) if path.is_dir() else (path,):
                real = Path(os.path.realpath(file.parent), file.name)
                if any(real.is_relative_to(result) for result in results):
                    continue
                if suffixes and file.suffix.lower() not in suffixes:
                    skipped[file.suffix.lower() or "no suffix"] += 1
                    continue
                is_empty = False
                found.setdefault(file, file.relative_to(start))
        if is_empty:
            new = findings[num_earlier:]
            reasons = [skipped_message(skipped), *(finding.message for finding in new)]
            raise InputError(
                "; ".join(
                    [f"--input={text}: contains no image ({' '.join(IMAGE_SUFFIXES)})"]
                    + [reason for reason in reasons if reason]
                )
            )
        others += skipped
    names = _unique_names(found)
    renamed = sum(Path(name) != found[path].with_suffix("") for name, path in names.items())
    problems = list(dict.fromkeys(finding.message for finding in findings))
    return Inputs(names, others, problems, renamed)


def skipped_message(others: Counter[str]) -> str:
    """A log line about files that are not images; empty if there are none."""
    if not others:
        return ""
    kinds = ", ".join(f"{suffix} {number}" for suffix, number in sorted(others.items()))
    return f"skipped {count_of(others.total(), 'file')}, not images: {kinds}"


def _matches(text: str) -> Iterator[tuple[Path, Path, tuple[str, ...]]]:
    """Expand an input: paths, the folder of their names, and allowed suffixes (none: any)."""
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if os.path.lexists(path):  # before trying it as a pattern: names may contain brackets
        yield (path, path, IMAGE_SUFFIXES) if path.is_dir() else (path, path.parent, ())
        return
    start = next(folder for folder in path.parents if os.path.lexists(folder))
    pattern = str(path.relative_to(start))
    if not glob.has_magic(pattern):
        raise InputError(f"--input={text}: no such file or folder")
    matches = sorted(glob.glob(pattern, root_dir=start, recursive=True))
    if not matches:
        raise InputError(f"--input={text}: no file or folder matches the pattern")
    for match in matches:
        yield start / match, start, IMAGE_SUFFIXES


def _require_separate_output(folder: Path, output: Path) -> None:
    """Raise an InputError if the input folder is the output or one of its results."""
    for place in (output, *(output / name for name in RESULTS)):
        if os.path.realpath(place) == os.path.realpath(folder):
            raise InputError(
                f"--output={output}: masks would be written among the images of --input={folder};"
                " choose another folder"
            )


def _unique_names(found: Mapping[Path, Path]) -> dict[str, Path]:
    """The files by the shortest of their names that is unique."""
    shared = os.path.commonpath([path.parent for path in found])
    names = [
        [name.as_posix() for name in (below.with_suffix(""), below, path.relative_to(shared))]
        for path, below in found.items()
    ]
    times = [Counter(of_length) for of_length in zip(*names, strict=True)]
    files: dict[str, Path] = {}
    for path, options in zip(found, names, strict=True):
        clear = [name for name, number in zip(options, times, strict=True) if number[name] == 1]
        numbered = (f"{options[-1]} ({number})" for number in count(1))
        files[next(name for name in chain(clear, numbered) if name not in files)] = path
    return files
