"""``--lane auto``: what is chosen takes the source, or every lane's reason is named."""

import json
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from trt_kd.architectures import ARCHITECTURES
from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.cli.app import app
from trt_kd.config import StageConfig
from trt_kd.errors import ConfigError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.choosing import Deployment, Runtime, choose

ROOT = Path(__file__).parents[2]
VERSIONS = (None, "1.2.1", "1.3.0rc21")
GPUS = (None, "cpu", "hopper")
FORMATS = (None, "fp8", "int8_smoothquant", "int4_awq", "mixed")


class Made(StageConfig):
    stage = "made"
    format: dict | None = None


@pytest.fixture(scope="module")
def sources(tmp_path_factory, teacher):
    """An artifact of every family and format, of which only config and manifest are there."""
    root = tmp_path_factory.mktemp("sources")
    plain = json.loads((teacher.path / "config.json").read_text())
    found = []
    for family in ARCHITECTURES.names():
        for kind in FORMATS:
            out = root / f"{family}-{kind}"
            config = Made(format={"kind": kind} if kind else None)
            stored = "quantized" if kind else "checkpoint"
            with writing(out, kind=stored, config=config, inputs={}) as draft:
                text = json.dumps(plain | {"model_type": family, "max_position_embeddings": 4096})
                (draft.path / "config.json").write_text(text)
            found.append(Artifact.open(out))
    return found


@pytest.mark.parametrize("machine", [None, "1 x NVIDIA H100"])
@pytest.mark.parametrize("runtime", [None, *get_args(Runtime)])
def test_the_lane_chosen_takes_the_source_or_every_lane_says_why_not(
    sources, runtime, machine, monkeypatch
):
    monkeypatch.setattr("trt_kd.exporters.choosing.environment", lambda: {"gpu": machine})
    chosen, refused = set(), []
    for source in sources:
        for version in VERSIONS if runtime == "trtllm" else (None,):
            for gpu in GPUS:
                deployment = Deployment(runtime=runtime, version=version, gpu=gpu)
                try:
                    choice = choose(deployment, source)
                except ConfigError as error:
                    refused.append(error)
                    continue
                lane = choice.lane
                shape = read_shape(source.path)
                assert lane.check(shape, source.manifest.kind) == []
                assert lane.check_source(source) == []
                assert choice.explanation()[-1].startswith(f"lane {lane.kind}: ")
                chosen.add(lane.kind)
    assert all(error.hint for error in refused)
    assert all("not " in str(error) or "GPUs only" in str(error) for error in refused)
    assert chosen <= set(EXPORTERS.names())
    assert chosen
    if runtime in ("onnxruntime", "ort-genai", "tensorrt-rtx"):
        assert refused, "they take not every source"


@pytest.fixture
def source(sources):
    def find(family, kind):
        return next(one for one in sources if one.path.name == f"{family}-{kind}")

    return find


@pytest.mark.parametrize(
    ("target", "kind", "lane"),
    [
        ({"runtime": "trtllm"}, "fp8", "hf-unified"),
        ({"runtime": "trtllm", "version": "1.3.0rc21"}, "fp8", "hf-unified"),
        ({"runtime": "trtllm", "version": "1.2.1"}, "fp8", "hf-unified"),
        ({"runtime": "trtllm", "version": "1.2.1"}, "int8_smoothquant", "trtllm-engine"),
        ({"runtime": "vllm"}, "int4_awq", "hf-unified"),
        ({"runtime": "onnxruntime"}, None, "onnx"),
        ({"runtime": "onnxruntime"}, "fp8", "onnx"),
        ({"gpu": "cpu"}, None, "ort-genai"),
        ({"gpu": "hopper"}, None, "hf-unified"),
        ({"gpu": "hopper"}, "int8_smoothquant", "hf-unified"),
        ({"gpu": "cpu"}, "fp8", "onnx"),
        ({"gpu": "cpu"}, "int4_awq", "onnx"),
        ({"gpu": "cpu"}, "mixed", "hf-unified"),
    ],
)
def test_a_llama_goes_where_its_runtime_looks(source, target, kind, lane):
    assert choose(Deployment(**target), source("llama", kind)).lane.kind == lane


def test_a_family_without_the_best_lane_gets_the_next_and_hears_why(source):
    choice = choose(Deployment(gpu="cpu"), source("olmo2", None))
    assert choice.lane.kind == "hf-unified"
    assert [line.split(":")[0] for line in choice.passed_over] == ["not ort-genai", "not onnx"]


@pytest.mark.parametrize(
    ("kind", "lane", "other"),
    [
        (None, "ort-genai", "onnx"),
        ("int8_smoothquant", "onnx", "hf-unified"),
        ("int4_awq", "onnx", "hf-unified"),
        ("fp8", "hf-unified", "onnx"),
    ],
)
def test_without_target_and_gpu_what_this_machine_can_run_is_chosen_or_told(
    source, kind, lane, other, monkeypatch
):
    monkeypatch.setattr("trt_kd.exporters.choosing.environment", lambda: {"gpu": None})
    *others, chosen = choose(Deployment(), source("llama", kind)).explanation()
    assert chosen.startswith(f"lane {lane}: this machine has no GPU")
    assert any(line.startswith(f"also possible, {other}: ") for line in others)


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"runtime": "vllm", "version": "1.2"}, "has no effect"),
        ({"runtime": "trtllm", "version": "new"}, "is no version"),
        ({"runtime": "trtllm", "gpu": "cpu"}, "GPUs only"),
        ({"runtime": "ort-genai"}, "no lane takes"),
    ],
)
def test_what_cannot_be_is_refused_in_two_lines(source, target, what):
    with pytest.raises(ConfigError, match=what) as caught:
        choose(Deployment(**target), source("llama", "fp8"))
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) == 2


def test_the_target_of_a_recipe_is_taken_and_its_parts_can_be_replaced(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)
    recipe = ROOT / "workflows/llama3.1-8b-to-4b-width-fp8.yaml"  # trtllm on hopper
    quantized = source("llama", "int8_smoothquant").path

    def call(*about):
        given = ["export", "--source", quantized, "--out", tmp_path / "e", "--lane", "auto"]
        return CliRunner().invoke(app, [*map(str, given), *about])

    newest, old = call(f"target={recipe}"), call(f"target={recipe}", "target.version=1.2.1")
    assert "lane hf-unified: TensorRT-LLM's PyTorch backend" in newest.stderr
    assert "lane trtllm-engine: " in old.stderr
    without = call(f"target={ROOT / 'workflows/quickstart.yaml'}")
    assert without.exit_code == 2
    assert "names neither runtime nor gpu" in without.output


def test_the_command_explains_its_choice_and_exports(teacher, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)
    data = [f"data.source={{kind: text, files: [{text_file}]}}", "data.block_tokens=32"]
    given = ["--source", teacher.path, "--out", tmp_path / "e", *data, "--lane", "auto"]

    def call(*more):
        return CliRunner().invoke(app, ["export", *map(str, given), *more])

    done = call("target.runtime=vllm", "verify_blocks=1")
    assert done.exit_code == 0, done.output
    assert "lane hf-unified: vLLM loads Hugging Face folders" in done.stderr
    assert Artifact.open(tmp_path / "e").manifest.config["lane"]["kind"] == "hf-unified"
    for more, what in (("lane=onnx", "leave out"), ("target.runtime=tgi", "target: 1 problem")):
        refused = call(more)
        assert refused.exit_code == 2
        assert what in refused.output
