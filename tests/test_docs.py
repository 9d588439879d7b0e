"""What the documents name exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_of_the_original_has_its_test():
    text = (ROOT / "docs" / "upstream.md").read_text()
    rows = re.findall(r"^\| D(\d+) \|.*\| (.*) \|$", text, re.MULTILINE)
    of_what_is_not_here = {20, 22, 25, 30, 32, 33}
    assert [int(number) for number, _ in rows] == [
        number for number in range(1, 38) if number not in of_what_is_not_here
    ]
    for number, cell in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert named, f"D{number} names no test"
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_every_function_and_setting_of_the_method_exists():
    text = (ROOT / "docs" / "method.md").read_text()
    modules = {path.stem: path for path in (ROOT / "contrastseg_jax").rglob("*.py")}
    settings = (ROOT / "configs" / "default.py").read_text()
    named = re.findall(r"`(?:\w+/)?(\w+)\.([A-Za-z]\w+)\b", text)
    assert len(named) > 20
    for module, name in named:
        source = modules[module].read_text() if module in modules else ""
        defined = re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)
        assert defined or f"{module}.{name} = " in settings or name == "py", f"{module}.{name}"
