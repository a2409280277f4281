"""train_gpt.py, Test-time training: every document teaches its own head, and no other.

Run alone: python -m pytest -q tests/test_documents.py
"""
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import PARTS, stirred, stream
from test_ttt import edited, in_ranks

import train_gpt
from train_gpt import (BOS, Chunk, ConfigError, DocumentWeights, DocumentScorer, Memory, Stream,
                       Tally, document_plan, evaluate)

SHORT = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, seq_len=16, eval_stride=2,
             eval_batch_seqs=3, train_batch_tokens=64, parallel_residual_start=1, rope_dims=4,
             ttt_documents=True, ttt_chunk_tokens=4, ttt_lr=1.0, ttt_attention=0.02)
# Six layers, of which 3 and the last, 5, see all tokens; a window begins within an earlier chunk.
WINDOWS = dict(num_layers=6, attention_window=6)
STARTS = 0, 5, 6, 15, 60        # of documents of 5, 1, 9, 45 and 36 tokens
N = 96
RECIPES = [name for name in PARTS if name != "pr1060"]


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def documents_of(cfg, n: int = N, starts=STARTS) -> Stream:
    """A random stream with BOS at `starts` and nowhere else."""
    data = stream(cfg, n)
    data.tokens[data.tokens == BOS] = BOS + 1
    data.tokens[list(starts)] = BOS
    return data


def spans(n: int = N, starts=STARTS) -> list[range]:
    """Targets of each document."""
    cuts = [*starts, n]
    return list(map(range, cuts, cuts[1:]))


def set_rates(run) -> torch.Tensor:
    """Rates (V,) of the head's rows that differ by token, as an artifact's steps do."""
    run.flat.steps["tok_emb"] = rates = torch.linspace(0.5, 1.5, run.cfg.vocab_size)
    return rates


def learn(run, data: Stream) -> Tally:
    """Score a stream's documents, each of which teaches changes, at rates that differ by token."""
    set_rates(run)
    learner = DocumentWeights(run, looped=True)
    plan = document_plan(data.tokens, run.cfg, run.rt.dist.world)
    return evaluate(DocumentScorer(run.cfg, run.rt, learner.forward, data), plan, learner)


@pytest.fixture
def scores(make_run, monkeypatch):
    """A function (cfg, data) that returns the nats (n,) of all targets by a fresh model."""
    nats, add = {}, Tally.add

    def listen(self, nll, sizes, windows):
        at = [t for w in windows for t in w]
        assert not nats.keys() & set(at)
        nats.update(zip(at, nll.tolist(), strict=True))
        add(self, nll, sizes, windows)
    monkeypatch.setattr(Tally, "add", listen)

    def scores_of(cfg, data: Stream) -> torch.Tensor:
        nats.clear()
        learn(stirred(make_run(cfg)), data)
        assert sorted(nats) == list(range(len(data.bytes)))
        return torch.tensor([nats[i] for i in sorted(nats)], dtype=torch.float64)
    return scores_of


def head_inputs(hidden: torch.Tensor) -> torch.Tensor:
    """What a head's change meets: hidden states (..., C) of length 1, and a constant."""
    constant = torch.full((*hidden.shape[:-1], 1), DocumentWeights.BIAS ** 0.5)
    return torch.cat([F.normalize(hidden, dim=-1), constant], -1)               # (..., C + 1)


def learn_once(learner: DocumentWeights, tokens: torch.Tensor, goes_on: tuple[bool, ...]):
    """Score the first chunk of documents and learn from it: inputs and targets (2, B, T)."""
    chunk = Chunk([], None, goes_on)
    learner.before(chunk)
    learner.forward(*tokens)
    learner.after(chunk)


@torch.no_grad()
def plain(run, data: Stream, document: range) -> torch.Tensor:
    """Nats of a document's targets by one ordinary pass over it."""
    tokens = data.tokens[document.start:document.stop + 1].long()[None]
    return run.model(tokens[:, :-1], tokens[:, 1:], True, precise=True)[0].double()


# ------------------------------------------------------------------------------------------------
# The plan
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 3])
def test_a_plan_scores_each_target_once(make_cfg, world):
    """Any stream: documents by length, chunk after chunk of each, the last is not learnt from."""
    rng, cfg = random.Random(0), make_cfg(**SHORT)
    size = cfg.ttt_chunk_tokens
    for n in range(1, 80):
        starts = sorted({0, *(rng.randrange(n) for _ in range(rng.randrange(12)))})
        data = documents_of(cfg, n, starts[rng.randrange(2) if n > 1 else 0:])  # or without BOS
        found, lengths = [], {}
        for chunk in document_plan(data.tokens, cfg, world):
            for at, goes_on in zip(chunk.windows, chunk.goes_on, strict=True):
                start = max(s for s in starts if s <= at.start) if at else None
                found += at
                if at:
                    assert at.start - start == lengths.get(start, 0)
                    assert all(s not in at[1:] for s in starts)
                    assert len(at) == size if goes_on else len(at) <= size
                    lengths[start] = lengths.get(start, 0) + len(at)
            assert bool(chunk.told) != any(chunk.goes_on)
            assert not chunk.told or chunk.told["last"] == len(found)
        assert sorted(found) == list(range(n))
        assert list(lengths.values()) == sorted(lengths.values(), reverse=True)


def test_the_log_counts_batches_on(make_cfg, make_run, quiet):
    """A score line for each batch, whose targets follow those of the one before."""
    run = stirred(make_run(make_cfg(**SHORT)))
    quiet.events.clear()
    tally = learn(run, documents_of(run.cfg))
    lines = [(e["chunk"], e["first"], e["last"], e["documents"], e["updates"])
             for e in quiet.of("score")]
    assert lines == [("1/2", 0, 90, 3, 11), ("2/2", 90, 96, 2, 1)]
    assert quiet.of("score")[-1]["bpb"] == tally.total(run.rt.dist)[1] and not quiet.of("update")


# ------------------------------------------------------------------------------------------------
# Without learning
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [{}, WINDOWS], ids=["whole", "windows"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_kept_keys_and_values_give_the_plain_forward(make_cfg, make_run, scores, recipe, change):
    """Chunks of four tokens by frozen heads score as one pass over each document does."""
    cfg = make_cfg(**{**SHORT, **PARTS[recipe], **change, "seq_len": 64, "ttt_lr": 0.0})
    data, run = documents_of(cfg), stirred(make_run(cfg))
    found = scores(cfg, data)
    for document in spans():
        want = plain(run, data, document)
        torch.testing.assert_close(found[document.start:document.stop], want, rtol=1e-5, atol=2e-6)


def test_a_stream_without_bos(make_cfg, make_run, scores):
    """It is one document."""
    cfg = make_cfg(**{**SHORT, **PARTS["golf"], "seq_len": 64, "ttt_lr": 0.0})
    data = documents_of(cfg, 50, [])
    want = plain(stirred(make_run(cfg)), data, range(50))
    torch.testing.assert_close(scores(cfg, data), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("change", [{}, WINDOWS, {**WINDOWS, "attention_window": 20}],
                         ids=["whole", "windows", "windows longer than seq_len"])
def test_a_long_document_is_seen_through_a_moving_window(make_cfg, make_run, scores, monkeypatch,
                                                         change):
    """Beyond seq_len each layer's query sees the last seq_len keys, rotated by their distance, or
    the last attention_window."""
    cfg = make_cfg(**{**SHORT, **change, "ttt_lr": 0.0})
    data, T = documents_of(cfg), cfg.seq_len
    run = stirred(make_run(make_cfg(**{**SHORT, **change, "seq_len": 64})))

    def attend(self, q, k, v, mask):
        at = torch.arange(q.size(1))
        band = (at <= at[:, None]) & (at > at[:, None] - T)
        band = band if mask is None else band & mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, band, enable_gqa=True).transpose(1, 2)
    found = scores(cfg, data)
    monkeypatch.setattr(train_gpt.Sdpa, "attend", attend)
    for document in spans():
        want = plain(run, data, document)
        torch.testing.assert_close(found[document.start:document.stop], want, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", RECIPES)
def test_editing_a_target_moves_only_later_scores_of_its_document(make_cfg, scores, recipe):
    """Bit for bit, for every target but the BOS that cut the stream."""
    cfg = make_cfg(**{**SHORT, **PARTS[recipe]})
    data = documents_of(cfg)
    before = scores(cfg, data)
    for k in (0, 1, 3, 6, 7, 10, 13, 16, 19, 20, 30, 58, 60, 63, 64, 80, 94, 95):
        other, (own,) = edited(data, k, cfg), [d for d in spans() if k in d]
        later = torch.tensor([k <= i < own.stop for i in range(N)])
        after = scores(cfg, other)
        assert torch.equal(after[~later], before[~later]), k
        moved = after != before
        if not moved[later].all():          # two float32 met by chance: not in another edit as well
            moved |= scores(cfg, edited(other, k, cfg)) != before
        assert moved[later].all() and not moved[~later].any(), k


def test_a_first_chunk_is_scored_by_the_weights_alone(make_cfg, scores):
    """Heads move what follows, of documents that have a second chunk."""
    cfg = make_cfg(**SHORT)
    data = documents_of(cfg)
    found, frozen = scores(cfg, data), scores(make_cfg(**{**SHORT, "ttt_lr": 0.0}), data)
    for d in spans():
        first = slice(d.start, d.start + cfg.ttt_chunk_tokens)
        rest = slice(first.stop, d.stop)
        assert torch.equal(found[first][:len(d)], frozen[first][:len(d)])
        assert len(d) <= cfg.ttt_chunk_tokens or (found[rest] != frozen[rest]).all()


@pytest.mark.parametrize("change", [dict(ttt_attention=0.0), dict(ttt_chunk_tokens=1)])
def test_the_least_that_learns(make_cfg, scores, change):
    """Heads alone, and chunks of one token, whose first input of attention's outputs is zero."""
    found = scores(make_cfg(**{**SHORT, **change}), documents_of(make_cfg(**SHORT)))
    assert found.isfinite().all()


def test_documents_do_not_know_their_neighbours(make_cfg, scores):
    """Side by side or one after another, whatever the batch: the same nats."""
    found = []
    for batch in (1, 2, 3, 64):
        cfg = make_cfg(**{**SHORT, "eval_batch_seqs": batch})
        found.append(scores(cfg, documents_of(cfg)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_learning_helps_where_a_document_repeats(make_cfg, scores):
    """A phrase that comes again and again, each time after the context has forgotten it."""
    cfg = make_cfg(**SHORT)
    data = documents_of(cfg, 400, [0])
    data.tokens[1:] = data.tokens[1:41].repeat(10)
    found = scores(cfg, data)
    frozen = scores(make_cfg(**{**SHORT, "ttt_lr": 0.0}), data)
    assert found[-40:].mean() < 0.8 * frozen[-40:].mean()


@pytest.mark.parametrize("attention", [0.0, 0.02])
def test_a_step_follows_the_gradient_of_the_head(make_cfg, make_run, attention):
    """That of the changed model's own loss, by autograd, in float64, at each row's rate; a document
    that ends learns nothing."""
    run = stirred(make_run(make_cfg(**{**SHORT, "ttt_attention": attention})))
    rates = set_rates(run)
    learner, tokens = DocumentWeights(run, True), torch.randint(3, 300, (2, 3, 4))
    learn_once(learner, tokens, (True, False, True))
    hidden = run.model(tokens[0]).double()
    change = torch.zeros(3, 17, run.cfg.vocab_size, dtype=torch.float64, requires_grad=True)
    logits = hidden @ run.model.tok_emb.double().T + head_inputs(hidden) @ change
    cap = run.cfg.logit_softcap
    logits = cap * (logits / cap).tanh()
    loss = -logits.log_softmax(2).gather(2, tokens[1][..., None])[[0, 2]].sum()
    want, = torch.autograd.grad(loss, change)
    torch.testing.assert_close(learner.head.double(), -want * rates / rates.mean(), rtol=1e-3,
                               atol=1e-5)
    assert bool(learner.changes) == bool(attention)
    for change in (learner.head, *learner.changes.values()):
        assert not change[1].any() and change[0].any() and change[2].any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_attention_is_whitened(make_cfg, make_run, recipe):
    """By the covariance of the chunk's inputs, in float64 and in the space of inputs, where the
    program inverts in that of tokens; the gradient is that of the weights."""
    cfg = make_cfg(**{**SHORT, **PARTS[recipe], "eval_batch_seqs": 1})
    run = stirred(make_run(cfg))
    set_rates(run)
    learner, tokens = DocumentWeights(run, False), torch.randint(3, 300, (2, 1, 4))
    learn_once(learner, tokens, (True,))
    run.model.requires_grad_(True)
    inputs = {}
    hidden = run.model.hidden(tokens[0], run.model.mask(tokens[0]), False,
                              lambda names, x: inputs.update(dict.fromkeys(names, x)))
    model, found = dict(run.model.named_parameters()), {}
    loss = run.model.per_token_loss(hidden, tokens[1]).sum()
    for i in range(cfg.num_layers):
        layer = f"layers.{i}.attn."
        qkv = [f"{layer}c_{x}.weight" for x in "qkv"]
        for names, scale in (qkv, 1.0), ([layer + "proj.weight"], model[f"layers.{i}.attn_scale"]):
            grads = torch.autograd.grad(loss, [model[n] for n in names], retain_graph=True)
            found[names[0]] = (torch.cat(grads).T / scale).double()             # (I, O)
    assert found.keys() == learner.changes.keys()
    for name, gradient in found.items():
        x = inputs[name][0].double()                                            # (T, I)
        covariance = x.T @ x
        damping = DocumentWeights.DAMPING * torch.eye(x.size(1)).double()
        want = torch.linalg.solve(covariance / covariance.diagonal().mean() + damping, gradient)
        torch.testing.assert_close(learner.changes[name][0].double(),
                                   -cfg.ttt_lr * cfg.ttt_attention * want, rtol=1e-3, atol=1e-6)


def test_the_changed_model_has_the_changed_weights(make_cfg, make_run):
    """States of a document's first tokens by the changes of another run of it, and by weights."""
    cfg = make_cfg(**{**SHORT, "eval_batch_seqs": 1})
    run = stirred(make_run(cfg))
    set_rates(run)
    learner, tokens = DocumentWeights(run, True), torch.randint(3, 300, (2, 1, 4))
    learn_once(learner, tokens, (True,))
    kept, last, _ = learner.memory
    learner.memory = Memory([k[:, :, :0] for k in kept], 0 * last, 0)
    with torch.no_grad():
        frozen, own = learner.states(tokens[0])[0]
    torch.testing.assert_close(frozen, run.model(tokens[0]), rtol=1e-5, atol=1e-5)
    weights = run.flat.named(run.flat.data)
    for name, (change,) in learner.changes.items():
        if name.endswith("proj.weight"):
            weights[name] += (change / weights[name.split(".proj")[0] + "_scale"]).T
        else:
            parts = [weights[name.replace("c_q", f"c_{x}")] for x in "qkv"]
            for part, rows in zip(parts, change.T.split([len(p) for p in parts]), strict=True):
                part += rows
    assert (own - frozen).abs().max() > 1e-2
    torch.testing.assert_close(own, run.model(tokens[0]), rtol=1e-4, atol=1e-4)


def test_a_score_is_that_of_the_mean_of_two_probabilities(make_cfg, make_run):
    """Those of the model and of one that has learnt, apart, in float64; the sum over all targets
    is 1.  One document for each token of the vocabulary, alike but for the last targets."""
    run = stirred(make_run(make_cfg(**{**SHORT, "eval_batch_seqs": 320})))
    V, cap = run.cfg.vocab_size, run.cfg.logit_softcap
    set_rates(run)
    learner, chunk = DocumentWeights(run, True), Chunk([], None, (True,) * V)
    ids, every = torch.randint(3, V, (9,)), torch.arange(V)[:, None].expand(V, 4)
    learn_once(learner, torch.stack([ids[:4], ids[1:5]])[:, None].expand(2, V, 4), (True,) * V)
    learner.before(chunk)
    hidden = learner.states(ids[4:8].expand(V, 4))[0][:, 0].double()            # (2, T, C)
    p = (-learner.forward(ids[4:8].expand(V, 4), every).double()).exp()         # (V, T)
    torch.testing.assert_close(hidden[0], run.model(ids[None, :8])[0, 4:].double(), rtol=1e-4,
                               atol=1e-4)
    both = hidden @ run.model.tok_emb.double().T                                # (2, T, V)
    both[1] += head_inputs(hidden[1]) @ learner.head[0].double()
    both = (cap * (both / cap).tanh()).softmax(2)
    assert (both[1] / both[0]).max() > 2
    torch.testing.assert_close(p, both.mean(0).T, rtol=1e-4, atol=0)
    torch.testing.assert_close(p.sum(0), torch.ones(4).double(), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------
# Ranks, graphs, settings
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 5, 7])
def test_ranks_score_what_one_scores(make_cfg, make_run, world):
    """Also with fewer documents than ranks; all ranks come to the same collectives."""
    cfg = make_cfg(**{**SHORT, "train_batch_tokens": 16 * 70})
    data = documents_of(cfg)

    def work(dist):
        run = stirred(make_run(cfg, dist))
        tally = learn(run, data)
        return *tally.total(dist), *tally.times_scored(dist), getattr(dist, "calls", None)
    alone, found = work(train_gpt.Dist({})), in_ranks(world, work)
    for result in found:
        assert result[:4] == pytest.approx(alone[:4], rel=1e-6)
        assert result[4:6] == (1, 1) and result[6] == found[0][6]


@pytest.mark.parametrize("change, message", [
    (dict(ttt_chunk_tokens=17), "TTT_CHUNK_TOKENS=17: must be at most SEQ_LEN=16"),
    (dict(ttt_chunk_tokens=0), "TTT_CHUNK_TOKENS=0: must be positive"),
    (dict(extras_1060=True), "TTT_DOCUMENTS=1: must be 0 with EXTRAS_1060")])
def test_settings_that_contradict(make_cfg, change, message):
    """One line says what is wrong."""
    with pytest.raises(ConfigError, match=message):
        make_cfg(**{**SHORT, **change})


def test_two_processes_score_what_one_scores(toy_env, run_program, read_log, tmp_path):
    """Real runs: the artifact's documents on one rank and on two, and the lines of the log."""
    env = {**toy_env, "TTT_DOCUMENTS": "1", "TTT_CHUNK_TOKENS": "8", "TTT_LR": "1", "RUN_ID": "toy",
           "EVAL_BATCH_SEQS": "4"}
    found = []
    for world, more in ((1, {}), (2, dict(STAGES="eval")), (1, dict(STAGES="eval", TTT_LR="0"))):
        done = run_program({**env, **more}, world=world)
        assert done.returncode == 0, done.stderr
        log = read_log(tmp_path / "logs" / "toy.txt")
        found.append({v["name"]: float(v["val_loss"]) for e, v in log if e == "eval"}["ttt"])
        batches = [v for e, v in log if e == "score"]
        assert batches[-1]["last"] == [v for e, v in log if e == "validation"][-1]["targets"]
        assert ("ledger", "ttt", "1", "1") in [
            (e, v["name"], v["scored_min"], v["scored_max"]) for e, v in log if e == "ledger"]
    assert math.isclose(found[0], found[1], rel_tol=1e-7) and found[2] != found[0]
