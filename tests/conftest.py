"""Tiny real models and text, made here: no test downloads anything."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig

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


class MadeConfig(StageConfig):
    """Stands for whatever stage made an artifact that a test starts from."""

    stage = "import"
    note: str = ""


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
