"""A val drawn from a folder without one: whole sequences, the same in every run."""

import re
import shutil
from itertools import combinations

import pytest
from audited import folder_spec, prepare, run
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import names, write_image, write_pair

from contrastseg_jax.data.builders.val_split import UNITS, draw_val, sequences
from contrastseg_jax.data.dataset import open_split, open_splits
from contrastseg_jax.errors import InputError

SIZES = {"a": 1, "b": 9, "c": 4, "d": 4, "e": 30, "f": 2}
ALL = [f"{folder}/{i:03d}" for folder, number in SIZES.items() for i in range(number)]

# Names of all kinds: in folders and beside them, with a number or without, alike and not.
PART = st.sampled_from(["a", "b", "a1", "seq_2", "0001TP", "é", "a-b"])
NAME = st.builds(
    lambda folders, stem, number, ending: "/".join([*folders, f"{stem}{number}{ending}"]),
    st.lists(PART, max_size=2),
    st.sampled_from(["", "x", "x_", "0001TP_", "frame", "y "]),
    st.one_of(st.just(""), st.integers(0, 300).map("{:03d}".format)),
    st.sampled_from(["", "_leftImg8bit", ")"]),
).filter(lambda name: not name.endswith("/"))
NAMES = st.lists(NAME, min_size=2, max_size=60, unique=True)
FRACTION = st.floats(0.01, 0.99)


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        ("a/1 a/2 b/1", {"a": "a/1 a/2", "b": "b/1"}),
        ("city/a/1 city/b/1", {"city/a": "city/a/1", "city/b": "city/b/1"}),
        ("all/x_1 all/x_2 all/y_1", {"all/x": "all/x_1 all/x_2", "all/y": "all/y_1"}),
        ("0001TP_006690 0001TP_006720 0006R0_f00930", None),
        (
            "x_000_1_rgb x_000_2_rgb x_001_1_rgb",
            {"x_000": "x_000_1_rgb x_000_2_rgb", "x_001": "x_001_1_rgb"},
        ),
        ("cat dog 7", {"cat": "cat", "dog": "dog", "": "7"}),
        ("1 2 3", {"": "1 2 3"}),
        ("x1 x2 s/1 s/2", {"x": "x1 x2", "s": "s/1 s/2"}),
        ("vid(1) vid(2) film(1)", {"vid": "vid(1) vid(2)", "film": "film(1)"}),
    ],
)
def test_sequences_by_hand(given_names, expected):
    if expected is None:
        expected = {"0001TP": "0001TP_006690 0001TP_006720", "0006R0_f": "0006R0_f00930"}
    expected = {group: found.split() for group, found in expected.items()}
    assert sequences(given_names.split()) == expected


@settings(deadline=None)
@given(NAMES, FRACTION, st.randoms())
def test_no_sequence_is_on_both_sides_and_the_order_of_files_is_nothing(found, fraction, random):
    groups = sequences(found)
    assert sorted(name for group in groups.values() for name in group) == sorted(found)
    if len(groups) == 1:
        return
    val = draw_val(found, fraction, "sequence").val
    assert all(len({name in val for name in group}) == 1 for group in groups.values())
    assert 0 < len(val) < len(found)
    shuffled = random.sample(found, len(found))
    assert draw_val(shuffled, fraction, "sequence") == draw_val(found, fraction, "sequence")
    assert {key: sorted(group) for key, group in sequences(shuffled).items()} == {
        key: sorted(group) for key, group in groups.items()
    }


@settings(deadline=None)
@given(NAMES, FRACTION, st.sampled_from(UNITS))
def test_the_share_is_reached_within_the_images_of_one_sequence(found, fraction, unit):
    groups = sequences(found) if unit == "sequence" else {name: [name] for name in found}
    if len(groups) == 1:
        return
    largest = max(map(len, groups.values()))
    assert abs(len(draw_val(found, fraction, unit).val) - fraction * len(found)) < largest


@settings(deadline=None)
@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=40), st.data())
def test_frames_of_one_folder_stay_together_whatever_their_numbers(numbers, data):
    """The leak that matters: a frame in val, the one before it in train."""
    found = [f"{sequence}/f_{n}" for sequence in "pqr" for n in numbers]
    found += [f"clip{sequence}_{n:06d}" for sequence in "uvw" for n in numbers]
    val = draw_val(found, data.draw(FRACTION), "sequence").val
    for start in ("p/", "q/", "r/", "clipu", "clipv", "clipw"):
        assert len({name in val for name in found if name.startswith(start)}) == 1


def test_the_draw_is_the_same_for_ever():
    """Runs that are resumed or compared rely on it."""
    draw = draw_val(ALL, 0.2, "sequence")
    assert {name.partition("/")[0] for name in draw.val} == {"c", "d", "f"}
    assert len(draw_val(ALL, 0.2, "image").val) == 10
    assert sorted(draw_val([f"i{i}" for i in range(20)], 0.1, "image").val) == ["i5", "i6"]


def test_the_best_of_few_sequences_is_not_far_from_the_best_of_all():
    """CamVid has sequences of such sizes."""
    sizes = {"0001TP": 124, "0006R0": 101, "0016E5": 204, "Seq05VD": 171}
    found = [f"{name}_{i}" for name, size in sizes.items() for i in range(size)]
    for fraction in (0.1, 0.2, 0.3, 0.5, 0.7):
        wanted = fraction * len(found)
        best = min(
            abs(sum(chosen) - wanted)
            for number in (1, 2, 3)
            for chosen in combinations(sizes.values(), number)
        )
        got = abs(len(draw_val(found, fraction, "sequence").val) - wanted)
        assert got <= best + min(sizes.values()) / 2


@pytest.mark.parametrize(
    ("found", "unit", "message"),
    [
        (
            ["img_1", "img_2"],
            "sequence",
            "all 2 images are taken for one sequence, .* 'img' and a num",
        ),
        (
            ["s/img_1", "s/img_2"],
            "sequence",
            "'s/img' and a number.*: --config.data.val_unit=image",
        ),
        (["1", "2"], "sequence", "'' and a number"),
        (["a"], "image", "the only image is a; train and val need one each"),
        (["a"], "sequence", "the only image is a"),
    ],
)
def test_a_single_sequence_cannot_be_divided(found, unit, message):
    with pytest.raises(InputError, match=rf"^data.val_fraction = 0\.1: .*{message}"):
        draw_val(found, 0.1, unit)


# Folders


def write_sequences(raw, images="images", masks="labels", sizes=(3, 2, 2), suffix=".jpg"):
    for sequence, size in zip("abc", sizes, strict=True):
        for i in range(size):
            name = f"{sequence}_{i:02d}"
            write_pair(
                raw / images / f"{name}{suffix}",
                raw / masks / f"{name}.png",
                seed=ord(sequence) + 9 * i,
            )


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_without_val_is_divided_and_lists_what_it_has(raw, below, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    write_sequences(raw, f"images/{below}", f"labels/{below}")
    spec = folder_spec(raw, "data.val_fraction=0.3")
    train, val = open_splits(spec, ("train", "val"))
    written = [path.stem for path in (raw / "images" / below).iterdir()]
    assert sorted(names(train) + names(val)) == sorted(written)
    assert len({name[0] for name in names(val)}) == 1 and len(val) == 2
    assert not {name[0] for name in names(val)} & {name[0] for name in names(train)}
    for split, records in (("train", train), ("val", val)):
        assert (records.folder / f"{split}.txt").read_text().splitlines() == names(records)
    (group,) = {name[0] for name in names(val)}
    assert (
        f"val: 2 of 7 images in 1 of 3 sequences ({group}), drawn by data.val_fraction = 0.3;"
        f" {val.folder}/val.txt" in caplog.text
    )
    assert "train: 5 of 7 images in 2 of 3 sequences, drawn by data.val_fraction" in caplog.text
    assert not list((raw / "images").glob("val"))


def test_a_test_without_masks_is_not_drawn_from(raw):
    write_sequences(raw)
    for name in ("a_00", "z"):
        write_image(raw / "images" / "test" / f"{name}.jpg", seed=1)
    train, val = open_splits(folder_spec(raw, "data.val_fraction=0.3"), ("train", "val"))
    assert len(train) + len(val) == 7
    with pytest.raises(InputError, match="for the masks of"):
        open_split(folder_spec(raw, "data.val_fraction=0.3"), "test")


def test_the_audit_sees_the_splits_that_training_does(raw, capsys):
    write_sequences(raw)
    results = run(raw, "data.val_fraction=0.3")
    assert results["num_errors"] == 0
    assert "\nval: 2 of 7 images in 1 of 3 sequences (" in f"\n{capsys.readouterr().out}"
    assert {s: found["num_examples"] for s, found in results["splits"].items()} == {
        "train": 5,
        "val": 2,
    }


@pytest.mark.parametrize(
    "own", ["images/val", "labels/validation", "images/Training", "images/test2017"]
)
def test_a_split_of_its_own_is_not_drawn_over(root, raw, own):
    shutil.rmtree(root)
    write_sequences(raw)
    write_image(raw / own / "d.png")
    with pytest.raises(
        InputError, match=rf"^data.val_fraction = 0\.1: {raw} has {own}, a split of its"
    ) as error:
        prepare(raw, "data.val_fraction=0.1")
    (found,) = run(raw, "data.val_fraction=0.1")["findings"]
    assert found["message"] == str(error.value)


def test_an_empty_folder_says_the_layouts(raw):
    raw.mkdir(exist_ok=True)
    with pytest.raises(InputError, match="holds none\n.*Its layout") as error:
        prepare(raw, "data.val_fraction=0.1")
    assert "images/ labels/ without train/ and\nval/, or images/train/" in str(error.value)


def test_faults_of_undivided_files_are_told_once(raw):
    write_sequences(raw)
    (raw / "labels" / "b_01.png").unlink()
    (raw / "images" / "c_01.jpg").write_bytes(b"damaged")
    with pytest.raises(InputError) as error:
        prepare(raw, "data.val_fraction=0.3")
    lines = str(error.value).splitlines()
    assert (
        lines[0].startswith("2 problems") and len([line for line in lines if "b_01" in line]) == 1
    )


def test_the_setting_is_named_where_there_is_no_val(raw):
    write_sequences(raw, "images/train", "labels/train")
    with pytest.raises(InputError, match="has no split 'val', only train") as error:
        prepare(raw)
    (setting,) = re.findall(r"--config\.(data\.val_fraction=\S+)$", str(error.value), re.MULTILINE)
    assert len(prepare(raw, setting)) == 5


def test_what_is_added_to_a_sequence_stays_on_its_side(raw):
    """Another draw is prepared anew, with a list of its own."""
    write_sequences(raw, sizes=(30, 20, 20))
    spec = folder_spec(raw, "data.val_fraction=0.3")
    _, before = open_splits(spec, ("train", "val"))
    sequence = names(before)[0][0]
    write_pair(
        raw / "images" / f"{sequence}_99.jpg", raw / "labels" / f"{sequence}_99.png", seed=99
    )
    _, after = open_splits(spec, ("train", "val"))
    assert names(after) == [*names(before), f"{sequence}_99"] and after.folder != before.folder
