"""A trained network with its weights, for predictions from Python."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from contrastseg_jax.data.images import decode_image
from contrastseg_jax.data.preprocess import (
    Size,
    pad,
    padded_size,
    resize_image,
    resized_size,
    too_large,
)
from contrastseg_jax.data.spec import Color, Preprocessing
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import programs
from contrastseg_jax.evaluation.evaluate import compile_network
from contrastseg_jax.evaluation.protocols import configured
from contrastseg_jax.ops.resize import resized_argmax, resized_logits, resized_probabilities
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.setup.setup import Setup

# A file, or pixels in RGB, `u8[h w 3]`; a stack `u8[b h w 3]`; or a sequence of files and pixels.
Images = Any

class_programs = programs.by_shape(resized_argmax)
logit_programs = programs.by_shape(resized_logits)
probability_programs = programs.by_shape(resized_probabilities)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network with its weights, as `load` returns it.

    Its methods take an image, which is a file or an array in RGB, a stack of images of one size,
    or a sequence of images of any sizes, and return an array, a stack, or a list. Images are
    resized and padded as in evaluation, and the results have their own sizes. A program is compiled
    for each padded size, the first time it is met.
    """

    logits_fn: Callable[[Any], Any]  # of padded images, at any stride
    preprocessing: Preprocessing
    pad_multiple: int
    sizes: tuple[Size, ...] = ()  # all that padded images may have; none: any

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their ids."""
        return self.preprocessing.label_map.names

    @property
    def palette(self) -> tuple[Color, ...]:
        """A colour, (red, green, blue), for each class."""
        return self.preprocessing.label_map.palette

    def predict(self, images: Images) -> Any:
        """Class ids, `u8[h w]`.

        Raises:
            InputError: a file cannot be read, or an image is too large.
            ValueError: an array is not `u8[h w 3]`, or `u8[b h w 3]`.
        """
        return self._each(images, class_programs, np.uint8)

    def probabilities(self, images: Images) -> Any:
        """The softmax of the logits, `f32[h w k]`; raises as `predict` does."""
        return self._each(images, probability_programs, np.float32)

    def logits(self, images: Images) -> Any:
        """Logits at the size of the image, `f32[h w k]`; raises as `predict` does."""
        return self._each(images, logit_programs, np.float32)

    def _each(self, images: Images, outputs: programs.Programs, dtype: Any) -> Any:
        """What some programs make of the logits of each image, at the image's size."""
        if isinstance(images, (str, os.PathLike)):
            return self._run(self._read(images)[None], outputs, dtype, name=str(images))[0]
        if hasattr(images, "ndim"):
            stack = _checked(np.asarray(images))
            results = self._run(stack.reshape(-1, *stack.shape[-3:]), outputs, dtype)
            return results if stack.ndim == 4 else results[0]
        return [self._each(image, outputs, dtype) for image in images]

    def _run(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        outputs: programs.Programs,
        dtype: Any,
        name: str = "the image",
    ) -> UInt8[np.ndarray, "b h w"] | Float[np.ndarray, "b h w k"]:
        own_size = images.shape[1], images.shape[2]
        short_side, color = self.preprocessing.short_side, self.preprocessing.pad_color
        if problem := too_large(own_size, short_side, self.pad_multiple):
            raise InputError(f"{name} {problem}")
        size = resized_size(own_size, short_side)
        target = self._padded_size(size, name)
        padded = np.stack([pad(resize_image(image, size), target, color) for image in images])
        results = programs.run(
            outputs,
            self.logits_fn(padded),
            *(np.tile(np.array(s, np.int32), (len(images), 1)) for s in (size, own_size)),
            padded_image=padded.shape[1:3],
            padded_label=padded_size(own_size, self.pad_multiple),
        )
        return np.asarray(results)[:, : own_size[0], : own_size[1]].astype(dtype)

    def _padded_size(self, size: Size, name: str) -> Size:
        if not self.sizes:
            return padded_size(size, self.pad_multiple)
        fitting = [other for other in self.sizes if other[0] >= size[0] and other[1] >= size[1]]
        if not fitting:
            known = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise InputError(
                f"{name} has {size[0]}x{size[1]} pixels (height x width): larger than what this"
                f" network was exported for, {known}"
            )
        return min(fitting, key=math.prod)

    def _read(self, path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        return decode_image(content, str(path), self.preprocessing.decoding)


def load_setup(setup: Setup, workdir: Path, checkpoint: str) -> LoadedNetwork:
    """The network of a Setup with the weights of a checkpoint; "init" needs no run."""
    variables, _ = load_network(setup, workdir, checkpoint)
    network = compile_network(setup, configured(setup.config))
    return of_setup(setup, functools.partial(programs.run, network, variables))


def of_setup(setup: Setup, logits_fn: Callable[[Any], Any]) -> LoadedNetwork:
    """A function of padded images, with the preprocessing of a Setup around it."""
    return LoadedNetwork(logits_fn, setup.preprocessing, setup.config.eval.pad_multiple)


def _checked(images: np.ndarray) -> UInt8[np.ndarray, "*b h w 3"]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(
            f"images: {images.dtype} of shape {images.shape}: must be uint8, (height, width, 3) or"
            " (number, height, width, 3), in RGB"
        )
    if 0 in images.shape:
        raise ValueError(f"images: of shape {images.shape}: must have pixels")
    return images
