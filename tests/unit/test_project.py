"""The project as a whole: layout, documentation, examples, and what importing it costs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trtx_py
import trtx_py.benchmark

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("trtx_py", "mock_backend", "trtx_launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = [
    "scripts/demo",
    "scripts/test",
    "scripts/test-long",
    "scripts/check",
    "scripts/docs",
    "scripts/abi",
    "scripts/_env.sh",
    ".ci/run",
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on the mock, with warnings as errors; its output is in the failure."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRTX_BACKEND": "mock", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each preceded by blank lines so that a traceback has the page's line numbers."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        blocks.append("\n" * text[: match.start(1)].count("\n") + match[1])
    return blocks


PAGES_WITH_CODE = [page for page in DOCS if python_blocks(page)]


# Documentation


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=named)
def test_code_of_page_runs(page: Path, tmp_path: Path) -> None:
    model = tmp_path / "examples" / "digits" / "digits.onnx"
    model.parent.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "digits" / "digits.onnx", model)
    runner = tmp_path / "run_page.py"
    runner.write_text(
        "import sys\n"
        "namespace = {'__name__': '__main__'}\n"
        f"for block in {python_blocks(page)!r}:\n"
        f"    exec(compile(block, {named(page)!r}, 'exec'), namespace)\n"
        "import trtx_py\n"
        "assert trtx_py.live_objects() == [], trtx_py.live_objects()\n"
    )
    run_python("-W", "error", str(runner), cwd=tmp_path)


def test_async_test_functions_in_the_documentation_pass(tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to" / "ci-without-a-gpu.md"
    (block,) = [block for block in python_blocks(page) if "def test_" in block]
    (tmp_path / "test_page.py").write_text(block)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = run_python("-m", "pytest", "-q", *plugin_options(), "test_page.py", cwd=tmp_path)
    assert "1 passed" in result.stdout


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in trtx_py.__all__ if not name.startswith("__") and f"`{name}`" not in reference]
    assert missing == []


def public_modules() -> list[str]:
    """Modules below the facade that a program may import: no underscore, and they say what they export."""
    found = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        seam = parts[:2] in (("trtx_py", "backends"), ("trtx_py", "cli"), ("trtx_py", "capi"))
        private = any(part.startswith("_") for part in parts)
        if len(parts) + (parts[0] == "mock_backend") < 2 or seam or private:
            continue
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(".".join(parts))
    return found


@pytest.mark.parametrize("module", public_modules())
def test_every_name_of_a_public_module_is_in_the_reference(module: str) -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`]+)`", reference))
    pytest.importorskip(module, exc_type=ImportError)
    names = sys.modules[module].__all__
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_every_name_in_the_tables_of_the_reference_exists() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    ours = reference[: reference.index("## Backends")]
    names = re.findall(r"^\| `(\w+)` \|", ours, re.MULTILINE)
    assert len(names) > 20
    assert [name for name in names if name not in trtx_py.__all__] == []


def test_every_error_has_its_cause_and_cure_in_the_catalogue() -> None:
    catalogue = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    exported = {name: getattr(trtx_py, name) for name in trtx_py.__all__}
    errors = [name for name, kind in exported.items() if isinstance(kind, type) and issubclass(kind, Exception)]
    classes = {kind.__name__: kind for kind in vars(trtx_py._errors).values() if isinstance(kind, type)}
    classes |= {kind.__name__: kind for kind in vars(trtx_py.benchmark).values() if isinstance(kind, type)}
    errors += [name for name, kind in classes.items() if issubclass(kind, trtx_py.TrtxError)]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", catalogue, re.MULTILINE)
    assert all(len(cause) > 20 and len(cure) > 10 for _, cause, cure in rows)
    assert {*errors} - {"TrtxError"} == {name for name, _, _ in rows}
    (tree,) = re.findall(r"```text\n(TrtxError.*?)```", catalogue, re.DOTALL)
    assert {*re.findall(r"\w+Error", re.sub(r"\(.*?\)", "", tree))} == {*errors}


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_links_of_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", index.read_text())}
    pages = {page for page in DOCS if page.is_relative_to(ROOT / "docs") and page != index}
    assert pages - linked == set()


def test_every_environment_variable_is_documented() -> None:
    documented = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    files = [*SOURCES, *(ROOT / script for script in SCRIPTS), ROOT / "Dockerfile", ROOT / "pyproject.toml"]
    used = {name for file in files for name in re.findall(r"\bTRTX_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8"))}
    native = [*(ROOT / "capi" / "library").glob("*.c"), *(ROOT / "capi" / "src").glob("*.c")]
    native += (ROOT / "capi" / "rust" / "src").glob("*.rs")
    for file in native:  # C names variables where it reads them
        used |= {*re.findall(r'(?:getenv|env::var|env::var_os)\("(\w+)"\)', file.read_text(encoding="utf-8"))}
    assert {"TRTX_BACKEND", "TRTXPY_PYTHON"} <= used
    assert {name for name in used if f"`{name}`" not in documented} == set()


# Layout


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_source_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600, "split it: one noun per file"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    tree = ast.parse(text)
    assert not tree.body or ast.get_docstring(tree), "a module says what it is for"


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def test_only_the_tensorrt_backend_imports_tensorrt() -> None:
    importers = {named(p) for p in SOURCES if any(n.split(".")[0].startswith("tensorrt") for n in imported_modules(p))}
    assert {path for path in importers if not path.startswith("trtx_py/backends/tensorrt")} == set()


def test_the_library_does_not_import_the_mock_but_where_backends_are_named() -> None:
    importers = {named(p) for p in SOURCES if any(n.split(".")[0] == "mock_backend" for n in imported_modules(p))}
    assert {path for path in importers if not path.startswith(("mock_backend/", "trtx_py/backends/"))} == set()


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(r"\b(pypi\.org|pythonhosted\.org|registry\.npmjs|pypi\.nvidia)")
    files = [*DOCS, *SOURCES, ROOT / "pyproject.toml", *(ROOT / script for script in SCRIPTS)]
    assert [named(file) for file in files if hosts.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_valid_bash_and_stops_at_errors(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    if path.name != "_env.sh":  # sourced, never run
        assert os.access(path, os.X_OK)
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")


# Packaging


def test_version_is_the_same_everywhere() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"$', pyproject, re.MULTILINE)
    assert found
    assert trtx_py.__version__ == found[1]
    assert f"## [{found[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_names_belong_to_the_facade() -> None:
    assert sorted(trtx_py.__all__) == sorted(set(trtx_py.__all__))
    for name in trtx_py.__all__:
        value = getattr(trtx_py, name)
        if isinstance(value, type):
            assert value.__module__ == "trtx_py", f"{name} shows itself as {value.__module__}.{name}"


def test_importing_the_package_is_cheap() -> None:
    heavy = ("tensorrt", "tensorrt_rtx", "tensorrt_lean", "tensorrt_dispatch", "cuda", "onnx", "onnxruntime", "torch")
    code = f"import sys, trtx_py; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python("-W", "error", "-c", code).stdout.strip() == "[]"


def test_importing_the_package_leaves_quantization_and_conversion_to_their_first_use() -> None:
    code = (
        "import sys, trtx_py, trtx_py._config, trtx_py._precision\n"
        "rest = ('trtx_py.quantize', 'trtx_py.convert._pipeline', 'trtx_py.convert._types')\n"
        "def loaded(): return sorted(name for name in sys.modules if name.startswith(rest))\n"
        "print(loaded(), hasattr(trtx_py, 'no_such_name'), set(trtx_py.__all__) <= set(dir(trtx_py)), loaded())\n"
        "print(trtx_py.Calibration is trtx_py.quantize.Calibration, 'trtx_py.quantize' in loaded())\n"
        "from trtx_py.convert import InputSpec, OperatorCheck\n"
        "print(trtx_py.InputSpec is InputSpec, callable(trtx_py.convert), InputSpec)\n"
    )
    assert run_python("-W", "error", "-c", code).stdout.splitlines() == [
        "[] False True []", "True True", "True True <class 'trtx_py.InputSpec'>",
    ]  # fmt: skip


# Examples


def plugin_options() -> list[str]:
    """The pytest plugin is an entry point; where the package is not installed it is named on the command line."""
    from importlib.metadata import entry_points

    hook = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of an editable install: see pyproject.toml
    if any(point.value == "mock_backend.pytest_plugin" for point in entry_points(group="pytest11")):
        return hook
    return ["-p", "mock_backend.pytest_plugin", *hook]


#: What each example prints, so that one which does nothing is found.
EXAMPLES = {
    "minimal.py": r"^\[\[",
    "object_model.py": r"^left open: \[\]$",
    "dynamic_shapes.py": r"^129 images are refused: ",
    "int8.py": r"^against FP32: \d\d\.\d dB, .* same digit (9\d|100)\.",
    "cuda_graphs.py": r"^cuda_graphs=True: [12] shapes captured, [12]\d\d requests",
    "lanes.py": r"^lanes=4: .* 4 lanes started",
    "batching.py": r"^1000 requests in \d\d batches of \d\d",
    "multi_gpu.py": r"^device 1: serving, [1-9]\d* launches$",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str, tmp_path: Path) -> None:
    printed = run_python("-W", "error", str(ROOT / "examples" / example), TRTX_CACHE_DIR=str(tmp_path / "cache")).stdout
    assert re.search(EXAMPLES[example], printed, re.MULTILINE), printed


@pytest.mark.parametrize(
    ("example", "wanted"), [("from_pytorch/serve.py", "torch"), ("from_tensorflow.py", "tensorflow")]
)
def test_example_of_a_conversion_says_what_it_needs(example: str, wanted: str) -> None:
    """What it prints with the framework is in tests/integration/test_examples_convert.py."""
    if importlib.util.find_spec(wanted):
        pytest.skip(f"{wanted} is installed")
    command = [sys.executable, str(ROOT / "examples" / example)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert wanted in result.stderr
    assert "--python" in result.stderr.splitlines()[-1]


def test_every_example_is_in_the_list_and_is_run() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    programs = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".c", ".cpp")]
    parts = {"digits/train.py", "digits/digits_data.py", "ci_with_mock/classifier.py", "from_pytorch/net.py"}
    names = {path.relative_to(ROOT / "examples").as_posix() for path in programs} - parts
    assert [name for name in names if f"({name})" not in listed] == []
    assert {name for name in names if "/" not in name} - {"from_tensorflow.py"} == {*EXAMPLES}


def test_example_of_a_test_file_passes() -> None:
    result = run_python("-m", "pytest", "-q", *plugin_options(), str(ROOT / "examples" / "ci_with_mock"))
    assert "2 passed" in result.stdout


def test_demo_serves_the_held_out_digits() -> None:
    pytest.importorskip("sklearn", reason="the demo's images come from scikit-learn")
    printed = run_python(str(ROOT / "examples" / "digits" / "demo.py"), "--rounds", "1").stdout
    accuracy = re.search(r"^accuracy +([\d.]+)%", printed, re.MULTILINE)
    assert accuracy, printed
    assert float(accuracy[1]) >= 97
    assert re.search(r"^requests per second +[\d,]+ ", printed, re.MULTILINE)
    assert re.search(r"^  serving +median ", printed, re.MULTILINE)
    assert re.search(r"^left open +0 objects$", printed, re.MULTILINE)


def test_digits_model_is_small_and_says_what_was_held_out() -> None:
    onnx = pytest.importorskip("onnx")
    path = ROOT / "examples" / "digits" / "digits.onnx"
    assert path.stat().st_size < 200_000
    assert {entry.key for entry in onnx.load(path).metadata_props} == {"data", "held_out"}
