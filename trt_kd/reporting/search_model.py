"""The part of ``report.json`` that tells how the sizes were chosen."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.reporting.record import Record


class MeasuredCandidate(Record):
    """A candidate that was made and measured before any training."""

    name: str
    """Its axes with their sizes."""
    sizes: dict[str, int]
    """Sizes that differ from the unpruned model's."""
    parameters: PositiveInt
    """Its parameters."""
    memory_bytes: PositiveInt
    """Weights and key-value cache as the budget counts them."""
    predicted_nats: float
    """Divergence that the sensitivity curves add up to, in nats per token."""
    divergence_nats: float
    """Measured forward KL from the unpruned model, in nats per token."""
    divergence_stderr_nats: float
    """Standard error of the measured divergence over blocks of text."""


class SensitivityPoint(Record):
    """One axis cut alone, refit included."""

    kind: str
    """Kind of the axis."""
    size: PositiveInt
    """Size of the axis after the cut, as the axis counts."""
    present: PositiveInt
    """Size of the axis before the cut."""
    kl_nats: float
    """Forward KL from the unpruned model after this cut, in nats per token."""

    @model_validator(mode="after")
    def _is_a_cut(self) -> Self:
        if self.size >= self.present:
            raise ValueError(f"size {self.size} is no cut of {self.present}")
        return self

    @property
    def share_cut(self) -> float:
        """Share of the units that went."""
        return 1.0 - self.size / self.present


class Compared(Record):
    """One candidate against another on the same blocks of text."""

    round: int | None = None
    """Round of training after which they were compared; null for untrained."""
    difference_nats: float
    """Divergence of the one less that of the other, in nats per token; negative: the one is
    closer to the unpruned model."""
    low_nats: float
    """Lower end of the 95 % t interval of the difference, paired by block."""
    high_nats: float
    """Upper end of that interval."""
    verdict: Literal["better", "same", "worse"]
    """Better if the whole interval is below zero, worse if above, else same."""


class TournamentRound(Record):
    """Where the contestants stood after a round of training."""

    divergence_nats: Annotated[dict[str, float], Field(min_length=1)]
    """Forward KL from the unpruned model after the round, by contestant, in nats per token."""
    leader_share: Annotated[float, Field(ge=0, le=1)]
    """How often the leader still leads when the blocks are drawn anew with replacement, 0 to 1."""
    rank_agreement: float | None
    """Kendall's tau of the order with the one before the round, -1 to 1."""


class TournamentRecord(Record):
    """Short distillation of the best candidates."""

    rounds: Annotated[list[TournamentRound], Field(min_length=1)]
    """Every round in order; contestants that are not in one were out before it."""
    tokens_of_the_winner: int | None = None
    """Training tokens that the winner read in all rounds."""
    first_choice: str | None = None
    """The candidate that the prediction ranked first."""
    against_first_choice: Compared | None = None
    """The winner against the first choice, after the last round that saw both."""


class Way(Record):
    """A lane, at a batch size where the limit left a choice."""

    lane: str
    """Name of the lane."""
    batch: int | None = None
    """Batch size; null where there was one only."""

    @property
    def where(self) -> str:
        """Both in words."""
        return self.lane if self.batch is None else f"{self.lane} at batch size {self.batch}"


class CornerRecord(Way):
    """One way to a limit on time, unpruned or pruned to fit."""

    name: str
    """``unpruned``, or the sizes."""
    fits: bool
    """Whether it keeps every limit."""
    costs: dict[str, float]
    """Milliseconds by the name of every limit; of the unpruned model measured, else predicted;
    empty where the lane cannot be pruned to the limit."""
    nats: float | None
    """Divergence that format and cut add up to, in nats per token; null without scores."""


class VerdictRecord(Way):
    """Which corner keeps the limits nearest to the unpruned model."""

    pruning_pays: bool
    """Whether that one is pruned."""
    name: str
    """``unpruned``, or its sizes."""
    words: str
    """The same in a sentence or two."""


class TimedCandidate(Record):
    """A candidate that was timed on the runtime, in turns with the unpruned model."""

    name: str
    """Its axes with their sizes."""
    predicted: dict[str, float]
    """Milliseconds by the name of every limit, from the latency table."""
    measured: dict[str, float]
    """The same, measured."""
    before: dict[str, float]
    """The unpruned model's in the same run."""
    limits: dict[str, float]
    """Milliseconds at most."""
    speedup: dict[str, float]
    """How many times less than the unpruned model it takes."""
    over_predicted: dict[str, float]
    """Measured over predicted, both as shares of the unpruned model."""
    verdict: str
    """``kept``, or why it was dropped."""


class TimeLimit(Record):
    """What a limit on time did to the choice."""

    lane: str
    """The lane that was searched in."""
    limit: dict[str, str | float | int | None]
    """The limit as it was asked for."""
    limits: dict[str, float]
    """Milliseconds at most by name, on the latency table's scale."""
    before: dict[str, float]
    """The unpruned model's, measured for the table."""
    prediction_errors: dict[str, float]
    """Median error of the table's predictions by metric, as a share."""
    corners: list[CornerRecord]
    """Every lane unpruned, then the best of every lane pruned."""
    verdict: VerdictRecord | None = None
    """Whether pruning pays; null in records that do not say."""
    tried: list[TimedCandidate]
    """Candidates that were timed, in order."""


class SizeSearch(Record):
    """How the sizes of several open axes were chosen."""

    candidates_legal: int | None = None
    """Combinations of legal sizes that fit the budget and make good use of it."""
    candidates_within_limits: int | None = None
    """Those within the search's limits that no other one equals or exceeds along every axis."""
    check_tokens: int | None = None
    """Tokens of training text that candidates were measured on; calibration and the tournament's
    training saw none of them, and none is of the held-out split."""
    measured: list[MeasuredCandidate] = []
    """Candidates that were made and measured, in the order of their predictions."""
    winner: str | None = None
    """The candidate that was kept."""
    measured_over_predicted: float | None = None
    """Median over candidates of measured over predicted divergence."""
    rank_agreement: float | None = None
    """Kendall's tau of the order by prediction with the order by measurement, -1 to 1."""
    best_against_first: Compared | None = None
    """The candidate that measured best untrained against the prediction's first choice."""
    sensitivity: list[SensitivityPoint] = []
    """Cuts of single axes that the predictions stand on."""
    tournament: TournamentRecord | None = None
    """Short distillation of the best candidates; null where none was held."""
    latency: TimeLimit | None = None
    """What a limit on time did to the choice; null where time was not limited."""
    missing: list[str] = []
    """What is left out of how the sizes were chosen and why, a sentence each."""
