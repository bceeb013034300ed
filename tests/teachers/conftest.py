"""Options that a teacher cannot do without; ModelOpt, imported once with its warning."""

import pytest

from trt_kd.stages.distill import require_modelopt

require_modelopt()


@pytest.fixture
def teacher_options(teacher):
    """Options of the teacher of a kind, beside what has a default."""

    def options(kind):
        return {"several": {"others": [str(teacher.path)]}}.get(kind, {})

    return options
