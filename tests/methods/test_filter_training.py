from __future__ import annotations

import pytest
import torch

import dmcp
from dmcp.errors import BudgetError, CheckpointError, ConfigError
from dmcp.methods.filter_training import FilterTraining, filter_widths, fine_tuning
from dmcp.methods.fpgm import FPGM
from dmcp.methods.sfp import SFP
from dmcp.search import Budget, Targets
from dmcp.train import Schedule, Training, TrainOptions, run

OPTIONS = TrainOptions(Schedule(0.05))
WIDTHS = {"stem": 8, "first": 5, "last": 9, "head": 10}


@pytest.fixture
def make_stage(residual_lab):
    """A stage of two epochs of four steps, and the batches from a step on."""
    lab = residual_lab
    for norm in (lab.graph.model.norm1, lab.graph.model.norm3):
        torch.nn.init.ones_(norm.bias)  # so that zeroed filters have gradients

    def make(method, noise=0.0):
        model = lab.fresh()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
        return FilterTraining(
            model,
            OPTIONS,
            8,
            lab.graph,
            WIDTHS,
            method.score,
            every=4,
            hard=method.hard,
        )

    def stream(start):
        return list(lab.batches(8))[start:]

    return make, stream


def zero_filters(layer):
    zeros = (layer.weight.flatten(1) == 0).all(1) & (layer.bias == 0)
    return zeros.nonzero().flatten().tolist()


def dropped(stage, unit, channels):
    return sorted(set(range(channels)) - set(stage.kept[unit].tolist()))


def test_hard_filters_stay_zero_until_the_next_choice(make_stage):
    make, stream = make_stage
    stage = make(FPGM())
    for number, batch in enumerate(stream(0)):
        gone = dropped(stage, "first", 8)
        assert len(gone) == 3
        assert zero_filters(stage.model.first) == gone
        assert len(zero_filters(stage.model.last)) == 3
        assert zero_filters(stage.model.stem) == zero_filters(stage.model.second) == []
        before = stage.model.first.weight.detach().clone()
        stage.step(*batch)
        if number % 4 < 3:
            changed = (stage.model.first.weight != before).flatten(1).any(1)
            assert changed.tolist() == [channel not in gone for channel in range(8)]


def test_soft_filters_are_zeroed_after_an_epoch_and_regrow(make_stage):
    make, stream = make_stage
    stage = make(SFP())
    assert stage.kept == {}
    zeros = []
    for batch in stream(0):
        stage.step(*batch)
        zeros.append(len(zero_filters(stage.model.first)))
    assert zeros == [0, 0, 0, 3, 0, 0, 0, 3]
    assert zero_filters(stage.model.first) == dropped(stage, "first", 8)


def single_out(stage):
    """Make a filter that was kept the one to drop next: all others end far apart, around it."""
    chosen = stage.kept["first"][0].item()
    with torch.no_grad():
        stage.model.first.weight.normal_(0, 10)[chosen] = 0.01
    return chosen


@pytest.mark.parametrize("method", [FPGM(), SFP()])
def test_filters_are_chosen_anew_after_every_epoch(make_stage, method):
    make, stream = make_stage
    stage = make(method)
    batches = stream(0)
    for batch in batches[:4]:
        stage.step(*batch)
    chosen = single_out(stage)
    for batch in batches[4:]:
        stage.step(*batch)
    assert chosen in dropped(stage, "first", 8)


def test_a_hard_filter_has_no_momentum_when_it_is_zeroed(make_stage):
    make, stream = make_stage
    stage = make(FPGM())
    batches = stream(0)
    for batch in batches[:3]:
        stage.step(*batch)
    chosen = single_out(stage)
    momentum = stage.optimizer.state[stage.model.first.weight]["momentum_buffer"]
    assert (momentum[chosen] != 0).any()
    for batch in batches[3:6]:
        stage.step(*batch)
        assert (momentum[chosen] == 0).all()
        assert (stage.model.first.weight[chosen] == 0).all()


def test_norms_are_left_alone(make_stage):
    make, _ = make_stage
    stage = make(FPGM())
    assert (stage.model.norm1.weight == 1).all()
    assert (stage.model.norm1.running_var == 1).all()


@pytest.mark.parametrize("method", [FPGM(), SFP()])
@pytest.mark.parametrize("killed_at", [2, 6])
def test_a_killed_training_continues_with_the_same_bits(make_stage, tmp_path, method, killed_at):
    make, stream = make_stage

    def dies(start):
        yield from stream(start)[:killed_at]
        raise KeyboardInterrupt

    whole, resumed = make(method), make(method, noise=1.0)
    run(whole, stream, phase="filters")
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(KeyboardInterrupt):
        run(make(method), dies, phase="filters", checkpoint=checkpoint, checkpoint_every=1)
    run(resumed, stream, phase="filters", checkpoint=checkpoint)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert {k: v.tolist() for k, v in resumed.kept.items()} == {
        k: v.tolist() for k, v in whole.kept.items()
    }


def test_refuses_the_state_of_a_plain_training(make_stage, residual):
    make, _ = make_stage
    with pytest.raises(CheckpointError, match="no 'kept'"):
        make(SFP()).load_state_dict(Training(residual.model, OPTIONS, 8).state_dict())


def test_streams_stay_whole_where_the_budget_allows_it(residual):
    widths = filter_widths(residual, Budget(macs="50%").of(residual))
    assert widths["stem"] == 8
    assert widths["first"] / 8 == pytest.approx(widths["last"] / 12, abs=2 / 8)
    assert 0.4 < dmcp.cost(residual, "macs").of(widths) / dmcp.cost(residual, "macs").of({}) <= 0.5


def test_streams_join_at_the_same_share_where_it_does_not(residual):
    macs = dmcp.cost(residual, "macs")
    least = macs.of({"stem": 8, "first": 1, "last": 1})
    assert filter_widths(residual, Targets((macs,), (least,)))["stem"] == 8
    widths = filter_widths(residual, Targets((macs,), (least - 1,)))
    assert widths["stem"] < 8
    assert widths["first"] / 8 == pytest.approx(widths["stem"] / 8, abs=2 / 8)
    assert widths["last"] / 12 == pytest.approx(widths["stem"] / 8, abs=2 / 8)
    with pytest.raises(BudgetError):
        filter_widths(residual, Targets((macs,), (10,)))


def test_fine_tuning_takes_a_tenth_of_every_rate():
    found = fine_tuning(Schedule(0.5, start=0.2, warmup=0.1, final=0.01))
    assert [found.at(t) for t in (0, 0.1, 1)] == pytest.approx([0.02, 0.05, 0.001])
    assert fine_tuning(Schedule(0.5)).at(0) == pytest.approx(0.05)


@pytest.mark.parametrize("kind", [FPGM, SFP])
@pytest.mark.parametrize(("start", "images"), [("pretrained", 4 * 32), ("scratch", 0)])
def test_starts_from_the_pretrained_network_or_from_scratch(
    residual_lab, check_found, kind, start, images
):
    method = kind(start=start)
    assert method.uses_pretrained == bool(images)
    check_found(residual_lab, method.find(residual_lab))
    assert residual_lab.spent_on("half").backward == images + 2 * 4 * 32


@pytest.mark.parametrize("kind", [FPGM, SFP])
def test_refuses_another_start(kind):
    with pytest.raises(ConfigError, match=r"start must be .* got 'warm'"):
        kind(start="warm")
