"""Data sets, one file each; `dataset.BUILDERS` names them.

A file has `SPLITS`, the names of its splits; `label_map(spec)`, its classes and the mask values
that mean them; `split_config(spec, split)`, what there is of a split, with a `RecordBuilder` of its
own (`base.py`; its docstring describes the data set to TFDS); and, if it reads `data.root`,
`LAYOUT`, which error messages show. `pairs.py` and `folders.py` find images and masks.
"""
