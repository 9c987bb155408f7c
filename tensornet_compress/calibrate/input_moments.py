"""Input second moments of the targets of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

from torch import Tensor, nn

from tensornet_compress.calibrate.moments import Batch, InputMoment, collect_input_moments, weight_users
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import Target


def input_moments(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Input second moments by target, over the inputs of all modules that use its weight; an embedding takes those of the
    heads tied to it, since its rows have no input.

    Raises:
        TensorNetError: a target that received no input.
    """
    if not batches:
        return {}
    users = {target.name: found for target in chosen if (found := _users(model, target))}
    if not users:
        return {}
    collected = collect_input_moments(model, batches, list(dict.fromkeys(chain(*users.values()))), advance)
    means: dict[tuple[int, ...], Tensor] = {}
    result = {}
    for target, names in users.items():
        moments = [collected[name] for name in names if name in collected]
        if not moments:
            raise TensorNetError(f"{target!r} received no input during calibration; give batches that reach it, or ignore it")
        key = tuple(id(moment) for moment in moments)
        if key not in means:
            means[key] = _mean(moments).cpu()
        result[target] = means[key]
    return result


def _users(model: nn.Module, target: Target) -> list[str]:
    """The modules that multiply a target's weight with input vectors, each once."""
    wanted = [target.name, *target.tied]
    if target.kind == "embedding":
        wanted = [name for name in target.tied if isinstance(model.get_submodule(name), nn.Linear)]
    return weight_users(model, wanted)


def _mean(moments: Sequence[InputMoment]) -> Tensor:
    """The mean over the vectors of all moments, float64 (n, n)."""
    first, *others = moments
    if not others:
        return first.mean
    count = sum(moment.count for moment in moments)
    mean = first.mean * (first.count / count)
    for other in others:
        mean += other.mean * (other.count / count)
    return mean
