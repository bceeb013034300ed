"""Measure a student as the draft of its teacher on what the teacher writes."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel
from trt_kd.data.base import DataConfig, token_blocks
from trt_kd.errors import ConfigError
from trt_kd.evaluation.vocabulary import context_tokens
from trt_kd.measuring.progress import progress
from trt_kd.stages.matching import check_pair

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.evaluation.drafting import Drafted

Way = Literal["greedy", "sampled"]


class DraftConfig(StrictModel):
    """What the teacher writes, for the student to be compared on."""

    data: DataConfig = DataConfig()
    """Prompts are the beginnings of its held-out blocks."""
    prompts: Annotated[int, Field(ge=2)] = 16
    """Texts to measure on."""
    prompt_tokens: PositiveInt = 64
    """Of each prompt; at most ``data.block_tokens``."""
    new_tokens: PositiveInt = 64
    """Tokens that the teacher writes, fewer where it ends the text."""
    temperature: PositiveFloat = 1.0
    """Of both models where they sample; greedy decoding is measured beside it."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the blocks and the sampling."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompt_tokens > self.data.block_tokens:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} must be at most data.block_tokens "
                f"{self.data.block_tokens}"
            )
        return self


def measure_draft(
    config: DraftConfig, *, teacher: Path, student: Path
) -> "dict[Way, list[Drafted]]":
    """What both kinds of decoding say, one entry for each text.

    Raises:
        ConfigError: if a text is more than the context of a model.
        DataError: if there is too little held-out text.
        ModelError: if the two do not share vocabulary and tokenizer.
    """
    check_pair(student=student, teacher=teacher)
    limit = min(context_tokens(teacher), context_tokens(student))
    if config.prompt_tokens + config.new_tokens > limit:
        raise ConfigError(
            f"prompt_tokens {config.prompt_tokens} and new_tokens {config.new_tokens} are more "
            f"than the context of {limit} tokens",
            hint="lower one of them",
        )
    from trt_kd.checkpoints import load_tokenizer
    from trt_kd.teachers.online import OnlineTeacher
    from trt_kd.teachers.writer import Choice, continuations

    tokenizer = load_tokenizer(teacher)
    blocks = token_blocks(
        config.data, tokenizer, split="heldout", count=config.prompts, seed=config.seed
    )
    starts = blocks[:, : config.prompt_tokens].tolist()
    target, draft = (
        OnlineTeacher().load(path, precision=config.precision) for path in (teacher, student)
    )
    found: dict[Way, list[Drafted]] = {"greedy": [], "sampled": []}
    for number, start in enumerate(progress(starts, "drafting texts")):
        for way, texts in found.items():
            temperature = config.temperature if way == "sampled" else 0.0
            choice = Choice(config.new_tokens, temperature, 1.0, config.precision)
            seed = random.Random(f"{config.seed} {number}").getrandbits(32)
            (written,) = continuations(target, tokenizer, [start], choice, seed=seed)
            texts.append(_drafted(config, (target, draft), start, written.ids, way))
    return found


def _drafted(
    config: DraftConfig,
    models: "tuple[PreTrainedModel, PreTrainedModel]",
    prompt: list[int],
    ids: list[int],
    way: Way,
) -> "Drafted":
    """How the draft sees one text."""
    import torch

    from trt_kd.evaluation.drafting import greedy, sampled

    device: Any = models[0].device
    tokens = torch.tensor(ids, device=device)
    target, draft = (_logits(model.to(device), prompt, ids, config.precision) for model in models)
    if way == "greedy":
        return greedy(draft, tokens)
    return sampled(target, draft, tokens, config.temperature)


def _logits(
    model: "PreTrainedModel", prompt: list[int], ids: list[int], precision: str
) -> "Tensor":
    """Logits ``[N, V]`` that predict ``ids`` after ``prompt``."""
    import torch

    device = model.device
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), bf16:
        given = torch.tensor([prompt + ids[:-1]], device=device)
        made = model(input_ids=given, use_cache=False, logits_to_keep=len(ids))
    return made.logits[0].float()  # type: ignore[no-any-return]
