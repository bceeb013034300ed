"""Both students are timed, measured, distilled alike and measured again."""

import importlib
import json

import pytest
import yaml

from trt_kd.stages.distill import require_modelopt
from trt_kd.stages.prune import PruneConfig, prune

require_modelopt()


@pytest.fixture
def script(monkeypatch):
    found = importlib.import_module("latency_or_params")
    monkeypatch.setattr(found, "untested_export", lambda lane, source, out: source)
    return found


@pytest.mark.usefixtures("forked")
def test_the_record_holds_both_moments_and_the_times(script, teacher, text_file, tmp_path, capsys):
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    cuts = {}
    for name, size in (("latency", 128), ("params", 64)):
        axes = [{"kind": "ffn", "size": size}]
        config = PruneConfig.model_validate({"axes": axes, "calibration_tokens": 128, "data": data})
        cuts[name] = prune(config, source=teacher, out=tmp_path / name)
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "name": "tiny",
        "data": data,
        "import": {"source": str(teacher.path)},
        "prune": {"axes": [{"kind": "ffn", "size": 64}], "calibration_tokens": 128},
        "distill": {"steps": 2, "batch_size": 2, "precision": "fp32"},
        "export": {"deploy": {"lane": "hf-unified"}},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    given = [teacher.path, "--recipe", recipe, "--work", tmp_path / "work", "--blocks", "3"]
    given += [word for name, cut in cuts.items() for word in (f"--{name}", cut.path)]
    sizes = ["--input-tokens", "8", "--output-tokens", "3", "--batch", "2", "--repeats", "2"]
    assert script.main([*map(str, given), *sizes]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    for moment in ("before", "after"):
        found = record[moment]
        kl = found["kl_to_teacher_nats"]
        difference = found["difference_nats"]
        assert difference["mean"] == pytest.approx(kl["latency"] - kl["params"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert record["before"] != record["after"]
    assert {one["runs"] for one in record["itl_over_teacher"].values()} == {2}
    assert record["distillation_tokens"] == 2 * 2 * 32
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
