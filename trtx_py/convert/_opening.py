"""What ``open_engine`` does with a source that is neither ONNX nor a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .._aio import run_shielded
from .._errors import ConversionError, InvalidArgumentError
from .._plan import Plan
from ._convert import convert

Source = Plan | bytes | bytearray | memoryview | str | os.PathLike[str]


async def model_for_engine(source: Source, conversion: Mapping[str, Any] | None) -> Source:
    """``source`` itself if it is ONNX or a plan, or nothing that is known; else the ONNX model made from it.

    Args:
        source: as ``open_engine`` takes it.
        conversion: keyword arguments of ``convert``; given for an ONNX model, that is converted too.

    Raises: as ``convert``.
    """
    if conversion is not None and not isinstance(conversion, Mapping):
        raise InvalidArgumentError(f"conversion is {type(conversion).__name__}; expected arguments of trtx_py.convert")
    if isinstance(source, Plan) or not isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike)):
        if conversion is not None:
            raise InvalidArgumentError("conversion was given, and the source is a plan already; leave it out")
        return source
    try:
        found = await run_shielded(lambda: convert.detect_format(source))
    except InvalidArgumentError:
        return source  # a path that cannot be read: the next to open it says so
    except ConversionError as error:
        if conversion is None and error.format in (None, "onnx", "plan"):
            return source  # damaged: whoever reads models and plans says how
        raise
    if conversion is None and found in ("onnx", "plan"):
        return source
    arguments = {"check_operators": False, **(conversion or {})}  # the build that follows parses it anyway
    try:
        return (await convert(source, **arguments)).source
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise InvalidArgumentError(f"conversion: {error}; expected arguments of trtx_py.convert") from error
