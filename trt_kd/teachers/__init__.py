"""Teachers: the distributions to imitate. To add one: a module here, one line below."""

from trt_kd.registry import Registry
from trt_kd.teachers.base import Teacher

TEACHERS: Registry[type[Teacher]] = Registry(
    "teacher",
    {
        "online": "trt_kd.teachers.online:OnlineTeacher",
        "cached": "trt_kd.teachers.cached:CachedTeacher",
        "served": "trt_kd.teachers.served:ServedTeacher",
        "several": "trt_kd.teachers.several:SeveralTeachers",
        "cross_tokenizer": "trt_kd.teachers.cross_tokenizer:CrossTokenizerTeacher",
    },
)
