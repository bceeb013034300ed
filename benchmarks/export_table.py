"""One checkpoint through every export lane: seconds, bytes, logit difference, realised precision.

    python benchmarks/export_table.py --student DIR [--work DIR] [--only NAME ...]

Every row is an artifact in the work folder: a run that was cut off goes on with the rows that are
missing. A lane that refuses the model, is not registered or lacks its package is a row with the
reason. Prints a Markdown table, then one line of JSON.

KL and the largest logit difference are those of the export to what it was made from, on held-out
text; `quantization KL` is what the quantization before it cost. `onnx-qdq` are the graphs of
quantized sources, as QuantizeLinear and DequantizeLinear. Realised precision is the share of the
matrix weights by bits, counted in the files written, scales left out. `KL to itself` is that of the
simulated quantized model to itself with noise of a millionth on its embedding: what the rounding of
inputs makes of a last bit, and no export can be nearer. For `onnx-fp32` the greedy
tokens of ONNX Runtime, its cache carried and prompts padded on the left, are compared with stock
transformers', which continues all prompts in one batch; both are kept in the work folder, group by
group.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from trt_kd.artifacts import Artifact, claim_work, piece
from trt_kd.artifacts.environment import environment
from trt_kd.backends.onnxruntime import OnnxRuntime
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.config import validate
from trt_kd.data.base import DataConfig, token_blocks
from trt_kd.errors import ArtifactError, TrtKdError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.verification import load_source
from trt_kd.stages.export import ExportConfig, export
from trt_kd.stages.quantize import QuantizeConfig, quantize

FP8, INT8_SQ = {"kind": "fp8"}, {"kind": "int8_smoothquant"}
INT4_AWQ = {"kind": "int4_awq", "block_size": 64}
ROWS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "hf-unified-fp8": (FP8, {"kind": "hf-unified"}),
    "hf-unified-int8-sq": (INT8_SQ, {"kind": "hf-unified"}),
    "hf-unified-int4-awq": (INT4_AWQ, {"kind": "hf-unified"}),
    **{
        f"trtllm-checkpoint-{name}-tp{ranks}": (
            quantization,
            {"kind": "trtllm-checkpoint", "tensor_parallel": ranks},
        )
        for name, quantization in (("bf16", None), ("fp8", FP8), ("int8-sq", INT8_SQ))
        for ranks in (1, 2, 3)
    },
    "onnx-fp32": (None, {"kind": "onnx", "precision": "fp32"}),
    "onnx-qdq-fp8": (FP8, {"kind": "onnx"}),
    "onnx-qdq-int8-sq": (INT8_SQ, {"kind": "onnx"}),
    "onnx-qdq-int4-awq": (INT4_AWQ, {"kind": "onnx"}),
    "tensorrt-rtx-fp16": (None, {"kind": "tensorrt-rtx", "precision": "fp16"}),
    "ort-genai-int4": (None, {"kind": "ort-genai", "precision": "int4"}),
    "ort-genai-fp32": (None, {"kind": "ort-genai", "precision": "fp32"}),
}
"""Quantization before the export, if any, and the lane, by the name of the row."""
COLUMNS = (
    "| Export | Seconds | Bytes | KL (nats/token) | Largest logit difference | Quantization KL "
    "| KL to itself | Realised precision |\n|:--|--:|--:|--:|--:|--:|--:|:--|"
)
MOVED = 1e-6
"""Relative size of the noise on the embedding under which a quantized model is held to itself."""
BATCHES = (1, 4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="one checkpoint through every export lane")
    parser.add_argument("--student", type=Path, required=True, help="artifact of a checkpoint")
    parser.add_argument("--work", type=Path, default=Path("export-table"), help="kept, to resume")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--data", default="{}", help="JSON: the text; standard docstrings if empty")
    parser.add_argument("--lane", default="{}", help="JSON: options of lanes by their kind")
    parser.add_argument("--blocks", type=int, default=4, help="held-out blocks to compare")
    parser.add_argument("--prompts", type=int, default=20, help="prompts to continue greedily")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each continuation")
    given = parser.parse_args(arguments)
    try:
        student = Artifact.open(given.student, expect="checkpoint")
        data = validate(DataConfig, json.loads(given.data), where="--data")
        rows = [row(name, student, given, data) for name in given.only]
        greedy = None
        if "onnx-fp32" in given.only and (exported := opened(given.work / "onnx-fp32")):
            greedy = greedy_agreement(student, exported, given, data)
    except (TrtKdError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "hardware": environment(),
        "workload": {
            "student": student.key,
            "parameters": load_shape(student),
            "data": data.model_dump(mode="json"),
            "held_out_blocks": given.blocks,
        },
        "rows": rows,
        "greedy": greedy,
    }
    print(table(rows, greedy))
    print(json.dumps(result))
    return 0


def load_shape(student: Artifact) -> int:
    """Parameters of the student, from its ``config.json``."""
    from trt_kd.architectures.shape import read_shape

    return read_shape(student.path).parameters


def row(
    name: str, student: Artifact, given: argparse.Namespace, data: DataConfig
) -> dict[str, Any]:
    """Make or reopen the artifact of a row; numbers, or the reason why there are none."""
    quantization, lane = ROWS[name]
    print(f"{name} ...", file=sys.stderr, flush=True)
    if lane["kind"] not in EXPORTERS.names():
        return {"name": name, "refused": f"the lane {lane['kind']} is not registered"}
    lane = {**lane, **json.loads(given.lane).get(lane["kind"], {})}
    settings = {"lane": lane, "data": data.model_dump(), "verify_blocks": given.blocks}
    try:
        source = student
        if quantization is not None:
            source = quantized(quantization, student, given.work, data)
        config = validate(ExportConfig, settings, where=name)
        out = given.work / name
        made = opened(out) or export(config, source=source, out=out)
    except TrtKdError as error:
        return {"name": name, "refused": without_places(str(error), given)}
    noise = own_noise(source, given, data) if quantization is not None else None
    return {"name": name, **numbers(made, source), "kl_to_itself_nats": noise}


def without_places(text: str, given: argparse.Namespace) -> str:
    """``text`` in one line, folders of this machine by their names alone."""
    for place in (given.student, given.work):
        text = text.replace(f"{place}", place.name)
    return " ".join(text.split())


def opened(out: Path) -> Artifact | None:
    """The finished artifact at ``out``; None if there is none."""
    try:
        return Artifact.open(out)
    except ArtifactError:
        return None


def quantized(
    settings: dict[str, Any], student: Artifact, work: Path, data: DataConfig
) -> Artifact:
    """The student in a low-bit format, made once for all lanes that take it."""
    out = work / f"quantized-{settings['kind']}"
    config = validate(QuantizeConfig, {"format": settings, "data": data.model_dump()}, where="row")
    return opened(out) or quantize(config, source=student, out=out)


def own_noise(source: Artifact, given: argparse.Namespace, data: DataConfig) -> float:
    """Mean KL per token of a quantized model to itself with its embedding moved a little.

    Kept in the work folder beside the artifact.
    """
    import torch

    blocks_NL = token_blocks(
        data, load_tokenizer(source.path), split="heldout", count=given.blocks, seed=0
    )

    def measured(_: Path) -> dict[str, Any]:
        model = load_source(source)
        before = list(logits_of(model, blocks_NL))
        weight = model.get_input_embeddings().weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight.mul_(1 + MOVED * noise)
        return {"kl_nats": compare(before, logits_of(model, blocks_NL)).kl_nats}

    work = given.work / f"noise-{source.key[:12]}-{given.blocks}"
    return float(piece(work, measured)["kl_nats"])


def numbers(made: Artifact, source: Artifact) -> dict[str, Any]:
    """What the table shows of an export, and all that its manifest records."""
    metrics = made.metrics
    return {
        "seconds": metrics["seconds"],
        "weight_bytes": metrics["weight_bytes"],
        "logits_kl_nats": metrics["logits_kl_nats"],
        "logits_max_abs": metrics["logits_max_abs"],
        "quantization_kl_nats": source.metrics.get("kl_to_source_nats"),
        "weight_share_by_bits": metrics["weight_share_by_bits"],
        "metrics": metrics,
    }


def greedy_agreement(
    student: Artifact, exported: Artifact, given: argparse.Namespace, data: DataConfig
) -> dict[str, Any]:
    """Prompts whose greedy tokens ONNX Runtime and transformers agree on, by batch size.

    The tokens of transformers are computed once, every group of prompts of ONNX Runtime is kept:
    a run that was cut off goes on with the next group.
    """
    sizes = {"prompts": given.prompts, "tokens": given.tokens}
    identity = {"models": [student.key, exported.key], "data": data.model_dump(mode="json")}
    key = json.dumps(identity | sizes, sort_keys=True)
    work = claim_work(given.work / "greedy", sha256(key.encode()).hexdigest())
    prompts = greedy_prompts(student, given.prompts, data)

    def reference(_: Path) -> dict[str, Any]:
        model = load_model(student.path, dtype="float32")
        return {"tokens": continued(model, prompts, given.tokens).tolist()}

    expected = piece(work / "transformers", reference)["tokens"]
    found = {}
    with ExitStack() as stack:
        session = cache(lambda: stack.enter_context(OnnxRuntime().load(exported.path)))
        for batch in BATCHES:
            same = 0
            for start in range(0, len(prompts), batch):
                group = prompts[start : start + batch]
                made = piece(
                    work / f"onnxruntime-batch-{batch}-{start}",
                    partial(generated, session, group, given.tokens),
                )
                wanted = expected[start : start + batch]
                same += sum(a == b for a, b in zip(made["tokens"], wanted, strict=True))
            found[f"equal_at_batch_{batch}"] = same
    return {**sizes, **found}


def greedy_prompts(student: Artifact, count: int, data: DataConfig) -> list[list[int]]:
    """Beginnings of held-out blocks, of six different lengths in turn."""
    tokenizer = load_tokenizer(student.path)
    blocks_NL = token_blocks(data, tokenizer, split="heldout", count=count, seed=1)
    lengths = [8 + 3 * (n % 6) for n in range(count)]
    return [block[:length].tolist() for block, length in zip(blocks_NL, lengths, strict=True)]


def generated(
    session: Callable[[], Any], prompts: list[list[int]], tokens: int, _: Path
) -> dict[str, Any]:
    """Greedy continuations of a group of prompts by ONNX Runtime."""
    return {"tokens": session().generate(prompts, tokens).tolist()}


def continued(model: Any, prompts: list[list[int]], tokens: int) -> np.ndarray:
    """Greedy continuations ``[B, tokens]`` by stock transformers, padded on the left.

    End-of-text is a token like any other.
    """
    import torch

    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids_BL, real_BT, past, found = torch.tensor(padded), torch.tensor(real), None, []
    with torch.inference_mode():
        for _ in range(tokens):
            positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
            output = model(
                input_ids=ids_BL, attention_mask=real_BT,
                position_ids=positions_BT[:, -ids_BL.shape[1] :],
                past_key_values=past, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            ids_BL, past = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            real_BT = torch.cat([real_BT, torch.ones_like(ids_BL)], dim=1)
            found.append(ids_BL[:, 0].numpy())
    return np.stack(found, axis=1)


def table(rows: list[dict[str, Any]], greedy: dict[str, Any] | None) -> str:
    """Rows with numbers as a table, then the refused ones and the greedy tokens as sentences."""
    lines = [COLUMNS]
    for entry in rows:
        if "refused" in entry:
            continue
        shares = entry["weight_share_by_bits"].items()
        precision = ", ".join(f"{share:.1%} in {bits} bits" for bits, share in shares)
        lost, noise = (
            "-" if entry[key] is None else format(entry[key], ".2g")
            for key in ("quantization_kl_nats", "kl_to_itself_nats")
        )
        lines.append(
            f"| {entry['name']} | {entry['seconds']:.1f} | {entry['weight_bytes']:,} "
            f"| {entry['logits_kl_nats']:.2g} | {entry['logits_max_abs']:.2g} "
            f"| {lost} | {noise} | {precision} |"
        )
    refused = [entry for entry in rows if "refused" in entry]
    lines += ["", *(f"- {entry['name']}: {entry['refused']}" for entry in refused)]
    if greedy is not None:
        counts = ", ".join(f"{greedy[f'equal_at_batch_{b}']} at batch {b}" for b in BATCHES)
        sentence = (
            f"ONNX Runtime generates the {greedy['tokens']} greedy tokens of transformers for"
        )
        lines += ["", f"{sentence} {counts} of {greedy['prompts']} prompts."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
