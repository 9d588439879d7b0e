"""Convert PyTorch weights, or a checkpoint of a run, to a folder for `model.init_from`."""

import hashlib
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.files import ORBAX_MISREADS, require_literal
from contrastseg_jax.models import segmenter
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.models.zoo import NETWORKS
from contrastseg_jax.structs import ImageFormat
from contrastseg_jax.weights import parity, pretrained, run_weights
from contrastseg_jax.weights.recognize import Recognized, recognize
from contrastseg_jax.weights.spec import Weights
from contrastseg_jax.weights.torch_files import read_tensors
from contrastseg_jax.weights.torch_names import StateDict, locate

ROUNDING = 1e-4  # relative to the largest value; rounding over a hundred layers is 4e-6


def convert(source: Path, output: Path) -> None:
    """Convert a PyTorch or safetensors file to a folder in the format of `pretrained`.

    Prints every array with its statistics, then a summary.

    Raises:
        InputError: the file cannot be read, matches no network or contains values that are not
            finite; the output is not a new or empty folder, or cannot be written. Nothing is left
            behind then.
    """
    _require_usable(output)
    state = locate(read_tensors(source))
    recognized = recognize(state, source=str(source))
    variables = segmenter.unflatten(state.leaves)
    _require_sound(state, source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    weights = Weights(
        **vars(recognized),
        class_names=(),
        image_format=_image_format(recognized, state),
        source=source.name,
        sha256=digest,
    )
    left_out = Counter(state.unused.values())
    remarks = [
        "not used: " + (", ".join(f"{n} {name}" for name, n in left_out.items()) or "nothing"),
        _compare_with_peer(weights, state, variables),
    ]
    _write(output, weights, variables, remarks)


def convert_run(workdir: Path, checkpoint: str, output: Path) -> None:
    """Convert a checkpoint of a run: "latest", "best" or a step. Otherwise as `convert`.

    The EMA if the run keeps one; without optimiser and bank.
    """
    _require_usable(output)
    if checkpoint == "init":
        raise InputError("--checkpoint=init: must be latest, best or a step to convert a run")
    variables, weights = run_weights.restore(workdir, checkpoint)
    _write(output, weights, variables, [])


def _require_usable(output: Path) -> None:
    require_literal(output.resolve(), "--output", ORBAX_MISREADS)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output={output}: must be a new folder, or an empty one")


def _write(output: Path, weights: Weights, variables: Variables, remarks: list[str]) -> None:
    """Save the folder, and print its report."""
    overview = parameter_overview.get_parameter_overview(variables, include_stats=True)
    report = "\n".join([overview, *_summary(weights, variables), *remarks])
    pretrained.save(output, weights, variables, report + "\n")
    print(report)
    print(f"written: {output}; use it with --config.model.init_from={output}")


def _image_format(recognized: Recognized, state: StateDict) -> ImageFormat:
    """The image format of the weights: of a segmentation network, or of ImageNet training."""
    backbone = NETWORKS[recognized.networks[0]].backbone
    is_part = any(name.startswith("backbone.") for name in state.names.values())
    return backbone.whole_format if is_part else backbone.image_format


def _require_sound(state: StateDict, source: Path) -> None:
    """Raise an InputError for values that a trained network cannot have."""
    problems = []
    for key, array in state.tensors.items():
        if array.dtype != np.float32:
            problems.append(f"{key}: is {array.dtype}, must be floating-point")
        elif not np.isfinite(array).all():
            problems.append(f"{key}: has values that are not finite")
        elif key.endswith("running_var") and (array < 0).any():
            problems.append(f"{key}: has a negative variance")
    if problems:
        raise listed(str(source), problems)


def _summary(weights: Weights, variables: Variables) -> list[str]:
    """Lines that describe the weights."""
    if weights.num_classes:
        head = f" and a projection head ({weights.proj_dim})" if weights.proj_dim else ""
        what = f"{weights.networks[0]} with {weights.num_classes} classes{head}"
    else:
        what = f"the backbone of {', '.join(weights.networks)}"
    has_aux = "aux_head" in variables["params"]
    lacks_aux = bool(weights.num_classes and NETWORKS[weights.networks[0]].aux_head and not has_aux)
    return [
        f"{weights.source}: {what}",
        f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(variables['params'])):,}",
        *(["missing: the auxiliary head, randomly initialised by training"] if lacks_aux else []),
        f"images: {pretrained.describe_image_format(weights.image_format)}",
    ]


def _compare_with_peer(weights: Weights, state: StateDict, variables: Variables) -> str:
    """Compare the output with that of the same network in torchvision or timm."""
    pixels = np.random.default_rng(0).standard_normal((1, 64, 96, 3)).astype(np.float32)
    try:
        expected = parity.peer_output(weights.networks, state, pixels)
    except RuntimeError as error:  # another version, with other tensor names
        return f"not compared: {str(error).splitlines()[0]}"
    if expected is None:
        return "not compared: no installed torchvision or timm has this network"
    result = parity.own_output(weights.networks[0], weights.num_classes, variables, pixels)
    difference, largest = np.abs(result - expected).max(), np.abs(expected).max()
    verdict = "" if difference <= ROUNDING * largest else ", which is more than rounding"
    return (
        "compared with torchvision's or timm's output: maximum difference"
        f" {difference:.0e}, maximum value {largest:.0e}{verdict}"
    )
