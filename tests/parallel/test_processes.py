"""What a process does alone; with others: test_multi_process.py, test_stops.py."""

import os
import signal
import subprocess
import sys

import pytest

from contrastseg_jax.errors import InputError
from contrastseg_jax.parallel import processes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "all three or none"),
        ((None, None, 0), "all three or none"),
        (("host:1", 2, 2), "--process_id=2: must be in 0..1, for --num_processes=2"),
        (("host", 2, 0), "--coordinator=host: must be HOST:PORT"),
        (("host:99999", 2, 0), "--coordinator=host:99999: .* with a port in 1..65535"),
        ((":80", 2, 0), "--coordinator=:80: must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_say_who_a_process_is(arguments, message):
    with pytest.raises(InputError, match=message):
        processes.start(*arguments, timeout=1)


def test_alone_a_process_is_the_first_and_agrees_with_itself(tmp_path):
    assert processes.is_first() and processes.gather("ä") == ["ä"]
    assert processes.sync_errors(lambda: 3) == processes.first_then_others(lambda: 3) == 3
    processes.require_same({"seed": 1})
    processes.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), processes.exit_on_error():
        processes.sync_errors((tmp_path / "nothing").read_text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_only_within(number):
    before = signal.getsignal(number)
    with processes.deferred_signals() as received:
        assert not received()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the same request, delivered twice
        assert received() == number
    assert signal.getsignal(number) == before


def test_a_second_signal_exits_at_once():
    program = (
        "import os, signal, time\n"
        "from contrastseg_jax.parallel import processes\n"
        "processes.REPEAT_SECONDS = 0\n"
        "with processes.deferred_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 130 and not result.stdout, result.stderr
    assert "without saving" in result.stderr


def test_the_code_has_one_digest():
    assert processes.code_digest() == processes.code_digest()
    assert len(processes.code_digest()) == 16
