"""ModelOpt prune mode ``hf_minitron``: Minitron pruning of stock Hugging Face decoders.

Importing this module registers the mode beside NVIDIA's ``mcore_minitron``, and both take the same
constraints: ``export_config`` with ``ffn_hidden_size``, ``hidden_size``, ``num_attention_heads``,
``num_layers``, ``num_moe_experts`` and ``moe_ffn_hidden_size``, or limits: ``params`` and
``active_params`` (counts, or ``"80%"``) and ``memory_mb``. Two differences: ``num_query_groups``
can shrink too, with its query heads; memory is counted in the format of deployment (``memory`` in
the mode's settings) and not at two bytes for every parameter::

    mtp.prune(model, mode=[("hf_minitron", {"axes": [...]})], dummy_input=None,
              constraints={"export_config": {"ffn_hidden_size": 1024}},
              config={"forward_loop": forward_loop})

Under limits several axes may stay open, by default all that the family has: then the best sizes
are searched, with ``top_k``, ``score_func``, ``max_width_pruning``, ``max_depth_pruning`` and
``hparams_to_skip`` in ``config`` as there. Without a ``score_func`` candidates are measured by
their divergence from the unpruned model, on text of the loop that the refit did not see.
``checkpoint`` is a folder that ``trt-kd score`` wrote.

The second value it returns holds the sizes and measurements under ``best``.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from modelopt.torch.nas.conversion import NASModeRegistry
from modelopt.torch.opt import modelopt_state
from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.opt.mode import ModeDescriptor
from modelopt.torch.opt.searcher import BaseSearcher
from modelopt.torch.prune.pruning import PruneModeRegistry
from torch import nn
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.config import Plugin, build_plugin, validate
from trt_kd.errors import ConfigError
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.base import Axis
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.engine import Request, shrink
from trt_kd.pruning.in_memory import search_sizes
from trt_kd.pruning.reconstruction import Reconstruct
from trt_kd.pruning.scores import Scores
from trt_kd.pruning.search import Search, open_axes
from trt_kd.pruning.sizes import planned_shape, settled
from trt_kd.registry import Registry

NAME = "hf_minitron"
P = TypeVar("P", bound=Plugin)


class HFMinitronConfig(ModeloptBaseConfig):  # type: ignore[misc]
    """Settings of the mode, plain data so that ModelOpt can store them."""

    axes: list[str | dict[str, Any]] = ModeloptField(
        default=[],
        title="Axes",
        description="Axes with their options, sizes left out; those that the constraints name "
        "and this list does not are cut with their defaults.",
    )
    importance: dict[str, Any] = ModeloptField(
        default={"kind": "activation"},
        title="Importance",
        description="How channels are ranked.",
    )
    reconstruct: dict[str, Any] | None = ModeloptField(
        default={},
        title="Reconstruction",
        description="Options of the least-squares refit after an MLP cut; None leaves it out.",
    )
    memory: dict[str, Any] = ModeloptField(
        default={},
        title="Memory",
        description="What memory_mb counts: batch, tokens, weight_format and kv_format.",
    )
    seed: int = ModeloptField(
        default=0, title="Seed", description="Seeds an importance that draws numbers."
    )


class HFMinitronSearcher(BaseSearcher):  # type: ignore[misc]
    """Runs the forward loop under hooks, then cuts the model in place."""

    @property
    def default_search_config(self) -> dict[str, Any]:
        """ModelOpt's own, and those of ``mcore_minitron`` that mean the same here."""
        theirs = {"hparams_to_skip": None, "top_k": 10}
        limits = {"max_width_pruning": 0.4, "max_depth_pruning": 0.2}
        return {**super().default_search_config, **theirs, **limits}

    @property
    def default_state_dict(self) -> dict[str, Any]:
        """The result: sizes and measurements."""
        return {"best": {}}

    def load_search_checkpoint(self, strict: bool = True) -> bool:
        """Leave ``checkpoint`` to the search itself: it is a folder of scores, not a pickle."""
        return False

    def run_search(self) -> None:
        """Score, or read the scores in the folder ``checkpoint``, and cut.

        Raises:
            TrtKdError: if the constraints, the sizes or the activations are impossible.
        """
        settings = modelopt_state(self.model)["modelopt_state_dict"][-1][1]["config"]
        shape = model_shape(self.model)
        skipped = self.config["hparams_to_skip"] or []
        axes, budget = _axes(settings, self.constraints, shape, skipped)
        reconstruct = settings["reconstruct"]
        request = Request(
            axes=axes,
            importance=_plugin(IMPORTANCE, settings["importance"]),
            reconstruct=None if reconstruct is None else Reconstruct(**reconstruct),
            seed=settings["seed"],
        )
        forward_loop = self.config["forward_loop"]
        if forward_loop is None:
            raise ConfigError(
                f"{NAME} needs calibration text", hint="give prune() config={'forward_loop': ...}"
            )
        folder = self.config["checkpoint"]
        scores = None if folder is None else Scores.load(Path(folder))
        started = time.perf_counter()
        found: dict[str, Any] = {}
        if budget is not None:
            request.axes, found = search_sizes(
                self.model, forward_loop, request, budget, self._search(), self.config["score_func"]
            )
        self.best = shrink(self.model, forward_loop, request, shape, scores)
        self.best |= {"search": found} if found else {}
        self.best["seconds"] = time.perf_counter() - started

    def _search(self) -> Search:
        names = ("top_k", "max_width_pruning", "max_depth_pruning")
        return validate(Search, {name: self.config[name] for name in names}, where=NAME)


@NASModeRegistry.register_mode
@PruneModeRegistry.register_mode
class HFMinitronModeDescriptor(ModeDescriptor):  # type: ignore[misc]
    """Tells ModelOpt how the mode is called and what carries it out."""

    @property
    def name(self) -> str:
        """Name of the mode."""
        return NAME

    @property
    def config_class(self) -> type[HFMinitronConfig]:
        """Settings of the mode."""
        return HFMinitronConfig

    @property
    def next_modes(self) -> set[str] | None:
        """Modes that may follow at once."""
        return {"export_nas", "kd_loss", "quantize", "sparse_magnitude", "sparse_gpt"}

    @property
    def export_mode(self) -> str | None:
        """The mode that ends the search."""
        return "export_nas"

    @property
    def search_algorithm(self) -> type[HFMinitronSearcher]:
        """What prunes."""
        return HFMinitronSearcher

    @property
    def convert(self) -> Any:
        """Leaves the model as it is: there is no search space of dynamic modules."""
        return _convert

    @property
    def restore(self) -> Any:
        """Leaves the model as it is: the pruned checkpoint is a stock one."""
        return _restore


def _convert(model: nn.Module, config: HFMinitronConfig) -> tuple[nn.Module, dict[str, Any]]:
    return model, {"subnet_config": {}}


def _restore(model: nn.Module, config: HFMinitronConfig, metadata: dict[str, Any]) -> nn.Module:
    return model


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Shape of a loaded model.

    Raises:
        ModelError: if its architecture is not supported.
    """
    architecture_of(model.config.model_type)
    return shape_from_config(model.config.to_dict())


def detach_state(model: nn.Module) -> None:
    """Remove ModelOpt's record from ``model``, so that it is saved as the stock model it is."""
    ModeloptStateManager.remove_state(model)
    version_key = ModeloptStateManager._state_version_key
    if hasattr(model, version_key):
        delattr(model, version_key)


def _axes(
    settings: Mapping[str, Any],
    constraints: Mapping[str, Any],
    shape: ModelShape,
    skipped: Sequence[str],
) -> tuple[list[Axis], Budget | None]:
    """The axes with the sizes that the constraints ask for, or open with the budget of a search."""
    known = {"export_config", "params", "active_params", "memory_mb"}
    if (
        not constraints
        or not constraints.keys() <= known
        or ("export_config" in constraints and len(constraints) > 1)
    ):
        raise ConfigError(
            f"{NAME}: unsupported constraints {sorted(constraints)}",
            hint="give either export_config, or any of params, active_params and memory_mb",
        )
    axes = [_plugin(AXES, value) for value in settings["axes"]]
    if "export_config" not in constraints:
        budget = validate(Budget, {**settings["memory"], **constraints}, where=NAME)
        axes = [axis for axis in axes or _all_axes(shape) if axis.constraint not in skipped]
        if len(open_axes(axes)) > 1:
            return axes, budget
        return settled(axes, planned_shape(axes, budget, shape)), None
    wanted = dict(constraints["export_config"])
    present = {axis.constraint for axis in axes}
    missing = wanted.keys() - present
    if AXES.load("vocab").constraint in wanted:
        raise ConfigError(
            f"{NAME} cannot cut the vocabulary: the tokenizer has to be rewritten with it",
            hint="use the command: trt-kd prune 'axes=[{kind: vocab, size: 32768}]'",
        )
    axes += [_plugin(AXES, name) for name in AXES.names() if AXES.load(name).constraint in missing]
    if unknown := wanted.keys() ^ {axis.constraint for axis in axes}:
        raise ConfigError(
            f"{NAME}: export_config and axes disagree on {', '.join(sorted(unknown))}",
            hint=f"export_config takes {', '.join(constraints_known())}, one for every axis",
        )
    asked = shape.with_sizes(**{axis.shape_field: wanted[axis.constraint] for axis in axes})
    axes = [axis.resized(axis.read(asked)) for axis in axes]
    return settled(axes, planned_shape(axes, None, shape)), None


def _all_axes(shape: ModelShape) -> list[Axis]:
    """Every axis that the family has and whose cut leaves the tokens as they are."""
    lacking = architecture_of(shape.model_type).axes(shape)
    axes: list[Axis] = [_plugin(AXES, name) for name in AXES.names() if not lacking[name]]
    return [axis for axis in axes if axis.unit != "tokens"]


def constraints_known() -> list[str]:
    """Keys of ``export_config``, in the order of the axes."""
    return [AXES.load(name).constraint for name in AXES.names()]


def _plugin(registry: Registry[type[P]], value: object) -> P:
    return cast("P", build_plugin(cast("Registry[type[Plugin]]", registry), value))
