"""``bench speed``: forward of a module, decoding, compressing and searching, as ratios to dense or to a peer in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import JsonValue

from tensornet_compress.bench import methods as _registered  # noqa: F401
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.race import clock_name
from tensornet_compress.bench.registry import Registry
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.report import Measure

MEASURES = {
    "time": Measure(title="time", unit="s", better="lower", explanation="Median of one call; all contenders timed in turn."),
    "ours_over_this": Measure(
        title="time of ours / time of this",
        better="lower",
        explanation="Below one: ours is faster than this contender, in the same run on the same machine.",
    ),
    "tokens_per_second": Measure(title="tokens per second", unit="tokens/s", better="higher"),
}
OURS = "ours"


@dataclass(frozen=True)
class SpeedSettings:
    """What a run of ``bench speed`` does. ``tracks``: which races, all for ``None``; ``rounds``: timings of each contender;
    ``context``: tokens cached before decoding; ``steps``: tokens decoded in a round."""

    model: str = "smollm2-135m"
    text: str = "wikipedia"
    tracks: tuple[str, ...] | None = None
    rounds: int = 7
    batches: tuple[int, ...] = (1, 256)
    keep: float = 0.6
    context: int = 512
    steps: int = 3
    bits: float = 4.5
    budget: float = 20.0
    quick: bool = True
    seed: int = 0

    @classmethod
    def full(cls, **changed: Any) -> SpeedSettings:
        """More rounds, longer contexts, a whole block compressed by every method."""
        whole: dict[str, Any] = {"rounds": 41, "batches": (1, 32, 512), "context": 4096, "steps": 12, "budget": 60.0}
        return cls(**whole | {"quick": False} | changed)

    def as_json(self) -> dict[str, JsonValue]:
        """For ``Result.settings``."""
        made: dict[str, Any] = asdict(self) | {"clock": clock_name()}
        made["tracks"] = [track.name for track in TRACKS.choose(self.tracks)]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


@dataclass(frozen=True)
class Timed:
    """Seconds per call by contender, with the reason for those that could not run; ``tokens`` that one call makes."""

    seconds: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    tokens: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """One race: ``run`` times everybody at once. ``contenders`` are known before it is run; ``OURS`` is one of them."""

    subject: str
    contenders: tuple[str, ...]
    run: Callable[[], Timed]


@dataclass(frozen=True)
class Track:
    """A kind of race: settings -> heats."""

    name: str
    heats: Callable[[SpeedSettings], Iterator[Heat]]


TRACKS: Registry[Track] = Registry("track")


@dataclass
class SpeedBench:
    """All heats of all tracks."""

    settings: SpeedSettings
    _times: dict[str, Timed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tensornet_compress.bench import tracks as _tracks  # noqa: F401

        self.tracks = TRACKS.choose(self.settings.tracks)

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        return self.settings.as_json()

    def measures(self) -> dict[str, Measure]:
        """Of the values that rows have."""
        return MEASURES

    def prepare(self) -> None:
        """Nothing: each heat loads what it needs."""

    def release(self) -> None:
        """Let go of what was loaded."""
        self._times.clear()

    def jobs(self) -> Iterator[Job]:
        """A row for each contender of each heat; the first row of a heat runs it."""

        def job(heat: Heat, contender: str) -> Job:
            return Job("speed", heat.subject, contender, lambda: self.row(heat, contender), ours=contender.startswith(OURS))

        for track in self.tracks:
            for heat in track.heats(self.settings):
                for contender in heat.contenders:
                    yield job(heat, contender)

    def row(self, heat: Heat, contender: str) -> dict[str, Any]:
        """One contender of a heat."""
        if heat.subject not in self._times:
            self._times[heat.subject] = heat.run()
        timed = self._times[heat.subject]
        if contender not in timed.seconds:
            raise Unavailable(timed.missing.get(contender, "it did not take part"))
        seconds = timed.seconds[contender]
        values = {"time": seconds, "ours_over_this": timed.seconds[OURS] / max(seconds, 1e-12)}
        if timed.tokens is not None:
            values["tokens_per_second"] = timed.tokens / max(seconds, 1e-12)
        return {"values": values, "seed": self.settings.seed, "settings": {"clock": clock_name()} | dict(timed.settings)}
