"""Recipes in Model Optimizer's own format: those that it ships, by name, and own files."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts.environment import environment
from trt_kd.errors import ConfigError
from trt_kd.quantization.base import QuantizationFormat, alignment_problems, preset
from trt_kd.quantization.modelopt import modelopt, quiet
from trt_kd.quantization.recipe_files import (
    block_size,
    needs_cuda,
    numerics,
    shipped,
    with_imports,
)

_PRESET = "_CFG"
_CUDA_PRESETS = ("NVFP4", "MXFP", "MXINT")
_KERNELS = 16


class Recipe(QuantizationFormat):
    """What a recipe of Model Optimizer says: one that it ships, or a file of yours.

    The recipe in full, imports resolved, is kept with the model, so that a later version of
    Model Optimizer or a changed file does not change what was made.
    """

    kind: Literal["recipe"] = "recipe"
    name: str | None = None
    """Shipped recipe, such as ``fp8_default-kv_fp8`` or its path below ``modelopt_recipes``, or a
    configuration of ``modelopt.torch.quantization`` by its name, such as ``FP8_DEFAULT_CFG``."""
    file: Path | None = None
    """Own recipe file."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_error_limit: ClassVar[float | None] = None
    weight_bits: ClassVar[float] = 16.0
    trainable: ClassVar[bool] = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.name is None) == (self.file is None):
            raise ValueError("give either name or file of the recipe")
        if self.kv_cache != "none":
            raise ValueError(
                "a recipe says itself what the cache is: name one that ends in -kv_fp8, or set "
                "kv_cache of a plain format"
            )
        return self

    def outside(self) -> dict[str, str]:
        """See the base class: a digest of the recipe with all that it imports.

        Raises:
            ConfigError: if there is no such recipe.
        """
        if self._preset is not None:
            return {}
        texts = sorted(path.read_bytes() for path in with_imports(self._path()))
        return {"recipe": sha256(b"\0".join(texts)).hexdigest()}

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class: kind of recipe, block sizes, and what only a GPU simulates."""
        no_gpu = environment()["gpu"] is None
        reason = (
            f"recipe {self._shown} needs a CUDA GPU: Model Optimizer simulates its number format "
            "with CUDA kernels only, and this machine has none; choose fp8_default-kv_fp8"
        )
        if self._preset is not None:
            cuda = no_gpu and any(name in self._preset for name in _CUDA_PRESETS)
            return [reason] if cuda else alignment_problems(shape, _KERNELS, why="as kernels want")
        try:
            files = with_imports(self._path())
        except ConfigError as error:
            return [str(error).replace("\n  hint: ", "; ")]
        if problem := self._type_problem(files[self._path()]):
            return [problem]
        found = list(numerics(files))
        if no_gpu and any(map(needs_cuda, found)):
            return [reason]
        sizes = [size for size in map(block_size, found) if size is not None]
        why = f"as recipe {self._shown} wants"
        return alignment_problems(shape, max([_KERNELS, *sizes]), why=why)

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class.

        Raises:
            ConfigError: if Model Optimizer does not know or refuses the recipe.
        """
        if self._preset is not None:
            if not hasattr(modelopt("quantization"), self._preset):
                raise ConfigError(
                    f"modelopt.torch.quantization has no configuration {self._preset}",
                    hint="see its documentation, or name a recipe that it ships",
                )
            return preset(self._preset)
        from trt_kd.optional import require

        modelopt("quantization")  # without what its imports warn of
        loader: Any = require("modelopt.recipe", extra="compress")
        try:
            with quiet():
                loaded = loader.load_recipe(self._path().absolute())
        except ValueError as error:
            reason = str(error).strip().replace("\n", " ")
            raise ConfigError(
                f"Model Optimizer refuses the recipe {self._shown}: {reason}",
                hint="start from one that it ships: the general/ptq folder of modelopt_recipes",
            ) from error
        config: dict[str, Any] = loaded.quantize.model_dump(exclude_unset=True)
        return config

    def kept(self) -> dict[str, Any]:
        """See the base class: the recipe in full."""
        return {"recipe": yaml.safe_dump({"quantize": _plain(self.modelopt_config())})}

    def restored_config(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class: from what was kept, not from the file."""
        config: dict[str, Any] = yaml.safe_load(kept["recipe"])["quantize"]
        return config | {"algorithm": None}

    @property
    def _preset(self) -> str | None:
        return self.name if self.name is not None and self.name.endswith(_PRESET) else None

    @property
    def _shown(self) -> str:
        return str(self.name or self.file)

    def _path(self) -> Path:
        if self.file is not None:
            return self.file
        return shipped(str(self.name))

    def _type_problem(self, documents: list[Any]) -> str | None:
        """Why the recipe is none for plain post-training quantization."""
        main = documents[-1] if documents and isinstance(documents[-1], dict) else {}
        found = (main.get("metadata") or {}).get("recipe_type")
        if found == "ptq":
            return None
        advice = "; use {kind: mixed} for a search" if found == "auto_quantize" else ""
        return f"recipe {self._shown} is of type {found!r}, not ptq{advice}"


def _plain(value: Any) -> Any:
    """Value without tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
