"""The ABI is the one that is written down, and every kind of change to it needs a new version."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from tests.unit.capi.programs import LIBRARY, ROOT, run, tool


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trtxpy_abi", ROOT / "capi" / "abi" / "abi.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


abi = _load()
HEADER = abi.HEADER.read_text(encoding="utf-8")
MAP = abi.MAP.read_text(encoding="utf-8")


class Sources:
    """A copy of the header and the map that a test may change, and the folder of what is written down."""

    _read: ClassVar[dict[tuple[str, str], Any]] = {}  # three runs of the compiler for each

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header, self.map = HEADER, MAP
        self.write_down()

    def read(self) -> Any:
        if (self.header, self.map) not in self._read:
            header, version_map = self.folder / "trtxpy.h", self.folder / "trtxpy.map"
            header.write_text(self.header)
            version_map.write_text(self.map)
            self._read[self.header, self.map] = abi.read(header, version_map)
        return self._read[self.header, self.map]

    def write_down(self) -> None:
        assert abi.update(self.read(), self.folder) == []

    def replace(self, old: str, new: str) -> Sources:
        assert self.header.count(old) == 1, old
        self.header = self.header.replace(old, new)
        return self

    def move(self, major: int, minor: int) -> Sources:
        self.header = re.sub(r"(?m)^(#define TRTXPY_ABI_MAJOR) \d+$", rf"\1 {major}", self.header)
        self.header = re.sub(r"(?m)^(#define TRTXPY_ABI_MINOR) \d+$", rf"\1 {minor}", self.header)
        return self

    def faults(self) -> list[str]:
        return list(abi.check(self.read(), self.folder))


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    tool("gcc")
    return Sources(tmp_path)


VERSION = abi.committed()[-1].version
NEXT_MINOR, NEXT_MAJOR = (VERSION[0], VERSION[1] + 1), (VERSION[0] + 1, 0)


def test_the_header_is_what_is_written_down() -> None:
    tool("gcc")
    assert abi.check(abi.read()) == []


def test_the_library_exports_what_is_declared() -> None:
    if not LIBRARY.is_file():
        pytest.skip("libtrtxpy is not built: scripts/build-native")
    tool("readelf")
    assert abi.library_faults(abi.read(), LIBRARY) == []


def test_the_script_checks_all_of_it() -> None:
    tool("gcc")
    run([str(ROOT / "scripts" / "abi"), "check", "--library", str(LIBRARY)], PYTHON=sys.executable)


def test_a_library_that_exports_something_else_is_found(tmp_path: Path) -> None:
    library = tmp_path / "libother.so"
    (tmp_path / "other.c").write_text("int trtxpy_stray(void) { return 0; }\nint trtxpy_init(void) { return 0; }\n")
    run([tool("gcc"), "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(library)])
    faults = abi.library_faults(abi.read(), library)
    assert any("trtxpy_stray is ; declared: nowhere" in fault for fault in faults)
    assert any("trtxpy_init is ; declared: TRTXPY_1" in fault for fault in faults), "it has no version"
    assert any("trtxpy_submit is missing" in fault for fault in faults)


def test_what_is_written_down_reads_back(sources: Sources) -> None:
    declared = sources.read()
    assert abi.parse_text(declared.text()) == declared
    assert len(declared.functions) > 40
    assert declared.structs["trtxpy_shape"].size == 72
    assert declared.constants["TRTXPY_INTERNAL"] == 26


# Each change is caught unless the version moves as it must

Change = Callable[[Sources], object]


def edit(old: str, new: str) -> Change:
    return lambda sources: sources.replace(old, new)


def new_function(sources: Sources, node: str = f"TRTXPY_{NEXT_MINOR[0]}.{NEXT_MINOR[1]}") -> None:
    sources.replace(
        "TRTXPY_API trtxpy_status trtxpy_last_status(void);",
        "TRTXPY_API trtxpy_status trtxpy_last_status(void);\nTRTXPY_API int trtxpy_more(const char *name, size_t n);",
    )
    if f"{node} {{" in sources.map:
        sources.map = sources.map.replace("global:\n", "global:\n        trtxpy_more;\n", 1)
    else:
        sources.map += f"{node} {{\n    global:\n        trtxpy_more;\n}} TRTXPY_1;\n"


ADDITIONS: dict[str, Change] = {
    "function": new_function,
    "constant": edit("TRTXPY_INTERNAL = 26 ", "TRTXPY_INTERNAL = 26, TRTXPY_MORE = 27 "),
    "member at the end": edit(
        "    const char *python;\n",
        "    const char *python;\n    const char *more;\n",
    ),
    "reserved member used": edit(
        "    uint32_t reserved;          /* 0 */",
        "    uint32_t flags;",
    ),
    "struct": edit(
        "#define TRTXPY_MAX_RANK 8",
        "#define TRTXPY_MAX_RANK 8\ntypedef struct trtxpy_more {\n    int32_t x;\n} trtxpy_more;",
    ),
    "type": edit(
        "typedef int32_t trtxpy_dtype;",
        "typedef int32_t trtxpy_dtype;\ntypedef int trtxpy_more;",
    ),
    "macro": edit(
        "#define TRTXPY_MAX_RANK 8",
        "#define TRTXPY_MAX_RANK 8\n#define TRTXPY_MORE 1",
    ),
    "default in an INIT macro": edit(
        "{sizeof(trtxpy_dispatch_options), 0, 0, 0}",
        "{sizeof(trtxpy_dispatch_options), 1000, 0, 0}",
    ),
}


def without_function(sources: Sources) -> None:
    sources.replace("TRTXPY_API trtxpy_status trtxpy_last_status(void);", "")
    sources.map = sources.map.replace("        trtxpy_last_status;\n", "")


def another_node(sources: Sources) -> None:
    sources.map = sources.map.replace("        trtxpy_last_status;\n", "")
    sources.map += "TRTXPY_1.1 {\n    global:\n        trtxpy_last_status;\n} TRTXPY_1;\n"


BREAKS: dict[str, Change] = {
    "function gone": without_function,
    "function in another node": another_node,
    "parameter's type": edit(
        "trtxpy_tensor_bytes(trtxpy_tensor tensor, size_t *bytes)",
        "trtxpy_tensor_bytes(trtxpy_tensor tensor, uint32_t *bytes)",
    ),
    "parameter more": edit(
        "trtxpy_queue_fd(trtxpy_queue queue, int *fd)",
        "trtxpy_queue_fd(trtxpy_queue queue, int *fd, int x)",
    ),
    "const": edit(
        "trtxpy_tensor_write(trtxpy_tensor tensor, const void *data",
        "trtxpy_tensor_write(trtxpy_tensor tensor, void *data",
    ),
    "return type": edit(
        "TRTXPY_API uint32_t trtxpy_abi_version",
        "TRTXPY_API uint64_t trtxpy_abi_version",
    ),
    "callback's parameter": edit(
        "(*trtxpy_callback)(trtxpy_status status, const char *message,",
        "(*trtxpy_callback)(trtxpy_status status, char *message,",
    ),
    "constant's value": edit("TRTXPY_INTERNAL = 26 ", "TRTXPY_INTERNAL = 27 "),
    "constant gone": edit("TRTXPY_INPUT = 0, ", ""),
    "constant in between": edit(
        "TRTXPY_CANCELLED = 18,\n    TRTXPY_TIMEOUT = 19,",
        "TRTXPY_MORE = 18,\n    TRTXPY_CANCELLED,\n    TRTXPY_TIMEOUT,",
    ),
    "type's width": edit("typedef int32_t trtxpy_status;", "typedef int64_t trtxpy_status;"),
    "macro's value": edit("#define TRTXPY_MAX_RANK 8", "#define TRTXPY_MAX_RANK 9"),
    "macro gone": edit(
        "#define TRTXPY_INIT_OPTIONS_INIT {sizeof(trtxpy_init_options), NULL}",
        "",
    ),
    "member in between": edit(
        "    int32_t device;            /* number",
        "    uint64_t more;\n    int32_t device;            /* number",
    ),
    "member gone": edit(
        "    uint32_t allow_host_code;  /* not 0: load plans that carry code for the CPU */\n",
        "",
    ),
    "member's name": edit("    uint32_t allow_host_code; ", "    uint32_t allow_code; "),
    "member's type": edit("    uint32_t allow_host_code; ", "    int32_t allow_host_code; "),
    "members swapped": edit("    uint64_t in_flight, queued;", "    uint64_t queued, in_flight;"),
    "member at the end of a struct without a size": edit(
        "    trtxpy_tensor tensor;\n} trtxpy_binding;",
        "    trtxpy_tensor tensor;\n    uint64_t more;\n} trtxpy_binding;",
    ),
    "struct that another holds grows": edit(
        "    int32_t reserved;\n} trtxpy_result;",
        "    int32_t reserved;\n    uint64_t more;\n} trtxpy_result;",
    ),
    "alignment": edit(
        "    const char *python;\n} trtxpy_init_options;",
        "    const char *python;\n} __attribute__((aligned(32))) trtxpy_init_options;",
    ),
}


@pytest.mark.parametrize("change", ADDITIONS)
def test_an_addition_needs_a_minor_version(sources: Sources, change: str) -> None:
    ADDITIONS[change](sources)
    assert any("it needs" in fault for fault in sources.faults())
    assert abi.update(sources.read(), sources.folder) != [], "nor can it be written down"
    sources.move(*NEXT_MINOR)
    assert [fault for fault in sources.faults() if "is not written down" not in fault] == []
    assert any("is not written down" in fault for fault in sources.faults())
    sources.write_down()
    assert sources.faults() == []


@pytest.mark.parametrize("change", [name for name in BREAKS if name != "alignment"])
def test_a_break_needs_a_major_version(sources: Sources, change: str) -> None:
    BREAKS[change](sources)
    assert any("this needs ABI" in fault for fault in sources.faults())
    sources.move(*NEXT_MINOR)
    assert any("this needs ABI" in fault for fault in sources.faults()), "a minor version is not enough"
    assert abi.update(sources.read(), sources.folder) != []
    sources.move(*NEXT_MAJOR)
    assert [fault for fault in sources.faults() if "is not written down" not in fault] == []
    sources.write_down()
    assert sources.faults() == []


def test_what_is_not_understood_is_refused_not_passed_over(sources: Sources) -> None:
    BREAKS["alignment"](sources)
    with pytest.raises(abi.AbiError, match="not a declaration this script knows"):
        sources.read()


def test_a_member_in_the_padding_is_a_break(sources: Sources) -> None:
    """An older caller's struct_size covers the padding, so the library could not tell whether he set the member."""
    sources.replace("    const char *python;\n", "    const char *python;\n    int32_t half;\n")
    sources.move(*NEXT_MINOR)
    sources.write_down()
    sources.replace("    int32_t half;\n", "    int32_t half;\n    int32_t other_half;\n")
    sources.move(NEXT_MINOR[0], NEXT_MINOR[1] + 1)
    assert any("this needs ABI" in fault for fault in sources.faults())


def test_names_of_parameters_and_comments_are_not_the_abi(sources: Sources) -> None:
    sources.replace(
        "trtxpy_queue_fd(trtxpy_queue queue, int *fd)", "trtxpy_queue_fd(trtxpy_queue q,\n  int  *  where /* x */)"
    )
    assert sources.faults() == []


def test_a_new_function_belongs_to_its_versions_node(sources: Sources) -> None:
    new_function(sources, node="TRTXPY_1")
    sources.move(*NEXT_MINOR)
    assert any(f"it belongs into TRTXPY_{NEXT_MINOR[0]}.{NEXT_MINOR[1]}" in fault for fault in sources.faults())


def test_a_version_cannot_go_back(sources: Sources) -> None:
    sources.move(*NEXT_MAJOR)
    sources.write_down()
    sources.move(*VERSION)
    assert any("went back" in fault for fault in sources.faults())


def test_the_map_and_the_header_name_the_same_functions(sources: Sources) -> None:
    sources.map = sources.map.replace("        trtxpy_run;\n", "")
    with pytest.raises(abi.AbiError, match=r"declared in only one of .*: trtxpy_run$"):
        sources.read()


def test_a_map_with_patterns_is_refused(sources: Sources) -> None:
    sources.map = sources.map.replace("        trtxpy_run;\n", "        trtxpy_run*;\n")
    with pytest.raises(abi.AbiError, match="without patterns"):
        sources.read()


def test_steps_between_written_versions_are_checked_too(sources: Sources) -> None:
    """A file of an old version that was edited later shows."""
    ADDITIONS["constant"](sources)
    sources.move(*NEXT_MINOR)
    sources.write_down()
    old = abi.file_of(VERSION, sources.folder)
    old.write_text(old.read_text().replace("constant TRTXPY_TIMEOUT = 19", "constant TRTXPY_TIMEOUT = 20"))
    assert any("TRTXPY_TIMEOUT" in fault for fault in sources.faults())


CORE = (ROOT / "capi" / "library" / "core.h").read_text(encoding="utf-8")


def test_sizes_that_are_accepted_are_those_that_were_written_down() -> None:
    """ABI 1.0 is released in its file: however the header grows, callers that were built with 1.0 are accepted."""
    listed = dict(re.findall(r"^ +X\((trtxpy_\w+), (\w+)\)", CORE, re.MULTILINE))
    written = (ROOT / "capi" / "abi" / "trtxpy-1.0.abi").read_text(encoding="utf-8")
    members = {
        struct: re.findall(r"^  \d+ size \d+ (\w+): ", body, re.MULTILINE)
        for struct, body in re.findall(r"^struct (trtxpy_\w+) [^\n]*\n((?:  [^\n]*\n)*)", written, re.MULTILINE)
    }
    members.pop("trtxpy_result")  # of which only the library makes one
    last = {struct: names[-1] for struct, names in members.items() if names[0] == "struct_size"}
    assert len(last) >= 11
    assert listed == last


def test_no_size_that_is_accepted_grows_with_its_struct() -> None:
    calls = []
    for source in sorted((ROOT / "capi" / "library").glob("*.c")):
        text = source.read_text(encoding="utf-8")
        calls += re.findall(r"= trtxpy_(?:read|write)_struct\(([^;]*)\);", text)
    assert len(calls) >= 11
    for call in calls:
        assert re.search(r", TRTXPY_SIZE_\d+_\d+\(trtxpy_\w+\), ", call), call
