"""trtexec's options by name: what each becomes here, or why it is refused. docs/reference/trtexec.md is made of it.

Nothing is ignored: an option that cannot be honoured is an error that names it and the nearest equivalent. Those
without effect here (because they ask for what is always so) say that in the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

BUILDING = ("build", "run", "bench", "profile")
RUNNING = ("run", "bench", "profile")
MEASURING = ("bench", "profile")
EVERY = BUILDING

Arguments = list[str]


@dataclass(frozen=True)
class Name:
    """One option of trtexec.

    Attributes:
        name: without dashes.
        value: its value as trtexec's help writes it; empty for a flag.
        commands: where it is understood.
        becomes: what it becomes, for people; empty if it is refused.
        make: our arguments for its value.
        refused: why it is not understood, and what to use.
    """

    name: str
    value: str = ""
    commands: tuple[str, ...] = EVERY
    becomes: str = ""
    make: Callable[[str], Arguments] | None = None
    refused: str = ""


def _as(option: str, value: str = "VALUE", commands: tuple[str, ...] = BUILDING, name: str = "") -> Name:
    """The same value under our name."""
    return Name(name, value, commands, f"`{option} {value}`", lambda given: [option, given])


def _flag(*ours: str, commands: tuple[str, ...] = BUILDING, name: str = "") -> Name:
    return Name(name, "", commands, f"`{' '.join(ours)}`", lambda given: list(ours))


def _so(why: str, commands: tuple[str, ...] = BUILDING, value: str = "", name: str = "") -> Name:
    """Asks for what is so anyway."""
    return Name(name, value, commands, why, lambda given: [])


def _no(why: str, value: str = "", name: str = "") -> Name:
    return Name(name, value, EVERY, refused=why)


class _BadValueError(ValueError):
    """A value that is understood and cannot be honoured."""


def _positional(given: str) -> Arguments:
    # After the dashes nothing is an option, whatever the file is called; put there by `translated`.
    return [_POSITIONAL, given]


_POSITIONAL = "\0positional"


_POOLS = {
    "workspace": "--workspace", "dlaSRAM": "--dla-sram", "dlaLocalDRAM": "--dla-local-dram",
    "dlaGlobalDRAM": "--dla-global-dram", "tacticSharedMem": "--tactic-shared-memory",
}  # fmt: skip


def _pools(given: str) -> Arguments:
    found: Arguments = []
    for part in given.split(","):
        name, _, size = part.partition(":")
        if name not in _POOLS or not size:
            raise _BadValueError(f"{part!r}: expected {', '.join(_POOLS)} with a size")
        # trtexec counts in MiB where no unit is given.
        found += [_POOLS[name], f"{size}M" if size[-1].isdigit() else size]
    return found


def _inputs(given: str) -> Arguments:
    found: Arguments = []
    for part in given.split(","):
        name, colon, file = part.partition(":")
        if not colon:
            raise _BadValueError(f"{part!r}: expected NAME:FILE")
        found += ["--input", f"{name.strip(chr(39))}={file}"]
    return found


def _choice(option: str, words: dict[str, Sequence[str]]) -> Callable[[str], Arguments]:
    def make(given: str) -> Arguments:
        if given not in words:
            raise _BadValueError(f"{given!r} is not understood; expected {', '.join(words)}")
        return [option, *words[given]] if words[given] and option else list(words[given])

    return make


def _sparsity(given: str) -> Arguments:
    if given == "force":
        raise _BadValueError("'force' overwrites weights with zeros, which changes what the model computes; use enable")
    return _choice("", {"enable": ["--sparse-weights"], "disable": []})(given)


_FEATURES = {
    "profileSharing0806": "PROFILE_SHARING_0806", "aliasedPluginIO1003": "ALIASED_PLUGIN_IO_10_03",
    "runtimeActivationResize": "RUNTIME_ACTIVATION_RESIZE_10_10", "disableExternalTacticSourcesForCore0805":
    "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",
}  # fmt: skip


def _preview(given: str) -> Arguments:
    found: Arguments = []
    for part in given.split(","):
        sign, name = part[:1], part[1:]
        if sign not in "+-" or not name:
            raise _BadValueError(f"{part!r}: expected +NAME or -NAME")
        found += ["--preview-feature", f"{_FEATURES.get(name, name)}={'on' if sign == '+' else 'off'}"]
    return found


def _capabilities(given: str) -> Arguments:
    found: Arguments = []
    for part in given.split(","):
        if not part.isdigit() or len(part) < 2:
            raise _BadValueError(f"{part!r}: expected numbers such as 89 or 120")
        found += ["--compute-capability", f"{part[:-1]}.{part[-1]}"]
    return found


def _plugins(given: str) -> Arguments:
    return [each for part in given.split(",") for each in ("--plugin", part)]


def _output(given: str) -> Arguments:
    # What has no name is left for --output to refuse: it would be the name of a hidden file.
    named = given.lower().endswith(".json") or not os.path.basename(given)
    return ["--output", given if named else f"{given}.json"]


_TILING = ("none", "fast", "moderate", "full")

_NAMES: dict[str, Name] = {
    "onnx": Name("", "FILE", EVERY, "the argument `MODEL`", _positional),
    "loadEngine": Name("", "FILE", RUNNING, "the argument `MODEL`", _positional),
    "saveEngine": _as("--output", "FILE", ("build",)),
    "saveAllEngines": _no("one plan is built at a time; use --output"),
    "model": _no("Caffe models are not read; export ONNX", "FILE"),
    "deploy": _no("Caffe models are not read; export ONNX", "FILE"),
    "uff": _no("UFF models are not read; export ONNX", "FILE"),
    "getPlanVersionOnly": _no("use trtx inspect"),
    "skipInference": _so("nothing: `build` never infers", ("build",)),
    "buildOnly": _so("nothing: `build` never infers", ("build",)),
    # shapes
    "minShapes": _as("--min-shapes", "SPEC"),
    "optShapes": _as("--opt-shapes", "SPEC"),
    "maxShapes": _as("--max-shapes", "SPEC"),
    "shapes": _as("--shapes", "SPEC"),
    "minShapesCalib": _no("calibration takes the samples as they are; use --calibration-data", "SPEC"),
    "optShapesCalib": _no("calibration takes the samples as they are; use --calibration-data", "SPEC"),
    "maxShapesCalib": _no("calibration takes the samples as they are; use --calibration-data", "SPEC"),
    "useProfile": _no("the profile is chosen by the shapes; use --shapes", "N"),
    "inputIOFormats": _no("inputs have the types of the model and are linear; change the model", "SPEC"),
    "outputIOFormats": _no("outputs have the types of the model and are linear; change the model", "SPEC"),
    "directIO": _no("inputs and outputs are linear"),
    # precisions
    "fp16": _flag("--precision", "fp16"),
    "bf16": _flag("--precision", "bf16"),
    "int8": _flag("--precision", "int8"),
    "fp8": _flag("--precision", "fp8"),
    "int4": _flag("--precision", "int4-weights"),
    "best": _no("no precision is chosen for you: build one plan for each --precision and measure both, or say one"),
    "noTF32": _flag("--no-tf32"),
    "stronglyTyped": _no("without --precision types come from the model where TensorRT is strongly typed (RTX, 11)"),
    "calib": _no("TensorRT's own caches are not read; use --calibration-data and --calibration-cache", "FILE"),
    "calibProfile": _no("calibration takes the samples as they are; use --calibration-data", "N"),
    "dynamicRange": _no("ranges come from --calibration-data, or from Q/DQ nodes of the model", "SPEC"),
    "precisionConstraints": _no("use --require-precision, and --keep NODE for what stays in FP32", "SPEC"),
    "layerPrecisions": _no("use --keep NODE for what stays in FP32", "SPEC"),
    "layerOutputTypes": _no("use --keep NODE for what stays in FP32", "SPEC"),
    "layerDeviceTypes": _no("use --dla-core for the whole network", "SPEC"),
    # memory and speed of the build
    "memPoolSize": Name(
        "", "SPEC", BUILDING, "`--workspace`, `--dla-sram`, `--dla-local-dram`, `--dla-global-dram`, "
        "`--tactic-shared-memory`; MiB where no unit is given", _pools),
    "builderOptimizationLevel": _as("--optimization-level", "N"),
    "maxAuxStreams": _as("--max-aux-streams", "N"),
    "maxTactics": _as("--max-tactics", "N"),
    "avgTiming": _as("--timing-iterations", "N"),
    "tilingOptimizationLevel": Name(
        "", "N", BUILDING, "`--tiling`: 0 is none, 1 fast, 2 moderate, 3 full",
        _choice("--tiling", {**{str(n): [word] for n, word in enumerate(_TILING)}, **{w: [w] for w in _TILING}})),
    "l2LimitForTiling": _as("--tiling-l2", "N"),
    "tacticSources": _no("trtexec adds to and takes from defaults; say them all: --tactic-sources NAME,...", "SPEC"),
    "preview": Name("", "SPEC", BUILDING, "`--preview-feature NAME=on` or `=off`", _preview),
    "timingCacheFile": _as("--timing-cache", "FILE"),
    "noBuilderCache": _so("nothing: without `--timing-cache` there is none"),
    "noCompilationCache": _no("whether compiled kernels are shared inside a build cannot be chosen"),
    "errorOnTimingCacheMiss": _flag("--timing-cache-require-hit"),
    "sparsity": Name("", "enable|disable", BUILDING, "`--sparse-weights`, or nothing; `force` is refused", _sparsity),
    "profilingVerbosity": _as("--profiling-verbosity", "layer_names_only|detailed|none"),
    "restricted": _no("safe engines are not built; use --engine-capability safety where TensorRT has it"),
    "safe": _flag("--engine-capability", "safety"),
    "consistency": _no("safe engines are not checked"),
    "buildDLAStandalone": _flag("--engine-capability", "dla_standalone"),
    "useDLACore": _as("--dla-core", "N"),
    "allowGPUFallback": _so("nothing, beside `useDLACore`; without it `--no-gpu-fallback` is added"),
    # what the plan may do later
    "refit": _flag("--refit", "all"),
    "stripWeights": _flag("--strip-plan", "--refit", "identical"),
    "stripAllWeights": _flag("--strip-plan", "--refit", "all"),
    "markDebug": _no("debug tensors are not read; use trtx compare to find where errors begin", "SPEC"),
    "allowWeightStreaming": _flag("--weight-streaming"),
    "weightStreaming": _flag("--weight-streaming"),
    "weightStreamingBudget": _as("--weight-streaming-bytes", "SIZE", RUNNING),
    "versionCompatible": _flag("--version-compatible"),
    "vc": _flag("--version-compatible"),
    "excludeLeanRuntime": _flag("--exclude-runtime"),
    "hardwareCompatibilityLevel": Name(
        "", "none|ampere+|sameComputeCapability", BUILDING, "`--hardware-compatibility`, or nothing",
        _choice("", {
            "none": [], "ampere+": ["--hardware-compatibility", "ampere_plus"],
            "sameComputeCapability": ["--hardware-compatibility", "same_compute_capability"],
        })),
    "runtimePlatform": Name(
        "", "SameAsBuild|WindowsAMD64", BUILDING, "`--runtime-platform`, or nothing",
        _choice("", {"SameAsBuild": [], "WindowsAMD64": ["--runtime-platform", "windows_amd64"]})),
    "computeCapabilities": Name("", "LIST", BUILDING, "`--compute-capability X.Y` for each", _capabilities),
    "tempdir": _no("set TMPDIR", "DIR"),
    "tempfileControls": _no("temporary files cannot be forbidden; set TMPDIR", "SPEC"),
    # plugins
    "plugins": Name("", "FILES", BUILDING, "`--plugin FILE` for each", _plugins),
    "staticPlugins": Name("", "FILES", BUILDING, "`--plugin FILE` for each", _plugins),
    "dynamicPlugins": Name("", "FILES", BUILDING, "`--plugin FILE` for each", _plugins),
    "setPluginsToSerialize": Name(
        "", "FILES", BUILDING, "`--plugin FILE` for each, with `--embed-plugins`",
        lambda given: [*_plugins(given), "--embed-plugins"]),
    "ignoreParsedPluginLibs": _no("plugins are never looked for by themselves; leave it out"),
    # running
    "useRuntime": Name(
        "", "full|lean|dispatch", RUNNING, "`--backend`",
        _choice("--backend", {"full": ["tensorrt"], "lean": ["tensorrt_lean"], "dispatch": ["tensorrt_dispatch"]})),
    "leanDLLPath": _as("--lean-library", "FILE", RUNNING),
    "runtimeCacheFile": _as("--runtime-cache", "FILE", RUNNING),
    "loadInputs": Name("", "SPEC", ("run",), "`--input NAME=FILE` for each", _inputs),
    "exportOutput": Name("", "FILE", ("run",), "`--output FILE`, JSON; `.json` is added", _output),
    "dumpOutput": _flag("--show", commands=("run",)),
    "dumpRawBindingsToFile": _no("use --output FILE.npz"),
    "iterations": _as("--iterations", "N", MEASURING),
    "warmUp": _no("warm-up ends when latencies agree; trtx bench --warmup-limit SECONDS bounds it", "MS"),
    "duration": _no("rounds are measured; use --rounds and --iterations, and --time-limit to bound them", "SECONDS"),
    "useCudaGraph": _flag("--graphs", commands=MEASURING),
    "streams": _as("--lanes", "N", MEASURING),
    "infStreams": _as("--lanes", "N", MEASURING),
    "exportTimes": _as("--output", "FILE", MEASURING),
    "dumpProfile": _so("nothing: `profile` prints the layers; elsewhere it is refused", ("profile",)),
    "exportProfile": _as("--output", "FILE", ("profile",)),
    "separateProfileRun": _so("nothing: `profile` measures layers in a run of their own", ("profile",)),
    "avgRuns": _no("percentiles are of all iterations", "N"),
    "percentile": _no("p50, p90, p95 and p99 are always reported", "LIST"),
    "idleTime": _no("load is closed or open loop; see trtx bench --help", "MS"),
    "sleepTime": _no("load is closed or open loop; see trtx bench --help", "MS"),
    "threads": _no("lanes need no threads; use --lanes (our --threads N is the builder's)"),
    "useSpinWait": _no("use trtx_py.EngineOptions(completion='latency') in a program"),
    "useManagedMemory": _no("inputs and outputs lie in pinned memory"),
    "noDataTransfers": _no("requests have copies; use trtx profile, which tells the shares of copies and kernels"),
    "exposeDMA": _no("copies overlap with --lanes of 2 and more"),
    "timeDeserialize": _no("trtx bench reports it", ""),
    "timeRefit": _no("use trtx_py.Refitter in a program"),
    "dumpRefit": _no("use trtx_py.Refitter in a program"),
    "dumpLayerInfo": _no("use trtx inspect"),
    "exportLayerInfo": _no("use trtx inspect --json", "FILE"),
    "dumpOptimizationProfile": _no("use trtx inspect"),
    "persistentCacheRatio": _no("the L2 cache's persistent part cannot be set", "X"),
    "allocationStrategy": _no("activation memory is allocated once for each lane", "SPEC"),
    "saveDebugTensors": _no("debug tensors are not read; use trtx compare to find where errors begin", "SPEC"),
    "asyncFileReader": _no("plans are read and verified as a whole before TensorRT sees them"),
    "device": _as("--device", "N", EVERY),
    "verbose": _flag("--verbose", commands=EVERY),
}  # fmt: skip

#: By name, with the name in each.
NAMES: dict[str, Name] = {
    name: Name(name, each.value, each.commands, each.becomes, each.make, each.refused) for name, each in _NAMES.items()
}


def translated(command: str, arguments: Sequence[str]) -> list[str]:
    """``arguments`` with trtexec's names replaced by ours. Raises click.UsageError for what cannot be honoured."""
    made: list[str] = []
    positional: list[str] = []
    used: list[str] = []
    waiting = list(arguments)
    while waiting:
        token = waiting.pop(0)
        if token == "--":
            made += [token, *waiting]
            break
        bare, equals, value = token.partition("=")
        name = bare[2:] if bare.startswith("--") else ""
        if bare[1:] in NAMES and bare[0] == "-" and bare[1:] not in ("h", "v"):
            # Click would take -onnx=FILE for `--output nnx=FILE`.
            raise click.UsageError(f"{bare} has one dash; trtexec's option is -{bare}")
        known = NAMES.get(name)
        if known is None or (name in _SHARED and not _means_trtexec(name, equals, waiting)):
            made.append(token)
            continue
        _check(command, known)
        if known.value and not equals:
            if not waiting:
                raise click.UsageError(f"--{name} needs a value: --{name}={known.value}")
            value = waiting.pop(0)
        elif not known.value and equals:
            raise click.UsageError(f"--{name} takes no value")
        used.append(name)
        assert known.make is not None
        try:
            ours = known.make(value)
        except _BadValueError as error:
            raise click.UsageError(f"--{name}: {error}") from error
        if ours and ours[0] == _POSITIONAL:
            positional.append(ours[1])
        else:
            made += ours
    _check_together(used)
    if "useDLACore" in used and "allowGPUFallback" not in used:
        made.append("--no-gpu-fallback")
    if positional:
        made = [*made, *([] if "--" in made else ["--"]), *positional]
    return made


#: Names that both have, with one meaning or nearly so: they stay as they are.
_SHARED = frozenset({"shapes", "refit", "threads", "iterations", "verbose", "device"})
_REFIT = ("all", "identical", "individual")


def _means_trtexec(name: str, equals: str, following: Sequence[str]) -> bool:
    # Alone these are trtexec's flags; with a value they are ours.
    after = following[0] if following else ""
    return not equals and ((name == "refit" and after not in _REFIT) or (name == "threads" and not after.isdigit()))


def _check(command: str, known: Name) -> None:
    if known.refused:
        raise click.UsageError(f"trtexec's --{known.name} is not understood: {known.refused}")
    if command not in known.commands:
        places = " and ".join(f"trtx {each}" for each in known.commands)
        raise click.UsageError(f"trtexec's --{known.name} is understood by {places}, not by trtx {command}")


def _check_together(used: Sequence[str]) -> None:
    words = [name for name in used if name in ("fp16", "bf16", "int8", "fp8", "int4")]
    if len(set(words)) > 1:
        raise click.UsageError(
            f"--{' and --'.join(dict.fromkeys(words))}: one precision is built, and what cannot have it "
            "stays in FP32; give one of them"
        )
