"""What pruning has to know about a family of decoders; importing it needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Per-layer lists that a config may hold: one entry for every layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")

EXPERT_AXES = ("experts", "expert_ffn")
"""Kinds of axes that only a mixture of experts has."""

AXES = ("hidden", "ffn", "heads", "kv_heads", *EXPERT_AXES, "depth", "vocab")
"""Kinds of axes that a family has or lacks."""


@dataclass(frozen=True)
class Slice:
    """Where the units of an axis lie along one dimension of one parameter.

    Unit u takes the ``width`` entries from ``start + u * width`` on.
    """

    module: "nn.Module"
    name: str
    """Name of the parameter in ``module``."""
    dim: int
    units: int
    width: int = 1
    start: int = 0
    rms: bool = False
    """Whether it is the weight of a norm that divides by a mean over the units."""


def rows(
    linear: "nn.Module", units: int, *, width: int | None = None, start: int = 0
) -> "tuple[Slice, ...]":
    """Slices of the outputs of ``linear``: its weight and, where it has one, its bias.

    Unless ``width`` and ``start`` say that they are a part, the units fill the outputs.
    """
    width = width or cast("nn.Linear", linear).out_features // units
    weight = Slice(linear, "weight", 0, units, width, start)
    return (weight,) if linear.bias is None else (weight, replace(weight, name="bias"))


def columns(linear: "nn.Module", units: int) -> Slice:
    """Slice of the inputs of ``linear``, the units in runs of equal width."""
    return Slice(linear, "weight", 1, units, cast("nn.Linear", linear).in_features // units)


@dataclass(frozen=True)
class Mlp:
    """A dense MLP: channels that ``makers`` make and ``down`` reads."""

    makers: tuple[Slice, ...]
    down: "nn.Linear"


@dataclass(frozen=True)
class Attention:
    """An attention block: query heads, and the groups that share keys and values."""

    query: tuple[Slice, ...]
    """Along query heads: projection, biases, norms over all heads."""
    key_value: tuple[Slice, ...]
    """The same along key-value heads."""
    o: "nn.Linear"
    """Reads the heads one after the other."""
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Readers:
    """What reads the residual stream at one point: parameters whose last dimension is hidden."""

    block: "nn.Module"
    """Its input is what all of them read."""
    norm: "nn.Module | None"
    """The norm whose output that is; None where it is the stream itself."""
    weights: "Mapping[str, tuple[Slice, ...]]"
    """By name: parameters that are refit together."""


class Experts(ABC):
    """The mixture of experts of one layer, however the library's version stores it."""

    module: "nn.Module"
    """The block; its input is routed."""
    residual: tuple[Slice, ...]
    """Its parameters along the hidden size."""
    count: int
    """Experts."""
    width: int
    """Channels of one expert."""
    router: "nn.Module"
    """Chooses experts; its weight is ``[E, H]``."""

    @abstractmethod
    def route(self, inputs_TH: "Tensor") -> "tuple[Tensor, Tensor]":
        """Weights and numbers ``[T, K]`` of the K experts that each token is sent to."""

    @abstractmethod
    def channels(self, expert: int, inputs_SH: "Tensor") -> "Tensor":
        """What one expert feeds into its down projection, ``[S, C]``."""

    @abstractmethod
    def outputs(self, expert: int, channels_SC: "Tensor") -> "Tensor":
        """What one expert makes of its channels, ``[S, H]``, not yet weighted."""

    @abstractmethod
    def down(self, expert: int) -> "Tensor":
        """The down projection of one expert, ``[H, C]``, in the model's own storage."""

    @abstractmethod
    def keep(self, experts_K: "Tensor") -> None:
        """Drop all experts but these, with their rows of the router."""

    @abstractmethod
    def narrow(self, channels_EK: "Tensor") -> None:
        """Keep of every expert only the channels in its row, ascending."""

    def visits(self, inputs_TH: "Tensor") -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
        """For every expert in turn the S tokens routed to it.

        Yields their numbers ``[S]``, their weights ``[S]`` and its channels ``[S, C]``.
        """
        weights_TK, experts_TK = self.route(inputs_TH)
        for expert in range(self.count):
            tokens_S, rank_S = (experts_TK == expert).nonzero(as_tuple=True)
            channels_SC = self.channels(expert, inputs_TH[tokens_S])
            yield tokens_S, weights_TK[tokens_S, rank_S], channels_SC


class Architecture(ABC):
    """Where the decoders of one family keep their parts, and how their sizes are recorded.

    The defaults fit what most families share; see ``llama.py`` for the smallest one.
    """

    lacks: ClassVar[Mapping[str, str]] = {}
    """Axes that the stock code of this family cannot be cut along, with the reason."""
    body_name: ClassVar[str] = "model"
    """Where the model without its head is found."""
    norm_offset: ClassVar[float] = 0.0
    """What a norm adds to its weight before it multiplies."""
    whole_heads: ClassVar[bool] = False
    """Whether its config refuses a hidden size that is no multiple of the query heads."""
    expert_projections: ClassVar[tuple[str, str, str] | None] = None
    """Names of gate, up and down of one expert in a checkpoint; None without experts."""

    def axes(self, shape: ModelShape) -> dict[str, str]:
        """Every kind of axis, with the reason why this model lacks it or an empty string."""
        moe, dense = shape.expert_layers > 0, shape.ffn > 0
        absent = {} if moe else dict.fromkeys(EXPERT_AXES, "its layers have no experts")
        if not dense:
            absent["ffn"] = "every layer has experts instead of one MLP"
        return {kind: self.lacks.get(kind) or absent.get(kind, "") for kind in AXES}

    def check_axis(self, kind: str, shape: ModelShape) -> None:
        """Check that a model of ``shape`` can be cut along an axis; needs no torch.

        Raises:
            ModelError: naming the reason and the axes that it has.
        """
        axes = self.axes(shape)
        if reason := axes.get(kind):
            others = ", ".join(name for name, lacking in axes.items() if not lacking)
            raise ModelError(
                f"axis {kind!r}: a {shape.model_type} model cannot be cut along it: {reason}",
                hint=f"it has {others}",
            )

    def check_shape(self, shape: ModelShape) -> None:
        """Check that the family's stock config accepts these sizes together; needs no torch.

        Raises:
            ModelError: with the nearest hidden sizes that it accepts.
        """
        if shape.derived_head_dim and shape.hidden != shape.heads * shape.head_dim:
            raise ModelError(
                f"hidden size {shape.hidden} is not {shape.heads} heads of {shape.head_dim}, "
                f"and the stock code of this {shape.model_type} model derives one from the other",
                hint="cut hidden and heads in the same proportion, or neither",
            )
        if self.whole_heads and shape.hidden % shape.heads:
            below = shape.hidden // shape.heads * shape.heads
            raise ModelError(
                f"hidden size {shape.hidden} is no multiple of {shape.heads} query heads, which "
                f"the config of a {shape.model_type} model refuses in transformers 5",
                hint=f"the nearest ones are {below} and {below + shape.heads}; or change the heads",
            )

    def takes(self, shape: ModelShape) -> bool:
        """Whether the family's stock config accepts these sizes together; needs no torch."""
        try:
            self.check_shape(shape)
        except ModelError:
            return False
        return True

    def portable(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config.json`` with the family's own settings in the spelling of both versions."""
        return config

    def stored(self, name: str) -> str:
        """Name in a checkpoint's files of a module or parameter, which no version changes."""
        return name

    def body(self, model: "PreTrainedModel") -> "nn.Module":
        """The model without its head."""
        return model.get_submodule(self.body_name)

    def layers(self, model: "PreTrainedModel") -> "nn.ModuleList":
        """Decoder layers, first to last."""
        return cast("nn.ModuleList", self.body(model).get_submodule("layers"))

    def embedding(self, model: "PreTrainedModel") -> "nn.Embedding":
        """Token embedding, ``[vocabulary, hidden]``."""
        return cast("nn.Embedding", model.get_input_embeddings())

    def final_norm(self, model: "PreTrainedModel") -> "nn.Module":
        """Norm between the last layer and the head."""
        return self.body(model).get_submodule("norm")

    def head(self, model: "PreTrainedModel") -> "nn.Linear":
        """Projection to the vocabulary; its weight may be the embedding's."""
        get: Callable[[], object] = model.get_output_embeddings
        return cast("nn.Linear", get())

    @abstractmethod
    def norms(self, layer: "nn.Module") -> "tuple[nn.Module, ...]":
        """Norms over the hidden size, in the order of the forward pass."""

    @abstractmethod
    def mlp(self, layer: "nn.Module") -> Mlp | None:
        """Dense MLP of one layer; None where it has experts."""

    @abstractmethod
    def attention(self, layer: "nn.Module") -> Attention:
        """Attention block of one layer."""

    @abstractmethod
    def residual(self, layer: "nn.Module") -> "tuple[Slice, ...]":
        """Every parameter of one layer along the hidden size, norms included."""

    @abstractmethod
    def readers(self, layer: "nn.Module") -> "tuple[Readers, Readers]":
        """What reads the residual stream: that of the attention and that of the MLP."""

    def experts(self, layer: "nn.Module") -> Experts | None:
        """Experts of one layer; None where it has a dense MLP."""
        return None

    def adds_to_residual(self) -> bool:
        """Whether o and down add to the residual stream without a norm between."""
        return True

    @abstractmethod
    def after_hidden(self, model: "PreTrainedModel", before: int, after: int) -> None:
        """Make up for what the family's code derives from the hidden size itself."""

    @abstractmethod
    def record(self, model: "PreTrainedModel", **sizes: int) -> None:
        """Write new sizes, named as in ``ModelShape``, into the config and the modules."""

    def keep_layers(self, model: "PreTrainedModel", kept: Sequence[int]) -> None:
        """Keep only the layers ``kept``, renumbered, with the config's per-layer lists cut."""
        from torch import nn

        layers = self.layers(model)
        chosen = nn.ModuleList([layers[index] for index in kept])
        for index, layer in enumerate(chosen):
            for module in layer.modules():
                update(module, "layer_idx", index)
        self.body(model).layers = chosen
        _keep_in_config(model.config, kept)


def norm_slices(norm: "nn.Module") -> "tuple[Slice, ...]":
    """Slices of a norm over its channels: weight and, where it has one, bias."""
    weight = norm.get_parameter("weight")
    found = (Slice(norm, "weight", 0, weight.numel(), rms=True),)
    if getattr(norm, "bias", None) is None:
        return found
    return (*found, Slice(norm, "bias", 0, weight.numel()))


def take(module: "nn.Module", name: str, dim: int, keep_K: "Tensor") -> None:
    """Keep the entries ``keep_K`` of a parameter along ``dim``, sizes of the module included.

    The padding index of an embedding moves with its row, or is unset if the row goes.
    """
    from torch import nn

    weight = module.get_parameter(name)
    kept = weight.detach().index_select(dim, keep_K.to(weight.device)).contiguous()
    if isinstance(module, nn.Embedding) and dim == 0 and module.padding_idx is not None:
        places = (keep_K == module.padding_idx).nonzero().flatten().tolist()
        module.padding_idx = places[0] if places else None
    put(module, name, nn.Parameter(kept, requires_grad=weight.requires_grad))


def put(module: "nn.Module", name: str, parameter: "nn.Parameter") -> None:
    """Give a module another parameter, sizes of the module included."""
    from torch import nn

    setattr(module, name, parameter)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = module.weight.shape[1], module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def update(module: "nn.Module", attribute: str, value: object) -> None:
    """Set an attribute where the module has it."""
    if hasattr(module, attribute):
        setattr(module, attribute, value)


def _keep_in_config(config: Any, kept: Sequence[int]) -> None:
    for name in _PER_LAYER:
        entries = getattr(config, name, None)
        if isinstance(entries, list):
            setattr(config, name, [entries[index] for index in kept])
    # The layers before this number attend to everything, the ones after it to a window.
    full = getattr(config, "max_window_layers", None)
    if full is not None:
        config.max_window_layers = sum(index < full for index in kept)
    config.num_hidden_layers = len(kept)
