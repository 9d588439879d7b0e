"""Memory that this process can still get, where other programs and limits share the machine."""

from collections.abc import Iterator
from pathlib import Path

import psutil

# Of a control group, by version: the files of its limit and its use, the line of what it can give
# up when memory runs short.
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes() -> int:
    """Memory of the machine that is available, or less where a container or batch job may not."""
    return min([psutil.virtual_memory().available, *left_by_groups()])


def left_by_groups(
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
