"""Multi-process runs: connecting, agreeing on values, and failing together."""

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

# The key-value store of `jax.distributed` has no public API. Unlike collectives it can wait for
# hours, and needs no devices.
from jax._src.distributed import global_state
from jax.sharding import Mesh

from contrastseg_jax import out_of_memory
from contrastseg_jax.errors import InputError, listed, reason
from contrastseg_jax.files import write_atomically
from contrastseg_jax.parallel import sharding

Result = TypeVar("Result")
StopRequests = Callable[..., jax.Array]  # (failed=False) -> whether all should stop

# When a process dies, the others exit after this time unless a collective fails first. The service
# polls every few seconds; docs/scaling.md promises 60 s in total.
HEARTBEAT_SECONDS = 40
GATHER_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # others may be preparing data; a death ends the wait
SHARED_FOLDER_SECONDS = 20  # for a write on one host to become visible on the others
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 1.0  # within which a further signal is the same request
TERMINATED = 128 + signal.SIGTERM  # exit status of a run that was stopped


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop; the current work is abandoned."""


class SharedError(InputError):
    """An error of one process, raised in all of them at the same place."""


_gather_ids = itertools.count()  # all processes call `gather` in the same order


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int
) -> None:
    """Connect to the other processes of the run; must be called before JAX is asked for devices.

    Without arguments, uses the processes started by Cloud TPU, GKE, SLURM or Open MPI, if any. The
    process exits if not all of them have connected within `timeout` seconds.

    Raises:
        InputError: the arguments are incomplete, or inconsistent with each other or with those of
            the other processes.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        who, where = "a process", "the scheduler's coordinator"
    else:
        who, where = _checked_arguments(*given)
        print(f"{who}: waiting for the others at {where}", file=sys.stderr, flush=True)
    # JAX aborts with a C++ stack trace on its own timeout, so that one is set later.
    message = (
        f"error: {who}: not all processes connected to {where} within --start_timeout={timeout} s."
        " Is it reachable from here? Was every process started, with the same --num_processes and"
        " its own --process_id?"
    )
    alarm = threading.Timer(timeout, _exit, [message])
    alarm.daemon = True
    alarm.start()
    # It would install its own SIGTERM handler; `deferred_sigterm` takes its place.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"{who}: cannot connect to the others at {where}: {error}") from error
    finally:
        alarm.cancel()
    if count() > 1:
        _require_same_count()
        devices = {"devices per process": jax.local_device_count()}
        require_same(devices | {"jax": jax.__version__, "code": code_digest()})
        # Connects all devices while the processes are in step: the connection times out after
        # seconds, and later one may arrive minutes after another, from compiling.
        jax.block_until_ready(sharding.any_process(False, sharding.make_mesh()))


def _checked_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, str]:
    """The name of this process and the coordinator's address, for messages."""
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
    """Compare --num_processes, as a coordinator also accepts processes with a larger one."""
    if is_first():
        _client().key_value_set("num_processes", str(count()))
    of_first = int(_client().blocking_key_value_get("num_processes", GATHER_TIMEOUT_MS))
    if of_first != count():
        raise InputError(f"--num_processes={count()}: process 0 was started with {of_first}")


def index() -> int:
    """The index of this process. Unlike `jax.process_index` it does not initialise devices."""
    return global_state.process_id or 0


def count() -> int:
    """The number of processes of the run."""
    return global_state.num_processes or 1


def is_first() -> bool:
    """Whether this process writes what is written once per run: log, scores, pictures."""
    return index() == 0


def is_peer_failure(error: Exception) -> bool:
    """Whether an error may only be the consequence of another process having exited."""
    signs = ("Gloo", "NCCL", "oordination service", "Connection closed by peer")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(s in str(error) for s in signs)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """In a multi-process run, exit on an error at once, naming the process, without cleanup."""
    try:
        yield
    except SystemExit:
        # Stopped, with everything saved: another signal must not interrupt the joint shutdown.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise
    except Exception as error:
        if count() == 1:
            raise
        text = out_of_memory.explanation(error) or _message(error)
        _exit(f"error: process {index()} of {count()}: {text}")


def _message(error: Exception) -> str:
    """The most useful message for an error in one of several processes."""
    if is_peer_failure(error):
        return (
            f"{error}\nWhen one process exits, all do: the first error among them is the cause."
            " Run again to resume from the last checkpoint."
        )
    if isinstance(error, (InputError, OSError, FloatingPointError)):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    if is_first() and count() > 1:
        time.sleep(1)  # the coordinator is in this process: let the others get the same error
    os._exit(1)  # without cleanup, in which Python and JAX wait for the other processes


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], int]]:
    """Defer SIGTERM and SIGINT inside the block; the function returns the one received, or 0.

    Another one exits at once, unless it follows within REPEAT_SECONDS: schedulers and shells may
    deliver one request several times.
    """
    first, since = 0, 0.0

    def receive(number: int, _: Any) -> None:
        nonlocal first, since
        if first and time.monotonic() - since > REPEAT_SECONDS:
            print("stopped at once, without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)
        if not first:
            first, since = number, time.monotonic()

    before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
    try:
        yield lambda: first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests(mesh: Mesh) -> Iterator[StopRequests]:
    """Defer stop signals inside the block; the function asks whether all processes should stop.

    All processes must call it, and get the same answer once it is computed: whether any of them
    received SIGTERM or SIGINT, or called it with `failed`.
    """
    with deferred_signals() as received:
        yield lambda failed=False: sharding.any_process(received() > 0 or failed, mesh)


def stop_together(requests: StopRequests, error: Exception | None) -> None:
    """Raise the same in all processes if one has an error or must stop; all must call it."""
    if requests(error is not None):
        raise_shared(reason(error) if error else "")
        raise Stopped


def gather(text: str) -> list[str]:
    """The texts of all processes, ordered by index; waits for the slowest, however long."""
    if count() == 1:
        return [text]
    name = f"gather/{next(_gather_ids)}"
    _client().key_value_set(f"{name}/{index()}", text)
    texts = [
        _client().blocking_key_value_get(f"{name}/{other}", GATHER_TIMEOUT_MS)
        for other in range(count())
    ]
    _client().wait_at_barrier(name, GATHER_TIMEOUT_MS)  # process 0, with the store, may exit next
    return texts


def _client() -> Any:
    return global_state.client


def sync_errors(work: Callable[[], Result]) -> Result:
    """Run `work` in each process, and raise its errors in all of them.

    `work` must not wait for other processes: one that fails there would leave them waiting.

    Raises:
        SharedError: in all processes, if `work` raised an InputError or OSError in any; it names
            them.
    """
    if count() == 1:
        return work()
    result, problem = None, ""
    try:
        result = work()
    except (InputError, OSError) as error:
        problem = str(error)
    raise_shared(problem)
    return result  # pyright: ignore[reportReturnType]  # None only where `work` returned it


def raise_shared(problem: str) -> None:
    """Raise a SharedError in all processes if one has a problem; all must call it."""
    problems = [(other, text) for other, text in enumerate(gather(problem)) if text]
    if problems:
        texts = "\n".join(dict.fromkeys(text for _, text in problems))
        indices = ", ".join(str(other) for other, _ in problems)
        raise SharedError(f"in process {indices}: {texts}" if count() > 1 else texts)


def first_then_others(work: Callable[[], Result]) -> Result:
    """Run `work` in process 0, then in the others, which find what it has written."""
    of_first = sync_errors(lambda: work() if is_first() else None)
    of_others = sync_errors(lambda: None if is_first() else work())
    return of_first if is_first() else of_others  # pyright: ignore[reportReturnType]


def require_same(values: Mapping[str, object]) -> None:
    """Raise an InputError in all processes naming the values that differ from process 0's."""
    everyone = [json.loads(text) for text in gather(json.dumps(values, default=str))]
    problems = [
        f"{name}: process 0 has {everyone[0].get(name)!r}, process {other} has {value!r}"
        for other, theirs in enumerate(everyone)
        for name, value in theirs.items()
        if value != everyone[0].get(name)
    ]
    if problems:
        raise listed("the arguments of the processes of this run", problems)


def require_shared(folder: Path) -> None:
    """Raise an InputError in all processes unless the folder is shared by all of them."""
    token = gather(secrets.token_hex(8))[0]
    path = folder / ".shared"
    sync_errors(lambda: write_atomically(path, token) if is_first() else None)
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (seen := _contains(path, token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    missing = [other for other, text in enumerate(gather(str(seen))) if text != "True"]
    if is_first():
        path.unlink()
    if missing:
        raise InputError(
            f"--workdir={folder}: process {', '.join(map(str, missing))} does not see what process"
            " 0 writes there; it must be a folder shared by all hosts"
        )


def _contains(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def code_digest() -> str:
    """A digest of all source files of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
