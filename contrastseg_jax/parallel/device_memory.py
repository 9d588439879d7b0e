"""Memory of devices and of the machine, where other programs and limits share it."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import psutil

# Of a control group, by version: the files of its limit and its use, the line of what it can give
# up when memory runs short.
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Memory of the machine that is available, or less where a container or batch job may not."""
    return min([psutil.virtual_memory().available, *cgroup_available_bytes()])


def cgroup_available_bytes(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """What the memory limit of each control group around this process leaves."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (1, root / "memory") if controllers else (2, root)
        limit, used, reclaimable = GROUP_FILES[version]
        folder = top / path.lstrip("/")  # in a container it is not there, but its top is the group
        for group in (folder, *(above for above in folder.parents if above.is_relative_to(top))):
            try:
                lines = (group / "memory.stat").read_text().splitlines()
                cached = int(dict(line.split() for line in lines)[reclaimable])
                yield int((group / limit).read_text()) - int((group / used).read_text()) + cached
            except (OSError, ValueError, KeyError):  # no limit there, or "max"
                continue


def device_bytes() -> int:
    """Memory of one device; devices of the CPU share that of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", of_machine // jax.local_device_count())


def free_bytes() -> int:
    """Memory that a device has left; devices of the CPU share that of the machine.

    Of that a tenth is left to what else this program holds: pictures, and what it compiles.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return available_bytes() * 9 // 10 // jax.local_device_count()
