"""Feeding batches to the train step: the next batch is made while a step runs."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from contrastseg_jax.data import pipeline
from contrastseg_jax.data.augment import Augmentation
from contrastseg_jax.data.pipeline import Source
from contrastseg_jax.objectives.objective import Metrics
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import Batch, TrainState

StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_batches(setup: Setup, source: Source, start_step: int) -> pipeline.Batches:
    """This process's rows of the training batches after `start_step`."""
    config = setup.config
    return pipeline.train_batches(
        source,
        preprocessing=setup.preprocessing,
        augmentation=Augmentation(**config.augment),
        batch_size=config.train.batch_size,
        steps=range(start_step, config.train.num_steps),
        seed=config.seed,
        loading=pipeline.loading_settings(config),
        shard=pipeline.Shard(jax.process_index(), jax.process_count()),
    )


def step_images(setup: Setup, source: Source, step: int) -> list[str]:
    """The names of the images of the batch of a step, counted from 1."""
    config = setup.config
    ids = pipeline.example_ids(
        len(source), seed=config.seed, batch_size=config.train.batch_size, step=step - 1
    )
    return [source[example_id]["name"].decode() for example_id in ids]


def take_steps(
    step_fn: StepFn, state: TrainState, batches: Iterator[Batch], mesh: Mesh
) -> Iterator[tuple[TrainState, Metrics, float]]:
    """One step per batch: the new state, its metrics, and seconds in which the devices were idle.

    One step is in flight while the next batch is prepared, not a long queue of them. Waiting for
    the batch costs time only once that step has finished.
    """
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(time.monotonic)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            came = time.monotonic()
            if batch is None:
                return
            # Asynchronous: the batch is copied while the previous step runs.
            state, metrics = step_fn(state, sharding.to_devices(batch, mesh))
            waited = max(0.0, came - max(asked, ended.result()))
            ended = pool.submit(_time_of_end, metrics)
            yield state, metrics, waited


def _time_of_end(metrics: Metrics) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()
