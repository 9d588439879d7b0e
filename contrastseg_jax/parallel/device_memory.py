"""Memory of devices and of the host, within the limits of cgroups and other programs."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import psutil

# By cgroup version: files with limit and usage, and the reclaimable entry of memory.stat.
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Available host memory, within the limits of a container or batch job."""
    return min([psutil.virtual_memory().available, *cgroup_available_bytes()])


def cgroup_available_bytes(
    own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Memory left under the limit of each cgroup that this process is in."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (1, root / "memory") if controllers else (2, root)
        limit, used, reclaimable = GROUP_FILES[version]
        folder = top / path.lstrip("/")  # missing in a container, whose root is the group
        for group in (folder, *(above for above in folder.parents if above.is_relative_to(top))):
            try:
                lines = (group / "memory.stat").read_text().splitlines()
                cached = int(dict(line.split() for line in lines)[reclaimable])
                yield int((group / limit).read_text()) - int((group / used).read_text()) + cached
            except (OSError, ValueError, KeyError):  # no limit, or "max"
                continue


def device_bytes() -> int:
    """Memory of one device; CPU devices share the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", host_bytes // jax.local_device_count())


def free_bytes() -> int:
    """Free memory of one device; CPU devices share the host's.

    A tenth of the host's is reserved for the rest of this program: images, and the compiler.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return available_bytes() * 9 // 10 // jax.local_device_count()
