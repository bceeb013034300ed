"""Every family that can be extended by one file and one line."""

from typing import Any

from trt_kd.architectures import ARCHITECTURES
from trt_kd.backends import BACKENDS, LOAD_GENERATORS
from trt_kd.data import DATA
from trt_kd.evaluation import TASKS
from trt_kd.exporters import EXPORTERS
from trt_kd.losses import FEATURE_LOSSES, LOSSES, PROJECTORS
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.quantization import FORMATS
from trt_kd.registry import Registry
from trt_kd.teachers import TEACHERS

FAMILIES: list[Registry[Any]] = [
    ARCHITECTURES,
    DATA,
    AXES,
    IMPORTANCE,
    LOSSES,
    FEATURE_LOSSES,
    PROJECTORS,
    TEACHERS,
    FORMATS,
    EXPORTERS,
    BACKENDS,
    LOAD_GENERATORS,
    TASKS,
]
