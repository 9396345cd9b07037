"""Structures: the widths of pruned networks, their file, others' files, and the published ones."""

from dmcp.structure.fingerprint import graph_hash
from dmcp.structure.importers import Importer, open_structure, read_structure
from dmcp.structure.published import Structures, structures
from dmcp.structure.structure import Provenance, Structure, installed

__all__ = [
    "Importer",
    "Provenance",
    "Structure",
    "Structures",
    "graph_hash",
    "installed",
    "open_structure",
    "read_structure",
    "structures",
]
