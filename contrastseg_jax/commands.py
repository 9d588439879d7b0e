"""The commands: what each mode of the command line runs.

Importing JAX and the networks takes seconds, so it waits until the config has been read.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrastseg_jax.config.load import inherit_image_format, load_config
from contrastseg_jax.config.rules import PHOTOGRAPHIC, PROTOCOL
from contrastseg_jax.config.tree import Config
from contrastseg_jax.errors import InputError
from contrastseg_jax.run.logging import start_logging
from contrastseg_jax.run.several import find_workdirs, read_configs
from contrastseg_jax.run.workdir import find_run, is_run, read_config, require_same_config

# By mode: settings that may differ from the run's where the command line names them.
MAY_DIFFER = {"eval": PROTOCOL, "predict": (*PROTOCOL, *PHOTOGRAPHIC)}


@dataclass(frozen=True)
class Arguments:
    """The parsed command line: one field per flag, and the overrides of config settings."""

    mode: str
    config: str | None
    workdir: Path  # this and `output`: the current folder by default
    checkpoint: str
    replay: str | None
    split: str | None
    input: tuple[str, ...]
    runs: tuple[str, ...]
    size: tuple[str, ...]
    output: Path
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    start_timeout: int
    topology: str | None
    quick: bool
    time_limit: float
    settings: tuple[str, ...]  # "train.batch_size=4"
    given: frozenset[str]  # names of the flags that were set to something


def run_train(arguments: Arguments) -> None:
    """Train, resuming from the newest checkpoint if there is one."""
    config, workdir = config_for(arguments), arguments.workdir
    with joined_processes(arguments):
        from contrastseg_jax.parallel import processes
        from contrastseg_jax.training.train import train

        # What one process cannot read, all of them report.
        setup = processes.sync_errors(lambda: set_up(config, arguments, run=find_run(workdir)))
        train(setup, workdir)


def run_replay(arguments: Arguments) -> None:
    """Take a step of a run again, and say what of it is not finite."""
    if not (step := arguments.replay or "").isdecimal():
        raise InputError(f"--replay={step}: must be a step of the run")
    config, workdir = config_for(arguments), arguments.workdir
    start_logging()
    as_training = dataclasses.replace(arguments, mode="train")
    setup = set_up(config, as_training, run=find_run(workdir))
    from contrastseg_jax.training.replay import replay

    replay(setup, workdir, int(step))


def run_eval(arguments: Arguments) -> None:
    """Evaluate a checkpoint on a split."""
    config = config_for(arguments)
    with joined_processes(arguments):
        setup = set_up(config, arguments)
        from contrastseg_jax.evaluation.evaluate import evaluate_run

        split, output = arguments.split or "val", optional_output(arguments)
        evaluate_run(setup, arguments.workdir, arguments.checkpoint, split, output)


def run_predict(arguments: Arguments) -> None:
    """Write masks and overlays for image files."""
    config = config_for(arguments)
    start_logging()
    setup = set_up(config, arguments)
    from contrastseg_jax.evaluation.predict import predict_run

    inputs, output = list(arguments.input), arguments.output
    predict_run(setup, arguments.workdir, arguments.checkpoint, inputs, output)


def run_export(arguments: Arguments) -> None:
    """Write a trained network as a program that needs none of this package."""
    config = config_for(arguments)
    start_logging()
    setup = set_up(config, dataclasses.replace(arguments, mode="predict"))
    from contrastseg_jax.export.export import export_run

    checkpoint, sizes = arguments.checkpoint, arguments.size
    export_run(setup, arguments.workdir, checkpoint, sizes, arguments.output)


def run_embed(arguments: Arguments) -> None:
    """Draw what several runs have learnt of the same pixels."""
    workdirs = find_workdirs(arguments.runs)
    configs = read_configs(workdirs)
    start_logging()
    setups = [set_up(config, arguments) for config in configs]
    from contrastseg_jax.evaluation.embed import embed_runs

    embed_runs(setups, workdirs, arguments.checkpoint, optional_output(arguments))


def run_audit(arguments: Arguments) -> None:
    """Check a data set for errors."""
    config = config_for(arguments)
    start_logging()
    from contrastseg_jax.data.audit.report import audit_run
    from contrastseg_jax.setup.preflight import check

    check(config, mode="audit")
    audit_run(config, arguments.workdir, arguments.split)


def run_plan(arguments: Arguments) -> None:
    """Print the memory, compute and communication a run needs, and exit."""
    config = config_for(arguments)
    start_logging()
    from contrastseg_jax.planning.plan import plan_run

    status = plan_run(
        config,
        topology=arguments.topology,
        quick=arguments.quick,
        time_limit=arguments.time_limit,
        output=optional_output(arguments),
    )
    exit_now(status)


def run_compare(arguments: Arguments) -> None:
    """Compare runs that were evaluated, over their seeds."""
    start_logging()
    from contrastseg_jax.evaluation.compare import compare_runs

    split = arguments.split or "val"
    compare_runs(arguments.runs, arguments.checkpoint, split, arguments.output)


def run_convert(arguments: Arguments) -> None:
    """Convert a weights file, or a checkpoint of a run."""
    source, output = Path(os.path.expanduser(arguments.input[0])), arguments.output
    of_run = is_run(source)
    if not of_run and "checkpoint" in arguments.given:
        raise InputError(
            f"--checkpoint={arguments.checkpoint}: --input={source} is not a run folder"
        )
    start_logging()
    from contrastseg_jax.weights.convert import convert, convert_run

    if of_run:
        convert_run(source, arguments.checkpoint, output)
    else:
        convert(source, output)


# --- Shared by several ----------------------------------------------------------------------------


def config_for(arguments: Arguments) -> Config:
    """The config given by --config, or that of the run in the workdir."""
    mode, workdir, settings = arguments.mode, arguments.workdir, arguments.settings
    named = [text.partition("=")[0] for text in settings]
    may_differ = [path for path in MAY_DIFFER.get(mode, ()) if path in named]
    if not arguments.config:
        if mode == "audit" and not (workdir / "config.json").exists():
            raise InputError(f"--config: required, as --workdir={workdir} contains no run")
        return read_config(workdir, settings, may_differ=may_differ)
    config = load_config(arguments.config, settings)
    if mode in ("eval", "predict", "replay", "export"):
        is_init = arguments.checkpoint == "init"  # which does not need a run
        run = find_run(workdir) if is_init else read_config(workdir)
        if run is not None:
            config = inherit_image_format(config, run)
            require_same_config(config, run, workdir, may_differ=may_differ)
    return config


@contextlib.contextmanager
def joined_processes(arguments: Arguments) -> Iterator[None]:
    """Connect to the other processes of the run, if any; an error in one ends all of them."""
    from contrastseg_jax.parallel import processes

    start_logging()
    process = arguments.coordinator, arguments.num_processes, arguments.process_id
    with processes.exit_on_error():
        processes.start(*process, timeout=arguments.start_timeout)
        start_logging(processes.index())
        yield


def set_up(config: Config, arguments: Arguments, *, run: Config | None = None) -> Any:
    """Check the config for this mode and machine; `run`: the config of the run being resumed."""
    from contrastseg_jax.setup import preflight

    return preflight.set_up(
        config, mode=arguments.mode, run=run, from_init=arguments.checkpoint == "init"
    )


def optional_output(arguments: Arguments) -> Path | None:
    """--output where the mode does not require it."""
    return arguments.output if "output" in arguments.given else None


def exit_now(status: int) -> None:
    """Exit without cleanup: tearing down a running compilation crashes."""
    sys.stdout.flush()
    os._exit(status)
