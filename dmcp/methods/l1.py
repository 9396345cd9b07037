"""Filter pruning by L1 norms ("Pruning Filters for Efficient ConvNets", Li et al., ICLR 2017).

Deviations from the paper: one share for all units, where it chooses one for each stage by hand; a
residual stream is pruned too, by the norms of all layers that produce it. So the widths are those
of `Uniform`, and only the weights differ: the network brings the pretrained filters with the
largest norms, which is what `Lab.inherit` gives to the methods that find widths alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dmcp.methods.growth import kept_channels
from dmcp.methods.importance import l1_norms
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.methods.uniform import Uniform


@dataclass(frozen=True)
class L1:
    """Equal shares of all units; of each, the filters with the largest L1 norms."""

    uses_pretrained: ClassVar[bool] = True

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        model = lab.pretrained()
        norms = l1_norms(lab.graph, model)
        found = {}
        for label, pruned in Uniform().find(lab).items():
            kept = kept_channels(lab.graph, norms, pruned.widths)
            found[label] = replace(pruned, network=lab.extract(model, kept=kept), kept=kept)
        return found
