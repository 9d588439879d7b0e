"""JAX's persistent compilation cache."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax

from contrastseg_jax.config.tree import Config
from contrastseg_jax.run.logging import log


def set_compilation_cache(config: Config, workdir: Path | None) -> None:
    """Use the cache folder of the environment or the config, by default one in the workdir."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or config.parallel.compilation_cache
    if not folder and workdir:
        folder = str(workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)
    _shorten_warnings(folder)


def _shorten_warnings(folder: str) -> None:
    """Log only the first of JAX's warnings, of one per program it cannot read or write."""
    show, logged = warnings.showwarning, False

    def show_or_log(message: Warning | str, *details: Any) -> None:
        nonlocal logged
        text = str(message)
        if "persistent compilation cache entry" not in text:
            show(message, *details)
        elif not logged:
            logged = True
            reason = text.partition(": ")[2]
            log.warning(f"{folder}: the compilation cache cannot be read or written ({reason})")

    warnings.showwarning = show_or_log
