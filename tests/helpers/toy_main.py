"""`main.py` with the network `toy`.

FLOAT64=1: in float64. SIGNAL_AT=STEP:NAME[:PROCESS]: a process sends itself a signal when it has
logged a step, which no machine is too slow for.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

if os.environ.get("FLOAT64"):
    import float64  # noqa: F401
import toy  # noqa: F401

from contrastseg_jax.training import progress


def log_and_signal(log_interval, at, number):
    """`log_interval`, and after step `at` the signal."""

    def log(config, workdir, board, step, *rest):
        result = log_interval(config, workdir, board, step, *rest)
        if step == at:
            os.kill(os.getpid(), number)
        return result

    return log


step, _, rest = os.environ.get("SIGNAL_AT", "").partition(":")
name, _, process = rest.partition(":")
if step and (not process or f"--process_id={process}" in sys.argv):
    progress.log_interval = log_and_signal(progress.log_interval, int(step), signal.Signals[name])
runpy.run_path(str(Path(__file__).parents[2] / "main.py"), run_name="__main__")
