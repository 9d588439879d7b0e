"""Reading `.pth` and `.safetensors`: every container and type of number, and no code run."""

import collections
import importlib.util
import os
import pickle
import warnings

import jax.numpy as jnp
import needs
import numpy as np
import pytest
from safetensors.flax import save_file as save_jax
from safetensors.numpy import save_file

from contrastseg_jax.errors import InputError
from contrastseg_jax.weights import torch_files
from contrastseg_jax.weights.torch_files import read_tensors

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.count": np.int64(7)}


def assert_arrays(tensors):
    assert tensors.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[key], array)
        assert tensors[key].dtype == array.dtype


def save_torch(content, path):
    torch = importlib.import_module("torch")
    torch.save(content, path)
    return path


def torch_state():
    torch = importlib.import_module("torch")
    return collections.OrderedDict(
        (key, torch.from_numpy(np.asarray(array))) for key, array in ARRAYS.items()
    )


def test_safetensors(tmp_path):
    arrays = {key: np.asarray(array) for key, array in ARRAYS.items()}
    save_file(arrays, tmp_path / "x.safetensors")
    assert_arrays(read_tensors(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_fractions_become_float32(tmp_path, dtype):
    if dtype == "float64":
        save_file({"x": np.array([0.5, -2.0])}, tmp_path / "x.safetensors")
    else:
        save_jax({"x": jnp.array([0.5, -2.0], dtype)}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path / "x.safetensors")
    assert tensors["x"].dtype == np.float32
    np.testing.assert_array_equal(tensors["x"], [0.5, -2.0])


def test_numbers_of_eight_bits_are_refused(tmp_path):
    """safetensors knows them; NumPy does not."""
    save_jax({"x": jnp.zeros(2, jnp.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="x.safetensors: cannot be read .*x is F8_E4M3"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.pth", "x.SAFETENSORS", "x"])
def test_safetensors_of_any_name(tmp_path, name):
    save_file({key: np.asarray(array) for key, array in ARRAYS.items()}, tmp_path / name)
    assert_arrays(read_tensors(tmp_path / name))


@needs.torch
@pytest.mark.parametrize("is_zip", [True, False])
def test_pytorch_files_of_any_name(tmp_path, is_zip):
    torch = importlib.import_module("torch")
    path = tmp_path / "x.safetensors"
    torch.save(torch_state(), path, _use_new_zipfile_serialization=is_zip)
    assert_arrays(read_tensors(path))


@needs.torch
def test_programs_of_pytorch_are_refused(tmp_path):
    torch = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth: is a TorchScript program; save the state_dict"):
        read_tensors(tmp_path / "x.pth")


@needs.torch
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "config_dict": {"lr": 0.1, "names": ["a"]}, "epoch": 3},
        lambda state: {"model": state},
        # As the original saves its best checkpoint: its score is a NumPy scalar.
        lambda state: {"state_dict": state, "config_dict": {"max_performance": np.float64(0.8)}},
        lambda state: {"state_dict": state, "x": [np.int64(3), np.bool_(True), np.ones(3)]},
    ],
)
def test_containers_of_pytorch(tmp_path, wrap):
    assert_arrays(read_tensors(save_torch(wrap(torch_state()), tmp_path / "x.pth")))


@needs.torch
def test_the_format_before_zip_files_and_half_precision(tmp_path):
    torch = importlib.import_module("torch")
    state = {"x": torch.nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.bfloat16))}
    torch.save(state, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=False)
    tensors = read_tensors(tmp_path / "x.pth.tar")
    assert tensors["x"].dtype == np.float32
    np.testing.assert_array_equal(tensors["x"], [0.5, -2.0])


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@needs.torch
@pytest.mark.parametrize("by_torch", [True, False])
def test_code_is_refused_and_not_run(tmp_path, by_torch):
    content, path = {"state_dict": Payload(str(tmp_path / "pwned"))}, tmp_path / "x.pth"
    if by_torch:
        save_torch(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="x.pth: contains .*mkdir, which is not a tensor") as error:
        read_tensors(path)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


class BrokenScalar:
    """A NumPy scalar of a type that was told it holds objects: reading it crashed the process."""

    def __reduce__(self):
        return np._core.multiarray.scalar, (BrokenType(), b"12345678")


class BrokenType:
    def __reduce__(self):
        state = (3, "<", None, None, None, -1, -1, 2)
        return np.dtype, ("f8", False, True), state


@needs.torch
def test_broken_numpy_objects_are_not_built(tmp_path):
    content = {"state_dict": torch_state(), "config_dict": BrokenScalar()}
    assert_arrays(read_tensors(save_torch(content, tmp_path / "x.pth")))


@needs.torch
@pytest.mark.parametrize("kind", ["sparse", "meta", "complex"])
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, kind):
    torch = importlib.import_module("torch")
    tensor = {
        "sparse": lambda: torch.ones(2, 3).to_sparse(),
        "meta": lambda: torch.empty(2, device="meta"),
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
    }[kind]()
    with pytest.raises(InputError, match="x.pth: a.weight: must (be a plain array|be real)"):
        read_tensors(save_torch({"a.weight": tensor}, tmp_path / "x.pth"))


@needs.torch
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"<html>Not found</html>", pickle.dumps([1, 2])], ids=len
)
def test_what_is_no_pytorch_file_is_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match="x.pth: "):
        read_tensors(tmp_path / "x.pth")


@needs.torch
def test_a_file_cut_short_is_refused(tmp_path):
    path = save_torch(torch_state(), tmp_path / "x.pth")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="x.pth: cannot be read as a PyTorch file; it is damaged"):
        read_tensors(path)


@needs.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "must contain a state dict, .* not a tensor: epoch, lr"),
        ([1, 2], "contains a list, must be a state dict"),
        ({}, "contains no tensors"),
    ],
)
def test_a_file_without_state_dict_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_tensors(save_torch(content, tmp_path / "x.pth"))


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, None])
def test_damaged_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(5, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-2] if content is None else content)
    with pytest.raises(InputError, match="x.safetensors: cannot be read as safetensors"):
        read_tensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="none.pth: no such file"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a folder"):
        read_tensors(tmp_path)


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"")
    monkeypatch.setattr(torch_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torch"):
        read_tensors(tmp_path / "x.pth")
