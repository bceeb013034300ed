"""Watch what passes modules while a model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

Observe = Callable[[Tensor], None]
Hook = Callable[[nn.Module, Literal["input", "output"], Observe], None]


@contextmanager
def hooks() -> Iterator[Hook]:
    """Give a function that has ``observe`` called with the first input or output of a module.

    The tensor is the one that the model works with, not detached. All hooks go in the end.
    """
    handles = []

    def hook(module: nn.Module, side: Literal["input", "output"], observe: Observe) -> None:
        def on_input(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            observe(inputs[0] if inputs else named["hidden_states"])

        def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            observe(output[0] if isinstance(output, tuple) else output)

        if side == "input":
            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(on_output))

    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off meanwhile."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
