"""Command line: train, replay, evaluate, compare, embed, predict, export, audit, plan, convert.

    python main.py --mode=audit --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --mode=plan --config=configs/cityscapes.py --topology=v5e:2x4
    python main.py --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --workdir=runs/quickstart --replay=120
    python main.py --mode=eval --workdir=runs/quickstart --checkpoint=best
    python main.py --mode=predict --workdir=runs/quickstart --input=photos --output=predictions
    python main.py --mode=compare --runs=runs/ce --runs=runs/memory --output=comparison
    python main.py --mode=embed --runs=runs/ce --runs=runs/contrast --output=embeddings
    python main.py --mode=export --workdir=runs/quickstart --output=exported --size=512x512
    python main.py --mode=convert --input=resnet50.pth --output=weights/resnet50

Any setting of contrastseg_jax/config/default.py can be changed: --config.train.batch_size=4.
"""

import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from absl import app, flags

from contrastseg_jax import out_of_memory
from contrastseg_jax.commands import (
    Arguments,
    exit_now,
    run_audit,
    run_compare,
    run_convert,
    run_embed,
    run_eval,
    run_export,
    run_plan,
    run_predict,
    run_replay,
    run_train,
)
from contrastseg_jax.config.checks import is_text
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import ORBAX_MISREADS, require_literal
from contrastseg_jax.run.xla_flags import xla_flags

SETTING = "--config."


# --- Commands and flags ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What one --mode runs, the flags it requires and the optional ones."""

    run: Callable[[Arguments], None]
    needs: tuple[str, ...]
    reads: tuple[str, ...]


REPEATED = ("input", "runs", "size")  # flags that may be given several times
PROCESS_FLAGS = ("coordinator", "num_processes", "process_id", "start_timeout")
COMMANDS = {
    "train": Command(run_train, ("config", "workdir"), ("checkpoint", *PROCESS_FLAGS)),
    "replay": Command(run_replay, ("workdir", "replay"), ("config",)),
    "eval": Command(
        run_eval, ("workdir",), ("config", "checkpoint", "split", "output", *PROCESS_FLAGS)
    ),
    "predict": Command(run_predict, ("workdir", "input", "output"), ("config", "checkpoint")),
    "export": Command(run_export, ("workdir", "output"), ("config", "checkpoint", "size")),
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
    "eval, predict, export, convert, compare, embed: latest, best or a step; eval, predict, export:"
    " or init, the pretrained weights of model.init_from without training.",
)
flags.DEFINE_string(
    "replay", None, "replay: step of the run to take again; --mode=replay may be left out."
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
    "compare, embed: workdir, or folder that contains workdirs; may be repeated. compare: the first"
    " is the baseline.",
)
flags.DEFINE_multi_string(
    "size",
    None,
    "export: HEIGHTxWIDTH of the images that the network will be given; may be repeated. Default:"
    " augment.crop_size.",
)
flags.DEFINE_string(
    "output",
    None,
    "predict, export, convert, compare, embed: folder for the results, of embed by default in the"
    " first run's; eval: folder to use instead of the workdir, which may then be read-only; plan:"
    " JSON file.",
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
    for name in ("input", "runs"):
        for text in values[name]:
            local_path(name, text)
    if "replay" in given and values["mode"] == "train":
        values["mode"] = "replay"
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
