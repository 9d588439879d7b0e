"""Colour tables in the config and in files."""

import json

import pytest
from small import make_config

from contrastseg_jax.config.load import from_json, to_json
from contrastseg_jax.config.palette import levels
from contrastseg_jax.errors import InputError
from contrastseg_jax.setup.preflight import check

NAMES = ("road", "traffic light")
COLORS = ("#804080", "#faaa1e")  # (128, 64, 128), (250, 170, 30)
SETTINGS = ("data.name=folder", "data.root=/data", "data.mask_encoding=rgb")
FORMS = {
    "CamVid": "128 64 128\troad\n250 170 30\t\ttraffic light\n0 0 0\tVoid\n",
    "hex": "# the classes\n#804080 road\n\n#FAAA1E traffic light\n#000000 unlabeled\n",
    "csv": 'name,r,g,b\nroad,128,64,128\n"traffic light", 250, 170, 30\nignore,0,0,0\n',
    "csv of colours first": "r;g;b;name\n128;64;128;road\n250;170;30;traffic light\n0;0;0;void\n",
    "CVAT": "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:250,170,30::\n"
    "void:0,0,0::\n",
    "json": json.dumps({"road": [128, 64, 128], "traffic light": "#FAAA1E", "VOID": [0, 0, 0]}),
    "json list": json.dumps(
        [
            {"name": "road", "color": [128, 64, 128]},
            {"name": "traffic light", "color": "#faaa1e"},
            {"name": "Ignore", "color": "#000000"},
        ]
    ),
}


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "colors.txt"
        path.write_text(text, "utf-8-sig")
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_files_of_every_form_say_the_same(file, form):
    data = make_config(*SETTINGS, f"data.palette={file(FORMS[form])}").data
    assert (data.class_names, data.palette) == (NAMES, COLORS)
    assert data.ignore_colors == ("#000000",)


@pytest.mark.parametrize(
    "palette",
    ["('#804080', '#FAAA1E')", "((128, 64, 128), (250, 170, 30))", "['#804080', '#faaa1e']"],
)
def test_colours_are_the_same_in_any_spelling(palette):
    config = make_config(*SETTINGS, f"data.class_names={NAMES}", f"data.palette={palette}")
    assert config.data.palette == COLORS
    assert from_json(to_json(config), "config.json").data.palette == COLORS
    assert levels(COLORS[1]) == (250, 170, 30)


def test_a_run_keeps_the_colours_and_needs_the_file_no_more(file):
    path = file(FORMS["CamVid"])
    config = make_config(*SETTINGS, f"data.palette={path}", "data.ignore_colors=((1, 2, 3),)")
    path.unlink()
    again = from_json(to_json(config), "config.json")
    assert again == config
    assert again.data.ignore_colors == ("#010203", "#000000")


def test_a_file_without_names_takes_those_of_the_config(file):
    path = file("128 64 128\n250,170,30\n")
    config = make_config(*SETTINGS, f"data.class_names={NAMES}", f"data.palette={path}")
    assert (config.data.palette, config.data.class_names) == (COLORS, NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no colour"),
        ("128 64 road", "line 1: '128 64 road': a row must be 'r g b name'"),
        ("1 2 3 a\n1 2 256 b", "line 2: '1 2 256 b': a row must be"),
        ("1 2 3 4", "line 1: '1 2 3 4' may begin or end with its colour"),
        ("1 2 3 a\n4 5 6", "colour #040506 has no name"),
        (
            '{"road": [1, 2]}',
            r'colors.txt: \{"name": "road", "color": \[1, 2\]\}: must be a colour',
        ),
        ('["road", ', "is not JSON"),
    ],
)
def test_files_that_are_no_tables_are_refused(file, text, message):
    with pytest.raises(InputError, match=message):
        make_config(*SETTINGS, f"data.palette={file(text)}")


def test_names_must_be_those_of_the_file(file):
    swapped = f"data.class_names={NAMES[::-1]}"
    with pytest.raises(InputError, match="data.class_names = .*must be \\(\\), or the names in"):
        make_config(*SETTINGS, swapped, f"data.palette={file(FORMS['hex'])}")
    with pytest.raises(InputError, match="nowhere: cannot be read .*data.palette must be colours"):
        make_config(*SETTINGS, "data.palette=nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.palette=()"], "data.palette = (): must be the colours of the classes"),
        (["data.palette=('#804080', '#8040')"], "must be colours, '#rrggbb' or"),
        (["data.palette=((0, 0, 256), 7)"], "must be colours, '#rrggbb' or"),
        (["data.ignore_colors=(0, 0, 0)"], "data.ignore_colors = (0, 0, 0): must be colours"),
        (["data.palette=('#000000',)"], "data.palette has 1 colours: must have one for each of"),
        (["data.palette=('#000001', '#000001')"], "to 'road' and 'traffic light' (#000001)"),
        (["data.ignore_colors=('#804080',)"], "to data.ignore_colors and 'road' (#804080)"),
        (["data.mask_encoding=color"], "data.mask_encoding = 'color': must be one of index, rgb"),
        (["data.mask_encoding=index"], "data.palette = ('#804080', '#faaa1e'): must be () unless"),
        (["data.ignore_values=(0,)"], "data.ignore_values = (0,): must be (255,), the default"),
        (["data.name=camvid"], "data.mask_encoding = 'rgb': must be 'index' unless data.name"),
        (
            ["data.palette=()", "data.mask_encoding=binary", "data.class_names=('a', 'b', 'c')"],
            "must name the 2 classes of data.mask_encoding = 'binary'",
        ),
    ],
)
def test_tables_that_mean_nothing_are_refused_at_the_start(settings, message):
    config = make_config(
        *SETTINGS, f"data.class_names={NAMES}", f"data.palette={COLORS}", *settings
    )
    with pytest.raises(InputError) as error:
        check(config, mode="audit")
    assert message in str(error.value)
