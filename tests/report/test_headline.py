"""Who is called best: by quality under the same bytes, by bytes under the same error, and peers when they are."""

from __future__ import annotations

from tensornet_compress.report import Result, Row
from tensornet_compress.report.page.charts import staircase
from tensornet_compress.report.page.groups import Group, duels, groups
from tensornet_compress.report.page.headline import featured, stories
from tests.report.synthetic import everything, result, row


def only(made: Result) -> Group:
    (group,) = groups(made)
    return group


def told(made: Result) -> str:
    return " ".join(sentence for story in stories(groups(made)) for sentence in story.sentences)


def test_a_peer_of_more_bytes_does_not_count_and_one_of_fewer_does() -> None:
    made = result(row("ours", 2000, 0.3, True), row("big peer", 3000, 0.1), row("small peer", 1000, 0.2))
    assert [(d.limit, d.winner, d.peer.method) for d in duels(only(made))] == [
        (2000, "peer", "small peer"),
        (3000, "peer", "big peer"),
    ]
    assert "ours wins at 0 of 2 sizes, a peer at 2, neither at 0" in told(made)


def test_ours_wins_where_it_is_better_and_even_is_even() -> None:
    made = result(row("ours", 2000, 0.1, True), row("ours", 4000, 0.0502, True), row("p", 2000, 0.2), row("p", 4000, 0.05))
    assert [d.winner for d in duels(only(made))] == ["ours", "even"]
    assert "ours wins at 1 of 2 sizes, a peer at 0, neither at 1" in told(made)


def test_sizes_within_one_percent_are_one_limit() -> None:
    made = result(row("ours", 2000, 0.1, True), row("p", 2010, 0.2))
    assert [(d.limit, d.winner) for d in duels(only(made))] == [(2010, "ours")]


def test_search_compares_bytes_at_equal_error() -> None:
    base = {"task": "search", "subject": "t", "budget": 0.1, "budget_unit": "relative error"}
    rows = [
        Row.model_validate(base | {"method": "search", "ours": True, "values": {"nbytes": 200, "error": 0.09}}),
        Row.model_validate(base | {"method": "svd", "values": {"nbytes": 100, "error": 0.1}}),
        Row.model_validate(base | {"method": "tt", "values": {"nbytes": 300, "error": 0.01}}),
    ]
    (duel,) = duels(only(result(*rows)))
    assert (duel.winner, duel.peer.method, duel.factor) == ("peer", "svd", 0.5)
    assert "svd reaches 100 bytes against 200 bytes of ours" in told(result(*rows))


def test_without_peers_nobody_is_called_best() -> None:
    assert "does not say whether another method" in told(result(row("ours", 2000, 0.1, True)))
    assert "Nothing of ours" in told(result(row("peer", 2000, 0.1)))


def test_the_original_is_no_peer_and_gives_the_size_before() -> None:
    group = groups(everything())[0]
    assert group.original is not None
    assert group.original.method == "original"
    assert "original" not in {row.method for row in group.peers}
    text = told(everything())
    assert "becomes 8.00 times smaller with auto (ours): 4.00 kB instead of 32.0 kB" in text
    assert "perplexity 16 (before: 15)" in text


def test_the_headline_takes_the_smallest_of_ours_with_a_small_loss() -> None:
    made = result(row("a", 1000, 0.5, True), row("a", 2000, 0.09, True), row("a", 3000, 0.01, True))
    chosen = featured(only(made))
    assert chosen is not None
    assert chosen.values["nbytes"] == 2000


def test_the_staircase_keeps_what_nothing_smaller_matches() -> None:
    points = [(1, 5), (2, 6), (3, 4), (3, 2), (4, 2), (5, 1)]
    assert staircase(points, higher=False) == [(1, 5), (3, 2), (5, 1)]
    assert staircase(points, higher=True) == [(1, 5), (2, 6)]


def test_divergences_below_what_the_original_shows_against_itself_are_even() -> None:
    dense = row("dense", 32000, 8e-7).model_copy(update={"budget": None})
    (duel,) = duels(only(result(dense, row("ours", 2000, 1e-8, True), row("p", 2000, 6e-7))))
    assert (duel.winner, duel.factor) == ("even", 1.0)
    (duel,) = duels(only(result(dense, row("ours", 2000, 1e-8, True), row("p", 2000, 8e-6))))
    assert (duel.winner, round(duel.factor), duel.lossless) == ("ours", 10, True)
    (duel,) = duels(only(result(dense, row("ours", 2000, 9e-7, True), row("p", 2000, 8e-6))))
    assert (duel.winner, duel.lossless) == ("ours", False)
