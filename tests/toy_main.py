"""`main.py` with the network `toy`, and under FLOAT64=1 in float64."""

import os
import runpy
from pathlib import Path

if os.environ.get("FLOAT64"):
    import float64  # noqa: F401
import toy  # noqa: F401

runpy.run_path(str(Path(__file__).parents[1] / "main.py"), run_name="__main__")
