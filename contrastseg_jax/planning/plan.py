"""What a run will take, from its config alone: parameters, operations, memory, what travels.

Two kinds of figures. The quick ones are computed: from the shapes of the state, the program before
it is optimised, and formulas of their own. The others are read from the real train step, compiled
for the devices that are planned for, be they there or not.
"""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh

from contrastseg_jax.config.rules import splits_memory, uses_contrast, uses_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.files import to_json, write_atomically
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

LOG_SECONDS = 30  # seconds between two lines that say that the compiler is at work
POOL = {"random": 1, "hardest": None, "semi_hard": 10, "all": None}  # drawn per one selected


def plan_run(
    config: Config, *, topology: str | None, quick: bool, time_limit: float, output: Path | None
) -> int:
    """Print the plan, and write it to `output` as JSON if given; the program's exit status.

    0: it fits, or is not known to be too large and `quick` figures were asked for. 1: it does not
    fit, or the `time_limit` of compiling, in seconds, has passed: there are the quick figures then,
    and the compiler may still be at work.
    """
    target = find_topology(topology, count_only=quick)
    check(config, mode="plan", num_devices=target.num_devices)
    plan = quick_plan(config, target)
    if quick:
        unknown = ", nor is it known whether there is such a slice" if not target.devices else ""
        plan = dataclasses.replace(plan, note=f"--quick: not compiled{unknown}")
    else:
        plan = compiled_plan(plan, config, target, time_limit)
    print(report(plan, config), flush=True)
    if output:
        values = dataclasses.asdict(plan) | {"fits": plan.fits, "least_bytes": plan.least_bytes}
        write_atomically(output, to_json(values) + "\n")
    return 0 if plan.fits or (quick and plan.fits is None) else 1


# --- Computed ------------------------------------------------------------------------------------


def quick_plan(config: Config, target: Topology) -> Plan:
    """What can be known without compiling, in seconds."""
    setup = resolve(config, jax.devices()[:1])
    lowered, state, batch = _lower(setup)
    mesh = AbstractMesh((target.num_devices,), ("data",))
    of_contrast = contrast_flops(setup)
    return Plan(
        model=config.model.name,
        batch_size=config.train.batch_size,
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
    """Bytes of each part of the state on each device, padding of the device's layouts left out."""
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
    """Operations of the walks over candidates in a step, on all devices together.

        4 A d (N + P) + 4 A d B

    A anchors of length d. Each meets N negatives and P positives: a product gives the similarity, a
    second one the gradient. N is all candidates (others than negatives are masked), P those of one
    of the classes, or the pools that a selection draws. B candidates of the batch have a gradient
    of their own.
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
    """Bytes that must travel in a step, on each device, whatever the number of devices above one.

    gradients: those of all parameters, summed. parameters: those of which each device keeps a part,
    whole. BatchNorm: sums over the batch of every channel, two in the forward pass and two in the
    backward pass: 2 |statistics|. anchors, of b images with s each, d long: b s (4 d + 5),
    embedding, label and mask, where other devices contrast theirs with them; 4 d more for those
    that are contrasted with a bank in parts. anchors' gradient: b s 4 d; with the bank in parts
    five sums per anchor more. keys: b k (v + 1) (4 d + 1), rows and masks of v pixels and one mean
    per class and image.
    """
    config = setup.config
    if mesh.size == 1:
        return {}
    sent = {"gradients": _bytes(state.params)}
    if config.parallel.fsdp:
        places = jax.tree.leaves(state_sharding(setup, state, mesh).params)
        params = jax.tree.leaves(state.params)
        sent["parameters"] = _bytes(
            [x for x, place in zip(params, places, strict=True) if not place.is_fully_replicated]
        )
    sent["BatchNorm"] = 2 * _bytes(state.batch_stats)
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
    """The train step as written, with the shapes of its arguments."""
    tx, _ = build_optimizer(setup.config)
    state, batch = abstract_state(setup, tx), batch_shape(setup)
    return compile_step(setup, tx).lower(state, batch), state, batch


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- Compiled ------------------------------------------------------------------------------------


def compiled_plan(plan: Plan, config: Config, target: Topology, time_limit: float) -> Plan:
    """The plan with the figures of the compiled step, or with a note why there are none."""
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
    """The compiled program, or None where the time limit, in seconds, is too short.

    The compiler runs in a thread that nothing can stop and no one waits for, so that an interrupt
    is obeyed at once.
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
            log.info(f"compiling for {time.monotonic() - started:.0f} s")
    if results and isinstance(results[0], Exception):
        raise results[0]
    return results[0] if results else None


def figures(program: Any, plan: Plan, seconds: float) -> Compiled:
    """What XLA says of the compiled step that is planned.

    On one device it may have collectives too, which XLA leaves in though nothing is sent.
    """
    memory, text = program.memory_analysis(), program.as_text()
    return Compiled(
        seconds=seconds,
        flops=(program.cost_analysis() or {}).get("flops", 0.0)
        + plan.contrast_flops / plan.num_devices,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=traffic(hlo.collectives(text) if plan.num_devices > 1 else []),
    )


def traffic(found: list[hlo.Collective]) -> dict[str, Traffic]:
    """The collectives by kind, kinds that do not occur left out."""
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
