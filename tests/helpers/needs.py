"""What some tests need and not every machine has: the end of a run says how to get it."""

from importlib.util import find_spec

import pytest
from raw_data import REAL_CAMVID

REASONS = {
    "torch": "needs PyTorch: pip install torch==2.13.0",
    "timm": "needs timm, in an environment of its own: pip install torchvision timm",
    "torchvision": "needs torchvision, in an environment of its own: pip install torchvision timm",
    "libtpu": "needs libtpu: pip install libtpu",
}


def package(name):
    """A package that tests compare with; without it the test is skipped."""
    return pytest.importorskip(name, reason=REASONS[name.partition(".")[0]])


def _installed(name):
    return pytest.mark.skipif(not find_spec(name), reason=REASONS[name])


libtpu = _installed("libtpu")


def torch(test):
    """A test that PyTorch has a part in."""
    return pytest.mark.torch(_installed("torch")(test))


camvid = pytest.mark.skipif(
    not REAL_CAMVID.exists(), reason="needs CamVid, SegNet's copy, in ../shared/camvid"
)
