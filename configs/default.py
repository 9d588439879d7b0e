"""The schema, `contrastseg_jax/config/default.py`, as a config of its own; for copies too.

python main.py --config=configs/default.py:hrnet_w48,memory --workdir=runs/mine \
    --config.data.root=FOLDER "--config.data.class_names=('road', 'tree')"
"""

from contrastseg_jax.config.default import get_config

__all__ = ["get_config"]
