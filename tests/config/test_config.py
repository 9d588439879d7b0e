"""Loading, overriding, checking and storing configs; no setting without a reader."""

import inspect
import re

import pytest
from paths import ROOT

from contrastseg_jax.config.default import VARIANTS
from contrastseg_jax.config.load import from_json, load_config, schema
from contrastseg_jax.config.rules import (
    FOLDERS,
    LEFT_OPEN,
    OPERATIONAL,
    PHOTOGRAPHIC,
    RULES,
    broken_rules,
    decides_evaluation,
)
from contrastseg_jax.config.tree import leaves
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.losses.segmentation import PIXEL_LOSSES
from contrastseg_jax.parallel import device_memory
from contrastseg_jax.setup.preflight import check

DEFAULT = str(ROOT / "configs" / "default.py")
FILES = sorted(path for path in (ROOT / "configs").glob("*.py"))
NEEDED = {  # what a user has to say
    "default.py": ["data.root=/data", "data.class_names=('a', 'b')"],
    "folder.py": ["data.root=/data", "data.class_names=('a', 'b')"],
    **dict.fromkeys(
        ("camvid.py", "cityscapes.py", "pascal_context.py", "coco_stuff.py", "ade20k.py"),
        ["data.root=/data"],
    ),
}


def config_with(*overrides, spec=""):
    return load_config(DEFAULT + spec, overrides)


def check_rules(*overrides, num_devices=1):
    problems = broken_rules(
        config_with("data.name=synthetic", *overrides),
        choices={
            "model.name": ("hrnet_w18", "hrnet_w48"),
            "data.name": ("synthetic", "camvid", "tfds"),
        },
        num_devices=num_devices,
    )
    if problems:
        raise listed("the config", problems)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("variant", ["", "ce", "contrast", "memory", "pretrain"])
def test_every_config_is_valid(path, variant, monkeypatch):
    """The bank fits an accelerator of 16 GB."""
    monkeypatch.setattr(device_memory, "device_bytes", lambda: 16 << 30)
    spec = f":hrnet_tiny,{variant}" if variant else ""
    config = load_config(str(path) + spec, NEEDED.get(path.name, []))
    if path.name != "default.py":
        check(config, mode="train")
    settings = dict(leaves(config))
    for setting, value in VARIANTS[variant or "memory"].items():
        assert settings[setting] == value


def test_every_setting_is_read():
    """As config.GROUP.KEY, by a local name of its group, or with its whole group unpacked."""
    local = {"contrast": "settings", "model": "net"}
    paths = (ROOT / "contrastseg_jax").rglob("*.py")
    source = "\n".join(path.read_text() for path in paths if path.parent.name != "config")
    for path, _ in leaves(config_with()):
        *_, group, key = f"config.{path}".split(".")
        if group == "terms":
            assert key in PIXEL_LOSSES, f"no such loss: {path}"
            continue
        if group in PIXEL_LOSSES:  # handed to it whole
            assert key in inspect.signature(PIXEL_LOSSES[group]).parameters, f"not read: {path}"
            continue
        unpacked = re.search(rf"\*\*(config|data)\.{group}\b", source)
        parameter = unpacked and re.search(rf"^    {key}: ", source, re.MULTILINE)
        named = rf"\b({group}|{local.get(group, group)})\.{key}\b"
        assert parameter or re.search(named, source), f"nothing reads {path}"


def test_every_setting_has_its_rules_or_none_on_purpose():
    """So that a new one is not forgotten; and no rule is left of one that is gone."""
    settings = dict(leaves(config_with()))
    assert RULES.keys() == settings.keys()
    without = {path for path, rules in RULES.items() if not rules}
    assert without == {
        *(
            "data.name",
            "model.name",
            "model.remat",
            "model.freeze",
        ),  # `broken_rules` is told, and `preflight.check`
        *(path for path, value in settings.items() if isinstance(value, bool)),
    }


def test_rules_are_in_the_order_of_the_schema():
    """In which those that are broken are listed."""
    source = (ROOT / "contrastseg_jax" / "config" / "default.py").read_text()
    local = {"net": "model", "evaluate": "eval", "config": ""}
    defined = re.findall(r"^    (\w+(?:\.\w+)*)\.(\w+) = (?!.*ConfigDict)", source, re.MULTILINE)
    paths = [f"{local.get(group, group)}.{key}".lstrip(".") for group, key in defined]
    assert list(RULES) == paths


@pytest.mark.parametrize("group", [FOLDERS, LEFT_OPEN, OPERATIONAL, PHOTOGRAPHIC])
def test_groups_name_settings(group):
    assert set(group) <= RULES.keys() and len(set(group)) == len(group)


def test_all_bad_overrides_are_listed_with_the_nearest_name():
    with pytest.raises(InputError) as error:
        config_with(
            *("data.name=synthetic", "train.batchsize=3", "contrast.temprature=2"),
            *("train.num_steps=a", "seed", "tau=1"),
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "5 problems in the config:"
    assert "train.batchsize: no such setting, did you mean train.batch_size?" in lines[1]
    assert "contrast.temprature: no such setting, did you mean contrast.temperature?" in lines[2]
    assert "train.num_steps = a: must be a whole number" in lines[3]
    assert "seed: write it as --config.seed=VALUE" in lines[4]


@pytest.mark.parametrize(
    ("path", "suggested"),
    [("train.seed", "seed"), ("trian.num_steps", "train.num_steps"), ("optim.lr", None)],
)
def test_the_last_name_of_a_setting_counts_more_than_its_group(path, suggested):
    with pytest.raises(InputError) as error:
        config_with(f"{path}=1")
    hint = f", did you mean {suggested}?" if suggested else ""
    assert f"  {path}: no such setting{hint}" in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.learning_rate=1", 1.0),
        ("optim.learning_rate=5e-3", 0.005),
        ("augment.scale_range=(1, 2)", (1.0, 2.0)),
        ("augment.scale_range=[1, 2]", (1.0, 2.0)),
        ("data.class_names=('a', 'b')", ("a", "b")),
        ("data.root=007", "007"),
        ("loss.class_weights=(1, 2.5)", (1, 2.5)),
    ],
)
def test_overrides_take_the_type_of_the_default(text, value):
    path = text.partition("=")[0]
    got = dict(leaves(config_with(text)))[path]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("train.batch_size=2.5", "train.batch_size=True", "augment.crop_size=64"),
        *("optim.momentum=x", "contrast.approximate=1", "contrast.approximate=yes"),
    ],
)
def test_overrides_of_another_type_are_refused(text):
    with pytest.raises(InputError, match=re.escape(text.replace("=", " = "))):
        config_with(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.num_steps=-5", "train.num_steps = -5: must be at least 1"),  # so no warm-up fits
        ("memory.pixel_size=-5000", "memory.pixel_size = -5000: must not be negative"),
        ("data.class_names=abc", "data.class_names = abc: must be a tuple, e.g. (1, 2)"),
    ],
)
def test_what_follows_from_a_fault_is_no_other_fault(setting, message):
    with pytest.raises(InputError) as error:
        of_names = ("data.name=tfds", "data.tfds.dataset=x") if "names" in setting else ()
        check_rules(*of_names, setting)
    assert str(error.value).startswith(f"1 problem in the config:\n  {message}")


def test_all_broken_rules_are_listed():
    with pytest.raises(InputError) as error:
        check_rules(
            "model.name=hrnet_w49",
            "contrast.temperature=0",
            "contrast.candidates=bothh",
            "augment.crop_size=(1, 2, 3)",
            "train.batch_size=10",
            num_devices=4,
        )
    text = str(error.value)
    assert text.startswith("5 problems in the config:")
    assert "model.name = 'hrnet_w49': must be one of hrnet_w18, hrnet_w48, did you mean" in text
    assert "contrast.temperature = 0.0: must be > 0" in text
    assert "did you mean both?" in text
    assert "augment.crop_size = (1, 2, 3): must be (height, width)" in text
    assert "train.batch_size = 10: must be a multiple of the 4 devices, e.g. 8 or 12" in text


def test_every_device_has_part_in_every_micro_batch():
    check_rules("train.accumulation_steps=4", "train.batch_size=8", num_devices=2)
    with pytest.raises(InputError) as error:
        check_rules("train.accumulation_steps=3", "train.batch_size=8", num_devices=2)
    rule = "must be a multiple of the 2 devices times train.accumulation_steps = 3, e.g. 6 or 12"
    assert f"train.batch_size = 8: {rule}" in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.root=caf\udce9"],
        ["seed=-1"],
        ["seed=2147483648"],
        ["loss.class_weights=('a', 1.0)"],
        ["data.class_names=([1], [2])"],
        ["data.class_names=(1, 2)"],
        ["augment.flip_rate=1.5"],
        ["augment.color_distortion=-0.5"],
        ["augment.class_uniform_rate=2"],
        ["augment.blur_rate=-0.1"],
        ["augment.erase_rate=1.1"],
        ["augment.class_mix_rate=nan"],
        ["data.train_splits=()"],
        ["data.train_splits=('train', 'train')"],
        ["data.train_splits=(1, 2)"],
        ["data.val_fraction=0.1"],  # synthetic has its own
        *([f"data.val_fraction={value}"] for value in (1, -0.1, 7)),
        ["data.val_unit=frame"],
        ["data.num_workers=-1"],
        ["augment.scale_range=(2.0, 1.0)"],
        ["augment.scale_range=(1.0,)"],
        ["model.image_mean=(1.0, 2.0)"],
        ["model.image_std=(1.0, 0.0, 1.0)"],
        ["model.image_std=('a', 'b', 'c')"],
        ["model.image_std=(0.229, 0.224, 0.225)"],
        ["model.image_mean=(-5.0, 300.0, 0.0)"],
        ["model.image_mean=(0.485, 0.456, 0.406)"],
        ["model.image_std=(300.0, 1.0, 1.0)"],
        ["model.image_std=(-1.0, 1.0, 1.0)"],
        ["model.dropout_rate=1.0"],
        ["model.channel_order=rgb"],
        ["model.proj_dim=0"],
        ["contrast.warmup_steps=40000"],
        ["contrast.ramp_steps=-1"],
        ["loss.segmentation_weight=-1.0"],
        ["loss.segmentation_weight=0.0", "contrast.candidates=none"],
        ["loss.ramp_steps=-1"],
        ["data.train_subset=0"],
        ["data.train_subset=1.5"],
        ["data.train_subset=-3"],
        ["data.train_subset=nan"],
        ["memory.key_pixels=right"],
        ["memory.key_network=ema", "optim.ema_decay=0.0"],
        ["memory.pixel_size=0", "memory.segment_size=0"],
        ["data.ignore_values=(256,)"],
        ["data.synthetic.num_classes=1"],
        ["loss.class_weights=(1.0, -1.0)"],
        ["loss.class_weights=(1.0, 2.0)", "loss.class_weighting=enet"],
        ["loss.class_weighting=auto"],
        ["loss.terms.cross_entropy=0"],
        ["loss.terms.lovasz=-1"],
        ["loss.cross_entropy.label_smoothing=1.0"],
        ["loss.ohem.threshold=1.5"],
        ["loss.rmi.pool_size=0"],
        ["optim.ema_decay=1.0"],
        ["optim.head_lr_multiplier=0"],
        ["optim.name=adam"],
        ["optim.schedule=step"],
        ["optim.decayed=norms"],
        ["optim.betas=(0.9,)"],
        ["optim.betas=(0.9, 1.0)"],
        ["optim.clip_norm=-1.0"],
        ["train.accumulation_steps=0"],
        ["data.name=camvid"],
        ["data.name=tfds", "data.class_names=('a', 'b')"],
    ],
    ids=lambda o: o[0],
)
def test_each_rule_holds(overrides):
    check_rules()
    name = overrides[0].partition("=")[0]
    name = {"data.name=camvid": "data.root", "data.name=tfds": "data.tfds.dataset"}.get(
        overrides[0], name
    )
    with pytest.raises(InputError, match=re.escape(name)) as error:
        check_rules(*overrides)
    assert str(error.value).startswith("1 problem in the config:")


@pytest.mark.parametrize("mean", [(), (0.0, 0.0, 0.0), (127.5, 127.5, 127.5), (0.0, 2.0, 0.0)])
def test_means_in_grey_levels_are_taken(mean):
    check_rules(f"model.image_mean={mean}")


def test_folders_are_the_same_by_whatever_path(tmp_path, monkeypatch):
    """Or a run could not be started again from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w").mkdir()
    (tmp_path / "link").symlink_to("w")
    for spelling in ("w", "./w", "~/w", "link", tmp_path / "w"):
        assert config_with(f"model.init_from={spelling}").model.init_from == str(tmp_path / "w")
    assert config_with("data.root=~/w").data.root == str(tmp_path / "w")
    assert config_with("data.root=w").data.root == "w"
    assert config_with().model.init_from == config_with().data.root == ""
    stored = from_json('{"model": {"init_from": "w"}}', "config.json")
    assert stored.model.init_from == str(tmp_path / "w")


def test_recipes_have_the_weights_of_their_classes():
    config = load_config(str(ROOT / "configs" / "cityscapes.py"), ["data.root=/data"])
    weights = config.loss.class_weights
    assert len(weights) == 19
    assert (weights[0], weights[-1]) == (0.8373, 1.0507)  # road, bicycle


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_heads_learn_faster_where_they_do_in_the_original(path):
    config = load_config(str(path), NEEDED.get(path.name, []))
    faster = path.stem in ("pascal_context", "coco_stuff")
    assert config.optim.head_lr_multiplier == (10 if faster else 1)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_name_without_py_is_that_of_a_recipe(path, tmp_path, monkeypatch):
    needed = NEEDED.get(path.name, [])
    expected = load_config(f"{path}:hrnet_tiny,ce", needed)
    monkeypatch.chdir(tmp_path)
    assert load_config(f"{path.stem}:hrnet_tiny,ce", needed) == expected
    assert load_config(path.stem, needed) == load_config(str(path), needed)


@pytest.mark.parametrize(
    ("name", "hint"), [("camvd", ", did you mean camvid?"), ("zebra", ""), ("configs/nothing", "")]
)
def test_an_unknown_recipe_lists_those_there_are(name, hint):
    with pytest.raises(InputError) as error:
        load_config(f"{name}:hrnet_tiny,ce")
    recipes = ", ".join(path.stem for path in FILES)
    known = f"(recipes: {recipes}; or a file of your own, FILE.py)"
    assert str(error.value) == f"--config={name}: no such recipe{hint} {known}"


def test_files_that_are_no_config(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file"):
        load_config("configs/nothing.py")
    with pytest.raises(InputError, match="variant 'cee'"):
        config_with(spec=":hrnet_w18,cee")
    path = tmp_path / "typo.py"
    path.write_text(
        "from configs import default\n"
        "def get_config(spec=''):\n"
        "    config = default.get_config()\n"
        "    config.train.batchsize = 3\n"
        "    return config\n"
    )
    with pytest.raises(InputError, match=r'Did you mean "batch_size".*typo.py, line 4'):
        load_config(str(path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--config=typo.py:toy: .*\(typo.py, line 4\)"):
        load_config("typo.py:toy")
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match="nothing_of_this_name"):
        load_config(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match="get_config"):
        load_config(str(path))


def test_what_is_evaluated_is_decided_by_settings_of_data_and_evaluation():
    decisive = {path for path, _ in leaves(schema()) if decides_evaluation(path)}
    assert {path.partition(".")[0] for path in decisive} == {"data", "eval"}
    assert {"data.name", "data.short_side", "data.tfds.val_split", "eval.pad_multiple"} <= decisive
    assert not decisive & {"data.root", "data.tfds.train_split", "eval.batch_size", *OPERATIONAL}
    assert not decides_evaluation("data.train_anything")
