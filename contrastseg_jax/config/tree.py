"""Configs as trees of settings with dotted paths."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

Config = Any  # a ConfigDict, whose settings have no types that a checker could see


def replaced(config: Config, settings: dict[str, Any]) -> Config:
    """A copy of the config with other values at some dotted paths."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(settings)
    return config.lock()


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its dotted path."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(path: str, known: Sequence[str] | dict[str, Any]) -> str:
    """ ", did you mean …?" or nothing; the last part of a path counts more than its group."""
    key, by_key = path.rpartition(".")[2], {name.rpartition(".")[2]: name for name in known}
    found = difflib.get_close_matches(path, known, n=1, cutoff=0.85)
    found = found or [by_key[k] for k in difflib.get_close_matches(key, by_key, n=1, cutoff=0.7)]
    if "." not in path:
        found = found or difflib.get_close_matches(path, known, n=1)
    return f", did you mean {found[0]}?" if found else ""
