"""Audits of a folder's data set, and what preparing says of the same."""

import json

from small import make_config

from contrastseg_jax.data.audit import report
from contrastseg_jax.data.dataset import dataset_spec, open_splits
from contrastseg_jax.errors import InputError

NAMES = ("sky", "road", "tree")


def settings(root, class_names=NAMES, ignore_values=(255,)):
    return (
        "data.name=folder",
        f"data.root={root}",
        f"data.class_names={class_names}",
        f"data.ignore_values={ignore_values}",
        f"data.prepared_dir={root.parent / 'prepared'}",
    )


def folder_spec(root, *overrides):
    return dataset_spec(make_config(*settings(root), *overrides))


def run(root, *overrides, split=None, **changed):
    """What `audit.json` has; the error, if any, must be the summary's."""
    config = make_config(*settings(root, **changed), *overrides)
    workdir = root.parent / "run"
    try:
        report.audit_run(config, workdir, split)
        failed = False
    except InputError as error:
        assert "training would go wrong" in str(error)
        failed = True
    results = json.loads((workdir / "audit" / "audit.json").read_text())
    assert failed == (results["num_errors"] > 0)
    assert not (root.parent / "prepared").exists()
    assert [path.name for path in workdir.iterdir()] == ["audit"]
    return results


def prepare(root, *overrides):
    """The records to train on, prepared as training does."""
    return open_splits(folder_spec(root, *overrides), ("train", "val"))[0]
