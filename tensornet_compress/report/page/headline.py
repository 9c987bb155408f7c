"""The headline: what was compressed, how small it became, what that cost, and who is best at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from tensornet_compress.report.page.groups import TASKS, Duel, Group, duels, is_divergence, label, usable
from tensornet_compress.report.page.numbers import (
    amount,
    heading,
    is_bytes,
    lower_first,
    plain,
    short,
    significant,
    times,
    with_unit,
    without_unit,
)
from tensornet_compress.report.page.parts import Claim, Story
from tensornet_compress.report.schema import Measure, Row

_SMALL_LOSS = 0.1
_SAME_SIZE = 1.02
_MOST_STORIES = 3
_MOST_SPEEDS = 6


def stories(groups: Sequence[Group]) -> list[Story]:
    """One story for each subject; many subjects of a task share one."""
    made = []
    for task in TASKS:
        mine = [group for group in groups if group.task == task and group.quality != "predicted_error"]
        if mine and (task == "speed" or len(mine) > _MOST_STORIES):
            made.append(_speed(mine) if task == "speed" else _many(mine))
        else:
            made += map(_one, mine)
    return made


def featured(group: Group) -> Row | None:
    """The row that stands for a group: the smallest of ours whose loss stays small, of those alike in size the best; else the
    best of ours (or of the peers)."""
    size, quality = group.size, group.quality
    rows = [row for row in (group.ours or group.peers) if size is None or usable(row, size)]
    if not rows:
        return None
    if group.task == "search" and group.ours:
        return fights[0].ours if (fights := duels(group)) else group.ours[0]
    if quality is None or group.task == "search":
        return rows[0] if size is None else group.best(size, rows)
    good = [row for row in rows if is_divergence(quality) and row.values.get(quality, inf) <= _SMALL_LOSS]
    if good and size is not None:
        least = min(row.values[size] for row in good)
        rows = [row for row in good if row.values[size] <= max(least, _SAME_SIZE * least)]
    return group.best(quality, rows) or rows[0]


def _one(group: Group) -> Story:
    title = f"{TASKS[group.task]}: {short(group.subject)}"
    row, fights = featured(group), duels(group)
    if row is None:
        return Story(title, ("Nothing was measured in bytes.",))
    change = _change(group, row)
    sentences, claims = [_smaller(group, row, change)], []
    if change is not None:
        claims.append(change.claim)
    elif group.size is not None:
        claims.append(_claim(row.values[group.size], group.measures[group.size]))
    if cost := _cost(group, row):
        sentences.append(cost)
        if group.quality is not None and usable(row, group.quality):
            claims.append(_claim(row.values[group.quality], group.measures[group.quality]))
    if group.task == "search" and row.note:
        sentences.append(f"What was chosen and why: {plain(row.note)}.")
    sentences.append(_verdict(group, fights))
    if fights:
        won, lost = _won_and_lost(fights)
        tone = "good" if len(won) == len(fights) else "bad" if len(lost) > len(won) else "even"
        places = "sizes" if fights[0].limit_on else "limits"
        figure = f"{len(won)} of {len(fights)}"
        claims.append(Claim(figure, f"{places} at which ours beats every peer", tone))  # type: ignore[arg-type]
    return Story(title, tuple(sentences), tuple(claims))


@dataclass(frozen=True)
class _Change:
    """Bytes before and after. ``part``: of the compressed layers, which are less than half of the model."""

    before: float
    now: float
    part: bool

    @property
    def factor(self) -> tuple[str, str]:
        """``("3.2", "smaller")``"""
        smaller = self.now <= self.before
        ratio = self.before / self.now if smaller else self.now / self.before
        return times(ratio), "smaller" if smaller else "larger"

    @property
    def claim(self) -> Claim:
        ratio, way = self.factor
        of = f"{amount(self.now)} of {amount(self.before)}{', the compressed layers' if self.part else ''}"
        return Claim(f"{ratio} ×", f"{way}: {of}")


def _change(group: Group, row: Row) -> _Change | None:
    name, original, before = "targeted_nbytes", group.original, group.nbytes_before(row)
    part = original is not None and usable(original, name) and usable(row, name)
    if part and original is not None and before is not None and 0 < original.values[name] < before / 2:
        before, now = original.values[name], row.values[name]
    else:
        part, now = False, row.values["nbytes"] if usable(row, "nbytes") else 0.0
    return None if before is None or now <= 0 else _Change(before, now, part)


def _smaller(group: Group, row: Row, change: _Change | None) -> str:
    """How small it became, in which bits, and what lies beside it."""
    subject, size = short(group.subject), group.size
    who = f"{short(row.method)}{' (ours)' if row.ours and 'ours' not in row.method else ''}"
    thing = f"The key-value cache of {subject}, the model's memory of the text so far," if group.task == "kv" else subject
    told = ""
    if change is not None:
        ratio, way = change.factor
        verb = f"The compressed layers of {subject} become" if change.part else f"{thing} becomes"
        told = f"{verb} {ratio} times {way} with {who}: {amount(change.now)} instead of {amount(change.before)}."
        if change.part and group.original is not None:
            whole, was = (amount(one.values["nbytes"]) for one in (row, group.original))
            told += f" The whole model, most of which was left alone, takes {whole} instead of {was}."
    elif size is not None and is_bytes(group.measures[size]):
        told = f"{thing} takes {with_unit(row.values[size], group.measures[size])} with {who}."
    each = {"weights": ("bits_per_weight", "weight"), "kv": ("bits_per_element", "number")}.get(group.task)
    if each is not None and usable(row, each[0]):
        bits = f"{significant(row.values[each[0]])} bits for each {each[1]} it holds"
        told += f" That is {bits}" if told else f"{thing} takes {bits} with {who}"
        told += ", where the original has 16 or 32."
    told = told or f"{thing} is stored with {who}."
    if usable(row, "payload_bits_per_element"):
        payload = significant(row.values["payload_bits_per_element"])
        told += f" Its compressed tokens take {payload} bits a number; the first and the latest tokens stay exact."
    if usable(row, "profile_nbytes"):
        told += f" Beside it lies a profile of {amount(row.values['profile_nbytes'])}, stored once for the model."
    return told


def _claim(value: float, measure: Measure) -> Claim:
    unit = "" if is_bytes(measure) or measure.unit.lower() in measure.title.lower() else f", {plain(measure.unit)}"
    return Claim(without_unit(value, measure), f"{heading(measure)}{unit}")


def _cost(group: Group, row: Row) -> str:
    told: list[str] = []
    for name in group.qualities[:3]:
        if usable(row, name):
            measure, original = group.measures[name], group.original
            said = f"{lower_first(plain(measure.title))} {with_unit(row.values[name], measure)}"
            if is_divergence(name) or "error" in name:
                said += "" if told else " (0 would mean that nothing changed)"
            elif original is not None and usable(original, name) and original.values[name] not in (0, 1):
                said += f" (before: {with_unit(original.values[name], measure)})"
            told.append(said)
    return f"What it costs: {', '.join(told)}." if told else ""


def _won_and_lost(fights: Sequence[Duel]) -> tuple[list[Duel], list[Duel]]:
    won, lost = ([duel for duel in fights if duel.winner == side] for side in ("ours", "peer"))
    return won, lost


def _verdict(group: Group, fights: Sequence[Duel]) -> str:
    if not group.ours:
        return "Nothing of ours is among these methods, so ours and peers are not compared."
    if not group.peers:
        return "No peer was run here, so this page does not say whether another method would do better."
    if not fights:
        return "Ours and the peers were not measured at comparable sizes, so none is called best."
    won, lost = _won_and_lost(fights)
    told = f"Against peers {'at equal bytes' if fights[0].limit_on else 'at equal error'}:"
    if len(fights) == 1:
        return f"{told} {'ours is better.' if won else duel_words(lost[0]) if lost else 'ours and the best of them are even.'}"
    places = f"{len(fights)} {'sizes' if fights[0].limit_on else 'limits'}"
    if len(won) == len(fights):
        return f"{told} ours is better at every one of {places}."
    even = len(fights) - len(won) - len(lost)
    told = f"{told} ours is better at {len(won)} of {places}{f', even at {even}' if even else ''}"
    if not lost:
        return f"{told}; no peer is better."
    return f"{told}, and a peer is better at {len(lost)}. {duel_words(min(lost, key=lambda duel: duel.factor))}"


def limit_words(duel: Duel) -> str:
    """The limit of a duel, as a table's first column says it."""
    return f"{duel.limit:g}" if duel.limit_on is None else with_unit(duel.limit, duel.group.measures[duel.limit_on])


def duel_words(duel: Duel) -> str:
    """A duel as one sentence."""
    mine, other = (with_unit(row.values[duel.by], duel.measure) for row in (duel.ours, duel.peer))
    told = "" if is_bytes(duel.measure) else f" {lower_first(plain(duel.measure.title))}"
    limit, peer = f"Under a limit of {limit_words(duel)}", label(duel.peer)
    if duel.limit_on is None:
        limit, peer = f"At an error of {limit_words(duel)}", duel.peer.method
    return f"{limit}, {short(peer)} reaches{told} {other} against {mine} of ours."


def _many(groups: Sequence[Group]) -> Story:
    """Many subjects in one story: how often ours wins, and where it wins and loses most."""
    fights = [duel for group in groups for duel in duels(group)]
    title = f"{TASKS[groups[0].task]}: {len(groups)} subjects"
    if not fights:
        return Story(title, (f"{len(groups)} subjects were measured; no peer was run on any of them.",))
    won, lost = _won_and_lost(fights)
    even = len(fights) - len(won) - len(lost)
    what = "fewer bytes at equal error" if fights[0].limit_on is None else "a better result at equal bytes"
    sentences = [
        f"Of {len(fights)} comparisons ours wins {len(won)}, a peer wins {len(lost)} and {even} are even; {what} wins."
    ]
    if won:
        best = max(won, key=lambda duel: duel.factor)
        lead = f"{times(best.factor)} times better than {short(best.peer.method)}"
        sentences.append(f"Ours leads most on {short(best.group.subject)}: {lead}.")
    if lost:
        worst = min(lost, key=lambda duel: duel.factor)
        sentences.append(f"A peer leads most on {short(worst.group.subject)}. {duel_words(worst)}")
    claims = (
        Claim(str(len(won)), "comparisons won by ours", "good" if won else "plain"),
        Claim(str(even), "even", "even"),
        Claim(str(len(lost)), "won by a peer", "bad" if lost else "plain"),
    )
    return Story(title, tuple(sentences), claims)


def _speed(groups: Sequence[Group]) -> Story:
    """How much longer or shorter ours takes than the fastest peer, subject by subject."""
    sentences = []
    for group in groups:
        name = next((name for name in group.times if group.measures[name].better == "lower"), "")
        ours, peer = (group.best(name, side) if name else None for side in (group.ours, group.peers))
        if ours is not None and peer is not None and min(ours.values[name], peer.values[name]) > 0:
            mine, other, subject = ours.values[name], peer.values[name], plain(group.subject)
            values = " against ".join(with_unit(value, group.measures[name]) for value in (mine, other))
            told = f"{short(label(ours))} {_pace(mine / other)} the fastest peer, {short(label(peer))} ({values})."
            sentences.append(f"{subject[:1].upper()}{subject[1:]}: {told}")
    return Story(TASKS["speed"], tuple(sentences[:_MOST_SPEEDS]) or ("Times are in the charts and tables below.",))


def _pace(ratio: float) -> str:
    if 1 / _SAME_SIZE <= ratio <= _SAME_SIZE:
        return "takes as long as"
    return f"takes {times(ratio)} times as long as" if ratio > 1 else f"is {times(1 / ratio)} times as fast as"
