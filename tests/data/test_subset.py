"""Parts of a split: by share, by number, by a list."""

import pickle

import pytest

from contrastseg_jax.data.joined import joined
from contrastseg_jax.data.subset import image_names, subset
from contrastseg_jax.errors import InputError

RECORDS = [{"name": f"scene_{i}".encode(), "image": b"", "label": b""} for i in range(40)]


def test_all_without_a_setting():
    assert subset(RECORDS, "") is RECORDS


@pytest.mark.parametrize(("which", "number"), [("0.125", 5), ("0.001", 1), ("46e-2", 18), ("7", 7)])
def test_shares_and_numbers_are_drawn_once_and_in_order(which, number):
    part = subset(RECORDS, which)
    drawn = image_names(part)
    assert len(part) == len(set(drawn)) == number
    assert drawn == sorted(drawn, key=lambda name: int(name.split("_")[1]))
    assert image_names(subset(RECORDS, which)) == drawn


def test_a_smaller_part_lies_inside_a_larger_one():
    parts = [set(image_names(subset(RECORDS, str(n)))) for n in (1, 5, 10, 39, 40)]
    for small, large in zip(parts, parts[1:], strict=False):
        assert small < large
    assert parts[2] != set(image_names(RECORDS[:10]))


def test_a_list_names_images(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("scene_7\n\n scene_3 \n")
    assert image_names(subset(RECORDS, str(file))) == ["scene_3", "scene_7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene_7\nscene_99\nscene_7\n", "scene_99: no such image in the split\n  scene_7: listed"),
        ("\n", "lists no image"),
        (None, "cannot be read \\(No such file or directory\\)"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        subset(RECORDS, str(file))
    assert f"data.train_subset = '{file}'" in str(error.value)


def test_a_part_larger_than_the_split_is_refused():
    with pytest.raises(InputError, match="train_subset = '41': must be at most 40"):
        subset(RECORDS, "41")


@pytest.mark.parametrize("lengths", [(40,), (3, 37), (1, 1, 38), (39, 0, 1)])
def test_joined_splits_are_the_splits_one_after_the_other(lengths):
    rest, splits = list(RECORDS), []
    for length in lengths:
        splits.append(rest[:length])
        rest = rest[length:]
    whole = pickle.loads(pickle.dumps(joined(splits)))
    assert [*whole] == RECORDS == [whole[i] for i in range(40)] and len(whole) == 40
    assert whole[-1] == RECORDS[-1]
    for index in (40, -41):
        with pytest.raises(IndexError):
            whole[index]
    assert image_names(subset(whole, "7")) == image_names(subset(RECORDS, "7"))


def test_a_list_cannot_name_images_of_which_two_splits_have_one_each(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("scene_7\n")
    with pytest.raises(
        InputError, match="scene_7: several of data.train_splits have such an image"
    ):
        subset(joined([RECORDS, RECORDS[:9]]), str(file))
    file.write_text("scene_30\n")
    assert image_names(subset(joined([RECORDS, RECORDS[:9]]), str(file))) == ["scene_30"]
