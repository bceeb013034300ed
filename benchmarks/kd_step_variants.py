"""The trainers that ``kd_step.py`` compares, each run under the same clock.

Shape suffixes: B sequences, L positions, T predicted tokens, V vocabulary.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, trainer

from trt_kd.architectures.shape import read_shape
from trt_kd.checkpoints import check_weights, load_model, load_tokenizer, save_model
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.measuring.machine import peak_memory_bytes
from trt_kd.stages.distill import DistillConfig, require_modelopt
from trt_kd.stages.matching import check_pair
from trt_kd.stages.teaching import train_student
from trt_kd.teachers.base import Demand
from trt_kd.teachers.cached import CachedTeacher
from trt_kd.teachers.online import OnlineTeacher

LEARNING_RATE = 1e-5
IGNORED = -100
"""Label of what is not predicted, in every library here."""
SHARED_ARGUMENTS = [
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "use_cpu",
    "seed",
    "report_to",
    "dataloader_pin_memory",
    "remove_unused_columns",
    "logging_steps",
    "logging_nan_inf_filter",
    "disable_tqdm",
    "save_strategy",
    "save_steps",
]
"""What TRL's arguments take over from ours; its own defaults differ."""


class Meter(TrainerCallback):
    """Seconds of every step, from before its forward pass to after its optimizer, and memory.

    A trainer of transformers calls it; a loop by hand calls ``start``, ``begin`` and ``end``.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.cuda = torch.cuda.is_available()
        self.loaded_bytes = self.peak_bytes = 0
        self.load_counted = False

    def start(self) -> None:
        """Take what is in memory as the loaded models, and start the peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.loaded_bytes = torch.cuda.memory_allocated()
        else:
            self.load_counted = not forget_peak()
            self.loaded_bytes = psutil.Process().memory_info().rss

    def begin(self) -> None:
        """Begin a step."""
        self._wait()
        self._began = self.clock()

    def end(self) -> None:
        """End a step, once the device has done it."""
        self._wait()
        self.seconds.append(self.clock() - self._began)
        peak = torch.cuda.max_memory_allocated() if self.cuda else peak_memory_bytes()
        self.peak_bytes = max(peak, self.loaded_bytes)

    def memory(self) -> dict[str, int | bool]:
        """Bytes of the loaded models and at the peak of the steps so far."""
        return {
            "loaded_bytes": self.loaded_bytes,
            "peak_bytes": self.peak_bytes,
            "load_counted": self.load_counted,
        }

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Models are loaded, no step is made."""
        self.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batch is there."""
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer is done; the checkpoint of the last step is not wanted."""
        self.end()
        control.should_save = False


def forget_peak() -> bool:
    """Start the peak anew, where the system can: loading may take more than a step and hide it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@contextmanager
def listening(meter: Meter) -> Iterator[None]:
    """Add the meter to every trainer made meanwhile, whoever makes it."""
    trainer.DEFAULT_CALLBACKS.append(meter)
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(meter)


def prepare(given: argparse.Namespace, count: int) -> dict[str, Any]:
    """Write the random pair if none is given, ``count`` blocks and their cache; say what it is."""
    student, teacher = pair(given)
    if given.student is None:
        tokenizer = write_tokenizer(given.work / "tokenizer", given.vocab)
        for seed, (path, ffn) in enumerate(((student, given.student_ffn), (teacher, given.ffn))):
            save_model(random_model(given, ffn, seed), path, tokenizer_from=tokenizer)
        generator = np.random.default_rng(0)
        blocks = generator.integers(0, given.vocab, (count, given.block_tokens), dtype=np.int64)
    else:
        check_weights(student)
        check_weights(teacher)
        check_pair(student=student, teacher=teacher)
        source = {"kind": "text", "files": [str(given.text)]} if given.text else "stdlib_docstrings"
        settings = {"source": source, "block_tokens": given.block_tokens}
        data = DataConfig.model_validate(settings)
        blocks = token_blocks(data, load_tokenizer(teacher), split="train", count=count)
    np.save(given.work / "blocks.npy", blocks)
    facts: dict[str, Any] = {
        "parameters": {
            "student": read_shape(student).parameters,
            "teacher": read_shape(teacher).parameters,
        },
        "vocabulary": read_shape(teacher).vocab,
        "threads": torch.get_num_threads(),
        "text": "random ids" if given.student is None else "text",
        "data_fingerprint": fingerprint(blocks),
    }
    if "cached" in given.variants:
        demand = Demand(blocks, given.precision, given.work)
        cache = cached_teacher(given).targets(teacher, demand)
        facts["cache_bytes_per_token"] = cache.size_bytes / blocks.size
    return facts


def pair(given: argparse.Namespace) -> tuple[Path, Path]:
    """Checkpoints of student and teacher."""
    return given.student or given.work / "student", given.teacher or given.work / "teacher"


def random_model(given: argparse.Namespace, ffn: int, seed: int) -> LlamaForCausalLM:
    """A Llama of the sizes asked for, in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=ffn,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        max_position_embeddings=max(2048, given.block_tokens),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def write_tokenizer(out: Path, vocab: int) -> Path:
    """A tokenizer of so many words; only its files and its special token are ever asked for."""
    from tokenizers import Tokenizer, models

    end = "<|endoftext|>"
    words = {end: 0} | {f"w{number}": number for number in range(1, vocab)}
    out.mkdir()
    Tokenizer(models.WordLevel(words, unk_token=end)).save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


def cached_teacher(given: argparse.Namespace) -> CachedTeacher:
    """Settings of the cache that ``prepare`` writes."""
    return CachedTeacher(k=given.k, cache=given.work / "logits")


class PlacedTeacher(OnlineTeacher):
    """The same teacher, on the device before the memory of the models is taken."""

    def targets(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        return placed(super().targets(*args, **kwargs))


def placed(model: Any) -> Any:
    """The model on its device, every weight read once: files are mapped and loaded lazily."""
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    for weight in model.parameters():
        weight.detach().sum()
    return model


def measured(given: argparse.Namespace, untimed: int) -> dict[str, Any]:
    """Seconds of the timed steps of variant ``given.child``, and its memory."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    blocks = np.load(given.work / "blocks.npy")
    meter = Meter()
    with listening(meter):
        RUNS[given.child](given, blocks, meter)
    if len(meter.seconds) != untimed + given.repeats:
        raise ValueError(f"{given.child} made {len(meter.seconds)} steps")
    return {"samples_s": meter.seconds[untimed:], **meter.memory()}


def settings_of(given: argparse.Namespace, steps: int) -> DistillConfig:
    """One schedule for all, without a checkpoint on the way."""
    return DistillConfig(
        steps=steps,
        batch_size=given.batch,
        learning_rate=LEARNING_RATE,
        precision=given.precision,
        checkpoint_every_steps=steps + 1,
    )


def loaded_pair(given: argparse.Namespace) -> tuple[Any, Any]:
    """Student in float32 and a frozen teacher for the trainers that are not ours."""
    student, teacher = pair(given)
    dtype = "float32" if given.precision == "fp32" else given.teacher_dtype
    frozen = load_model(teacher, dtype=dtype).requires_grad_(False)
    return placed(load_model(student, dtype="float32")), placed(frozen)


def ours(given: argparse.Namespace, blocks: Any, meter: Meter) -> None:
    """The stage's own training, online or cached."""
    require_modelopt()
    source = cached_teacher(given) if given.child == "cached" else PlacedTeacher()
    config = settings_of(given, len(blocks) // given.batch).model_copy(update={"teacher": source})
    student, teacher = pair(given)
    model = placed(load_model(student, dtype="float32"))
    train_student(config, model, blocks, teacher, given.work / f"training-{given.child}")


def modelopt(given: argparse.Namespace, blocks: Any, meter: Meter) -> None:
    """ModelOpt's trainer with its logits loss, under our arguments."""
    require_modelopt()
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    from trt_kd.training.blocks import Blocks
    from trt_kd.training.loop import training_arguments

    config = settings_of(given, len(blocks) // given.batch)
    student, teacher = loaded_pair(given)
    KDTrainer(
        model=student,
        args=training_arguments(config, given.work / "training-modelopt"),
        train_dataset=Blocks(blocks),
        distill_args={"teacher_model": teacher},
    ).train()


def trl(given: argparse.Namespace, blocks: Any, meter: Meter) -> None:
    """TRL's trainer for given text: no step generates (lmbda 0), forward KL (beta 0)."""
    require_modelopt()
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from trt_kd.training.loop import training_arguments

    config = settings_of(given, len(blocks) // given.batch)
    shared = training_arguments(config, given.work / "training-trl")
    arguments = GKDConfig(
        **{name: getattr(shared, name) for name in SHARED_ARGUMENTS},
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        max_length=given.block_tokens,
        gradient_checkpointing=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    labels = blocks.copy()
    labels[:, 0] = IGNORED
    columns = {"input_ids": blocks, "attention_mask": np.ones_like(blocks), "labels": labels}
    student, teacher = loaded_pair(given)
    GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=transformers.default_data_collator,
        train_dataset=Dataset.from_dict({name: one.tolist() for name, one in columns.items()}),
        processing_class=load_tokenizer(pair(given)[0]),
    ).train()


def plain(given: argparse.Namespace, blocks: Any, meter: Meter) -> None:
    """What one writes first: both models under autocast, whole logits in float32, AdamW."""
    student, teacher = loaded_pair(given)
    student.train()
    device = student.device
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    bf16 = given.precision == "bf16"
    meter.start()
    for batch in torch.from_numpy(blocks).split(given.batch):
        tokens_BL = batch.to(device)
        meter.begin()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher_BLV = teacher(tokens_BL, use_cache=False).logits
            student_BLV = student(tokens_BL, use_cache=False).logits
        loss = functional.kl_div(
            student_BLV[:, :-1].float().flatten(0, 1).log_softmax(-1),
            teacher_BLV[:, :-1].float().flatten(0, 1).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del teacher_BLV, student_BLV, loss
        meter.end()


RUNS = {"online": ours, "cached": ours, "modelopt": modelopt, "trl": trl, "plain": plain}
