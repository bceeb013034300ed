"""The script makes one artifact a row, goes on where it stopped and ends with JSON."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "export_table.json"
ROWS = ["hf-unified-fp8", "hf-unified-int4-awq", "trtllm-checkpoint-bf16-tp2", "onnx-fp32"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("export_table")


@pytest.fixture
def run(script, teacher, text_file, tmp_path, capsys):
    """Run the script on the tiny teacher; the last line's JSON, and all that was printed."""
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    common = ["--student", str(teacher.path), "--work", str(tmp_path), "--data", json.dumps(data)]

    def call(*arguments: str):
        sizes = ["--blocks", "1", "--prompts", "3", "--tokens", "8"]
        assert script.main([*common, *sizes, *arguments]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return call


@pytest.mark.slow
def test_rows_are_made_once_and_say_what_was_written(run, script, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    result, printed = run("--only", *ROWS)
    rows = {entry["name"]: entry for entry in result["rows"]}
    assert list(rows) == ROWS
    assert rows["hf-unified-fp8"]["weight_share_by_bits"]["8"] > 0.6
    assert rows["hf-unified-int4-awq"]["weight_share_by_bits"]["4"] > 0.6
    assert rows["hf-unified-fp8"]["quantization_kl_nats"] > 0
    assert 0 <= rows["hf-unified-fp8"]["kl_to_itself_nats"] < 0.1
    assert rows["onnx-fp32"]["kl_to_itself_nats"] is None
    assert rows["onnx-fp32"]["weight_share_by_bits"] == {"32": 1.0}
    assert rows["onnx-fp32"]["logits_kl_nats"] < 1e-8
    tokens = {"prompts": 3, "tokens": 8, "equal_at_batch_1": 3, "equal_at_batch_4": 3}
    assert result["greedy"] == tokens
    assert "3 at batch 1, 3 at batch 4 of 3 prompts" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/trt_kd.json")}
    monkeypatch.setattr(sys.modules["trt_kd.stages.export"], "export", None)
    monkeypatch.setattr(script, "load_model", None)
    monkeypatch.setattr(script.OnnxRuntime, "load", None)
    again, _ = run("--only", *ROWS)
    assert again["rows"] == result["rows"]
    assert again["greedy"] == result["greedy"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/trt_kd.json")} == before


def test_the_batched_reference_is_what_single_prompts_give(script, make_model):
    import torch

    model = make_model()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [300, 200], [17, 4, 99]]
    found = script.continued(model, prompts, 6)
    for prompt, tokens in zip(prompts, found.tolist(), strict=True):
        text = list(prompt)
        for token in tokens:
            with torch.inference_mode():
                assert int(model(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)


def test_greedy_tokens_go_on_after_a_kill_with_the_groups_that_are_missing(
    script, teacher, text_file, tmp_path, monkeypatch
):
    """A stand-in for ONNX Runtime that says what transformers says, but is killed once."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    from trt_kd.config import validate

    asked = []

    class Session:
        def generate(self, prompts, tokens):
            asked.append(len(prompts))
            if len(asked) == 3:
                raise KeyboardInterrupt
            return script.continued(
                script.load_model(teacher.path, dtype="float32"), prompts, tokens
            )

    @contextmanager
    def load(self, directory):
        yield Session()

    monkeypatch.setattr(script.OnnxRuntime, "load", load)
    monkeypatch.setattr(script, "BATCHES", (1, 2))
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    data = validate(script.DataConfig, data, where="data")
    given = SimpleNamespace(work=tmp_path, prompts=3, tokens=4)
    with pytest.raises(KeyboardInterrupt):
        script.greedy_agreement(teacher, teacher, given, data)
    found = script.greedy_agreement(teacher, teacher, given, data)
    assert found == {"prompts": 3, "tokens": 4, "equal_at_batch_1": 3, "equal_at_batch_2": 3}
    assert asked == [1, 1, 1, 1, 2, 1]


def test_a_lane_that_is_not_there_or_refuses_is_a_row_with_its_reason(run, script, monkeypatch):
    monkeypatch.setitem(script.ROWS, "nobody", (None, {"kind": "no-such-lane"}))
    monkeypatch.setitem(script.ROWS, "odd", (None, {"kind": "hf-unified"}))
    result, printed = run("--only", "nobody", "odd", "--lane", '{"hf-unified": {"no": 1}}')
    assert "the lane no-such-lane is not registered" in result["rows"][0]["refused"]
    assert "Extra inputs are not permitted" in result["rows"][1]["refused"]
    assert "- nobody: the lane no-such-lane" in printed


def test_a_refusal_names_no_folder_of_the_machine(run, teacher, tmp_path):
    result, printed = run("--only", "trtllm-checkpoint-bf16-tp3")
    (row,) = result["rows"]
    assert "tensor_parallel 3: 4 query heads do not split evenly" in row["refused"]
    for place in (teacher.path.parent, tmp_path):
        assert str(place) not in printed


def test_the_rows_are_the_promised_ones(script):
    names = set(script.ROWS)
    assert {"hf-unified-fp8", "hf-unified-int8-sq", "hf-unified-int4-awq"} < names
    assert {f"trtllm-checkpoint-fp8-tp{ranks}" for ranks in (1, 2, 3)} < names
    assert {"onnx-qdq-fp8", "onnx-qdq-int8-sq", "onnx-qdq-int4-awq"} < names
    assert {"onnx-fp32", "tensorrt-rtx-fp16", "ort-genai-int4", "ort-genai-fp32"} < names


def test_what_is_no_checkpoint_is_an_error_of_two_lines(script, tmp_path, capsys):
    assert script.main(["--student", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_page_shows_the_record(script):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    numbers = [entry for entry in record["rows"] if "refused" not in entry]
    page = (ROOT / "docs" / "lanes.md").read_text(encoding="utf-8")
    assert script.table(numbers, record["greedy"]) in page, script.table(numbers, record["greedy"])
    assert {entry["name"] for entry in record["rows"]} == set(script.ROWS)
    assert {entry["name"] for entry in record["rows"] if "refused" in entry} == {
        f"trtllm-checkpoint-{name}-tp2" for name in ("bf16", "fp8", "int8-sq")
    }
