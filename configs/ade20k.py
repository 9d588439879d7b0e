"""ADE20K scene parsing (20,210 / 2000 images of many sizes, 150 classes).

    python main.py --config=configs/ade20k.py:hrnet_w48,memory --workdir=runs/ade20k \
        --config.data.root=ADEChallengeData2016 \
        --config.model.init_from=weights/hrnet_w48_imagenet
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_w48,memory") -> Config:
    """The original's settings for ADE20K, which has no contrast; the paper does not use it."""
    config = default.get_config(spec)
    config.data.name = "ade20k"
    config.data.short_side = 520  # original: ade20k/H_48_D_4
    config.augment.crop_size = (520, 520)  # original: ade20k/H_48_D_4
    config.contrast.anchors_per_image = 512  # original: 1024 for the 2 images of a GPU
    # The paper's rule, 20,210 and 202,100 slots, would take 34,147 MB.
    config.memory.segment_size = 5000  # original: Cityscapes' bank
    config.memory.pixel_size = 5000  # original: Cityscapes' bank; both queues take 1536 MB
    config.optim.learning_rate = 0.02  # original: ade20k/H_48_D_4
    config.optim.weight_decay = 1e-4  # original: ade20k/H_48_D_4
    config.train.batch_size = 16  # original: ade20k/H_48_D_4
    config.train.num_steps = 150_000  # original: ade20k/H_48_D_4
    config.train.eval_steps = 10_000  # openseg, which the original is built on: ade20k/H_48_D_4
    config.eval.pad_multiple = 128  # images have many sizes: few to compile
    return config
