"""Cityscapes (2975 / 500 images of 2048x1024, 19 classes).

    python main.py --config=configs/cityscapes.py:hrnet_w48,memory --workdir=runs/cityscapes \
        --config.data.root=CITYSCAPES --config.model.init_from=weights/hrnet_w48_imagenet

The temperature study of the original's README (HRNet-W48, contrast inside the batch):

    for t in 0.05 0.07 0.10 0.20 0.30 0.40; do python main.py --workdir=runs/temperature_$t \
        --config=configs/cityscapes.py:hrnet_w48,contrast --config.data.root=CITYSCAPES \
        --config.model.init_from=weights/hrnet_w48_imagenet --config.contrast.temperature=$t; done
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_w48,memory") -> Config:
    """The original's settings for Cityscapes; so are the defaults, which have the rest."""
    config = default.get_config(spec)
    config.data.name = "cityscapes"
    config.augment.crop_size = (512, 1024)  # original: cityscapes/H_48_D_4
    config.loss.class_weights = (  # original: cityscapes/H_48_D_4
        *(0.8373, 0.9180, 0.8660, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
        *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
    )
    config.loss.aux_weight = 0.4  # original: cityscapes/H_48_D_4
    config.contrast.anchors_per_image = 512  # original: 1024 for the 2 images of a GPU
    config.contrast.loss_weight = 0.1  # original: cityscapes/H_48_D_4
    config.contrast.warmup_steps = 5000  # original: cityscapes/H_48_D_4
    config.memory.segment_size = 2975  # paper: the number of training images
    config.memory.pixel_size = 29_750  # paper: ten times that; the bank takes 637 MB
    config.optim.learning_rate = 0.01  # original: cityscapes/H_48_D_4
    config.optim.weight_decay = 5e-4  # original: cityscapes/H_48_D_4
    config.train.batch_size = 8  # original: scripts/cityscapes
    config.train.num_steps = 40_000  # original: cityscapes/H_48_D_4
    config.train.eval_steps = 1000  # original: cityscapes/H_48_D_4
    return config
