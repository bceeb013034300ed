"""Model Optimizer's recipe files, looked at without loading it: where they are, what they need."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from trt_kd.errors import ConfigError

_PACKAGE = "modelopt_recipes"
_PTQ = "general/ptq"
_CUDA_BITS = {"e2m1", "e3m2", "e2m3"}


def library() -> Path | None:
    """Folder of the recipes that the installed Model Optimizer ships; None if there is none."""
    spec = find_spec(_PACKAGE)
    found = list(spec.submodule_search_locations or ()) if spec else []
    return Path(found[0]) if found else None


def names() -> list[str]:
    """Names of the post-training recipes for any model that the library ships."""
    root = library()
    folder = root / _PTQ if root is not None else None
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder is not None else []


def shipped(name: str) -> Path:
    """File of the shipped recipe ``name``: its path in the library, or its name in general/ptq.

    Raises:
        ConfigError: if there is none, or no library.
    """
    root = library()
    if root is None:
        raise ConfigError(
            f"the recipe {name} cannot be looked up: {_PACKAGE} is not installed",
            hint="pip install 'trt-kd[compress]'",
        )
    for start in (root, root / _PTQ):
        path = (start / name).with_name(Path(name).name.removesuffix(".yaml") + ".yaml")
        if path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return path
    raise ConfigError(
        f"Model Optimizer ships no recipe {name!r}",
        hint=f"one of {', '.join(names())}; or its path below {_PACKAGE}, or file: FILE",
    )


def documents(path: Path) -> list[Any]:
    """YAML documents of ``path``.

    Raises:
        ConfigError: if it cannot be read or is no YAML.
    """
    try:
        return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the recipe {path.name} cannot be read: {reason}",
            hint="give the path of a YAML file as format.file",
        ) from error


def with_imports(path: Path) -> dict[Path, list[Any]]:
    """Documents of ``path`` and of every file that it imports, by file.

    Raises:
        ConfigError: if one is not there or cannot be read.
    """
    found: dict[Path, list[Any]] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found[current] = documents(current)
        for document in found[current]:
            imports = document.get("imports") if isinstance(document, Mapping) else None
            waiting += [shipped(str(name)) for name in (imports or {}).values()]
    return found


def numerics(files: Mapping[Path, list[Any]]) -> Iterator[Mapping[str, Any]]:
    """Every description of a number format that stands anywhere in ``files``."""
    waiting: list[Any] = list(files.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if "num_bits" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def needs_cuda(numeric: Mapping[str, Any]) -> bool:
    """Whether Model Optimizer simulates a number format with CUDA kernels only.

    These are the floats of four and six bits, and blocks whose scales are low-bit floats.
    """
    blocks = numeric.get("block_sizes")
    scaled = isinstance(blocks, Mapping) and blocks.get("scale_bits") is not None
    return scaled or str(numeric.get("num_bits")) in _CUDA_BITS


def block_size(numeric: Mapping[str, Any]) -> int | None:
    """Weights along the input that share a scale; None where they do not come in blocks."""
    blocks = numeric.get("block_sizes")
    size = blocks.get(-1) if isinstance(blocks, Mapping) else None
    return size if isinstance(size, int) else None
