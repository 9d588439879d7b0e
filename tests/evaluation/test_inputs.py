"""Which files are predicted, and under which names."""

import os
from pathlib import Path

import pytest

from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation.inputs import find_images, skipped_message


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Makes empty files below a folder, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names(*inputs, output="out"):
    found = find_images(inputs, Path(output))
    return {name: os.path.relpath(path) for name, path in found.files.items()}


def test_links_give_their_own_names_and_hidden_folders_none(photos):
    root = photos("in/a.png", "in/.ipynb_checkpoints/a-1.png", "store/b.png", "store/0f3a9c")
    (root / "in" / "linked").symlink_to("../store")
    (root / "photo.png").symlink_to("store/0f3a9c")
    assert names("in") == {"a": "in/a.png", "linked/b": "in/linked/b.png"}
    assert names("photo.png") == {"photo": "photo.png"}


def test_files_of_other_kinds_are_counted(photos):
    photos("in/a.JPG", "in/b.gif", "in/c.GIF", "in/d.mp4", "in/README")
    found = find_images(["in"], photos() / "out")
    assert list(found.files) == ["a"]
    assert (
        skipped_message(found.others) == "skipped 4 files, not images: .gif 2, .mp4 1, no suffix 1"
    )
    assert names("in/README", "in/b.gif") == {"README": "in/README", "b": "in/b.gif"}


def test_files_that_would_share_a_name_keep_their_suffixes(photos):
    photos("in/grey.jpg", "in/grey.png", "in/grey.jpg.png", "in/other.png")
    assert names("in") == {
        "grey.jpg": "in/grey.jpg",
        "grey.png": "in/grey.png",
        "grey.jpg.png": "in/grey.jpg.png",
        "other": "in/other.png",
    }
    assert find_images(["in"], photos() / "out").renamed == 3


def test_several_inputs(photos):
    photos("one/a.png", "one/b.png", "two/a.png", "two/c,d.png", "three/more/e.png")
    assert names("one", "two/c,d.png", "three", "one/b.png") == {
        "a": "one/a.png",
        "b": "one/b.png",
        "c,d": "two/c,d.png",
        "more/e": "three/more/e.png",
    }
    assert names("one", "two") == {
        "one/a.png": "one/a.png",
        "b": "one/b.png",
        "two/a.png": "two/a.png",
        "c,d": "two/c,d.png",
    }


def test_patterns(photos):
    photos("in/a[1].jpg", "in/a1.jpg", "in/x/y.jpg", "in/z/y.jpg", "in/note.txt", "in/.h.jpg")
    photos("odd[1]/v.jpg")
    assert names("in/a[1].jpg") == {"a[1]": "in/a[1].jpg"}  # there is such a file
    assert names("in/a[0-9].jpg") == {"a1": "in/a1.jpg"}
    assert names("in/*.jpg") == {"a1": "in/a1.jpg", "a[1]": "in/a[1].jpg"}
    assert names("in/*/y.jpg") == {"x/y": "in/x/y.jpg", "z/y": "in/z/y.jpg"}
    assert names("in/**/?.jpg") == {"x/y": "in/x/y.jpg", "z/y": "in/z/y.jpg"}
    assert names("odd[1]/*.jpg") == {"v": "odd[1]/v.jpg"}
    assert set(names("*")) == {"in/a1", "in/a[1]", "in/x/y", "in/z/y", "odd[1]/v"}


def test_a_name_that_is_not_utf8(photos):
    root = photos("in/a.png")
    odd = os.fsdecode(b"caf\xe9.png")
    (root / "in" / odd).touch()
    assert set(names("in")) == {"a", odd.removesuffix(".png")}


def test_results_are_not_inputs(photos):
    """Whether the output lies in the input, or the input in the output."""
    photos("in/a.png", "in/out/masks/a.png", "in/out/overlays/a.jpg", "in/out/legend.png")
    photos("in/masks/b.png")
    assert set(names("in", output="in/out")) == {"a", "masks/b"}
    photos("masks/a.png", "legend.png", "more/a.png")
    assert set(names("more", output=".")) == {"a"}
    (photos() / "link").symlink_to("in")
    for folder, output in (("in", "in"), ("in", "link"), ("link", "in/."), ("in/masks", "link")):
        with pytest.raises(InputError, match="choose another folder"):
            names(folder, output=output)


def test_inputs_that_are_none(photos):
    photos("in/a.png", "in/b.gif", "empty/a.gif")
    with pytest.raises(InputError, match="--input=nothing: no such file or folder"):
        names("in", "nothing")
    with pytest.raises(InputError, match=r"--input=in/\*.tif: no file or folder matches"):
        names("in/*.tif")
    with pytest.raises(
        InputError, match=r"--input=empty: contains no image \(.jpg .*; skipped 1 file, not"
    ):
        names("in", "empty")  # what is said of it does not count the files of others


def test_a_folder_that_cannot_be_read_is_a_problem_of_its_own(photos, monkeypatch):
    photos("in/a.png", "in/closed/b.png")
    listdir = os.listdir

    def fail(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", fail)
    found = find_images(["in"], photos() / "out")
    assert list(found.files) == ["a"]
    assert found.problems == [f"{photos() / 'in' / 'closed'}: cannot be read (Permission denied)"]
