"""Label settings of the user's own folder."""

import pytest

from contrastseg_jax.data.dataset import label_map
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError


def test_folder_counts_values_from_zero_without_the_ignored():
    spec = DatasetSpec(name="folder", class_names=("a", "b", "c"), ignore_values=(0, 2, 255))
    found = label_map(spec)
    assert found.names == ("a", "b", "c")
    assert found.train_ids == {0: 255, 2: 255, 255: 255, 1: 0, 3: 1, 4: 2}
    assert len(set(found.palette)) == 3


@pytest.mark.parametrize(
    ("class_names", "ignore_values", "message"),
    [
        ((), (255,), r"data\.class_names has 0 names: name 1\.\.255 classes"),
        (tuple(map(str, range(255))), (0, 255), r"has 255 names: name 1\.\.254 classes"),
        (("a",), (256,), r"data\.ignore_values = \(256,\): must lie in 0\.\.255"),
    ],
)
def test_folder_label_settings_are_checked(class_names, ignore_values, message):
    spec = DatasetSpec(name="folder", class_names=class_names, ignore_values=ignore_values)
    with pytest.raises(InputError, match=message):
        label_map(spec)
