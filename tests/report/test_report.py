"""Pictures show what they should."""

import csv
import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

from contrastseg_jax.data import pictures
from contrastseg_jax.data.audit.statistics import Example
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.report import curves, evaluation
from contrastseg_jax.report.image_counts import ImageCounts
from contrastseg_jax.structs import IGNORE_LABEL

CLASSES = LabelMap(("red", "<green>"), ((255, 0, 0), (0, 255, 0)), {0: 0, 1: 1, 255: IGNORE_LABEL})


def test_overlay_mixes_colours_half_and_half_and_leaves_ignored_pixels():
    image = np.full((1, 3, 3), 100, np.uint8)
    label = np.array([[0, 1, IGNORE_LABEL]], np.uint8)
    expected = [[[177, 50, 50], [50, 177, 50], [100, 100, 100]]]
    np.testing.assert_array_equal(pictures.overlay(image, label, CLASSES), expected)


def test_panel_and_legend_hold_the_colours_of_the_classes(tmp_path):
    label = np.zeros((20, 30), np.uint8)
    prediction = np.ones((20, 30), np.int32)
    image = np.full((20, 30, 3), 7, np.uint8)
    pictures.save_panel(tmp_path / "panel.png", image, label, prediction, CLASSES, "x")
    pictures.save_legend(tmp_path / "legend.png", CLASSES)
    for name, least in (("panel.png", 10_000), ("legend.png", 20)):
        with Image.open(tmp_path / name) as picture:
            pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
        for color in CLASSES.palette:
            assert (pixels == color).all(axis=1).sum() > least, (name, color)


@pytest.mark.parametrize("size", [(3, 5000), (5000, 3), (1, 1), (2000, 3000)])
def test_a_panel_of_any_shape_can_be_looked_at(tmp_path, size):
    """Neither billions of pixels nor a sliver: each picture has room enough for its classes."""
    image = np.full((*size, 3), 7, np.uint8)
    label = np.zeros(size, np.uint8)
    pictures.save_panel(tmp_path / "panel.png", image, label, label + 1, CLASSES, "x")
    with Image.open(tmp_path / "panel.png") as picture:
        assert picture.width == 1440 and 200 < picture.height < 4000
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    for color in ((7, 7, 7), *CLASSES.palette):
        assert (pixels == color).all(axis=1).sum() > 50_000, color


def test_a_sheet_of_strips_can_be_looked_at(tmp_path):
    examples = [
        Example("strip", np.full((*size, 3), 100, np.uint8), np.zeros(size, np.uint8))
        for size in ((1, 480), (480, 1))
    ]
    pictures.save_sheet(tmp_path / "sheet.png", examples, CLASSES, "data")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert max(picture.size) < 2000
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == (177, 50, 50)).all(axis=1).sum() > 20_000


def test_sheet_shows_every_example_and_a_legend_of_what_occurs(tmp_path):
    label = np.zeros((30, 40), np.uint8)
    label[:, 20:] = IGNORE_LABEL
    image = np.full((30, 40, 3), 100, np.uint8)
    examples = [Example(f"train $写真$ {i}", image, label) for i in range(7)]
    pictures.save_sheet(tmp_path / "sheet.png", examples, CLASSES, "data $\\x$")
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == (177, 50, 50)).all(axis=1).sum() > 7 * 10_000  # red over grey
    assert (pixels == (100, 100, 100)).all(axis=1).sum() > 7 * 10_000  # between the hatching
    assert (pixels == (255, 0, 0)).all(axis=1).sum() > 20  # legend
    assert not (pixels == (0, 255, 0)).all(axis=1).any()


@pytest.mark.parametrize(("similarities", "panels"), [((), 2), ((0.9, 0.1), 3)])
def test_curves_of_a_run(tmp_path, similarities, panels):
    names = ("train/positive_similarity", "train/negative_similarity")
    lines = [
        {"step": 1, "train/cross_entropy": 2.0, "train/contrast": None},
        {"step": 2, "train/cross_entropy": 1.0, **dict(zip(names, similarities, strict=False))},
        {"step": 2, "val/mean_iou": 0.5},
        {"step": 3, "val/mean_iou": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.save_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (480 * panels, 420)
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    orange = (pixels == (255, 127, 14)).all(axis=1).any()  # the second curve of a panel
    assert orange == bool(similarities)


def test_a_stop_makes_no_dip():
    """Intervals that a stop or a start cuts short are joined to means over as many steps."""
    rng = np.random.default_rng(0)
    of_steps, lines, done = 1 + 0.5 * rng.normal(size=130), [], 0
    for step in (20, 40, 43, 60, 80, 81, 82, 100, 120, 130):
        mean = of_steps[done:step].mean()
        lines.append({"step": step, "train/x": mean, "train/interval_steps": step - done})
        done = step
    expected = [(20, 0), (40, 20), (60, 40), (80, 60), (100, 80), (130, 100)]
    assert curves.curve(lines, "train/x") == [
        (end, pytest.approx(of_steps[begin:end].mean())) for end, begin in expected
    ]


def test_curves_have_zeros_and_no_nulls():
    lines = [{"step": 1, "val/x": 0.0}, {"step": 2, "val/x": None}, {"step": 3, "val/x": 0.5}]
    assert curves.curve(lines, "val/x") == [(1, 0.0), (3, 0.5)]
    assert curves.curve([], "val/x") == []


def test_evaluation_page_escapes_names_and_metrics_are_valid_json(tmp_path):
    results = {
        **{"data": "d", "split": "val", "step": 7, "mean_iou": 0.25, "pixel_accuracy": 0.5},
        "iou": {"red": 0.25, "<green>": float("nan")},
    }
    evaluation.save_evaluation(tmp_path, results, ["000001.png"], ["it has <collapsed>"])
    page = (tmp_path / "index.html").read_text()
    assert "&lt;green&gt;" in page and "<green>" not in page and 'src="000001.png"' in page
    assert "it has &lt;collapsed&gt;" in page
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["iou"] == {"red": 0.25, "<green>": None}


def test_scores_are_tables_too(tmp_path):
    results = {
        **{"data": "d", "split": "val", "step": 7, "mean_iou": 0.25, "pixel_accuracy": 0.5},
        "iou": {"red, dark": 0.25, "green": float("nan")},
        "recall": {"red, dark": 1.0, "green": float("nan")},
    }
    evaluation.save_evaluation(tmp_path, results, [])
    with (tmp_path / "per_class.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "IoU", "recall"],
        ["red, dark", "0.2500", "1.0000"],
        ["green", "", ""],
    ]
    assert evaluation.summary(results) == "mean IoU 0.2500, pixel accuracy 0.5000"
    counts = ImageCounts(
        split="val",
        protocol="whole_image",
        image_names=("a", "b"),
        class_names=("x", "y"),
        intersection=np.array([[2, 0], [1, 1]]),
        labelled=np.array([[4, 0], [1, 1]]),
        predicted=np.array([[2, 2], [1, 1]]),
    )
    evaluation.save_image_scores(tmp_path, counts)
    assert (tmp_path / "per_image.csv").read_text().splitlines() == [
        "image,mean IoU,pixel accuracy,x,y",
        "a,0.2500,0.5000,0.5000,0.0000",
        "b,1.0000,1.0000,1.0000,1.0000",
    ]


STRANGE = [
    "price_$5_and_$6.png",
    r"$\frac{",
    "_hidden",
    "",
    "two\nlines\ttab\r",
    "写真 हिन्दी עברית 🛣",
    "e\u0301",
    "%d \\ {} & # ^ ~ <b>",
    "\udcff",
    "x" * 5000,
    "label",
    "prediction",
]


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: ascii(name)[:24])
def test_text_of_users_is_drawn_as_it_is(tmp_path, monkeypatch, name):
    """In titles and legends; names are no mathtext, no LaTeX and no instruction to a legend."""
    drawn = []
    draw = matplotlib.text.Text.draw

    def noted(text, *arguments, **settings):
        drawn.append((text.get_text(), text.get_parse_math(), text.get_usetex()))
        return draw(text, *arguments, **settings)

    monkeypatch.setattr(matplotlib.text.Text, "draw", noted)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # as a matplotlibrc may say
    classes = LabelMap((name, "other"), ((255, 0, 0), (0, 255, 0)), {0: 0, 1: 1})
    image, label = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    pictures.save_panel(tmp_path / "panel.png", image, label, label, classes, name)
    pictures.save_legend(tmp_path / "legend.png", classes)
    pictures.save_sheet(tmp_path / "sheet.png", [Example(name, image, label)], classes, name)
    expected = pictures.shortened(name)
    assert sum(text == expected for text, _, _ in drawn) >= (5 if name else 0)
    assert not any(usetex for _, _, usetex in drawn)
    assert not any(parse_math for text, parse_math, _ in drawn if text == expected and name)
    with Image.open(tmp_path / "legend.png") as picture:
        assert picture.width < 1000


def test_names_are_shortened_in_the_middle():
    assert pictures.shortened("a.png") == "a.png"
    short = pictures.shortened("begin" + "x" * 100 + "end.png")
    assert short.startswith("begin") and short.endswith("end.png") and len(short) <= 48
    assert pictures.shortened("a\nb\udcff\x00") == "a\ufffdb\ufffd\ufffd"


def test_a_page_has_any_name(tmp_path):
    results = {
        **{"data": "d", "split": "val", "step": 7, "mean_iou": 0.25, "pixel_accuracy": 0.5},
        "iou": {'"><script>\udcff': 0.25},
    }
    evaluation.save_evaluation(tmp_path, results, ["a#b?c%20 'x'\".png"])
    page = (tmp_path / "index.html").read_text()
    assert "<script>" not in page
    assert 'src="a%23b%3Fc%2520%20%27x%27%22.png"' in page
    assert list(json.loads((tmp_path / "metrics.json").read_text())["iou"]) == ['"><script>\udcff']
