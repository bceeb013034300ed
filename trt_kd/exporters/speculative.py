"""Option files and commands of a draft and its target, as data; nothing is run here.

Source: ``DraftTargetDecodingConfig`` of TensorRT-LLM's LLM API, whose two generations spell it
differently, and vLLM's page on draft models; the method is that of Leviathan et al. 2022
(arXiv:2211.17192).
"""

import json
import shlex
from pathlib import Path
from typing import Any

from trt_kd.exporters.trtllm_commands import SERVE_FILE, Workload, serve_options

TARGET, DRAFT = "target", "draft"
"""Folders of the two models."""
OPTIONS_FILES = {"1.2": "llm_api_options_1.2.yaml", "1.3": "llm_api_options_1.3.yaml"}
VLLM_FILE = "vllm_speculative_config.json"
_SPELLED = {
    "1.2": ("DraftTarget", "speculative_model_dir"),
    "1.3": ("Draft_Target", "speculative_model"),
}
_MEMORY_SHARE = 0.85
"""Of the free GPU memory for caches: two models have one each."""


def speculative_options(version: str, workload: Workload, tokens_ahead: int) -> dict[str, Any]:
    """Content of the LLM API's option file for TensorRT-LLM ``version``, 1.2 or 1.3.

    A drafted token may be taken back, so blocks of the cache are not shared between requests, and
    steps do not overlap; NVIDIA's published settings say the same.
    """
    decoding, draft = _SPELLED[version]
    options = serve_options(workload)
    options["kv_cache_config"] |= {
        "enable_block_reuse": False,
        "free_gpu_memory_fraction": _MEMORY_SHARE,
    }
    del options["enable_chunked_prefill"]
    return options | {
        "disable_overlap_scheduler": True,
        "speculative_config": {
            "decoding_type": decoding,
            "max_draft_len": tokens_ahead,
            draft: DRAFT,
        },
    }


def vllm_config(tokens_ahead: int) -> dict[str, Any]:
    """What vLLM's ``--speculative-config`` says."""
    return {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": tokens_ahead}


def trtllm_command(version: str, workload: Workload) -> list[str]:
    """``trtllm-serve`` in the folder of the pair."""
    return [
        *("trtllm-serve", TARGET, "--backend", "pytorch", "--tp_size", "1"),
        *("--max_batch_size", str(workload.batch), "--max_num_tokens", str(workload.num_tokens)),
        *("--max_seq_len", str(workload.sequence_tokens), "--config", OPTIONS_FILES[version]),
    ]


def vllm_command(workload: Workload, tokens_ahead: int) -> list[str]:
    """``vllm serve`` in the folder of the pair."""
    return [
        *("vllm", "serve", TARGET, "--max-model-len", str(workload.sequence_tokens)),
        *("--max-num-seqs", str(workload.batch)),
        *("--speculative-config", json.dumps(vllm_config(tokens_ahead))),
    ]


def write_pair_serving(out: Path, workload: Workload, tokens_ahead: int) -> None:
    """Write option files and commands for the pair in ``out``."""
    import yaml

    for version, name in OPTIONS_FILES.items():
        options = speculative_options(version, workload, tokens_ahead)
        (out / name).write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    told = json.dumps(vllm_config(tokens_ahead), indent=2) + "\n"
    (out / VLLM_FILE).write_text(told, encoding="utf-8")
    lines = {
        "TensorRT-LLM 1.2": trtllm_command("1.2", workload),
        "TensorRT-LLM 1.3": trtllm_command("1.3", workload),
        "vLLM": vllm_command(workload, tokens_ahead),
    }
    blocks = [f"{name}:\n\n```\n{shlex.join(line)}\n```\n" for name, line in lines.items()]
    page = (
        f"# Serving\n\nThe draft writes {tokens_ahead} tokens ahead, the target checks them in one "
        "pass: its text stays its own. Run in this folder.\n\n" + "\n".join(blocks)
    )
    (out / SERVE_FILE).write_text(page, encoding="utf-8")
