"""What is known of weights besides their values."""

from dataclasses import dataclass

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.dataset import dataset_spec, label_map
from contrastseg_jax.structs import IMAGENET, ImageFormat


@dataclass(frozen=True)
class Weights:
    """The description of weights that training may start from."""

    networks: tuple[str, ...]  # one, or for a backbone alone, all that share it
    num_classes: int  # 0: no head
    proj_dim: int  # 0: no projection head
    class_names: tuple[str, ...]  # in the order of the logits; empty: not known
    image_format: ImageFormat
    source: str  # name of the file or run that they come from
    sha256: str  # of that file; empty: from a run


def class_names(config: Config) -> tuple[str, ...]:
    """The classes of a config's data set, in the order of their ids."""
    return label_map(dataset_spec(config)).names


def image_format(config: Config) -> ImageFormat:
    """The network's image format; ImageNet's for settings that the config leaves unset."""
    net = config.model
    return ImageFormat(
        mean=net.image_mean or IMAGENET.mean,
        std=net.image_std or IMAGENET.std,
        channel_order=net.channel_order or IMAGENET.channel_order,
    )
