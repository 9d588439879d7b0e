"""PASCAL-Context (4998 / 5105 images of about 500x375, 59 classes without background).

    python main.py --config=configs/pascal_context.py:hrnet_w48,memory --workdir=runs/context \
        --config.data.root=VOC2010 --config.model.init_from=weights/hrnet_w48_imagenet
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_w48,memory") -> Config:
    """The original's settings for PASCAL-Context, where it has them; contrast as by default."""
    config = default.get_config(spec)
    config.data.name = "pascal_context"
    config.data.short_side = 520  # original: pascal_context/H_48_D_4
    config.augment.crop_size = (520, 520)  # original: pascal_context/H_48_D_4
    config.contrast.anchors_per_image = 512  # original: 1024 for the 2 images of a GPU
    config.memory.segment_size = 4998  # paper: the number of training images
    config.memory.pixel_size = 49_980  # paper: ten times that; the bank takes 3322 MB
    config.optim.learning_rate = 0.001  # original: pascal_context/H_48_D_4
    config.optim.head_lr_multiplier = 10.0  # original: scripts/pascal_context
    config.optim.weight_decay = 1e-4  # original: pascal_context/H_48_D_4
    config.train.batch_size = 16  # original: scripts/pascal_context
    config.train.num_steps = 60_000  # original: scripts/pascal_context
    config.train.eval_steps = 5000  # original: pascal_context/H_48_D_4
    config.eval.pad_multiple = 128  # images have many sizes: few to compile
    return config
