"""How the sizes were chosen, in tables and the sentences that read them.

Every number of a sentence stands in a table too, written the same way.
"""

import math
from collections.abc import Sequence

from trt_kd.reporting.formatting import MISSING, bytes_text, fixed, signed, significant, times
from trt_kd.reporting.search_model import Compared, MeasuredCandidate, SizeSearch
from trt_kd.reporting.tables import Cell, Row, Table

UNPRUNED = "unpruned"
AGREEMENT = ((1.0, "the same"), (0.5, "much alike"), (-0.5, "hardly related"), (-1.0, "opposed"))
"""Words for two orders, from this Kendall's tau on."""


def by_measurement(search: SizeSearch) -> list[MeasuredCandidate]:
    """Measured candidates, the one closest to the unpruned model first."""
    return sorted(search.measured, key=lambda one: one.divergence_nats)


def first_choice(search: SizeSearch) -> str | None:
    """The candidate that the prediction ranked first, where that is known."""
    if search.tournament is not None and search.tournament.first_choice is not None:
        return search.tournament.first_choice
    return search.measured[0].name if search.measured else None


def paragraphs(search: SizeSearch) -> list[str]:
    """Whether pruning pays, what was searched and what won, the trained comparison."""
    parts = [_counts(search), _winner(search), _predictions(search)]
    found = [_pays(search), " ".join(part for part in parts if part), _against_first(search)]
    return [text for text in found if text]


def _pays(search: SizeSearch) -> str:
    """The verdict of the corners; their numbers stand in a table of their own."""
    limit = search.latency
    if limit is None or limit.verdict is None:
        return ""
    verdict = limit.verdict
    if not verdict.pruning_pays:
        return (
            f"Pruning does not pay: the format alone keeps the limit in the lane {verdict.where}, "
            "and nothing that is pruned strays less."
        )
    fitting = [one.where for one in limit.corners if one.fits and one.name == UNPRUNED]
    why = "no lane keeps the limit unpruned"
    if fitting:
        why = f"unpruned, the limit is kept by {' and '.join(fitting)}, which strays further"
    return f"Pruning pays: {why}. The sizes were searched in the lane {verdict.where}."


def _counts(search: SizeSearch) -> str:
    legal, within = search.candidates_legal, search.candidates_within_limits
    parts = []
    if legal is not None:
        what = _plural(legal, "combination of legal sizes fits", "combinations of legal sizes fit")
        parts.append(f"{legal:,} {what} the budget")
    if within is not None:
        parts.append(f"{within:,} {_plural(within, 'is', 'are')} within the search's limits")
    if count := len(search.measured):
        parts.append(f"{count:,} {_plural(count, 'was', 'were')} made and measured")
    if len(parts) < 2:
        return "".join(f"{part}." for part in parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}."


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _winner(search: SizeSearch) -> str:
    if search.winner is None:
        return ""
    if search.tournament is not None:
        return f"{search.winner} was kept: it came first in the tournament."
    if search.measured and search.winner == by_measurement(search)[0].name:
        return f"{search.winner} was kept: it measured closest to the unpruned model."
    return f"{search.winner} was kept."


def _predictions(search: SizeSearch) -> str:
    parts = []
    if search.measured_over_predicted is not None:
        ratio = _ratio(search.measured_over_predicted)
        parts.append(f"The measured divergence is {ratio} the predicted one (median).")
    if search.rank_agreement is not None:
        tau = search.rank_agreement
        words = next(said for least, said in AGREEMENT if tau >= least)
        parts.append(
            f"The order by prediction and that by measurement are {words} (Kendall's tau "
            f"{_tau(tau)})."
        )
    return " ".join(parts)


def _against_first(search: SizeSearch) -> str:
    """The tournament's winner against the prediction's first choice."""
    held, first = search.tournament, first_choice(search)
    if held is None or search.winner is None:
        return ""
    if search.winner == first:
        return "The winner is the prediction's first choice itself."
    found = held.against_first_choice
    if found is None:
        return ""
    whom = "After the same training the winner and the prediction's first choice are the same"
    if found.verdict == "same":
        return f"{whom}: difference {difference(found)} nats, 95 % interval {interval(found)}."
    sign = -1 if found.verdict == "better" else 1
    ends = sorted((sign * found.low_nats, sign * found.high_nats))
    digits = _digits(found)
    return (
        f"After the same training the winner is {found.verdict} than the prediction's first choice "
        f"by {fixed(sign * found.difference_nats, digits)} nats per token "
        f"(95 % interval {fixed(ends[0], digits)} to {fixed(ends[1], digits)})."
    )


def facts(search: SizeSearch) -> Table:
    """The search in numbers."""
    held = search.tournament
    rows = [
        ("combinations of legal sizes within the budget", _count(search.candidates_legal),
         "and not far below it"),
        ("within the search's limits", _count(search.candidates_within_limits),
         "and no other one at least as large along every axis"),
        ("made and measured", f"{len(search.measured):,}" if search.measured else "",
         "the best predictions"),
        ("tokens of the measurement", _count(search.check_tokens), "training text"),
        ("measured over predicted divergence",
         "" if search.measured_over_predicted is None else _ratio(search.measured_over_predicted),
         "median over candidates"),
        ("Kendall's tau", "" if search.rank_agreement is None else _tau(search.rank_agreement),
         "order by prediction with order by measurement"),
        ("training tokens of the winner", _count(held.tokens_of_the_winner) if held else "",
         "all rounds of the tournament"),
    ]  # fmt: skip
    return Table(
        "Search",
        ["Number"],
        [Row(name, [Cell(value)], detail=detail) for name, value, detail in rows if value],
    )


def measured(search: SizeSearch) -> Table:
    """Every measured candidate, the closest to the unpruned model first."""
    sizes = list(dict.fromkeys(name for one in search.measured for name in one.sizes))
    rows = [
        Row(
            one.name,
            [
                Cell(str(place)),
                *(Cell(f"{one.sizes[name]:,}" if name in one.sizes else "as before")
                  for name in sizes),
                Cell(significant(one.parameters / 1e6, 4)),
                Cell(bytes_text(one.memory_bytes)),
                Cell(significant(one.predicted_nats)),
                Cell(significant(one.divergence_nats), significant(one.divergence_stderr_nats, 2)),
            ],
            detail=_standing(search, one.name),
        )
        for place, one in enumerate(by_measurement(search), start=1)
    ]  # fmt: skip
    columns = ["Place", *sizes, "Parameters (M)", "Memory", "Predicted (nats)", "Measured (nats)"]
    return Table("Candidate", columns, rows, _measured_caption(search))


def _measured_caption(search: SizeSearch) -> str:
    if not search.measured:
        return ""
    return (
        "Divergence: forward KL from the unpruned model per token, on training text that neither "
        "calibration nor training saw, never on the held-out split; ± standard error over blocks, "
        "before any training. Memory: weights and key-value cache as the budget counts them."
    )


def _standing(search: SizeSearch, name: str) -> str:
    said = [
        (name == search.winner, "winner"),
        (name == first_choice(search), "first choice of the prediction"),
    ]
    return ", ".join(words for holds, words in said if holds)


def comparisons(search: SizeSearch) -> Table:
    """The best against the prediction's first choice, before and after the tournament."""
    held = search.tournament
    closest = by_measurement(search)[0].name if search.measured else search.winner
    pairs = [
        ("best measured", closest, search.best_against_first),
        ("winner", search.winner, held.against_first_choice if held else None),
    ]
    rows = [
        Row(
            name,
            _compared_cells(one, itself=best == first_choice(search)),
            detail="untrained" if one.round is None else f"after round {one.round}",
        )
        for name, best, one in pairs
        if one is not None
    ]
    return Table(
        "Candidate",
        ["Difference (nats)", "95 % interval", "Verdict"],
        rows,
        "Divergence less that of the prediction's first choice, paired by block; below zero: "
        "closer to the unpruned model than the first choice.",
    )


def _compared_cells(one: Compared, *, itself: bool) -> list[Cell]:
    if itself:
        return [Cell(), Cell(), Cell("the first choice itself")]
    return [Cell(difference(one)), Cell(interval(one)), Cell(one.verdict)]


def tournament(search: SizeSearch) -> Table:
    """A row per contestant, a column per round; below them how sure every round's order is."""
    held = search.tournament
    if held is None:
        return Table("Contestant", [], [])
    untrained = {one.name: one.divergence_nats for one in search.measured}
    columns = ["Untrained", *(f"Round {number}" for number in range(1, len(held.rounds) + 1))]
    rows = []
    for name in _contestants(search):
        found = [untrained.get(name), *(entry.divergence_nats.get(name) for entry in held.rounds)]
        cells = [Cell("" if nats is None else significant(nats)) for nats in found]
        rows.append(Row(name, cells, detail=_standing(search, name)))
    shares = [f"{fixed(100 * entry.leader_share, 0)} %" for entry in held.rounds]
    taus = [MISSING if e.rank_agreement is None else _tau(e.rank_agreement) for e in held.rounds]
    rows.append(Row("leader leads", [Cell(""), *map(Cell, shares)], detail="blocks drawn anew"))
    rows.append(Row("Kendall's tau", [Cell(""), *map(Cell, taus)], detail="with the order before"))
    caption = (
        "Divergence in nats per token after each round, on the same text as above; blank where a "
        "contestant was out."
    )
    return Table("Contestant", columns, rows, caption)


def _contestants(search: SizeSearch) -> Sequence[str]:
    """Every contestant, those that stayed longest first."""
    rounds = search.tournament.rounds if search.tournament else []
    last = {name: (number, nats) for number, entry in enumerate(rounds)
            for name, nats in entry.divergence_nats.items()}  # fmt: skip
    return sorted(last, key=lambda name: (-last[name][0], last[name][1]))


def difference(one: Compared) -> str:
    """The difference with its sign, to the digits that its interval supports."""
    return signed(one.difference_nats, _digits(one))


def interval(one: Compared) -> str:
    """Both ends of its interval."""
    return f"{signed(one.low_nats, _digits(one))} to {signed(one.high_nats, _digits(one))}"


def _digits(one: Compared) -> int:
    """Decimals that show two digits of the interval's width."""
    width = one.high_nats - one.low_nats or abs(one.difference_nats)
    return min(9, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _ratio(value: float) -> str:
    return times(value, 2)


def _tau(value: float) -> str:
    return fixed(value, 2)
