"""Whether contrast works: known failures, recognised in the metrics of a run, in plain words."""

import math
from collections.abc import Mapping
from pathlib import Path

from contrastseg_jax.config.tree import Config
from contrastseg_jax.objectives.pixel_contrast import contrast_start
from contrastseg_jax.run.workdir import read_metrics

NEEDED = {"contrast", "negatives_per_anchor", "positive_similarity", "negative_similarity"}
PATIENCE = 0.1  # share of the steps that the contrast loss is given before it is judged
FLOOR_MARGIN = 0.02  # share by which the loss of useless embeddings may lie below log(1 + N)
COLLAPSE = 0.05  # difference of the mean similarities of positives and negatives
STALE = 1000  # steps, mean age of the rows of the bank
SMALLEST_RATIO = 0.01  # of the gradients of contrast and segmentation loss


def logged_symptoms(workdir: Path, step: int, config: Config) -> list[str]:
    """The symptoms after `step` steps, by what training had logged last; none where it had not."""
    lines = [x for x in read_metrics(workdir) if "train/loss" in x and x["step"] <= step]
    if not lines:
        return []
    of_training = (x for x in lines[-1].items() if x[0].startswith("train/") and x[1] is not None)
    values = {key.removeprefix("train/"): value for key, value in of_training}
    return [*symptoms(values, step, config).values()]


def symptoms(values: Mapping[str, float], step: int, config: Config) -> dict[str, str]:
    """What is wrong with the contrast loss after `step` steps, as sentences by name.

    Args:
        values: means of the metrics over some steps, as `progress.interval_means` gives them.
        step: number of steps taken.
        config: of the run.
    """
    contrast, num_steps = config.contrast, config.train.num_steps
    start = contrast_start(config) + contrast.ramp_steps
    is_early = step < start + PATIENCE * (num_steps - start)
    if is_early or not NEEDED <= values.keys():
        return {}
    found = {}
    # Of pairs that were chosen for being hard, even a good embedding has similar negatives.
    is_fair = {contrast.positives, contrast.negatives} <= {"all", "random"}
    scale = contrast.temperature / contrast.base_temperature
    floor = scale * math.log1p(values["negatives_per_anchor"])
    positive, negative = values["positive_similarity"], values["negative_similarity"]
    if is_fair and positive - negative < COLLAPSE:
        found["collapse"] = (
            "the embeddings have collapsed: positives are hardly more similar"
            f" ({positive:.2f}) than negatives ({negative:.2f}); raise contrast.temperature, or"
            " lower optim.learning_rate"
        )
    elif is_fair and values["contrast"] > (1 - FLOOR_MARGIN) * floor:
        found["floor"] = (
            f"the contrast loss, {values['contrast']:.2f}, is that of embeddings that do not"
            f" separate the classes, {floor:.2f}; lower contrast.temperature, or raise"
            " contrast.loss_weight"
        )
    if values.get("memory_age", 0.0) > STALE:
        found["stale"] = (
            f"the rows of the memory bank are {values['memory_age']:.0f} steps old on average, from"
            " a network that has changed since; lower memory.pixel_size and memory.segment_size,"
            " or raise memory.pixels_per_class"
        )
    ratio = values.get("gradient_ratio", math.inf)
    if config.loss.segmentation_weight and ratio < SMALLEST_RATIO:
        found["weight"] = (
            f"contrast hardly moves the features: its gradient there is {ratio:.1e} of that of the"
            f" segmentation loss; raise contrast.loss_weight, now {contrast.loss_weight:g}"
        )
    return found
