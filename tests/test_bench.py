"""bench/step_time.py: its counts, its timing, its floors, and tiny runs of the whole script."""
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from conftest import ROOT, TINY, set_stage

sys.path.insert(0, str(ROOT / "bench"))

import step_time  # noqa: E402

TINY_ENV = {**{name.upper(): value for name, value in TINY.items()}, "TRAIN_BATCH_TOKENS": 64}
# What the default recipe lacks: few wide heads, gates, two lanes.
OTHER = dict(NUM_HEADS=2, NUM_KV_HEADS=1, SMEAR_CHANNELS=4, HEAD_GATE_CHANNELS=4, TWO_LANES=1,
             XSA_LAST_N=0, NUM_LOOPS=0)
PARTS = ["attention kernel", "attention products", "MLP products", "embedding, head, loss",
         "gradient upkeep", "elementwise rest", "optimizer", "EMA", "whole step"]


def make_bench(run, state=None):
    """A `Bench` of a run on ceilings that make floors easy."""
    rows = torch.randint(run.cfg.vocab_size, (run.cfg.batch_seqs, run.cfg.seq_len + 1))
    return step_time.Bench(run, rows, state, step_time.Ceilings(1e9, 1e9), 1)


@pytest.fixture
def run(make_run):
    """A run of the tiny model with its initial weights."""
    return make_run(train_gpt.Config(**TINY))


def call_main(monkeypatch, capsys, settings, *args):
    """(exit code, stdout, stderr) of `main` under the tiny environment and `settings`."""
    set_stage(monkeypatch, {**TINY_ENV, **settings})
    code = step_time.main(list(args))
    return code, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------
# Counts
# ------------------------------------------------------------------------------------------------

def test_flops_of_the_default_model(monkeypatch, make_run):
    """The counts that the measuring protocol states: 296 MFLOP per token plain, 444 looped."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, generator: weight)
    run = make_run(train_gpt.Config())
    assert [round(step_time.model_flops(run, looped) / 1e6) for looped in (False, True)] == [
        296, 444]


def test_products_are_all_matrices_and_the_head(run):
    """Plain, products add up to the matrices and the embedding; looped, layers repeat."""
    params = sum(len(run.flat.part(run.flat.data, g)) for g in ("muon", "embed"))
    plain, looped = (step_time.products(run, flag) for flag in (False, True))
    assert step_time.product_flops(plain) == 6 * params
    assert [p.part for p in plain].count("head") == [p.part for p in looped].count("head") == 1
    layer = sum(p.O * p.I for p in plain[:-1]) // run.cfg.num_layers
    assert step_time.product_flops(looped) - step_time.product_flops(plain) == 6 * layer


def test_fewer_products_move_fewer_bytes():
    """A parallel layer saves a norm's passes; own-value exclusion and a second lane cost some."""
    cfg = train_gpt.Config(**{**TINY, "xsa_last_n": 0})
    C, K = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    serial, parallel = (step_time.layer_elements(cfg, i) for i in (1, 2))
    assert serial - parallel == 4 * C
    with_xsa = train_gpt.Config(**TINY)
    assert step_time.layer_elements(with_xsa, 1) - serial == 5 * C + 3 * K
    lanes = train_gpt.Config(**{**TINY, "xsa_last_n": 0, "two_lanes": 1})
    assert step_time.layer_elements(lanes, 2) > parallel


def test_ends_are_the_model_without_layers(run):
    """Every layer begins as the identity, so the ends' gradient is that of the initial model."""
    bench = make_bench(run)
    table = run.model.tok_emb
    step_time.ends_work(bench)()
    ends = table.grad.clone()
    rows = bench.parts[0]
    run.flat.buffer.zero_()
    run.forward(rows[:, :-1], rows[:, 1:], False).mean().backward()
    assert ends.abs().max() > 0
    torch.testing.assert_close(ends, table.grad, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# Times and floors
# ------------------------------------------------------------------------------------------------

class FakeEvent:
    """Stands in for torch.cuda.Event: its clock ticks once a record."""
    ticks = 0

    def __init__(self, enable_timing):
        """An event that can be timed."""
        assert enable_timing

    def record(self):
        """Remember the tick."""
        FakeEvent.ticks += 1
        self.at = FakeEvent.ticks

    def elapsed_time(self, end):
        """Ticks between two events."""
        return float(end.at - self.at)


def test_device_events_time_phases_and_turns(monkeypatch):
    """On a GPU events do the timing, and the device is waited for twice only."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    waits, calls = [], []
    dist = SimpleNamespace(on_cuda=True, barrier=lambda: waits.append(len(calls)))
    phases = [lambda: calls.append(0), lambda: calls.append(1)]
    times = step_time.time_phases(dist, phases, 5)
    assert times == [1.0, 1.0, 2.0]
    assert waits == [2 * step_time.WARM_CALLS, 2 * (step_time.WARM_CALLS + 5)]


def test_parts_add_up_to_the_step(run):
    """The rest is forward_backward less the timed parts; every floor is positive."""
    shapes = {(p.O, p.I): 1.0 for p in step_time.products(run, True)}
    shared = step_time.Shared(attention=[5.0, 2.0], products=shapes, ends=3.0, upkeep=0.5)
    for looped, layers in ((False, 3), (True, 4)):
        parts = step_time.make_parts(make_bench(run), looped, shared, [100.0, 7.0, 1.0, 108.0])
        ms = {p.name: p.ms for p in parts}
        assert sum(ms.values()) == pytest.approx(108.0)
        assert ms["attention kernel"] == 5.0 + 2.0 * (layers - 1)      # the last has no window
        assert ms["attention products"] == ms["MLP products"] == 2.0 * layers
        assert all(p.floor_ms > 0 for p in parts)


def test_floors_are_flops_and_bytes():
    """At 1 TFLOP/s and 1 GB/s, 2 GFLOP and 3 MB take 2 + 3 ms."""
    assert step_time.Ceilings(1e12, 1e9).floor_ms(2e9, 3e6) == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, graphs", [({}, ["plain", "looped"]), (OTHER, ["plain"])])
def test_a_tiny_run(monkeypatch, capsys, tmp_path, settings, graphs):
    """Every recipe is timed part by part, from no data, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_time, "WARM_CALLS", 1)
    code, out, err = call_main(monkeypatch, capsys, settings, "--steps", "1")
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    assert re.search(r"^ceilings: matrix product \S+ TFLOP/s, copy \S+ TB/s$", out, re.M)
    assert re.findall(r"^(\w+): \S+ ms per step, .* % MFU$", out, re.M) == graphs
    assert re.search(r"^attention kernel of a layer: \S+ ms, with a window \S+ ms$", out, re.M)
    assert re.findall(r"^(\w+), part by part$", out, re.M) == graphs
    for graph in graphs:
        table = out.split(f"{graph}, part by part\n")[1].split("\n\n")[0].splitlines()
        assert [re.split("  +", line)[0] for line in table[1:]] == PARTS


class Peer(train_gpt.Dist):
    """One of two ranks, whose collectives give the shape of both ranks' data without the other."""
    rank_to_be = 0

    def __init__(self):
        """Without a process group."""
        super().__init__({})
        self.world, self.rank, self.is_main = 2, self.rank_to_be, self.rank_to_be == 0

    def all_reduce_(self, x):
        """This rank's part of the sum."""
        return x

    def all_gather(self, part):
        """This rank's part twice."""
        return torch.cat([part, part])

    def barrier(self):
        """The other rank is there already."""

    close = barrier


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_share_a_step(monkeypatch, capsys, rank):
    """Rank 0 alone prints, and tokens are counted over both."""
    monkeypatch.setattr(step_time, "WARM_CALLS", 0)
    monkeypatch.setattr(step_time, "Dist", Peer)
    monkeypatch.setattr(Peer, "rank_to_be", rank)
    code, out, err = call_main(monkeypatch, capsys, {}, "--steps", "1", "--graph", "plain")
    assert (code, err) == (0, "")
    if rank:
        assert out == ""
    else:
        ms, rate = re.search(r"plain: (\S+) ms per step, (\S+) tokens/s", out).groups()
        assert out.startswith("2 x CPU")
        assert re.search(r"^all-reduce of \d+ MB of gradients: \S+ ms$", out, re.M)
        assert re.search(r"^all-gathers of \d+ MB of updates: \S+ ms$", out, re.M)
        assert int(rate.replace(",", "")) == pytest.approx(64_000 / float(ms), rel=0.01, abs=1)


@pytest.mark.parametrize("settings, args, message", [
    (dict(SEQ_LEN=0), (), "SEQ_LEN=0: must be positive"),
    (dict(SEQ_LENN=8), (), "SEQ_LENN is not a setting; did you mean SEQ_LEN?"),
    ({}, ("--steps", "0"), "--steps 0: must be at least 1"),
    ({}, ("--steps", "many"), "argument --steps: invalid int value: 'many'; see --help"),
    (dict(NUM_LOOPS=0), ("--graph", "looped"), "--graph looped: NUM_LOOPS=0 leaves no layer to "
     "loop over; set it to 1"),
    ({}, ("--kernels",), "--kernels: only a GPU has kernels to profile; leave it out")])
def test_bad_input_is_one_line(monkeypatch, capsys, settings, args, message):
    """Exit code 2 and one line, before anything is timed."""
    found = call_main(monkeypatch, capsys, settings, *args)
    assert found == (2, "", f"step_time: {message}\n")
