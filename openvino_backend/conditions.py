"""What a trace depends on that torch cannot keep in a file: globals, functions, classes, what a function encloses.

Within a process these are compared by identity, numbers and strings by value. For another process each is described in
words that it finds too: no address and no order of a set is in them.
"""

import builtins
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from openvino_backend.errors import CacheMissError
from openvino_backend.torch_private import OPERATORS

_PLAIN = (bool, bytes, complex, float, int, str, type(None), type(...), torch.dtype, torch.device, torch.layout)
_ABSENT = "absent"
_DEPTH = 4


class Conditions:
    """Expressions that had values when a function was traced, and must have them at each call.

    Args:
        expressions: of L, the arguments and what the function encloses by name, and of what is in `scope`.
        arguments: L when the function was traced or loaded.

    Attributes:
        descriptions: for each expression what it gave, in words.
    """

    def __init__(self, expressions: Iterable[str], scope: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        self.descriptions: dict[str, str] = {}
        self._absent: list[Callable[[Any], Any]] = []
        present: list[str] = []
        ordinals: dict[int, int] = {}
        for each in sorted(set(expressions)):
            read = _make_reader(each, scope)
            try:
                value = read(arguments)
                is_lasting = _is_same(read(arguments), value)
            except Exception:  # a guard may tell that something is not there
                self.descriptions[each] = _ABSENT
                self._absent.append(read)
                continue
            if is_lasting:
                present.append(each)
                # Which of these are one object and which are two is seen, too.
                ordinal = "" if is_plain(value) else f" #{ordinals.setdefault(id(value), len(ordinals))}"
                self.descriptions[each] = describe(value) + ordinal
            else:  # an object of the moment, such as a dictionary's view
                present.append(f"type({each})")
                self.descriptions[each] = describe(type(value))
        # One expression for all: some 200 take 0.1 ms.
        self._read = _make_reader(f"({''.join(f'{each}, ' for each in present)})", scope)
        self._seen: tuple[Any, ...] = self._read(arguments)
        self._present = present

    @property
    def absent(self) -> set[str]:
        """The expressions that cannot be evaluated."""
        return {each for each, description in self.descriptions.items() if description == _ABSENT}

    @property
    def classes(self) -> dict[str, type]:
        """The classes among what was seen, by expression."""
        seen = zip(self._present, self._seen, strict=True)
        return {each: value for each, value in seen if isinstance(value, type) and each in self.descriptions}

    def hold(self, arguments: Mapping[str, Any]) -> bool:
        """Tell whether every expression gives what it gave."""
        try:
            values = self._read(arguments)
        except Exception:  # something is not there any more
            return False
        return all(map(_is_same, values, self._seen)) and not any(_is_there(read, arguments) for read in self._absent)

    def check_descriptions(self, descriptions: Mapping[str, str]) -> None:
        """Refuse a trace that another process made when something was different.

        Raises:
            CacheMissError: names what it was.
        """
        for expression, description in descriptions.items():
            if self.descriptions[expression] != description:
                raise CacheMissError(
                    f"{expression} was {description} when it was traced, and is {self.descriptions[expression]}"
                )


def is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a string or the like, equal to another that is written as it is."""
    if type(value) in (tuple, frozenset):
        return all(map(is_plain, value))
    return type(value) in _PLAIN or isinstance(value, enum.Enum)


def describe(value: Any, *, depth: int = _DEPTH) -> str:
    """Return words for a value that are the same in each process."""
    if type(value) in (tuple, list, set, frozenset, dict):
        return _describe_items(value, depth=depth)
    if is_plain(value):
        return f"{value!r}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, types.CodeType):
        return f"code {value.co_qualname} {_digest_code(value)}"
    if isinstance(value, types.FunctionType):
        defaults = describe((value.__defaults__, value.__kwdefaults__), depth=depth - 1)
        return f"function {value.__module__}.{value.__qualname__} {_digest_code(value.__code__)} {defaults}"
    if isinstance(value, types.MethodType):
        return f"method {describe(value.__func__)} of {_name_class(type(value.__self__))}"
    if isinstance(value, functools.partial):
        return f"partial {describe((value.func, value.args, value.keywords), depth=depth - 1)}"
    if isinstance(value, type):
        return f"class {_name_class(value)}{_digest_class(value)}"
    if isinstance(value, torch.Tensor):
        return f"{_name_class(type(value))} {value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    if isinstance(value, torch.Size | OPERATORS):
        return str(value)
    name = getattr(value, "__qualname__", None)  # a function of C's
    return f"{_name_class(type(value))} {value.__module__ if name else ''}.{name}" if name else _name_class(type(value))


def _describe_items(value: Any, *, depth: int) -> str:
    if depth <= 0:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        items = [f"{describe(key, depth=depth - 1)}: {describe(item, depth=depth - 1)}" for key, item in value.items()]
    else:
        items = [describe(item, depth=depth - 1) for item in value]
    return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, set | frozenset) else items)})"


def _name_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _digest_code(code: types.CodeType) -> str:
    """Return a digest of what the code does; where it stands and what its variables are called is no matter."""
    constants = [_digest_code(each) if isinstance(each, types.CodeType) else describe(each) for each in code.co_consts]
    flat = (code.co_code.hex(), constants, code.co_names, code.co_freevars, code.co_cellvars, code.co_argcount)
    return hashlib.sha256(repr(flat).encode()).hexdigest()[:16]


def _digest_class(kind: type) -> str:
    """Return a digest of a class's own functions, if it has any: two classes may have one name."""
    functions = [each for each in map(unwrap_method, vars(kind).values()) if isinstance(each, types.FunctionType)]
    if not functions or vars(builtins).get(kind.__name__) is kind:
        return ""
    digests = sorted(f"{each.__qualname__} {_digest_code(each.__code__)}" for each in functions)
    return f" {hashlib.sha256(repr(digests).encode()).hexdigest()[:16]}"


def unwrap_method(value: Any) -> Any:
    """Return the function in a class's static or class method or property."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _make_reader(expression: str, scope: Mapping[str, Any]) -> Callable[[Any], Any]:
    reader: Callable[[Any], Any] = eval(f"lambda L: {expression}", dict(scope))
    return reader


def _is_there(read: Callable[[Any], Any], arguments: Mapping[str, Any]) -> bool:
    try:
        read(arguments)
    except Exception:
        return False
    return True


def _is_same(value: Any, seen: Any) -> bool:
    if value is seen:
        return True
    if type(value) is not type(seen):
        return False
    if type(value) is tuple:
        return len(value) == len(seen) and all(map(_is_same, value, seen))
    if isinstance(value, types.MethodType | types.BuiltinMethodType | types.MethodWrapperType):
        return bool(value == seen)  # made at each look; equal when the object and the function are the same ones
    return is_plain(value) and repr(value) == repr(seen)  # unlike ==, repr tells 0.0 from -0.0, and knows nan
