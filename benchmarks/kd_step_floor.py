"""The least that ``kd_step.py``'s step can cost: its parts alone, and the peak of the matrix unit.

Shape suffixes: B sequences, L positions, T predicted tokens, D hidden size, V vocabulary.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from kd_step_variants import LEARNING_RATE, Meter, pair, placed
from torch import nn

from trt_kd.checkpoints import load_model
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training.attention import blockwise_attention

MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}
MATRIX_SECONDS = 0.5
MATRIX_ROUNDS = 5


def measured_floor(given: argparse.Namespace, untimed: int) -> dict[str, Any]:
    """Seconds of every part, in turns, their operations, and the matrix peak before and after."""
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = matrix_peak(device, dtype)
    student, teacher = pair(given)
    models = (
        placed(load_model(student, dtype="float32")),
        placed(OnlineTeacher().load(teacher, precision=given.precision)),
    )
    meter = Meter()
    meter.start()
    parts = parts_of(given, *models, dtype)
    for _ in range(untimed + given.repeats):
        for part in parts.values():
            meter.begin()
            part()
            meter.end()
    timed = meter.seconds[untimed * len(parts) :]
    return {
        "samples_s": {name: timed[place :: len(parts)] for place, name in enumerate(parts)},
        "flops": flops_of(given, *models),
        "matrix_peak_flops_per_s": max(peak, matrix_peak(device, dtype)),
        "matrix_size": MATRIX_SIZES[device],
        **meter.memory(),
    }


def parts_of(
    given: argparse.Namespace, student: Any, teacher: Any, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What a step cannot do without, as calls: products of the heads without softmax or loss.

    The optimizer's gradients are those of the trunk.
    """
    student.train()
    device = student.device
    blocks = np.load(given.work / "blocks.npy")[: given.batch]
    tokens_BL = torch.from_numpy(blocks).to(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, dtype == torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    sizes = (*tokens_BL.shape, student.config.hidden_size)
    gradient_BLD = 1e-3 * torch.randn(sizes, device=device)
    heads = [
        model.get_output_embeddings().weight.detach().to(dtype) for model in (student, teacher)
    ]
    hidden_TD, teacher_TD = (
        torch.randn(given.batch * (given.block_tokens - 1), head.shape[1], device=device).to(dtype)
        for head in heads
    )

    def student_trunk() -> None:
        with autocast(), blockwise_attention():
            out = student.base_model(input_ids=tokens_BL, use_cache=False)
        out.last_hidden_state.backward(gradient_BLD.to(out.last_hidden_state.dtype))

    def student_head() -> None:
        logits_TV = hidden_TD @ heads[0].mT
        _ = logits_TV @ heads[0]
        _ = logits_TV.mT @ hidden_TD

    def teacher_trunk() -> None:
        with torch.no_grad(), autocast(), blockwise_attention():
            teacher.base_model(input_ids=tokens_BL, use_cache=False)

    def teacher_head() -> None:
        _ = teacher_TD @ heads[1].mT

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {
        "student_trunk": student_trunk,
        "student_head": student_head,
        "teacher_trunk": teacher_trunk,
        "teacher_head": teacher_head,
        "optimizer": update,
    }


def flops_of(given: argparse.Namespace, student: Any, teacher: Any) -> dict[str, int]:
    """Operations of the matrix products; backward takes twice those of forward.

    Dense models only: every weight of a linear layer is used by every token.
    """
    rows = given.batch * (given.block_tokens - 1)
    products = [
        2 * rows * model.get_output_embeddings().weight.numel() for model in (student, teacher)
    ]
    return {
        "student_trunk": 3 * trunk_flops(student, given.batch, given.block_tokens),
        "student_head": 3 * products[0],
        "teacher_trunk": trunk_flops(teacher, given.batch, given.block_tokens),
        "teacher_head": products[1],
    }


def trunk_flops(model: Any, batch: int, length: int) -> int:
    """Forward: two per token and weight of a linear layer, and the causal half of attention."""
    head, config = model.get_output_embeddings(), model.config
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 2 * length * config.num_attention_heads * size * config.num_hidden_layers
    return batch * length * (2 * weights + scores)


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the best of many products of two square matrices."""
    size = MATRIX_SIZES[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    meter = Meter()
    started = time.perf_counter()
    while len(meter.seconds) < MATRIX_ROUNDS or time.perf_counter() - started < MATRIX_SECONDS:
        meter.begin()
        _ = left @ right
        meter.end()
    return 2.0 * size**3 / min(meter.seconds)
