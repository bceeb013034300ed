"""The report stage on made artifacts: from files of the other stages to the page in a browser."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig, validate
from trt_kd.errors import ArtifactError, ConfigError
from trt_kd.reporting.model import Report
from trt_kd.stages.prune import PruneConfig, prune
from trt_kd.stages.report import ReportConfig, make_report, read_report, report

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
QUALITY = {  # KL, agreement, loss, accuracy
    "teacher": (0.0, 1.0, 3.26, 0.62),
    "teacher_quantized": (0.19, 0.80, 3.42, 0.59),
    "pruned": (0.33, 0.73, 3.51, 0.55),
    "cross_entropy": (0.62, 0.65, 3.05, 0.50),
    "student": (0.26, 0.76, 3.40, 0.60),
    "student_quantized": (0.43, 0.69, 3.58, 0.56),
}
STEP_MS = {"teacher": 20.0, "teacher_quantized": 4.6, "student": 16.5, "student_quantized": 3.9}
CUT = {
    "parameters_before": 134_515_008,
    "block_influence": [0.9, *[0.04] * 28, 0.4],
    "kept_sizes": {"ffn_hidden_size": 1024},
    "refits": [
        {
            "layer": layer,
            "projection": "down_proj",
            "plain_residual": 0.2,
            "residual": 0.1,
            "ridge": 0.01 if layer < 29 else None,
        }
        for layer in range(30)
    ],
    "calibration_tokens": 16_384,
    "importance_pass_s": 40.0,
}
GATES: list[dict[str, Any]] = [
    {"name": "at most 82 % of the parameters", "variant": "student", "metric": "parameters_share",
     "max": 0.82},
    {"name": "distillation recovers", "variant": "student", "metric": "kl_to_teacher_nats",
     "relative_to": "pruned", "max": 0.85},
    {"name": "as accurate as the teacher", "variant": "student", "metric": "tasks.facts.accuracy",
     "relative_to": "teacher", "min": -0.05},
    {"name": "2.5 times as fast", "variant": "student_quantized", "metric": "output_tokens_per_s",
     "relative_to": "teacher", "min": 2.5},
]  # fmt: skip


class Made(StageConfig):
    """Stands for the settings of any other stage."""

    stage: ClassVar[str] = "made"
    note: str = ""
    axes: list[dict[str, Any]] | None = None
    lane: dict[str, Any] | None = None


def write(out: Path, kind: Any, files: dict[str, Any], **more: Any) -> Artifact:
    config = Made(note=out.name, axes=more.get("axes"), lane=more.get("lane"))
    with writing(out, kind=kind, config=config, inputs=more.get("inputs", {})) as draft:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (draft.path / name).write_text(text, encoding="utf-8")
        draft.metrics |= more.get("metrics", {})
    return Artifact.open(out)


def evaluation(out: Path, role: str, model: Artifact, teacher: Artifact) -> Artifact:
    kl, agreement, loss, accuracy = QUALITY[role]
    source = random.Random(1)  # the same blocks and items for every role, so that pairs correlate
    noise = [source.uniform(-1, 1) for _ in range(32)]
    items = [source.random() for _ in range(200)]
    own = random.Random(role)
    blocks = {
        "kl_to_teacher_nats": [kl * (1 + 0.2 * x + own.uniform(-0.1, 0.1)) for x in noise],
        "top1_agreement": [agreement - 0.05 * x * (kl > 0) for x in noise],
        "loss_nats_per_token": [loss + 0.3 * x for x in noise],
    }
    right = [value < accuracy for value in items]
    share = sum(right) / len(right)
    stderr = (share * (1 - share) / (len(right) - 1)) ** 0.5
    metrics = {
        "kl_to_teacher_nats": kl, "kl_to_teacher_nats_stderr": 0.02 * kl,
        "top1_agreement": agreement, "top1_agreement_stderr": 0.005 * (kl > 0),
        "loss_nats_per_token": loss, "loss_nats_per_token_stderr": 0.03,
        "perplexity": 2.718281828**loss, "heldout_tokens": 8160,
        "tasks": {"facts": {"accuracy": share, "stderr": stderr, "n": len(right)}},
    }  # fmt: skip
    lines = [
        json.dumps({"task": "facts", "item": n, "correct": value}) for n, value in enumerate(right)
    ]
    record = {"schema_version": 1, "heldout_blocks_sha256": "ab", "per_block": blocks, **metrics}
    files = {"evaluation.json": record, "items.jsonl": "\n".join(lines) + "\n"}
    inputs = {"model": model, "teacher": teacher}
    return write(out, "evaluation", files, metrics=metrics, inputs=inputs)


def benchmark(out: Path, variants: dict[str, Artifact]) -> Artifact:
    source = random.Random(2)
    records: dict[str, Any] = {}
    samples = []
    for role in variants:
        records[role] = []
        for size in (1, 4, 8):
            step = STEP_MS[role] * (0.8 + 0.2 * size)
            for repeat in range(5):
                steps = [step * source.uniform(0.97, 1.03) / 1e3 for _ in range(32)]
                steps[0] *= 6
                line = {"variant": role, "batch_size": size, "repeat": repeat, "step_s": steps}
                samples.append(json.dumps(line))
            times = {"p50": step, "p90": 1.04 * step, "p99": 1.2 * step}
            records[role].append({
                "backend": "ort-genai", "format": "int4" if "quantized" in role else "fp32",
                "batch_size": size, "input_tokens": 128, "output_tokens": 32,
                "ttft_ms": {share: 6 * value for share, value in times.items()}, "itl_ms": times,
                "output_tokens_per_s": 32 * size / (37 * step / 1e3), "repeats": 5,
                "spread": 0.02, "steady": True, "peak_memory_bytes": 700_000_000,
                "decode_floor_ms": 0.8 * step, "load_s": 1.0, "load_average": 0.5,
            })  # fmt: skip
    hardware = {"processor": "Example CPU", "cores": 2, "memory_bytes": 25_000_000_000,
                "system": "Linux x86_64", "gpu": None, "onnxruntime-genai": "0.18.0"}  # fmt: skip
    content = {"schema_version": 1, "hardware": hardware, "variants": records}
    files = {"benchmark.json": content, "samples.jsonl": "\n".join(samples) + "\n"}
    return write(out, "benchmark", files, inputs=variants)


def make_inputs(root: Path) -> dict[str, Artifact]:
    """Artifacts of a whole run, small files in the layout the stages write."""
    pruned_sizes = {**LLAMA, "intermediate_size": 1024}

    def checkpoint(name: str, config: dict[str, Any], **inputs: Artifact) -> Artifact:
        files = {"config.json": config, "model.safetensors": "0" * 4000}
        metrics = {"seconds": 90.0} | (CUT if name == "pruned" else {})
        axes = [{"kind": "ffn"}] if name == "pruned" else None
        return write(root / name, "checkpoint", files, inputs=inputs, metrics=metrics, axes=axes)

    def export(name: str, precision: str, source: Artifact) -> Artifact:
        lane = {"kind": "ort-genai", "precision": precision}
        size = 1500 if precision == "int4" else 6000
        metrics = {"logits_kl_nats": 0.001, "top1_agreement": 0.99, "seconds": 7.0}
        return write(root / name, "export", {"model.onnx": "0" * size}, lane=lane,
                     inputs={"source": source}, metrics=metrics)  # fmt: skip

    teacher = checkpoint("teacher", {**LLAMA, "intermediate_size": 1536})
    pruned = checkpoint("pruned", pruned_sizes, source=teacher)
    student = checkpoint("student", pruned_sizes, teacher=teacher, student=pruned)
    control = checkpoint("cross_entropy", pruned_sizes, student=pruned)
    models = {
        "teacher": teacher,
        "teacher_quantized": teacher,
        "pruned": pruned,
        "cross_entropy": control,
        "student": student,
        "student_quantized": student,
    }
    shipped = {
        "teacher": export("teacher-fp32", "fp32", teacher),
        "teacher_quantized": export("teacher-int4", "int4", teacher),
        "student": export("student-fp32", "fp32", student),
        "student_quantized": export("student-int4", "int4", student),
    }
    inputs = {f"{role}.model": model for role, model in models.items()}
    inputs |= {f"{role}.shipped": artifact for role, artifact in shipped.items()}
    for role, model in models.items():
        judged = shipped[role] if role.endswith("_quantized") else model
        inputs[f"{role}.evaluation"] = evaluation(root / f"evaluate-{role}", role, judged, teacher)
    inputs["benchmark"] = benchmark(root / "benchmark", shipped)
    inputs["export.student-fp8"] = write(
        root / "student-fp8", "export", {"model.safetensors": "0" * 2000},
        lane={"kind": "hf-unified"}, inputs={"source": student}, metrics={"logits_kl_nats": 0.01},
    )  # fmt: skip
    return inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Artifact]:
    return make_inputs(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> Artifact:
    config = ReportConfig.model_validate(
        {"title": "Made", "gates": GATES, "recipe": {"name": "quickstart", "seed": 0}}
    )
    return report(config, out=tmp_path_factory.mktemp("out") / "report", **inputs)


def test_all_four_files_are_written_and_read_back(made):
    assert set(made.manifest.files) == {"report.html", "report.md", "report.json", "model_card.md"}
    found = read_report(made.path)
    assert found == Report.model_validate_json((made.path / "report.json").read_text("utf-8"))
    assert found.verdict == made.metrics["verdict"]
    assert {gate.name: gate.verdict for gate in found.gates} == made.metrics["gates"]


def test_rows_carry_what_the_stages_measured(made):
    found = read_report(made.path)
    assert [variant.role for variant in found.variants] == list(QUALITY)
    rows = {variant.role: variant for variant in found.variants}
    assert rows["teacher"].parameters == 134_515_008
    assert rows["student"].parameters_share == pytest.approx(0.803, abs=1e-3)
    assert rows["student_quantized"].format == "int4"
    assert rows["student_quantized"].size_bytes == 1500
    assert rows["student_quantized"].evaluated == "export"
    assert rows["student"].evaluated == "checkpoint"
    assert rows["pruned"].same_speed_as == "student"
    assert rows["pruned"].speed == []
    assert [record.batch_size for record in rows["teacher"].speed] == [1, 4, 8]
    assert found.exports[0].lane == "hf-unified"
    assert found.environment["processor"] == "Example CPU"


def test_what_was_cut_stands_in_all_three_files(made):
    found = read_report(made.path).pruning
    assert found is not None
    assert (found.before, found.after) == ("teacher", "student")
    assert [layer.block_influence for layer in found.layers] == CUT["block_influence"]
    assert found.layers[29].refits[0].ridge == "plain cut"
    assert found.missing == []
    assert {(row.batch_size, row.tokens) for row in found.memory} == {(1, 160), (4, 160), (8, 160)}
    for name in ("report.html", "report.md"):
        text = (made.path / name).read_text(encoding="utf-8")
        assert "What was cut" in text
        assert "Batch 8, 160 tokens" in text


def test_a_real_cut_is_told_projection_by_projection(teacher, text_file, tmp_path):
    def cut(*axes: dict[str, Any]) -> dict[str, list[float | None]]:
        data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
        settings = {"axes": axes, "calibration_tokens": 64, "data": data}
        out = tmp_path / "-".join(axis["kind"] for axis in axes)
        pruned = prune(PruneConfig.model_validate(settings), source=teacher, out=out)
        inputs = {"teacher.model": teacher, "pruned.model": pruned}
        found = make_report(ReportConfig(), inputs).pruning
        assert found is not None
        assert found.missing == ["Nothing was timed: memory is predicted for 2,048 tokens."]
        layers.append([layer.kept for layer in found.layers])
        lost: dict[str, list[float | None]] = {}
        for layer in found.layers:
            assert layer.block_influence is not None
            for refit in layer.refits:
                lost.setdefault(refit.projection, []).append(refit.plain_energy_lost)
        return lost

    layers: list[list[bool | None]] = []
    ffn, heads = {"kind": "ffn", "size": 64}, {"kind": "heads", "size": 1}
    down, output = cut(ffn), cut(heads)
    assert cut(heads, ffn) == {"output": output["output"], "down": down["down"]}
    kept = [lost for layer, lost in enumerate(down["down"]) if layer != 2]
    assert cut(ffn, {"kind": "depth", "drop": [2]}) == {"down": kept}
    assert layers[-1] == [True, True, False, True]


def test_gates_use_pairs_of_blocks_items_and_runs(made):
    gates = read_report(made.path).gates
    assert [gate.method for gate in gates] == [
        "exact", "t, 32 paired blocks", "Tango, 200 paired items", "t of logs, 5 paired runs"
    ]  # fmt: skip
    assert [gate.verdict for gate in gates] == ["pass", "pass", "undecided", "pass"]


def test_lineage_names_every_artifact_after_its_inputs(made, inputs):
    nodes = read_report(made.path).lineage
    seen: set[str] = set()
    for node in nodes:
        assert set(node.inputs.values()) <= seen
        seen.add(node.key)
    assert {artifact.key[:12] for artifact in inputs.values()} <= seen


def test_no_gates_leave_the_verdict_undecided_with_a_note(inputs):
    found = make_report(ReportConfig(), inputs)
    assert found.verdict == "undecided"
    assert any("No gates" in note for note in found.notes)


def test_a_rehearsal_says_that_its_numbers_mean_nothing(inputs):
    config = ReportConfig.model_validate({"gates": GATES}).rehearsal()
    assert [gate.name for gate in config.gates] == [gate["name"] for gate in GATES]
    assert any("numbers mean nothing" in note for note in make_report(config, inputs).notes)


def test_speed_may_be_missing_altogether(inputs):
    fewer = {name: value for name, value in inputs.items() if name != "benchmark"}
    found = make_report(ReportConfig.model_validate({"gates": GATES}), fewer)
    assert found.gates[-1].verdict == "undecided"
    assert "not timed" in found.gates[-1].reason


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"techer.model": "teacher.model"}, "no input 'techer.model'"),
        ({"teacher.modle": "teacher.model"}, "no input 'teacher.modle'"),
        ({"student.evaluation": "student.evaluation"}, "student.model is missing"),
        ({"student.model": "student.model"}, "baseline 'teacher' has no model"),
    ],
)
def test_wrong_inputs_are_named_with_a_remedy(inputs, tmp_path, wrong, message):
    given = {name: inputs[source] for name, source in wrong.items()}
    with pytest.raises(ArtifactError, match=message) as caught:
        report(ReportConfig(), out=tmp_path / "report", **given)
    assert caught.value.hint
    assert not (tmp_path / "report").exists()


def test_settings_that_cannot_work_are_refused_when_read():
    for settings, message in (
        ({"gates": [GATES[0], GATES[0]]}, "stands twice"),
        ({"gates": [GATES[1]], "roles": {"student": "s"}}, "no role 'pruned' here; roles: student"),
        ({"gates": [{**GATES[0], "metric": "speed"}]}, "available: parameters"),
        ({"baseline": "pupil"}, "teacher"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ReportConfig, settings, where="recipe")


def test_a_damaged_report_is_refused(made, tmp_path):
    copy = tmp_path / "report"
    shutil.copytree(made.path, copy)
    (copy / "report.json").write_text('{"schema_version": 2}', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"damaged at schema_version") as caught:
        read_report(copy)
    assert "again" in str(caught.value.hint)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def visit(page: Path, folder: Path, *, width: int) -> tuple[str, str, list[str]]:
    """The DOM after loading ``page``, console lines, and what the page (not the browser) asked for.

    The browser's own requests have no origin in its log; a page's have. No name resolves.
    """
    log = folder / "net.json"
    result = subprocess.run(
        [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
         f"--window-size={width},2000", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--log-net-log={log}", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    asked = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if '"initiator"' in line:
            event = json.loads(line.rstrip().rstrip(","))
            if event["params"]["initiator"] != "not an origin":
                asked.append(event["params"]["url"])
    return result.stdout, console, asked


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_chromium_without_errors_requests_or_missing_figures(
    made, tmp_path, width
):
    dom, console, asked = visit(made.path / "report.html", tmp_path, width=width)
    assert console == ""
    assert asked == []
    figures = re.findall(r"<svg.*?</svg>", dom, flags=re.DOTALL)
    assert len(figures) == 8
    assert all("<path" in figure and "<text" in figure for figure in figures)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium on PATH")
def test_the_check_above_would_see_a_request_and_a_console_message(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/canary.png'><script>console.error('seen')</script>",
        encoding="utf-8",
    )
    _, console, asked = visit(bad, tmp_path, width=390)
    assert "seen" in console
    assert asked == ["http://127.0.0.1:9/canary.png"]
