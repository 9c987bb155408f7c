"""``bench speed``: forward of a module, decoding, compressing and searching, as ratios to dense or to a peer in one run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import JsonValue

from tensornet_compress.bench import tracks as _registered  # noqa: F401
from tensornet_compress.bench.harness import Job, lower
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.run import Bench
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, clock_name
from tensornet_compress.report import Measure

MEASURES = {
    "time": lower("time", "s", "Median of one call; all contenders timed in turn."),
    "ours_over_this": lower(
        "time of ours / time of this",
        explanation="Below one: ours is faster than this contender, in the same run on the same machine.",
    ),
    "over_dense": lower(
        "time of this / time of dense fp32",
        explanation="Below one: faster than the dense one in the same run.",
    ),
    "tokens_per_second": Measure(title="tokens per second", unit="tokens/s", better="higher"),
    "prefill": lower("prefill", "s", "All tokens of the context in one pass."),
    "sealing": lower("taking in a token", "s", "By a full cache, of the keys and values of another 64, older ones coded."),
    "held_nbytes": lower("counted bytes", "bytes", "What the cache says that it holds."),
    "grown_nbytes": lower("grown bytes", "bytes", "By how much the resident memory of a process grew."),
    "held_share": lower("counted bytes / those of the exact cache", role="size"),
    "grown_share": lower("grown bytes / those of the exact cache", role="size"),
    "peak_nbytes": lower("peak memory", "bytes", "Most memory held during the work less that before it."),
}


class SpeedBench(Bench[SpeedSettings]):
    """All heats of all tracks."""

    task = "speed"
    timed = True

    def __init__(self, settings: SpeedSettings):
        super().__init__(settings)
        self.tracks = TRACKS.choose(settings.tracks)
        self._raced: dict[str, Raced] = {}

    def describe(self) -> dict[str, JsonValue]:
        return super().describe() | {"tracks": [track.name for track in self.tracks], "clock": clock_name()}

    def measures(self) -> dict[str, Measure]:
        return MEASURES

    def release(self) -> None:
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
        if "time" in values and "time" in raced.values.get("dense", {}):
            values["over_dense"] = values["time"] / max(raced.values["dense"]["time"], 1e-12)
        return {"values": values, "seed": self.settings.seed, "settings": {"clock": clock_name()} | dict(raced.settings)}
