"""Engines of TensorRT-LLM 1.2, built by ``trtllm-build`` from a verified checkpoint.

The build wants TensorRT-LLM and a GPU of the kind that will serve. Where that is missing the
checkpoint is made and proven all the same, and stays beside the artifact in the making: build it
in the pinned container with the command of the error, run the export again, and it is taken in.
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.backends.trtllm_container import docker_command
from trt_kd.checkpoints import copy_tokenizer, portable_config, read_json
from trt_kd.errors import MissingDependencyError, ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.trtllm_checkpoint import HF_CONFIG, KEPT, TrtllmCheckpoint
from trt_kd.exporters.trtllm_commands import (
    Workload,
    build_command,
    build_options,
    write_engine_serving,
)
from trt_kd.exporters.trtllm_layout import positions
from trt_kd.quantization.base import QuantizationFormat

logger = logging.getLogger(__name__)

_VERSION = "1.2."
_LEAST_SHARE = 0.5
"""An engine that is smaller than this share of its rank's weights is not whole."""


class TrtllmEngine(Exporter):
    """TensorRT engines for TensorRT-LLM 1.2, built here or in its container."""

    kind: Literal["trtllm-engine"] = "trtllm-engine"
    backend: ClassVar[str] = "trtllm-checkpoint"

    tensor_parallel: PositiveInt = 1
    """GPUs that share every layer."""
    pipeline_parallel: PositiveInt = 1
    """GPUs that take the layers in turn."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of all that is not quantized; ``auto`` keeps the source's."""
    max_batch_size: PositiveInt = 64
    """Requests at a time; memory of the engine grows with it."""
    max_input_tokens: PositiveInt = 1024
    """Longest prompt."""
    max_output_tokens: PositiveInt = 1024
    """Longest answer; prompt and answer together must fit the model's positions."""

    @property
    def workload(self) -> Workload:
        """Largest requests that the engine takes."""
        return Workload(self.max_batch_size, self.max_input_tokens, self.max_output_tokens)

    def basis(self) -> TrtllmCheckpoint:
        """See the base class."""
        return TrtllmCheckpoint(
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            dtype=self.dtype,
        )

    @property
    def executed(self) -> bool:
        """See the base class."""
        return False

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        return self.basis().check(shape, source_kind)

    def check_format(self, shape: ModelShape, quantization: QuantizationFormat) -> list[str]:
        """See the base class."""
        return self.basis().check_format(shape, quantization)

    def check_source(self, source: Artifact) -> list[str]:
        """See the base class: that of the checkpoint, and the lengths."""
        found = self.basis().check_source(source)
        config = portable_config(read_json(source.path / "config.json"))
        longest, asked = positions(config, read_shape(source.path)), self.workload.sequence_tokens
        if asked > longest:
            found.append(
                f"max_input_tokens + max_output_tokens is {asked}; sequences of this model in an "
                f"engine end at {longest}"
            )
        return found

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class; ``source`` is the checkpoint of ``basis``."""
        engine = source.path.resolve().with_name("engine")
        config = read_json(source.path / "config.json")
        if _is_built(engine, config) and (found := self.problems(source, engine)):
            logger.warning("%s is not the engine asked for and is removed: %s", engine, found[0])
            shutil.rmtree(engine)
        if not _is_built(engine, config):
            self._build(source.path.resolve(), engine, config)
        for path in sorted(engine.iterdir()):
            shutil.copyfile(path, out / path.name)
        shutil.copyfile(source.path / "config.json", out / "checkpoint_config.json")
        companions = out / "hf"
        companions.mkdir()
        shutil.copyfile(source.path / HF_CONFIG, companions / "config.json")
        copy_tokenizer(source.path, companions)
        for name in KEPT:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, companions / name)
        write_engine_serving(out, str(read_json(source.path / HF_CONFIG)["model_type"]))
        built = read_json(out / "config.json")
        return {"tensorrt_llm": str(built.get("version")), "quant_algo": _algorithm(config)}

    def _build(self, checkpoint: Path, engine: Path, config: Mapping[str, Any]) -> None:
        options = build_options(config, self.workload)
        if not _can_build():
            command = build_command(["trtllm-build"], checkpoint, engine, options)
            raise MissingDependencyError(
                "tensorrt_llm 1.2 is not installed here, so no engine was built; the verified "
                f"checkpoint stays in {checkpoint}",
                hint="build it on a GPU of the kind that will serve, then give the same trt-kd "
                f"command again: {docker_command(engine.parent, command)}",
            )
        program = [sys.executable, "-m", "tensorrt_llm.commands.build"]
        shutil.rmtree(engine, ignore_errors=True)
        engine.mkdir()
        log = engine / "build.log"
        with log.open("wb") as file:
            done = subprocess.run(
                build_command(program, checkpoint, engine, options),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode or not _is_built(engine, config):
            kept = engine.with_name("build.log")
            log.replace(kept)
            shutil.rmtree(engine)
            raise ModelError(
                f"trtllm-build failed with exit code {done.returncode}",
                hint=f"its log is {kept}; the checkpoint stays in {checkpoint}",
            )

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: the engine's own config against checkpoint and options."""
        checkpoint, built = read_json(source.path / "config.json"), read_json(out / "config.json")
        found = []
        version = str(built.get("version"))
        if not version.startswith(_VERSION):
            found.append(f"the engine was built by TensorRT-LLM {version}, not {_VERSION}x")
        found += _differences("pretrained_config", checkpoint, built.get("pretrained_config"))
        workload = self.workload
        asked = {
            "max_batch_size": workload.batch,
            "max_input_len": workload.input_tokens,
            "max_seq_len": workload.sequence_tokens,
            "max_num_tokens": workload.num_tokens,
        }
        found += _differences("build_config", asked, built.get("build_config"))
        for rank in range(int(checkpoint["mapping"]["world_size"])):
            size = (out / f"rank{rank}.engine").stat().st_size
            weights = (source.path / f"rank{rank}.safetensors").stat().st_size
            if size < _LEAST_SHARE * weights:
                found.append(f"rank{rank}.engine has {size:,} bytes, its weights {weights:,}")
        return found

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class: that of the checkpoint."""
        return self.basis().kl_limit_nats(source)


def _algorithm(config: Mapping[str, Any]) -> str | None:
    value = config["quantization"]["quant_algo"]
    return None if value is None else str(value)


def _can_build() -> bool:
    """Whether a TensorRT-LLM with the engine builder is installed; it is not imported."""
    spec = find_spec("tensorrt_llm")
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / "commands" / "build.py").is_file() for place in places or ())


def _is_built(engine: Path, config: Mapping[str, Any]) -> bool:
    names = [f"rank{rank}.engine" for rank in range(int(config["mapping"]["world_size"]))]
    return all((engine / name).is_file() for name in ["config.json", *names])


def _differences(where: str, expected: Mapping[str, Any], found: object) -> list[str]:
    """Settings of ``expected`` that ``found`` says otherwise; it may say more."""
    if not isinstance(found, Mapping):
        return [f"config.json of the engine has no {where}"]
    result = []
    for key, value in expected.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            result += _differences(f"{where}.{key}", value, found[key])
        elif key != "producer" and found.get(key) != value:
            result.append(f"{where}.{key} is {found.get(key)!r}, {value!r} was asked for")
    return result
