"""Devices to plan for: this machine's, virtual CPU devices, or TPUs that are not available."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from contrastseg_jax.errors import InputError
from contrastseg_jax.parallel import device_memory

GIB = 1 << 30
TPU_BYTES = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}  # per chip
AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of the chip topology
# Megacore: both cores of a chip are one device, as on real machines; not libtpu's default.
OPTIONS: dict[str, dict[str, str]] = {"v4": {"chip_config_name": "megacore"}}
# Without these, libtpu queries the metadata server of Google Cloud, and waits.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any valid type
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Topology:
    """Devices to train on."""

    name: str  # value of --topology, or "own devices"
    kind: str  # of device, e.g. "TPU v5 lite"
    num_devices: int
    device_bytes: int  # memory per device
    devices: Sequence[Any] | None  # None: unavailable, cannot be compiled for


def find_topology(name: str | None, *, count_only: bool = False) -> Topology:
    """The devices given by --topology: `cpu:8`, `v5e:2x4`; None: those of this machine.

    `count_only`: only kind and number of TPUs, which does not need libtpu. JAX must not be
    initialised yet: from here on it uses the CPU for everything but compiling.

    Raises:
        InputError: no such topology, no libtpu, or JAX is initialised with other devices.
    """
    if name is None:
        devices, size = jax.devices(), device_memory.device_bytes()
        return Topology("own devices", devices[0].device_kind, len(devices), size, devices)
    kind, _, shape = name.partition(":")
    known = kind == "cpu" or (kind in TPU_BYTES and shape.count("x") == AXES[kind] - 1)
    if not known or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise InputError(
            f"--topology={name}: must be cpu:N, or a TPU type and shape: "
            + ", ".join(f"{tpu}:2x2{'x1' * (axes - 2)}" for tpu, axes in AXES.items())
        )
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return _cpu_topology(name, shape)
    devices = None if count_only else _tpu_devices(name, kind)
    number = math.prod(map(int, shape.split("x")))
    return Topology(name, f"TPU {kind}", number, TPU_BYTES[kind], devices)


def _cpu_topology(name: str, shape: str) -> Topology:
    """Virtual CPU devices, which share the memory of this machine."""
    if not shape.isdecimal():
        raise InputError(f"--topology={name}: must be a number of CPU devices, e.g. cpu:8")
    try:
        jax.config.update("jax_num_cpu_devices", int(shape))
    except RuntimeError as error:
        if jax.device_count() != int(shape):
            raise InputError(
                f"--topology={name}: JAX is already initialised, with {jax.device_count()} devices"
            ) from error
    devices = jax.devices()
    return Topology(
        name, devices[0].device_kind, len(devices), device_memory.device_bytes(), devices
    )


def _tpu_devices(name: str, kind: str) -> Sequence[Any]:
    for variable, value in NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    try:
        options = OPTIONS.get(kind, {})
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--topology={name}: libtpu does not support it ({reason})") from error
    except RuntimeError as error:
        raise InputError(
            f"--topology={name}: compiling for a TPU that is not available needs libtpu:"
            " pip install 'contrastseg_jax[tpu-plan]', or pip install libtpu; --quick does not"
        ) from error
