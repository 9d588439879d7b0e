"""Loading and overriding configs. No JAX here."""

import ast
import importlib.util
import json
import os
import sys
import traceback
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from contrastseg_jax.config import default, palette
from contrastseg_jax.config.checks import is_number, is_text
from contrastseg_jax.config.rules import COLORS, FOLDERS, LEFT_OPEN, broken_rules
from contrastseg_jax.config.tree import Config, leaves, nearest, replaced
from contrastseg_jax.errors import InputError, listed

PACKAGE = Path(__file__).parents[1]
# An installed package holds the recipes; in a checkout they lie beside it.
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "configs"


def load_config(name_and_spec: str, overrides: Sequence[str] = ()) -> Config:
    """The config of "RECIPE[:SPEC]" or "FILE.py[:SPEC]", with overrides: "train.batch_size=4"."""
    name, _, spec = name_and_spec.partition(":")
    path = config_file(name)
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config={name}: must be a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(spec) if spec else module.get_config()
    except Exception as error:  # a config file is a program of the user's
        # ConfigDict wraps its message, which names the nearest key, in quotes and newlines.
        message = str(error).replace("\\n", " ").replace("\\'", "'")
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == module_spec.origin]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise InputError(f"--config={name_and_spec}: {message} ({where})") from error
    return override(config, overrides)


def config_file(name: str) -> Path:
    """The file that --config names: one of the user's, FILE.py, or that of a recipe."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InputError(f"--config={name}: no such file")
        return Path(name)
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.py"))}
    if name not in recipes:
        raise InputError(
            f"--config={name}: no such recipe{nearest(name, recipes)}"
            f" (recipes: {', '.join(recipes)}; or a file of your own, FILE.py)"
        )
    return recipes[name]


def schema() -> Config:
    """Every setting with its default."""
    return default.get_config()


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of the config with "PATH=VALUE" settings applied; all bad ones in one error."""
    known = dict(leaves(config))
    problems: dict[str, str] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            problems[path] = f"{path}: write it as --config.{path}=VALUE"
        elif path not in known:
            problems[path] = f"{path}: no such setting{nearest(path, known)}"
        else:
            default = () if path in COLORS else known[path]  # colours come in several types
            try:
                known[path] = _typed(_parsed(value, path, default), default)
            except TypeError as error:
                problems[path] = f"{path} = {value}: {error}"
    if palette.is_file(known["data.palette"]):
        (file,), names = known["data.palette"], known["data.class_names"]
        try:
            known |= palette.settings_of_file(file, names, known["data.ignore_colors"])
        except InputError as error:
            problems["data.palette"] = str(error)
    config = replaced(config, _located(known))
    if problems:
        broken = broken_rules(config, choices={}, num_devices=1)
        others = [line for line in broken if line.partition(" = ")[0] not in problems]
        raise listed("the config", [*problems.values(), *others])
    return config


def inherit_image_format(config: Config, run: Config) -> Config:
    """The config, with the image format settings it leaves unset taken from the run's config."""
    settings, found = dict(leaves(config)), dict(leaves(run))
    return replaced(config, {path: settings[path] or found[path] for path in LEFT_OPEN})


def _located(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by path, with folders, names and colours as whoever compares them needs them."""
    paths = {path: settings[path] for path in FOLDERS if is_text(settings[path])}  # else: a rule
    paths = {path: os.path.expanduser(value) for path, value in paths.items()}
    images = paths.get("data.train_subset", "")
    if images and not is_number(images):
        paths["data.train_subset"] = os.path.realpath(images)
    weights = paths.get("model.init_from", "")
    if weights and "://" not in weights:  # those of a run, from wherever it is started again
        paths["model.init_from"] = os.path.realpath(weights)
    names = tuple(  # letters with accents come in one character or in two
        unicodedata.normalize("NFC", name) if isinstance(name, str) else name
        for name in settings["data.class_names"]
    )
    colors = {path: tuple(map(palette.normalized, settings[path])) for path in COLORS}
    return settings | paths | colors | {"data.class_names": names}


def to_json(config: Config) -> str:
    """The config as JSON, as `config.json` of a workdir holds it."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """A config read back; `source` is the file that errors name.

    A setting that came after the file was written has its default.
    """
    default = schema()
    try:
        stored = dict(leaves(ConfigDict(json.loads(text))))
    except (ValueError, TypeError) as error:
        raise InputError(f"{source}: not a config ({error})") from error
    known = dict(leaves(default))
    unknown = sorted(stored.keys() - known)
    problems = [f"{path}: no such setting{nearest(path, known)}" for path in unknown]
    for path in sorted(known.keys() & stored):
        try:
            known[path] = _typed(stored[path], known[path])
        except TypeError as error:
            problems.append(f"{path} = {stored[path]!r}: {error}")
    if problems:
        raise listed(source, problems)
    return replaced(default, _located(known))


def _parsed(text: str, path: str, default: Any) -> Any:
    """A command line's text as a Python value; plain text where the setting is a string."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return (text,) if path == "data.palette" else text  # its file


def _typed(value: Any, default: Any) -> Any:
    """The value in the type of the default; whole numbers are fractions too, lists tuples."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        kinds = {type(item) for item in default}
        if float in kinds:
            return tuple(_typed(item, 0.0) for item in value)
        return tuple(_typed(item, default[0]) if default else item for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise TypeError(f"must be a number of at most {sys.float_info.max:.2g}")
        return float(value)
    if type(value) is not type(default):
        kind = {
            tuple: "tuple, e.g. (1, 2) or ('a', 'b')",
            bool: "truth value, True or False",
            int: "whole number",
            float: "number",
            str: "string",
        }
        raise TypeError(f"must be a {kind[type(default)]}")
    return value
