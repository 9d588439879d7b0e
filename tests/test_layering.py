"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "contrastseg_jax"
VOCABULARY = {"structs", "errors", "files", "text", "config", "workdir"}
METHOD = {"contrast", "memory", "losses", "metrics", "resize", "selection", "streaming"}
LIBRARIES_OF = {"flax": {"models", "structs"}, "tensorflow": set()}


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if first in VOCABULARY:
        return "vocabulary"
    if first in METHOD:
        return "method"
    return first if first in ("models", "data") else "program"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_from_program_to_vocabulary(path):
    room = room_of(path)
    allowed = VOCABULARY | {"method": METHOD, "models": {"models", "resize"}, "data": {"data"}}.get(
        room, set()
    )
    for name in imports_of(path):
        library, _, rest = name.partition(".")
        if library == "contrastseg_jax" and room != "program":
            assert rest.split(".")[0] in allowed, f"{path} imports {name}"
        for restricted, owners in LIBRARIES_OF.items():
            if library == restricted:
                assert path.relative_to(PACKAGE).parts[0].removesuffix(".py") in owners, name
        if library in ("jax", "flax"):
            assert room != "data" and path.stem not in VOCABULARY - {"structs"}, name
