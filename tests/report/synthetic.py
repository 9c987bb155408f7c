"""Results made up for tests: one that has everything, and pieces to build smaller ones from."""

from __future__ import annotations

from typing import Any

from tensornet_compress.report import BitsOfLayer, Drawing, LayerCell, Machine, Measure, Result, Row, Spectrum

MEASURES = {
    "nbytes": Measure(title="Whole model", unit="bytes", better="lower", explanation="Everything stored."),
    "kl": Measure(title="KL divergence", unit="nats per token", better="lower"),
    "perplexity": Measure(title="Perplexity", better="lower"),
    "error": Measure(title="Relative error", better="lower"),
    "seconds": Measure(title="Time to compress", unit="s", better="lower"),
}
SECTIONS = (
    "compare", "fronts", "layers", "ledger", "spectra", "networks", "cache", "timings", "skipped", "figures", "words",
    "reproduce",
)  # fmt: skip


def row(method: str, nbytes: float, kl: float, ours: bool = False, **more: Any) -> Row:
    """A row of weights."""
    content: dict[str, Any] = {
        "task": "weights", "subject": "tiny", "method": method, "ours": ours, "budget": nbytes / 1000, "budget_unit": "bits",
        "values": {"nbytes": nbytes, "kl": kl},
    }  # fmt: skip
    return Row.model_validate(content | more)


def result(*rows: Row, **more: Any) -> Result:
    """A result of these rows."""
    machine = Machine(processor="any", cores=2, threads=1, python="3.11", packages={"torch": "2"}, commit="abc")
    content: dict[str, Any] = {
        "name": "Tiny", "command": "tensornet-compress bench weights", "version": "0", "made": "2026-01-01", "machine": machine,
        "settings": {"windows": 4, "note": "a <b> setting"}, "measures": MEASURES, "rows": rows, "seconds": 3.5,
    }  # fmt: skip
    return Result.model_validate(content | more)


def layers(blocks: int = 6) -> tuple[LayerCell, ...]:
    """Layers of a small model, and one outside its blocks."""
    cells = [
        LayerCell(
            name=f"model.layers.{block}.mlp.{kind}", kind="linear", family="svd" if block % 2 else "dense",
            formats="int4g64" if block % 2 else "bf16", ranks=(8 * block,) if block % 2 else (), bits_per_weight=3 + block,
            nbytes=1000 + block, error=10.0**-block,
        )
        for block in range(blocks)
        for kind in ("up_proj", "down_proj")
    ]  # fmt: skip
    head = LayerCell(name="lm_head", kind="linear", family="dense", formats="bf16", bits_per_weight=16, nbytes=4096)
    return (*cells, head)


def everything() -> Result:
    """A result in which every section has something to show."""
    tree = Drawing(
        title="a tree", legs=((), ("a 4",), ("b 4",), (), ("c 4",), ("d 4",)),
        edges=((0, 1, 3), (0, 2, 3), (0, 3, 2), (3, 4, 5), (3, 5, 5)),
    )  # fmt: skip
    chain = Drawing(title="a chain", legs=tuple((f"p{i}",) for i in range(9)), edges=tuple((i, i + 1, 2**i) for i in range(8)))
    spectrum = Spectrum(title="widest cut", before=(1.0, 0.5, 0.25), after=(1.0, 0.1, 0.0))
    return result(
        row("original", 32000, 0.0, budget=None, values={"nbytes": 32000, "kl": 0.0, "perplexity": 15.0}),
        row(
            "auto", 4000, 0.05, True, values={"nbytes": 4000, "kl": 0.05, "perplexity": 16.0, "seconds": 60.0}, layers=layers(),
            ledger={"codes": 3000, "scales": 900, "orders": 100}, spectra=(spectrum,), drawings=(tree, chain),
        ),
        row("auto", 2000, 0.5, True),
        row("rtn", 4000, 0.2, values={"nbytes": 4000, "kl": 0.2, "perplexity": 18.0, "seconds": 1.0}),
        row("rtn", 2000, 0.4),
        row("gptq", 0, 0, values={}, skipped="needs a package that is not installed"),
        Row(
            task="kv", subject="tiny", method="live", ours=True, budget=2, values={"nbytes": 100, "kl": 0.1},
            cache_bits=tuple(BitsOfLayer(layer=layer, keys=2 + layer, values=2) for layer in range(4)),
        ),
        Row(task="speed", subject="tiny, decoding", method="live", ours=True, values={"seconds": 2.0}),
        Row(task="speed", subject="tiny, decoding", method="exact", values={"seconds": 1.0}),
    )  # fmt: skip
