"""Starting or resuming a run: its data, the initial state and the compiled train step."""

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from clu import parameter_overview

from contrastseg_jax.config.rules import micro_batch_size
from contrastseg_jax.config.tree import leaves
from contrastseg_jax.data.class_weights import computed_weights, count_classes
from contrastseg_jax.data.dataset import open_splits
from contrastseg_jax.data.joined import joined
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import Source
from contrastseg_jax.data.prepared import fingerprint, read_names
from contrastseg_jax.data.subset import image_names, subset
from contrastseg_jax.evaluation.evaluate import Evaluator, make_evaluator, require_memory
from contrastseg_jax.models.freezing import trained
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import checkpoint_reader, checkpoint_writer
from contrastseg_jax.run.claim import resumes
from contrastseg_jax.run.compilation_cache import set_compilation_cache
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.record import environment
from contrastseg_jax.run.workdir import find_run, saved_steps
from contrastseg_jax.setup.resolve import build_terms, initial_variables, num_anchors, num_cells
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import TrainState
from contrastseg_jax.text import count_of
from contrastseg_jax.training.feed import StepFn
from contrastseg_jax.training.optim import Schedule, build_optimizer
from contrastseg_jax.training.score import has_scores, is_early_end
from contrastseg_jax.training.state import abstract_state, init_state, state_sharding
from contrastseg_jax.training.train_step import batch_shape, compile_step
from contrastseg_jax.weights import pretrained
from contrastseg_jax.weights.load import inference_variables


@dataclass(frozen=True)
class Start:
    """The state and programs that the training loop starts with."""

    step: int  # of the checkpoint that the run resumes from, or 0
    state: TrainState
    step_fn: StepFn
    schedule: Schedule
    is_scored: bool  # False: a stop came before the evaluation due at that checkpoint


def is_due(step: int, period: int, num_steps: int) -> bool:
    """Whether something done every `period` steps and at the end is due after `step` steps."""
    return step % period == 0 or step == num_steps


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is scored on."""

    source: Source
    evaluator: Evaluator  # of val
    lists: dict[str, list[str]]  # for `record_images`; none in a list whose setting is not used
    facts: dict[str, Any]  # for the record of the run


def open_data(setup: Setup) -> TrainingData:
    """The training records, and the evaluator of the validation split."""
    spec, which = setup.data, setup.config.data.train_subset
    names = spec.splits_of_training
    opened = processes.first_then_others(lambda: open_splits(spec, names))
    splits = dict(zip(names, opened, strict=True))
    whole = joined([splits[name] for name in spec.train_splits])
    part = processes.sync_errors(lambda: subset(whole, which))
    lists = {f"split/{name}": read_names(records, name) for name, records in splits.items()}
    lists["train_images"] = image_names(part) if which else []
    # A list may differ from machine to machine.
    digests = {
        f"{name}.txt, SHA-256": hashlib.sha256("\n".join(images).encode()).hexdigest()
        for name, images in lists.items()
        if images
    }
    sizes = {"images": (len(part), len(splits["val"]))}
    processes.require_same(dict(leaves(setup.config)) | sizes | digests)
    of_all = f" of {len(whole)}, by data.train_subset = '{which}'" if which else ""
    if len(spec.train_splits) > 1:
        of_all += f", of {', '.join(f'{name} ({len(splits[name])})' for name in spec.train_splits)}"
    log.info(
        f"{spec.name}: {count_of(len(part), 'training image')}{of_all};"
        f" {count_of(len(splits['val']), 'validation image')}"
    )
    log.info(label_table(setup.classes))
    facts = {
        "name": spec.name,
        "fingerprints": {name: fingerprint(records) for name, records in splits.items()},
        "images": {"train": len(part), "val": len(splits["val"])},
        "train_subset": which,
    }
    return TrainingData(part, make_evaluator(setup, splits["val"], "val"), lists, facts)


def weigh_classes(setup: Setup, source: Source) -> Setup:
    """The setup with class weights of the training images, where `loss.class_weighting` asks."""
    formula, names = setup.config.loss.class_weighting, setup.classes.names
    if formula == "given":
        return setup
    counts = processes.first_then_others(lambda: count_classes(source, setup.classes))
    weights = computed_weights(counts, formula)
    processes.require_same({"class weights": weights})
    text = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))
    log.info(f"class weights by {formula} of {count_of(len(source), 'training image')}: {text}")
    terms = build_terms(setup.config, weights)
    return dataclasses.replace(setup, class_weights=weights, terms=terms)


def fresh_variables(setup: Setup, workdir: Path) -> Variables | None:
    """Initial variables of a new run; None if the workdir contains a run to resume."""
    is_fresh = not resumes(workdir)
    processes.require_same({"resumes": not is_fresh})
    return initial_variables(setup) if is_fresh else None


def log_new_duration(setup: Setup, workdir: Path) -> None:
    """Say what another `train.num_steps` than the run had before does to its learning rate."""
    run, config, step = find_run(workdir), setup.config, saved_steps(workdir)[-1]
    if run is None or run.train.num_steps == config.train.num_steps:
        return
    old, new = (float(build_optimizer(each)[1](step)) for each in (run, config))
    log.info(
        f"train.num_steps: {config.train.num_steps} instead of {run.train.num_steps}; the learning"
        f" rate goes on at {new:.2e}, where the new schedule is at step {step}, not at {old:.2e}"
    )


def describe_start(setup: Setup, data: TrainingData, step: int) -> dict[str, Any]:
    """The entry of a start from `step` in the record of the run."""
    config = setup.config
    entry = environment(setup.mesh) | {"step": step, "seed": config.seed, "data": data.facts}
    if step:
        return entry
    weights: dict[str, Any] = {"source": "random"}
    if folder := config.model.init_from:
        found = pretrained.read(Path(folder), config.model.name)
        weights = {"folder": folder, "source": found.source, "sha256": found.sha256}
    return entry | {"start_weights": weights}


def start(
    setup: Setup, workdir: Path, variables: Variables | None, evaluator: Evaluator
) -> Start | None:
    """Start from `variables`, or if None, from the newest intact checkpoint; None: finished.

    Raises:
        InputError: checkpoints cannot be stored, none is intact, or it does not fit into memory.
    """
    config = setup.config
    set_compilation_cache(config, workdir)
    step = 0 if variables else checkpoint_reader.find_intact(workdir, "latest", resume=True)
    needs_scores = step > 0 and is_due(step, config.train.eval_steps, config.train.num_steps)
    is_scored = not needs_scores or has_scores(workdir, step)
    if step >= config.train.num_steps and is_scored:
        return None
    if step and is_scored and is_early_end(workdir, config.train.patience, step):
        return None
    tx, schedule = build_optimizer(config)
    abstract = abstract_state(setup, tx)
    checkpoint_writer.prepare(workdir, abstract)
    where = state_sharding(setup, abstract, setup.mesh)
    if variables is None:
        log.info(f"resuming from step {step} of {config.train.num_steps}")
        state = checkpoint_reader.restore(workdir, step, abstract, where)
    else:
        state = jax.device_put(init_state(setup, tx, variables), where)
    _log_network(setup, state)
    require_memory(evaluator, inference_variables(state, setup.objective))
    return Start(step, state, _compiled(setup, tx, state), schedule, is_scored)


def _compiled(setup: Setup, tx: optax.GradientTransformation, state: TrainState) -> StepFn:
    log.info("compiling")
    started = time.monotonic()
    step_fn = compile_step(setup, tx).lower(state, batch_shape(setup)).compile()
    log.info(f"compiled in {time.monotonic() - started:.0f} s")
    return step_fn


def _log_network(setup: Setup, state: TrainState) -> None:
    config, num_devices = setup.config, setup.mesh.size
    num_params = parameter_overview.count_parameters(state.params)
    log.info(
        f"{config.model.name}: {num_params / 1e6:.2f} M parameters on"
        f" {count_of(num_devices, f'{jax.default_backend()} device')}"
    )
    if config.model.freeze:
        num_trained = parameter_overview.count_parameters(trained(setup.model, state.params))
        log.info(
            f"model.freeze = {tuple(config.model.freeze)!r}: {num_trained / 1e6:.2f} M of them are"
            " trained; frozen BatchNorms keep their statistics"
        )
    if config.train.accumulation_steps > 1:
        size = micro_batch_size(config)
        log.info(
            f"train.accumulation_steps = {config.train.accumulation_steps}: micro-batches of"
            f" {count_of(size, 'image')}; BatchNorm and contrast inside the batch see one of them,"
            " the bank is written once a step; cross entropy and focal loss are those of the"
            " batch, others means of the micro-batches'"
        )
    if setup.objective:
        anchors, cells = num_anchors(config, setup.model), num_cells(config, setup.model)
        log.info(f"contrast.anchors_per_image: {anchors} of {cells} cells; fewer are faster")
