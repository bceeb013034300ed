"""The environment: facts that let numbers be judged, nothing that names a host."""

import getpass
import json
import platform
from importlib.metadata import version

from trt_kd import __version__
from trt_kd.artifacts.environment import environment, installed, memory_bytes


def test_tells_processor_memory_and_versions():
    facts = environment()
    assert facts["trt-kd"] == __version__
    assert facts["torch"] == version("torch")
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1 << 28
    assert facts["processor"]


def test_names_no_host_and_no_user():
    words = json.dumps(environment()).lower().split('"')
    assert platform.node().lower() not in words
    assert getpass.getuser().lower() not in words


def test_absent_packages_are_none_and_not_listed():
    assert installed("no-such-package-at-all") is None
    assert None not in [value for name, value in environment().items() if name == "tensorrt-llm"]


def test_an_unknown_memory_size_is_none(monkeypatch):
    def refuse(name):
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", refuse)
    assert memory_bytes() is None
