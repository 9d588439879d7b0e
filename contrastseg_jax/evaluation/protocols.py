"""How the logits of an image come from those of a network: of one pass, or of several combined.

Logits are combined at the network's stride: an array of image size times classes never exists.
"""

from collections.abc import Callable

from jaxtyping import Array, Float, UInt8

Images = UInt8[Array, "b h w 3"]
Logits = Float[Array, "b hs ws k"]
Network = Callable[[Images], Logits]  # of images of any size
Protocol = Callable[[Network, Images], Logits]  # pure; the stride is that of the network


def whole_image(network: Network, image: Images) -> Logits:
    """One pass over the image as it is."""
    return network(image)
