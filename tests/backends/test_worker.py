"""A model in a process of its own: answers, errors, memory, and its end."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from trt_kd.backends import BACKENDS
from trt_kd.backends.worker import OutOfMemoryError, Worker
from trt_kd.errors import ModelError, TrtKdError

PROMPTS = np.random.default_rng(0).integers(1, 512, (2, 8)).tolist()

FAKE = '''
"""A backend without a model: what it does is told by the first prompt's first id."""
import os
from typing import Literal

from trt_kd.backends.base import Backend, Session


class Fake(Backend):
    """Nothing loaded."""

    kind: Literal["fake_backend:Fake"] = "fake_backend:Fake"

    def load(self, directory):
        if not directory.exists():
            raise RuntimeError("nothing there\\nsecond line")
        return FakeSession()


class FakeSession(Session):
    vocab_size = 8

    def logits(self, tokens_BL):
        raise ValueError

    def steps(self, prompts, new_tokens):
        told = prompts[0][0]
        if told == 1:
            raise MemoryError("64 GiB")
        if told == 2:
            os._exit(3)
        if told == 3:
            os.kill(os.getpid(), 9)
        if told == 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        for _ in range(new_tokens - (told == 5)):
            yield

    def close(self):
        pass
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_backend.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    return BACKENDS.load("fake_backend:Fake")()


@pytest.fixture
def worker(fake, tmp_path):
    with Worker("student", fake, tmp_path) as worker:
        yield worker


def test_every_step_has_a_time(worker):
    run = worker.run([[0, 1], [2, 3]], 5)
    assert len(run.step_s) == 5
    assert all(seconds >= 0 for seconds in run.step_s)


@pytest.mark.parametrize("told", [1, 4])
def test_out_of_memory_is_told_apart_and_the_process_goes_on(worker, told):
    with pytest.raises(OutOfMemoryError, match="variant student"):
        worker.run([[told]], 2)
    assert len(worker.run([[0]], 2).step_s) == 2


@pytest.mark.parametrize(("told", "how"), [(2, "ended with code 3"), (3, "signal 9")])
def test_a_process_that_dies_is_an_error_of_two_lines(worker, told, how):
    with pytest.raises(ModelError, match=how) as caught:
        worker.run([[told]], 2)
    assert len(str(caught.value).splitlines()) == 2
    assert str(caught.value).startswith("variant student: ")


def test_a_decoder_that_stops_early_is_an_error(worker):
    with pytest.raises(TrtKdError, match="1 steps instead of 2"):
        worker.run([[5]], 2)


def test_a_model_that_cannot_be_loaded_is_an_error_of_one_line_and_names_the_variant(fake):
    with pytest.raises(ModelError, match="variant student: RuntimeError: nothing there second"):
        Worker("student", fake, Path("/nowhere"))


def test_a_missing_checkpoint_says_what_the_backend_says(tmp_path):
    with pytest.raises(ModelError, match=r"variant student: .*genai_config.json cannot be read"):
        Worker("student", BACKENDS.load("ort-genai")(), tmp_path)


def test_leaving_the_worker_ends_its_process(fake, tmp_path):
    with Worker("student", fake, tmp_path) as worker:
        process = worker._process
    assert process.returncode == 0


def test_the_process_ends_with_its_parent(fake, tmp_path):
    with Worker("student", fake, tmp_path) as worker:
        child = worker._process
        worker._pipe.close()  # what the system does when the parent is killed
        assert child.wait(timeout=10) == 0


def test_an_interrupt_from_the_keyboard_is_left_to_the_parent(worker):
    worker.run([[0]], 1)
    os.kill(worker._process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert len(worker.run([[0]], 2).step_s) == 2


def test_memory_is_the_childs_own(fake, tmp_path):
    ballast = np.ones(100 << 20, dtype=np.int32)  # 400 MiB
    with Worker("student", fake, tmp_path) as worker:
        assert worker.run([[0]], 1).peak_memory_bytes < ballast.nbytes // 2


def test_an_export_decodes_in_its_own_process_without_torch(ort_export):
    with Worker("export", BACKENDS.load("ort-genai")(threads=1), ort_export) as worker:
        run = worker.run(PROMPTS, 6)
    assert len(run.step_s) == 6
    assert worker.load_s > 0
    assert 1 << 20 < run.peak_memory_bytes < 400 << 20
