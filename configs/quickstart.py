"""A small HRNet on the embedded land cover photographs, for two CPU cores and a few minutes.

python main.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import default
from contrastseg_jax.config import Config


def get_config(spec: str = "hrnet_tiny,memory") -> Config:
    """The default config, made small."""
    config = default.get_config(spec)
    config.data.name = "landcover"
    config.data.num_threads = 2
    config.augment.crop_size = (128, 128)
    # About 1 / log(1.1 + share of the class), scaled to a mean of 1 over the training pixels.
    config.loss.class_weights = (0.5, 1.5, 1.9, 1.4, 1.4, 1.8, 2.5, 1.8)
    config.contrast.anchors_per_image = 64
    config.contrast.warmup_steps = 100
    config.memory.pixel_size = 200
    config.memory.segment_size = 50
    config.optim.learning_rate = 0.05
    config.train.num_steps = 400
    config.train.log_steps = 20
    config.train.eval_steps = 200
    config.train.checkpoint_steps = 200
    config.eval.batch_size = 1
    return config
