"""Regenerate ``_operators.py`` from the real TensorRT for RTX parser: ``python -m mock_backend._make_operators``.

Needs tensorrt-rtx, onnx and onnxruntime (for the names of its contrib operators); no GPU and no driver.
Source: nvonnxparser::IParser::supportsOperator, nvinfer1::BuilderFlag
"""

from __future__ import annotations

import importlib
import pathlib
import textwrap
from typing import Any

_ALSO_ASKED = (
    "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_FP4DynamicQuantize", "TRT_INT4DequantizeLinear",
    "TRT_INT4QuantizeLinear", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear",
)  # fmt: skip

_HEAD = '''"""What the ONNX parser of tensorrt-rtx {version} imports, by operator name. Made by ``_make_operators.py``.

The parser looks at names alone and ignores domains, so ``my.domain::Relu`` is a Relu to it.
"""

from __future__ import annotations

__all__ = ["BUILDER_FLAGS", "SUPPORTED", "TABLE_VERSION"]

TABLE_VERSION = "{version}"
'''


def _table(name: str, words: list[str]) -> str:
    body = textwrap.fill(" ".join(words), 112)
    return f'\n{name} = frozenset(\n    """\n{textwrap.indent(body, "    ")}\n    """.split()\n)\n'


def main() -> None:
    """Ask the parser about every operator that ONNX and ONNX Runtime define, and write the table."""
    import onnx.defs

    trt: Any = importlib.import_module("tensorrt_rtx")
    ort: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network()
    parser = trt.OnnxParser(network, logger)
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    names |= {schema.name for schema in ort.get_all_operator_schema()}
    supported = sorted(name for name in names | set(_ALSO_ASKED) if parser.supports_operator(name))
    flags = sorted(trt.BuilderFlag.__members__)
    text = _HEAD.format(version=trt.__version__) + _table("SUPPORTED", supported) + _table("BUILDER_FLAGS", flags)
    pathlib.Path(__file__).with_name("_operators.py").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
