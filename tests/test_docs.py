"""What the documents name exists, and their commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
from absl.testing import flagsaver
from paths import ROOT

from contrastseg_jax import cli
from contrastseg_jax.config.load import load_config
from contrastseg_jax.config.rules import broken_rules
from contrastseg_jax.data.dataset import dataset_names
from contrastseg_jax.models.zoo import model_names

COMMAND = re.compile(
    r"(?:python (?=main|benchmarks)|^(?=contrastseg ))"
    r"((?:main\.py|benchmarks/\w+\.py|contrastseg)[^\n`;#]*(?:(?<=\\)\n[^\n`;#]*)*)",
    re.MULTILINE,
)


def commands():
    """Program and arguments of each call that documents, configs or programs show, once."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "contrastseg_jax" / "cli.py"]
    for path in (*files, *(ROOT / "configs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        for text in COMMAND.findall(path.read_text()):
            if text.count('"') % 2:  # the call stands in quotes itself
                text = text.rpartition('"')[0]
            if "=…" in text or "=MODE" in text:
                continue
            for shown, meant in (("\\\n", " "), ("$t", "0.1"), (", …", "")):
                text = text.replace(shown, meant)
            yield tuple(shlex.split(text))


@pytest.mark.parametrize("command", sorted(set(commands())), ids=" ".join)
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = command
    if program.startswith("benchmarks"):
        defined = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", Path(program).read_text())
        assert {text[2:].partition("=")[0] for text in arguments} <= {*defined}
        return
    monkeypatch.setattr(cli, "require_places", lambda _: None)  # made-up ones
    settings = [text.removeprefix(cli.SETTING) for text in arguments if cli.SETTING in text]
    with flagsaver.flagsaver():
        flags = [text for text in arguments if cli.SETTING not in text]
        assert cli.FLAGS([program, *flags]) == [program]
        understood = cli.read_arguments(settings)
        if understood.config:
            config = load_config(understood.config, settings)
            choices = {"model.name": model_names(), "data.name": dataset_names()}
            problems = broken_rules(config, choices=choices, num_devices=1)
            assert problems == [] or understood.mode == "plan"  # which needs no data


def test_there_are_such_commands():
    found = set(commands())
    programs = {program for program, *_ in found}
    assert len(found) > 30 and len(programs) > 5 and "contrastseg" in programs


def anchors_of(path):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in kept}


def test_every_link_leads_to_a_file_and_a_heading():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(path), f"{page.name}: {target}"
            found += 1
    assert found > 30


def test_the_front_page_fits_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text


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
            assert f"def {test}(" in next((ROOT / "tests").rglob(file)).read_text(), (
                f"{file}::{test}"
            )


def test_every_function_and_setting_of_the_method_exists():
    text = (ROOT / "docs" / "method.md").read_text()
    modules = {path.stem: path for path in (ROOT / "contrastseg_jax").rglob("*.py")}
    settings = (ROOT / "contrastseg_jax" / "config" / "default.py").read_text()
    named = re.findall(r"`(?:\w+/)?(\w+)\.([A-Za-z]\w+)\b", text)
    assert len(named) > 20
    for module, name in named:
        source = modules[module].read_text() if module in modules else ""
        defined = re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)
        assert defined or f"{module}.{name} = " in settings or name == "py", f"{module}.{name}"
