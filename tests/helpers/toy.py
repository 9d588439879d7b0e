"""Makes networks known that have all that training needs and compile fast: `toy`, `toy_ocr`."""

from functools import partial

from contrastseg_jax.models.backbones import resnet
from contrastseg_jax.models.heads.fcn import FCNHead
from contrastseg_jax.models.heads.ocr import OCRHead
from contrastseg_jax.models.zoo import NETWORKS, NetworkSpec

BACKBONE = resnet.backbone(resnet.ResNetSpec((1, 0, 0, 0), "basic"))
HEAD = partial(FCNHead, width=16)
NETWORKS["toy"] = NetworkSpec(BACKBONE, HEAD)
NETWORKS["toy_ocr"] = NetworkSpec(BACKBONE, OCRHead, aux_head=HEAD, aux_guides=True)
