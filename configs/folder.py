"""Your own images: images/{train,val}/ and labels/{train,val}/ below one folder.

    python main.py --config=configs/folder.py:hrnet_w18_small,memory --config.data.root=FOLDER \
        "--config.data.class_names=('background', 'road', 'tree')" --workdir=runs/mine

A mask is a PNG with one channel; its values number the classes in the order of class_names, and
data.ignore_values (255) are no class; masks in colours, or of 0 and 255, are read by
data.mask_encoding. Without val, --config.data.val_fraction=0.1 draws one. Copy this file to keep
settings of your own.
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_w18_small,memory") -> Config:
    """Moderate settings for one GPU and a few hundred to a few thousand images."""
    config = default.get_config(spec)
    config.data.name = "folder"
    config.augment.crop_size = (512, 512)
    config.contrast.warmup_steps = 1000
    config.memory.pixel_size = 2000
    config.memory.segment_size = 500
    config.train.num_steps = 10_000
    config.train.eval_steps = 500
    return config
