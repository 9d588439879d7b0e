"""Flags for a CPU are set where they are known and help, and never over the user's own."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from contrastseg_jax.run import xla_flags as module
from contrastseg_jax.run.xla_flags import xla_flags

YNN = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"


@pytest.fixture(autouse=True)
def a_cpu_alone(monkeypatch):
    monkeypatch.setattr(module, "_jaxlib_version", lambda: "0.10.2")
    monkeypatch.setattr(module.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


def test_both_are_set():
    assert xla_flags({}) == f"{YNN} {BARRIERS}"


def test_the_users_own_stay():
    own = "--xla_cpu_experimental_ynn_fusion_type= --xla_dump_to=x"
    assert xla_flags({"XLA_FLAGS": own}) == f"{own} {BARRIERS}"
    assert xla_flags({"XLA_FLAGS": "--xla_disable_hlo_passes=a"}).count("disable_hlo_passes") == 1


@pytest.mark.parametrize("unknown", ["0.9.2", "0.13.0", "1.0.1"])
def test_none_for_a_jaxlib_that_may_not_know_them(monkeypatch, unknown):
    monkeypatch.setattr(module, "_jaxlib_version", lambda: unknown)
    assert xla_flags({}) == ""
    assert xla_flags({"XLA_FLAGS": "--a=b"}) == "--a=b"


@pytest.mark.parametrize("installed", ["plugin", "libtpu"])
def test_none_where_an_accelerator_may_be_used(monkeypatch, installed):
    if installed == "plugin":
        monkeypatch.setattr(module.importlib.metadata, "entry_points", lambda group: (group,))
    else:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    assert xla_flags({}) == ""
    assert xla_flags({"JAX_PLATFORMS": "cuda"}) == xla_flags({"JAX_PLATFORMS": "cuda,cpu"}) == ""
    assert xla_flags({"JAX_PLATFORMS": "cpu"}) == f"{YNN} {BARRIERS}"


# Twelve residual blocks; prints how much the largest fused operation of the gradient reads.
CHAIN = """
import re, jax, jax.numpy as jnp
from contrastseg_jax.ops.convolution import materialize
def chain(kernels, x):
    for k in kernels:
        x = materialize(jax.nn.relu(x + jnp.dot(x, k) * 1.01))
    return x.sum()
kernels = [jnp.ones((8, 8))] * 12
program = jax.jit(jax.grad(chain)).lower(kernels, jnp.ones((1, 4, 4, 8))).compile().as_text()
fused = [line for line in program.splitlines() if re.match("%.*fused_computation.*{", line)]
print(max(line.partition("->")[0].count(": f32") for line in fused))
"""


@pytest.mark.slow
def test_a_chain_of_blocks_is_not_computed_again_in_each_block(monkeypatch):
    monkeypatch.setattr(module, "_jaxlib_version", lambda: version("jaxlib"))
    flags = xla_flags({})
    assert flags, "this version of jaxlib is not listed"

    def reads(flags):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(
            [sys.executable, "-c", CHAIN],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        return int(re.findall(r"\d+", result.stdout)[-1])

    assert reads(flags) <= 4
    assert reads("") > 10
