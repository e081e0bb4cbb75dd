"""Turns BuildOptions into an IBuilderConfig. Every field is honoured or refused by name and version, never dropped."""

from __future__ import annotations

import re
from typing import Any

from ..._errors import BuilderError
from ..._types import BuildOptions
from ._log_router import Operation
from ._vendor import Vendor

#: precision word -> the builder flag that asks for it on weakly typed versions
_PRECISION_FLAGS = {"fp16": "FP16", "bf16": "BF16", "int8": "INT8", "fp8": "FP8", "int4-weights": "INT4"}
_PRECISIONS = ("fp32", "tf32", *_PRECISION_FLAGS)
_MAX_OPTIMIZATION_LEVEL = 5


def apply_options(vendor: Vendor, config: Any, network: Any, options: BuildOptions, operation: Operation) -> None:
    """Set everything in ``options`` but the profiles.

    Raises:
        BuilderError: this version cannot do what an option asks for; names both and the next step.
    Source: nvinfer1::IBuilderConfig
    """
    if options.workspace_bytes is not None:
        _set_workspace(vendor, config, options.workspace_bytes)
    if options.optimization_level is not None:
        _set_optimization_level(vendor, config, options.optimization_level)
    if options.max_aux_streams is not None:
        _set_aux_streams(vendor, config, options.max_aux_streams)
    # TensorRT takes EXCLUDE_LEAN_RUNTIME only after this one.
    for name in sorted(options.flags, key=lambda name: name != "VERSION_COMPATIBLE"):
        set_builder_flag(vendor, config, name, operation)
    _set_precision(vendor, config, network, options, operation)
    if options.inspectable:
        _keep_layer_types(vendor, config)
    _set_compute_capabilities(vendor, config, options.compute_capabilities, operation)
    if options.profile_sharing and vendor.facts.profile_sharing == "preview":
        _share_profiles(vendor, config)


def set_builder_flag(vendor: Vendor, config: Any, name: str, operation: Operation) -> None:
    """Set one nvinfer1::BuilderFlag by name. Raises BuilderError if this version does not have or take it."""
    known = vendor.members("BuilderFlag")
    if name not in known:
        if name in _PRECISION_FLAGS.values() and vendor.facts.typing == "strong":
            raise BuilderError(f"{vendor.title} has no builder flag {name}: {_strongly_typed_hint(name)}")
        raise BuilderError(f"{vendor.title} has no builder flag {name!r}; it has {', '.join(sorted(known))}")
    config.set_flag(known[name])
    if not config.get_flag(known[name]):
        raise BuilderError(
            f"{vendor.title} refused the builder flag {name}; it conflicts with another flag of this build",
            tensorrt_log=operation.lines,
        )


def _set_workspace(vendor: Vendor, config: Any, workspace_bytes: int) -> None:
    if not 0 <= workspace_bytes < 2**63:
        raise BuilderError(f"workspace_bytes is {workspace_bytes}; expected a number of bytes from 0 to {2**63 - 1}")
    pool = vendor.module.MemoryPoolType.WORKSPACE
    config.set_memory_pool_limit(pool, workspace_bytes)
    if config.get_memory_pool_limit(pool) != workspace_bytes:
        found = config.get_memory_pool_limit(pool)
        raise BuilderError(f"{vendor.title} took {found} bytes of workspace where {workspace_bytes} were asked for")


def _set_optimization_level(vendor: Vendor, config: Any, level: int) -> None:
    if not hasattr(config, "builder_optimization_level"):
        raise BuilderError(f"{vendor.title} has no optimization levels; leave optimization_level unset")
    if not 0 <= level <= _MAX_OPTIMIZATION_LEVEL:
        raise BuilderError(f"optimization_level is {level}; expected 0 to {_MAX_OPTIMIZATION_LEVEL}")
    config.builder_optimization_level = level


def _set_aux_streams(vendor: Vendor, config: Any, count: int) -> None:
    if not hasattr(config, "max_aux_streams"):
        raise BuilderError(f"{vendor.title} has no auxiliary streams; leave max_aux_streams unset")
    if count < 0:
        raise BuilderError(f"max_aux_streams is {count}; expected 0 or more, or None to leave it to TensorRT")
    config.max_aux_streams = count


def _share_profiles(vendor: Vendor, config: Any) -> None:
    features = vendor.members("PreviewFeature")
    names = [name for name in features if name.startswith("PROFILE_SHARING")]
    if not names:
        raise BuilderError(
            f"{vendor.title} cannot share an optimization profile between execution contexts (it has no preview "
            f"feature PROFILE_SHARING_0806); set profile_sharing=False and use one profile for each context"
        )
    config.set_preview_feature(features[names[0]], True)


def _keep_layer_types(vendor: Vendor, config: Any) -> None:
    """Source: nvinfer1::IBuilderConfig::setProfilingVerbosity"""
    levels = vendor.members("ProfilingVerbosity")
    if "DETAILED" not in levels or not hasattr(config, "profiling_verbosity"):
        raise BuilderError(
            f"{vendor.title} has no ProfilingVerbosity.DETAILED, so what it builds cannot be read back; build without "
            "require_precision"
        )
    config.profiling_verbosity = levels["DETAILED"]


def _set_precision(vendor: Vendor, config: Any, network: Any, options: BuildOptions, operation: Operation) -> None:
    word = options.precision
    if word is not None and word not in _PRECISIONS:
        raise BuilderError(f"precision is {word!r}; expected one of {', '.join(_PRECISIONS)}, or None")
    strong = vendor.facts.typing == "strong"
    if word in _PRECISION_FLAGS and strong:
        raise BuilderError(f"{vendor.title} cannot build with precision={word!r}: {_strongly_typed_hint(word)}")
    used = _types_in(network)
    if word in ("fp32", "tf32"):
        reduced = sorted(used - {"FLOAT", "INT32", "INT64", "BOOL", "UINT8"})
        if strong and reduced:
            raise BuilderError(
                f"{vendor.title} cannot build with precision={word!r}: the model's own types decide, and it computes "
                f"in {', '.join(reduced)}; leave precision unset, or build from the float32 model"
            )
        _set_tf32(vendor, config, word == "tf32", operation)
        return
    if strong:
        return
    if word is None:
        # Without the flag TensorRT would silently compute such a model in float32.
        wanted = [flag for flag in ("FP16", "BF16", "INT8", "FP8") if _needs(flag, used)]
    else:
        wanted = [_PRECISION_FLAGS[word]]
        if word == "int8" and options.calibrator is None and not {"QUANTIZE", "DEQUANTIZE"} & used:
            raise BuilderError(
                f"{vendor.title} cannot build with precision='int8': there are no ranges. The model has no "
                f"QuantizeLinear or DequantizeLinear nodes to take them from; give calibration=Calibration(data), or "
                f"quantize the model first and leave precision unset"
            )
    for flag in wanted:
        set_builder_flag(vendor, config, flag, operation)


def _set_tf32(vendor: Vendor, config: Any, on: bool, operation: Operation) -> None:
    if on:
        set_builder_flag(vendor, config, "TF32", operation)
        return
    flag = vendor.members("BuilderFlag").get("TF32")
    if flag is not None:
        config.clear_flag(flag)


def _types_in(network: Any) -> set[str]:
    """Names of the element types that the layers produce, and QUANTIZE or DEQUANTIZE if there are such layers."""
    found = {network.get_input(i).dtype.name for i in range(network.num_inputs)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = getattr(getattr(layer, "type", None), "name", "")
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            found.add(kind)
        found.update(layer.get_output(i).dtype.name for i in range(layer.num_outputs))
    return found


def _needs(flag: str, used: set[str]) -> bool:
    quantized = bool({"QUANTIZE", "DEQUANTIZE"} & used)
    return {
        "FP16": "HALF" in used,
        "BF16": "BF16" in used,
        "INT8": quantized and "FP8" not in used,
        "FP8": "FP8" in used,
    }[flag]


def _set_compute_capabilities(vendor: Vendor, config: Any, capabilities: tuple[str, ...], operation: Operation) -> None:
    known = vendor.members("ComputeCapability")
    supported = vendor.flavour.can_target and known and hasattr(config, "num_compute_capabilities")
    if not supported:
        if capabilities:
            raise BuilderError(
                f"{vendor.title} builds for the GPU at hand only, not for compute capability "
                f"{', '.join(capabilities)}; leave compute_capabilities unset, or build with tensorrt_rtx"
            )
        return
    members = [_capability_member(vendor, known, capability) for capability in capabilities]
    if len(set(capabilities)) != len(capabilities):
        raise BuilderError(f"compute_capabilities names one twice: {', '.join(capabilities)}; name each once")
    if not members and "CURRENT" in known:
        # Left alone, TensorRT-RTX 1.7 would build for 8.0 where it finds no GPU, without a word.
        members = [known["CURRENT"]]
    config.num_compute_capabilities = len(members)
    for index, member in enumerate(members):
        if not config.set_compute_capability(member, index):
            raise BuilderError(f"{vendor.title} refused compute capability {member.name}", tensorrt_log=operation.lines)


def _capability_member(vendor: Vendor, known: dict[str, Any], capability: str) -> Any:
    parts = re.fullmatch(r"(\d+)\.(\d+)", capability)
    name = f"SM{parts[1]}{parts[2]}" if parts else ""
    if name not in known:
        ways = ", ".join(f"{sm[2:-1]}.{sm[-1]}" for sm in known if re.fullmatch(r"SM\d{2,3}", sm))
        raise BuilderError(f"{vendor.title} cannot build for compute capability {capability!r}; it knows {ways}")
    return known[name]


def _strongly_typed_hint(word: str) -> str:
    return (
        f"it is strongly typed, so types come from the ONNX model; convert the model to {word.lower()} first "
        f"(casts for the float types, QuantizeLinear/DequantizeLinear for int8 and fp8) and leave precision unset"
    )
