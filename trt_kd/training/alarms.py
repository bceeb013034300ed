"""Named alarms: what a sick training run looks like in its log, and what the literature advises.

Every alarm is a pure function of the log's rows so far, so that a resumed run and a reader of the
finished artifact find the same alarms at the same steps. A row stands for a step
(``history.jsonl``) or for a measurement (``monitors.jsonl``). Thresholds are wide: the noise of
small batches and weights that follow a schedule raise none.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal, TypeAlias

AlarmName: TypeAlias = Literal[
    "task_stalls",
    "response_rises",
    "early_gradient_spike",
    "entropy_collapse",
    "feature_collapse",
    "late_pairs_diverge",
    "length_drift",
]
Need: TypeAlias = Literal["monitor", "response", "features", "on_policy", "common_tokenizer"]
Row: TypeAlias = Mapping[str, float]
Rows: TypeAlias = Sequence[Row]

WINDOW = 256
"""Newest rows that an alarm sees, beside the very first one."""
BLOCK = 10
"""Steps of which a median is taken before steps are compared."""

_PAIR = re.compile(r"^feature_.*?_(\d+)_(\d+)(?:_nats_per_token)?$")


@dataclass(frozen=True)
class Alarm:
    """A symptom in the newest rows."""

    name: AlarmName
    says: str
    """What is seen, in a few words."""
    advice: str
    """What helps."""
    source: str
    """Who says so."""
    needs: frozenset[Need]
    """What a run must have for it to be raised at all."""
    fires: Callable[[Rows, Rows], bool]
    """The symptom as a function of the steps' rows and the measurements' rows."""


def task_stalls(steps: Rows, measured: Rows) -> bool:
    """Divergence on held-out text falls three times, by 5 % in all; task loss never gains 0.1 %."""
    rows = [row for row in measured if "heldout_kl_nats_per_token" in row][-4:]
    if len(rows) < 4:
        return False
    kl = [row["heldout_kl_nats_per_token"] for row in rows]
    task = [row["heldout_task_nats_per_token"] for row in rows]
    falls = all(after < before for before, after in pairwise(kl)) and kl[-1] < 0.95 * kl[0]
    return falls and all(value > 0.999 * task[0] for value in task[1:])


def response_rises(steps: Rows, measured: Rows) -> bool:
    """The response loss is 3 times its recent median, or ten steps lie 50 % above the best ten."""
    values = _values(steps, "response_nats_per_token")
    if len(values) > BLOCK and values[-1] > 3 * median(values[-2 * BLOCK - 1 : -1]):
        return True
    return _risen(values, 1.5)


def early_gradient_spike(steps: Rows, measured: Rows) -> bool:
    """Gradients of the first quarter of the layers are 5 times theirs, and twice the others'."""
    rows = [row for row in measured if "grad_norm_layer_0" in row]
    if len(rows) < 4:
        return False
    parts = [_early_and_late(row) for row in rows]
    early = [norm for norm, _ in parts]
    share = [norm / max(rest, 1e-30) for norm, rest in parts]
    grew = early[-1] > 5 * median(early[:-1])
    return grew and share[-1] > 2 * median(share[:-1])


def entropy_collapse(steps: Rows, measured: Rows) -> bool:
    """The student's entropy is below half of its first value and half of its own task loss."""
    rows = [row for row in measured if "heldout_entropy_nats_per_token" in row]
    if len(rows) < 2:
        return False
    entropy = [row["heldout_entropy_nats_per_token"] for row in rows]
    task = rows[-1]["heldout_task_nats_per_token"]
    return entropy[-1] < 0.5 * entropy[0] and entropy[-1] < 0.5 * task


def feature_collapse(steps: Rows, measured: Rows) -> bool:
    """A feature loss stays below a thousandth of its first value for ten steps."""
    found = [_values(steps, name) for name in _feature_names(steps)]
    return any(len(v) > BLOCK and max(v[-BLOCK:]) < 1e-3 * v[0] for v in found)


def late_pairs_diverge(steps: Rows, measured: Rows) -> bool:
    """The loss of a pair in the later half rises by 30 % above its best; the first pair's not."""
    pairs = [
        (int(found[1]), name) for name in _feature_names(steps) if (found := _PAIR.match(name))
    ]
    ordered = [_values(steps, name) for _, name in sorted(pairs)]
    if len(ordered) < 2 or _risen(ordered[0], 1.1):
        return False
    return any(_risen(values, 1.3) for values in ordered[(len(ordered) + 1) // 2 :])


def length_drift(steps: Rows, measured: Rows) -> bool:
    """What the student writes is half as long as before, or twice: medians of ten such steps."""
    values = _values(steps, "generated_tokens")
    if len(values) < 2 * BLOCK:
        return False
    first, newest = median(values[:BLOCK]), median(values[-BLOCK:])
    return newest < 0.5 * first or newest > 2 * first


ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "task_stalls",
        "the student comes closer to the teacher on held-out text, its task loss no longer gains",
        "stop here, raise task_weight late in the run, or correct the teacher on this text first",
        "Cho and Hariharan 2019, arXiv:1910.01348",
        frozenset({"monitor", "response", "common_tokenizer"}),
        task_stalls,
    ),
    Alarm(
        "response_rises",
        "the response loss jumped or climbs",
        "lower learning_rate, raise warmup_steps, or lower max_grad_norm",
        "Chowdhery et al. 2022, arXiv:2204.02311; Wortsman et al. 2023, arXiv:2309.14322",
        frozenset({"response"}),
        response_rises,
    ),
    Alarm(
        "early_gradient_spike",
        "gradients of the first layers jumped, which comes before a loss that diverges",
        "lower learning_rate or max_grad_norm, or raise warmup_steps",
        "Zeng et al. 2022, arXiv:2210.02414; Molybog et al. 2023, arXiv:2304.09871",
        frozenset({"monitor"}),
        early_gradient_spike,
    ),
    Alarm(
        "entropy_collapse",
        "the student is far surer than it is right on held-out text",
        "use forward_kl or jsd instead of reverse_kl, lower learning_rate, or give more text",
        "Pereyra et al. 2017, arXiv:1701.06548; Agarwal et al. 2024, arXiv:2306.13649",
        frozenset({"monitor"}),
        entropy_collapse,
    ),
    Alarm(
        "feature_collapse",
        "a feature loss fell to nothing: a projector can map everything to one point",
        "put the projector on the student's side, make it orthogonal, or normalise the teacher's",
        "Miles et al. 2024, arXiv:2403.06213",
        frozenset({"features"}),
        feature_collapse,
    ),
    Alarm(
        "late_pairs_diverge",
        "later layer pairs come apart while the first one does not",
        "pair later layers anew by similarity (trt-kd layers), or lower the features' weight",
        "Passban et al. 2021, arXiv:2012.14022",
        frozenset({"features"}),
        late_pairs_diverge,
    ),
    Alarm(
        "length_drift",
        "the student's own texts become much shorter or longer",
        "lower on_policy.share or learning_rate, or set on_policy.temperature to 1",
        "Gu et al. 2024, arXiv:2306.08543",
        frozenset({"on_policy"}),
        length_drift,
    ),
)
"""Every alarm."""


class Watch:
    """Sees rows one by one and says which alarms they raise for the first time."""

    def __init__(self) -> None:
        self.fired: dict[AlarmName, int] = {}
        """Step at which each alarm was raised first."""
        self._steps: list[Row] = []
        self._measured: list[Row] = []

    def step(self, row: Row) -> list[Alarm]:
        """Alarms that the row of a step raises."""
        self._steps.append(row)
        return self._raised(int(row["step"]))

    def measurement(self, row: Row) -> list[Alarm]:
        """Alarms that the row of a measurement raises."""
        self._measured.append(row)
        return self._raised(int(row["step"]))

    def _raised(self, step: int) -> list[Alarm]:
        steps, measured = _window(self._steps), _window(self._measured)
        new = [a for a in ALARMS if a.name not in self.fired and a.fires(steps, measured)]
        self.fired |= {alarm.name: step for alarm in new}
        return new


def alarms_of(steps: Rows, measured: Rows) -> dict[AlarmName, int]:
    """Step at which each alarm is raised first by a log, as it would have been live."""
    watch = Watch()
    rows = [(row["step"], 0, watch.step, row) for row in steps]
    rows += [(row["step"], 1, watch.measurement, row) for row in measured]
    for _, _, see, row in sorted(rows, key=lambda entry: entry[:2]):
        see(row)
    return watch.fired


def _window(rows: Sequence[Row]) -> Rows:
    return rows if len(rows) <= WINDOW else [rows[0], *rows[-WINDOW:]]


def _values(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _risen(values: Sequence[float], factor: float) -> bool:
    """Whether the median of the newest block lies above ``factor`` times the lowest block's."""
    blocks = [median(values[end - BLOCK : end]) for end in range(len(values), BLOCK - 1, -BLOCK)]
    return len(blocks) > 1 and blocks[0] > factor * min(blocks)


def _early_and_late(row: Row) -> tuple[float, float]:
    """Root mean square of the gradient norms of the first quarter of the layers, and the rest."""
    prefix = "grad_norm_layer_"
    numbered = {int(n.removeprefix(prefix)): v for n, v in row.items() if n.startswith(prefix)}
    squares = [numbered[layer] ** 2 for layer in sorted(numbered)]
    first = max(1, len(squares) // 4)
    rest = squares[first:] or squares
    return fmean(squares[:first]) ** 0.5, fmean(rest) ** 0.5


def _feature_names(steps: Rows) -> list[str]:
    return [name for name in steps[-1] if name.startswith("feature_")] if steps else []
