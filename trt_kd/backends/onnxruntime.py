"""ONNX Runtime on an ONNX step with its key-value cache as inputs and outputs.

Shape suffixes: B sequences, L positions, T positions so far, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trt_kd.architectures.shape import read_shape
from trt_kd.backends.base import Backend, Session, rectangle, work_of
from trt_kd.checkpoints import read_json
from trt_kd.errors import ModelError
from trt_kd.measuring.roofline import DecodeWork
from trt_kd.optional import require

GRAPH = "model.onnx"
_BYTES = {"INT8": 1.0, "INT4": 0.5, "FLOAT8E4M3FN": 4.0}
"""Bytes of a weight that a step reads, by the type it is stored in; FP8 is widened on loading."""
_PROVIDERS = ["CPUExecutionProvider"]
_REFUSALS = (
    "EPFail",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)


class OnnxRuntime(Backend):
    """ONNX Runtime on a CPU, the cache carried from step to step without a copy."""

    kind: Literal["onnxruntime"] = "onnxruntime"

    def load(self, directory: Path) -> "OnnxRuntimeSession":
        """See the base class."""
        runtime = require("onnxruntime", extra="onnx")
        config = read_json(directory / "config.json")
        options = runtime.SessionOptions()
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        state = runtime.capi.onnxruntime_pybind11_state
        unreadable = require("google.protobuf.message", extra="onnx").DecodeError
        refusals = (unreadable, *(getattr(state, name) for name in _REFUSALS))
        try:
            for key, value in _entries(directory / GRAPH).items():
                options.add_session_config_entry(key, value)
            loaded = runtime.InferenceSession(
                str(directory / GRAPH), sess_options=options, providers=_PROVIDERS
            )
        except refusals as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(
                f"{directory} cannot be loaded by ONNX Runtime: {reason}",
                hint="export the model again",
            ) from error
        return OnnxRuntimeSession(loaded, config.get("max_position_embeddings"))

    def decode_work(self, directory: Path) -> DecodeWork:
        """See the base class; on a CPU the runtime widens 16-bit and FP8 weights to float32."""
        work = work_of(read_shape(directory), weight_bytes=4, kv_bytes=4)
        stored = _low_bit_weights(directory / GRAPH)
        saved = sum(int(count * (4 - _BYTES[kind])) for kind, count in stored.items())
        return replace(work, weight_bytes=work.weight_bytes - saved)


def _entries(graph: Path) -> dict[str, str]:
    """Session settings under which products are computed as the graph says.

    By default a product with INT4 weights rounds its input to INT8, and one of FP8 numbers becomes
    an operator that then refuses them.
    """
    found = {"session.qdq_matmulnbits_accuracy_level": "1"}
    if graph.is_file() and "FLOAT8E4M3FN" in _low_bit_weights(graph):
        found["session.disable_quant_qdq"] = "1"
    return found


def _low_bit_weights(path: Path) -> dict[str, int]:
    """Count of the weights in every low-bit type of a graph; external data is not read."""
    onnx = require("onnx", extra="onnx")
    counts: dict[str, int] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind in _BYTES and len(tensor.dims) > 1:
            counts[kind] = counts.get(kind, 0) + prod(tensor.dims)
    return counts


class OnnxRuntimeSession(Session):
    """A loaded ``onnxruntime.InferenceSession``."""

    def __init__(self, model: Any, context: int | None) -> None:
        self._model: Any = model
        self._context = context
        self._cache = {i.name: i for i in model.get_inputs() if i.name.startswith("past_key_")}
        self._outputs = [output.name for output in model.get_outputs()]
        self.vocab_size = int(model.get_outputs()[0].shape[-1])

    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """See the base class.

        The second half runs on the cache of the first: what is compared is what will decode.
        """
        self._check(tokens_BL, tokens_BL.shape[1])
        cache = self._empty(len(tokens_BL))
        real_BL = np.ones_like(tokens_BL, dtype=np.int64)
        half = (tokens_BL.shape[1] + 1) // 2
        parts = []
        for start in range(0, tokens_BL.shape[1], half):
            stop = start + half
            part, cache = self._step(tokens_BL[:, start:stop], real_BL[:, :stop], cache)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """See the base class."""
        tokens_BL = rectangle(prompts)
        for _ in self._decoded(tokens_BL, np.ones_like(tokens_BL), new_tokens):
            yield

    def generate(self, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
        """Greedy continuation ``[B, new_tokens]`` of prompts of any lengths, padded on the left.

        Raises:
            ValueError: if there is no prompt or one is empty.
        """
        if not prompts or not all(prompts):
            raise ValueError("prompts must not be empty")
        length = max(map(len, prompts))
        tokens_BL = np.zeros((len(prompts), length), dtype=np.int64)
        real_BL = np.zeros_like(tokens_BL)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, length - len(prompt) :] = prompt
            real_BL[row, length - len(prompt) :] = 1
        return np.stack(list(self._decoded(tokens_BL, real_BL, new_tokens)), axis=1)

    def close(self) -> None:
        """See the base class."""
        self._model = None

    def _decoded(
        self, tokens_BL: np.ndarray, real_BT: np.ndarray, new_tokens: int
    ) -> Iterator[np.ndarray]:
        """Yield the next token ``[B]`` of every sequence, step by step."""
        self._check(tokens_BL, tokens_BL.shape[1] + new_tokens)
        cache = self._empty(len(tokens_BL))
        for _ in range(new_tokens):
            logits_BLV, cache = self._step(tokens_BL, real_BT, cache)
            next_B = logits_BLV[:, -1].argmax(-1)
            yield next_B
            tokens_BL = next_B[:, None]
            real_BT = np.concatenate([real_BT, np.ones_like(tokens_BL)], axis=1)

    def _step(
        self, tokens_BL: np.ndarray, real_BT: np.ndarray, cache: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits ``[B, L, V]`` of the new positions, and the longer cache."""
        value = require("onnxruntime", extra="onnx").OrtValue.ortvalue_from_numpy
        positions_BT = np.maximum(real_BT.cumsum(1) - 1, 0)
        flat = {
            "input_ids": tokens_BL,
            "attention_mask": real_BT,
            "position_ids": positions_BT[:, -tokens_BL.shape[1] :],
        }
        feed = {name: value(np.ascontiguousarray(array)) for name, array in flat.items()}
        logits, *present = self._model.run_with_ort_values(self._outputs, feed | cache)
        return logits.numpy(), dict(zip(self._cache, present, strict=True))

    def _empty(self, batch: int) -> dict[str, Any]:
        """Return a cache without a position."""
        value = require("onnxruntime", extra="onnx").OrtValue.ortvalue_from_numpy
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: value(np.zeros((batch, item.shape[1], 0, item.shape[3]), dtypes[item.type]))
            for name, item in self._cache.items()
        }

    def _check(self, tokens_BL: np.ndarray, length: int) -> None:
        """Refuse what the graph would answer with nonsense."""
        if self._model is None:
            raise ValueError("the session is closed")
        if self._context is not None and length > self._context:
            raise ModelError(
                f"{length} tokens exceed the model's context of {self._context}",
                hint="ask for fewer input or output tokens",
            )
        low, high = int(tokens_BL.min()), int(tokens_BL.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids run from {low} to {high}, vocabulary {self.vocab_size}")
