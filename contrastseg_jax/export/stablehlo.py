"""A network as a StableHLO program, which JAX runs without this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from contrastseg_jax.errors import InputError, reason

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"
RUNNER = Path(__file__).with_name("run_stablehlo.py")
NEEDS = "jax, flatbuffers and numpy"
# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
LIFETIME = "read by the JAX version that wrote it and those of about the next six months"


def serialize(logits_of: Callable[[Any], Any], size: tuple[int, int]) -> bytes:
    """The program of a function of images `u8[b h w 3]`, of one size and any number."""
    (number,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((number, *size, 3), jnp.uint8)
    return bytes(export.export(jax.jit(logits_of), platforms=PLATFORMS)(images).serialize())


def deserialize(path: Path) -> Callable[[Any], Any]:
    """The function that a file has; InputError for one that this JAX cannot read."""
    try:
        return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever a damaged or later file makes of the parser
        raise InputError(
            f"{path}: damaged, or not for JAX {jax.__version__}: a program is {LIFETIME}"
            f" ({reason(error)})"
        ) from error
