"""TensorRT-LLM's own container: where its tools run when they are not installed here."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
"""The last stable release with ``trtllm-build``; also in ``containers/images.yaml``."""


def docker_command(folder: Path, command: Sequence[str], *, also: Sequence[Path] = ()) -> str:
    """Line that runs ``command`` in the pinned container.

    ``folder``, where it is run, and the folders in ``also`` have the same paths inside.
    """
    run = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host"]
    run += ["--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    run += ["--user", f"{os.getuid()}:{os.getgid()}"]
    for each in dict.fromkeys([folder, *also]):
        run += ["-v", f"{each}:{each}"]
    return shlex.join([*run, "-w", str(folder), IMAGE, *command])
