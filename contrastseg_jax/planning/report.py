"""The figures of a plan, and its text report."""

from dataclasses import dataclass

from contrastseg_jax.config.tree import Config
from contrastseg_jax.models.zoo import stage_names
from contrastseg_jax.setup.preflight import BANK_SHARE

TOO_LARGE = "out of memory when compiling"  # prefix of a plan's note


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step, on each device."""

    number: int
    bytes: int
    in_loop: int  # of `number`: those in loops with unknown trip count, counted once each
    largest: int  # bytes of one


@dataclass(frozen=True)
class Compiled:
    """Figures of the compiled step; all bytes are per device."""

    seconds: float
    flops: float  # per device: one iteration of every loop, and the estimate of the contrast loss
    arguments: int
    results: int
    aliased: int  # results that reuse the memory of arguments: the state
    temporaries: int
    collectives: dict[str, Traffic]

    @property
    def peak(self) -> int:
        """Peak memory of a step, in bytes."""
        return self.arguments + self.results - self.aliased + self.temporaries


@dataclass(frozen=True)
class Plan:
    """All figures of one config on one topology."""

    model: str
    batch_size: int
    accumulation_steps: int
    topology: str
    device: str
    num_devices: int
    device_bytes: int
    parameters: int
    anchors_per_image: int
    cells_per_image: int  # of the embedding map, from which anchors are sampled
    flops: float  # all devices: the unoptimised program, one iteration of every loop; and the next
    contrast_flops: float  # all devices: estimated, of the loops of the contrast loss
    bytes_held: dict[str, int]  # per device: the state, and the batch
    bytes_sent: dict[str, int]  # per device: estimated
    compiled: Compiled | None = None
    note: str = ""  # why nothing was compiled

    @property
    def least_bytes(self) -> int:
        """Memory per device: the peak, or if that is not known, state and batch."""
        return self.compiled.peak if self.compiled else sum(self.bytes_held.values())

    @property
    def fits(self) -> bool | None:
        """Whether it fits into a device's memory; None: not known."""
        if self.note.startswith(TOO_LARGE) or self.least_bytes > self.device_bytes:
            return False
        if self.bytes_held["bank"] > BANK_SHARE * self.device_bytes:  # training would reject it
            return False
        return True if self.compiled else None


def report(plan: Plan, config: Config) -> str:
    """The text report."""
    n, anchors = plan.num_devices, f"{plan.anchors_per_image} of {plan.cells_per_image}"
    own = plan.compiled.flops if plan.compiled else plan.flops / n
    parts = plan.accumulation_steps
    in_parts = f" in {parts} micro-batches" if parts > 1 else ""
    lines = [
        f"{plan.model}, {plan.batch_size} images per step{in_parts}, on {plan.topology}:"
        f" {n} x {plan.device} with {_size(plan.device_bytes)} each",
        "",
        *_rows({"parameters": f"{plan.parameters / 1e6:.2f} M"}),
        *_rows({"contrast.anchors_per_image (cells)": anchors} if plan.anchors_per_image else {}),
        *_rows({"FLOPs per step": _flops(plan.flops)}),
        *_rows({"contrast loss, estimated": _flops(plan.contrast_flops)}, indent=2),
        *_rows({"FLOPs per step and device": _flops(own)}),
        "",
        "memory per device",
        *_rows({name: _size(size) for name, size in plan.bytes_held.items()}, indent=2),
        "",
        *(_compiled_lines(plan.compiled, plan) if plan.compiled else _computed_lines(plan)),
        "",
    ]
    return "\n".join([*lines, *verdict(plan, config)])


def _compiled_lines(compiled: Compiled, plan: Plan) -> list[str]:
    note = " (compiled for a CPU; other devices differ)" * (plan.device == "cpu")
    parts = {
        "arguments": _size(compiled.arguments),
        "+ results": _size(compiled.results),
        "- results in place of arguments": _size(compiled.aliased),
        "+ temporaries": _size(compiled.temporaries),
    }
    lines = [f"peak memory per device: {_size(compiled.peak)}{note}", *_rows(parts, indent=2)]
    lines += ["", f"{'sent per device and step':34}{'number':>8}{'bytes':>14}{'largest':>14}"]
    if not compiled.collectives:
        lines += _rows({"nothing": _size(0)}, indent=2)
    for kind, sent in compiled.collectives.items():
        sizes = f"{sent.number:8}{_size(sent.bytes):>14}{_size(sent.largest):>14}"
        loops = f"  {sent.in_loop} in loops, counted once each" if sent.in_loop else ""
        lines.append(f"  {kind:32}{sizes}{loops}")
    return [*lines, "", f"compiled in {compiled.seconds:.0f} s"]


def _computed_lines(plan: Plan) -> list[str]:
    sent = plan.bytes_sent or {"nothing": 0}
    lines = ["sent per device and step, estimated"]
    return [*lines, *_rows({name: _size(size) for name, size in sent.items()}, indent=2)]


def verdict(plan: Plan, config: Config) -> list[str]:
    """Whether it fits, and if not, which settings to change, most effective first."""
    share = f"{plan.least_bytes / plan.device_bytes:.0%} of a device's memory"
    if plan.fits:
        return [f"fits: {share}"]
    if plan.fits is None:
        return [
            plan.note,
            f"needs at least {share}, plus the activations kept for the gradient",
        ]
    bank = plan.bytes_held["bank"] / plan.device_bytes
    return [
        *([plan.note] if plan.note else []),
        f"does not fit: {share}",
        *([f"bank: {bank:.0%}, must be at most {BANK_SHARE:.0%}"] * (bank > BANK_SHARE)),
        *advice(plan, config),
    ]


def advice(plan: Plan, config: Config) -> list[str]:
    """Settings that save memory, most effective first; the bank's if it alone is too large.

    Those that would save less than 1% of a device's memory are left out.
    """
    images, net, bank = plan.batch_size // plan.num_devices, config.model, config.memory
    size, n, held = plan.bytes_held["bank"], plan.num_devices, plan.bytes_held
    min_saved = plan.device_bytes // 100
    names = ", ".join(f"'{stage}'" for stage in stage_names(net.name))
    for_activations = {
        f"train.batch_size={plan.batch_size // 2 // n * n}, or more devices: now {images} images"
        " each": images > 1,
        f"train.accumulation_steps={2 * plan.accumulation_steps}: half as many images at once": (
            images % (2 * plan.accumulation_steps) == 0
        ),
        f"model.remat=({names}): recomputes activations": not net.remat,
        "model.dtype=bfloat16: halves activations": net.dtype == "float32",
        f"augment.crop_size, now {tuple(config.augment.crop_size)}: activations grow with it": True,
    }
    for_bank = {
        f"memory.sharding=slots: bank takes {_size(size // n)} of each device instead of"
        f" {_size(size)}": size > min_saved and bank.sharding == "replicated" and n > 1,
        "memory.dtype=bfloat16: halves the bank": size > min_saved and bank.dtype == "float32",
        f"memory.pixel_size, now {bank.pixel_size}, and memory.segment_size, now"
        f" {bank.segment_size}: fewer slots": size > min_saved,
    }
    for_state = {
        "parallel.fsdp=True: shards parameters and optimiser state": (
            n > 1
            and not config.parallel.fsdp
            and held["parameters"] + held["optimiser state"] > min_saved
        ),
    }
    order = (for_activations, for_bank, for_state)
    if size > BANK_SHARE * plan.device_bytes:
        order = (for_bank, for_activations, for_state)
    steps = [f"  {text}" for part in order for text, helps in part.items() if helps]
    return ["to reduce memory, in this order:", *steps]


def _rows(values: dict[str, str], *, indent: int = 0) -> list[str]:
    """Lines of names and values, in two columns."""
    return [f"{' ' * indent}{name:{34 - indent}}{value:>14}" for name, value in values.items()]


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _flops(number: float) -> str:
    return f"{number / 1e12:.3f} TFLOP" if number >= 1e11 else f"{number / 1e9:.3f} GFLOP"
