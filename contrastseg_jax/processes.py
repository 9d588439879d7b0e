"""Several processes as one run: how they meet, agree, and fail together."""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.files import write_atomically

Result = TypeVar("Result")

# After which the processes that are left end as well, where no collective has told them before.
HEARTBEAT_SECONDS = 60
TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that was told to stop


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int
) -> None:
    """Meet the other processes of the run; before anything else asks JAX for devices.

    Without arguments they are those that Cloud TPU, GKE, SLURM or Open MPI have started, or there
    are none. A process that is not joined by all others within `timeout` seconds ends.

    Raises:
        InputError: the arguments are incomplete or contradict each other.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        who, where = "a process", "the coordinator that the scheduler names"
    elif coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator, --num_processes, --process_id: all three or none")
    elif not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id={process_id}: must be in 0..{num_processes - 1}, for"
            f" --num_processes={num_processes}"
        )
    elif not coordinator.rpartition(":")[2].isdecimal() or coordinator.startswith(":"):
        raise InputError(f"--coordinator={coordinator}: must be HOST:PORT, of process 0")
    else:
        who, where = f"process {process_id} of {num_processes}", coordinator
        print(f"{who}: waits for the others at {where}", file=sys.stderr, flush=True)
    # JAX's own end of waiting is an abort with the stack of its C++; so it is set to come later.
    sentence = (
        f"error: {who}: not all processes have met at {where} within --start_timeout={timeout} s."
        " Can it be reached from here? Was each process started, with the same number of processes"
        " and with an index of its own?"
    )
    alarm = threading.Timer(timeout, _end, [sentence])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"starting several processes: {error}") from error
    finally:
        alarm.cancel()


def index() -> int:
    """Which of the run's processes this is."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes what a run writes once: log, scores, pictures."""
    return jax.process_index() == 0


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, an error of one of several processes ends it with its index, waiting for no other."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            text += (
                "\nWhere one process ends, all do: the first error among them is the cause. Started"
                " again, the run goes on from its last checkpoint."
            )
        elif not isinstance(error, (InputError, OSError, FloatingPointError)):
            text = "".join(traceback.format_exception(error)).rstrip()
        _end(f"error: process {jax.process_index()} of {jax.process_count()}: {text}")


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # at once: what Python and JAX do at an end waits for the other processes


@contextlib.contextmanager
def noted_sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM does not end the process; the function says whether it has come."""
    come = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: come.set())
    try:
        yield come.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(data.size, np.int32))
    padded = np.zeros(np.max(lengths), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def together(work: Callable[[], Result]) -> Result:
    """What `work` gives in this process.

    Raises:
        InputError: in all processes, if `work` raised one or an OSError in any; it names them.
    """
    if jax.process_count() == 1:
        return work()
    result, problem = None, ""
    try:
        result = work()
    except (InputError, OSError) as error:
        problem = str(error)
    problems = [(index, text) for index, text in enumerate(gather(problem)) if text]
    if problems:
        indices = ", ".join(str(index) for index, _ in problems)
        texts = dict.fromkeys(text for _, text in problems)
        raise InputError(f"in process {indices}: " + "\n".join(texts))
    return result  # pyright: ignore[reportReturnType]  # None only where `work` gave it


def first_then_others(work: Callable[[], Result]) -> Result:
    """`work` in process 0, and then in the others, which find what it has written."""
    of_first = together(lambda: work() if is_first() else None)
    of_others = together(lambda: None if is_first() else work())
    return of_first if is_first() else of_others  # pyright: ignore[reportReturnType]


def require_same(facts: Mapping[str, object]) -> None:
    """Raise an InputError in all processes that names what one has other than process 0."""
    everyone = [json.loads(text) for text in gather(json.dumps(facts, default=str))]
    problems = [
        f"{name} = {value!r}: process 0 has {everyone[0].get(name)!r}, process {index} another"
        for index, others in enumerate(everyone)
        for name, value in others.items()
        if value != everyone[0].get(name)
    ]
    if problems:
        raise listed("what the processes of this run were started with", problems)


def require_shared(folder: Path) -> None:
    """Raise an InputError in all processes unless each sees the same folder."""
    token = gather(secrets.token_hex(8))[0]
    path = folder / ".shared"
    together(lambda: write_atomically(path, token) if is_first() else None)
    seen = path.exists() and path.read_text() == token
    apart = [index for index, text in enumerate(gather(str(seen))) if text != "True"]
    if is_first():
        path.unlink()
    if apart:
        raise InputError(
            f"--workdir={folder}: process {', '.join(map(str, apart))} does not see what process 0"
            " writes there; it must be a folder that all hosts share"
        )


def code_digest() -> str:
    """Of all source files of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
