"""The house in order: sizes, layers, lazy imports, forbidden constructs, registries.

Rules of size are ruff's own, run here with every ``noqa`` ignored; the rest reads syntax trees.
"""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import trt_kd
from trt_kd.config import Plugin
from trt_kd.registry import Registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trt_kd"
FILES = sorted(PACKAGE.rglob("*.py"))

CORE = (
    "errors",
    "registry",
    "optional",
    "config",
    "seeding",
    "heap",
    "checkpoints",
    "architectures",
)
FAMILIES = (
    "pruning",
    "losses",
    "teachers",
    "data",
    "training",
    "quantization",
    "exporters",
    "latency",
    "backends",
    "evaluation",
    "reporting",
    "doctor",
)
LAYERS = (CORE, ("measuring", "artifacts"), FAMILIES, ("stages",), ("pipeline",), ("cli",))

SHARED_FAMILIES = {"data", "backends"}
"""Families that every other family may import."""

ALLOWED_BETWEEN_FAMILIES = {
    ("doctor", "exporters"): "lists every registered lane; reads the table only",
    ("exporters", "quantization"): "an export of a quantized model starts by restoring it",
    ("pruning", "latency"): "a budget may limit predicted time",
    ("reporting", "training"): "draws the layer pairs that training judged",
    ("reporting", "pruning"): "predicts memory with the budget's closed forms",
    ("teachers", "losses"): "a cached teacher gives the rows that top-k losses read",
    ("training", "losses"): "the objective is a sum of losses",
    ("training", "teachers"): "one trainer reads a cached teacher's rows",
}
"""Further imports from one family to another, each with its reason."""

HEAVY = {
    "accelerate",
    "datasets",
    "gguf",
    "lm_eval",
    "matplotlib",
    "modelopt",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "safetensors",
    "scipy",
    "tensorrt_rtx",
    "torch",
    "transformers",
}
"""Packages that a plan must not import."""

ALLOWED_PRETRAINED = {"trt_kd/checkpoints.py": "the one place that loads and saves models"}
"""Files that may call ``from_pretrained`` and ``save_pretrained``, each with its reason."""

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
UNSAFE_KEYWORDS = {"trust_remote_code", "shell", "allow_pickle"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute chain, or the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of all that ``path`` imports anywhere, with the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# --- sizes --------------------------------------------------------------------------------------


def test_no_file_is_longer_than_400_lines():
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    report([f"{name}: {length} lines" for name, length in lengths.items() if length > 400])


def test_no_function_is_too_long_or_takes_too_much_whatever_its_comments_say():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--no-cache"]
    rules = ["--select", "PLR0913,PLR0915,C901,BLE,S101,D1", "--ignore", "D105,D107"]
    limits = ["max-args=6", "max-statements=40"]
    options = [part for limit in limits for part in ("--config", f"lint.pylint.{limit}")]
    done = subprocess.run(
        [*command, *rules, *options, "--output-format", "concise", "trt_kd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_class_lies_deeper_than_three_below_our_own_bases():
    parents: dict[str, list[str]] = {}
    for path in FILES:
        module = module_of(path)
        known = {
            node.name: f"{module}.{node.name}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.ClassDef)
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trt_kd"):
                known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases = [b.value if isinstance(b, ast.Subscript) else b for b in node.bases]
                named = [known[dotted(base)] for base in bases if dotted(base) in known]
                parents[f"{module}.{node.name}"] = named

    def depth(name: str) -> int:
        """Levels below the two bases that only say "a strict pydantic model" and "a plugin"."""
        if name.rpartition(".")[2] in {"StrictModel", "Plugin"}:
            return 0
        return max((1 + depth(parent) for parent in parents.get(name, [])), default=0)

    report([f"{name}: depth {depth(name)}" for name in parents if depth(name) > 3])


def test_no_file_is_called_utils():
    report([name_of(path) for path in FILES if path.stem in {"utils", "util", "helpers", "misc"}])


# --- layers -------------------------------------------------------------------------------------


def part_of(name: str) -> str | None:
    """The part of the package that a dotted name belongs to; None outside and for its root."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "trt_kd" and len(pieces) > 1 else None


def rank_of(part: str) -> int | None:
    return next((rank for rank, layer in enumerate(LAYERS) if part in layer), None)


def between_parts() -> Iterator[tuple[str, str, str]]:
    """(place, importing part, imported part) of every import that crosses parts."""
    for path in FILES:
        here = part_of(module_of(path))
        for name, line in imports(path):
            there = part_of(name)
            if here and there and there not in (here, "__version__"):
                yield f"{name_of(path)}:{line}", here, there


def test_every_part_of_the_package_has_its_layer():
    parts = {part for path in FILES if (part := part_of(module_of(path)))}
    report([f"trt_kd/{part} stands in no layer" for part in sorted(parts) if rank_of(part) is None])


def test_imports_point_one_way():
    report(
        [
            f"{place}: {here} imports {there}, which lies above it"
            for place, here, there in between_parts()
            if (rank_of(there) or 0) > (rank_of(here) or 0)
        ]
    )


def test_families_import_only_the_shared_ones():
    report(
        [
            f"{place}: {here} imports {there}"
            for place, here, there in between_parts()
            if here in FAMILIES
            and there in FAMILIES
            and there not in SHARED_FAMILIES
            and (here, there) not in ALLOWED_BETWEEN_FAMILIES
        ]
    )


def test_no_two_parts_import_each_other():
    edges = defaultdict(set)
    for _, here, there in between_parts():
        edges[here].add(there)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        following = edges[start] - seen
        return goal in following or any(reaches(n, goal, seen | following) for n in following)

    report(
        [f"{part} imports itself by way of others" for part in list(edges) if reaches(part, part)]
    )


def test_every_package_has_an_init_file():
    folders = {path.parent for path in FILES}
    report(
        [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    )


# --- lazy imports -------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import trt_kd
from trt_kd.registry import Registry
heavy, problems = set(sys.argv[1:]), []

def look(what, act):
    before = heavy & set(sys.modules)
    result = act()
    problems.extend(f"{what} imports {name}" for name in sorted(heavy & set(sys.modules) - before))
    return result

parts = sorted(pkgutil.iter_modules(trt_kd.__path__), key=lambda part: part.name != "stages")
for part in parts:
    module = look(f"trt_kd.{part.name}", lambda: importlib.import_module(f"trt_kd.{part.name}"))
    if part.name == "stages":
        for stage in pkgutil.iter_modules(module.__path__):
            name = f"trt_kd.stages.{stage.name}"
            look(name, lambda: importlib.import_module(name))
    for registry in [value for value in vars(module).values() if isinstance(value, Registry)]:
        for name in registry.names():
            look(f"{registry.what} {name}", lambda: registry.load(name))
print(json.dumps(problems))
"""


def test_a_plan_imports_no_heavy_package():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *sorted(HEAVY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_no_heavy_package():
    if not (PACKAGE / "cli/__init__.py").is_file():
        pytest.skip("there is no command line yet")
    code = (
        "import sys; sys.argv = ['trt-kd', '--help']; from trt_kd.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*sorted(set(sys.modules) & set(sys.stdin.read().split())), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input=" ".join([*HEAVY, "numpy"]),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.split() == []


# --- forbidden constructs -----------------------------------------------------------------------


def test_nothing_catches_every_exception():
    problems = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {dotted(kind) if kind else "everything" for kind in types}
            ends = node.body[-1]
            passes_on = isinstance(ends, ast.Raise) and ends.exc is None
            if caught & {"Exception", "everything"} or (
                "BaseException" in caught and not passes_on
            ):
                problems.append(f"{name_of(path)}:{node.lineno}: catches {', '.join(caught)}")
    report(problems)


def test_nothing_unpickles_evaluates_or_starts_a_shell():
    problems = []
    for path in FILES:
        found = [f"imports {n}" for n, _ in imports(path) if n.split(".")[0] in UNSAFE_MODULES]
        for call in calls(path):
            if dotted(call.func) in UNSAFE_CALLS:
                found.append(f"{call.lineno}: calls {dotted(call.func)}")
            if dotted(call.func) == "yaml.load" and len(call.args) + len(call.keywords) < 2:
                found.append(f"{call.lineno}: calls yaml.load without a loader")
            for keyword in call.keywords:
                constant = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in UNSAFE_KEYWORDS and not constant:
                    found.append(f"{call.lineno}: passes {keyword.arg}")
        problems += [f"{name_of(path)}: {problem}" for problem in found]
    report(problems)


def test_only_checkpoints_loads_and_saves_models():
    report(
        [
            f"{name_of(path)}:{call.lineno}: calls {call.func.attr}"
            for path in FILES
            if name_of(path) not in ALLOWED_PRETRAINED
            for call in calls(path)
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in {"from_pretrained", "save_pretrained"}
        ]
    )


def test_only_the_command_line_prints():
    report(
        [
            f"{name_of(path)}:{call.lineno}"
            for path in FILES
            if part_of(module_of(path)) != "cli"
            for call in calls(path)
            if dotted(call.func) in {"print", "sys.stdout.write", "sys.exit"}
        ]
    )


def test_nothing_is_left_to_do():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplemented")
    report(
        [
            f"{name_of(path)}:{number}: {line.strip()}"
            for path in FILES
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
            if unfinished.search(line)
        ]
    )


def test_no_file_names_a_folder_of_somebodys_machine():
    private = re.compile(r"(?<![\w.>})$/-])/(?:root|home|tmp|work|Users)/[\w.]")
    problems = []
    for path in own_files():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if private.search(line):
                problems.append(f"{name_of(path)}:{number}: {line.strip()[:120]}")
    report(problems)


def own_files() -> list[Path]:
    """Files under version control or about to be, tests left out; all text files without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in done.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        paths = list(PACKAGE.rglob("*"))
    return [
        path
        for path in paths
        if path.is_file()
        and path.relative_to(ROOT).parts[0] != "tests"
        and path.suffix not in {".png", ".gz", ".npz", ".safetensors", ".gguf", ".pyc"}
    ]


# --- registries ---------------------------------------------------------------------------------


def registries() -> list[tuple[str, Registry]]:
    found = []
    for part in pkgutil.iter_modules(trt_kd.__path__):
        if not part.ispkg or part.name == "pipeline":
            continue
        module = importlib.import_module(f"trt_kd.{part.name}")
        found += [
            (f"{part.name}.{name}", value)
            for name, value in vars(module).items()
            if isinstance(value, Registry)
        ]
    return found


MEMBERS = [
    pytest.param(registry, member, id=f"{name}:{member}")
    for name, registry in registries()
    for member in registry.names()
]


@pytest.mark.parametrize(("registry", "member"), MEMBERS)
def test_a_registered_name_is_the_default_kind_of_its_class(registry, member):
    loaded = registry.load(member)
    if isinstance(loaded, type) and issubclass(loaded, Plugin):
        assert loaded.model_fields["kind"].default == member


@pytest.mark.parametrize(("registry", "member"), MEMBERS)
def test_every_member_has_a_summary_of_one_line(registry, member):
    summary = registry.summary(member)
    assert summary
    assert len(summary) <= 100
    assert summary.endswith(".")


@pytest.mark.parametrize(("registry", "member"), MEMBERS)
def test_every_option_of_a_member_is_documented(registry, member):
    loaded = registry.load(member)
    if isinstance(loaded, type) and issubclass(loaded, Plugin):
        fields = {name: field for name, field in loaded.model_fields.items() if name != "kind"}
        report([f"{loaded.__name__}.{n}" for n, field in fields.items() if not field.description])
