"""A small HRNet on the embedded land cover photographs, for two CPU cores and a few minutes.

python main.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from contrastseg_jax.config import default
from contrastseg_jax.config.tree import Config


def get_config(spec: str = "hrnet_tiny,memory") -> Config:
    """The default config, made small."""
    config = default.get_config(spec)
    config.data.name = "landcover"
    config.data.cache_size = 27  # all of them
    config.data.num_threads = 2
    # Many small crops rather than few large ones: each step sees more of the Earth.
    config.augment.crop_size = (64, 64)
    config.train.batch_size = 32
    config.model.proj_dim = 64
    # Share of the class to the power of -1/3, with a mean of 1 over the training pixels.
    config.loss.class_weights = (0.70, 1.35, 1.66, 1.26, 1.30, 1.62, 3.62, 1.56)
    config.contrast.warmup_steps = 100
    config.memory.pixel_size = 400
    config.memory.segment_size = 50
    config.optim.learning_rate = 0.1
    config.optim.ema_decay = 0.98  # statistics of small crops are noisy: evaluate with averages
    config.train.num_steps = 600
    config.train.log_steps = 50
    config.train.eval_steps = 200
    config.train.checkpoint_steps = 200
    config.eval.batch_size = 1
    return config
