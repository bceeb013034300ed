"""Load and save checkpoints: the only file that calls ``from_pretrained`` and ``save_pretrained``.

What is saved loads in stock transformers, 4.57 and 5 alike: rope in both spellings, an explicit
``head_dim``, a tokenizer class that both know, safetensors only.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import model_type_of
from trt_kd.errors import ModelError
from trt_kd.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_COPY_TOKENIZER = "copy tokenizer.json and tokenizer_config.json from the model's source"


def load_model(directory: Path, *, dtype: str | None = None) -> "PreTrainedModel":
    """Load the causal language model in ``directory``, in evaluation mode, on the CPU.

    ``dtype`` is a torch dtype's name; None keeps what the checkpoint holds.

    Raises:
        ModelError: if a file is missing or damaged, or keys are missing, unexpected or misshapen.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_weights(directory)
    auto: Any = AutoModelForCausalLM
    try:
        model, loading = auto.from_pretrained(
            directory,
            dtype=getattr(torch, dtype) if dtype else "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{directory} cannot be loaded: {reason}",
            hint="import the model again from its source",
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, loading[what])):
            raise ModelError(
                f"{directory}: {len(keys)} {what.replace('_', ' ')}, first {keys[0]}",
                hint="config.json and the weights disagree; import the model again",
            )
    return model.eval()  # type: ignore[no-any-return]


def stored_dtype(directory: Path) -> str:
    """Name of the torch dtype that the ``config.json`` of ``directory`` gives its weights."""
    config = read_json(directory / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in ``directory``.

    Raises:
        ModelError: if there is none or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{directory} holds no usable tokenizer: {reason}",
            hint=_COPY_TOKENIZER,
        ) from error
    return tokenizer


def save_model(model: "PreTrainedModel", out: Path, *, tokenizer_from: Path) -> None:
    """Write ``model`` to ``out`` as safetensors, with the tokenizer files of ``tokenizer_from``.

    Raises:
        OSError: if the disk is full, whatever the library below calls it.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(out, safe_serialization=True)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
    copy_tokenizer(tokenizer_from, out)
    make_portable(out)


def load_gguf(path: Path, tokenizer_out: Path, *, dtype: str) -> "PreTrainedModel":
    """Load a GGUF file de-quantized to ``dtype`` and write its tokenizer to ``tokenizer_out``.

    Raises:
        ModelError: if the file is damaged or of an architecture that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    try:
        with _parsed_once():
            model = auto.from_pretrained(
                path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{path.name} cannot be read as GGUF: {reason}", hint="download the file again"
        ) from error
    tokenizer.save_pretrained(tokenizer_out)
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF header once (not four times) and map its names once.

    The vocabulary stands in the header token by token, and the map of names is built anew for
    every module of the model: together half of the time of an import.
    """
    gguf: Any = require("gguf", extra="quickstart")
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def check_config(directory: Path) -> None:
    """Refuse a model that needs code of its own or whose architecture is not known.

    Raises:
        ModelError: naming the architecture or the key.
    """
    config = read_json(directory / "config.json")
    if "auto_map" in config:
        raise ModelError(
            f"{directory} asks for code of its own (auto_map in config.json)",
            hint="only architectures that transformers ships are supported",
        )
    architecture_of(model_type_of(config))


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files byte for byte."""
    if source == out:
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def make_portable(directory: Path) -> None:
    """Rewrite the JSON files of a checkpoint so that transformers 4.57 and 5 read the same."""
    config = read_json(directory / "config.json")
    _write(directory / "config.json", portable_config(config))
    path = directory / "tokenizer_config.json"
    if path.is_file():
        tokenizer = read_json(path)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            _write(path, tokenizer)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with rope in both spellings and ``head_dim`` written out.

    transformers 5 keeps ``rope_parameters`` only; 4.57 reads ``rope_theta`` and
    ``rope_scaling`` and would rotate with base 10000 without a word.
    """
    result = dict(config)
    if not result.get("head_dim") and "num_attention_heads" in result:
        result["head_dim"] = result["hidden_size"] // result["num_attention_heads"]
    rope = result.get("rope_parameters")
    if rope is None and "rope_theta" in result:
        scaling = result.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        rope = {**scaling, "rope_theta": result["rope_theta"], "rope_type": kind}
        result["rope_parameters"] = rope
    if isinstance(rope, dict) and "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default"
        result["rope_scaling"] = None if plain else scaling
    model_type = str(result.get("model_type"))
    if model_type not in ARCHITECTURES.names():
        return result
    return architecture_of(model_type).portable(result)


def check_weights(directory: Path) -> int:
    """Check that the weight files of ``directory`` are complete, from their headers only.

    Returns how many values they hold.

    Raises:
        ModelError: if there is no safetensors file, one is truncated, or an index points
            outside the directory.
    """
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is not a directory", hint="give the folder of a Hugging Face model"
        )
    names = _weight_names(directory)
    if not names:
        raise ModelError(
            f"{directory} holds no safetensors file",
            hint="pickled weights are not read; convert the model to safetensors first",
        )
    return sum(_check_header(directory / name) for name in names)


def _weight_names(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in directory.glob("*.safetensors"))
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(
            f"{index} has no weight_map from tensors to files", hint="download the model again"
        )
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError(
                f"{index} points outside its directory: {name!r}",
                hint="download the model again: its index names files beside it only",
            )
    return names


def _check_header(path: Path) -> int:
    """Compare the file's size with what its header promises; return how many values it holds."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        values: int = sum(math.prod(entry["shape"]) for entry in header.values())
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="download or copy it again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a safetensors file: {error}", hint="download or export it again"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"{path} is truncated: {size:,} bytes of {expected:,}",
            hint="download or copy it again",
        )
    return values


def check_tokenizer(directory: Path) -> None:
    """Check that ``directory`` holds a tokenizer, without loading it.

    Raises:
        ModelError: if there is none, or one of its JSON files is damaged.
    """
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & {path.name for path in found}:
        raise ModelError(f"{directory} holds no tokenizer", hint=_COPY_TOKENIZER)
    for path in found:
        if path.suffix == ".json":
            read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: if the file is absent or damaged.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}",
            hint=f"{path.parent} should be a folder that holds it",
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON: {error}", hint="download or write it again"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} does not hold a JSON object", hint="download or write it again")
    return loaded


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
