"""A resolved config: the objects that training and evaluation are given."""

from dataclasses import dataclass

from jax.sharding import Mesh

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.spec import DatasetSpec, LabelMap, Preprocessing
from contrastseg_jax.losses.segmentation import Term
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
    class_weights: tuple[float, ...]  # of the terms that have any; empty: all 1
    terms: tuple[Term, ...]  # of the segmentation loss
    objective: Objective | None  # beside it; None: nothing
    mesh: Mesh
