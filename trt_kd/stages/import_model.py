"""Bring a model in: a Hugging Face directory, a hub id, a GGUF file, or one inside a package.

The result is a stock checkpoint: safetensors, rope in both spellings, no remote code.
"""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.gguf import read_gguf_header
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import (
    check_config,
    check_tokenizer,
    check_weights,
    copy_tokenizer,
    load_gguf,
    load_model,
    make_portable,
    save_model,
)
from trt_kd.config import StageConfig, StrictModel
from trt_kd.errors import ConfigError, ModelError
from trt_kd.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE_BYTES = 1 << 20
PIECES = 64


class ExpectedShape(StrictModel):
    """Sizes of the model to come, so that a plan needs no download; checked on import."""

    model_type: str
    layers: PositiveInt
    hidden: PositiveInt
    ffn: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab: PositiveInt
    tied: bool = False

    def shape(self) -> ModelShape:
        """The same sizes as a shape; biases and norms follow from the model type."""
        return ModelShape(
            **self.model_dump(),
            attention_bias=self.model_type == "qwen2",
            qk_norm="head" if self.model_type == "qwen3" else "none",
        )


class ImportConfig(StageConfig):
    """Where the teacher comes from."""

    stage: ClassVar[str] = "import"

    source: str
    """A directory, a ``.gguf`` file, ``package:NAME/FILE.gguf`` for a file inside an installed
    Python package, or ``hf:OWNER/NAME@REVISION`` on the Hugging Face hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the stored weights; null keeps the source's (a GGUF file becomes bfloat16)."""
    expect: ExpectedShape | None = None
    """Sizes known beforehand; import fails if the model has others."""
    keep_layers: PositiveInt | None = None
    """Keep the first so many layers only: the twin that a rehearsal runs on."""

    @model_validator(mode="after")
    def _known_form(self) -> Self:
        if self.source.startswith("package:") and "/" not in self.source:
            raise ValueError(f"source {self.source!r}: write package:NAME/FILE.gguf")
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprint of the source's bytes; a hub id is its own, with its revision."""
        path = self.local_path()
        return {} if path is None or not path.exists() else {"source": fingerprint(path)}

    def rehearsal(self) -> Self:
        """A twin of two layers."""
        return self.model_copy(update={"keep_layers": 2, "expect": None})

    def local_path(self) -> Path | None:
        """The file or directory named by ``source``; None for a hub id or an absent package."""
        if self.source.startswith("hf:"):
            return None
        if not self.source.startswith("package:"):
            return Path(self.source).expanduser()
        package, _, file = self.source.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations))).resolve()
        path = (root / file).resolve()
        if not path.is_relative_to(root):
            raise ConfigError(
                f"source {self.source!r} leads out of its package",
                hint="name a file in it as package:NAME/FILE",
            )
        return path

    def known_shape(self) -> ModelShape | None:
        """Sizes as far as they can be told without a download or a load."""
        path = self.local_path()
        shape: ModelShape | None
        if path is not None and (path / "config.json").is_file():
            shape = read_shape(path)
        elif path is not None and path.suffix == ".gguf" and path.is_file():
            shape = read_gguf_header(path).shape()
        elif self.expect is not None:
            shape = self.expect.shape()
        elif path is not None:
            _require_model(path, self.source)
            return None
        else:
            return None
        if self.keep_layers is None or shape is None:
            return shape
        return ModelShape(**vars(shape) | {"layers": min(self.keep_layers, shape.layers)})


def import_model(config: ImportConfig, *, out: Path) -> Artifact:
    """Turn the model at ``config.source`` into a checkpoint at ``out``.

    Raises:
        ModelError: if it is missing, damaged, unsupported or of other sizes than expected.
    """
    from trt_kd.reporting.model_card import licence_of

    path = _located(config)
    with writing(out, kind="checkpoint", config=config, inputs={}) as draft:
        if path.suffix == ".gguf":
            model = load_gguf(path, draft.path, dtype=config.dtype or "bfloat16")
            _save_twin(model, config, draft.path, tokenizer_from=draft.path)
        else:
            check_config(path)
            _check_fit(path, values=check_weights(path))
            check_tokenizer(path)
            if config.dtype or config.keep_layers:
                model = load_model(path, dtype=config.dtype)
                _save_twin(model, config, draft.path, tokenizer_from=path)
            else:
                _copy(path, draft.path)
        check_config(draft.path)
        shape = read_shape(draft.path)
        _compare(config, shape)
        draft.metrics["parameters"] = shape.parameters
        draft.metrics["parameters_by_part"] = dict(shape.parts())
        if path.suffix == ".gguf":
            draft.metrics["license"] = read_gguf_header(path).metadata.get("general.license")
        elif licence := licence_of(path):
            draft.metrics["license"] = licence
    return Artifact.open(out, expect="checkpoint")


def _located(config: ImportConfig) -> Path:
    """Find the source on this machine, downloading a hub id."""
    if config.source.startswith("hf:"):
        return _download(config.source.removeprefix("hf:"))
    path = config.local_path()
    if path is None:
        package = config.source.removeprefix("package:").partition("/")[0]
        raise ModelError(
            f"package {package} is not installed, so {config.source} cannot be read",
            hint="install it, or name a directory, a .gguf file or an hf: id as import.source",
        )
    _require_model(path, config.source)
    return path


def _require_model(path: Path, source: str) -> None:
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return
    what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise ModelError(
        f"import.source {source} {what}",
        hint="name a model directory, a .gguf file, package:NAME/FILE or hf:OWNER/NAME",
    )


def _download(hub_id: str) -> Path:
    hub = require("huggingface_hub", extra="compress")
    errors = require("huggingface_hub.errors", extra="compress")
    import httpx

    name, _, revision = hub_id.partition("@")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*"]
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
        httpx.HTTPError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"hf:{hub_id} cannot be downloaded: {reason}",
            hint="check the name, the network and HF_TOKEN, or give a local directory",
        ) from error


def _check_fit(path: Path, *, values: int) -> None:
    """Refuse weights that are fewer than ``config.json`` speaks of."""
    wanted = read_shape(path).parameters
    if values < wanted:
        raise ModelError(
            f"{path} holds {values:,} weights, its config.json speaks of {wanted:,}",
            hint="config.json and the weights disagree: download both again",
        )


def _save_twin(
    model: "PreTrainedModel", config: ImportConfig, out: Path, *, tokenizer_from: Path
) -> None:
    if config.keep_layers is not None:
        architecture = architecture_of(model.config.model_type)
        count = min(config.keep_layers, len(architecture.layers(model)))
        architecture.keep_layers(model, range(count))
    save_model(model, out, tokenizer_from=tokenizer_from)


def _copy(source: Path, out: Path) -> None:
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    names += [path.name for path in sorted(source.glob("*.safetensors"))]
    names += [path.name for path in sorted(source.glob("LICENSE*"))]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    copy_tokenizer(source, out)
    make_portable(out)


def _compare(config: ImportConfig, shape: ModelShape) -> None:
    expected = config.expect.shape() if config.expect else None
    if expected is None or expected == shape:
        return
    wrong = [
        f"{name} {value} instead of {getattr(expected, name)}"
        for name, value in vars(shape).items()
        if value != getattr(expected, name)
    ]
    raise ModelError(
        f"{config.source} has {', '.join(wrong)}",
        hint="correct import.expect in the recipe, or the source",
    )


def fingerprint(path: Path) -> str:
    """sha256 over the names, sizes and bytes of a file or of a model directory's files.

    Of a file above 64 MiB only 64 evenly spaced pieces of 1 MiB are read, so that planning with
    a large model stays quick.
    """
    files = (
        [path]
        if path.is_file()
        else sorted(
            file for file in path.iterdir() if file.suffix in {".json", ".safetensors", ".model"}
        )
    )
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        step = max(PIECE_BYTES, size // PIECES)
        with file.open("rb") as handle:
            for start in range(0, size, step):
                handle.seek(start)
                digest.update(handle.read(PIECE_BYTES))
    return digest.hexdigest()
