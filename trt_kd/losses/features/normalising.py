"""What is done to features before they are compared.

Shape suffixes: B sequences, L positions, T valid tokens, D width.

Sources: Miles and Mikolajczyk 2024 (arXiv:2303.11098) for batch statistics on both sides; Miles et
al. 2024, VkD (arXiv:2403.06213) for standardising and for whitening the teacher.
"""

import torch
from torch import Tensor

from trt_kd.losses.features.base import Normalisation
from trt_kd.losses.features.maths import widened

EPSILON = 1e-6
"""Added to variances."""
SHRINKAGE = 0.01
"""Share of the mean variance that is added to every channel's before whitening."""


def normalised(
    how: Normalisation, student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides' features, normalised in at least float32.

    ``standardise`` gives every token mean 0 and variance 1 over its channels. ``batch`` gives every
    channel mean 0 and variance 1 over the valid tokens. ``whiten`` also makes the teacher's
    channels uncorrelated and leaves the student as it is. Statistics are those of the valid tokens
    at hand; what masked tokens hold afterwards means nothing.
    """
    student_BLD, teacher_BLD = widened(student_BLD), widened(teacher_BLD)
    if how == "standardise":
        return _standardised(student_BLD), _standardised(teacher_BLD)
    if how == "batch":
        return _over_batch(student_BLD, mask_BL), _over_batch(teacher_BLD, mask_BL)
    if how == "whiten":
        return student_BLD, _whitened(teacher_BLD, mask_BL)
    return student_BLD, teacher_BLD


def _standardised(features_BLD: Tensor) -> Tensor:
    variance_BL, mean_BL = torch.var_mean(features_BLD, -1, correction=0, keepdim=True)
    return (features_BLD - mean_BL) / (variance_BL + EPSILON).sqrt()


def _over_batch(features_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    rows_TD = features_BLD[mask_BL]
    if not len(rows_TD):
        return features_BLD
    variance_D, mean_D = torch.var_mean(rows_TD, 0, correction=0)
    return (features_BLD - mean_D) / (variance_D + EPSILON).sqrt()


def _whitened(features_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Rotate to principal components, scale each to variance 1 and rotate back (ZCA).

    The gradient holds the statistics constant: that of eigenvectors is not to be trusted.
    """
    rows_TD = features_BLD[mask_BL].detach()
    if not len(rows_TD):
        return features_BLD
    mean_D = rows_TD.mean(0)
    centred_TD = rows_TD - mean_D
    covariance_DD = centred_TD.mT @ centred_TD / len(rows_TD)
    covariance_DD.diagonal().add_(SHRINKAGE * covariance_DD.diagonal().mean() + EPSILON)
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
    whitening_DD: Tensor = axes_DD / variance_D.clamp_min(EPSILON).sqrt() @ axes_DD.mT
    return (features_BLD - mean_D) @ whitening_DD
