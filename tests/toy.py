"""Makes a network known that has all that training needs and compiles fast: `toy`."""

from functools import partial

from contrastseg_jax.models.heads import FCNHead
from contrastseg_jax.models.resnet import ResNetSpec
from contrastseg_jax.models.segmenter import NETWORKS, NetworkSpec

NETWORKS["toy"] = NetworkSpec(ResNetSpec((1, 0, 0, 0), "basic"), partial(FCNHead, width=16))
