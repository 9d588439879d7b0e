"""Export of a trained network: programs of some image sizes, and a card that explains them.

card.json        classes, palette, what goes in and comes out, scores, and where it comes from
HxW.stablehlo    the network for images of that height and width, weights inside
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.data.preprocess import Size
from contrastseg_jax.data.spec import Decoding, LabelMap, Preprocessing
from contrastseg_jax.errors import InputError, reason
from contrastseg_jax.evaluation.evaluate import network_logits
from contrastseg_jax.evaluation.loaded_network import LoadedNetwork
from contrastseg_jax.evaluation.protocols import whole_image
from contrastseg_jax.export import stablehlo
from contrastseg_jax.files import to_json
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.record import environment, read_starts
from contrastseg_jax.run.workdir import evaluation_folder
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.setup.setup import Setup

CARD = "card.json"

NUM_CHECKED = 2  # images on which an export is compared with the checkpoint
CHECK_SECONDS = 600
LARGEST_DIFFERENCE = 1e-3  # of logits, relative to the largest; beyond it an export is refused


def export_run(
    setup: Setup, workdir: Path, checkpoint: str, sizes: Sequence[str], output: Path
) -> None:
    """Write the network of a checkpoint to an empty or missing folder, whole or not at all.

    `sizes`: of the images, "HEIGHTxWIDTH"; none: the crop that it was trained on. Each program is
    loaded in a process of its own and compared with the checkpoint; the differences are logged.

    Raises:
        InputError: the folder is in use or cannot be written, a size is wrong, or a program does
            not give the checkpoint's logits.
    """
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"--output={output}: must be an empty folder, or one to be made")
    height, width = setup.config.augment.crop_size
    parsed = dict.fromkeys(parse_size(text) for text in sizes) or [(height, width)]
    variables, step = load_network(setup, workdir, checkpoint)
    logits_of = jax.jit(functools.partial(image_logits, variables, setup=setup))
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for size in parsed:
            name = "{}x{}".format(*size)
            path = partial / f"{name}{stablehlo.SUFFIX}"
            path.write_bytes(stablehlo.serialize(logits_of, size))
            difference = largest_difference(path, logits_of, size)
            log.info(
                f"{output / path.name}: {path.stat().st_size / 2**20:.1f} MiB; its logits differ by"
                f" at most {difference:.1e} from the checkpoint's, relative to the largest"
            )
        card = describe(setup, workdir, step, checkpoint, [path.name for path in partial.iterdir()])
        (partial / CARD).write_text(to_json(card) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise InputError(f"--output={output}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info(f"exported step {step}: {output}")


def is_export(folder: Path) -> bool:
    """Whether a folder is one that `export_run` has written."""
    return (folder / CARD).is_file()


def load_export(folder: Path) -> LoadedNetwork:
    """The exported network of a folder, for images that fit into one of its sizes.

    Raises:
        InputError: the card or a program is damaged, or of a JAX version that this one cannot read.
    """
    try:
        card = json.loads((folder / CARD).read_text())
        label_map = LabelMap(tuple(card["classes"]), tuple(map(tuple, card["palette"])), {})
        given = card["input"]
        preprocessing = Preprocessing(
            label_map,
            tuple(given["pad_color"]),
            given["short_side"] or 0,
            Decoding(given["exif_orientation"], given["bit_depth"]),
        )
        names = {parse_size(Path(name).stem): name for name in card["programs"]}
    except (InputError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / CARD}: damaged ({reason(error)})") from error
    exported = {size: stablehlo.deserialize(folder / name) for size, name in names.items()}

    def logits_of(images: UInt8[np.ndarray, "b h w 3"]) -> Float[Array, "b h w k"]:
        return exported[images.shape[1:3]](images)

    return LoadedNetwork(logits_of, preprocessing, pad_multiple=1, sizes=tuple(exported))


def image_logits(
    variables: Variables, image: UInt8[Array, "b h w 3"], *, setup: Setup
) -> Float[Array, "b h w k"]:
    """Logits at the size of the images; normalisation is part of it."""
    logits = network_logits(variables, image, setup=setup, protocol=whole_image)
    return resize_bilinear(logits, (image.shape[1], image.shape[2]))


def parse_size(text: str) -> Size:
    """The height and width of "512x1024"; InputError for anything else."""
    height, times, width = text.partition("x")
    if not (times and height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise InputError(f"--size={text}: must be HEIGHTxWIDTH in pixels, e.g. 512x1024")
    return int(height), int(width)


def largest_difference(path: Path, logits_of: Callable[[Any], Any], size: Size) -> float:
    """Of a program's logits, run in a process of its own, and the checkpoint's, of noise.

    Relative to the checkpoint's largest logit.

    Raises:
        InputError: the program does not run, or the difference is more than rounding.
    """
    images = np.random.default_rng(0).integers(0, 256, (NUM_CHECKED, *size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(given, images)
        done = subprocess.run(
            [sys.executable, str(stablehlo.RUNNER), str(path), str(given), str(found)],
            env=os.environ | {"JAX_PLATFORMS": jax.default_backend()},
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{path.name}: cannot be run by itself ({last})")
        logits = np.load(found)
    expected = np.asarray(logits_of(images))
    difference = float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"{path.name}: its logits differ by {difference:.1e} from the checkpoint's, relative to"
            f" the largest; at most {LARGEST_DIFFERENCE} is rounding"
        )
    return difference


def describe(
    setup: Setup, workdir: Path, step: int, checkpoint: str, programs: Sequence[str]
) -> dict[str, Any]:
    """What card.json says of an export."""
    metrics = evaluation_folder(workdir, step) / "metrics.json"
    return {
        "format": "stablehlo",
        "needs": stablehlo.NEEDS,
        "lifetime": f"{stablehlo.LIFETIME}: JAX {jax.__version__}",
        "platforms": list(stablehlo.PLATFORMS),
        "programs": sorted(programs),
        "input": {
            "array": "uint8[number, height, width, 3], RGB, 0..255, not normalised",
            "short_side": setup.preprocessing.short_side or None,
            "pad_color": list(setup.preprocessing.pad_color),
            "exif_orientation": setup.data.exif_orientation,
            "bit_depth": setup.data.bit_depth,
        },
        "output": {"array": "float32[number, height, width, classes], logits"},
        "classes": list(setup.classes.names),
        "palette": [list(color) for color in setup.classes.palette],
        "network": setup.config.model.name,
        "step": step,
        "checkpoint": checkpoint,
        "val": json.loads(metrics.read_text()) if metrics.is_file() else None,
        "record": environment(setup.mesh) | {"starts": read_starts(workdir)},
        "config": setup.config.to_dict(),
    }
