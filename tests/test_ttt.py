"""train_gpt.py, Test-time training: score first, learn after, the same on any number of ranks.

Run alone: python -m pytest -q tests/test_ttt.py
"""
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import PARTS, stirred, stream

import train_gpt
from train_gpt import Scorer, Tally, Validation, eval_chunks

SHORT = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, seq_len=8, eval_stride=2,
             eval_batch_seqs=4, train_batch_tokens=64, ttt_chunk_tokens=16, ttt_epochs=2,
             ttt_lr=0.5, parallel_residual_start=1)
N = 44 // 8 * 8                 # targets of a short stream: two chunks and a half
PATIENCE = 20.0                 # seconds that a rank waits for the others before a test fails


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

class Rank(train_gpt.Dist):
    """One of several ranks that are threads of this process; counts its collectives by name."""

    def __init__(self, rank: int, world: int, meet: threading.Barrier, board: list):
        """Rank `rank` of `world`; all share `board`, on which each hands in a tensor."""
        super().__init__({})
        self.rank, self.world, self.is_main = rank, world, rank == 0
        self.meet, self.board, self.calls = meet, board, Counter()

    def swap(self, name: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Hand in a copy of `x` and return those of all ranks; fails if the others do not come."""
        self.calls[name] += 1
        self.board[self.rank] = name, x.clone()
        self.meet.wait(PATIENCE)
        names, parts = zip(*self.board)
        self.meet.wait(PATIENCE)
        assert set(names) == {name}, f"ranks meet in different collectives: {names}"
        return list(parts)

    def sum_(self, x):
        """Replace `x` by its sum over ranks."""
        return x.copy_(sum(self.swap("sum_", x)))

    def max(self, value):
        """Largest `value` of any rank."""
        return max(self.swap("max", torch.tensor(value, dtype=torch.float64))).item()

    def wait(self):
        """Return when every rank has come here."""
        self.swap("wait", torch.zeros(1))


def in_ranks(world: int, work) -> list:
    """What `work(dist)` returns on each of `world` ranks, run side by side in threads."""
    meet, board = threading.Barrier(world), [None] * world

    def one(rank: int):
        """Do the work of a rank; its failure ends the waiting of the others."""
        try:
            return work(Rank(rank, world, meet, board))
        except BaseException:
            meet.abort()
            raise
    with ThreadPoolExecutor(world) as pool:
        tasks = [pool.submit(one, rank) for rank in range(world)]
    errors = [t.exception() for t in tasks if t.exception()]
    errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [t.result() for t in tasks]


@pytest.fixture
def recorded(monkeypatch) -> dict[int, float]:
    """Nats of every target that any tally has counted, by position; counted twice is an error."""
    nats, add = {}, Tally.add

    def listen(self, nll, sizes, windows, seq_len):
        """Note each target's nats on their way into the tally."""
        for window, row in zip(windows, nll.tolist(), strict=True):
            for position, value in enumerate(row, window.start + seq_len - window.tail):
                assert position not in nats
                nats[position] = value
        add(self, nll, sizes, windows, seq_len)
    monkeypatch.setattr(Tally, "add", listen)
    return nats


@pytest.fixture
def scores(make_run, recorded):
    """A function (cfg, data, learn) that returns the nats (n,) of every target of a fresh model."""
    def scores_of(cfg, data: Validation, learn: bool = True) -> torch.Tensor:
        """Score the stream with the same stirred weights every time."""
        recorded.clear()
        run = stirred(make_run(cfg))
        eval_chunks(run, Scorer(run, data), learn)
        assert sorted(recorded) == list(range(len(data.bytes)))
        return torch.tensor([recorded[i] for i in sorted(recorded)], dtype=torch.float64)
    return scores_of


def edited(data: Validation, k: int, cfg) -> Validation:
    """The stream with another token as target k."""
    tokens = data.tokens.clone()
    tokens[k + 1] = (tokens[k + 1] + 1 + k) % cfg.vocab_size
    return data._replace(tokens=tokens)


def chunk_of(position: int, cfg) -> int:
    """Number of the chunk in which a target lies."""
    return position // cfg.ttt_chunk_tokens


# ------------------------------------------------------------------------------------------------
# Legality
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [16, 24])
def test_editing_a_target_changes_no_earlier_score(make_cfg, scores, size):
    """For every k, TTT on: targets before k score bit for bit the same, k itself does not."""
    cfg = make_cfg(**{**SHORT, "ttt_chunk_tokens": size})
    data = stream(cfg, N)
    before = scores(cfg, data)
    for k in range(N):
        after = scores(cfg, edited(data, k, cfg))
        assert torch.equal(after[:k], before[:k]), k
        assert after[k] != before[k], k


@pytest.mark.parametrize("recipe", PARTS)
@pytest.mark.parametrize("across", [False, True])
def test_no_recipe_lets_a_target_reach_back(make_cfg, scores, recipe, across):
    """The same of every recipe's model, learning or not; a document's first token is a target too.

    `across` is #1060's own form of its smear gate, which mixes documents.
    """
    cfg = make_cfg(**{**SHORT, **PARTS[recipe], "smear_across_documents": across})
    data = stream(cfg, N)
    data.tokens[[5, 6, 20]] = train_gpt.BOS
    before = scores(cfg, data)
    for k in range(0, N, 3):
        after = scores(cfg, edited(data, k, cfg))
        assert torch.equal(after[:k], before[:k]) and after[k] != before[k], k
    still = make_cfg(**{**SHORT, **PARTS[recipe], "ttt_lr": 0.0})
    assert torch.equal(scores(still, data), scores(still, data, False))


def test_a_target_teaches_the_chunks_after_its_own(make_cfg, scores):
    """What no context reaches is reached through the weights: learning does take place."""
    cfg = make_cfg(**{**SHORT, "num_loops": 0})
    data = stream(cfg, N)
    frozen = scores(cfg, data, False), scores(cfg, edited(data, 2, cfg), False)
    taught = scores(cfg, data), scores(cfg, edited(data, 2, cfg))
    later = slice(cfg.ttt_chunk_tokens + cfg.seq_len, None)
    assert torch.equal(frozen[0][later], frozen[1][later])
    assert (taught[0][later] != taught[1][later]).all()


def test_lr_zero_is_sliding_bit_for_bit(make_cfg, scores):
    """Test-time training that moves nothing scores every target exactly as sliding windows do."""
    cfg = make_cfg(**{**SHORT, "ttt_lr": 0.0})
    data = stream(cfg, N)
    assert torch.equal(scores(cfg, data), scores(cfg, data, False))


def test_learning_moves_later_scores_only(make_cfg, scores):
    """The first chunk is scored by the weights of the artifact, all later ones by others."""
    cfg = make_cfg(**SHORT)
    data = stream(cfg, N)
    found, frozen = scores(cfg, data), scores(cfg, data, False)
    first = cfg.ttt_chunk_tokens
    assert torch.equal(found[:first], frozen[:first])
    assert (found[first:] != frozen[first:]).all()


def test_learning_helps_on_a_stream_that_repeats(make_cfg, scores):
    """A stream of one phrase again and again is learnt: its last chunk costs far less."""
    cfg = make_cfg(**{**SHORT, "ttt_lr": 0.2, "ttt_epochs": 4})
    data = stream(cfg, 16 * 12)
    data = data._replace(tokens=data.tokens[:9].repeat(30)[:16 * 12 + 1].contiguous())
    found, frozen = scores(cfg, data), scores(cfg, data, False)
    assert found[-16:].mean() < 0.7 * frozen[-16:].mean()


# ------------------------------------------------------------------------------------------------
# What is done, in which order
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [N, 32, 16, 8])
def test_each_update_follows_its_own_score(make_cfg, make_run, quiet, n):
    """The log alternates score and update of one interval; the last chunk is scored only."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    quiet.events.clear()
    eval_chunks(run, Scorer(run, stream(cfg, n)), learn=True)
    spans = [(lo, min(lo + 16, n)) for lo in range(0, n, 16)]
    want = [(event, f"{i}/{len(spans)}", *span) for i, span in enumerate(spans, 1)
            for event in ("score", "update")][:-1]
    assert [(event, v["chunk"], v["first"], v["last"]) for event, v in quiet.events] == want


def test_scores_in_the_log_grow_with_the_stream(make_cfg, make_run, quiet):
    """A score line has the bits per byte of all targets so far; the last one is the result."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    tally = eval_chunks(run, Scorer(run, stream(cfg, N)), learn=True)
    told = [e["bpb"] for e in quiet.of("score")]
    assert told[-1] == tally.total(run.dist)[1] and len(set(told)) == len(told) == 3


def test_sliding_logs_no_update(make_cfg, make_run, quiet):
    """Without learning neither weights nor log show a trace of chunks."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    before = run.flat.data.clone()
    eval_chunks(run, Scorer(run, stream(cfg, N)), learn=False)
    assert torch.equal(run.flat.data, before)
    assert not quiet.of("score") and not quiet.of("update")


def slow_weights(run, data: Validation, keep_momentum: bool = True) -> torch.Tensor:
    """Weights (P,) after all chunks by torch.optim.SGD, one sequence after another."""
    cfg, n = run.cfg, len(data.bytes)
    parameters, last = list(run.model.parameters()), -(-n // cfg.ttt_chunk_tokens) - 1
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=cfg.ttt_momentum)
    for i in range(last):
        lo = i * cfg.ttt_chunk_tokens
        starts = range(lo, min(lo + cfg.ttt_chunk_tokens, n), cfg.seq_len)
        sgd.param_groups[0]["lr"] = cfg.ttt_lr * (1 + math.cos(math.pi * i / last)) / 2
        if not keep_momentum:
            sgd.state.clear()
        for _ in range(cfg.ttt_epochs):
            sgd.zero_grad(set_to_none=False)
            for s in starts:
                row = data.tokens[s:s + cfg.seq_len + 1].long()[None]
                features = run.model.features(row[:, :-1], True)
                nll = run.model.token_nll(features, row[:, 1:])
                (nll.mean() / len(starts)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, cfg.ttt_grad_clip)
            sgd.step()
    return run.flat.data.clone()


@pytest.mark.parametrize("clip", [1.0, 0.2, 100.0])
def test_updates_equal_plain_sgd(make_cfg, make_run, clip):
    """Cosine over chunks, momentum kept from chunk to chunk, clipping: as torch.optim.SGD does."""
    cfg = make_cfg(**{**SHORT, "ttt_grad_clip": clip, "ttt_lr": 0.05})
    data, run = stream(cfg, 4 * 16), stirred(make_run(cfg))
    start = run.flat.data.clone()
    eval_chunks(run, Scorer(run, data), learn=True)
    found, want = run.flat.data.clone(), slow_weights(stirred(make_run(cfg)), data)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-6)
    forgetful = slow_weights(stirred(make_run(cfg)), data, keep_momentum=False)
    assert (forgetful - want).norm() > 100 * (found - want).norm()
    assert (found - start).norm() > 0.01


def test_every_parameter_learns(make_cfg, make_run):
    """Embedding, matrices and vectors all move, as the rules of the score allow."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    before = {n: w.clone() for n, w in run.flat.named(run.flat.data).items()}
    eval_chunks(run, Scorer(run, stream(cfg, N)), learn=True)
    after = run.flat.named(run.flat.data)
    assert all(not torch.equal(after[n], w) for n, w in before.items())


def test_a_chunk_is_learnt_whole_and_alone(make_cfg, make_run, monkeypatch):
    """Each update sees the tokens of its chunk, with one more as the last target, and no others."""
    cfg, seen = make_cfg(**SHORT), []
    monkeypatch.setattr(train_gpt, "adapt", lambda run, tokens, *rest: seen.append(tokens))
    data, run = stream(cfg, N), make_run(cfg)
    eval_chunks(run, Scorer(run, data), learn=True)
    want = [data.tokens[lo:lo + 17] for lo in (0, 16) for _ in range(cfg.ttt_epochs)]
    assert len(seen) == len(want) and all(map(torch.equal, seen, want))


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3, 5])
def test_uneven_shares_learn_the_same(make_cfg, make_run, world):
    """Two sequences on up to five ranks: as many collectives on each, and one rank's weights."""
    cfg = make_cfg(**{**SHORT, "train_batch_tokens": 8 * 30, "ttt_lr": 0.05,
                      "ttt_grad_clip": 100.0})        # clipping would hide a wrong scale
    data = stream(cfg, 7 * 8)

    def work(dist):
        """Weights after all chunks, and the collectives that took part."""
        run = stirred(make_run(cfg, dist))
        eval_chunks(run, Scorer(run, data), learn=True)
        return run.flat.data.clone(), getattr(dist, "calls", None)
    alone, _ = work(train_gpt.Dist({}))
    found = in_ranks(world, work)
    for weights, calls in found:
        assert torch.equal(weights, found[0][0]) and calls == found[0][1]
        torch.testing.assert_close(weights, alone, rtol=1e-4, atol=2e-6)
    assert found[0][1]["sum_"] == 3 * cfg.ttt_epochs + 4        # one an update, one a score line


def test_ranks_without_a_sequence_do_the_same_collectives(make_cfg, make_run):
    """Also in the warm-up that compiles scoring, whatever the share."""
    cfg = make_cfg(**{**SHORT, "train_batch_tokens": 8 * 30})

    def work(dist):
        """Collectives of the warm-up; it moves no weight."""
        run = make_run(cfg, dist)
        before = run.flat.data.clone()
        train_gpt.warm_up_scoring(run)
        assert torch.equal(run.flat.data, before)
        return dist.calls
    found = in_ranks(5, work)
    assert found[0]["sum_"] and all(calls == found[0] for calls in found)
