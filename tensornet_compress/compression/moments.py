"""Input second moments of the targets of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tensornet_compress.metric import Batch, collect_input_moments, has_input_moment
from tensornet_compress.nn import Target


def input_moments(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Input second moments by target; an embedding takes that of the head tied to it, since its rows have no input."""
    if not batches:
        return {}
    source: dict[str, str] = {}
    for target in chosen:
        if has_input_moment(model.get_submodule(target.name)):
            source[target.name] = target.name
        elif target.kind == "embedding":
            heads = [name for name in target.tied if isinstance(model.get_submodule(name), nn.Linear)]
            if heads:
                source[target.name] = heads[0]
    if not source:
        return {}
    collected = collect_input_moments(model, batches, list(dict.fromkeys(source.values())), advance)
    means = {id(moment): moment.mean.cpu() for moment in collected.values()}
    return {name: means[id(collected[origin])] for name, origin in source.items()}
