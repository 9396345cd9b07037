"""How long networks take on the machine at hand."""

from dmcp.latency.measure import measure_latency
from dmcp.latency.runtime import RUNTIMES, Runtime
from dmcp.latency.steps import on_steps
from dmcp.latency.timing import Timing, side_by_side

__all__ = ["RUNTIMES", "Runtime", "Timing", "measure_latency", "on_steps", "side_by_side"]
