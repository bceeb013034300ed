"""ONNX Runtime GenAI: options, what the builder really wrote, and planted faults."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.config import validate
from trt_kd.errors import ConfigError, MissingDependencyError, ModelError, VerificationError
from trt_kd.exporters.ort_genai import OrtGenai, end_of_text
from trt_kd.exporters.verification import source_logits, verify

LIMITS = {"fp32": 1e-9, "int8": 0.05, "int4": 0.5}


@pytest.fixture(scope="session")
def exported(teacher, forks, tmp_path_factory):
    """Exports of the tiny teacher by precision, each made when first asked for.

    The builder has a process of its own for one of them, and forks for the others.
    """
    pytest.importorskip("onnxruntime_genai")
    made: dict[str, tuple[OrtGenai, dict, Path]] = {}

    def make(precision: str):
        if precision not in made:
            out = tmp_path_factory.mktemp("ort") / precision
            out.mkdir()
            lane = OrtGenai(precision=precision)
            with pytest.MonkeyPatch.context() as patch:
                if precision != "fp32":
                    patch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)
                made[precision] = lane, lane.export(teacher, out), out
        return made[precision]

    return make


def test_the_settings_survive_a_round_trip():
    lane = OrtGenai(precision="int4", int4_algorithm="rtn")
    assert OrtGenai.model_validate(lane.model_dump()) == lane
    assert OrtGenai.model_validate(OrtGenai(precision="fp32").model_dump()).precision == "fp32"


def test_an_option_without_effect_is_an_error():
    with pytest.raises(ConfigError, match="no effect"):
        validate(OrtGenai, {"precision": "int8", "int4_algorithm": "rtn"}, where="lane")


def test_a_quantized_source_is_refused_with_the_reason(teacher):
    problems = OrtGenai().check(read_shape(teacher.path), "quantized")
    assert len(problems) == 1
    assert "plain checkpoint" in problems[0]


def test_a_mistral_with_a_window_is_refused_and_one_without_is_not(tmp_path):
    from trt_kd.artifacts import Artifact, writing
    from trt_kd.config import StageConfig

    class Made(StageConfig):
        stage = "import"

    for number, (window, count) in enumerate([(None, 0), (4096, 1), (32768, 0)]):
        out = tmp_path / str(number)
        with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
            config = {"model_type": "mistral", "max_position_embeddings": 32768}
            text = json.dumps(config | {"sliding_window": window})
            (draft.path / "config.json").write_text(text)
        assert len(OrtGenai().check_source(Artifact.open(out))) == count


def test_unknown_architectures_and_odd_heads_are_refused(teacher):
    from dataclasses import replace

    shape = read_shape(teacher.path)
    assert OrtGenai().check(shape, "checkpoint") == []
    assert OrtGenai().check(replace(shape, model_type="mamba"), "checkpoint")
    for head_dim in (12, 24, 40, 72):
        (problem,) = OrtGenai().check(replace(shape, head_dim=head_dim), "checkpoint")
        assert f"16 divides, not {head_dim}" in problem


def test_a_missing_package_names_its_extra(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependencyError, match="onnx"):
        OrtGenai().export(teacher, tmp_path)


def test_the_builder_is_run_without_a_shell_and_without_a_network(teacher, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai")
    seen = {}

    def fake(arguments, **options):
        seen.update(options, arguments=arguments)
        return subprocess.CompletedProcess(arguments, 3, stdout="", stderr="first\nno space\n\n")

    monkeypatch.setattr("trt_kd.exporters.ort_genai.subprocess.run", fake)
    with pytest.raises(ModelError, match="code 3: no space"):
        OrtGenai().export(teacher, tmp_path)
    assert seen["env"]["HF_HUB_OFFLINE"] == "1"
    assert not seen.get("shell")
    assert "algo_config=k_quant_mixed" in seen["arguments"]
    cache = Path(seen["arguments"][seen["arguments"].index("-c") + 1])
    assert cache.is_relative_to(tmp_path)


def test_end_of_text_is_the_generation_configuration_s(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_of_text(tmp_path) == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert end_of_text(tmp_path) == [5, 6]
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_of_text(tmp_path) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", LIMITS)
def test_an_export_agrees_with_its_source(exported, teacher, blocks, precision):
    lane, _, out = exported(precision)
    difference = verify(lane, teacher, out, blocks, source_logits(teacher, blocks))
    assert difference.kl_nats < LIMITS[precision]


@pytest.mark.slow
def test_the_bits_asked_for_are_the_bits_written(exported):
    shares = {p: exported(p)[1] for p in LIMITS}
    assert shares["fp32"] == {"realised_low_bit_share": 0, "weight_share_by_bits": {"32": 1.0}}
    assert set(shares["int8"]["weight_share_by_bits"]) == {"8", "32"}
    assert 0.8 < shares["int8"]["realised_low_bit_share"] < 0.9
    mixed = shares["int4"]["weight_share_by_bits"]
    assert set(mixed) == {"4", "8"}
    assert mixed["4"] > 0.2
    assert shares["int4"]["realised_low_bit_share"] == pytest.approx(1.0)


@pytest.mark.slow
def test_every_weight_is_counted_once(exported, teacher):
    from trt_kd.exporters.onnx_graph import weights_by_bits

    parts = read_shape(teacher.path).parts()
    expected = parts["embedding"] + parts["attention"] + parts["mlp"]
    counted = {p: weights_by_bits(exported(p)[2] / "model.onnx") for p in LIMITS}
    assert sum(counted["int4"].values()) == expected
    # With other precisions the builder stores the tied table twice: for look-up and as the head.
    twice = parts["embedding"]
    assert counted["int8"] == {8: expected, 32: twice}
    assert sum(counted["fp32"].values()) in (expected, expected + twice)


@pytest.mark.slow
def test_end_of_text_and_tokenizer_are_the_source_s(exported, teacher):
    import onnxruntime_genai as genai

    _, _, out = exported("fp32")
    settings = json.loads((out / "genai_config.json").read_text())["model"]
    assert settings["eos_token_id"] == end_of_text(teacher.path)
    assert (out / "tokenizer.json").read_bytes() == (teacher.path / "tokenizer.json").read_bytes()
    tokens = genai.Tokenizer(genai.Model(str(out))).encode("Open the file, read every line.")
    from trt_kd.checkpoints import load_tokenizer

    expected = load_tokenizer(teacher.path)("Open the file, read every line.")["input_ids"]
    assert list(tokens) == expected


@pytest.mark.slow
def test_nothing_is_left_behind_and_no_path_is_told(exported, teacher):
    _, _, out = exported("fp32")
    assert {path.suffix for path in out.iterdir()} <= {".json", ".onnx", ".data", ".jinja", ".txt"}
    for path in out.iterdir():
        assert str(teacher.path.parent).encode() not in path.read_bytes(), path


def rotated(out: Path, factor: float) -> None:
    import onnx

    model = onnx.load(out / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            table = onnx.numpy_helper.to_array(tensor)
            half = np.roll(table, 1, axis=1) if factor else table
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(half), tensor.name))
    onnx.save(model, out / "model.onnx")


def other_epsilon(out: Path) -> None:
    import onnx

    model = onnx.load(out / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-5
    onnx.save(model, out / "model.onnx")


def other_weight(out: Path) -> None:
    path = out / "model.onnx.data"
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    data[len(data) // 2 :] ^= 0x11
    path.write_bytes(data.tobytes())


def other_setting(name: str, value: object):
    def change(out: Path) -> None:
        path = out / "genai_config.json"
        settings = json.loads(path.read_text())
        place = settings["model"] if name in settings["model"] else settings["model"]["decoder"]
        place[name] = value
        path.write_text(json.dumps(settings))

    return change


FAULTS = {
    "rotation": lambda out: rotated(out, 1.0),
    "epsilon": other_epsilon,
    "weights": other_weight,
    "end of text": other_setting("eos_token_id", [0, 1]),
    "layers": other_setting("num_hidden_layers", 3),
    "no graph": lambda out: (out / "model.onnx.data").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(exported, teacher, blocks, tmp_path, fault):
    lane, _, good = exported("int4")
    out = tmp_path / "spoilt"
    shutil.copytree(good, out)
    reference = source_logits(teacher, blocks)
    FAULTS[fault](out)
    with pytest.raises((VerificationError, ModelError)):
        verify(lane, teacher, out, blocks, reference)


@pytest.mark.slow
def test_bits_that_were_not_written_are_seen(exported, teacher, blocks):
    _, _, out = exported("fp32")
    with pytest.raises(VerificationError, match="100% in 32 bits"):
        verify(OrtGenai(precision="int4"), teacher, out, blocks, source_logits(teacher, blocks))


def test_the_builder_runs_though_transformers_lacks_a_class(tmp_path, monkeypatch):
    from trt_kd.exporters.genai_builder import run

    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "ran"
    (tmp_path / "asks_for_news.py").write_text(
        "from pathlib import Path\n"
        "from transformers import AutoConfig, OfTomorrow, OfNextWeek\n"
        f"Path({str(out)!r}).write_text(OfTomorrow.__name__ + OfNextWeek.__name__)\n"
    )
    import transformers

    try:
        run("asks_for_news")
    finally:
        for name in ("OfTomorrow", "OfNextWeek"):
            vars(transformers).pop(name, None)
    assert out.read_text() == "OfTomorrowOfNextWeek"


def test_other_import_errors_are_not_hidden(tmp_path, monkeypatch):
    from trt_kd.exporters.genai_builder import run

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "asks_for_more.py").write_text("from json import no_such_name\n")
    with pytest.raises(ImportError, match="no_such_name"):
        run("asks_for_more")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_in_parallel_finds_the_same_weights(bits, monkeypatch):
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    from trt_kd.exporters import genai_builder

    monkeypatch.setattr(genai_builder, "_WEIGHTS_AT_ONCE", 7 * 32)
    weights = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32).T
    weights[:, 3] = 0.25  # a group of equal weights has no range
    plain = quant_tensor_k_quant_cpu(weights.copy(), bits, 32)
    found = genai_builder.in_parallel(quant_tensor_k_quant_cpu)(weights.copy(), bits, 32)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
