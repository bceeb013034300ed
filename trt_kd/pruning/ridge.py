r"""Refit a projection to fewer inputs by ridge regression; pure torch.

For inputs X ``[T, C]`` with Gram matrix G = X'X, a projection W ``[H, C]``, kept inputs K, cut ones
D and an error E ``[T, H]`` that the projection shall make up for besides, the new one minimises
:math:`\|X W' + \phi E - X_K W_K'\|^2 + \lambda \|W_K - W_{:,K}\|^2`:

.. math:: W_K = W_{:,K} + (W_{:,D} G_{DK} + \phi E'X_K) (G_{KK} + \lambda I)^{-1}

so that a large lambda leaves the plain cut. Every other sequence is kept out of the fit, and the
lambda (and the share :math:`\phi` of the error) that does best on those is the one used on all:
with too few tokens that is the plain cut. The same regression serves ZipLM (arXiv:2302.04089),
SlimGPT (arXiv:2412.18110) and OSSCAR (arXiv:2403.12983).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trt_kd.errors import ModelError
from trt_kd.pruning.reconstruction import ROWS

JUDGED = 128
"""Outputs, or mixtures of them, by which ridges are compared."""
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


class Gram:
    """Moments of what passes a module, of two halves of the sequences."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start with nothing seen; sums are taken in ``dtype``."""
        self._dtype = dtype
        self._halves: list[Moments | None] = [None, None]
        self._sequences = 0

    def add(self, states_BLC: Tensor, errors_BLH: Tensor | None = None) -> None:
        """Add a batch; its sequences go to both halves in turn."""
        for half in (0, 1):
            first = (half + self._sequences) % 2
            errors = None if errors_BLH is None else errors_BLH[first::2]
            states = states_BLC[first::2].to(self._dtype)
            self._halves[half] = _added(self._halves[half], states, errors)
        self._sequences += len(states_BLC)

    def add_some(self, states_SC: Tensor, sequences_S: Tensor, count: int) -> None:
        """Add some of the tokens of a batch of ``count``, each with its sequence's number.

        Halves are dealt as in ``add``; without tokens they stand all the same.
        """
        for half in (0, 1):
            mine_S = (sequences_S + self._sequences) % 2 == half
            moments = self._halves[half]
            if moments is None:
                channels = states_SC.shape[1]
                moments = Moments(states_SC.new_zeros(channels, channels, dtype=self._dtype))
                self._halves[half] = moments
            states = states_SC[mine_S].to(self._dtype)
            moments.gram.addmm_(states.T, states)
        self._sequences += count

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
    states_TC = states_BLC.flatten(0, 1)
    errors_TH = None if errors_BLH is None else errors_BLH.flatten(0, 1).to(states_TC)
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
    """The new projection ``[H, K]``, in the old one's dtype."""
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
    """Solve for the projection from the channels ``keep_K``, in float64.

    A ridge times the mean of diag(G) is lambda; the best of ``ridges`` and ``feedbacks`` (shares of
    the error) and of the plain cut is found on one half of the sequences with the solutions of the
    other half, both ways; of more than ``JUDGED`` outputs as many random mixtures are judged.

    Raises:
        ModelError: if there are fewer than two sequences.
    """
    weight_HC, keep_K = weight_HC.detach(), keep_K.to(weight_HC.device)
    ridge, share = _best(weight_HC, gram.halves, keep_K, sorted(ridges), feedbacks)
    return solve(weight_HC, gram.halves, keep_K, ridge, share)


def solve(
    weight_HC: Tensor,
    lots: Sequence[Moments],
    keep_K: Tensor,
    ridge: float,
    feedback: float = 0.0,
) -> Refit:
    """The projection for one ridge from the tokens of all ``lots``; not finite if there is none."""
    inputs = _Inputs(lots, keep_K)
    fitted_HK = weight_HC[:, keep_K]
    factor_KK = None if math.isinf(ridge) else inputs.factor(ridge)
    wanted = plain = sum(lot.energy for lot in lots)
    gained = 0.0
    for first in range(0, len(weight_HC), ROWS):
        rows = slice(first, first + ROWS)
        crosses = [lot.cross[rows] for lot in lots if lot.cross is not None]
        cut = _Cut(weight_HC[rows].double(), crosses, inputs)
        plain += cut.loss
        wanted += cut.loss - cut.gain(-fitted_HK[rows].double())
        if factor_KK is not None:
            change_HK = cut.change(factor_KK, feedback)
            gained += cut.gain(change_HK)
            fitted_HK[rows] = (fitted_HK[rows] + change_HK).to(fitted_HK.dtype)
    shares = [max(lost, 0.0) / (wanted or 1.0) for lost in (plain - gained, plain)]
    return Refit(fitted_HK, shares[0], shares[1], ridge)


def _best(
    weight_HC: Tensor,
    halves: Sequence[Moments],
    keep_K: Tensor,
    ridges: Sequence[float],
    feedbacks: Sequence[float],
) -> tuple[float, float]:
    """Ridge and feedback of the solutions that gain most on the half that they do not know."""
    mix = _mixtures(len(weight_HC))
    judged_JC = mix(weight_HC)
    one, other = (
        _Cut(
            judged_JC, [mix(half.cross)] if half.cross is not None else [], _Inputs([half], keep_K)
        )
        for half in halves
    )
    best, highest = (PLAIN, 0.0), 0.0
    for ridge in ridges:
        pairs = zip(
            _gains(one, other, ridge, feedbacks), _gains(other, one, ridge, feedbacks), strict=True
        )
        for feedback, gain in zip(feedbacks, map(sum, pairs), strict=True):
            if math.isfinite(gain) and gain > highest:
                best, highest = (ridge, feedback), gain
    return best


def _gains(fit: "_Cut", check: "_Cut", ridge: float, feedbacks: Sequence[float]) -> list[float]:
    """What the solutions for ``fit`` gain on ``check``, by feedback."""
    factor_KK = fit.inputs.factor(ridge)
    return [check.gain(fit.change(factor_KK, feedback)) for feedback in feedbacks]


def _mixtures(outputs: int) -> Callable[[Tensor], Tensor]:
    """Turns rows into float64, many of them into sums with random signs: squares tell as much."""
    if outputs <= JUDGED:
        return Tensor.double
    generator = torch.Generator().manual_seed(0)
    signs_JH = torch.randint(0, 2, (JUDGED, outputs), generator=generator).double() * 2.0 - 1.0
    return lambda rows_HC: signs_JH.to(rows_HC.device) @ rows_HC.double()


class _Inputs:
    """The Gram matrix of some lots of tokens, parted into kept and cut inputs."""

    def __init__(self, lots: Sequence[Moments], keep_K: Tensor) -> None:
        self.mean = sum(float(lot.gram.diagonal().double().mean()) for lot in lots)
        dropped_C = torch.ones(len(lots[0].gram), dtype=torch.bool, device=keep_K.device)
        dropped_C[keep_K] = False
        self.keep_K, self.drop_D = keep_K, dropped_C.nonzero().flatten()
        self.gram_KK = _part(lots, self.keep_K, self.keep_K)
        self.gram_DK = _part(lots, self.drop_D, self.keep_K)
        self.gram_DD = _part(lots, self.drop_D, self.drop_D)

    def factor(self, ridge: float) -> Tensor:
        """Cholesky factor ``[K, K]`` for the kept inputs, in float64; NaN if there is none."""
        system_KK = self.gram_KK.to(torch.float64, copy=True)
        system_KK.diagonal().add_(ridge * self.mean)
        # In place: it is symmetric, and LAPACK's matrices stand column by column.
        factor_KK, info = system_KK.T, torch.zeros((), dtype=torch.int32, device=system_KK.device)
        torch.linalg.cholesky_ex(factor_KK, out=(factor_KK, info))
        return factor_KK if int(info) == 0 else factor_KK.fill_(math.nan)


def _part(lots: Sequence[Moments], rows_R: Tensor, columns_K: Tensor) -> Tensor:
    parts = (lot.gram[rows_R.unsqueeze(1), columns_K] for lot in lots)
    return functools.reduce(Tensor.add_, parts)


class _Cut:
    """What is lost of some outputs with the cut inputs, and what a change of the others gains."""

    def __init__(self, weight_HC: Tensor, crosses: Sequence[Tensor], inputs: _Inputs) -> None:
        self.inputs = inputs
        cut_HD = weight_HC[:, inputs.drop_D]
        self.goal_HK = self.wanted_HK = _times(cut_HD, inputs.gram_DK)
        self.loss = float((_times(cut_HD, inputs.gram_DD) * cut_HD).sum())
        """Squares of the cut inputs' output and twice its product with the errors."""
        for cross_HC in crosses:
            self.wanted_HK = self.wanted_HK + cross_HC[:, inputs.keep_K]
            self.loss += 2.0 * float((cross_HC[:, inputs.drop_D] * cut_HD).sum())

    def change(self, factor_KK: Tensor, feedback: float) -> Tensor:
        """What to add to the kept weights, ``[H, K]``; the errors are made up for in part."""
        right_HK = torch.lerp(self.goal_HK, self.wanted_HK, feedback)
        half_KH = torch.linalg.solve_triangular(factor_KK, right_HK.T, upper=False)
        change_KH: Tensor = torch.linalg.solve_triangular(factor_KK.T, half_KH, upper=True)
        return change_KH.T

    def gain(self, change_HK: Tensor) -> float:
        """How much less is lost with the change."""
        product_HK = _times(change_HK, self.inputs.gram_KK)
        return float(((2.0 * self.wanted_HK - product_HK) * change_HK).sum())


def _times(left_HR: Tensor, gram_RK: Tensor) -> Tensor:
    """Product in float64 with a matrix that never stands there in float64 as a whole."""
    product_HK = left_HR.new_empty(len(left_HR), gram_RK.shape[1])
    for first in range(0, gram_RK.shape[1], ROWS):
        columns = slice(first, first + ROWS)
        product_HK[:, columns] = left_HR @ gram_RK[:, columns].double()
    return product_HK
