"""What a teacher writes after prompts, a batch at a time.

Shape suffixes: B prompts, L positions.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trt_kd.errors import ConfigError
from trt_kd.teachers.base import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Choice(NamedTuple):
    """How tokens are chosen."""

    new_tokens: int
    """At most so many."""
    temperature: float
    """0 takes the likeliest."""
    top_p: float
    """Share of the probability that is sampled from."""
    precision: Precision
    """Of the matrix products."""


class Written(NamedTuple):
    """What follows one prompt."""

    ids: list[int]
    """New tokens, the one that ended them included."""
    finished: bool
    """Whether one did."""


@torch.no_grad()
def continuations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    choice: Choice,
    *,
    seed: int,
) -> list[Written]:
    """Continue ``prompts``, token ids of any length; equal seeds give equal tokens.

    Raises:
        ConfigError: if a prompt and what shall follow are more than the model's context.
    """
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    runner: Any = model.to(device)
    longest = max(map(len, prompts))
    context = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if context and longest + choice.new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and {choice.new_tokens} new ones are more than the "
            f"teacher's context of {context}",
            hint="lower new_tokens or prompt_tokens",
        )
    ends = ends_of(model, tokenizer.eos_token_id)
    rows = [[ends[0]] * (longest - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    runner.generation_config = settings_of(choice, ends)
    torch.manual_seed(seed)
    with torch.autocast(device, torch.bfloat16, enabled=choice.precision == "bf16"):
        made_BL = runner.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(seen, device=device),
        )
    return [_until_end(row, ends) for row in made_BL[:, longest:].tolist()]


@torch.no_grad()
def answer_nats(
    model: "PreTrainedModel", context: list[int], answer: list[int], precision: Precision
) -> float:
    """Log-probability of ``answer`` after ``context``, token ids, in nats per token."""
    tokens_1L = torch.tensor([context + answer], device=model.device)
    runner: Any = model
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits_LV = runner(input_ids=tokens_1L, use_cache=False).logits[0]
    rows_AV = logits_LV[len(context) - 1 : -1].float().log_softmax(-1)
    return float(rows_AV.gather(-1, tokens_1L[0, len(context) :, None]).mean())


def settings_of(choice: Choice, ends: list[int]) -> Any:
    """Settings of our own alone: those in the checkpoint may penalize or sample."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if choice.temperature:
        sampling = {
            "do_sample": True,
            "temperature": choice.temperature,
            "top_p": choice.top_p,
            "top_k": 0,
        }
    made: Any = GenerationConfig
    return made(
        max_new_tokens=choice.new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
        **sampling,
    )


def ends_of(model: "PreTrainedModel", eos: int | None) -> list[int]:
    """Tokens that end a text: the tokenizer's ``eos``, then those that the checkpoint names."""
    settings: Any = model.generation_config
    named = settings.eos_token_id if settings is not None else None
    listed = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(int(token) for token in (eos, *listed) if token is not None))


def _until_end(ids: list[int], ends: list[int]) -> Written:
    for place, token in enumerate(ids):
        if token in ends:
            return Written(ids[: place + 1], True)
    return Written(ids, False)
