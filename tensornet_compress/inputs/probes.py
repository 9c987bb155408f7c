"""Small zero-shot sets made here, the same on every machine: last words, English agreement, rare words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

from tensornet_compress.inputs.texts import heldout_articles

Continuation = tuple[str, str]
"""A context and the text that follows it, which begins with a space."""
Pair = tuple[str, str, str]
"""A context, the right text after it and the wrong one."""

_SENTENCE_END = re.compile(r"(?<=[a-z]{2}[.?!]) (?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]{4,}")
_CONTEXT_WORDS, _LEAST_CONTEXT, _LEAST_SENTENCE = 60, 35, 8

_THINGS = (
    "key keys, picture pictures, machine machines, letter letters, ship ships, house houses, cabinet cabinets, window windows"
)
_PEOPLE = (
    "author authors, teacher teachers, child children, farmer farmers, woman women, doctor doctors, lawyer lawyers, "
    "senator senators"
)
_PLACES, _DEEDS = ("near", "behind", "beside"), ("likes like", "knows know", "sees see")
_VERBS = ("is are: old", "was were: there", "has have: been moved", "does do: not matter")
_PAIRS_OF_A_KIND = 72

# Definition, word. Common in dictionaries, rare in running text.
_RARE = (
    "a large woodwind instrument with a double reed: bassoon; a fear of closed spaces: claustrophobia; "
    "an animal with a pouch, such as a kangaroo: marsupial; a word that reads the same backwards: palindrome; "
    "the study of insects: entomology; a small stringed instrument from Hawaii: ukulele; "
    "a frozen mass of slowly moving ice: glacier; a doctor who treats the skin: dermatologist; "
    "a tool for measuring the pressure of air: barometer; a person who makes maps: cartographer; "
    "a poem of fourteen lines: sonnet; a shape with eight sides: octagon; the fear of spiders: arachnophobia; "
    "a boat with two hulls: catamaran; a person who collects stamps: philatelist; "
    "an upright prehistoric stone: megalith; a stone coffin: sarcophagus; "
    "a bird that cannot fly and lives in Antarctica: penguin; a covered walk with columns: colonnade; "
    "a sweet spread made of oranges: marmalade; a knife fixed to a rifle: bayonet; "
    "the outermost layer of the skin: epidermis; a ship that travels under water: submarine; "
    "an underground burial place: catacomb; a list of words with their meanings: glossary; "
    "a violent storm with a rotating column of air: tornado; the art of beautiful handwriting: calligraphy; "
    "a curved weapon that returns to its thrower: boomerang; a loose robe worn in Japan: kimono; "
    "a green gem: emerald; a fish with a long snout like a horse: seahorse; an ancient Egyptian king: pharaoh; "
    "a person who studies the stars: astronomer; a substance that speeds up a reaction: catalyst; "
    "a round roof: dome; a spice made from the stigmas of crocuses: saffron; a house made of snow: igloo; "
    "an instrument for looking at very small things: microscope; "
    "a musical work for a solo instrument and orchestra: concerto"
)


def zero_shot_sets(items: int | None = None) -> dict[str, list[Any]]:
    """The three sets by name, as ``evaluate.Suite`` takes them, or ``items`` spread over each."""
    sets: dict[str, list[Any]] = {"last_words": last_words(), "pairs": agreement_pairs(), "rare_words": rare_words()}
    return sets if items is None else {name: whole[:: -(-len(whole) // items)] for name, whole in sets.items()}


def last_words(count: int = 150) -> list[Continuation]:
    """Passages of held-out articles without their last word, which stands in the passage once before (as in LAMBADA): the
    first passage of each article, then the second of each."""
    by_article = (_passages(article) for article in heldout_articles("prose") + heldout_articles("technical"))
    in_turn = chain.from_iterable(zip_longest(*by_article))
    return [passage for passage in in_turn if passage is not None][:count]


def _passages(article: str) -> Iterator[Continuation]:
    for paragraph in article.split("\n"):
        sentences = _SENTENCE_END.split(paragraph)
        for number in range(len(sentences) - 1, 0, -1):
            words = sentences[number].rstrip(".?!").split(" ")
            before = " ".join([*sentences[:number], *words[:-1]]).split(" ")[-_CONTEXT_WORDS:]
            seen = {word.strip(".,;:()\"'").lower() for word in before}
            long_enough = len(words) >= _LEAST_SENTENCE and len(before) >= _LEAST_CONTEXT
            if long_enough and _WORD.fullmatch(words[-1]) and words[-1].lower() in seen:
                yield " ".join(before), f" {words[-1]}"
                break


def agreement_pairs() -> list[Pair]:
    """Minimal pairs of English agreement, 72 of each kind: a verb with its subject across another noun of the other number,
    a verb across a relative clause, a reflexive with its subject, a demonstrative with its noun."""
    things, people, deeds = map(_couples, (_THINGS, _PEOPLE, ", ".join(_DEEDS)))
    verbs = [(*forms.split(" "), end) for forms, end in (verb.split(":") for verb in _VERBS)]
    kinds: list[list[Pair]] = [[], [], [], []]
    for t, thing in enumerate(things):
        for p, person in enumerate(people):
            for number in (0, 1):
                one, end = verbs[(t + p) % len(verbs)][:2], verbs[(t + p) % len(verbs)][2]
                right, wrong = f" {one[number]}{end}", f" {one[1 - number]}{end}"
                other, deed = person[1 - number], deeds[(t + p) % len(deeds)][1 - number]
                selves = " itself", " themselves"
                kinds[0].append((f"The {thing[number]} {_PLACES[(t + p) % len(_PLACES)]} the {other}", right, wrong))
                kinds[1].append((f"The {thing[number]} that the {other} {deed}", right, wrong))
                kinds[2].append((f"The {thing[number]} of the {other} could not move", selves[number], selves[1 - number]))
                pointing = f"Near the {other} we saw {('this', 'these')[number]} old"
                kinds[3].append((pointing, f" {thing[number]}", f" {thing[1 - number]}"))
    # A step that shares no factor with the numbers of nouns visits all of them in both numbers.
    return [kind[5 * place % len(kind)] for kind in kinds for place in range(_PAIRS_OF_A_KIND)]


def rare_words() -> list[Continuation]:
    """Rare words after their definitions (the head must still know them) and definitions after the words (the embedding)."""
    entries = [tuple(entry.strip().split(": ")) for entry in _RARE.split(";")]
    named = [(f"The English word for {meaning} is", f" {word}") for meaning, word in entries]
    return named + [(f'In a dictionary, "{word}" means', f" {meaning}") for meaning, word in entries]


def _couples(text: str) -> list[list[str]]:
    """``a as, b bs`` -> [[a, as], [b, bs]]."""
    return [couple.split(" ") for couple in text.split(", ")]
