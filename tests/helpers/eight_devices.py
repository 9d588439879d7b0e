"""What `test_multi_device.py` compares, computed on 1 to 8 devices: to be run on its own.

FLOAT64=1 python tests/helpers/eight_devices.py FILE.npz   # but for selections by hardness,
python tests/helpers/eight_devices.py FILE.npz             # which compare the bits of float32
"""

import os
import sys

import compile_fast

os.environ["XLA_FLAGS"] = compile_fast.flags(num_devices=8)

import functools
import itertools

if os.environ.get("FLOAT64"):
    import float64

import jax
import numpy as np
from small import make_batch, make_config, run_steps, start

from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.parallel import sharding

FLOAT = "float64" if os.environ.get("FLOAT64") else "float32"
STRATEGIES = {"float64": ("all", "random"), "float32": ("semi_hard", "hardest")}[FLOAT]
SHARDINGS = ("replicated", "slots")
# Devices, and how the state of a whole train step lies over them.
LAYOUTS = {
    "1": (1, ()),
    "2": (2, ()),
    "4, in parts": (4, ("memory.sharding=slots", "parallel.fsdp=True")),
}
CLASSES, DIM = 3, 16


def make_maps(seed, moved=False):
    """Embeddings, labels and predictions of eight images; `moved`: embeddings by one rounding."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(8, 6, 7, DIM))
    embedding /= np.linalg.norm(embedding, axis=-1, keepdims=True)
    embedding = embedding.astype(FLOAT)
    if moved:
        away = np.random.default_rng(99).choice([-np.inf, np.inf], embedding.shape).astype(FLOAT)
        embedding = np.nextafter(embedding, away)
    label, prediction = rng.integers(CLASSES, size=(2, 8, 6, 7)).astype(np.int32)
    return embedding, label, prediction, np.arange(8)


def contrast(maps, bank, *, mesh, split_memory, strategy):
    """Loss and its gradient in the embeddings, then the bank with their keys in it."""
    embedding, label, prediction, index = maps
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), index)

    def loss_of(embedding):
        anchors = sample_anchors(
            *(embedding, label, prediction, keys),
            num_classes=CLASSES,
            anchors_per_image=12,
            max_views=4,
            strategy="hard",
        )
        return pixel_contrast_loss(
            anchors,
            (batch_candidates(anchors), *memory_bank.memory_candidates(bank)),
            jax.random.key(1),
            temperature=0.1,
            base_temperature=0.07,
            positives=strategy,
            negatives=strategy,
            num_positives=5,
            num_negatives=6,
            mesh=mesh,
            split_candidates=split_memory,
        )

    (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(embedding)
    pixel = memory_bank.pixel_keys(embedding, label, keys, num_classes=CLASSES, pixels_per_class=2)
    segment = memory_bank.segment_keys(embedding, label, num_classes=CLASSES)
    rows = sharding.replicate((pixel, segment), mesh)
    bank = memory_bank.enqueue(bank, *rows, mesh=mesh if split_memory else None)
    return loss, metrics, grad, bank


def run_contrast(num_devices, bank_sharding, strategy, moved=False):
    """Three steps from a bank that is partly filled: later ones overwrite slots of earlier ones."""
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    split_memory = bank_sharding == "slots"
    bank = memory_bank.init_memory(
        num_classes=CLASSES, pixel_size=24, segment_size=16, proj_dim=DIM, dtype=FLOAT
    )
    replicated = sharding.replicated(mesh)
    of_bank = sharding.bank_sharding(mesh, bank) if split_memory else replicated
    step = jax.jit(
        functools.partial(contrast, mesh=mesh, split_memory=split_memory, strategy=strategy),
        in_shardings=(sharding.batch_sharding(mesh), of_bank),
        out_shardings=(None, None, None, of_bank),
        donate_argnums=1,
    )
    bank = jax.device_put(bank, of_bank)
    results = []
    for seed in range(3):
        maps = jax.device_put(make_maps(seed, moved), sharding.batch_sharding(mesh))
        loss, metrics, grad, bank = step(maps, bank)
        results += [loss, grad, *(metrics[key] for key in sorted(metrics))]
        jax.block_until_ready(bank)
    # One image of a network that is lost: no device may miss it, and the bank does not keep it.
    embedding, *others = make_maps(3)
    embedding[3] = np.nan
    maps = jax.device_put((embedding, *others), sharding.batch_sharding(mesh))
    with jax.debug_nans(False):
        loss, _, _, bank = step(maps, bank)
        assert np.isnan(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(bank))
    held = {shard.data.shape[1] for shard in bank.pixel.addressable_shards}
    assert held == {24 // num_devices if split_memory else 24}
    return [np.asarray(x) for x in (*results, *jax.tree.leaves(bank))]


def run_step(bank_sharding):
    """The HLO of the real step on eight devices, and how often two batches were traced."""
    settings = ("memory.pixel_size=65536", "memory.segment_size=64", "train.batch_size=8")
    selection = ("contrast.negatives=semi_hard", "contrast.num_negatives=8")
    config = make_config(*settings, *selection, f"memory.sharding={bank_sharding}")
    step_fn, state, mesh = start(config, num_devices=8)
    batch = sharding.to_devices(make_batch(size=8), mesh)
    with jax.debug_nans(False):  # which would keep the arguments, to look for the NaN again
        hlo = step_fn.lower(state, batch).compile().as_text()
    for seed in range(2):
        batch = sharding.to_devices(make_batch(seed, size=8), mesh)
        state, _ = jax.block_until_ready(step_fn(state, batch))
    return hlo, step_fn._cache_size()


def run_training(num_devices, settings):
    """Metrics of three steps and the state after them, by their paths."""
    config = make_config(*float64.SETTINGS, "optim.learning_rate=0.1", *settings)
    state, history, _ = run_steps(config, num_devices)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path((history, state))
    }


def main(path):
    """Write everything into one file."""
    results = {}
    for num_devices, bank_sharding, strategy in itertools.product((1, 8), SHARDINGS, STRATEGIES):
        for i, array in enumerate(run_contrast(num_devices, bank_sharding, strategy)):
            results[f"{strategy}/{num_devices}/{bank_sharding}/{i}"] = array
    if FLOAT == "float32":
        for strategy in STRATEGIES:
            for i, array in enumerate(run_contrast(1, "replicated", strategy, moved=True)):
                results[f"{strategy}/moved/{i}"] = array
        for bank_sharding in SHARDINGS:
            hlo, traces = run_step(bank_sharding)
            results |= {f"hlo/{bank_sharding}": hlo, f"traces/{bank_sharding}": traces}
    else:
        for layout in LAYOUTS:
            for key, array in run_training(*LAYOUTS[layout]).items():
                results[f"training/{layout}/{key}"] = array
    np.savez(path, **results)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_debug_nans", True)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_CACHE"])
    main(sys.argv[1])
