"""To import before all else: float64 wherever the program says float32.

What rounding alone makes different between two runs is far below 1e-6 then, so what is not is a
fault. In float32 a few steps magnify it ten thousandfold, and every processor rounds its own way.
"""

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64  # Flax's layers have it as a default, so before they are imported

from contrastseg_jax.config.checks import one_of  # noqa: E402
from contrastseg_jax.config.rules import RULES  # noqa: E402

SETTINGS = ("model.dtype=float64", "memory.dtype=float64")
for setting in SETTINGS:
    path, _, name = setting.partition("=")
    RULES[path] = [one_of(*RULES[path][0].names, name)]
