"""Values as they are written on a command line: sizes, shapes, ranges, names with files."""

from __future__ import annotations

import math
import os
import re
import stat
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

Shape = tuple[int, ...]

if TYPE_CHECKING:
    _Bytes = click.ParamType[int]
    _Text = click.ParamType[str]
    _ByName = click.ParamType[dict[str, Shape]]
    _Profile = click.ParamType[dict[str, tuple[Shape, Shape, Shape]]]
    _Named = click.ParamType[tuple[str, str]]
else:  # generic since click 8.4 only
    _Bytes = _Text = _ByName = _Profile = _Named = click.ParamType

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B|B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LARGEST = (1 << 63) - 1  # of sizes and of axes, in TensorRT and in numpy


class Word(_Text):
    """A name, of what it may be; not an empty one, as an unset variable of a shell leaves it."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails for a name without letters."""
        if not str(value).strip():
            self.fail(f"{value!r} is no name", param, ctx)
        return str(value)


class Size(_Bytes):
    """Bytes: ``1073741824``, ``1024M``, ``1GiB``; K, M, G and T are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Fails for what is no size."""
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no size; expected bytes, or a number with K, M or G such as 512M", param, ctx)
        size = int(Fraction(found[1]) * _FACTORS[found[2].upper()]) if len(found[1]) < 40 else _LARGEST + 1
        if size > _LARGEST:
            self.fail(f"{value!r:.60} is more than a size can be, {_LARGEST} bytes", param, ctx)
        return size


class Capability(_Text):
    """A GPU architecture, such as ``8.9``."""

    name = "capability"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails for what is no architecture."""
        if re.fullmatch(r"\d+\.\d+", str(value)) is None:
            self.fail(f"{value!r} is no compute capability; expected two numbers such as 8.9", param, ctx)
        return str(value)


def shape_of(text: str) -> Shape:
    """``1x3x224x224`` as a tuple, ``scalar`` as an empty one. Raises ValueError."""
    if text == "scalar":
        return ()
    parts = text.split("x")
    if not all(re.fullmatch(r"-?[0-9]{1,18}", part) for part in parts):
        raise ValueError
    return tuple(int(part) for part in parts)


class Shapes(_ByName):
    """A shape for each input: ``image:1x3x224x224,mask:1x224``. An input's name may have colons of its own."""

    name = "shapes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Shape]:
        """Fails for what is no list of shapes."""
        if isinstance(value, dict):
            return value
        found: dict[str, Shape] = {}
        for part in str(value).split(","):
            name, colon, text = part.rpartition(":")
            name = name.strip().strip("'\"")
            try:
                if not colon or not name:
                    raise ValueError
                shape = shape_of(text.strip())
            except ValueError:
                self.fail(f"{part!r} is no input with its shape; expected NAME:1x3x224x224", param, ctx)
            if name in found:  # one of the two would be forgotten
                self.fail(f"{name!r} has two shapes; give one", param, ctx)
            found[name] = shape
        return found


class Ranges(_Profile):
    """One optimization profile: ``image:1x3x8x8:4x3x8x8:8x3x8x8,...``, each with its least, best and largest shape."""

    name = "ranges"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, tuple[Shape, Shape, Shape]]:
        """Fails for what is no profile; a number alone is what trtexec's --profile takes, and is not ours."""
        if isinstance(value, dict):
            return value
        if str(value).isdigit():
            self.fail(
                f"{value!r} is a number, as trtexec has it; here each --profile is a whole one: NAME:MIN:OPT:MAX",
                param, ctx,
            )  # fmt: skip
        found: dict[str, tuple[Shape, Shape, Shape]] = {}
        for part in str(value).split(","):
            pieces = part.rsplit(":", 3)
            try:
                name, low, best, high = (piece.strip() for piece in pieces)
                limits = (shape_of(low), shape_of(best), shape_of(high))
                if not name:
                    raise ValueError
            except ValueError:
                self.fail(f"{part!r} is no range; expected NAME:MIN:OPT:MAX such as x:1x8:4x8:32x8", param, ctx)
            if name in found:
                self.fail(f"{name!r} has two ranges; a second profile needs a --profile of its own", param, ctx)
            found[name] = limits
        return found


class Pair(_Named):
    """``NAME=VALUE``; with a colon in place of the equals sign too, as trtexec has it."""

    name = "name=value"

    def __init__(self, *, optional: bool = False) -> None:
        self._optional = optional

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Fails where there is no name, unless it may be left out."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        name, sign, rest = text.partition("=")
        if not sign:
            name, sign, rest = text.rpartition(":")
        if sign and name and rest:
            return name, rest
        if self._optional and text and not sign:
            return "", text
        self.fail(f"{text!r} has no name; expected NAME=VALUE", param, ctx)


class Number(click.FloatRange):
    """As click's range of floats, which takes NaN: it is neither too small nor too large. No infinity either, unless
    ``infinite``."""

    name = "number"  # which is what click says of a value that is none

    def __init__(
        self, min: float | None = None, max: float | None = None, *, min_open: bool = False, max_open: bool = False,
        infinite: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(min, max, min_open, max_open)
        self._infinite = infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Fails for what is no number."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found) or (math.isinf(found) and not self._infinite):
            self.fail(f"{value!r} is no {'' if self._infinite else 'finite '}number", param, ctx)
        return found


class InputPath(click.Path):
    """A file, or a folder too, that is there. What never ends (a device) or cannot be read twice (a pipe) is refused:
    files are looked at first, and then read."""

    def __init__(self, *, folder: bool = False) -> None:
        super().__init__(exists=True, dir_okay=folder)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails where there is nothing to read."""
        found = os.fspath(super().convert(value, param, ctx))
        assert isinstance(found, str)
        if is_special(found):
            self.fail(f"{found!r} is a pipe or a device; give the path of a file", param, ctx)
        return found


class FolderPath(click.Path):
    """A folder. Click takes a pipe or a device for one: it asks only whether it is a file."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails for what is no folder."""
        found = os.fspath(super().convert(value, param, ctx))
        assert isinstance(found, str)
        if not found:  # what an unset variable of a shell leaves; it would be the current folder
            self.fail("it is empty; expected the path of a folder", param, ctx)
        if is_special(found):
            self.fail(f"{found!r} is a pipe or a device; give the path of a folder", param, ctx)
        return found


class OutputPath(click.Path):
    """A file to write, or to read and write, whose folder is there: known before minutes of work, not behind them.

    Files are replaced, so that nobody sees half of one: a device would be replaced too, and /dev/null be gone.
    """

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Fails where no file can be put."""
        found = os.fspath(super().convert(value, param, ctx))
        assert isinstance(found, str)
        if not found:
            self.fail("it is empty; expected the path of a file", param, ctx)
        if found.endswith(os.sep):
            self.fail(f"{found!r} is the name of a folder; expected the path of a file", param, ctx)
        folder = os.path.dirname(os.path.abspath(found))
        if is_special(found):
            self.fail(f"{found!r} is a pipe or a device; give the path of a file", param, ctx)
        if not os.path.isdir(folder):
            self.fail(f"the folder {folder!r} does not exist", param, ctx)
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(f"the folder {folder!r} cannot be written", param, ctx)
        return found


def is_special(path: str) -> bool:
    """Whether ``path`` is there, and neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


SIZE, SHAPES, RANGES, PAIR, CAPABILITY = Size(), Shapes(), Ranges(), Pair(), Capability()
WORD = Word()
#: Not more than anything counts that far: Python and the libraries behind it take no larger numbers everywhere.
COUNT = click.IntRange(1, (1 << 31) - 1)
_LARGEST_FLOAT32, _LEAST_FLOAT32 = 3.4028234663852886e38, 1.1754943508222875e-38
#: Pixels are reckoned in float32, in which more than that is infinite, and less is 0.
FLOAT32, DIVISOR = Number(-_LARGEST_FLOAT32, _LARGEST_FLOAT32), Number(_LEAST_FLOAT32, _LARGEST_FLOAT32)
FILE, ANY_PATH = InputPath(), InputPath(folder=True)
OUTPUT = OutputPath()
#: Read if it is there, and made or replaced.
KEPT = OutputPath()
