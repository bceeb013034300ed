"""Memory of the passes over the calibration text, in closed form; needs no torch.

Counted is what stands in float32 beside the weights at the worst moment of one batch: in a backward
pass what it reads again, and what is kept of the sites. Its factors were found by measuring, and a
test measures again. Attention must not hold its matrix of weights, which is true of the kernels
that transformers takes by default for all families but a few.
"""

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Evidence


def pass_bytes(shape: ModelShape, evidence: Evidence, *, batch: int, tokens: int) -> int:
    """Bytes of activations, and of the gradients that stand beside them, in one pass.

    Args:
        shape: the unpruned model.
        evidence: what the pass shows to an importance: ``states`` runs the trunk, ``gradients``
            the whole model forward and backward, ``losses`` the whole model on one sequence, again
            and again without a run of layers.
        batch: sequences run at once.
        tokens: of each of them.
    """
    heads = shape.heads * shape.head_dim
    ffn = max(shape.ffn, shape.experts_per_token * shape.expert_ffn)
    # The residual stream of every layer, and the largest intermediate results of one layer.
    stream, at_work = shape.layers * shape.hidden, 8 * max(ffn, shape.hidden, heads)
    if evidence == "losses":
        return 4 * tokens * (stream + at_work + _LOGITS * shape.vocab)
    if evidence == "gradients":
        width = (4 + 2 * shape.norms_per_layer) * shape.hidden
        held = shape.layers * (width + 6 * heads + 5 * ffn)
        return 4 * batch * tokens * (held + at_work + _LOGITS * shape.vocab)
    return 4 * batch * tokens * (stream + at_work)


_LOGITS = 3
"""Copies of the logits: as made, without the last position, and their logarithms or gradients."""
