"""The script measures both backends on tiny models, counts, and says what it finds."""

import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks/harness_overhead.py"
TINY = ["--runs", "3", "--comparisons", "2", "--pairs", "3", "--threads", "1"]
TINY += ["--input-tokens", "4", "--output-tokens", "6"]


@pytest.fixture
def script(load_script):
    return load_script("harness_overhead")


@pytest.fixture
def run(script, capsys):
    def run(*arguments):
        code = script.main([*arguments, *TINY])
        return code, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def ort_export(teacher, forking, tmp_path_factory):
    pytest.importorskip("onnxruntime_genai")
    from trt_kd.exporters.ort_genai import OrtGenai

    out = tmp_path_factory.mktemp("ort")
    with forking():
        OrtGenai(precision="fp32").export(teacher, out)
    return out


@pytest.mark.slow
def test_both_backends_are_held_against_a_bare_loop(run, teacher, ort_export):
    code, told = run("--ort-genai", str(ort_export), "--transformers", str(teacher.path))
    assert code == 0
    result = json.loads(told.out.splitlines()[-1])
    assert set(result["itl_ratio"]) == {"ort-genai", "transformers"}
    for name, ratio in result["itl_ratio"].items():
        found = result["overhead"][name]
        assert found["interval"][0] <= ratio <= found["interval"][1]
        assert min(found["itl_ms"].values()) > 0
    itself = result["itself"]
    assert (itself["backend"], itself["comparisons"], itself["pairs"]) == ("ort-genai", 2, 3)
    held = [low <= 1 <= high for low, _, high in itself["intervals"]]
    assert itself["covered"] == sum(held)
    assert f"{sum(held)} of 2 intervals hold 1" in told.out


@pytest.mark.parametrize("name", ["ort-genai", "transformers"])
def test_the_bare_loop_takes_as_many_steps_as_asked(script, name, teacher, request):
    from trt_kd.backends import BACKENDS

    folder = request.getfixturevalue("ort_export") if name == "ort-genai" else teacher.path
    with BACKENDS.load(name)(threads=1).load(folder) as session:
        times = script.BARE[name](session, [[5, 6, 7]], 4)
    assert len(times) == 4
    assert min(times) > 0


def test_a_directory_that_does_not_load_is_told_in_two_lines(run, tmp_path):
    code, told = run("--ort-genai", str(tmp_path))
    assert code == 2
    assert len(told.err.strip().splitlines()) == 2


def test_no_directory_is_a_usage_error(run):
    with pytest.raises(SystemExit):
        run()
