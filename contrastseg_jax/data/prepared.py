"""Folders of prepared records: reading them, and verifying that they are complete and undamaged.

A manifest of a folder's files, with size, time and digest of each, is written last. A start trusts
files that have the size and time of the manifest, and computes the digest of others: a folder that
was copied is read once, and one in which a file is missing or changed is prepared again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from contrastseg_jax.errors import InputError
from contrastseg_jax.files import to_json, write_atomically

MANIFEST = "files.json"
ALWAYS_HASHED_SIZE = 1 << 20  # bytes up to which computing a digest costs nothing
MALFORMED = (ValueError, TypeError, AttributeError)  # errors of reading a malformed manifest


@dataclass(frozen=True)
class FileStamp:
    """Size, time and digest of a file, by which a changed one is recognised."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Records(Sequence):
    """The records of a split. Can be pickled for other processes, which open the files again."""

    folder: Path
    encoded: ArrayRecordDataSource
    features: tfds.features.FeaturesDict

    def __len__(self) -> int:
        """Number of records."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record, its image and label still encoded.

        Raises:
            InputError: it cannot be read; names the folder, and the damaged file if there is one.
        """
        index = range(len(self))[index]
        decoders: Any = dict.fromkeys(("image", "label"), tfds.decode.SkipDecoding())
        try:
            record: Any = self.features.deserialize_example_np(
                self.encoded[index], decoders=decoders
            )
        except Exception as error:  # of several classes, with messages from C++
            raise self._unreadable(index, error) from error
        return record

    def _unreadable(self, index: int, error: Exception) -> InputError:
        fault = find_fault(self.folder, trust_time=False)
        if not fault:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return InputError(f"{self.folder}: record {index} cannot be read: {reason}")
        try:
            _forget_times(self.folder)
            advice = "start again, and it is prepared anew"
        except (OSError, *MALFORMED):  # the folder is read-only, or its manifest is missing
            advice = "delete it, and the next start prepares it anew"
        return InputError(f"{self.folder}: this prepared data set is damaged ({fault}); {advice}")


def open_records(builder: tfds.core.DatasetBuilder, split: str) -> Records:
    """The records that `builder` has prepared."""
    source: Any = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
    # Without the builder, whose config may list all raw files.
    return Records(Path(builder.data_dir), source.data_source, source.dataset_info.features)


def fingerprint(records: Sequence[dict[str, bytes]]) -> str:
    """A digest of a split: the same for the same prepared records, wherever they lie.

    Empty for records that were not prepared.
    """
    if not isinstance(records, Records):
        return ""
    stamps = _read_manifest(records.folder)
    text = "".join(f"{name} {stamps[name].sha256}\n" for name in sorted(stamps))
    return hashlib.sha256(text.encode()).hexdigest()


def list_file(folder: Path, split: str) -> Path:
    """The list of the images of a prepared split that was drawn; other splits have none."""
    return folder / f"{split}.txt"


def write_names(folder: Path, split: str, names: Sequence[str]) -> None:
    """Write the list, before the folder counts as prepared."""
    write_atomically(list_file(folder, split), "".join(f"{name}\n" for name in names))


def read_names(records: Records, split: str) -> list[str]:
    """The names in the list; none: the split was not drawn."""
    file = list_file(records.folder, split)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def mark_prepared(folder: Path) -> None:
    """Write the manifest of a folder, which then counts as prepared."""
    stamps = {path.name: _stamp(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    _write_manifest(folder, stamps)


def find_fault(folder: Path, *, trust_time: bool = True) -> str:
    """Why a folder is not as its manifest says; empty: it is.

    `trust_time`: files of the listed size and time need not be read.
    """
    try:
        listed = _read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, which is written last"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except MALFORMED:
        return f"{MANIFEST} is garbled"
    found = {}
    for name, stamp in listed.items():
        try:
            found[name] = _current_stamp(folder / name, stamp, trust_time)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found[name].size != stamp.size:
            return f"{name} has {found[name].size} bytes instead of {stamp.size}"
        if found[name].sha256 != stamp.sha256:
            return f"{name} has other bytes than were written"
    if found != listed:  # only times differ: the next start need not read the files again
        with contextlib.suppress(OSError):
            _write_manifest(folder, found)
    return ""


def remove(folder: Path) -> None:
    """Delete a folder of prepared records, or a file or link in its place, but not its target."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        folder.chmod(0o775)
    shutil.rmtree(folder)


def _current_stamp(path: Path, listed: FileStamp, trust_time: bool) -> FileStamp:
    """The stamp of a file; its digest is computed only if size and time do not vouch for it."""
    status = path.stat()
    if status.st_size != listed.size:
        return replace(listed, size=status.st_size)
    is_same = status.st_mtime_ns == listed.mtime_ns and os.access(path, os.R_OK)
    return listed if trust_time and is_same and listed.size > ALWAYS_HASHED_SIZE else _stamp(path)


def _stamp(path: Path) -> FileStamp:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    return FileStamp(status.st_size, status.st_mtime_ns, digest)


def _forget_times(folder: Path) -> None:
    """Make the next start read all files: the damaged one has the size and time of the manifest."""
    stamps = _read_manifest(folder).items()
    _write_manifest(folder, {name: replace(stamp, mtime_ns=0) for name, stamp in stamps})


def _read_manifest(folder: Path) -> dict[str, FileStamp]:
    content = json.loads((folder / MANIFEST).read_text()).items()
    stamps = {name: FileStamp(**stamp) for name, stamp in content}
    if not stamps:
        raise ValueError(f"{folder / MANIFEST}: lists no file")
    return stamps


def _write_manifest(folder: Path, stamps: dict[str, FileStamp]) -> None:
    content = {name: asdict(stamp) for name, stamp in stamps.items()}
    write_atomically(folder / MANIFEST, to_json(content) + "\n")
