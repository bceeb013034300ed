"""A draft beside its target: one configuration, and refused where no runtime would take it."""

import json
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.cli.app import app
from trt_kd.config import StageConfig, validate
from trt_kd.errors import ArtifactError, ConfigError, ModelError
from trt_kd.stages.pair import PairConfig, check_member, pair


class Exported(StageConfig):
    """Stands for an export of a lane."""

    stage = "export"
    lane: dict


@pytest.fixture(scope="module")
def exported(make_model, tokenizer_dir, tmp_path_factory):
    """An ``hf-unified`` export of a model with such changes; another tokenizer on request."""

    def make(lane="hf-unified", added_token=None, **changes) -> Artifact:
        out = tmp_path_factory.mktemp("export") / "e"
        config = Exported(lane={"kind": lane})
        with writing(out, kind="export", config=config, inputs={}) as draft:
            save_model(make_model(**changes), draft.path, tokenizer_from=tokenizer_dir)
            (draft.path / "serve.md").write_text("alone", encoding="utf-8")
            if added_token is not None:
                path = draft.path / "tokenizer.json"
                content = json.loads(path.read_text())
                content["added_tokens"][0]["content"] = added_token
                path.write_text(json.dumps(content))
        return Artifact.open(out)

    return make


@pytest.fixture(scope="module")
def target(exported):
    return exported()


@pytest.fixture(scope="module")
def small(exported):
    return exported(num_hidden_layers=1, max_position_embeddings=256)


@pytest.fixture(scope="module")
def made(target, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "p"
    return pair(PairConfig(tokens_ahead=3), target=target, draft=small, out=out)


def test_both_models_are_there_byte_for_byte_without_what_serves_one_alone(made, target, small):
    for folder, source in (("target", target), ("draft", small)):
        for name, digest in source.manifest.files.items():
            if name != "serve.md":
                assert made.manifest.files[f"{folder}/{name}"] == digest
        assert not (made.path / folder / "serve.md").exists()
    assert made.manifest.inputs == {"target": target.key, "draft": small.key}
    made.verify()


def test_every_runtime_is_told_of_the_same_draft(made):
    spelled = {
        "1.2": ("DraftTarget", "speculative_model_dir"),
        "1.3": ("Draft_Target", "speculative_model"),
    }
    for version, (decoding, place) in spelled.items():
        options = yaml.safe_load((made.path / f"llm_api_options_{version}.yaml").read_text())
        told = options["speculative_config"]
        assert told == {"decoding_type": decoding, "max_draft_len": 3, place: "draft"}
        assert options["disable_overlap_scheduler"] is True
        assert options["kv_cache_config"]["enable_block_reuse"] is False
    vllm = json.loads((made.path / "vllm_speculative_config.json").read_text())
    assert vllm == {"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}
    lines = [
        shlex.split(line)
        for line in (made.path / "serve.md").read_text().splitlines()
        if line.startswith(("trtllm-serve", "vllm"))
    ]
    assert [line[:3] for line in lines] == [
        ["trtllm-serve", "target", "--backend"],
        ["trtllm-serve", "target", "--backend"],
        ["vllm", "serve", "target"],
    ]
    assert json.loads(lines[2][lines[2].index("--speculative-config") + 1]) == vllm


def test_sequences_end_where_the_shorter_context_does(made):
    assert made.metrics["longest_sequence_tokens"] == 256
    assert made.metrics["draft_parameters"] < made.metrics["target_parameters"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 520}, "the target has 512 tokens and the draft 520"),
        ({"added_token": "<|end|>"}, "different tokenizers"),
        ({"num_hidden_layers": 4}, "would not save anything"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(target, exported, tmp_path, changes, reason):
    draft = exported(**({"num_hidden_layers": 1} | changes))
    with pytest.raises(ModelError, match=reason):
        pair(PairConfig(), target=target, draft=draft, out=tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_only_what_both_runtimes_load_is_taken(teacher, exported, target):
    for artifact in (teacher, exported(lane="onnx")):
        with pytest.raises(ArtifactError, match="no export of the lane hf-unified"):
            check_member(artifact)
    check_member(target)


def test_a_format_that_is_not_served_is_refused(exported):
    artifact = exported(num_hidden_layers=1)
    told = {"quant_algo": "W8A8_SQ_PER_CHANNEL"}
    path = artifact.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": told}))
    (artifact.path / "hf_quant_config.json").write_text(json.dumps({"quantization": told}))
    with pytest.raises(ModelError, match="W8A8_SQ_PER_CHANNEL, which TensorRT-LLM"):
        check_member(artifact)


@pytest.mark.parametrize("count", [0, 65])
def test_an_odd_number_of_tokens_is_refused(count):
    with pytest.raises(ConfigError, match="tokens_ahead"):
        validate(PairConfig, {"tokens_ahead": count}, where="pair")


def test_the_command_prints_how_to_serve(target, small, tmp_path, monkeypatch):
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)
    places = [
        "--target",
        str(target.path),
        "--draft",
        str(small.path),
        "--out",
        str(tmp_path / "p"),
    ]
    done = CliRunner().invoke(app, ["pair", *places, "tokens_ahead=2"])
    assert done.exit_code == 0, done.output
    assert "trtllm-serve target" in done.output
    assert '"num_speculative_tokens": 2' in done.output
