"""How long networks take on the machine at hand."""

from dmcp.latency.timing import Timing, side_by_side

__all__ = ["Timing", "side_by_side"]
