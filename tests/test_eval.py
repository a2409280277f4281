"""train_gpt.py, Evaluation: windows, chunks, tallies, and the scorer against a slow one.

Run alone: python -m pytest -q tests/test_eval.py
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QuietLog, stirred, stream

import train_gpt
from train_gpt import Frozen, GolfError, Scorer, Stream, Tally, evaluate

PLANS = dict(plain=train_gpt.plain_plan, sliding=train_gpt.sliding_plan)
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world`, whose sums over ranks are left to the test."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.all_reduce_ = rank, world, lambda x: x
    return dist


def scorer_of(run, data: Stream, dist=None) -> Scorer:
    """Scorer of a stream by the model of `run`."""
    rt = run.rt._replace(dist=dist or run.rt.dist)
    return Scorer(run.cfg, rt, run.forward, data)


def slow_nll(run, data: Stream, window: range) -> torch.Tensor:
    """Nats of a window's targets by plain log_softmax over soft-capped logits, in float64."""
    cfg, model = run.cfg, run.model
    tokens = data.tokens[window.stop - cfg.seq_len:window.stop + 1].long()
    with torch.no_grad():
        x = model(tokens[None, :-1])[0].double()
    logits = cfg.logit_softcap * torch.tanh(x @ model.tok_emb.double().T / cfg.logit_softcap)
    nll = -logits.log_softmax(-1)[torch.arange(cfg.seq_len), tokens[1:]]
    return nll[-len(window):].detach()


def close(found, want):
    """Fail unless two tallies hold the same numbers, up to rounding of the nats."""
    np.testing.assert_allclose(found, want, rtol=1e-6)


# ------------------------------------------------------------------------------------------------
# Windows and chunks
# ------------------------------------------------------------------------------------------------

def sizes():
    """(n, settings of the plan) for many lengths, windows, strides and chunks."""
    for T in (1, 4, 8, 12):
        for stride in (s for s in range(1, T + 1) if T % s == 0):
            for n in range(T, 6 * T + 1, T):
                for size in (T, 2 * T, 3 * T, 100 * T):
                    yield n, SimpleNamespace(
                        seq_len=T, eval_stride=stride, ttt_chunk_tokens=size, ttt_documents=False)


def test_plans_score_each_target_once():
    """Windows lie within the stream; chunk after chunk they score 0..n-1 in order, once.

    A chunk scores exactly its own interval, and all chunks but the last have the same size.
    """
    for n, cfg in sizes():
        T, size = cfg.seq_len, cfg.ttt_chunk_tokens
        plain, sliding = (make(n, cfg) for make in PLANS.values())
        assert [(c.told["first"], c.told["last"]) for c in sliding] == [
            (lo, min(lo + size, n)) for lo in range(0, n, size)]
        whole = plain[0]._replace(told=dict(first=0, last=n))
        for chunk in [whole, *sliding]:
            targets = [t for w in chunk.windows for t in w]
            assert targets == list(range(chunk.told["first"], chunk.told["last"]))
            assert all(T <= w.stop <= n and 0 < len(w) <= T for w in chunk.windows)


def test_sliding_windows_give_context():
    """After the first window each target has at least seq_len - stride tokens before it."""
    for n, cfg in sizes():
        first, *rest = [w for c in train_gpt.sliding_plan(n, cfg) for w in c.windows]
        assert first == range(cfg.seq_len) and all(len(w) == cfg.eval_stride for w in rest)


# ------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------

@each_plan
def test_uniform_model_in_closed_form(cfg, make_run, plan):
    """A model that knows nothing needs log2(V) bits a token: n log2(V) over the bytes of text."""
    run, data = make_run(cfg), stream(cfg, 320)
    run.model.tok_emb.data.zero_()
    tally, size = evaluate(scorer_of(run, data), plan(320, cfg), Frozen()), int(data.bytes.sum())
    loss, bpb = train_gpt.report_score("uniform", tally, run.rt, 1.0)
    assert tally.total(run.rt.dist) == (loss, bpb, 320, size)
    assert loss == pytest.approx(math.log(cfg.vocab_size), rel=1e-6)
    assert bpb == pytest.approx(320 * math.log2(cfg.vocab_size) / size, rel=1e-6)


@each_plan
def test_scorer_equals_a_slow_reference(cfg, make_run, plan):
    """Nats of every window by itself, from log_softmax in float64, sum to those of the scorer.

    Scoring leaves no trace: no weight changes, and no gradient is computed.
    """
    run, data = stirred(make_run(cfg)), stream(cfg, 224)
    before = run.flat.data.clone()
    tally = evaluate(scorer_of(run, data), plan(224, cfg), Frozen())
    assert torch.equal(run.flat.data, before) and not run.flat.buffer.any()
    want = sum(slow_nll(run, data, w).sum().item() for c in plan(224, cfg) for w in c.windows)
    close(tally.sums.tolist(), [want, 224, data.bytes.sum().item()])


def test_scoring_distribution_sums_to_one(cfg, make_run):
    """Over all tokens of the vocabulary the probabilities that scoring uses add up to 1."""
    run, V = stirred(make_run(cfg)), cfg.vocab_size
    run.model.tok_emb.data.mul_(20)             # logits up to the soft cap
    tokens = stream(cfg, 32).tokens[:-1].long()[None].expand(V, -1)
    with torch.no_grad():
        nll = run.forward(tokens, torch.arange(V)[:, None].expand(V, 32), precise=True)
    total = nll.double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(32, dtype=torch.float64), atol=1e-5, rtol=0)
    assert nll.min() < 0.5 and nll.max() > 20, "the example is too flat to show anything"


@pytest.mark.parametrize("world", [3, 30])
@each_plan
def test_ranks_share_the_work_of_one(cfg, make_run, world, plan):
    """Together ranks count what one counts, each target once; some may have nothing to do."""
    run, data = stirred(make_run(cfg)), stream(cfg, 320)

    def tally_of(dist=None) -> Tally:
        return evaluate(scorer_of(run, data, dist), plan(320, cfg), Frozen())
    alone, parts = tally_of(), [tally_of(ranked(r, world)) for r in range(world)]
    close(sum(p.sums for p in parts).tolist(), alone.sums.tolist())
    assert (sum(p.ledger for p in parts) == 1).all()


def test_batch_size_does_not_change_the_score(make_cfg, make_run):
    """One window at a time or all at once: the same nats up to rounding, the same counts."""
    data, found = stream(make_cfg(), 160), []
    for batch in (1, 7, 64):
        run = stirred(make_run(make_cfg(eval_batch_seqs=batch)))
        plan = train_gpt.sliding_plan(160, run.cfg)
        found.append(evaluate(scorer_of(run, data), plan, Frozen()).sums.tolist())
    close(found[1:], [found[0]] * 2)


def counting(cfg, data: Stream, shapes: list) -> Scorer:
    """A scorer whose score of a target is its token id, exactly; notes the shapes it is given."""
    def forward(tokens, targets, precise):
        assert precise
        shapes.append((tuple(tokens.shape), tuple(targets.shape)))
        return targets.float()
    rt = train_gpt.Runtime(train_gpt.Dist({}), QuietLog(), train_gpt.Clock(cfg))
    return Scorer(cfg, rt, forward, data)


@pytest.mark.parametrize("batch", [1, 5, 16, 100])
def test_padding_is_never_counted(make_cfg, batch):
    """Batches are filled up to one shape for each length; only real windows enter the sums."""
    cfg, shapes = make_cfg(eval_batch_seqs=batch), []
    data = stream(cfg, 448)
    scorer = counting(cfg, data, shapes)
    tally = evaluate(scorer, train_gpt.sliding_plan(448, cfg), Frozen())
    assert tally.sums.tolist() == [data.tokens[1:].sum(), 448, data.bytes.sum()]
    assert tally.times_scored(scorer.rt.dist) == (1, 1)
    assert set(shapes) == {((batch, 32), (batch, 32)), ((batch, 32), (batch, 8))}


# ------------------------------------------------------------------------------------------------
# The ledger
# ------------------------------------------------------------------------------------------------

def report_of(cfg, windows: list[range]):
    """Report of a pass that scored `windows` of a stream of 128 targets, and that stream."""
    data = stream(cfg, 128)
    scorer, tally = counting(cfg, data, []), Tally(128, torch.device("cpu"))
    scorer.score(windows, tally)
    return train_gpt.report_score("a pass", tally, scorer.rt, 1.0), data


def plain_windows(cfg) -> list[range]:
    """Windows side by side over 128 targets."""
    return train_gpt.plain_plan(128, cfg)[0].windows


def test_a_whole_pass_is_reported(cfg):
    """Each target once: the report is nats per token and bits per byte."""
    found, data = report_of(cfg, plain_windows(cfg))
    nats, size = data.tokens[1:].sum().item(), data.bytes.sum().item()
    assert found == pytest.approx((nats / 128, nats / math.log(2) / size))


@pytest.mark.parametrize("spoil", [
    lambda windows: windows + windows[:1], lambda windows: windows[:-1],
    lambda windows: windows[:-1] + windows[:1], lambda windows: windows[1:] + [range(1, 33)]],
    ids=["twice", "never", "one twice and one never", "off by one"])
def test_the_ledger_trips(cfg, spoil):
    """A target scored twice or never ends the run, even where their number is right."""
    with pytest.raises(AssertionError, match="once"):
        report_of(cfg, spoil(plain_windows(cfg)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_score_is_an_error(cfg, value):
    """Weights that score no finite number are an error with the name of the pass."""
    scorer = counting(cfg, stream(cfg, 128), [])
    scorer.forward = lambda tokens, targets, precise: torch.full(targets.shape, value)
    tally = evaluate(scorer, train_gpt.plain_plan(128, cfg), Frozen())
    with pytest.raises(GolfError, match="a pass: the loss is"):
        train_gpt.report_score("a pass", tally, scorer.rt, 1.0)
