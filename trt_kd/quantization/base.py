"""What every quantization format says of itself, without torch and without a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import Plugin
from trt_kd.quantization.modelopt import modelopt


class QuantizationFormat(Plugin, ABC):
    """A number format for weights and activations, and the algorithm that sets its scales."""

    export_kl_limit_nats: ClassVar[float]
    """What an export may add to twice the KL of quantization itself, in mean nats per token."""
    weight_error_limit: ClassVar[float | None]
    """Largest relative Frobenius error of an exported weight; None: weights are not compared."""
    weight_bits: ClassVar[float]
    """Bits of a weight, scales not counted; 16 where the format chooses for every layer."""

    trainable: ClassVar[bool] = True
    """Whether the scales of its weights can be taken anew from trained ones."""

    kv_cache: Literal["none", "fp8"] = "none"
    """Key-value cache in the model's own type, or in FP8 E4M3 with one static scale for the keys
    and one for the values of a layer, which come from the calibration text."""

    @field_validator("kv_cache", mode="before")
    @classmethod
    def _no_cache_of_four_bits(cls, value: object) -> object:
        if value == "nvfp4":
            raise ValueError(
                "Model Optimizer simulates an NVFP4 cache with CUDA kernels only, and no export "
                "of one can be read back here: choose fp8"
            )
        return value

    @abstractmethod
    def check(self, shape: ModelShape) -> list[str]:
        """Problems of this format with a model of ``shape``, as text; empty if it fits."""

    @abstractmethod
    def modelopt_config(self) -> dict[str, Any]:
        """Settings for ``modelopt.torch.quantization.quantize``; a copy, safe to change.

        They speak of the projections; those of the cache come from ``cache_settings``.

        Raises:
            MissingDependencyError: if Model Optimizer is not installed.
        """

    def cache_settings(self) -> list[dict[str, Any]]:
        """Settings of the quantizers of keys and values; empty where ``kv_cache`` is ``none``.

        Raises:
            MissingDependencyError: if Model Optimizer is not installed.
        """
        if self.kv_cache == "none":
            return []
        settings: list[dict[str, Any]] = preset("FP8_KV_CFG")["quant_cfg"]
        return [entry for entry in settings if entry["quantizer_name"] != "*"]

    def outside(self) -> dict[str, str]:
        """Fingerprints of what the settings name but do not hold."""
        return {}

    def kept(self) -> dict[str, Any]:
        """What is kept with a calibrated model beside the settings; JSON."""
        return {}

    def restored_config(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that insert the quantizers of a calibrated model, to be filled with its scales.

        ``kept`` is what ``calibrate`` returned.
        """
        return self.modelopt_config() | {"algorithm": None}


def in_features(shape: ModelShape) -> dict[str, int]:
    """Input width of every kind of quantized projection."""
    found = {
        "q_proj, k_proj, v_proj, gate_proj, up_proj": shape.hidden,
        "o_proj": shape.heads * shape.head_dim,
        "down_proj": shape.ffn,
    }
    return found | ({"the experts' down_proj": shape.expert_ffn} if shape.experts else {})


def alignment_problems(shape: ModelShape, multiple: int, *, why: str) -> list[str]:
    """Name every input width of ``shape`` that is no multiple of ``multiple``."""
    return [
        f"the input width {width} of {name} is no multiple of {multiple}, {why}"
        for name, width in in_features(shape).items()
        if width % multiple
    ]


def preset(name: str) -> dict[str, Any]:
    """Deep copy of Model Optimizer's preset ``name``."""
    from copy import deepcopy

    mtq = modelopt("quantization")
    config: dict[str, Any] = deepcopy(getattr(mtq, name))
    return config


def label(quantization: QuantizationFormat) -> str:
    """Name of a format with the options that are not its defaults."""
    given = quantization.model_dump(exclude_defaults=True, exclude={"kind"})
    return " ".join([quantization.kind, *(f"{key}={value}" for key, value in given.items())])
