"""The command line answers quickly, in two lines when something is wrong, with an exit code."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "run", "plan", "rehearse", "gate", "import", "prune", "distill", "quantize", "export",
    "evaluate", "benchmark", "report", "show", "layers", "sensitivity", "ls", "doctor",
]  # fmt: skip


def command_line(run, *arguments):
    return run(
        [sys.executable, "-m", "trt_kd.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "100"},
    )


@pytest.fixture(scope="module")
def trt_kd(forks):
    """The command line in a fork, which has its imports behind it."""
    for name in ("trt_kd.cli", "trt_kd.pipeline.plan"):
        importlib.import_module(name)
    return partial(command_line, forks.run)


def test_every_command_is_in_the_help_with_exit_codes():
    done = command_line(subprocess.run, "--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in done.stdout
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(trt_kd, command):
    done = trt_kd(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_examples_stand_in_the_help_as_one_would_type_them(trt_kd):
    told = [line.strip() for line in trt_kd("prune", "--help").stdout.splitlines()]
    what_fits = "trt-kd prune --dry-run --source DIR 'axes=[ffn, depth]' budget.params=80%"
    assert f"What fits: {what_fits}" in told


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["ls"], ["plan", "workflows/llama3.1-8b-to-4b-width-fp8.yaml"]],
)
def test_what_needs_no_torch_does_not_load_it(arguments):
    code = (
        "import sys\n"
        "from trt_kd.cli import main\n"
        f"sys.argv = ['trt-kd', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, file=sys.stderr)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_recipe_with_three_mistakes_prints_all_three_and_writes_nothing(trt_kd, tmp_path):
    recipe = ROOT / "workflows" / "quickstart.yaml"
    mistakes = ["distill.steps=-3", "prune.calibration_tokens=many", "shuffel=true"]
    done = trt_kd("run", recipe, *mistakes, "--out", tmp_path)
    assert done.returncode == 2
    for path in ("distill.steps", "prune.calibration_tokens", "shuffel"):
        assert path in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_recipe_is_two_lines_at_most(trt_kd, tmp_path):
    done = trt_kd("plan", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) <= 2


def test_ls_and_plan_speak_json(trt_kd):
    listed = json.loads(trt_kd("ls", "--json").stdout)
    assert "forward_kl" in listed["KD loss"]
    assert all(summary for family in listed.values() for summary in family.values())
    plan = json.loads(trt_kd("plan", "workflows/quickstart.yaml", "--json").stdout)
    assert plan["models"]["student"]["parameters"] <= 0.82 * plan["models"]["teacher"]["parameters"]


def test_show_checks_digests_and_prints_the_lineage(trt_kd, teacher):
    done = trt_kd("show", teacher.path)
    assert done.returncode == 0
    assert "all digests match" in done.stdout
    manifest = json.loads(trt_kd("show", teacher.path, "--json").stdout)
    assert manifest["key"] == teacher.key


def test_stages_run_one_by_one(trt_kd, teacher, tmp_path):
    done = trt_kd("import", f"source={teacher.path}", "--out", tmp_path / "t", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "checkpoint"
    again = trt_kd("import", f"source={teacher.path}", "--out", tmp_path / "t")
    assert again.returncode == 2
    assert "exists already" in again.stderr


SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config_only(tmp_path):
    """A directory with nothing but a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
    return tmp_path


def test_a_dry_run_lists_what_fits_from_config_json_alone(trt_kd, config_only):
    axes = "axes=[ffn, depth, heads, kv_heads]"
    done = trt_kd(
        "prune", "--dry-run", "--json", "--source", config_only, axes, "budget.params=80%"
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    limit = 0.8 * listed["parameters_before"]
    assert listed["candidates"]
    assert all(0 < one["parameters"] <= limit for one in listed["candidates"])
    assert {"ffn", "layers"} <= {name for one in listed["candidates"] for name in one["sizes"]}
    assert [path.name for path in config_only.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["axes=[ffn]", "budget.params=1%"], "none of the 24 combinations"),
        (["axes=[experts]", "budget.params=80%"], "'experts': a llama model cannot be cut"),
        (["axes=[ffn]"], "budget: Field required"),
        (["axes=[{kind: ffn, size: 2048}]", "budget.params=80%"], "larger than the model's 1536"),
        (["axes=[ffn]", "budget.params=80%", "target.format=fp7"], "fp7"),
    ],
)
def test_a_dry_run_of_the_impossible_says_so_in_two_lines(trt_kd, config_only, arguments, what):
    done = trt_kd("prune", "--dry-run", "--source", config_only, *arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert "Traceback" not in done.stderr
