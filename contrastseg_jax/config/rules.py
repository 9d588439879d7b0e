"""The rules that settings must obey."""

from collections.abc import Callable, Sequence
from typing import Any

from contrastseg_jax.config.tree import Config, leaves, nearest


def broken_rules(
    config: Config, *, choices: dict[str, Sequence[str]], num_devices: int
) -> list[str]:
    """Every setting that breaks a rule, as a line with its value and the first rule it breaks.

    `choices`: for a path, the values that exist (data sets and networks know their own names).
    `num_devices`: what a training batch is split over.
    """
    settings = dict(leaves(config))
    choices = CHOICES | choices
    broken = {
        path: f"must be one of {', '.join(allowed)}" + nearest(str(settings[path]), allowed)
        for path, allowed in choices.items()
        if settings[path] not in allowed
    }
    for paths, holds, rule in RULES:
        for path in paths.split():
            if path not in broken and not holds(settings[path], config):
                broken[path] = rule
    problems = [f"{path} = {settings[path]!r}: {rule}" for path, rule in broken.items()]
    size = config.train.batch_size
    if size > 0 and size % num_devices:
        below = size - size % num_devices
        multiples = " or ".join(str(n) for n in (below, below + num_devices) if n)
        problems.append(
            f"train.batch_size = {size}: must be a multiple of the {num_devices} devices,"
            f" e.g. {multiples}"
        )
    return problems


def is_text(value: str) -> bool:
    """Whether it can be a path, and be written to any file: it is UTF-8 and has no NUL."""
    return "\0" not in value and value.encode(errors="ignore").decode() == value


def uses_contrast(config: Config) -> bool:
    """Whether the contrast loss takes part in training at all."""
    return config.contrast.candidates != "none"


def uses_memory(config: Config) -> bool:
    """Whether the run carries a memory bank."""
    return config.contrast.candidates in ("memory", "both")


def splits_memory(config: Config) -> bool:
    """Whether each device holds a part of the bank's slots instead of the whole bank."""
    return uses_memory(config) and config.memory.sharding == "slots"


CHOICES = {
    "data.exif_orientation": ("stored", "applied"),
    "contrast.candidates": ("none", "batch", "memory", "both"),
    "contrast.anchors": ("hard", "random"),
    "contrast.positives": ("all", "random", "hardest", "semi_hard"),
    "contrast.negatives": ("all", "random", "hardest", "semi_hard"),
    "model.dtype": ("float32", "bfloat16"),
    "memory.dtype": ("float32", "bfloat16"),
    "memory.sharding": ("replicated", "slots"),
}

Rule = tuple[str, Callable[[Any, Config], bool], str]


def _pair(value: Sequence[Any], smallest: float) -> bool:
    return len(value) == 2 and all(isinstance(v, int) and v >= smallest for v in value)


def _are_levels(value: Sequence[Any], smallest: float) -> bool:
    are_in = (isinstance(v, (int, float)) and smallest <= v <= 255 for v in value)
    return len(value) in (0, 3) and all(are_in)


def _range(value: Sequence[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1]


# Paths that a rule is for, the rule, and the sentence that says it.
RULES: tuple[Rule, ...] = (
    (
        "data.num_threads data.prefetch contrast.max_views contrast.num_positives"
        " contrast.num_negatives"
        " memory.pixels_per_class train.batch_size train.num_steps train.log_steps"
        " train.eval_steps train.checkpoint_steps train.keep_checkpoints eval.batch_size"
        " eval.pad_multiple",
        lambda v, c: v >= 1,
        "must be at least 1",
    ),
    (
        "data.short_side data.cache_size data.num_workers augment.brightness contrast.warmup_steps"
        " contrast.anchors_per_image memory.pixel_size memory.segment_size optim.warmup_steps"
        " optim.weight_decay optim.poly_power eval.num_pictures loss.aux_weight",
        lambda v, c: v >= 0,
        "must not be negative",
    ),
    (
        "contrast.loss_weight contrast.temperature contrast.base_temperature optim.learning_rate"
        " optim.head_lr_multiplier",
        lambda v, c: v > 0,
        "must be > 0",
    ),
    (
        "data.bit_depth",
        lambda v, c: v == 0 or 8 <= v <= 16,
        "must be 8 to 16, or 0 for that of each file",
    ),
    ("seed", lambda v, c: 0 <= v < 2**31, "must be in 0..2147483647"),
    (
        "augment.flip_rate augment.color_distortion augment.class_uniform_rate",
        lambda v, c: 0 <= v <= 1,
        "must be in 0..1",
    ),
    (
        "optim.momentum optim.ema_decay",
        lambda v, c: 0 <= v < 1,
        "must be at least 0 and below 1",
    ),
    (
        "model.dropout_rate",
        lambda v, c: 0 <= v < 1 or v == -1,
        "must be at least 0 and below 1, or -1 for that of the network's original",
    ),
    (
        "augment.crop_size data.synthetic.image_size",
        lambda v, c: _pair(v, 32),
        "must be (height, width), whole numbers of at least 32",
    ),
    ("data.synthetic.num_examples", lambda v, c: _pair(v, 1), "must be (train, val), at least 1"),
    (
        "augment.scale_range augment.aspect_range",
        lambda v, c: _range(v),
        "must be (smallest, largest), both > 0",
    ),
    ("data.synthetic.num_classes", lambda v, c: 2 <= v <= 254, "must be in 2..254"),
    (
        "data.class_names",
        lambda v, c: (
            all(isinstance(name, str) and is_text(name) for name in v) and len(set(v)) == len(v)
        ),
        "must be names in UTF-8, e.g. ('road', 'tree'), each once",
    ),
    (
        "data.class_names",
        lambda v, c: c.data.name not in ("folder", "tfds") or 2 <= len(v) <= 254,
        "must name the 2 to 254 classes of data.name = 'folder' or 'tfds'",
    ),
    (
        "data.ignore_values",
        lambda v, c: all(isinstance(i, int) and 0 <= i <= 255 for i in v),
        "must be mask values in 0..255",
    ),
    (
        "data.root",
        lambda v, c: bool(v) or c.data.name in ("landcover", "tfds", "synthetic"),
        "must name the folder that holds the data set",
    ),
    (
        "data.root data.prepared_dir model.init_from parallel.compilation_cache"
        " data.tfds.dataset data.tfds.image_feature data.tfds.label_feature"
        " data.tfds.train_split data.tfds.val_split",
        lambda v, c: is_text(v),
        "must be UTF-8, without NUL",
    ),
    (
        "data.tfds.dataset",
        lambda v, c: bool(v) or c.data.name != "tfds",
        "must name the data set, e.g. oxford_iiit_pet",
    ),
    (
        "model.image_mean",
        lambda v, c: _are_levels(v, 0) and (not any(v) or max(v) > 1),
        "must be three grey levels (red, green, blue) in 0..255, no fractions of 255, or none",
    ),
    (
        "model.image_std",
        lambda v, c: _are_levels(v, 1),
        "must be three grey levels (red, green, blue) in 1..255, no fractions of 255, or none",
    ),
    (
        "model.channel_order",
        lambda v, c: v in ("", "RGB", "BGR"),
        "must be 'RGB' or 'BGR', or empty",
    ),
    (
        "loss.class_weights",
        lambda v, c: all(isinstance(i, (int, float)) and i >= 0 for i in v) and (not v or any(v)),
        "must be numbers, none negative and not all 0",
    ),
    (
        "model.proj_dim",
        lambda v, c: v >= 1 or not uses_contrast(c),
        "must be at least 1 with pixel contrast",
    ),
    (
        "contrast.warmup_steps",
        lambda v, c: v < c.train.num_steps or c.train.num_steps < 1 or not uses_contrast(c),
        "must be less than train.num_steps, or the contrast loss never counts",
    ),
    (
        "optim.warmup_steps",
        lambda v, c: v < c.train.num_steps or c.train.num_steps < 1,
        "must be less than train.num_steps",
    ),
    (
        "memory.pixel_size",
        lambda v, c: v + c.memory.segment_size > 0 or not uses_memory(c),
        "must not be 0 together with memory.segment_size when the bank is used",
    ),
)
