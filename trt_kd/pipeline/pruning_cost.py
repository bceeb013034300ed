"""What the folds of a cut compute, from its settings and the sizes before and after it."""

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.reconstruction import SHARES, proof_sequences
from trt_kd.stages.prune import PruneConfig


def folds(config: PruneConfig, shape: ModelShape, dropped: int) -> int:
    """Gaps, at most, that a layer before them may make up for when so many layers are dropped."""
    if config.reconstruct is None or config.reconstruct.schedule != "sequential":
        return 0
    for axis in config.axes:
        if isinstance(axis, DepthAxis):
            if axis.drop is not None:
                return sum(1 for n in axis.drop if n and n - 1 not in axis.drop)
            return min(1, dropped) if axis.contiguous else min(dropped, shape.layers - dropped)
    return 0


def fold_flops(config: PruneConfig, shape: ModelShape, dropped: int) -> float:
    """Products of the fits of all folds: a Gram matrix each, and a solution by share and ridge."""
    if config.reconstruct is None:
        return 0.0
    tokens = config.blocks() * config.data.block_tokens
    solved = len(SHARES) * len(config.reconstruct.ridges)
    each = 2.0 * tokens * shape.ffn * (shape.ffn + shape.hidden)
    each += solved * (shape.ffn**3 / 3 + 2.0 * shape.hidden * shape.ffn**2)
    return folds(config, shape, dropped) * each


def proof_tokens(config: PruneConfig, shape: ModelShape, dropped: int) -> int:
    """Tokens that pass the model to prove all folds: the original, the plain cut, every share.

    They count as if they ran through the whole of it and not from the gap on.
    """
    held = proof_sequences(config.blocks()) * config.data.block_tokens
    return folds(config, shape, dropped) * (2 + len(SHARES)) * held
