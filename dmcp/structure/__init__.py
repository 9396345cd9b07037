"""Structures: the widths of pruned networks, their file, and the published ones.

`dmcp.structure.importers` reads the files of others.
"""

from dmcp.structure.fingerprint import graph_hash
from dmcp.structure.published import Structures, structures
from dmcp.structure.structure import Provenance, Structure, installed

__all__ = [
    "Provenance",
    "Structure",
    "Structures",
    "graph_hash",
    "installed",
    "structures",
]
