"""ONNX Runtime GenAI: its own model builder, run apart, and its output put right.

The builder adds the tokenizer's end-of-turn token to the end-of-text tokens and rewrites the
tokenizer; both are restored from the source.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.environment import environment
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import copy_tokenizer, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.optional import require

if TYPE_CHECKING:
    from trt_kd.backends.base import Backend

log = logging.getLogger(__name__)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose export by the builder is checked here."""

Provider = Literal["cpu", "cuda", "trt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Algorithm = Literal["k_quant_mixed", "k_quant", "rtn_mixed", "rtn", "default"]
_MIXED = ("k_quant_mixed", "rtn_mixed")
_ROUNDED = [
    "rtn",
    "is_symmetric=false",
    "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8",
]
"""Rounds to nearest in the layout of ``k_quant_mixed``: zero points, the same layers in 8 bits."""
_COSINE_ERROR = {"bf16": 8e-3}
"""Of tables in bfloat16; all others for a GPU are in float16."""
_FILES = ("model.onnx", "model.onnx.data", "genai_config.json")
_POSITIONS = (1, 7, 63)
_BUILDER = Path(__file__).with_name("genai_builder.py").resolve()


_PRECISIONS: Mapping[Provider, tuple[Precision, ...]] = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp16", "bf16", "int8", "int4"),
    "trt-rtx": ("fp16", "bf16"),
}
"""What each provider is given; the first is taken where a plain model is asked for."""
_NAMES: Mapping[Provider, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("cuda",),
    "trt-rtx": ("NvTensorRtRtx",),
}
"""Providers as ``genai_config.json`` names them; the CPU needs no name."""


class OrtGenai(Exporter):
    """ONNX Runtime GenAI: float32, float16 or bfloat16, or 8 and 4 bits in blocks of 32.

    On SmolLM2-135M the predictions move by 3e-11 nats (fp32), 0.016 (int8) and 0.19 (int4). With
    int8 the builder keeps a plain copy of the embedding; with int4 it shares the head's table.
    Exports for a GPU are read back on the CPU.
    """

    kind: Literal["ort-genai"] = "ort-genai"
    backend: ClassVar[str] = "ort-genai"

    provider: Provider = "cpu"
    """Where it will run: ``cpu``, ``cuda``, or ``trt-rtx`` for TensorRT for RTX inside ONNX
    Runtime, which compiles the graph when it loads it."""
    precision: Precision = "int4"
    """How matrix weights are stored: fp32, int8 or int4 for a CPU, whose activations stay in
    float32; fp16, bf16, int8 or int4 for CUDA, fp16 or bf16 for TensorRT for RTX."""
    int4_algorithm: Algorithm = "k_quant_mixed"
    """How 4-bit weights are chosen; the mixed ones keep the sensitive weights in 8 bits."""

    @model_validator(mode="after")
    def _no_idle_option(self) -> Self:
        if self.precision not in _PRECISIONS[self.provider]:
            known = ", ".join(_PRECISIONS[self.provider])
            raise ValueError(f"provider {self.provider} takes precision {known}")
        if self.precision != "int4" and self.int4_algorithm != "k_quant_mixed":
            raise ValueError(f"int4_algorithm has no effect on precision {self.precision}")
        return self

    @property
    def executed(self) -> bool:
        """See the base class: a GPU's export runs where one is."""
        return self.provider == "cpu" or environment()["gpu"] is not None

    def reader(self) -> "Backend":
        """See the base class: on the CPU, whatever it was built for."""
        from trt_kd.backends.ort_genai import OrtGenai as Reader

        return Reader(provider="own" if self.provider == "cpu" else "cpu")

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        problems = []
        if source_kind != "checkpoint":
            problems.append(
                f"ort-genai takes a plain checkpoint, not a {source_kind}: its builder quantizes "
                "by itself, and reads Model Optimizer's formats for CUDA only; drop the "
                "quantization or export to hf-unified"
            )
        if shape.model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            problems.append(
                f"ort-genai is not known to export {shape.model_type!r}; known: {known}"
            )
        # As in the catalogue of legal sizes: ONNX Runtime refuses 24, 40 and 72 when it runs.
        if shape.head_dim % 16:
            problems.append(f"ort-genai needs a head_dim that 16 divides, not {shape.head_dim}")
        return problems

    def check_source(self, source: Artifact) -> list[str]:
        """See the base class: a window that the runtime fails to read beyond."""
        config = read_json(source.path / "config.json")
        window, context = config.get("sliding_window"), config.get("max_position_embeddings")
        if config.get("model_type") != "mistral" or window is None or window >= (context or 0):
            return []
        reason = f"ort-genai fails beyond a mistral's sliding window, {window} of {context} tokens"
        return [f"{reason}: export to onnx or hf-unified"]

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class."""
        for module in ("onnxruntime_genai", "onnx_ir", "onnx"):
            require(module, extra="onnx")
        scratch = (out / "scratch").resolve()
        _builder_input(source, scratch / "source")
        _run(self._arguments(scratch / "source", out.resolve(), scratch), scratch)
        shutil.rmtree(scratch)
        copy_tokenizer(source.path, out)
        _restore_end_of_text(source.path, out)
        shares = self._shares(out)
        return {
            "realised_low_bit_share": sum(shares[bits] for bits in shares if bits <= 8),
            "weight_share_by_bits": {str(bits): shares[bits] for bits in sorted(shares)},
        }

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: settings, sizes, norms, rotation and the bits really used."""
        if missing := [name for name in _FILES if not (out / name).is_file()]:
            return [f"{missing[0]} is missing"]
        config = portable_config(read_json(source.path / "config.json"))
        written = read_json(out / "genai_config.json").get("model", {})
        found = _setting_problems(config, read_shape(source.path), written, source.path)
        found += self._provider_problems(written)
        tolerance = 1e-4 if self.provider == "cpu" else _COSINE_ERROR.get(self.precision, 1e-3)
        return found + _graph_problems(config, out, tolerance) + self._bit_problems(out)

    def rehearsal(self) -> Self:
        """Round to nearest: the search for better 4-bit weights takes half of an export."""
        mixed = self.precision == "int4" and self.int4_algorithm == "k_quant_mixed"
        return self.model_copy(update={"int4_algorithm": "rtn_mixed"} if mixed else {})

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class."""
        limits = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 0.02, "int8": 0.05, "int4": 0.5}
        return limits[self.precision]

    def _arguments(self, source: Path, out: Path, scratch: Path) -> list[str]:
        builder = [sys.executable, str(_BUILDER)]
        places = ["-i", str(source), "-o", str(out), "-c", str(scratch / "cache")]
        options = ["hf_token=false"]
        if self.precision == "int4":
            algorithm = _ROUNDED if self.int4_algorithm == "rtn_mixed" else [self.int4_algorithm]
            options += [f"algo_config={algorithm[0]}", *algorithm[1:]]
        provider = (*_NAMES[self.provider], "cpu")[0]
        given = ["-p", self.precision, "-e", provider, "--extra_options", *options]
        return [*builder, *places, *given]

    def _shares(self, out: Path) -> dict[int, float]:
        from trt_kd.exporters.onnx_graph import weights_by_bits

        counts = weights_by_bits(out / "model.onnx")
        total = sum(counts.values())
        return {bits: count / total for bits, count in counts.items()}

    def _provider_problems(self, written: dict[str, Any]) -> list[str]:
        """Another provider than was asked for in ``genai_config.json``."""
        session = written.get("decoder", {}).get("session_options", {})
        named = tuple(name for entry in session.get("provider_options", []) for name in entry)
        if named == _NAMES[self.provider]:
            return []
        return [f"genai_config.json: providers are {list(named)}, asked for was {self.provider}"]

    def _bit_problems(self, out: Path) -> list[str]:
        """Compare the bits asked for with the bits found: the builder ignores unknown options."""
        shares = self._shares(out)
        low = sum(share for bits, share in shares.items() if bits <= 8)
        told = ", ".join(f"{share:.0%} in {bits} bits" for bits, share in sorted(shares.items()))
        good = {
            "fp32": shares == {32: 1.0},
            "fp16": shares == {16: 1.0},
            "bf16": shares == {16: 1.0},
            "int8": low >= 0.5 and 4 not in shares,
            "int4": low >= 0.5 and shares.get(4, 0.0) > 0,
        }[self.precision]
        mixed = self.precision == "int4" and self.int4_algorithm in _MIXED
        if good and not (mixed and 8 not in shares):
            return []
        asked = f"int4 by {self.int4_algorithm}" if self.precision == "int4" else self.precision
        return [f"asked for {asked}, but weights are stored {told}"]


def _builder_input(source: Artifact, place: Path) -> None:
    """Make a view of the checkpoint that the builder reads under either transformers.

    Under 4.57 it stumbles over a ``rope_scaling`` that is null, so the rotation stands there too.
    """
    place.mkdir(parents=True)
    for name in source.manifest.files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to((source.path / name).resolve())
    config = portable_config(read_json(source.path / "config.json"))
    if config.get("rope_scaling") is None and isinstance(config.get("rope_parameters"), dict):
        config["rope_scaling"] = config["rope_parameters"]
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _run(arguments: list[str], scratch: Path) -> None:
    """Run the builder in ``scratch``, offline; its output goes to the log."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        arguments, cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        log.debug("builder: %s", line)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ModelError(
            f"the builder of ONNX Runtime GenAI failed with code {done.returncode}: {lines[-1]}",
            hint="run with more memory or disk, or choose another precision",
        )


def end_of_text(directory: Path) -> int | list[int] | None:
    """End-of-text tokens of a checkpoint: its generation configuration, else its own."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            found = read_json(directory / name).get("eos_token_id")
            if found is not None:
                return found  # type: ignore[no-any-return]
    return None


def _restore_end_of_text(source: Path, out: Path) -> None:
    path = out / "genai_config.json"
    settings = read_json(path)
    end = end_of_text(source)
    if end is not None:
        settings["model"]["eos_token_id"] = end
    path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _setting_problems(
    config: dict[str, Any], shape: ModelShape, written: dict[str, Any], source: Path
) -> list[str]:
    decoder = written.get("decoder", {})
    pairs = {
        "eos_token_id": (written.get("eos_token_id"), end_of_text(source)),
        "vocab_size": (written.get("vocab_size"), shape.vocab),
        "context_length": (
            written.get("context_length"),
            config.get("max_position_embeddings", written.get("context_length")),
        ),
        "head_size": (decoder.get("head_size"), shape.head_dim),
        "hidden_size": (decoder.get("hidden_size"), shape.hidden),
        "num_attention_heads": (decoder.get("num_attention_heads"), shape.heads),
        "num_key_value_heads": (decoder.get("num_key_value_heads"), shape.kv_heads),
        "num_hidden_layers": (decoder.get("num_hidden_layers"), shape.layers),
    }
    return [
        f"genai_config.json: {name} is {found}, source {expected}"
        for name, (found, expected) in pairs.items()
        if found != expected
    ]


def _graph_problems(config: dict[str, Any], out: Path, tolerance: float) -> list[str]:
    """Check the norms' epsilon, and the rotation where its table follows from rope_theta.

    ``tolerance`` is what storing a cosine may cost.
    """
    from trt_kd.exporters.onnx_graph import norm_epsilons, rope_cosines

    found = []
    expected = config.get("rms_norm_eps")
    epsilons = norm_epsilons(out / "model.onnx")
    if expected is not None and not all(np.isclose(e, expected, rtol=1e-5) for e in epsilons):
        found.append(f"model.onnx: norms have epsilon {sorted(epsilons)}, source {expected}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        return found
    positions = [p for p in _POSITIONS if p < int(config["max_position_embeddings"])]
    cosines = rope_cosines(out / "model.onnx", positions)
    if cosines is None:
        return found
    half = cosines.shape[1]
    frequencies = float(rope["rope_theta"]) ** (-np.arange(half) / half)
    if not np.allclose(cosines, np.cos(np.outer(positions, frequencies)), atol=tolerance):
        found.append(f"model.onnx: the rotation is not that of rope_theta {rope['rope_theta']}")
    return found
