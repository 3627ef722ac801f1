"""Reads the pickles of tensor files as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine. This one knows the opcodes that torch's files are
made of and treats what they name (`GLOBAL`) as mere symbols from a short list: tensor rebuilding,
storages and containers. What else stands beside weights (settings, versions, histories, partial
functions) becomes an inert `Placeholder`: classes of any library, and a few of Python's own. All
other names of Python's own library, all calls of functions and all other opcodes are refused by
name, before anything is built from them. Work and memory are bounded by the length of the pickle.

Opcodes: the table of Python's `pickletools`. What torch writes: `torch/serialization.py` and
`torch/_utils.py` of PyTorch (BSD-3).
"""

import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from zoo.checkpoints.tensor import (
    DTYPES,
    MAX_DIMENSIONS,
    CheckpointError,
    UnsafeCheckpoint,
    element_count,
)

MAX_PICKLE = 32 << 20  # bytes
MAX_STEPS = 2_000_000  # opcodes run, and items copied by them
MAX_TENSORS = 200_000


@dataclass(frozen=True)
class Symbol:
    """A name that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class StorageRef:
    """A storage: its key in the file, element type (None: bytes), number of elements, start."""

    key: str
    dtype: str | None
    count: int
    start: int = 0


@dataclass(frozen=True)
class TensorRef:
    """A checked view of a storage; `offset` and `strides` count elements of `dtype`."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Placeholder:
    """An object of an admitted class, of which nothing is kept but the class's name."""

    kind: str = "an object"


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": "float32",
        "Double": "float64",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
    }.items()
}
_UNTYPED = {("torch", "UntypedStorage"), ("torch.storage", "UntypedStorage")}
_INERT = {  # configuration and numbers beside the weights in official training checkpoints
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("yacs.config", "CfgNode"),
    ("easydict", "EasyDict"),
    ("addict.addict", "Dict"),
    ("mmcv.utils.config", "ConfigDict"),
    ("mmengine.config.config", "ConfigDict"),
    ("ml_collections.config_dict.config_dict", "ConfigDict"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    ("omegaconf.nodes", "AnyNode"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PureWindowsPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("datetime", "datetime"),
    ("datetime", "date"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("time", "struct_time"),
    ("collections", "deque"),
    ("collections", "UserDict"),
    ("functools", "partial"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("uuid", "UUID"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("random", "Random"),
    ("re", "_compile"),
    ("numpy.random._pickle", "__randomstate_ctor"),
    ("numpy.random._pickle", "__generator_ctor"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("torch", "device"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
}
_TYPES = {  # named as arguments, never called
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("typing", "Any"),
    *(
        (builtins, name)
        for builtins in ("builtins", "__builtin__")
        for name in (
            "dict", "list", "int", "float", "str", "object", "bool", "bytes", "complex", "tuple",
            "slice", "range", "bytearray", "type",
        )
    ),
}  # fmt: skip
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}  # a method that is named
_CALLABLE = {(b, n) for b in ("builtins", "__builtin__") for n in ("slice", "range", "complex")}
_OUTSIDE = set(sys.stdlib_module_names) | {
    "__builtin__", "__builtins__", "commands", "copy_reg", "cPickle", "exceptions", "StringIO",
    "cloudpickle", "dill", "joblib", "pip", "setuptools", "pkg_resources", "distutils", "IPython",
    "ipykernel", "nose", "py", "pytest", "_pytest", "numpy", "jax", "tensorflow",
}  # fmt: skip
"""Where nothing is admitted but what is listed above: what can do harm if it is ever called."""
_CLASS = re.compile(r"_*[A-Z]\w*")


def _is_class(module: str, name: str) -> bool:
    """Whether a name reads like a class of some library, which may be kept as a placeholder."""
    root = module.partition(".")[0]
    if root == "numpy" and module in ("numpy.dtypes", "numpy"):
        return bool(_CLASS.fullmatch(name))
    if root in _OUTSIDE or module.startswith(("torch.jit", "torch.package", "torch.hub")):
        return False
    return all(_CLASS.fullmatch(part) for part in name.split(".")) and module != "torch"


def _is_named(module: str, name: str) -> bool:
    """Whether a name may stand as an argument: a class, or a function that is never called."""
    if _is_class(module, name) or module == "torch.nn.functional":
        return True
    root, parts = module.partition(".")[0], name.split(".")
    plain = all(part.isidentifier() and not part.startswith("__") for part in parts)
    return plain and root not in (*_OUTSIDE, "torch") and len(parts) <= 2


_KEY_TYPES = (str, int, float, bytes, Symbol, Placeholder, type(None))


class PickleMachine:
    """Runs one pickle of `data` that starts at `start`; `end` is then the byte after it.

    Args:
      data: the bytes.
      where: the file's name, for errors.
      start: first byte of the pickle.
    """

    def __init__(self, data: bytes, where: str, start: int = 0) -> None:
        self.end = start
        self.storages: dict[str, StorageRef] = {}
        self._data, self._where = data, where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._tensors = 0

    def run(self) -> Any:
        """The object: scalars, strings, tuples, lists, dicts, `TensorRef`s and `Placeholder`s.

        Raises:
          UnsafeCheckpoint: for anything but tensors and containers, by name.
          CheckpointError: if the pickle is broken or cut off.
        """
        try:
            while True:
                op = self._take(1)[0]
                if op == 0x2E:  # STOP
                    return self._pop()
                action = _ACTIONS.get(op)
                if action is None:
                    self._refuse(f"opcode {bytes([op])!r}, which torch never writes")
                self._charge(1)
                action(self)
        except CheckpointError:
            raise
        except (
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            struct.error,
            UnicodeError,
        ) as error:
            raise CheckpointError(
                f"{self._where}: the pickle is broken near byte {self.end} "
                f"({type(error).__name__})."
            ) from None

    # ------------------------------------------------------------------ the stack

    def _take(self, count: int) -> bytes:
        piece = self._data[self.end : self.end + count]
        if len(piece) < count:
            raise CheckpointError(
                f"{self._where}: the pickle is cut off, or longer than {MAX_PICKLE} bytes."
            )
        self.end += count
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _line(self) -> str:
        stop = self._data.find(b"\n", self.end, self.end + 1000)
        if stop < 0:
            raise CheckpointError(f"{self._where}: the pickle is cut off in a name.")
        return self._take(stop + 1 - self.end)[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise IndexError
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _charge(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            self._refuse(f"more than {MAX_STEPS} steps")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsafeCheckpoint(
            f"{self._where}: the pickle holds {what}. Only tensors and plain containers are read; "
            "if you trust the file, convert it to safetensors where it was made."
        )

    # ------------------------------------------------------------------ opcodes

    def _memoize(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _symbol(self, module: Any, name: Any) -> None:
        pair = (module, name)
        if not (isinstance(module, str) and isinstance(name, str)):
            self._refuse("a name that is no text")
        known = (
            pair in _CALLS
            or pair in _INERT
            or pair in _TYPES
            or pair in _UNTYPED
            or pair in _GETATTR
            or _is_named(module, name)
            or (module == "torch" and (name in _STORAGES or name in DTYPES))
        )
        if not known:
            self._refuse(ascii(f"{module[:200]}.{name[:200]}")[1:-1])
        self._push(Symbol(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._symbol(module, name)

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        self._push(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """What an admitted constructor makes of its arguments."""
        if not isinstance(function, Symbol) or not isinstance(args, tuple):
            self._refuse(f"a call of {_brief(function)}")
        pair = (function.module, function.name)
        if pair in _INERT or pair in _TYPES & _CALLABLE or _is_class(*pair):
            return Placeholder(str(function))
        if pair in _GETATTR and len(args) == 2 and isinstance(args[0], Symbol):
            if _is_named(args[0].module, f"{args[0].name}.{args[1]}"):
                return Placeholder(f"{args[0]}.{args[1]}")
        if pair not in _CALLS:
            self._refuse(f"a call of {function}")
        return _CALLS[pair](self, *args)

    def _newobj(self) -> None:
        args, cls = self._pop(), self._pop()
        self._push(self.call(cls, args))

    def _build(self) -> None:
        self._pop()  # the state: attributes of an OrderedDict (_metadata) or of a placeholder
        target = self._stack[-1]
        if not isinstance(target, dict | Placeholder | TensorRef):
            self._refuse(f"attributes for {_brief(target)}")

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            self._refuse(f"items for {_brief(target)}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise ValueError
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[self._key(key)] = value
        elif not isinstance(target, Placeholder):
            self._refuse(f"entries for {_brief(target)}")

    def _key(self, key: Any) -> Any:
        # Hashing a deep tuple can exhaust the C stack, and huge keys collide: keys are flat.
        flat = key if isinstance(key, tuple) else (key,)
        if len(flat) > 8 or not all(isinstance(k, _KEY_TYPES) for k in flat):
            self._refuse(f"a dictionary key that is {_brief(key)}")
        if any(isinstance(k, int) and abs(k) >= 1 << 63 for k in flat):
            self._refuse("a dictionary key of more than 63 bits")
        return key

    def _persistent(self) -> None:
        pid = self._pop()
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            self._refuse("a reference to something that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) == 6 else None
        if not isinstance(kind, Symbol) or not isinstance(key, str) or not _is_size(count):
            self._refuse("a storage without a proper type, key and size")
        if kind.module == "torch" and kind.name in _STORAGES:
            dtype: str | None = _STORAGES[kind.name]
        elif (kind.module, kind.name) in _UNTYPED:
            dtype = None
        else:
            self._refuse(f"a storage of type {kind}")
        storage = StorageRef(key, dtype, count)
        known = self.storages.setdefault(key, storage)
        if known != storage:
            self._refuse(f"storage {key[:50]!r} twice, with different sizes or types")
        if view is not None:  # legacy files: (key of the view, first element, elements)
            if not (isinstance(view, tuple) and len(view) == 3 and all(map(_is_size, view[1:]))):
                self._refuse("a view of a storage without a proper place")
            if view[1] + view[2] > count:
                self._refuse(f"a view that leaves its storage {key[:50]!r}")
            storage = StorageRef(key, dtype, view[2], view[1])
        self._push(storage)

    # ------------------------------------------------------------------ admitted calls

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
        if not isinstance(storage, StorageRef) or storage.dtype is None:
            self._refuse("a tensor without a typed storage")
        return self._view(storage, storage.dtype, storage.count, offset, shape, strides)

    def _tensor_v3(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        *rest: Any,
    ) -> TensorRef:
        if not isinstance(storage, StorageRef) or storage.dtype is not None:
            self._refuse("a tensor without an untyped storage")
        if not isinstance(dtype, Symbol) or dtype.module != "torch" or dtype.name not in DTYPES:
            self._refuse(f"a tensor of type {_brief(dtype)}")
        count = storage.count // DTYPES[dtype.name].itemsize
        return self._view(storage, dtype.name, count, offset, shape, strides)

    def _view(
        self, storage: StorageRef, dtype: str, count: int, offset: Any, shape: Any, strides: Any
    ) -> TensorRef:
        if not (isinstance(shape, tuple) and isinstance(strides, tuple) and _is_size(offset)):
            self._refuse("a tensor without a proper shape")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            self._refuse(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
        if not all(map(_is_size, shape + strides)):
            self._refuse("a tensor with negative or non-integer sizes or strides")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if offset > count or (element_count(shape) and last >= count):
            self._refuse(
                f"a tensor of shape {shape} with strides {strides} from {offset}, "
                f"beyond the {count} elements of its storage {storage.key[:50]!r}"
            )
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            self._refuse(f"more than {MAX_TENSORS} tensors")
        return TensorRef(storage, dtype, offset, shape, strides)

    def _parameter(self, tensor: Any, *rest: Any) -> TensorRef:
        if not isinstance(tensor, TensorRef):
            self._refuse("a parameter that is no tensor")
        return tensor

    def _subclass(self, function: Any, kind: Any, args: Any, state: Any) -> TensorRef:
        plain = (Symbol("torch", "Tensor"), Symbol("torch.nn.parameter", "Parameter"))
        if kind not in plain or not isinstance(function, Symbol) or function not in _REBUILDS:
            self._refuse(f"a tensor of class {_brief(kind)}")
        return self.call(function, args)

    def _ordered_dict(self, *args: Any) -> dict:
        if not args:
            return {}
        if len(args) == 1 and isinstance(args[0], dict):
            return args[0]
        if len(args) != 1 or not isinstance(args[0], list):
            self._refuse("a dictionary made of neither pairs nor a dictionary")
        self._charge(len(args[0]))
        result = {}
        for pair in args[0]:
            key, value = pair
            result[self._key(key)] = value
        return result

    def _default_dict(self, factory: Any = None, *args: Any) -> dict:
        return self._ordered_dict(*args)

    def _set(self, *args: Any) -> tuple:
        if len(args) > 1 or (args and not isinstance(args[0], list | tuple)):
            self._refuse("a set that is not made of a list")
        self._charge(len(args[0]) if args else 0)
        return tuple(args[0]) if args else ()

    def _size(self, *args: Any) -> tuple:
        if len(args) != 1 or not isinstance(args[0], list | tuple):
            self._refuse("a torch.Size that is not made of a tuple")
        self._charge(len(args[0]))
        return tuple(args[0])

    def _encode(self, text: Any, coding: Any = "utf-8", *rest: Any) -> bytes:
        if not isinstance(text, str) or coding not in ("latin1", "utf-8", "ascii"):
            self._refuse("text in an unknown coding")
        self._charge(len(text) // 64)
        return text.encode(coding)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _brief(value: Any) -> str:
    return str(value)[:200] if isinstance(value, Symbol) else f"a {type(value).__name__}"


def _integer(machine: PickleMachine, length: int) -> None:
    if not 0 <= length <= 64:
        machine._refuse(f"an integer of {length} bytes")
    machine._push(int.from_bytes(machine._take(length), "little", signed=True))


def _text(machine: PickleMachine, length: int) -> None:
    machine._push(machine._take(length).decode("utf-8", "surrogatepass"))


def _protocol(machine: PickleMachine) -> None:
    version = machine._number("B")
    if version > 5:
        machine._refuse(f"protocol {version}, which is unknown")


def _tuple_of(count: int) -> Callable[[PickleMachine], None]:
    def action(machine: PickleMachine) -> None:
        machine._push(tuple(reversed([machine._pop() for _ in range(count)])))

    return action


def _top(machine: PickleMachine) -> Any:
    value = machine._pop()
    machine._push(value)
    return value


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): PickleMachine._tensor,
    ("torch._utils", "_rebuild_tensor_v2"): PickleMachine._tensor,
    ("torch._utils", "_rebuild_tensor_v3"): PickleMachine._tensor_v3,
    ("torch._utils", "_rebuild_parameter"): PickleMachine._parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): PickleMachine._parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): PickleMachine._subclass,
    ("torch", "Size"): PickleMachine._size,
    ("collections", "OrderedDict"): PickleMachine._ordered_dict,
    ("collections", "Counter"): PickleMachine._ordered_dict,
    ("collections", "defaultdict"): PickleMachine._default_dict,
    ("builtins", "set"): PickleMachine._set,
    ("builtins", "frozenset"): PickleMachine._set,
    ("__builtin__", "set"): PickleMachine._set,
    ("__builtin__", "frozenset"): PickleMachine._set,
    ("_codecs", "encode"): PickleMachine._encode,
}
_REBUILDS = {Symbol(*pair) for pair in _CALLS if pair[0] == "torch._utils"}

_ACTIONS: dict[int, Callable[[PickleMachine], Any]] = {
    ord(code): action
    for code, action in {
        b"\x80": _protocol,
        b"\x95": lambda m: m._number("Q"),  # FRAME: its length is of no use here
        b"(": lambda m: m._marks.append(len(m._stack)),
        b"0": lambda m: m._pop(),
        b"1": lambda m: m._since_mark(),
        b"2": lambda m: m._push(_top(m)),
        b"N": lambda m: m._push(None),
        b"\x88": lambda m: m._push(True),
        b"\x89": lambda m: m._push(False),
        b"J": lambda m: m._push(m._number("i")),
        b"K": lambda m: m._push(m._number("B")),
        b"M": lambda m: m._push(m._number("H")),
        b"\x8a": lambda m: _integer(m, m._number("B")),
        b"\x8b": lambda m: _integer(m, m._number("i")),
        b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
        b"X": lambda m: _text(m, m._number("I")),
        b"\x8c": lambda m: _text(m, m._number("B")),
        b"\x8d": lambda m: _text(m, m._number("Q")),
        b"U": lambda m: m._push(m._take(m._number("B")).decode("latin1")),  # Python 2 str
        b"T": lambda m: m._push(m._take(m._number("I")).decode("latin1")),
        b"C": lambda m: m._push(m._take(m._number("B"))),
        b"B": lambda m: m._push(m._take(m._number("I"))),
        b"\x8e": lambda m: m._push(m._take(m._number("Q"))),
        b"\x96": lambda m: m._push(m._take(m._number("Q"))),  # BYTEARRAY8
        b")": lambda m: m._push(()),
        b"t": lambda m: m._push(tuple(m._since_mark())),
        b"\x85": _tuple_of(1),
        b"\x86": _tuple_of(2),
        b"\x87": _tuple_of(3),
        b"]": lambda m: m._push([]),
        b"l": lambda m: m._push(m._since_mark()),
        b"a": lambda m: m._append([m._pop()]),
        b"e": lambda m: m._append(m._since_mark()),
        b"}": lambda m: m._push({}),
        b"s": lambda m: m._set_items([m._pop(), m._pop()][::-1]),
        b"u": lambda m: m._set_items(m._since_mark()),
        b"\x8f": lambda m: m._push([]),  # EMPTY_SET: its items are kept as a list
        b"\x90": lambda m: m._append(m._since_mark()),
        b"\x91": lambda m: m._push(tuple(m._since_mark())),
        b"q": lambda m: m._memoize(m._number("B")),
        b"r": lambda m: m._memoize(m._number("I")),
        b"\x94": lambda m: m._memoize(len(m._memo)),
        b"h": lambda m: m._push(m._memo[m._number("B")]),
        b"j": lambda m: m._push(m._memo[m._number("I")]),
        b"c": lambda m: m._symbol(m._line(), m._line()),
        b"\x93": lambda m: m._stack_global(),
        b"R": lambda m: m._reduce(),
        b"\x81": lambda m: m._newobj(),
        b"\x92": lambda m: (m._pop(), m._newobj()),  # NEWOBJ_EX: keywords are of no use here
        b"b": lambda m: m._build(),
        b"Q": lambda m: m._persistent(),
    }.items()
}
