"""How similar the layers of two models are: linear CKA, debiased, in minibatches.

Sources: Kornblith et al. 2019 (arXiv:1905.00414) for CKA; Nguyen et al. 2021 (arXiv:2010.15327) for
the minibatch form: the unbiased estimate of HSIC (Song et al. 2012), averaged over minibatches
before the quotient is taken, so that the result does not depend on their size but by chance.

Shape suffixes: B blocks, L positions, N tokens of a minibatch, S layers of the student, T layers of
the teacher, D width.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.artifacts import piece
from trt_kd.errors import DataError
from trt_kd.training.features import Feature, check_names, with_given
from trt_kd.training.pairing import most_similar
from trt_kd.training.reading import reading

if TYPE_CHECKING:
    from trt_kd.losses.features.base import Reading

logger = logging.getLogger(__name__)

MINIBATCH_TOKENS = 256
BLOCKS = 4
"""Blocks that the tokens of a minibatch are taken from."""
TOKENS = 4096
"""Tokens that pairs are measured on before training."""
LEAST_TOKENS = 4
"""Below these the estimate does not exist."""


def by_similarity(
    features: Sequence[Feature],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: NDArray[np.int64],
    work: Path,
) -> list[Feature]:
    """The terms with the pairs of ``pairs: cka`` measured on ``blocks`` and written out.

    A run that is resumed finds its pairs in ``work``.
    """
    if all(isinstance(feature.pairs, list) for feature in features):
        return list(features)

    def measure(_folder: Path) -> dict[str, Any]:
        count = -(-TOKENS // blocks.shape[1])
        if torch.cuda.is_available():  # where the trainer will put them
            for model in (student, teacher):
                nn.Module.cuda(model)
        return {"cka": layer_similarity(student, teacher, blocks[:count]).tolist()}

    similarity = piece(work / "layer_similarity", measure)["cka"]
    found = []
    for feature in features:
        if isinstance(feature.pairs, list):
            found.append(feature)
            continue
        pairs = most_similar(feature, similarity)
        logger.info("%s compares the layers %s", feature.loss.kind, [list(pair) for pair in pairs])
        found.append(with_given(feature, pairs))
    check_names(found)
    return found


@torch.no_grad()
def layer_similarity(
    student: PreTrainedModel, teacher: PreTrainedModel, blocks: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Linear CKA ``[S, T]`` of the outputs of all layers on ``blocks`` ``[B, L]``.

    The first token of a block is left out: in most models it carries a massive activation, which
    would be all that is compared.

    Raises:
        DataError: if there are too few tokens.
    """
    sums: list[Tensor] = []
    dtypes = {p.dtype for model in (student, teacher) for p in model.parameters()}
    mixed = partial(torch.autocast, student.device.type, torch.bfloat16, torch.bfloat16 in dtypes)
    for start in range(0, len(blocks), BLOCKS):
        tokens_BL = torch.from_numpy(np.ascontiguousarray(blocks[start : start + BLOCKS]))
        if tokens_BL[:, 1:].numel() < LEAST_TOKENS:
            continue
        with mixed():
            states = [_layer_states(model, tokens_BL) for model in (student, teacher)]
        grams = [_gram_matrices(x) for x in states]
        found = [_hsic(grams[0], grams[1]), *(_hsic(x, x).diagonal() for x in grams)]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    if not sums:
        raise DataError(
            f"{blocks.size} tokens are too few to compare layers",
            hint=f"give at least {2 * LEAST_TOKENS}",
        )
    cross_ST, own_S, own_T = sums
    return (cross_ST / (own_S[:, None] * own_T[None, :]).sqrt()).cpu().numpy()


def _layer_states(model: PreTrainedModel, tokens_BL: Tensor) -> list[Tensor]:
    """Outputs ``[N, D]`` of every layer at evenly spaced tokens, in float64."""
    depth = len(architecture_of(model.config.model_type).layers(model))
    wanted: list[tuple[int, Reading]] = [(layer, "states") for layer in range(depth)]
    parts: Any = model
    with reading(model, wanted) as seen:
        parts.base_model(input_ids=tokens_BL.to(model.device), use_cache=False)
    available = tokens_BL[:, 1:].numel()
    count = min(MINIBATCH_TOKENS, available)
    chosen = torch.arange(count, device=model.device) * available // count
    return [seen[key][:, 1:].flatten(0, 1)[chosen].double() for key in wanted]


def _gram_matrices(layers: list[Tensor]) -> Tensor:
    """Gram matrices ``[S, N, N]`` of the layers, diagonals zero."""
    grams_SNN = torch.stack([x_ND @ x_ND.mT for x_ND in layers])
    grams_SNN.diagonal(dim1=1, dim2=2).zero_()
    return grams_SNN


def _hsic(one_SNN: Tensor, other_TNN: Tensor) -> Tensor:
    """Unbiased estimate of HSIC ``[S, T]`` of all pairs of Gram matrices without diagonals."""
    count = one_SNN.shape[1]
    traces_ST = one_SNN.flatten(1) @ other_TNN.flatten(1).mT
    rows_SN, rows_TN = one_SNN.sum(-1), other_TNN.sum(-1)
    totals_ST = rows_SN.sum(-1)[:, None] * rows_TN.sum(-1)[None, :]
    estimate_ST = (
        traces_ST + totals_ST / ((count - 1) * (count - 2)) - 2 / (count - 2) * rows_SN @ rows_TN.mT
    )
    return estimate_ST / (count * (count - 3))
