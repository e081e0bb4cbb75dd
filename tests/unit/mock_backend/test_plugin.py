"""The fixtures, run as a user's tests would."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]

TESTS = """
import os
import pytest

def start(backend):
    driver = backend.driver
    driver.cuInit(0)
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0))
    return driver

def test_clean(mock_backend):
    driver = start(mock_backend)
    driver.cuMemFree(driver.cuMemAlloc(16))
    driver.cuDevicePrimaryCtxRelease(0)

def test_leaks(mock_backend):
    start(mock_backend).cuMemAlloc(16)

def test_leaks_of_a_factory(mock_backend_factory):
    start(mock_backend_factory(memory_bytes=1 << 20)).cuStreamCreate(0)

def test_env(trtx_backend_env):
    assert os.environ["TRTX_BACKEND"] == trtx_backend_env == "mock"
"""


def test_fixtures(tmp_path):
    (tmp_path / "test_user.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rE", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    plugin = ["-p", "mock_backend.pytest_plugin", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, *plugin], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "4 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "leak: device block" in done.stdout
    assert "test_user.py" in done.stdout
    assert "leak: stream" in done.stdout
