"""The budget of ``weights`` as its options give it."""

from __future__ import annotations

from math import isfinite

from tensornet_compress.compressing import Budget
from tensornet_compress.errors import TensorNetError


def given_budget(bits_per_weight: float | None, ratio: float | None, size: str | None) -> Budget:
    """The budget of exactly one option.

    Raises:
        TensorNetError: none or several were given, or what is no positive number.
    """
    options = {"--bits-per-weight": bits_per_weight, "--ratio": ratio, "--size": size}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        said = " and ".join(f"{name} {value}" for name, value in given.items()) or "none"
        raise TensorNetError(f"give exactly one of {', '.join(options)}; was given {said}")
    nbytes = parse_size(size)
    ((name, value),) = given.items()
    number = nbytes if nbytes is not None else float(value)
    if not (isfinite(number) and number > 0):
        raise TensorNetError(f"{name} must be positive and finite, was given {value}")
    return Budget(bits_per_weight=bits_per_weight, ratio=ratio, nbytes=nbytes)


def parse_size(text: str | None) -> int | None:
    """``90MB``, ``1.2GB``, ``512KiB`` or plain bytes -> bytes."""
    if text is None:
        return None
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().upper()
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if number.endswith(unit)), "")
    try:
        return int(float(number.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        raise TensorNetError(f"--size {text!r} is not a size; use bytes or a number with KB, MB, GB, KiB, MiB or GiB") from None
