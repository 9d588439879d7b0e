"""What a config means, resolved once: what programs are handed instead of its names."""

from dataclasses import dataclass

from jax.sharding import Mesh

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.spec import DatasetSpec, LabelMap, Preprocessing
from contrastseg_jax.losses.segmentation import PixelLoss
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.structs import ImageFormat


@dataclass(frozen=True)
class Setup:
    """A config with what it names; `resolve.resolve` makes it."""

    config: Config
    data: DatasetSpec
    classes: LabelMap
    image_format: ImageFormat
    preprocessing: Preprocessing
    model: Segmenter
    pixel_loss: PixelLoss
    objective: Objective | None  # beside it; None: nothing
    mesh: Mesh
