"""Several processes as one run: how they meet, agree, and fail together."""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

# The key-value store behind `jax.distributed` has no public name. Unlike collectives it waits for
# as long as it must, and needs no devices.
from jax._src.distributed import global_state
from jax.sharding import Mesh

from contrastseg_jax import out_of_memory
from contrastseg_jax.errors import InputError, listed, reason
from contrastseg_jax.files import write_atomically
from contrastseg_jax.parallel import sharding

Result = TypeVar("Result")
StopRequests = Callable[..., jax.Array]  # (failed=False) -> whether all are to stop

# After which the processes that are left end as well, where no collective has told them before.
# The service looks every few seconds; README.md promises 60 s in all.
HEARTBEAT_SECONDS = 40
GATHER_TIMEOUT_MS = (
    7 * 24 * 3600 * 1000
)  # for what another process prepares; its death ends the waiting
SHARED_FOLDER_SECONDS = 20  # in which a folder that hosts share shows to all what one has written
TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that was told to stop


class Stopped(Exception):  # noqa: N818
    """The run was told to stop, and what it was doing is given up."""


class SharedError(InputError):
    """What one process could not do, raised in all of them at the same place."""


_gather_ids = itertools.count()  # of `gather`; all processes ask the same ones in the same order


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int
) -> None:
    """Meet the other processes of the run; before anything else asks JAX for devices.

    Without arguments they are those that Cloud TPU, GKE, SLURM or Open MPI have started, or there
    are none. A process that is not joined by all others within `timeout` seconds ends.

    Raises:
        InputError: the arguments are incomplete or contradict each other, or what the other
            processes were given.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        who, where = "a process", "the coordinator that the scheduler names"
    else:
        who, where = _checked_arguments(*given)
        print(f"{who}: waits for the others at {where}", file=sys.stderr, flush=True)
    # JAX's own end of waiting is an abort with the stack of its C++; so it is set to come later.
    sentence = (
        f"error: {who}: not all processes have met at {where} within --start_timeout={timeout} s."
        " Can it be reached from here? Was each process started, with the same number of processes"
        " and with an index of its own?"
    )
    alarm = threading.Timer(timeout, _exit, [sentence])
    alarm.daemon = True
    alarm.start()
    # It would take SIGTERM for itself; `deferred_sigterm` does what it is for.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"{who}: cannot meet the others at {where}: {error}") from error
    finally:
        alarm.cancel()
    if count() > 1:
        _require_same_count()
        devices = {"devices of a process": jax.local_device_count()}
        require_same(devices | {"jax": jax.__version__, "code": code_digest()})
        # Connects all devices while all processes are at the same place. Later one may come
        # minutes after another, from compiling, and this waits for seconds alone.
        jax.block_until_ready(sharding.any_process(False, sharding.make_mesh()))


def _checked_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, str]:
    """Who this process is and where it meets the others, for messages."""
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator, --num_processes, --process_id: all three or none")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id={process_id}: must be in 0..{num_processes - 1}, for"
            f" --num_processes={num_processes}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) < 2**16:
        raise InputError(
            f"--coordinator={coordinator}: must be HOST:PORT of process 0, with a port in 1..65535"
        )
    return f"process {process_id} of {num_processes}", coordinator


def _require_same_count() -> None:
    """A coordinator that waits for fewer processes than another was told of lets it in."""
    if is_first():
        _client().key_value_set("num_processes", str(count()))
    of_first = int(_client().blocking_key_value_get("num_processes", GATHER_TIMEOUT_MS))
    if of_first != count():
        raise InputError(f"--num_processes={count()}: process 0 was started with {of_first}")


def index() -> int:
    """Which of the run's processes this is. Unlike JAX's own it starts no devices."""
    return global_state.process_id or 0


def count() -> int:
    """How many processes the run has."""
    return global_state.num_processes or 1


def is_first() -> bool:
    """Whether this process writes what a run writes once: log, scores, pictures."""
    return index() == 0


def is_peer_failure(error: Exception) -> bool:
    """Whether an error may be no more than the end of another process."""
    signs = ("Gloo", "NCCL", "oordination service", "Connection closed by peer")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(s in str(error) for s in signs)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Within, an error of one of several processes ends it with its index, waiting for no other."""
    try:
        yield
    except SystemExit:
        # Told to stop, with all saved: another SIGTERM must not hurry the end, which all share.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except Exception as error:
        if count() == 1:
            raise
        text = out_of_memory.explanation(error) or _message(error)
        _exit(f"error: process {index()} of {count()}: {text}")


def _message(error: Exception) -> str:
    """What tells the user most of an error of one among several processes."""
    if is_peer_failure(error):
        return (
            f"{error}\nWhere one process ends, all do: the first error among them is the cause."
            " Started again, the run goes on from its last checkpoint."
        )
    if isinstance(error, (InputError, OSError, FloatingPointError)):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    if is_first() and count() > 1:
        time.sleep(1)  # all meet in this process: let the others hear what it has heard
    os._exit(1)  # at once: what Python and JAX do at an end waits for the other processes


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM does not end the process; the function says whether it has come."""
    come = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: come.set())
    try:
        yield come.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_requests(mesh: Mesh) -> Iterator[StopRequests]:
    """Within, SIGTERM does not end the process; the function asks whether all are to stop.

    All processes must ask, and hear the same once it is known: whether SIGTERM has come to any of
    them, or one asks with `failed`.
    """
    with deferred_sigterm() as has_come:
        yield lambda failed=False: sharding.any_process(has_come() or failed, mesh)


def stop_together(requests: StopRequests, error: Exception | None) -> None:
    """Raise the same in all processes where one has an error, or was told to stop; all must ask."""
    if requests(error is not None):
        raise_shared(reason(error) if error else "")
        raise Stopped


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; waits for the slowest, however long."""
    if count() == 1:
        return [text]
    name = f"gather/{next(_gather_ids)}"
    _client().key_value_set(f"{name}/{index()}", text)
    texts = [
        _client().blocking_key_value_get(f"{name}/{other}", GATHER_TIMEOUT_MS)
        for other in range(count())
    ]
    _client().wait_at_barrier(name, GATHER_TIMEOUT_MS)  # process 0 may end after it, and the store
    return texts


def _client() -> Any:
    return global_state.client


def sync_errors(work: Callable[[], Result]) -> Result:
    """What `work` gives in this process.

    Raises:
        SharedError: in all processes, if `work` raised one or an OSError in any; it names them.
    """
    if count() == 1:
        return work()
    result, problem = None, ""
    try:
        result = work()
    except (InputError, OSError) as error:
        problem = str(error)
    raise_shared(problem)
    return result  # pyright: ignore[reportReturnType]  # None only where `work` gave it


def raise_shared(problem: str) -> None:
    """Raise a SharedError in all processes, if one has a problem; all must ask."""
    problems = [(other, text) for other, text in enumerate(gather(problem)) if text]
    if problems:
        texts = "\n".join(dict.fromkeys(text for _, text in problems))
        indices = ", ".join(str(other) for other, _ in problems)
        raise SharedError(f"in process {indices}: {texts}" if count() > 1 else texts)


def first_then_others(work: Callable[[], Result]) -> Result:
    """`work` in process 0, and then in the others, which find what it has written."""
    of_first = sync_errors(lambda: work() if is_first() else None)
    of_others = sync_errors(lambda: None if is_first() else work())
    return of_first if is_first() else of_others  # pyright: ignore[reportReturnType]


def require_same(values: Mapping[str, object]) -> None:
    """Raise an InputError in all processes that names what one has other than process 0."""
    everyone = [json.loads(text) for text in gather(json.dumps(values, default=str))]
    problems = [
        f"{name}: process 0 has {everyone[0].get(name)!r}, process {other} has {value!r}"
        for other, theirs in enumerate(everyone)
        for name, value in theirs.items()
        if value != everyone[0].get(name)
    ]
    if problems:
        raise listed("what the processes of this run were started with", problems)


def require_shared(folder: Path) -> None:
    """Raise an InputError in all processes unless each sees the same folder."""
    token = gather(secrets.token_hex(8))[0]
    path = folder / ".shared"
    sync_errors(lambda: write_atomically(path, token) if is_first() else None)
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (seen := _contains(path, token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    apart = [other for other, text in enumerate(gather(str(seen))) if text != "True"]
    if is_first():
        path.unlink()
    if apart:
        raise InputError(
            f"--workdir={folder}: process {', '.join(map(str, apart))} does not see what process 0"
            " writes there; it must be a folder that all hosts share"
        )


def _contains(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def code_digest() -> str:
    """Of all source files of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
