"""The public conformance suites, on the mock."""

from __future__ import annotations

import pytest

from mock_backend import MockBackend
from mock_backend.conformance import DriverConformance, RuntimeConformance


class _OnMock:
    @pytest.fixture(autouse=True)
    def clean(self):
        self.made: list[MockBackend] = []
        yield
        for backend in self.made:
            backend.assert_clean()

    def make_backend(self):
        backend = MockBackend()
        self.made.append(backend)
        return backend


class TestMockDriver(_OnMock, DriverConformance):
    pass


class TestMockRuntime(_OnMock, RuntimeConformance):
    pass
