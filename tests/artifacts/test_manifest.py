"""Keys: every change of the work changes them, nothing else does."""

import hashlib
import json
import time
from typing import ClassVar, Literal

import pytest

from trt_kd.artifacts import Manifest, work_key
from trt_kd.artifacts.manifest import sha256_of
from trt_kd.config import Plugin, StageConfig


class Loss(Plugin):
    """A plugin of this test."""

    kind: Literal["loss"] = "loss"
    temperature: float = 1.0


class Config(StageConfig):
    """Settings of all sorts."""

    stage: ClassVar[str] = "distill"
    steps: int = 100
    rate: float = 2e-4
    name: str = "a"
    sizes: list[int] = [1, 2]
    table: dict[str, int] = {"x": 1, "y": 2}
    maybe: int | None = None
    flag: bool = False
    loss: Loss = Loss()


class Renamed(Config):
    """The same settings of another stage."""

    stage: ClassVar[str] = "prune"


class Later(Config):
    """The same settings for a later version of the stage."""

    version: ClassVar[int] = 2


class Outside(Config):
    """The same settings with data from outside."""

    def outside(self) -> dict[str, str]:
        """Name one file."""
        return {"corpus": "0123"}


INPUTS = {"teacher": "11", "student": "22"}
KEY = work_key(Config(), INPUTS)

CHANGES = {
    "steps": [{"steps": 101}, {"steps": 99}],
    "rate": [{"rate": 2.0000001e-4}, {"rate": 0.0}],
    "name": [{"name": "b"}, {"name": "a "}, {"name": "A"}, {"name": ""}, {"name": "ä"}],
    "sizes": [{"sizes": [2, 1]}, {"sizes": [1]}, {"sizes": [1, 2, 2]}, {"sizes": []}],
    "table": [{"table": {"x": 2, "y": 1}}, {"table": {"x": 1}}, {"table": {"x": 1, "z": 2}}],
    "maybe": [{"maybe": 0}, {"maybe": 1}],
    "flag": [{"flag": True}],
    "loss": [{"loss": {"temperature": 1.5}}],
}


def test_every_field_is_changed_in_this_test():
    assert set(CHANGES) == set(Config.model_fields)


def test_every_change_of_a_single_field_gives_another_key():
    changed = [Config.model_validate(change) for changes in CHANGES.values() for change in changes]
    keys = [work_key(config, INPUTS) for config in changed]
    assert len({KEY, *keys}) == len(keys) + 1


@pytest.mark.parametrize("config", [Renamed(), Later(), Outside()], ids=lambda c: type(c).__name__)
def test_another_stage_version_or_outside_datum_gives_another_key(config):
    assert work_key(config, INPUTS) != KEY


@pytest.mark.parametrize(
    "inputs",
    [{}, {"teacher": "11"}, {"teacher": "22", "student": "11"}, {"teacher": "11", "source": "22"}],
)
def test_other_inputs_or_other_roles_give_another_key(inputs):
    assert work_key(Config(), inputs) != KEY


def test_the_same_work_written_another_way_gives_the_same_key(tmp_path, monkeypatch):
    config = Config.model_validate(
        {"table": {"y": 2, "x": 1}, "loss": {"kind": "loss", "temperature": 1}, "steps": 100.0}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert work_key(config, {"student": "22", "teacher": "11"}) == KEY


def test_a_key_is_256_bits_and_does_not_change_between_releases():
    assert KEY == "1cdcdf502001bed1f5ee038d158d6cacda99c90a0a0b1cadf9b9040bd9b948d8"


def test_the_digest_is_that_of_sha256sum_also_over_pieces(tmp_path):
    path = tmp_path / "large.bin"
    content = bytes(range(256)) * 10_000  # more than two pieces
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_manifest_survives_its_file():
    manifest = Manifest(
        kind="checkpoint",
        stage="import",
        key="k",
        config={"a": {"b": [1, None, "ä"]}},
        inputs={},
        metrics={"tasks": {"t": {"accuracy": 0.5, "n": 4}}, "loss_nats_per_token": 1.25},
    )
    text = manifest.model_dump_json(indent=2)
    assert Manifest.model_validate_json(text) == manifest
    assert json.loads(text)["schema_version"] == 1
