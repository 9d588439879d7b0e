"""Read the tensors of a PyTorch or safetensors file, without executing code in it."""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from contrastseg_jax.errors import InputError

Tensors = dict[str, Shaped[np.ndarray, "..."]]

CONTAINERS = ("state_dict", "model")  # keys of the state dict within a checkpoint
# The original's checkpoints contain a few of these besides tensors, such as their score.
NUMPY_OBJECTS = (
    *("numpy.dtype", "numpy.ndarray"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
)


class _Ignored:
    """Stands in for NumPy's objects, which a malicious file could crash; ignores its state."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file or one written by `torch.save`, whatever its suffix.

    Floating-point tensors are converted to float32. The state dict may be the whole file or under
    one of CONTAINERS.

    Raises:
        InputError: the file is missing, truncated, of another kind, has no tensors, or contains
            objects that need executing code to load.
    """
    if not path.is_file():
        reason = "is a folder, but not a run" if path.is_dir() else "no such file"
        raise InputError(f"--input={path}: {reason}")
    if _is_safetensors(path):
        tensors = _read_safetensors(path)
    else:
        tensors = _state_dict(_read_torch(path), path)
    if not tensors:
        raise InputError(f"{path}: contains no tensors")
    return {key: _as_float32(array, f"{path}: {key}") for key, array in tensors.items()}


def _is_safetensors(path: Path) -> bool:
    """By the first bytes, or if they are of neither kind, by the suffix."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the header's length, its JSON
        return True
    return path.suffix.lower() == ".safetensors" and not start.startswith((b"PK", b"\x80"))


def _read_safetensors(path: Path) -> Tensors:
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                try:
                    tensors[key] = file.get_tensor(key)
                except AttributeError as error:  # NumPy has no such type
                    kind = file.get_slice(key).get_dtype()
                    raise TypeError(f"{key} is {kind}, which NumPy does not support") from error
        return tensors
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def _read_torch(path: Path) -> Any:
    """The content of a `torch.save` file, with PyTorch tensors."""
    if not importlib.util.find_spec("torch"):
        raise InputError(
            f"{path}: needs PyTorch to be read (pip install torch); .safetensors files do not"
        )
    torch = importlib.import_module("torch")
    stand_ins = [(_Ignored, name) for name in NUMPY_OBJECTS]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error
            with path.open("rb") as file:  # given a path, PyTorch goes by its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        # PyTorch's own message advises to unpickle the file regardless.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(
                f"{path}: contains {code[1]}, which is not a tensor; only tensors and numbers are"
                " unpickled, as anything else may execute code; save a model's state_dict()"
            ) from error
        if "TorchScript" in str(error):
            raise InputError(
                f"{path}: is a TorchScript program; save the state_dict() of its model instead"
            ) from error
        raise InputError(
            f"{path}: cannot be read as a PyTorch file; it is damaged, truncated or of another kind"
        ) from error


def _state_dict(content: Any, path: Path) -> Tensors:
    """The tensors by name, taken out of their container if any."""
    torch = importlib.import_module("torch")
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: contains a {type(content).__name__}, must be a state dict")
    others = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InputError(
            f"{path}: must contain a state dict, alone or under"
            f" {' or '.join(map(repr, CONTAINERS))}; not a tensor: {', '.join(others[:5])}"
        )
    return {str(key): _to_numpy(tensor, f"{path}: {key}") for key, tensor in content.items()}


def _to_numpy(tensor: Any, name: str) -> Shaped[np.ndarray, "..."]:
    try:
        tensor = tensor.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        kind = str(tensor.layout).removeprefix("torch.")
        raise InputError(
            f"{name}: must be a plain array of numbers, is {kind} {tensor.dtype} on {tensor.device}"
        ) from error


def _as_float32(array: Shaped[np.ndarray, "..."], name: str) -> Shaped[np.ndarray, "..."]:
    if array.dtype.kind == "c":
        raise InputError(f"{name}: must be real, is {array.dtype}")
    return array if array.dtype.kind in "iub" else array.astype(np.float32, copy=False)
