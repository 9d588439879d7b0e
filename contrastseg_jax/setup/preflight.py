"""Checks of a config against network, data set and machine, before anything is written."""

from pathlib import Path

import jax
import jax.numpy as jnp

from contrastseg_jax.config.palette import palette_problems
from contrastseg_jax.config.rules import (
    broken_rules,
    micro_batch_size,
    uses_contrast,
    uses_memory,
)
from contrastseg_jax.config.tree import Config, replaced
from contrastseg_jax.contrast.selection import POOLED, RANK_BITS
from contrastseg_jax.data.dataset import dataset_names, split_names
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.files import TFDS_MISREADS, require_literal
from contrastseg_jax.models.zoo import model_names, part_names, stage_names
from contrastseg_jax.parallel import device_memory
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.weights_and_biases import is_installed
from contrastseg_jax.setup.resolve import (
    adopt_image_format,
    build_model,
    num_anchors,
    resolve,
    training_shapes,
)
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.weights import pretrained
from contrastseg_jax.weights.spec import class_names

BANK_SHARE = 0.5  # largest share of a device's memory; the network needs the rest
# Values per channel for BatchNorm. The variance of n values is (n - 1) / n of the true one on
# average, so features in evaluation, with the running average, are larger than in training: by 41%
# with 2, 15% with 4, 7% with 8, the fewest in the original's recipes.
MIN_BATCH_NORM_VALUES = 8


def set_up(
    config: Config, *, mode: str, run: Config | None = None, from_init: bool = False
) -> Setup:
    """Check a config, and resolve it to a `Setup`.

    `run`: the config of the run being resumed, if any. `from_init`: use the weights of
    `model.init_from` without training.

    Raises:
        InputError: settings are inconsistent with each other, network, data set or machine.
    """
    is_new_run = mode == "train" and run is None
    check(config, mode=mode, reads_weights=from_init or is_new_run)
    if from_init and not config.model.init_from:
        raise InputError("--checkpoint=init: needs --config.model.init_from=FOLDER")
    if from_init or mode == "train":
        config = adopt_image_format(config, None if from_init else run)
    # Images are predicted one by one.
    return resolve(config, jax.local_devices()[:1] if mode == "predict" else None)


def check(
    config: Config,
    *,
    mode: str,
    reads_weights: bool = False,
    num_devices: int | None = None,
) -> None:
    """Raise one InputError for all invalid settings, for this package or this machine.

    Settings that are valid but harm training are warnings.

    `reads_weights`: whether the weights of `model.init_from`, if set, will be loaded.
    `num_devices`: to train on, for a plan, which itself reports what does not fit into memory;
    default: this machine's.
    """
    trains = mode in ("train", "plan")
    if num_devices is None:
        num_devices = jax.device_count() if trains else 1
    problems = broken_rules(
        config,
        choices={"model.name": model_names(), "data.name": dataset_names()},
        num_devices=num_devices,
    )
    if mode in ("plan", "predict"):  # read no data
        problems = [problem for problem in problems if not problem.startswith("data.root")]
    else:
        problems += folder_problems(config)
    if config.model.name in model_names():
        problems += weights_problems(config) if reads_weights else []
        problems += stage_problems(config)
    if not any(problem.startswith("data.") for problem in problems):
        problems += class_problems(config) + split_problems(config) + color_problems(config)
        # Otherwise there is no valid network or batch to check further.
        shape_settings = ("model.", "augment.crop_size", "train.batch_size", "train.accumulation")
        if trains and not any(problem.startswith(shape_settings) for problem in problems):
            num_classes = len(class_names(config))
            problems += contrast_problems(
                config,
                num_classes=num_classes,
                num_devices=num_devices,
                device_bytes=device_memory.device_bytes() if mode == "train" else None,
            )
            problems += batch_norm_problems(config, num_classes=num_classes)
    if mode == "train" and config.train.wandb_project and not is_installed():
        problems.append(
            f"train.wandb_project = {config.train.wandb_project!r}: needs the package wandb; pip"
            " install wandb"
        )
    if problems:
        raise listed("the config", problems)


def stage_problems(config: Config) -> list[str]:
    """Stages of model.remat, or parts of model.freeze, that the network does not have."""
    net = config.model
    known = {"remat": ("stages", stage_names(net.name)), "freeze": ("parts", part_names(net.name))}
    return [
        f"model.{setting} names {name!r}: must be {kind} of {net.name}: {', '.join(names)}"
        for setting, (kind, names) in known.items()
        for name in net[setting]
        if name not in names
    ]


def class_problems(config: Config) -> list[str]:
    """A number of class weights other than that of the classes."""
    names, weights = class_names(config), config.loss.class_weights
    if len(weights) in (0, len(names)):
        return []
    return [
        f"loss.class_weights has {len(weights)} numbers: must have one for each of the"
        f" {len(names)} classes {', '.join(names)}, or none"
    ]


def color_problems(config: Config) -> list[str]:
    """A table of colours that is not one for each class, or has one for two."""
    data = config.data
    if data.mask_encoding != "rgb":
        return []
    return palette_problems(data.class_names, data.palette, data.ignore_colors)


def split_problems(config: Config) -> list[str]:
    """Splits of data.train_splits that the data set never has."""
    names = split_names(config.data.name)
    return [
        f"data.train_splits names {split!r}: must be splits of {config.data.name}: "
        + ", ".join(names)
        for split in config.data.train_splits
        if split not in names
    ]


def folder_problems(config: Config) -> list[str]:
    """Folders that TFDS would misread."""
    names = ("prepared_dir", "root") if config.data.name == "tfds" else ("prepared_dir",)
    problems = []
    for name in names:
        try:
            folder = Path(config.data[name]).expanduser()
            require_literal(folder, f"data.{name}", TFDS_MISREADS)
        except InputError as error:
            problems.append(str(error))
    return problems


def weights_problems(config: Config) -> list[str]:
    """Why `model.init_from` cannot be loaded into the network."""
    net = config.model
    if not net.init_from:
        return []
    if "://" in net.init_from:
        return [f"model.init_from = {net.init_from!r}: must be on a local or mounted disk"]
    try:
        pretrained.read(Path(net.init_from), net.name)
        pretrained.require_intact(Path(net.init_from))
    except InputError as error:
        return [str(error)]
    return []


def batch_norm_problems(config: Config, *, num_classes: int) -> list[str]:
    """BatchNorm layers with one value per channel, which have no variance.

    A warning for those with few values.
    """
    model = build_model(config, num_classes)
    size, number = config.train.batch_size, config.train.accumulation_steps
    crop_size = tuple(config.augment.crop_size)
    num_values = training_shapes(config, model).num_values
    fewest = min(num_values.values())
    if fewest >= MIN_BATCH_NORM_VALUES:
        return []
    layers = [name for name, number in num_values.items() if number == fewest]
    others = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    # Global pooling, or one vector per class, does not depend on the crop.
    larger = replaced(config, {"augment.crop_size": tuple(2 * side for side in crop_size)})
    by_crop = training_shapes(larger, model).num_values[layers[0]] > fewest
    text = (
        f"train.batch_size = {size}, augment.crop_size = {crop_size}: BatchNorm of"
        f" {config.model.name} computes the variance of a channel from {fewest}"
        f" value{'s' if fewest > 1 else ''} ({layers[0]}{others})"
    )
    remedy = f"raise train.batch_size to {-(-MIN_BATCH_NORM_VALUES * size // fewest)}"
    remedy += ", or augment.crop_size" if by_crop else ""
    remedy += f", or lower train.accumulation_steps, now {number}" if number > 1 else ""
    if fewest == 1:
        return [f"{text}, which is always 0: {remedy}"]
    log.warning(f"{text}, so that evaluation differs from training: {remedy}")
    return []


def contrast_problems(
    config: Config, *, num_classes: int, num_devices: int, device_bytes: int | None
) -> list[str]:
    """Problems with the sizes of bank, candidates and anchors.

    `device_bytes`: memory of one device; None: not checked.
    """
    if not uses_contrast(config):
        return []
    settings, bank, batch_size = config.contrast, config.memory, micro_batch_size(config)
    problems, slots, anchors = [], 0, 0
    if uses_memory(config):
        slots = bank.pixel_size + bank.segment_size
        problems += bank_problems(config, num_devices=num_devices)
        parts = num_devices if bank.sharding == "slots" else 1
        size = num_classes * slots * config.model.proj_dim * jnp.dtype(bank.dtype).itemsize
        if device_bytes is not None and size // parts > BANK_SHARE * device_bytes:
            problems.append(
                f"memory: {num_classes} classes x {slots} slots x {config.model.proj_dim}"
                f" {bank.dtype} takes {size // parts / 2**30:.1f} GiB of a device's"
                f" {device_bytes / 2**30:.1f}: must be at most {BANK_SHARE:.0%}; make the queues"
                " smaller, or use memory.dtype = 'bfloat16' or memory.sharding = 'slots'"
            )
    if settings.candidates in ("batch", "both"):
        anchors = num_anchors(config, build_model(config, num_classes))
    own = min(anchors, settings.max_views)  # of one class in an image, including the anchor
    most = {
        "positives": slots + max(batch_size * own - 1, 0),
        "negatives": (num_classes - 1) * slots
        + batch_size * min(anchors, (num_classes - 1) * settings.max_views),
    }
    for side, limit in most.items():
        number = settings[f"num_{side}"]
        if settings[side] != "all" and number > limit:
            problems.append(
                f"contrast.num_{side} = {number}: an anchor has at most {limit}, of {num_classes}"
                f" classes, {slots} slots a class and {batch_size * anchors} anchors in the batch"
            )
    total = num_classes * slots + batch_size * anchors
    if total > 1 << RANK_BITS and POOLED & {settings.positives, settings.negatives}:
        problems.append(
            f"contrast.positives = {settings.positives!r}, contrast.negatives ="
            f" {settings.negatives!r}: can draw from at most {1 << RANK_BITS} candidates; there are"
            f" {total}, of {num_classes} classes, {slots} slots a class and {batch_size * anchors}"
            " anchors in the batch"
        )
    return problems


def bank_problems(config: Config, *, num_devices: int) -> list[str]:
    """Queues too short for one step, or not divisible by the number of devices."""
    problems, bank = [], config.memory
    for queue, per_image in (("pixel", bank.pixels_per_class), ("segment", 1)):
        size, rows = bank[f"{queue}_size"], per_image * config.train.batch_size
        if 0 < size < rows:
            problems.append(
                f"memory.{queue}_size = {size}: one step may enqueue {rows} rows of a class"
                f" ({per_image} for each of {config.train.batch_size} images); it must be at least"
                " that, or 0"
            )
        if bank.sharding == "slots" and size % num_devices:
            problems.append(
                f"memory.{queue}_size = {size}: memory.sharding = 'slots' splits it over"
                f" {num_devices} devices; it must be a multiple, e.g."
                f" {size + num_devices - size % num_devices}"
            )
    return problems
