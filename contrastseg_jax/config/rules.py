"""What is known of each setting besides its default: its rules, and who may change it when.

A new setting has a line in default.py and one in RULES, at the same place; what more there is to
say of it stands in the groups below.
"""

from collections.abc import Sequence
from typing import Any

from contrastseg_jax.config.checks import (
    Rule,
    above,
    are_numbers,
    are_whole,
    at_least,
    between,
    from_below,
    increasing,
    is_number,
    is_text,
    not_negative,
    one_of,
    pair,
    text,
)
from contrastseg_jax.config.palette import is_color
from contrastseg_jax.config.tree import Config, leaves, nearest

# Settings of the machine and of the watching, not of the experiment: a run may resume with others.
OPERATIONAL = (
    "data.root",
    "data.prepared_dir",
    "data.cache_size",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
    "train.log_steps",
    "train.eval_steps",
    "train.checkpoint_steps",
    "train.keep_checkpoints",
    "train.wandb_project",
    "train.max_skipped_steps",
    "eval.batch_size",
    "eval.boundary_width",
    "eval.num_pictures",
    "memory.sharding",
    "parallel.fsdp",
    "parallel.compilation_cache",
)
# Settings of when a run ends, which a run may resume with others of to go on.
DURATION = ("train.num_steps", "train.patience")
# Settings of the photographs: those to predict may come from another camera than those of the run.
PHOTOGRAPHIC = ("data.exif_orientation", "data.bit_depth")
# Settings of how an image is seen, on which a checkpoint may be scored in other ways.
PROTOCOL = ("eval.scales", "eval.flip", "eval.window", "eval.overlap")
# Settings that are those of the weights a run starts from, where a config does not say.
LEFT_OPEN = ("model.image_mean", "model.image_std", "model.channel_order")
# Folders, in which ~ is the home of whoever starts the run.
FOLDERS = ("data.root", "data.train_subset", "model.init_from")
# Colours, in several spellings.
COLORS = ("data.palette", "data.ignore_colors")


def decides_evaluation(path: str) -> bool:
    """Whether scores cannot be compared where this setting differs.

    Settings of the data and of evaluations do, unless they are of the machine, or of what is
    trained on: those are named `train…`. (Of `num_examples` the second number matters, and shows in
    the images that were evaluated.)
    """
    of_training = path.rpartition(".")[2].startswith("train")
    of_training |= path == "data.synthetic.num_examples"
    is_evaluated = path.partition(".")[0] in ("data", "eval")
    return is_evaluated and path not in OPERATIONAL and not of_training


def uses_contrast(config: Config) -> bool:
    """Whether the contrast loss takes part in training at all."""
    return config.contrast.candidates != "none"


def uses_memory(config: Config) -> bool:
    """Whether the run carries a memory bank."""
    return config.contrast.candidates in ("memory", "both")


def micro_batch_size(config: Config) -> int:
    """Images of the global batch that are computed at once."""
    return config.train.batch_size // config.train.accumulation_steps


def splits_memory(config: Config) -> bool:
    """Whether each device holds a part of the bank's slots instead of the whole bank."""
    return uses_memory(config) and config.memory.sharding == "slots"


# --- Rules of one setting, and those that look at others ------------------------------------------


def _are_class_names(value: Sequence[Any], _: Config) -> bool:
    are_names = all(isinstance(name, str) and is_text(name) for name in value)
    return are_names and len(set(value)) == len(value)


def _are_levels(value: Sequence[Any], smallest: int) -> bool:
    return len(value) in (0, 3) and are_numbers(value, smallest, 255)


def _is_before_end(value: int, config: Config) -> bool:
    num_steps = config.train.num_steps
    return value < num_steps or num_steps < 1  # a fault of its own


SCALES = Rule(
    lambda value, _: bool(value) and are_numbers(value, 0.1, 4) and len(set(value)) == len(value),
    "must be numbers from 0.1 to 4, each once, e.g. (0.75, 1.0, 1.25)",
)
WINDOW = Rule(
    lambda value, _: len(value) in (0, 2) and are_whole(value, 32),
    "must be empty, or the height and width of windows of 32 pixels and more, e.g. (512, 1024)",
)
NAMED_ROOT = Rule(
    lambda value, config: bool(value) or config.data.name in ("landcover", "tfds", "synthetic"),
    "must name the folder that holds the data set",
)
NAMED_DATASET = Rule(
    lambda value, config: bool(value) or config.data.name != "tfds",
    "must name the data set, e.g. oxford_iiit_pet",
)
CLASS_NAMES = Rule(_are_class_names, "must be names in UTF-8, e.g. ('road', 'tree'), each once")
ALL_CLASSES = Rule(
    lambda value, config: config.data.name not in ("folder", "tfds") or 2 <= len(value) <= 254,
    "must name the 2 to 254 classes of data.name = 'folder' or 'tfds'",
)
TWO_CLASSES = Rule(
    lambda value, config: len(value) == 2 or config.data.mask_encoding != "binary",
    "must name the 2 classes of data.mask_encoding = 'binary': that of 0, that of other values",
)
MASK_VALUES = Rule(lambda value, _: are_whole(value, 0, 255), "must be mask values in 0..255")
OF_INDICES = Rule(
    lambda value, config: value == (255,) or config.data.mask_encoding == "index",
    "must be (255,), the default, unless data.mask_encoding = 'index'; 'rgb' has"
    " data.ignore_colors, 'binary' gives every value a class",
)
OF_NAMED_CLASSES = Rule(
    lambda value, config: value == "index" or config.data.name in ("folder", "tfds"),
    "must be 'index' unless data.name = 'folder' or 'tfds', as other data sets have masks of their"
    " own",
)
ARE_COLORS = Rule(
    lambda value, _: all(map(is_color, value)),
    "must be colours, '#rrggbb' or (red, green, blue) in 0..255 each",
)
SOME_COLORS = Rule(
    lambda value, config: bool(value) or config.data.mask_encoding != "rgb",
    "must be the colours of the classes, or a file of them, where data.mask_encoding = 'rgb'",
)
OF_COLORS = Rule(
    lambda value, config: not value or config.data.mask_encoding == "rgb",
    "must be () unless data.mask_encoding = 'rgb'",
)
BIT_DEPTH = Rule(
    lambda value, _: value == 0 or 8 <= value <= 16, "must be 8 to 16, or 0 for that of each file"
)
TRAIN_SUBSET = Rule(
    lambda value, _: not is_number(value) or 0 < float(value) < 1 or value.strip("0").isdigit(),
    "must be a share above 0 and below 1, a whole number from 1 on, or a file of names",
)
TRAIN_SPLITS = Rule(
    lambda value, _: 0 < len(value) == len(set(value)),
    "must name at least one split, each once, e.g. ('train', 'val')",
)
OF_FOLDER = Rule(
    lambda value, config: value == 0 or config.data.name == "folder",
    "must be 0 unless data.name = 'folder', as other data sets come with a val",
)
IMAGE_SIZE = pair(32, "must be (height, width), whole numbers of at least 32")
NUM_EXAMPLES = pair(1, "must be (train, val), at least 1")
FACTORS = increasing("must be (smallest, largest), both > 0")
DROPOUT = Rule(
    lambda value, _: 0 <= value < 1 or value == -1,
    "must be at least 0 and below 1, or -1 for that of the network's original",
)
EMBEDDED = Rule(
    lambda value, config: value >= 1 or not uses_contrast(config),
    "must be at least 1 with pixel contrast",
)
MEANS = Rule(
    lambda value, _: _are_levels(value, 0) and (not any(value) or max(value) > 1),
    "must be three grey levels (red, green, blue) in 0..255, no fractions of 255, or none",
)
DEVIATIONS = Rule(
    lambda value, _: _are_levels(value, 1),
    "must be three grey levels (red, green, blue) in 1..255, no fractions of 255, or none",
)
CHANNEL_ORDER = Rule(
    lambda value, _: value in ("", "RGB", "BGR"), "must be 'RGB' or 'BGR', or empty"
)
SOMETHING_TRAINS = Rule(
    lambda value, config: value > 0 or uses_contrast(config),
    "must be > 0 without pixel contrast, or nothing is trained",
)
SOME_TERM = Rule(
    lambda value, config: (
        value > 0 or any(config.loss.terms.values()) or config.loss.segmentation_weight == 0
    ),
    "must be > 0 where all other weights in loss.terms are 0",
)
CLASS_WEIGHTS = Rule(
    lambda value, _: are_numbers(value, 0) and (not value or any(value)),
    "must be numbers, none negative and not all 0",
)
GIVEN_OR_COMPUTED = Rule(
    lambda value, config: not value or config.loss.class_weighting == "given",
    "must be () where loss.class_weighting computes them",
)
CONTRAST_COUNTS = Rule(
    lambda value, config: (
        _is_before_end(value, config)
        or not uses_contrast(config)
        or config.loss.segmentation_weight == 0
    ),
    "must be less than train.num_steps, or the contrast loss never counts",
)
WARMUP_ENDS = Rule(_is_before_end, "must be less than train.num_steps")
SOME_SLOTS = Rule(
    lambda value, config: value + config.memory.segment_size > 0 or not uses_memory(config),
    "must not be 0 together with memory.segment_size when the bank is used",
)
BETAS = Rule(
    lambda value, _: len(value) == 2 and are_numbers(value, 0) and max(value) < 1,
    "must be two numbers, at least 0 and below 1",
)
EMA_EXISTS = Rule(
    lambda value, config: value != "ema" or config.optim.ema_decay > 0,
    "needs a running average: set optim.ema_decay, e.g. 0.999",
)
SELECTION = one_of("all", "random", "hardest", "semi_hard")
DTYPE = one_of("float32", "bfloat16")

# --- The rules of every setting, in the order of default.py ---------------------------------------

# The first that a value breaks is the one that is told.
RULES: dict[str, list[Rule]] = {
    "seed": [between(0, 2**31 - 1)],
    "data.name": [],  # the data sets know their names
    "data.root": [NAMED_ROOT, text()],
    "data.prepared_dir": [text()],
    "data.class_names": [CLASS_NAMES, ALL_CLASSES, TWO_CLASSES],
    "data.ignore_values": [MASK_VALUES, OF_INDICES],
    "data.mask_encoding": [one_of("index", "rgb", "binary"), OF_NAMED_CLASSES],
    "data.palette": [ARE_COLORS, SOME_COLORS, OF_COLORS],
    "data.ignore_colors": [ARE_COLORS, OF_COLORS],
    "data.exif_orientation": [one_of("stored", "applied")],
    "data.bit_depth": [BIT_DEPTH],
    "data.train_subset": [text(), TRAIN_SUBSET],
    "data.train_splits": [TRAIN_SPLITS],
    "data.val_fraction": [from_below(0, 1), OF_FOLDER],
    "data.val_unit": [one_of("sequence", "image")],
    "data.short_side": [not_negative()],
    "data.cache_size": [not_negative()],
    "data.num_threads": [at_least(1)],
    "data.num_workers": [not_negative()],
    "data.prefetch": [at_least(1)],
    "data.tfds.dataset": [text(), NAMED_DATASET],
    "data.tfds.image_feature": [text()],
    "data.tfds.label_feature": [text()],
    "data.tfds.train_split": [text()],
    "data.tfds.val_split": [text()],
    "data.synthetic.image_size": [IMAGE_SIZE],
    "data.synthetic.num_classes": [between(2, 254)],
    "data.synthetic.num_examples": [NUM_EXAMPLES],
    "augment.crop_size": [IMAGE_SIZE],
    "augment.scale_range": [FACTORS],
    "augment.aspect_range": [FACTORS],
    "augment.flip_rate": [between(0, 1)],
    "augment.brightness": [not_negative()],
    "augment.color_distortion": [between(0, 1)],
    "augment.class_uniform_rate": [between(0, 1)],
    "augment.blur_rate": [between(0, 1)],
    "augment.erase_rate": [between(0, 1)],
    "augment.class_mix_rate": [between(0, 1)],
    "model.name": [],  # the networks know their names
    "model.proj_input": [one_of("features", "last")],
    "model.proj_dim": [EMBEDDED],
    "model.dropout_rate": [DROPOUT],
    "model.init_from": [text()],
    "model.dtype": [DTYPE],
    "model.remat": [],  # the networks know their stages
    "model.freeze": [],  # likewise their parts
    "model.image_mean": [MEANS],
    "model.image_std": [DEVIATIONS],
    "model.channel_order": [CHANNEL_ORDER],
    "loss.segmentation_weight": [not_negative(), SOMETHING_TRAINS],
    "loss.ramp_steps": [not_negative()],
    "loss.class_weights": [CLASS_WEIGHTS, GIVEN_OR_COMPUTED],
    "loss.class_weighting": [one_of("given", "median_frequency", "enet")],
    "loss.aux_weight": [not_negative()],
    "loss.terms.cross_entropy": [not_negative(), SOME_TERM],
    "loss.terms.ohem": [not_negative()],
    "loss.terms.focal": [not_negative()],
    "loss.terms.lovasz": [not_negative()],
    "loss.terms.rmi": [not_negative()],
    "loss.terms.dice": [not_negative()],
    "loss.cross_entropy.label_smoothing": [from_below(0, 1)],
    "loss.ohem.threshold": [between(0, 1)],
    "loss.ohem.min_kept": [not_negative()],
    "loss.focal.gamma": [not_negative()],
    "loss.rmi.radius": [between(1, 5)],
    "loss.rmi.pool_size": [between(1, 8)],
    "loss.rmi.bce_share": [between(0, 1)],
    "loss.dice.smooth": [not_negative()],
    "contrast.candidates": [one_of("none", "batch", "memory", "both")],
    "contrast.loss_weight": [above(0)],
    "contrast.anchors": [one_of("hard", "random")],
    "contrast.anchors_per_image": [not_negative()],
    "contrast.max_views": [at_least(1)],
    "contrast.positives": [SELECTION],
    "contrast.negatives": [SELECTION],
    "contrast.num_positives": [at_least(1)],
    "contrast.num_negatives": [at_least(1)],
    "contrast.approximate": [],  # a truth value
    "contrast.temperature": [above(0)],
    "contrast.base_temperature": [above(0)],
    "contrast.warmup_steps": [not_negative(), CONTRAST_COUNTS],
    "contrast.ramp_steps": [not_negative()],
    "memory.pixel_size": [not_negative(), SOME_SLOTS],
    "memory.segment_size": [not_negative()],
    "memory.pixels_per_class": [at_least(1)],
    "memory.key_pixels": [one_of("all", "correct")],
    "memory.key_network": [one_of("online", "ema"), EMA_EXISTS],
    "memory.dtype": [DTYPE],
    "memory.sharding": [one_of("replicated", "slots")],
    "optim.name": [one_of("sgd", "adamw")],
    "optim.learning_rate": [above(0)],
    "optim.head_lr_multiplier": [above(0)],
    "optim.schedule": [one_of("poly", "cosine", "constant")],
    "optim.warmup_steps": [not_negative(), WARMUP_ENDS],
    "optim.poly_power": [not_negative()],
    "optim.momentum": [from_below(0, 1)],
    "optim.betas": [BETAS],
    "optim.weight_decay": [not_negative()],
    "optim.decayed": [one_of("all", "kernels")],
    "optim.clip_norm": [not_negative()],
    "optim.ema_decay": [from_below(0, 1)],
    "train.batch_size": [at_least(1)],
    "train.accumulation_steps": [at_least(1)],
    "train.num_steps": [at_least(1)],
    "train.log_steps": [at_least(1)],
    "train.eval_steps": [at_least(1)],
    "train.checkpoint_steps": [at_least(1)],
    "train.wandb_project": [text()],
    "train.max_skipped_steps": [at_least(1)],
    "train.patience": [not_negative()],
    "train.keep_checkpoints": [at_least(1)],
    "parallel.fsdp": [],  # a truth value
    "parallel.compilation_cache": [text()],
    "eval.batch_size": [at_least(1)],
    "eval.pad_multiple": [at_least(1)],
    "eval.scales": [SCALES],
    "eval.flip": [],  # a truth value
    "eval.window": [WINDOW],
    "eval.overlap": [from_below(0, 1)],
    "eval.boundary_width": [between(0, 1)],
    "eval.num_pictures": [not_negative()],
}


def broken_rules(
    config: Config, *, choices: dict[str, Sequence[str]], num_devices: int
) -> list[str]:
    """Every setting that breaks a rule, as a line with its value and the first rule it breaks.

    `choices`: for a path, the values that exist (data sets and networks know their own names).
    `num_devices`: what a training batch is split over.
    """
    settings = dict(leaves(config))
    known_names = {path: [one_of(*names)] for path, names in choices.items()}
    problems = []
    for path, rules in (RULES | known_names).items():
        value = settings[path]
        broken = next((rule for rule in rules if not rule.holds(value, config)), None)
        if broken:
            hint = nearest(str(value), broken.names)
            problems.append(f"{path} = {value!r}: {broken.sentence}{hint}")
    size, number = config.train.batch_size, config.train.accumulation_steps
    parts = num_devices * max(number, 1)  # less is a fault of its own
    if size > 0 and size % parts:
        below = size - size % parts
        multiples = " or ".join(str(n) for n in (below, below + parts) if n)
        of_devices = f"a multiple of the {num_devices} devices"
        times = f" times train.accumulation_steps = {number}" if number > 1 else ""
        problems.append(f"train.batch_size = {size}: must be {of_devices}{times}, e.g. {multiples}")
    return problems
