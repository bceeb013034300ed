"""The catalogue of legal sizes: every rule sourced and tried, nearest sizes, no torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import validate
from trt_kd.errors import ConfigError, ModelError
from trt_kd.pruning.catalogue import (
    SIZES,
    Catalogue,
    Rule,
    Target,
    catalogue,
    check,
    legal,
    legal_sizes,
    refused,
    violations,
)
from trt_kd.quantization import FORMATS

LLAMA = ModelShape(
    model_type="llama",
    layers=32,
    hidden=4096,
    ffn=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
)
MIXTURE = replace(LLAMA, ffn=0, experts=128, experts_per_token=8, expert_ffn=768)

PAGE = Path(__file__).parents[2] / "docs/legal-sizes.md"

EXAMPLES = {
    # rule: (sizes that keep it, sizes that break it, ranks)
    "query_groups": ({"heads": 24}, {"heads": 28}, 1),
    "experts_to_choose_from": ({"experts": 8}, {"experts": 7}, 1),
    "ranks_share_heads": ({"heads": 24}, {"heads": 30}, 4),
    "ranks_share_kv_heads": ({"kv_heads": 2}, {"kv_heads": 6}, 4),
    "ranks_share_channels": ({"expert_ffn": 702}, {"expert_ffn": 703}, 2),
    "ranks_share_vocabulary": ({"vocab": 502}, {"vocab": 501}, 2),
    "ranks_share_experts": ({"experts": 120}, {"experts": 124}, 8),
    "padded_vocabulary": ({"vocab": 512}, {"vocab": 576}, 2),
    "trtllm_head_sizes": ({"head_dim": 80}, {"head_dim": 100}, 1),
    "trtllm_fused_head_sizes": ({"head_dim": 64}, {"head_dim": 80}, 1),
    "vllm_head_sizes": ({"head_dim": 96}, {"head_dim": 112}, 1),
    "ort_head_sizes": ({"head_dim": 48}, {"head_dim": 40}, 1),
    "trtllm_group_sizes": (
        {"heads": 64, "kv_heads": 2},
        {"heads": 66, "kv_heads": 2},
        1,
    ),
    "expert_eights": ({"experts": 120}, {"experts": 124}, 1),
    "expert_powers_of_two": ({"experts": 64}, {"experts": 96}, 1),
    "trtllm_most_experts": ({"experts": 2048}, {"experts": 2056}, 1),
    "int4_blocks_128": ({"ffn": 1024}, {"ffn": 1152}, 2),
    "int4_blocks_128_hidden": ({"hidden": 640}, {"hidden": 576}, 2),
    "int4_blocks_64": ({"heads": 8, "head_dim": 48}, {"heads": 6, "head_dim": 48}, 2),
    "int4_blocks_64_hidden": ({"hidden": 576}, {"hidden": 544}, 1),
    "marlin_inputs": ({"ffn": 512}, {"ffn": 384}, 2),
    "marlin_hidden": ({"hidden": 640}, {"hidden": 576}, 1),
    "marlin_outputs": ({"kv_heads": 2, "head_dim": 64}, {"kv_heads": 2, "head_dim": 88}, 2),
    "vllm_w4a8_outputs": ({"kv_heads": 4}, {"head_dim": 100}, 1),
    "nvfp4_blocks": ({"ffn": 1008}, {"ffn": 1000}, 1),
    "nvfp4_blocks_hidden": ({"hidden": 592}, {"hidden": 600}, 1),
    "nvfp4_alignment": ({"ffn": 1024}, {"ffn": 1008}, 1),
    "nvfp4_alignment_hidden": ({"hidden": 608}, {"hidden": 592}, 1),
    "nvfp4_padding": ({"expert_ffn": 704}, {"expert_ffn": 720}, 1),
    "mx_blocks": ({"ffn": 1056}, {"ffn": 1040}, 1),
    "mx_blocks_hidden": ({"hidden": 608}, {"hidden": 592}, 1),
    "ort_blocks": ({"ffn": 1056}, {"ffn": 1040}, 1),
    "fp8_alignment": ({"ffn": 1040}, {"ffn": 1032}, 1),
    "fp8_alignment_hidden": ({"hidden": 592}, {"hidden": 584}, 1),
    "fp8_padding": ({"ffn": 1056}, {"ffn": 1040}, 2),
    "int8_alignment": ({"ffn": 1040}, {"ffn": 1032}, 1),
    "int8_alignment_hidden": ({"hidden": 592}, {"hidden": 584}, 1),
    "tile_16_bit": ({"ffn": 1024}, {"ffn": 1040}, 1),
    "tile_16_bit_hidden": ({"hidden": 576}, {"hidden": 592}, 1),
    "tile_8_bit": ({"ffn": 1024}, {"ffn": 1088}, 1),
    "tile_8_bit_hidden": ({"hidden": 640}, {"hidden": 576}, 1),
    "block_scale_tile": ({"ffn": 1024}, {"ffn": 1088}, 1),
    "block_scale_tile_hidden": ({"hidden": 640}, {"hidden": 576}, 1),
}

RULES = [pytest.param(rule, id=rule.name) for rule in catalogue().rules]
AWQ = Target(format="int4_awq", runtime="trtllm", gpu="hopper")


def target_of(rule: Rule, ranks: int) -> Target:
    known = catalogue()
    return Target(
        format=(*rule.formats, "bf16")[0],
        runtime=(*rule.runtimes, "transformers")[0],
        gpu=(*rule.gpus, known.gpus[0])[0],
        tensor_parallel=ranks,
    )


def tried(rule: Rule) -> tuple[ModelShape, ModelShape, Target]:
    keeps, breaks, ranks = EXAMPLES[rule.name]
    moe = {"experts", "expert_ffn"} & {*keeps, *breaks}
    base = MIXTURE if moe else LLAMA
    return base.with_sizes(**keeps), base.with_sizes(**breaks), target_of(rule, ranks)


def test_every_rule_has_its_example():
    assert set(EXAMPLES) == {rule.name for rule in catalogue().rules}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_public_source_and_a_reason(rule):
    assert all(source.startswith("https://") for source in rule.source)
    assert rule.what
    assert rule.reason
    assert ("must" in rule.what or "can be at most" in rule.what) == (rule.severity == "illegal")


def test_the_page_lists_every_rule_as_it_is():
    rows = [
        f"| `{rule.name}` | {rule.what} | "
        + " | ".join(
            ", ".join(names) or "all" for names in (rule.formats, rule.runtimes, rule.gpus)
        )
        + f" | {rule.severity} |"
        for rule in catalogue().rules
    ]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line in rows] == rows
    assert len([line for line in page if line.endswith(("| illegal |", "| slow |"))]) == len(rows)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_one_size_and_finds_fault_with_another(rule):
    keeps, breaks, target = tried(rule)
    assert rule.name not in {found.rule for found in violations(keeps, target)}
    found = {found.rule: found for found in violations(breaks, target)}
    assert found[rule.name].severity == rule.severity
    assert found[rule.name].value == getattr(breaks, found[rule.name].size)


@pytest.mark.parametrize("rule", RULES)
def test_the_nearest_sizes_break_nothing_as_bad_and_none_lies_between(rule):
    _, breaks, target = tried(rule)
    for found in violations(breaks, target):
        bad = {"illegal"} if found.severity == "illegal" else {"illegal", "slow"}

        def about(size, found=found, bad=bad):
            changed = breaks.with_sizes(**{found.size: size})
            return [
                other
                for other in violations(changed, target)
                if found.size in other.fields and other.severity in bad
            ]

        for near in (found.below, found.above):
            assert near is None or not about(near)
        between = range((found.below or 0) + 1, min(found.above or 0, found.value + 200))
        assert all(about(size) for size in between[:: max(1, len(between) // 20)])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_legal_widths_of_awq_are_multiples_of_128_on_every_rank(ranks):
    target = AWQ.model_copy(update={"tensor_parallel": ranks})
    expected = [size for size in range(64, 1500, 64) if size % (128 * ranks) == 0]
    assert legal_sizes("ffn", 1500, target, multiple_of=64) == [*expected, 1500]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("target", [Target(), AWQ, AWQ.model_copy(update={"tensor_parallel": 4})])
def test_legal_sizes_are_the_legal_multiples_and_the_present_size(name, target):
    sizes = legal_sizes(name, 259, target, multiple_of=4)
    expected = [size for size in range(4, 259, 4) if legal(name, size, target)]
    assert sizes == [*expected, 259]
    assert all(type(size) is int for size in sizes)


def test_a_model_is_not_refused_for_what_it_is_but_told_of_it():
    smollm2 = replace(LLAMA, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64)
    assert {found.size for found in refused(smollm2, AWQ)} == {"hidden", "heads"}
    narrower = smollm2.with_sizes(ffn=1024)
    check(narrower, AWQ, smollm2)
    assert legal_sizes("hidden", 576, AWQ, multiple_of=64)[-1] == 576
    with pytest.raises(ModelError, match="hidden 576"):
        check(narrower.with_sizes(heads=8, kv_heads=4), AWQ)


def test_losing_key_value_heads_is_checked_against_the_query_heads():
    assert [v.rule for v in refused(LLAMA.with_sizes(kv_heads=3), Target(), LLAMA)] == [
        "query_groups"
    ]


def test_an_illegal_size_is_a_two_line_error_with_rule_and_nearest_sizes():
    with pytest.raises(ModelError) as caught:
        check(LLAMA.with_sizes(ffn=1000, hidden=1000), AWQ)
    first, second = str(caught.value).splitlines()
    assert "ffn 1000 is illegal for int4_awq on trtllm (hopper)" in first
    assert "[int4_blocks_128] (and 1 more)" in first
    assert "896 and 1024" in second


def test_a_made_size_is_told_with_the_size_to_change():
    with pytest.raises(ModelError, match=r"heads 9 \(query_width 576\)"):
        check(LLAMA.with_sizes(heads=9, kv_heads=9, head_dim=64), AWQ)


@pytest.mark.parametrize(
    ("shape", "target", "rule"),
    [
        # Llama 2 7B with AWQ on four ranks, and the head size of OpenLLaMA 3B
        (
            replace(LLAMA, ffn=11008),
            {"format": "int4_awq", "tensor_parallel": 4},
            "int4_blocks_128",
        ),
        (replace(LLAMA, hidden=3200, head_dim=100), {}, "trtllm_head_sizes"),
        (replace(LLAMA, heads=14, kv_heads=2), {"tensor_parallel": 4}, "ranks_share_heads"),
    ],
)
def test_reported_failures_are_foreseen(shape, target, rule):
    found = refused(shape, Target(runtime="trtllm", gpu="hopper", **target))
    assert rule in {violation.rule for violation in found}


@pytest.mark.parametrize("runtime", ["transformers", "trtllm", "vllm", "ort-genai"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_common_model_is_legal_in_every_format(runtime, ranks):
    for name in catalogue().formats:
        target = Target(format=name, runtime=runtime, gpu="blackwell", tensor_parallel=ranks)
        assert not refused(LLAMA.with_sizes(ffn=14336), target)


@pytest.mark.parametrize("name", ["fp8", "int8", "int8_smoothquant", "int4_awq"])
def test_what_a_quantization_format_refuses_the_catalogue_refuses_too(name):
    target = Target(format=name, runtime="trtllm", gpu="hopper")
    plugin = FORMATS.load(name)()
    for changes in ({"hidden": 1000}, {"ffn": 1000}, {"heads": 8, "head_dim": 9}, {"ffn": 1080}):
        shape = LLAMA.with_sizes(**changes)
        assert not plugin.check(shape) or refused(shape, target)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"format": "int3"}, "format: unknown format 'int3'; available: fp32, bf16"),
        ({"runtime": "tgi"}, "available: transformers, trtllm, vllm, ort-genai"),
        ({"gpu": "volta"}, "available: cpu, ampere, ada, hopper, blackwell"),
        ({"tensor_parallel": 0}, "tensor_parallel: Input should be greater than 0"),
        ({"tp": 2}, "tp: Extra inputs are not permitted"),
    ],
)
def test_an_unknown_target_lists_the_choices(settings, problem):
    with pytest.raises(ConfigError) as caught:
        validate(Target, settings, where="target")
    assert problem in str(caught.value)


def test_an_unknown_size_is_the_callers_mistake():
    with pytest.raises(ValueError, match="unknown size 'widths'"):
        legal("widths", 64, Target())


@pytest.mark.parametrize(
    "changes",
    [
        {"multiple": 64, "maximum": 8},
        {},
        {"multiple": 8, "source": []},
        {"maximum": 8, "sizes": []},
    ],
)
def test_a_rule_without_source_or_of_two_kinds_is_refused(changes):
    rule = {"name": "a", "what": "b", "sizes": ["ffn"], "severity": "slow", "reason": "c"}
    with pytest.raises(ConfigError):
        validate(Rule, rule | {"source": ["https://example.org"]} | changes, where="rule")


def test_a_rule_for_an_unknown_format_or_of_a_known_name_is_refused():
    known = catalogue().model_dump()
    rule = known["rules"][0]
    for rules in ([rule, rule], [rule | {"formats": ["int3"]}]):
        with pytest.raises(ConfigError, match=r"twice|int3"):
            validate(Catalogue, known | {"rules": rules}, where="catalogue")


def test_the_catalogue_needs_no_torch():
    code = (
        "import sys\n"
        "from trt_kd.pruning.catalogue import Target, legal_sizes\n"
        "import trt_kd.pruning.candidates\n"
        "legal_sizes('ffn', 512, Target(format='fp8'), multiple_of=64)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
