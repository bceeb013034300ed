"""Run ONNX Runtime GenAI's model builder: faster, and under an older transformers than it expects.

The builder of version 0.18 imports classes of the newest models at its top and so refuses
transformers 4.57 altogether. Classes that are absent are stood in for here; none of them is used
for the model types that are exported.

Its search for 4-bit weights (k-quant) passes over a whole matrix some two hundred times on one
core. Groups of weights do not know of each other, so here some groups at a time, which stay in the
core's cache, are searched on every core. The result is the same, bit for bit.

Run as a script, with the builder's own arguments.
"""

import importlib
import os
import re
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ABSENT = re.compile(r"cannot import name '(\w+)' from 'transformers'")
_SEARCH_MODULE = "onnxruntime.quantization.neural_compressor.weight_only"
_SEARCH = "quant_tensor_k_quant_cpu"
_WEIGHTS_AT_ONCE = 1 << 17
"""Half a megabyte in float32; the search holds about six tensors of that size."""

Search = Callable[..., tuple[NDArray[Any], ...]]


def run(module: str, added: frozenset[str] = frozenset()) -> None:
    """Run ``module`` as a program; add to transformers, one by one, the classes it lacks.

    Raises:
        ImportError: if anything else is missing.
    """
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        absent = _ABSENT.match(str(error))
        if absent is None or absent[1] in added:
            raise
        transformers: Any = importlib.import_module("transformers")
        setattr(transformers, absent[1], type(absent[1], (), {}))
    else:
        return
    run(module, added | {absent[1]})


def in_parallel(search: Search) -> Search:
    """``search`` for quantized weights, scales and zero points, some groups of weights at a time.

    It takes weights, bits and the size of a group, and must treat every group by itself.
    """

    def searched(
        data: NDArray[Any], num_bits: int = 4, group_size: int = 32
    ) -> tuple[NDArray[Any], ...]:
        groups = np.reshape(data, (-1, group_size))
        parts = np.array_split(groups, -(-groups.size // _WEIGHTS_AT_ONCE))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda part: search(part, num_bits, group_size), parts)
            return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))

    return searched


if __name__ == "__main__":
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # a third of the start, never used
    sys.path.pop(0)  # the folder of this file, whose modules must not stand in for others
    quantizer = importlib.import_module(_SEARCH_MODULE)
    setattr(quantizer, _SEARCH, in_parallel(getattr(quantizer, _SEARCH)))
    run("onnxruntime_genai.models.builder")
