"""Blocks that a module has many of: torch traces one of each kind, and what it made of it stands for the others.

Tracing SDXL's UNet with its 70 transformer blocks one by one takes twice as long, and its trace has three times as many
checks.
"""

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from openvino_backend.conditions import describe
from openvino_backend.errors import OpenVINOBackendError

_region = torch.ops.higher_order.invoke_subgraph


def list_blocks(module: torch.nn.Module, classes: Collection[str]) -> list[torch.nn.Module]:
    """Return the parts of a module that are of classes with these names."""
    return [each for each in module.modules() if type(each).__name__ in classes]


@contextlib.contextmanager
def trace_once(blocks: Collection[torch.nn.Module]) -> Iterator[None]:
    """Have torch trace, while in this context, one of those blocks that are alike.

    Whether two are so torch checks itself, but for some things, such as the hooks of a block's parts. So where two of a
    class differ by more than the shapes of weights, all of that class are traced.
    """
    kinds: list[Any] = [
        kind for kind in set(map(type, blocks)) if _are_alike([each for each in blocks if type(each) is kind])
    ]
    kept = {kind: vars(kind).get("forward") for kind in kinds}
    try:
        for kind in kinds:
            kind.forward = torch.compiler.nested_compile_region(kind.forward, max_reuse_entries=len(blocks))
        yield
    finally:
        for kind, method in kept.items():
            if method is None:
                del kind.forward
            else:
                kind.forward = method


def write_out_regions(graph: torch.fx.GraphModule) -> None:
    """Put in the place of each call of a subgraph what the subgraph does."""
    for node in graph.graph.find_nodes(op="call_function", target=_region):
        source, _, *operands = node.args
        subgraph = graph.get_submodule(source.target).graph
        known = dict(zip(subgraph.find_nodes(op="placeholder"), operands, strict=True))
        results: Any = ()
        with graph.graph.inserting_before(node):
            for each in subgraph.nodes:
                if each.op == "output":
                    results = each.args[0]
                elif each.op != "placeholder":
                    known[each] = graph.graph.node_copy(each, known.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(known[results[user.args[1]]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not source.users:
            graph.graph.erase_node(source)
    graph.recompile()


def check_flat(graph: torch.fx.GraphModule) -> None:
    """Refuse a graph that holds others.

    Raises:
        OpenVINOBackendError: names the operators that call them.
    """
    nodes = graph.graph.find_nodes(op="get_attr")
    held = [node for node in nodes if isinstance(getattr(graph, node.target), torch.nn.Module)]
    callers = {str(user.target) for node in held for user in node.users}
    if callers:
        raise OpenVINOBackendError(
            f"the graph holds graphs that {', '.join(sorted(callers))} call, as of torch.cond or of a repeated block "
            "that changes what it is given"
        )


def digest_blocks(blocks: Iterable[torch.nn.Module]) -> str:
    """Return a digest of all in the blocks but the values of weights.

    The checks that torch keeps with a trace look at the first block of a kind only.
    """
    states = [
        (describe(type(part)), {name: _describe_state(value) for name, value in vars(part).items()})
        for block in blocks
        for part in block.modules()
    ]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _are_alike(blocks: Collection[torch.nn.Module]) -> bool:
    shapes = {tuple((name, each.shape) for name, each in block.state_dict().items()) for block in blocks}
    return len({digest_blocks([block]) for block in blocks}) == len(shapes)


def _describe_state(value: Any) -> str:
    """Return words for what a module holds; of a dictionary, such as that of its hooks, for what is in it."""
    if isinstance(value, Mapping):
        return describe(dict(value))
    if type(value).__module__ == "builtins" or isinstance(value, torch.Tensor):
        return describe(value)
    return f"{describe(type(value))} {describe(getattr(value, '__dict__', {}))}"
