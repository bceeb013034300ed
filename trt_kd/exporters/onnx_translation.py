"""Translate a captured decoder into ONNX, operator by operator.

PyTorch's own translation first breaks the capture into finer operators and takes several times
as long. A decoder uses few operators; one that is not known here is an error that names it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from trt_kd.errors import ModelError
from trt_kd.exporters.onnx_qdq import LowBit
from trt_kd.exporters.onnx_writer import Graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_END = 2**63 - 1
_UNARY = {"cos": "Cos", "sin": "Sin", "neg": "Neg", "tanh": "Tanh", "sigmoid": "Sigmoid"}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"}
_COMPARE = {"le": "LessOrEqual", "lt": "Less", "ge": "GreaterOrEqual", "gt": "Greater"}
_LOGIC = {"__and__": "And", "logical_and": "And", "bitwise_and": "And"}


def translate(
    program: "ExportedProgram",
    graph: Graph,
    inputs: Sequence[str],
    low_bit: "Mapping[str, LowBit] | None" = None,
) -> list[str]:
    """Add all of ``program`` to ``graph`` and return the names of its outputs, in order.

    ``inputs`` are the public names of the user's inputs, ``low_bit`` the projections that are
    quantized, by the names of their weights.

    Raises:
        ModelError: if an operator is not known here.
    """
    translation = Translation(program, graph, inputs, low_bit or {})
    for node in program.graph.nodes:
        translation.add(node)
    return translation.outputs


class Translation:
    """Values of a capture as values of an ONNX graph.

    A symbolic size is an int64 tensor of one element; a size that is known is a Python number.
    """

    def __init__(
        self,
        program: "ExportedProgram",
        graph: Graph,
        inputs: Sequence[str],
        low_bit: "Mapping[str, LowBit]",
    ) -> None:
        signature = program.graph_signature
        stored: dict[str, Any] = {**program.state_dict, **program.constants}
        self._graph = graph
        self._tensors = {
            spec.arg.name: (spec.target, stored[spec.target])
            for spec in signature.input_specs
            if spec.target in stored
        }
        self._inputs: dict[str, str] = dict(
            zip(map(str, signature.user_inputs), inputs, strict=True)
        )
        self._values: dict[fx.Node, Any] = {}
        self._looked_up = _looked_up(program)
        self._low_bit = low_bit
        self._rounding: dict[fx.Node, LowBit] = {}
        self._rounded: dict[tuple[Any, ...], str] = {}
        self.outputs: list[str] = []

    def add(self, node: fx.Node) -> None:
        """Translate one node of the capture."""
        if node.op == "placeholder":
            if node.users:
                self._values[node] = self._placeholder(node)
        elif node.op == "output":
            self.outputs = [self._values[value] for value in _args(node)[0]]
        elif node.op == "get_attr":
            owner: Any = node.graph.owning_module
            self._values[node] = owner.get_submodule(str(node.target))
        else:
            known = _OPERATORS.get(_operator(node))
            if known is None:
                raise ModelError(
                    f"the model uses the operator {node.target}, which has no translation to ONNX",
                    hint="export to hf-unified or ort-genai",
                )
            self._values[node] = known(self, node)

    def _placeholder(self, node: fx.Node) -> str:
        if name := self._inputs.get(node.name):
            return name
        path, tensor = self._tensors[node.name]
        path = path.removeprefix("model.")  # the step's own attribute: names as in the checkpoint
        if found := self._low_bit.get(path):
            self._rounding[node] = found
            return found.add_weight(self._graph)
        if all(_operator(user) == "linear" and _args(user)[1] is node for user in node.users):
            return self._graph.weight(f"{path}.transposed", tensor.T)
        return self._graph.weight(path, tensor)

    # --- arguments ------------------------------------------------------------------------------

    def value(self, argument: Any) -> Any:
        """The ONNX name of a captured value; numbers as they are."""
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def tensor(self, argument: Any, dtype: torch.dtype) -> str:
        """Name of ``argument`` as a tensor of ``dtype``."""
        if not isinstance(argument, fx.Node):
            return self._graph.constant(argument, _numpy(dtype))
        name = self._values[argument]
        found = argument.meta["val"]
        kind = found.dtype if isinstance(found, torch.Tensor) else torch.int64
        return str(name) if kind == dtype else self.cast(name, dtype)

    def sizes(self, arguments: Sequence[Any]) -> str:
        """Name of a shape whose entries are numbers or symbolic sizes."""
        found = [self.value(argument) for argument in arguments]
        if all(isinstance(size, int) for size in found):
            return self._graph.constant(found)
        parts = [s if isinstance(s, str) else self._graph.constant([s]) for s in found]
        return self.op("Concat", *parts, axis=0)

    def op(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node."""
        return self._graph.node(operator, *inputs, **attributes)

    def cast(self, name: str, dtype: torch.dtype) -> str:
        """Cast a value."""
        import onnx

        return self.op("Cast", name, to=onnx.helper.np_dtype_to_tensor_dtype(_numpy(dtype)))

    # --- operators ------------------------------------------------------------------------------

    def same(self, node: fx.Node) -> Any:
        """Return the input: a copy, a view without effect, dropout in evaluation."""
        return self.value(_args(node)[0])

    def nothing(self, node: fx.Node) -> None:
        """Translate a check of the capture, which was made when it was captured."""

    def inlined(self, node: fx.Node) -> list[Any]:
        """Translate the body of a region without autocast, which transformers 4.57 writes."""
        _, _, enabled, _, body, *operands = _args(node)
        if enabled:
            raise ModelError("the model computes a part in autocast, which ONNX does not know")
        given = iter(operands)
        for inner in self.value(body).graph.nodes:
            if inner.op == "placeholder":
                self._values[inner] = self.value(next(given))
            elif inner.op == "output":
                return [self.value(result) for result in _args(inner)[0]]
            else:
                self.add(inner)
        return []

    def to(self, node: fx.Node) -> str:
        """Cast to another type, where it is another."""
        return self.tensor(_args(node)[0], _val(node).dtype)

    def unary(self, node: fx.Node) -> str:
        """Translate a function of one tensor."""
        return self.op(_UNARY[_operator(node)], self.value(_args(node)[0]))

    def binary(self, node: fx.Node) -> str:
        """Translate arithmetic on two tensors, a tensor and a number, or two sizes."""
        result = node.meta["val"]
        dtype = result.dtype if isinstance(result, torch.Tensor) else torch.int64
        left, right = _args(node)[:2]
        if not isinstance(result, torch.Tensor):
            left, right = ([a] if isinstance(a, int) else a for a in (left, right))
        operator = _BINARY[_operator(node)]
        if operator == "Pow" and right == 2:
            operator, right = "Mul", left
        return self.op(operator, self.tensor(left, dtype), self.tensor(right, dtype))

    def compare(self, node: fx.Node) -> str:
        """Translate a comparison into a boolean tensor."""
        left, right = _args(node)[:2]
        dtype = torch.result_type(
            *(_val(a) if isinstance(a, fx.Node) else a for a in (left, right))
        )
        pair = (self.tensor(left, dtype), self.tensor(right, dtype))
        operator = _operator(node)
        if operator in _COMPARE:
            return self.op(_COMPARE[operator], *pair)
        equal = self.op("Equal", *pair)
        return equal if operator == "eq" else self.op("Not", equal)

    def logic(self, node: fx.Node) -> str:
        """Translate an operator on booleans."""
        return self.op(_LOGIC[_operator(node)], *(self.value(a) for a in _args(node)[:2]))

    def where(self, node: fx.Node) -> str:
        """Choose element by element."""
        dtype = _val(node).dtype
        condition, *choices = _args(node)
        return self.op("Where", self.value(condition), *(self.tensor(c, dtype) for c in choices))

    def linear(self, node: fx.Node) -> str:
        """Multiply by a transposed weight and add a bias."""
        x, weight, *bias = _args(node)
        name = self.value(weight)
        if weight in self._looked_up:
            name = self.op("Transpose", name, perm=[1, 0])
        read = self.value(x)
        if weight in self._rounding:  # projections of one input may share its codes
            rounding = self._rounding[weight]
            key = (read, *rounding.input_key())
            if key not in self._rounded:
                self._rounded[key] = rounding.add_input(self._graph, read)
            read = self._rounded[key]
        product = self.op("MatMul", read, name)
        given = [b for b in bias if b is not None]
        return self.op("Add", product, self.value(given[0])) if given else product

    def matmul(self, node: fx.Node) -> str:
        """Multiply two batches of matrices."""
        return self.op("MatMul", *(self.value(a) for a in _args(node)[:2]))

    def embedding(self, node: fx.Node) -> str:
        """Look rows up."""
        return self.op("Gather", self.value(_args(node)[0]), self.value(_args(node)[1]), axis=0)

    def mean(self, node: fx.Node) -> str:
        """Average over dimensions."""
        x, dims, *keep = _args(node)
        axes = self._graph.constant(dims)
        return self.op("ReduceMean", self.value(x), axes, keepdims=int(bool(keep and keep[0])))

    def rsqrt(self, node: fx.Node) -> str:
        """One over the square root."""
        return self.op("Reciprocal", self.op("Sqrt", self.value(_args(node)[0])))

    def softmax(self, node: fx.Node) -> str:
        """Softmax in the type of its result."""
        return self.op(
            "Softmax", self.tensor(_args(node)[0], _val(node).dtype), axis=int(_args(node)[1])
        )

    def silu(self, node: fx.Node) -> str:
        """Multiply by its own sigmoid."""
        x = self.value(_args(node)[0])
        return self.op("Mul", x, self.op("Sigmoid", x))

    def gelu(self, node: fx.Node) -> str:
        """Gaussian error linear unit, exact or by tanh."""
        form = node.kwargs.get("approximate", "none")
        return self.op("Gelu", self.value(_args(node)[0]), approximate=form)

    def cat(self, node: fx.Node) -> str:
        """Concatenate."""
        tensors, *dim = _args(node)
        return self.op("Concat", *(self.value(t) for t in tensors), axis=int(dim[0]) if dim else 0)

    def transpose(self, node: fx.Node) -> str:
        """Exchange two dimensions."""
        order = list(range(_val(node).ndim))
        first, second = (int(d) % len(order) for d in _args(node)[1:3])
        order[first], order[second] = order[second], order[first]
        return self.op("Transpose", self.value(_args(node)[0]), perm=order)

    def unsqueeze(self, node: fx.Node) -> str:
        """Insert a dimension of one."""
        axes = self._graph.constant([_args(node)[1]])
        return self.op("Unsqueeze", self.value(_args(node)[0]), axes)

    def reshape(self, node: fx.Node) -> str:
        """Give another shape."""
        return self.op("Reshape", self.value(_args(node)[0]), self.sizes(_args(node)[1]))

    def expand(self, node: fx.Node) -> str:
        """Repeat dimensions of one; -1 leaves a dimension alone."""
        sizes = [1 if size == -1 else size for size in _args(node)[1]]
        return self.op("Expand", self.value(_args(node)[0]), self.sizes(sizes))

    def slice(self, node: fx.Node) -> Any:
        """Cut a range out of a dimension; a whole range is the tensor itself."""
        given = _args(node)
        defaults: tuple[Any, ...] = (None, 0, None, None, 1)
        x, dim, start, end, step = (*given, *defaults[len(given) :])
        start, end = start or 0, _END if end is None else end
        if start == 0 and step == 1 and isinstance(end, int) and end >= _END:
            return self.value(x)
        place = [self.sizes([part]) for part in (start, end, dim, step)]
        return self.op("Slice", self.value(x), *place)

    def chunk(self, node: fx.Node) -> list[str]:
        """Cut into equal parts."""
        x, _, *dim = _args(node)
        axis = int(dim[0]) if dim else 0
        sizes = [int(part.shape[axis]) for part in node.meta["val"]]
        return self._split(x, sizes, axis)

    def split(self, node: fx.Node) -> list[str]:
        """Cut into parts of given sizes."""
        axis = int(_args(node)[2]) if len(_args(node)) > 2 else 0
        return self._split(_args(node)[0], [int(p.shape[axis]) for p in node.meta["val"]], axis)

    def _split(self, x: Any, sizes: list[int], axis: int) -> list[str]:
        place = self._graph.constant(sizes)
        return self._graph.nodes("Split", len(sizes), self.value(x), place, axis=axis)

    def getitem(self, node: fx.Node) -> Any:
        """One of several outputs."""
        return self.value(_args(node)[0])[_args(node)[1]]

    def arange(self, node: fx.Node) -> str:
        """Count from 0 to a size."""
        end = self.op("Squeeze", self.sizes(_args(node)[:1]))
        return self.op("Range", self._graph.constant(0), end, self._graph.constant(1))

    def size(self, node: fx.Node) -> str:
        """One size of a tensor."""
        x, dim = _args(node)
        return self.op("Shape", self.value(x), start=int(dim), end=int(dim) + 1)


_OPERATORS: dict[str, Callable[[Translation, fx.Node], Any]] = {
    **dict.fromkeys(
        ("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "dropout"),
        Translation.same,
    ),
    **dict.fromkeys(("to", "_to_copy", "type_as"), Translation.to),
    **dict.fromkeys(_UNARY, Translation.unary),
    **dict.fromkeys(_BINARY, Translation.binary),
    **dict.fromkeys((*_COMPARE, "eq", "ne"), Translation.compare),
    **dict.fromkeys(_LOGIC, Translation.logic),
    **dict.fromkeys(("view", "reshape"), Translation.reshape),
    **dict.fromkeys(("split", "split_with_sizes"), Translation.split),
    "_assert_tensor_metadata": Translation.nothing,
    "arange": Translation.arange,
    "cat": Translation.cat,
    "chunk": Translation.chunk,
    "embedding": Translation.embedding,
    "expand": Translation.expand,
    "gelu": Translation.gelu,
    "getitem": Translation.getitem,
    "linear": Translation.linear,
    "matmul": Translation.matmul,
    "mean": Translation.mean,
    "rsqrt": Translation.rsqrt,
    "silu": Translation.silu,
    "slice": Translation.slice,
    "softmax": Translation.softmax,
    "sym_size": Translation.size,
    "transpose": Translation.transpose,
    "unsqueeze": Translation.unsqueeze,
    "where": Translation.where,
    "wrap_with_autocast": Translation.inlined,
}


def _operator(node: fx.Node) -> str:
    """Name of a node's operator without library and overload: ``mul`` of ``aten.mul.Tensor``."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _looked_up(program: "ExportedProgram") -> set[fx.Node]:
    """Tables that an embedding reads: a tied head shares them and is transposed in the graph."""
    nodes: Any = program.graph.nodes
    return {_args(node)[0] for node in nodes if _operator(node) == "embedding"}


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _val(node: Any) -> Any:
    return node.meta["val"]


def _numpy(dtype: torch.dtype) -> Any:
    return np.dtype(str(dtype).removeprefix("torch."))
