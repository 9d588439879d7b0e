"""Predictions for image files: index masks, overlays and a legend."""

import functools
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax import report
from contrastseg_jax.build import dataset_spec, decoding, image_format, keep_compiled, pad_color
from contrastseg_jax.config import Config
from contrastseg_jax.data.augment import padded_size, resize_image, resized_size
from contrastseg_jax.data.dataset import label_map
from contrastseg_jax.data.images import (
    IMAGE_SUFFIXES,
    decode_image,
    encode_jpeg,
    encode_png,
    is_turned,
)
from contrastseg_jax.data.labels import to_mask_values
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.evaluate import LogitsFn, load_run, network_logits
from contrastseg_jax.files import write_atomically
from contrastseg_jax.logging import log
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.resize import most_likely

most_likely_fn = jax.jit(most_likely, static_argnames=("padded_image", "padded_label"))


def predict_run(config: Config, workdir: Path, which: str, input_path: Path, output: Path) -> None:
    """Predict a file, or every image below a folder, into `output`.

    For `a/b.jpg` come `masks/a/b.png` (mask values of the data set) and `overlays/a/b.jpg`.
    A file that cannot be read does not stop the others; all such are in the error at the end.
    """
    output = output.resolve()
    files = find_images(input_path.resolve(), output)
    model, variables, _, _ = load_run(config, workdir, which)
    keep_compiled(config, workdir)
    classes = label_map(dataset_spec(config))
    network = functools.partial(network_logits, model=model, image_format=image_format(config))
    logits_fn = jax.jit(network)
    problems, num_turned = [], 0
    with logging_redirect_tqdm([log]):
        for name, path in tqdm(files.items(), unit="image", disable=None):
            try:
                content = path.read_bytes()
                image = decode_image(content, str(path), decoding(config))
            except (OSError, InputError) as error:
                problems.append(str(error))
                continue
            if config.data.exif_orientation == "stored":
                num_turned += is_turned(content, str(path))
            prediction = predict_image(config, logits_fn, variables, image)
            mask = encode_png(to_mask_values(prediction, classes))
            write_atomically(output / "masks" / f"{name}.png", mask)
            picture = encode_jpeg(report.overlay(image, prediction, classes), 90)
            write_atomically(output / "overlays" / f"{name}.jpg", picture)
    if len(problems) < len(files):
        report.save_legend(output / "legend.png", classes)
    log.info(f"{len(files) - len(problems)} of {len(files)} images predicted: {output}")
    if num_turned:
        log.info(
            f"{num_turned} of them taken as stored, which EXIF data ask viewers to turn;"
            " --config.data.exif_orientation=applied turns them"
        )
    if problems:
        raise listed(str(input_path), problems)


def predict_image(
    config: Config,
    logits_fn: LogitsFn,
    variables: Variables,
    image: UInt8[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "h w"]:
    """Class ids at the image's own size; the network sees it as in an evaluation."""
    own_size, multiple = (image.shape[0], image.shape[1]), config.eval.pad_multiple
    size = resized_size(own_size, config.data.short_side)
    padded = np.full((1, *padded_size(size, multiple), 3), pad_color(config), np.uint8)
    padded[0, : size[0], : size[1]] = resize_image(image, size)
    classes = most_likely_fn(
        logits_fn(variables, padded),
        *(np.array([size], np.int32), np.array([own_size], np.int32)),
        padded_image=padded.shape[1:3],
        padded_label=padded_size(own_size, multiple),
    )
    return np.asarray(classes)[0, : own_size[0], : own_size[1]].astype(np.uint8)


def find_images(input_path: Path, output: Path) -> dict[str, Path]:
    """The image files to predict, by the name of their results; `output` is left out."""
    if input_path.is_file():
        return {input_path.stem: input_path}
    if not input_path.is_dir():
        raise InputError(f"--input={input_path}: no such file or folder")
    if input_path == output:
        raise InputError(f"--output={output}: must be another folder than --input")
    files: dict[str, Path] = {}
    for path in sorted(input_path.rglob("[!.]*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.is_relative_to(output):
            continue
        name = path.relative_to(input_path).with_suffix("").as_posix()
        if name in files:
            raise InputError(f"{path}: its results would overwrite those of {files[name]}")
        files[name] = path
    if not files:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise InputError(f"--input={input_path}: holds no image ({suffixes})")
    return files
