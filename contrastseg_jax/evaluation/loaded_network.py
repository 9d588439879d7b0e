"""A trained network with its weights, for predictions from Python."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from contrastseg_jax.config.load import schema
from contrastseg_jax.config.tree import Config, replaced
from contrastseg_jax.data.images import decode_image
from contrastseg_jax.data.preprocess import pad, padded_size, resize_image, resized_size, too_large
from contrastseg_jax.data.spec import Color
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import programs
from contrastseg_jax.evaluation.evaluate import compile_network
from contrastseg_jax.evaluation.protocols import configured
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.ops.resize import resized_argmax, resized_logits, resized_probabilities
from contrastseg_jax.run.workdir import is_run, read_config
from contrastseg_jax.setup import preflight
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.weights import pretrained

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

    setup: Setup
    variables: Variables
    logits_fn: Callable[[Variables, Any], Any]  # of padded images, at the network's stride

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their ids."""
        return self.setup.classes.names

    @property
    def palette(self) -> tuple[Color, ...]:
        """A colour, (red, green, blue), for each class."""
        return self.setup.classes.palette

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
        multiple = self.setup.config.eval.pad_multiple
        own_size = images.shape[1], images.shape[2]
        short_side, color = self.setup.preprocessing.short_side, self.setup.preprocessing.pad_color
        if problem := too_large(own_size, short_side, multiple):
            raise InputError(f"{name} {problem}")
        size = resized_size(own_size, short_side)
        target = padded_size(size, multiple)
        padded = np.stack([pad(resize_image(image, size), target, color) for image in images])
        results = programs.run(
            outputs,
            self.logits_fn(self.variables, padded),
            *(np.tile(np.array(s, np.int32), (len(images), 1)) for s in (size, own_size)),
            padded_image=padded.shape[1:3],
            padded_label=padded_size(own_size, multiple),
        )
        return np.asarray(results)[:, : own_size[0], : own_size[1]].astype(dtype)

    def _read(self, path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        return decode_image(content, str(path), self.setup.data.decoding)


def load(source: str | os.PathLike[str], *, checkpoint: str = "best") -> LoadedNetwork:
    """Load a trained network: that of a run, or of a folder of --mode=convert.

    `checkpoint`: of a run "best" by the mIoU of val, "latest", or a step. The network is placed on
    one device.

    Raises:
        InputError: there is no such run, folder or checkpoint, it is damaged, or the weights are
            those of a backbone alone.
        FloatingPointError: a value is not finite.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    of_run = is_run(folder)
    config = read_config(folder) if of_run else _config_of_weights(folder)
    return load_setup(
        preflight.set_up(config, mode="predict", from_init=not of_run),
        folder,
        checkpoint if of_run else "init",
    )


def load_setup(setup: Setup, workdir: Path, checkpoint: str) -> LoadedNetwork:
    """The network of a Setup with the weights of a checkpoint; "init" needs no run."""
    variables, _ = load_network(setup, workdir, checkpoint)
    network = compile_network(setup, configured(setup.config))
    return LoadedNetwork(setup, variables, functools.partial(programs.run, network))


def _config_of_weights(folder: Path) -> Config:
    """A config of which converted weights are the network, without contrast."""
    weights = pretrained.describe(folder)
    if not weights.num_classes:
        raise InputError(
            f"{folder}: {weights.source} has the weights of a backbone alone; train a network that"
            f" starts from them, --config.model.init_from={folder}"
        )
    names = weights.class_names or tuple(f"class {i}" for i in range(weights.num_classes))
    return replaced(
        schema(),
        {
            "data.name": "folder",
            "data.class_names": names,
            "model.name": weights.networks[0],
            "model.init_from": str(folder.absolute()),
            "contrast.candidates": "none",
        },
    )


def _checked(images: np.ndarray) -> UInt8[np.ndarray, "*b h w 3"]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(
            f"images: {images.dtype} of shape {images.shape}: must be uint8, (height, width, 3) or"
            " (number, height, width, 3), in RGB"
        )
    if 0 in images.shape:
        raise ValueError(f"images: of shape {images.shape}: must have pixels")
    return images
