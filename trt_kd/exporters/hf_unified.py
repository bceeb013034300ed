"""The unified Hugging Face checkpoint that TensorRT-LLM, vLLM and SGLang load.

Model Optimizer writes it; what it is known to get wrong is repaired here: rope in one spelling
only, a tokenizer class that transformers 4.57 does not know, a changed generation configuration.
So ``config.json`` is the source's plus the quantization block, and the tokenizer the source's
byte for byte.
"""

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.environment import installed
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import copy_tokenizer, make_portable, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.hf_unified_files import (
    CACHE_ALGORITHMS,
    HF_QUANT_CONFIG,
    MIXED,
    QUANT_CFG,
    read_quantization,
    weight_share_by_bits,
)
from trt_kd.exporters.trtllm_commands import SERVED, write_serving
from trt_kd.quantization.base import QuantizationFormat

_OF_EXPERTS = ("fp8", "fp8_per_channel_per_token", "int8", "int8_smoothquant")


class HfUnified(Exporter):
    """A Hugging Face directory with low-bit weights and scales, or a plain copy of a checkpoint."""

    kind: Literal["hf-unified"] = "hf-unified"
    backend: ClassVar[str] = "hf-unified"

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        if source_kind not in ("checkpoint", "quantized"):
            return [f"hf-unified takes a checkpoint or a quantized model, not a {source_kind}"]
        return []

    def check_format(self, shape: ModelShape, quantization: QuantizationFormat) -> list[str]:
        """See the base class: experts come in the formats that are tested here.

        Where transformers 5 keeps them in two tensors, Model Optimizer smooths none of them and
        does not export INT4 AWQ.
        """
        kind, version = quantization.kind, installed("transformers")
        if not shape.experts or kind in _OF_EXPERTS:
            return []
        if kind != "int4_awq":
            return [f"experts in {kind} are not exported; choose one of {', '.join(_OF_EXPERTS)}"]
        if version is None or version.startswith("4."):
            return []
        reason = "Model Optimizer exports experts in int4_awq only under transformers 4"
        return [f"{reason}, installed is {version}: quantize and export there, or choose fp8"]

    def check_source(self, source: Artifact) -> list[str]:
        """See the base class: the number format of a quantized source."""
        if source.manifest.kind != "quantized":
            return []
        from trt_kd.quantization.storage import format_of

        return self.check_format(read_shape(source.path), format_of(source))

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class."""
        if source.manifest.kind == "checkpoint":
            for name in source.manifest.files:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.path / name, out / name)
        else:
            _export_quantized(source.path, out)
        make_portable(out)
        _repeat_layer_formats(out)
        quantization = read_quantization(out)
        algorithm = quantization.algorithm if quantization else None
        layers = (quantization.layers if quantization else None) or {}
        unserved = sorted({layer.algorithm for layer in layers.values()} - set(SERVED))
        write_serving(out, read_json(out / "config.json"), next(iter(unserved), algorithm))
        shares = weight_share_by_bits(out)
        return {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": quantization.kv_cache if quantization else None,
            "weight_share_by_bits": shares,
            "realised_low_bit_share": sum(shares[bits] for bits in shares if int(bits) <= 8),
        }

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: configuration, tensors and dequantized weights against the source."""
        from trt_kd.exporters.hf_unified_check import problems

        if source.manifest.kind == "checkpoint":
            return problems(source.path, out, weight_error_limit=None)
        from trt_kd.quantization.storage import format_of

        quantization = format_of(source)
        found = problems(source.path, out, weight_error_limit=quantization.weight_error_limit)
        return found or _cache_problems(quantization, out)

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class: a copy may not stray; a quantized model may by its own rounding.

        The export rounds some weights and activations to the other neighbour, and later layers
        carry that on. Two independent roundings are twice as far (in KL) from each other as one
        is from the source, and that is known from quantization.
        """
        if source.manifest.kind == "checkpoint":
            return 1e-6
        from trt_kd.quantization.storage import format_of

        rounding = source.metrics.get("kl_to_source_nats")
        allowed = 2 * rounding if isinstance(rounding, float) else 0.0
        return format_of(source).export_kl_limit_nats + allowed


def _cache_problems(quantization: QuantizationFormat, out: Path) -> list[str]:
    """A format of the cache that was not asked for; a recipe's own is known by its scales alone."""
    told = read_quantization(out)
    cache = told.kv_cache if told else None
    asked = CACHE_ALGORITHMS[quantization.kv_cache]
    if cache == asked or quantization.kind == "recipe":
        return []
    return [f"the key-value cache is said to be in {cache}, asked for was {asked}"]


def _repeat_layer_formats(out: Path) -> None:
    """Write what ``hf_quant_config.json`` says of single layers where TensorRT-LLM 1.2 reads it."""
    path = out / HF_QUANT_CONFIG
    if not path.is_file():
        return
    settings = read_json(path).get("quantization", {})
    if settings.get("quant_algo") == MIXED:
        text = json.dumps(settings, indent=2) + "\n"
        (out / QUANT_CFG).write_text(text, encoding="utf-8")


def _export_quantized(source: Path, out: Path) -> None:
    from trt_kd.quantization.modelopt import modelopt, quiet
    from trt_kd.quantization.storage import load_quantized

    export = modelopt("export")
    model = load_quantized(source)
    try:
        with quiet():
            export.export_hf_checkpoint(model, export_dir=out)
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"Model Optimizer cannot export {source}: {reason}") from error
    config = read_json(source / "config.json")
    config["quantization_config"] = read_json(out / "config.json").get("quantization_config")
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    copy_tokenizer(source, out)
