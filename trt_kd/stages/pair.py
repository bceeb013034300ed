"""Pair: a draft and its target in one folder, configured for speculative decoding."""

import shutil
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ModelError
from trt_kd.evaluation.vocabulary import context_tokens, tokenizer_identity

_LANE = "hf-unified"


class PairConfig(StageConfig):
    """How far the draft writes ahead."""

    stage: ClassVar[str] = "pair"

    tokens_ahead: Annotated[int, Field(ge=1, le=64)] = 4
    """Tokens that the draft writes before the target checks them; ``trt-kd draft`` says how many
    pay."""


def pair(config: PairConfig, *, target: Artifact, draft: Artifact, out: Path) -> Artifact:
    """Put the exports ``target`` and ``draft`` side by side at ``out``, with one configuration.

    Raises:
        ArtifactError: if one is no ``hf-unified`` export, or is damaged.
        ModelError: if they do not share vocabulary and tokenizer, the draft is not the smaller one,
            or TensorRT-LLM does not serve a format.
    """
    from trt_kd.exporters.speculative import DRAFT, TARGET, write_pair_serving
    from trt_kd.exporters.trtllm_commands import OPTIONS_FILE, SERVE_FILE, serving_workload

    for artifact in (target, draft):
        check_member(artifact)
    check_match(target.path, draft.path)
    workload = serving_workload(min(context_tokens(target.path), context_tokens(draft.path)))
    with writing(
        out, kind="pair", config=config, inputs={"target": target, "draft": draft}
    ) as made:
        for folder, artifact in ((TARGET, target), (DRAFT, draft)):
            artifact.verify()
            for name in artifact.manifest.files:
                if name in (OPTIONS_FILE, SERVE_FILE):
                    continue  # how it is served alone
                (made.path / folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, made.path / folder / name)
        write_pair_serving(made.path, workload, config.tokens_ahead)
        made.metrics |= {
            "tokens_ahead": config.tokens_ahead,
            "target_parameters": read_shape(target.path).parameters,
            "draft_parameters": read_shape(draft.path).parameters,
            "longest_sequence_tokens": workload.sequence_tokens,
        }
    return Artifact.open(out, expect="pair")


def check_member(artifact: Artifact) -> None:
    """Check that ``artifact`` is an export that TensorRT-LLM and vLLM load, in a format served.

    Raises:
        ArtifactError: if it is something else.
        ModelError: if its format is not served.
    """
    from trt_kd.exporters.hf_unified_files import read_quantization
    from trt_kd.exporters.trtllm_commands import SERVED

    lane = artifact.manifest.config.get("lane")
    kind = lane.get("kind") if isinstance(lane, dict) else lane
    if artifact.manifest.kind != "export" or kind != _LANE:
        raise ArtifactError(
            f"{artifact.path} is no export of the lane {_LANE}",
            hint=f"make one: trt-kd export --source {artifact.path} --out FOLDER --lane {_LANE}",
        )
    told = read_quantization(artifact.path)
    algorithms = {layer.algorithm for layer in (told.layers or {}).values()} if told else set()
    unserved = sorted((algorithms | {told.algorithm} if told else set()) - set(SERVED))
    if unserved:
        raise ModelError(
            f"{artifact.path} is in {unserved[0]}, which TensorRT-LLM's PyTorch backend does not "
            "document",
            hint="quantize it in fp8 or int4_awq, or not at all",
        )


def check_match(target: Path, draft: Path) -> None:
    """Check that the draft writes the target's tokens, and is the smaller model.

    Padding of the vocabulary counts: runtimes compare the rows of both heads.

    Raises:
        ModelError: if it is not so.
    """
    shapes = {"target": read_shape(target), "draft": read_shape(draft)}
    if shapes["target"].vocab != shapes["draft"].vocab:
        raise ModelError(
            f"the target has {shapes['target'].vocab:,} tokens and the draft "
            f"{shapes['draft'].vocab:,}",
            hint="runtimes compare their heads row by row: give both one vocabulary",
        )
    if tokenizer_identity(target) != tokenizer_identity(draft):
        raise ModelError(
            f"{target} and {draft} have different tokenizers",
            hint="a draft writes its target's tokens: prune it from the target",
        )
    if shapes["draft"].parameters >= shapes["target"].parameters:
        raise ModelError(
            f"the draft has {shapes['draft'].parameters:,} parameters, the target "
            f"{shapes['target'].parameters:,}: it would not save anything",
            hint="give them the other way round, or a smaller draft",
        )
