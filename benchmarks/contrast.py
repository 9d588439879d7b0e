"""Time and memory of the contrast loss and the bank, beside what they are measured against.

    python benchmarks/contrast.py            # all tables, about three minutes on two CPU cores
    python benchmarks/contrast.py --growth   # how a step grows with slots and classes
    python benchmarks/contrast.py --steps    # whole steps of small and large networks

Both sides of a ratio are timed in one run, in turns (whole steps: one after the other), and the
quickest of several runs counts. With PyTorch installed, the method in the batch is also timed the
way the original computes it.
"""

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
from absl import app, flags
from jax import lax
from jax.nn import logsumexp, softplus

from contrastseg_jax.config.load import load_config
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.run.xla_flags import xla_flags
from contrastseg_jax.structs import Anchors, Candidates, MemoryBank

torch_networks: Any = None
if importlib.util.find_spec("torch") is not None:
    torch_networks = importlib.import_module("torch_networks")

FLAGS = flags.FLAGS
flags.DEFINE_boolean("growth", False, "Time per step against slots and classes instead.")
flags.DEFINE_boolean("steps", False, "Time of whole steps by variant instead.")

SCALE: dict[str, Any] = {"temperature": 0.1, "base_temperature": 0.07}
DIM, CLASSES = 256, 19


def main(_: list[str]) -> None:
    """Print the tables in Markdown."""
    os.environ["XLA_FLAGS"] = xla_flags(os.environ)  # as the program sets them
    if FLAGS.growth:
        growth()
        return
    if FLAGS.steps:
        whole_steps()
        return
    in_batch(num_images=2)
    in_batch(num_images=8)
    against_bank()
    enqueue()


# --- In the batch --------------------------------------------------------------------------------


def in_batch(num_images: int) -> None:
    """Anchors and loss of a batch of 128x256 maps, forward and backward."""
    embedding, label, prediction = make_maps(num_images)
    ours = compiled(jax.value_and_grad(loss_in_batch), embedding, label, prediction)
    direct = compiled(jax.value_and_grad(direct_in_batch), embedding, label, prediction)
    sides: dict[str, Any] = {"ours": ours, "all similarities at once": direct}
    if torch_networks is not None:
        arrays = (embedding, label, prediction)
        maps = [torch_networks.torch.from_numpy(np.array(x)) for x in arrays]
        sides["PyTorch, as the original"] = lambda: original_in_batch(*maps)
    print(f"\n{num_images} images of 128x256x{DIM}, {CLASSES} classes, 512 anchors an image\n")
    table(sides, "ours")
    print(f"\nextra memory: ours {extra_megabytes(ours)} MB, at once {extra_megabytes(direct)} MB")


def make_maps(num_images: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit embeddings, labels in blocks, and predictions of which a third are wrong."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(num_images, 128, 256, DIM)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=-1, keepdims=True)
    label = rng.integers(CLASSES, size=(num_images, 8, 16)).repeat(16, 1).repeat(16, 2)
    other = rng.integers(CLASSES, size=label.shape)
    prediction = np.where(rng.random(label.shape) < 0.3, other, label)
    return jnp.asarray(embedding), jnp.asarray(label, jnp.int32), jnp.asarray(prediction, jnp.int32)


def draw(embedding: jax.Array, label: jax.Array, prediction: jax.Array) -> Anchors:
    """The anchors of all images."""
    return sample_anchors(
        *(embedding, label, prediction, jax.random.split(jax.random.key(0), len(label))),
        num_classes=CLASSES,
        anchors_per_image=512,
        max_views=100,
        strategy="hard",
    )


def loss_in_batch(embedding: jax.Array, label: jax.Array, prediction: jax.Array) -> jax.Array:
    """What a step computes."""
    anchors = draw(embedding, label, prediction)
    return pixel_contrast_loss(anchors, (batch_candidates(anchors),), **SCALE)[0]


def direct_in_batch(embedding: jax.Array, label: jax.Array, prediction: jax.Array) -> jax.Array:
    """The same anchors, with the whole matrix of similarities."""
    anchors = draw(embedding, label, prediction)
    rows, label = anchors.embedding.reshape(-1, DIM), anchors.label.reshape(-1)
    return direct_loss(rows, label, anchors.valid.reshape(-1), rows, label, in_batch=True)


def direct_loss(
    rows: jax.Array,
    label: jax.Array,
    valid: jax.Array,
    candidates: jax.Array,
    candidate_label: jax.Array,
    *,
    in_batch: bool,
) -> jax.Array:
    """Eq. 3, written down as it stands."""
    similarity = jnp.matmul(rows, candidates.T, precision=lax.Precision.HIGHEST) / 0.1
    same = label[:, None] == candidate_label[None, :]
    usable = valid[:, None] & (valid[None, :] if in_batch else True)
    positive, negative = usable & same, usable & ~same
    if in_batch:
        positive &= ~jnp.eye(len(rows), dtype=bool)
    excess = logsumexp(jnp.where(negative, similarity, -1e30), axis=1)[:, None] - similarity
    number = positive.sum(1)
    cost = jnp.where(positive, softplus(excess), 0).sum(1) / jnp.maximum(number, 1)
    return 0.1 / 0.07 * cost.sum() / jnp.maximum((number > 0).sum(), 1)


def original_in_batch(embedding: Any, label: Any, prediction: Any) -> float:
    """Loss and gradient by autograd."""
    embedding = embedding.clone().requires_grad_()
    loss = torch_networks.contrast_in_batch(embedding, label, prediction)
    loss.backward()
    return loss.item()


# --- Against the bank ----------------------------------------------------------------------------


def against_bank() -> None:
    """1024 anchors against 190,000 rows, beside one product of that size with its output."""
    anchors, candidates = make_bank(CLASSES, 10_000, num_anchors=1024)
    rows = anchors.embedding

    def product(rows: jax.Array, candidates: Candidates) -> jax.Array:
        bank = candidates.embedding.reshape(-1, DIM)
        return jnp.matmul(rows[0], bank.T, precision=lax.Precision.HIGHEST)

    sides = {"one matrix product": compiled(product, rows, candidates)}
    for strategy in ("all", "random", "semi_hard", "hardest"):
        loss = functools.partial(loss_against_bank, anchors=anchors, strategy=strategy)
        sides[strategy] = compiled(jax.value_and_grad(loss), rows, candidates)

    def direct(rows: jax.Array, candidates: Candidates) -> jax.Array:
        return direct_loss(
            *(rows[0], anchors.label[0], anchors.valid[0]),
            *(candidates.embedding.reshape(-1, DIM), candidates.label.reshape(-1)),
            in_batch=False,
        )

    sides["all similarities at once"] = compiled(jax.value_and_grad(direct), rows, candidates)
    print(f"\n1024 anchors against 190,000 rows of {DIM}: loss and gradient, by selection\n")
    table(sides, "one matrix product", num_runs=3)
    print("\nextra memory, MB: " + ", ".join(f"{k} {extra_megabytes(v)}" for k, v in sides.items()))


def make_bank(
    num_classes: int, slots: int, *, num_anchors: int, dim: int = DIM
) -> tuple[Anchors, Candidates]:
    """One image's anchors, and a full queue."""
    rows, queue = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(1, num_anchors, dim), (num_classes, slots, dim)])
    )
    rows, queue = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (rows, queue))
    label = jnp.sort(jax.random.randint(jax.random.key(2), (1, num_anchors), 0, num_classes))
    shape = queue.shape[:2]
    of_slots = jnp.broadcast_to(jnp.arange(num_classes)[:, None], shape)
    return (
        Anchors(rows, label, jnp.ones(label.shape, bool)),
        Candidates(queue, of_slots, jnp.ones(shape, bool), stop_gradient=True),
    )


def loss_against_bank(
    rows: jax.Array, candidates: Candidates, *, anchors: Anchors, strategy: str
) -> jax.Array:
    """Positives and negatives chosen in one way, in the numbers of the paper."""
    return pixel_contrast_loss(
        dataclasses.replace(anchors, embedding=rows),
        (candidates,),
        jax.random.key(0),
        positives=strategy,
        negatives=strategy,
        **SCALE,
    )[0]


# --- The queue -----------------------------------------------------------------------------------


def enqueue() -> None:
    """Keys of eight images and their writing into a bank that is given away."""
    embedding, label, _ = make_maps(8)
    bank = memory_bank.init_memory(
        num_classes=CLASSES, pixel_size=5000, segment_size=5000, proj_dim=DIM, dtype="float32"
    )

    def step(bank: MemoryBank, embedding: jax.Array, label: jax.Array) -> MemoryBank:
        keys = jax.random.split(jax.random.key(0), len(label))
        pixel = memory_bank.pixel_keys(
            embedding, label, keys, num_classes=CLASSES, pixels_per_class=10
        )
        return memory_bank.enqueue(
            bank, pixel, memory_bank.segment_keys(embedding, label, num_classes=CLASSES)
        )

    run: Any = jax.jit(step, donate_argnums=0).lower(bank, embedding, label).compile()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        bank = jax.block_until_ready(run(bank, embedding, label))
        seconds.append(time.perf_counter() - started)
    stats, size = run.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(bank))
    print(f"\nenqueue, 8 images of 128x256x{DIM}, {CLASSES} classes, 10 pixels each\n")
    print(
        f"{1e3 * min(seconds):.1f} ms; {stats.alias_size_in_bytes / size:.0%} of the bank in place,"
        f" {stats.temp_size_in_bytes / 2**20:.0f} MB besides"
    )


# --- Growth --------------------------------------------------------------------------------------


def growth() -> None:
    """One anchor batch against ever larger banks; 64-d, so that the largest fit."""
    print("\n512 anchors, 64-d, loss and gradient\n")
    print("| classes | slots per class | rows | all, ms | all, ns a row | semi_hard, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    sizes = [(19, m) for m in (1000, 3000, 10_000, 30_000, 100_000)]
    for num_classes, slots in sizes + [(k, 10_000) for k in (38, 76, 171)]:
        anchors, candidates = make_bank(num_classes, slots, num_anchors=512, dim=64)
        seconds = []
        for strategy in ("all", "semi_hard"):
            loss = functools.partial(loss_against_bank, anchors=anchors, strategy=strategy)
            run = compiled(jax.value_and_grad(loss), anchors.embedding, candidates)
            seconds.append(min(networks.seconds_of(run) for _ in range(4)))
        rows = num_classes * slots
        print(
            f"| {num_classes} | {slots:,} | {rows:,} | {1e3 * seconds[0]:.0f}"
            f" | {1e9 * seconds[0] / rows:.0f} | {1e3 * seconds[1]:.0f} |"
        )


# --- Whole steps ---------------------------------------------------------------------------------


# Recipe and network, height and width of a crop, images a step, runs of which the quickest counts.
STEPS = (
    ("folder", "hrnet_tiny", (64, 64), 8, 12),
    ("folder", "hrnet_tiny", (128, 128), 8, 8),
    ("folder", "hrnet_w18_small", (128, 256), 4, 4),
    ("cityscapes", "hrnet_w48", (256, 512), 2, 3),
    ("cityscapes", "hrnet_w48", (512, 1024), 1, 2),
)


def whole_steps() -> None:
    """Cross entropy, contrast, and contrast with the bank, by the settings of the recipes."""
    print("| recipe | crops | ce, s | contrast, in units of ce | memory |")
    print("| --- | --- | --- | --- | --- |")
    for recipe, model, size, batch_size, num_runs in STEPS:
        seconds = {}
        for variant in ("ce", "contrast", "memory"):  # one after the other: each takes much memory
            run = train_step(f"configs/{recipe}.py:{model},{variant}", size, batch_size)
            seconds[variant] = min(networks.seconds_of(run) for _ in range(num_runs))
        ratios = (f"{seconds[variant] / seconds['ce']:.2f}" for variant in ("contrast", "memory"))
        height, width = size
        crops = f"{batch_size} of {height}x{width}"
        cells = (f"`{recipe}:{model}`", crops, f"{seconds['ce']:.3f}", *ratios)
        print("|", " | ".join(cells), "|", flush=True)


def train_step(recipe: str, size: tuple[int, int], batch_size: int) -> Callable[[], Any]:
    """One step after another on one batch of labels in blocks, with contrast from the first on."""
    settings = ["data.root=.", f"augment.crop_size={size}", f"train.batch_size={batch_size}"]
    settings += ["contrast.warmup_steps=0"]
    if "folder" in recipe:
        settings += [f"data.class_names={tuple(map(str, range(CLASSES)))}"]
    return networks.step_program(load_config(recipe, settings)).run


# --- Measuring -----------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function with its arguments."""
    return functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def extra_megabytes(run: Any) -> int:
    """Memory beyond arguments and results."""
    return round(run.func.memory_analysis().temp_size_in_bytes / 2**20)


def table(sides: dict[str, Callable[[], Any]], unit: str, num_runs: int = 6) -> None:
    """Each side in units of one of them, measured in turns."""
    seconds = {name: [] for name in sides}
    for _ in range(num_runs):
        for name, run in sides.items():
            seconds[name].append(networks.seconds_of(run))
    print(f"| side | in units of {unit} | ms |\n| --- | --- | --- |")
    for name, times in seconds.items():
        print(f"| {name} | {min(times) / min(seconds[unit]):.2f} | {1e3 * min(times):.1f} |")


if __name__ == "__main__":
    app.run(main)
