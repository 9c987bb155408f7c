"""Products with coded numbers beside dense ones and PyTorch's integer kernels, and a model that generates with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.peer_packages import SIDE, reason
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, Track, on_threads, race, thread_counts
from tensornet_compress.bench.texts import find_text
from tensornet_compress.bench.tracks.decoding import BITS, Caches
from tensornet_compress.coding import CodedFormat, parse_format
from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.coding.codes import Codes
from tensornet_compress.kernels.coded_linear import coded_linear
from tensornet_compress.kv.live.cache import LiveCache
from tensornet_compress.nn.replace import replace_module
from tensornet_compress.tensor import NetworkSpec, TensorNetwork
from tensornet_compress.tensor.network import part_name

SHAPES, ROWS = ((576, 576), (1536, 576), (4096, 4096)), (1, 16, 512)
EXCEPTIONS = 0.005
"""Share of codes that do not fit 4 bits."""
CODED = (OURS, "ours-bf16", "ours-int4", "ours-int4-bf16", "ours-int4g64z", "ours-int4g64z-bf16", "ours-int3g64z")
PACKED = ("torch-int8-bf16", "torch-int4-bf16", "torchao-int8-bf16", "quanto-int8", "quanto-int4", "hqq-int8", "hqq-int4")
"""Private operators of PyTorch, and linear layers of packages."""
PRODUCTS = (*CODED, "dense", "dense-bf16", *PACKED)
STEP = 0.365
"""Of the weights' deviation: 3.5 bits a weight once entropy-coded."""
WITH_CACHE = "ours-with-live-cache"
"""The model of ``ours`` with a live cache of 3 bits."""
MODELS = (OURS, "ours-bf16", WITH_CACHE, "dense", "dense-bf16")


def products(settings: SpeedSettings) -> Iterator[Heat]:
    """Each shape with each number of inputs on 1 thread, and on all."""
    for threads in thread_counts():
        for m, n in SHAPES[:2] if settings.quick else SHAPES:
            for rows in ROWS[:2] if settings.quick else ROWS:
                subject = f"product with {m} x {n}, {rows} inputs, {threads} threads"
                yield Heat(subject, PRODUCTS, partial(_products, settings, m, n, rows, threads))


def _products(settings: SpeedSettings, m: int, n: int, rows: int, threads: int) -> Raced:
    generator = torch.Generator().manual_seed(settings.seed)
    weight, x = torch.randn(m, n, generator=generator), torch.randn(rows, n, generator=generator)
    short, short_weight = x.bfloat16(), weight.bfloat16()
    codes = _codes(weight, 8), _codes(weight, 4), _grouped(weight, "int4g64z"), _grouped(weight, "int3g64z")
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: coded_linear(x, codes[0]),
        "ours-bf16": lambda: coded_linear(short, codes[0]),
        "ours-int4": lambda: coded_linear(x, codes[1]),
        "ours-int4-bf16": lambda: coded_linear(short, codes[1]),
        "ours-int4g64z": lambda: coded_linear(x, codes[2]),
        "ours-int4g64z-bf16": lambda: coded_linear(short, codes[2]),
        "ours-int3g64z": lambda: coded_linear(x, codes[3]),
        "dense": lambda: F.linear(x, weight),
        "dense-bf16": lambda: F.linear(short, short_weight),
    }
    missing = {}
    for name in PACKED:
        try:
            call = _packed(name, m, n, generator)
            calls[name] = partial(call, short if name.endswith("bf16") else x)
            calls[name]()
        # Private operators are absent or different in other versions of torch, and packages raise what they like.
        except Exception as error:
            calls.pop(name, None)
            missing[name] = reason(error)
    with on_threads(threads):
        times = race(calls, settings.rounds)
    return Raced(
        {name: {"time": time} for name, time in times.items()}, missing, {"threads": threads, "exceptions": EXCEPTIONS}
    )


def _codes(weight: Tensor, bits: int) -> Codes:
    """Rounded with a factor a row and a column; with 4 bits, ``EXCEPTIONS`` of the codes lie beyond."""
    m, n = weight.shape
    half = 1 << (bits - 1)
    reach = weight.abs().flatten()[: 1 << 20].quantile(1 - EXCEPTIONS) if bits == 4 else weight.abs().max()
    whole = (weight / reach * (half - 1)).round().int()
    near = whole.clamp(-half, half - 1)
    place = (whole != near).flatten().nonzero().flatten().int()
    excess = (whole - near).flatten()[place.long()]
    stored = near.to(torch.int8) if bits == 8 else pack_bits(near + half, bits)
    return Codes(stored, torch.full((m, 1), float(reach) / (half - 1)), None, torch.ones(n), place, excess, bits, n, n)


def _grouped(weight: Tensor, name: str) -> Codes:
    fmt: Any = parse_format(name)
    codes: Codes = fmt.operands(fmt.encode(weight), tuple(weight.shape))
    return codes


def _packed(name: str, m: int, n: int, generator: torch.Generator) -> Callable[[Tensor], object]:
    """What multiplies inputs (rows, n) with codes of a weight (m, n), as a package does that on its own."""
    package, bits = name.split("-")[:2]
    if package == "torch":
        return (_torch_int8 if bits == "int8" else _torch_int4)(m, n, generator)
    layer: Any = nn.Linear(n, m, bias=False)
    if package == "torchao":
        ao = SIDE.module("torchao")
        layer = nn.Sequential(layer.bfloat16())
        ao.quantize_(layer, ao.Int8WeightOnlyConfig(set_inductor_config=False))
    elif package == "quanto":
        quanto = SIDE.module("quanto")
        layer = quanto.QLinear.from_module(layer, weights=getattr(quanto, f"q{bits}"))
        layer.freeze()
    else:
        hqq = SIDE.module("hqq")
        how = hqq.BaseQuantizeConfig(nbits=int(bits.removeprefix("int")), group_size=64, axis=1)
        layer = hqq.HQQLinear(layer, how, compute_dtype=torch.float32, device="cpu")
    return cast("Callable[[Tensor], object]", layer.eval())


def _torch_int8(m: int, n: int, generator: torch.Generator) -> Callable[[Tensor], object]:
    codes = torch.randint(-127, 128, (m, n), generator=generator).to(torch.int8)
    scales = torch.ones(m, dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, codes, scales)


def _torch_int4(m: int, n: int, generator: torch.Generator) -> Callable[[Tensor], object]:
    codes = torch.randint(0, 16, (m, n), generator=generator, dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(n // 64, m, 2, dtype=torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, 64, scales)


def generating(settings: SpeedSettings) -> Iterator[Heat]:
    """A whole model at batch 1, after short and long contexts."""
    for threads in thread_counts():
        for context in sorted({min(256, settings.context), settings.context}):
            subject = f"generating after {context} tokens, {threads} threads"
            yield Heat(subject, MODELS, partial(_generate, settings, context, threads))


def _generate(settings: SpeedSettings, context: int, threads: int) -> Raced:
    from transformers import DynamicCache

    found = find_model(settings.model)
    ids = find_text(settings.text).windows(found.tokenizer(), "heldout", context + 1, 1)
    models: dict[str, Any] = {"dense": found.load().eval(), "dense-bf16": found.load().eval().bfloat16()}
    models |= {OURS: coded_model(found.load().eval()), "ours-bf16": coded_model(found.load().eval()).bfloat16()}
    models[WITH_CACHE] = models[OURS]
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    caches: dict[str, Any] = {name: DynamicCache(config=model.config) for name, model in models.items()}
    caches[WITH_CACHE] = LiveCache(models[WITH_CACHE], BITS, Caches(settings, context).profile)
    with on_threads(threads), torch.no_grad():
        for name, model in models.items():
            model(ids[:, :context], past_key_values=caches[name], logits_to_keep=1)
        # One step of each in turn, so that what else the machine does falls on all alike.
        for number in range(settings.steps * max(1, settings.rounds // 4) + 1):
            for name in MODELS if number % 2 else MODELS[::-1]:
                began = perf_counter()
                models[name](ids[:, -1:], past_key_values=caches[name], logits_to_keep=1)
                caches[name].crop(-1)
                seconds[name].append(perf_counter() - began)
    values = {}
    for name, times in seconds.items():
        held = {(t.data_ptr(), t.nbytes) for t in (*models[name].parameters(), *models[name].buffers())}
        time = median(times[1:])
        values[name] = {"time": time, "tokens_per_second": 1 / time, "held_nbytes": float(sum(size for _, size in held))}
    return Raced(values, settings={"threads": threads, "step": STEP})


def coded_model(model: nn.Module) -> nn.Module:
    """All linear layers and embeddings in entropy-coded integers, plainly rounded: the speed of one that was compressed."""
    head = getattr(model, "lm_head", None)
    tied = head is not None and head.weight is model.get_input_embeddings().weight  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and not (tied and module is head):
            weight = module.weight.detach()
            fmt = CodedFormat(step=STEP * float(weight.std()))
            parts = fmt.encode(weight)
            spec = NetworkSpec.dense(tuple(weight.shape), fmt.of(parts))
            network = TensorNetwork(spec, {part_name(0, 0, part): stored for part, stored in parts.items()})
            replace_module(model, name, network, ("lm_head",) if tied and isinstance(module, nn.Embedding) else ())
    return model


for _track in (Track("products", products), Track("generating", generating)):
    TRACKS.add(_track)
