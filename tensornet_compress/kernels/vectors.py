"""Inner loops over packed codes, written as vectors of 16 lanes: what LLVM does not find by itself in a plain loop.

A *block* of codes is what 16 lanes hold, ``step(bits)`` columns. Where codes of 2, 4 and 8 bits fill whole 32-bit words, lane
``l`` reads word ``l``; of other widths it reads the ``bits`` bytes of its 8 codes. Code ``k`` of lane ``l`` is column
``lane_codes * l + k`` of the block; of signed bytes (``bits == SIGNED``), which are read 16 at a time, it is column
``16 k + l``. Inputs are put into that order once (``loops._prepared``), so codes are used as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _typed_intrinsic

intrinsic: Any = _typed_intrinsic
LANES = 16
SIGNED = -8
"""Stands for bits: codes that are plain int8."""
_WORD, _BYTE, _LONG, _FLOAT = ir.IntType(32), ir.IntType(8), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_WORD, LANES), ir.VectorType(_FLOAT, LANES)


def lane_codes(bits: int) -> int:
    """Codes of a lane in one block."""
    return 4 if bits == SIGNED else 32 // bits if bits in (2, 4, 8) else 8


def step(bits: int) -> int:
    """Columns of a block."""
    return LANES * lane_codes(bits)


def _all(value: float, kind: Any = _FLOAT) -> Any:
    return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES)


def _load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _plus(builder: Any, address: Any, nbytes: int) -> Any:
    return builder.add(address, ir.Constant(_LONG, nbytes))


def _fields(builder: Any, address: Any, bits: int) -> Iterator[Any]:
    """The codes of a block over ``unshifts``, 16 lanes of fp32 for each code of a lane."""
    if bits == SIGNED:
        for k in range(4):
            raw = _load(builder, _plus(builder, address, LANES * k), ir.VectorType(_BYTE, LANES))
            yield builder.sitofp(builder.sext(raw, _WORDS), _FLOATS)
        return
    words = None
    for k, (base, shift) in enumerate(_word_places(bits)):
        if words is None or base != _word_places(bits)[k - 1][0]:
            if bits in (2, 4, 8):
                words = _load(builder, address, _WORDS)
            else:
                words = ir.Constant(_WORDS, ir.Undefined)
                for lane in range(LANES):
                    word = _load(builder, _plus(builder, address, lane * bits + base), _WORD)
                    words = builder.insert_element(words, word, ir.Constant(_WORD, lane))
        top = shift + bits == 32
        field = builder.lshr(words, _all(shift, _WORD)) if top else builder.and_(words, _all((1 << bits) - 1 << shift, _WORD))
        yield builder.sitofp(field, _FLOATS)


def _word_places(bits: int) -> list[tuple[int, int]]:
    """For each code of a lane the byte at which its word is read, and its place in the word."""
    found, base = [], 0
    for k in range(lane_codes(bits)):
        if (k + 1) * bits > 8 * base + 32:
            base = k * bits // 8
        found.append((base, k * bits - 8 * base))
    return found


def unshifts(bits: int) -> list[float]:
    """What inputs are multiplied with, for each code of a lane: codes are taken where they lie in their words, as shifting each
    would cost a fourth of the time. Powers of two, so nothing is rounded."""
    return [1.0 if shift + bits == 32 else 0.5**shift for _, shift in _word_places(bits)]


def _fma(builder: Any) -> Callable[..., Any]:
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
    return lambda *operands: builder.call(fma, operands)


def _sum(builder: Any, vector: Any) -> Any:
    """Sum of the lanes."""
    width = LANES
    while width > 1:
        width //= 2
        vector = builder.fadd(*_halves(builder, vector, width))
    return builder.extract_element(vector, ir.Constant(_WORD, 0))


def _halves(builder: Any, vector: Any, width: int) -> Iterator[Any]:
    for start in (0, width):
        yield builder.shuffle_vector(
            vector, vector, ir.Constant(ir.VectorType(_WORD, width), list(range(start, start + width)))
        )


@intrinsic(prefer_literal=True)
def block_products(typingctx, bits, parts, offset, rows, codes, x, stride, blocks, scales, offsets, out):  # type: ignore[no-untyped-def]
    """One row of codes with ``rows`` inputs; the first four arguments are constants, the others addresses and numbers.

    Args:
        parts: groups in a block, with a fp32 scale each at ``scales``; 0: codes are summed as they are.
        offset: whether groups have a fp32 offset each as well, at ``offsets``.
        x: fp32, for each input and block a vector for each code of a lane, and one that sums begin with (offset: the sums of
            inputs, which offsets are multiplied with); inputs are ``stride`` bytes apart.
        out: fp32 (rows,), written.
    """
    b, p, z, count = (kind.literal_value for kind in (bits, parts, offset, rows))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes, x, stride, blocks, scales, offsets, out = args[4:]
        per, fma, nothing = lane_codes(b), _fma(builder), _all(0.0)
        totals = [cgutils.alloca_once_value(builder, nothing) for _ in range(count)]

        def of_groups(address: Any, block: Any) -> Any:
            """A number for each lane."""
            address = builder.add(address, builder.mul(block, ir.Constant(_LONG, 4 * p)))
            few = _load(builder, address, ir.VectorType(_FLOAT, p) if p > 1 else _FLOAT, 4)
            if p == 1:
                return _every_lane(builder, few)
            return builder.shuffle_vector(few, few, ir.Constant(_WORDS, [lane * p // LANES for lane in range(LANES)]))

        with cgutils.for_range(builder, blocks, intp=_LONG) as loop:
            code = builder.add(codes, builder.mul(loop.index, ir.Constant(_LONG, step(b) * abs(b) // 8)))
            first = builder.add(x, builder.mul(loop.index, ir.Constant(_LONG, 4 * LANES * (per + 1))))
            places = [builder.add(first, builder.mul(stride, ir.Constant(_LONG, row))) for row in range(count)]

            def inputs(row: int, k: int) -> Any:
                return _load(builder, _plus(builder, places[row], 4 * LANES * k), _FLOATS, 4)

            # Without scales of groups, sums of many inputs go on in place; few would wait for one another's additions.
            direct = p == 0 and count >= 4
            sums = [nothing if b == SIGNED or z else inputs(row, per) for row in range(count)]
            if direct:
                held = [builder.load(total) for total in totals]
                sums = held if b == SIGNED else [builder.fadd(*pair) for pair in zip(held, sums)]
            for k, field in enumerate(_fields(builder, code, b)):
                sums = [fma(field, inputs(row, k), sums[row]) for row in range(count)]
            scale, more = (of_groups(scales, loop.index) if p else None), (of_groups(offsets, loop.index) if z else None)
            for row in range(count):
                total = nothing if direct else builder.load(totals[row])
                total = fma(sums[row], scale, total) if p else sums[row] if direct else builder.fadd(sums[row], total)
                builder.store(fma(inputs(row, per), more, total) if z else total, totals[row])
        for row in range(count):
            pointer = builder.inttoptr(_plus(builder, out, 4 * row), _FLOAT.as_pointer())
            builder.store(_sum(builder, builder.load(totals[row])), pointer)
        return context.get_dummy_value()

    return types.void(bits, parts, offset, rows, *([types.int64] * 7)), codegen


def _every_lane(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))


def _token_bytes(builder: Any, address: Any, width: int) -> Any:
    """For 16 tokens, which are a quarter of a unit of a bit plane (``coding/planes.py``), the bytes that hold their fields."""
    raw = _load(builder, address, ir.VectorType(_BYTE, 8 if width == 1 else LANES))
    if width == 1:
        raw = builder.shuffle_vector(raw, raw, ir.Constant(_WORDS, [*range(8), *range(8)]))
    return builder.zext(raw, _WORDS)


def _tokens(builder: Any, address: Any, width: int) -> Iterator[Any]:
    """The fields of a unit of a bit plane, as fp32, quarter by quarter."""
    loaded: dict[int, Any] = {}
    for quarter in range(4):
        # Of 4 bits a byte holds tokens j and j + 32, of 2 bits j, j + 16, ..., of 1 bit j, j + 8, ...
        offset = LANES * (quarter % 2) if width == 4 else 0
        if offset not in loaded:
            loaded[offset] = _token_bytes(builder, _plus(builder, address, offset), width)
        low = 4 * (quarter // 2) if width == 4 else 2 * quarter
        shifts = [low + (width == 1 and lane >= 8) for lane in range(LANES)]
        field = builder.lshr(loaded[offset], ir.Constant(_WORDS, shifts)) if any(shifts) else loaded[offset]
        yield builder.sitofp(builder.and_(field, _all((1 << width) - 1, _WORD)), _FLOATS)


@intrinsic(prefer_literal=True)
def add_fields_times_factors(typingctx, width, rows, quarter, count, planes, stride, factors, sums):  # type: ignore[no-untyped-def]
    """A quarter of a unit of ``count`` planes of one width, with ``rows`` factors each; width and rows are constants.

    Args:
        planes: address of the unit in the first plane, others follow after ``stride`` bytes.
        factors: fp32 (count, rows). sums: fp32 (rows, 16), added to.
    """
    w, k = (kind.literal_value for kind in (width, rows))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        quarter, count, planes, stride, factors, sums = args[2:]
        fma, one = _fma(builder), ir.Constant(_LONG, 1)
        if w == 4:
            planes = builder.add(planes, builder.mul(builder.and_(quarter, one), ir.Constant(_LONG, LANES)))
            low = builder.shl(builder.lshr(quarter, one), ir.Constant(_LONG, 2))
        else:
            low = builder.shl(quarter, one)
        # Fields are taken where they lie in their bytes: sums of them are scaled in the end, by powers of two.
        shifts = ir.Constant(_WORDS, [int(w == 1 and lane >= 8) for lane in range(LANES)])
        shifts = builder.add(shifts, _every_lane(builder, builder.trunc(low, _WORD)))
        mask = builder.shl(_all((1 << w) - 1, _WORD), shifts)
        unshift = builder.bitcast(builder.shl(builder.sub(_all(127, _WORD), shifts), _all(23, _WORD)), _FLOATS)
        held = [cgutils.alloca_once_value(builder, _all(0.0)) for _ in range(k)]
        with cgutils.for_range(builder, count, intp=_LONG) as loop:
            found = _token_bytes(builder, builder.add(planes, builder.mul(stride, loop.index)), w)
            field = builder.sitofp(builder.and_(found, mask), _FLOATS)
            first = builder.add(factors, builder.mul(loop.index, ir.Constant(_LONG, 4 * k)))
            for row, total in enumerate(held):
                factor = _every_lane(builder, _load(builder, _plus(builder, first, 4 * row), _FLOAT, 4))
                builder.store(fma(field, factor, builder.load(total)), total)
        for row, total in enumerate(held):
            at = _plus(builder, sums, 4 * LANES * row)
            added = fma(builder.load(total), unshift, _load(builder, at, _FLOATS, 4))
            builder.store(added, builder.inttoptr(at, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(width, rows, *([types.int64] * 6)), codegen


@intrinsic(prefer_literal=True)
def fields_times_weights(typingctx, width, rows, units, plane, weights, stride, out):  # type: ignore[no-untyped-def]
    """``units`` units of one plane, times ``rows`` weights of each token.

    Args:
        weights: fp32, of token after token; rows are ``stride`` bytes apart. out: fp32 (rows,), written.
    """
    w, k = (kind.literal_value for kind in (width, rows))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        units, plane, weights, stride, out = args[2:]
        fma = _fma(builder)
        totals = [cgutils.alloca_once_value(builder, _all(0.0)) for _ in range(k)]
        with cgutils.for_range(builder, units, intp=_LONG) as loop:
            fields = list(_tokens(builder, builder.add(plane, builder.mul(loop.index, ir.Constant(_LONG, 8 * w))), w))
            first = builder.add(weights, builder.mul(loop.index, ir.Constant(_LONG, 256)))
            for row in range(k):
                at = builder.add(first, builder.mul(stride, ir.Constant(_LONG, row)))
                total = builder.load(totals[row])
                for quarter, field in enumerate(fields):
                    total = fma(field, _load(builder, _plus(builder, at, 64 * quarter), _FLOATS, 4), total)
                builder.store(total, totals[row])
        for row in range(k):
            at = builder.inttoptr(_plus(builder, out, 4 * row), _FLOAT.as_pointer())
            builder.store(_sum(builder, builder.load(totals[row])), at)
        return context.get_dummy_value()

    return types.void(width, rows, *([types.int64] * 5)), codegen


@intrinsic
def largest(typingctx, at, vectors):  # type: ignore[no-untyped-def]
    """The largest of fp32 numbers at an address, 16 times ``vectors`` (one or more) of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, vectors = args
        top = cgutils.alloca_once_value(builder, _load(builder, at, _FLOATS, 4))
        with cgutils.for_range(builder, vectors, intp=_LONG) as loop:
            here, held = _load(builder, _vector_at(builder, at, loop.index), _FLOATS, 4), builder.load(top)
            builder.store(builder.select(builder.fcmp_ordered(">", here, held), here, held), top)
        folded, width = builder.load(top), LANES
        while width > 1:
            width //= 2
            low, high = _halves(builder, folded, width)
            folded = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(folded, ir.Constant(_WORD, 0))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def exponentials(typingctx, at, vectors, less):  # type: ignore[no-untyped-def]
    """Put ``exp(x - less)``, of at most 1, in place of fp32 numbers x, 16 times ``vectors`` of them; their sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, vectors, less = args
        total, less, fma = cgutils.alloca_once_value(builder, _all(0.0)), _every_lane(builder, less), _fma(builder)
        with cgutils.for_range(builder, vectors, intp=_LONG) as loop:
            place = _vector_at(builder, at, loop.index)
            x = builder.fsub(_load(builder, place, _FLOATS, 4), less)
            # Not a number stays one.
            x = builder.select(builder.fcmp_ordered("<", x, _all(-87.0)), _all(-87.0), x)
            # exp(x) = 2^n exp(r), n whole, r within half of log 2; adding 1.5 2^23 rounds.
            whole = builder.fsub(fma(x, _all(1.4426950408889634), _all(12582912.0)), _all(12582912.0))
            r = fma(whole, _all(2.12194440e-4), fma(whole, _all(-0.693359375), x))
            power = _all(1 / 5040)
            for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
                power = fma(power, r, _all(term))
            exponent = builder.add(builder.fptosi(whole, _WORDS), _all(127, _WORD))
            scale = builder.bitcast(builder.shl(exponent, _all(23, _WORD)), _FLOATS)
            result = builder.fmul(power, scale)
            builder.store(result, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
            builder.store(builder.fadd(builder.load(total), result), total)
        return _sum(builder, builder.load(total))

    return types.float32(types.int64, types.int64, types.float32), codegen


def _vector_at(builder: Any, address: Any, number: Any) -> Any:
    return builder.add(address, builder.mul(number, ir.Constant(_LONG, 4 * LANES)))


@intrinsic(prefer_literal=True)
def float_at(typingctx, kind, address):  # type: ignore[no-untyped-def]
    """The number at an address, as fp32; ``kind``, a constant: 0 fp32, 1 fp16, 2 bf16."""
    which = kind.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if which == 0:
            return _load(builder, args[1], _FLOAT, 4)
        short = _load(builder, args[1], ir.IntType(16), 2)
        if which == 1:
            return builder.fpext(builder.bitcast(short, ir.HalfType()), _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(short, _WORD), ir.Constant(_WORD, 16)), _FLOAT)

    return types.float32(kind, types.int64), codegen


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as what ``numba.carray`` takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic(prefer_literal=True)
def copy_bytes(typingctx, to, source, nbytes):  # type: ignore[no-untyped-def]
    """Copy a constant number of bytes between addresses; a loop over bytes takes several times as long."""
    count = nbytes.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source = (builder.inttoptr(address, _BYTE.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, to, source, ir.Constant(_LONG, count), 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, nbytes), codegen


@intrinsic
def call(typingctx, function, first, last, args):  # type: ignore[no-untyped-def]
    """Call a C function (int64, int64, int64) -> nothing by its address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_LONG] * 3)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
