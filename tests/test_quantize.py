"""train_gpt.py, Quantization: GPTQ against a slow one, Hessians, gradients, steps, their search.

Run alone: python -m pytest -q tests/test_quantize.py
"""
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import stirred

import train_gpt
from train_gpt import GolfError

USUAL = 0.4145                  # steps in row std: #1394's
LIMITED = 0.01                  # so fine that codes of several weights are at the limit of int8


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world`, which notes the tensors that it hands in to be summed."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.summed = rank, world, []
    dist.all_reduce_ = dist.summed.append
    dist.all_reduce_max, dist.barrier = lambda *values: list(values), lambda: None
    return dist


def gram(N: int, I: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """Sums of x x^T (N, I, I) over correlated inputs of very different power."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(N, I, I, generator=rng) / I ** 0.5 + torch.eye(I)
    power = torch.logspace(-1, 1, I)[torch.randperm(I, generator=rng)]
    x = torch.randn(N, rank or 4 * I, I, generator=rng) @ mix * power
    return x.mT @ x


def weights(N: int, O: int, I: int, seed: int = 1) -> torch.Tensor:
    """Random matrices (N, O, I) whose rows have different lengths."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(N, O, I, generator=rng) * torch.linspace(0.1, 2.0, O)[:, None]


def rounded(W, sigmas: float) -> torch.Tensor:
    """Steps (N, O) of so many row std as an artifact holds them."""
    return train_gpt.stored_steps(train_gpt.round_steps(W, sigmas * W.std(2), "a stack"))


def quantize(W, H, step=None, damping=0.01, log=lambda *a, **k: None):
    """Codes of a stack and the steps (N, O) that they were made with."""
    step = rounded(W, USUAL) if step is None else step
    return train_gpt.gptq(W, train_gpt.inverse_factor(H, damping, "a stack", log), step), step


def inverses(H, damping: float, order) -> list:
    """For each column in `order` the columns left and the inverse of their Hessian, in float64."""
    H = H.double() + damping * H.double().diagonal().mean() * torch.eye(len(H))
    left = [list(order[i:]) for i in range(len(order))]
    return [(columns, torch.linalg.inv(H[columns][:, columns])) for columns in left]


def slow_codes(W, H, step, block: int = 128, damping: float = 0.01) -> torch.Tensor:
    """Codes (O, I) on the trellis by optimal brain quantization, row after row, in float64.

    Each of the four states keeps its own way: cost, weights that took its errors so far, codes.
    After every `block` columns only the best way is left.
    """
    following = {0: (0, 2), 1: (2, 0), 2: (1, 3), 3: (3, 1)}           # by parity
    steps, Q = inverses(H, damping, range(len(H))), []
    for row, size in zip(W.double(), step.double().tolist()):
        ways = {0: (0.0, row, [])}
        for j, (left, inverse) in enumerate(steps):
            found = {}
            for state, (cost, w, codes) in ways.items():
                half = state // 2 / 2
                y = min(max(float(w[j]) / size - half, -126), 126)
                for parity, code in enumerate((2 * round(y / 2), 2 * round((y - 1) / 2) + 1)):
                    error = w[j] - (code + half) * size
                    total = cost + float(error ** 2 / inverse[0, 0])
                    target = following[state][parity]
                    if target not in found or total < found[target][0]:
                        changed = w.clone()
                        changed[left] -= error / inverse[0, 0] * inverse[0]
                        found[target] = total, changed, [*codes, code]
            ways = found
            if (j + 1) % block == 0:
                state = min(ways, key=lambda s: ways[s][0])
                ways = {state: ways[state]}
        Q.append(min(ways.values(), key=lambda way: way[0])[2])
    return torch.tensor(Q, dtype=torch.int8)


def scalar_codes(W, H, step, damping: float = 0.01) -> torch.Tensor:
    """Codes (O, I) by GPTQ as published: no trellis, columns by falling power, in float64."""
    W, Q = W.double().clone(), torch.zeros(W.shape, dtype=torch.int8)
    for left, inverse in inverses(H, damping, H.diagonal().argsort(descending=True).tolist()):
        j = left[0]
        q = (W[:, j] / step).round().clamp(-127, 127)
        W[:, left] -= torch.outer((W[:, j] - q * step) / inverse[0, 0], inverse[0])
        Q[:, j] = q
    return Q


def restored(Q, step) -> torch.Tensor:
    """Weights (N, O, I) of the codes of a stack."""
    return (Q + train_gpt.half_steps(Q)) * step[..., None]


def weighted_error(W, V, H) -> torch.Tensor:
    """e H e^T (N, O) of each row of a stack, e = W - V being its error, in float64."""
    E = W.double() - V.double()
    return torch.einsum("noi,nij,noj->no", E, H.double(), E)


def coded_bytes(Q) -> int:
    """Bytes of the codes of a stack in an artifact."""
    return sum(map(len, train_gpt.encode_range({str(i): q for i, q in enumerate(Q)})))


# ------------------------------------------------------------------------------------------------
# GPTQ
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("I", [1, 2, 7, 24])
def test_half_steps_follow_the_parities_of_earlier_codes(I):
    """A state of two bits, moved by each code's parity, says where half a step is added."""
    codes = torch.randint(-127, 128, (5, I), dtype=torch.int8)
    for row, halves in zip(codes.tolist(), train_gpt.half_steps(codes).tolist()):
        now = before = 0
        for code, half in zip(row, halves):
            assert half == now / 2
            now, before = (code % 2) ^ before, now


@pytest.mark.parametrize("sigmas", [USUAL, LIMITED])
def test_codes_are_those_of_a_slow_trellis(monkeypatch, sigmas):
    """Codes are those of optimal brain quantization with a way for each state."""
    W, H = weights(2, 4, 24), gram(2, 24)
    step = sigmas * W.std(2)
    for block in (1, 5, 24, 128):
        want = torch.stack([slow_codes(w, h, s, block) for w, h, s in zip(W, H, step)])
        assert want.abs().max() == 127 or sigmas == USUAL, "no code is at the limit"
        monkeypatch.setattr(train_gpt, "GPTQ_BLOCK", block)
        assert torch.equal(quantize(W, H, step)[0], want), block


def test_white_inputs_mean_the_nearest_point_of_the_trellis():
    """With H a multiple of the identity no codes are nearer, whatever their parities are."""
    W = weights(2, 16, 8)
    step = USUAL * W.std(2)
    parity = torch.cartesian_prod(*[torch.arange(2, dtype=torch.int8)] * 8)         # (256, 8)
    y = (W / step[..., None])[:, :, None] - train_gpt.half_steps(parity)            # in codes
    off = y - (2 * ((y - parity) / 2).round() + parity)
    best = off.square().sum(3).amin(2)                                              # (N, O)
    for power in (1.0, 37.0):
        Q, _ = quantize(W, power * torch.eye(8).repeat(2, 1, 1), step)
        error = ((restored(Q, step) - W) / step[..., None]).square().sum(2)
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigmas", [0.25, USUAL, 0.6])
def test_error_at_equal_entropy_is_below_that_of_published_gptq(sigmas):
    """By 2 % at least, in every matrix; a bit a weight is worth a factor of 4."""
    for seed in range(3):
        W, H = weights(2, 128, 64, seed), gram(2, 64, seed=seed)
        step = sigmas * W.std(2)
        Q, scalar = quantize(W, H, step)[0], [scalar_codes(*x) for x in zip(W, H, step)]
        for w, h, s, q, p in zip(W, H, step, Q, scalar):
            values = restored(q[None], s[None]), (p * s[:, None])[None]
            errors = [weighted_error(w[None], v, h[None]).sum() * 4 ** (train_gpt.entropy_bytes(
                codes.numpy()) * 8 / w.numel()) for v, codes in zip(values, (q, p))]
            assert errors[0] < 0.98 * errors[1]


def test_arguments_are_untouched():
    """Neither weights nor Hessians change."""
    W, H = weights(2, 6, 24), gram(2, 24)
    kept = W.clone(), H.clone()
    quantize(W, H)
    assert torch.equal(W, kept[0]) and torch.equal(H, kept[1])


def test_dead_inputs_are_rounded_all_the_same():
    """Inputs that were always zero, all of a matrix too, are off by less than a step."""
    W, H = weights(3, 6, 24), gram(3, 24)
    for n, dead in enumerate([[0, 7], [23], range(24)]):
        H[n, list(dead)], H[n, :, list(dead)] = 0, 0
    Q, step = quantize(W, H)
    off = (restored(Q, step) - W).abs() / step[..., None]
    assert off[0][:, [0, 7]].max() < 1 and off[1][:, 23].max() < 1 and off[2].max() < 1
    for q, w, h, s in zip(Q[:2], W, H, step):
        assert torch.equal(q, slow_codes(w, h, s))


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------

def test_stored_steps_are_near_those_wanted():
    """A step is within 2 ** (1 / 16) of the one that was wanted, in one byte of any value."""
    W, wanted = torch.randn(1, 256, 8), torch.logspace(-5, 1, 256)[None]
    logs = train_gpt.round_steps(W, wanted, "a stack")
    ratio = (train_gpt.stored_steps(logs) / wanted).log2().abs()
    free = wanted > W.abs().amax(2) / 100
    assert logs.dtype == torch.int8 and free.any() and ratio[free].max() <= 1 / 16 + 1e-4
    every = torch.arange(-128, 128, dtype=torch.int8)
    steps = train_gpt.stored_steps(every)
    assert torch.equal(train_gpt.round_steps(steps[:, None, None], steps[:, None], "")[:, 0], every)


def test_no_code_leaves_int8():
    """However fine the step that is wanted, the largest weight of a row has a code of its own."""
    W = weights(2, 16, 200)
    for sigmas in (1e-6, 0.01):
        step = rounded(W, sigmas)
        largest = W.abs().amax(2) / step
        assert largest.max() <= 126.001 and largest.min() > 115       # 126 / 2 ** (1 / 8)


def test_small_weights_lose_no_more_than_large_ones():
    """Scaled by a power of two, a matrix has the same codes."""
    W, H = weights(2, 64, 48), gram(2, 48)
    want, step = quantize(W, H)
    for octaves in (-18, 3):
        found, other = quantize(2.0 ** octaves * W, H)
        assert torch.equal(found, want) and torch.equal(other, 2.0 ** octaves * step)


@pytest.mark.parametrize("factor", [1e-9, 1e9, math.nan])
def test_rows_beyond_the_range_of_steps_raise(factor):
    """A row that no stored step can hold is an error that names the matrix, not a row of zeros."""
    W = weights(1, 8, 24)
    W[:, 3] *= factor
    with pytest.raises(GolfError, match="a stack: a row of weights up to .*, outside|outside the"):
        rounded(W, USUAL)


def test_a_row_of_zeros_stays_finite():
    """A row of zeros, as of a new layer, has codes 0 and a positive step."""
    Q, step = quantize(torch.zeros(1, 4, 8), gram(1, 8))
    assert not Q.any() and (step > 0).all() and step.isfinite().all()


def flat_of(W: torch.Tensor, gradients: torch.Tensor) -> SimpleNamespace:
    """What `wanted_steps` asks of a model whose matrices are the stack W (N, O, I)."""
    names = [str(i) for i in range(len(W))]
    return SimpleNamespace(groups=dict(muon=names, embed=[]), named=lambda w: dict(zip(names, w)),
                           gradients=dict(zip(names, gradients)))


def steps_of(W, gradients, step: float, embed_step: float) -> torch.Tensor:
    """Stored steps (N, O) of a stack by one of the two rules."""
    flat, cfg = flat_of(W, gradients), SimpleNamespace(embed_step=embed_step)
    wanted = train_gpt.wanted_steps(cfg, flat, W, flat.gradients, step)
    return train_gpt.stored_steps(train_gpt.round_steps(W, torch.stack([*wanted.values()]), ""))


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_steps_by_damage_do_less_at_the_same_entropy(spread):
    """Damage, in float64: the error of every row by its inputs times its gradient squared.

    Coded to the same bytes, steps by damage do less of it than steps by deviation, to every matrix
    if gradients are alike, and to all together if they differ.
    """
    W, H = weights(3, 96, 256), gram(3, 256)
    gradients = torch.exp(spread * torch.randn(3, 96))
    damages = []
    for embed_step in (0.15, 0.0):
        step = steps_of(W, gradients, 0.4, embed_step)
        Q = quantize(W, H, step)[0]
        size = coded_bytes(Q)
        damage = (weighted_error(W, restored(Q, step), H) * gradients.double().square()).sum(1)
        damages.append(damage * 4 ** (8 * size / Q.numel()))          # a bit is a factor of 4
    assert damages[1].sum() < 0.9 * damages[0].sum()
    assert spread or (damages[1] < damages[0]).all()


def test_a_step_times_its_harm_is_the_same_everywhere():
    """A row's harm is its gradient, with a share of its matrix's.

    The geometric mean of steps in row std, over rows of all matrices, is what was asked for.
    """
    W, gradients = weights(3, 200, 64), torch.exp(torch.randn(3, 200))
    flat, cfg = flat_of(W, gradients), SimpleNamespace(embed_step=0.0)
    steps = torch.stack([*train_gpt.wanted_steps(cfg, flat, W, flat.gradients, 0.3).values()])
    power = gradients.double().square()
    harm = steps * (power + train_gpt.PRIOR_POWER * power.mean(1, keepdim=True)).sqrt()
    torch.testing.assert_close(harm, harm[:1, :1].expand_as(harm), rtol=1e-5, atol=0)
    assert (steps / W.std(2)).log().mean().exp().item() == pytest.approx(0.3, rel=1e-4)


def test_a_matrix_that_harms_nothing_takes_nothing():
    """Without any gradient its codes are zeros, and the other matrices' steps are as without it."""
    W, gradients = weights(3, 20, 64), torch.exp(torch.randn(3, 20))
    gradients[1] = 0
    steps = steps_of(W, gradients, 0.3, 0.0)
    assert not (W / steps[..., None]).round()[1].any()
    assert torch.equal(steps[[0, 2]], steps_of(W[[0, 2]], gradients[[0, 2]], 0.3, 0.0))


def test_steps_by_deviation_are_those_of_the_seeds(trained):
    """Matrices have so many row std, embeddings their own number, whatever gradients say."""
    run = trained.run
    steps = train_gpt.wanted_steps(run.cfg, run.flat, trained.state.ema, {}, 0.3)
    for name, w in run.flat.named(trained.state.ema).items():
        if name in steps:
            size = 20 / 127 if name == "tok_emb" else 0.3
            torch.testing.assert_close(steps[name], size * w.std(1), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------
# Damping and failure
# ------------------------------------------------------------------------------------------------

def bent(I: int, least: float) -> torch.Tensor:
    """A symmetric matrix (1, I, I) of mean diagonal 1 whose smallest eigenvalue is `least`."""
    values = torch.full((I,), (I - least) / (I - 1), dtype=torch.float64)
    values[0] = least
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(I, I, dtype=torch.float64, generator=rng)).Q
    return (basis * values @ basis.mT).float()[None]


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_reverse_cholesky_factor(damping, quiet):
    """U is upper triangular and U^T U the inverse of the damped Hessian."""
    H = gram(3, 32)
    U = train_gpt.inverse_factor(H, damping, "a stack", quiet)
    damped = H + damping * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(32)
    assert torch.equal(U, U.triu()) and not quiet.events
    want = torch.eye(32).expand(3, 32, 32)
    torch.testing.assert_close(U.mT @ U @ damped, want, atol=1e-3, rtol=0)


def test_rank_deficient_inputs_need_no_more_than_the_usual_damping(quiet):
    """Fewer tokens than inputs, as in a short calibration, is no reason to damp more."""
    train_gpt.inverse_factor(gram(1, 64, rank=5), 0.01, "a stack", quiet)
    assert not quiet.events


@pytest.mark.parametrize("least, tries", [(-0.05, 1), (-0.5, 2)])
def test_damping_is_raised_tenfold_and_logged(quiet, least, tries):
    """A Hessian that is not positive definite gets more damping; nothing else changes."""
    W, H = weights(1, 6, 24), bent(24, least)
    Q, _ = quantize(W, H, log=quiet)
    assert [(e["matrix"], e["damping"]) for e in quiet.of("damping")] == [
        ("a stack", pytest.approx(0.01 * 10 ** i)) for i in range(tries)]
    assert torch.equal(Q, quantize(W, H, damping=0.01 * 10 ** tries)[0])


def test_a_hopeless_hessian_is_an_error(quiet):
    """After a hundredfold damping the error names matrix, pivot and remedy; so in any stack."""
    H = torch.cat([gram(2, 24), bent(24, -3.0)])
    with pytest.raises(GolfError, match=r"a stack: .* of 24.*raise GPTQ_DAMPING \(now 0.01\)"):
        quantize(weights(3, 6, 24), H, log=quiet)
    assert [e["damping"] for e in quiet.of("damping")] == pytest.approx([0.01, 0.1, 1.0])


def test_inputs_that_are_not_finite_are_an_error(quiet):
    """No damping mends a NaN or an infinity: the error says that training has diverged."""
    for value in (math.nan, math.inf):
        H = gram(3, 24)
        H[1, 2, 2] = value
        with pytest.raises(GolfError, match="a stack: .*too large; .* lower MATRIX_LR"):
            quantize(weights(3, 6, 24), H, log=quiet)
    assert not quiet.events


# ------------------------------------------------------------------------------------------------
# Hessians
# ------------------------------------------------------------------------------------------------

def read_batches(run, count: int) -> list[torch.Tensor]:
    """The first batches of a rank, (B, T + 1) each."""
    identity = train_gpt.check_data(run.cfg, run.rt)
    shards = train_gpt.open_shards(run.cfg, "train", run.rt, identity)
    batches = train_gpt.Batches(run.cfg, shards, run.rt.dist)
    rows = [batches.next() for _ in range(count)]
    batches.close()
    return rows


def hessians_of(run, count: int, rows=None) -> dict[str, torch.Tensor]:
    """The Hessians of the first batches."""
    rows = iter(rows or read_batches(run, count))
    return train_gpt.collect_hessians(run.cfg, run.rt, partial(run.capture, looped=True),
                                      SimpleNamespace(next=rows.__next__), count)


def seen_inputs(run, rows) -> dict[str, list[torch.Tensor]]:
    """Inputs (B T, I) of every matrix in looped passes over rows, by hooks, one entry a pass."""
    seen = {name: [] for name in (*run.flat.groups["muon"], "tok_emb")}

    def listen(module, *names: str):
        def hook(_, args):
            for name in names:
                seen[name].append(args[0].detach().flatten(0, 1))
        module.register_forward_pre_hook(hook)
    for i, layer in enumerate(run.model.layers):
        listen(layer.attn, *(f"layers.{i}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v")))
        listen(layer.attn.proj, f"layers.{i}.attn.proj.weight")
        listen(layer.mlp, f"layers.{i}.mlp.fc.weight")
        listen(layer.mlp.proj, f"layers.{i}.mlp.proj.weight")
    with torch.no_grad():
        seen["tok_emb"] = [run.model(r[:, :-1]).flatten(0, 1) for r in rows]
    return seen


def test_hessians_are_sums_over_tokens_of_every_pass(make_cfg, make_run):
    """Token after token, x x^T of each matrix, recurrent layers once a pass, two batches in all.

    Query, key and value of a layer share one tensor; no other two matrices do.
    """
    cfg = make_cfg(seq_len=8, train_batch_tokens=64, num_loops=2, ttt_chunk_tokens=64)
    run = stirred(make_run(cfg))
    rows = read_batches(run, 2)
    found, seen = hessians_of(run, 2, rows), seen_inputs(run, rows)
    assert {len(v) for k, v in seen.items() if k.startswith("layers.1.")} == {6}
    assert len(seen["layers.0.mlp.fc.weight"]) == 2 and found.keys() == seen.keys()
    for name, inputs in seen.items():
        want = sum(torch.outer(x, x) for x in torch.cat(inputs))
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-3, msg=name)
    q, k, v = (found[f"layers.0.attn.{n}.weight"] for n in ("c_q", "c_k", "c_v"))
    assert q is k is v and len({id(H) for H in found.values()}) == len(found) - 2 * cfg.num_layers


@pytest.mark.parametrize("micro", [1, 8])
def test_micro_batches_do_not_change_hessians(make_cfg, make_run, micro):
    """The sum is over the global batch, however it is cut."""
    runs = [make_run(make_cfg(micro_batch_seqs=m)) for m in (4, micro)]
    for want, H in zip(*(hessians_of(stirred(run), 1).values() for run in runs)):
        torch.testing.assert_close(H, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_sum_to_one_rank(cfg, make_run, world):
    """Each rank hands every Hessian in once to be summed, and the sums are those of one rank."""
    alone, total = hessians_of(stirred(make_run(cfg)), 2), {}
    for rank in range(world):
        dist = ranked(rank, world)
        mine = hessians_of(stirred(make_run(cfg, dist)), 2)
        assert sorted(map(id, dist.summed)) == sorted({id(H) for H in mine.values()})
        total = {name: H + total.get(name, 0) for name, H in mine.items()}
    for name, want in alone.items():
        torch.testing.assert_close(total[name], want, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_sums_of_squares_by_row(make_cfg, make_run, monkeypatch, world):
    """The squares of each micro-batch's gradient: mean along rows, sum over all ranks."""
    monkeypatch.setattr(train_gpt, "GRADIENT_BATCHES", 2)
    cfg, found, want = make_cfg(micro_batch_seqs=2), 0, 0
    for rank in range(world):
        run = stirred(make_run(cfg, ranked(rank, world)))
        run.rt.dist.all_reduce_ = lambda x: x
        rows = read_batches(run, 2)
        sizes = train_gpt.collect_gradients(cfg, run.rt, run.flat, run.forward,
                                            SimpleNamespace(next=iter(rows).__next__))
        assert sizes.keys() == {*run.flat.groups["muon"], "tok_emb"}
        found = found + torch.cat([*sizes.values()]).square()
        for part in torch.cat(rows).split(2):
            gradients = torch.autograd.grad(run.forward(part[:, :-1], part[:, 1:]).mean(),
                                            [*run.model.parameters()])
            named = dict(zip(dict(run.model.named_parameters()), gradients))
            want = want + torch.cat([named[n].square().mean(1) for n in sizes])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("slower, seconds, used", [(0, 0.0, 1), (0, 41.0, 4), (0, 39.0, 3),
                                                   (0, 21.0, 2), (0, 19.0, 1), (25, 41.0, 1)])
def test_no_batch_is_begun_that_would_end_late(cfg, make_run, monkeypatch, slower, seconds, used):
    """At 10 s a batch, or that of the slowest rank, the last one still ends in time."""
    run, ticks = make_run(cfg), SimpleNamespace(now=0.0, read=0)
    rows = read_batches(run, 1)[0]

    def next_batch():
        ticks.now, ticks.read = ticks.now + 10.0, ticks.read + 1
        return rows
    run.rt.dist.all_reduce_max = lambda spent: [spent + slower]
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: ticks.now)
    train_gpt.collect_hessians(cfg, run.rt, partial(run.capture, looped=True),
                               SimpleNamespace(next=next_batch), 4, seconds)
    assert ticks.read == used


# ------------------------------------------------------------------------------------------------
# The whole model
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def trained(make_cfg, make_run, monkeypatch) -> SimpleNamespace:
    """A run with random weights as if trained, its Hessians, and code that counts 1,000 bytes."""
    monkeypatch.setattr(train_gpt, "own_source", lambda: b"x" * 1000)
    cfg = make_cfg(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1)
    run = stirred(make_run(cfg))
    state = train_gpt.TrainState(run, 6, True)
    gradients = {n: torch.exp(torch.randn(run.flat.shapes[n][0])) for n in hessians_of(run, 2)}
    return SimpleNamespace(run=run, state=state, hessians=hessians_of(run, 2), gradients=gradients)


def quantize_model(trained, step: float, hessians=None):
    """Tensors of the artifact, and rows about them by name."""
    run, ema = trained.run, trained.state.ema
    steps = train_gpt.wanted_steps(run.cfg, run.flat, ema, {}, step)
    tensors, rows = train_gpt.quantize_model(run.cfg, run.flat, ema, hessians or trained.hessians,
                                             steps, run.rt.log)
    return tensors, {row["name"]: row for row in rows}


@pytest.mark.parametrize("step", [0.1, 0.4, 2.0])
def test_rows_say_what_rounding_did(trained, step):
    """Mean squared errors over variances are those of the tensors."""
    named = trained.run.flat.named(trained.state.ema)
    tensors, rows = quantize_model(trained, step)
    assert sorted(rows) == sorted([*trained.run.flat.groups["muon"], "tok_emb"])
    for name, row in rows.items():
        w, q = named[name], tensors[name]
        error = w - train_gpt.restore(q, tensors[name + ".step"])
        assert row["mse"] == pytest.approx(float(error.square().mean() / w.var()), rel=1e-5)


def test_dequantized_weights_are_near_the_average(trained):
    """Each matrix has codes of its own, at a small error; vectors are rounded to float16."""
    flat = trained.run.flat
    tensors, rows = quantize_model(trained, 0.2)
    flat.data.fill_(math.nan)
    train_gpt.dequantize(tensors, flat)
    before, after = flat.named(trained.state.ema), flat.named(flat.data)
    for name, row in rows.items():
        w, v = before[name], after[name]
        mse = float((v - w).square().mean() / w.var())
        assert mse == pytest.approx(row["mse"], rel=1e-4) and mse < 0.1
    for name in flat.groups["scalar"]:
        assert torch.equal(after[name], before[name].half().float())


def test_a_matrix_of_zeros_has_no_error(trained):
    """Where nothing was learnt nothing is lost, and the log's numbers stay numbers."""
    name = trained.run.flat.groups["muon"][0]
    trained.run.flat.named(trained.state.ema)[name].zero_()
    _, rows = quantize_model(trained, USUAL)
    assert rows[name]["mse"] == 0.0
    assert all(math.isfinite(row[key]) for row in rows.values() for key in row if key != "name")


def test_a_missing_hessian_raises(trained):
    """A matrix whose input calibration did not see is an error that names it, whichever it is."""
    for name in trained.hessians:
        others = {n: H for n, H in trained.hessians.items() if n != name}
        with pytest.raises(GolfError, match=f"{re.escape(name)}: calibration saw no input"):
            quantize_model(trained, USUAL, others)


def test_lookup_tables_are_rounded_without_a_hessian(make_cfg, make_run):
    """No product reads #1060's tables of pairs and values: their inputs are taken as white."""
    run = stirred(make_run(make_cfg(extras_1060=True)))
    trained = SimpleNamespace(run=run, state=train_gpt.TrainState(run, 6, True),
                              hessians=hessians_of(run, 1))
    tables = set(train_gpt.LOOKUP_TABLES)
    assert not tables & trained.hessians.keys() and tables <= set(run.flat.groups["embed"])
    (tensors, _), named = quantize_model(trained, USUAL), run.flat.named(run.flat.data)
    for name in tables:
        w, step = named[name][None], train_gpt.stored_steps(tensors[f"{name}.step"])[None]
        assert torch.equal(tensors[name], quantize(w, torch.eye(w.size(2))[None], step)[0][0])


# ------------------------------------------------------------------------------------------------
# The search of the step
# ------------------------------------------------------------------------------------------------

def normal_bytes(count: int, step: float) -> int:
    """Bytes of `count` normal weights in codes of a step in std, ideally coded."""
    edges = [(j + 0.5) * step / math.sqrt(2) for j in range(-128, 127)]
    masses = [(math.erf(b) - math.erf(a)) / 2 for a, b in zip([-math.inf, *edges],
                                                              [*edges, math.inf])]
    return round(count / 8 * -sum(p * math.log2(p) for p in masses if p))


@pytest.mark.parametrize("count, target", [(35_900_000, t * 10 ** 6) for t in (12, 14, 15, 16, 17)]
                         + [(300_000, 110_000), (2_000_000, 850_000)])
def test_the_search_converges_in_four_tries(count, target):
    """For normal weights of any number and any target within reach, the fourth try fits, at least.

    That holds with a fixed overhead beside the codes, such as steps, and code of 20 kB.
    """
    step, overhead = train_gpt.FIRST_STEP, 20_000 + count // 1000
    for _ in range(4):
        spare = target - overhead - normal_bytes(count, step)
        if 0 <= spare <= train_gpt.STEP_SLACK:
            break
        step = train_gpt.next_step(step, spare, count)
    assert 0 <= spare <= train_gpt.STEP_SLACK


def fit(trained, **settings) -> list[bytes]:
    """Parts of the artifact under other settings."""
    cfg = train_gpt.Config(**{**vars(trained.run.cfg), **settings})
    return train_gpt.fit_artifact(trained.run._replace(cfg=cfg), trained.state, trained.hessians,
                                  trained.gradients, train_gpt.Identity({}, "none"))


def size_of(parts: list[bytes]) -> int:
    """Bytes of an artifact and its code."""
    return sum(map(len, parts)) + 1000


@pytest.mark.parametrize("target", [13_000, 17_000])
def test_the_search_fills_the_target(trained, quiet, monkeypatch, target):
    """Without a step of its own the artifact ends below the target and within the slack of it."""
    monkeypatch.setattr(train_gpt, "STEP_SLACK", 300)
    parts = fit(trained, code_step=0.0, target_bytes=target)
    assert target - 300 <= size_of(parts) <= target
    tries = quiet.of("compress")
    assert tries[-1]["total_bytes"] == size_of(parts) and len(tries) <= train_gpt.MOST_TRIES
    assert (tries[-1]["code_step"] > train_gpt.FIRST_STEP) == (tries[0]["total_bytes"] > target)


def test_the_search_ends_at_the_finest_step(trained, quiet):
    """Where there is more room than a model needs, the step ends at its least."""
    fit(trained, code_step=0.0, target_bytes=10 ** 7)
    assert quiet.of("compress")[-1]["code_step"] == train_gpt.LEAST_STEP


def test_an_explicit_step_is_kept(trained, quiet):
    """CODE_STEP is used as it is, once, whatever room is left; the model's weights are packed."""
    want = fit(trained, code_step=0.16)
    assert [e["code_step"] for e in quiet.of("compress")] == [0.16]
    trained.state.ema.normal_()
    assert fit(trained, code_step=0.16) == want
    trained.run.flat.data.add_(0.1 * torch.randn(len(trained.state.ema)))
    assert fit(trained, code_step=0.16) != want


@pytest.mark.parametrize("step", [0.4, 0.0])
def test_too_large_is_an_error_with_both_numbers(trained, quiet, step):
    """An artifact over the target raises an error with its size and the size allowed."""
    with pytest.raises(GolfError) as caught:
        fit(trained, code_step=step, target_bytes=4_000)
    model, code, total, *_ = map(int, re.findall(r"\d+", str(caught.value)))
    assert model + code == total == quiet.of("compress")[-1]["total_bytes"] > 4_000
    assert code == 1000 and "TARGET_BYTES=4000" in str(caught.value)
    assert not quiet.of("matrix")
