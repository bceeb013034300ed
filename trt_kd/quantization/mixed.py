"""A format for every layer of its own, under a budget of bits: Model Optimizer's ``auto_quantize``.

A layer's score is the squared product of its output's error and the gradient of the loss: the
second-order term, with the Fisher information for the Hessian (as in pruning, Theis et al. 2018,
arXiv:1801.05787), and the choice is an integer program. Or the score is the measured KL.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import plugin_field
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat, label

UNQUANTIZED = "none"
"""Stands for the format of a layer that stays as it is."""
_QUANTIZERS = ("weight_quantizer", "input_quantizer")


class Mixed(QuantizationFormat):
    """The best of several formats, or none, for every layer under a budget of bits per weight.

    Matrices that a runtime fuses (query, key and value; gate and up) get one format.
    """

    kind: Literal["mixed"] = "mixed"
    formats: Annotated[
        list[plugin_field(FORMATS, QuantizationFormat)],  # type: ignore[valid-type]
        Field(min_length=1),
    ] = ["fp8", "int4_awq"]
    """What a layer may be quantized to; staying as it is can always be chosen."""
    effective_bits: Annotated[float, Field(gt=0, lt=16)] = 6.0
    """Bits per weight on average over all projections, scales not counted; the head stays out."""
    method: Literal["gradient", "kl_div"] = "gradient"
    """Scores from gradients of the loss, or from the KL of every choice, one forward pass each."""
    score_tokens: PositiveInt = 2048
    """Calibration tokens behind the scores, rounded up to whole batches."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_error_limit: ClassVar[float | None] = None
    weight_bits: ClassVar[float] = 16.0

    @field_validator("formats")
    @classmethod
    def _different(cls, formats: list[QuantizationFormat]) -> list[QuantizationFormat]:
        names = [label(member) for member in formats]
        if len(set(names)) < len(names):
            raise ValueError(f"a format stands twice in {names}")
        if unfit := [member.kind for member in formats if member.weight_bits >= 16]:
            raise ValueError(f"{unfit[0]} is no format of one layer: name plain formats")
        if odd := [member.kind for member in formats if not member.trainable]:
            raise ValueError(f"{odd[0]} is not searched among others: quantize the model in it")
        if any(member.kv_cache != "none" for member in formats):
            raise ValueError("the cache has one format in all layers: set kv_cache of mixed itself")
        return formats

    @model_validator(mode="after")
    def _the_budget_can_be_met(self) -> Self:
        least = min(member.weight_bits for member in self.formats)
        if self.effective_bits < least:
            raise ValueError(
                f"effective_bits {self.effective_bits:g} is below the {least:g} bits of the "
                "smallest format: raise it, or add a smaller format"
            )
        return self

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        if shape.experts:
            return ["mixed does not choose among experts; quantize the model in one format"]
        return [problem for member in self.formats for problem in member.check(shape)]

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class: nothing is quantized before the search."""
        return {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}

    def restored_config(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class."""
        members = {label(member): member.modelopt_config()["quant_cfg"] for member in self.formats}
        config = self.modelopt_config()
        for module, name in kept["chosen"].items():
            entries = [] if name == UNQUANTIZED else members[name]
            config["quant_cfg"] += [
                {**entry, "quantizer_name": f"{module}.{quantizer}"}
                for quantizer in _QUANTIZERS
                for entry in entries
                if entry["quantizer_name"] == f"*{quantizer}"
            ]
        return config

    def bits(self, name: str) -> float:
        """Bits per weight of the member labelled ``name``, or of a layer left as it is."""
        bits: dict[str, float] = {label(member): member.weight_bits for member in self.formats}
        return bits.get(name, 16.0)
