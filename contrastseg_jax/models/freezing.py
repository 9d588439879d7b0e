"""Frozen parts of a backbone: constants, of which there is neither gradient nor optimiser state."""

from typing import Any

import jax

from contrastseg_jax.models.segmenter import Segmenter


def trained(model: Segmenter, variables: Any) -> Any:
    """`params`, `batch_stats` or a tree of both, with None for each leaf that is frozen."""

    def keep(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _, is_inside, module = name.partition("backbone/")
        return None if is_inside and module.startswith(model.frozen) else leaf

    return jax.tree_util.tree_map_with_path(keep, variables)


def with_frozen(part: Any, whole: Any) -> Any:
    """What `trained` leaves of a tree, filled up with the frozen leaves of `whole`."""
    return jax.tree.map(lambda old, new: old if new is None else new, whole, part)
