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


def log_and_signal(log_progress, at, number):
    """`log_progress`, and after step `at` the signal."""

    def log(run_progress, step):
        log_progress(run_progress, step)
        if step == at:
            os.kill(os.getpid(), number)

    return log


step, _, rest = os.environ.get("SIGNAL_AT", "").partition(":")
name, _, process = rest.partition(":")
if step and (not process or f"--process_id={process}" in sys.argv):
    progress.log_progress = log_and_signal(progress.log_progress, int(step), signal.Signals[name])
runpy.run_path(str(Path(__file__).parents[2] / "main.py"), run_name="__main__")
