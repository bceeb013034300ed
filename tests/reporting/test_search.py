"""How the sizes were chosen: from the prune stage's record, complete or damaged, to a page."""

import copy
import json
import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from trt_kd.pruning.halving import compared, leader_share, order, rank_agreement
from trt_kd.reporting import latency_tables, search_tables
from trt_kd.reporting.collect import Sources
from trt_kd.reporting.markdown import report_markdown
from trt_kd.reporting.page import page
from trt_kd.reporting.search import search_of
from trt_kd.reporting.search_figure import search_figures
from trt_kd.reporting.tables import plain

SIZES = {"ffn1024-depth30": (1024, 30), "ffn1152-depth28": (1152, 28),
         "ffn1280-depth27": (1280, 27), "ffn1216-depth27": (1216, 27)}  # fmt: skip
"""Candidates in the order of their predictions."""
MEASURED = (0.31, 0.27, 0.34, 0.29)
ROUNDS = (
    {"ffn1152-depth28": 0.21, "ffn1216-depth27": 0.22, "ffn1024-depth30": 0.25},
    {"ffn1152-depth28": 0.19, "ffn1216-depth27": 0.18},
)
WINNER, FIRST, CLOSEST = "ffn1216-depth27", "ffn1024-depth30", "ffn1152-depth28"
PARTS = (
    "candidates_legal", "candidates_within_limits", "check_tokens", "measured", "winner",
    "measured_over_predicted", "rank_agreement", "best_against_first", "sensitivity",
)  # fmt: skip


def blocks(mean: float, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    """Divergence of every block; what makes a block hard is shared."""
    hard = np.random.default_rng(99).normal(size=16)
    own = np.random.default_rng(seed).normal(size=16)
    return mean * (1 + 0.2 * (hard - hard.mean())) + spread * (own - own.mean())


def record_of(*, tournament: bool = True) -> dict[str, Any]:
    """What a search leaves, by the functions that make it."""
    measured = {name: blocks(nats, seed) for seed, (name, nats) in
                enumerate(zip(SIZES, MEASURED, strict=True))}  # fmt: skip
    trained = [{name: blocks(nats, seed) for seed, (name, nats) in enumerate(entry.items())}
               for entry in ROUNDS]  # fmt: skip
    rows = [
        {"name": name, "sizes": {"ffn": ffn} | ({"layers": layers} if layers < 30 else {}),
         "parameters": 108_000_000 - 1000 * place, "memory_bytes": 216_000_000,
         "predicted_nats": 0.20 + 0.01 * place, "divergence_nats": float(measured[name].mean()),
         "divergence_stderr_nats": float(measured[name].std(ddof=1) / 4)}
        for place, (name, (ffn, layers)) in enumerate(SIZES.items())
    ]  # fmt: skip
    held = {
        "rounds": [
            {"divergence_nats": {name: float(after[name].mean()) for name in order(after)},
             "leader_share": leader_share(after),
             "rank_agreement": rank_agreement(order(before), order(after))}
            for before, after in zip([measured, *trained], trained, strict=False)
        ],
        "tokens_of_the_winner": 30_720,
        "first_choice": FIRST,
        "winner": WINNER,
        "against_first_choice": {
            "round": 1, **compared(trained[0][WINNER], trained[0][FIRST]).as_dict(),
        },
    }  # fmt: skip
    record = {
        "candidates_legal": 412,
        "candidates_within_limits": 37,
        "check_tokens": 4_096,
        "measured": rows,
        "measured_over_predicted": 1.37,
        "rank_agreement": rank_agreement(list(SIZES), order(measured)),
        "best_against_first": compared(measured[CLOSEST], measured[FIRST]).as_dict(),
        "sensitivity": [
            {"kind": "ffn", "size": 1536 - cut, "present": 1536, "kl_nats": (cut / 1536) ** 2}
            for cut in (128, 256, 512)
        ] + [{"kind": "depth", "size": 27, "present": 30, "kl_nats": 0.11}],
        "tournament": held if tournament else None,
        "winner": WINNER if tournament else CLOSEST,
    }  # fmt: skip
    return json.loads(json.dumps(record))


def found(record: Any, role: str = "pruned"):
    """What the report makes of a record."""
    metrics = {"parameters_after": 1} if record is None else {"search": record}
    cut = SimpleNamespace(metrics=metrics, manifest=SimpleNamespace(stage="prune"))
    return search_of(Sources({role: {"model": cut}}, None, {}))


@pytest.fixture
def texts(make_report, variant):
    """The page and the Markdown of a report that tells little else."""

    def make(search):
        report = make_report(variants=[variant("teacher")], search=search)
        return page(report), report_markdown(report)

    return make


def tables(search) -> list:
    return [
        search_tables.measured(search),
        search_tables.tournament(search),
        search_tables.comparisons(search),
        search_tables.facts(search),
    ]


def in_tables(search) -> str:
    """Every cell and name of every table."""
    rows = [row for table in tables(search) for row in table.rows]
    return " ".join(text for row in rows for text in (row.name, *(c.text() for c in row.cells)))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The complete record with the part at ``path`` replaced."""
    record = copy.deepcopy(record_of())
    *above, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    part = record
    for key in above:
        part = part[key]
    part[last] = value
    return record


def test_a_complete_record_is_read_whole():
    record = record_of()
    search = found(record)
    assert search.missing == []
    told = search.model_dump(mode="json", exclude={"missing"})
    assert told["best_against_first"].pop("round") is None
    assert told.pop("latency") is None
    del record["tournament"]["winner"]
    assert told == record


def test_there_is_no_section_where_sizes_were_given(texts):
    assert found(None) is None
    assert search_of(Sources({}, None, {})) is None
    assert all("How the sizes were chosen" not in text for text in texts(None))


def test_a_student_that_was_only_pruned_tells_its_search():
    assert found(record_of(), role="student").winner == WINNER


@pytest.mark.parametrize("tournament", [True, False])
def test_every_number_of_the_sentences_stands_in_a_table(tournament):
    search = found(record_of(tournament=tournament))
    text = " ".join(search_tables.paragraphs(search)).replace("95 % interval", "")
    numbers = re.findall(r"\d[\d,.]*\d|\d", text)
    assert len(numbers) > 4
    shown = in_tables(search)
    assert [number for number in numbers if number not in shown] == []


def test_the_sentences_say_what_was_searched_what_won_and_why():
    said, trained = search_tables.paragraphs(found(record_of()))
    assert said.startswith(
        "412 combinations of legal sizes fit the budget, 37 are within the search's limits and "
        "4 were made and measured. ffn1216-depth27 was kept: it came first in the tournament."
    )
    assert "is 1.37× the predicted one (median)" in said
    assert trained.startswith("After the same training the winner is better than")
    (alone,) = search_tables.paragraphs(found(record_of(tournament=False)))
    assert "ffn1152-depth28 was kept: it measured closest to the unpruned model." in alone


@pytest.mark.parametrize(
    ("tau", "words"),
    [(1.0, "are the same"), (0.6, "are much alike"), (0.0, "are hardly related"),
     (-1.0, "are opposed")],
)  # fmt: skip
def test_kendalls_tau_is_put_in_words(tau, words):
    (said, *_) = search_tables.paragraphs(found(changed("rank_agreement", tau)))
    assert f"{words} (Kendall's tau" in said


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (-0.01, r"is better than .* by 0\.0\d+ nats per token \(95 % interval 0\.0\d+ to 0\.0\d+"),
        (0.01, r"is worse than .* by 0\.0\d+ nats per token \(95 % interval 0\.0\d+ to 0\.0\d+"),
        (0.0, r"are the same: difference .+ nats, 95 % interval −0\.0\d+ to \+0\.0\d+\."),
    ],
)
def test_the_winner_is_compared_with_the_first_choice_by_its_interval(shift, words):
    second = blocks(0.2, 1, 0.002)
    pair = compared(blocks(0.2, 2, 0.002) + shift, second).as_dict()
    search = found(changed("tournament.against_first_choice", {"round": 1, **pair}))
    assert re.search(words, search_tables.paragraphs(search)[1])


def test_a_winner_that_was_the_first_choice_says_so():
    search = found(changed("tournament.first_choice", WINNER))
    assert search_tables.paragraphs(search)[1] == (
        "The winner is the prediction's first choice itself."
    )
    assert search_tables.comparisons(search).rows[1].cells[-1].value == "the first choice itself"


def test_candidates_stand_in_the_order_of_their_measurement_with_the_winner_marked():
    table = search_tables.measured(found(record_of()))
    assert [row.name for row in table.rows] == [
        name for _, name in sorted(zip(MEASURED, SIZES, strict=True))
    ]
    details = {row.name: row.detail for row in table.rows if row.detail}
    assert details == {WINNER: "winner", FIRST: "first choice of the prediction"}
    assert table.columns[:3] == ["Place", "ffn", "layers"]
    assert next(row for row in table.rows if row.name == FIRST).cells[2].value == "as before"


def test_the_table_says_which_text_was_measured_on():
    caption = search_tables.measured(found(record_of())).caption
    assert "training text that neither calibration nor training saw" in caption
    assert "never on the held-out split" in caption


def test_a_contestant_is_blank_where_it_was_out():
    table = search_tables.tournament(found(record_of()))
    assert table.columns == ["Untrained", "Round 1", "Round 2"]
    cells = {row.name: [cell.value for cell in row.cells] for row in table.rows}
    assert list(cells) == [WINNER, CLOSEST, FIRST, "leader leads", "Kendall's tau"]
    assert cells[FIRST] == ["0.310", "0.250", ""]
    assert cells[WINNER] == ["0.290", "0.220", "0.180"]
    assert cells["Kendall's tau"] == ["", "1.00", "−1.00"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [None, "many", {"a": [1]}, [float("nan")]])
def test_a_part_that_is_absent_or_damaged_is_left_out_and_named(texts, name, value):
    if name == "winner" and value == "many":
        value = 3
    search = found(changed(name, value))
    told = [sentence for sentence in search.missing if name in sentence]
    assert len(told) == 1
    assert ("was not recorded" if value is None else "left out") in told[0]
    if value is None:
        html, markdown = texts(search)
        assert "How the sizes were chosen" in html
        assert plain(told[0]) in markdown


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("measured.0.sizes", [1], "measured.0.sizes is damaged"),
        ("measured.1.divergence_nats", "low", "measured.1.divergence_nats is damaged"),
        ("measured.1.parameters", True, "measured.1.parameters is damaged"),
        ("sensitivity.0.size", 1536, "sensitivity.0 is damaged"),
        ("sensitivity.0.present", 0, "sensitivity.0.present is damaged"),
        ("sensitivity.3.kl_nats", float("inf"), "sensitivity is damaged"),
        ("tournament", "held", "The tournament is left out: its record is damaged."),
        ("tournament.rounds", [], "The tournament is left out: it has no round."),
        ("tournament.rounds", None, "tournament.rounds was not recorded"),
        ("tournament.rounds.0.divergence_nats", {}, "rounds.0.divergence_nats is damaged"),
        ("tournament.rounds.1.leader_share", 2.0, "tournament.rounds.1.leader_share is damaged"),
        ("tournament.against_first_choice", None, "against_first_choice was not recorded"),
        ("tournament.against_first_choice.verdict", "fine", "verdict is damaged"),
        ("tournament.first_choice", None, "tournament.first_choice was not recorded"),
        ("tournament.tokens_of_the_winner", "all", "tokens_of_the_winner is damaged"),
        ("winner", "ffn1-depth1", "The winner is left out: it is none of the measured"),
    ],
)  # fmt: skip
def test_the_damaged_place_is_named_and_the_rest_is_shown(texts, path, value, place):
    search = found(changed(path, value))
    assert len([sentence for sentence in search.missing if place in sentence]) == 1
    assert "412" in in_tables(search) + " ".join(search_tables.paragraphs(search))
    assert len(search_figures(search)) >= 1


@pytest.mark.parametrize("record", ["none", [], [1], {}])
def test_a_record_that_is_none_still_makes_a_page(texts, record):
    search = found(record)
    assert search.missing
    assert search_figures(search) == []
    assert all("How the sizes were chosen" in text for text in texts(search))


def test_a_single_candidate_is_shown_without_an_order():
    record = record_of(tournament=False)
    record |= {"measured": record["measured"][:1], "winner": FIRST, "rank_agreement": None}
    search = found(record)
    assert search.missing == []
    assert "Kendall" not in " ".join(search_tables.paragraphs(search))
    assert search_tables.comparisons(search).rows[0].cells[-1].value == "the first choice itself"


def test_names_cannot_bring_in_markup(texts):
    record = json.loads(json.dumps(record_of()).replace(WINNER, "<b>|x"))
    assert not any("<b>|x" in text for text in texts(found(record)))


def test_the_figures_are_themed_well_formed_and_tell_axes_apart_without_colour():
    search = found(record_of())
    drawn = search_figures(search)
    assert drawn == search_figures(search)
    for drawing in drawn:
        assert ElementTree.fromstring(drawing.svg).get("aria-label") == drawing.title
        assert "currentColor" in drawing.svg
        assert "http" not in drawing.svg
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', drawing.svg))
        assert used <= set(re.findall(r'\sid="([^"]+)"', drawing.svg))
    costs, predictions = drawn
    assert ">ffn<" in costs.svg
    assert ">depth<" in costs.svg
    assert all(f">{place}<" in predictions.svg for place in (1, 2, 3, 4))
    assert "The winner is filled." in predictions.text


def test_cuts_that_cost_nothing_have_no_place_on_a_logarithmic_scale():
    search = found(changed("sensitivity.0.kl_nats", -1e-9))
    assert "Cuts that cost nothing are not drawn." in search_figures(search)[0].text
    nothing = found({**record_of(), "sensitivity": []})
    assert [drawing.title for drawing in search_figures(nothing)] == ["Predicted against measured"]


# --- limits on time -----------------------------------------------------------------------------

LATENCY = {
    "lane": "int4",
    "limit": {"itl_ms": "70%", "ttft_ms": None, "tokens_per_s": None, "batch": 4,
              "percentile": 50, "lane": None, "min_speedup": 1.02,
              "input_tokens": 64, "output_tokens": 24},
    "limits": {"itl_ms": 21.0},
    "before": {"itl_ms": 30.0},
    "prediction_errors": {"itl_ms": 0.02},
    "corners": [
        {"lane": "int4", "name": "unpruned", "fits": False, "costs": {"itl_ms": 30.0},
         "nats": 0.19},
        {"lane": "int4", "name": FIRST, "fits": True, "costs": {"itl_ms": 20.9}, "nats": 0.62},
    ],
    "tried": [
        {"name": name, "predicted": {"itl_ms": 20.9}, "measured": {"itl_ms": ms},
         "before": {"itl_ms": 30.5}, "limits": {"itl_ms": 21.35}, "speedup": {"itl_ms": 30.5 / ms},
         "over_predicted": {"itl_ms": 1.0}, "verdict": verdict}
        for name, ms, verdict in ((FIRST, 22.5, "over the limit"), (WINNER, 20.7, "kept"))
    ],
}  # fmt: skip


def test_a_limit_on_time_shows_the_lanes_and_what_was_timed(texts):
    for text in texts(found(record_of() | {"latency": LATENCY})):
        for said in ("Lanes under the limit", "Timed on the runtime", "unpruned", "22.5", "20.7",
                     "over the limit", "kept", "1.47", "Batch size 4, 64 + 24 tokens;",
                     "(median error: ITL 2.0%)"):  # fmt: skip
            assert said in text


def test_a_limit_from_before_tables_had_several_lengths_is_told_without_them(texts):
    limit = {k: v for k, v in LATENCY["limit"].items() if not k.endswith("put_tokens")}
    for text in texts(found(record_of() | {"latency": LATENCY | {"limit": limit}})):
        assert "Batch size 4; ITL" in text


def test_one_open_axis_under_a_limit_on_time_is_told_without_a_search():
    cut = SimpleNamespace(metrics={"latency": LATENCY}, manifest=SimpleNamespace(stage="prune"))
    search = search_of(Sources({"pruned": {"model": cut}}, None, {}))
    assert search.latency.lane == "int4"
    assert search.missing == []


def test_a_damaged_limit_on_time_is_left_out_and_named():
    search = found(record_of() | {"latency": {"lane": "int4"}})
    assert search.latency is None
    assert search.missing == ["The limit on time is left out: latency.limit is damaged."]


UNPRUNED, PRUNED = {"lane": "int4", "name": "unpruned"}, {"lane": "int4", "name": FIRST}


@pytest.mark.parametrize(
    ("verdict", "fits", "said"),
    [
        (PRUNED | {"pruning_pays": True}, False, "Pruning pays: no lane keeps the limit unpruned."),
        (PRUNED | {"pruning_pays": True}, True, "the limit is kept by int4, which strays further."),
        (UNPRUNED | {"pruning_pays": False}, True, "Pruning does not pay: the format alone keeps"),
    ],
)
def test_whether_pruning_pays_is_said_first(texts, verdict, fits, said):
    latency = copy.deepcopy(LATENCY) | {"verdict": verdict | {"words": "as printed"}}
    latency["corners"][0]["fits"] = fits
    search = found(record_of() | {"latency": latency})
    assert said in search_tables.paragraphs(search)[0]
    for text in texts(search):
        assert said in text


def test_where_the_batch_size_was_open_every_lane_says_its_own(texts):
    latency = copy.deepcopy(LATENCY) | {
        "verdict": PRUNED | {"pruning_pays": True, "batch": 8, "words": "as printed"}
    }
    for batch, corner in zip((1, 8), latency["corners"], strict=True):
        corner["batch"] = batch
    search = found(record_of() | {"latency": latency})
    chosen = [row.name for row in latency_tables.corners(search).rows if row.detail == "searched"]
    assert chosen == ["int4 at batch size 8"]
    for text in texts(search):
        for said in ("int4 at batch size 1", "in the lane int4 at batch size 8."):
            assert said in text
        assert "Batch size 4" not in text
        assert "64 + 24 tokens; ITL" in text


def test_a_lane_that_cannot_be_pruned_to_the_limit_has_no_costs(texts):
    latency = copy.deepcopy(LATENCY)
    latency["corners"].append(
        {"lane": "fp32", "name": "no legal sizes", "fits": False, "costs": {}, "nats": None}
    )
    for text in texts(found(record_of() | {"latency": latency})):
        assert "no legal sizes" in text
