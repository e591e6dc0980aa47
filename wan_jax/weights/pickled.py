"""Pickles of weights, read by a machine that can build names, numbers and tensors and nothing else.

pickle.Unpickler calls what a file names, and its memo lets a few bytes stand for exponentially many
objects. Here each opcode that torch writes for weights has its few lines, every other is an error,
and no global is ever looked up: it stays a name that one of these functions knows or refuses.
"""

import io
import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple, cast

_MAX_BYTES = 2**21  # UMT5's, the largest that is released so, needs under 2**17
_MAX_AXES = 8
_STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_CALLS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
# Names of what is newer than weights in float32, float16 and bfloat16 need.
_NARROW = ("torch.storage.UntypedStorage", "torch._utils._rebuild_tensor_v3", "torch.float8_")
_MARK = object()


class Storage(NamedTuple):
    """A run of numbers in the file: its name there, NumPy's name of their type, and how many."""

    key: str
    dtype: str
    length: int


class Tensor(NamedTuple):
    """Offset and strides count elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    name: str


def load(stream: BinaryIO) -> Any:
    """The object of the pickle that begins here; the stream stands behind it afterwards.

    Dictionaries, lists, tuples, strings, numbers and Tensors can come out. Raises ValueError for
    anything else in the pickle, and for one of more than 2 MiB.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(cast(BinaryIO, _Bounded(stream))):
        machine.step(opcode.name, argument)
    return machine.result()


def loads(data: bytes) -> Any:
    """load() of a pickle that fills these bytes."""
    stream = io.BytesIO(data)
    tree = load(stream)
    if stream.tell() != len(data):
        raise ValueError(f"{len(data) - stream.tell()} bytes follow its pickle")
    return tree


class _Bounded:
    """The part of a stream that a pickle may have: a length in it cannot ask for gigabytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = _MAX_BYTES

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left <= 0:
            raise ValueError(f"its pickle has more than {_MAX_BYTES} bytes")
        return data

    def read(self, size: int) -> bytes:
        return self._take(self._stream.read(min(size, self._left)))

    def readline(self) -> bytes:
        line = self._take(self._stream.readline(self._left))
        if b"\\" in line:  # the library would decode it, with warnings
            raise ValueError("its pickle has a backslash in a name")
        return line


class _Machine:
    """The stack and the memo of a pickle, one opcode at a time."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError("its pickle leaves more or less than one object")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """Do one opcode; ValueError for those that weights do not need."""
        stack = self._stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in _LITERALS:
            stack.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"its pickle refers to object {argument}, which it does not have")
            stack.append(self._memo[argument])
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif opcode == "GLOBAL":
            stack.append(_known(str(argument).replace(" ", ".", 1)))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the opcode {opcode}, which weights do not need")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("its pickle takes an object where there is none")
        return self._stack[-1]

    def _pop(self) -> Any:
        top = self._top()
        self._stack.pop()
        return top

    def _since_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("its pickle takes a group of objects where there is none")
        self._stack.pop()
        return items[::-1]

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(items[::-1]))

    def _marked_tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _mark(self) -> None:
        self._stack.append(_MARK)

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError("its pickle appends to what is no list")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError("its pickle sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise ValueError(f"a name in its pickle is a {type(key).__name__}")
            if key in target:
                raise ValueError(f"{show(key)} is there twice")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("its pickle asks for a global without a name")
        self._stack.append(_known(f"{module}.{name}"))

    def _reduce(self) -> None:
        arguments, call = self._pop(), self._pop()
        if type(call) is not _Global or type(arguments) is not tuple:
            raise ValueError("its pickle calls what is no function of weights")
        self._stack.append(_call(call.name, arguments))

    def _build(self) -> None:
        # What torch sets so is `_metadata` of a state dict, which describes modules: not needed.
        state = self._pop()
        if type(self._top()) is not dict or type(state) is not dict:
            raise ValueError("its pickle sets attributes of what has none")

    def _persistent(self) -> None:
        self._stack.append(_storage(self._pop()))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine._mark,
    "TUPLE": _Machine._marked_tuple,
    "TUPLE1": lambda machine: machine._tuple(1),
    "TUPLE2": lambda machine: machine._tuple(2),
    "TUPLE3": lambda machine: machine._tuple(3),
    "APPEND": lambda machine: machine._extend([machine._pop()]),
    "APPENDS": lambda machine: machine._extend(machine._since_mark()),
    "SETITEM": _Machine._set_item,
    "SETITEMS": lambda machine: machine._set_items(machine._since_mark()),
    "STACK_GLOBAL": _Machine._global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}


def show(text: str) -> str:
    """A string from a file, fit for a line of an error."""
    return repr(text[:100])[1:-1] + ("..." if len(text) > 100 else "")


def _known(name: str) -> _Global:
    if name.startswith(_NARROW):
        raise ValueError(
            f"it asks for {show(name)}, so its tensors are float8 or as narrow; take the file in "
            "bfloat16, float16 or float32"
        )
    if name not in _CALLS and name not in _STORAGES:
        raise ValueError(f"it asks for {show(name)}, which is no part of weights")
    return _Global(name)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name == "torch._utils._rebuild_tensor_v2" and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    parameter = name == "torch._utils._rebuild_parameter" and len(arguments) == 3
    if parameter and type(arguments[0]) is Tensor:
        return arguments[0]
    raise ValueError(f"it calls {show(name)} with what does not belong there")


def _counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _storage(pid: Any) -> Storage:
    """From the reference torch writes: "storage", type, key, device, count, and None or a view."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError("its pickle refers to what is no storage of weights")
    _, kind, key, _, count, *view = pid
    known = type(kind) is _Global and kind.name in _STORAGES
    if not known or type(key) is not str or not _counts([count]) or view not in ([], [None]):
        raise ValueError("its pickle describes a storage that is none of weights")
    return Storage(key, _STORAGES[kind.name], count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    axes = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides)
    if type(storage) is not Storage or not axes or len(shape) > _MAX_AXES:
        raise ValueError("a tensor in its pickle is not described by a storage and numbers")
    if not _counts((offset, *shape, *strides)):
        raise ValueError("a tensor in its pickle has sizes that are no counts")
    return Tensor(storage, offset, shape, strides)
