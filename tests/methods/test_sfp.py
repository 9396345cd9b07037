from __future__ import annotations

import torch

from dmcp.methods.sfp import SFP


def test_scores_are_l2_norms():
    assert SFP().score(torch.tensor([[3.0, 4.0], [0.0, -2.0]])).tolist() == [5, 2]
    assert SFP.hard is False
