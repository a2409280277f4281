"""Section Evaluation: every target is scored exactly once, in nats and in bytes."""
import math

import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import Tally, Validation


class Ranks:
    """One of `world` fake ranks; sums are added up by the test."""

    def __init__(self, rank: int, world: int):
        """Rank `rank` of `world`."""
        self.rank, self.world, self.device = rank, world, torch.device("cpu")
        self.dtype, self.on_cuda, self.is_main = torch.float32, False, rank == 0

    share, sum_ = train_gpt.Dist.share, staticmethod(lambda x: x)


def validation(cfg, n, seed=0):
    """A random stream of n targets, each worth 0 to 9 bytes."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(cfg.vocab_size, (n + 1,), generator=rng, dtype=torch.int32)
    return Validation(tokens, torch.randint(10, (n,), generator=rng).to(torch.int16))


def roughen(model):
    """Give a model random weights everywhere, so that nothing is the identity."""
    rng = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=rng)


def scored(windows, n, seq_len):
    """How often each of n targets is scored by `windows`."""
    counts = np.zeros(n, int)
    for start, tail in windows:
        counts[start + seq_len - tail:start + seq_len] += 1
    return counts


@pytest.mark.parametrize("seq_len", [8, 32, 96])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_windows_tile_the_stream(seq_len, parts):
    """Plain and sliding windows score each target once, for any length and stride."""
    for length in range(1, 9):
        n = length * seq_len
        assert (scored(train_gpt.plain_windows(n, seq_len), n, seq_len) == 1).all()
        sliding = train_gpt.sliding_windows(n, seq_len, seq_len // parts)
        assert (scored(sliding, n, seq_len) == 1).all()
        assert all(0 <= start and start + seq_len <= n for start, _ in sliding)


def test_sliding_windows_have_all_the_context_there_is():
    """A target at position p is scored with at least min(p, seq_len - stride) tokens before it."""
    for start, tail in train_gpt.sliding_windows(320, 32, 8):
        assert start == 0 or tail == 8


def test_chunks_partition_the_windows():
    """Chunks hold all windows in order, and no chunk scores a target of another."""
    windows = train_gpt.sliding_windows(1024, 32, 8)
    chunks = train_gpt.chunks_of(windows, 32, 128)
    assert [w for chunk in chunks for w in chunk] == windows
    for i, chunk in enumerate(chunks):
        counts = scored(chunk, 1024, 32)
        assert set(np.flatnonzero(counts)) == set(range(128 * i, 128 * (i + 1)))


def test_bits_per_byte_of_a_uniform_model(make_cfg, make_run):
    """With zero embeddings all tokens are equally likely: log2(V) bits a token."""
    run = make_run(make_cfg())
    run.model.tok_emb.data.zero_()
    data = validation(run.cfg, 96)
    loss, bpb, targets, size = train_gpt.Scorer(run, data).plain().total(run.dist)
    assert (targets, size) == (96, int(data.bytes.sum()))
    assert loss == pytest.approx(math.log(run.cfg.vocab_size), rel=1e-6)
    assert bpb == pytest.approx(math.log2(run.cfg.vocab_size) * 96 / size, rel=1e-6)


def test_the_scored_distribution_sums_to_one(make_cfg, make_run):
    """exp(-nats) over all candidates for a target is 1, at random contexts."""
    run = make_run(make_cfg())
    roughen(run.model)
    V = run.cfg.vocab_size
    context = torch.randint(V, (3, run.cfg.seq_len))
    with torch.no_grad():
        every = torch.arange(V)[:, None]
        for row in context:
            nll = run.window_nll(row.expand(V, -1), every)          # (V, 1)
            assert nll.double().neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


def reference_nats(run, data, windows):
    """Nats of every target, one window at a time, from the whole window's softmax."""
    nats = torch.zeros(len(data.bytes), dtype=torch.float64)
    T = run.cfg.seq_len
    for start, tail in windows:
        x = data.tokens[start:start + T].long()[None]
        y = data.tokens[start + 1:start + T + 1].long()
        logits = run.model.features(x, True)[0] @ run.model.tok_emb.T
        logits = 30 * torch.tanh(logits / 30)
        nll = torch.nn.functional.cross_entropy(logits.double(), y, reduction="none")
        nats[start + T - tail:start + T] = nll[-tail:]
    return nats


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_scorer_equals_one_window_at_a_time(make_cfg, make_run, batch):
    """Batching, padding and slicing change nothing."""
    run = make_run(make_cfg(eval_batch_seqs=batch))
    roughen(run.model)
    data = validation(run.cfg, 160)
    windows = train_gpt.sliding_windows(160, 32, 8)
    scorer, tally = train_gpt.Scorer(run, data), Tally(160, run.dist.device)
    scorer.score(windows, tally)
    with torch.no_grad():
        nats = reference_nats(run, data, windows)
    loss, bpb, targets, size = tally.total(run.dist)
    assert (targets, size) == (160, int(data.bytes.sum()))
    assert loss == pytest.approx(nats.mean().item(), rel=1e-5)
    assert bpb == pytest.approx(nats.sum().item() / math.log(2) / size, rel=1e-5)
    assert tally.ledger(run.dist) == (1, 1)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_add_up_to_the_whole(make_cfg, make_run, world):
    """Ranks together score what one rank scores."""
    run = make_run(make_cfg())
    roughen(run.model)
    data = validation(run.cfg, 160)
    whole = train_gpt.Scorer(run, data).plain()
    sums, counts = torch.zeros(3, dtype=torch.float64), np.zeros(160, int)
    for rank in range(world):
        part = train_gpt.Scorer(run._replace(dist=Ranks(rank, world)), data).plain()
        sums, counts = sums + part.sums, counts + part.scored
    assert (counts == 1).all()
    assert torch.allclose(sums, whole.sums, rtol=1e-6)


def test_a_target_scored_twice_or_never_is_refused(make_cfg, make_run):
    """The ledger stops a pass whose windows overlap or leave a gap."""
    run = make_run(make_cfg())
    scorer = train_gpt.Scorer(run, validation(run.cfg, 96))
    plain = train_gpt.plain_windows(96, 32)
    for windows in (plain + plain[:1], plain[:2], plain[:2] + plain[:1]):
        tally = Tally(96, run.dist.device)
        scorer.score(windows, tally)
        with pytest.raises(AssertionError):
            scorer.report("plain", tally, 0.0)


def test_a_broken_model_is_not_scored(make_cfg, make_run):
    """Weights that are not numbers end in a DataError, not in a score."""
    run = make_run(make_cfg())
    run.model.tok_emb.data.fill_(math.nan)
    scorer = train_gpt.Scorer(run, validation(run.cfg, 64))
    with pytest.raises(train_gpt.DataError, match="plain"):
        scorer.report("plain", scorer.plain(), 0.0)
