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
from train_gpt import DataError, Scorer, Tally, Validation, Window

SIZES = [(n, seq, stride) for seq in (1, 4, 8, 12) for stride in range(1, seq + 1)
         if seq % stride == 0 for n in range(seq, 6 * seq + 1, seq)]


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world`, whose sums over ranks are left to the test."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.sum_ = rank, world, lambda x: x
    return dist


def scored(windows: list[Window], seq_len: int) -> list[int]:
    """The targets that windows score, in their order."""
    return [t for w in windows for t in range(w.start + seq_len - w.tail, w.start + seq_len)]


def slow_nll(run, data: Validation, window: Window) -> torch.Tensor:
    """Nats of a window's targets by plain log_softmax over soft-capped logits, in float64."""
    cfg, model = run.cfg, run.model
    tokens = data.tokens[window.start:window.start + cfg.seq_len + 1].long()
    with torch.no_grad():
        x = model.features(tokens[None, :-1], True)[0].double()
    logits = cfg.logit_softcap * torch.tanh(x @ model.tok_emb.double().T / cfg.logit_softcap)
    nll = -logits.log_softmax(-1)[torch.arange(cfg.seq_len), tokens[1:]]
    return nll[cfg.seq_len - window.tail:].detach()


def close(found, want):
    """Fail unless two tallies hold the same numbers, up to rounding of the nats."""
    np.testing.assert_allclose(found, want, rtol=1e-6)


# ------------------------------------------------------------------------------------------------
# Windows and chunks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, seq_len, stride", SIZES)
def test_windows_score_each_target_once(n, seq_len, stride):
    """Side by side and sliding, windows lie within the stream and score 0..n-1 in order, once."""
    for windows in (train_gpt.plain_windows(n, seq_len),
                    train_gpt.sliding_windows(n, seq_len, stride)):
        assert scored(windows, seq_len) == list(range(n))
        assert all(0 <= w.start <= n - seq_len and 0 < w.tail <= seq_len for w in windows)


@pytest.mark.parametrize("n, seq_len, stride", SIZES)
def test_sliding_windows_give_context(n, seq_len, stride):
    """After the first window each target has at least seq_len - stride tokens before it."""
    first, *rest = train_gpt.sliding_windows(n, seq_len, stride)
    assert first == (0, seq_len)
    assert all(w.tail == stride for w in rest)


@pytest.mark.parametrize("n, seq_len, stride", SIZES)
def test_chunks_partition_windows_and_targets(n, seq_len, stride):
    """Chunks keep the order of the windows; chunk i scores exactly its own range of targets."""
    windows = train_gpt.sliding_windows(n, seq_len, stride)
    for size in (seq_len, 2 * seq_len, 3 * seq_len, 100 * seq_len):
        chunks = train_gpt.chunks_of(windows, seq_len, size)
        assert [w for chunk in chunks for w in chunk] == windows
        assert [scored(chunk, seq_len) for chunk in chunks] == [
            list(range(lo, min(lo + size, n))) for lo in range(0, n, size)]


# ------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------

def test_uniform_model_in_closed_form(cfg, make_run):
    """A model that knows nothing needs log2(V) bits a token: n log2(V) over the bytes of text."""
    run, data = make_run(cfg), stream(cfg, 320)
    run.model.tok_emb.data.zero_()
    scorer = Scorer(run, data)
    for tally in (scorer.plain(), train_gpt.eval_chunks(run, scorer, learn=False)):
        loss, bpb, targets, size = tally.total(run.dist)
        assert (targets, size) == (320, int(data.bytes.sum()))
        assert loss == pytest.approx(math.log(cfg.vocab_size), rel=1e-6)
        assert bpb == pytest.approx(320 * math.log2(cfg.vocab_size) / size, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_scorer_equals_a_slow_reference(cfg, make_run, kind):
    """Nats of every window by itself, from log_softmax in float64, sum to what the scorer says."""
    run, data = stirred(make_run(cfg)), stream(cfg, 224)
    scorer, sliding = Scorer(run, data), kind == "sliding"
    windows = train_gpt.sliding_windows(224, 32, 8) if sliding else train_gpt.plain_windows(224, 32)
    tally = train_gpt.eval_chunks(run, scorer, learn=False) if sliding else scorer.plain()
    want = sum(slow_nll(run, data, w).sum().item() for w in windows)
    close(tally.sums.tolist(), [want, 224, data.bytes.sum().item()])


def test_scoring_distribution_sums_to_one(cfg, make_run):
    """Over all tokens of the vocabulary the probabilities that scoring uses add up to 1."""
    run, V = stirred(make_run(cfg)), cfg.vocab_size
    run.model.tok_emb.data.mul_(20)             # logits up to the soft cap
    tokens = stream(cfg, 32).tokens[:-1].long()[None].expand(V, -1)
    with torch.no_grad():
        nll = run.window_nll(tokens, torch.arange(V)[:, None].expand(V, 32))
    total = nll.double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(32, dtype=torch.float64), atol=1e-5, rtol=0)
    assert nll.min() < 0.5 and nll.max() > 20, "the example is too flat to show anything"


@pytest.mark.parametrize("world", [2, 3, 7, 30])
@pytest.mark.parametrize("sliding", [False, True])
def test_ranks_share_the_work_of_one(make_cfg, make_run, world, sliding):
    """Together ranks count what one counts, each target once; some may have nothing to do."""
    cfg = make_cfg(train_batch_tokens=32 * 210)
    run, data = stirred(make_run(cfg)), stream(cfg, 320)

    def tally_of(dist) -> Tally:
        """Count a rank's share."""
        scorer = Scorer(run._replace(dist=dist), data)
        return train_gpt.eval_chunks(scorer.run, scorer, False) if sliding else scorer.plain()
    alone, parts = tally_of(run.dist), [tally_of(ranked(r, world)) for r in range(world)]
    close(sum(p.sums for p in parts).tolist(), alone.sums.tolist())
    assert (sum(p.scored for p in parts) == 1).all()


def counting_run(cfg) -> SimpleNamespace:
    """A run whose score of a target is its token id, exactly; remembers the shapes it was given."""
    shapes = []

    def window_nll(tokens, targets):
        """The target ids themselves."""
        shapes.append((tuple(tokens.shape), tuple(targets.shape)))
        return targets.float()
    return SimpleNamespace(cfg=cfg, dist=train_gpt.Dist({}), window_nll=window_nll, shapes=shapes,
                           flat=SimpleNamespace(data=torch.zeros(1)), log=QuietLog())


@pytest.mark.parametrize("batch", [1, 5, 16, 100])
def test_padding_is_never_counted(make_cfg, batch):
    """Batches are filled up to one shape for each tail; only real windows enter the sums."""
    cfg = make_cfg(eval_batch_seqs=batch)
    run, data = counting_run(cfg), stream(cfg, 448)
    tally = train_gpt.eval_chunks(run, Scorer(run, data), learn=False)
    assert tally.sums.tolist() == [data.tokens[1:].sum(), 448, data.bytes.sum()]
    assert tally.ledger(run.dist) == (1, 1)
    assert set(run.shapes) == {((batch, 32), (batch, 32)), ((batch, 32), (batch, 8))}


def test_batch_size_does_not_change_the_score(make_cfg, make_run):
    """One window at a time or all at once: the same nats up to rounding, the same counts."""
    data, found = stream(make_cfg(), 320), []
    for batch in (1, 7, 64):
        run = stirred(make_run(make_cfg(eval_batch_seqs=batch)))
        found.append(train_gpt.eval_chunks(run, Scorer(run, data), False).sums.tolist())
    close(found[1:], [found[0]] * 2)


def test_scoring_leaves_no_trace(cfg, make_run):
    """Scoring changes no weight and asks for no gradient."""
    run = stirred(make_run(cfg))
    before = run.flat.data.clone()
    Scorer(run, stream(cfg, 96)).plain()
    assert torch.equal(run.flat.data, before) and not run.flat.buffer.any()


# ------------------------------------------------------------------------------------------------
# The ledger
# ------------------------------------------------------------------------------------------------

def report_of(cfg, windows: list[Window], n: int, run=None):
    """Report of a pass that scored `windows` of a stream of n targets."""
    run = run or counting_run(cfg)
    run.log, run.clock = QuietLog(), SimpleNamespace(eval_seconds=0.0)
    scorer, tally = Scorer(run, stream(cfg, n)), Tally(n, torch.device("cpu"))
    scorer.score(windows, tally)
    return scorer.report("a pass", tally, 1.0)


def test_a_whole_pass_is_reported(cfg):
    """Each target once: the report is nats per token and bits per byte."""
    data = stream(cfg, 128)
    nats, size = data.tokens[1:].sum().item(), data.bytes.sum().item()
    found = report_of(cfg, train_gpt.plain_windows(128, 32), 128)
    assert found == pytest.approx((nats / 128, nats / math.log(2) / size))


@pytest.mark.parametrize("spoil", [
    lambda windows: windows + windows[:1], lambda windows: windows[:-1],
    lambda windows: windows[:-1] + windows[:1], lambda windows: windows[1:] + [Window(1, 32)]],
    ids=["twice", "never", "one twice and one never", "off by one"])
def test_the_ledger_trips(cfg, spoil):
    """A target scored twice or never ends the run, even where their number is right."""
    with pytest.raises(AssertionError, match="once"):
        report_of(cfg, spoil(train_gpt.plain_windows(128, 32)), 128)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_score_is_an_error(cfg, value):
    """Weights that score no finite number are refused with the name of the pass."""
    run = counting_run(cfg)
    run.window_nll = lambda tokens, targets: torch.full(targets.shape, value)
    with pytest.raises(DataError, match="a pass: the loss is"):
        report_of(cfg, train_gpt.plain_windows(128, 32), 128, run)
