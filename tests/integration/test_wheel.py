"""The sdist builds, its wheel works in an environment without a checkout, and both hold what they should.

The environment is an empty one: the packages that trtx_py depends on are those of the tests, by a path file, and
trtx_py itself is the wheel's alone (the tree would come by a path file of the tests' own environment, which only that
reads). The slow test takes everything from the package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import trtx_py

pytest.importorskip("build", reason="the extra dev is not installed")

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
CHECK = ROOT / "tests" / "installed_wheel.py"


def run(command: list[str | Path], cwd: Path, timeout: float = 300, **environment: str) -> str:
    """Standard output; what else was said is in the failure. No variable of ours that names a path is handed on."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRTX", "VIRTUAL"))}
    given = {**inherited, "TRTX_CACHE_DIR": str(cwd / "cache"), **environment}
    result = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it. It needs scikit-build-core, from pip's cache or an index."""
    folder = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT], cwd=folder, timeout=600)
    return folder / "dist"


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, and with the other packages of the tests."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.EnvBuilder(symlinks=True).create(folder)
    interpreter = folder / "bin" / "python"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        interpreter,
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run([*pip, "--no-deps", "--no-index", wheel], cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_readme_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    model = tmp_path / "examples" / "digits"
    model.mkdir(parents=True)
    shutil.copy(DIGITS, model)
    blocks = readme_blocks()
    assert len(blocks) >= 3
    (tmp_path / "main_job.py").write_text("\n".join(blocks) + "\nimport sys\nprint(trtx.__file__, sys.path)\n")
    printed = run([python, "-W", "error", "main_job.py"], cwd=tmp_path)
    assert "launches for 1000 requests" in printed
    assert str(python.parents[1]) in printed.splitlines()[-1].split()[0]
    assert str(ROOT / "trtx_py") not in printed
    assert f"'{ROOT}'" not in printed.splitlines()[-1]


def test_what_else_it_brings(python: Path, tmp_path: Path) -> None:
    assert "all of it works" in run([python, "-W", "error", CHECK, DIGITS], cwd=tmp_path)


def test_the_pytest_plugin_comes_with_it(python: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "ci_with_mock", tmp_path / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "digits").mkdir()
    shutil.copy(DIGITS, tmp_path / "digits")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    printed = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "ci"], cwd=tmp_path)
    assert "2 passed" in printed


def test_every_command_starts(python: Path, wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        text = archive.read(name).decode()
    commands = re.findall(r"^(\S+) = ", text.partition("[console_scripts]")[2].partition("\n[")[0], re.MULTILINE)
    for command in commands:
        assert "Usage" in run([python.parent / command, "--help"], cwd=tmp_path)


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    suffix = re.escape(sysconfig.get_config_var("EXT_SUFFIX"))
    native = {name for name in names if name.endswith(".so")}
    for module in ("trtx_py/_native", "mock_backend/_native"):
        assert [name for name in native if re.fullmatch(module + suffix, name)], native
    assert len(native) == 3, native
    assert {"trtx_py/py.typed", "mock_backend/py.typed", "trtx_py/_native.pyi"} <= {*names}
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {*wheel_packages()}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".c", ".orig"))]
    assert f"Version: {trtx_py.__version__}" in metadata
    assert re.search(r"^License-File: LICENSE$", metadata, re.MULTILINE)
    assert metadata.rstrip().endswith("[CHANGELOG.md](CHANGELOG.md)."), "the README is its description"


def test_what_the_sdist_holds(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "SECURITY.md",
        "CONTRIBUTING.md",
    }
    wanted |= {"capi/include/trtxpy.h", "docs/index.md", "mkdocs.yml", "Dockerfile", "tests/unit/test_project.py"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".venv", "build/"))]


def wheel_packages() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (packages,) = re.findall(r"^wheel.packages = (\[.+\])$", text, re.MULTILINE)
    return re.findall(r'"(\w+)"', packages)


@pytest.mark.slow
def test_the_sdist_installs_with_a_c_compiler_alone(sdist: Path, tmp_path: Path) -> None:
    """From a package index, into an empty environment, with nothing on the path but gcc and g++ and what they call."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gcc", "g++", "cc", "c++", "as", "ld", "ar", "ranlib", "nm", "strip", "sh", "uname"):
        found = shutil.which(name)
        assert found, f"no {name} here"
        (programs / name).symlink_to(Path(found).resolve())
    folder = tmp_path / "venv"
    venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)
    python = folder / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, f"{sdist}[mock]"], cwd=tmp_path, timeout=900, PATH=str(programs))
    assert "all of it works" in run([python, "-W", "error", CHECK, DIGITS], cwd=tmp_path, PATH=str(programs))
