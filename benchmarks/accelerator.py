"""What an accelerator makes of the program: speed, memory, rounding and a real run.

    python benchmarks/accelerator.py --output=accelerator.json   # all parts, in 25 minutes
    python benchmarks/accelerator.py --part=train,bank           # some of them
    python benchmarks/accelerator.py --tiny                      # tries the program, on a CPU too

The file is written after every row; parts that it already has and that are not measured again stay.
A row that fails says why in its place, and past `--minutes` a part begins no further row.

Shares are those of the peaks that vendors publish for dense operations and memory, and are left out
for other devices. Operations are counted as in networks.py. Products of float32 count against the
peak of what they are computed in by default: TF32 on a GPU, bfloat16 on a TPU.
"""

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
from absl import app, flags

from contrastseg_jax.config.default import VARIANTS
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.evaluation.evaluate import network_logits, score
from contrastseg_jax.evaluation.protocols import whole_image
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.out_of_memory import is_out_of_memory
from contrastseg_jax.setup.resolve import initial_variables, resolve
from contrastseg_jax.structs import Anchors, Batch, MemoryBank, TrainState
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state
from contrastseg_jax.training.train_step import total_loss

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
Rows = Iterator[tuple[Row, Callable[[], Row]]]  # what a row is about, and its measurement


@dataclass(frozen=True)
class Peak:
    """Of one device, as published."""

    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, of what products of float32 are computed in
    bandwidth: float  # GB/s


PEAKS = {  # by `device_kind`
    "NVIDIA A100-SXM4-80GB": Peak(312, 156, 2039),
    "NVIDIA H100 80GB HBM3": Peak(989, 494.5, 3350),
    "NVIDIA H200": Peak(989, 494.5, 4800),
    "TPU v4": Peak(275, 275, 1228),
    "TPU v5 lite": Peak(197, 197, 819),
    "TPU v5e": Peak(197, 197, 819),
    "TPU v5": Peak(459, 459, 2765),
    "TPU v5p": Peak(459, 459, 2765),
    "TPU v6 lite": Peak(918, 918, 1640),
    "TPU v6e": Peak(918, 918, 1640),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    trained: tuple[tuple[str, str, str], ...]  # network, dtype, variant
    compared: tuple[str, str]  # network and variant of `parity`
    crop_size: tuple[int, int]
    evaluated: str
    image_size: tuple[int, int]
    batch_size: int
    rounds: int  # of which the median counts
    warm_up: int  # rounds before them
    slots: tuple[int, ...]  # of a class of the bank
    dim: int
    anchors_per_image: int
    recipe: str  # of the run on land cover
    settings: tuple[str, ...] = ()  # of all training


FULL = Scale(
    trained=(
        ("hrnet_w48", "bfloat16", "memory"),
        ("hrnet_w48", "bfloat16", "ce"),
        ("hrnet_w48_ocr", "bfloat16", "memory"),
        ("deeplabv3_r101", "bfloat16", "memory"),
        ("deeplabv3plus_r101", "bfloat16", "memory"),
        ("hrnet_w48", "float32", "memory"),
    ),
    compared=("hrnet_tiny", "contrast"),
    crop_size=(512, 1024),
    evaluated="hrnet_w48",
    image_size=(1024, 2048),
    batch_size=8,
    rounds=20,
    warm_up=3,
    slots=(1000, 2000, 5000, 10_000),
    dim=256,
    anchors_per_image=512,
    recipe="quickstart.py",
)
TINY = Scale(  # ResNet-18 compiles faster than the smallest HRNet
    trained=(("fcn_r18", "bfloat16", "memory"),),
    compared=("fcn_r18", "ce"),
    crop_size=(64, 64),
    evaluated="fcn_r18",
    image_size=(64, 128),
    batch_size=2,
    rounds=2,
    warm_up=1,
    slots=(40,),
    dim=16,
    anchors_per_image=16,
    recipe="quickstart.py:fcn_r18,ce",
    settings=(
        *("train.num_steps=2", "train.batch_size=2", "data.short_side=64"),
        *("memory.pixel_size=40", "memory.segment_size=8", "eval.num_pictures=0"),
    ),
)

FLAGS = flags.FLAGS
flags.DEFINE_list("part", [], "Parts to measure; empty: all.")
flags.DEFINE_string("output", None, "JSON file of all rows.")
flags.DEFINE_integer("batch_size", 0, "Images of a step; 0: 8, on a CPU 2.", lower_bound=0)
flags.DEFINE_float("minutes", 9, "Past which a part begins no further row.")
flags.DEFINE_boolean("tiny", False, "The smallest networks, sizes and steps.")


def main(_: list[str]) -> None:
    """Measure the parts, then print their tables in Markdown."""
    if unknown := set(FLAGS.part) - set(PARTS):
        sys.exit(f"--part={','.join(sorted(unknown))}: must be among {', '.join(PARTS)}")
    if FLAGS.tiny:  # read when the first device is asked for, and by the run on land cover
        os.environ["XLA_FLAGS"] = (
            f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
        )
    output = Path(FLAGS.output) if FLAGS.output else None
    results = json.loads(output.read_text()) if output and output.exists() else {}
    measured = [name for name in PARTS if name in FLAGS.part or not FLAGS.part]
    for name in measured:
        results[name] = {}
        for rows in measure(name, TINY if FLAGS.tiny else FULL):
            results[name] = describe_device() | {"tiny": FLAGS.tiny, "rows": rows}
            if output:
                write_atomically(output, to_json(results))
    for name in measured:
        print_table(name, results[name])


def measure(part: str, scale: Scale) -> Iterator[list[Row]]:
    """The rows of a part so far, after each of them."""
    began, longest, rows = time.perf_counter(), 0.0, []
    for labels, measurement in PARTS[part](scale):
        started = time.perf_counter()
        if started + longest - began > 60 * FLAGS.minutes:
            row = labels | {"error": "no time left"}
        else:
            try:
                row = labels | measurement()
            except Exception as error:  # the other rows are measured all the same
                row = labels | {"error": f"{type(error).__name__}: {error}"[:500]}
            longest = max(longest, time.perf_counter() - started)
        gc.collect()
        print(f"{part}: " + ", ".join(f"{k} {cell(x)}" for k, x in row.items()), flush=True)
        rows.append(row)
        yield rows


def describe_device() -> Row:
    """Where JAX computes."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}


def print_table(name: str, part: Row) -> None:
    """The rows of a part; they need not have the same columns."""
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    print(f"\n{name}, {part['device']}, jax {part['jax']}\n")
    networks.row(*(column.replace("_", " ") for column in columns))
    networks.row(*["---"] * len(columns))
    for row in part["rows"]:
        networks.row(*(cell(row.get(column)) for column in columns))


def cell(value: Any) -> str:
    """Three digits of a number; nothing for what is not known."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else " ".join(str(value).split())


# --- Train steps ---------------------------------------------------------------------------------


def train(scale: Scale) -> Rows:
    """Whole steps, past the warm-up of the contrast loss."""
    for network, dtype, variant in scale.trained:
        labels = {"network": network, "dtype": dtype, "variant": variant}
        settings = (
            f"model.dtype={dtype}",
            f"contrast.candidates={VARIANTS[variant]['contrast.candidates']}",
        )
        yield labels, functools.partial(fitting, train_row, scale, network, dtype, settings)


def train_row(
    scale: Scale, network: str, dtype: str, settings: tuple[str, ...], batch_size: int
) -> Row:
    """Speed and memory of a step."""
    device = jax.devices()[0]
    before = peak_bytes(device)
    settings = *scale.settings, *settings, f"train.batch_size={batch_size}"
    step = networks.step_program(networks.make_config(network, scale.crop_size, *settings))
    seconds, after = median_seconds(step.run, scale), peak_bytes(device)
    # The device's is the peak of all rows so far: this row's only where it rose.
    of_device = after / 2**30 if after > before else None
    return {
        "batch_size": batch_size,
        "images_per_second": batch_size / seconds,
        "step_ms": 1e3 * seconds,
        "share_of_peak": share_of_peak(step.gigaflop, seconds, dtype),
        "peak_memory_gib": of_device or step.peak_megabytes / 2**10,
        "peak_memory_of": "device" if of_device else "program",
        "compile_seconds": step.compile_seconds,
    }


# --- The bank ------------------------------------------------------------------------------------


def bank(scale: Scale) -> Rows:
    """The loss against a queue of pixels, with its gradient, and the writing into it."""
    for dtype in ("float32", "bfloat16"):
        for slots in scale.slots:
            labels = {"dtype": dtype, "slots_per_class": slots}
            yield labels, functools.partial(bank_row, scale, dtype, slots)


def bank_row(scale: Scale, dtype: str, slots: int) -> Row:
    """Times of the two; the bandwidth is that of reading the bank once, which the loss must."""
    queue = full_bank(networks.CLASSES, slots, scale.dim, dtype)
    num_bytes, num_images = queue.pixel.nbytes, batch_size_of(scale)
    rows, label = make_anchors(num_images, scale.anchors_per_image, scale.dim)
    loss = networks.compiled(jax.jit(jax.value_and_grad(bank_loss)), rows, label, queue)
    of_loss = median_seconds(loss.run, scale, calls=5)
    height, width = (side // 4 for side in scale.crop_size)
    embedding = unit_rows(2, num_images, height, width, scale.dim)
    labels = jax.random.randint(jax.random.key(3), embedding.shape[:3], 0, networks.CLASSES)
    writing = jax.jit(write_keys, donate_argnums=0)
    write = networks.compiled(writing, queue, embedding, labels, carries_state=True)
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return {
        "bank_mib": num_bytes / 2**20,
        "anchors": label.size,
        "loss_ms": 1e3 * of_loss,
        "share_of_bandwidth": num_bytes / of_loss / (1e9 * peak.bandwidth) if peak else None,
        "enqueue_ms": 1e3 * median_seconds(write.run, scale, calls=5),
    }


def full_bank(num_classes: int, slots: int, dim: int, dtype: str) -> MemoryBank:
    """Pixels in all slots; no segments."""
    empty = memory_bank.init_memory(
        num_classes=num_classes, pixel_size=slots, segment_size=0, proj_dim=dim, dtype=dtype
    )
    pixel = unit_rows(0, *empty.pixel.shape).astype(dtype)
    return replace(empty, pixel=pixel, pixel_count=jnp.full(num_classes, slots, jnp.int32))


def make_anchors(num_images: int, per_image: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """Embeddings and labels; an image has its anchors by class."""
    shape = num_images, per_image
    label = jax.random.randint(jax.random.key(1), shape, 0, networks.CLASSES)
    return unit_rows(1, *shape, dim), jnp.sort(label)


def unit_rows(seed: int, *shape: int) -> jax.Array:
    """Embeddings in all directions."""
    rows = jax.random.normal(jax.random.key(seed), shape)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def bank_loss(rows: jax.Array, label: jax.Array, bank: MemoryBank) -> jax.Array:
    """All slots are candidates."""
    anchors = Anchors(rows, label, jnp.ones(label.shape, bool))
    candidates = memory_bank.memory_candidates(bank)
    return pixel_contrast_loss(anchors, candidates, temperature=0.1, base_temperature=0.07)[0]


def write_keys(bank: MemoryBank, embedding: jax.Array, label: jax.Array) -> tuple[MemoryBank]:
    """The keys of a batch, drawn and written."""
    keys, num_classes = jax.random.split(jax.random.key(0), len(label)), bank.pixel.shape[0]
    pixel = memory_bank.pixel_keys(
        embedding, label, keys, num_classes=num_classes, pixels_per_class=10
    )
    segment = memory_bank.segment_keys(embedding, label, num_classes=num_classes)
    return (memory_bank.enqueue(bank, pixel, segment),)


# --- Evaluation ----------------------------------------------------------------------------------


def evaluate(scale: Scale) -> Rows:
    """The network and the scores of its predictions, without reading images."""
    for dtype in ("bfloat16", "float32"):
        labels = {"network": scale.evaluated, "dtype": dtype}
        yield labels, functools.partial(fitting, evaluate_row, scale, dtype)


def evaluate_row(scale: Scale, dtype: str, batch_size: int) -> Row:
    """Both programs that an evaluation runs for each batch."""
    settings = f"model.dtype={dtype}", f"train.batch_size={batch_size}"
    config = networks.make_config(scale.evaluated, scale.image_size, *settings)
    setup = resolve(config, jax.devices()[:1])
    variables, batch = jax.device_put((initial_variables(setup), networks.make_batch(config)))
    logits_of = functools.partial(network_logits, setup=setup, protocol=whole_image)
    network = networks.compiled(jax.jit(logits_of), variables, batch.image)
    scores = networks.compiled(jax.jit(score), network.run(), batch)
    seconds = median_seconds(lambda: (network.run(), scores.run()), scale)
    return {
        "batch_size": batch_size,
        "images_per_second": batch_size / seconds,
        "share_of_peak": share_of_peak(network.gigaflop, seconds, dtype),
        "compile_seconds": network.compile_seconds + scores.compile_seconds,
    }


# --- Parity --------------------------------------------------------------------------------------


def parity(scale: Scale) -> Rows:
    """Losses and gradients beside those of the CPU, which computes at the highest precision."""
    of_network = functools.partial(network_gradient, *scale.compared)
    for name, gradient in ((scale.compared[0], of_network), ("contrast loss", bank_gradient)):
        for precision in ("highest", "default"):
            labels = {"loss": name, "precision": precision}
            yield labels, functools.partial(parity_row, gradient, precision)


def parity_row(gradient: Callable[[Any, str], tuple[Any, Any]], precision: str) -> Row:
    """Relative differences; of gradients that of all parameters as one vector."""
    loss, grads = gradient(jax.devices("cpu")[0], "highest")
    other, other_grads = gradient(jax.devices()[0], precision)
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in (other_grads, grads)
    )
    return {
        "value": float(loss),
        "difference_of_loss": abs(float(other) - float(loss)) / abs(float(loss)),
        "difference_of_gradient": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
    }


@functools.cache
def network_gradient(network: str, variant: str, device: Any, precision: str) -> tuple[Any, Any]:
    """The loss of a train step.

    Anchors are random: hard ones depend on predictions, of which rounding turns some over.
    """
    settings = (
        f"contrast.candidates={VARIANTS[variant]['contrast.candidates']}",
        "contrast.anchors=random",
    )
    config = networks.make_config(network, (64, 64), "train.batch_size=4", *settings)
    setup, (tx, _) = resolve(config, [device]), build_optimizer(config)
    with jax.default_device(jax.devices("cpu")[0]):  # the same parameters everywhere
        state = jax.device_get(init_state(setup, tx, initial_variables(setup)))

    def loss(params: Any, state: TrainState, batch: Batch) -> jax.Array:
        rng = jax.random.key(0)
        output, _ = setup.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch.image, setup.image_format),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        image_rng = jax.random.split(rng, len(batch.label))
        return total_loss(setup, state, output, batch.label, image_rng, rng)[0]

    return gradient_on(device, precision, loss, state.params, state, networks.make_batch(config))


@functools.cache
def bank_gradient(device: Any, precision: str) -> tuple[Any, Any]:
    """The contrast loss against a bank."""
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = (*make_anchors(2, 128, 64), full_bank(networks.CLASSES, 100, 64, "float32"))
        inputs = jax.device_get(inputs)
    return gradient_on(device, precision, bank_loss, *inputs)


def gradient_on(
    device: Any, precision: str, loss: Callable[..., jax.Array], *inputs: Any
) -> tuple[Any, Any]:
    """Value and gradient by the first argument."""
    with jax.default_matmul_precision(precision):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(*jax.device_put(inputs, device)))


# --- A real run ----------------------------------------------------------------------------------


def landcover(scale: Scale) -> Rows:
    """The quickstart, in bfloat16."""
    yield {"config": "quickstart", "dtype": "bfloat16"}, functools.partial(landcover_row, scale)


def landcover_row(scale: Scale) -> Row:
    """Score of the last step; the time is that of the process, with compiling and evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        started, workdir = time.perf_counter(), Path(folder) / "run"
        settings = "model.dtype=bfloat16", f"data.prepared_dir={folder}/prepared"
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}"),
                f"--config={ROOT / 'configs' / scale.recipe}",
                *(f"--config.{setting}" for setting in (*settings, *scale.settings)),
            ],
            check=True,
            timeout=60 * FLAGS.minutes,
        )
        seconds = time.perf_counter() - started
        last = max((workdir / "eval").iterdir(), key=lambda path: int(path.name))
        scores = json.loads((last / "metrics.json").read_text())
    return {"steps": scores["step"], "mean_iou": scores["mean_iou"], "seconds": seconds}


# --- Measuring -----------------------------------------------------------------------------------


def fitting(row: Callable[..., Row], scale: Scale, *arguments: Any) -> Row:
    """The row with the batch size asked for, or half of it, and so on, until it fits."""
    batch_size = batch_size_of(scale)
    while True:
        try:
            return row(scale, *arguments, batch_size)
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        gc.collect()
        batch_size //= 2


def batch_size_of(scale: Scale) -> int:
    """Images of a step."""
    on_cpu = jax.default_backend() == "cpu"
    return FLAGS.batch_size or min(scale.batch_size, 2 if on_cpu else scale.batch_size)


def median_seconds(run: Callable[[], Any], scale: Scale, calls: int = 1) -> float:
    """Of one call; several in a row hide how long each takes to start."""
    seconds = []
    for _ in range(scale.warm_up + scale.rounds):
        started = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds[scale.warm_up :])


def share_of_peak(gigaflop: float, seconds: float, dtype: str) -> float | None:
    """Of the operations per second that the device is built for; None where that is not known."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return gigaflop / seconds / (1e3 * getattr(peak, dtype)) if peak and gigaflop else None


def peak_bytes(device: Any) -> int:
    """Most memory in use since the process began; 0 where the device does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


# The run on land cover first: a process of its own, for which the device must be free.
PARTS: dict[str, Callable[[Scale], Rows]] = {
    "landcover": landcover,
    "train": train,
    "bank": bank,
    "evaluate": evaluate,
    "parity": parity,
}

if __name__ == "__main__":
    app.run(main)
