"""XLA_FLAGS of the tests, to set before JAX is imported: compiling takes most of their time.

No LLVM optimisation, and the older of XLA's two emitters of fused loops, where it still has both:
together they halve the time that a gradient of HRNet takes to compile.
"""

from importlib.metadata import version

# A flag that XLA does not know ends the process.
KNOWS_EMITTERS = version("jaxlib").startswith("0.10.")


def flags(num_devices: int) -> str:
    """XLA_FLAGS for so many virtual devices."""
    found = [
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if KNOWS_EMITTERS else []),
    ]
    return " ".join(found)
