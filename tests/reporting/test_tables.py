import re

import pytest

from trt_kd.reporting.details import exports, gates, stage_costs, workloads
from trt_kd.reporting.evidence import Evidence
from trt_kd.reporting.formatting import bytes_text, fixed, signed, significant
from trt_kd.reporting.gates import Gate
from trt_kd.reporting.markdown import report_markdown
from trt_kd.reporting.model_card import licence_of, model_card
from trt_kd.reporting.summary import console_table
from trt_kd.reporting.tables import comparison, markdown, plain
from trt_kd.reporting.verdicts import decide

SIGNED = re.compile(r"[+\u2212±][\d.,]+( %)?|[\d.,]+\u00d7")


def test_the_first_row_is_the_baseline_and_every_other_change_has_a_sign(make_report):
    table = comparison(make_report())
    assert [row.baseline for row in table.rows] == [True, *[False] * 5]
    assert not any(cell.change for cell in table.rows[0].cells)
    for row in table.rows[1:]:
        for cell in row.cells:
            assert SIGNED.fullmatch(cell.change), cell


def test_size_quality_and_speed_stand_side_by_side(make_report):
    table = comparison(make_report())
    assert [name for name, _ in table.groups] == ["Size", "Quality", "Speed, batch 1"]
    assert sum(count for _, count in table.groups) == len(table.columns)
    assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_the_caption_says_hardware_workload_repeats_and_spread(make_report):
    caption = comparison(make_report()).caption
    said = ["Example CPU, 2 cores", "batch 1, 128 + 32 tokens", "median of 5", "half range"]
    said += ["standard error", "8,160", "facts 200", "against teacher", "2026-01-12"]
    assert [words for words in said if words not in caption] == []


def test_a_row_that_shares_its_speed_says_with_whom(make_report):
    rows = {row.name: row for row in comparison(make_report()).rows}
    assert "same shapes as student" in rows["pruned"].detail
    assert rows["pruned"].cells[-1] == rows["student"].cells[-1]


def test_stage_costs_say_what_pruning_took_and_what_training_gave_back(make_report):
    rows = {row.name: row.cells for row in stage_costs(make_report()).rows}
    assert rows["Pruning"][1].value == "+0.330"
    assert rows["Distillation"][4].value == "+21 %"
    assert rows["Cross-entropy instead"][4].value == "\u221282 %"


def test_a_corrected_teacher_is_what_pruning_starts_from(make_report, variant):
    without = make_report()
    report = make_report(variants=[*without.variants, variant("corrected")])
    rows = {row.name: row for row in stage_costs(report).rows}
    assert "Correction of the teacher" not in {row.name for row in stage_costs(without).rows}
    assert rows["Correction of the teacher"].detail == "teacher to corrected"
    assert rows["Pruning"].detail == "corrected to pruned"
    assert rows["Pruning"].cells[1].value == "+0.280"


def test_every_table_has_as_many_cells_as_columns(make_report):
    asked = Gate(name="g", variant="student", metric="perplexity", relative_to="teacher", max=2)
    report = make_report(exports=[{"name": "fp8", "lane": "hf-unified", "format": "fp8",
                                   "size_bytes": 5_000_000, "artifact": "cd" * 32}])  # fmt: skip
    report = report.model_copy(update={"gates": [decide(asked, report, Evidence())]})
    for make in (comparison, workloads, stage_costs, exports, gates):
        table = make(report)
        assert table.rows
        assert all(len(row.cells) == len(table.columns) for row in table.rows)
        lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
        assert len(lines) == len(table.rows) + 2
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.479, 3, "+0.479"), (-19.7, 1, "\u221219.7"), (0.0001, 2, "±0.00"), (-0.001, 2, "±0.00")],
)
def test_changes_carry_their_sign(value, digits, text):
    assert signed(value, digits) == text


def test_numbers_have_few_digits():
    assert significant(1480.2) == "1,480"
    assert significant(0.012345) == "0.0123"
    assert significant(0) == "0"
    assert fixed(-0.0001, 2) == "0.00"
    assert bytes_text(538_100_000) == "538 MB"


def test_the_console_table_is_aligned_and_narrow(make_report, variant):
    rows = [
        variant("teacher", name="a name that goes on for " + "ever and " * 20),
        variant("student"),
    ]
    report = make_report(variants=rows, notes=["long " * 60])
    text = console_table(report)
    assert max(map(len, text.splitlines())) <= 110
    head, first, second = text.splitlines()[:3]
    assert len(head) == len(first) == len(second)
    assert "Verdict: undecided" in text


def test_markdown_escapes_what_came_from_outside(make_report):
    text = report_markdown(make_report(title="a | <script>alert(1)</script> *b*"))
    assert "<script" not in text
    assert plain("a|b\n[c](d)") == r"a\|b \[c\](d)"


def test_the_model_card_names_the_licence_it_found(make_report, tmp_path):
    assert licence_of(tmp_path) == ""
    (tmp_path / "LICENSE").write_text("\n   Some  License\nVersion 2\n", encoding="utf-8")
    assert licence_of(tmp_path) == "Some License"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# M\n", encoding="utf-8")
    assert licence_of(tmp_path) == "apache-2.0"
    assert "\nlicense: apache-2.0\n" in model_card(make_report(), licence="apache-2.0")
    assert "name no licence" in model_card(make_report(), licence="")


def test_power_and_energy_have_columns_only_where_a_gpu_was_watched(make_report, variant, speed):
    assert "Energy (J/token)" not in workloads(make_report()).columns
    watched = speed(20.0, 1, gpu_power_w=412.0, energy_j_per_token=0.51, gpu_throttled={})
    capped = speed(20.0, 8, gpu_power_w=699.0, gpu_throttled={"power cap": 0.75})
    table = workloads(make_report(variants=[variant("teacher", speed=[watched, capped])]))
    assert table.columns[-4:] == ["GPU memory", "Power (W)", "Energy (J/token)", "Throttled"]
    found = [[cell.value for cell in row.cells[-3:]] for row in table.rows]
    assert found[0] == ["412", "0.510", "no"]
    assert found[1][0] == "699"
    assert found[1][2] == "power cap 75 %"
