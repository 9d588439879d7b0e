"""What ran out of memory, and what takes less of it."""

import errno
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent

# By file of this package: what it was doing, and what takes less memory.
WORK = {
    "training/train.py": (
        "training",
        "Lower augment.crop_size or train.batch_size; --mode=plan says what fits, and what else"
        " saves memory",
    ),
    "evaluation/evaluate.py": (
        "evaluating",
        "Lower eval.batch_size; where it is 1 already, the largest images are too large for this"
        " machine",
    ),
    "evaluation/predict.py": (
        "predicting",
        "The image is too large for this machine: scale it down, or cut it into parts",
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
        "They are held in memory several times over: convert on a machine with more of it",
    ),
    "planning/plan.py": ("planning", "The compiler needs it; --quick plans without compiling"),
}


def explanation(error: BaseException) -> str | None:
    """What was being done when memory ran out, and what takes less; None for other errors.

    The innermost file of WORK that the error came through says it.
    """
    if not is_out_of_memory(error):
        return None
    on_device = "RESOURCE_EXHAUSTED" in str(error)
    lines = str(error).strip().splitlines() or ["an allocation failed"]
    work, remedy = _work(error)
    kind = "device memory" if on_device else "memory"
    return f"not enough {kind}{work}: {lines[0]}{remedy}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, NumPy, Pillow, the system, XLA or OpenCV say it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("RESOURCE_EXHAUSTED", "(-4:Insufficient memory)")
    return any(sign in str(error) for sign in signs)


def _work(error: BaseException) -> tuple[str, str]:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
        if name in WORK:
            work, remedy = WORK[name]
            return f" while {work}", f"\n{remedy}"
    return "", ""
