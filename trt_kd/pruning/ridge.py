r"""Refit a projection to fewer inputs by ridge regression; pure torch.

For inputs X ``[T, C]`` with Gram matrix G = X'X, a projection W ``[H, C]`` and kept inputs K, the
new projection minimises :math:`\|X W' - X_K W_K'\|^2 + \lambda \|W_K - W_{:,K}\|^2`:

.. math:: W_K = (W G_{:,K} + \lambda W_{:,K}) (G_{KK} + \lambda I)^{-1}

so that a large lambda leaves the plain cut. The same regression serves ZipLM (arXiv:2302.04089),
SlimGPT (arXiv:2412.18110) and OSSCAR (arXiv:2403.12983).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trt_kd.errors import ModelError


class Refit(NamedTuple):
    """A refitted projection and the share of the output's energy that is lost."""

    weight: Tensor
    """The new projection ``[H, K]``, float64."""
    residual: float
    """Squared error over squared output, with the new projection."""
    plain_residual: float
    """The same for the plain cut."""


def refit(weight_HC: Tensor, gram_CC: Tensor, keep_K: Tensor, ridge: float) -> Refit:
    """Solve for the projection from the channels ``keep_K``; ``ridge`` times mean diag(G) = lambda.

    Raises:
        ModelError: if the system has no finite solution.
    """
    weight, gram = weight_HC.detach().double(), gram_CC.double()
    cross_CK, gram_KK = gram[:, keep_K], gram[keep_K][:, keep_K]
    # With no input energy at all any lambda gives the plain cut.
    damping = ridge * float(gram.diagonal().mean()) or 1.0
    plain_HK = weight[:, keep_K]
    system_KK = gram_KK + damping * torch.eye(keep_K.numel(), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(system_KK)
    fitted = torch.cholesky_solve((weight @ cross_CK + damping * plain_HK).T, factor).T
    if int(info) != 0 or not bool(torch.isfinite(fitted).all()):
        raise ModelError(
            "the least-squares reconstruction has no finite solution",
            hint="raise reconstruct.ridge, use more calibration_tokens, or set reconstruct: null",
        )
    energy = float(((weight @ gram) * weight).sum())

    def residual(candidate_HK: Tensor) -> float:
        lost = energy - 2.0 * float(((weight @ cross_CK) * candidate_HK).sum())
        lost += float(((candidate_HK @ gram_KK) * candidate_HK).sum())
        return max(lost, 0.0) / energy if energy else 0.0

    return Refit(fitted, residual(fitted), residual(plain_HK))
