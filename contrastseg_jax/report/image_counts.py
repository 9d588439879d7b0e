"""What an evaluation counted in each image: the file beside its scores."""

import io
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int

from contrastseg_jax.errors import InputError
from contrastseg_jax.files import write_atomically

FILE_NAME = "image_counts.npz"


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of each of n images, in the order of their example ids, and k classes.

    Without ignored pixels. Their sums over the images are those of the confusion matrix: its
    diagonal, the sums of its rows and of its columns.
    """

    split: str
    protocol: str
    image_names: tuple[str, ...]
    class_names: tuple[str, ...]
    intersection: Int[np.ndarray, "n k"]  # labelled and predicted as the class
    labelled: Int[np.ndarray, "n k"]
    predicted: Int[np.ndarray, "n k"]


def save_image_counts(folder: Path, counts: ImageCounts) -> None:
    """Write the counts into the folder of an evaluation."""
    file = io.BytesIO()
    arrays = {field.name: np.asarray(getattr(counts, field.name)) for field in fields(counts)}
    np.savez_compressed(file, allow_pickle=False, **arrays)
    write_atomically(folder / FILE_NAME, file.getvalue())


def read_image_counts(folder: Path) -> ImageCounts:
    """The counts in the folder of an evaluation.

    Raises:
        FileNotFoundError: it has none.
        InputError: the file is damaged.
    """
    path = folder / FILE_NAME
    content = io.BytesIO(path.read_bytes())  # of a damaged file np.load would not close the handle
    try:
        with np.load(content) as file:
            arrays = {field.name: file[field.name] for field in fields(ImageCounts)}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: is damaged ({error}); --mode=eval writes it again") from error
    return ImageCounts(
        split=str(arrays["split"]),
        protocol=str(arrays["protocol"]),
        image_names=tuple(arrays["image_names"].tolist()),
        class_names=tuple(arrays["class_names"].tolist()),
        **{key: arrays[key] for key in ("intersection", "labelled", "predicted")},
    )
