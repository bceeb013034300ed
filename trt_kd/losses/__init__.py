"""Knowledge-distillation losses on logits. To add one: write a module here, add one line below."""

from trt_kd.losses.base import KDLoss
from trt_kd.registry import Registry

LOSSES: Registry[type[KDLoss]] = Registry(
    "KD loss",
    {
        "forward_kl": "trt_kd.losses.kl:ForwardKL",
        "reverse_kl": "trt_kd.losses.kl:ReverseKL",
        "jsd": "trt_kd.losses.jsd:JensenShannon",
    },
)
