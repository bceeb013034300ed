"""Knowledge-distillation losses on logits and on features, and projectors between features.

To add one: write a module here, add one line to its table below.
"""

from trt_kd.losses.base import KDLoss
from trt_kd.losses.features.base import FeatureLoss, Projector
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
        "uld": "trt_kd.losses.uld:UniversalLogit",
    },
)

FEATURE_LOSSES: Registry[type[FeatureLoss]] = Registry(
    "feature loss",
    {
        "mse": "trt_kd.losses.features.tokens:MeanSquaredError",
        "cosine": "trt_kd.losses.features.tokens:Cosine",
        "logsum": "trt_kd.losses.features.tokens:LogSum",
        "hint": "trt_kd.losses.features.tokens:Hint",
        "crd": "trt_kd.losses.features.contrastive:ContrastiveRepresentation",
        "pkd": "trt_kd.losses.features.sequences:PatientKD",
        "attention_transfer": "trt_kd.losses.features.sequences:AttentionTransfer",
        "nst": "trt_kd.losses.features.sequences:NeuronSelectivityTransfer",
        "pkt": "trt_kd.losses.features.relations:ProbabilisticTransfer",
        "gram": "trt_kd.losses.features.relations:Gram",
        "rkd_distance": "trt_kd.losses.features.relations:RelationalDistance",
        "rkd_angle": "trt_kd.losses.features.relations:RelationalAngle",
        "minilm": "trt_kd.losses.features.relations:MiniLM",
        "minilm_v1": "trt_kd.losses.features.relations:MiniLMv1",
    },
)

PROJECTORS: Registry[type[Projector]] = Registry(
    "projector",
    {
        "none": "trt_kd.losses.features.projectors:NoProjector",
        "linear": "trt_kd.losses.features.projectors:LinearProjector",
        "mlp": "trt_kd.losses.features.projectors:MlpProjector",
        "orthogonal": "trt_kd.losses.features.projectors:OrthogonalProjector",
    },
)
