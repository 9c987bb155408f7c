"""The headline: what was compressed, how small it became, what that cost, and who is best at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensornet_compress.report.groups import TASKS, Group, baseline_nbytes, label, usable
from tensornet_compress.report.numbers import (
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
from tensornet_compress.report.parts import Claim, Story
from tensornet_compress.report.schema import Measure, Result, Row, Task
from tensornet_compress.report.verdict import Duel, duels

_SMALL_LOSS = {"kl": 0.1, "kl_natural": 0.1, "natural_kl": 0.1, "divergence": 0.1}
_UNCOMPRESSED: dict[Task, tuple[str, str]] = {"weights": ("weight", "16 or 32"), "kv": ("number", "16 or 32")}
_NONE_IS_ZERO = ("kl", "divergence", "error")
_MOST_STORIES = 3
_SAME_SIZE = 1.02
_MOST_SPEEDS = 6
_PREDICTED = "predicted_error"


def stories(result: Result, found: Sequence[Group]) -> list[Story]:
    """One story for each subject; many subjects of a task share one."""
    made = []
    for task in TASKS:
        mine = [group for group in found if group.task == task and group.quality != _PREDICTED]
        if task == "speed":
            made += [_speed(mine)] if mine else []
        elif len(mine) > _MOST_STORIES:
            made.append(_many(mine))
        else:
            made += [_one(group) for group in mine]
    return made


def featured(group: Group) -> Row | None:
    """The row that stands for a group: the smallest of ours whose loss stays small, of those alike in size the best; else the
    best of ours (or of the peers)."""
    size, quality = group.size, group.quality
    rows = [row for row in (group.ours or group.peers) if size is None or usable(row, size)]
    if not rows:
        return None
    if group.task == "search" and group.ours:
        fights = duels(group)
        return fights[0].ours if fights else group.ours[0]
    if quality is None or group.task == "search":
        return min(rows, key=lambda row: row.values[size] if size else 0.0)
    rows = [row for row in rows if usable(row, quality)] or rows
    limit = _SMALL_LOSS.get(quality)
    good = [row for row in rows if limit is not None and row.values.get(quality, limit + 1) <= limit]
    sign = -1 if group.measures[quality].better == "higher" else 1
    if good and size is not None:
        least = min(row.values[size] for row in good)
        return min(
            (r for r in good if r.values[size] <= max(least, _SAME_SIZE * least)), key=lambda row: sign * row.values[quality]
        )
    return min(rows, key=lambda row: sign * row.values.get(quality, float("inf") * sign))


def _one(group: Group) -> Story:
    row = featured(group)
    fights = duels(group)
    if row is None:
        return Story(f"{TASKS[group.task]}: {short(group.subject)}", ("Nothing was measured in bytes.",))
    sentences, claims = [_smaller(group, row)], _size_claims(group, row)
    cost = _cost(group, row)
    if cost:
        sentences.append(cost)
        quality = group.quality or ""
        if usable(row, quality):
            claims.append(_claim(row.values[quality], group.measures[quality]))
    if group.task == "search" and row.note:
        sentences.append(f"What was chosen and why: {plain(row.note)}.")
    sentences.append(_verdict(group, fights))
    if fights:
        won = sum(duel.winner == "ours" for duel in fights)
        lost = sum(duel.winner == "peer" for duel in fights)
        tone = "good" if won == len(fights) else "bad" if lost > won else "even"
        places = "sizes" if fights[0].limit_on else "limits"
        claims.append(Claim(f"{won} of {len(fights)}", f"{places} at which ours beats every peer", tone))  # type: ignore[arg-type]
    return Story(f"{TASKS[group.task]}: {short(group.subject)}", tuple(sentences), tuple(claims))


def _smaller(group: Group, row: Row) -> str:
    change, size = _change(group, row), group.size
    ours = row.ours and "ours" not in row.method
    who, subject = f"{short(row.method)}{' (ours)' if ours else ''}", short(group.subject)
    thing = {"kv": f"The key-value cache of {subject}, the model's memory of the text so far,"}.get(group.task, subject)
    if change is not None:
        thing = f"The compressed layers of {subject}" if change.part else thing
        verb = "become" if change.part else "becomes"
        told = f"{thing} {verb} {change.words} with {who}: {amount(change.now)} instead of {amount(change.before)}."
        if change.part and group.original is not None:
            whole, was = (amount(one.values["nbytes"]) for one in (row, group.original))
            told += f" The whole model, most of which was left alone, takes {whole} instead of {was}."
    elif size is not None and is_bytes(group.measures[size]):
        told = f"{thing} takes {with_unit(row.values[size], group.measures[size])} with {who}."
    else:
        told = ""
    bits = next((name for name in ("bits_per_weight", "bits_per_element") if usable(row, name)), None)
    if bits is not None and group.task in _UNCOMPRESSED:
        number_of, usual = _UNCOMPRESSED[group.task]
        what = f"{significant(row.values[bits])} bits for each {number_of} it holds"
        told += f" That is {what}" if told else f"{thing} takes {what} with {who}"
        told += f", where the original has {usual}."
    told = told or f"{thing} is stored with {who}."
    return told + _beside(row)


def _beside(row: Row) -> str:
    """What a cache holds beside its codes."""
    told = ""
    if usable(row, "payload_bits_per_element"):
        payload = significant(row.values["payload_bits_per_element"])
        told += f" Its compressed tokens take {payload} bits a number; the first and the latest tokens stay exact."
    if usable(row, "profile_nbytes"):
        told += f" Beside it lies a profile of {amount(row.values['profile_nbytes'])}, stored once for the model."
    return told


@dataclass(frozen=True)
class _Change:
    """Bytes before and after. ``part``: of the compressed layers, which are less than half of the model."""

    before: float
    now: float
    part: bool = False

    @property
    def words(self) -> str:
        if self.now <= self.before:
            return f"{times(self.before / self.now)} times smaller"
        return f"{times(self.now / self.before)} times larger"


def _change(group: Group, row: Row) -> _Change | None:
    name, original, before = "targeted_nbytes", group.original, baseline_nbytes(group, row)
    if before is None or not usable(row, "nbytes") or row.values["nbytes"] <= 0:
        return None
    if original is not None and usable(original, name) and usable(row, name) and 0 < original.values[name] < before / 2:
        return _Change(original.values[name], row.values[name], True) if row.values[name] > 0 else None
    return _Change(before, row.values["nbytes"])


def _size_claims(group: Group, row: Row) -> list[Claim]:
    change, size = _change(group, row), group.size
    if change is not None:
        of = f"{amount(change.now)} of {amount(change.before)}{', the compressed layers' if change.part else ''}"
        factor = change.before / change.now
        return [Claim(f"{times(max(factor, 1 / factor))} ×", f"{'smaller' if factor >= 1 else 'larger'}: {of}")]
    if size is None:
        return []
    return [_claim(row.values[size], group.measures[size])]


def _claim(value: float, measure: Measure) -> Claim:
    unit = "" if is_bytes(measure) or measure.unit.lower() in measure.title.lower() else f", {plain(measure.unit)}"
    return Claim(without_unit(value, measure), f"{heading(measure)}{unit}")


def _cost(group: Group, row: Row) -> str:
    told: list[str] = []
    for name in group.qualities[:3]:
        if not usable(row, name):
            continue
        measure = group.measures[name]
        said = f"{lower_first(plain(measure.title))} {with_unit(row.values[name], measure)}"
        if any(word in name for word in _NONE_IS_ZERO):
            said += "" if told else " (0 would mean that nothing changed)"
        elif group.original is not None and usable(group.original, name) and group.original.values[name] not in (0, 1):
            said += f" (before: {with_unit(group.original.values[name], measure)})"
        told.append(said)
    return f"What it costs: {', '.join(told)}." if told else ""


def _verdict(group: Group, fights: Sequence[Duel]) -> str:
    if not group.ours:
        return "Nothing of ours is among these methods, so ours and peers are not compared."
    if not group.peers:
        return "No peer was run here, so this page does not say whether another method would do better."
    if not fights:
        return "Ours and the peers were not measured at comparable sizes, so none is called best."
    won = [duel for duel in fights if duel.winner == "ours"]
    lost = [duel for duel in fights if duel.winner == "peer"]
    what = "at equal bytes" if fights[0].limit_on else "at equal error"
    if len(fights) == 1:
        said = "ours is better" if won else duel_words(fights[0]) if lost else "ours and the best of them are even"
        return f"Against peers {what}: {said}".removesuffix(".") + "."
    if len(won) == len(fights):
        return f"Against peers {what}: ours is better at every one of {_places(fights)}."
    told = f"Against peers {what}: ours is better at {len(won)} of {_places(fights)}"
    even = len(fights) - len(won) - len(lost)
    told += f", even at {even}" if even else ""
    if not lost:
        return f"{told}; no peer is better."
    worst = min(lost, key=lambda duel: duel.factor)
    return f"{told}, and a peer is better at {len(lost)}. {duel_words(worst)}"


def _places(fights: Sequence[Duel]) -> str:
    return f"{len(fights)} {'size' if fights[0].limit_on else 'limit'}{'s' if len(fights) > 1 else ''}"


def limit_words(duel: Duel) -> str:
    """The limit of a duel, as a table's first column says it."""
    if duel.limit_on is None:
        return f"{duel.limit:g}"
    return with_unit(duel.limit, duel.group.measures[duel.limit_on])


def duel_words(duel: Duel) -> str:
    """A duel as one sentence."""
    measure = duel.group.measures[duel.by]
    mine, other = duel.ours.values[duel.by], duel.peer.values[duel.by]
    values = f"{with_unit(other, measure)} against {with_unit(mine, measure)} of ours"
    told = "" if is_bytes(measure) else f" {lower_first(plain(measure.title))}"
    limit = f"At an error of {limit_words(duel)}" if duel.limit_on is None else f"Under a limit of {limit_words(duel)}"
    return f"{limit}, {short(duel.peer.method if duel.limit_on is None else label(duel.peer))} reaches{told} {values}."


def _many(found: Sequence[Group]) -> Story:
    """Many subjects in one story: how often ours wins, and where it wins and loses most."""
    fights = [duel for group in found for duel in duels(group)]
    title = f"{TASKS[found[0].task]}: {len(found)} subjects"
    if not fights:
        return Story(title, (f"{len(found)} subjects were measured; no peer was run on any of them.",))
    won = [duel for duel in fights if duel.winner == "ours"]
    lost = [duel for duel in fights if duel.winner == "peer"]
    what = "fewer bytes at equal error" if fights[0].limit_on is None else "a better result at equal bytes"
    even = len(fights) - len(won) - len(lost)
    sentences = [
        f"Of {len(fights)} comparisons ours wins {len(won)}, a peer wins {len(lost)} and {even} are even; {what} wins."
    ]
    if won:
        best = max(won, key=lambda duel: duel.factor)
        sentences.append(
            f"Ours leads most on {short(best.group.subject)}: {times(best.factor)} times better than {short(best.peer.method)}."
        )
    if lost:
        worst = min(lost, key=lambda duel: duel.factor)
        sentences.append(f"A peer leads most on {short(worst.group.subject)}. {duel_words(worst)}")
    tone = "good" if won and not lost else "bad" if len(lost) > len(won) else "even"
    claims = (
        Claim(str(len(won)), "comparisons won by ours", "good" if won else "plain"),
        Claim(str(even), "even", "even"),
        Claim(str(len(lost)), "won by a peer", "bad" if lost else "plain"),
    )
    return Story(title, tuple(sentences), claims if tone else ())


def _speed(found: Sequence[Group]) -> Story:
    """How much longer or shorter ours takes than the fastest peer, subject by subject."""
    sentences = []
    for group in found:
        name = next((name for name in group.times if group.measures[name].better == "lower"), None)
        sides = [[row for row in side if name and usable(row, name)] for side in (group.ours, group.peers)]
        if name is None or not all(sides):
            continue
        ours, peer = (min(side, key=lambda row: row.values[name]) for side in sides)
        mine, other = ours.values[name], peer.values[name]
        unit = group.measures[name]
        sentences.append(
            f"{_first_upper(plain(group.subject))}: {short(label(ours))} {_pace(mine / other)} the fastest peer, "
            f"{short(label(peer))} ({with_unit(mine, unit)} against {with_unit(other, unit)})."
        )
    return Story(TASKS["speed"], tuple(sentences[:_MOST_SPEEDS]) or ("Times are in the charts and tables below.",))


def _pace(ratio: float) -> str:
    if 1 / _SAME_SIZE <= ratio <= _SAME_SIZE:
        return "takes as long as"
    return f"takes {times(ratio)} times as long as" if ratio > 1 else f"is {times(1 / ratio)} times as fast as"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
