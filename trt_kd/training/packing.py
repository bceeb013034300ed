"""Documents that share a block: told apart, or read as one text.

Shape suffixes: B sequences, L positions.
"""

from typing import TYPE_CHECKING, Any

from trt_kd.config import StrictModel
from trt_kd.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Largest difference of hidden states that float arithmetic in another order may make, relative."""


class Packing(StrictModel):
    """How documents that share a block see each other."""

    reset: bool = False
    """Begin positions and attention anew with every document, and learn nothing across the
    boundary; else a block is one text in which end-of-text tokens separate documents."""


def positions(tokens_BL: "Tensor", end: int) -> "Tensor":
    """Position of every token in its document, int64 ``[B, L]``; ``end`` is a document's last.

    From positions that start anew transformers makes a block-diagonal causal mask, in every
    attention implementation, where no other mask and no cache is given.
    """
    import torch

    place_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    begins_BL = torch.zeros_like(tokens_BL)
    begins_BL[:, 1:] = torch.where(tokens_BL[:, :-1] == end, place_L[1:], 0)
    return place_L - begins_BL.cummax(1).values


def goes_on(tokens_BL: "Tensor", end: int | None) -> "Tensor":
    """Which tokens but the last are followed by one of their document, bool ``[B, L - 1]``."""
    import torch

    before_BK = tokens_BL[..., :-1]
    return torch.ones_like(before_BK, dtype=torch.bool) if end is None else before_BK != end


def inputs(tokens_BL: "Tensor", end: int | None) -> dict[str, Any]:
    """What a forward pass is given; ``end`` is None where a block is read as one text."""
    given: dict[str, Any] = {"input_ids": tokens_BL, "use_cache": False}
    return given if end is None else given | {"position_ids": positions(tokens_BL, end)}


def check_packing(model: "PreTrainedModel", role: str) -> None:
    """Check that positions which start anew keep documents apart in ``model``.

    Raises:
        ModelError: if a document's logits depend on the document before it.
    """
    import torch

    with torch.no_grad():
        tokens_BL = torch.tensor([[2, 0, 1, 3, 2], [3, 0, 1, 3, 2]], device=model.device)
        given: dict[str, Any] = inputs(tokens_BL, 0)
        first, second = model(**given).logits[:, 2:].float()
    if not torch.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE):
        raise ModelError(
            f"the {role} ({model.config.model_type}) reads across documents of a block "
            "although positions start anew",
            hint="leave packing.reset out for this model",
        )
