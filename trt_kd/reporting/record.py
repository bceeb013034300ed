"""What every part of ``report.json`` is made of."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of the report: complete, typo-proof, unchangeable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
