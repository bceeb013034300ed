"""First-order Taylor importance: what the loss would change if a unit, or a layer, were gone.

Sources: Molchanov et al. 2019 (arXiv:1906.10771) for the expansion; Ma et al. 2023, LLM-Pruner
(arXiv:2305.11627) for language models. Unlike both it expands in activations instead of weights,
so that one number stands for all parameters of a unit, and it takes the absolute value once, of the
sum over all calibration tokens: that sum is the change of their loss.

Shapes: B sequences, L tokens, C channels, H hidden.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.pruning.base import Evidence, Importance, Unit

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Taylor(Importance):
    r"""First-order change of the loss: :math:`|\sum_{bt} x_{btc} \partial L / \partial x_{btc}|`.

    L is the next-token loss in nats, summed over the calibration text. Of a run of layers x is what
    it adds to the residual stream. It costs a backward pass, with all activations held.
    """

    kind: Literal["taylor"] = "taylor"
    units: ClassVar[frozenset[Unit]] = frozenset({"channels", "layers"})
    evidence: ClassVar[Evidence] = "gradients"

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Sum over tokens of state times gradient, in nats and float64.

        For channels: state and gradient ``[B, L, C]`` give ``[C]``. For layers: before, after and
        gradient after, each ``[B, L, H]``, give ``[]``.
        """
        *ends, gradient = (state.detach().float() for state in states)
        if len(ends) == 1:
            return (ends[0] * gradient).sum(dim=1).double().sum(dim=0)
        before_BLH, after_BLH = ends
        return ((after_BLH - before_BLH) * gradient).sum(dim=-1).double().sum()

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """Size of the total."""
        return total.abs()
