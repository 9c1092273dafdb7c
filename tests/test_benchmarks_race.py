"""The measuring core itself: ratios, the gate before the clock, peers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from racing import no_clock, quick, scale_weight, small, with_fast
from torch import nn

from benchmarks import field, race
from benchmarks.cases import CASES, INPUT_STEP, WEIGHT_STEP, conv_flops, on_grid, recurrent, system
from benchmarks.dispatch import measure_step
from benchmarks.peers import PEERS, Peer
from benchmarks.race import OURS, PEER_ERROR, Spread, WrongResult
from benchmarks.recurrent import recurrent_flops
from cnnlstm_fast.nn.stream import Stream

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- ratios


def test_spread_is_the_20th_50th_and_80th_percentile():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0)


def test_a_ratio_is_paired_within_its_round():
    """A round in which the whole machine was ten times slower must not move the ratio."""
    ours, theirs = [1.0, 10.0, 1.0, 2.0, 1.0], [3.0, 30.0, 3.0, 6.0, 3.0]
    assert race.paired_ratio(theirs, ours) == Spread(3.0, 3.0, 3.0)


def test_a_ratio_is_the_median_over_rounds():
    assert race.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]).p50 == 2.0


def test_ratios_need_one_turn_of_each_per_round():
    with pytest.raises(ValueError, match="got 2 and 1 turns"):
        race.paired_ratio([1.0, 2.0], [1.0])


def test_the_best_peer_has_the_lowest_median():
    """One lucky call does not make a peer the best, one disturbed call does not unmake it."""
    assert race.best_peer({"lucky": [1.0, 9.0, 9.0], "steady": [4.0, 4.0, 400.0]}) == "steady"


def test_flops_of_a_convolution():
    """Counted by hand: 2 images of 4 x 5, 3 channels to 7, kernel 3x2, one multiply and one add each."""
    assert conv_flops(2 * 7 * 4 * 5, 3, (3, 2)) == 2 * (2 * 7 * 4 * 5) * (3 * 3 * 2)
    assert CASES["TimeDistributed/features/inference"].flops == 3_468_165_120


def test_flops_of_layers():
    """By hand: 3 sequences of 5 steps; the second layer of two directions reads both."""
    first = 3 * 5 * 2 * 4 * 7 * (2 + 7) * 2
    second = 3 * 5 * 2 * 4 * 7 * (14 + 7) * 2
    assert recurrent_flops("LSTM", (3, 5), 2, 7, layers=2, directions=2) == first + second
    assert recurrent_flops("GRU", (3, 5), 2, 7) == 3 * 5 * 2 * 3 * 7 * (2 + 7)
    assert round(CASES["Simple/model/inference"].flops / 1e9, 1) == 11.9


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("given", ["plain", "resets", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_cases_race(kind, given, mode):
    """Loops and packed sequences compute what one call does; a wrong one is not timed."""
    case = recurrent(kind, (4, 6), 5, 7, given=given, mode=mode, layers=2)
    case = dataclasses.replace(case, peers=("eager",))
    result = race.race(case, **quick())
    assert [s.name for s in result.standings] == [OURS, "eager"] and result.left_out == {}

    def build_wrong():
        plain, fast = case.build()
        with torch.no_grad():
            fast.layer.weight_hh_l1 *= 1 + 1e-3
        return plain, fast

    with pytest.raises(WrongResult):
        race.race(dataclasses.replace(case, build=build_wrong), **quick())


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("stage", ["features", "model"])
@pytest.mark.parametrize("kind", ["Simple", "1DConv", "TimeDistributed"])
def test_a_right_case_races(kind, stage, mode):
    case = small(kind, mode, stage=stage)
    result = race.race(case, **quick())
    assert [s.name for s in result.standings] == [OURS, "eager", "chunked 16"]
    assert result.left_out == {}
    assert result.best in ("eager", "chunked 16")
    assert result.standing(OURS).ratio == Spread(1.0, 1.0, 1.0)
    used = case.build()[0] if stage == "model" else case.build()[0].cnn
    if kind != "1DConv":
        assert result.parameter_bytes == 4 * sum(p.numel() for p in used.parameters())
    assert all(0 < s.ms.p20 <= s.ms.p50 <= s.ms.p80 and s.error < PEER_ERROR for s in result.standings)
    assert (result.gflops is not None) == (mode == "inference")


def scale_gradient(model: nn.Module) -> None:
    conv = model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]
    conv.bias.register_hook(lambda grad: grad * (1 + 1e-4))


def drop_gradient(model: nn.Module) -> None:
    (model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]).bias.requires_grad_(False)


def give_nan(model: nn.Module) -> None:
    right = model.features
    model.features = lambda x: right(x) * float("nan")


def give_another_shape(model: nn.Module) -> None:
    right = model.features
    model.features = lambda x: right(x)[:, :-1]


@pytest.mark.parametrize(
    ("mode", "fault", "said"),
    [
        ("inference", scale_weight, "the output is off"),
        ("inference", give_nan, "the output is off"),
        ("inference", give_another_shape, "the output is off"),
        ("training", scale_gradient, r"the gradient of cnn.*bias is off"),
        ("training", drop_gradient, r"the gradient of cnn.*bias is off"),
    ],
)
@pytest.mark.parametrize("kind", ["Simple", "TimeDistributed"])
def test_a_wrong_result_is_never_timed(monkeypatch, kind, mode, fault, said):
    monkeypatch.setattr(race, "turn", no_clock)
    with pytest.raises(WrongResult, match=said) as error:
        race.race(with_fast(small(kind, mode), fault), **(quick() | {"seed": 5}))
    assert "seed 5" in str(error.value) and kind in str(error.value)


def wrong_peer(case, model, x):
    return lambda x: case.forward(model, x.bfloat16().float())


def broken_peer(case, model, x):
    raise RuntimeError("no such operator\nand a long tail")


@pytest.mark.parametrize(
    ("prepare", "why"), [(wrong_peer, "the output is off"), (broken_peer, "no such operator")]
)
def test_a_wrong_or_broken_peer_is_left_out_by_name(monkeypatch, prepare, why):
    monkeypatch.setitem(PEERS, "bad", Peer("bad", prepare))
    result = race.race(dataclasses.replace(small(), peers=("bad", "eager")), **quick())
    assert [s.name for s in result.standings] == [OURS, "eager"]
    assert why in result.left_out["bad"] and "\n" not in result.left_out["bad"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(PEERS, "absent", Peer("absent", broken_peer, package="no_such_package"))
    result = race.race(dataclasses.replace(small(), peers=("eager", "absent")), **quick())
    assert "pip install no_such_package" in result.left_out["absent"]


def test_a_lent_output_is_shown_but_never_the_best(monkeypatch):
    reference = system("Simple").build()[0]

    def lent(case, model, x):
        out = case.forward(reference, x)
        return lambda x: out

    fast_and_lent = Peer("lent", lent, lent=True)
    monkeypatch.setattr(race, "exceeding", lambda found, limits: None)
    monkeypatch.setitem(PEERS, "lent", fast_and_lent)
    result = race.race(dataclasses.replace(small(), peers=("eager", "lent")), **quick())
    assert result.standing("lent").lent and result.best == "eager"


def test_training_is_verified_where_sums_are_exact():
    """On the grid a float32 convolution equals float64's, so that no winner hangs on rounding."""
    reference, _ = system("TimeDistributed", size=(8, 8)).build()
    x = on_grid(torch.randn(4, 3, 8, 8), INPUT_STEP)
    conv = reference.cnn[0]
    exact = copy.deepcopy(conv).double()(x.double())
    assert torch.equal(conv(x).double(), exact)
    assert torch.equal(conv.weight, on_grid(conv.weight, WEIGHT_STEP)) and conv.weight.unique().numel() > 100


def test_turns_count_only_after_an_uncounted_call():
    seen = []
    times = race.turn(lambda batch: seen.append(batch), ["a", "b", "c"], seconds=10.0)
    assert len(times) == 20 and seen == ["c", *("a", "b", "c") * 6, "a", "b"]


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("name", ["channels_last", "chunked 16", "chunked 8"])
@pytest.mark.parametrize("stage", ["features", "model"])
@pytest.mark.parametrize(("kind", "batch"), [("Simple", 19), ("1DConv", 17), ("TimeDistributed", 5)])
def test_plain_peers_compute_the_model(name, stage, kind, batch):
    """Batches that chunks do not divide."""
    case = dataclasses.replace(small(kind, stage=stage), shape=(batch, *small(kind).shape[1:]))
    reference, _ = case.build()
    x = torch.randn(case.shape)
    with torch.no_grad():
        found = PEERS[name].prepare(case, copy.deepcopy(reference), x)(x)
        torch.testing.assert_close(found, case.forward(reference, x), rtol=1e-5, atol=1e-5)


def test_peers_that_do_not_train_say_so():
    case = small(mode="training")
    assert PEERS["OpenVINO"].why_not(case) == "OpenVINO does not train"
    assert PEERS["eager"].why_not(case) is None


def test_every_case_names_known_peers():
    for case in CASES.values():
        assert set(case.peers) <= set(PEERS) and set(case.targets) <= {"best", *case.peers}
        assert all(PEERS[name].trains for name in case.peers) or not case.training


def test_a_step_of_a_stream_is_checked_and_timed(monkeypatch):
    found = measure_step("LSTM", 5, 6, 2, 3, rounds=3, calls=2)
    assert found.layer == "LSTM 5-6x2" and found.batch == 3 and found.eager_us > 0 and found.ours_us > 0
    right = Stream.__call__
    monkeypatch.setattr(Stream, "__call__", lambda self, x: right(self, x) + 1e-3)
    with pytest.raises(WrongResult, match="a stream of GRU is off by 1"):
        measure_step("GRU", 5, 6, 1, 1, rounds=3, calls=2)


# ---------------------------------------------------------------- whole models


SMALL_INPUTS = {
    "OCR": (2, 1, 32, 24),
    "OCR by rectangular pools": (2, 1, 32, 24),
    "video frames": (1, 2, 3, 71, 43),
    "speech front end": (2, 1, 161, 60),
    "sensors": (2, 9, 24),
    "sound events": (2, 1, 6, 40),
    "agent": (2, 1, 1, 84, 84),
}


@pytest.mark.some(5)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", field.MODELS)
def test_a_model_of_the_field_races(name, mode):
    case = CASES[f"field/{name}/{mode}"]
    case = dataclasses.replace(case, shape=SMALL_INPUTS[name], peers=("eager", "channels_last"))
    result = race.race(case, **quick())
    assert result.left_out == {} and len(result.standings) == 3


def test_a_gradient_that_is_zero_counts_as_itself():
    """Of a bias before a batch norm only rounding is left, which has no digits to compare."""
    true = {"output": torch.ones(4).double(), "bias": torch.full((4,), 1e-17).double()}
    found = race.errors({"output": torch.ones(4), "bias": torch.full((4,), 1e-6)}, true)
    assert found["output"] == 0 and found["bias"] == pytest.approx(2e-6)
