"""Every export carries its own card: lineage, settings, proof and licence."""

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.card import export_card, inherited_licence


class Made(StageConfig):
    stage = "made"
    note: str = ""


@pytest.fixture
def descendant(tmp_path):
    """A checkpoint two stages away from an import that named its licence."""

    def make(licence):
        source, inputs = None, {}
        for number, note in enumerate(["imported", "pruned `here`", "quantized"]):
            with writing(
                tmp_path / f"{number}", kind="checkpoint", config=Made(note=note), inputs=inputs
            ) as draft:
                (draft.path / "config.json").write_text("{}")
                draft.metrics["license"] = licence if number == 0 else None
                draft.metrics["kl_to_source_nats"] = 0.0312345
            source = Artifact.open(tmp_path / f"{number}")
            inputs = {"source": source}
        return source

    return make


@pytest.mark.parametrize("name", EXPORTERS.names())
def test_the_card_names_every_step_the_settings_the_proof_and_the_licence(descendant, name):
    source, lane = descendant("apache-2.0"), EXPORTERS.load(name)()
    metrics = {"logits_kl_nats": 1.5e-9, "weight_bytes": 12345, "verified_tokens": 1024}
    card = export_card(lane, source, metrics)
    assert f"# Export for {name}" in card
    for key in [source.key, *source.manifest.lineage]:
        assert key[:12] in card
    for text in ("apache-2.0", "imported", "1.5e-09", "12,345", "0.0312", "pruned 'here'"):
        assert text in card


def test_an_unknown_licence_is_said_to_be_unknown(descendant):
    source = descendant(None)
    assert inherited_licence(source) == ""
    assert "names no licence" in export_card(EXPORTERS.load("hf-unified")(), source, {})
