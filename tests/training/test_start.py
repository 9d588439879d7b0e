"""What a run begins with."""

import logging

import numpy as np
from small import make_config, setup_of

from contrastseg_jax.data.class_weights import ClassCounts, enet_weights
from contrastseg_jax.data.preprocess import open_example
from contrastseg_jax.training.start import open_data, weigh_classes


def test_class_weights_are_those_of_the_training_images(tmp_path, caplog):
    terms = "loss.terms.ohem=0.5", "loss.terms.dice=2", "loss.ohem.min_kept=9"
    config = make_config(
        *terms, "loss.class_weighting=enet", f"data.prepared_dir={tmp_path}", "data.train_subset=4"
    )
    setup = setup_of(config)
    source = open_data(setup).source
    with caplog.at_level(logging.INFO, logger="contrastseg_jax"):
        found = weigh_classes(setup, source).terms
    assert [(term.name, term.weight) for term in found] == [
        ("cross_entropy", 1.0),
        ("ohem", 0.5),
        ("dice", 2.0),
    ]
    labels = [open_example(record, setup.preprocessing).label for record in source]
    pixels = np.array([sum((label == c).sum() for label in labels) for c in range(3)])
    weights = enet_weights(ClassCounts(pixels, pixels))
    cross_entropy, ohem, dice = (term.loss.keywords for term in found)
    np.testing.assert_allclose(cross_entropy["class_weights"], weights, rtol=1e-3)
    assert ohem["class_weights"] == cross_entropy["class_weights"] and ohem["min_kept"] == 9
    assert dice == {"smooth": 0.0}
    names = setup.classes.names
    said = ", ".join(f"{n} {w:.4g}" for n, w in zip(names, weights, strict=True))
    assert f"class weights by enet of 4 training images: {said}" in caplog.text
