"""Building with fake vendor modules: what differs between 8.6, 10 and 11."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.backends.fake_vendor import FakeConfig, FakeDriver, FakeVendor, Layer, Severity, Tensor
from trtx_py import _types as t
from trtx_py._errors import (
    BackendUnavailableError,
    BuilderError,
    ClosedError,
    InvalidArgumentError,
    ParserError,
    ShapeError,
)
from trtx_py._types import BuildOptions, ShapeRange
from trtx_py.backends.tensorrt import TensorRTFamilyBackend

PROFILE = {"x": ShapeRange((1, 4), (2, 4), (8, 4))}
V8, V10, V11 = "8.6.0", "10.3.0.26", "11.4.0.106"


class Fixture:
    def __init__(self, version: str) -> None:
        self.vendor = FakeVendor(version)
        self.lines: list[tuple[t.Severity, str]] = []
        self.backend = TensorRTFamilyBackend("tensorrt", module=self.vendor)
        self.builder = self.backend.create_builder(lambda severity, line: self.lines.append((severity, line)))

    def network(self) -> Any:
        network = self.builder.create_network()
        network.parse_onnx(b"model", None)
        return network

    def build(self, progress: Any = None, **options: Any) -> FakeConfig:
        options.setdefault("profiles", (PROFILE,))
        self.plan = self.builder.build_serialized_network(self.network(), BuildOptions(**options), progress)
        return self.vendor.configs[-1]

    def flags(self, **options: Any) -> set[str]:
        return {flag.name for flag in self.build(**options).flags}


@pytest.mark.parametrize(("version", "flags"), [(V8, 1), (V10, 0), (V11, 1)])
def test_network_creation_flags(version: str, flags: int) -> None:
    fixture = Fixture(version)
    network = fixture.network()
    assert fixture.vendor.networks[-1].flags == flags
    assert [tensor.name for tensor in network.inputs] == ["x"]
    assert network.num_layers == 1


@pytest.mark.parametrize(("version", "shared"), [(V8, {"PROFILE_SHARING_0806": True}), (V10, {}), (V11, {})])
def test_profile_sharing_is_a_preview_feature_of_8_6(version: str, shared: dict[str, bool]) -> None:
    assert Fixture(version).build().features == shared
    assert Fixture(version).build(profile_sharing=False).features == {}


def test_profile_sharing_is_refused_by_name_where_it_is_missing() -> None:
    fixture = Fixture(V8)
    del fixture.vendor.PreviewFeature
    with pytest.raises(BuilderError, match=r"PROFILE_SHARING_0806.*profile_sharing=False"):
        fixture.build()


@pytest.mark.parametrize(
    ("version", "word", "flag"),
    [(V8, "fp16", "FP16"), (V8, "fp8", "FP8"), (V10, "bf16", "BF16"), (V10, "fp16", "FP16")],
)
def test_precision_sets_a_flag_on_weakly_typed_versions(version: str, word: str, flag: str) -> None:
    assert Fixture(version).flags(precision=word) == {flag}


def test_precision_that_a_version_lacks_is_refused() -> None:
    with pytest.raises(BuilderError, match=r"tensorrt 8\.6\.0 has no builder flag 'BF16'; it has FP16"):
        Fixture(V8).build(precision="bf16")


@pytest.mark.parametrize("word", ["fp16", "bf16", "int8", "fp8"])
def test_precision_is_refused_where_typing_is_strong(word: str) -> None:
    with pytest.raises(
        BuilderError, match=rf"tensorrt 11\.4\.0\.106 .*precision='{word}'.*convert the model to {word}"
    ):
        Fixture(V11).build(precision=word)
    with pytest.raises(BuilderError, match="expected one of fp32"):
        Fixture(V11).build(precision="float16")


@pytest.mark.parametrize("version", [V8, V11])
def test_fp32_clears_tf32(version: str) -> None:
    fixture = Fixture(version)
    config = fixture.build(precision="fp32")
    assert {flag.name for flag in config.cleared} == {"TF32"}
    assert fixture.flags(precision="tf32") == {"TF32"}


def test_fp32_is_refused_for_a_half_model_where_typing_is_strong() -> None:
    fixture = Fixture(V11)
    fixture.vendor.model_layers = [Layer("CAST", Tensor("y", fixture.vendor.DataType.HALF, (1,)))]
    with pytest.raises(BuilderError, match="computes in HALF"):
        fixture.build(precision="fp32")


@pytest.mark.parametrize(
    ("kind", "dtype", "flags"),
    [
        ("CAST", "HALF", {"FP16"}),
        ("QUANTIZE", "INT8", {"INT8"}),
        ("QUANTIZE", "FP8", {"FP8"}),
        ("CAST", "FLOAT", set()),
    ],
)
def test_models_own_types_need_their_flags_where_typing_is_weak(kind: str, dtype: str, flags: set[str]) -> None:
    fixture = Fixture(V8)
    fixture.vendor.model_layers = [Layer(kind, Tensor("y", fixture.vendor.DataType[dtype], (1,)))]
    assert fixture.flags() == flags


def test_int8_without_ranges_is_refused() -> None:
    with pytest.raises(BuilderError, match="QuantizeLinear"):
        Fixture(V8).build(precision="int8")


def test_unknown_and_conflicting_flags_are_refused_by_name() -> None:
    fixture = Fixture(V10)
    with pytest.raises(BuilderError, match=r"tensorrt 10\.3\.0\.26 has no builder flag 'NONSENSE'; it has BF16"):
        fixture.build(flags=("NONSENSE",))
    with pytest.raises(BuilderError, match=r"no builder flag FP16: it is strongly typed"):
        Fixture(V11).build(flags=("FP16",))
    original = fixture.vendor.Builder.create_builder_config

    def refusing(self: Any) -> FakeConfig:
        config: FakeConfig = original(self)
        config.refused = {"REFIT"}
        return config

    fixture.vendor.Builder.create_builder_config = refusing  # type: ignore[method-assign]
    with pytest.raises(BuilderError, match="refused the builder flag REFIT"):
        fixture.build(flags=("REFIT",))


def test_numbers_reach_the_configuration() -> None:
    config = Fixture(V10).build(workspace_bytes=1 << 20, optimization_level=5, max_aux_streams=0)
    assert list(config.pools.values()) == [1 << 20]
    assert (config.builder_optimization_level, config.max_aux_streams) == (5, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workspace_bytes": -1}, "workspace_bytes is -1"),
        ({"optimization_level": 6}, "expected 0 to 5"),
        ({"max_aux_streams": -1}, "max_aux_streams is -1"),
        ({"compute_capabilities": ("8.9",)}, "tensorrt 10.3.0.26 builds for the GPU at hand only"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BuilderError, match=says):
        Fixture(V10).build(**options)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({}, "no range for the dynamic input 'x'"),
        ({**PROFILE, "z": PROFILE["x"]}, "'z', which is no input"),
        ({"x": ShapeRange((1, 4), (2, 4), (8,))}, "different lengths"),
        ({"x": ShapeRange((1,), (2,), (8,))}, "expected 2 dimensions"),
        ({"x": ShapeRange((4, 4), (2, 4), (8, 4))}, "min <= opt <= max"),
        ({"x": ShapeRange((1, 4), (2, 5), (8, 5))}, "dimension 1 is fixed at 4"),
        ({"x": ShapeRange((-1, 4), (2, 4), (8, 4))}, "not complete"),
        ({"x": ShapeRange((1, 4), (2, 4), (2**31, 4))}, "not complete"),
    ],
)
def test_profiles_are_checked_against_the_network(profile: t.ProfileSpec, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        Fixture(V10).build(profiles=(profile,))


def test_dynamic_network_needs_a_profile() -> None:
    with pytest.raises(BuilderError, match=r"input 'x' float32 \[\?x4\]"):
        Fixture(V10).build(profiles=())


def test_shape_tensors_are_bounded_by_values() -> None:
    fixture = Fixture(V8)
    fixture.vendor.model_inputs.append(Tensor("s", fixture.vendor.DataType.INT64, (2,), is_shape_tensor=True))
    values = ShapeRange((-1, 1), (1, 4), (8, 4))
    config = fixture.build(profiles=({**PROFILE, "s": values},))
    assert config.profiles[0].values == {"s": ([-1, 1], [1, 4], [8, 4])}
    assert config.profiles[0].shapes == {"x": ((1, 4), (2, 4), (8, 4))}
    with pytest.raises(ShapeError, match="shape tensor of 2 values"):
        fixture.build(profiles=({**PROFILE, "s": ShapeRange((1,), (1,), (1,))},))
    with pytest.raises(ShapeError, match=r"tensorrt 8\.6\.0 takes values of 32 bits"):
        fixture.build(profiles=({**PROFILE, "s": ShapeRange((1, 1), (1, 1), (2**40, 1))},))


class Progress:
    def __init__(self, stop_after: int = 10**9, fails: BaseException | None = None) -> None:
        self.steps, self.stop_after, self.fails = 0, stop_after, fails

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        if self.fails is not None:
            raise self.fails

    def step_complete(self, phase: str, step: int) -> bool:
        self.steps += 1
        return self.steps < self.stop_after

    def phase_finish(self, phase: str) -> None:
        self.finished = phase


def run_monitor(config: Any) -> None:
    monitor = config.progress_monitor
    monitor.phase_start("compile", None, 3)
    config.answers = [monitor.step_complete("compile", step) for step in range(3)]
    monitor.phase_finish("compile")


def test_progress_watches_and_aborts() -> None:
    fixture = Fixture(V10)
    fixture.vendor.during_build = run_monitor
    progress = Progress()
    fixture.build(progress=progress)
    assert (progress.steps, progress.finished) == (3, "compile")
    with pytest.raises(BuilderError, match="aborted by its progress callback"):
        fixture.build(progress=Progress(stop_after=2))
    assert fixture.vendor.configs[-1].answers == [True, False, False]  # type: ignore[attr-defined]


@pytest.mark.parametrize("failure", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_progress_that_raises_stops_the_build_and_is_raised_after_it(failure: BaseException) -> None:
    fixture = Fixture(V10)
    fixture.vendor.during_build = run_monitor
    with pytest.raises(type(failure)) as caught:
        fixture.build(progress=Progress(fails=failure))
    assert caught.value is failure
    assert fixture.vendor.configs[-1].answers == [False, False, False]  # type: ignore[attr-defined]


def test_8_6_says_that_it_cannot_be_watched() -> None:
    fixture = Fixture(V8)
    config = fixture.build(progress=Progress())
    assert not hasattr(config, "progress_monitor")
    assert any("has no IProgressMonitor" in line for _, line in fixture.lines)


def test_failed_build_carries_the_log_and_the_next_step() -> None:
    fixture = Fixture(V8)
    fixture.vendor.build_result = None
    fixture.vendor.log_during_build = [
        (Severity.INFO, "chatter"),
        (Severity.WARNING, "careful"),
        (Severity.ERROR, "cudaError 35: insufficient"),
    ]
    with pytest.raises(BuilderError, match="compute_capabilities") as caught:
        fixture.build()
    assert caught.value.tensorrt_log == ("careful", "cudaError 35: insufficient")
    assert [line for _, line in fixture.lines] == ["chatter", "careful", "cudaError 35: insufficient"]


class IssueOf86:
    """8.6's ParserError: no node_name, no node_operator."""

    def code(self) -> Any:
        return SimpleNamespace(name="UNSUPPORTED_NODE")

    def desc(self) -> str:
        return "no importer"

    def node(self) -> int:
        return 7


class IssueOf10(IssueOf86):
    def node_name(self) -> str:
        return "n7"

    def node_operator(self) -> str:
        return "Frob"


@pytest.mark.parametrize(("issue", "node", "operator"), [(IssueOf86(), "#7", ""), (IssueOf10(), "n7", "Frob")])
def test_parser_issues_of_old_and_new_versions(issue: Any, node: str, operator: str) -> None:
    fixture = Fixture(V8)
    fixture.vendor.parse_errors = [issue, issue]
    with pytest.raises(ParserError) as caught:
        fixture.network()
    found = caught.value.issues
    assert len(found) == 2
    assert (found[0].node, found[0].operator, found[0].code, found[0].reason) == (
        node, operator, "UNSUPPORTED_NODE", "no importer",
    )  # fmt: skip


def test_external_data_directory_becomes_a_path_inside_it(tmp_path: Any) -> None:
    fixture = Fixture(V8)
    fixture.builder.create_network().parse_onnx(b"model", str(tmp_path))
    assert fixture.vendor.parsed == (b"model", str(tmp_path / "model.onnx"))
    with pytest.raises(ParserError, match="is no directory"):
        fixture.builder.create_network().parse_onnx(b"model", str(tmp_path / "missing"))


def test_misuse_is_refused_before_it_reaches_tensorrt() -> None:
    fixture = Fixture(V10)
    network = fixture.network()
    with pytest.raises(ParserError, match="parsed already"):
        network.parse_onnx(b"model", None)
    with pytest.raises(ParserError, match="0 bytes"):
        fixture.builder.create_network().parse_onnx(b"", None)
    with pytest.raises(InvalidArgumentError, match="no network of this builder"):
        Fixture(V10).builder.build_serialized_network(network, BuildOptions(profiles=(PROFILE,)), None)
    network.destroy()
    network.destroy()
    with pytest.raises(ClosedError, match="network is destroyed"):
        fixture.builder.build_serialized_network(network, BuildOptions(profiles=(PROFILE,)), None)
    fixture.builder.destroy()
    fixture.builder.destroy()
    with pytest.raises(ClosedError, match="builder is destroyed"):
        fixture.builder.create_network()


def test_one_build_at_a_time() -> None:
    fixture = Fixture(V10)
    network = fixture.network()
    errors = []

    def again(config: Any) -> None:
        with pytest.raises(BuilderError, match="building already") as caught:
            fixture.builder.build_serialized_network(network, BuildOptions(profiles=(PROFILE,)), None)
        errors.append(caught.value)

    fixture.vendor.during_build = again
    fixture.build()
    assert len(errors) == 1


def test_builder_that_only_looks_alive_is_never_used() -> None:
    vendor = FakeVendor(V8)
    vendor.log_at_creation = [(Severity.ERROR, "createInferBuilder: CUDA initialization failure with error: 35")]
    with pytest.raises(BuilderError, match="could not create a builder") as caught:
        TensorRTFamilyBackend("tensorrt", module=vendor).create_builder(lambda severity, line: None)
    assert "error: 35" in caught.value.tensorrt_log[0]


@pytest.mark.parametrize("kind", ["lean", "dispatch"])
def test_runtimes_without_a_builder_say_what_to_build_with(kind: str) -> None:
    backend = TensorRTFamilyBackend(f"tensorrt_{kind}", module=FakeVendor("10.16.1.11", kind), driver=None)
    with pytest.raises(BackendUnavailableError, match="pip install tensorrt-rtx"):
        backend.create_builder(lambda severity, line: None)


def test_info_and_old_versions() -> None:
    driver: Any = FakeDriver((9, 0))
    info = TensorRTFamilyBackend("tensorrt", module=FakeVendor(V11), driver=driver).info
    assert (info.name, info.version, info.can_build, info.can_run, info.strongly_typed) == (
        "tensorrt", V11, True, True, True,
    )  # fmt: skip
    none: Any = FakeDriver()
    assert not TensorRTFamilyBackend("tensorrt", module=FakeVendor(V8), driver=none).info.can_run
    old = FakeVendor(V8)
    old.__version__ = "8.5.2"
    with pytest.raises(BackendUnavailableError, match=r"tensorrt 8\.5\.2 is installed; 8\.6 is the oldest"):
        TensorRTFamilyBackend("tensorrt", module=old)
