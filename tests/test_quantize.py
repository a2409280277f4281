"""train_gpt.py, Quantization: GPTQ against a slow one, Hessians against explicit sums, clip search.

Run alone: python -m pytest -q tests/test_quantize.py
"""
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import stirred

import train_gpt
from train_gpt import QuantError, SizeError

FINE = (6, 12.85)               # bits, largest code in row deviations: no weight is near the limit
COARSE = (3, 2.0)               # codes -3..3, so that several weights are at the limit


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world`, whose sums over ranks are left to the test."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.sum_, dist.summed = rank, world, lambda x: dist.summed.append(x), []
    dist.max, dist.wait = lambda value: value, lambda: None
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


def quantize(cfg, W, H, grid=FINE, log=lambda *a, **k: None):
    """Codes and scales of a stack, by the program."""
    return train_gpt.quantize_stack(W, H, grid, cfg, "a stack", log)


def slow_codes(W, H, scale, bits: int, damping: float) -> torch.Tensor:
    """Codes (O, I) of one matrix by optimal brain quantization, weight after weight, in float64.

    Each error is spread with the inverse of what is left of the Hessian, inverted anew every time.
    """
    W, H, scale = W.double().clone(), H.double().clone(), scale.double()
    dead = H.diagonal() == 0
    W[:, dead], H.diagonal()[dead] = 0, 1
    left = torch.argsort(torch.where(dead, 0, H.diagonal()), descending=True, stable=True).tolist()
    H += damping * H.diagonal().mean() * torch.eye(len(H))
    Q, limit = torch.zeros(W.shape, dtype=torch.int8), 2 ** (bits - 1) - 1
    while left:
        inverse, j = torch.linalg.inv(H[left][:, left]), left[0]
        q = (W[:, j] / scale).round().clamp(-limit, limit)
        W[:, left] -= torch.outer((W[:, j] - q * scale) / inverse[0, 0], inverse[0])
        Q[:, j] = q
        left = left[1:]
    return Q


def nearest(W, scale, bits: int) -> torch.Tensor:
    """Codes of plain rounding to the nearest."""
    limit = 2 ** (bits - 1) - 1
    return (W / scale.float()[..., None]).round().clamp(-limit, limit).to(torch.int8)


def weighted_error(W, Q, scale, H) -> torch.Tensor:
    """tr(E H E^T) of each matrix of a stack, E what rounding did."""
    E = (W - Q * scale.float()[..., None]).double()
    return torch.einsum("noi,nij,noj->n", E, H.double(), E)


# ------------------------------------------------------------------------------------------------
# GPTQ
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 2, 5, 24, 128])
@pytest.mark.parametrize("grid", [FINE, COARSE])
def test_any_block_size_is_the_plain_column_loop(make_cfg, block, grid):
    """Codes are those of optimal brain quantization, one column at a time, at any block size."""
    W, H = weights(3, 6, 24), gram(3, 24)
    Q, scale = quantize(make_cfg(gptq_block_size=block), W, H, grid)
    want = [slow_codes(w, h, s.float(), grid[0], 0.01) for w, h, s in zip(W, H, scale)]
    assert torch.equal(Q, torch.stack(want))
    assert not torch.equal(Q, nearest(W, scale, grid[0]))


def test_the_limit_is_reached_and_kept(cfg):
    """A coarse grid has codes at its limit on both sides, and none beyond."""
    Q, _ = quantize(cfg, weights(3, 6, 24), gram(3, 24), COARSE)
    assert Q.min() == -3 and Q.max() == 3


@pytest.mark.parametrize("power", [1.0, 37.0])
@pytest.mark.parametrize("grid", [FINE, COARSE])
def test_white_inputs_mean_rounding_to_nearest(cfg, power, grid):
    """With H a multiple of I there is nothing to fold errors into."""
    W = weights(2, 8, 40)
    Q, scale = quantize(cfg, W, power * torch.eye(40).repeat(2, 1, 1), grid)
    assert torch.equal(Q, nearest(W, scale, grid[0]))


@pytest.mark.parametrize("seed", range(5))
def test_weighted_error_is_below_rounding_to_nearest(cfg, seed):
    """On correlated inputs every matrix of a stack errs less than when rounded to nearest."""
    W, H = weights(4, 16, 48, seed), gram(4, 48, seed=seed)
    Q, scale = quantize(cfg, W, H, (4, 4.0))
    plain = weighted_error(W, nearest(W, scale, 4), scale, H)
    assert (weighted_error(W, Q, scale, H) < 0.9 * plain).all()


def test_arguments_are_untouched(cfg):
    """Neither the weights nor the Hessians given are changed, dead inputs included."""
    W, H = weights(2, 6, 24), gram(2, 24)
    H[:, 3], H[:, :, 3] = 0, 0
    kept = W.clone(), H.clone()
    quantize(cfg, W, H)
    assert torch.equal(W, kept[0]) and torch.equal(H, kept[1])


def test_the_column_loop_works_on_a_copy():
    """gptq leaves the weights, factor and scale that it is given as they were."""
    given = weights(2, 6, 24), torch.eye(24).triu().repeat(2, 1, 1) + 0.1, torch.full((2, 6), 0.1)
    kept = [x.clone() for x in given]
    train_gpt.gptq(*given, 31, 8)
    assert all(map(torch.equal, given, kept))


def test_dead_inputs_get_code_zero_and_leave_the_others_alone(cfg):
    """An input that never fired has code 0; the rest is quantized as the paper says."""
    W, H = weights(2, 6, 24), gram(2, 24)
    for n, dead in enumerate([[0, 7], [23]]):
        H[n, dead], H[n, :, dead] = 0, 0
    Q, scale = quantize(cfg, W, H)
    assert not Q[0][:, [0, 7]].any() and not Q[1][:, 23].any() and Q[0][:, 23].any()
    for q, w, h, s in zip(Q, W, H, scale):
        assert torch.equal(q, slow_codes(w, h, s.float(), 6, 0.01))


def test_all_inputs_dead(cfg):
    """A matrix whose input is always zero gets code 0 everywhere, and a finite scale."""
    Q, scale = quantize(cfg, weights(1, 4, 8), torch.zeros(1, 8, 8))
    assert not Q.any() and scale.isfinite().all()


def test_a_constant_row_stays_finite(cfg):
    """A row without spread, as of a new layer, has a positive scale that fp16 can hold."""
    Q, scale = quantize(cfg, torch.zeros(1, 4, 8), gram(1, 8))
    assert not Q.any() and (scale > 0).all()


def test_columns_go_in_order_of_power(cfg):
    """The most powerful column is rounded to nearest: no error was there to fold into it."""
    W, H = weights(3, 64, 24), gram(3, 24)
    Q, scale = quantize(cfg, W, H)
    plain = nearest(W, scale, 6)
    for n, order in enumerate(H.diagonal(dim1=1, dim2=2).argsort(descending=True)):
        assert torch.equal(Q[n, :, order[0]], plain[n, :, order[0]])
        assert not torch.equal(Q[n, :, order[-1]], plain[n, :, order[-1]])


def test_order_of_the_inputs_does_not_matter(cfg):
    """Inputs given in another order get the same codes, in that order."""
    W, H, p = weights(2, 6, 24), gram(2, 24), torch.randperm(24)
    Q, scale = quantize(cfg, W, H)
    moved, _ = quantize(cfg, W[:, :, p], H[:, p][:, :, p])
    assert torch.equal(moved, Q[:, :, p])


def test_scale_is_rounded_before_use(cfg):
    """Codes belong to the fp16 scale that is stored, which is so many deviations of the row."""
    W = weights(1, 64, 512)
    Q, scale = quantize(cfg, W, torch.eye(512)[None])
    exact = 12.85 / 31 * W.double().std(2)
    assert scale.dtype == torch.half and torch.equal(scale, exact.float().half())
    assert torch.equal(Q, nearest(W, scale, 6))
    assert not torch.equal(Q, nearest(W, exact, 6)), "the example cannot tell the two apart"


# ------------------------------------------------------------------------------------------------
# Damping and failure
# ------------------------------------------------------------------------------------------------

def bent(I: int, least: float) -> torch.Tensor:
    """A symmetric matrix (1, I, I) of mean diagonal 1 whose smallest eigenvalue is `least`."""
    values = torch.full((I,), (I - least) / (I - 1), dtype=torch.float64)
    values[0] = least
    basis = torch.linalg.qr(torch.randn(I, I, dtype=torch.float64)).Q
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
def test_damping_is_raised_tenfold_and_logged(make_cfg, quiet, least, tries):
    """A Hessian that is not positive definite gets more damping; nothing else changes."""
    W, H = weights(1, 6, 24), bent(24, least)
    Q, _ = quantize(make_cfg(gptq_damping=0.01), W, H, log=quiet)
    told = [(e["matrix"], e["damping"]) for e in quiet.of("damping")]
    assert told == [("a stack", pytest.approx(0.01 * 10 ** i)) for i in range(tries)]
    direct, _ = quantize(make_cfg(gptq_damping=0.01 * 10 ** tries), W, H)
    assert torch.equal(Q, direct)


@pytest.mark.parametrize("H", [bent(24, -3.0), torch.full((1, 24, 24), math.nan)])
def test_a_hopeless_hessian_is_an_error(cfg, quiet, H):
    """After a hundredfold damping comes QuantError with name, pivot and remedy, nothing else."""
    with pytest.raises(QuantError, match=r"a stack: .* of 24.*raise GPTQ_DAMPING \(now 0.01\)"):
        quantize(cfg, weights(1, 6, 24), H, log=quiet)
    assert [e["damping"] for e in quiet.of("damping")] == pytest.approx([0.01, 0.1, 1.0])


def test_one_bad_matrix_of_a_stack_is_seen(cfg):
    """A stack with a single broken Hessian is refused as a whole."""
    H = torch.cat([gram(2, 24), bent(24, -3.0)])
    with pytest.raises(QuantError):
        quantize(cfg, weights(3, 6, 24), H)


# ------------------------------------------------------------------------------------------------
# Hessians
# ------------------------------------------------------------------------------------------------

def read_batches(run, count: int) -> list[torch.Tensor]:
    """The first batches of a rank, (B, T + 1) each."""
    shards = train_gpt.open_shards(run.cfg, "train", run.clock, run.log)
    batches = train_gpt.Batches(run.cfg, shards, run.dist)
    rows = [batches.next() for _ in range(count)]
    batches.close()
    return rows


def hessians_of(run, count: int) -> dict[str, torch.Tensor]:
    """What the program collects from the first batches."""
    return train_gpt.collect_hessians(run, SimpleNamespace(next=iter(
        read_batches(run, count)).__next__), count)


def tap(module, keep: list, make=lambda x: x):
    """Have `module` leave `make` of its first argument in `keep` whenever it is called."""
    module.register_forward_pre_hook(
        lambda _, args: keep.append(make(args[0].detach().flatten(0, 1))))


def tapped_inputs(run, rows) -> dict[str, list[torch.Tensor]]:
    """Inputs (B T, I) of every matrix in looped passes over rows, one entry a pass over a layer."""
    seen = {name: [] for name in (*run.flat.groups["matrices"], "tok_emb")}
    for i, layer in enumerate(run.model.layers):
        for matrix in ("c_q", "c_k", "c_v"):
            tap(layer.attn, seen[f"layers.{i}.attn.{matrix}.weight"])
        tap(layer.attn.proj, seen[f"layers.{i}.attn.proj.weight"])
        tap(layer.mlp, seen[f"layers.{i}.mlp.fc.weight"])
        up = layer.mlp.fc.weight.detach()
        tap(layer.mlp, seen[f"layers.{i}.mlp.proj.weight"],
            lambda x, up=up: torch.where(x @ up.T > 0, x @ up.T, x @ up.T / 2) ** 2)
    with torch.no_grad():
        seen["tok_emb"] = [run.model.features(r[:, :-1], True).flatten(0, 1) for r in rows]
    return seen


def test_hessians_are_sums_over_tokens_of_every_pass(make_cfg, make_run):
    """Token after token, x x^T of each matrix, recurrent layers once a pass, two batches in all."""
    run = make_run(make_cfg(seq_len=8, train_batch_tokens=64, num_loops=2, ttt_chunk_tokens=64))
    stirred(run)
    found = hessians_of(run, 2)
    seen = tapped_inputs(run, read_batches(run, 2))
    passes = {len(v) for k, v in seen.items() if k.startswith("layers.1.")}
    assert passes == {6} and len(seen["layers.0.mlp.fc.weight"]) == 2
    assert found.keys() == seen.keys()
    for name, inputs in seen.items():
        want = sum(torch.outer(x, x) for x in torch.cat(inputs))
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-3, msg=name)


def test_matrices_of_one_input_share_a_hessian(cfg, make_run):
    """Query, key and value of a layer have one tensor; no other two matrices do."""
    found = hessians_of(make_run(cfg), 1)
    qkv = [found[f"layers.0.attn.{n}.weight"] for n in ("c_q", "c_k", "c_v")]
    assert qkv[0] is qkv[1] is qkv[2]
    assert len({id(H) for H in found.values()}) == len(found) - 2 * cfg.num_layers


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


def test_calibration_ends_in_time(cfg, make_run, quiet):
    """With next to no time left one batch is used, and the log says how many were wanted."""
    run = make_run(cfg)
    loader = SimpleNamespace(next=iter(read_batches(run, 2)).__next__)
    cut = train_gpt.collect_hessians(run, loader, 2, 1e-9)
    assert torch.equal(cut["tok_emb"], hessians_of(run, 1)["tok_emb"])
    assert [(e["batches"], e["wanted"]) for e in quiet.of("hessians_cut")] == [(1, 2)]


# ------------------------------------------------------------------------------------------------
# The whole model, and its size
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codes, want", [
    ([7] * 100, 0.0), ([-127, 127] * 50, 100 / 8), (list(range(-31, 33)) * 5, 320 * 6 / 8),
    ([1, 2, 2, 2], (math.log2(4) + 3 * math.log2(4 / 3)) / 8)])
def test_entropy_in_closed_form(codes, want):
    """Bytes of an ideal coder: n log2(k) / 8 for k equally frequent codes, 0 for a single one."""
    found = train_gpt.entropy_bytes(torch.tensor(codes, dtype=torch.int8))
    assert found == pytest.approx(want, abs=1e-9)


@pytest.fixture
def trained(cfg, make_run, monkeypatch) -> SimpleNamespace:
    """A run with random weights as if trained, its Hessians, and code that counts 1,000 bytes."""
    monkeypatch.setattr(train_gpt, "own_source", lambda: "x" * 1000)
    run = stirred(make_run(cfg))
    result = train_gpt.Trained(run.flat.data.clone(), run.flat.data.clone(), {}, 1.0, 6)
    return SimpleNamespace(run=run, result=result, hessians=hessians_of(run, 2))


def fit(trained, **settings) -> list[bytes]:
    """Parts of the artifact under other settings."""
    cfg = train_gpt.Config(**{**vars(trained.run.cfg), **settings})
    return train_gpt.fit_artifact(trained.run._replace(cfg=cfg), trained.result, trained.hessians)


def size_of(parts: list[bytes]) -> int:
    """Bytes of an artifact and its code."""
    return sum(map(len, parts)) + 1000


def test_rows_tell_what_rounding_did(trained, cfg):
    """Mean squared error over variance, codes at the limit and entropy are those of the tensors."""
    flat, average = trained.run.flat, trained.result.average
    tensors, rows = train_gpt.quantize_model(trained.run, average, trained.hessians, 2.0)
    assert sorted(row["name"] for row in rows) == sorted([*flat.groups["matrices"], "tok_emb"])
    for row in rows:
        w, q = flat.named(average)[row["name"]], tensors[row["name"]].float()
        error = w - q * tensors[row["name"] + ".scale"].float()[:, None]
        limit = 127 if row["name"] == "tok_emb" else 31
        assert row["mse"] == pytest.approx(float(error.square().mean() / w.var()), rel=1e-5)
        assert row["clip_frac"] == pytest.approx(float((q.abs() == limit).float().mean()))
    assert any(row["clip_frac"] > 0.01 for row in rows)


def test_a_matrix_of_zeros_has_no_error(trained):
    """Where nothing was learnt nothing is lost, and the log's numbers stay numbers."""
    flat, average = trained.run.flat, trained.result.average.clone()
    name = flat.groups["matrices"][0]
    flat.named(average)[name].zero_()
    _, rows = train_gpt.quantize_model(trained.run, average, trained.hessians, 12.85)
    assert {row["name"]: row["mse"] for row in rows}[name] == 0.0
    assert all(math.isfinite(value) for row in rows for value in list(row.values())[1:])


def test_dequantized_weights_are_near_the_average(trained):
    """What an artifact's tensors stand for: codes times scales, and vectors rounded to fp16."""
    run, average = trained.run, trained.result.average
    tensors, rows = train_gpt.quantize_model(run, average, trained.hessians, 12.85)
    run.flat.data.fill_(math.nan)
    train_gpt.dequantize(tensors, run.flat)
    before, after = run.flat.named(average), run.flat.named(run.flat.data)
    for row in rows:
        w, v = before[row["name"]], after[row["name"]]
        assert float((v - w).square().mean() / w.var()) == pytest.approx(row["mse"], rel=1e-4)
    for name in run.flat.groups["vectors"]:
        assert torch.equal(after[name], before[name].half().float())


@pytest.mark.parametrize("target", [38_000, 48_000, 60_000])
def test_the_clip_search_fills_the_target(trained, quiet, monkeypatch, target):
    """Without a clip of its own the artifact ends below the target and within the slack of it."""
    monkeypatch.setattr(train_gpt, "CLIP_SLACK", 800)
    parts = fit(trained, matrix_clip_sigmas=0.0, target_bytes=target)
    assert target - 800 <= size_of(parts) <= target
    tries = quiet.of("compress")
    assert tries[-1]["total_bytes"] == size_of(parts) and len(tries) <= train_gpt.MOST_CLIPS
    assert (tries[-1]["matrix_clip_sigmas"] > 12.85) == (tries[0]["total_bytes"] > target)


def test_the_search_ends_at_the_finest_clip(trained, quiet):
    """Where there is more room than a model needs, the clip ends at its least."""
    fit(trained, matrix_clip_sigmas=0.0, target_bytes=10 ** 7)
    assert quiet.of("compress")[-1]["matrix_clip_sigmas"] == train_gpt.LEAST_CLIP
    assert {row["clip_sigmas"] for row in quiet.of("matrix")} == {train_gpt.LEAST_CLIP, 20.0}


@pytest.mark.parametrize("clip", [5.0, 30.0])
def test_an_explicit_clip_is_kept(trained, quiet, clip):
    """MATRIX_CLIP_SIGMAS is used as it is, once, whatever room is left."""
    fit(trained, matrix_clip_sigmas=clip)
    assert [e["matrix_clip_sigmas"] for e in quiet.of("compress")] == [clip]


@pytest.mark.parametrize("clip", [12.85, 0.0])
def test_too_large_is_an_error_with_both_numbers(trained, quiet, clip):
    """An artifact over the target is refused: what it takes and what it may take are told."""
    with pytest.raises(SizeError) as caught:
        fit(trained, matrix_clip_sigmas=clip, target_bytes=11_000)
    told = list(map(int, re.findall(r"\d+", str(caught.value))))
    assert told[0] + told[1] == told[2] == quiet.of("compress")[-1]["total_bytes"] > 11_000
    assert told[1] == 1000 and "TARGET_BYTES=11000" in str(caught.value)
    assert not quiet.of("matrix")


# ------------------------------------------------------------------------------------------------
# What mutations of train_gpt.py showed to be unclaimed
# ------------------------------------------------------------------------------------------------

def test_gptq_itself_leaves_the_weights_alone():
    """Errors are folded into a copy, also where the caller hands in its only one."""
    W, U = weights(2, 6, 24), torch.randn(2, 24, 24).triu() + 5 * torch.eye(24)
    kept = W.clone()
    train_gpt.gptq(W, U, torch.full((2, 6), 0.1), 31, 5)
    assert torch.equal(W, kept)


@pytest.mark.parametrize("slower, seconds, used", [(0, 0.0, 4), (0, 41.0, 4), (0, 39.0, 3),
                                                   (0, 21.0, 2), (0, 19.0, 1), (25, 41.0, 1)])
def test_no_batch_is_begun_that_would_end_late(cfg, make_run, quiet, monkeypatch, slower, seconds,
                                               used):
    """At 10 s a batch, or what the slowest rank takes, the last one still ends in time."""
    run, ticks = make_run(cfg), SimpleNamespace(now=0.0, read=0)
    rows = read_batches(run, 1)[0]

    def next_batch():
        """A batch that takes ten seconds."""
        ticks.now, ticks.read = ticks.now + 10.0, ticks.read + 1
        return rows
    run.dist.max = lambda spent: spent + slower
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: ticks.now)
    train_gpt.collect_hessians(run, SimpleNamespace(next=next_batch), 4, seconds)
    assert ticks.read == used and len(quiet.of("hessians_cut")) == (used < 4)


@pytest.mark.parametrize("bits", [3, 6, 8])
def test_matrix_bits_are_those_asked_for(trained, bits):
    """MATRIX_BITS bounds the codes of matrices, and of nothing else."""
    cfg = train_gpt.Config(**{**vars(trained.run.cfg), "matrix_bits": bits})
    tensors, rows = train_gpt.quantize_model(trained.run._replace(cfg=cfg), trained.result.average,
                                             trained.hessians, 2.0)
    for row in rows:
        want = 8 if row["name"] == "tok_emb" else bits
        assert row["bits"] == want and tensors[row["name"]].abs().max() <= 2 ** (want - 1) - 1
    assert max(int(tensors[r["name"]].abs().max()) for r in rows[:-1]) == 2 ** (bits - 1) - 1


def test_every_matrix_has_its_own_codes(trained):
    """The codes under a name are those of the matrix of that name: rounding costs little."""
    _, rows = train_gpt.quantize_model(trained.run, trained.result.average, trained.hessians, 6.0)
    assert max(row["mse"] for row in rows) < 0.1


def test_the_average_is_what_is_quantized(trained):
    """The artifact holds the weight average, not the weights of the last step."""
    want = fit(trained)
    trained.result.weights.normal_()
    assert fit(trained) == want
    trained.result.average.add_(0.1 * torch.randn(len(trained.result.average)))
    assert fit(trained) != want
