"""ADE20K scene parsing: the 150 classes of the MIT challenge of 2016 (ADEChallengeData2016)."""

from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, pairs_config
from contrastseg_jax.data.builders.folders import match_folders
from contrastseg_jax.data.labels import default_palette, split_names
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """images/training/ images/validation/ (train, val) with *.jpg, annotations/training/
annotations/validation/ with *.png of the same names"""
FOLDERS = {
    "train": ("images/training", "annotations/training"),
    "val": ("images/validation", "annotations/validation"),
}
SPLITS = tuple(FOLDERS)
OTHER = 0  # mask value of pixels of no class
# The first of each class's names in objectInfo150.txt, in its order.
CLASSES = split_names(
    """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain,
conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent,
bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle,
lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
)


class Ade20k(RecordBuilder):
    """ADE20K (Zhou et al., 2017), 150 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Mask value v is class v - 1; 0 is ignored, as in the challenge.

    The colours are our own: two classes of the official palette share one.
    """
    train_ids = {value: value - 1 for value in range(1, len(CLASSES) + 1)} | {OTHER: IGNORE_LABEL}
    return LabelMap(CLASSES, default_palette(len(CLASSES)), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`."""
    return pairs_config(Ade20k, spec, split, match_folders(spec, FOLDERS, split), label_map(spec))
