"""Watch what passes modules while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

STATE = "hidden_states"
"""Name of the first input, where it is given by name."""

Observe = Callable[[Tensor], None]
ObserveCall = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], None]


class Hook:
    """Has functions called with what passes modules, until ``hooks`` ends.

    Tensors are the ones that the model works with, not detached.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __call__(
        self, module: nn.Module, side: Literal["input", "output"], observe: Observe
    ) -> None:
        """Observe the first input or output of a module."""

        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            observe(output[0] if isinstance(output, tuple) else output)

        if side == "input":
            self.call(module, lambda state, rest, named: observe(state))
        else:
            self._handles.append(module.register_forward_hook(on_output))

    def call(self, module: nn.Module, observe: ObserveCall) -> None:
        """Observe the first input of a module, and the other arguments by place and by name."""

        def on_input(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if inputs:
                observe(inputs[0], inputs[1:], named)
            else:
                others = {name: value for name, value in named.items() if name != STATE}
                observe(named[STATE], (), others)

        self._handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))

    def remove(self) -> None:
        """Observe no more."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def hooks() -> Iterator[Hook]:
    """Give a hook whose observers all go in the end."""
    hook = Hook()
    try:
        yield hook
    finally:
        hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off meanwhile."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
