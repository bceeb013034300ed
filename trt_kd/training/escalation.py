"""Features only where responses alone do not suffice."""

from pydantic import PositiveFloat, PositiveInt

from trt_kd.config import StrictModel


class Escalation(StrictModel):
    """The run begins without features; a measurement on held-out text decides whether they join."""

    after_steps: PositiveInt
    """Steps after which is decided; one that the monitor measures."""
    gap_nats: PositiveFloat
    """Divergence from the teacher, in nats per token, that may remain; above it features join."""
