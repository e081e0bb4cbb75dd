"""Profiles, options, progress and the plan."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from mock_backend import MockBackend, PlanPayload
from trtx_py._errors import BuilderError, PlanError, VersionMismatchError
from trtx_py._types import BuildOptions, Severity, ShapeRange


def refusal(rig, model, *profiles, **options):
    with pytest.raises(BuilderError) as caught:
        rig.build(model, *profiles, **options)
    assert any(severity is Severity.ERROR for severity, _ in rig.lines)
    return str(caught.value)


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ((), ["no optimization profile has been defined", "'x'"]),
        (({"x": ShapeRange((4, 4), (2, 4), (8, 4))},), ["MIN<=OPT<=MAX"]),
        (({"x": ShapeRange((1,), (2,), (8,))},), ["has 2 dimensions", "gives 1"]),
        (({"x": ShapeRange((1, 4), (2, 4), (8, 5))},), ["axis 1", "max=5", "tensor has 4"]),
        (({"x": ShapeRange((-1, 4), (2, 4), (8, 4))},), ["negative"]),
        (({"x": ShapeRange((1, 4), (2, 4), (8, 4)), "q": ShapeRange((1,), (1,), (1,))},), ["'q'", "'x'"]),
        (({"x": ShapeRange((1, 4), (2, 4), (8, 4))}, {}), ["profile 1 has no range for 'x'"]),
    ],
)
def test_profiles_that_do_not_fit(rig, models, profiles, words):
    text = refusal(rig, models.relu(), *profiles)
    assert all(word in text for word in words), text


def test_named_dimensions_must_agree(rig, models):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    model = models.make([node], [("x", "FLOAT", ["N"]), ("w", "FLOAT", ["N"])], [("y", "FLOAT", ["N"])])
    text = refusal(rig, model, {"x": ShapeRange((1,), (2,), (8,)), "w": ShapeRange((1,), (3,), (8,))})
    assert "Dimensions with name N must be equal: x has 2, w has 3" in text


def test_question_marks_are_a_name_like_any_other(rig, models):
    text = refusal(rig, models.relu(["?", "?"]), {"x": ShapeRange((1, 4), (2, 4), (8, 4))})
    assert "Dimensions with name ? must be equal: x has 2, x has 4" in text
    plan = rig.build(models.relu(["?", "?"]), {"x": ShapeRange((1, 1), (2, 2), (8, 4))})
    assert PlanPayload.from_bytes(plan).num_profiles == 1


def test_shape_tensor_profile_holds_values(rig, models):
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    model = models.make([node], [("x", "FLOAT", [8]), ("s", "INT64", [2])], [("y", "FLOAT", ["a", "b"])])
    text = refusal(rig, model, {"s": ShapeRange((1,), (2,), (8,))})
    assert "has 2 values" in text
    engine = rig.engine(rig.build(model, {"s": ShapeRange((1, 1), (2, 4), (8, 8))}))
    assert {t.name: t.ranges for t in engine.io_tensors}["s"] == (ShapeRange((1, 1), (2, 4), (8, 8)),)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"precision": "fp16"}, "strongly typed"),
        ({"precision": "int8"}, "Q/DQ"),
        ({"precision": "huge"}, "unknown"),
        ({"flags": ("FP16",)}, "convert it before the build"),
        ({"flags": ("NOPE",)}, "known are"),
        ({"flags": ("STRIP_PLAN",)}, "STRIP_PLAN"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes"),
        ({"max_aux_streams": -1}, "max_aux_streams"),
        ({"compute_capabilities": ("sm89",)}, "8.9"),
    ],
)
def test_options_that_cannot_be_honoured(rig, models, options, word):
    assert word in refusal(rig, models.relu(), models.N4, **options)


def test_fp32_means_a_float32_model(rig, models):
    rig.build(models.relu(), models.N4, precision="fp32", flags=("TF32", "REFIT"), optimization_level=3)
    assert "float16" in refusal(rig, models.relu(elem="FLOAT16"), models.N4, precision="fp32")


def test_no_outputs(rig, models):
    node = helper.make_node("Relu", ["x"], ["y"])
    assert "at least one output" in refusal(rig, models.make([node], [("x", "FLOAT", [2])], []))


def test_network_of_another_builder(rig, models):
    network = rig.parse(models.relu())
    other = rig.backend.create_builder(rig.log)
    with pytest.raises(BuilderError, match="not created by this builder"):
        other.build_serialized_network(network, BuildOptions(profiles=(models.N4,)), None)
    other.destroy()


class Progress:
    def __init__(self, stop_after=None):
        self.events, self.stop_after, self.open = [], stop_after, []

    def phase_start(self, phase, parent, steps):
        assert parent is None or parent in self.open
        self.open.append(phase)
        self.events.append((phase, steps))

    def step_complete(self, phase, step):
        assert phase in self.open
        self.events.append((phase, step))
        return self.stop_after is None or len(self.events) < self.stop_after

    def phase_finish(self, phase):
        self.open.remove(phase)


def test_progress(rig, models):
    progress = Progress()
    rig.build(models.relu(), models.N4, progress=progress)
    assert progress.open == []
    assert ("Tactic selection", 1) in progress.events


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_progress_can_stop_the_build(rig, models, stop_after):
    progress = Progress(stop_after)
    with pytest.raises(BuilderError, match="cancelled"):
        rig.build(models.relu(), models.N4, progress=progress)
    assert progress.open == []


def test_plan_layout(rig, models):
    plan = rig.build(models.relu(), models.N4)
    assert plan[:4] == b"mtrt"
    assert int.from_bytes(plan[16:24], "little") == len(plan)
    assert tuple(plan[24:28]) == (1, 0, 0, 0)
    payload = PlanPayload.from_bytes(plan)
    assert (payload.flavour, payload.compute_capabilities) == ("mock", ("8.9",))
    assert rig.build(models.relu(), models.N4) == plan  # the same build gives the same bytes


@pytest.mark.parametrize("position", [0, 5, 16, 25, 30, 40, 70, -1])
def test_a_changed_byte_is_found(rig, models, position):
    plan = bytearray(rig.build(models.relu(), models.N4))
    plan[position] ^= 0x40
    with pytest.raises(PlanError):
        rig.engine(bytes(plan))


def test_length_is_exact(rig, models):
    plan = rig.build(models.relu(), models.N4)
    with pytest.raises(PlanError, match="cut off"):
        rig.engine(plan[: len(plan) // 2])
    with pytest.raises(PlanError, match="cut off"):
        rig.engine(plan[:10])
    with pytest.raises(PlanError, match="appended"):
        rig.engine(plan + b"\0")
    rig.engine(memoryview(plan))


def test_other_version_and_other_gpu(rig, rig_with, models):
    plan = rig.build(models.relu(), models.N4)
    newer = rig_with(version="2.0.0.0")
    with pytest.raises(VersionMismatchError) as version:
        newer.engine(plan)
    assert (version.value.plan, version.value.runtime) == ("mock 1.0.0.0", "mock 2.0.0.0")
    both = rig.build(models.relu(), models.N4, compute_capabilities=("8.9", "9.0"))
    hopper = rig_with(compute_capability="9.0")
    with pytest.raises(VersionMismatchError) as gpu:
        hopper.engine(plan)
    assert ("8.9" in gpu.value.plan, "9.0" in gpu.value.runtime) == (True, True)
    hopper.engine(both)


def test_weights_take_memory(rig_with, models):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weights = {"w": np.zeros(100_000, np.float32)}
    model = models.make([node], [("x", "FLOAT", [100_000])], [("y", "FLOAT", [100_000])], weights=weights)
    rig = rig_with()
    before = rig.driver.cuMemGetInfo()[0]
    engine = rig.engine(rig.build(model))
    assert engine.weights_bytes >= 400_000
    assert before - rig.driver.cuMemGetInfo()[0] >= 400_000
    small = rig_with(memory_bytes=100_000)
    with pytest.raises(Exception, match="weights of engine"):
        small.engine(small.build(model))


def test_options_of_the_backend_are_checked():
    for bad in ({"operators": "some"}, {"compute_capability": "89"}, {"version": "one"}, {"memory_bytes": 0}):
        with pytest.raises(ValueError):
            MockBackend(**bad)
