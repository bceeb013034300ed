"""Let the teacher write text for the student: sequence-level distillation.

Source: Kim and Rush 2016 (arXiv:1606.07947). Training on what the teacher writes is plain
cross-entropy on its own choice; with a teacher beside it, distillation on the teacher's own text.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.artifacts import Artifact, claim_work, piece, work_directory, work_key, writing
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig
from trt_kd.data.base import DataConfig, documents
from trt_kd.data.generated import TEXTS
from trt_kd.data.lazy import pick
from trt_kd.errors import ConfigError, DataError, ModelError
from trt_kd.evaluation.vocabulary import context_tokens
from trt_kd.measuring.progress import progress
from trt_kd.optional import require
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.teachers.traces import FAULTS, Trace, Traces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trt_kd.teachers.writer import Written


SHOWN = ("prompt", "text", "finished", "thought", "answer", "gain_nats")
"""What a line of the artifact holds, where it is known."""


class GenerateConfig(StageConfig):
    """What the teacher starts from, how much it writes, and how it chooses."""

    stage: ClassVar[str] = "generate"

    data: DataConfig = DataConfig()
    """Where prompts come from: documents of the training split, each once."""
    texts: PositiveInt = 256
    """Texts to write."""
    prompt_tokens: PositiveInt = 32
    """A document gives its first tokens, so many, to be continued. With ``chat`` it is a message,
    and longer ones are left out."""
    chat: bool = False
    """Ask the document as a user's message in the model's chat template; the text that is written
    down is the whole dialogue."""
    new_tokens: PositiveInt = 224
    """Tokens that the teacher may add; where it ends earlier, the text does."""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token each time; 1 samples from the teacher as it is."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold so much probability."""
    traces: Traces | None = None
    """Keep only texts that think and then answer, as these say; all of them if left out."""
    batch_size: PositiveInt = 8
    """Texts at a time; a kill costs one batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Choice of the documents, and of the tokens."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.traces and self.traces.most_tokens >= self.new_tokens:
            raise ValueError(
                f"traces.most_tokens {self.traces.most_tokens} has no effect: it must be below "
                f"new_tokens {self.new_tokens}"
            )
        if self.traces and self.traces.answer_field is not None:
            if not self.data.source.holds_fields:
                raise ValueError(
                    f"traces.answer_field: {self.data.source.kind} text has no fields: write "
                    "data.source: {kind: jsonl, files: [FILE]}"
                )
            if not self.chat:
                raise ValueError(
                    "traces.answer_field: the beginning of a document is another question than "
                    "the whole: write chat: true"
                )
        if self.top_p < 1 and not self.temperature:
            raise ValueError("top_p has no effect: temperature is 0")
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text that prompts come from."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Two short texts."""
        short = {"texts": 2, "new_tokens": min(self.new_tokens, 4), "traces": None}
        return self.model_copy(update=short)


def generate(config: GenerateConfig, *, teacher: Artifact, out: Path) -> Artifact:
    """Write texts of ``teacher`` as JSON lines to ``out``; batches of a cut-off run are taken up.

    Each line has the ``prompt``, the whole ``text`` and whether the teacher ended it, ``finished``;
    with ``traces`` also ``thought``, ``answer`` and, where it is asked for, ``gain_nats``.

    Raises:
        ConfigError: if prompt and new tokens are more than the teacher's context.
        DataError: if too few documents are long, or with ``chat`` short, enough; if none has the
            known answer that is asked for.
        ModelError: if the teacher has no chat template.
    """
    require("torch", extra="compress")
    _check_context(config, teacher.path)
    tokenizer = load_tokenizer(teacher.path)
    prompts = _prompts(config, tokenizer)
    inputs = {"teacher": teacher}
    with writing(out, kind="text", config=config, inputs=inputs) as draft:
        work = claim_work(work_directory(out), work_key(config, {"teacher": teacher.key}))
        rows = list(_rows(_Writer(config, teacher.path, tokenizer), prompts, work))
        kept = _kept(rows)
        with (draft.path / TEXTS).open("w", encoding="utf-8") as file:
            for row in kept:
                shown = {name: row[name] for name in SHOWN if name in row}
                file.write(json.dumps(shown, ensure_ascii=False) + "\n")
        draft.metrics |= {
            "texts": len(kept),
            "new_tokens": sum(row["new_tokens"] for row in kept),
            "finished_share": sum(row["finished"] for row in kept) / len(kept),
        }
        if config.traces is not None:
            draft.metrics |= {f"left_out_{fault}": _count(rows, fault) for fault in FAULTS}
        if config.traces is not None and config.traces.answer_field is not None:
            draft.metrics["known_answers"] = sum(row.get("known", False) for row in kept)
    return Artifact.open(out, expect="text")


def _kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without a fault.

    Raises:
        DataError: if there is none.
    """
    kept = [row for row in rows if not row.get("fault")]
    if not kept:
        counts = ", ".join(f"{_count(rows, fault)} {fault}" for fault in FAULTS)
        raise DataError(
            f"none of {len(rows)} texts is kept: {counts}",
            hint="change traces, raise new_tokens, or ask a teacher that thinks in this form",
        )
    return kept


def _count(rows: list[dict[str, Any]], fault: str) -> int:
    return sum(row.get("fault") == fault for row in rows)


def _check_context(config: GenerateConfig, directory: Path) -> None:
    limit = context_tokens(directory)
    if config.prompt_tokens + config.new_tokens > limit:
        raise ConfigError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} are more "
            f"than the teacher's context of {limit}",
            hint="lower one of them",
        )


class _Prompt(NamedTuple):
    """Token ids, and the answer where it is known."""

    ids: list[int]
    known: str | None


def _prompts(config: GenerateConfig, tokenizer: "PreTrainedTokenizerBase") -> list[_Prompt]:
    """The prompts, in an order that the seed decides."""
    texts = documents(config.data, "train")
    order = list(range(len(texts)))
    random.Random(config.seed).shuffle(order)
    field = config.traces.answer_field if config.traces else None
    known = {} if field is None else config.data.source.beside(field)
    found: list[_Prompt] = []
    for text in pick(texts, order):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if config.chat and len(ids) <= config.prompt_tokens:
            found.append(_Prompt(_as_message(text, tokenizer), known.get(text)))
        elif not config.chat and len(ids) >= config.prompt_tokens:
            found.append(_Prompt(ids[: config.prompt_tokens], None))
        if len(found) == config.texts:
            return found
    bound = "at most" if config.chat else "at least"
    raise DataError(
        f"data source {config.data.source.kind} has {len(found)} documents of {bound} "
        f"{config.prompt_tokens} tokens for {config.texts} texts",
        hint="lower texts, change prompt_tokens or give more text",
    )


def _as_message(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if not tokenizer.chat_template:
        raise ModelError(
            "the teacher's tokenizer has no chat template", hint="set chat=false, or add one"
        )
    message = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Writer:
    """Writes batches of texts; the model is loaded when the first one is asked for."""

    config: GenerateConfig
    directory: Path
    tokenizer: "PreTrainedTokenizerBase"

    @cached_property
    def _model(self) -> "PreTrainedModel":
        return OnlineTeacher().load(self.directory, precision=self.config.precision)

    def batch(self, number: int, prompts: list[_Prompt], _folder: Path) -> dict[str, Any]:
        """Rows of the batch with that number."""
        from trt_kd.teachers.writer import Choice, continuations

        config = self.config
        choice = Choice(config.new_tokens, config.temperature, config.top_p, config.precision)
        seed = random.Random(f"{config.seed} {number}").getrandbits(32)
        ids = [prompt.ids for prompt in prompts]
        found = continuations(self._model, self.tokenizer, ids, choice, seed=seed)
        return {
            "rows": [
                self._row(prompt.ids, written) | self._traced(prompt, written)
                for prompt, written in zip(prompts, found, strict=True)
            ]
        }

    def _traced(self, prompt: _Prompt, written: "Written") -> dict[str, Any]:
        """The parts of a text that thinks, and its fault, None where it is kept."""
        if (wanted := self.config.traces) is None:
            return {}
        text: Any = self.tokenizer.decode(self._without_end(written), skip_special_tokens=False)
        trace = wanted.split(text)
        if not written.finished or trace is None:
            return {"fault": "undelimited" if written.finished else "unfinished"}
        parts: dict[str, Any] = {"thought": trace.thought, "answer": trace.answer}
        if len(self._ids(trace.thought)) > wanted.most_tokens:
            return {"fault": "too_long"}
        if prompt.known is not None:
            if not wanted.agrees(trace.answer, prompt.known):
                return {"fault": "wrong"}
            parts["known"] = True
        if wanted.least_gain_nats is not None:
            parts["gain_nats"] = self._gain_nats(prompt.ids, trace, wanted)
            if parts["gain_nats"] < wanted.least_gain_nats:
                return {"fault": "unsupported"}
        return parts

    def _gain_nats(self, prompt: list[int], trace: Trace, wanted: Traces) -> float:
        """How much likelier the answer is behind the trace than behind an empty one, per token."""
        from trt_kd.teachers.writer import answer_nats

        begin, answer = wanted.open if trace.opened else "", self._ids(trace.answer)
        nats = [
            answer_nats(
                self._model,
                prompt + self._ids(f"{begin}{thought}{wanted.close}"),
                answer,
                self.config.precision,
            )
            for thought in (trace.thought, "")
        ]
        return nats[0] - nats[1]

    def _ids(self, text: str) -> list[int]:
        found: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return found["input_ids"]  # type: ignore[no-any-return]

    def _without_end(self, written: "Written") -> list[int]:
        end = self.tokenizer.eos_token_id  # the packing of documents puts its own
        return written.ids[:-1] if written.ids[-1:] == [end] else written.ids

    def _row(self, prompt: list[int], written: "Written") -> dict[str, Any]:
        ids = self._without_end(written)
        skip = not self.config.chat and self.config.traces is None
        return {
            "prompt": self.tokenizer.decode(prompt, skip_special_tokens=skip),
            "text": self.tokenizer.decode(prompt + ids, skip_special_tokens=skip),
            "finished": written.finished,
            "new_tokens": len(written.ids),
        }


def _rows(writer: _Writer, prompts: list[_Prompt], work: Path) -> Iterator[dict[str, Any]]:
    """One row per prompt, batch by batch, from disk where a batch was made before."""
    size = writer.config.batch_size
    starts = range(0, len(prompts), size)
    for number, start in enumerate(progress(starts, "writing texts")):
        make = partial(writer.batch, number, prompts[start : start + size])
        yield from piece(work / f"batch-{number:05d}", make)["rows"]
