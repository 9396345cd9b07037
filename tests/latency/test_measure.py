import json
from dataclasses import dataclass, replace

import pytest
import torch

import dmcp
from dmcp.errors import ConfigError
from dmcp.latency import Runtime, Timing, measure, measure_latency, on_steps
from dmcp.latency.cache import TimingCache, cache_folder
from dmcp.latency.measure import _fit, cover


def narrowed(graph, most=3):
    units = tuple(
        replace(unit, choices=unit.choices[-most:]) if unit.searchable else unit
        for unit in graph.units
    )
    return replace(graph, units=units)


@dataclass(frozen=True)
class Counting(Runtime):
    """Whose milliseconds are the parameters of what it runs: they are known of any network."""

    def prepare(self, module, inputs):
        return lambda: float(sum(parameter.numel() for parameter in module.parameters()))


@pytest.fixture
def counting(monkeypatch):
    def counted(calls, **_):
        return [Timing(call(), 0.5 * call(), 2 * call()) for call in calls]

    monkeypatch.setattr(measure, "side_by_side", counted)
    return Counting()


@pytest.mark.parametrize("name", ["Residual", "Concat", "Depthwise", "WithoutNorm", "resnet18"])
def test_latency_is_the_sum_of_what_was_measured(traced, counting, tmp_path, random_widths, name):
    case = traced(name)
    table = measure_latency(case.graph, case.inputs[0], counting, points=2, cache=tmp_path)
    cost = dmcp.cost(case.graph, "latency", table)
    # The parameters of a layer are a product of two widths, so two points of each tell all.
    for seed in range(4):
        widths = random_widths(case.graph, seed)
        small = dmcp.extract(case.graph, widths)
        count = sum(parameter.numel() for parameter in small.parameters())
        least = {unit.name: max(widths[unit.name], unit.choices[0]) for unit in case.graph.units}
        assert cost.of(least) == pytest.approx(count, rel=1e-6)
    assert (table.scale, table.offset) == (pytest.approx(1), pytest.approx(0, abs=0.1))
    assert all(c["predicted"] == pytest.approx(c["measured"], rel=1e-5) for c in table.checks)
    assert table.terms[0].high == (2 * torch.tensor(table.terms[0].ms)).tolist()


def test_the_default_device_of_new_tensors_does_not_matter(traced, counting, tmp_path):
    case = traced("WithoutNorm")
    tables = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            tables.append(
                measure_latency(case.graph, case.inputs[0], counting, points=2, cache=tmp_path)
            )
    assert tables[0] == tables[1]


def test_a_unit_at_both_ends_is_measured_on_the_diagonal(traced, counting, tmp_path):
    case = traced("BothEnds")
    table = measure_latency(case.graph, case.inputs[0], counting, points=8, cache=tmp_path)
    cost = dmcp.cost(case.graph, "latency", table)
    for width in range(1, 9):
        small = dmcp.extract(case.graph, {"stem.0": width})
        count = sum(parameter.numel() for parameter in small.parameters())
        assert cost.of({"stem.0": width}) == pytest.approx(count, rel=1e-6)


def test_what_was_measured_is_not_measured_again(traced, tmp_path):
    case = traced("Residual")
    graph, seen = narrowed(case.graph), []

    def measured(runtime=None, **options):
        on_step = options.pop("on_step", lambda *counts: seen.append(counts))
        options = {"points": 2, "rounds": 2, "cache": tmp_path, **options}
        table = measure_latency(graph, case.inputs[0], runtime, on_step=on_step, **options)
        return table, seen[-1][2]

    class StopError(Exception):
        pass

    def interrupt(done, _total, count):
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        measured(on_step=interrupt)
    (path,) = tmp_path.iterdir()
    before = len(TimingCache(tmp_path, Runtime().describe(), 2))
    assert before > 0
    with path.open("a") as file:
        file.write('{"signature": "cut sho')
    first, rest = measured()
    assert rest > 0
    second, none = measured()
    assert none == 0
    assert first.to_json() == second.to_json()
    _, wider = measured(points=3)
    assert wider > 0
    assert first.setting["runtime"] == "eager"
    assert first.setting["input"] == [2, 3, 8, 8]
    _, threads = measured(Runtime(threads=2))
    assert threads == before + rest
    assert len(list(tmp_path.iterdir())) == 2
    assert measured(rounds=3)[1] == before + rest, "two rounds are too few"
    assert measured()[1] == 0


def test_other_networks_share_what_is_the_same(traced, tmp_path):
    counts = []
    for name in ("Residual", "Residual", "Depthwise"):
        case = traced(name)
        measure_latency(
            narrowed(case.graph, 2),
            case.inputs[0],
            points=2,
            rounds=2,
            cache=tmp_path,
            on_step=lambda *seen: counts.append(seen[2]) if seen[0] == seen[1] else None,
        )
    assert counts[0] > counts[2] > counts[1] == 0


def test_the_cache_keeps_settings_apart(tmp_path, monkeypatch):
    first = TimingCache(tmp_path / "a", {"threads": 1}, 3)
    first.add({"x": Timing(2.0, 1.0, 3.0)})
    assert TimingCache(tmp_path / "a", {"threads": 1}, 2)["x"] == Timing(2.0, 1.0, 3.0)
    assert "x" not in TimingCache(tmp_path / "a", {"threads": 1}, 4)
    assert "x" not in TimingCache(tmp_path / "a", {"threads": 2}, 3)
    assert json.loads(first.path.read_text().splitlines()[0]) == {"threads": 1}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dmcp" / "latency"


def test_structures_cover_what_is_wanted():
    wanted = [{u: a, u + 1: b} for u in range(8) for a in range(4) for b in range(4)]
    plan = cover(wanted, [dict.fromkeys(range(9), level) for level in range(4)])
    assert all(any(each.items() <= levels.items() for levels in plan) for each in wanted)
    assert len(plan) <= 24, "neighbours share structures"


def test_the_fit_is_robust_and_never_negative():
    sums = [1.0, 2.0, 4.0, 5.0]
    assert _fit(sums, [3 * s + 2 for s in sums], 0.5) == pytest.approx((3, 2))
    assert _fit(sums, [3 * s - 1 for s in sums], 0.5) == pytest.approx((3, -1))
    one_was_disturbed = [5.0, 8.0, 90.0, 17.0, 20.0, 23.0]
    assert _fit([1.0, 2.0, 4.0, 5.0, 6.0, 7.0], one_was_disturbed, 0.5) == pytest.approx((3, 2))
    scale, offset = _fit(sums, [3 * s - 2.5 for s in sums], 0.5)
    assert (scale > 0, offset) == (True, 0)
    scale, offset = _fit(sums, sums[::-1], 0.5)
    assert (scale > 0, offset) == (True, 0)


def test_options_that_cannot_be_are_refused(traced, tmp_path):
    case = traced("Residual")
    with pytest.raises(ConfigError, match="points and rounds must be at least 2, got 1 and 15"):
        measure_latency(case.graph, case.inputs[0], points=1, cache=tmp_path)
    fixed = replace(case.graph, units=tuple(replace(u, searchable=False) for u in case.graph.units))
    with pytest.raises(ConfigError, match="the network has no unit whose width can vary"):
        measure_latency(fixed, case.inputs[0], cache=tmp_path)
    with pytest.raises(ConfigError, match="runtime must be one of eager, compiled, onnxruntime"):
        Runtime("tensorrt")
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:<number>, got 'tpu'"):
        Runtime(device="tpu")
    with pytest.raises(ConfigError, match=r"got 'cpu:0'"):
        Runtime(device="cpu:0")
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        Runtime(threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="device is 'cuda', but torch finds no CUDA GPU"):
        Runtime(device="cuda")


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_runtimes_run_the_network(traced, name):
    case = traced("Residual")
    runtime = Runtime(name)
    with runtime.running(), torch.no_grad():
        assert not torch.is_grad_enabled()
        call = runtime.prepare(case.model.eval(), case.inputs)
        torch.testing.assert_close(call(), case.model(*case.inputs), rtol=1e-4, atol=1e-5)
    assert runtime.describe()["runtime"] == name


def test_widths_follow_the_steps_of_the_table(traced, made_up_table):
    graph = traced("Residual").graph
    table = made_up_table(graph)
    first = graph.searchable[0].name
    axis = replace(table.axes[0], nodes=(1.0, 4.0, 5.0, 8.0))
    term = replace(table.terms[1], ms=[1.0, 2.0, 1.5, 3.0])
    alone = replace(table, axes=(axis,), terms=(term,), scale=1.0)
    stepped = on_steps(graph, dmcp.cost(graph, "latency", alone))
    # From 1.5 on a width of 5 is as fast.
    assert stepped.searchable[0].choices == (1, 2, 5, 6, 7, 8)
    assert stepped.units[1].choices == graph.units[1].choices[-1:]
    net = dmcp.MarkovNet(graph.model, graph=stepped, groups=None)
    assert net.graph.units[0].choices == (1, 2, 5, 6, 7, 8)
    assert first == "stem.0"
    # No latency of the others is known to fall.
    assert not any(unit.searchable for unit in stepped.units[1:])
