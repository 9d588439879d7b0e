"""A resolved config: the objects that training and evaluation are given."""

from dataclasses import dataclass

from jax.sharding import Mesh

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.data.preprocess import Preprocessing
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.objectives.objective import Objective
from contrastseg_jax.structs import ImageFormat


@dataclass(frozen=True)
class Setup:
    """A config with the objects it describes; built by `resolve.resolve`."""

    config: Config
    data: DatasetSpec
    classes: LabelMap
    image_format: ImageFormat
    preprocessing: Preprocessing
    model: Segmenter
    objective: Objective | None  # None: cross entropy alone
    mesh: Mesh
