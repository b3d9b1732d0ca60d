"""Describe what a trace of a method depends on, equally in each process: no address, no order of a set.

It covers the method and the tree of modules: classes, plain attributes, configurations and hooks. It covers their
source files and package versions. It omits globals, and functions that a running program replaces.
"""

import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from openvino_backend.weights import digest_weights

_PLAIN = (bool, bytes, complex, float, int, str, type(None), type(...), torch.dtype, torch.device, torch.layout)
_DEPTH = 5
_STATE = ("_parameters", "_buffers", "_modules")  # of each module; only the names of the first two are included
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
# The path that a model was read from, and a list that diffusers makes of a set, in the set's order.
_NAMES = ("_name_or_path", "name_or_path", "_commit_hash", "_use_default_values")


def compute_fingerprint(module: torch.nn.Module, method: Callable[..., Any]) -> str:
    """Return a digest of all that a trace depends on, except weights and arguments."""
    describer = Describer()
    told: list[Any] = [describer.describe(method)]
    for name, part in module.named_modules():
        tensors = [(each, value is None) for held in _STATE[:2] for each, value in vars(part)[held].items()]
        state = {
            each: list(value.values()) if each.endswith(_HOOKS) else value  # the keys differ between processes
            for each, value in vars(part).items()
            if each not in _STATE and not isinstance(value, torch.Tensor) and not _is_ours(value)
        }
        told.append((name, describer.describe(type(part)), tensors, describer.describe(state)))
    told += [sorted(describer.files), describer.find_versions()]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _is_ours(value: Any) -> bool:
    """Return whether a value is a compiled function, which may replace the method."""
    return type(value).__module__.partition(".")[0] == __package__


class Describer:
    """Describes values, and notes where their classes and functions come from.

    Attributes:
        files: the digests of the source files.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._packages: set[str] = set()

    def describe(self, value: Any, *, depth: int = _DEPTH) -> str:
        """Return a description of a value; below the depth only its type."""
        if _is_plain(value):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, torch.Tensor):
            return f"tensor {digest_weights({'': value})}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            return self._describe_class(value)
        if isinstance(value, torch.nn.Module) or depth <= 0:
            return self._describe_class(type(value))
        if isinstance(value, types.FunctionType):
            return self._describe_function(value, depth=depth)
        if isinstance(value, types.MethodType):
            return f"method {self.describe(value.__func__)} of {self.describe(value.__self__, depth=depth - 1)}"
        if isinstance(value, functools.partial):
            return f"partial {self.describe((value.func, value.args, value.keywords), depth=depth - 1)}"
        return self._describe_items(value, depth=depth - 1)

    def find_versions(self) -> list[tuple[str, str]]:
        """Return the versions of the packages seen so far."""
        return sorted((name, str(getattr(sys.modules.get(name), "__version__", ""))) for name in self._packages)

    def _describe_items(self, value: Any, *, depth: int) -> str:
        """Describe what a container or an object holds."""
        kind = self._describe_class(type(value))
        if isinstance(value, Mapping):
            held = value.items()
        elif isinstance(value, list | tuple | set | frozenset):
            items = [self.describe(each, depth=depth) for each in value]
            return f"{kind}({', '.join(sorted(items) if isinstance(value, set | frozenset) else items)})"
        elif not hasattr(value, "__dict__"):  # a C function has a name, other objects have none
            return f"{kind} {getattr(value, '__qualname__', '')}"
        else:
            held = vars(value).items()
        told = (f"{self.describe(key)}: {self.describe(each, depth=depth)}" for key, each in held if key not in _NAMES)
        return f"{kind}({', '.join(told)})"

    def _describe_function(self, value: types.FunctionType, *, depth: int) -> str:
        self._note(value.__module__)
        cells = [each.cell_contents for each in value.__closure__ or () if each != types.CellType()]
        held = self.describe((value.__defaults__, value.__kwdefaults__, cells), depth=depth - 1)
        return f"function {value.__module__}.{value.__qualname__} {_digest_bytecode(value.__code__)} {held}"

    def _describe_class(self, kind: type) -> str:
        for each in kind.__mro__:
            self._note(each.__module__)
        return f"class {kind.__module__}.{kind.__qualname__} {_digest_class(kind)}"

    def _note(self, module: str) -> None:
        package = module.partition(".")[0]
        self._packages.add(package)
        if package not in ("builtins", "torch"):
            self.files.add(_digest_file(getattr(sys.modules.get(module), "__file__", None)))


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, enum.Enum | torch.Size)


@functools.cache
def _digest_file(path: str | None) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).exists() else ""


@functools.cache
def _digest_class(kind: type) -> str:
    """Return a digest of a class's own functions: classes in one file may share a name."""
    functions = [each for each in vars(kind).values() if isinstance(each, types.FunctionType)]
    return hashlib.sha256(repr([_digest_bytecode(each.__code__) for each in functions]).encode()).hexdigest()[:16]


@functools.cache
def _digest_bytecode(code: types.CodeType) -> str:
    """Return a digest of what the code does, wherever it is."""
    constants = [_digest_bytecode(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
    told = [sorted(map(repr, each)) if isinstance(each, frozenset) else repr(each) for each in constants]
    return hashlib.sha256(repr((code.co_code.hex(), told, code.co_names)).encode()).hexdigest()[:16]
