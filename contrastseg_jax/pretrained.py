"""Weights that training starts from: a folder that says what they are, and holds them.

weights.json   `Weights`
variables/     `params` and `batch_stats`, as Orbax stores them
report.txt     every array with its shape, mean and standard deviation
"""

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from contrastseg_jax.errors import InputError
from contrastseg_jax.logging import log
from contrastseg_jax.models import weights as weights_lib
from contrastseg_jax.models.segmenter import NETWORKS, Variables, sharing_backbone
from contrastseg_jax.structs import CHANNEL_ORDERS, ImageFormat


@dataclass(frozen=True)
class Weights:
    """What is known of the variables in a folder."""

    networks: tuple[str, ...]  # one, or of a backbone alone all that stand on it
    num_classes: int  # 0: no head
    proj_dim: int  # 0: no projection head
    image_format: ImageFormat
    source: str  # name of the file that they come from
    sha256: str  # of that file


def save(folder: Path, weights: Weights, variables: Variables, report: str) -> None:
    """Write the folder, which must be empty or missing: it appears whole or not at all."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "report.txt").write_text(report)
        (partial / "weights.json").write_text(json.dumps(dataclasses.asdict(weights), indent=2))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "variables", variables)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(folder: Path, network: str) -> Weights:
    """What weights.json says.

    Raises:
        InputError: there is none, it is damaged, or the weights are not of this network's backbone.
    """
    path = folder / "weights.json"
    if not path.is_file():
        raise InputError(
            f"model.init_from = '{folder}': must be a folder that --mode=convert has written;"
            f" {path} does not exist"
        )
    try:
        values = json.loads(path.read_text())
        image = values.pop("image_format")
        weights = Weights(
            networks=tuple(values.pop("networks")),
            image_format=ImageFormat(
                tuple(image["mean"]), tuple(image["std"]), image["channel_order"]
            ),
            **values,
        )
        fitting = sharing_backbone(weights.networks[0])
        _require_format(weights.image_format)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); convert the weights again") from error
    if network not in fitting:
        raise InputError(
            f"model.init_from = '{folder}': {weights.source} is of {weights.networks[0]}, whose"
            f" backbone model.name = {network!r} does not have; these have it: {', '.join(fitting)}"
        )
    return weights


def start_from(folder: Path, network: str, fresh: Variables, *, whole: bool) -> Variables:
    """`fresh` with all that the weights of a folder have for it; the log says what they have not.

    Of another network on the same backbone only the backbone is taken.

    Raises:
        InputError: the folder cannot be read, or its weights are of another backbone; with `whole`,
            something that the logits depend on would stay fresh.
    """
    weights = read(folder, network)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            given: Any = checkpointer.restore(folder.absolute() / "variables")
    except Exception as error:  # Orbax raises many kinds
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{folder / 'variables'}: cannot be read ({type(error).__name__}: {reason}); convert"
            " the weights again"
        ) from error
    parts = None if network in weights.networks else ("backbone",)
    variables, kept = weights_lib.merge(given, fresh, parts=parts, source=str(folder))
    missing = [f"{name} ({reason})" for name, reason in kept.items()]
    for_training = ("proj_head",) if NETWORKS[network].aux_guides else ("proj_head", "aux_head")
    if whole and any(name.split("/")[0] not in for_training for name in kept):
        raise InputError(
            f"--checkpoint=init: model.init_from = '{folder}' does not hold all of {network} as it"
            f" is configured, but not {', '.join(missing)}"
        )
    log.info(f"starting from {weights.source} ({folder})")
    if missing:
        log.info(f"starting anew: {', '.join(missing)}")
    unread = sorted(given["params"].keys() - variables["params"].keys())
    if unread:
        log.info(f"left out: {', '.join(unread)}")
    return variables


def _require_format(image_format: ImageFormat) -> None:
    numbers = (*image_format.mean, *image_format.std)
    is_sound = len(image_format.mean) == len(image_format.std) == 3 and min(image_format.std) > 0
    if not is_sound or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"no format of images: {image_format}")
    if image_format.channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order = {image_format.channel_order!r}")
