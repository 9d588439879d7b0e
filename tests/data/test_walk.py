"""What a folder holds, as training and prediction see it."""

import errno
import os

from contrastseg_jax.data.walk import files_below


def below(folder, findings=None):
    found = files_below(folder, [] if findings is None else findings)
    return [path.relative_to(folder).as_posix() for path in found]


def test_links_are_followed_and_named_by_the_path_that_leads_to_them(tmp_path):
    for name in ("store/b.png", "store/0f3a9c", "in/a.png", "in/.ipynb_checkpoints/a-1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / ".hidden.png").touch()
    (tmp_path / "in" / "linked").symlink_to("../store")
    (tmp_path / "in" / "photo.png").symlink_to("../store/0f3a9c")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    (tmp_path / "store" / "round").symlink_to("../in")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert below(tmp_path / "in") == [
        *("a.png", "gone.png", "linked/0f3a9c", "linked/b.png", "photo.png")
    ]


def test_a_folder_that_cannot_be_read_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.png").touch()
    listdir = os.listdir

    def fail(folder):
        if str(folder).endswith("a"):
            raise OSError(errno.EIO, "Input/output error", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", fail)
    findings = []
    assert below(tmp_path, findings) == ["b.png"]
    (found,) = findings
    assert found.message == f"{tmp_path / 'a'}: cannot be read (Input/output error)"
    assert found.kind == "unreadable" and found.is_error


def test_a_folder_that_does_not_exist_has_no_files(tmp_path):
    assert below(tmp_path / "nothing") == []
