"""Folders of prepared records: whole or not, and what is read from them.

The list of a folder's files, each with size, time and digest, is written last. A start trusts files
whose size and time are those of the list, and computes the digest of others; so a folder that was
copied is read once, and one that lost a file, or has another in its place, is prepared again.
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

LIST = "files.json"
SMALL = 1 << 20  # bytes of a file whose digest costs nothing
GARBLED = (ValueError, TypeError, AttributeError)  # what reading a list raises that is none


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Records(Sequence):
    """The records of a split. Travels to other processes, where it opens the files anew."""

    folder: Path
    encoded: ArrayRecordDataSource
    features: tfds.features.FeaturesDict

    def __len__(self) -> int:
        """Number of records."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record, its pictures still encoded.

        Raises:
            InputError: it cannot be read; names the folder, and the file if one is damaged.
        """
        index = range(len(self))[index]
        decoders: Any = dict.fromkeys(("image", "label"), tfds.decode.SkipDecoding())
        try:
            record: Any = self.features.deserialize_example_np(
                self.encoded[index], decoders=decoders
            )
        except Exception as error:  # of several classes, whose texts are those of C++
            raise self._unreadable(index, error) from error
        return record

    def _unreadable(self, index: int, error: Exception) -> InputError:
        fault = find_fault(self.folder, trusting=False)
        if not fault:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return InputError(f"{self.folder}: record {index} cannot be read: {reason}")
        try:
            _distrust(self.folder)
            advice = "start again, and it is prepared anew"
        except (OSError, *GARBLED):  # it is read-only, or has lost its list
            advice = "delete it, and the next start prepares it anew"
        return InputError(f"{self.folder}: this prepared data set is damaged ({fault}); {advice}")


def open_records(builder: tfds.core.DatasetBuilder, split: str) -> Records:
    """What `builder` has prepared."""
    source: Any = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
    # Without the builder, whose settings may list all raw files.
    return Records(Path(builder.data_dir), source.data_source, source.dataset_info.features)


def seal(folder: Path) -> None:
    """Write the list of a folder's files: from now on it counts as prepared."""
    stamps = {path.name: _stamp(path) for path in sorted(folder.iterdir()) if path.name != LIST}
    _write_list(folder, stamps)


def find_fault(folder: Path, *, trusting: bool = True) -> str:
    """Why a folder is not as it was sealed; empty: it is whole.

    `trusting`: files of the listed size and time need not be read.
    """
    try:
        listed = _read_list(folder)
    except FileNotFoundError:
        return f"it has no {LIST}, which is written last"
    except OSError as error:
        return f"{LIST} cannot be read: {error.strerror}"
    except GARBLED:
        return f"{LIST} is garbled"
    found = {}
    for name, stamp in listed.items():
        try:
            found[name] = _compared(folder / name, stamp, trusting)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found[name].size != stamp.size:
            return f"{name} has {found[name].size} bytes instead of {stamp.size}"
        if found[name].sha256 != stamp.sha256:
            return f"{name} has other bytes than were written"
    if found != listed:  # of other times: the next start need not read them again
        with contextlib.suppress(OSError):
            _write_list(folder, found)
    return ""


def remove(folder: Path) -> None:
    """Delete a folder of prepared records, or what lies in its place; links are not followed."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        folder.chmod(0o775)
    shutil.rmtree(folder)


def _compared(path: Path, listed: Stamp, trusting: bool) -> Stamp:
    """The stamp of a file, whose digest is computed where it can matter."""
    status = path.stat()
    if status.st_size != listed.size:
        return replace(listed, size=status.st_size)
    is_same = status.st_mtime_ns == listed.mtime_ns and os.access(path, os.R_OK)
    return listed if trusting and is_same and listed.size > SMALL else _stamp(path)


def _stamp(path: Path) -> Stamp:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, digest)


def _distrust(folder: Path) -> None:
    """Let the next start read all files: what is damaged has the listed size and time."""
    listed = _read_list(folder).items()
    _write_list(folder, {name: replace(stamp, mtime_ns=0) for name, stamp in listed})


def _read_list(folder: Path) -> dict[str, Stamp]:
    content = json.loads((folder / LIST).read_text()).items()
    stamps = {name: Stamp(**stamp) for name, stamp in content}
    if not stamps:
        raise ValueError(f"{folder / LIST}: names no file")
    return stamps


def _write_list(folder: Path, stamps: dict[str, Stamp]) -> None:
    content = {name: asdict(stamp) for name, stamp in stamps.items()}
    write_atomically(folder / LIST, to_json(content) + "\n")
