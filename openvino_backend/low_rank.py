"""Low-rank side inputs: a layer's W x becomes W x + up (down x), with matrices from each call.

A model is compiled for known layers, but not for known matrices: these are inputs of the compiled model. Linear layers
take any rank, and rank 0 in a call without matrices. W is unchanged, in 8 bits if it is compressed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import openvino
import torch
from openvino import opset13

from openvino_backend.errors import OpenVINOBackendError

Products = Mapping[
    str, tuple[torch.Tensor, torch.Tensor]
]  # by a weight's name: rank × inputs (× kernel), results × rank
_MARK = "layer:"
_KINDS = ("MatMul", "Convolution")
_current: ContextVar[Products] = ContextVar("products", default={})  # noqa: B039, it is never changed


@contextlib.contextmanager
def use(products: Products) -> Iterator[None]:
    """Let models called in the block compute with these matrices."""
    token = _current.set(products)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class Slot:
    """The side inputs of one layer: `down`, and one `up` for each piece of the layer.

    Attributes:
        name: the name of its weights.
        down: the first matrix's shape, with a convolution's rank, or 0 for linear layers.
        results: the number for each piece.
        pieces: their number.
    """

    name: str
    down: tuple[int, ...]
    results: int
    pieces: int

    def fill(self, products: Products) -> list[torch.Tensor]:
        """Return the inputs of a call."""
        rank, *taken = self.down
        down, up = products.get(self.name) or (torch.zeros(0, *taken), torch.zeros(self.results * self.pieces, 0))
        if rank:  # a convolution takes only the rank that it was compiled for
            missing = rank - len(down)
            down = torch.cat([down, down.new_zeros(missing, *taken)])
            up = torch.cat([up, up.new_zeros(len(up), missing)], dim=1)[:, :, None, None]
        return [down.contiguous(), *(each.contiguous() for each in up.chunk(self.pieces))]


class SideInputs:
    """The side inputs of a compiled model. The same products give the same tensors."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        self.slots = slots
        self._filled: tuple[Products, tuple[torch.Tensor, ...]] | None = None

    def find(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors of this call."""
        products, filled = _current.get(), self._filled
        if filled is None or filled[0] is not products:
            filled = products, tuple(each for slot in self.slots for each in slot.fill(products))
            self._filled = filled
        return filled[1]


def name_layers(model: openvino.Model, names: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
    """Name products after their weights. The cached model keeps the names.

    Args:
        names: weight names by address and shape.
    """
    for node in model.get_ops():
        if node.get_type_name() in _KINDS:
            constant = node.input_value(1).get_node()
            while constant.get_type_name() in ("Convert", "Reshape"):
                constant = constant.input_value(0).get_node()
            if constant.get_type_name() == "Constant":
                name = names.get((constant.data.ctypes.data, tuple(constant.shape)))
                if name is not None:
                    node.set_friendly_name(_MARK + name)


def name_piece(piece: openvino.Node, layer: openvino.Node, index: int) -> None:
    """Name one of a layer's pieces."""
    if layer.get_friendly_name().startswith(_MARK):
        piece.set_friendly_name(f"{layer.get_friendly_name()}/{index}")


def add_side_inputs(model: openvino.Model, ranks: Mapping[str, int]) -> SideInputs:
    """Add side inputs to the named layers of a model.

    Args:
        ranks: the largest rank of a call, by weight name.
    """
    layers: dict[str, list[openvino.Node]] = {}
    for node in model.get_ops():
        name, _, _ = node.get_friendly_name().removeprefix(_MARK).partition("/")
        if node.get_type_name() in _KINDS and name in ranks:
            layers.setdefault(name, []).append(node)
    slots = []
    for name, pieces in layers.items():
        pieces.sort(key=lambda each: each.get_friendly_name())
        is_convolution = pieces[0].get_type_name() == "Convolution"
        results, *taken = pieces[0].input(1).get_partial_shape().to_shape()
        rank = ranks[name] if is_convolution else 0
        parameters = [_make_parameter([rank or -1, *taken])]
        middle = _multiply(pieces[0], pieces[0].input_value(0), parameters[0], is_convolution)
        for piece in pieces:
            up = _make_parameter([results, rank or -1, *(1 for _ in taken[1:])])
            parameters.append(up)
            added = _add_up(middle, up, is_convolution)
            users = list(piece.output(0).get_target_inputs())
            total = opset13.add(piece.output(0), added)
            for each in users:
                each.replace_source_output(total.output(0))
        model.add_parameters(parameters)
        slots.append(Slot(name, (rank, *taken), results, len(pieces)))
    model.validate_nodes_and_infer_types()
    return SideInputs(tuple(slots))


def check_found(ranks: Mapping[str, int], found: set[str]) -> None:
    """Refuse layers that are in none of a function's models.

    Raises:
        OpenVINOBackendError: names one.
    """
    missing = sorted(set(ranks) - found)
    if missing:
        raise OpenVINOBackendError(
            f"{len(missing)} weights for side inputs are in no linear layer or convolution, such as {missing[0]}"
        )


def _make_parameter(shape: list[int]) -> openvino.Node:
    return opset13.parameter(openvino.PartialShape(shape), openvino.Type.f32)


def _multiply(
    layer: openvino.Node, source: openvino.Output, down: openvino.Node, is_convolution: bool
) -> openvino.Node:
    """Multiply a layer's input with `down`, as the layer does with its weights."""
    if not is_convolution:
        return opset13.matmul(source, down, transpose_a=False, transpose_b=True)
    about = layer.get_attributes()
    return opset13.convolution(
        source, down, about["strides"], about["pads_begin"], about["pads_end"], about["dilations"]
    )


def _add_up(middle: openvino.Node, up: openvino.Node, is_convolution: bool) -> openvino.Node:
    if not is_convolution:
        return opset13.matmul(middle, up, transpose_a=False, transpose_b=True)
    return opset13.convolution(middle, up, [1, 1], [0, 0], [0, 0], [1, 1])
