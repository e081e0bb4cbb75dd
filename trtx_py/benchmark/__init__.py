"""Benchmarks: contenders side by side, in interleaved rounds, with checked outputs and confidence intervals.

``import trtx_py`` does not import this; ``from trtx_py.benchmark import ...`` does.
"""

from ._compare import Change, ResultComparison, compare_results
from ._errors import ContenderError, ResultFileError, WrongOutputError
from ._files import SCHEMA_VERSION, load_result, parse_result
from ._load import ClosedLoop, OpenLoop
from ._result import (
    Accuracy,
    BenchmarkResult,
    ContenderResult,
    Environment,
    GpuState,
    Measurement,
    Ratio,
    WarmUpResult,
)
from ._run import run
from ._session import Progress
from ._spec import BenchmarkSpec, Contender, baselines
from ._stats import Interval
from ._sweeps import batch_sweep, batcher_against_direct, graphs_on_off, lanes_sweep, precision_comparison
from ._warmup import WarmUp

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "BenchmarkResult",
    "BenchmarkSpec",
    "Change",
    "ClosedLoop",
    "Contender",
    "ContenderError",
    "ContenderResult",
    "Environment",
    "GpuState",
    "Interval",
    "Measurement",
    "OpenLoop",
    "Progress",
    "Ratio",
    "ResultComparison",
    "ResultFileError",
    "WarmUp",
    "WarmUpResult",
    "WrongOutputError",
    "baselines",
    "batch_sweep",
    "batcher_against_direct",
    "compare_results",
    "graphs_on_off",
    "lanes_sweep",
    "load_result",
    "parse_result",
    "precision_comparison",
    "run",
]
