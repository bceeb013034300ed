"""Engines: with a builder in TensorRT-LLM's place, and without one."""

import json
import shlex
import sys

import pytest

from trt_kd.artifacts import Artifact
from trt_kd.backends.trtllm_container import IMAGE
from trt_kd.errors import MissingDependencyError, ModelError, VerificationError
from trt_kd.exporters.trtllm_engine import TrtllmEngine
from trt_kd.stages.export import ExportConfig, export

BUILDER = """
import json, sys
from pathlib import Path

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("building", sys.argv[1:])
checkpoint, out = Path(options["--checkpoint_dir"]), Path(options["--output_dir"])
config = json.loads((checkpoint / "config.json").read_text())
config["mapping"] |= {"cp_size": 1}
build = {
    name: int(options["--" + name])
    for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
}
CHANGE
for rank in range(config["mapping"]["world_size"]):
    data = (checkpoint / f"rank{rank}.safetensors").read_bytes()
    (out / f"rank{rank}.engine").write_bytes(data[: int(len(data) * SHARE)])
whole = {"version": "1.2.1", "pretrained_config": config, "build_config": build}
(out / "config.json").write_text(json.dumps(whole))
Path(options["--output_timing_cache"]).write_text("times")
"""
LANE = {
    "kind": "trtllm-engine",
    "tensor_parallel": 2,
    "max_batch_size": 4,
    "max_input_tokens": 64,
    "max_output_tokens": 32,
}


@pytest.fixture
def config(text_file):
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    return ExportConfig.model_validate({"lane": LANE, "data": data, "verify_blocks": 1})


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package named tensorrt_llm in place whose builder copies the weights."""

    def put(change: str = "", share: float = 1.0):
        folder = tmp_path / "site" / "tensorrt_llm" / "commands"
        folder.mkdir(parents=True, exist_ok=True)
        code = BUILDER.replace("CHANGE", change).replace("SHARE", str(share))
        (folder / "build.py").write_text(code)
        for package in (folder, folder.parent):
            (package / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    return put


def test_without_tensorrt_llm_the_checkpoint_stays_and_docker_is_named(teacher, config, tmp_path):
    out = tmp_path / "e"
    with pytest.raises(MissingDependencyError, match="the verified checkpoint stays in") as caught:
        export(config, source=teacher, out=out)
    assert len(str(caught.value).splitlines()) == 2
    assert not out.exists()
    assert not (tmp_path / "e.partial").exists()
    checkpoint = tmp_path / "e.work" / "trtllm-checkpoint"
    Artifact.open(checkpoint, expect="export").verify()
    words = shlex.split(caught.value.hint.partition(": ")[2])
    command = words[words.index(IMAGE) + 1 :]
    assert command[:3] == ["trtllm-build", "--checkpoint_dir", str(checkpoint)]
    assert command[command.index("--output_dir") + 1] == str(tmp_path / "e.work" / "engine")


def test_what_the_container_built_is_taken_in_by_the_same_command(
    teacher, config, install, tmp_path, monkeypatch
):
    import subprocess

    out = tmp_path / "e"
    with pytest.raises(MissingDependencyError) as caught:
        export(config, source=teacher, out=out)
    made = (tmp_path / "e.work/trtllm-checkpoint/rank0.safetensors").stat().st_mtime_ns
    words = shlex.split(caught.value.hint.partition(": ")[2])
    (tmp_path / "e.work" / "engine").mkdir()
    with monkeypatch.context():
        install()
        program = [sys.executable, "-m", "tensorrt_llm.commands.build"]
        subprocess.run([*program, *words[words.index(IMAGE) + 2 :]], check=True)
    monkeypatch.setattr("trt_kd.exporters.trtllm_engine._can_build", lambda: False)
    assert (tmp_path / "e.work/trtllm-checkpoint/rank0.safetensors").stat().st_mtime_ns == made
    artifact = export(config, source=teacher, out=out)
    assert artifact.metrics["tensorrt_llm"] == "1.2.1"
    assert not (tmp_path / "e.work").exists()


def test_with_tensorrt_llm_the_engine_its_log_and_its_cache_become_the_artifact(
    teacher, config, install, tmp_path
):
    install()
    artifact = export(config, source=teacher, out=tmp_path / "e")
    artifact.verify()
    names = set(artifact.manifest.files)
    assert names >= {
        *("config.json", "rank0.engine", "rank1.engine", "model.cache", "build.log"),
        *("checkpoint_config.json", "hf/config.json", "hf/tokenizer.json", "serve.md"),
    }
    metrics = artifact.metrics
    assert metrics["logits_kl_nats"] < metrics["logits_kl_limit_nats"]
    assert metrics["weight_bytes"] > 0
    assert "--tensor_parallel" not in (tmp_path / "e/build.log").read_text()
    assert json.loads((tmp_path / "e/hf/config.json").read_text())["model_type"] == "llama"


def test_a_build_that_fails_leaves_its_log_and_the_checkpoint(teacher, config, install, tmp_path):
    install(change="sys.exit('no GPU')")
    with pytest.raises(ModelError, match="trtllm-build failed with exit code 1"):
        export(config, source=teacher, out=tmp_path / "e")
    assert "no GPU" in (tmp_path / "e.work/build.log").read_text()
    assert (tmp_path / "e.work/trtllm-checkpoint/config.json").is_file()
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"change": "build['max_seq_len'] = 9"}, "max_seq_len is 9, 96 was asked for"),
        ({"change": "config['rotary_base'] = 1.0"}, "pretrained_config.rotary_base is 1.0"),
        ({"change": "config['mapping']['tp_size'] = 1"}, "pretrained_config.mapping.tp_size is 1"),
        ({"share": 0.1}, "rank0.engine has"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused_and_built_anew(
    teacher, config, install, tmp_path, fault, reason
):
    install(**fault)
    with pytest.raises(VerificationError, match=reason):
        export(config, source=teacher, out=tmp_path / "e")
    assert not (tmp_path / "e").exists()
    install()
    assert export(config, source=teacher, out=tmp_path / "e").metrics["tensorrt_llm"] == "1.2.1"


def test_lengths_beyond_the_model_are_refused_before_anything_is_read(teacher):
    lane = TrtllmEngine(max_input_tokens=500, max_output_tokens=13)
    (problem,) = lane.check_source(teacher)
    assert problem == (
        "max_input_tokens + max_output_tokens is 513; sequences of this model in an engine end at "
        "512"
    )
