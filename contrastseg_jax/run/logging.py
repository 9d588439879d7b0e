"""Logging to the terminal, with errors only from the libraries."""

import logging

import absl.logging

log = logging.getLogger("contrastseg_jax")
# These libraries log a traceback of errors that they also raise.
DUPLICATE_LOGGERS = ("orbax", "tensorstore", "asyncio")


def start_logging(process: int = 0) -> None:
    """Log to stderr; from libraries only errors, from processes other than 0 only warnings."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    for library in (absl.logging.get_absl_logger(), logging.getLogger("asyncio")):
        library.addFilter(_is_not_duplicate)
    handler = logging.StreamHandler()
    name = f"process {process}: " if process else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if process else logging.INFO)


def _is_not_duplicate(record: logging.LogRecord) -> bool:
    return not any(f"/{name}/" in record.pathname for name in DUPLICATE_LOGGERS)
