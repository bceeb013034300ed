"""The script prunes a sharded model in a process of its own and ends with JSON."""

import json
import sys

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import load_model, load_tokenizer


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("prune_memory")


def test_the_random_model_is_a_sharded_checkpoint_that_loads(script, tmp_path):
    script.write_model(script.SMALL, tmp_path / "model", None)
    source = Artifact.open(tmp_path / "model", expect="checkpoint")
    source.verify()
    model = load_model(source.path)
    index = json.loads((source.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert model.num_parameters() == read_shape(source.path).parameters
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()
    weight = model.model.layers[3].mlp.down_proj.weight.detach().float()
    assert float(weight.std()) == pytest.approx(256**-0.5, rel=0.02)
    assert len(load_tokenizer(source.path)("any text")["input_ids"]) > 0


def test_the_large_model_has_more_than_a_billion_parameters(script):
    sizes = [size for shard in script.sharded(script.LARGE) for size in shard.values()]
    assert sum(script.math.prod(size) for size in sizes) == pytest.approx(1.1e9, rel=0.01)


def test_a_command_is_listened_to_and_its_failure_passed_on(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "COMMAND", [sys.executable, "-c"])
    code = "import sys; print('one\\ntwo', file=sys.stderr)"
    found = script.run([code])
    assert found["progress_lines"] == 2
    assert found["longest_silence_s"] > 0
    assert capsys.readouterr().err == "one\ntwo\n"
    with pytest.raises(script.subprocess.CalledProcessError):
        script.run(["raise SystemExit(2)"])


@pytest.mark.slow
def test_the_whole_script_runs(script, tokenizer_dir, capfd):
    arguments = ["--small", "--tokenizer", str(tokenizer_dir), "--calibration-tokens", "512"]
    assert script.main(arguments) == 0
    *table, last = capfd.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["parameters_after"] < 0.7 * record["parameters_before"]
    assert 1 << 26 < record["peak_bytes"] < record["limit_bytes"] == 8e9
    assert record["workload"]["shards"] == 3
    assert record["progress_lines"] >= 1
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
