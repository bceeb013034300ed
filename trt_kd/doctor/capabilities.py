"""What this machine can do: every stage, export lane and backend, or the way to get it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from trt_kd.doctor.check import Capability
from trt_kd.doctor.machine import COMMANDS, gpus, which
from trt_kd.doctor.packages import REQUIREMENTS, install_command, supported
from trt_kd.registry import Registry

MODEL = ("torch", "transformers", "safetensors")
COMPRESS = (*MODEL, "nvidia-modelopt", "accelerate")
ORT_GENAI = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class Needs:
    """What has to be on the machine."""

    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    gpu: bool = False


STAGES = {
    "import": Needs(MODEL),
    "prune": Needs(COMPRESS),
    "distill": Needs((*COMPRESS, "tensorboard")),
    "quantize": Needs(COMPRESS),
    "export": Needs(MODEL),
    "pair": Needs(("numpy",)),
    "evaluate": Needs((*MODEL, "lm-eval")),
    "benchmark": Needs(("numpy", "psutil")),
    "report": Needs(("jinja2", "matplotlib")),
}

LANES = {
    "hf-unified": Needs(COMPRESS),
    "ort-genai": Needs((*MODEL, *ORT_GENAI)),
    "onnx": Needs((*MODEL, "onnx", "onnxruntime")),
    "tensorrt-rtx": Needs((*MODEL, "onnx", "onnxruntime", "tensorrt-rtx")),
    "trtllm-checkpoint": Needs(COMPRESS),
    "trtllm-engine": Needs((), ("trtllm-build",), gpu=True),
}

BACKENDS = {
    "transformers": Needs(MODEL),
    "hf-unified": Needs(COMPRESS),
    "ort-genai": Needs(("onnxruntime", "onnxruntime-genai")),
    "onnxruntime": Needs(("onnxruntime",)),
    "trtllm": Needs(("tensorrt-llm",), gpu=True),
    "trtllm-bench": Needs((), ("trtllm-bench",), gpu=True),
    "trtllm-serve": Needs((), ("trtllm-serve",), gpu=True),
    "openai-server": Needs((), ("aiperf",)),
}


def capabilities() -> dict[str, Capability]:
    """Every stage, export lane and backend by ``family name``, available or how to get it."""
    gpu_present = bool(gpus())
    families = {
        "stage": (STAGES, STAGES),
        "export": (LANES, _registered("trt_kd.exporters")),
        "backend": (BACKENDS, _registered("trt_kd.backends")),
    }
    result = {}
    for family, (table, registered) in families.items():
        for name in registered:
            needs = table.get(name)
            result[f"{family} {name}"] = (
                Capability(True, "registered; its own packages are not known here")
                if needs is None
                else judge(needs, gpu_present=gpu_present)
            )
    return result


def judge(needs: Needs, *, gpu_present: bool) -> Capability:
    """Compare ``needs`` with what is installed."""
    packages = [package for package in needs.packages if not supported(package)]
    commands = [command for command in needs.commands if which(command) is None]
    absent = [*packages, *commands, *(["an NVIDIA GPU"] if needs.gpu and not gpu_present else [])]
    if not absent:
        used = [*needs.packages, *needs.commands]
        return Capability(True, f"on {', '.join(used)}")
    return Capability(False, f"needs {', '.join(absent)}", _remedy(packages, commands))


def _remedy(packages: list[str], commands: list[str]) -> str:
    """One way to get what is absent: the first extra, else the first command, else a GPU."""
    if packages:
        return install_command(_extra_of(packages))
    if commands:
        return COMMANDS[commands[0]]
    return "use a machine with an NVIDIA GPU, see containers/README.md"


def _extra_of(packages: list[str]) -> str:
    return next(
        extra for extra, table in REQUIREMENTS.items() if any(name in table for name in packages)
    )


def _registered(package: str) -> Iterator[str]:
    """Names in the registries of ``package``, so that a new member is listed on arrival."""
    for value in vars(import_module(package)).values():
        if isinstance(value, Registry):
            yield from value.names()
