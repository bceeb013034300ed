"""Knowledge-distillation losses on logits. To add one: write a module here, add one line below."""

from trt_kd.losses.base import KDLoss
from trt_kd.registry import Registry

LOSSES: Registry[type[KDLoss]] = Registry(
    "KD loss",
    {
        "forward_kl": "trt_kd.losses.kl:ForwardKL",
        "reverse_kl": "trt_kd.losses.kl:ReverseKL",
        "jsd": "trt_kd.losses.jsd:JensenShannon",
        "symmetric_kl": "trt_kd.losses.kl:SymmetricKL",
        "skewed_forward_kl": "trt_kd.losses.skewed:SkewedForwardKL",
        "skewed_reverse_kl": "trt_kd.losses.skewed:SkewedReverseKL",
        "total_variation": "trt_kd.losses.total_variation:TotalVariation",
        "alpha_beta": "trt_kd.losses.alpha_beta:AlphaBeta",
        "adaptive_kl": "trt_kd.losses.adaptive:AdaptiveKL",
        "dkd": "trt_kd.losses.dkd:DecoupledKD",
        "mft": "trt_kd.losses.mft:Minifinetuning",
    },
)
