"""Tiny real models and text, made here: no test downloads anything."""

import ast
import gc
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork may lack the threads of its parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig

gc.disable()  # while libraries are imported; a collection walks through all that there is

SENTENCES = [
    "The capital of France is Paris, and the river Seine runs through it.",
    "A function returns a value; a generator yields many of them, one at a time.",
    "Open the file, read every line, strip the newline and count the words.",
    "Raise a ValueError when the argument is negative, and say which limit was broken.",
    "Hydrogen is the lightest element; helium comes next, then lithium and beryllium.",
    "The parser turns text into a tree, and the compiler turns the tree into bytes.",
    "Return a new list that contains the items of the iterable in reversed order.",
    "Threads share memory, processes do not; queues carry messages between both.",
]


FIRST = ("pipeline", "benchmarks", "exporters", "stages", "training", "backends", "pruning")
"""Folders whose files take longest; two processes then end at nearly the same time."""


def pytest_collection_modifyitems(items):
    """Long files first; the order is otherwise as it was."""
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(place)))


MANY_MODULES = 50
_seen_modules = 0


def pytest_collection_finish():
    """What was imported is there to stay."""
    _freeze_imports()
    gc.enable()


def pytest_runtest_logfinish():
    """So is what tests have imported since."""
    if len(sys.modules) > _seen_modules + MANY_MODULES:
        _freeze_imports()


def _freeze_imports():
    """Leave out of collections what was imported: each would walk through two million objects."""
    global _seen_modules
    gc.collect()
    gc.freeze()
    _seen_modules = len(sys.modules)


class Forked(subprocess.Popen):
    """A Python script, ``-c`` or ``-m`` in a fork of this process instead of a process of its own.

    Libraries are loaded already, which takes a new process ten seconds.
    """

    def _execute_child(self, args, *given):
        program, *arguments = map(str, args)
        assert program == sys.executable
        pass_fds, cwd, env = given[3:6]
        pipes = given[9:15]  # two ends of each stream, -1 where the child keeps ours
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which the fork does not use
            self.pid = os.fork()
        if self.pid == 0:
            _run_script(arguments, (pipes[0], pipes[3], pipes[5]), pass_fds, cwd, env)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run_forked(command, *, cwd=None, env=None, check=False, timeout=300.0, **_):
    """Do what ``subprocess.run`` does, in a fork. Both outputs are kept."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with Forked(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr) as process:
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
        told = [file.seek(0) or file.read() for file in (stdout, stderr)]
    finished = subprocess.CompletedProcess(command, code, *told)
    if check:
        finished.check_returncode()
    return finished


def _run_script(arguments, streams, pass_fds, cwd, env):
    """The whole life of a fork, which must not go on in the code of its parent."""
    code = 1
    try:
        _keep_only(streams, pass_fds)
        os.chdir(cwd or ".")
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        warnings.simplefilter("ignore")
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        if code == 1:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _keep_only(streams, pass_fds):
    """Let go of the files of the parent as a new program would, and print where it would.

    Their numbers stay taken: objects of the parent that close them must not close others.
    """
    for number, file in enumerate(streams):
        if file >= 0:
            os.dup2(file, number)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in {int(name) for name in os.listdir("/dev/fd")} - {0, 1, 2, *pass_fds, nothing}:
        with suppress(OSError):  # the directory that was listed is closed by now
            os.fstat(number)
            os.dup2(nothing, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


ROOT = Path(__file__).parents[1]
VERSIONED = ("transformers", "modelopt")


def imported_by(file: Path, *, everywhere: bool = False) -> set[str]:
    """Modules that a file imports, at its top or everywhere."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names | {name.partition(".")[0] for name in names}


@pytest.fixture(scope="session")
def imports():
    return imported_by


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def load_script(root):
    """Import a script of ``benchmarks/`` by its name."""

    def load_script(name):
        spec = spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.fixture(scope="session")
def families(load_script):
    """The script that builds tiny models of every family and tries its axes."""
    return load_script("families_table")


@pytest.fixture(scope="session")
def on_transformers():
    """transformers, ModelOpt, and all modules of ours that cannot be imported without them."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in (ROOT / "trt_kd").rglob("*.py")
    }
    needs = {name: imported_by(file) for name, file in files.items()}
    found = set(VERSIONED)
    while more := {name for name in needs if needs[name] & found} - found:
        found |= more
    return found


@pytest.fixture(scope="session")
def one_version():
    """What is tested under one version of transformers only."""
    lines = (ROOT / "tests" / "without_transformers.txt").read_text(encoding="utf-8").split()
    return [ROOT / line for line in lines]


@pytest.fixture(autouse=True)
def out_of_reach(request, one_version, on_transformers):
    """Nothing of transformers where another version is said to change nothing."""
    if not {request.path, request.path.parent} & {*one_version}:
        yield
        return
    assert not {"make_model", "teacher"} & {*request.fixturenames}, "made with transformers"
    with pytest.MonkeyPatch.context() as patch:
        for name in on_transformers:
            patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture(scope="session")
def forks():
    """Stands for the module ``subprocess`` where a script of Python would load everything anew."""
    return SimpleNamespace(**vars(subprocess) | {"run": run_forked, "Popen": Forked})


@pytest.fixture(scope="session")
def forking(forks):
    """A context for benchmarks, which do once what each would begin with.

    Measured models and the builder of ONNX Runtime GenAI lie in forks (that they have processes of
    their own is tested in tests/backends and tests/exporters), and the machine's peaks are known.
    """
    from trt_kd.measuring.roofline import measure_peaks

    peaks = cache(measure_peaks)

    @contextmanager
    def in_forks():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trt_kd.backends.worker.subprocess", forks)
            patch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)
            patch.setattr("trt_kd.stages.benchmark.measure_peaks", peaks)
            yield

    return in_forks


@pytest.fixture
def forked(forking):
    """The test runs in that context."""
    with forking():
        yield


@pytest.fixture(autouse=True)
def quiet_logger():
    """Take off what a command that ran in this process hung on our logger: its stream is closed."""
    _bare_logger()
    yield
    _bare_logger()


def _bare_logger():
    ours = logging.getLogger("trt_kd")
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)


class MadeConfig(StageConfig):
    """Stands for whatever stage made an artifact that a test starts from."""

    stage = "import"
    note: str = ""


class NoisedConfig(StageConfig):
    """Stands for the stage that made a student."""

    stage = "prune"


class TracesConfig(StageConfig):
    """Stands for the stage that lets a teacher write."""

    stage = "generate"
    traces: dict[str, str] | None = {"open": "<think>", "close": "</think>"}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text file with 400 different documents, separated by blank lines."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [
        f"Note {n}. {SENTENCES[n % 8]} {SENTENCES[(n * 3 + 1) % 8]} "
        f"{SENTENCES[(n * 5 + 2) % 8]} End of note {n}."
        for n in range(400)
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def learn_tokenizer(directory: Path, lines: list[str], *, size: int, end: str, **settings) -> Path:
    """Write a byte-level BPE tokenizer of ``size`` tokens, learnt from ``lines``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def write_traces():
    """Write 40 traces as a text artifact, settings of its stage as keywords; give its source."""

    def write(folder, **config):
        lines = []
        for n in range(40):
            opened = "<think>" * (n % 2)  # by the template, or by the teacher
            parts = {
                "prompt": f"Note {n}? {opened}",
                "thought": f"It is {n % 7} of seven. " * (n % 3) + "So.",
                "answer": f" Note {n % 7}.",
            }
            begin = "" if opened else "<think>"
            text = f"{parts['prompt']}{begin}{parts['thought']}</think>{parts['answer']}"
            lines.append(json.dumps({**parts, "text": text, "finished": True}) + "\n")
        settings = TracesConfig(**config)
        with writing(folder, kind="text", config=settings, inputs={}) as draft:
            (draft.path / "generated.jsonl").write_text("".join(lines), encoding="utf-8")
        return {"kind": "generated", "artifact": str(folder)}

    return write


@pytest.fixture(scope="session")
def traces(write_traces, tmp_path_factory):
    """A data source of traces."""
    return write_traces(tmp_path_factory.mktemp("traces") / "made")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, text_file) -> Path:
    """A directory with a byte-level BPE tokenizer of 512 tokens."""
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    end = "<|endoftext|>"
    special = {"bos_token": end, "pad_token": end, "model_max_length": 512}
    directory = tmp_path_factory.mktemp("tokenizer")
    return learn_tokenizer(directory, lines, size=512, end=end, **special)


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory, text_file) -> Path:
    """A byte-level tokenizer of 300 tokens, which has learnt from the text read backwards."""
    lines = [line[::-1] for line in text_file.read_text(encoding="utf-8").splitlines()]
    return learn_tokenizer(tmp_path_factory.mktemp("other"), lines, size=300, end="<end>")


@pytest.fixture(scope="session")
def make_model():
    """Build a tiny random Llama; keyword arguments replace the configuration's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **changes):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.15,
        }
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()

    return make


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, make_model, tokenizer_dir) -> Artifact:
    """A tiny finished checkpoint artifact; never write into it."""
    out = tmp_path_factory.mktemp("artifacts") / "teacher"
    with writing(out, kind="checkpoint", config=MadeConfig(), inputs={}) as draft:
        model = make_model()
        save_model(model, draft.path, tokenizer_from=tokenizer_dir)
        draft.metrics["parameters"] = model.num_parameters()
    return Artifact.open(out, expect="checkpoint")


@pytest.fixture(scope="session")
def make_student(tmp_path_factory, make_model, tokenizer_dir):
    """Build a checkpoint artifact: the teacher with noise on its weights, or another model."""
    import torch

    def make(
        noise: float = 0.02,
        dtype: torch.dtype = torch.float32,
        tokenizer: Path = tokenizer_dir,
        metrics: Iterable = (),
        **changes,
    ) -> Artifact:
        model = make_model(**changes)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
        out = tmp_path_factory.mktemp("student") / "student"
        with writing(out, kind="checkpoint", config=NoisedConfig(), inputs={}) as draft:
            save_model(model.to(dtype), draft.path, tokenizer_from=tokenizer)
            draft.metrics.update(metrics)
        return Artifact.open(out)

    return make
