"""ONNX Runtime GenAI: what ``onnxruntime_genai.models.builder`` writes.

Two properties of the runtime (0.18) that this file works around:

- Rows of a batch that end in ``pad_token_id`` lose those positions, and every logit after them
  is wrong. A column of another token is appended and its logits are dropped, which causal
  attention makes exact.
- Rows stop at end-of-text unless ``min_length`` forbids it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from trt_kd.backends.base import Backend, Session, rectangle
from trt_kd.backends.widened_graph import has_bfloat16, widen
from trt_kd.errors import ModelError
from trt_kd.measuring.roofline import DecodeWork
from trt_kd.optional import require

_CONFIG = "genai_config.json"
_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")


class OrtGenai(Backend):
    """ONNX Runtime GenAI on the provider the export was built for, or its graph on the CPU."""

    kind: Literal["ort-genai"] = "ort-genai"
    provider: Literal["own", "cpu"] = "own"
    """``cpu`` runs a graph built for a GPU on the CPU, bfloat16 widened to float32: what it
    computes can be read, how fast it is cannot."""

    def load(self, directory: Path) -> "OrtGenaiSession":
        """See the base class."""
        require("onnxruntime_genai", extra="onnx")
        settings = genai_config(directory)
        with ExitStack() as stack:
            place = directory
            if self.provider == "cpu" and has_bfloat16(directory / settings["decoder"]["filename"]):
                place = Path(stack.enter_context(TemporaryDirectory(prefix="widened-")))
                shutil.copyfile(directory / _CONFIG, place / _CONFIG)
                for path in directory.glob("tokenizer*"):
                    shutil.copyfile(path, place / path.name)
                name = settings["decoder"]["filename"]
                widen(directory / name, place / name)
            model = self._model(directory, place)
            return OrtGenaiSession(model, settings, stack.pop_all())

    def _model(self, directory: Path, place: Path) -> Any:
        """Load the export ``directory`` from ``place``."""
        genai = require("onnxruntime_genai", extra="onnx")
        try:
            config = genai.Config(str(place))
            if self.provider == "cpu":
                config.clear_providers()
            if self.threads is not None:
                options = {"intra_op_num_threads": self.threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            return genai.Model(config)
        except RuntimeError as error:  # the only class this runtime raises
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{directory} cannot be loaded by ONNX Runtime GenAI: {reason}",
                hint="export the model again, or load it where the provider is that it was built "
                "for",
            ) from error

    def decode_work(self, directory: Path) -> DecodeWork:
        """See the base class: the weights of the graph's matrix products."""
        decoder = genai_config(directory)["decoder"]
        weight_bytes, weights = _products(directory / decoder["filename"])
        heads = decoder["num_hidden_layers"] * decoder["num_attention_heads"]
        head = genai_config(directory)["vocab_size"] * decoder["hidden_size"]
        kv_values = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
        return DecodeWork(
            weight_bytes=weight_bytes,
            weights=weights,
            kv_bytes_per_token=_cache_bytes(directory / decoder["filename"])
            * kv_values
            * decoder["head_size"],
            head_weights=min(head, weights),
            attention_channels=0 if "sliding_window" in decoder else heads * decoder["head_size"],
        )


def _products(path: Path) -> tuple[int, int]:
    """Bytes and count of the weights in matrix products; external data is not read."""
    onnx = require("onnx", extra="onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    read: dict[str, Any] = {}
    weights = 0
    for node in graph.node:
        if node.op_type in _PRODUCTS:
            inputs = [stored[name] for name in node.input if name in stored]
            read |= {tensor.name: tensor for tensor in inputs}
            sizes = {item.name: item.i for item in node.attribute if item.name in ("K", "N")}
            weights += prod(sizes.values()) if sizes else sum(prod(t.dims) for t in inputs)
    size = sum(_bytes(tensor.data_type, prod(tensor.dims)) for tensor in read.values())
    return size, weights


def _cache_bytes(path: Path) -> float:
    """Bytes of a number in the key-value cache."""
    onnx = require("onnx", extra="onnx")
    outputs = onnx.load(str(path), load_external_data=False).graph.output
    types = [o.type.tensor_type.elem_type for o in outputs if o.name.startswith("present")]
    return float(_bytes(types[0], 1)) if types else 4.0


def _bytes(data_type: int, count: int) -> int:
    onnx = require("onnx", extra="onnx")
    packed = "INT4" in onnx.TensorProto.DataType.Name(data_type)
    size = int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    return count // 2 if packed else count * size


class OrtGenaiSession(Session):
    """A loaded ``onnxruntime_genai.Model``."""

    def __init__(self, model: Any, settings: dict[str, Any], files: ExitStack) -> None:
        self._model: Any = model
        self._files = files
        self.vocab_size = int(settings["vocab_size"])
        self._context = int(settings["context_length"])
        self._filler = 1 if settings.get("pad_token_id") == 0 else 0

    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """See the base class."""
        batch, length = tokens_BL.shape
        self._check(tokens_BL)
        filler_B1 = np.full((batch, 1), self._filler)
        generator = self._generator(batch, length + 1, min_length=0)
        generator.append_tokens(np.concatenate([tokens_BL, filler_B1], axis=1).astype(np.int32))
        result: np.ndarray = generator.get_output("logits")[:, :-1]
        return result.astype(np.float32, copy=False)

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """See the base class."""
        tokens_BL = rectangle(prompts)
        batch, length = tokens_BL.shape
        self._check(tokens_BL)
        total = length + new_tokens
        generator = self._generator(batch, total, min_length=total)
        generator.append_tokens(tokens_BL.astype(np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield

    def close(self) -> None:
        """See the base class."""
        self._model = None
        self._files.close()

    def _generator(self, batch: int, max_length: int, *, min_length: int) -> Any:
        """Return a new generator; its key-value cache holds ``max_length`` tokens per row."""
        if self._model is None:
            raise ValueError("the session is closed")
        if max_length > self._context:
            raise ModelError(
                f"{max_length} tokens exceed the model's context of {self._context}",
                hint="ask for fewer input or output tokens",
            )
        genai = require("onnxruntime_genai", extra="onnx")
        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=batch, max_length=max_length, min_length=min_length, do_sample=False
        )
        return genai.Generator(self._model, params)

    def _check(self, tokens_BL: np.ndarray) -> None:
        """Refuse what the runtime would read as another token or answer with a log line."""
        low, high = int(tokens_BL.min()), int(tokens_BL.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids run from {low} to {high}, vocabulary {self.vocab_size}")


def genai_config(directory: Path) -> dict[str, Any]:
    """Part ``model`` of the export's ``genai_config.json``.

    Raises:
        ModelError: if it is absent, damaged or lacks a size.
    """
    path = directory / _CONFIG
    hint = "export the model again"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        for name in ("vocab_size", "context_length"):
            int(model[name])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no configuration of a decoder: {error}", hint=hint) from error
    return dict(model)
