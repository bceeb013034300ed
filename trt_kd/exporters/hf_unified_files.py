"""The files of a unified Hugging Face checkpoint: headers, tensors and quantization settings."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.checkpoints import check_weights, read_json
from trt_kd.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

HF_QUANT_CONFIG = "hf_quant_config.json"
QUANT_CFG = "quant_cfg.json"
"""Where TensorRT-LLM up to 1.2 looks for the formats of layers first."""
MIXED = "MIXED_PRECISION"
WEIGHT_TYPES = {
    "FP8": "F8_E4M3",
    "FP8_PER_CHANNEL_PER_TOKEN": "F8_E4M3",
    "fp8_pb_wo": "F8_E4M3",
    "W8A8_SQ_PER_CHANNEL": "I8",
    "W4A16_AWQ": "U8",
    "W4A8_AWQ": "U8",
}
"""Quantization algorithms that can be read back here, and how they store a weight."""
CACHE_ALGORITHMS = {"none": None, "fp8": "FP8"}
"""What a checkpoint calls the formats of the key-value cache."""
CACHE_SCALES = {"k_proj": "k_scale", "v_proj": "v_scale"}
"""Scales of an FP8 cache by the projection that they stand beside."""
_FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
_BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I8": 8, "U8": 4}
"""Bits of a weight by its type in a safetensors header; bytes hold two 4-bit codes."""
_SCALES = ("_scale", "_scale_2", "scaling_factor")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Layer:
    """What a checkpoint says of the quantization of one projection."""

    algorithm: str
    group_size: int | None
    """Weights along the input that share a scale; None where they do not come in groups."""


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its quantization."""

    algorithm: str
    excluded: tuple[str, ...]
    """Patterns of module names that are not quantized."""
    group_size: int | None = field(default=None, compare=False)
    """Weights along the input that share a scale, as ``hf_quant_config.json`` alone says."""
    layers: Mapping[str, Layer] | None = None
    """Every quantized projection by name, where each has an algorithm of its own."""
    kv_cache: str | None = None
    """Format of the key-value cache; None where it is the model's own."""

    def of(self, module: str) -> Layer | None:
        """How the projection ``module`` is quantized, if it is."""
        if self.layers is not None:
            return self.layers.get(module)
        if any(fnmatch(module, pattern) for pattern in self.excluded):
            return None
        return Layer(self.algorithm, self.group_size)


def read_quantization(directory: Path) -> Quantization | None:
    """Read both places that tell the quantization of the checkpoint; None if unquantized.

    TensorRT-LLM up to 1.2 reads ``hf_quant_config.json``, later versions and vLLM the block in
    ``config.json``.

    Raises:
        ModelError: if only one is there, they disagree, or the algorithm cannot be read back.
    """
    inline = read_json(directory / "config.json").get("quantization_config")
    path = directory / HF_QUANT_CONFIG
    if inline is None and not path.is_file():
        return None
    if inline is None or not path.is_file():
        missing = HF_QUANT_CONFIG if inline is not None else "quantization_config in config.json"
        raise ModelError(f"{directory} tells of its quantization in one place only: no {missing}")
    separate = read_json(path).get("quantization", {})
    found = _told(inline, "ignore")
    told = _told(separate, "exclude_modules")
    if found != told:
        raise ModelError(f"{directory}: config.json says {found}, {HF_QUANT_CONFIG} says {told}")
    used = {layer.algorithm for layer in (found.layers or {}).values()} or {found.algorithm}
    if unknown := sorted(used - set(WEIGHT_TYPES)):
        raise ModelError(
            f"{directory}: the algorithm {unknown[0]} cannot be read back here",
            hint=f"known: {', '.join(WEIGHT_TYPES)}",
        )
    if found.layers is not None:
        _check_layers(directory, found.layers, separate)
    if found.kv_cache not in (None, "FP8"):
        raise ModelError(
            f"{directory}: a key-value cache in {found.kv_cache} cannot be read back here",
            hint="quantize with an FP8 cache or none",
        )
    return replace(found, group_size=separate.get("group_size"))


def _told(settings: Mapping[str, Any], excluded: str) -> Quantization:
    """What one of the two places says; ``excluded`` is its word for modules left out."""
    algorithm, layers = str(settings.get("quant_algo")), None
    if algorithm == MIXED:
        layers = {
            module: Layer(str(layer.get("quant_algo")), layer.get("group_size"))
            for module, layer in settings.get("quantized_layers", {}).items()
        }
    cache = settings.get("kv_cache_quant_algo")
    if (scheme := settings.get("kv_cache_scheme")) is not None:
        cache = "FP8" if scheme == _FP8_SCHEME else str(scheme)
    return Quantization(algorithm, tuple(settings.get(excluded) or ()), None, layers, cache)


def _check_layers(
    directory: Path, layers: Mapping[str, Layer], settings: Mapping[str, Any]
) -> None:
    """What TensorRT-LLM fuses must have one format, and its own file must say the same."""
    path = directory / QUANT_CFG
    if not path.is_file() or read_json(path) != dict(settings):
        raise ModelError(f"{path} does not say what {HF_QUANT_CONFIG} says")
    for module in layers:
        parent, _, name = module.rpartition(".")
        for partners in _FUSED:
            if name not in partners:
                continue
            for partner in partners:
                if layers.get(f"{parent}.{partner}") != layers[module]:
                    raise ModelError(
                        f"{directory}: {module} and its {partner} have different formats, "
                        "but a runtime fuses them"
                    )


def is_cache_scale(name: str) -> bool:
    """Whether the tensor ``name`` is the scale of a layer's keys or values in the cache."""
    module, _, part = name.rpartition(".")
    return CACHE_SCALES.get(module.rpartition(".")[2]) == part


class Tensors(Mapping[str, "Tensor"]):
    """Tensors of all weight files of a directory, read one at a time."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> "Tensor":
        """Read tensor ``name``."""
        return self._files[name].get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the files."""
        return iter(self._files)

    def __len__(self) -> int:
        """Count of tensors."""
        return len(self._files)

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of tensor ``name``, without reading it."""
        piece = self._files[name].get_slice(name)
        return str(piece.get_dtype()), tuple(piece.get_shape())


@contextmanager
def open_tensors(
    directory: Path, *, only: str = "*.safetensors", leave_out: str | None = None
) -> Iterator[Tensors]:
    """Open the weight files of ``directory`` that match ``only``, but for ``leave_out``.

    Raises:
        ModelError: if a file is missing or damaged, or a tensor stands in two files.
    """
    from contextlib import ExitStack

    from safetensors import SafetensorError, safe_open

    check_weights(directory)
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in sorted(directory.glob(only)):
            if path.name == leave_out:
                continue
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
            names = file.keys()
            if twice := sorted(set(names) & set(files)):
                raise ModelError(f"{directory}: {twice[0]} stands in two files")
            files |= dict.fromkeys(names, file)
        yield Tensors(files)


def weight_share_by_bits(directory: Path) -> dict[str, float]:
    """Share of the matrix weights by the bits they are stored in, from the files' headers.

    Scales are no weights. Tables that ranks hold twice count twice.
    """
    counts: Counter[int] = Counter()
    for path in sorted(directory.glob("*.safetensors")):  # ranks have the same names
        with open_tensors(directory, only=path.name) as tensors:
            for name in tensors:
                dtype, dims = tensors.header(name)
                if len(dims) >= 2 and dtype in _BITS and not name.endswith(_SCALES):
                    counts[_BITS[dtype]] += prod(dims) * (2 if dtype == "U8" else 1)
    total = counts.total()
    return {str(bits): count / total for bits, count in sorted(counts.items())}
