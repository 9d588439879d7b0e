"""Messages for out-of-memory errors: what was being done, and how to use less memory."""

import errno
import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent

# By file of this package: what it was doing, and how to use less memory.
WORK = {
    "training/train.py": (
        "training",
        "Lower augment.crop_size, train.batch_size or, with contrast,"
        " contrast.anchors_per_image; set model.dtype=bfloat16, model.remat or"
        " train.accumulation_steps; a bank shrinks with memory.pixel_size, memory.dtype=bfloat16 or"
        " memory.sharding=slots. --mode=plan shows what fits",
    ),
    "evaluation/evaluate.py": (
        "evaluating",
        "Lower eval.batch_size; if it is 1 already, the largest images are too large for this"
        " machine",
    ),
    "evaluation/loaded_network.py": (
        "predicting",
        "The image is too large for this machine: scale it down, or cut it into tiles",
    ),
    "data/pictures.py": ("drawing pictures", "Lower eval.num_pictures, or make the images smaller"),
    "data/pipeline.py": (
        "making batches",
        "Lower data.cache_size, data.num_workers, data.num_threads or data.prefetch",
    ),
    "data/audit/examples.py": (
        "reading the data set",
        "Images are decoded several at a time: make the largest ones smaller",
    ),
    "data/audit/report.py": ("auditing the data set", "Make the largest images smaller"),
    "weights/convert.py": (
        "converting weights",
        "Conversion keeps several copies in memory: use a machine with more of it",
    ),
    "planning/plan.py": ("planning", "The compiler needs it; --quick estimates without compiling"),
}


def explanation(error: BaseException) -> str | None:
    """A message with a remedy for an out-of-memory error; None for other errors.

    Taken from the innermost frame of the traceback that is in a file of WORK.
    """
    if not is_out_of_memory(error):
        return None
    on_device = "RESOURCE_EXHAUSTED" in str(error)
    lines = str(error).strip().splitlines() or ["an allocation failed"]
    work, remedy = _work(error)
    kind = "device memory" if on_device else "memory"
    return f"out of {kind}{work}: {_with_units(lines[0])}{remedy}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an out-of-memory error of Python, NumPy, Pillow, the system, XLA or OpenCV."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("RESOURCE_EXHAUSTED", "(-4:Insufficient memory)")
    return any(sign in str(error) for sign in signs)


def _with_units(message: str) -> str:
    """A message with large numbers of bytes in GiB as well."""

    def in_gib(found: re.Match[str]) -> str:
        size = int(found[1]) / 2**30
        return f"{found[0]} ({size:.1f} GiB)" if size >= 0.1 else found[0]

    return re.sub(r"\b(\d+) bytes", in_gib, message)


def _work(error: BaseException) -> tuple[str, str]:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
        if name in WORK:
            work, remedy = WORK[name]
            return f" while {work}", f"\n{remedy}"
    return "", ""
