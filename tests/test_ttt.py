"""train_gpt.py, Test-time training: score first, learn after, the same on any number of ranks.

Run alone: python -m pytest -q tests/test_ttt.py
"""
import gc
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType

import pytest
import torch
from conftest import PARTS, stirred, stream

import train_gpt
from train_gpt import SGD, Frozen, Scorer, Stream, Tally, evaluate, sliding_plan

SHORT = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, seq_len=8, eval_stride=2,
             eval_batch_seqs=8, train_batch_tokens=64, ttt_chunk_tokens=16, ttt_epochs=2,
             ttt_lr=0.5, parallel_residual_start=1, rope_dims=4)
N = 44 // 8 * 8                 # targets of a short stream: two chunks and a half
PATIENCE = 20.0                 # seconds that a rank waits for the others before a test fails


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

class Rank(train_gpt.Dist):
    """One of several ranks that are threads of this process; counts its collectives by name."""

    def __init__(self, rank: int, world: int, meet: threading.Barrier, board: list):
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

    def all_reduce_(self, x):
        return x.copy_(sum(self.swap("sum", x)))

    def all_reduce_max(self, *values):
        parts = self.swap("max", torch.tensor(values, dtype=torch.float64))
        return torch.stack(parts).amax(0).tolist()

    def barrier(self):
        self.swap("barrier", torch.zeros(1))


def in_ranks(world: int, work) -> list:
    """The results of `work(dist)` on each of `world` ranks, run side by side in threads."""
    meet, board = threading.Barrier(world), [None] * world

    def one(rank: int):
        try:
            return work(Rank(rank, world, meet, board))
        except BaseException:
            meet.abort()                                    # ends the waiting of the others
            raise
    with ThreadPoolExecutor(world) as pool:
        tasks = [pool.submit(one, rank) for rank in range(world)]
    errors = [t.exception() for t in tasks if t.exception()]
    errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [t.result() for t in tasks]


def learn(run, data: Stream, learner=SGD) -> Tally:
    """Score a stream by sliding windows, learning from each chunk after its score."""
    plan, learner = sliding_plan(len(data.bytes), run.cfg), learner_of(run, data, learner)
    return evaluate(Scorer(run.cfg, run.rt, run.forward, data), plan, learner)


def learner_of(run, data: Stream, kind) -> Frozen:
    """A learner, ready to start on a stream."""
    if not issubclass(kind, SGD):
        return kind()
    chunks = len(sliding_plan(len(data.bytes), run.cfg))
    return kind(run, run.forward, data, chunks)


@pytest.fixture
def scores(make_run, monkeypatch):
    """A function (cfg, data, learner) that returns the nats (n,) of all targets of a fresh model.

    They are read on their way into the tally; a target that is counted twice is an error.
    """
    nats, add = {}, Tally.add

    def listen(self, nll, sizes, windows):
        for window, row in zip(windows, nll.tolist(), strict=True):
            for position, value in zip(window, row, strict=True):
                assert position not in nats
                nats[position] = value
        add(self, nll, sizes, windows)
    monkeypatch.setattr(Tally, "add", listen)

    def scores_of(cfg, data: Stream, learner=SGD) -> torch.Tensor:
        nats.clear()
        learn(stirred(make_run(cfg)), data, learner)
        assert sorted(nats) == list(range(len(data.bytes)))
        return torch.tensor([nats[i] for i in sorted(nats)], dtype=torch.float64)
    return scores_of


def edited(data: Stream, k: int, cfg) -> Stream:
    """The stream with another token as target k."""
    tokens = data.tokens.clone()
    tokens[k + 1] = (tokens[k + 1] + 1 + k) % cfg.vocab_size
    return data._replace(tokens=tokens)


# ------------------------------------------------------------------------------------------------
# Legality
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", PARTS)
@pytest.mark.parametrize("learner", [Frozen, SGD])
def test_editing_a_target_changes_no_earlier_score(make_cfg, scores, recipe, learner):
    """For every k and every recipe: targets before k score bit for bit the same, k itself does not.

    A document's first token is a target too.
    """
    cfg = make_cfg(**{**SHORT, "ttt_epochs": 1, **PARTS[recipe]})
    data = stream(cfg, N)
    data.tokens[[5, 6, 20]] = train_gpt.BOS
    before = scores(cfg, data, learner)
    for k in range(N):
        after = scores(cfg, edited(data, k, cfg), learner)
        assert torch.equal(after[:k], before[:k]) and after[k] != before[k], k


@pytest.mark.parametrize("recipe", PARTS)
def test_lr_zero_is_sliding_bit_for_bit(make_cfg, scores, recipe):
    """Test-time training that moves nothing scores every target exactly as sliding windows do."""
    cfg = make_cfg(**{**SHORT, **PARTS[recipe], "ttt_lr": 0.0})
    data = stream(cfg, N)
    assert torch.equal(scores(cfg, data), scores(cfg, data, Frozen))


def test_learning_moves_later_scores_only(make_cfg, scores):
    """The first chunk is scored by the weights of the artifact, all later ones by others."""
    cfg = make_cfg(**SHORT)
    data, first = stream(cfg, N), cfg.ttt_chunk_tokens
    found, frozen = scores(cfg, data), scores(cfg, data, Frozen)
    assert torch.equal(found[:first], frozen[:first])
    assert (found[first:] != frozen[first:]).all()


def test_a_target_teaches_the_chunks_after_its_own(make_cfg, scores):
    """The weights reach targets that no context reaches: learning does take place."""
    cfg = make_cfg(**{**SHORT, "num_loops": 0})
    data = stream(cfg, N)
    frozen, taught = ([scores(cfg, d, learner) for d in (data, edited(data, 2, cfg))]
                      for learner in (Frozen, SGD))
    later = slice(cfg.ttt_chunk_tokens + cfg.seq_len, None)
    assert torch.equal(frozen[0][later], frozen[1][later])
    assert (taught[0][later] != taught[1][later]).all()


def test_learning_helps_on_a_stream_that_repeats(make_cfg, scores):
    """A stream of one phrase again and again is learnt: its last chunk costs far less."""
    cfg = make_cfg(**{**SHORT, "ttt_lr": 0.2, "ttt_epochs": 4})
    data = stream(cfg, 16 * 12)
    data = data._replace(tokens=data.tokens[:9].repeat(30)[:16 * 12 + 1].contiguous())
    found, frozen = scores(cfg, data), scores(cfg, data, Frozen)
    assert found[-16:].mean() < 0.7 * frozen[-16:].mean()


# ------------------------------------------------------------------------------------------------
# The order of scoring and learning
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [N, 32, 16, 8])
def test_each_chunk_is_scored_before_it_is_learnt(make_cfg, make_run, quiet, n):
    """A learner sees before, score, after of one chunk, then of the next; the last has no after.

    The log alternates score and update of the same intervals.
    """
    cfg, seen = make_cfg(**SHORT), []

    class Recorder(Frozen):
        learns = True

        def before(self, chunk):
            seen.append(("before", chunk))

        def after(self, chunk):
            seen.append(("after", chunk))
            return {}
    run = make_run(cfg)
    scorer, plan = Scorer(cfg, run.rt, run.forward, stream(cfg, n)), sliding_plan(n, cfg)
    score, chunks = scorer.score, {id(chunk.windows): chunk for chunk in plan}
    scorer.score = lambda windows, tally: seen.append(("score", chunks[id(windows)])) or score(
        windows, tally)
    quiet.events.clear()
    evaluate(scorer, plan, Recorder())
    assert seen == [(e, c) for c in plan for e in ("before", "score", "after")][:-1]
    spans = [(lo, min(lo + 16, n)) for lo in range(0, n, 16)]
    want = [(event, f"{i}/{len(spans)}", *span) for i, span in enumerate(spans, 1)
            for event in ("score", "update")][:-1]
    assert [(event, v["chunk"], v["first"], v["last"]) for event, v in quiet.events] == want


def reachable(*roots) -> list:
    """All objects that some refer to, but not through modules, classes, functions or frames."""
    closed = ModuleType, type, FunctionType, BuiltinFunctionType, FrameType
    found, todo = {}, list(roots)
    while todo:
        x = todo.pop()
        if id(x) not in found and not isinstance(x, closed):
            found[id(x)] = x
            todo += gc.get_referents(x)
    return list(found.values())


def test_no_learner_can_reach_the_tally(make_cfg, make_run):
    """Neither what a learner is given nor what it holds leads to the scores that are added up."""
    cfg, met = make_cfg(**SHORT), []

    class Curious(SGD):
        def before(self, chunk):
            met.extend(map(type, reachable(self, chunk)))

        def after(self, chunk):
            met.extend(map(type, reachable(self, chunk)))
            return super().after(chunk)
    learn(stirred(make_run(cfg)), stream(cfg, N), Curious)
    assert train_gpt.GPT in met and Tally not in met


def test_scores_in_the_log_grow_with_the_stream(make_cfg, make_run, quiet):
    """A score line has the bits per byte of all targets so far; the last one is the result."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    tally = learn(run, stream(cfg, N))
    logged = [e["bpb"] for e in quiet.of("score")]
    assert logged[-1] == tally.total(run.rt.dist)[1] and len(set(logged)) == len(logged) == 3


def test_sliding_logs_no_update(make_cfg, make_run, quiet):
    """Without learning neither weights nor log show a trace of chunks."""
    cfg = make_cfg(**SHORT)
    run = stirred(make_run(cfg))
    before = run.flat.data.clone()
    learn(run, stream(cfg, N), Frozen)
    assert torch.equal(run.flat.data, before)
    assert not quiet.of("score") and not quiet.of("update")


# ------------------------------------------------------------------------------------------------
# The update
# ------------------------------------------------------------------------------------------------

def slow_weights(run, data: Stream, keep_momentum: bool = True) -> torch.Tensor:
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
                (run.model(row[:, :-1], row[:, 1:]).mean() / len(starts)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, SGD.CLIP_NORM)
            sgd.step()
    return run.flat.data.clone()


@pytest.mark.parametrize("clip", [1.0, 0.2, 100.0])
def test_updates_equal_plain_sgd(make_cfg, make_run, monkeypatch, clip):
    """Cosine over chunks, momentum kept from chunk to chunk, clipping: as torch.optim.SGD does.

    Embedding, matrices and vectors all move.
    """
    monkeypatch.setattr(SGD, "CLIP_NORM", clip)
    cfg = make_cfg(**{**SHORT, "ttt_lr": 0.05})
    data, run = stream(cfg, 4 * 16), stirred(make_run(cfg))
    before = run.flat.data.clone()
    learn(run, data)
    found, want = run.flat.data, slow_weights(stirred(make_run(cfg)), data)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-6)
    forgetful = slow_weights(stirred(make_run(cfg)), data, keep_momentum=False)
    assert (forgetful - want).norm() > 100 * (found - want).norm()
    assert (found - before).norm() > 0.01
    moved = run.flat.named(found - before)
    assert all(change.any() for change in moved.values())


def test_a_chunk_is_learnt_whole_and_alone(make_cfg, make_run):
    """Each update sees the tokens of its chunk, with one more as the last target, and no others."""
    cfg, seen = make_cfg(**SHORT), []

    class Listener(SGD):
        def step(self, tokens, lr):
            seen.append(tokens)
    data = stream(cfg, N)
    learn(make_run(cfg), data, Listener)
    want = [data.tokens[lo:lo + 17] for lo in (0, 16) for _ in range(cfg.ttt_epochs)]
    assert len(seen) == len(want) and all(map(torch.equal, seen, want))


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3, 5])
def test_uneven_shares_learn_the_same(make_cfg, make_run, monkeypatch, world):
    """Two sequences on up to five ranks: as many collectives on each, and one rank's weights."""
    monkeypatch.setattr(SGD, "CLIP_NORM", 100.0)            # clipping would hide a wrong scale
    cfg = make_cfg(**{**SHORT, "train_batch_tokens": 8 * 30, "ttt_lr": 0.05})
    data = stream(cfg, 7 * 8)

    def work(dist):
        run = stirred(make_run(cfg, dist))
        learn(run, data)
        return run.flat.data.clone(), getattr(dist, "calls", None)
    alone, _ = work(train_gpt.Dist({}))
    found = in_ranks(world, work)
    for weights, calls in found:
        assert torch.equal(weights, found[0][0]) and calls == found[0][1]
        torch.testing.assert_close(weights, alone, rtol=1e-4, atol=2e-6)
    assert found[0][1]["sum"] == 3 * cfg.ttt_epochs + 4     # one an update, one a score line


def test_ranks_without_a_sequence_do_the_same_collectives(make_cfg, make_run):
    """Also in the warm-up that compiles scoring, whatever the share; it moves no weight."""
    cfg = make_cfg(**{**SHORT, "train_batch_tokens": 8 * 30})

    def work(dist):
        run = make_run(cfg, dist)
        before = run.flat.data.clone()
        train_gpt.warm_up_scoring(run)
        assert torch.equal(run.flat.data, before)
        return dist.calls
    found = in_ranks(5, work)
    assert found[0]["sum"] and all(calls == found[0] for calls in found)
