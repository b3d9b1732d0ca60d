"""The change of one layer, by the format of its file.

A trained layer has the weights W + change(W). The weights become W + scale · change(W), whatever the format is.
Only plain LoRA is low rank, so only its change can be an input of the compiled graph.
"""

import math
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EPSILON = 2.0**-23  # float32's, which LyCORIS adds to norms before it divides by them
NEUMANN_TERMS = 5  # PEFT's default


@dataclass(frozen=True)
class LowRankChange:
    """The change of one layer by plain LoRA: factor × up × down.

    Attributes:
        down: rank × inputs, and for a convolution × height × width.
        up: outputs × rank.
        factor: alpha / rank, as trained.
    """

    down: Any
    up: Any
    factor: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def compute(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the change of each parameter; see `FusedChange.compute`."""
        return {"weight": _fit(self.up.float() @ self.down.flatten(1).float() * self.factor, weights["weight"])}


@dataclass(frozen=True)
class Format:
    """A format of changes.

    Attributes:
        tensors: the values of MATRIX_BY_SUFFIX that only this format has.
        compute: returns the change of weights.
        ranked: tensors whose first dimensions have the rank as their least.
    """

    name: str
    tensors: frozenset[str]
    compute: Callable[[Any, "FusedChange"], Any]
    ranked: tuple[str, ...] = ()


class Tensors(UserDict[str, Any]):
    """A layer's tensors by name. Reading one makes it float32, and its name is kept in `read`."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.read: set[str] = set()
        super().__init__(tensors)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        tensor = super().__getitem__(name)
        return tensor if isinstance(tensor, float) else tensor.float()


@dataclass(frozen=True)
class FusedChange:
    """The change of one layer that can only be added to its weights.

    Attributes:
        tensors: by name; alpha and on_input are numbers.
        rank: None for a format without one.
        factor: alpha / rank, as trained; 1 without a rank.
        settings: PEFT's, of the layer's component.
        scales_inputs: (IA)³ of PEFT scales the inputs, and otherwise the outputs.
    """

    format: Format
    tensors: Tensors
    rank: int | None
    factor: float
    settings: Mapping[str, Any]
    scales_inputs: bool

    @property
    def kinds(self) -> set[str]:
        """Its formats in words."""
        decomposed = {"DoRA"} if self.tensors.keys() & {"dora_scale", "magnitude"} else set()
        biases = {BIASES.name} if self.tensors.keys() & {"diff_b", "up_bias"} else set()
        return {self.format.name} | decomposed | biases

    def compute(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the change of each parameter that changes.

        Args:
            weights: the layer's parameters by name, in float32.

        Raises:
            KeyError: a tensor is missing.
            IndexError, RuntimeError, ValueError: the shapes do not fit.
        """
        weight, bias = weights["weight"], weights.get("bias")
        change = self.format.compute(weight, self)
        if change is not None:
            change = _fit(change, weight)
            if "DoRA" in self.kinds:
                change = self._decompose(weight + change) - weight
        changes = {"weight": change, "bias": self._compute_bias(bias)}
        return {name: each for name, each in changes.items() if each is not None}

    def _decompose(self, weight: Any) -> Any:
        """Return weights with the magnitudes of DoRA: one for each output, or for each input."""
        import torch

        if "magnitude" in self.tensors:
            magnitudes, axis = self.tensors["magnitude"], 0  # PEFT's are of the outputs
        else:
            magnitudes = self.tensors["dora_scale"]
            axis = int(magnitudes.shape[0] == 1)
        others = [each for each in range(weight.dim()) if each != axis]
        norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        return weight * (_along(magnitudes, weight, axis) / (norms + EPSILON))

    def _compute_bias(self, bias: Any) -> Any:
        """Return the change of the bias; None if there is none."""
        added = []
        if "diff_b" in self.tensors:
            added.append(self.tensors["diff_b"])
        if "up_bias" in self.tensors:
            added.append(self.tensors["up_bias"] * self.factor)
        if added and bias is None:
            raise ValueError("no bias")
        if "ia3_l" in self.tensors and bias is not None and not self.scales_inputs:
            added.append(bias * (self.tensors["ia3_l"].flatten() - 1))
        return sum(_fit(each, bias) for each in added) if added else None


def _fit(change: Any, weight: Any) -> Any:
    """Return a change in the shape of the weights. A linear layer and a 1×1 convolution have the same ones.

    Raises:
        ValueError: it has another number of outputs or of weights.
    """
    if change.shape[:1] != weight.shape[:1] or change.numel() != weight.numel():
        raise ValueError(f"a change of {change.shape}")
    return change.reshape(weight.shape)


def _along(vector: Any, weight: Any, axis: int) -> Any:
    """Return a number for each output (axis 0) or input (axis 1) of a layer, to multiply its weights by.

    Raises:
        ValueError: there are more or fewer numbers.
    """
    if vector.numel() != weight.shape[axis]:
        raise ValueError(f"{vector.numel()} numbers")
    return vector.reshape([-1 if each == axis else 1 for each in range(weight.dim())])


def _join(up: Any, down: Any, core: Any = None) -> Any:
    """Return the product of two matrices.

    Args:
        core: rank × rank × height × width, between them in Tucker's decomposition.
    """
    import torch

    up, down = up.flatten(1), down.flatten(1)
    return up @ down if core is None else torch.einsum("ij...,pi,jr->pr...", core, up, down)


def _join_named(change: FusedChange, name: str, core: str) -> Any:
    """Return the product of the matrices `name`_a and `name`_b."""
    first, second, between = change.tensors[f"{name}_a"], change.tensors[f"{name}_b"], change.tensors.get(core)
    return _join(first if between is None else first.T, second, between)


def _compute_lora(weight: Any, change: FusedChange) -> Any:
    tensors = change.tensors
    return _join(tensors["up"], tensors["down"], tensors.get("mid")) * change.factor


def _compute_loha(weight: Any, change: FusedChange) -> Any:
    return _join_named(change, "hada_w1", "hada_t1") * _join_named(change, "hada_w2", "hada_t2") * change.factor


def _compute_lokr(weight: Any, change: FusedChange) -> Any:
    import torch

    first, second = (
        change.tensors[name] if name in change.tensors else _join_named(change, name, core)
        for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )
    return torch.kron(first, second.flatten(1)) * change.factor


def _compute_glora(weight: Any, change: FusedChange) -> Any:
    import torch

    a1, a2, b1, b2 = (change.tensors[name] for name in ("a1", "a2", "b1", "b2"))
    if len(a1) != weight.shape[1]:  # in LyCORIS's first files the names are the other way round
        a1, a2, b1, b2 = a2, a1, b2, b1
    added = _fit(_join(b1, b2, change.tensors.get("bm")), weight)
    return (torch.einsum("oi...,ij->oj...", weight, _join(a1, a2)) + added) * change.factor


def _compute_ia3(weight: Any, change: FusedChange) -> Any:
    return weight * _along(change.tensors["weight"], weight, int(change.tensors["on_input"]))


def _compute_ia3_of_peft(weight: Any, change: FusedChange) -> Any:
    return weight * (_along(change.tensors["ia3_l"], weight, int(change.scales_inputs)) - 1)


def _compute_oft(weight: Any, change: FusedChange) -> Any:
    """Rotate blocks of outputs: once (OFT), or several times in other orders (BOFT)."""
    import torch

    tensors, outputs, rows = change.tensors, len(weight), weight.flatten(1)
    rotations = tensors.get("oft_diag")
    if rotations is None:
        skew = tensors["oft_blocks"] - tensors["oft_blocks"].transpose(-1, -2)
        limit = tensors.get("alpha", 0) * outputs
        if limit > 0:
            skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1)
        unit = torch.eye(skew.shape[-1], device=skew.device)
        rotations = (unit + skew) @ torch.linalg.inv(unit - skew)
    if rotations.dim() == 3:
        rotated = rotations.transpose(1, 2) @ rows.reshape(*rotations.shape[:2], rows.shape[1])
    else:
        rotated = rows
        for stage, blocks in enumerate(rotations):
            stride = 2**stage * (blocks.shape[-1] // 2)
            order = torch.arange(outputs, device=blocks.device).reshape(-1, 2, stride).transpose(1, 2).flatten()
            rotated = rotated[order].reshape(*blocks.shape[:2], rows.shape[1])
            rotated = (blocks @ rotated).flatten(0, 1)[order.argsort()]
    rotated = rotated.reshape(weight.shape)
    return rotated * _along(tensors["rescale"], weight, 0) - weight if "rescale" in tensors else rotated - weight


def _compute_oft_of_peft(weight: Any, change: FusedChange) -> Any:
    """Rotate blocks of inputs. Each block has the upper triangle of a skew matrix."""
    import torch

    vectors, settings = change.tensors["oft_R"], change.settings
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    skew = vectors.new_zeros(len(vectors), size, size)
    skew[:, rows, columns] = vectors
    skew = skew - skew.transpose(1, 2)
    unit = torch.eye(size, device=skew.device)
    if not settings.get("use_cayley_neumann", True):
        return _rotate_inputs(weight, (unit - skew) @ torch.linalg.inv(unit + skew)) - weight
    # A series approximates the quotient. Training did the same.
    terms = settings.get("num_cayley_neumann_terms", NEUMANN_TERMS)
    factors = [2.0] * (terms - 1) if terms < 3 else [2.0] * (max(terms, 4) - 2) + [1.0]
    rotations, power = unit.expand_as(skew), unit
    for factor in factors:
        power = power @ skew
        rotations = rotations + factor * power
    return _rotate_inputs(weight, rotations) - weight


def _compute_boft_of_peft(weight: Any, change: FusedChange) -> Any:
    import torch

    (blocks,) = change.tensors["boft_R"]
    skew = (blocks - blocks.transpose(1, 2)) / 2
    unit = torch.eye(skew.shape[-1], device=skew.device)
    rotated = _rotate_inputs(weight, (unit - skew) @ torch.linalg.inv(unit + skew))
    return rotated * _along(change.tensors["boft_s"], weight, 0) - weight


def _rotate_inputs(weight: Any, rotations: Any) -> Any:
    import torch

    size = rotations.shape[-1]
    blocks = weight.reshape(len(weight), -1, size)
    return torch.einsum("orc,rkc->ork", blocks, rotations.expand(blocks.shape[1], size, size)).reshape(weight.shape)


def _subtract(weight: Any, change: FusedChange) -> Any:
    return _fit(change.tensors["set_weight"], weight) - weight


LORA = Format("LoRA", frozenset({"down", "up", "mid", "up_bias"}), _compute_lora, ranked=("down",))
BIASES = Format("biases", frozenset({"diff_b"}), lambda weight, change: None)
FORMATS = (
    LORA,
    Format(
        "LoHa",
        frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
        _compute_loha,
        ranked=("hada_w1_b",),
    ),
    Format(
        "LoKr",
        frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
        _compute_lokr,
        ranked=("lokr_w1_b", "lokr_w2_b"),
    ),
    Format("GLoRA", frozenset({"a1", "a2", "b1", "b2", "bm"}), _compute_glora, ranked=("a1", "a2")),
    Format("(IA)³", frozenset({"weight", "on_input"}), _compute_ia3),
    Format("(IA)³ of PEFT", frozenset({"ia3_l"}), _compute_ia3_of_peft),
    Format("OFT or BOFT", frozenset({"oft_blocks", "oft_diag", "rescale"}), _compute_oft),
    Format("OFT of PEFT", frozenset({"oft_R"}), _compute_oft_of_peft),
    Format("BOFT of PEFT", frozenset({"boft_R", "boft_s"}), _compute_boft_of_peft),
    Format("differences of weights", frozenset({"diff"}), lambda weight, change: change.tensors["diff"]),
    Format("whole weights", frozenset({"set_weight"}), _subtract),
)
