"""Command lines and option files of TensorRT-LLM 1.2.1 and 1.3, as data; nothing is run here.

What stands in an option file stands on no command line: up to 1.2.1 the file overrides the line,
from 1.3 the line overrides the file. ``tests/contracts`` holds every line and file against the
options that both versions know.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONS_FILE = "extra_llm_api_options.yaml"
SERVE_FILE = "serve.md"
_DEFAULT_NUM_TOKENS = 8192
_BATCH, _LONGEST = 64, 8192
SERVED = (
    *(None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_AWQ", "W4A8_AWQ"),
    *("fp8_pb_wo", "MIXED_PRECISION"),
)
"""Algorithms that the PyTorch backend documents; others load in an engine or elsewhere. It takes
``fp8_pb_wo``, Model Optimizer's name, for its own ``FP8_BLOCK_SCALES``."""


@dataclass(frozen=True)
class Workload:
    """Largest requests that a runtime must take."""

    batch: int
    input_tokens: int
    output_tokens: int

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return self.input_tokens + self.output_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of one step: a whole prompt beside a full batch, or TensorRT-LLM's own 8192.

        Its default for the batch, 2048, reserves activations that small GPUs do not have.
        """
        everything = self.batch * self.sequence_tokens
        return max(self.input_tokens + self.batch, min(_DEFAULT_NUM_TOKENS, everything))


def build_options(config: Mapping[str, Any], workload: Workload) -> list[str]:
    """Options of ``trtllm-build``, but for its folders, chosen from checkpoint and workload.

    16-bit products, INT4's among them, go to the GEMM plugin, as NVIDIA's tuning guide and examples
    advise; other low-bit ones to TensorRT's own kernels. Prompts that read an FP8 cache do so in
    FP8, for which the builder wants an FP8 checkpoint; with other formats every prompt is read
    whole, and no cache is reused.
    """
    quantization = config["quantization"]
    fp8 = quantization["quant_algo"] == "FP8"
    cache = quantization["kv_cache_quant_algo"] == "FP8"
    options: dict[str, object] = {
        "--max_batch_size": workload.batch,
        "--max_input_len": workload.input_tokens,
        "--max_seq_len": workload.sequence_tokens,
        "--max_num_tokens": workload.num_tokens,
        "--gpt_attention_plugin": "auto",
        "--kv_cache_type": "paged",
        "--remove_input_padding": "enable",
        "--context_fmha": "enable",
        "--use_paged_context_fmha": "disable" if cache and not fp8 else "enable",
        "--use_fp8_context_fmha": "enable" if cache and fp8 else "disable",
        "--use_fused_mlp": "enable" if fp8 else "disable",
        "--workers": config["mapping"]["world_size"],
        "--log_level": "info",
    }
    if quantization["quant_algo"] in (None, "W4A16_AWQ"):
        options["--gemm_plugin"] = "auto"
    return [str(part) for item in options.items() for part in item]


def build_command(
    program: Sequence[str], checkpoint: Path, engine: Path, options: Sequence[str]
) -> list[str]:
    """Whole argument list of a build; the timing cache lands beside the engine."""
    folders = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine)]
    cache = ["--output_timing_cache", str(engine / "model.cache")]
    return [*program, *folders, *cache, *options]


def serving_workload(longest: int) -> Workload:
    """Sizes to start serving a model of ``longest`` positions with."""
    total = min(longest, _LONGEST)
    return Workload(_BATCH, total - total // 4, total // 4)


def serve_options(workload: Workload) -> dict[str, Any]:
    """Content of the LLM API's option file, valid for the PyTorch backend of both versions."""
    return {
        "kv_cache_config": {
            "dtype": "auto",
            "enable_block_reuse": True,
            "free_gpu_memory_fraction": 0.9,
        },
        "cuda_graph_config": {"max_batch_size": workload.batch, "enable_padding": True},
        "enable_chunked_prefill": True,
    }


def serve_command(workload: Workload) -> list[str]:
    """``trtllm-serve`` of the Hugging Face folder that it is run in."""
    return [
        *("trtllm-serve", ".", "--backend", "pytorch", "--tp_size", "1"),
        *("--max_batch_size", str(workload.batch), "--max_num_tokens", str(workload.num_tokens)),
        *("--max_seq_len", str(workload.sequence_tokens), "--config", OPTIONS_FILE),
    ]


def bench_command(workload: Workload, name: str) -> list[str]:
    """``trtllm-bench throughput`` of the Hugging Face folder that it is run in."""
    return [
        *("trtllm-bench", "--model", name, "--model_path", ".", "throughput"),
        *("--backend", "pytorch", "--tp", "1", "--dataset", "requests.jsonl"),
        *("--max_batch_size", str(workload.batch), "--max_num_tokens", str(workload.num_tokens)),
        *("--max_seq_len", str(workload.sequence_tokens), "--config", OPTIONS_FILE),
        *("--concurrency", str(workload.batch), "--streaming", "--report_json", "report.json"),
    ]


def engine_serve_command() -> list[str]:
    """``trtllm-serve`` of the engine folder that it is run in; 1.2 only."""
    return ["trtllm-serve", ".", "--backend", "tensorrt", "--tokenizer", "hf"]


def engine_bench_command(name: str) -> list[str]:
    """``trtllm-bench throughput`` of the engine folder that it is run in; 1.2 only.

    The longest sequence is the engine's: that option must stay unset.
    """
    return [
        *("trtllm-bench", "--model", name, "--model_path", "hf", "throughput"),
        *("--backend", "tensorrt", "--engine_dir", ".", "--dataset", "requests.jsonl"),
        *("--streaming", "--report_json", "report.json"),
    ]


def write_serving(out: Path, config: Mapping[str, Any], algorithm: str | None) -> None:
    """Write the option file and the commands for a Hugging Face folder into it.

    For an algorithm that TensorRT-LLM's PyTorch backend does not document, the page says so.
    """
    import yaml

    if algorithm not in SERVED:
        page = (
            f"# Serving\n\nTensorRT-LLM's PyTorch backend does not document {algorithm}: serve "
            "this folder elsewhere, or export the lane trtllm-engine.\n"
        )
        (out / SERVE_FILE).write_text(page, encoding="utf-8")
        return
    workload = serving_workload(int(config["max_position_embeddings"]))
    text = yaml.safe_dump(serve_options(workload), sort_keys=False)
    (out / OPTIONS_FILE).write_text(text, encoding="utf-8")
    commands = [serve_command(workload), bench_command(workload, str(config["model_type"]))]
    (out / SERVE_FILE).write_text(_page("1.2.1 and 1.3", commands), encoding="utf-8")


def write_engine_serving(out: Path, name: str) -> None:
    """Write the commands for an engine folder into it."""
    commands = [engine_serve_command(), engine_bench_command(name)]
    (out / SERVE_FILE).write_text(_page("1.2", commands), encoding="utf-8")


def _page(versions: str, commands: Sequence[Sequence[str]]) -> str:
    lines = "\n".join(shlex.join(command) for command in commands)
    return (
        f"# Serving\n\nFor TensorRT-LLM {versions}, run in this folder. Each line of "
        "`requests.jsonl` is\n`"
        '{"task_id": 0, "input_ids": [1, 2], "output_tokens": 128}`'
        f".\n\n```\n{lines}\n```\n"
    )
