"""Layouts searched for the layers of a model: one search for each kind of layer, shared by its siblings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensornet_compress.compressing.jobs import Layer
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.searching import search
from tensornet_compress.tensor import Layout, Topology

SEARCHED_ERROR = 0.2
"""Relative error that layouts are compared at: what integers of about 3 bits lose. At a smaller one dense wins on most weights,
and at a given number of bytes exact layouts could not be told apart."""


@dataclass(frozen=True)
class LayoutSearch:
    """What the search of one kind of layer came to.

    ``kind``: last part of the name and the shape. ``layer``: the one that was searched. ``gain``: its bytes without ordering
    over those with, and ``null_gain`` the same on shuffled entries; ``layout`` is None when nothing beyond that was won.
    """

    kind: str
    layer: str
    layout: tuple[Layout, Topology] | None
    gain: float
    null_gain: float
    reason: str

    def __str__(self) -> str:
        return f"searched {self.kind} (on {self.layer}): {self.reason}"


def layer_kind(name: str, shape: Sequence[int]) -> str:
    """Layers of one kind share a layout: ``down_proj 576 x 1536``."""
    return f"{name.rpartition('.')[2]} {' x '.join(map(str, shape))}"


def search_layouts(jobs: Sequence[Layer], seconds: float, progress: Progress | None = None) -> dict[str, LayoutSearch]:
    """Search mode orders and topologies on the middle layer of every kind, in the layer's metric.

    Fibre orders are left out: they belong to one tensor and would have to be stored again for every sibling.

    Args:
        jobs: the layers. seconds: time budget of each kind's search, null control included.

    Returns:
        By kind (see ``layer_kind``), in the order of the layers.
    """
    kinds: dict[str, list[Layer]] = {}
    for job in jobs:
        kinds.setdefault(layer_kind(job.name, job.source.load().shape), []).append(job)
    found = {}
    with (progress or SilentProgress()).stage("search layouts", len(kinds)) as advance:
        for kind, members in kinds.items():
            member = members[len(members) // 2]
            try:
                found[kind] = _search_kind(kind, member, seconds)
            except TensorNetError as error:
                found[kind] = LayoutSearch(kind, member.name, None, 1.0, 1.0, f"failed: {error}")
            advance()
    return found


def _search_kind(kind: str, job: Layer, seconds: float) -> LayoutSearch:
    weight = job.source.load()
    result = search(
        weight.float(),
        max_error=SEARCHED_ERROR,
        metric=job.loaded_metric(),
        orderings=("mode",),
        formats=("bf16",),
        time_budget=seconds,
    )
    term = result.best.spec.terms[0]
    null_gain = 1.0 if result.null is None else result.null.gain
    if not result.choice.ordered:
        return LayoutSearch(kind, job.name, None, result.gain, null_gain, result.reason)
    return LayoutSearch(kind, job.name, (term.layout, term.topology), result.gain, null_gain, result.reason)
