"""The closed list of stages: settings, function and input roles of each."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.config import StageConfig


@dataclass(frozen=True)
class Stage:
    """One stage, named by where its parts stand; nothing is imported before it is needed."""

    module: str
    config: str
    function: str
    summary: str

    def config_class(self) -> type[StageConfig]:
        """The class of its settings."""
        return getattr(import_module(self.module), self.config)  # type: ignore[no-any-return]

    def run(self, config: StageConfig, **inputs: Any) -> Artifact:
        """Do the work; ``inputs`` are artifacts by role, and ``out``."""
        function: Callable[..., Artifact] = getattr(import_module(self.module), self.function)
        return function(config, **inputs)


def _stage(name: str, function: str, config: str, summary: str) -> Stage:
    return Stage(f"trt_kd.stages.{name}", config, function, summary)


STAGES: dict[str, Stage] = {
    "import": _stage("import_model", "import_model", "ImportConfig", "bring a model in"),
    "score": _stage("score", "score", "ScoreConfig", "score every part for a search"),
    "latency": _stage("latency", "latency", "LatencyConfig", "time sizes on the runtime"),
    "prune": _stage("prune", "prune", "PruneConfig", "cut width and depth, then reconstruct"),
    "generate": _stage("generate", "generate", "GenerateConfig", "let the teacher write text"),
    "distill": _stage("distill", "distill", "DistillConfig", "recover by distillation"),
    "quantize": _stage("quantize", "quantize", "QuantizeConfig", "calibrate low-bit formats"),
    "sensitivity": _stage(
        "sensitivity", "sensitivity", "SensitivityConfig", "cost of formats by layer"
    ),
    "export": _stage("export", "export", "ExportConfig", "write for a runtime and read back"),
    "pair": _stage("pair", "pair", "PairConfig", "put a draft beside its target"),
    "evaluate": _stage("evaluate", "evaluate", "EvaluateConfig", "measure what ships"),
    "benchmark": _stage("benchmark", "benchmark", "BenchmarkConfig", "time it, interleaved"),
    "report": _stage("report", "report", "ReportConfig", "tables, figures, verdict"),
}
