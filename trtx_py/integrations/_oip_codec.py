"""Bodies of the Open Inference Protocol: JSON, with or without binary tensors behind it, to arrays and back.

Pure functions on bytes; no server. What they refuse they refuse with InvalidArgumentError, whatever the bytes are.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from trtx_py import DTypeError, InvalidArgumentError, ShapeError

Array = np.ndarray[Any, Any]

#: The protocol's names of element types, and what numpy calls them. BYTES has no fixed size, and TensorRT no such type.
DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_NOTHING = np.empty(0)
_NARROW = (DATATYPES["FP16"], DATATYPES["BF16"])
_NO_PARAMETERS: dict[str, Any] = {}
_LENGTH = "Inference-Header-Content-Length"
_NOT_JSON = "the body is not JSON"
#: How many different headers are kept for each model, and how long they may be.
_KEPT, _KEPT_BYTES = 256, 2048
_ANY_SHAPE_RANK = 32  # as many dimensions as every version of numpy has


@dataclass(frozen=True)
class TensorMetadata:
    """One input or output as the protocol describes it.

    Attributes:
        name: as requests name it.
        datatype: the protocol's name: BOOL, INT8 to INT64, UINT8 to UINT64, FP16, FP32, FP64, BF16.
        shape: -1 for a dimension that requests choose.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise InvalidArgumentError(f"tensor {self.name!r}: {_unknown_datatype(self.datatype)}")

    def described(self) -> dict[str, Any]:
        """For the metadata endpoint."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass
class InferRequest:
    """A request that was read: arrays are views of the body where it carried them in binary.

    Attributes:
        id: echoed; None where there was none.
        inputs: by name.
        outputs: names that were asked for, with whether each goes back in binary; None: all.
        binary: whether outputs go back in binary where it is not said for each.
        parameters: of the request.
    """

    inputs: dict[str, Array]
    id: str | None = None
    outputs: list[tuple[str, bool]] | None = None
    binary: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name. Raises DTypeError where it has none, such as for 8-bit floats."""
    name = _NAMES.get(dtype)
    if name is None:
        raise DTypeError(
            f"the Open Inference Protocol has no datatype for {dtype.name}; it has {', '.join(DATATYPES)}: "
            "cast it inside the model"
        )
    return name


class _Binary(NamedTuple):
    """A tensor that lies behind the JSON."""

    name: str
    dtype: np.dtype[Any]
    shape: list[int]
    elements: int
    nbytes: int


class _Header(NamedTuple):
    """What the JSON of a request says; it fits the model. What is behind it has not been looked at.

    ``arrays`` has all inputs in their order; empty ones stand for those behind the JSON.
    """

    id: str | None
    outputs: list[tuple[str, bool]] | None
    binary: bool
    parameters: Mapping[str, Any]
    arrays: dict[str, Array]
    behind: list[_Binary]


class RequestReader:
    """Reads the requests for one model.

    A client whose tensors are binary sends the same JSON again and again; so it is read once, and kept while there are
    few of them. Not thread-safe: for one event loop.
    """

    def __init__(self, inputs: Mapping[str, TensorMetadata], outputs: Mapping[str, Any]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._headers: dict[bytes, _Header] = {}

    def __call__(self, body: bytes | bytearray, header_length: int | None) -> InferRequest:
        """The request in a body.

        Args:
            body: as received; arrays that came in binary are read-only views of it, so leave it as it is.
            header_length: Inference-Header-Content-Length: how much of it is JSON; None for all.
        Raises:
            InvalidArgumentError, DTypeError, ShapeError: the body is damaged or does not fit the model.
        """
        if header_length is None:
            header = self._read(_read_json(body, f"{_NOT_JSON}; if tensors follow it, send {_LENGTH}"))
            offset = len(body)
        else:
            offset = header_length
            if offset > len(body):
                raise InvalidArgumentError(f"{_LENGTH} is {offset}, and the body has {len(body)} bytes")
            text = bytes(body[:offset])
            known = self._headers.get(text)
            header = self._read_kept(text) if known is None else known
        arrays = header.arrays.copy()
        for tensor in header.behind:
            arrays[tensor.name] = _view(tensor, body, offset)
            offset += tensor.nbytes
        if offset != len(body):
            raise InvalidArgumentError(
                f"the body has {len(body) - offset} bytes more than its inputs take; expected each binary input's "
                f"binary_data_size, and {_LENGTH}, to add up to it"
            )
        return InferRequest(arrays, header.id, header.outputs, header.binary, header.parameters)

    def _read_kept(self, text: bytes) -> _Header:
        header = self._read(_read_json(text, _NOT_JSON))
        if header.id is None and len(header.behind) == len(header.arrays) and len(text) <= _KEPT_BYTES:
            if len(self._headers) >= _KEPT:
                self._headers.clear()
            self._headers[text] = header
        return header

    def _read(self, found: Mapping[str, Any]) -> _Header:
        parameters = _parameters(found, "the request")
        binary = _flag(parameters, "binary_data_output", "the request")
        identity = _read_id(found)
        entries = found.get("inputs")
        if type(entries) is not list:
            raise InvalidArgumentError(f"inputs is {_kind(entries)}; expected a list of tensors")
        arrays: dict[str, Array] = {}
        behind: list[_Binary] = []
        for entry in entries:
            name, metadata = _known(entry, self._inputs, "input")
            if name in arrays:
                raise InvalidArgumentError(f"input {name!r} is given twice")
            tensor = _read_tensor(name, metadata, entry)
            if isinstance(tensor, _Binary):
                behind.append(tensor)
                arrays[name] = _NOTHING
            else:
                arrays[name] = tensor
        if len(arrays) != len(self._inputs):
            missing = ", ".join(repr(name) for name in self._inputs if name not in arrays)
            raise InvalidArgumentError(f"inputs are missing: {missing}")
        wanted = found.get("outputs")
        outputs = None
        if wanted is not None and wanted != []:
            outputs = _read_outputs(wanted, self._outputs, binary)
        return _Header(identity, outputs, binary, parameters, arrays, behind)


class _Named(float):
    """What JSON has by name: NaN, Infinity or -Infinity. A number that Python reads as infinite is merely too large."""


def _read_json(text: bytes | bytearray, refusal: str) -> dict[str, Any]:
    try:
        found = json.loads(str(text, "utf-8"), parse_constant=_Named)
    except RecursionError:
        raise InvalidArgumentError("the body's JSON is nested too deeply") from None
    except ValueError as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise InvalidArgumentError(f"{refusal} ({error})") from None
    if type(found) is not dict:
        raise InvalidArgumentError(f"the body is {_kind(found)}; expected an object with inputs")
    return found


def _read_id(found: Mapping[str, Any]) -> str | None:
    value = found.get("id")
    if value is not None and type(value) is not str:
        raise InvalidArgumentError(f"id is {_kind(value)}; expected a string")
    return value


def _parameters(entry: Mapping[str, Any], what: str) -> dict[str, Any]:
    value = entry.get("parameters", _NO_PARAMETERS)
    if type(value) is not dict:
        raise InvalidArgumentError(f"parameters of {what} is {_kind(value)}; expected an object")
    if value:
        for name in ("shared_memory_region", "classification"):
            if value.get(name):
                raise InvalidArgumentError(f"parameter {name} of {what} is not supported; send and fetch the tensor")
    return value


def _flag(parameters: Mapping[str, Any], name: str, what: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InvalidArgumentError(f"{name} of {what} is {_kind(value)}; expected true or false")
    return value


def _known(entry: Any, known: Mapping[str, Any], what: str) -> tuple[str, Any]:
    if type(entry) is not dict:
        raise InvalidArgumentError(f"an {what} is {_kind(entry)}; expected an object with a name")
    name = entry.get("name")
    if type(name) is not str or name not in known:
        raise InvalidArgumentError(f"there is no {what} {_shown(name)}; the model has {', '.join(map(repr, known))}")
    return name, known[name]


def _read_outputs(wanted: Any, known: Mapping[str, Any], binary: bool) -> list[tuple[str, bool]]:
    if type(wanted) is not list:
        raise InvalidArgumentError(f"outputs is {_kind(wanted)}; expected a list")
    chosen: list[tuple[str, bool]] = []
    for entry in wanted:
        name, _ = _known(entry, known, "output")
        if any(name == other for other, _ in chosen):
            raise InvalidArgumentError(f"output {name!r} is asked for twice")
        what = f"output {name!r}"
        chosen.append((name, _flag(_parameters(entry, what), "binary_data", what, binary)))
    return chosen


def _read_tensor(name: str, metadata: TensorMetadata, entry: Mapping[str, Any]) -> Array | _Binary:
    datatype = entry.get("datatype")
    if datatype != metadata.datatype:
        if type(datatype) is not str or datatype not in DATATYPES:
            raise DTypeError(f"input {name!r}: {_unknown_datatype(datatype)}; the model takes {metadata.datatype}")
        raise DTypeError(f"input {name!r} has datatype {datatype}; the model takes {metadata.datatype}")
    dtype = DATATYPES[metadata.datatype]
    shape = entry.get("shape")
    if type(shape) is not list or len(shape) > _ANY_SHAPE_RANK or any(type(n) is not int or n < 0 for n in shape):
        raise ShapeError(f"input {name!r} has shape {_shown(shape)}; expected a list of dimensions, none negative")
    count = math.prod(shape)
    nbytes = _parameters(entry, f"input {name!r}").get("binary_data_size")
    if nbytes is None:
        return _shaped(name, _from_json(name, dtype, count, entry), shape)
    if type(nbytes) is not int or nbytes != count * dtype.itemsize:
        raise ShapeError(
            f"input {name!r} has binary_data_size {_shown(nbytes)}; its shape {_shown(shape)} and datatype take "
            f"{count * dtype.itemsize}"
        )
    if "data" in entry:
        raise InvalidArgumentError(f"input {name!r} has both data and binary_data_size; expected one of them")
    return _Binary(name, dtype, shape, count, nbytes)


def _view(tensor: _Binary, body: bytes | bytearray, offset: int) -> Array:
    """The tensor where it lies in the body."""
    name, dtype, shape, count, nbytes = tensor
    if offset + nbytes > len(body):
        raise ShapeError(
            f"input {name!r} has binary_data_size {nbytes}, and {len(body) - offset} bytes are left of the body"
        )
    if not count:  # of which numpy makes no view
        return _shaped(name, np.empty(0, dtype), shape)
    array = _shaped(name, np.frombuffer(body, dtype, count, offset), shape)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise InvalidArgumentError(f"input {name!r} is BOOL and has bytes other than 0 and 1")
    return array


def _shaped(name: str, array: Array, shape: list[int]) -> Array:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:  # more dimensions or elements than an array can have
        raise ShapeError(f"input {name!r} has shape {_shown(shape)}, which no array has ({error})") from None


def _from_json(name: str, dtype: np.dtype[Any], count: int, entry: Mapping[str, Any]) -> Array:
    """Numbers of JSON, flat or nested, as the type they were declared, if none of them changes."""
    if "data" not in entry:
        raise InvalidArgumentError(f"input {name!r} has no data; expected data, or binary_data_size in its parameters")
    data = entry["data"]
    if type(data) is not list:
        data = [data]
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        raise InvalidArgumentError(f"input {name!r} has data that is ragged or no numbers") from None
    if array.size != count:
        raise ShapeError(f"input {name!r} has {array.size} values in data; its shape takes {count}")
    kinds = {"b": "b", "i": "iu", "u": "iu"}.get(dtype.kind, "iuf")
    if not count:
        return np.empty(0, dtype)
    if array.dtype.kind not in kinds:
        exact = _exact(data, array, kinds)
        if exact is None:
            raise DTypeError(f"input {name!r} has data of another kind than {dtype.name}: {_shown(array.flat[0])}, ...")
        array = exact
    if kinds != "b" and bool in _types(data):  # numpy takes them for 0 and 1 where they are among numbers
        raise DTypeError(f"input {name!r} has truth values among its data; expected numbers, it is {dtype.name}")
    array = array.reshape(-1)
    if kinds == "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DTypeError(f"input {name!r} has values beyond {dtype.name}, {limits.min} to {limits.max}")
        return array.astype(dtype)
    try:
        array = array.astype(np.float64) if array.dtype.kind == "O" else array
    except OverflowError:
        raise DTypeError(f"input {name!r} has values beyond the largest {dtype.name}") from None
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
    infinite = np.isinf(converted)
    if kinds == "iuf" and infinite.any():
        named = [type(value) is _Named for value in np.asarray(data, np.object_).flat]
        if not np.array_equal(infinite, infinite & named):
            raise DTypeError(f"input {name!r} has values beyond the largest {dtype.name}")
    return converted


def _types(data: list[Any]) -> set[type]:
    """Of all values of a list that may be nested."""
    found = set(map(type, data))
    if list in found:
        found.update(*(_types(value) for value in data if type(value) is list))
    return found


def _exact(data: list[Any], array: Array, kinds: str) -> Array | None:
    """Numbers of which some exceed 63 bits, which numpy reads as floats or objects: as Python's own. Else None."""
    if array.dtype.kind in "fO" and kinds != "b":
        objects = np.asarray(data, np.object_)
        if all(type(value) is int or (isinstance(value, float) and "f" in kinds) for value in objects.flat):
            return objects
    return None


@functools.lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    return json.dumps(text)


def write_response(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, Array]
) -> tuple[bytes, list[memoryview]]:
    """The JSON of an answer, and the binary tensors that follow it: views of the arrays, which must not change.

    Raises:
        DTypeError: an output has a type that the protocol lacks.
        KeyError: an output that was asked for was not made.
    """
    chosen: Sequence[tuple[str, bool]]
    chosen = request.outputs if request.outputs is not None else [(name, request.binary) for name in outputs]
    entries: list[str] = []
    tensors: list[memoryview] = []
    for name, binary in chosen:
        array = np.asarray(outputs[name])
        datatype = datatype_of(array.dtype)
        flat = array.reshape(-1)  # of a view that is not contiguous this is a copy, which it needs anyway
        head = f'{{"name":{_quoted(name)},"datatype":"{datatype}","shape":{list(array.shape)}'
        if binary:
            entries.append(f'{head},"parameters":{{"binary_data_size":{array.nbytes}}}}}')
            tensors.append(flat.view(np.uint8).data)
        else:
            with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
                numbers = flat.astype(np.float32) if array.dtype in _NARROW else flat
            entries.append(f'{head},"data":{json.dumps(numbers.tolist())}}}')
    identity = "" if request.id is None else f'"id":{json.dumps(request.id)},'
    names = f'"model_name":{_quoted(model)},"model_version":{_quoted(version)}'
    text = f'{{{names},{identity}"outputs":[{",".join(entries)}]}}'
    return text.encode(), tensors


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "missing"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """For a message: what a client sent may be long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown_datatype(datatype: Any) -> str:
    if datatype == "BYTES":
        return "datatype BYTES is not supported, TensorRT has no strings; send numbers"
    return f"there is no datatype {_shown(datatype)}; there are {', '.join(DATATYPES)}"
