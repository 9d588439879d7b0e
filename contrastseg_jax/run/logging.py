"""Messages: on the terminal, and of the libraries only what is wrong."""

import logging

import absl.logging

log = logging.getLogger("contrastseg_jax")
# What these libraries log of an error is its traceback, and they raise it as well.
DUPLICATE_LOGGERS = ("orbax", "tensorstore", "asyncio")


def start_logging(process: int = 0) -> None:
    """Plain lines on standard error; of the libraries, and of processes but 0, what is wrong."""
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
