"""How the sizes were chosen: the record that a search leaves in the pruned artifact, part by part.

What is absent or damaged is left out and named, so that older and newer records still make a page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from trt_kd.reporting.collect import Sources, pruned_of
from trt_kd.reporting.search_model import (
    Compared,
    MeasuredCandidate,
    SensitivityPoint,
    SizeSearch,
    TimeLimit,
    TournamentRecord,
    TournamentRound,
)

T = TypeVar("T")


def search_of(sources: Sources) -> SizeSearch | None:
    """How the sizes of the pruned model were chosen, or None where they were given."""
    cut = pruned_of(sources)
    recorded = cut.metrics.get("search") if cut is not None else None
    if recorded is None:
        return _only_timed(cut.metrics if cut is not None else {})
    if not isinstance(recorded, Mapping):
        return SizeSearch(missing=["The search is left out: its record is damaged."])
    missing: list[str] = []
    read = _Parts(recorded, missing).read
    measured = read("measured", list[MeasuredCandidate], "The measured candidates are") or []
    return SizeSearch(
        candidates_legal=read("candidates_legal", int, "The number of legal candidates is"),
        candidates_within_limits=read(
            "candidates_within_limits", int, "The number of candidates within the limits is"
        ),
        check_tokens=read("check_tokens", int, "The amount of text behind the measurements is"),
        measured=measured,
        winner=_winner(read("winner", str, "The winner is"), measured, missing),
        measured_over_predicted=read(
            "measured_over_predicted", float, "The ratio of measurement and prediction is"
        ),
        # The order of a single candidate agrees with nothing, which is no gap in the record.
        rank_agreement=None
        if len(measured) == 1
        else read("rank_agreement", float, "The agreement of the predicted order is"),
        best_against_first=read(
            "best_against_first", Compared, "The untrained comparison with the first choice is"
        ),
        sensitivity=read("sensitivity", list[SensitivityPoint], "The sensitivity curves are") or [],
        tournament=_tournament(recorded.get("tournament"), missing),
        latency=_latency(recorded, missing),
        missing=missing,
    )


def _only_timed(metrics: Mapping[str, Any]) -> SizeSearch | None:
    """How the one open axis came to its size under a limit on time, or None."""
    missing: list[str] = []
    latency = _latency(metrics, missing)
    return SizeSearch(latency=latency, missing=missing) if latency or missing else None


def _latency(recorded: Mapping[str, Any], missing: list[str]) -> TimeLimit | None:
    if recorded.get("latency") is None:
        return None
    return _Parts(recorded, missing).read("latency", TimeLimit, "The limit on time is")


def _winner(
    name: str | None, measured: Sequence[MeasuredCandidate], missing: list[str]
) -> str | None:
    if name is None or not measured or name in {one.name for one in measured}:
        return name
    missing.append("The winner is left out: it is none of the measured candidates.")
    return None


def _tournament(recorded: Any, missing: list[str]) -> TournamentRecord | None:
    if recorded is None:
        return None
    if not isinstance(recorded, Mapping):
        missing.append("The tournament is left out: its record is damaged.")
        return None
    read = _Parts(recorded, missing, "tournament.").read
    rounds = read("rounds", list[TournamentRound], "The tournament is")
    if rounds is None:
        return None
    if not rounds:
        missing.append("The tournament is left out: it has no round.")
        return None
    return TournamentRecord(
        rounds=rounds,
        tokens_of_the_winner=read("tokens_of_the_winner", int, "The winner's training is"),
        first_choice=read("first_choice", str, "The prediction's first choice is"),
        against_first_choice=read(
            "against_first_choice", Compared, "The comparison with the first choice is"
        ),
    )


@dataclass(frozen=True)
class _Parts:
    """Reads the parts of a record and notes what cannot be read."""

    record: Mapping[str, Any]
    missing: list[str]
    prefix: str = ""
    """What stands before the names of the parts."""

    def read(self, name: str, kind: type[T], what: str) -> T | None:
        """The part ``name`` as a ``kind``; else None, and a sentence that begins with ``what``."""
        value, place = self.record.get(name), self.prefix + name
        if value is None:
            self.missing.append(f"{what} left out: {place} was not recorded.")
            return None
        try:
            # As JSON, since a strict reading of Python objects refuses mappings for records.
            text = json.dumps(value, allow_nan=False)
            return TypeAdapter(kind).validate_json(text, strict=True)
        except ValueError as error:  # no ``kind``, or a number that JSON cannot hold
            inner = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
            where = ".".join([place, *map(str, inner)])
            self.missing.append(f"{what} left out: {where} is damaged.")
            return None
