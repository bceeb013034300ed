"""When the terms of the objective are weighed by their gradients.

Source: Chen et al. 2018, GradNorm (arXiv:1711.02257), whose weights are learnt towards equal rates
of training; here a weight is the asked ratio of norms itself and is met at once.
"""

from typing import Annotated

from pydantic import Field, PositiveInt

from trt_kd.config import StrictModel


class Balance(StrictModel):
    """Every weight says how large a term's gradient is beside the response's.

    Norms are taken on the student's last activation that all terms share: the one below the lowest
    layer that a feature reads, or the last hidden states where there are none.
    """

    every_steps: PositiveInt = 10
    """Steps from one measurement of the norms to the next; one costs about a backward pass for
    each term."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What the running mean of a norm keeps of itself at a measurement."""
