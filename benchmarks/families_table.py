"""Write docs/families.md: which axes of which family survive cut, save, load and forward.

    python benchmarks/families_table.py

builds a tiny random model of every family, cuts it to half along every axis that the family has,
and loads what was saved with stock transformers. A test holds the page and the models together.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.checkpoints import load_model, save_model
from trt_kd.pruning import AXES
from trt_kd.pruning.base import Axis, Place, Site, WidthAxis

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
KINDS = ("hidden", "ffn", "heads", "kv_heads", "experts", "expert_ffn", "depth")
COLUMNS = (*KINDS, "vocab")
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "olmo2": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
"""What tiny models of a family have besides ``SIZES``; None takes an entry away."""


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A small random model of a family, its norms and biases random too."""
    torch.manual_seed(0)
    settings = {**SIZES, **FAMILIES[model_type], **changes}
    kept = {name: value for name, value in settings.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **kept)).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which hides mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def halved(kind: str, shape: ModelShape) -> Axis:
    """An axis with the legal size nearest to half."""
    if kind == "depth":
        return AXES.load(kind)(drop=[0])
    axis = AXES.load(kind)(multiple_of=1)
    legal = axis.legal(shape)
    return axis.resized(min(legal, key=lambda size: abs(size - legal[-1] / 2)))


def scores(model: PreTrainedModel, places: list[Place]) -> list[torch.Tensor]:
    """Sum of the sizes of every place's units over a few random tokens."""
    totals: dict[int, torch.Tensor] = {}

    def add(index: int, site: Site, state: torch.Tensor) -> None:
        state = state if site.read is None else site.read(state)
        unit = state.unflatten(-1, (-1, site.width)).norm(dim=-1)
        totals[index] = totals.get(index, torch.zeros(())) + unit.sum(dim=(0, 1))

    handles = []
    for index, place in enumerate(places):
        for site in place.sites:
            if site.side == "input":
                handles.append(
                    site.module.register_forward_pre_hook(
                        lambda _, inputs, index=index, site=site: add(index, site, inputs[0])
                    )
                )
            else:
                handles.append(
                    site.module.register_forward_hook(
                        lambda _, __, output, index=index, site=site: add(index, site, output)
                    )
                )
    logits(model)
    for handle in handles:
        handle.remove()
    return [totals[index] for index in range(len(places))]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits on two sequences of 24 random tokens."""
    tokens = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens %= model.config.vocab_size
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def survives(model_type: str, kind: str, folder: Path) -> bool:
    """Whether a cut model is as small as planned and comes back from disk as it went."""
    model, architecture = tiny(model_type), architecture_of(model_type)
    shape = shape_from_config(model.config.to_dict())
    axis = halved(kind, shape)
    if axis.unit == "tokens":
        keep = [torch.arange(0, shape.vocab, 2)]
    elif isinstance(axis, WidthAxis):
        keep = axis.keep(scores(model, axis.places(model, architecture)), shape)
    else:
        keep = axis.keep([torch.zeros(())] * shape.layers, shape)
    axis.cut(model, architecture, keep)
    cut = shape_from_config(model.config.to_dict())
    save_model(model, folder, tokenizer_from=folder)
    loaded = load_model(folder)
    for parameter in loaded.parameters():  # a mapped file is aligned otherwise: other kernels
        parameter.data = parameter.data.clone()
    loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    return (
        axis.read(cut) < axis.read(shape)
        and cut.parameters == loaded.num_parameters()
        and torch.equal(logits(model), logits(loaded))
    )


def row(model_type: str) -> tuple[list[str], dict[str, str]]:
    """Cells of one family and the reasons of those that say no."""
    shape = shape_from_config(tiny(model_type).config.to_dict())
    lacking = architecture_of(model_type).axes(shape)
    cells, reasons = [f"`{model_type}`"], {}
    for kind in COLUMNS:
        if lacking[kind]:
            reasons[kind] = lacking[kind]
            cells.append("-")
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells.append("yes" if survives(model_type, kind, Path(folder)) else "FAILS")
    return cells, reasons


def page() -> str:
    """The whole of docs/families.md."""
    head = [f"| {' | '.join(['family', *COLUMNS])} |", "|:--" * (len(COLUMNS) + 1) + "|"]
    lines, notes = [], []
    for model_type in ARCHITECTURES.names():
        cells, reasons = row(model_type)
        lines.append(f"| {' | '.join(cells)} |")
        own = {kind: why for kind, why in reasons.items() if "expert" not in why}
        notes += [f"- `{model_type}`, {kind}: {why}." for kind, why in own.items()]
        if architecture_of(model_type).whole_heads:
            notes.append(f"- `{model_type}`: {WHOLE_HEADS}")
    return "\n".join([INTRODUCTION, *head, *lines, "", NOTES, *notes, ""])


INTRODUCTION = """# Families

Which axes every family can be cut along. Generated by `python benchmarks/families_table.py`, which
builds a tiny random model of each `model_type`, cuts it to about half along one axis, saves it,
loads it with stock transformers and compares: parameters as counted beforehand, no missing or
unexpected key, the same logits bit by bit, and it generates.
"""
WHOLE_HEADS = """the hidden size must stay a multiple of the query heads, which transformers 5
  checks when it reads the config."""
NOTES = """A dash: the stock code of the family has no such size, or derives it from another one.
Asking for such an axis is an error that names the reason and the axes that are left. `experts` and
`expert_ffn` need a mixture of experts; where every layer is one, there is no `ffn`.

Besides:
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
