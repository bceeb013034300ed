"""Tiny real models and text, made here: no test downloads anything."""

import ast
import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
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


def pytest_collection_finish():
    """Leave out of collections what was imported: each would walk through two million objects."""
    gc.collect()
    gc.freeze()
    gc.enable()


def run_forked(command, *, cwd=None, env=None, check=False, timeout=300.0, **_):
    """Do what ``subprocess.run`` does with a Python script or ``-c``, in a fork of this process.

    Libraries are loaded already, which takes a new process ten seconds. Both outputs are kept.
    """
    executable, *arguments = map(str, command)
    assert executable == sys.executable
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which the fork does not use
            child = os.fork()
        if child == 0:
            os.chdir(cwd or ".")
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            _run_script(arguments, stdout, stderr)
        end, done = time.monotonic() + timeout, 0
        while not done and time.monotonic() < end:
            time.sleep(0.01)
            done, state = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired(command, timeout)
        told = [file.seek(0) or file.read() for file in (stdout, stderr)]
    finished = subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(state), *told)
    if check:
        finished.check_returncode()
    return finished


def _run_script(arguments, stdout, stderr):
    """The whole life of a fork, which must not go on in the code of its parent."""
    code = 1
    try:
        for number, file in ((1, stdout), (2, stderr)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = stdout, stderr
        warnings.simplefilter("ignore")
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        if code == 1:
            traceback.print_exc(file=stderr)
        stdout.flush()
        stderr.flush()
        os._exit(code)


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
    return SimpleNamespace(**vars(subprocess) | {"run": run_forked})


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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    special = "<|endoftext|>"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special,
        "bos_token": special,
        "pad_token": special,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory, text_file):
    """A byte-level tokenizer of 300 tokens, which has learnt from the text read backwards."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = text_file.read_text(encoding="utf-8")
    tokenizer.train_from_iterator([line[::-1] for line in text.splitlines()], trainer)
    directory = tmp_path_factory.mktemp("other")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


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
