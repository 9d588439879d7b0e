"""CamVid street scenes (SegNet's split: 367 / 101 / 233 images of 480x360, 11 classes).

    python main.py --config=configs/camvid.py:hrnet_w18_small,memory --config.data.root=CAMVID \
        --workdir=runs/camvid

For the original's images of 960x720 add --config.data.short_side=360, or raise the crop.
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_w48,memory") -> Config:
    """The original's settings for CamVid, where it has any; it has no script."""
    config = default.get_config(spec)
    config.data.name = "camvid"
    config.augment.crop_size = (360, 480)  # original: camvid/H_48_D_4_MEM
    config.contrast.anchors_per_image = 512  # original: 1024 for the 2 images of a GPU
    config.contrast.warmup_steps = 3000  # original: camvid/H_48_D_4_MEM
    config.memory.segment_size = 367  # paper: the number of training images
    config.memory.pixel_size = 3670  # paper: ten times that; the bank takes 45 MB
    config.optim.learning_rate = 0.01  # original: camvid/H_48_D_4_MEM
    config.optim.weight_decay = 5e-4  # original: camvid/H_48_D_4_MEM
    config.train.batch_size = 16  # original: camvid/H_48_D_4_MEM
    config.train.num_steps = 40_000  # original: camvid/H_48_D_4_MEM
    config.train.eval_steps = 1000  # original: camvid/H_48_D_4_MEM
    config.eval.pad_multiple = 8  # 360 and 480 are: no padding
    return config
