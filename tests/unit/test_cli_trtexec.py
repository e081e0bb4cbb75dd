"""trtexec's names."""

from __future__ import annotations

import click
import pytest

from tests.cli import DIGITS, Run, runner
from trtx_py.cli._app import app
from trtx_py.cli._trtexec import BUILDING, NAMES, translated


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [
        ("build", "--onnx=m.onnx --saveEngine=p.plan", "--output p.plan -- m.onnx"),
        ("build", "--onnx m.onnx --fp16", "--precision fp16 -- m.onnx"),
        ("build", "--minShapes=x:1x3 --optShapes=x:2x3 --maxShapes=x:4x3",
         "--min-shapes x:1x3 --opt-shapes x:2x3 --max-shapes x:4x3"),
        ("build", "--memPoolSize=workspace:1024,tacticSharedMem:48K", "--workspace 1024M --tactic-shared-memory 48K"),
        ("build", "--int8 --noTF32 --sparsity=enable", "--precision int8 --no-tf32 --sparse-weights"),
        ("build", "--int4 --sparsity=disable", "--precision int4-weights"),
        ("build", "--stripWeights", "--strip-plan --refit identical"),
        ("build", "--refit", "--refit all"),
        ("build", "--refit identical m.onnx", "--refit identical m.onnx"),
        ("build", "--refit=individual", "--refit=individual"),
        ("build", "--hardwareCompatibilityLevel=ampere+", "--hardware-compatibility ampere_plus"),
        ("build", "--hardwareCompatibilityLevel=none --runtimePlatform=SameAsBuild", ""),
        ("build", "--dynamicPlugins=a.so,b.so", "--plugin a.so --plugin b.so"),
        ("build", "--setPluginsToSerialize=a.so", "--plugin a.so --embed-plugins"),
        ("build", "--preview=+profileSharing0806,-aliasedPluginIO1003",
         "--preview-feature PROFILE_SHARING_0806=on --preview-feature ALIASED_PLUGIN_IO_10_03=off"),
        ("build", "--useDLACore=1", "--dla-core 1 --no-gpu-fallback"),
        ("build", "--useDLACore=1 --allowGPUFallback", "--dla-core 1"),
        ("build", "--computeCapabilities=89,120", "--compute-capability 8.9 --compute-capability 12.0"),
        ("build", "--skipInference --noBuilderCache", ""),
        ("build", "--tilingOptimizationLevel=3", "--tiling full"),
        ("build", "--tilingOptimizationLevel=none", "--tiling none"),
        ("run", "--loadEngine=p.plan --loadInputs=x:a.bin,y:b.bin", "--input x=a.bin --input y=b.bin -- p.plan"),
        ("run", "--exportOutput=o --dumpOutput", "--output o.json --show"),
        ("run", "--useRuntime=lean --device=1 --verbose", "--backend tensorrt_lean --device=1 --verbose"),
        ("bench", "--infStreams=4 --iterations=10 --useCudaGraph", "--lanes 4 --iterations=10 --graphs"),
        ("profile", "--dumpProfile --separateProfileRun --exportProfile=p.json", "--output p.json"),
        ("build", "m.onnx -- --onnx", "m.onnx -- --onnx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_becomes(command: str, theirs: str, ours: str) -> None:
    assert translated(command, theirs.split()) == ours.split()


@pytest.mark.parametrize("name", [name for name, each in NAMES.items() if each.refused])
def test_refused_names_say_what_to_use(run: Run, name: str) -> None:
    value = NAMES[name].value and "=1"
    run("build", DIGITS, f"--{name}{value}").failed(2, f"--{name} is not understood: ")


@pytest.mark.parametrize(("name", "words"), [("", "it is empty"), ("outputs/", "is the name of a folder")])
def test_outputs_need_a_name(run: Run, name: str, words: str) -> None:
    run("run", f"--onnx={DIGITS}", f"--exportOutput={name}").failed(2, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fp16", "--int8"), "one precision"),
        (("--sparsity=force",), "use enable"),
        (("--memPoolSize=heap:3",), "workspace"),
        (("--saveEngine",), "needs a value"),
        (("--fp16=1",), "takes no value"),
        (("--preview=profileSharing0806",), "+NAME"),
        (("--computeCapabilities=8.9",), "such as 89"),
        (("--hardwareCompatibilityLevel=hopper",), "ampere+"),
        (("--loadInputs=x",), "trtx run"),
        (("--dumpProfile",), "trtx profile"),
        (("-saveEngine=x.plan",), "trtexec's option is --saveEngine"),
        (("-onnx", "x.onnx"), "trtexec's option is --onnx"),
        (("--tilingOptimizationLevel=4",), "expected 0, 1, 2, 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_honoured_is_an_error(run: Run, arguments: tuple[str, ...], words: str) -> None:
    run("build", f"--onnx={DIGITS}", *arguments).failed(2, words, "trtx build --help")


def test_every_name_becomes_options_that_exist() -> None:
    values = {
        "sparsity": "enable", "hardwareCompatibilityLevel": "ampere+", "runtimePlatform": "WindowsAMD64",
        "useRuntime": "full", "memPoolSize": "workspace:1", "preview": "+x", "computeCapabilities": "89",
        "loadInputs": "x:f", "tilingOptimizationLevel": "3",
    }  # fmt: skip
    for name, each in NAMES.items():
        assert bool(each.refused) != bool(each.make), name
        assert bool(each.refused) != bool(each.becomes), name
        for command in () if each.refused else each.commands:
            found = app.get_command(click.Context(app), command)
            assert found is not None
            known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
            value = f"={values.get(name, 'f')}" if each.value else ""
            made = [
                part for part in translated(command, [f"--{name}{value}"]) if part.startswith("--") and part != "--"
            ]
            assert {part.partition("=")[0] for part in made} <= known, (command, name)


def test_names_of_ours_are_not_taken_for_theirs() -> None:
    """A name that both have must be said to be shared, or ours could not be used."""
    from trtx_py.cli._trtexec import _SHARED

    ours: set[str] = set()
    for command in BUILDING:
        found = app.get_command(click.Context(app), command)
        assert found is not None
        ours |= {option[2:] for parameter in found.params for option in parameter.opts if option.startswith("--")}
    assert ours & NAMES.keys() == _SHARED
