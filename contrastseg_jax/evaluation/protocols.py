"""Evaluation protocols: the logits of an image, from one or several passes of the network.

Logits are combined at the network's stride; full-size logits are never materialised.
"""

import functools
from collections.abc import Callable

from jaxtyping import Array, Float, UInt8

Images = UInt8[Array, "b h w 3"]
Logits = Float[Array, "b hs ws k"]
Network = Callable[[Images], Logits]  # of images of any size
Protocol = Callable[[Network, Images], Logits]  # pure; at the network's stride


def whole_image(network: Network, image: Images) -> Logits:
    """One pass over the image as it is."""
    return network(image)


def protocol_name(protocol: Protocol) -> str:
    """The protocol's function with the settings bound to it, as evaluations record it."""
    if isinstance(protocol, functools.partial):
        values = (*map(repr, protocol.args), *(f"{k}={v!r}" for k, v in protocol.keywords.items()))
        return f"{protocol_name(protocol.func)}({', '.join(values)})"
    return getattr(protocol, "__name__", type(protocol).__name__)
