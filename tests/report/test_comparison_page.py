"""What the files of a comparison say and show."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from contrastseg_jax.report.comparison import Arm, ArmCounts, compare
from contrastseg_jax.report.comparison_page import (
    NAMES,
    markdown,
    markdown_table,
    page,
    save_comparison,
)
from contrastseg_jax.report.comparison_tables import Evaluated, Table

NAMES_OF_CLASSES = ("road", "_tree_", "a|b <script>", "nowhere")
EVALUATED = Evaluated("my|data", "val", "best", ("A note on <seeds>.",))


@pytest.fixture(scope="module")
def compared():
    rng = np.random.default_rng(0)
    labelled = rng.integers(50, 100, size=(5, 4)) * [[8, 3, 1, 0]]
    arms, counts = [], []
    for name, seeds in (("base $x$", (0, 1)), ("other", (0, 1, 2)), ("single", (1,))):
        hit = (labelled * rng.random((len(seeds), *labelled.shape))).astype(int)
        counts.append(ArmCounts(hit, hit + rng.integers(20, size=hit.shape) * (labelled > 0)))
        curves = tuple([(100, rng.random()), (200, rng.random())] for _ in seeds)
        workdirs = tuple(f"runs/{name}_{seed}" for seed in seeds)
        settings = {"contrast.loss_weight": len(arms), "model.name": name}
        arms.append(Arm(name, settings, workdirs, seeds, (200,) * len(seeds), curves))
    return compare(arms, counts, labelled, NAMES_OF_CLASSES, num_resamples=100)


def without_curves(comparison):
    arms = [
        dataclasses.replace(
            arm,
            learning_curve=type(arm.learning_curve)(np.array([], np.int64), *[np.array([])] * 3),
        )
        for arm in comparison.arms
    ]
    return dataclasses.replace(comparison, arms=tuple(arms))


def test_three_files_are_written(compared, tmp_path):
    save_comparison(tmp_path / "new" / "folder", compared, EVALUATED)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {*NAMES}


def test_json_has_every_figure_by_name(compared, tmp_path):
    save_comparison(tmp_path, compared, EVALUATED)
    text = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in text
    values = json.loads(text)
    assert values["baseline"] == "base $x$" and values["rarest"] == ["a|b <script>"]
    assert values["labelled_pixels"]["nowhere"] == 0
    assert [arm["seeds"] for arm in values["arms"]] == [[0, 1], [0, 1, 2], [1]]
    for arm, found in zip(values["arms"], compared.arms, strict=True):
        assert arm["mean"]["mean_iou"] == pytest.approx(found.mean[0])
        assert arm["mean"]["iou"]["road"] == pytest.approx(found.mean[3])
        assert arm["by_seed"]["pixel_accuracy"] == pytest.approx(found.scores[:, 1].tolist())
        assert arm["learning_curve"]["steps"] == [100, 200]
    assert values["arms"][2]["std"]["mean_iou"] is None
    other, single = values["differences"]
    assert other["seeds"] == [0, 1] and single["seeds"] == [1]
    interval = compared.differences[0].seed_interval[:, 2].tolist()
    assert other["seed_interval"]["rarest_mean_iou"] == pytest.approx(interval)
    assert single["seed_interval"]["iou"]["road"] == [None, None]
    assert single["image_interval"]["iou"]["nowhere"] == [None, None]


def rows_of(text):
    """The cells of each row of Markdown tables."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]


def test_markdown_has_a_row_for_every_figure(compared):
    text = markdown(compared, EVALUATED)
    rows = [[cell.strip() for cell in row] for row in rows_of(text)]
    base, difference = compared.arms[0], compared.differences[0]
    assert ["base $x$", "2", *(f"{base.mean[i]:.4f} ± {base.std[i]:.4f}" for i in range(3))] in rows
    bounds = [
        f"{low:+.4f} to {high:+.4f}"
        for low, high in (difference.seed_interval[:, 0], difference.image_interval[:, 0])
    ]
    assert ["other", "mIoU", "2", f"{difference.mean[0]:+.4f}", *bounds] in rows
    (single,) = [row for row in rows if row[:2] == ["single", "mIoU"]]
    assert single[4] == "–" and single[5] != "–"
    assert ["nowhere", "0.00%", "–", "–", "–"] in rows
    assert ["contrast.loss_weight", "0", "1", "2"] in rows
    rarest = text.index("## The rarest classes: IoU"), text.index("## All classes: IoU")
    assert text[slice(*rarest)].count("a\\|b &lt;script&gt;") == 3
    assert "\\_tree\\_" in text and "A note on &lt;seeds&gt;." in text
    assert "# 3 arms on my\\|data, val" in text


def test_columns_of_markdown_stay_columns():
    table = Table("t", ("a|b", "c"), [["d|e\nf", "`g`"], ["\\", "[x](y)"]])
    lines = markdown_table(table)
    assert lines[1] == "| --- | ---: |"
    assert lines[0] == "| a\\|b | c |"
    assert lines[2:] == ["| d\\|e\ufffdf | \\`g\\` |", "| \\\\ | \\[x](y) |"]


class Parsed(HTMLParser):
    """The tags, texts and sources of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def pictures_of(text):
    for source in Parsed(text).sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            yield np.array(picture.convert("RGB"))


def test_the_page_needs_no_other_file(compared):
    text = page(compared, EVALUATED)
    found = Parsed(text)
    assert "script" not in found.tags and "link" not in found.tags
    assert "a|b <script>" in found.texts and "A note on <seeds>." in found.texts
    assert found.tags.count("table") == 8
    curves, differences = pictures_of(text)
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # all arms
        assert (curves == color).all(2).sum() > 50, color
    for color in ((255, 127, 14), (44, 160, 44)):  # all but the baseline
        assert (differences == color).all(2).sum() > 50, color
    assert len(list(pictures_of(page(without_curves(compared), EVALUATED)))) == 1


def test_names_are_drawn_as_they_are(compared, monkeypatch):
    drawn = []
    draw = matplotlib.text.Text.draw

    def noted(text, *arguments, **settings):
        drawn.append((text.get_text(), text.get_parse_math()))
        return draw(text, *arguments, **settings)

    monkeypatch.setattr(matplotlib.text.Text, "draw", noted)
    page(compared, EVALUATED)
    for name in ("base $x$", "difference from base $x$", "_tree_", "a|b <script>"):
        assert (name, False) in drawn, name
