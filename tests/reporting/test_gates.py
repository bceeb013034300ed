from dataclasses import replace

import pytest

from trt_kd.config import validate
from trt_kd.errors import ConfigError
from trt_kd.reporting.evidence import Evidence, TimedRun
from trt_kd.reporting.gates import CHOICES, Gate, unmet_needs
from trt_kd.reporting.intervals import mcnemar, paired_difference_interval
from trt_kd.reporting.verdicts import decide, judge, overall


def gate(**settings):
    return Gate.model_validate({"name": "g", "variant": "student", **settings})


@pytest.mark.parametrize(
    ("interval", "at_most", "at_least"),
    [
        ((1.0, 2.0), "pass", "undecided"),
        ((2.0, 2.0), "pass", "pass"),
        ((2.0, 3.0), "undecided", "pass"),
        ((1.9, 2.1), "undecided", "undecided"),
        ((2.1, 3.0), "fail", "pass"),
        ((1.0, 1.9), "pass", "fail"),
        (None, "undecided", "undecided"),
    ],
)
def test_the_whole_interval_decides(interval, at_most, at_least):
    assert judge(interval, gate(metric="perplexity", max=2)) == at_most
    assert judge(interval, gate(metric="perplexity", min=2)) == at_least


def test_overall_fails_before_it_is_undecided_and_needs_a_gate_to_pass():
    assert overall(["pass", "undecided", "fail"]) == "fail"
    assert overall(["pass", "undecided"]) == "undecided"
    assert overall(["pass", "pass"]) == "pass"
    assert overall([]) == "undecided"


def test_exact_numbers_have_no_width(make_report):
    found = decide(gate(metric="parameters_share", max=0.82), make_report(), Evidence())
    assert found.interval == (found.value, found.value)
    assert found.verdict == "pass"
    ratio = gate(metric="size_bytes", variant="student_quantized", relative_to="teacher", max=0.2)
    assert decide(ratio, make_report(), Evidence()).verdict == "fail"


def test_pairs_of_blocks_decide_what_standard_errors_cannot(make_report, evidence):
    asked = gate(metric="kl_to_teacher_nats", relative_to="pruned", max=0.80)
    paired = decide(asked, make_report(), evidence)
    assert paired.verdict == "pass"
    assert paired.value == pytest.approx(0.26 / 0.33)
    assert decide(asked, make_report(), Evidence()).verdict == "undecided"


def test_blocks_of_different_text_are_not_paired(make_report, evidence):
    other = replace(evidence, text={**evidence.text, "pruned": "cd"})
    asked = gate(metric="kl_to_teacher_nats", relative_to="pruned", max=0.80)
    assert "unpaired" in decide(asked, make_report(), other).method


def test_accuracy_on_the_same_items_is_a_paired_non_inferiority_test(
    make_report, evidence, variant
):
    answers = {
        role: list(evidence.items[role]["facts"].values()) for role in ("student", "teacher")
    }
    rows = [
        variant(role, quality={"tasks": {"facts": {
            "accuracy": sum(right) / 200, "stderr": 0.035, "n": 200}}})
        for role, right in (("teacher", answers["teacher"]), ("student", answers["student"]))
    ]  # fmt: skip
    report = make_report(variants=rows)
    pairs = list(zip(answers["student"], answers["teacher"], strict=True))
    gained, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    asked = gate(metric="tasks.facts.accuracy", relative_to="teacher", min=-0.2)

    found = decide(asked, report, evidence)

    assert found.compare == "difference"
    assert found.value == pytest.approx((gained - lost) / 200)
    assert found.interval == pytest.approx(paired_difference_interval(gained, lost, 200))
    assert found.p_value == pytest.approx(mcnemar(gained, lost))
    assert found.verdict == "pass"
    strict = gate(metric="tasks.facts.accuracy", relative_to="teacher", min=0.0)
    assert decide(strict, report, evidence).verdict == "fail"


def test_partial_credit_is_never_judged_as_right_or_wrong(make_report, evidence, variant):
    half = {"tasks": {"facts": {"accuracy": 0.111, "stderr": 0.02, "n": 200}}}
    report = make_report(
        variants=[variant("teacher", quality=half), variant("student", quality=half)]
    )
    asked = gate(metric="tasks.facts.accuracy", relative_to="teacher", min=-0.1)
    assert "unpaired" in decide(asked, report, evidence).method


def test_speed_is_the_ratio_of_runs_of_one_round(make_report):
    def runs(*steps):
        return {1: [TimedRun(1, (step,) * 32) for step in steps]}

    drifting = {"student": runs(0.010, 0.020, 0.040), "teacher": runs(0.020, 0.040, 0.080)}
    asked = gate(metric="output_tokens_per_s", relative_to="teacher", min=1.9)
    found = decide(asked, make_report(), Evidence(runs=drifting))
    assert found.value == pytest.approx(2.0)
    assert found.interval == pytest.approx((2.0, 2.0))
    assert found.verdict == "pass"


def test_itl_leaves_the_first_step_out_and_ttft_is_the_first_step():
    run = TimedRun(4, (0.050, 0.010, 0.010, 0.010))
    assert run.metric("ttft_ms", "p50") == pytest.approx(50)
    assert run.metric("itl_ms", "p99") == pytest.approx(10)
    assert run.metric("output_tokens_per_s", "p50") == pytest.approx(16 / 0.080)


def test_unsteady_repeats_leave_a_speed_gate_undecided(make_report, variant):
    shaky = variant("student")
    shaky = shaky.model_copy(
        update={"speed": [shaky.speed[0].model_copy(update={"steady": False})]}
    )
    report = make_report(variants=[variant("teacher"), shaky])
    found = decide(gate(metric="itl_ms", max=1000), report, Evidence())
    assert found.verdict == "undecided"
    assert "not steady" in found.reason


def test_without_single_runs_the_range_of_repeats_decides(make_report):
    found = decide(gate(metric="itl_ms", relative_to="teacher", max=0.9), make_report(), Evidence())
    assert found.interval == pytest.approx((16 * 0.98 / (20 * 1.02), 16 * 1.02 / (20 * 0.98)))
    assert found.verdict == "pass"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"metric": "tasks.unknown.accuracy", "min": 0.1}, "not evaluated on unknown"),
        ({"metric": "itl_ms", "batch_size": 3, "max": 9}, "not timed on this workload"),
        ({"metric": "kl_to_teacher_nats", "relative_to": "teacher", "max": 1}, "no ratio"),
        ({"metric": "peak_memory_bytes", "max": 1}, "was not recorded"),
    ],
)
def test_what_is_missing_is_undecided_and_says_so(make_report, evidence, settings, reason):
    found = decide(gate(**settings), make_report(), evidence)
    assert found.verdict == "undecided"
    assert reason in found.reason


def test_a_variant_that_is_not_in_the_report_is_undecided(make_report, variant):
    report = make_report(variants=[variant("teacher")])
    found = decide(gate(metric="perplexity", max=1), report, Evidence())
    assert "no variant 'student'" in found.reason


@pytest.mark.parametrize("metric", [*CHOICES[:-1], "tasks.facts.accuracy"])
@pytest.mark.parametrize("relative", [False, True])
def test_every_metric_can_be_judged_alone_and_against_another(
    make_report, evidence, metric, relative
):
    if relative and metric == "parameters_share":
        pytest.skip("is a ratio already")
    settings = {"metric": metric, "max": 1e12} | ({"relative_to": "pruned"} if relative else {})
    found = decide(gate(**settings), make_report(), evidence)
    assert found.verdict == ("undecided" if metric == "peak_memory_bytes" else "pass")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "kl_to_techer_nats", "max": 1}, "did you mean 'kl_to_teacher_nats'"),
        ({"metric": "kl_to_techer_nats", "max": 1}, "parameters_share"),
        ({"metric": "perplexity", "max": 1, "variant": "pupil"}, "'student_quantized'"),
        ({"metric": "perplexity"}, "either max or min"),
        ({"metric": "perplexity", "max": 1, "min": 0}, "either max or min"),
        ({"metric": "perplexity", "max": 1, "relative_to": "student"}, "with itself"),
        ({"metric": "perplexity", "max": 1, "compare": "ratio"}, "needs relative_to"),
        ({"metric": "ttft_ms", "max": 1, "compare": "value", "relative_to": "teacher"}, "excludes"),
        ({"metric": "perplexity", "max": 1, "batch_size": 2}, "no effect"),
        ({"metric": "output_tokens_per_s", "max": 1, "percentile": "p99"}, "no effect"),
        ({"metric": "parameters_share", "max": 1, "relative_to": "teacher"}, "to the baseline"),
        ({"metric": "perplexity", "max": 1, "maximum": 1}, "maximum"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_mean_anything_is_refused_when_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(Gate, {"name": "g", "variant": "student", **settings}, where="recipe")


def test_a_plan_can_tell_which_gates_will_never_be_measured():
    gates = [
        gate(metric="tasks.other.accuracy", min=0.1),
        gate(metric="perplexity", relative_to="cross_entropy", max=1),
        gate(metric="perplexity", max=1),
    ]
    problems = unmet_needs(gates, roles=["teacher", "student"], tasks=["facts"])
    assert len(problems) == 2
    assert "gates.0: no task 'other'" in problems[0]
    assert "gates.1: this run has no variant 'cross_entropy'" in problems[1]
