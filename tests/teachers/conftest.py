"""ModelOpt, imported once with the warning that it causes while it is imported."""

from trt_kd.stages.distill import require_modelopt

require_modelopt()
