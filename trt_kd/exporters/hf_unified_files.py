"""The files of a unified Hugging Face checkpoint: headers, tensors and quantization settings."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.checkpoints import check_weights, read_json
from trt_kd.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

HF_QUANT_CONFIG = "hf_quant_config.json"
WEIGHT_TYPES = {"FP8": "F8_E4M3", "W8A8_SQ_PER_CHANNEL": "I8", "W4A16_AWQ": "U8"}
"""Quantization algorithms that can be read back here, and how they store a weight."""


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its quantization."""

    algorithm: str
    excluded: tuple[str, ...]
    """Patterns of module names that are not quantized."""
    group_size: int | None = field(default=None, compare=False)
    """Weights along the input that share a scale, as ``hf_quant_config.json`` alone says."""

    def covers(self, module: str) -> bool:
        """Whether the projection ``module`` is quantized."""
        return not any(fnmatch(module, pattern) for pattern in self.excluded)


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
    found = Quantization(str(inline.get("quant_algo")), tuple(inline.get("ignore", ())))
    told = Quantization(
        str(separate.get("quant_algo")), tuple(separate.get("exclude_modules") or ())
    )
    if found != told:
        raise ModelError(f"{directory}: config.json says {found}, {HF_QUANT_CONFIG} says {told}")
    if found.algorithm not in WEIGHT_TYPES:
        raise ModelError(
            f"{directory}: the algorithm {found.algorithm} cannot be read back here",
            hint=f"known: {', '.join(WEIGHT_TYPES)}",
        )
    return replace(found, group_size=separate.get("group_size"))


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
