"""train_gpt.py, Optimizer: Muon and AdamW against slow ones, groups, ranks, schedules, averages.

Run alone: python -m pytest -q tests/test_optim.py
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARTS
from torch import nn

import train_gpt
from train_gpt import GPT, Config, Flat, Muon, Schedule, TrainState, orthogonalize

CPU = torch.device("cpu")
TALL, WIDE, SQUARE = (96, 32), (32, 96), (48, 48)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world` whose `all_gather` returns its own part, remembered in `parts`."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.parts = rank, world, []
    dist.all_gather = lambda part: dist.parts.append(part) or part
    return dist


def stirred_flat(cfg: Config, seed: int = 0) -> Flat:
    """The flat parameters of a tiny model, all of them random."""
    flat = Flat(GPT(cfg), CPU)
    rng = torch.Generator().manual_seed(seed)
    flat.data.copy_(0.1 * torch.randn(len(flat.data), generator=rng))
    return flat


def optimizers_of(cfg: Config, flat: Flat) -> dict:
    """The optimiser of each group, as training has them."""
    rt = SimpleNamespace(dist=train_gpt.Dist({}))
    return TrainState(SimpleNamespace(cfg=cfg, flat=flat, rt=rt), 1, False).optimizers


class Optimizers:
    """All optimisers of a tiny model with random weights."""

    def __init__(self, cfg: Config):
        self.cfg, self.flat = cfg, stirred_flat(cfg)
        self.all = optimizers_of(cfg, self.flat).values()

    def step(self, gradient: torch.Tensor, lr_scale: float = 1.0, momentum: float = 0.95):
        """One step of all on a flat gradient."""
        self.flat.grad.copy_(gradient)
        for optimizer in self.all:
            optimizer.step(lr_scale, momentum)

    def states(self) -> list[torch.Tensor]:
        """All tensors that the optimisers remember."""
        return [t for optimizer in self.all for t in optimizer.state.values()]


def gradients(flat: Flat, count: int) -> list[torch.Tensor]:
    """Random flat gradients, the same every time."""
    rng = torch.Generator().manual_seed(3)
    return [0.02 * torch.randn(len(flat.data), generator=rng) for _ in range(count)]


# ------------------------------------------------------------------------------------------------
# Orthogonalisation
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [TALL, WIDE, (200, 20), (20, 200), (1, 30), (30, 1)])
@pytest.mark.parametrize("row_normalize", [False, True])
def test_singular_values_end_in_a_band(shape, row_normalize):
    """Whatever the scale of a matrix, wide or tall, its singular values come out around 1."""
    G = torch.randn(4, *shape) * torch.tensor([1e-4, 0.3, 1.0, 1e4])[:, None, None]
    values = torch.linalg.svdvals(orthogonalize(G, row_normalize, torch.float32))
    assert values.min() > 0.74 and values.max() < 1.26


def test_no_singular_value_explodes():
    """Even those of a square matrix, some next to nothing, stay below the band's upper end."""
    values = torch.linalg.svdvals(orthogonalize(torch.randn(8, *SQUARE), True, torch.float32))
    assert values.max() < 1.26 and values.median() > 0.74


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_directions_are_kept(shape):
    """The result is near U V^T of the singular value decomposition of the gradient."""
    G = torch.randn(2, *shape)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    U2, _, V2 = torch.linalg.svd(orthogonalize(G, False, torch.float32), full_matrices=False)
    torch.testing.assert_close(U2 @ V2, U @ V, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_rows_are_normalized_first(shape):
    """With row_normalize the lengths of rows make no difference; without it they do."""
    G = torch.randn(2, *shape)
    scaled = G * torch.rand(2, shape[0], 1).add(0.1)
    for normalize in (True, False):
        a, b = (orthogonalize(x, normalize, torch.float32) for x in (G, scaled))
        assert torch.allclose(a, b, atol=1e-3) == normalize


@pytest.mark.parametrize("row_normalize", [False, True])
def test_zero_matrices_are_safe(row_normalize):
    """A matrix or a row without gradient gives zeros, and leaves its neighbours alone."""
    G = torch.randn(3, 8, 16)
    G[1], G[2, 3] = 0, 0
    out = orthogonalize(G, row_normalize, torch.float32)
    assert not out[1].any() and not out[2, 3].any() and out.isfinite().all()
    torch.testing.assert_close(out[:1], orthogonalize(G[:1], row_normalize, torch.float32))


def test_orthogonalize_leaves_its_input_alone():
    """The gradient is not modified, and the result has the dtype asked for."""
    for shape in (TALL, WIDE):
        G = torch.randn(2, *shape)
        before = G.clone()
        assert orthogonalize(G, True, torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(G, before)


# ------------------------------------------------------------------------------------------------
# Steps, against slow ones
# ------------------------------------------------------------------------------------------------

def slow_muon(W, gradients, rates, cfg: Config):
    """Muon with row normalisation on one matrix, in float64."""
    M, (rows, cols) = np.zeros(W.shape), W.shape
    for G, (lr_scale, mu) in zip(gradients, rates):
        lr = cfg.matrix_lr * lr_scale
        M = mu * M + G
        U = G + mu * M
        U = np.array([row / max(math.sqrt((row ** 2).sum()), 1e-7) for row in U])
        X = U / (math.sqrt((U ** 2).sum()) + 1e-7)
        X = X.T if rows > cols else X
        for a, b, c in train_gpt.QUINTICS:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        X = X.T if rows > cols else X
        W = W * (1 - lr * cfg.muon_wd) - lr * math.sqrt(max(1, rows / cols)) * X
    return W


def test_muon_equals_a_slow_one(cfg):
    """Every matrix moves as the formula says, over steps of changing rate and momentum."""
    ours = Optimizers(cfg)
    flat, rates = ours.flat, [(1.0, 0.92), (0.5, 0.95), (1.0, 0.99), (0.0, 0.9)]
    start, steps = flat.data.clone(), gradients(flat, 4)
    for gradient, rate in zip(steps, rates):
        ours.step(gradient, *rate)
    for name in flat.groups["muon"]:
        W, *G = (flat.named(v)[name].double().numpy() for v in (start, *steps))
        expected = torch.from_numpy(slow_muon(W, G, rates, ours.cfg)).float()
        torch.testing.assert_close(flat.named(flat.data)[name], expected, atol=3e-5, rtol=0)


def test_adamw_equals_torchs_parameter_by_parameter(cfg):
    """Embedding and vectors move as under torch.optim.AdamW with the rates of their group."""
    ours, scales = Optimizers(cfg), [1.0, 0.5, 0.25]
    flat, theirs = ours.flat, {}
    rates = dict(embed=(cfg.tied_embed_lr, cfg.embed_wd), scalar=(cfg.scalar_lr, cfg.adam_wd))
    for group, (lr, decay) in rates.items():
        for name in flat.groups[group]:
            p = nn.Parameter(flat.named(flat.data)[name].clone())
            adam = torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
            theirs[name] = p, lr, adam
    for gradient, scale in zip(gradients(flat, 3), scales):
        ours.step(gradient, scale)
        for name, (p, lr, adam) in theirs.items():
            p.grad, adam.param_groups[0]["lr"] = flat.named(gradient)[name].clone(), lr * scale
            adam.step()
    for name, (p, _, _) in theirs.items():
        torch.testing.assert_close(flat.named(flat.data)[name], p.data, atol=1e-7, rtol=1e-6)
    assert len(theirs) + len(flat.groups["muon"]) == len(flat.names)


@pytest.mark.parametrize("field,group", [
    ("matrix_lr", "muon"), ("muon_wd", "muon"), ("muon_row_normalize", "muon"),
    ("tied_embed_lr", "embed"), ("embed_wd", "embed"), ("scalar_lr", "scalar"),
    ("adam_wd", "scalar")])
def test_each_setting_moves_its_group_only(make_cfg, field, group):
    """A rate, a decay or a kind of step changes the weights of one group and no other."""
    value = getattr(Config(), field)
    results = []
    for cfg in (make_cfg(), make_cfg(**{field: not value if type(value) is bool else 2 * value})):
        ours = Optimizers(cfg)
        ours.step(gradients(ours.flat, 1)[0])
        results.append(ours.flat.data)
    for name in ours.flat.groups:
        same = torch.equal(*(ours.flat.part(data, name) for data in results))
        assert same == (name != group), name


def test_rate_zero_moves_nothing(cfg):
    """At the end of a warm-down to 0 a step leaves every weight where it is."""
    ours = Optimizers(cfg)
    before = ours.flat.data.clone()
    ours.step(gradients(ours.flat, 1)[0], lr_scale=0.0)
    assert torch.equal(ours.flat.data, before)


def test_steps_continue_from_a_state(cfg):
    """With weights and states of another, optimisers make the same next steps, bit for bit.

    With the weights alone they do not: fresh optimisers remember nothing.
    """
    ours, other, fresh = (Optimizers(cfg) for _ in range(3))
    steps = gradients(ours.flat, 4)
    for gradient in steps[:2]:
        ours.step(gradient)
    for copy in (other, fresh):
        copy.flat.data.copy_(ours.flat.data)
    for mine, theirs in zip(other.states(), ours.states(), strict=True):
        mine.copy_(theirs)
    for gradient in steps[2:]:
        for optimizers in (ours, other, fresh):
            optimizers.step(gradient)
    assert torch.equal(other.flat.data, ours.flat.data)
    for group in ours.flat.groups:
        assert not torch.equal(*(o.flat.part(o.flat.data, group) for o in (fresh, ours))), group


def test_another_optimiser_is_named_in_one_place(cfg, make_run, quiet, monkeypatch):
    """The log takes an optimiser's name from its class, and a checkpoint those of its tensors."""
    class Lion(train_gpt.AdamW):
        """A third kind of optimiser."""
    monkeypatch.setitem(train_gpt.OPTIMIZERS, "embed", Lion)
    names = set(TrainState(make_run(cfg), 10, True).tensors())
    logged = [(v["name"], v["optimizer"]) for event, v in quiet.events if event == "group"]
    assert logged == [("muon", "muon"), ("embed", "lion"), ("scalar", "adamw")]
    assert names == {"weights", "ema", "trail", "muon.momentum", *(
        f"{group}.{name}" for group in ("embed", "scalar")
        for name in ("step", "exp_avg", "exp_avg_sq"))}


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("N", [1, 3, 8])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_ranks_split_a_stack(cfg, world, N, shape):
    """The ranks' equal parts together are what one rank computes, whatever is left to the last."""
    flat, G = stirred_flat(cfg), torch.randn(N, *shape)
    alone = Muon(cfg, flat, train_gpt.Dist({}), "muon").orthogonalize_sharded(G)
    dists = [ranked(rank, world) for rank in range(world)]
    for dist in dists:
        Muon(cfg, flat, dist, "muon").orthogonalize_sharded(G)
    parts = [part for dist in dists for part in dist.parts]
    assert {p.shape for p in parts} == {(-(-N // world), *shape)} and len(parts) == world
    torch.testing.assert_close(torch.cat(parts)[:N], alone, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------
# The flat vector
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", PARTS)
def test_every_parameter_is_in_one_group(make_cfg, recipe):
    """In every recipe the groups hold each parameter once: matrices, token tables, all else."""
    model = GPT(make_cfg(**PARTS[recipe]))
    flat, named = Flat(model, CPU), dict(model.named_parameters())
    assert sorted(flat.names) == sorted(named) == sorted(sum(flat.groups.values(), []))
    assert sum(len(flat.part(flat.data, group)) for group in flat.groups) == len(flat.data)
    for name, p in named.items():
        group = ("muon" if name.endswith(".weight") else
                 "embed" if name.endswith("_emb") else "scalar")
        assert name in flat.groups[group] and (p.dim() == 2 or group == "scalar"), name


def test_a_parameter_without_a_group_raises(cfg):
    """A parameter that declares no group, or an unknown one, cannot be forgotten."""
    for group in ("scalars", None):
        model = GPT(cfg)
        model.layers[0].mystery = train_gpt.param(torch.zeros(3), group)
        with pytest.raises(KeyError, match=str(group)):
            optimizers_of(cfg, Flat(model, CPU))


def test_flat_keeps_the_model(cfg):
    """Moving the parameters into the vector changes none of them, nor what the model computes."""
    plain, model = GPT(cfg), GPT(cfg)
    flat = Flat(model, CPU)
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), p), name
        assert torch.equal(flat.named(flat.data)[name], p), name
    ids = torch.randint(cfg.vocab_size, (2, 9))
    assert torch.equal(model(ids), plain(ids))


def test_flat_aliases_the_parameters(cfg):
    """Writing into the vector, its parts, stacks or names is writing into the model."""
    model = GPT(cfg)
    flat = Flat(model, CPU)
    flat.data.copy_(torch.arange(len(flat.data)))
    for name, p in model.named_parameters():
        assert torch.equal(p, flat.named(flat.data)[name]), name
    assert len({p.data_ptr() for p in model.parameters()}) == len(flat.names)
    for write in (lambda: flat.part(flat.data, "scalar"), lambda: flat.named(flat.data)["tok_emb"],
                  lambda: flat.stacks(flat.data)[0][1][-1]):
        before = [p.detach().clone() for p in model.parameters()]
        changed = write()
        changed.add_(1.0)
        moved = sum((p != b).sum().item() for p, b in zip(model.parameters(), before))
        assert moved == changed.numel()


def test_backward_fills_the_flat_gradient(cfg):
    """Gradients replace those before or add up, at their parameters' places, the loss behind."""
    model = GPT(cfg)
    flat = Flat(model, CPU)
    flat.buffer.fill_(7.0)
    ids = torch.randint(cfg.vocab_size, (2, 9))
    for add in (False, True):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        flat.backward(loss, add)
    twin = GPT(cfg)
    twin(ids[:, :-1], ids[:, 1:]).mean().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(flat.named(flat.grad)[name], 2 * p.grad, msg=name)
    assert flat.loss.item() == flat.buffer[-1].item() == 2 * loss.item()
    flat.buffer.zero_()
    assert not any(p.grad.any() for p in model.parameters())


def test_stacks_hold_matrices_of_one_shape(cfg):
    """Each stack's rows are the named matrices; every matrix is in one stack, one a shape."""
    flat = stirred_flat(cfg)
    named, stacks = flat.named(flat.data), flat.stacks(flat.data)
    for names, W in stacks:
        assert len(names) == len(W)
        assert all(torch.equal(named[n], w) for n, w in zip(names, W))
    assert [n for names, _ in stacks for n in names] == flat.groups["muon"]
    assert len({W.shape[1:] for _, W in stacks}) == len(stacks)


# ------------------------------------------------------------------------------------------------
# Gradient clipping
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length,limit,after", [(2.0, 0.3, 0.3), (0.2, 0.3, 0.2), (2.0, 0.0, 2.0),
                                                (0.0, 0.3, 0.0), (1e10, 1.0, 1.0)])
def test_long_gradients_are_shortened(length, limit, after):
    """A gradient longer than the limit ends at it, in its direction; 0 is no limit."""
    direction = nn.functional.normalize(torch.randn(1000), dim=0)
    grad = length * direction
    train_gpt.clip_gradient_(grad, limit)
    torch.testing.assert_close(grad, after * direction, atol=1e-6, rtol=1e-4)


def test_clipping_is_exact_at_full_size():
    """The gradient of the challenge's model ends within 1e-6 of the limit, measured in float64."""
    grad = torch.rand(1 << 20).repeat(35)                   # 36.7 M values
    train_gpt.clip_gradient_(grad, 0.3)
    norm = math.sqrt(sum(float(part.double() @ part.double()) for part in grad.split(1 << 20)))
    assert norm == pytest.approx(0.3, rel=1e-6)


def test_the_whole_gradient_is_clipped_at_once(make_cfg, make_run):
    """After a step's backward pass all parameters' gradients together have the limit's length."""
    lengths = {}
    for limit in (0.0, 0.05):
        cfg = make_cfg(grad_clip_norm=limit)
        run = make_run(cfg)
        rows = torch.randint(cfg.vocab_size, (8, 33), generator=torch.Generator().manual_seed(0))
        train_gpt.forward_backward(run, rows, False)
        lengths[limit] = run.flat.grad.norm().item()
    assert lengths[0.0] > 0.1 and lengths[0.05] == pytest.approx(0.05, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("warmdown,floor,progress,scale", [
    (0.72, 0.0, 0.0, 1.0), (0.72, 0.0, 0.28, 1.0), (0.72, 0.0, 0.64, 0.5), (0.72, 0.0, 1.0, 0.0),
    (0.72, 0.0, 1.01, 0.0), (0.72, 0.1, 0.64, 0.5), (0.72, 0.1, 0.99, 0.1), (1.0, 0.0, 0.25, 0.75),
    (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0)])
def test_learning_rate_falls_in_a_straight_line(make_cfg, warmdown, floor, progress, scale):
    """1 until the warm-down, then straight to min_lr at the end, and never below it."""
    schedule = Schedule(make_cfg(warmdown_frac=warmdown, min_lr=floor), 100, True)
    assert schedule.lr_scale(progress) == pytest.approx(scale)


@pytest.mark.parametrize("steps,step,momentum", [
    (1000, 0, 0.92), (1000, 165, 0.955), (1000, 330, 0.99), (1000, 999, 0.99), (4000, 660, 0.955),
    (10000, 750, 0.955), (1, 0, 0.92), (1, 1, 0.99)])
def test_momentum_rises_in_a_straight_line(cfg, steps, step, momentum):
    """From 0.92 to 0.99 over the first 0.33 of the expected steps, at most 1,500."""
    assert Schedule(cfg, steps, True).momentum(step) == pytest.approx(momentum)


def test_momentum_without_warm_up(make_cfg):
    """A warm-up of no length is over at step 0."""
    schedule = Schedule(make_cfg(muon_momentum_warmup_frac=0.0), 100, True)
    assert schedule.momentum(0) == pytest.approx(0.99)


def test_recurrence_starts_on_time(make_cfg):
    """Layers loop from the set part of training on, from the start if 0, never if switched off."""
    at = lambda progress, on=True, **o: Schedule(make_cfg(**o), 100, on).looped(progress)
    assert [at(p) for p in (0.0, 0.349, 0.35, 1.0)] == [False, False, True, True]
    assert at(0.0, enable_looping_at=0.0) and not at(0.99, enable_looping_at=1.0)
    assert not at(1.0, on=False)


@pytest.mark.parametrize("frac,steps,decay", [
    (0.063, 4550, 1 - 1 / 286.65), (0.5, 10, 0.8), (0.0, 100, 0.0), (0.1, 10, 0.0),
    (0.01, 10, 0.0)])
def test_average_remembers_a_part_of_the_run(make_cfg, frac, steps, decay):
    """An average's horizon is a share of the expected steps; below one it has none."""
    assert Schedule(make_cfg(), steps, True).decay(frac) == pytest.approx(decay)


@pytest.mark.parametrize("steps", [1, 628, 2133, 2134, 100_000])
def test_averages_see_enough_of_a_run(make_cfg, steps):
    """16 samples or more within the shorter horizon, or every step, as at the start of any run."""
    every = Schedule(make_cfg(), steps, True).average_every
    assert every(1) == every(63) == 1
    assert every(64) == every(4000) == (4 if steps >= 2134 else 1)
    assert every(4000) == 1 or 16 * every(4000) <= Schedule.TRAIL * steps


def test_average_of_every_fourth_step(make_cfg, make_run):
    """It forgets as fast as one that sees every step."""
    run = make_run(make_cfg(ema_horizon_frac=0.004, lookahead=0.5))
    rows, state = torch.randint(run.cfg.vocab_size, (8, 33)), TrainState(run, 10_000, True)
    state.step = 64
    before = run.flat.data.clone()
    for _ in range(4):
        assert torch.equal(state.ema, before) and torch.equal(state.trail, before)
        state.train_step(rows, 0.0)
    for average, horizon in (state.ema, 40), (state.trail, 300):
        d = (1 - 1 / horizon) ** 4
        expected = d * before + (1 - d) * run.flat.data
        torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frac", [0.0, 0.4])
def test_average_of_the_weights_in_closed_form(make_cfg, make_run, frac):
    """After n steps it is d^n w0 + (1 - d) sum d^(n-i) wi; without a horizon, the last weights."""
    run = make_run(make_cfg(ema_horizon_frac=frac))
    rows, state = torch.randint(run.cfg.vocab_size, (8, 33)), TrainState(run, 10, True)
    weights = [run.flat.data.clone()]
    for _ in range(4):
        state.train_step(rows, 0.0)
        weights.append(run.flat.data.clone())
    d = 0.75 if frac else 0.0
    expected = d ** 4 * weights[0] + (1 - d) * sum(d ** (4 - i) * weights[i] for i in range(1, 5))
    torch.testing.assert_close(state.ema, expected, atol=1e-6, rtol=1e-5)
    assert state.step == 4 and not torch.equal(weights[3], weights[4])


def test_lookahead_takes_gradients_ahead_and_keeps_the_displacement(make_cfg, make_run):
    """Three steps by hand: a mean of the steps moves the weights before the gradient."""
    run = make_run(make_cfg(lookahead=0.5))
    state = train_gpt.TrainState(run, 100, False)
    seen, schedule = [], state.schedule
    weights = lambda: run.flat.data.clone()
    rows = torch.randint(2, run.cfg.vocab_size, (8, run.cfg.seq_len + 1))
    true = train_gpt.forward_backward
    try:
        train_gpt.forward_backward = lambda *args: (seen.append(weights()), true(*args))
        first = weights()
        state.train_step(rows, 0.1)                         # too early: only the mean is taken
        second, mean = weights(), (weights() - first) / 3   # over 3 of 100 steps
        torch.testing.assert_close(seen[0], first, atol=0, rtol=0)
        state.train_step(rows, 0.5)
        third = weights()
        torch.testing.assert_close(seen[1], second + 0.5 * schedule.lr_scale(0.5) * mean,
                                   atol=1e-7, rtol=1e-6)
        state.train_step(rows, 0.6)
        mean += (third - second - mean) / 3                 # the step counts from before it
        torch.testing.assert_close(seen[2], third + 0.5 * schedule.lr_scale(0.6) * mean,
                                   atol=1e-7, rtol=1e-6)
    finally:
        train_gpt.forward_backward = true
