"""Run an exported network, in a process that has JAX alone.

python run_stablehlo.py NETWORK.stablehlo IMAGES.npy LOGITS.npy
"""

import sys
from pathlib import Path

import numpy as np
from jax import export


def run(network: str, images: str, logits: str) -> None:
    """Write the logits `f32[b h w k]` of images `u8[b h w 3]`."""
    exported = export.deserialize(bytearray(Path(network).read_bytes()))
    np.save(logits, np.asarray(exported.call(np.load(images))))


if __name__ == "__main__":
    run(*sys.argv[1:])
