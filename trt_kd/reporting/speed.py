"""Records of a benchmark as the report and its figures read them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import read_json
from trt_kd.config import validate
from trt_kd.errors import ArtifactError
from trt_kd.reporting.speed_model import LoadRecord, Percentiles, SpeedRecord

Raw = Mapping[str, Any]
"""One record of ``benchmark.json``."""


@dataclass(frozen=True)
class Timed:
    """What one benchmark measured, by variant."""

    speed: Mapping[str, list[SpeedRecord]] = field(default_factory=dict)
    load: Mapping[str, list[LoadRecord]] = field(default_factory=dict)
    """Empty unless a load generator measured."""
    failures: list[str] = field(default_factory=list)
    """A sentence for every workload that was not timed."""


def read_timed(benchmark: Artifact | None) -> Timed:
    """What ``benchmark`` measured; nothing where there is none.

    Raises:
        ArtifactError: if its file is of another version.
        ModelError: if it is damaged.
    """
    if benchmark is None:
        return Timed()
    path = benchmark.path / "benchmark.json"
    content = read_json(path)
    if content.get("schema_version") != 1:
        raise ArtifactError(
            f"{path} has schema version {content.get('schema_version')!r}, not 1",
            hint="run the benchmark again with this version",
        )
    return timed(content)


def timed(content: Mapping[str, Any]) -> Timed:
    """What the content of a ``benchmark.json`` says."""
    loaded = content.get("load")
    variants: Mapping[str, list[Raw]] = content["variants"]
    at_rates: Mapping[str, list[Raw]] = content.get("request_rates", {})
    every = {name: [*records, *at_rates.get(name, [])] for name, records in variants.items()}
    return Timed(
        speed={
            name: [
                _speed_record(record, under_load=loaded is not None) for record in _good(records)
            ]
            for name, records in variants.items()
        },
        load={
            name: [_load_record(record, loaded) for record in _good(records)]
            for name, records in every.items()
            if loaded is not None
        },
        failures=[
            f"{name} at {_workload(record)} was not timed: {record['error']}."
            for name, records in every.items()
            for record in records
            if "error" in record
        ],
    )


def _good(records: list[Raw]) -> Iterator[Raw]:
    return (record for record in records if "error" not in record)


def _workload(record: Raw) -> str:
    if "request_rate" in record:
        return f"{record['request_rate']:g} requests per second"
    lengths = f"{record['input_tokens']} + {record['output_tokens']} tokens"
    return f"batch size {record['batch_size']}, {lengths},"


def _speed_record(record: Raw, *, under_load: bool) -> SpeedRecord:
    fields = {name: record.get(name) for name in SpeedRecord.model_fields}
    fields["under_load"] = under_load
    for name in ("ttft_ms", "itl_ms"):
        times = fields[name]
        if times is not None:
            known = {share: times[share] for share in Percentiles.model_fields}
            fields[name] = None if None in known.values() else known
    return validate(SpeedRecord, fields, where="benchmark.json")


def _load_record(record: Raw, loaded: Mapping[str, Any]) -> LoadRecord:
    fields = {name: record.get(name) for name in LoadRecord.model_fields}
    fields |= {"concurrency": record.get("batch_size"), "slo": dict(loaded["slo"])}
    fields |= {"served_here": loaded.get("served_here")}
    return validate(LoadRecord, fields, where="benchmark.json")
