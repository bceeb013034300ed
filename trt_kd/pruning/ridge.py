r"""Refit a projection to fewer inputs by ridge regression; pure torch.

For inputs X ``[T, C]`` with Gram matrix G = X'X, a projection W ``[H, C]``, kept inputs K and an
error E ``[T, H]`` that the projection shall make up for besides, the new one minimises
:math:`\|X W' + \phi E - X_K W_K'\|^2 + \lambda \|W_K - W_{:,K}\|^2`:

.. math:: W_K = (W G_{:,K} + \phi E'X_K + \lambda W_{:,K}) (G_{KK} + \lambda I)^{-1}

so that a large lambda leaves the plain cut. Every other sequence is kept out of the fit, and the
lambda (and the share :math:`\phi` of the error) that does best on those is the one used on all:
with too few tokens that is the plain cut. The same regression serves ZipLM (arXiv:2302.04089),
SlimGPT (arXiv:2412.18110) and OSSCAR (arXiv:2403.12983).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trt_kd.errors import ModelError

PLAIN = math.inf
"""The ridge with which the plain cut stays as it is."""


@dataclass
class Moments:
    """Second moments of inputs X ``[T, C]`` and errors E ``[T, H]``; sums over tokens."""

    gram: Tensor
    """X'X."""
    cross: Tensor | None = None
    """E'X; None without errors."""
    energy: float = 0.0
    """Sum of the squares of E."""

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both lots of tokens."""
        crosses = [each.cross for each in (self, other) if each.cross is not None]
        cross = crosses[0] + crosses[1] if len(crosses) == 2 else None
        return Moments(self.gram + other.gram, cross, self.energy + other.energy)

    def double(self) -> "Moments":
        """The same in float64."""
        cross = None if self.cross is None else self.cross.double()
        return Moments(self.gram.double(), cross, self.energy)


class Gram:
    """Moments in float32 of what passes a module, of two halves of the sequences."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._halves: list[Moments | None] = [None, None]
        self._sequences = 0

    def add(self, states_BLC: Tensor, errors_BLH: Tensor | None = None) -> None:
        """Add a batch; its sequences go to both halves in turn."""
        for half in (0, 1):
            first = (half + self._sequences) % 2
            errors = None if errors_BLH is None else errors_BLH[first::2]
            self._halves[half] = _added(self._halves[half], states_BLC[first::2], errors)
        self._sequences += len(states_BLC)

    @property
    def halves(self) -> tuple[Moments, Moments]:
        """Moments of both halves.

        Raises:
            ModelError: if fewer than two sequences passed.
        """
        fit, check = self._halves
        if fit is None or check is None:
            raise ModelError(
                f"a refit needs two sequences of calibration text, found {self._sequences}",
                hint="raise calibration_tokens to two blocks at least, or set reconstruct: null",
            )
        return fit, check

    @property
    def sum(self) -> Moments:
        """Moments of all sequences."""
        fit, check = self.halves
        return fit + check


def _added(
    moments: Moments | None, states_BLC: Tensor, errors_BLH: Tensor | None
) -> Moments | None:
    if not len(states_BLC):
        return moments
    states_TC = states_BLC.flatten(0, 1).float()
    errors_TH = None if errors_BLH is None else errors_BLH.flatten(0, 1).float()
    if moments is None:
        channels = states_TC.shape[1]
        moments = Moments(states_TC.new_zeros(channels, channels))
        if errors_TH is not None:
            moments.cross = states_TC.new_zeros(errors_TH.shape[1], channels)
    moments.gram.addmm_(states_TC.T, states_TC)
    if errors_TH is not None and moments.cross is not None:
        moments.cross.addmm_(errors_TH.T, states_TC)
        moments.energy += float(errors_TH.square().sum())
    return moments


class Refit(NamedTuple):
    """A refitted projection and the share of the wanted output's energy that is lost."""

    weight: Tensor
    """The new projection ``[H, K]``, float64."""
    residual: float
    """Squared error over squared output, with the new projection."""
    plain_residual: float
    """The same for the plain cut."""
    ridge: float
    """The ridge that did best on sequences outside the fit; infinite for the plain cut."""


def refit(
    weight_HC: Tensor,
    gram: Gram,
    keep_K: Tensor,
    ridges: Sequence[float],
    feedbacks: Sequence[float] = (0.0,),
) -> Refit:
    """Solve for the projection from the channels ``keep_K``.

    A ridge times the mean of diag(G) is lambda; the best of ``ridges`` and ``feedbacks`` (shares of
    the error) and of the plain cut is found on one half of the sequences with the solutions of the
    other half, both ways.

    Raises:
        ModelError: if there are fewer than two sequences.
    """
    weight = weight_HC.detach().double()
    one, other = (_Problem(weight, half.double(), keep_K) for half in gram.halves)
    candidates = [(ridge, share) for ridge in sorted(ridges) for share in feedbacks]
    candidates.append((PLAIN, 0.0))
    losses = [
        other.lost(one.solve(*candidate)) + one.lost(other.solve(*candidate))
        for candidate in candidates
    ]
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = candidates[losses.index(min(losses))] if min(losses) < math.inf else candidates[-1]
    whole = _Problem(weight, gram.sum.double(), keep_K)
    fitted, plain = whole.solve(*best), whole.solve(PLAIN)
    shares = [max(whole.lost(each), 0.0) / (whole.energy or 1.0) for each in (fitted, plain)]
    return Refit(fitted, shares[0], shares[1], best[0])


class _Problem:
    """Everything that the candidates for one projection share."""

    def __init__(self, weight_HC: Tensor, moments: Moments, keep_K: Tensor) -> None:
        gram_CC = moments.gram
        output_HC = weight_HC @ gram_CC
        self.plain_HK = weight_HC[:, keep_K]
        self.gram_KK = gram_CC[keep_K][:, keep_K]
        self.mean = float(gram_CC.diagonal().mean())
        self.output_HK = output_HC[:, keep_K]
        self.error_HK = None if moments.cross is None else moments.cross[:, keep_K]
        self.energy = float((output_HC * weight_HC).sum()) + moments.energy
        """Squares of the wanted output: the old one and the errors."""
        if moments.cross is not None:
            self.energy += 2.0 * float((moments.cross * weight_HC).sum())

    def solve(self, ridge: float, feedback: float = 0.0) -> Tensor:
        """The projection ``[H, K]`` for one ridge, in float64; not finite if there is none."""
        # With no input energy at all any lambda gives the plain cut.
        damping = ridge * self.mean
        if math.isinf(ridge) or damping == 0.0:
            return self.plain_HK
        system_KK = self.gram_KK.clone()
        system_KK.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(system_KK)
        if int(info) != 0:
            return torch.full_like(self.plain_HK, math.nan)
        right_HK = self.output_HK + damping * self.plain_HK
        if feedback and self.error_HK is not None:
            right_HK += feedback * self.error_HK
        return torch.cholesky_solve(right_HK.T, factor).T

    def lost(self, candidate_HK: Tensor) -> float:
        """Squared distance to the wanted output, the errors made up for in full."""
        wanted_HK = self.output_HK if self.error_HK is None else self.output_HK + self.error_HK
        ours = float(((candidate_HK @ self.gram_KK - 2.0 * wanted_HK) * candidate_HK).sum())
        return self.energy + ours


def solve(weight_HC: Tensor, moments: Moments, keep_K: Tensor, ridge: float) -> Tensor:
    """The projection ``[H, K]`` for one ridge, in float64; not finite if there is none."""
    return _Problem(weight_HC.double(), moments.double(), keep_K).solve(ridge)
