"""Who may import whom, read from the source."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

PACKAGE = ROOT / "contrastseg_jax"
# From top to bottom: a room sees those of the lines below, and of its own line itself alone.
ORDER = (
    {"cli"},
    {"commands", "library"},
    {"planning", "export"},
    {"training"},
    {"evaluation"},
    {"setup"},
    {"weights"},
    {"report", "run", "objectives"},
    {"models", "data", "parallel", "losses"},
    {"contrast", "ops", "config"},
    {"structs", "errors", "files", "text", "out_of_memory"},
)
VOCABULARY = ORDER[-1]  # files of which each may see the others
FACE = "__init__"  # of the package: sees all, once its names are used
LINE = {room: line for line, rooms in enumerate(ORDER) for room in rooms}
# Rooms that may import a library; all others may not.
ONLY_IN = {"flax": {"models", "structs"}, "tensorflow": set(), "torch": set()}
NOT_IN = {"jax": {"data", "config", "errors", "files", "text", "out_of_memory"}}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) != FACE)


def test_every_room_has_its_place():
    assert {room_of(path) for path in MODULES} == set(LINE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_sees_what_stands_below_it(path):
    room = room_of(path)
    for name in imports_of(path):
        library, _, rest = name.partition(".")
        if library == "contrastseg_jax":
            other = rest.split(".")[0]
            if other == "__version__":
                continue
            beside = other == room or {other, room} <= VOCABULARY
            assert beside or LINE[room] < LINE[other], f"{room} imports {name}"
        assert room in ONLY_IN.get(library, {room}), f"{room} imports {name}"
        assert room not in NOT_IN.get(library, set()), f"{room} imports {name}"


HEAVY = {
    "matplotlib",
    "tensorflow_datasets",
    "grain",
    "cv2",
    "PIL",
    "imagecodecs",
    "orbax",
    "tensorboardX",
    "clu",
    "sklearn",
}


@pytest.mark.parametrize(
    ("module", "lacks"),
    [
        ("contrastseg_jax", HEAVY | {"jax", "flax", "numpy"}),
        ("contrastseg_jax.cli", HEAVY | {"jax", "flax"}),
        ("contrastseg_jax.contrast.loss", HEAVY | {"optax"}),
        ("contrastseg_jax.losses.cross_entropy", HEAVY),
        ("contrastseg_jax.training.train_step", HEAVY),
    ],
)
def test_a_module_imports_what_it_computes_with(module, lacks):
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert not lacks & set(result.stdout.split())
