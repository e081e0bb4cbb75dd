"""precision= of a build: a conversion where typing is strong, flags and calibrators where it is weak; read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import trtx_py as trtx
from mock_backend import MockBackend
from tests.quantize_models import cnn, images
from tests.unit.backends.fake_vendor import FakeVendor, Layer, Tensor
from trtx_py._precision import PrecisionRequest, ReadyNetwork, read_back, ready_network
from trtx_py._types import BackendInfo, BuildOptions, DataType, LayerPrecision
from trtx_py.backends.tensorrt import TensorRTFamilyBackend
from trtx_py.backends.tensorrt._layers import inspected_precisions, network_precisions
from trtx_py.quantize import convert
from trtx_py.quantize._calibrator import TensorRTCalibrator

MODEL = cnn().SerializeToString()
RANGES = [{"image": ((1, 1, 8, 8), (8, 1, 8, 8), (32, 1, 8, 8))}]
WORDS = ("fp16", "bf16", "int8", "fp8", "int4-weights")


def options_for(word: str | None) -> dict[str, Any]:
    return {"calibration": trtx.Calibration(images(), method="minmax")} if word in ("int8", "fp8") else {}


def build(backend: Any, model: bytes = MODEL, **options: Any) -> trtx.Plan:
    with trtx.Builder(None, backend) as builder, builder.create_network() as network, builder.create_config() as config:
        network.parse_onnx(model)
        for name, value in options.items():
            setattr(config, name, value)
        with builder.create_optimization_profile() as profile:
            profile.set_shape("image", *RANGES[0]["image"])
            config.add_optimization_profile(profile)
        return builder.build_serialized_network_sync(network, config)


# Where typing is strong


@pytest.mark.parametrize("word", WORDS)
async def test_each_word_builds_and_says_what_was_built(word: str, mock_backend: MockBackend) -> None:
    names = {"fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8", "int4-weights": "INT4"}
    given = {**options_for(word), "require_precision": True}
    async with trtx.open_engine(MODEL, mock_backend, precision=word, profiles=RANGES, **given) as engine:
        header = engine.plan_header
        assert header.precision == word
        assert header.build_options["layers_by_precision"][names[word]] >= 1
        assert [t.dtype for t in engine.io_tensors] == [DataType.FLOAT, DataType.FLOAT]
        heavy = [layer for layer in engine.layer_precisions() if layer.multiplies]
        wanted = {"first", "second", "dense"} if word != "int4-weights" else {"dense"}
        assert {layer.name for layer in heavy if layer.computes_in(word)} == wanted
        found = (await engine.infer({"image": images()}))["probabilities"]
        comparison = await trtx.compare(MODEL, engine, images(), **options_for(word))
    error = comparison.outputs["probabilities"]
    assert error.rows == len(found) == 24
    assert 0 < error.relative < 0.2
    assert comparison.layers


def test_the_network_of_the_caller_is_left_alone(mock_backend: MockBackend) -> None:
    with (
        trtx.Builder(None, mock_backend) as builder, builder.create_network() as network,
        builder.create_config() as config,
    ):  # fmt: skip
        network.parse_onnx(MODEL)
        config.precision = "fp16"
        with builder.create_optimization_profile() as profile:
            profile.set_shape("image", *RANGES[0]["image"])
            config.add_optimization_profile(profile)
        half = builder.build_serialized_network_sync(network, config)
        config.precision = None
        plain = builder.build_serialized_network_sync(network, config)
        assert {layer.dtype for layer in network.layer_precisions()} == {DataType.FLOAT}
    assert half.header.onnx_sha256 == plain.header.onnx_sha256
    assert "layers_by_precision" not in plain.header.build_options


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"precision": "int8"}, trtx.CalibrationError, "pass calibration=Calibration"),
        ({"precision": "fp16", **options_for("int8")}, trtx.InvalidArgumentError, "leave calibration out"),
        ({"precision_policy": trtx.PrecisionPolicy()}, trtx.InvalidArgumentError, "converts nothing"),
        ({"require_precision": True}, trtx.InvalidArgumentError, "set precision too"),
        ({"precision": "fp8", "compute_capabilities": ("8.6",), **options_for("fp8")}, trtx.PrecisionError,
         r"mock \S+ cannot build precision='fp8' for compute capability 8.6: it needs 8.9"),
        ({"precision": "bf16", "compute_capabilities": ("8.9", "7.5")}, trtx.PrecisionError, "7.5: it needs 8.0"),
        ({"precision": "int4-weights", "compute_capabilities": ("7.5",)}, trtx.PrecisionError, "it needs 8.0"),
        ({"precision": "fp16", "precision_policy": trtx.PrecisionPolicy(keep=frozenset({"x"}))},
         trtx.InvalidArgumentError, "keep names x"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(mock_backend: MockBackend, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(mock_backend, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("calibration", images()), ("precision_policy", {"keep": "x"}), ("require_precision", "yes")]
)
def test_options_of_a_wrong_type_are_refused(mock_backend: MockBackend, name: str, value: Any) -> None:
    with pytest.raises(trtx.InvalidArgumentError, match=name):
        build(mock_backend, **{name: value})


def test_a_model_with_ranges_of_its_own_needs_no_calibration(mock_backend: MockBackend) -> None:
    quantized = convert(MODEL, "int8", **options_for("int8")).serialized()
    plan = build(mock_backend, quantized, precision="int8", require_precision=True)
    assert plan.header.build_options["layers_by_precision"]["INT8"] == 3
    with pytest.raises(trtx.InvalidArgumentError, match="nodes already"):
        build(mock_backend, quantized, precision="int8", **options_for("int8"))


def test_require_precision_fails_a_build_that_became_something_else(mock_backend: MockBackend) -> None:
    quantized = convert(MODEL, "int8", **options_for("int8")).serialized()
    with pytest.raises(trtx.PrecisionError) as caught:
        build(mock_backend, quantized, precision="fp8", require_precision=True)
    assert "0 of 3 layers that multiply compute in it" in str(caught.value)
    assert caught.value.problems[0] == "CONVOLUTION 'first' computes in INT8"


def test_what_the_policy_keeps_is_no_failure(mock_backend: MockBackend) -> None:
    policy = trtx.PrecisionPolicy(keep=frozenset({"second"}))
    plan = build(mock_backend, precision="fp16", precision_policy=policy, require_precision=True)
    assert plan.header.build_options["precision_policy"] == {"keep": ["second"]}


def test_a_build_that_is_cancelled_while_it_calibrates_leaves_nothing(mock_backend: MockBackend) -> None:
    aborted = [False]

    def batches() -> Iterator[dict[str, Any]]:
        for image in images():
            aborted[0] = True
            yield {"image": image[None]}

    class Reader:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return batches()

    from trtx_py._onnx_source import load_onnx

    request = PrecisionRequest("int8", trtx.Calibration(Reader()))
    native = mock_backend.create_builder(lambda severity, line: None)
    network = native.create_network()
    network.parse_onnx(MODEL, None)
    with (
        pytest.raises(trtx.BuilderError, match="cancelled while it calibrated"),
        ready_network(
            native, network, load_onnx(MODEL, None), mock_backend.info, BuildOptions(), request,
            targets=(), cancelled=lambda: aborted[0],
        ),
    ):  # fmt: skip
        pass
    network.destroy()
    native.destroy()


# Where typing is weak


class FakeMemory:
    """The part of the driver that the calibrator uses."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.copied: list[bytes] = []
        self.synchronized = 0

    def cuMemAlloc(self, nbytes: int) -> int:
        self.blocks[256 * (len(self.blocks) + 1)] = bytes(nbytes)
        return 256 * len(self.blocks)

    def cuMemFree(self, address: int) -> None:
        del self.blocks[address]

    def cuMemcpyHtoDAsync(self, address: int, host: int, nbytes: int, stream: int) -> None:
        import ctypes

        self.copied.append(ctypes.string_at(host, nbytes))

    def cuStreamSynchronize(self, stream: int) -> None:
        self.synchronized += 1


class Weak:
    """TensorRT 8.6 or 10 with calibrators, over fakes; ``during`` plays the builder."""

    def __init__(self, version: str = "10.3.0.26") -> None:
        self.vendor = FakeVendor(version)
        self.vendor.model_inputs = [Tensor("image", self.vendor.DataType.FLOAT, (-1, 1, 8, 8))]
        for name in ("IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"):
            setattr(self.vendor, name, type(name, (), {"__init__": lambda self: None}))
        self.memory = FakeMemory()
        self.backend = TensorRTFamilyBackend("tensorrt", module=self.vendor, driver=self.memory)  # type: ignore[arg-type]
        self.builder = self.backend.create_builder(lambda severity, line: None)
        self.config: Any = None
        original = self.vendor.Builder.create_builder_config

        def configured(builder: Any) -> Any:
            self.config = original(builder)
            self.config.int8_calibrator = None
            self.config.calibration_profile = None
            self.config.set_calibration_profile = lambda p: setattr(self.config, "calibration_profile", p)
            return self.config

        self.vendor.Builder.create_builder_config = configured  # type: ignore[method-assign, assignment]

    def build(self, calibration: trtx.Calibration, sha256: str = "m") -> None:
        network = self.builder.create_network()
        network.parse_onnx(b"model", None)
        source = TensorRTCalibrator(calibration, network.inputs, sha256, "tensorrt")
        ranges = {"image": trtx.ShapeRange(*RANGES[0]["image"])}
        self.builder.build_serialized_network(
            network, BuildOptions(precision="int8", calibrator=source, profiles=(ranges,)), None
        )


@pytest.mark.parametrize(
    ("method", "name"), [("entropy", "IInt8EntropyCalibrator2"), ("minmax", "IInt8MinMaxCalibrator")]
)
@pytest.mark.parametrize("version", ["8.6.0", "10.3.0.26"])
def test_tensorrts_calibrator_gets_every_batch_and_keeps_its_cache(
    version: str, method: str, name: str, tmp_path: Path
) -> None:
    weak, seen = Weak(version), []

    def during(config: Any) -> None:
        calibrator = config.int8_calibrator
        assert type(calibrator).__mro__[1].__name__ == name
        assert calibrator.get_batch_size() == 8
        seen.append(calibrator.read_calibration_cache())
        while seen[-1] is None and calibrator.get_batch(["image"]) is not None:
            assert len(weak.memory.blocks) == 1
        calibrator.write_calibration_cache(memoryview(b"table"))

    weak.vendor.during_build = during
    given = trtx.Calibration(images(20), method=method, cache=tmp_path / "cache.json")
    weak.build(given)
    # 20 rows are two batches of 8; TensorRT would read past the end of the last 4.
    assert b"".join(weak.memory.copied) == images(20)[:16].tobytes()
    assert weak.memory.synchronized == 2
    assert weak.memory.blocks == {}
    assert {flag.name for flag in weak.config.flags} == {"INT8"}
    assert weak.config.calibration_profile.shapes == {"image": ((8, 1, 8, 8),) * 3}
    weak.build(given)
    weak.build(given, sha256="another model")
    assert seen == [None, b"table", None]
    assert len(json.loads((tmp_path / "cache.json").read_text())["entries"]) == 2


def test_tensorrts_calibrator_gets_no_values_that_are_not_finite() -> None:
    data = images(16)
    data[3, 0, 3, 3] = np.inf
    with pytest.raises(trtx.CalibrationError, match="input 'image' have values that are not finite"):
        Weak().build(trtx.Calibration(data))


def test_what_goes_wrong_in_a_callback_is_raised_behind_the_build() -> None:
    weak = Weak()
    broken = [{"image": images(8)}, {"image": images(8).astype(np.float64)}]

    def during(config: Any) -> None:
        assert config.int8_calibrator.get_batch(["image"]) is not None
        assert config.int8_calibrator.get_batch(["image"]) is None
        assert config.int8_calibrator.read_calibration_cache() is None

    weak.vendor.during_build = during
    with pytest.raises(trtx.DTypeError, match="batch 1: input 'image' is float64"):
        weak.build(trtx.Calibration(broken))
    assert weak.memory.blocks == {}


def test_a_version_without_calibrators_is_named() -> None:
    weak = Weak()
    delattr(weak.vendor, "IInt8EntropyCalibrator2")
    with pytest.raises(trtx.BuilderError, match=r"tensorrt 10\.3\.0\.26 has no IInt8EntropyCalibrator2"):
        weak.build(trtx.Calibration(images()))
    with pytest.raises(trtx.InvalidArgumentError, match=r"'entropy' or 'minmax', and not by 'percentile 99\.99'"):
        weak.build(trtx.Calibration(images(), method="percentile"))


WEAK = BackendInfo("tensorrt", "tensorrt", "10.3.0.26", can_build=True, can_run=True, strongly_typed=False)


@pytest.mark.parametrize(("word", "expected"), [("fp16", "fp16"), ("int8", "int8"), ("fp8", "fp8")])
def test_weak_typing_gets_flags_and_converts_what_no_flag_makes(
    word: str, expected: str, mock_backend: MockBackend
) -> None:
    from trtx_py._onnx_source import load_onnx

    native = mock_backend.create_builder(lambda severity, line: None)
    network = native.create_network()
    network.parse_onnx(MODEL, None)
    request = PrecisionRequest(word, options_for(word).get("calibration"))
    with ready_network(
        native, network, load_onnx(MODEL, None), WEAK, BuildOptions(precision=word), request,
        targets=("8.9",), cancelled=lambda: False,
    ) as ready:  # fmt: skip
        assert ready.options.precision == expected
        assert (ready.options.calibrator is not None) == (word == "int8")
        assert (ready.native is network) == (word != "fp8")
    network.destroy()
    native.destroy()


def test_a_policy_is_refused_where_tensorrt_chooses() -> None:
    request = PrecisionRequest("fp16", policy=trtx.PrecisionPolicy())
    nothing: Any = SimpleNamespace(inputs=())
    with (
        pytest.raises(trtx.InvalidArgumentError, match=r"tensorrt 10\.3\.0\.26 is weakly typed"),
        ready_network(nothing, nothing, nothing, WEAK, BuildOptions(), request, targets=(), cancelled=lambda: False),
    ):
        pass


# Reading back


def inspected(name: str, kind: str, given: str, made: str) -> dict[str, Any]:
    return {
        "Name": name, "LayerType": kind, "Inputs": [{"Name": "a", "Format/Datatype": given}],
        "Outputs": [{"Name": "b", "Format/Datatype": made}], "ParameterType": "Convolution",
        "Weights": {"Type": given.split()[-1], "Count": 3},
    }  # fmt: skip


def test_the_inspectors_json_is_read() -> None:
    layers = inspected_precisions(json.dumps({"Layers": [
        inspected("conv1 + relu1", "CaskConvolution", "Row major linear FP16 format", "Half"),
        inspected("conv2", "CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format", "Int8"),
        "a name alone",
    ]}))  # fmt: skip
    assert [(x.name, x.kind, x.inputs, x.outputs) for x in layers] == [
        ("conv1 + relu1", "CONVOLUTION", (DataType.HALF,), (DataType.HALF,)),
        ("conv2", "CONVOLUTION", (DataType.INT8,), (DataType.INT8,)),
    ]
    assert inspected_precisions("no JSON") == ()


def test_what_tensorrt_chose_is_judged_by_the_inspector() -> None:
    chosen = (LayerPrecision("conv", "CONVOLUTION", (DataType.FLOAT, DataType.FLOAT), (DataType.FLOAT,)),)
    ready: Any = ReadyNetwork(SimpleNamespace(), BuildOptions())
    required = PrecisionRequest("fp16", required=True)
    with pytest.raises(trtx.PrecisionError, match="CONVOLUTION 'conv' computes in FLOAT"):
        read_back(WEAK, ready, required, lambda: chosen)
    assert read_back(WEAK, ready, PrecisionRequest("fp32", required=True), lambda: chosen) == chosen
    # A node that was kept excuses its own layers, not those of another whose name begins alike.
    kept: Any = ReadyNetwork(SimpleNamespace(), BuildOptions(), frozenset({"conv"}), frozenset({"conv_1"}))
    both = (
        LayerPrecision("conv_1", "CONVOLUTION", (DataType.FLOAT, DataType.FLOAT), (DataType.FLOAT,)),
        LayerPrecision("last", "CONVOLUTION", (DataType.HALF, DataType.HALF), (DataType.HALF,)),
    )
    with pytest.raises(trtx.PrecisionError, match="CONVOLUTION 'conv_1' computes in FLOAT"):
        read_back(WEAK, kept, required, lambda: both)
    with pytest.raises(trtx.PrecisionError, match="tells no layer's types"):
        read_back(WEAK, ready, required, lambda: ())

    def nothing_runs() -> Any:
        raise trtx.BackendUnavailableError("no driver")

    with pytest.raises(trtx.PrecisionError, match=r"cannot be loaded here to see what it chose \(no driver\)"):
        read_back(WEAK, ready, required, nothing_runs)
    assert read_back(WEAK, ready, PrecisionRequest("fp16"), nothing_runs) == ()


def test_a_network_is_read_through_dequantization() -> None:
    types = FakeVendor("11.4.0.106").DataType

    def layer(kind: str, inputs: list[Any], output: Any) -> Any:
        made = Layer(kind, output)
        vars(made).update(name=kind.lower(), num_inputs=len(inputs), get_input=inputs.__getitem__)
        return made

    dtypes = {"x": "FLOAT", "q": "INT8", "d": "FLOAT", "s": "FLOAT", "w": "FLOAT", "y": "FLOAT"}
    tensors = {name: Tensor(name, types[dtype], (1,)) for name, dtype in dtypes.items()}
    layers = [
        layer("QUANTIZE", [tensors["x"]], tensors["q"]), layer("DEQUANTIZE", [tensors["q"]], tensors["d"]),
        layer("SHUFFLE", [tensors["d"]], tensors["s"]),
        layer("MATRIX_MULTIPLY", [tensors["s"], tensors["w"]], tensors["y"]),
    ]  # fmt: skip
    network = SimpleNamespace(num_layers=4, get_layer=layers.__getitem__)
    product = network_precisions(network)[-1]
    assert product.inputs == (DataType.INT8, DataType.FLOAT)
    assert not product.computes_in("int8")
