"""The script ends with JSON that holds size, loss and speed at every k."""

import json

import pytest

from trt_kd.checkpoints import save_model
from trt_kd.stages.distill import require_modelopt

require_modelopt()


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("logit_cache")


@pytest.fixture(scope="module")
def tiny(teacher, text_file):
    options = ["--text", text_file, "--blocks", 3, "--block-tokens", 32, "--repeats", 2]
    return [str(teacher.path), *map(str, [*options, "--precision", "fp32", "--k", 8, 64, 512])]


def test_the_last_line_is_the_record_and_the_table_stands_above(script, tiny, capsys):
    assert script.main(tiny) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert [row["k"] for row in record["k"]] == [8, 64, 512]
    assert record["hardware"]["python"]
    assert record["training"] is None
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    small, middle, whole = record["k"]
    assert small["kl_nats_per_token"] > middle["kl_nats_per_token"] > whole["kl_nats_per_token"]
    assert [row["draws"] for row in record["k"]] == [2, 16, 128]
    for row in record["k"]:
        assert row["loss_cached_nats_per_token"] == pytest.approx(
            row["loss_dense_nats_per_token"], rel=0.15
        )
        assert 0 <= row["storing_kl_nats_per_token"] < 5e-3
        assert row["decode_tokens_per_s"] > 0
        assert row["encode_tokens_per_s"] > 0


def test_training_compares_online_and_cached(
    script, tiny, make_model, tokenizer_dir, tmp_path, capsys
):
    save_model(make_model(seed=5), tmp_path / "student", tokenizer_from=tokenizer_dir)
    more = ["--student", str(tmp_path / "student"), "--train-steps", "2", "--train-batch", "1"]
    assert script.main([*tiny, *more]) == 0
    training = json.loads(capsys.readouterr().out.splitlines()[-1])["training"]
    assert training["before_nats_per_token"] > 0.1
    assert training["steps"] == 2
    assert training["ratio"] == pytest.approx(1.0, abs=0.2)
    assert training["cached"]["step_s"] > 0


def test_training_needs_a_student(script, tiny):
    with pytest.raises(SystemExit):
        script.main([*tiny, "--train-steps", "2"])


def test_a_folder_without_a_model_is_two_lines_and_code_2(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
