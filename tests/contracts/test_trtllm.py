"""Every command line and option file that we write is one that TensorRT-LLM takes."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from trt_kd.backends.trtllm_container import IMAGE, docker_command
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.speculative import speculative_options, trtllm_command
from trt_kd.exporters.trtllm_commands import (
    OPTIONS_FILE,
    SERVE_FILE,
    Workload,
    build_command,
    build_options,
    engine_bench_command,
    engine_serve_command,
    serve_options,
    serving_workload,
    write_serving,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMANDS = json.loads((HERE / "trtllm_commands.json").read_text())
OPTIONS = json.loads((HERE / "trtllm_options.json").read_text())
VERSIONS = list(COMMANDS)
PATTERNS = {
    "integer": r"-?\d+",
    "number": r"-?\d+(\.\d+)?",
    "boolean": r"true|false",
    "text": r"[^-].*",
}
TYPES = {"integer": int, "number": (int, float), "boolean": bool, "text": str}


def line_problems(argv: list[str], version: str) -> list[str]:
    """What the parser of ``version`` would say of a command line."""
    command = COMMANDS[version].get(argv[0])
    if command is None:
        return [f"{argv[0]} does not exist in {version}"]
    problems, words = [], argv[1:]
    positional = command["positional"]
    while command is not None:
        options = _by_name(command["options"])
        seen, following = set(), None
        while words:
            word = words.pop(0)
            if word in command.get("subcommands", {}):
                following = command["subcommands"][word]
                break
            if not word.startswith("-"):
                positional -= 1
                continue
            if word not in options:
                problems.append(f"unknown option {word}")
                continue
            name, option = options[word]
            seen.add(name)
            if option["type"] != "flag":
                problems += _value_problems(name, option, words.pop(0) if words else None)
        required = {name for name, option in options.values() if option.get("required")}
        problems += [f"{name} is required" for name in required - seen]
        command = following
    return problems + ([f"{positional} words missing or too many"] if positional else [])


def _by_name(options):
    return {
        alias: (name, option)
        for name, option in options.items()
        for alias in (name, *option.get("aliases", ()))
    }


def _value_problems(name, option, value):
    if value is None or not re.fullmatch(PATTERNS[option["type"]], value):
        return [f"{name} {value} is no {option['type']}"]
    if value not in option.get("choices", [value]):
        return [f"{name} {value} is none of {option['choices']}"]
    return []


def file_problems(found, known) -> list[str]:
    """What the LLM API would say of an option file."""
    problems = []
    for key, value in found.items():
        kind = known.get(key)
        if kind is None:
            problems.append(f"unknown key {key}")
        elif isinstance(kind, dict):
            problems += file_problems(value, kind)
        elif isinstance(kind, list):
            problems += [] if value in kind else [f"{key} {value} is none of {kind}"]
        elif not isinstance(value, TYPES[kind]) or (kind != "boolean" and value is True):
            problems.append(f"{key} {value!r} is no {kind}")
    return problems


def lines_of(page: str) -> list[list[str]]:
    (block,) = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("trtllm-serve . --max_batch 3", "unknown option --max_batch"),
        ("trtllm-serve", "1 words missing"),
        ("trtllm-serve . --backend tensorflow", "is none of"),
        ("trtllm-serve . --max_batch_size many", "is no integer"),
        ("trtllm-bench throughput --dataset d", "--model is required"),
        ("trtllm-bench --model m latency --streaming", "unknown option --streaming"),
    ],
)
def test_the_contract_refuses_what_the_parsers_refuse(line, problem):
    for version in VERSIONS:
        assert problem in "".join(line_problems(line.split(), version))


def test_an_unknown_key_of_an_option_file_is_seen():
    assert file_problems({"kv_cache_config": {"dtyp": "auto"}}, OPTIONS["1.3"])
    assert file_problems({"enable_chunked_prefill": 1}, OPTIONS["1.3"])


@pytest.mark.parametrize("cache", [None, "FP8"])
@pytest.mark.parametrize("algorithm", [None, "FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ"])
@pytest.mark.parametrize(
    "workload", [Workload(1, 128, 32), Workload(64, 1024, 1024), Workload(2048, 1, 1)]
)
@pytest.mark.parametrize("world", [1, 6])
def test_every_build_is_one_that_1_2_takes(algorithm, cache, workload, world):
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
    config = {"quantization": quantization, "mapping": {"world_size": world}}
    options = build_options(config, workload)
    argv = build_command(["trtllm-build"], Path("/a/ckpt"), Path("/a/engine"), options)
    assert line_problems(argv, "1.2.1") == []
    assert line_problems(argv, "1.3") == ["trtllm-build does not exist in 1.3"]
    value = dict(itertools.pairwise(argv))
    assert int(value["--max_num_tokens"]) >= workload.input_tokens
    assert int(value["--max_seq_len"]) == workload.input_tokens + workload.output_tokens
    assert ("--gemm_plugin" in value) == (algorithm in (None, "W4A16_AWQ"))
    # tensorrt_llm/builder.py of 1.2: in FP8 only with both, an FP8 cache in pages only in FP8
    in_fp8 = algorithm == cache == "FP8"
    assert value["--use_fp8_context_fmha"] == ("enable" if in_fp8 else "disable")
    in_pages = cache is None or in_fp8
    assert value["--use_paged_context_fmha"] == ("enable" if in_pages else "disable")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("algorithm", [None, "FP8", "W4A16_AWQ"])
@pytest.mark.parametrize("longest", [32, 2048, 131072])
def test_every_serving_file_is_one_that_both_versions_take(tmp_path, version, algorithm, longest):
    config = {"max_position_embeddings": longest, "model_type": "llama"}
    write_serving(tmp_path, config, algorithm)
    options = yaml.safe_load((tmp_path / OPTIONS_FILE).read_text())
    assert file_problems(options, OPTIONS[version]) == []
    lines = lines_of((tmp_path / SERVE_FILE).read_text())
    assert {line[0] for line in lines} == {"trtllm-serve", "trtllm-bench"}
    for line in lines:
        assert line_problems(line, version) == []
        assert int(line[line.index("--max_seq_len") + 1]) <= longest
        names = {word.removeprefix("--") for word in line if word.startswith("--")}
        assert not names & set(options), "which of the two wins changed between versions"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("longest", [32, 2048, 131072])
def test_a_pair_is_configured_as_its_version_spells_it(version, longest):
    generation = version[:3]
    workload = serving_workload(longest)
    options = speculative_options(generation, workload, 4)
    assert file_problems(options, OPTIONS[version]) == []
    other = next(name for name in ("1.2", "1.3") if name != generation)
    assert file_problems(speculative_options(other, workload, 4), OPTIONS[version]) != []
    line = trtllm_command(generation, workload)
    assert line_problems(line, version) == []
    names = {word.removeprefix("--") for word in line if word.startswith("--")}
    assert not names & set(options)


def test_an_algorithm_without_a_documented_backend_gets_no_command(tmp_path):
    write_serving(
        tmp_path, {"max_position_embeddings": 64, "model_type": "llama"}, "W8A8_SQ_PER_CHANNEL"
    )
    assert "```" not in (tmp_path / SERVE_FILE).read_text()
    assert not (tmp_path / OPTIONS_FILE).exists()


def test_graphs_are_captured_for_the_batch_that_is_served():
    workload = serving_workload(4096)
    assert serve_options(workload)["cuda_graph_config"]["max_batch_size"] == workload.batch


@pytest.mark.parametrize("argv", [engine_serve_command(), engine_bench_command("llama")])
def test_an_engine_is_served_by_1_2_alone(argv):
    assert line_problems(argv, "1.2.1") == []
    assert any("--backend tensorrt" in problem for problem in line_problems(argv, "1.3"))
    assert "--max_seq_len" not in argv


def test_the_pinned_container_is_one_that_builds_engines():
    images = yaml.safe_load((ROOT / "containers/images.yaml").read_text())["images"]
    (image,) = [image for image in images if image["image"] == IMAGE]
    assert image["trtllm_build"] is True


def test_the_docker_line_runs_the_build_on_the_same_paths():
    folder = Path("/data/a b")
    words = shlex.split(
        docker_command(folder, ["trtllm-build", "--output_dir", "/data/a b/engine"])
    )
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[words.index("-v") + 1] == "/data/a b:/data/a b"
    at = words.index(IMAGE)
    assert line_problems(words[at + 1 :], "1.2.1") == []


def test_quantization_names_are_members_of_both_versions():
    from trt_kd.exporters.trtllm_format import WEIGHTS
    from trt_kd.exporters.trtllm_layout import ALGORITHMS

    assert set(ALGORITHMS.values()) <= set(WEIGHTS)
    assert "trtllm-engine" in EXPORTERS.names()
