"""Values of configuration files and shapes, of the right type or an error that names them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_MAX_JSON = 2**26  # bytes; the index of the largest released checkpoint has 2**17


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file if it holds none, or a name twice."""
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} bytes")
        text = file.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is not JSON that can be read: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; an object is needed")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def integer(values: Mapping[str, Any], name: str) -> int:
    """A positive integer; KeyError if it is missing, ValueError if it is something else."""
    return _positive(name, values[name])


def integers(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A list of positive integers; errors as in integer()."""
    return tuple(_positive(name, value) for value in _list(values, name))


def numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A list of finite numbers; errors as in integer()."""
    found = _list(values, name)
    wrong = [v for v in found if type(v) not in (int, float) or not math.isfinite(v)]
    if wrong:
        raise ValueError(f"{name} has {wrong[0]!r}; finite numbers are needed")
    return tuple(map(float, found))


def booleans(values: Mapping[str, Any], name: str) -> tuple[bool, ...]:
    """A list of true and false; errors as in integer()."""
    found = _list(values, name)
    wrong = [value for value in found if type(value) is not bool]
    if wrong:
        raise ValueError(f"{name} has {wrong[0]!r}; true or false is needed")
    return tuple(found)


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} is {value!r}; a positive integer is needed")
    return value


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values[name]
    if not isinstance(found, list | tuple):
        raise ValueError(f"{name} is {found!r}; a list is needed")
    return list(found)


def sizes(shapes: Mapping[str, tuple[int, ...]], name: str, *, axes: int) -> tuple[int, ...]:
    """Shape of a tensor of this many axes; ValueError if it has others, is empty or missing."""
    if name not in shapes:
        raise ValueError(f"there is no tensor {name}")
    found = shapes[name]
    if len(found) != axes or 0 in found:
        raise ValueError(f"{name} has shape {list(found)}; {axes} axes are needed, none of them 0")
    return found
