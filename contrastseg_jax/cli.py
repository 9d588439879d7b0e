"""Command line: train, evaluate, compare, embed, predict, audit data, plan runs, convert weights.

    python main.py --mode=audit --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --mode=plan --config=configs/cityscapes.py --topology=v5e:2x4
    python main.py --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --mode=eval --workdir=runs/quickstart --checkpoint=best
    python main.py --mode=predict --workdir=runs/quickstart --input=photos --output=predictions
    python main.py --mode=compare --runs=runs/ce --runs=runs/memory --output=comparison
    python main.py --mode=embed --runs=runs/ce --runs=runs/contrast --output=embeddings
    python main.py --mode=convert --input=resnet50.pth --output=weights/resnet50

Any setting of contrastseg_jax/config/default.py can be changed: --config.train.batch_size=4.
"""

import contextlib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from absl import app, flags

from contrastseg_jax import out_of_memory
from contrastseg_jax.config.checks import is_text
from contrastseg_jax.config.load import inherit_image_format, load
from contrastseg_jax.config.rules import PHOTOGRAPHIC
from contrastseg_jax.config.tree import Config
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import ORBAX_MISREADS, require_literal
from contrastseg_jax.run.logging import start_logging
from contrastseg_jax.run.several import read_runs
from contrastseg_jax.run.workdir import find_run, read_config, require_same_config
from contrastseg_jax.run.xla_flags import xla_flags

SETTING = "--config."


@dataclass(frozen=True)
class Arguments:
    """The parsed command line: one field per flag, and the overrides of config settings."""

    mode: str
    config: str | None
    workdir: Path  # this and `output`: the current folder by default
    checkpoint: str
    split: str | None
    input: tuple[str, ...]
    runs: tuple[str, ...]
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


# --- Commands: one function for each mode ---------------------------------------------------------
# Importing JAX and the networks takes seconds, so it waits until the config has been read.


def run_train(arguments: Arguments) -> None:
    """Train, resuming from the newest checkpoint if there is one."""
    config, workdir = load_config(arguments), arguments.workdir
    with joined_processes(arguments):
        from contrastseg_jax.parallel import processes
        from contrastseg_jax.training.train import train

        # What one process cannot read, all of them report.
        setup = processes.sync_errors(lambda: set_up(config, arguments, run=find_run(workdir)))
        train(setup, workdir)


def run_eval(arguments: Arguments) -> None:
    """Evaluate a checkpoint on a split."""
    config = load_config(arguments)
    with joined_processes(arguments):
        setup = set_up(config, arguments)
        from contrastseg_jax.evaluation.evaluate import evaluate_run

        split, output = arguments.split or "val", optional_output(arguments)
        evaluate_run(setup, arguments.workdir, arguments.checkpoint, split, output)


def run_predict(arguments: Arguments) -> None:
    """Write masks and overlays for image files."""
    config = load_config(arguments)
    start_logging()
    setup = set_up(config, arguments)
    from contrastseg_jax.evaluation.predict import predict_run

    inputs, output = list(arguments.input), arguments.output
    predict_run(setup, arguments.workdir, arguments.checkpoint, inputs, output)


def run_embed(arguments: Arguments) -> None:
    """Draw what several runs have learnt of the same pixels."""
    workdirs = [local_path("runs", text) for text in arguments.runs]
    configs = read_runs(workdirs)
    start_logging()
    setups = [set_up(config, arguments) for config in configs]
    from contrastseg_jax.evaluation.embed import embed_runs

    embed_runs(setups, workdirs, arguments.checkpoint, optional_output(arguments))


def run_audit(arguments: Arguments) -> None:
    """Check a data set for errors."""
    config = load_config(arguments)
    start_logging()
    from contrastseg_jax.data.audit.report import audit_run
    from contrastseg_jax.setup.preflight import check

    check(config, mode="audit")
    audit_run(config, arguments.workdir, arguments.split)


def run_plan(arguments: Arguments) -> None:
    """Print the memory, compute and communication a run needs, and exit."""
    config = load_config(arguments)
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
    source, output = local_path("input", arguments.input[0]), arguments.output
    is_run = (source / "config.json").is_file() and (source / "checkpoints").is_dir()
    if not is_run and "checkpoint" in arguments.given:
        raise InputError(
            f"--checkpoint={arguments.checkpoint}: --input={source} is not a run folder"
        )
    start_logging()
    from contrastseg_jax.weights.convert import convert, convert_run

    if is_run:
        convert_run(source, arguments.checkpoint, output)
    else:
        convert(source, output)


# --- Shared by several commands -------------------------------------------------------------------


def load_config(arguments: Arguments) -> Config:
    """The config given by --config, or that of the run in the workdir."""
    mode, workdir, settings = arguments.mode, arguments.workdir, arguments.settings
    named = [text.partition("=")[0] for text in settings]
    may_differ = [path for path in PHOTOGRAPHIC if mode == "predict" and path in named]
    if not arguments.config:
        if mode == "audit" and not (workdir / "config.json").exists():
            raise InputError(f"--config: required, as --workdir={workdir} contains no run")
        return read_config(workdir, settings, may_differ=may_differ)
    config = load(arguments.config, settings)
    if mode in ("eval", "predict"):
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


# --- Commands and flags ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What one --mode runs, the flags it requires and the optional ones."""

    run: Callable[[Arguments], None]
    needs: tuple[str, ...]
    reads: tuple[str, ...]


REPEATED = ("input", "runs")  # flags that may be given several times
PROCESS_FLAGS = ("coordinator", "num_processes", "process_id", "start_timeout")
COMMANDS = {
    "train": Command(run_train, ("config", "workdir"), ("checkpoint", *PROCESS_FLAGS)),
    "eval": Command(
        run_eval, ("workdir",), ("config", "checkpoint", "split", "output", *PROCESS_FLAGS)
    ),
    "predict": Command(run_predict, ("workdir", "input", "output"), ("config", "checkpoint")),
    "embed": Command(run_embed, ("runs",), ("checkpoint", "output")),
    "audit": Command(run_audit, ("workdir",), ("config", "split")),
    "plan": Command(run_plan, ("config",), ("output", "topology", "quick", "time_limit")),
    "compare": Command(run_compare, ("runs", "output"), ("checkpoint", "split")),
    "convert": Command(run_convert, ("input", "output"), ("checkpoint",)),
}

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "config",
    None,
    "A recipe, e.g. camvid, or FILE.py, each with [:MODEL[,VARIANT]]; optional after training.",
)
flags.DEFINE_string(
    "workdir", None, "Folder of the run; not used by plan, compare, embed and convert."
)
flags.DEFINE_enum("mode", "train", list(COMMANDS), "What to do.")
flags.DEFINE_string(
    "checkpoint",
    "latest",
    "eval, predict, convert, compare, embed: latest, best or a step; eval, predict: or init, the"
    " pretrained weights of model.init_from without training.",
)
flags.DEFINE_string(
    "split",
    None,
    "eval, compare: split to evaluate, or that was, default val; audit: split to read, default"
    " all.",
)
flags.DEFINE_multi_string(
    "input",
    None,
    "predict: image, folder of images or pattern ('photos/*.jpg'); may be repeated."
    " convert: .pth, .safetensors, folder of a run.",
)
flags.DEFINE_multi_string(
    "runs",
    None,
    "compare: workdir, or folder that contains workdirs; may be repeated. The first is the"
    " baseline. embed: workdir; may be repeated.",
)
flags.DEFINE_string(
    "output",
    None,
    "predict, convert, compare, embed: folder for the results, of embed by default in the first"
    " run's; eval: folder to use instead of the workdir, which may then be read-only; plan: JSON"
    " file.",
)
flags.DEFINE_string(
    "coordinator", None, "train, eval with several processes: HOST:PORT of process 0."
)
flags.DEFINE_integer("num_processes", None, "Number of processes.")
flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
flags.DEFINE_integer(
    "start_timeout", 300, "Seconds within which all processes must have started.", lower_bound=1
)
flags.DEFINE_string("topology", None, "plan: e.g. cpu:8 or v5e:2x4; default: this machine.")
flags.DEFINE_boolean("quick", False, "plan: estimate without compiling.")
flags.DEFINE_float("time_limit", 1800, "plan: time limit for compiling, in seconds.", lower_bound=0)


def usage(program: str) -> str:
    """Modes with their flags, optional ones in brackets, and examples.

    `program`: main.py, or the name of the installed command.
    """
    call = f"python {program}" if program.endswith(".py") else program
    lines = [f"usage: {call} --mode=MODE --FLAG=VALUE ...", ""]
    for mode, command in COMMANDS.items():
        needs = " ".join(f"--{name}" for name in command.needs)
        reads = " ".join(f"--{name}" for name in command.reads if name not in PROCESS_FLAGS)
        lines.append(f"  --mode={mode:9}{needs} [{reads}]")
    start = " ".join(f"--{name}" for name in PROCESS_FLAGS)
    lines += [
        f"  train, eval with several processes: {start}",
        "",
        "--help lists all flags.",
        "",
    ]
    examples = (__doc__ or "").partition("\n\n")[2].rstrip()
    if call == program:  # run from anywhere: recipes by name
        examples = re.sub(r"configs/(\w+)\.py", r"\1", re.sub(r"python main\.py", call, examples))
    return "\n".join([*lines, examples])


# --- Parsing the command line ---------------------------------------------------------------------


def read_arguments(settings: Sequence[str]) -> Arguments:
    """The arguments from absl's flags and overrides "PATH=VALUE"; InputError if they conflict."""
    names = [field.name for field in fields(Arguments) if field.name in FLAGS]
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    values |= {name: tuple(values[name] or ()) for name in REPEATED}
    empty = {name for name in names if values[name] == ""}
    empty |= {name for name in REPEATED if "" in values[name]}
    given = frozenset(name for name in names if FLAGS[name].present and name not in empty)
    for name in REPEATED:
        for text in values[name]:
            local_path(name, text)
    for name in ("workdir", "output"):
        values[name] = local_path(name, values[name] or "")
    arguments = Arguments(**values, settings=tuple(settings), given=given)
    require_flags(arguments)
    require_places(arguments)
    return arguments


def local_path(name: str, text: str) -> Path:
    """The path given by a flag; the current folder if empty."""
    if "://" in text:
        raise InputError(f"--{name}={text}: must be on a local or mounted disk")
    if not is_text(text):
        raise InputError(f"--{name}={text!r}: must be UTF-8, without NUL")
    return Path(os.path.expanduser(text))


def require_flags(arguments: Arguments) -> None:
    """Raise an InputError for missing flags, and for flags that the mode does not use."""
    mode, command = arguments.mode, COMMANDS[arguments.mode]
    for name in command.needs:
        if name not in arguments.given:
            raise InputError(f"--{name}: required by --mode={mode}")
    used = {"mode", *command.needs, *command.reads}
    for name in sorted(arguments.given - used):
        raise InputError(f"--{name}: not used by --mode={mode}")
    if arguments.settings and "config" not in used:
        raise InputError(f"{SETTING}{arguments.settings[0]}: not used by --mode={mode}")
    if mode == "convert" and len(arguments.input) > 1:
        raise InputError(f"--input={' '.join(arguments.input)}: --mode=convert takes one")
    if mode == "train" and arguments.checkpoint != "latest":
        raise InputError(f"--checkpoint={arguments.checkpoint}: training resumes from the latest")


def require_places(arguments: Arguments) -> None:
    """Raise an InputError early for paths that are not folders or are not writable."""
    require_literal(arguments.workdir, "--workdir", ORBAX_MISREADS)
    results = "output" if "output" in arguments.given else "workdir"
    for name, path in (("workdir", arguments.workdir), ("output", arguments.output)):
        if name not in arguments.given:
            continue
        is_file = name == "output" and arguments.mode == "plan"
        if is_file and path.is_dir():
            raise InputError(f"--{name}={path}: is a folder, not a file")
        folder = path.parent if is_file else path
        found = next(place for place in (folder, *folder.parents) if place.exists())
        if not found.is_dir():
            raise InputError(f"--{name}={path}: {found} is a file, not a folder")
        if name == results and not os.access(found, os.W_OK | os.X_OK):
            is_read_only = os.statvfs(found).f_flag & os.ST_RDONLY
            reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
            advice = "; write elsewhere with --output=FOLDER" if arguments.mode == "eval" else ""
            raise InputError(f"--{name}={path}: cannot be written ({found}: {reason}){advice}")


# --- The program ----------------------------------------------------------------------------------


def main(argv: Sequence[str], settings: Sequence[str]) -> None:
    """Run the command; user errors become one-line messages."""
    try:
        if argv[1:]:
            raise InputError(f"{' '.join(argv[1:])}: not recognised; use --NAME=VALUE")
        arguments = read_arguments(settings)
        COMMANDS[arguments.mode].run(arguments)
    except Exception as error:
        is_user_error = isinstance(error, (InputError, OSError, FloatingPointError))
        message = out_of_memory.explanation(error) or (str(error) if is_user_error else "")
        if not message:
            raise
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        hint = "; run again to resume from the last checkpoint" if FLAGS.mode == "train" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        exit_now(130)


def run_program() -> None:
    """Entry point: parse the command line, run, and exit with a status."""
    # --help shows only the flags registered for the program that was called.
    for flag in FLAGS.get_key_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if not sys.argv[1:]:
        print(usage(Path(sys.argv[0]).name), file=sys.stderr)
        sys.exit(2)
    # File and class names may contain characters that the terminal cannot encode.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    os.environ["XLA_FLAGS"] = xla_flags(os.environ)  # read when JAX starts
    settings = [text.removeprefix(SETTING) for text in sys.argv if text.startswith(SETTING)]
    flags_only = [text for text in sys.argv if not text.startswith(SETTING)]
    app.run(functools.partial(main, settings=settings), argv=flags_only)
