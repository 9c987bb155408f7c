"""The headline: what was compressed, how small it became, what that cost, and who is best at equal bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from tensornet_compress.report.page.groups import TASKS, Duel, Group, duels, is_divergence, label, usable
from tensornet_compress.report.page.numbers import (
    amount,
    heading,
    is_bytes,
    lower_first,
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
_LAYERS = "targeted_nbytes"
_MOST_STORIES = 3
_MOST_SPEEDS = 6


def stories(groups: Sequence[Group]) -> list[Story]:
    """One story for each subject; many subjects of a task share one."""
    made = []
    for task in TASKS:
        mine = [group for group in groups if group.task == task and group.quality != "predicted_error"]
        if mine and task == "speed":
            made.append(_speed(mine))
        elif len(mine) > _MOST_STORIES:
            fights = [duel for group in mine for duel in duels(group)]
            told = _standing(fights) if fights else ("No peer was run on any of them.",)
            made.append(Story(f"{TASKS[task]}: {len(mine)} subjects", told, _won_claim(fights)))
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
    change, cost = _change(group, row), _cost(group, row)
    claims = [change.claim] if change is not None else []
    shown = [None if claims else group.size, group.quality if cost else None]
    claims += [_claim(row.values[name], group.measures[name]) for name in shown if name is not None and usable(row, name)]
    choice = f"What was chosen and why: {row.note}." if group.task == "search" and row.note else ""
    if fights:
        verdict = _standing(fights)
    elif not group.ours:
        verdict = ("Nothing of ours is among these methods, so ours and peers are not compared.",)
    elif not group.peers:
        verdict = ("No peer was run here, so this page does not say whether another method would do better.",)
    else:
        verdict = ("Ours and the peers were not measured at comparable sizes, so none is called best.",)
    sentences = (_smaller(group, row, change), cost, choice, *verdict)
    return Story(title, tuple(filter(None, sentences)), (*claims, *_won_claim(fights)))


@dataclass(frozen=True)
class _Change:
    """Bytes before and after. ``part``: of the compressed layers, which are less than half of the model."""

    before: float
    now: float
    part: bool

    @property
    def words(self) -> str:
        """``3.2 times smaller``"""
        smaller = self.now <= self.before
        ratio = self.before / self.now if smaller else self.now / self.before
        return f"{times(ratio)} times {'smaller' if smaller else 'larger'}"

    @property
    def claim(self) -> Claim:
        ratio, _, way = self.words.split()
        of = f"{amount(self.now)} of {amount(self.before)}{', the compressed layers' if self.part else ''}"
        return Claim(f"{ratio} ×", f"{way}: {of}")


def _change(group: Group, row: Row) -> _Change | None:
    """What became of the compressed layers, where most of the model was left alone, or else of all bytes."""
    whole, original = group.nbytes_before(row), group.original
    if whole is None:
        return None
    layers = 0.0 if original is None or not usable(row, _LAYERS) else original.values.get(_LAYERS, 0.0)
    part = 0 < layers < whole / 2
    before, now = (layers, row.values[_LAYERS]) if part else (whole, row.values.get("nbytes", 0.0))
    return _Change(before, now, part) if 0 < now < inf else None


def _smaller(group: Group, row: Row, change: _Change | None) -> str:
    """How small it became, in which bits, and what lies beside it."""
    subject, size = short(group.subject), group.size
    who = f"{short(row.method)}{' (ours)' if row.ours and 'ours' not in row.method else ''}"
    thing = f"The key-value cache of {subject}, the model's memory of the text so far," if group.task == "kv" else subject
    told = ""
    if change is not None:
        verb = f"The compressed layers of {subject} become" if change.part else f"{thing} becomes"
        told = f"{verb} {change.words} with {who}: {amount(change.now)} instead of {amount(change.before)}."
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
    unit = "" if is_bytes(measure) or measure.unit.lower() in measure.title.lower() else f", {measure.unit}"
    return Claim(without_unit(value, measure), f"{heading(measure)}{unit}")


def _cost(group: Group, row: Row) -> str:
    told: list[str] = []
    for name in group.qualities[:3]:
        if usable(row, name):
            measure, original = group.measures[name], group.original
            said = f"{lower_first(measure.title)} {with_unit(row.values[name], measure)}"
            if is_divergence(name) or "error" in name:
                said += "" if told else " (0 would mean that nothing changed)"
            elif original is not None and usable(original, name) and original.values[name] not in (0, 1):
                said += f" (before: {with_unit(original.values[name], measure)})"
            told.append(said)
    return f"What it costs: {', '.join(told)}." if told else ""


def _won_claim(fights: Sequence[Duel]) -> tuple[Claim, ...]:
    if not fights:
        return ()
    count = Counter(duel.winner for duel in fights)
    tone = "good" if count["ours"] == len(fights) else "bad" if count["peer"] > count["ours"] else "even"
    what = f"{'sizes' if fights[0].limit_on else 'limits'} at which ours beats every peer"
    return (Claim(f"{count['ours']} of {len(fights)}", what, tone),)  # type: ignore[arg-type]


def _standing(fights: Sequence[Duel]) -> tuple[str, ...]:
    """How often ours and peers win, and where either does by most."""
    won, lost = ([duel for duel in fights if duel.winner == side] for side in ("ours", "peer"))
    equal, limits = ("bytes", "sizes") if fights[0].limit_on else ("error", "limits")
    even = len(fights) - len(won) - len(lost)
    told = [f"At equal {equal}, ours wins at {len(won)} of {len(fights)} {limits}, a peer at {len(lost)}, neither at {even}."]
    several = len({duel.group.subject for duel in fights}) > 1
    if won and several:
        best = max(won, key=lambda duel: duel.factor)
        lead = f"{times(best.factor)} times better than {short(best.peer.method)}"
        told.append(f"Ours leads most on {short(best.group.subject)}: {lead}.")
    if lost:
        worst = min(lost, key=lambda duel: duel.factor)
        told.append((f"A peer leads most on {short(worst.group.subject)}. " if several else "") + duel_words(worst))
    return tuple(told)


def limit_words(duel: Duel) -> str:
    """The limit of a duel, as a table's first column says it."""
    return f"{duel.limit:g}" if duel.limit_on is None else with_unit(duel.limit, duel.group.measures[duel.limit_on])


def duel_words(duel: Duel) -> str:
    """A duel as one sentence."""
    mine, other = (with_unit(row.values[duel.by], duel.measure) for row in (duel.ours, duel.peer))
    told = "" if is_bytes(duel.measure) else f" {lower_first(duel.measure.title)}"
    limit, peer = f"Under a limit of {limit_words(duel)}", label(duel.peer)
    if duel.limit_on is None:
        limit, peer = f"At an error of {limit_words(duel)}", duel.peer.method
    return f"{limit}, {short(peer)} reaches{told} {other} against {mine} of ours."


def _speed(groups: Sequence[Group]) -> Story:
    """How much longer or shorter ours takes than the fastest peer, subject by subject."""
    sentences = []
    for group in groups:
        name = next((name for name in group.times if group.measures[name].better == "lower"), "")
        ours, peer = (group.best(name, side) if name else None for side in (group.ours, group.peers))
        if ours is not None and peer is not None and min(ours.values[name], peer.values[name]) > 0:
            mine, other, subject = ours.values[name], peer.values[name], group.subject
            values = " against ".join(with_unit(value, group.measures[name]) for value in (mine, other))
            told = f"{short(label(ours))} {_pace(mine / other)} the fastest peer, {short(label(peer))} ({values})."
            sentences.append(f"{subject[:1].upper()}{subject[1:]}: {told}")
    return Story(TASKS["speed"], tuple(sentences[:_MOST_SPEEDS]) or ("Times are in the charts and tables below.",))


def _pace(ratio: float) -> str:
    if 1 / _SAME_SIZE <= ratio <= _SAME_SIZE:
        return "takes as long as"
    return f"takes {times(ratio)} times as long as" if ratio > 1 else f"is {times(1 / ratio)} times as fast as"
