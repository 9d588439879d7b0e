"""What the networks cost: parameters, operations, time and memory.

    python benchmarks/networks.py             # the table of docs/models.md, two minutes
    python benchmarks/networks.py --timings   # forward and train step, two minutes or more for each
    python benchmarks/networks.py --remat     # what each stage in `model.remat` saves and costs

    --names=hrnet_w48,fcn_r50   # these networks
    --size=512,1024             # timings at this height and width

A multiplication and an addition are two operations. They are counted by XLA in the program before
optimisation: without the products with padding, and with BatchNorm and resizes (matrix products
here). Other counts take each window of a convolution as whole and nothing besides convolutions and
OCR's products. In HRNet the differences nearly cancel: hrnet_w48 has 645.5 GFLOP by such a count
and 644.9 by ours, hrnet_w48_ocr 920.7 and 918.7. Dilated windows hold much padding: deeplabv3_r101
has 1484 and 1311.

Peak memory is what XLA allots to the program: arguments, results and what lies between. On a CPU
the process grows by more when it first runs (hrnet_w48 at 256x512: by 233 MB in the forward pass,
where 137 lie between, by 2550 in the step, of 2327). Its own peak says less: after compiling,
before the first step, it had 4 GB already.
"""

import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from contrastseg_jax.config import default
from contrastseg_jax.config.load import override
from contrastseg_jax.config.tree import Config
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.xla_flags import xla_flags
from contrastseg_jax.setup.resolve import build_model, initial_variables, resolve
from contrastseg_jax.structs import Batch
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state
from contrastseg_jax.training.train_step import compile_step

CLASSES, PROJ_DIM = 19, 256
TIMED = (
    *("hrnet_tiny", "hrnet_w18_small", "hrnet_w18", "hrnet_w48", "hrnet_w48_ocr"),
    *("fcn_r50", "deeplabv3_r101_torchvision", "deeplabv3_r101", "deeplabv3plus_r50", "ocr_r101"),
    "fcn_convnext_tiny",
)
REMATTED = ("hrnet_w48", "deeplabv3_r101")
PATIENCE = 30  # seconds of measuring after which no further round begins

FLAGS = flags.FLAGS
flags.DEFINE_boolean("timings", False, "Time and memory of forward and train step instead.")
flags.DEFINE_boolean("remat", False, "Memory and time of a train step by model.remat instead.")
flags.DEFINE_list("names", [], "Networks; empty: all, and of those that are timed a few.")
flags.DEFINE_list("size", ["256", "512"], "Height and width at which networks are timed.")


def main(_: list[str]) -> None:
    """Print one table in Markdown."""
    os.environ["XLA_FLAGS"] = xla_flags(os.environ)  # as the program sets them
    height, width = map(int, FLAGS.size)
    if FLAGS.timings:
        timings(FLAGS.names or TIMED, (height, width))
    elif FLAGS.remat:
        rematted(FLAGS.names or REMATTED, (height, width))
    else:
        counts(FLAGS.names or zoo.model_names())


# --- Parameters and operations -------------------------------------------------------------------


def counts(names: Sequence[str]) -> None:
    """The table of docs/models.md: evaluation, and the parameters that contrast adds."""
    row("name", "parameters (19 classes)", "projection head", "GFLOP at 512x1024")
    row(*["---"] * 4)
    image = jax.ShapeDtypeStruct((1, 512, 1024, 3), jnp.float32)
    for name in names:
        model = zoo.build_model(name, num_classes=CLASSES, proj_dim=PROJ_DIM, dropout_rate=0.0)
        variables = segmenter.variable_shapes(model)
        sizes = {
            part: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
            for part, tree in variables["params"].items()
        }
        of_head = sizes.pop("proj_head")
        program = jax.jit(functools.partial(forward, model)).lower(variables, image)
        cells = f"`{name}`", f"{sum(sizes.values()):.2f} M", f"+ {of_head:.2f} M"
        row(*cells, f"{gigaflop(program):.0f}")


def forward(model: Segmenter, variables: Any, image: jax.Array) -> jax.Array:
    """Logits at the network's stride."""
    output: Any = model.apply(variables, image, train=False)
    return output.logits


def gigaflop(program: jax.stages.Lowered) -> float:
    """Operations of a program as it was written."""
    return (program.cost_analysis() or {}).get("flops", 0.0) / 1e9


# --- Time and memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What can be run again and again, and its costs."""

    run: Callable[[], Any]
    gigaflop: float
    compile_seconds: float  # tracing and compiling
    temp_megabytes: float  # what lies between arguments and results
    peak_megabytes: float  # with them; a state that is given away counts once


def timings(names: Sequence[str], size: tuple[int, int]) -> None:
    """Forward of one image in evaluation; train step of two, with contrast in the batch.

    Beside them the same in PyTorch, where it is installed and the network is written for it, in
    turns; with the layout of memory that is the faster. Speeds are shares of the operations per
    second of a float32 matrix product, which takes turns with the network too.
    """
    print(f"{size[0]}x{size[1]}, 1 image forward, 2 images a step\n")
    row(
        *("network", "time of PyTorch's: forward", "step"),
        *("speed of a product: forward", "step", "forward, s", "step, s", "product, GFLOP/s"),
        *("compiling, s: forward", "step", "peak memory, MB: forward", "step"),
    )
    row(*["---"] * 12)
    product = product_program()
    for name in names:
        config, of_torch = make_config(name, size), torch_programs(name, size)
        predict, step = forward_program(config), step_program(config)
        forwards, of_products = least_seconds([predict.run, *of_torch["forward"]], product)
        steps, of_products_then = least_seconds([step.run, *of_torch["step"]], product)
        rates = product.gigaflop / of_products, product.gigaflop / of_products_then
        row(
            f"`{name}`",
            *(f"{ours / min(theirs):.2f}" if theirs else "" for ours, *theirs in (forwards, steps)),
            f"{predict.gigaflop / forwards[0] / rates[0]:.2f}",
            f"{step.gigaflop / steps[0] / rates[1]:.2f}",
            *(f"{forwards[0]:.3f}", f"{steps[0]:.2f}", f"{rates[0]:.0f}, {rates[1]:.0f}"),
            *(f"{program.compile_seconds:.0f}" for program in (predict, step)),
            *(f"{program.peak_megabytes:.0f}" for program in (predict, step)),
        )


def torch_programs(name: str, size: tuple[int, int]) -> dict[str, list[Callable[[], Any]]]:
    """Forward and step of the same network in PyTorch, in both layouts; none where it lacks."""
    programs: dict[str, list[Callable[[], Any]]] = {"forward": [], "step": []}
    if importlib.util.find_spec("torch") is not None:
        torch_networks = importlib.import_module("torch_networks")
        for forward, step in torch_networks.programs(name, size):
            programs["forward"].append(forward)
            programs["step"].append(step)
    return programs


def rematted(names: Sequence[str], size: tuple[int, int]) -> None:
    """The train step of two images with no stage, each and all of them computed again.

    `kept` is what JAX hands from the forward pass to the gradient, parameters included; `temp` is
    what XLA makes of it, and differs between kinds of device.
    """
    print(f"{size[0]}x{size[1]}, 2 images a step\n")
    row(
        *("network", "remat", "of no remat: kept", "temp", "time"),
        *("kept, MB", "temp, MB", "step, s"),
    )
    row(*["---"] * 8)
    for name in names:
        stages, plain = zoo.stage_names(name), None
        for remat in ((), *((stage,) for stage in stages), stages):
            config = make_config(name, size, f"model.remat={remat}")
            step = step_program(config)
            seconds = min(seconds_of(step.run) for _ in range(4))
            costs = kept_megabytes(config), step.temp_megabytes, seconds
            plain = plain or costs
            shares = (f"{x / y:.2f}" for x, y in zip(costs, plain, strict=True))
            kept, temp, seconds = costs
            cells = f"`{name}`", ", ".join(remat) or "none", *shares
            row(*cells, f"{kept:.0f}", f"{temp:.0f}", f"{seconds:.2f}")


def make_config(name: str, size: tuple[int, int], *overrides: str) -> Config:
    """A user's config with contrast in the batch, past its warm-up."""
    own = ("train.batch_size=2", f"augment.crop_size={size}", "contrast.warmup_steps=0")
    own += ("data.name=synthetic", f"data.synthetic.num_classes={CLASSES}")
    return override(default.get_config(f"{name},contrast"), (*own, *overrides))


def forward_program(config: Config) -> Program:
    """Evaluation of one image."""
    model = build_model(config, CLASSES)
    variables = jax.device_put(segmenter.init_variables(model, config.seed))
    image = noise(1, *config.augment.crop_size, 3)
    return compiled(jax.jit(functools.partial(forward, model)), variables, image)


def step_program(config: Config) -> Program:
    """Train steps of one batch, one after the other."""
    setup, (tx, _) = resolve(config, jax.devices()[:1]), build_optimizer(config)
    state = init_state(setup, tx, initial_variables(setup))
    state = jax.device_put(state, sharding.replicated(setup.mesh))
    batch = jax.device_put(make_batch(config), sharding.batch_sharding(setup.mesh))
    return compiled(compile_step(setup, tx), state, batch, carries_state=True)


def make_batch(config: Config) -> Batch:
    """Images of noise, with labels in blocks."""
    rng, size = np.random.default_rng(0), config.train.batch_size
    height, width = config.augment.crop_size
    blocks = rng.integers(CLASSES, size=(size, height // 16, width // 16))
    return Batch(
        image=rng.integers(256, size=(size, height, width, 3)).astype(np.uint8),
        label=blocks.repeat(16, 1).repeat(16, 2).astype(np.uint8),
        example_id=np.arange(size, dtype=np.int32),
        valid=np.ones(size, bool),
    )


def kept_megabytes(config: Config) -> float:
    """What the gradient of the network needs of its forward pass, as JAX sees it."""
    model = build_model(config, CLASSES)
    image = jax.ShapeDtypeStruct((2, *config.augment.crop_size, 3), jnp.float32)

    def gradient(variables: Any, image: jax.Array) -> Any:
        def outputs(params: Any) -> Any:
            rngs = {"dropout": jax.random.key(0)}
            own = variables | {"params": params}
            return model.apply(own, image, train=True, mutable=["batch_stats"], rngs=rngs)[0]

        return jax.vjp(outputs, variables["params"])[1]

    kept = jax.eval_shape(gradient, segmenter.variable_shapes(model), image)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / 2**20


def product_program() -> Program:
    """What a device does at its fastest."""
    return compiled(jax.jit(jnp.matmul), noise(2048, 2048), noise(2048, 2048))


def noise(*shape: int) -> jax.Array:
    """Normally distributed."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def compiled(function: Any, *arguments: Any, carries_state: bool = False) -> Program:
    """A function with its arguments, of which the first may be each run's first result."""
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    executable = lowered.compile()
    seconds = time.perf_counter() - started

    def run() -> Any:
        nonlocal arguments
        results = executable(*arguments)
        if carries_state:
            arguments = results[0], *arguments[1:]
        return results

    memory = executable.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held -= memory.alias_size_in_bytes
    return Program(
        run=run,
        gigaflop=gigaflop(lowered),
        compile_seconds=seconds,
        temp_megabytes=memory.temp_size_in_bytes / 2**20,
        peak_megabytes=(memory.temp_size_in_bytes + held) / 2**20,
    )


def least_seconds(runs: Sequence[Callable[[], Any]], product: Program) -> tuple[list[float], float]:
    """The quickest of several turns of each, and of a product.

    In a turn each runs twice and the second counts: the first finds the memory that it needs with
    the others. A product is short, so that it is easily disturbed: it runs five times a turn.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    of_product: list[float] = []
    began = time.perf_counter()
    while len(of_product) < 10 or (
        len(of_product) < 50 and time.perf_counter() - began < PATIENCE * len(runs)
    ):
        for times, run in zip(seconds, runs, strict=True):
            times.append([seconds_of(run) for _ in range(2)][1])
        of_product += [seconds_of(product.run) for _ in range(5)]
    return [min(times) for times in seconds], min(of_product)


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one run, to its end."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def row(*cells: str) -> None:
    """A line of a table in Markdown."""
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    app.run(main)
