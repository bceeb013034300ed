"""``report.json``, schema version 1: what a report says, with the unit in every name.

docs/report.md documents every field; a test keeps the two together.
"""

from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from trt_kd.reporting.record import Record
from trt_kd.reporting.search_model import SizeSearch
from trt_kd.reporting.speed_model import LoadRecord, SpeedRecord
from trt_kd.reporting.training_model import Training

Role = Literal[
    "teacher",
    "teacher_quantized",
    "corrected",
    "pruned",
    "cross_entropy",
    "student",
    "student_quantized",
]
"""What a variant stands for in the comparison."""

ROLES: tuple[Role, ...] = (
    "teacher",
    "teacher_quantized",
    "corrected",
    "pruned",
    "cross_entropy",
    "student",
    "student_quantized",
)
"""Every role, in the order of the rows."""

Verdict = Literal["pass", "fail", "undecided"]


class TaskScore(Record):
    """Accuracy on one task."""

    accuracy: float
    """Share of items answered correctly, 0 to 1."""
    stderr: float | None
    """Standard error of the accuracy."""
    n: int
    """Items."""


class Quality(Record):
    """Agreement with the teacher and accuracy; null where it was not measured."""

    kl_to_teacher_nats: float | None = None
    """Forward KL from teacher to variant on held-out text, in nats per token."""
    kl_to_teacher_nats_stderr: float | None = None
    """Its standard error over blocks of text."""
    top1_agreement: float | None = None
    """Share of held-out tokens where variant and teacher would choose the same token."""
    top1_agreement_stderr: float | None = None
    """Its standard error over blocks of text."""
    perplexity: float | None = None
    """exp of the loss on held-out text."""
    loss_nats_per_token: float | None = None
    """Cross-entropy on held-out text."""
    loss_nats_per_token_stderr: float | None = None
    """Its standard error over blocks of text."""
    heldout_tokens: int | None = None
    """Tokens behind the numbers above."""
    tasks: dict[str, TaskScore] = {}
    """Accuracy by task."""


class Variant(Record):
    """One row of the comparison."""

    name: str
    """What the row is called."""
    role: Role
    """What it stands for."""
    parameters: int
    """Parameters of the model; a tied head counts once."""
    parameters_share: float
    """``parameters`` over the baseline's."""
    size_bytes: int
    """All files of what ships: the export, or the checkpoint where nothing was exported."""
    format: str
    """Format of the weights that ship."""
    lane: str
    """Exporter that wrote what ships; ``checkpoint`` where nothing was exported."""
    quality: Quality
    """Measured on the artifact named by ``evaluated``."""
    evaluated: Literal["checkpoint", "export"] | None
    """What ``quality`` was measured on; null where it was not measured."""
    speed: list[SpeedRecord]
    """Measured workloads; empty where ``same_speed_as`` names a variant of the same shapes."""
    same_speed_as: Role | None = None
    """A measured variant of the same shapes and format class, whose speed this one shares."""
    load: list[LoadRecord] = []
    """Every load that a load generator measured."""
    artifacts: dict[str, str]
    """Keys of the model, what ships and the evaluation."""
    seconds: dict[str, float] = {}
    """Duration of the stages that made the model, what ships and the evaluation."""


class ExportRow(Record):
    """An exported artifact that is not a variant."""

    name: str
    """What it is called."""
    lane: str
    """Exporter that wrote it."""
    format: str
    """Format of its weights."""
    size_bytes: int
    """All its files."""
    logits_kl_nats: float | None = None
    """KL from source to export on held-out text, in nats per token, read back after writing."""
    top1_agreement: float | None = None
    """Share of tokens where source and export choose the same token."""
    artifact: str
    """Its key."""


class GateResult(Record):
    """A limit, what was found and the decision."""

    name: str
    """What the recipe calls it."""
    variant: Role
    """Role it judges."""
    metric: str
    """What it judges."""
    relative_to: Role | None
    """Role it is compared with."""
    compare: Literal["value", "ratio", "difference"]
    """What ``value`` is."""
    bound: Literal["at most", "at least"]
    """Which side of the limit passes."""
    limit: float
    """The limit, in the unit of ``value``."""
    value: float | None
    """What was found; null where nothing could be."""
    interval: tuple[float, float] | None
    """95 % interval of ``value``; zero width for exact numbers."""
    method: str
    """How the interval was made."""
    p_value: float | None = None
    """Exact McNemar test, two-sided, where two variants answered the same items."""
    verdict: Verdict
    """Pass: the whole interval is on the right side; fail: on the wrong side; else undecided."""
    reason: str = ""
    """Why it is undecided."""


class LineageNode(Record):
    """One artifact behind the report."""

    name: str
    """What the report calls it, or its stage."""
    stage: str
    """The stage that wrote it."""
    kind: str
    """What it holds."""
    key: str
    """First 12 hexadecimal digits of its key."""
    inputs: dict[str, str]
    """Key prefixes of its inputs by role."""


class PartCount(Record):
    """Parameters of one part of the model."""

    name: str
    """Embedding, attention, mlp, norms, lm_head, router or experts."""
    parameters_before: int
    """Parameters of the part in the model ``before``."""
    parameters_after: int
    """Parameters of the part in the model ``after``."""


class SizeChange(Record):
    """One size of the model."""

    name: str
    """Layers, hidden, ffn, heads, kv_heads, head_dim, vocab, experts or expert_ffn."""
    before: int
    """Size of the model ``before``."""
    after: int
    """Size of the model ``after``."""


class Refitted(Record):
    """A projection that lost inputs or makes up for dropped layers, and what that cost."""

    projection: Literal["attention", "output", "mlp", "router", "experts", "down"]
    """Output projection of the attention, down projection of the MLP or of its experts, or, after a
    cut of the residual stream, what reads it: for attention, for the MLP, the router."""
    plain_energy_lost: float | None
    """Squared error of its output over the squared output, inputs cut and no more, 0 to 1."""
    refit_energy_lost: float | None
    """The same after the refit to the inputs that are left."""
    ridge: float | Literal["plain cut"] | None
    """Pull towards the plain cut that did best outside the fit; null where it was not recorded."""


class LayerCut(Record):
    """One layer of the model before the cut."""

    layer: int
    """Its number from 0."""
    kept: bool | None
    """False where the layer was dropped; null where layers were and which was not recorded."""
    block_influence: float | None
    """Mean over calibration tokens of 1 - cosine of the layer's input and output."""
    refits: list[Refitted] = []
    """Its projections that were refit."""


class MemoryForecast(Record):
    """Predicted memory of one model in one format; activations and runtime are not counted."""

    role: Role
    """The model."""
    weight_format: str
    """Format of the weights of projections and experts."""
    bits_per_weight: float
    """Bits of one of these weights with its share of the block's scale."""
    kv_format: str
    """Format of the key-value cache."""
    batch_size: int
    """Sequences in the cache."""
    tokens: int
    """Tokens of each of them, input and output."""
    weights_bytes: int
    """All weights with their scales."""
    kv_cache_bytes: int
    """The key-value cache."""


class Pruning(Record):
    """What was cut."""

    before: Role
    """The model that was cut."""
    after: Role
    """What came of it."""
    parts: list[PartCount]
    """Parameters by part."""
    sizes: list[SizeChange]
    """Sizes by name, those that stayed included."""
    layers: list[LayerCut] = []
    """Sensitivity and loss layer by layer, of the model before the cut."""
    memory: list[MemoryForecast] = []
    """Predicted memory by format and batch, before and after."""
    calibration_tokens: int | None = None
    """Tokens behind scores and refit."""
    importance_pass_s: float | None = None
    """Duration of the scoring pass."""
    missing: list[str] = []
    """What is left out and why, a sentence each."""


class Report(Record):
    """Everything the page shows."""

    schema_version: Literal[1] = 1
    """Version of this layout."""
    name: str
    """Name of the recipe."""
    title: str
    """Heading."""
    created: str
    """UTC time, ISO 8601."""
    verdict: Verdict
    """Fail if any gate fails, else undecided if any is undecided or there is none, else pass."""
    baseline: Role
    """Role of the first row; every change is against it."""
    variants: list[Variant]
    """Rows, the baseline first."""
    exports: list[ExportRow] = []
    """Further exported artifacts."""
    pruning: Pruning | None = None
    """What was cut; null where nothing was pruned or the model before is not in the report."""
    search: SizeSearch | None = None
    """How the sizes were chosen; null where they were given."""
    training: Training | None = None
    """How the student was trained; null where it was not."""
    gates: list[GateResult] = []
    """The limits of the recipe, in its order."""
    environment: dict[str, Any] = {}
    """Hardware and versions of the machine that did the measuring."""
    recipe: dict[str, Any] = {}
    """Resolved settings of the run."""
    lineage: list[LineageNode] = []
    """Every artifact behind the numbers, each after its inputs."""
    notes: list[str] = []
    """What a reader must know before believing a number."""

    @model_validator(mode="after")
    def _baseline_is_first(self) -> Self:
        roles = [variant.role for variant in self.variants]
        if not roles or roles[0] != self.baseline:
            raise ValueError(f"the first variant must be the baseline {self.baseline!r}: {roles}")
        if len(set(roles)) != len(roles):
            raise ValueError(f"roles stand twice: {roles}")
        return self

    def variant(self, role: Role | None) -> Variant | None:
        """The variant with ``role``, or None."""
        return next((row for row in self.variants if row.role == role), None)

    def speed_of(self, variant: Variant) -> list[SpeedRecord]:
        """Speed of ``variant``, or of the variant whose shapes it shares."""
        if variant.speed or variant.same_speed_as is None:
            return variant.speed
        other = self.variant(variant.same_speed_as)
        return other.speed if other else []
