"""Trains, evaluates and predicts; audits data, plans runs, converts weights to start from.

    python main.py --mode=audit --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --mode=plan --config=configs/cityscapes.py --topology=v5e:2x4
    python main.py --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --mode=eval --workdir=runs/quickstart --checkpoint=best
    python main.py --mode=predict --workdir=runs/quickstart --input=photos --output=predictions
    python main.py --mode=convert --input=resnet50.pth --output=weights/resnet50

Any setting of contrastseg_jax/config/default.py can be changed: --config.train.batch_size=4.
"""

import errno
import functools
import io
import os
import sys
from pathlib import Path
from typing import cast

from absl import app, flags

from contrastseg_jax import out_of_memory
from contrastseg_jax.config.checks import is_text
from contrastseg_jax.config.load import filled_in, load
from contrastseg_jax.config.rules import PHOTOGRAPHIC
from contrastseg_jax.config.tree import Config
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import OF_CHECKPOINTS, require_literal
from contrastseg_jax.run.workdir import find_run, read_config, refuse_differences

SETTING = "--config."

START = ("coordinator", "num_processes", "process_id", "start_timeout")
# The flags of each mode: those it needs, and others that it reads.
NEEDED = {
    "train": ("config", "workdir"),
    "eval": ("workdir",),
    "predict": ("workdir", "input", "output"),
    "audit": ("workdir",),
    "plan": ("config",),
    "convert": ("input", "output"),
}
OPTIONAL = {
    "train": ("checkpoint", *START),
    "eval": ("config", "checkpoint", "split", "output", *START),
    "predict": ("config", "checkpoint"),
    "audit": ("config", "split"),
    "plan": ("output", "topology", "quick", "time_limit"),
    "convert": ("checkpoint",),
}

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "FILE.py[:MODEL[,VARIANT]]; may be left out after training.")
flags.DEFINE_string("workdir", None, "Folder of the run; not of plan and convert.")
flags.DEFINE_enum("mode", "train", list(NEEDED), "What to do.")
flags.DEFINE_string(
    "checkpoint",
    "latest",
    "eval, predict, convert: latest, best or a step; eval, predict: or init, the weights of"
    " model.init_from as they are.",
)
flags.DEFINE_string(
    "split", None, "eval: the split of the data set, val by default; audit: it alone, not all."
)
flags.DEFINE_multi_string(
    "input",
    None,
    "predict: image, folder of images or pattern ('photos/*.jpg'), and again for more of them;"
    " convert: .pth, .safetensors, folder of a run.",
)
flags.DEFINE_string(
    "output",
    None,
    "predict, convert: folder for the results; eval: likewise, instead of one in the workdir, which"
    " may be read-only then; plan: JSON file.",
)
flags.DEFINE_string(
    "coordinator", None, "train, eval in several processes: HOST:PORT of process 0."
)
flags.DEFINE_integer("num_processes", None, "How many there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")
flags.DEFINE_integer(
    "start_timeout", 300, "Seconds in which all of them must have started.", lower_bound=1
)
flags.DEFINE_string("topology", None, "plan: cpu:8, v5e:2x4 and the like; else the own devices.")
flags.DEFINE_boolean("quick", False, "plan: what is known without compiling.")
flags.DEFINE_float("time_limit", 1800, "plan: seconds of compiling.", lower_bound=0)


def main(argv: list[str], settings: list[str]) -> None:
    """Reads the flags and calls one function per mode; what goes wrong ends in one message."""
    try:
        if argv[1:]:
            raise InputError(f"{' '.join(argv[1:])}: not understood; write --NAME=VALUE")
        require_flags(settings)
        if FLAGS.mode == "convert":
            convert_weights(path_of("input"), path_of("output"))
        elif FLAGS.mode == "plan":
            plan(load_config(settings))
        else:
            start_and_run(load_config(settings), path_of("workdir"))
    except Exception as error:
        is_of_user = isinstance(error, (InputError, OSError, FloatingPointError))
        message = out_of_memory.explanation(error) or (str(error) if is_of_user else "")
        if not message:
            raise
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        outlook = "; a run goes on from its last checkpoint" if FLAGS.mode == "train" else ""
        print(f"interrupted{outlook}", file=sys.stderr)
        leave(130)


def usage() -> str:
    """Modes with their flags, those that may be left out in brackets, and examples."""
    lines = ["usage: python main.py --mode=MODE --FLAG=VALUE ...", ""]
    for mode, needed in NEEDED.items():
        optional = " ".join(f"--{name}" for name in OPTIONAL[mode] if name not in START)
        lines.append(f"  --mode={mode:9}{' '.join(f'--{n}' for n in needed)} [{optional}]")
    start = " ".join(f"--{name}" for name in START)
    lines += [f"  train, eval in several processes: {start}", "", "--help explains each flag.", ""]
    return "\n".join([*lines, (__doc__ or "").partition("\n\n")[2].rstrip()])


def leave(status: int) -> None:
    """End the process at once: tearing down a compilation that goes on ends in a crash."""
    sys.stdout.flush()
    os._exit(status)


def require_flags(settings: list[str]) -> None:
    """Raise an error for flags that the mode needs, or has no use for."""
    mode = FLAGS.mode
    for name in NEEDED[mode]:
        if "" in texts_of(name):
            raise InputError(f"--{name}: is needed, --mode={mode} has no default for it")
    known = {name for names in (*NEEDED.values(), *OPTIONAL.values()) for name in names}
    for name in sorted(known.difference(NEEDED[mode], OPTIONAL[mode])):
        if FLAGS[name].present:
            raise InputError(f"--{name}: --mode={mode} has no use for it")
    if mode == "convert" and settings:
        raise InputError(f"{SETTING}{settings[0]}: --mode=convert has no use for settings")
    if mode == "convert" and len(FLAGS.input) > 1:
        raise InputError(f"--input={' '.join(FLAGS.input)}: --mode=convert takes one")
    if mode == "train" and FLAGS.checkpoint != "latest":
        raise InputError(f"--checkpoint={FLAGS.checkpoint}: training goes on from the latest")
    require_places(mode)


def require_places(mode: str) -> None:
    """Raise an error for a file or folder that the mode cannot read or write, before it works."""
    path_of("input")
    require_literal(path_of("workdir"), "--workdir", OF_CHECKPOINTS)
    in_workdir = mode in ("train", "audit") or (mode == "eval" and not FLAGS.output)
    for name in ("workdir", "output"):
        text, path = FLAGS[name].value, path_of(name)
        is_file = name == "output" and mode == "plan"
        if is_file and text and path.is_dir():
            raise InputError(f"--{name}={text}: is a folder, not a file")
        folder = path.parent if is_file else path
        found = next(place for place in (folder, *folder.parents) if place.exists())
        if not found.is_dir():
            raise InputError(f"--{name}={text}: {found} is a file, not a folder")
        if not text or os.access(found, os.W_OK | os.X_OK):
            continue
        if name == "output" or in_workdir:
            is_read_only = os.statvfs(found).f_flag & os.ST_RDONLY
            reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
            advice = "; results go elsewhere with --output=FOLDER" if mode == "eval" else ""
            raise InputError(f"--{name}={text}: cannot be written ({found}: {reason}){advice}")


def texts_of(name: str) -> list[str]:
    """What a flag is given, which may be more than once; an empty text where it is left out."""
    values = FLAGS[name].value or ""
    return [values] if isinstance(values, str) else values


def path_of(name: str) -> Path:
    """The file or folder that a flag names, the last of several; if left out the current folder."""
    texts = texts_of(name)
    for text in texts:
        if "://" in text:
            raise InputError(f"--{name}={text}: must be on a local or mounted disk")
        if not is_text(text):
            raise InputError(f"--{name}={text!r}: must be UTF-8, without NUL")
    return Path(os.path.expanduser(texts[-1]))


def load_config(settings: list[str]) -> Config:
    """The config of the command line, or that of the run in the workdir."""
    workdir = path_of("workdir")
    named = [text.partition("=")[0] for text in settings]
    free = [path for path in PHOTOGRAPHIC if FLAGS.mode == "predict" and path in named]
    if not FLAGS.config:
        if FLAGS.mode == "audit" and not (workdir / "config.json").exists():
            raise InputError(f"--config: is needed, as --workdir={workdir} holds no run")
        return read_config(workdir, settings, free=free)
    config = load(FLAGS.config, settings)
    if FLAGS.mode in ("eval", "predict"):
        of_init = FLAGS.checkpoint == "init"  # for which there need not be a run
        run = find_run(workdir) if of_init else read_config(workdir)
        if run is not None:
            config = filled_in(config, run)
            refuse_differences(config, run, workdir, free=free)
    return config


def start_and_run(config: Config, workdir: Path) -> None:
    """Meets the other processes of the run, if there are any, and calls the mode's function."""
    from contrastseg_jax.parallel import processes
    from contrastseg_jax.run.logging import start_logging

    start_logging()
    if FLAGS.mode not in ("train", "eval"):
        run(config, workdir)
        return
    which = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    with processes.ending_at_once():
        processes.start(*which, timeout=FLAGS.start_timeout)
        start_logging(processes.index())
        run(config, workdir)


def run(config: Config, workdir: Path) -> None:
    """Calls the mode's function."""
    # JAX and the networks take seconds to import: not before the config has been read.
    from contrastseg_jax.setup.preflight import check
    from contrastseg_jax.setup.setup import follow_weights

    of_init = FLAGS.checkpoint == "init"
    begins = FLAGS.mode == "train" and find_run(workdir) is None
    check(config, mode=FLAGS.mode, reads_weights=of_init or begins)
    if of_init:
        if not config.model.init_from:
            raise InputError("--checkpoint=init: needs --config.model.init_from=FOLDER")
        config = follow_weights(config, None)
    if FLAGS.mode == "train":
        from contrastseg_jax.training.train import train

        train(config, workdir)
    elif FLAGS.mode == "eval":
        from contrastseg_jax.evaluation.evaluate import evaluate_run

        output = path_of("output") if FLAGS.output else None
        evaluate_run(config, workdir, FLAGS.checkpoint, FLAGS.split or "val", output)
    elif FLAGS.mode == "predict":
        from contrastseg_jax.evaluation.predict import predict_run

        predict_run(config, workdir, FLAGS.checkpoint, FLAGS.input, path_of("output"))
    elif FLAGS.mode == "audit":
        from contrastseg_jax.data.audit.report import audit_run

        audit_run(config, workdir, FLAGS.split)


def convert_weights(source: Path, output: Path) -> None:
    """Converts a file, or a checkpoint of the run in a folder."""
    run = None
    if (source / "config.json").is_file() and (source / "checkpoints").is_dir():
        run = read_config(source)
    elif FLAGS["checkpoint"].present:
        raise InputError(f"--checkpoint={FLAGS.checkpoint}: --input={source} is no folder of a run")
    from contrastseg_jax.run.logging import start_logging
    from contrastseg_jax.weights.convert import convert, convert_run

    start_logging()
    if run is None:
        convert(source, output)
    else:
        convert_run(run, source, FLAGS.checkpoint, output)


def plan(config: Config) -> None:
    """Prints what a run will take, and ends the process."""
    from contrastseg_jax.planning.plan import plan_run
    from contrastseg_jax.run.logging import start_logging

    start_logging()
    status = plan_run(
        config,
        topology=FLAGS.topology,
        quick=FLAGS.quick,
        time_limit=FLAGS.time_limit,
        output=path_of("output") if FLAGS.output else None,
    )
    leave(status)


def run_program() -> None:
    """The program: reads the command line, and ends with its exit status."""
    # For --help, which shows the flags of the program that was called.
    for flag in FLAGS.get_key_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if not sys.argv[1:]:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    # Names of files and classes may hold what the terminal's encoding lacks.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    settings = [text.removeprefix(SETTING) for text in sys.argv if text.startswith(SETTING)]
    flags_only = [text for text in sys.argv if not text.startswith(SETTING)]
    app.run(functools.partial(main, settings=settings), argv=flags_only)
