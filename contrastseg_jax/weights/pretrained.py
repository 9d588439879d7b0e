"""Pretrained weights for `model.init_from`: a run, or a folder with their description and arrays.

weights.json   `Weights`, and the SHA-256 of every file in variables/
variables/     `params` and `batch_stats`, as Orbax stores them
report.txt     every array with its shape, mean and standard deviation
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from contrastseg_jax.errors import InputError, reason
from contrastseg_jax.files import ORBAX_MISREADS, require_disk_space, require_literal
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.models.zoo import NETWORKS, sharing_backbone
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import digests
from contrastseg_jax.run.checkpoint_files import LiteralPath
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import is_run
from contrastseg_jax.structs import CHANNEL_ORDERS, ImageFormat
from contrastseg_jax.weights import run_weights, torch_names
from contrastseg_jax.weights.spec import Weights


def save(folder: Path, weights: Weights, variables: Variables, report: str) -> None:
    """Write the folder, which must be empty or missing, atomically.

    Raises:
        InputError: it cannot be written.
    """
    target = folder.resolve()
    # An existing folder may be a mount point or in a read-only parent: it is filled, not replaced.
    exists = target.exists()
    partial = (target if exists else target.parent) / f".{target.name}.{os.getpid()}.partial"
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        require_disk_space(partial, sum(leaf.nbytes for leaf in jax.tree.leaves(variables)))
        (partial / "report.txt").write_text(report)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(LiteralPath(partial / "variables"), variables)
            found: Any = checkpointer.restore(LiteralPath(partial / "variables"))
        _require_same_arrays(variables, found)
        record = dataclasses.asdict(weights) | {"files": _digests(partial / "variables")}
        (partial / "weights.json").write_text(json.dumps(record, indent=2))
        if exists:
            for name in ("variables", "report.txt", "weights.json"):  # the last makes it valid
                os.replace(partial / name, target / name)
        else:
            os.replace(partial, target)
    except (OSError, ValueError) as error:  # Orbax raises ValueError for a device that fails
        raise InputError(f"--output={folder}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # it holds the folder
                parent.rmdir()


def is_there(folder: Path) -> bool:
    """Whether a folder holds weights: converted ones, or a run's."""
    return (folder / "weights.json").exists() or is_run(folder)


def describe(folder: Path) -> Weights:
    """The description of the weights in a folder, or of a run.

    Raises:
        InputError: it is missing or damaged.
    """
    with _named(folder):
        return run_weights.describe(folder) if is_run(folder) else _read_record(folder)


def read(folder: Path, network: str) -> Weights:
    """The description of the weights in a folder, or of a run, that start a network.

    Raises:
        InputError: it is missing or damaged, or the weights are for another backbone.
    """
    weights = describe(folder)
    fitting = sharing_backbone(weights.networks[0])
    if network not in fitting:
        raise InputError(
            f"model.init_from = '{folder}': {weights.source} is for {weights.networks[0]}, whose"
            f" backbone model.name = {network!r} does not use; these use it: {', '.join(fitting)}"
        )
    return weights


def _read_record(folder: Path) -> Weights:
    """Read weights.json."""
    path = folder / "weights.json"
    if not path.is_file():
        why = f"{path} does not exist"
        if folder.is_file():
            why = f"python main.py --mode=convert --input={folder} --output=FOLDER writes one"
        raise InputError(
            f"model.init_from = '{folder}': must be a run with a checkpoint, or a folder written by"
            f" --mode=convert; {why}"
        )
    require_literal(folder, "model.init_from", ORBAX_MISREADS)
    try:
        values = json.loads(path.read_text())
        image, files = values.pop("image_format"), values.pop("files")
        weights = Weights(
            networks=tuple(values.pop("networks")),
            class_names=tuple(values.pop("class_names")),
            image_format=ImageFormat(
                tuple(image["mean"]), tuple(image["std"]), image["channel_order"]
            ),
            **values,
        )
        if not isinstance(files, dict):
            raise TypeError(f"files = {files!r}")
        sharing_backbone(weights.networks[0])
        _require_format(weights.image_format)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); convert the weights again") from error
    return weights


def describe_image_format(image_format: ImageFormat) -> str:
    """The image format in words, for logs and reports."""
    return (
        f"{image_format.channel_order}; red, green, blue have mean {image_format.mean},"
        f" std {image_format.std}"
    )


def require_intact(folder: Path) -> None:
    """Raise an InputError unless the arrays are byte for byte what the conversion wrote.

    Orbax detects only some damage, only while reading, and keeps logging it afterwards. Of a run
    nothing is said: all processes choose its newest intact checkpoint together, as they read it.
    """
    if is_run(folder):
        return
    written = json.loads((folder / "weights.json").read_text())["files"]
    found = _digests(folder / "variables")
    damaged = [name for name, digest in written.items() if found.get(name) != digest]
    if damaged:
        raise InputError(
            f"{folder / 'variables'}: {', '.join(damaged[:3])}"
            f" {'is' if len(damaged) == 1 else 'are'} missing or not as converted; convert the"
            " weights again"
        )


def start_from(
    folder: Path, network: str, class_names: tuple[str, ...], fresh: Variables, *, strict: bool
) -> Variables:
    """`fresh` with the weights of a folder loaded into it; logs what stays randomly initialised.

    Of another network with the same backbone, only the backbone is loaded. All processes must call
    it: what one cannot read, all of them report.

    Raises:
        InputError: the folder cannot be read, or its weights are of another backbone; if `strict`,
            something that the logits depend on is missing, or the classes have other names.
    """
    weights = processes.sync_errors(lambda: read(folder, network))
    if is_run(folder):
        with _named(folder):
            given, weights = run_weights.restore(folder, "latest")
    else:
        processes.sync_errors(lambda: require_intact(folder))
        given = _restore(folder)
    parts = None if network in weights.networks else ("backbone",)
    variables, kept = torch_names.merge(given, fresh, parts=parts, source=str(folder))
    fresh_parts = {name: f"{name} ({why})" for name, why in kept.items()}
    for_training = ("proj_head",) if NETWORKS[network].aux_guides else ("proj_head", "aux_head")
    needed = [text for name, text in fresh_parts.items() if name.split("/")[0] not in for_training]
    if strict and needed:
        raise InputError(
            f"--checkpoint=init: model.init_from = '{folder}' lacks weights that the logits of"
            f" {network} depend on in this config: {', '.join(needed)}"
        )
    were = ", ".join(weights.class_names)
    renamed = bool(were) and not needed and weights.class_names != class_names
    if strict and renamed:
        raise InputError(
            f"--checkpoint=init: model.init_from = '{folder}' was trained on the classes {were},"
            f" the data set has {', '.join(class_names)}"
        )
    log.info(f"initialised from {weights.source} ({folder})")
    if renamed:
        log.warning(f"it was trained on the classes {were}: the last layer is loaded anyway")
    if fresh_parts:
        log.info(f"randomly initialised: {', '.join(fresh_parts.values())}")
    unread = sorted(given["params"].keys() - variables["params"].keys())
    if unread:
        log.info(f"not used: {', '.join(unread)}")
    return variables


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Lets an InputError about a run name the setting that names the run."""
    try:
        yield
    except InputError as error:
        if "model.init_from" in str(error):
            raise
        raise InputError(f"model.init_from = '{folder}': {error}") from error


def _restore(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(LiteralPath(folder.absolute() / "variables"))


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found


def _require_same_arrays(written: Variables, found: Any) -> None:
    """Raise a ValueError unless the arrays read back are those written."""
    sent, came = (
        {
            name: digests.array_digest(np.asarray(array))
            for name, array in digests.named_leaves(tree).items()
        }
        for tree in (written, found)
    )
    if wrong := [name for name in sent | came if sent.get(name) != came.get(name)]:
        raise ValueError(f"differs when read back: {', '.join(wrong[:3])}")


def _require_format(image_format: ImageFormat) -> None:
    numbers = (*image_format.mean, *image_format.std)
    is_sound = len(image_format.mean) == len(image_format.std) == 3 and min(image_format.std) > 0
    if not is_sound or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"invalid image format: {image_format}")
    if image_format.channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"channel_order = {image_format.channel_order!r}")
