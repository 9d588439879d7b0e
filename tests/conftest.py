"""JAX as strict as it gets, two virtual devices, and compiled programs kept between runs."""

import os

import checked_shapes  # noqa: F401
import compile_fast
from paths import ROOT

# Before JAX is imported. NPROC: virtual CPU devices need a thread each, or collectives may hang.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{compile_fast.flags(num_devices=2)} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
import small
from program import start_group
from raw_data import write_example

from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.training.train import train

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.devices()  # started, so that no test can change their number


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The config and workdir of a small run, trained to its end on two devices."""
    folder = tmp_path_factory.mktemp("run")
    config = small.make_config(f"data.prepared_dir={folder / 'prepared'}")
    train(small.setup_of(config), folder / "run")
    return config, folder / "run"


@pytest.fixture
def raw(tmp_path):
    """Where `spec_of` looks for raw data."""
    return tmp_path / "raw"


@pytest.fixture
def spec_of(tmp_path, raw):
    """Specs of data sets in `raw`, by name."""
    settings = {"root": str(raw), "prepared_dir": str(tmp_path / "prepared")}
    return lambda name, **changes: DatasetSpec(name=name, **settings, **changes)


@pytest.fixture
def root(raw):
    """A data set in the layout of `folder`: three examples to train on, two to validate."""
    for seed, name in enumerate("abcde"):
        write_example(raw, "train" if name < "d" else "val", name, seed)
    return raw


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def start():
    """Starts main.py in several processes; what still runs at a test's end is killed."""
    started = []

    def start(*arguments, **settings):
        group = start_group(*arguments, **settings)
        started.extend(group)
        return group

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
