"""The project as a whole: layout, documentation, examples, and what importing it costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trtx_py

ROOT = Path(__file__).parents[2]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("trtx_py", "mock_backend")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = ["scripts/demo", "scripts/test", "scripts/test-long", "scripts/check", "scripts/_env.sh", ".ci/run"]


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


def test_every_name_in_the_tables_of_the_reference_exists() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    ours = reference[: reference.index("## Backends")]
    names = re.findall(r"^\| `(\w+)` \|", ours, re.MULTILINE)
    assert len(names) > 20
    assert [name for name in names if name not in trtx_py.__all__] == []


def test_every_error_has_its_cause_and_cure_in_the_catalogue() -> None:
    catalogue = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    errors = [name for name in trtx_py.__all__ if name.endswith("Error") and name != "TrtxError"]
    assert [name for name in errors if f"\n| `{name}` |" not in catalogue] == []


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
    files = [*SOURCES, *(ROOT / script for script in SCRIPTS)]
    used = {name for file in files for name in re.findall(r"\bTRTX_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8"))}
    assert "TRTX_BACKEND" in used
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


# Examples


def plugin_options() -> list[str]:
    """The pytest plugin is an entry point; where the package is not installed it is named on the command line."""
    from importlib.metadata import entry_points

    if any(point.value == "mock_backend.pytest_plugin" for point in entry_points(group="pytest11")):
        return []
    return ["-p", "mock_backend.pytest_plugin"]


@pytest.mark.parametrize("example", ["minimal.py", "object_model.py"])
def test_example_runs(example: str) -> None:
    result = run_python("-W", "error", str(ROOT / "examples" / example))
    assert result.stdout.strip()


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
