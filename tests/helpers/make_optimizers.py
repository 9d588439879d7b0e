"""Writes tests/stored/optim: twenty steps of PyTorch's optimisers on a small problem.

    PYTHONPATH=tests/helpers python tests/helpers/make_optimizers.py

One file per case: the problem, the settings that mean the same here, and the parameters after each
step, computed in float64. The gradient of `accumulation` is the sum of those of four micro-batches.
"""

import json

import numpy as np
import torch
from paths import STORED
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    PolynomialLR,
)

FOLDER = STORED / "optim"
STEPS, WARMUP = 20, 5
IGNORED = 255
CLASS_WEIGHTS = (0.5, 1.0, 2.0)
SHAPES = {
    "backbone/kernel": (6, 8),
    "backbone/bias": (8,),
    "backbone/scale": (8,),
    "cls_head/kernel": (8, 3),
    "cls_head/bias": (3,),
}
SCHEDULES = {
    "poly": lambda optimizer: PolynomialLR(optimizer, STEPS, power=0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "constant": lambda optimizer: ConstantLR(optimizer, factor=1.0),
}
# Of the optimiser; others by name: schedule, warm-up, factor of the head's learning rate, whether
# only kernels decay, largest norm of the gradient, micro-batches of a step.
DEFAULT = {"schedule": "poly", "warmup": 0, "heads": 1, "kernels": False, "clip": 0.0, "parts": 1}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
CASES = {
    "sgd": (SGD, {}),
    "sgd_groups": (SGD, {"heads": 10, "kernels": True, "schedule": "cosine"}),
    "sgd_clipped": (SGD, {"clip": 0.2, "schedule": "constant", "warmup": WARMUP}),
    "accumulation": (SGD, {"parts": 4}),
    "adamw": (ADAMW, {}),
    "adamw_groups": (
        ADAMW,
        {"heads": 10, "kernels": True, "clip": 0.2, "schedule": "cosine", "warmup": WARMUP},
    ),
}


def problem():
    """Inputs, labels of which some are ignored, and first parameters of two layers."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(32, 6)), "label": rng.integers(3, size=32)}
    arrays["label"][::5] = IGNORED
    arrays["label"][4:20:4] = IGNORED  # so that micro-batches have different weights
    return arrays | {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def run(of_optimizer, settings):
    """The parameters after each step, flattened one after the other."""
    settings, arrays = DEFAULT | settings, problem()
    x, label = torch.tensor(arrays["x"]), torch.tensor(arrays["label"])
    params = {name: torch.tensor(arrays[name], requires_grad=True) for name in SHAPES}
    optimizer = torch_optimizer(params, of_optimizer, settings)
    schedules = [SCHEDULES[settings["schedule"]](optimizer)]
    if settings["warmup"]:
        warmup = settings["warmup"]
        schedules.append(LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1))
    schedule = ChainedScheduler(schedules)
    weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    total = weights[label[label != IGNORED]].sum()
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in range(settings["parts"]):
            rows = slice(part, None, settings["parts"])
            loss = torch.nn.functional.cross_entropy(
                logits(params, x[rows]), label[rows], weights, ignore_index=IGNORED, reduction="sum"
            )
            (loss / total).backward()
        if settings["clip"]:
            torch.nn.utils.clip_grad_norm_(params.values(), settings["clip"])
        optimizer.step()
        schedule.step()
        history.append(np.concatenate([p.detach().numpy().ravel() for p in params.values()]))
    return np.array(history)


def logits(params, x):
    """Of two layers, the first with a scale as a norm has it."""
    hidden = torch.tanh(
        (x @ params["backbone/kernel"]) * params["backbone/scale"] + params["backbone/bias"]
    )
    return hidden @ params["cls_head/kernel"] + params["cls_head/bias"]


def torch_optimizer(params, of_optimizer, settings):
    """PyTorch's, with a group for each learning rate and decay."""
    groups = []
    for name, param in params.items():
        group = {"params": [param]}
        if name.startswith("cls_head"):
            group["lr"] = of_optimizer["lr"] * settings["heads"]
        if settings["kernels"] and not name.endswith("kernel"):
            group["weight_decay"] = 0.0
        groups.append(group)
    kind = torch.optim.AdamW if "betas" in of_optimizer else torch.optim.SGD
    return kind(groups, **of_optimizer)


def as_config(of_optimizer, settings):
    """The settings of a config that mean the same."""
    settings = DEFAULT | settings
    names = {"lr": "learning_rate"}
    own = {f"optim.{names.get(key, key)}": value for key, value in of_optimizer.items()}
    return own | {
        "optim.name": "adamw" if "betas" in of_optimizer else "sgd",
        "optim.schedule": settings["schedule"],
        "optim.warmup_steps": settings["warmup"],
        "optim.head_lr_multiplier": float(settings["heads"]),
        "optim.decayed": "kernels" if settings["kernels"] else "all",
        "optim.clip_norm": settings["clip"],
        "loss.class_weights": CLASS_WEIGHTS,
        "train.accumulation_steps": settings["parts"],
        "train.num_steps": STEPS,
    }


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        meta = {"settings": as_config(*case), "torch": torch.__version__}
        np.savez_compressed(
            FOLDER / f"{name}.npz", params=run(*case), meta=json.dumps(meta), **problem()
        )


if __name__ == "__main__":
    main()
