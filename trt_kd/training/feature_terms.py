"""Feature losses while a run trains: projectors, memories, sums, and their part of a checkpoint.

Shape suffixes: B sequences, L positions, K positions that predict, T valid tokens, M remembered
rows, D width.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typing_extensions import Self

from trt_kd.losses.features.base import Reading
from trt_kd.losses.features.maths import widened
from trt_kd.losses.features.normalising import normalised
from trt_kd.training.checkpointing import PREFIX
from trt_kd.training.escalation import Escalation
from trt_kd.training.features import Feature
from trt_kd.training.history import MEASURED
from trt_kd.training.pairing import Pair
from trt_kd.training.reading import Seen, reading
from trt_kd.training.schedule import Schedule
from trt_kd.training.weights import weight_at

if TYPE_CHECKING:
    from trt_kd.teachers.base import Targets

logger = logging.getLogger(__name__)

FILE = "features.safetensors"
"""Projectors and memories in a training checkpoint."""


class Part(NamedTuple):
    """One term of a micro-batch."""

    weight: float
    """Its factor at this step."""
    value: Tensor
    """Its sum over valid tokens, ``[]``."""


@dataclass(frozen=True)
class Both:
    """What the layers of student and teacher said in one forward pass."""

    student: Seen
    teacher: Seen


class Term(nn.Module):
    """One loss on one pair of layers."""

    memory: Tensor | None

    def __init__(self, feature: Feature, pair: Pair, widths: tuple[int, int]) -> None:
        super().__init__()
        self.feature = feature
        self.pair = pair
        self.name = feature.name(pair)
        student, teacher = widths
        mapped = (teacher, student) if feature.projector.on_teacher else (student, teacher)
        self.projector = feature.projector.build(*mapped)
        compared = student if feature.projector.on_teacher else teacher
        remembers = feature.loss.memory_rows > 0
        self.register_buffer("memory", torch.zeros(0, compared) if remembers else None)
        self._latest: list[Tensor] = []

    @property
    def waits(self) -> bool:
        """Whether it has nothing to compare with yet."""
        return self.memory is not None and not len(self.memory)

    def forward(self, both: Both, mask_BK: Tensor) -> Tensor:
        """Sum of the loss over valid tokens, and over all that is read of the layers."""
        student_layer, teacher_layer = self.pair
        length = mask_BK.shape[1]
        total = torch.zeros((), device=mask_BK.device)
        for what in self.feature.loss.reads:
            student_BKD = widened(both.student[student_layer, what][:, :length])
            teacher_BKD = widened(both.teacher[teacher_layer, what][:, :length])
            student_BKD, teacher_BKD = self._projected(student_BKD, teacher_BKD)
            student_BKD, teacher_BKD = normalised(
                self.feature.normalise, student_BKD, teacher_BKD, mask_BK
            )
            total = total + self.feature.loss(student_BKD, teacher_BKD, mask_BK, self.memory)
            if self.memory is not None:
                self._latest.append(teacher_BKD[mask_BK].detach())
        return total

    def remember(self) -> None:
        """Take what the step's forward passes saw into the memory, the oldest rows going first.

        Once for each step: its micro-batches are compared with the same memory.
        """
        if self.memory is not None and self._latest:
            rows_MD = torch.cat([self.memory, *self._latest])
            self.memory = rows_MD[-self.feature.loss.memory_rows :].clone()
            self._latest = []

    def _projected(self, student_BKD: Tensor, teacher_BKD: Tensor) -> tuple[Tensor, Tensor]:
        if self.projector is None:
            return student_BKD, teacher_BKD
        if self.feature.projector.on_teacher:
            return student_BKD, self.projector(teacher_BKD)
        return self.projector(student_BKD), teacher_BKD


class FeatureTerms(nn.Module):
    """Every term of a run, with the parameters that are trained beside the student's."""

    def __init__(
        self, features: Sequence[Feature], widths: tuple[int, int], *, steps: int, seed: int
    ) -> None:
        """Build the terms; their pairs stand in ``features``.

        Args:
            features: entries of the recipe, pairs written out.
            widths: hidden sizes of student and teacher.
            steps: of the run, for the schedules of the weights.
            seed: of the projectors; the generators of the run are left as they are.
        """
        super().__init__()
        self.steps = steps
        self.joined = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.terms = nn.ModuleList(
                Term(feature, pair, widths) for feature in features for pair in _pairs(feature)
            )

    def at(self, step: int) -> list[Term]:
        """Terms of the objective at ``step``, counted from 0."""
        terms: list[Any] = list(self.terms) if self.joined else []
        return [term for term in terms if term.feature.runs_at(step)]

    def alone(self, step: int) -> bool:
        """Whether nothing but features is learnt at ``step``."""
        return any(term.feature.alone for term in self.at(step))

    @contextmanager
    def reading(
        self, student: PreTrainedModel, teacher: PreTrainedModel, step: int
    ) -> Iterator[Both]:
        """Read what the terms of ``step`` compare from the models' next forward passes."""
        wanted: list[set[tuple[int, Reading]]] = [set(), set()]
        for term in self.at(step):
            for side, layer in zip(wanted, term.pair, strict=True):
                side.update((layer, what) for what in term.feature.loss.reads)
        with reading(student, sorted(wanted[0])) as one, reading(teacher, sorted(wanted[1])) as two:
            yield Both(one, two)

    def parts(self, both: Both, mask_BK: Tensor, step: int) -> dict[str, Part]:
        """Every term's sum over valid tokens with its weight, by its name in the log."""
        found = {}
        with torch.autocast(mask_BK.device.type, enabled=False):
            for term in self.at(step):
                waits = term.waits
                value = term(both, mask_BK)
                if not waits:
                    found[term.name] = Part(weight_at(term.feature.weight, step, self.steps), value)
        return found

    def lowest(self, step: int) -> int | None:
        """The student's layer whose input all terms of ``step`` depend on, as late as can be.

        One more than the last layer where its output is all that they read; None without terms.
        """
        reads = [(term.pair[0], what) for term in self.at(step) for what in term.feature.loss.reads]
        return min((layer + (what == "states") for layer, what in reads), default=None)

    def remember(self) -> None:
        """Let every term that has a memory take the step into it."""
        terms: list[Any] = list(self.terms)
        for term in terms:
            term.remember()

    def save(self, folder: Path) -> None:
        """Write projectors and memories into a checkpoint."""
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / FILE)

    def resumed(self, folder: Path | None) -> Self:
        """Take up what a checkpoint holds, if there is one."""
        if folder is None:
            return self
        state = load_file(folder / FILE)
        for name, memory in state.items():
            if name.endswith(".memory"):  # its rows grow while it fills
                term: Any = self.get_submodule(name.removesuffix(".memory"))
                term.memory = torch.zeros_like(memory, device=term.memory.device)
        self.load_state_dict(state)
        return self


def terms_of(
    schedule: Schedule, student: PreTrainedModel, teacher: "Targets | None"
) -> FeatureTerms | None:
    """The terms that ``schedule`` asks for, or None.

    Raises:
        ValueError: if it asks for some and no teacher runs.
    """
    if not schedule.features:
        return None
    if not isinstance(teacher, nn.Module):
        raise ValueError("features need a teacher that runs beside the student")
    widths = student.config.hidden_size, teacher.config.hidden_size
    return FeatureTerms(schedule.features, widths, steps=schedule.steps, seed=schedule.seed)


class KeepFeatures(TrainerCallback):
    """Carries the state of the terms from step to step and into checkpoints."""

    def __init__(self, terms: FeatureTerms, checkpoints: Path) -> None:
        self.terms = terms
        self.checkpoints = checkpoints

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the step into the memories; the trainer clears the student's gradients only."""
        self.terms.remember()
        self.terms.zero_grad()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write beside the student's weights; called before the checkpoint is marked complete."""
        self.terms.save(self.checkpoints / f"{PREFIX}{state.global_step}")


class Escalate(TrainerCallback):
    """Keeps the terms out until a measurement has decided; a resumed run finds that in its log."""

    def __init__(self, terms: FeatureTerms, config: Escalation) -> None:
        self.terms = terms
        self.config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin without the terms, or as the log says."""
        self.terms.joined = False
        for entry in state.log_history:
            self._see(entry)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide at the measurement of that step."""
        self._see(state.log_history[-1])

    def _see(self, entry: dict[str, Any]) -> None:
        if MEASURED not in entry or entry["step"] != self.config.after_steps:
            return
        gap, limit = entry["heldout_kl_nats_per_token"], self.config.gap_nats
        self.terms.joined = gap > limit
        logger.info(
            "step %d: %.4f nats from the teacher, %.4f may remain: %s",
            entry["step"],
            gap,
            limit,
            "features join" if self.terms.joined else "no features",
        )


def _pairs(feature: Feature) -> list[Pair]:
    if not isinstance(feature.pairs, list):
        raise ValueError(f"pairs by the rule {feature.pairs} are not written out yet")
    return feature.pairs
