"""Memory limits of containers and batch systems, as the kernel writes them."""

import pytest

from contrastseg_jax.parallel import device_memory
from contrastseg_jax.parallel.device_memory import available_bytes, cgroup_available_bytes

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def write_group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")


@pytest.mark.parametrize(
    ("line", "top", "names"), [("0::/job/step", "", V2), ("4:memory:/job/step", "memory", V1)]
)
def test_each_limit_around_the_process_counts(tmp_path, line, top, names):
    (tmp_path / "own").write_text(f"9:cpu,cpuacct:/job/step\n{line}\n")
    root = tmp_path / "cgroup"
    write_group(root / top / "job" / "step", names, "max", 10, 0)
    write_group(root / top / "job", names, 100, 70, 20)
    write_group(root / top / "others", names, 1, 0, 0)
    assert list(cgroup_available_bytes(tmp_path / "own", root)) == [50]
    write_group(root / top, names, 80, 60, 0)
    assert list(cgroup_available_bytes(tmp_path / "own", root)) == [50, 20]


def test_a_container_sees_its_group_as_the_top(tmp_path):
    (tmp_path / "own").write_text("0::/outside/it\n")
    write_group(tmp_path / "cgroup", V2, 100, 70, 0)
    assert list(cgroup_available_bytes(tmp_path / "own", tmp_path / "cgroup")) == [30]


def test_a_system_without_groups(tmp_path):
    assert list(cgroup_available_bytes(tmp_path / "own", tmp_path)) == []
    assert 0 < device_memory.free_bytes() < available_bytes()
