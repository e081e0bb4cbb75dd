"""The calibration cache: one JSON file, ranges and TensorRT's own caches by key."""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import Any

from .._arguments import replace_file
from .._errors import CalibrationError

_FORMAT = "trtx_py calibration cache"
_VERSION = 1
#: Ranges are float32 in the model.
LARGEST_RANGE = float.fromhex("0x1.fffffep127")


class CacheFile:
    """Reads and replaces one file; entries of other models, data and methods stay.

    Raises CalibrationError if the file is there and is no such cache, or cannot be read: it is never overwritten then.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def read_ranges(self, key: str) -> dict[str, float] | None:
        """Ranges by tensor, None if there are none for this key."""
        found = self._entries().get(key)
        if not isinstance(found, dict):
            return None
        if not all(_is_range(value) for value in found.values()):
            raise self._damaged(f"entry {key[:16]}... has ranges that are no positive numbers")
        return {name: float(value) for name, value in found.items()}

    def write_ranges(self, key: str, ranges: dict[str, float]) -> None:
        """Add or replace an entry."""
        self._write(key, ranges)

    def read_blob(self, key: str) -> bytes | None:
        """What TensorRT's calibrator left, None if there is nothing for this key."""
        found = self._entries().get(key)
        if not isinstance(found, str):
            return None
        try:
            return base64.b64decode(found, validate=True)
        except binascii.Error as error:
            raise self._damaged(f"entry {key[:16]}... is not base64") from error

    def write_blob(self, key: str, blob: bytes) -> None:
        """Add or replace an entry."""
        self._write(key, base64.b64encode(blob).decode())

    def _write(self, key: str, value: Any) -> None:
        content = {"format": _FORMAT, "version": _VERSION, "entries": {**self._entries(), key: value}}
        replace_file(self._path, json.dumps(content, indent=1).encode(), "calibration cache")

    def _entries(self) -> dict[str, Any]:
        if not os.path.lexists(self._path):
            return {}
        try:
            with open(self._path, encoding="utf-8") as file:
                content = json.load(file)
        except OSError as error:
            raise CalibrationError(f"calibration cache {self._path!r} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise self._damaged(f'it does not say "format": "{_FORMAT}"')
        entries = content.get("entries")
        if content.get("version") != _VERSION or not isinstance(entries, dict):
            raise self._damaged(f"it is of version {content.get('version')!r}, expected {_VERSION}")
        return entries

    def _damaged(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"{self._path!r} is no calibration cache, or a damaged one ({why}); delete it, or name another file"
        )


def _is_range(value: Any) -> bool:
    # Comparing holds for integers that no float can take, and is false for NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST_RANGE
