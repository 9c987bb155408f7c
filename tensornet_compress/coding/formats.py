"""Number formats of a core: how its numbers are stored, exactly what that costs, and encode/decode.

A format is plain data with a short name (``fp32``, ``bf16``, ``int4g64``, ``int3g32z``, ``int4g32o``). Encoded parts are
named tensors, so that a core can lie in a file or in a module as plain parameters:

=============  =====================================================================
part           content
=============  =====================================================================
``""``         the numbers themselves (float formats)
``"_q"``       packed codes, uint8 (integer formats)
``"_scale"``   one scale per group
``"_zero"``    packed integer zero points (``z``), or float offsets (``o``)
``"_pivots"``  which rows are not stored (``PivotFormat``)
``"_coded"``   entropy-coded integers with their steps (``CodedFormat``)
``"_ties"``   entropy-coded order with ties (``SortedFormat``); ``"_scale"``, ``"_profile"``: the sorted values
=============  =====================================================================
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from math import prod
from typing import Annotated

from pydantic import Field

from tensornet_compress.coding.coded_format import CodedFormat
from tensornet_compress.coding.floats import FLOAT_DTYPES, FloatFormat
from tensornet_compress.coding.packed_integers import IntFormat
from tensornet_compress.coding.pivots import PivotFormat
from tensornet_compress.coding.sorted_format import SortedFormat
from tensornet_compress.errors import TensorNetError

_INT_NAME = re.compile(r"int([2-8])g(\d+)([zo]?)")


NamedFormat = FloatFormat | IntFormat | PivotFormat
"""What ``parse_format`` reads: the bytes of a core follow from its shape."""
EntropyCoded = CodedFormat | SortedFormat
"""Formats whose bytes follow from the numbers: ``coded_part`` names the bytes, ``resident_parts`` what memory holds in their
place, ``of`` gives the format of parts."""
NumberFormat = Annotated[NamedFormat | EntropyCoded, Field(discriminator="kind")]


@lru_cache(maxsize=256)
def parse_format(name: str) -> NamedFormat:
    """``fp32 | bf16 | fp16 | int<2..8>g<group>[z|o]`` -> format (``z``: integer zero points, ``o``: float offsets); a floating
    point name with ``p`` after it is that of two cores whose first one holds the identity (``PivotFormat``).

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> fmt = tnc.parse_format("int4g32")
    >>> parts = fmt.encode(torch.linspace(-1, 1, 64).reshape(2, 32))
    >>> {name: tuple(part.shape) for name, part in parts.items()}
    {'_q': (32,), '_scale': (2, 1)}

    Raises:
        TensorNetError: the name is none of these.
    """
    if name in FLOAT_DTYPES:
        return FloatFormat.model_validate({"dtype": name})
    if name.endswith("p") and name[:-1] in FLOAT_DTYPES:
        return PivotFormat.model_validate({"dtype": name[:-1]})
    match = _INT_NAME.fullmatch(name)
    if not match:
        raise TensorNetError(
            f"unknown number format {name!r}; use fp32, bf16, fp16 or int<2..8>g<group>[z|o], e.g. int4g64z, "
            "a floating point name with p (pivoted), or, in searches, ec (entropy-coded)"
        )
    zero = {"": "none", "z": "int", "o": "float"}[match[3]]
    return IntFormat.model_validate({"bits": int(match[1]), "group": int(match[2]), "zero": zero})


@cache
def format_nbytes(fmt: NamedFormat | EntropyCoded, shape: tuple[int, ...]) -> int:
    """Exact stored bytes of a core of ``shape``."""
    return sum(prod(part_shape) * dtype.itemsize for part_shape, dtype in fmt.parts(shape).values())
