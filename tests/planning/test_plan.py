"""What a plan says is what training then takes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import needs
import pytest
from jax.sharding import PartitionSpec
from paths import ROOT
from small import make_config, setup_of, start

from contrastseg_jax.config.rules import broken_rules
from contrastseg_jax.config.tree import replaced
from contrastseg_jax.contrast.selection import STRATEGIES
from contrastseg_jax.errors import InputError
from contrastseg_jax.parallel import sharding
from contrastseg_jax.planning import plan
from contrastseg_jax.planning.plan import plan_run
from contrastseg_jax.planning.report import Compiled, Plan, report
from contrastseg_jax.planning.topology import find_topology
from contrastseg_jax.setup.preflight import check
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state

pytestmark = pytest.mark.slow

BANK = ("train.batch_size=8", "memory.pixel_size=64", "memory.segment_size=16")
MAIN = (
    *(sys.executable, str(ROOT / "main.py"), "--mode=plan"),
    f"--config={ROOT / 'configs' / 'cityscapes.py'}:hrnet_tiny,memory",
    *("--config.memory.pixel_size=80", "--config.memory.segment_size=8"),
)
GIB = 1 << 30


def size_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def run_main(*flags, timeout=120):
    """`main.py` with the least that a plan needs: no workdir and no data."""
    cache = str(ROOT / ".cache" / "jax")
    return subprocess.run(
        [*MAIN, *flags],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def figures_of(values):
    return {key: value for key, value in values.items() if key not in ("fits", "least_bytes")}


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """The plan for the two devices of the tests: config, status, JSON and text."""
    config, path = make_config(*BANK), tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        texts = []
        patch.setattr("builtins.print", lambda *text, **_: texts.extend(text))
        status = plan_run(config, topology=None, quick=False, time_limit=500, output=path)
    return config, status, json.loads(path.read_text()), texts[0]


@pytest.mark.parametrize("sharding", ["replicated", "slots"])
def test_parts_of_the_state_are_as_large_as_they_will_be(sharding):
    config = make_config(*BANK, f"memory.sharding={sharding}", "optim.ema_decay=0.9")
    _, state, mesh = start(config)
    setup, (tx, _) = setup_of(config), build_optimizer(config)
    found = plan.state_bytes(setup, abstract_state(setup, tx), mesh)
    on_device = jax.tree.map(lambda x: x.addressable_shards[0].data, state)
    held = {
        "parameters": on_device.params,
        "optimiser state": on_device.opt_state,
        "EMA": on_device.ema,
        "BatchNorm statistics": on_device.batch_stats,
        "bank": on_device.memory,
    }
    assert found == {name: size_of(tree) for name, tree in held.items()}


def test_the_compiled_step_is_reported_whole(two_devices):
    _, status, values, text = two_devices
    compiled = values["compiled"]
    assert values["parameters"] == 98_160
    assert values["anchors_per_image"] == 24 and values["cells_per_image"] == 8 * 8
    assert values["flops"] > values["contrast_flops"] > 0
    assert re.search(r"contrast.anchors_per_image \(cells\) +24 of 64", text)
    assert values["bytes_held"]["batch"] == 4 * (32 * 32 * 4 + 4 + 1)
    assert status == 0 and values["fits"] is True
    assert values["least_bytes"] == (
        compiled["arguments"] + compiled["results"] - compiled["aliased"] + compiled["temporaries"]
    )
    held = sum(values["bytes_held"].values())
    assert held <= compiled["arguments"] < held + 1000
    assert compiled["collectives"]["all-reduce"]["number"] > 10
    for word in (
        *("on own devices: 2 x cpu", "0.10 M", "memory per device", "peak memory per device"),
        *("compiled for a CPU", "temporaries", "all-reduce", "compiled in", "fits: "),
    ):
        assert word in text, word
    assert "seconds" not in text


def test_computed_traffic_is_what_the_compiled_step_sends(two_devices):
    _, _, values, _ = two_devices
    computed = sum(values["bytes_sent"].values())
    compiled = sum(kind["bytes"] for kind in values["compiled"]["collectives"].values())
    assert computed == pytest.approx(compiled, rel=0.02)


def test_compiled_operations_are_those_of_the_program_as_written(two_devices):
    _, _, values, _ = two_devices
    assert values["compiled"]["flops"] == pytest.approx(values["flops"] / 2, rel=0.15)


def test_quick_needs_neither_data_nor_libtpu_nor_a_compiler(tmp_path):
    path = tmp_path / "plan.json"
    result = run_main("--quick", "--topology=v5e:2x4", f"--output={path}")
    assert result.returncode == 0, result.stderr
    values = json.loads(path.read_text())
    assert values["compiled"] is None and values["fits"] is None
    assert values["num_devices"] == 8 and values["device_bytes"] == 16 * GIB
    for word in ("8 x TPU v5e with 16.00 GiB", "gradients", "not compiled", "needs at least"):
        assert word in result.stdout, word


def test_after_the_time_limit_the_quick_figures_remain():
    result = run_main("--topology=cpu:4", "--time_limit=0.5", "--config.train.batch_size=4")
    assert result.returncode == 1, result.stderr
    assert "on cpu:4: 4 x cpu" in result.stdout
    assert "not compiled within --time_limit=0.5 s" in result.stdout
    assert "are missing" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"--topology=v9:2x2: must be cpu:N, or a TPU .*v5e:2x2"),
        ("v5e", r"--topology=v5e: must be"),
        ("v5e:0x2", r"--topology=v5e:0x2: must be"),
        ("v5e:2x2x2", r"--topology=v5e:2x2x2: must be .*v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2"),
        ("cpu:2x2", r"--topology=cpu:2x2: must be a number of CPU devices, e.g. cpu:8"),
        ("cpu:64", r"--topology=cpu:64: JAX is already initialised, with 2 devices"),
    ],
)
def test_unknown_topologies_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        find_topology(name)


@pytest.mark.skipif(
    find_spec("libtpu") is not None, reason="what happens without libtpu, which is installed"
)
def test_without_libtpu_the_error_says_what_to_install():
    with pytest.raises(InputError, match=r"--topology=v5e:2x4: .*libtpu.*tpu-plan.*--quick"):
        find_topology("v5e:2x4")


@needs.libtpu
def test_a_tpu_that_is_not_there_is_found_and_compiled_for():
    result = run_main("--topology=v5e:2x2", "--config.augment.crop_size=(64, 64)", timeout=400)
    assert result.returncode == 0, result.stderr
    assert "4 x TPU v5e with 16.00 GiB" in result.stdout and "compiled in" in result.stdout
    with pytest.raises(InputError, match=r"--topology=v5e:3x5: libtpu does not support it"):
        find_topology("v5e:3x5")


def test_the_config_is_checked_for_the_devices_planned_for(capsys):
    settings = dict(topology="v5e:4x4", quick=True, time_limit=1, output=None)
    with pytest.raises(InputError, match=r"train.batch_size = 8: must be a multiple of the 16"):
        plan_run(make_config(*BANK), **settings)
    config = make_config(*BANK, "train.batch_size=16", "memory.pixel_size=50000000")
    assert plan_run(config, **settings) == 1  # training would refuse it
    text = capsys.readouterr().out
    assert "does not fit: 59% of a device's memory" in text
    assert "bank: 59%, must be at most 50%" in text and "memory.sharding=slots" in text


def test_parameters_in_parts_are_gathered():
    """What comes with `parallel.fsdp` is what the compiled step gathers besides."""
    config = make_config(*BANK, "parallel.fsdp=True", "memory.sharding=slots")
    where = find_topology(None)
    found = plan.compiled_plan(plan.quick_plan(config, where), config, where, 500)
    computed = sum(found.bytes_sent.values())
    assert found.bytes_sent["parameters"] > 10**5
    compiled = sum(kind.bytes for kind in found.compiled.collectives.values())
    assert computed == pytest.approx(compiled, rel=0.02)


def test_micro_batches_and_frozen_parts_are_planned_for():
    """What is computed is what the compiled step does, and all images' operations are counted."""
    settings = ("train.accumulation_steps=2", "model.freeze=('stem',)")
    where = find_topology(None)
    whole = plan.quick_plan(make_config(*BANK, settings[1]), where)
    config = make_config(*BANK, *settings)
    found = plan.compiled_plan(plan.quick_plan(config, where), config, where, 500)
    compiled = sum(kind.bytes for kind in found.compiled.collectives.values())
    assert sum(found.bytes_sent.values()) == pytest.approx(compiled, rel=0.03)
    assert found.flops == pytest.approx(whole.flops, rel=0.01)
    assert found.compiled.flops == pytest.approx(found.flops / 2, rel=0.15)
    assert found.bytes_held["optimiser state"] < found.bytes_held["parameters"]
    assert "in 2 micro-batches, on" in report(found, config)


def test_missing_weights_do_not_matter_to_a_plan():
    config = make_config(*BANK, "model.init_from=/nowhere")
    check(config, mode="plan", num_devices=2)
    with pytest.raises(InputError, match="nowhere"):
        check(config, mode="train", reads_weights=True)


def test_what_does_not_fit_comes_with_the_settings_to_change(two_devices):
    config, _, values, _ = two_devices
    large = Compiled(1.0, 1e12, 10, 10, 10, GIB, {})
    held = values["bytes_held"] | {"bank": GIB // 8}
    small = Plan(
        **figures_of(values) | {"device_bytes": GIB // 2, "compiled": large, "bytes_held": held}
    )
    assert small.fits is False
    text = report(small, config)
    assert "does not fit: 200% of a device's memory" in text and "fsdp" not in text
    order = [
        "train.batch_size=4",
        "accumulation_steps=2",
        "remat=('layer1'",
        "model.dtype=bfloat16",
        "crop_size, now (32",
    ]
    order += ["sharding=slots", "memory.dtype=bfloat16", "memory.pixel_size"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)

    text = report(dataclasses.replace(small, bytes_held=held | {"bank": GIB}), config)
    assert text.index("memory.pixel_size") < text.index("train.batch_size=4")
    changed = make_config(*BANK, "model.dtype=bfloat16", "memory.sharding=slots", variant="ce")
    rest = report(dataclasses.replace(small, bytes_held=held | {"bank": 0}), changed)
    assert not re.search("bfloat16|slots|pixel_size", rest)


def test_one_device_sends_nothing(two_devices):
    """Though the sums over the devices stand in its program too."""
    config, _, values, _ = two_devices
    mesh = sharding.make_mesh(jax.devices()[:1])
    total = jax.shard_map(
        lambda x: jax.lax.psum(x.sum(), "data"),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    program = jax.jit(total).lower(jnp.zeros(8)).compile()
    alone = Plan(**figures_of(values) | {"num_devices": 1, "bytes_sent": {}, "compiled": None})
    compiled = plan.figures(program, alone, 1.0)
    assert compiled.flops >= alone.contrast_flops
    text = report(dataclasses.replace(alone, compiled=compiled), config)
    for said in (text, report(alone, config)):
        assert re.search(r"sent per device and step.*\n  nothing +0 bytes\n\n", said)


def test_what_the_compiler_finds_no_room_for_does_not_fit(two_devices, monkeypatch):
    config, _, values, _ = two_devices

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out. Used 20G of 15G hbm.")

    monkeypatch.setattr(plan, "_lower", lambda *_: (None, None, None))
    monkeypatch.setattr(plan, "compile_within", fail)
    quick = Plan(**figures_of(values) | {"compiled": None})
    found = plan.compiled_plan(quick, config, find_topology(None), 1)
    assert found.fits is False
    assert "out of memory when compiling: Used 20G of 15G hbm." in report(found, config)


def test_the_plan_and_the_rules_know_every_strategy():
    assert tuple(plan.POOL) == STRATEGIES
    for setting in ("contrast.positives", "contrast.negatives"):
        config = replaced(make_config(), {setting: "none of them"})
        (problem,) = broken_rules(config, choices={}, num_devices=1)
        assert all(strategy in problem for strategy in STRATEGIES)


def test_the_walk_over_candidates_is_counted():
    """8 images of 24 anchors, 3 classes of 80 slots: 192 anchors meet 432 candidates."""
    flops = plan.contrast_flops(setup_of(make_config(*BANK)))
    assert flops == 4 * 192 * 16 * (432 + 432 / 3 + 192)
    assert plan.contrast_flops(setup_of(make_config(variant="ce"))) == 0
    some = make_config(*BANK, "contrast.negatives=semi_hard", "contrast.num_negatives=8")
    assert plan.contrast_flops(setup_of(some)) == 4 * 192 * 16 * (80 + 432 / 3 + 192)
