"""Whether contrast works: known failures, recognised in the metrics of a run, in plain words."""

import math
from collections.abc import Mapping

from contrastseg_jax.config.tree import Config

PATIENCE = 0.1  # share of the steps that the contrast loss is given before it is judged
FLOOR_MARGIN = 0.02  # share by which a loss that tells nothing apart may lie below log(1 + N)
COLLAPSE = 0.05  # difference of the mean similarities of positives and negatives
STALE = 1000  # steps, mean age of the rows of the bank
SMALLEST_RATIO = 0.01  # of the gradients of contrast and segmentation loss


def symptoms(values: Mapping[str, float], step: int, config: Config) -> dict[str, str]:
    """What is wrong with the contrast loss after `step` steps, as sentences by name.

    Args:
        values: means of the metrics over some steps, as `progress.interval_means` gives them.
        step: number of steps taken.
        config: of the run.
    """
    contrast, num_steps = config.contrast, config.train.num_steps
    start = contrast.warmup_steps if config.loss.segmentation_weight else 0
    start += contrast.ramp_steps
    if step < start + PATIENCE * (num_steps - start) or "contrast" not in values:
        return {}
    found = {}
    scale = contrast.temperature / contrast.base_temperature
    floor = scale * math.log1p(values["negatives_per_anchor"])
    positive, negative = values["positive_similarity"], values["negative_similarity"]
    if positive - negative < COLLAPSE:
        found["collapse"] = (
            f"the embeddings have collapsed: positives are no more similar ({positive:.2f}) than"
            f" negatives ({negative:.2f}); raise contrast.temperature, or lower"
            " optim.learning_rate"
        )
    elif values["contrast"] > (1 - FLOOR_MARGIN) * floor:
        found["floor"] = (
            f"the contrast loss, {values['contrast']:.2f}, is that of embeddings that tell nothing"
            f" apart, log(1 + negatives) = {floor:.2f}; lower contrast.temperature, or raise"
            " contrast.loss_weight"
        )
    if values.get("memory_age", 0.0) > STALE:
        found["stale"] = (
            f"the rows of the memory bank are {values['memory_age']:.0f} steps old on average, from"
            " a network that was another; lower memory.pixel_size and memory.segment_size, or"
            " raise memory.pixels_per_class"
        )
    ratio = values.get("gradient_ratio", math.inf)
    if config.loss.segmentation_weight and ratio < SMALLEST_RATIO:
        found["weight"] = (
            f"contrast hardly moves the features: its gradient there is {ratio:.1e} of that of the"
            f" segmentation loss; raise contrast.loss_weight, now {contrast.loss_weight:g}"
        )
    return found
