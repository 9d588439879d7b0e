"""Colour tables of masks: colours as text, the files that hold them, and what makes one unusable.

A file has a row per class, in the order of the class ids:

    64 128 64   Animal          CamVid's label_colors.txt; commas or semicolons do as well
    #408040     Animal
    Animal,64,128,64            class_dict.csv, with a heading or without
    Animal:64,128,64::          CVAT's labelmap.txt

or is JSON: {"Animal": [64, 128, 64], …}, or a list of {"name": "Animal", "color": "#408040"}.
Blank lines and lines that begin with # and no colour are left out. Rows named as in `IGNORED_NAMES`
are colours without a class.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrastseg_jax.errors import InputError

IGNORED_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")  # in any case
COLOR = re.compile(r"#[0-9a-f]{6}")
MAX_NAMED = 4  # pairs of classes of one colour, in an error

_NUMBER, _GAP = r"(\d{1,3})", r"[\s,;]+"
_COLOR = rf"(?:(#[0-9a-fA-F]{{6}})|{_NUMBER}{_GAP}{_NUMBER}{_GAP}{_NUMBER})"
_COLOR_FIRST = re.compile(rf"{_COLOR}(?:[\s,;:]+(.*?))?[\s,;:]*")
_NAME_FIRST = re.compile(rf"(.+?)[\s,;:]+{_COLOR}[\s,;:]*")
_HEADING = re.compile(r"(?:(?:name|class|label|colou?r|r|g|b|red|green|blue)\b[\s,;]*)+", re.I)

Row = tuple[Any, str]  # colour, as far as it is one, and name; empty: it has none


def normalized(color: Any) -> Any:
    """The colour as "#rrggbb", of such a text or of (red, green, blue); else the value as it is."""
    if isinstance(color, str):
        return color.lower()
    if isinstance(color, (list, tuple)) and len(color) == 3:
        if all(type(level) is int and 0 <= level <= 255 for level in color):
            return "#{:02x}{:02x}{:02x}".format(*color)
    return color


def is_color(value: Any) -> bool:
    """Whether it is a colour as `normalized` returns it."""
    return isinstance(value, str) and bool(COLOR.fullmatch(value))


def levels(color: str) -> tuple[int, int, int]:
    """Red, green and blue of "#rrggbb"."""
    red, green, blue = bytes.fromhex(color[1:])
    return red, green, blue


def palette_problems(
    class_names: Sequence[str], palette: Sequence[str], ignore_colors: Sequence[str]
) -> list[str]:
    """Why a table of valid colours does not say what each colour means; none: it does."""
    if len(palette) != len(class_names):
        return [
            f"data.palette has {len(palette)} colours: must have one for each of the"
            f" {len(class_names)} classes {', '.join(class_names)}, in their order; colours that"
            " are no class belong in data.ignore_colors"
        ]
    first: dict[str, str] = dict.fromkeys(ignore_colors, "data.ignore_colors")
    same = []
    for name, color in zip(class_names, palette, strict=True):
        owner = first.setdefault(color, repr(name))
        if owner != repr(name):
            same.append(f"{owner} and {name!r} ({color})")
    if not same:
        return []
    more = f" and {len(same) - MAX_NAMED} more" if len(same) > MAX_NAMED else ""
    return [
        f"data.palette gives one colour to {', '.join(same[:MAX_NAMED])}{more}: each colour must"
        " mean one thing"
    ]


def is_file(palette: Sequence[Any]) -> bool:
    """Whether the setting names a file instead of colours."""
    is_text = len(palette) == 1 and isinstance(palette[0], str)
    return is_text and not palette[0].startswith("#")


def settings_of_file(
    name: str, class_names: Sequence[str], ignore_colors: Sequence[Any]
) -> dict[str, Any]:
    """The settings that a file stands for: palette, ignored colours, and names of the classes.

    Args:
        name: the file's path.
        class_names: those of the config; () takes the file's.
        ignore_colors: those of the config, to which the file's are added.

    Raises:
        InputError: it cannot be read, has rows that are not colours or lack names, or names other
            classes than the config.
    """
    rows = _read_rows(Path(name).expanduser())
    classes = [(color, label) for color, label in rows if label.lower() not in IGNORED_NAMES]
    ignored = [color for color, label in rows if label.lower() in IGNORED_NAMES]
    found = tuple(unicodedata.normalize("NFC", label) for _, label in classes)
    given = tuple(unicodedata.normalize("NFC", str(label)) for label in class_names)
    if any(found) and given and given != found:
        raise InputError(
            f"data.class_names = {given}: must be (), or the names in {name} in their order,"
            f" {found}"
        )
    if any(found) and not all(found):
        color = classes[found.index("")][0]
        raise InputError(f"{name}: colour {color} has no name, but others have; name all or none")
    return {
        "data.palette": tuple(color for color, _ in classes),
        "data.ignore_colors": tuple(dict.fromkeys((*map(normalized, ignore_colors), *ignored))),
        "data.class_names": found if any(found) else tuple(class_names),
    }


def _read_rows(path: Path) -> list[Row]:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); data.palette must be colours, e.g."
            " ('#800000', '#808000'), or a file that lists them"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be text in UTF-8, byte {error.start} is not") from error
    is_json = text.lstrip().startswith(("{", "["))
    rows = _json_rows(text, path) if is_json else _text_rows(text, path)
    if not rows:
        raise InputError(f"{path}: has no colour; {_ROW_RULE}")
    return rows


_ROW_RULE = "a row must be 'r g b name', '#rrggbb name' or 'name,r,g,b', with levels in 0..255"


def _text_rows(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        is_comment = line.startswith("#") and not COLOR.match(line.lower())
        if not line or is_comment or (not rows and _HEADING.fullmatch(line)):
            continue
        color_first, name_first = _COLOR_FIRST.fullmatch(line), _NAME_FIRST.fullmatch(line)
        if color_first and name_first:
            raise InputError(
                f"{path}, line {number}: '{line}' may begin or end with its colour; write it as"
                " '#rrggbb name'"
            )
        if color_first:
            *levels_or_text, name = color_first.groups()
        elif name_first:
            name, *levels_or_text = name_first.groups()
        else:
            raise InputError(f"{path}, line {number}: '{line}': {_ROW_RULE}")
        text_color, *numbers = levels_or_text
        color = normalized(text_color or [int(level) for level in numbers])
        if not is_color(color):
            raise InputError(f"{path}, line {number}: '{line}': {_ROW_RULE}")
        rows.append((color, (name or "").strip("\"' ")))
    return rows


def _json_rows(text: str, path: Path) -> list[Row]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if isinstance(content, dict):
        content = [{"name": name, "color": color} for name, color in content.items()]
    rows = []
    for entry in content:
        named = entry if isinstance(entry, dict) else {"color": entry}
        color, name = normalized(named.get("color")), named.get("name", "")
        if not is_color(color) or not isinstance(name, str):
            raise InputError(
                f"{path}: {json.dumps(entry)}: must be a colour, '#rrggbb' or [r, g, b] with levels"
                " in 0..255, or have one as its 'color', beside its 'name'"
            )
        rows.append((color, name.strip()))
    return rows
