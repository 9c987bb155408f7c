"""``bench speed``: forward of a module, decoding, compressing and searching, as ratios to dense or to a peer in one run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import JsonValue

from tensornet_compress.bench import tracks as _registered  # noqa: F401
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.run import Bench
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, clock_name
from tensornet_compress.report import Measure

MEASURES = {
    "time": Measure(title="time", unit="s", better="lower", explanation="Median of one call; all contenders timed in turn."),
    "ours_over_this": Measure(
        title="time of ours / time of this",
        better="lower",
        explanation="Below one: ours is faster than this contender, in the same run on the same machine.",
    ),
    "tokens_per_second": Measure(title="tokens per second", unit="tokens/s", better="higher"),
    "prefill": Measure(title="prefill", unit="s", better="lower", explanation="All tokens of the context in one pass."),
    "sealing": Measure(
        title="taking in a token",
        unit="s",
        better="lower",
        explanation="By a full cache, of the keys and values of another 64, with the coding of those before them.",
    ),
    "held_nbytes": Measure(
        title="counted bytes", unit="bytes", better="lower", explanation="What the cache says that it holds."
    ),
    "grown_nbytes": Measure(
        title="grown bytes", unit="bytes", better="lower", explanation="By how much the resident memory of a process grew."
    ),
    "held_share": Measure(title="counted bytes / those of the exact cache", better="lower", role="size"),
    "grown_share": Measure(title="grown bytes / those of the exact cache", better="lower", role="size"),
    "peak_nbytes": Measure(
        title="peak memory", unit="bytes", better="lower", explanation="Most memory held during the work less that before it."
    ),
}


class SpeedBench(Bench[SpeedSettings]):
    """All heats of all tracks."""

    task = "speed"

    def __init__(self, settings: SpeedSettings):
        super().__init__(settings)
        self.tracks = TRACKS.choose(settings.tracks)
        self._raced: dict[str, Raced] = {}

    def describe(self) -> dict[str, JsonValue]:
        """The settings as data."""
        told = super().describe() | {"tracks": [track.name for track in self.tracks], "clock": clock_name()}
        return {name: value for name, value in told.items() if name != "methods"}

    def measures(self) -> dict[str, Measure]:
        """Of the values that rows have."""
        return MEASURES

    def release(self) -> None:
        """Let go of what was measured."""
        self._raced.clear()

    def jobs(self) -> Iterator[Job]:
        """A row for each contender of each heat; the first row of a heat runs it."""
        for track in self.tracks:
            for heat in track.heats(self.settings):
                for name in heat.contenders:
                    yield Job(self.task, heat.subject, name, partial(self.row, heat, name), ours=name.startswith(OURS))

    def row(self, heat: Heat, contender: str) -> dict[str, Any]:
        """One contender of a heat."""
        if heat.subject not in self._raced:
            self._raced[heat.subject] = heat.run()
        raced = self._raced[heat.subject]
        if contender not in raced.values:
            raise Unavailable(raced.missing.get(contender, "it did not take part"))
        values, ours = dict(raced.values[contender]), raced.values.get(OURS, {})
        if "time" in values and "time" in ours:
            values["ours_over_this"] = ours["time"] / max(values["time"], 1e-12)
        return {"values": values, "seed": self.settings.seed, "settings": {"clock": clock_name()} | dict(raced.settings)}
