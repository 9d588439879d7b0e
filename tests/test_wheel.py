"""The package as an installation has it: the wheel, its program, and what importing it gives."""

import ast
import email
import json
import os
import subprocess
import sys

import program
import pytest
from paths import ROOT

import contrastseg_jax

pytestmark = pytest.mark.slow

SETTINGS = (
    "augment.crop_size=(32, 32)",
    "train.batch_size=4",
    "train.num_steps=2",
    "train.log_steps=1",
    "eval.num_pictures=1",
    "data.short_side=64",
)


def python(*arguments, path, folder):
    """What Python prints in a folder, with a package to import from elsewhere."""
    environment = program.environment() | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=program.TIMEOUT,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel is installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-index"]
    build = [*pip, "wheel", *options, "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run(build, check=True, timeout=program.TIMEOUT)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    install = [*pip, "install", *options, f"--target={target}", str(wheel)]
    subprocess.run(install, check=True, timeout=program.TIMEOUT)
    return target


def test_the_wheel_has_all_that_is_read_and_building_it_leaves_nothing(installed):
    package = installed / "contrastseg_jax"
    recipes = {path.name: path.read_text() for path in (ROOT / "configs").glob("*.py")}
    assert {path.name: path.read_text() for path in (package / "recipes").glob("*.py")} == recipes
    kept = {".py", ".jpg", ".png", ".md", ".typed"}
    for path in (ROOT / "contrastseg_jax").rglob("*"):
        if path.suffix in kept:
            name = path.relative_to(ROOT / "contrastseg_jax")
            assert (package / name).read_bytes() == path.read_bytes()
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert email.message_from_string(metadata.read_text())["Version"] == contrastseg_jax.__version__
    assert not [name for name in ("build", "dist") if (ROOT / name).exists()]
    assert not [*ROOT.glob("*.egg-info")]


def test_an_installed_program_trains_a_recipe_from_any_folder(installed, tmp_path):
    where = {"path": [installed], "folder": tmp_path}
    source = python("-c", "from contrastseg_jax import cli; print(cli.__file__)", **where)
    assert source.strip() == str(installed / "contrastseg_jax" / "cli.py")
    settings = [f"--config.{text}" for text in (*SETTINGS, "data.prepared_dir=prepared")]
    flags = ["--config=quickstart:fcn_r18,ce", "--workdir=run", *settings]
    python(installed / "bin" / "contrastseg", *flags, **where)
    assert program.logged_steps(tmp_path / "run") == [1, 2]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["name"] == "landcover"
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"prepared", "run"}


def test_importing_the_package_imports_nothing_else(tmp_path):
    code = "import sys; old = {*sys.modules}; import contrastseg_jax; print(*{*sys.modules} - old)"
    names = python("-c", code, path=[ROOT], folder=tmp_path).split()
    assert {name.partition(".")[0] for name in names} <= {
        "contrastseg_jax",
        *sys.stdlib_module_names,
    }
    assert [name for name in names if name.startswith("contrastseg_jax")] == ["contrastseg_jax"]


# What programs that train, read data or write files import.
HEAVY = {"matplotlib", "tensorflow_datasets", "orbax", "grain", "ml_collections", "cv2"}
HEAVY |= {"tensorboardX", "skimage", "sklearn"}


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (
            "contrast_step pixel_contrast_loss sample_anchors enqueue label_at_stride TrainState",
            HEAVY | {"optax"},
        ),
        ("cross_entropy ohem focal lovasz rmi dice", HEAVY),
        ("build_model", HEAVY),
    ],
    ids=["method", "losses", "networks"],
)
def test_names_bring_no_data_set_checkpoint_or_plot_along(names, absent, tmp_path):
    used = ", ".join(f"c.{name}" for name in names.split())
    code = f"import sys, contrastseg_jax as c; {used}; print(*sys.modules)"
    found = {
        name.partition(".")[0] for name in python("-c", code, path=[ROOT], folder=tmp_path).split()
    }
    assert "jax" in found
    assert not found & absent


def test_public_names_are_those_that_type_checkers_see():
    source = (ROOT / "contrastseg_jax" / "__init__.py").read_text()
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    for_checkers = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert len(for_checkers) == len(block.body)
    for name, module in for_checkers.items():
        value = getattr(contrastseg_jax, name)
        assert value is getattr(sys.modules[module], name)
        assert value.__module__ == module and name in dir(contrastseg_jax)
    assert contrastseg_jax._MODULES.keys() == for_checkers.keys()
    with pytest.raises(AttributeError, match="'contrastseg_jax' has no attribute 'nothing'"):
        _ = contrastseg_jax.nothing
