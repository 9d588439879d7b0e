"""Parameters, FLOPs, memory and communication of a run, from its config alone.

The quick figures are estimates: from the shapes of the state, the program before optimisation, and
formulas. The others are read from the real train step, compiled for the target devices, whether or
not they are available.
"""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh

from contrastseg_jax.config.rules import splits_memory, uses_contrast, uses_memory
from contrastseg_jax.config.tree import Config, replaced
from contrastseg_jax.contrast.devices import AXIS
from contrastseg_jax.contrast.selection import POOL_FACTOR
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.models.freezing import trained
from contrastseg_jax.parallel.sharding import AnyMesh
from contrastseg_jax.planning import hlo
from contrastseg_jax.planning.report import TOO_LARGE, Compiled, Plan, Traffic, report
from contrastseg_jax.planning.topology import Topology, find_topology
from contrastseg_jax.run.logging import log
from contrastseg_jax.setup.preflight import check
from contrastseg_jax.setup.resolve import num_anchors, num_cells, resolve
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import TrainState
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state, state_sharding
from contrastseg_jax.training.train_step import batch_shape, compile_step

LOG_SECONDS = 30  # between log lines while compiling
POOL = {
    "all": None,
    "random": 1,
    "hardest": None,
    "semi_hard": POOL_FACTOR,
}  # drawn per selected one


def plan_run(
    config: Config, *, topology: str | None, quick: bool, time_limit: float, output: Path | None
) -> int:
    """Print the plan, write it to `output` as JSON if given, and return the exit status.

    0: it fits, or with `quick`, it is not known not to fit. 1: it does not fit, or compiling has
    exceeded `time_limit`, in seconds: then only the quick figures are printed, and the compiler may
    still be running.
    """
    target = find_topology(topology, count_only=quick)
    check(config, mode="plan", num_devices=target.num_devices)
    plan = quick_plan(config, target)
    if quick:
        unknown = ", and whether such a slice exists is not known" if not target.devices else ""
        plan = dataclasses.replace(plan, note=f"--quick: not compiled{unknown}")
    else:
        plan = compiled_plan(plan, config, target, time_limit)
    print(report(plan, config), flush=True)
    if output:
        values = dataclasses.asdict(plan) | {"fits": plan.fits, "least_bytes": plan.least_bytes}
        write_atomically(output, to_json(values) + "\n")
    return 0 if plan.fits or (quick and plan.fits is None) else 1


# --- Estimates -----------------------------------------------------------------------------------


def quick_plan(config: Config, target: Topology) -> Plan:
    """The figures available without compiling, within seconds."""
    setup = resolve(config, jax.devices()[:1])
    lowered, state, batch = _lower(setup)
    # XLA counts a loop once, whatever is in it: that over micro-batches adds up to the batch.
    at_once = replaced(config, {"train.accumulation_steps": 1})
    if config.train.accumulation_steps > 1:
        lowered, _, _ = _lower(resolve(at_once, jax.devices()[:1]))
    mesh = AbstractMesh((target.num_devices,), (AXIS,))
    of_contrast = contrast_flops(setup)
    return Plan(
        model=config.model.name,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.accumulation_steps,
        topology=target.name,
        device=target.kind,
        num_devices=target.num_devices,
        device_bytes=target.device_bytes,
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        anchors_per_image=num_anchors(config, setup.model) if setup.objective else 0,
        cells_per_image=num_cells(config, setup.model),
        flops=(lowered.cost_analysis() or {}).get("flops", 0.0) + of_contrast,
        contrast_flops=of_contrast,
        bytes_held=state_bytes(setup, state, mesh) | {"batch": _bytes(batch) // target.num_devices},
        bytes_sent=sent_bytes(setup, state, mesh),
    )


def state_bytes(setup: Setup, state: TrainState, mesh: AnyMesh) -> dict[str, int]:
    """Bytes of each part of the state per device, without the padding of device layouts."""
    of_state = state_sharding(setup, state, mesh)
    parts = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype),
        state,
        of_state,
    )
    return {
        "parameters": _bytes(parts.params),
        "optimiser state": _bytes(parts.opt_state),
        "EMA": _bytes(parts.ema),
        "BatchNorm statistics": _bytes(parts.batch_stats),
        "bank": _bytes(parts.memory),
    }


def contrast_flops(setup: Setup) -> float:
    """FLOPs of the contrast loss in a step, over all devices.

        4 A d (N + P) + 4 A d B

    A anchors of length d, each with N negatives and P positives: one product for the similarity,
    one for the gradient. N is all candidates (others than negatives are masked), P those of one
    class, or the pools that a selection draws. B candidates of the batch have their own gradient.
    """
    config, num_classes = setup.config, setup.model.num_classes
    if not uses_contrast(config):
        return 0.0
    settings, bank = config.contrast, config.memory
    anchors = config.train.batch_size * num_anchors(config, setup.model)
    in_batch = anchors if settings.candidates in ("batch", "both") else 0
    slots = bank.pixel_size + bank.segment_size if uses_memory(config) else 0
    candidates = num_classes * slots + in_batch
    met = {"positives": candidates / num_classes, "negatives": candidates}
    for side in met:
        if pool := POOL[settings[side]]:
            met[side] = min(met[side], pool * settings[f"num_{side}"])
    return 4.0 * anchors * config.model.proj_dim * (sum(met.values()) + in_batch)


def sent_bytes(setup: Setup, state: TrainState, mesh: AnyMesh) -> dict[str, int]:
    """Bytes that each device must communicate in a step, for any number of devices above one.

    gradients: all-reduced, of all parameters that are trained, for each micro-batch. parameters:
    gathered, those that are sharded. BatchNorm: sums over a micro-batch per channel, two in the
    forward and two in the backward pass: 2 |statistics| for each, unless frozen. anchors, b images
    with s each of length d: b s (4 d + 5) for embedding, label and mask, where other devices use
    them as candidates; 4 d more if the bank is sharded. anchors' gradient: b s 4 d; five sums per
    anchor more if the bank is sharded. keys: b k (v + 1) (4 d + 1), embeddings and masks of v
    pixels and one mean per class and image.
    """
    config = setup.config
    if mesh.size == 1:
        return {}
    moving = trained(setup.model, {"params": state.params, "batch_stats": state.batch_stats})
    number = config.train.accumulation_steps
    sent = {"gradients": number * _bytes(moving["params"])}
    if config.parallel.fsdp:
        places = jax.tree.leaves(state_sharding(setup, state, mesh).params)
        params = jax.tree.leaves(state.params)
        sent["parameters"] = _bytes(
            [x for x, place in zip(params, places, strict=True) if not place.is_fully_replicated]
        )
    sent["BatchNorm"] = number * 2 * _bytes(moving["batch_stats"])
    settings, dim = config.contrast, config.model.proj_dim
    batch_size, split_bank = config.train.batch_size, splits_memory(config)
    in_batch = settings.candidates in ("batch", "both")
    if in_batch or split_bank:
        anchors = batch_size * num_anchors(config, setup.model)
        sent["anchors"] = anchors * (4 * dim + 5 + 4 * dim * (in_batch and split_bank))
        sent["anchors' gradient"] = anchors * 4 * (dim + 5 * split_bank)
    if uses_memory(config):
        rows = batch_size * setup.model.num_classes * (config.memory.pixels_per_class + 1)
        sent["keys"] = rows * (4 * dim + 1)
    return sent


def _lower(setup: Setup) -> tuple[jax.stages.Lowered, TrainState, Any]:
    """The lowered train step, with the shapes of its arguments."""
    tx, _ = build_optimizer(setup.config)
    state, batch = abstract_state(setup, tx), batch_shape(setup)
    return compile_step(setup, tx).lower(state, batch), state, batch


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- Compiled ------------------------------------------------------------------------------------


def compiled_plan(plan: Plan, config: Config, target: Topology, time_limit: float) -> Plan:
    """The plan with the figures of the compiled step, or a note why there are none."""
    log.info(f"compiling the train step for {target.num_devices} x {target.kind}")
    lowered, _, _ = _lower(resolve(config, target.devices))
    started = time.monotonic()
    try:
        program = compile_within(lowered, time_limit)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(plan, note=f"{TOO_LARGE}: {str(error).partition('. ')[2]}")
    if program is None:
        return dataclasses.replace(
            plan,
            note=f"not compiled within --time_limit={time_limit:g} s: the peak memory and the"
            " collectives of the compiled step are missing",
        )
    return dataclasses.replace(plan, compiled=figures(program, plan, time.monotonic() - started))


def compile_within(lowered: jax.stages.Lowered, time_limit: float) -> Any:
    """The compiled program, or None if compiling exceeds the time limit, in seconds.

    The compiler cannot be stopped; it runs in a daemon thread, so that Ctrl-C works at once.
    """
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(lowered.compile())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started = time.monotonic()
    while thread.is_alive() and (left := started + time_limit - time.monotonic()) > 0:
        thread.join(min(LOG_SECONDS, left))
        if thread.is_alive() and left > LOG_SECONDS:
            log.info(f"still compiling after {time.monotonic() - started:.0f} s")
    if results and isinstance(results[0], Exception):
        raise results[0]
    return results[0] if results else None


def figures(program: Any, plan: Plan, seconds: float) -> Compiled:
    """XLA's analysis of the compiled step.

    A program for one device may contain collectives too, though nothing is communicated.
    """
    memory, text = program.memory_analysis(), program.as_text()
    return Compiled(
        seconds=seconds,
        # A loop counts once; of what is outside that over micro-batches there is little.
        flops=(program.cost_analysis() or {}).get("flops", 0.0) * plan.accumulation_steps
        + plan.contrast_flops / plan.num_devices,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=traffic(hlo.collectives(text) if plan.num_devices > 1 else []),
    )


def traffic(found: list[hlo.Collective]) -> dict[str, Traffic]:
    """The collectives by kind; kinds that do not occur are left out."""
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in hlo.KINDS}
    return {
        kind: Traffic(
            number=sum(c.times for c in some),
            bytes=hlo.total_bytes(some),
            in_loop=sum(c.times for c in some if c.in_loop),
            largest=max(c.num_bytes for c in some),
        )
        for kind, some in by_kind.items()
        if some
    }
