"""What the networks cost: parameters, operations, time and memory.

    python benchmarks/networks.py             # the README's table, two minutes; nothing is compiled
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from contrastseg_jax.config import default
from contrastseg_jax.config.load import override
from contrastseg_jax.config.tree import Config
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.backbones import hrnet
from contrastseg_jax.models.heads import fusion
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import build_model, initial_variables, resolve
from contrastseg_jax.structs import Batch
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state
from contrastseg_jax.training.train_step import compile_step

CLASSES, PROJ_DIM = 19, 256
TIMED = (
    *("hrnet_tiny", "hrnet_w18_small", "hrnet_w18", "hrnet_w48", "hrnet_w48_ocr"),
    *("fcn_r50", "deeplabv3_r50_torchvision", "deeplabv3_r101", "deeplabv3plus_r50", "ocr_r101"),
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
    height, width = map(int, FLAGS.size)
    if FLAGS.timings:
        timings(FLAGS.names or TIMED, (height, width))
    elif FLAGS.remat:
        rematted(FLAGS.names or REMATTED, (height, width))
    else:
        counts(FLAGS.names or zoo.model_names())


# --- Parameters and operations -------------------------------------------------------------------


def counts(names: Sequence[str]) -> None:
    """The table of the README: evaluation, and the parameters that training adds for contrast."""
    row("name", "parameters (19 classes)", "projection head", "GFLOP at 512x1024")
    row(*["---"] * 4)
    image = jax.ShapeDtypeStruct((1, 512, 1024, 3), jnp.float32)
    for name in names:
        model = zoo.build(name, num_classes=CLASSES, proj_dim=PROJ_DIM, dropout_rate=0.0)
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

    Speeds are shares of the operations per second of a float32 matrix product, which is timed in
    turns with the network.
    """
    print(f"{size[0]}x{size[1]}, 1 image forward, 2 images a step\n")
    row(
        *("network", "speed of a product: forward", "step", "resizes of forward: time"),
        *("operations", "forward, s", "step, s", "product, GFLOP/s"),
        *("compiling, s: forward", "step", "peak memory, MB: forward", "step"),
    )
    row(*["---"] * 12)
    product = product_program()
    products = [product] * 5  # one that is short is easily disturbed
    for name in names:
        config = make_config(name, size)
        predict, resizes = forward_programs(config)
        of_predict, of_resizes, *of_product = least_seconds(predict, resizes, *products)
        step = step_program(config)
        of_step, *of_product_then = least_seconds(step, *products)
        rates = product.gigaflop / min(of_product), product.gigaflop / min(of_product_then)
        row(
            f"`{name}`",
            f"{predict.gigaflop / of_predict / rates[0]:.2f}",
            f"{step.gigaflop / of_step / rates[1]:.2f}",
            *(f"{of_resizes / of_predict:.1%}", f"{resizes.gigaflop / predict.gigaflop:.1%}"),
            *(f"{of_predict:.3f}", f"{of_step:.2f}", f"{rates[0]:.0f}, {rates[1]:.0f}"),
            *(f"{program.compile_seconds:.0f}" for program in (predict, step)),
            *(f"{program.peak_megabytes:.0f}" for program in (predict, step)),
        )


def rematted(names: Sequence[str], size: tuple[int, int]) -> None:
    """The train step of two images with no stage, each and all of them computed again.

    `kept` is what JAX hands from the forward pass to the gradient, parameters included; `temp` is
    what XLA makes of it, and differs between kinds of device. On a CPU nothing is saved: XLA drops
    the barriers that hold the second computation back before it orders the operations, unless
    XLA_FLAGS has --xla_disable_hlo_passes=cse_barrier_expander.
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
            costs = kept_megabytes(config), step.temp_megabytes, *least_seconds(step)
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


def forward_programs(config: Config) -> tuple[Program, Program]:
    """Evaluation of one image, and all resizes in it by themselves.

    Resizes are recorded while the network is traced, and timed as one program. The time that the
    network saves with a stand-in in their place would say less: repeated pixels take longer.
    """
    resizes = []

    def recorded(x: jax.Array, size: tuple[int, int]) -> jax.Array:
        resizes.append((x.shape, size))
        return resize_bilinear(x, size)

    model = build_model(config, CLASSES)
    variables = jax.device_put(segmenter.init_variables(model, config.seed))
    with (
        mock.patch.object(hrnet, "resize_bilinear", recorded),
        mock.patch.object(fusion, "resize_bilinear", recorded),
    ):
        image = noise(1, *config.augment.crop_size, 3)
        program = compiled(jax.jit(functools.partial(forward, model)), variables, image)
    maps, sizes = [noise(*shape) for shape, _ in resizes], [size for _, size in resizes]

    def resize_all(maps: list[jax.Array]) -> list[jax.Array]:
        return [resize_bilinear(x, size) for x, size in zip(maps, sizes, strict=True)]

    return program, compiled(jax.jit(resize_all), maps)


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


def least_seconds(*programs: Program) -> list[float]:
    """The quickest of several runs of each program, in turns, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in programs]
    began = time.perf_counter()
    while len(seconds[0]) < 2 or (len(seconds[0]) < 10 and time.perf_counter() - began < PATIENCE):
        for times, program in zip(seconds, programs, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(program.run())
            times.append(time.perf_counter() - started)
    return [min(times[1:]) for times in seconds]


def row(*cells: str) -> None:
    """A line of a table in Markdown."""
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    app.run(main)
