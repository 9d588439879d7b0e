"""What a process does alone; with others: test_multi_process.py, test_stops.py."""

import os
import signal

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


def test_sigterm_is_noted_and_only_within():
    before = signal.getsignal(signal.SIGTERM)
    with processes.deferred_sigterm() as has_come:
        assert not has_come()
        os.kill(os.getpid(), signal.SIGTERM)
        assert has_come()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_code_has_one_digest():
    assert processes.code_digest() == processes.code_digest()
    assert len(processes.code_digest()) == 16
