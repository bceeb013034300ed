"""The arithmetic of feature losses, in at least float32.

Shape suffixes: B sequences, L positions, T valid tokens of all sequences, N valid tokens of one
sequence, M remembered rows, D width, A relation heads.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-7
"""Least similarity and least mean distance, which keep logarithms and quotients finite."""


def widened(features: Tensor) -> Tensor:
    """The features in at least float32."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def valid_rows(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[T, D]`` of the valid tokens of both sides.

    Raises:
        ValueError: if the sides differ in sequences or positions, or the mask does.
    """
    if student_BLD.shape[:2] != mask_BL.shape or teacher_BLD.shape[:2] != mask_BL.shape:
        raise ValueError(
            f"student features {tuple(student_BLD.shape)}, teacher features "
            f"{tuple(teacher_BLD.shape)} and mask {tuple(mask_BL.shape)} are not of the same tokens"
        )
    return widened(student_BLD[mask_BL]), widened(teacher_BLD[mask_BL])


def valid_sequences(
    student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor, least: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Both sides' rows ``[N, D]`` of sequences of ``least`` valid tokens, and a zero to add to.

    Raises:
        ValueError: as ``valid_rows``.
    """
    student_TD, teacher_TD = valid_rows(student_BLD, teacher_BLD, mask_BL)
    counts = mask_BL.sum(-1).tolist()
    pairs = zip(torch.split(student_TD, counts), torch.split(teacher_TD, counts), strict=True)
    return [pair for pair in pairs if len(pair[0]) >= least], student_TD[:0].sum()


def contrastive(
    student_TD: Tensor, teacher_TD: Tensor, memory_MD: Tensor, temperature: float
) -> Tensor:
    """Sum over tokens of CRD's loss against ``memory_MD``."""
    student_TD = functional.normalize(student_TD, dim=-1)
    same_T = (student_TD * functional.normalize(teacher_TD, dim=-1)).sum(-1) / temperature
    memory_MD = functional.normalize(memory_MD.to(student_TD.dtype), dim=-1)
    other_TM = student_TD @ memory_MD.mT / temperature
    # log(Z M) with Z the mean of the exponentials: their sum.
    scale_T = other_TM.detach().logsumexp(-1)
    positives_T = functional.softplus(scale_T - same_T)
    return positives_T.sum() + functional.softplus(other_TM - scale_T[:, None]).sum()


def squared_mmd(student_ND: Tensor, teacher_ND: Tensor, degree: int) -> Tensor:
    """Squared maximum mean discrepancy of the channels under a polynomial kernel."""
    student_ND, teacher_ND = (functional.normalize(x, dim=0) for x in (student_ND, teacher_ND))

    def kernel(one_ND: Tensor, other_ND: Tensor) -> Tensor:
        return (one_ND.mT @ other_ND).pow(degree).mean()

    cross = kernel(student_ND, teacher_ND)
    return kernel(teacher_ND, teacher_ND) + kernel(student_ND, student_ND) - 2 * cross


def neighbour_divergence(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over tokens of the KL between the chances of their neighbours."""
    log_q_NK, log_p_NK = (_neighbours(x).log() for x in (student_ND, teacher_ND))
    return functional.kl_div(log_q_NK, log_p_NK, reduction="batchmean", log_target=True)


def _neighbours(features_ND: Tensor) -> Tensor:
    """Chances ``[N, N - 1]`` of every other token."""
    unit_ND = functional.normalize(features_ND, dim=-1)
    similarity_NN = ((1 + unit_ND @ unit_ND.mT) / 2).clamp_min(EPSILON)
    count = len(features_ND)
    others_NN = ~torch.eye(count, dtype=torch.bool, device=features_ND.device)
    similarity_NK = similarity_NN[others_NN].view(count, count - 1)
    return similarity_NK / similarity_NK.sum(-1, keepdim=True)


def evenly(features_ND: Tensor, count: int) -> Tensor:
    """At most ``count`` of the rows, evenly spaced, first and last among them."""
    rows = len(features_ND)
    if rows <= count:
        return features_ND
    chosen = [number * (rows - 1) // (count - 1) for number in range(count)]
    return features_ND[chosen]


def relative_distances(features_ND: Tensor) -> Tensor:
    """Distances of all pairs of rows, each pair once, divided by their mean."""
    count = len(features_ND)
    one, other = torch.triu_indices(count, count, 1, device=features_ND.device)
    squared = (features_ND[one] - features_ND[other]).square().sum(-1)
    # The root of zero has no gradient: equal tokens are at distance zero without one.
    apart = squared > 0
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    return distances / distances.mean().clamp_min(EPSILON)


def angles(features_ND: Tensor) -> Tensor:
    """Cosines of the angles at j between i and k, over all triples of different rows."""
    count = len(features_ND)
    edges_JID = functional.normalize(features_ND[None] - features_ND[:, None], dim=-1)
    cosines_JIK = edges_JID @ edges_JID.mT
    same = torch.eye(count, dtype=torch.bool, device=features_ND.device)
    return cosines_JIK[~(same[:, :, None] | same[:, None, :] | same[None, :, :])]


def relation_divergence(
    student_ND: Tensor, teacher_ND: Tensor, heads: int, *, causal: bool
) -> Tensor:
    """Mean over heads and tokens of the KL between the relations of both sides."""
    return _divergence(*(_relations(x, heads, causal) for x in (student_ND, teacher_ND)))


def attention_divergence(student_ND: Tensor, teacher_ND: Tensor, heads: int) -> Tensor:
    """The same of causal attention itself and of the relation of values, added.

    Features are scaled queries, keys and values side by side, each of ``heads`` heads.
    """
    student, teacher = (x.chunk(3, dim=-1) for x in (student_ND, teacher_ND))
    log_q_ANN, log_p_ANN = (
        _distributions(_heads(queries, heads), _heads(keys, heads), causal=True)
        for queries, keys, _ in (student, teacher)
    )
    values = relation_divergence(student[2], teacher[2], heads, causal=True)
    return _divergence(log_q_ANN, log_p_ANN) + values


def _divergence(log_q_ANN: Tensor, log_p_ANN: Tensor) -> Tensor:
    # A token that may not be seen has probability 0 on both sides: it adds nothing.
    gap_ANN = torch.where(log_p_ANN.isfinite(), log_p_ANN - log_q_ANN, 0.0)
    return (log_p_ANN.exp() * gap_ANN).sum(-1).mean()


def _relations(features_ND: Tensor, heads: int, causal: bool) -> Tensor:
    """Logarithms ``[A, N, N]`` of what each token attends to among the same kind of vectors."""
    heads_ANd = _heads(features_ND, heads)
    return _distributions(heads_ANd / math.sqrt(heads_ANd.shape[-1]), heads_ANd, causal)


def _heads(features_ND: Tensor, heads: int) -> Tensor:
    """``[A, N, D / A]``."""
    return features_ND.reshape(len(features_ND), heads, -1).transpose(0, 1)


def _distributions(queries_ANd: Tensor, keys_ANd: Tensor, causal: bool) -> Tensor:
    """Logarithms ``[A, N, N]`` of what the queries attend to among the keys."""
    scores_ANN = queries_ANd @ keys_ANd.mT
    if causal:
        later = torch.ones_like(scores_ANN[0], dtype=torch.bool).triu(1)
        scores_ANN = scores_ANN.masked_fill(later, -torch.inf)
    return scores_ANN.log_softmax(-1)
