"""XLA_FLAGS that make networks several times as fast on a CPU, to be set before JAX starts."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping

# XLA ends the process at a flag that it does not know, so only for versions that were tried.
KNOWN = ("0.10.", "0.11.", "0.12.")
FLAGS = {
    # Convolutions by XLA's own library: YNNPACK is slow with kernels as large as the image, which
    # gradients of kernels are, and with large dilations.
    "--xla_cpu_experimental_ynn_fusion_type": "-individual_convolution",
    # Optimisation barriers hold until operations are fused: `ops.convolution.materialize` and
    # `model.remat` depend on it.
    "--xla_disable_hlo_passes": "cse_barrier_expander",
}


def xla_flags(environment: Mapping[str, str]) -> str:
    """XLA_FLAGS for a process with these variables: its own, and ours if it computes on a CPU.

    A flag that is set already stays as it is.
    """
    own = environment.get("XLA_FLAGS", "")
    if not (_computes_on_cpu(environment) and _jaxlib_version().startswith(KNOWN)):
        return own
    given = {flag.partition("=")[0] for flag in own.split()}
    added = (f"{name}={value}" for name, value in FLAGS.items() if name not in given)
    return " ".join([*own.split(), *added])


def _jaxlib_version() -> str:
    return importlib.metadata.version("jaxlib")


def _computes_on_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX is told to use the CPU, or finds nothing else that is installed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
