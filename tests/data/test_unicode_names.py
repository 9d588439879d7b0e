"""Names in one Unicode form beside the same in the other, as macOS and Linux write them."""

import unicodedata

import numpy as np
import pytest
from audited import folder_spec, prepare, run
from raw_data import names, write, write_example, write_image, write_mask
from small import make_config

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.errors import InputError
from contrastseg_jax.setup.preflight import check

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "sé/été à Åre") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("image", "mask"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_an_image_finds_its_mask_in_the_other_form(root, image, mask):
    assert COMPOSED != DECOMPOSED
    write_image(root / "images" / "train" / f"{image}.jpg", (6, 8))
    write_mask(root / "labels" / "train" / f"{mask}.png", np.ones((6, 8)))
    results = run(root)
    assert results["findings"] == [] and results["splits"]["train"]["num_examples"] == 4
    records = prepare(root)
    assert names(records) == [*"abc", COMPOSED]
    file = root / "labels" / "train" / f"{mask}.png"
    assert records[3]["label"] == file.read_bytes()


def test_a_name_in_both_forms_is_a_finding(root):
    for seed, name in enumerate((COMPOSED, DECOMPOSED)):
        write_image(root / "images" / "train" / f"{name}.jpg", (6, 8), seed)
    write_mask(root / "labels" / "train" / f"{COMPOSED}.png", np.ones((6, 8)))
    (found,) = run(root)["findings"]
    files = [str(root / "images" / "train" / f"{name}.jpg") for name in (COMPOSED, DECOMPOSED)]
    assert found["kind"] == "layout" and found["file"] in files
    (other,) = {*files} - {found["file"]}
    message = f"{found['file']}: same name as {other} in another Unicode form (NFC, NFD)"
    assert found["message"] == message
    with pytest.raises(InputError, match="in another Unicode form"):
        prepare(root)


def test_a_mask_of_another_suffix_is_found_in_either_form(root):
    write_example(root, "train", COMPOSED, 1)
    mask = root / "labels" / "train" / f"{COMPOSED}.png"
    mask.rename(root / "labels" / "train" / "x.bmp")
    (root / "labels" / "train" / "x.bmp").rename(
        root / "labels" / "train" / "sé" / unicodedata.normalize("NFD", "été à Åre.bmp")
    )
    (found,) = run(root)["findings"]
    assert found["kind"] == "suffix"


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
def test_lists_name_files_in_either_form(listed, spec_of, raw):
    image, mask = f"train/{COMPOSED}.png", f"trainannot/{DECOMPOSED}.png"
    write_image(raw / image)
    write_mask(raw / mask, np.zeros((2, 3)))
    write(raw / "train.txt", f"train/{listed}.png trainannot/{listed}.png\n".encode())
    (record,) = open_split(spec_of("camvid"), "train")
    assert record["image"] == (raw / image).read_bytes()
    assert record["label"] == (raw / mask).read_bytes()
    write(raw / "train.txt", f"train/{listed}.png trainannot/{listed}x.png\n".encode())
    with pytest.raises(InputError, match="image without mask"):
        open_split(spec_of("camvid"), "train")


def test_class_names_are_the_same_in_either_form(root):
    spellings = [unicodedata.normalize(form, "été") for form in ("NFC", "NFD")]
    configs = [make_config(f"data.class_names=('a', '{name}')") for name in spellings]
    assert configs[0].data.class_names == configs[1].data.class_names == ("a", spellings[0])
    twice = make_config("data.name=folder", f"data.root={root}", f"data.class_names={spellings}")
    with pytest.raises(InputError, match=r"data\.class_names = .*each once"):
        check(twice, mode="audit")
    assert folder_spec(root).class_names == ("sky", "road", "tree")
