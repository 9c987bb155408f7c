"""Numbers, names and the page's own words, as people read them."""

from __future__ import annotations

import math
import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from tensornet_compress.report.schema import Measure

_PLURALS = ("bits", "seconds", "tokens")
_SHARE = re.compile(r"\b(same|share|agree\w*|top-?1)\b", re.IGNORECASE)


@cache
def texts() -> dict[str, Any]:
    """What stands above each section, and the words that the glossary explains."""
    return tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    """Text without the characters that no page or picture can show: controls and changes of writing direction."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in text)


def short(text: str, length: int = 48) -> str:
    """``plain`` text cut in its middle, where names of layers and files differ least."""
    text = " ".join(plain(text).split())
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def is_bytes(measure: Measure) -> bool:
    """Whether the values are counts of bytes."""
    return measure.unit.strip().lower() in ("bytes", "byte", "b")


def amount(nbytes: float) -> str:
    """Bytes in the decimal unit that leaves at most four digits: ``177 MB``."""
    if not math.isfinite(nbytes):
        return number(nbytes)
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= size:
            return f"{significant(nbytes / size, 3)} {unit}"
    return f"{nbytes:,.0f} bytes"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, without exponent where that stays short."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -5 or power >= 15:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{max(0, digits - 1 - power)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and digits > 4 else text


def number(value: float, digits: int = 4) -> str:
    """A value: integers whole, others to ``digits`` significant digits, NaN and infinity in words."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if f"{value:g}" == f"{value:.{digits}g}" and 1e-4 <= abs(value) < 1e15:
        return f"{value:,.{len(f'{value:g}'.partition('.')[2])}f}"
    return significant(value, digits)


def with_unit(value: float, measure: Measure) -> str:
    """A value as a sentence says it."""
    told, unit = without_unit(value, measure), measure.unit.strip()
    if is_bytes(measure) or _is_share(value, measure):
        return told
    return f"{told} {unit.removesuffix('s') if value == 1 and unit in _PLURALS else unit}".strip()


def without_unit(value: float, measure: Measure) -> str:
    """A value whose unit is told elsewhere; bytes and percentages keep theirs, which is part of the number."""
    if is_bytes(measure):
        return amount(value)
    return f"{significant(100 * value)} %" if _is_share(value, measure) else number(value, 3)


def _is_share(value: float, measure: Measure) -> bool:
    """Whether the value is a share of something and reads better as a percentage."""
    told = measure.unit.strip().lower() in ("share", "fraction") or bool(_SHARE.search(measure.title))
    return told and 0 <= value <= 1 and measure.better == "higher"


def heading(measure: Measure) -> str:
    """Title of a measure where a line begins."""
    return measure.title[:1].upper() + measure.title[1:]


def named(measure: Measure) -> str:
    """Title and unit of a measure beside an axis or above a column."""
    unit = short(measure.unit, 24)
    return short(heading(measure)) + (f" ({unit})" if unit and not is_bytes(measure) else "")


def times(ratio: float) -> str:
    """A factor: ``3.04``, ``12``, ``1,200``."""
    return significant(ratio, 3 if ratio < 100 else 2)


def lower_first(text: str) -> str:
    """``text`` as it stands inside a sentence; abbreviations keep their capitals."""
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def moment(text: str) -> str:
    """A time in ISO format and UTC as people write it, to the minute; other texts as they are."""
    return re.sub(r"^(\d+-\d\d-\d\d)T(\d\d:\d\d):\S*\+00:00$", r"\1 \2 UTC", text)


def setting(value: JsonValue) -> str:
    """A setting of a run as one short text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else str(value)
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {setting(item)}" for name, item in value.items()) or "none"
    return value
