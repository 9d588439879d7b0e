"""Settings, to be pasted, that read masks as they are, for what an audit has found in them."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from contrastseg_jax.data.audit.statistics import MAX_COLORS, SplitAudit
from contrastseg_jax.data.images import color_code, color_text
from contrastseg_jax.data.spec import DatasetSpec

WITH_SETTINGS = ("folder", "tfds")  # data sets that these settings are for
MAX_UNKNOWN = 30  # colours of no class that may be ignored; masks with more show soft edges
BLACK = 0


def color_remedy(spec: DatasetSpec, audits: Mapping[str, SplitAudit]) -> str:
    """How to read the masks of which an audit has counted the colours; empty: not by settings."""
    colors = sum((audit.color_pixels for audit in audits.values()), Counter[int]())
    if not colors or spec.name not in WITH_SETTINGS:
        return ""
    if len(colors) > MAX_COLORS:
        return "export them again from their source, without soft edges"
    if spec.mask_encoding == "rgb":
        known = {code for audit in audits.values() for code in audit.color_names}
        return _unknown_remedy(
            spec, [code for code, _ in colors.most_common() if code not in known]
        )
    if spec.mask_encoding == "binary":
        return ""
    if len(colors) == 2 and BLACK in colors:
        return _binary_text(spec, "the masks are black and one colour")
    return _palette_text(spec, colors)


def binary_remedy(spec: DatasetSpec, audits: Mapping[str, SplitAudit]) -> str:
    """How to read index masks that hold 0 and one value above 1, such as 255; empty: they do not.

    As class ids they would have a first class, and a second without a pixel.
    """
    found = np.sum([audit.value_pixels for audit in audits.values()], axis=0)
    values = np.flatnonzero(found).tolist()
    is_binary = len(values) == 2 and values[0] == 0 and values[1] > 1
    if not is_binary or spec.mask_encoding != "index" or spec.name not in WITH_SETTINGS:
        return ""
    return _binary_text(spec, f"the masks hold 0 and {values[1]} alone")


def _binary_text(spec: DatasetSpec, found: str) -> str:
    names = "" if len(spec.class_names) == 2 else ", and name two classes in data.class_names"
    settings = ["--config.data.mask_encoding=binary"]
    if spec.ignore_values != (255,):
        settings.append('"--config.data.ignore_values=(255,)"')
    return f"{found}; read them as those of two classes{names}:\n{' '.join(settings)}"


def _palette_text(spec: DatasetSpec, colors: Counter[int]) -> str:
    """A palette of all colours; black is ignored where it is the one that has no name."""
    num_names = len(spec.class_names)
    ignored = [BLACK] if BLACK in colors and len(colors) == num_names + 1 else []
    codes = [code for code, _ in colors.most_common() if code not in ignored]
    order = "the most frequent first"
    if all(code % 0x010101 == 0 for code in codes):
        codes, order = sorted(codes), "the darkest first"
    text = f"read them by their colours, which stand here {order}: put them in the order of"
    text += f" data.class_names ({', '.join(spec.class_names)})"
    if len(codes) != num_names:
        text += f"; {len(codes)} colours were found for {num_names} names, each class needs one"
    settings = ["--config.data.mask_encoding=rgb", f'"--config.data.palette={_values(codes)}"']
    if ignored:
        settings.append(f'"--config.data.ignore_colors={_values(ignored)}"')
    if spec.ignore_values != (255,):
        settings.append('"--config.data.ignore_values=(255,)"')
    return f"{text}:\n{' '.join(settings)}"


def _unknown_remedy(spec: DatasetSpec, codes: Sequence[int]) -> str:
    """What to do with colours that the palette does not have, the most frequent first."""
    if not codes:
        return ""
    if all(code % 0x010101 == 0 and code // 0x010101 < len(spec.class_names) for code in codes):
        return (
            "the masks hold numbers of classes, not colours; read them so, without data.palette"
            f':\n--config.data.mask_encoding=index "--config.data.class_names={spec.class_names}"'
        )
    if len(codes) > MAX_UNKNOWN:
        return "export them again without soft edges, which have colours of no class"
    ignored = [color_code(color) for color in spec.ignore_colors]
    text = "correct the masks, add the colours to data.palette and data.class_names, or let them be"
    return f'{text} no class:\n"--config.data.ignore_colors={_values([*ignored, *codes])}"'


def _values(codes: Collection[int]) -> str:
    return str(tuple(map(color_text, codes)))
