"""Predictions for image files: index masks, overlays and a legend."""

import errno
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit.examples import in_parallel
from contrastseg_jax.data.images import (
    JPEG_SIDE,
    decode_image,
    encode_jpeg,
    encode_png,
    has_exif_orientation,
    image_size,
)
from contrastseg_jax.data.labels import to_mask_values
from contrastseg_jax.data.preprocess import padded_size, resized_size
from contrastseg_jax.data.spec import Decoding, LabelMap
from contrastseg_jax.errors import InputError, best_effort, listed
from contrastseg_jax.evaluation.inputs import RESULTS, find_images, skipped_message
from contrastseg_jax.evaluation.loaded_network import load_setup
from contrastseg_jax.files import write_atomically
from contrastseg_jax.out_of_memory import is_out_of_memory
from contrastseg_jax.run.compilation_cache import set_compilation_cache
from contrastseg_jax.run.logging import log
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.text import count_of

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors that every other file would get too


def predict_run(
    setup: Setup, workdir: Path, checkpoint: str, inputs: Sequence[str], output: Path
) -> None:
    """Predict files, folders and patterns into `output`.

    Writes `masks/a/b.png` (mask values of the data set) and `overlays/a/b.jpg` for `a/b.jpg`; the
    overlay is a PNG if a side is too long for a JPEG. A file that cannot be read or does not fit
    into memory does not stop the others; the error at the end lists all of them.
    """
    found = find_images(inputs, output)
    _require_own_output(output)
    network = load_setup(setup, workdir, checkpoint)
    set_compilation_cache(setup.config, workdir)
    _make_folders(output, setup.classes)
    for line in (skipped_message(found.others), _renamed_message(found.renamed)):
        if line:
            log.info(line)
    problems, num_predicted, num_rotated, num_long = [*found.problems], 0, 0, 0
    files = _by_size(setup, found.files)
    with logging_redirect_tqdm([log]):
        for number, (name, path) in enumerate(tqdm(files, unit="image", disable=None), start=1):
            try:
                content = _content(path)
                image = decode_image(content, str(path), setup.data.decoding)
                prediction = network.predict(image)
                _write(output, name, image, prediction, setup.classes)
            except (OSError, InputError, MemoryError, RuntimeError, cv2.error) as error:
                problems.append(_problem(path, error))
                if isinstance(error, OSError) and error.errno in NO_SPACE:
                    problems += [f"{path}: not predicted" for _, path in files[number:]]
                    break
                continue
            num_predicted += 1
            if setup.data.exif_orientation == "stored":
                num_rotated += has_exif_orientation(content, str(path))
            num_long += _is_long(image)
    log.info(f"predicted {num_predicted} of {count_of(len(found.files), 'image')}: {output}")
    if num_rotated:
        log.info(
            f"{count_of(num_rotated, 'image')} with an EXIF orientation, which was ignored;"
            " --config.data.exif_orientation=applied rotates by EXIF orientation"
        )
    if num_long:
        log.info(f"{count_of(num_long, 'overlay')} written as PNG: a side is too long for JPEG")
    if problems:
        raise listed(" ".join(inputs), problems, limit=len(problems))


def _require_own_output(output: Path) -> None:
    """Raise an InputError for a folder with other files, which might be overwritten."""
    *folders, legend = RESULTS
    for name in folders:
        folder = output / name
        if folder.is_dir() and any(folder.iterdir()) and not (output / legend).exists():
            raise InputError(
                f"--output={output}: {folder} contains files that are not predictions (there is no"
                f" {legend}); choose another folder"
            )


def _make_folders(output: Path, classes: LabelMap) -> None:
    """Create the folders for the results, and check that they are writable."""
    *folders, legend = RESULTS
    try:
        for name in folders:
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise InputError(f"--output={output}: cannot be written ({reason})") from error
    with best_effort(str(output / legend)):
        pictures.save_legend(output / legend, classes)


def _by_size(setup: Setup, files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """The files ordered by padded size: the network is compiled once for each."""
    config, read_size = setup.config, functools.partial(_size, decoding=setup.data.decoding)
    own_sizes = in_parallel(read_size, files.values(), "Reading sizes")
    sizes = {}
    for name, size in zip(files, own_sizes, strict=True):
        resized = resized_size(size, config.data.short_side) if all(size) else size
        sizes[name] = padded_size(resized, config.eval.pad_multiple)
    number = len({size for size in sizes.values() if all(size)})
    log.info(
        f"{count_of(len(files), 'image')} to predict; compiling the network for"
        f" {count_of(number, 'padded image size')}"
    )
    return [(name, files[name]) for name in sorted(files, key=lambda name: sizes[name])]


def _size(path: Path, decoding: Decoding) -> tuple[int, int]:
    """(height, width) from a file's header; zeros if it is invalid, which decoding will report."""
    try:
        return image_size(path.read_bytes(), str(path), decoding)
    except (OSError, InputError, MemoryError):
        return 0, 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _write(
    output: Path,
    name: str,
    image: UInt8[np.ndarray, "h w 3"],
    prediction: UInt8[np.ndarray, "h w"],
    classes: LabelMap,
) -> None:
    mask = encode_png(to_mask_values(prediction, classes))
    write_atomically(output / "masks" / f"{name}.png", mask)
    path = output / "overlays" / f"{name}{'.png' if _is_long(image) else '.jpg'}"
    with best_effort(str(path)):
        picture = pictures.overlay(image, prediction, classes)
        content = encode_png(picture) if _is_long(image) else encode_jpeg(picture, 90)
        write_atomically(path, content)


def _is_long(image: UInt8[np.ndarray, "h w 3"]) -> bool:
    return max(image.shape) > JPEG_SIDE


def _renamed_message(number: int) -> str:
    if not number:
        return ""
    return f"{count_of(number, 'result')} with a longer name, as other inputs have the same name"


def _problem(path: Path, error: Exception) -> str:
    """What went wrong with a file, starting with its name; re-raises bugs."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_out_of_memory(error):
        text = f"out of memory ({text})"
    elif isinstance(error, OSError):
        text = f"results cannot be written ({error.strerror})"
    elif isinstance(error, RuntimeError):
        raise error
    return text if text.startswith(str(path)) else f"{path}: {text}"
