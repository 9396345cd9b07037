"""The search inside training code of others: a loop of one's own, Lightning.

`dmcp.integrations.lightning` needs the extra ``lightning`` and is imported by its own name.
"""

from dmcp.integrations.loop import LoopSearch

__all__ = ["LoopSearch"]
