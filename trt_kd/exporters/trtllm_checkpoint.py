"""Checkpoints of TensorRT-LLM up to 1.2, which ``trtllm-build`` turns into engines.

Written here and not by Model Optimizer, whose exporter is deprecated and wrong with transformers
5: it drops the rotary base and scaling, the settings of Qwen and the tie of the embeddings, and
splits heads over ranks that do not divide them.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PositiveInt

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import copy_tokenizer, portable_config, read_json, stored_dtype
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.hf_unified_files import CACHE_ALGORITHMS
from trt_kd.exporters.trtllm_layout import (
    ALGORITHMS,
    Ranks,
    block_problems,
    checkpoint_config,
    config_problems,
    padded_ffn,
    rank_problems,
    shape_problems,
)
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.int4 import Int4Awq

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ("generation_config.json",)
HF_CONFIG = "hf_config.json"
"""The source's ``config.json``, which TensorRT-LLM's tools want beside the tokenizer."""
_SIXTEEN_BITS = "INT4 codes are multiplied in 16 bits: set dtype=bfloat16 or dtype=float16"
_CAST_KL_NATS = 0.02
"""What rounding float32 weights, or Gemma's 1 + w, to 16 bits may cost, mean nats per token."""


class TrtllmCheckpoint(Exporter):
    """A checkpoint for ``trtllm-build`` of TensorRT-LLM 1.2, unquantized, FP8, INT8 or INT4."""

    kind: Literal["trtllm-checkpoint"] = "trtllm-checkpoint"
    backend: ClassVar[str] = "trtllm-checkpoint"

    tensor_parallel: PositiveInt = 1
    """GPUs that share every layer; heads, key-value heads and MLP channels must split over them."""
    pipeline_parallel: PositiveInt = 1
    """GPUs that take the layers in turn; their number must divide the layers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of all that is not quantized; ``auto`` keeps the source's."""

    @property
    def ranks(self) -> Ranks:
        """How the model is split."""
        return Ranks(self.tensor_parallel, self.pipeline_parallel)

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        if source_kind not in ("checkpoint", "quantized"):
            return [f"{self.kind} takes a checkpoint or a quantized model, not a {source_kind}"]
        if found := shape_problems(shape):
            return found
        return rank_problems(shape, self.ranks, low_bit=source_kind == "quantized")

    def check_format(self, shape: ModelShape, quantization: QuantizationFormat) -> list[str]:
        """See the base class: whether the format is defined, and its blocks fit the ranks."""
        if quantization.kind not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            return [
                f"format {quantization.kind} is not written by {self.kind}; those that are: {known}"
            ]
        if (block := _block(quantization)) is None:
            return []
        found = block_problems(shape, self.ranks, block)
        return found + ([_SIXTEEN_BITS] if self.dtype == "float32" else [])

    def check_source(self, source: Artifact) -> list[str]:
        """See the base class: rope, activation and the number format."""
        found = config_problems(portable_config(read_json(source.path / "config.json")))
        dtype = self.dtype_of(source)
        if source.manifest.kind == "quantized":
            quantization = _format(source)
            found += self.check_format(read_shape(source.path), quantization)
            if self.dtype == "auto" and dtype == "float32" and _block(quantization):
                found.append(_SIXTEEN_BITS)
        if dtype not in ("float32", "bfloat16", "float16"):
            found.append(f"weights in {dtype} are not written: set dtype=bfloat16")
        return found

    def dtype_of(self, source: Artifact) -> str:
        """Name of the torch dtype of what is not quantized."""
        return stored_dtype(source.path) if self.dtype == "auto" else self.dtype

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class."""
        if found := self.check_source(source):
            raise ModelError(f"{source.path} cannot go to {self.kind}: {found[0]}")
        config = portable_config(read_json(source.path / "config.json"))
        shape, channels = read_shape(source.path), self._channels(source)
        told = _told(source)
        quantization: dict[str, Any] = dict(told)
        if told["quant_algo"]:
            quantization["exclude_modules"] = ["lm_head"]
        if "group_size" in told:
            quantization |= {"has_zero_point": False, "pre_quant_scale": True}
        dtype = self.dtype_of(source)
        written = checkpoint_config(
            config,
            shape.with_sizes(ffn=channels),
            self.ranks,
            dtype=dtype,
            quantization=quantization,
        )
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
        self._write_weights(source, out, written)
        keep_companions(source.path, out)
        from trt_kd.exporters.hf_unified_files import weight_share_by_bits
        from trt_kd.exporters.trtllm_check import low_bit_share

        return {
            **told,
            "ranks": self.ranks.world,
            "mlp_channels_added": channels - shape.ffn,
            "weight_share_by_bits": weight_share_by_bits(out),
            "realised_low_bit_share": low_bit_share(out),
        }

    def _channels(self, source: Artifact) -> int:
        """MLP channels of the checkpoint."""
        low_bit, block = source.manifest.kind == "quantized", _told(source).get("group_size")
        return padded_ffn(read_shape(source.path), self.ranks, low_bit=low_bit, block=block)

    def _write_weights(self, source: Artifact, out: Path, written: dict[str, Any]) -> None:
        import torch

        from trt_kd.exporters.hf_unified_files import open_tensors
        from trt_kd.exporters.trtllm_padding import PaddedMlp
        from trt_kd.exporters.trtllm_writer import Source, write_ranks
        from trt_kd.quantization.storage import QUANTIZERS

        quantization, shape = written["quantization"], read_shape(source.path)
        more = written["intermediate_size"] - shape.ffn
        with ExitStack() as stack:
            weights = stack.enter_context(open_tensors(source.path, leave_out=QUANTIZERS))
            calibrated: Mapping[str, Tensor] = {}
            if quantization["quant_algo"]:
                calibrated = stack.enter_context(open_tensors(source.path, only=QUANTIZERS))
            place = Source(
                shape=shape.with_sizes(ffn=written["intermediate_size"]),
                ranks=self.ranks,
                dtype=getattr(torch, written["dtype"]),
                algorithm=quantization["quant_algo"],
                block=quantization.get("group_size"),
                kv_cache=quantization["kv_cache_quant_algo"] is not None,
                weights=PaddedMlp(weights, shape.ffn, more),
                quantizers=PaddedMlp(calibrated, shape.ffn, more),
            )
            write_ranks(place, out)

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: config, headers, weights, scales and companions."""
        from trt_kd.exporters.trtllm_check import problems

        limit = None
        if source.manifest.kind == "quantized":
            limit = _format(source).weight_error_limit
        promised = {
            "dtype": self.dtype_of(source),
            "group_size": None,
            **_told(source),
            "tp_size": self.tensor_parallel,
            "pp_size": self.pipeline_parallel,
            "intermediate_size": self._channels(source),
        }
        return problems(source, out, promised, limit)

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class: as for hf-unified, and what rounding to 16 bits may cost."""
        dtype, stored = self.dtype_of(source), stored_dtype(source.path)
        gemma = read_shape(source.path).model_type == "gemma2" and dtype != "float32"
        cast = _CAST_KL_NATS if gemma or dtype not in (stored, "float32") else 0.0
        if source.manifest.kind == "checkpoint":
            return 1e-6 + cast
        rounding = source.metrics.get("kl_to_source_nats")
        allowed = 2 * rounding if isinstance(rounding, float) else 0.0
        return _format(source).export_kl_limit_nats + allowed + cast


def keep_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer and the generation settings, which a checkpoint itself does not hold."""
    copy_tokenizer(source, out)
    shutil.copyfile(source / "config.json", out / HF_CONFIG)
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _format(source: Artifact) -> QuantizationFormat:
    from trt_kd.quantization.storage import format_of

    return format_of(source)


def _block(quantization: QuantizationFormat) -> int | None:
    """Weights along the input that share a scale, where they come in blocks."""
    return quantization.block_size if isinstance(quantization, Int4Awq) else None


def _told(source: Artifact) -> dict[str, Any]:
    """What ``config.json`` says of the number format of ``source``."""
    if source.manifest.kind == "checkpoint":
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    quantization = _format(source)
    block = _block(quantization)
    return {
        "quant_algo": ALGORITHMS[quantization.kind],
        "kv_cache_quant_algo": CACHE_ALGORITHMS[quantization.kv_cache],
        **({"group_size": block} if block else {}),
    }
