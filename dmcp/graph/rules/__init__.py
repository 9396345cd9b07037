"""How every operator passes channels on: one rule per operator, none per network."""

from dmcp.graph.rules import (  # noqa: F401  (importing a file registers its rules)
    contraction,
    elementwise,
    indexing,
    normalisation,
    recurrent,
    reduction,
    shape,
    window,
)
from dmcp.graph.rules.registry import find_rule

__all__ = ["find_rule"]
