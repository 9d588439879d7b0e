"""Programs compiled per argument shapes, on demand, and only if they fit into memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from contrastseg_jax.errors import InputError
from contrastseg_jax.parallel import device_memory

MAX_PROGRAMS = (
    32  # programs of a function; each takes 20 MB and more, and sizes of images may be thousands
)

Programs = Callable[..., jax.stages.Compiled]


def by_shape(function: Callable[..., Any], **settings: Any) -> Programs:
    """A compiler of a function for given arguments, arrays or shapes; keywords are static.

    The newest `MAX_PROGRAMS` programs are cached. `settings`: passed to `jax.jit`.

    Raises:
        InputError: (when called) the program needs more memory than is free.
    """
    kept: dict[Any, jax.stages.Compiled] = {}

    def program(*arguments: Any, **static: Any) -> jax.stages.Compiled:
        arrays, structure = jax.tree.flatten(arguments)
        shapes = [(x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in arrays]
        key = (structure, *shapes, *sorted(static.items()))
        if key not in kept:
            if len(kept) == MAX_PROGRAMS:
                del kept[next(iter(kept))]
            # With its own jit, as JAX keeps the compiled programs of a jit as long as it lives.
            jitted = jax.jit(functools.partial(function, **static), **settings)
            compiled = jitted.lower(*arguments).compile()
            require_memory(compiled)
            kept[key] = compiled
        return kept[key]

    return program


def run(programs: Programs, *arguments: Any, **static: Any) -> Any:
    """Run the program compiled for these arguments."""
    return programs(*arguments, **static)(*arguments)


def require_memory(program: jax.stages.Compiled) -> None:
    """Raise an InputError if a program needs more memory than a device has free."""
    memory, free = program.memory_analysis(), device_memory.free_bytes()
    if memory is None:  # not every backend knows
        return
    need = memory.argument_size_in_bytes + memory.output_size_in_bytes
    need += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    if need > free:
        raise InputError(f"needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")
