"""XLA_FLAGS of the tests, to set before JAX is imported: compiling takes most of their time.

No LLVM optimisation, and the older of XLA's two emitters of fused loops: together they halve the
time that a gradient of HRNet takes to compile.
"""


def flags(num_devices: int) -> str:
    """XLA_FLAGS for so many virtual devices."""
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    return f"--xla_force_host_platform_device_count={num_devices} {fast}"
