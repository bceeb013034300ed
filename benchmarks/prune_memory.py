"""How much memory pruning a sharded model takes, and whether it says how far it is.

    python benchmarks/prune_memory.py [--small] [--tokenizer FOLDER] [--calibration-tokens 2048]

Writes a random bfloat16 Llama of 1.1 B parameters in shards into a temporary folder, prunes its
MLPs and its depth with `trt-kd prune` at the tool's defaults, and prints a table, then one line of
JSON. The memory is the largest resident size of that command, pages of the weight files that it has
mapped included. What the command writes to standard error is passed on line by line.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from showing import shown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trt_kd.artifacts import writing
from trt_kd.artifacts.environment import environment
from trt_kd.checkpoints import copy_tokenizer, make_portable
from trt_kd.config import StageConfig

LIMIT_BYTES = 8e9
LARGE = {"hidden": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32_000}
SMALL = {"hidden": 64, "ffn": 256, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 512}
SHARD_LAYERS = 4
COMMAND = [sys.executable, "-m", "trt_kd.cli"]
EOS = "<|endoftext|>"
COLUMNS = (
    "| Parameters before | After | Peak memory (GB) | Limit (GB) | Seconds | Lines of progress "
    "| Longest silence (s) |\n|--:|--:|--:|--:|--:|--:|--:|"
)


class Random(StageConfig):
    """Stands for the import of a random model."""

    stage = "import"
    shape: dict[str, int]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="peak memory of pruning a sharded model")
    parser.add_argument("--small", action="store_true", help="a model of some MB")
    parser.add_argument("--tokenizer", type=Path, help="folder; a tiny BPE without it")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        return shown(lambda: measured(given, Path(folder)), table)


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, prune it, and put the numbers together.

    This process never loads torch: the system hands its peak memory on to its children's.
    """
    shape = SMALL if given.small else LARGE
    source, out = folder / "source", folder / "pruned"
    write_model(shape, source, given.tokenizer)
    ffn, layers = shape["ffn"] * 3 // 4, shape["layers"] - 2
    axes = f"axes=[{{kind: ffn, size: {ffn}}}, {{kind: depth, layers: {layers}}}]"
    settings = [axes, f"calibration_tokens={given.calibration_tokens}"]
    started = time.perf_counter()
    progress = run(["prune", "--source", str(source), "--out", str(out), *settings])
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    manifest = json.loads((out / "trt_kd.json").read_text(encoding="utf-8"))
    metrics = manifest["metrics"]
    return {
        "hardware": environment(),
        "workload": {
            "model": shape,
            "dtype": "bfloat16",
            "shards": len(list(source.glob("*.safetensors"))),
            "settings": settings,
        },
        "parameters_before": metrics["parameters_before"],
        "parameters_after": metrics["parameters_after"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
        "limit_bytes": LIMIT_BYTES,
        "seconds": seconds,
        **progress,
    }


def run(arguments: list[str]) -> dict[str, float]:
    """Run the command and pass its standard error on; how often it wrote there.

    Raises:
        CalledProcessError: if it failed.
    """
    command = [*COMMAND, *arguments]
    lines, silence, last = 0, 0.0, time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            now = time.perf_counter()
            lines, silence, last = lines + 1, max(silence, now - last), now
            print(line, end="", file=sys.stderr, flush=True)
    silence = max(silence, time.perf_counter() - last)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"progress_lines": lines, "longest_silence_s": silence}


def table(result: dict[str, Any]) -> str:
    """Markdown: one row."""
    hardware = result["hardware"]
    cells = [f"{result['parameters_before']:,}", f"{result['parameters_after']:,}"]
    cells += [f"{result[name] / 1e9:.2f}" for name in ("peak_bytes", "limit_bytes")]
    cells += [f"{result['seconds']:.0f}", str(result["progress_lines"])]
    cells.append(f"{result['longest_silence_s']:.0f}")
    first = f"{hardware['processor']}, {hardware['cores']} cores"
    return "\n".join([first, "", COLUMNS, f"| {' | '.join(cells)} |"])


def write_model(shape: dict[str, int], out: Path, tokenizer: Path | None) -> None:
    """A random checkpoint, one shard after the other, as an artifact."""
    generator = np.random.default_rng(0)
    with writing(out, kind="checkpoint", config=Random(shape=shape), inputs={}) as draft:
        shards = list(sharded(shape))
        names: dict[str, str] = {}
        for number, sizes in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_shard(draft.path / file, sizes, generator)
            names |= dict.fromkeys(sizes, file)
        total = 2 * sum(math.prod(size) for sizes in shards for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json(draft.path / "model.safetensors.index.json", index)
        write_json(draft.path / "config.json", config_of(shape))
        if tokenizer is None:
            write_tokenizer(draft.path)
        else:
            copy_tokenizer(tokenizer, draft.path)
        make_portable(draft.path)


def sharded(shape: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the weights, shard by shard."""
    hidden, ffn, vocab = shape["hidden"], shape["ffn"], shape["vocab"]
    keys = hidden // shape["heads"] * shape["kv_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    yield {"model.embed_tokens.weight": (vocab, hidden)}
    for first in range(0, shape["layers"], SHARD_LAYERS):
        yield {
            f"model.layers.{number}.{name}.weight": size
            for number in range(first, min(first + SHARD_LAYERS, shape["layers"]))
            for name, size in layer.items()
        }
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_shard(
    path: Path, sizes: dict[str, tuple[int, ...]], generator: np.random.Generator
) -> None:
    """A safetensors file, written tensor by tensor: length of its header, header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes.values():
            file.write(bfloat16(size, generator).tobytes())


def bfloat16(size: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.uint16]:
    """Norms of ones, random matrices that keep the size of what they multiply; as raw bits."""
    if len(size) == 1:
        values = np.ones(size, np.float32)
    else:
        values = generator.standard_normal(size, np.float32)
        values *= np.float32(size[1] ** -0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def config_of(shape: dict[str, int]) -> dict[str, Any]:
    """A stock ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with no merges: it reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": EOS}
    write_json(directory / "tokenizer_config.json", settings | {"pad_token": EOS})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
