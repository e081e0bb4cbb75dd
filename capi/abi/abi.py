"""The ABI of libtrtxpy as text, and whether a change to it needs a new version.

    scripts/abi dump                    print the ABI that trtxpy.h and trtxpy.map declare
    scripts/abi check [--library FILE]  fail unless capi/abi/trtxpy-MAJOR.MINOR.abi says the same and follows from the
                                        version before it; FILE must export what is declared
    scripts/abi update                  write the file of the header's version, if the version moved as it must

Needs Python, a C compiler (CC, default gcc) and, for --library, readelf. Declarations are read by a small parser that
refuses what it does not know; sizes and offsets are asked of the compiler. docs/reference/c-abi/versioning.md has the
rules.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "capi" / "include" / "trtxpy.h"
MAP = ROOT / "capi" / "library" / "trtxpy.map"
FOLDER = ROOT / "capi" / "abi"
SAME, MINOR, MAJOR = 0, 1, 2
SIZE_FIRST = "struct_size"  # a struct that begins with this member may grow at its end


class AbiError(Exception):
    """What was declared cannot be understood, or breaks a rule."""


# ---- what there is ----


@dataclass(frozen=True)
class Member:
    """Of a struct."""

    name: str
    type: str
    offset: int
    size: int


@dataclass(frozen=True)
class Struct:
    """Members None: opaque."""

    size: int
    alignment: int
    members: tuple[Member, ...]

    @property
    def may_grow(self) -> bool:
        return bool(self.members) and self.members[0].name == SIZE_FIRST


@dataclass
class Abi:
    """Everything that a caller is compiled with or linked to."""

    version: tuple[int, int] = (0, 0)
    functions: dict[str, str] = field(default_factory=dict)  # name: "return (parameters)"
    nodes: dict[str, str] = field(default_factory=dict)  # name: version node
    structs: dict[str, Struct] = field(default_factory=dict)
    typedefs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    macros: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        lines = [f"abi {self.version[0]}.{self.version[1]}", "model LP64"]
        lines += [f"typedef {name} = {kind}" for name, kind in sorted(self.typedefs.items())]
        lines += [f"constant {name} = {value}" for name, value in self.constants.items()]
        lines += [f"macro {name} = {value}" for name, value in sorted(self.macros.items())]
        for name, struct in sorted(self.structs.items()):
            lines.append(f"struct {name} size {struct.size} alignment {struct.alignment}")
            lines += [f"  {m.offset} size {m.size} {m.name}: {m.type}" for m in struct.members]
        lines += [f"function {name}@{self.nodes[name]} {kind}" for name, kind in sorted(self.functions.items())]
        return "\n".join(lines) + "\n"


def parse_text(text: str) -> Abi:
    """The inverse of ``Abi.text``."""
    abi = Abi()
    members: list[Member] = []
    for line in [*text.splitlines(), "end"]:
        member = re.fullmatch(r"  (\d+) size (\d+) (\w+): (.+)", line)
        if member:
            members.append(Member(member[3], member[4], int(member[1]), int(member[2])))
            continue
        if members:
            name = next(reversed(abi.structs))
            abi.structs[name] = Struct(abi.structs[name].size, abi.structs[name].alignment, tuple(members))
            members = []
        if version := re.fullmatch(r"abi (\d+)\.(\d+)", line):
            abi.version = (int(version[1]), int(version[2]))
        elif struct := re.fullmatch(r"struct (\w+) size (\d+) alignment (\d+)", line):
            abi.structs[struct[1]] = Struct(int(struct[2]), int(struct[3]), ())
        elif function := re.fullmatch(r"function (\w+)@(\S+) (.+)", line):
            abi.functions[function[1]], abi.nodes[function[1]] = function[3], function[2]
        elif typedef := re.fullmatch(r"typedef (\w+) = (.+)", line):
            abi.typedefs[typedef[1]] = typedef[2]
        elif constant := re.fullmatch(r"constant (\w+) = (-?\d+)", line):
            abi.constants[constant[1]] = int(constant[2])
        elif macro := re.fullmatch(r"macro (\w+) = (.*)", line):
            abi.macros[macro[1]] = macro[2]
        elif line not in ("model LP64", "end"):
            raise AbiError(f"not a line of an ABI file: {line!r}")
    return abi


# ---- from the header ----


def _compiler() -> str:
    return os.environ.get("CC", "gcc")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise AbiError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _one(text: str) -> str:
    """Whitespace as one writes it, so that only a change of meaning is a change."""
    text = " ".join(text.split())
    text = re.sub(r"\s*\*\s*", " *", text)
    text = re.sub(r"\*\s+(?=\*)", "*", text)
    return re.sub(r"\s*([(),])\s*", lambda found: {"(": "(", ")": ")", ",": ", "}[found[1]], text).strip()


def _declarator(text: str) -> tuple[str, str]:
    """``const char *name[3]`` as its name and its type, ``const char *[3]``."""
    found = re.fullmatch(r"([^{}()]*?[\s*])(\w+)\s*((?:\[[^\]]*\]\s*)*)", text.strip())
    if not found or found[2] in ("const", "int", "void", "char", "struct"):
        raise AbiError(f"not a declaration this script knows: {text.strip()!r}")
    return found[2], _one(found[1] + found[3])


def _parameters(text: str) -> str:
    if _one(text) in ("void", ""):
        return "void"
    return ", ".join(_declarator(parameter)[1] for parameter in text.split(","))


def _split_declarators(text: str) -> list[str]:
    """``uint64_t a, b`` as one declaration each; no pointers after the first comma, which C reads surprisingly."""
    first, *rest = text.split(",")
    name, kind = _declarator(first)
    if rest and ("*" in text or "[" in text):
        raise AbiError(f"declare pointers and arrays one by one: {text.strip()!r}")
    return [f"{kind} {name}", *(f"{kind} {other.strip()}" for other in rest)]


def _own_text(header: Path) -> str:
    """The header's own declarations after the preprocessor, without those of the C library."""
    lines = _run(_compiler(), "-E", "-x", "c", str(header)).splitlines()
    own, inside = [], False
    for line in lines:
        if mark := re.match(r'# \d+ "([^"]*)"', line):
            inside = mark[1] == str(header)
        elif inside:
            own.append(line)
    return "\n".join(own)


def _statements(text: str) -> list[str]:
    """Split at the semicolons outside of braces."""
    statements, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == ";" and depth == 0:
            statements.append(" ".join(text[start:i].split()))
            start = i + 1
    if text[start:].strip():
        raise AbiError(f"left over after the last declaration: {text[start:].strip()[:200]!r}")
    return statements


def _read_declarations(abi: Abi, text: str) -> dict[str, list[str]]:
    """Fill in what needs no compiler; returns the members of structs and the names of constants ("")."""
    bodies: dict[str, list[str]] = {"": []}
    for statement in _statements(text):
        if enum := re.fullmatch(r"enum \{(.*)\}", statement):
            bodies[""] += [item.split("=")[0].strip() for item in enum[1].split(",") if item.strip()]
        elif struct := re.fullmatch(r"typedef struct (\w+) \{(.*)\} (\w+)", statement):
            if struct[1] != struct[3]:
                raise AbiError(f"struct {struct[1]} has another name as a type, {struct[3]}")
            members = [item for item in struct[2].split(";") if item.strip()]
            bodies[struct[1]] = [_one(one) for member in members for one in _split_declarators(member)]
        elif re.fullmatch(r"struct \w+", statement):
            pass  # opaque: those who define it have its layout
        elif pointer := re.fullmatch(r"typedef (.+?)\( ?\* ?(\w+)\) ?\((.*)\)", statement):
            abi.typedefs[pointer[2]] = f"{_one(pointer[1])} (*)({_parameters(pointer[3])})"
        elif statement.startswith("typedef "):
            name, kind = _declarator(statement.removeprefix("typedef "))
            abi.typedefs[name] = kind
        elif function := re.fullmatch(r"(.+?[\s*])(\w+) ?\(([^()]*)\)", statement):
            returned = re.sub(r"__attribute__ ?\(\(.*?\)\)|^extern ", "", function[1])
            abi.functions[function[2]] = f"{_one(returned)} ({_parameters(function[3])})"
        else:
            raise AbiError(f"not a declaration this script knows: {statement[:200]!r}")
    return bodies


def _measure(abi: Abi, header: Path, bodies: dict[str, list[str]]) -> None:
    """Ask the compiler for sizes, offsets and values."""
    members = {name: [_declarator(member) for member in body] for name, body in bodies.items() if name}
    asks = ['printf("%zu\\n", sizeof(void *));']
    for name, pairs in members.items():
        asks.append(f'printf("%zu %zu\\n", sizeof({name}), _Alignof({name}));')
        asks += [f'printf("%zu %zu\\n", offsetof({name}, {m}), sizeof((({name} *)0)->{m}));' for m, _ in pairs]
    asks += [f'printf("%lld\\n", (long long){constant});' for constant in bodies[""]]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.c"), Path(folder, "probe")
        lines = ["#include <stdio.h>", f'#include "{header}"', "int main(void) {", *asks, "return 0;", "}"]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _run(_compiler(), "-std=c11", str(source), "-o", str(program))
        answers = iter(_run(str(program)).splitlines())
    if next(answers) != "8":
        raise AbiError("the ABI is described for 64-bit machines")
    for name, pairs in members.items():
        size, alignment = map(int, next(answers).split())
        found = []
        for member, kind in pairs:
            offset, bytes_ = map(int, next(answers).split())
            found.append(Member(member, kind, offset, bytes_))
        abi.structs[name] = Struct(size, alignment, tuple(found))
    for constant in bodies[""]:
        abi.constants[constant] = int(next(answers))


def read_map(text: str) -> dict[str, str]:
    """Symbol: node, of a linker's version script that lists names and ends with ``local: *``."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    nodes: dict[str, str] = {}
    for node, body, _ in re.findall(r"([\w.]+)\s*\{(.*?)\}\s*([\w.]*)\s*;", text, re.DOTALL):
        for symbol in re.findall(r"[^\s;:]+(?=\s*;)", body):
            if symbol == "*":
                continue
            if symbol in nodes or not re.fullmatch(r"\w+", symbol):
                raise AbiError(f"{symbol} in {node}: name each symbol once, without patterns")
            nodes[symbol] = node
    return nodes


def read(header: Path = HEADER, version_map: Path = MAP) -> Abi:
    """The ABI that the sources declare."""
    abi = Abi()
    bodies = _read_declarations(abi, _own_text(header))
    _measure(abi, header, bodies)
    for line in _run(_compiler(), "-E", "-dM", "-x", "c", str(header)).splitlines():
        if macro := re.fullmatch(r"#define (TRTXPY_\w+) ?(.*)", line):
            abi.macros[macro[1]] = " ".join(macro[2].split())
    for internal in ("TRTXPY_H", "TRTXPY_API"):
        abi.macros.pop(internal, None)
    abi.version = (int(abi.macros.pop("TRTXPY_ABI_MAJOR")), int(abi.macros.pop("TRTXPY_ABI_MINOR")))
    abi.nodes = read_map(version_map.read_text(encoding="utf-8"))
    if differ := set(abi.nodes) ^ set(abi.functions):
        raise AbiError(f"declared in only one of {header.name} and {version_map.name}: {', '.join(sorted(differ))}")
    return abi


# ---- what changed ----


def node_of(version: tuple[int, int]) -> str:
    """The version node of the symbols that a version added."""
    return f"TRTXPY_{version[0]}" + (f".{version[1]}" if version[1] else "")


def _struct_changes(name: str, old: Struct, new: Struct) -> list[tuple[int, str]]:
    changes: list[tuple[int, str]] = []
    for i, was in enumerate(old.members):
        if i >= len(new.members):
            changes.append((MAJOR, f"struct {name}: {was.name} is gone"))
            continue
        now = new.members[i]
        if (was.type, was.offset, was.size) != (now.type, now.offset, now.size):
            text = f"{was.name} was {was.type} at {was.offset} and is {now.name}, {now.type} at {now.offset}"
            changes.append((MAJOR, f"struct {name}: {text}"))
        elif was.name != now.name:
            reused = was.name.startswith("reserved")
            changes.append((MINOR if reused else MAJOR, f"struct {name}: {was.name} is called {now.name}"))
    for now in new.members[len(old.members) :]:
        level = MINOR if old.may_grow else MAJOR
        if level == MINOR and now.offset < old.size:
            # a library could not tell whether an older caller set it: its struct_size covers the padding
            level = MAJOR
        changes.append((level, f"struct {name}: {now.name} at {now.offset} is new"))
    if old.alignment != new.alignment:
        changes.append((MAJOR, f"struct {name}: its alignment was {old.alignment} and is {new.alignment}"))
    if old.size != new.size and not changes:
        changes.append((MAJOR, f"struct {name}: its size was {old.size} and is {new.size}"))
    return changes


def changes_between(old: Abi, new: Abi) -> list[tuple[int, str]]:
    """Every change with what it needs, MINOR or MAJOR."""
    changes: list[tuple[int, str]] = []
    for what, before, after in (
        ("function", old.functions, new.functions),
        ("type", old.typedefs, new.typedefs),
        ("constant", old.constants, new.constants),
        ("macro", old.macros, new.macros),
    ):
        for name in {**before, **after}:
            was, now = before.get(name), after.get(name)
            if was == now:
                continue
            level, text = MAJOR, f"{what} {name}: was {was}, is {now}"
            if was is None:
                level, text = MINOR, f"{what} {name} is new: {now}"
            elif now is None:
                text = f"{what} {name} is gone"
            elif what == "macro" and name.endswith("_INIT"):
                level = MINOR  # callers have the old one compiled in, and it stays right
            changes.append((level, text))
    for name in {**old.structs, **new.structs}:
        if name not in new.structs:
            changes.append((MAJOR, f"struct {name} is gone"))
        elif name not in old.structs:
            changes.append((MINOR, f"struct {name} is new"))
        else:
            changes += _struct_changes(name, old.structs[name], new.structs[name])
    for name, node in old.nodes.items():
        if new.nodes.get(name, node) != node:
            changes.append((MAJOR, f"function {name}: was in {node}, is in {new.nodes[name]}"))
    return changes


def faults_between(old: Abi, new: Abi) -> list[str]:
    """What breaks the rules: the version did not move as the changes need it."""
    changes = changes_between(old, new)
    needed = max((level for level, _ in changes), default=SAME)
    faults: list[str] = []
    if new.version < old.version:
        faults.append(f"the version went back, from {_dotted(old)} to {_dotted(new)}")
    elif needed == MAJOR and new.version[0] == old.version[0]:
        faults = [text for level, text in changes if level == MAJOR]
        faults.append(
            f"callers of {_dotted(old)} would break: this needs ABI {old.version[0] + 1}.0, not {_dotted(new)}"
        )
    elif needed == MINOR and new.version == old.version:
        faults = [text for _, text in changes]
        faults.append(f"this adds to ABI {_dotted(old)}: it needs {old.version[0]}.{old.version[1] + 1}")
    if new.version[0] == old.version[0]:
        for name in sorted(set(new.functions) - set(old.functions)):
            if new.version > old.version and new.nodes[name] != node_of(new.version):
                faults.append(f"{name} is new in {_dotted(new)}: in trtxpy.map it belongs into {node_of(new.version)}")
    return faults


def _dotted(abi: Abi) -> str:
    return f"{abi.version[0]}.{abi.version[1]}"


# ---- the committed files ----


def file_of(version: tuple[int, int], folder: Path = FOLDER) -> Path:
    """Where the ABI of a version is written down."""
    return folder / f"trtxpy-{version[0]}.{version[1]}.abi"


def committed(folder: Path = FOLDER) -> list[Abi]:
    """What is written down, oldest first."""
    found = []
    for path in folder.glob("trtxpy-*.abi"):
        abi = parse_text(path.read_text(encoding="utf-8"))
        if path != file_of(abi.version, folder):
            raise AbiError(f"{path} holds ABI {_dotted(abi)}")
        found.append(abi)
    return sorted(found, key=lambda abi: abi.version)


def check(abi: Abi, folder: Path = FOLDER) -> list[str]:
    """Faults of the declared ABI against the committed ones; none: all is as it must be."""
    files = committed(folder)
    newest = files[-1] if files else None
    if newest is None:
        return [f"no ABI is written down in {folder}: run scripts/abi update"]
    faults = []
    for old, new in itertools.pairwise(files):
        faults += faults_between(old, new)
    if newest.version == abi.version:
        if newest.text() != abi.text():
            faults += faults_between(newest, abi) or [f"{file_of(abi.version, folder)} differs: run scripts/abi update"]
    else:
        faults += faults_between(newest, abi)
        faults.append(f"ABI {_dotted(abi)} is not written down: run scripts/abi update")
    return faults


def update(abi: Abi, folder: Path = FOLDER) -> list[str]:
    """Write the file of this version; refuses what breaks a rule."""
    files = committed(folder)
    faults = faults_between(files[-1], abi) if files else []
    if not faults:
        file_of(abi.version, folder).write_text(abi.text(), encoding="utf-8")
    return faults


# ---- the built library ----


def exported(library: Path) -> dict[str, str]:
    """Symbol: version node, of what a library defines for others."""
    symbols: dict[str, str] = {}
    for line in _run("readelf", "--dyn-syms", "--wide", str(library)).splitlines():
        part = line.split()
        if len(part) >= 8 and part[4] in ("GLOBAL", "WEAK") and part[6] not in ("UND", "ABS"):
            name, _, node = part[7].partition("@")
            symbols[name] = node.lstrip("@")
    return symbols


def library_faults(abi: Abi, library: Path) -> list[str]:
    """What the library exports beside what is declared, and the other way round."""
    there = exported(library)
    return [
        f"{library.name}: {name} is {there.get(name, 'missing')}; declared: {abi.nodes.get(name, 'nowhere')}"
        for name in sorted(set(there) | set(abi.nodes))
        if there.get(name) != abi.nodes.get(name)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="scripts/abi", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("dump", help="print the declared ABI")
    commands.add_parser("update", help="write the file of the header's version")
    checking = commands.add_parser("check", help="compare with the committed file")
    checking.add_argument("--library", type=Path, help="a built libtrtxpy.so, which must export what is declared")
    options = parser.parse_args(arguments)
    try:
        abi = read()
        if options.command == "dump":
            sys.stdout.write(abi.text())
            return 0
        faults = update(abi) if options.command == "update" else check(abi)
        if options.command == "check" and options.library:
            faults += library_faults(abi, options.library)
    except AbiError as error:
        faults = [str(error)]
    for fault in faults:
        sys.stderr.write(f"abi: {fault}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
