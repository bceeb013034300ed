"""The script ends with JSON that holds every loss beside the untrained student and the control."""

import importlib
import json

import yaml

from trt_kd.stages.distill import require_modelopt

require_modelopt()


def test_every_loss_stands_beside_both_controls(teacher, text_file, tmp_path, capsys):
    script = importlib.import_module("losses_table")
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "name": "tiny",
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "import": {"source": str(teacher.path)},
        "prune": {"axes": [{"kind": "ffn", "size": 64}], "calibration_tokens": 128},
        "distill": {"steps": 9, "batch_size": 2, "warmup_steps": 4, "precision": "fp32"},
        "export": {"deploy": {"lane": "hf-unified"}},
        "evaluate": {"blocks": 2, "tasks": ["facts"], "items": 4},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    given = ["--recipe", recipe, "--teacher", teacher.path, "--work", tmp_path / "work"]
    losses = ["--steps", "2", "--losses", "forward_kl", "jsd", "--features", "mse", "minilm"]
    for _ in range(2):  # the second time from what stands in the work folder
        assert script.main([*map(str, given), *losses]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        record = json.loads(last)
        names = [row["name"] for row in record["results"]]
        trained = ["forward_kl", "jsd", "forward_kl+mse", "forward_kl+minilm"]
        assert names == ["untrained", "cross_entropy", *trained]
        assert record["tokens"] == 2 * 2 * 32
        assert len({row["kl_to_teacher_nats"] for row in record["results"]}) == 6
        assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
