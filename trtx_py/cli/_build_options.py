"""What a build can be asked for, as options of ``build`` and of all commands that may have to build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ._app import options
from ._values import (
    ANY_PATH,
    CAPABILITY,
    COUNT,
    DIVISOR,
    FILE,
    FLOAT32,
    KEPT,
    PAIR,
    RANGES,
    SHAPES,
    SIZE,
    WORD,
    Number,
    Shape,
)

if TYPE_CHECKING:
    from .._builder_options import BuilderOptions

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4-weights")
METHODS = ("entropy", "minmax", "percentile")
_Ranges = dict[str, tuple[Shape, Shape, Shape]]

precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), help="What to compute in; without it the model's own types."
)

calibration_options = options(
    click.option(
        "--calibration-data", multiple=True, type=ANY_PATH, metavar="PATH",
        help="Samples for int8 and fp8: a folder or files of .npy, .npz, .raw or images. May be repeated.",
    ),
    click.option("--calibration-method", type=click.Choice(METHODS), default="entropy", show_default=True,
                 help="How ranges follow from the samples."),
    click.option("--calibration-percentile", type=Number(0, 100, min_open=True), default=99.99, show_default=True,
                 metavar="P", help="Of magnitudes, for the method percentile."),
    click.option("--calibration-batches", type=COUNT, metavar="N", help="Use no more than N batches."),
    click.option("--calibration-batch-size", type=COUNT, default=8, show_default=True, metavar="N",
                 help="Samples in a batch, where the model leaves it open."),
    click.option("--calibration-cache", type=KEPT, metavar="FILE",
                 help="Keep the ranges here, by model, data and method, and take them from here."),
)  # fmt: skip

image_options = options(
    click.option("--image-scale", type=FLOAT32, default=1 / 255, metavar="X", help="Factor of pixels, if not 1/255."),
    click.option("--image-mean", type=FLOAT32, multiple=True, metavar="X", help="Subtracted after that; once, or once "
                 "for each channel."),
    click.option("--image-std", type=DIVISOR, multiple=True, metavar="X",
                 help="Divided by after that; as --image-mean."),
    click.option("--image-layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True,
                 help="How the model takes images."),
    click.option("--image-size", metavar="HxW", help="Height and width, for a model that leaves them open."),
)  # fmt: skip

policy_options = options(
    click.option("--keep", multiple=True, type=WORD, metavar="NODE",
                 help="An ONNX node that stays in FP32. May be repeated."),
    click.option("--keep-operator", multiple=True, type=WORD, metavar="OPERATOR",
                 help="Operators that stay in FP32 in fp16 and bf16, in place of the usual ones. May be repeated."),
    click.option("--quantize-operator", multiple=True, type=WORD, metavar="OPERATOR",
                 help="Operators that int8 and fp8 quantize, in place of all that can be. May be repeated."),
    click.option("--max-relative-error", type=Number(0, 1, min_open=True, max_open=True), metavar="X",
                 help="Keep further nodes in FP32 until every output is that close on the calibration data."),
    click.option("--int4-block-size", type=click.Choice(["16", "32", "64", "128", "256"]), default="128",
                 show_default=True, help="Weights that share one scale."),
)  # fmt: skip

_shape_options = options(
    click.option("--profile", "profile", multiple=True, type=RANGES, metavar="X:MIN:OPT:MAX,...",
                 help="An optimization profile: x:1x8:4x8:32x8,y:... May be repeated."),
    click.option("--min-shapes", type=SHAPES, metavar="X:SHAPE,...", help="Least shapes of one profile more: x:1x8."),
    click.option("--opt-shapes", type=SHAPES, metavar="X:SHAPE,...", help="Its best shapes."),
    click.option("--max-shapes", type=SHAPES, metavar="X:SHAPE,...", help="Its largest shapes."),
)  # fmt: skip

_resources = options(
    click.option("--workspace", type=SIZE, metavar="SIZE", help="Scratch memory that a layer may use: 512M, 1GiB."),
    click.option("--tactic-dram", type=SIZE, metavar="SIZE", help="Device memory that tactics may use."),
    click.option("--tactic-shared-memory", type=SIZE, metavar="SIZE", help="Shared memory that tactics may use."),
    click.option("--optimization-level", type=click.IntRange(0, 5), metavar="0-5",
                 help="0 builds fast, 5 makes a fast engine."),
    click.option("--max-aux-streams", type=click.IntRange(0, 7), metavar="N", help="Streams inside the engine."),
    click.option("--no-profile-sharing", is_flag=True, help="One context for each profile (a choice on 8.6 only)."),
    click.option("--threads", type=COUNT, metavar="N", help="Threads that the builder may use."),
    click.option("--account-memory", is_flag=True, help="Count what the build allocates on the device."),
)  # fmt: skip

_tactics = options(
    click.option("--tf32/--no-tf32", default=None, help="TF32 in place of FP32; TensorRT uses it by default."),
    click.option("--sparse-weights", is_flag=True, help="Kernels for weights of which two in four are 0."),
    click.option("--tactic-sources", metavar="NAME,...", help="Where kernels may come from, such as CUBLAS,CUDNN."),
    click.option("--max-tactics", type=COUNT, metavar="N", help="Kernels that are tried for a layer."),
    click.option("--timing-iterations", type=COUNT, metavar="N", help="How often each is timed."),
    click.option("--tiling", type=click.Choice(["none", "fast", "moderate", "full"]), help="Tiling over the L2 cache."),
    click.option("--tiling-l2", type=SIZE, metavar="SIZE", help="L2 cache that tiling may count on."),
    click.option("--preview-feature", multiple=True, type=WORD, metavar="NAME[=on|off]",
                 help="Of nvinfer1::PreviewFeature. May be repeated."),
    click.option("--flag", multiple=True, type=WORD, metavar="NAME", help="Of nvinfer1::BuilderFlag. May be repeated."),
    click.option("--profiling-verbosity", type=click.Choice(["layer_names_only", "detailed", "none"]),
                 help="What the plan tells the engine inspector."),
    click.option("--engine-capability", type=click.Choice(["standard", "safety", "dla_standalone"]),
                 help="What kind of engine."),
    click.option("--timing-cache", type=KEPT, metavar="FILE",
                 help="Times of kernels that were measured before: read, and replaced after the build."),
    click.option("--timing-cache-ignore-mismatch", is_flag=True, help="Take one of another GPU or driver too."),
    click.option("--timing-cache-editable", is_flag=True, help="Keep what TensorRT needs to edit it."),
    click.option("--timing-cache-require-hit", is_flag=True, help="Fail where something would have to be measured."),
)  # fmt: skip

_targets = options(
    click.option("--compute-capability", multiple=True, type=CAPABILITY, metavar="X.Y",
                 help="A GPU architecture to build for, such as 8.9 (TensorRT-RTX). May be repeated."),
    click.option("--hardware-compatibility", type=click.Choice(["ampere_plus", "same_compute_capability"]),
                 help="GPUs that the plan runs on besides this one."),
    click.option("--version-compatible", is_flag=True, help="Later versions of TensorRT can run the plan."),
    click.option("--exclude-runtime", is_flag=True, help="A version-compatible plan without the code that runs it."),
    click.option("--runtime-platform", type=click.Choice(["windows_amd64"]), help="Another system to build for."),
    click.option("--refit", type=click.Choice(["all", "identical", "individual"]), help="Weights that can be changed."),
    click.option("--strip-plan", is_flag=True, help="Leave the weights out; needs --refit."),
    click.option("--weight-streaming", is_flag=True, help="Weights may lie on the host."),
    click.option("--dla-core", type=click.IntRange(min=0), metavar="N", help="Layers on this accelerator (Jetson)."),
    click.option("--no-gpu-fallback", is_flag=True, help="Fail for layers that the accelerator cannot run."),
    click.option("--dla-sram", type=SIZE, metavar="SIZE", help="Its managed SRAM."),
    click.option("--dla-local-dram", type=SIZE, metavar="SIZE", help="Its local DRAM."),
    click.option("--dla-global-dram", type=SIZE, metavar="SIZE", help="Its global DRAM."),
    click.option("--plugin", multiple=True, type=FILE, metavar="FILE", help="A library with plugins. May be repeated."),
    click.option("--embed-plugins", is_flag=True, help="Put the plugin libraries into the plan."),
    click.option("--weights", type=FILE, metavar="FILE", help="All external data of the model, as one blob."),
    click.option("--require-precision", is_flag=True, help="Fail unless every product computes in --precision."),
)  # fmt: skip

build_options = options(
    precision_option, calibration_options, image_options, policy_options, _shape_options, _resources, _tactics, _targets
)


def option_names() -> tuple[str, ...]:
    """Names of all parameters that ``build_options`` adds."""
    probe = click.command()(build_options(lambda: None))
    return tuple(str(parameter.name) for parameter in probe.params)


def taken(given: dict[str, Any]) -> dict[str, Any]:
    """The values of ``build_options``, taken out of all that a command was given."""
    return {name: given.pop(name) for name in option_names() if name in given}


def image_folder(given: dict[str, Any], folder: str) -> Any:
    """An ImageFolder with the options for images."""
    from .. import ImageFolder, InvalidArgumentError

    size = given["image_size"]
    try:
        pair = None if size is None else tuple(int(part) for part in str(size).split("x"))
        if pair is not None and len(pair) != 2:
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"{size!r} is no size; expected HxW such as 224x224", param_hint="--image-size"
        ) from None
    try:
        return ImageFolder(
            folder, scale=given["image_scale"], mean=_one_or_many(given["image_mean"], 0.0),
            std=_one_or_many(given["image_std"], 1.0), layout=given["image_layout"], size=pair,
        )  # fmt: skip
    except InvalidArgumentError as error:  # begins with the name of the argument, which is the option's last word
        raise click.UsageError(f"--image-{error}") from error


def _one_or_many(values: tuple[float, ...], default: float) -> Any:
    return default if not values else values[0] if len(values) == 1 else values


def data_from(paths: tuple[str, ...], given: dict[str, Any]) -> Any:
    """Samples as ``Calibration`` and ``compare`` take them."""
    import os

    from .._array_files import read_npz

    if len(paths) == 1 and paths[0].endswith(".npz"):
        return read_npz(paths[0])
    if len(paths) == 1 and os.path.isdir(paths[0]):
        from ..quantize._readers import IMAGE_SUFFIXES

        names = os.listdir(paths[0])
        if names and all(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            return image_folder(given, paths[0])
    return list(paths)


def _refuse_without_data() -> None:
    """Options that say how to calibrate mean nothing without something to calibrate with."""
    context = click.get_current_context()
    prefixes = ("calibration_", "image_") if context.info_name in ("build", "calibrate") else ("calibration_",)
    for name in context.params:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name.startswith(prefixes):
            raise click.UsageError(f"--{name.replace('_', '-')} is for calibration; give --calibration-data too")


def calibration_from(given: dict[str, Any]) -> Any:
    """A Calibration, or None where no data were given."""
    from .. import Calibration

    if not given["calibration_data"]:
        _refuse_without_data()
        return None
    return Calibration(
        data_from(given["calibration_data"], given), method=given["calibration_method"],
        batches=given["calibration_batches"], batch_size=given["calibration_batch_size"],
        percentile=given["calibration_percentile"], cache=given["calibration_cache"],
    )  # fmt: skip


#: Precisions that an option of the policy says something about.
_POLICY_FOR = {"keep_operator": ("fp16", "bf16"), "quantize_operator": ("int8", "fp8"), "int4_block_size":
               ("int4-weights",)}  # fmt: skip


def refuse_for_another_precision(precision: str | None) -> None:
    """An option of the policy that the precision does not ask for would be forgotten."""
    context = click.get_current_context()
    for name, fitting in _POLICY_FOR.items():
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and precision is not None and precision not in fitting:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for {' and '.join(fitting)}; the precision is {precision}")


def policy_from(given: dict[str, Any]) -> Any:
    """A PrecisionPolicy, or None where none of its options was given."""
    from .. import PrecisionPolicy

    found = PrecisionPolicy(
        keep=frozenset(given["keep"]),
        keep_operators=frozenset(given["keep_operator"]) or None,
        quantized_operators=frozenset(given["quantize_operator"]) or None,
        max_relative_error=given["max_relative_error"],
        block_size=int(given["int4_block_size"]),
    )
    return found if found.described() else None


def profiles_from(given: dict[str, Any], fixed: dict[str, Shape] | None = None) -> list[_Ranges]:
    """The profiles: those of --profile, and one of --min-shapes, --opt-shapes and --max-shapes.

    Args:
        fixed: shapes that are to be least, best and largest at once, where nothing else says so.
    """
    found: list[_Ranges] = list(given["profile"])
    low, best, high = given["min_shapes"], given["opt_shapes"], given["max_shapes"]
    names = dict.fromkeys([*(low or ()), *(best or ()), *(high or ())])
    one: _Ranges = {}
    for name in names:
        # As trtexec has it: what is not given is like its neighbour. A scalar's shape is empty, and given all the same.
        minimum, optimum, maximum = (part.get(name) if part else None for part in (low, best, high))
        maximum = next(shape for shape in (maximum, optimum, minimum) if shape is not None)
        optimum = maximum if optimum is None else optimum
        minimum = optimum if minimum is None else minimum
        one[name] = (minimum, optimum, maximum)
    if one:
        found.append(one)
    if not found and fixed:
        found.append({name: (shape, shape, shape) for name, shape in fixed.items()})
    return found


def builder_options(given: dict[str, Any], fixed: dict[str, Shape] | None = None) -> BuilderOptions | None:
    """What ``create_config`` takes; None if nothing was asked for. Values that cannot be used are errors of usage."""
    from .. import BuilderOptions, InvalidArgumentError
    from .._config import checked_range

    try:
        made = _builder_options(given, fixed)
        for profile in made.profiles:
            for name, limits in profile.items():
                checked_range(name, *limits)
    except InvalidArgumentError as error:
        raise click.UsageError(str(error)) from error
    return None if made == BuilderOptions() else made


def _builder_options(given: dict[str, Any], fixed: dict[str, Shape] | None) -> BuilderOptions:
    from .. import BuilderOptions, DlaOptions, TimingCache

    refuse_for_another_precision(given["precision"])
    dla_pools = {
        "managed_sram_bytes": given["dla_sram"], "local_dram_bytes": given["dla_local_dram"],
        "global_dram_bytes": given["dla_global_dram"],
    }  # fmt: skip
    dla = None
    if given["dla_core"] is not None:
        dla = DlaOptions(core=given["dla_core"], gpu_fallback=not given["no_gpu_fallback"], **dla_pools)
    elif given["no_gpu_fallback"] or any(value is not None for value in dla_pools.values()):
        raise click.UsageError("--no-gpu-fallback and --dla-... say something about an accelerator; give --dla-core")
    cache_says = {
        name: given[f"timing_cache_{name}"] for name in ("ignore_mismatch", "editable", "require_hit")
    }  # fmt: skip
    cache = None
    if given["timing_cache"] is not None:
        cache = TimingCache(given["timing_cache"], **cache_says)
    elif any(cache_says.values()):
        raise click.UsageError("--timing-cache-... says something about a timing cache; give --timing-cache")
    sources = given["tactic_sources"]
    return BuilderOptions(
        precision=given["precision"], calibration=calibration_from(given), precision_policy=policy_from(given),
        require_precision=given["require_precision"], workspace_bytes=given["workspace"],
        optimization_level=given["optimization_level"], max_aux_streams=given["max_aux_streams"],
        profile_sharing=not given["no_profile_sharing"], compute_capabilities=tuple(given["compute_capability"]),
        profiles=tuple(profiles_from(given, fixed)), flags=tuple(given["flag"]), tf32=given["tf32"],
        sparse_weights=given["sparse_weights"], refit=given["refit"], strip_plan=given["strip_plan"],
        weight_streaming=given["weight_streaming"], version_compatible=given["version_compatible"],
        embed_runtime=not given["exclude_runtime"], hardware_compatibility=given["hardware_compatibility"],
        runtime_platform=given["runtime_platform"], tactic_dram_bytes=given["tactic_dram"],
        tactic_shared_memory_bytes=given["tactic_shared_memory"],
        tactic_sources=None if sources is None else tuple(part.strip() for part in sources.split(",")),
        max_tactics=given["max_tactics"], timing_iterations=given["timing_iterations"],
        tiling=None if given["tiling"] in (None, "none") else given["tiling"], tiling_l2_bytes=given["tiling_l2"],
        preview_features=_features(given["preview_feature"]), profiling_verbosity=given["profiling_verbosity"],
        engine_capability=given["engine_capability"], timing_cache=cache, dla=dla,
        plugin_libraries=tuple(given["plugin"]), embed_plugins=given["embed_plugins"],
        account_memory=given["account_memory"], threads=given["threads"],
    )  # fmt: skip


def _features(given: tuple[str, ...]) -> dict[str, bool] | None:
    found = {}
    for text in given:
        name, _, state = text.partition("=")
        if state not in ("", "on", "off"):
            raise click.BadParameter(f"{text!r}; expected NAME, NAME=on or NAME=off", param_hint="--preview-feature")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--preview-feature")
        found[name] = state != "off"
    return found or None


__all__ = [
    "METHODS",
    "PAIR",
    "build_options",
    "builder_options",
    "calibration_from",
    "calibration_options",
    "data_from",
    "image_options",
    "policy_from",
    "policy_options",
    "refuse_for_another_precision",
    "taken",
]
