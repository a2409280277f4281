"""train_gpt.py, Model: the forward pass against a slow one, causality, initial weights, loss.

Run alone: python -m pytest -q tests/test_model.py
"""
import itertools
import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import PARTS

import train_gpt
from train_gpt import BOS, GPT, Activation, Config, SoftcapNLL, layer_schedule

# Models that differ in every part, at a size for tests: layers, heads, kinds of blocks, skips,
# loops; then the models of the recipes, of which pr1858 has that of pr1876.
SHAPES = {
    "two loops": dict(num_layers=5, num_loops=2, loop_end=3, parallel_residual_start=3),
    "no loop, no gates": dict(num_loops=0, skip_gates_enabled=False),
    "one kv head, all XSA": dict(num_kv_heads=1, xsa_last_n=3, rope_dims=16, qk_gain_init=1.5),
    "no rope, no XSA": dict(num_kv_heads=4, xsa_last_n=0, rope_dims=0, parallel_residual_start=0),
    # Layers 0-2 and 4 see three tokens; layer 3 and the last, 5, see all.
    "windows": dict(num_layers=6, attention_window=3),
}
for name in PARTS.keys() - {"pr1858"}:
    SHAPES[name] = {key: PARTS[name][key] for key in Config().group("model") if key in PARTS[name]}
SHAPES["golf"] |= dict(num_layers=4, attention_window=2)    # the last has two lanes
SECOND = 4                      # where the second document begins in some tests


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def stirred(cfg: Config, dtype=torch.float64) -> GPT:
    """A model whose parameters are all random, none at 0 or 1, so that every part matters."""
    model, rng = GPT(cfg, dtype).to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.copy_(noise * (p.size(1) ** -0.5 if name.endswith(".weight") else 0.5)
                    + (0.7 if p.dim() == 1 or name == "skip_weights" else 0.0))
    return model


def some_tokens(cfg: Config, *shape: int) -> torch.Tensor:
    """Random token ids of a shape (B, T), with a second document from position `SECOND` on."""
    ids = torch.randint(2, cfg.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    ids[:, SECOND:SECOND + 1] = BOS
    return ids


@pytest.fixture(params=sorted(SHAPES))
def shape(request, make_cfg) -> Config:
    """A tiny `Config` of each of the shapes above."""
    return make_cfg(**SHAPES[request.param])


@pytest.fixture(scope="module")
def full_model() -> GPT:
    """The model of the challenge; its orthogonal weights stay zero, as drawing them is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.nn.init, "orthogonal_", lambda weight, generator: weight)
        return GPT(Config())


# ------------------------------------------------------------------------------------------------
# A slow model, one vector at a time
# ------------------------------------------------------------------------------------------------

def slow_norm(x):
    """A vector over its root mean square."""
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + 1e-6)


def slow_rope(x, position: int, dims: int, base: float):
    """A head vector whose channel k < dims/2 and its partner k + dims/2 are turned by position."""
    out, half = x.clone(), dims // 2
    for k in range(half):
        angle = position * base ** (-2 * k / dims)
        a, b = float(x[k]), float(x[k + half])
        out[k] = a * math.cos(angle) + b * math.sin(angle)
        out[k + half] = -a * math.sin(angle) + b * math.cos(angle)
    return out


def slow_head(queries, keys, values, xsa: bool, firsts):
    """Softmax attention of one head from position firsts[t] to t; XSA removes the own value."""
    out = []
    for t, q in enumerate(queries):
        seen = range(firsts[t], t + 1)
        scores = torch.stack([q @ keys[s] for s in seen]) / math.sqrt(len(q))
        y = sum(p * values[s] for p, s in zip(scores.softmax(0), seen))
        if xsa:
            own = values[t] / max(float(values[t].norm()), 1e-12)
            y = y - (y @ own) * own
        out.append(y)
    return out


def slow_gate(x, weight):
    """Sigmoid of the products of the first channels of a vector with the rows of `weight`."""
    return [torch.sigmoid(row @ x[:len(row)]) for row in weight]


def slow_embed(cfg: Config, p: dict, ids: list[int]):
    """Normed embeddings of ids, with hashed pairs and a part of the token before."""
    xs = []
    for t, i in enumerate(ids):
        x = p["tok_emb"][i]
        if cfg.extras_1060:
            last = len(p["extras.pair_emb"]) - 1
            row = ((36313 * i) ^ (27191 * ids[t - 1])) % last if t else last
            x = x + p["extras.pair_scale"] * (p["extras.pair_proj"] @ p["extras.pair_emb"][row])
        xs.append(x)
    inside = [t > 0 and i != 1 for t, i in enumerate(ids)]              # 1 begins a document
    if cfg.smear_channels:
        gates = [p["smear_strength"] * slow_gate(x, p["smear_weight"])[0] for x in xs]
        xs = [x + g * xs[t - 1] if inside[t] else x for t, (x, g) in enumerate(zip(xs, gates))]
    xs = list(map(slow_norm, xs))
    if cfg.extras_1060:
        g, zero = torch.sigmoid(p["extras.smear_gate"]), 0 * xs[0]
        xs = [(1 - g) * x + g * (xs[t - 1] if t else zero) if ids[t] != 1 else x
              for t, x in enumerate(xs)]
    return xs


def slow_values(cfg: Config, p: dict, layer: int, ids: list[int]):
    """What the value embedding adds to the values (K D,) of each position in a layer."""
    if not cfg.extras_1060 or layer < cfg.num_layers - 2:
        return [0.0] * len(ids)
    gain = p[f"layers.{layer}.attn.value_gain"] * p["extras.value_scale"]
    return [gain * (p["extras.value_proj"] @ p["extras.value_emb"][i]) for i in ids]


def slow_firsts(cfg: Config, layer: int, ids):
    """The first position that each position sees in a layer."""
    short = cfg.attention_window and layer not in (3, 7, 11, cfg.num_layers - 1)
    firsts, first = [], 0
    for t, i in enumerate(ids):
        first = t if i == 1 and cfg.documents else first                # 1 begins a document
        firsts.append(max(first, t + 1 - cfg.attention_window) if short else first)
    return firsts


def slow_attention(cfg: Config, p: dict, layer: int, xs, ids):
    """Attention of one layer over a list of vectors (C,)."""
    D, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    name = f"layers.{layer}.attn."
    own = [p[name + "c_v.weight"] @ x + e
           for x, e in zip(xs, slow_values(cfg, p, layer, ids))]
    heads, firsts = [], slow_firsts(cfg, layer, ids)
    for h in range(cfg.num_heads):
        mine, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        turn = lambda x, t: slow_rope(slow_norm(x), t, cfg.rope_dims, cfg.rope_base)
        queries = [turn(p[name + "c_q.weight"][mine] @ x, t) * p[name + "q_gain"][h]
                   for t, x in enumerate(xs)]
        keys = [turn(p[name + "c_k.weight"][shared] @ x, t) for t, x in enumerate(xs)]
        values = [v[shared] for v in own]
        y = slow_head(queries, keys, values, layer >= cfg.num_layers - cfg.xsa_last_n, firsts)
        if cfg.head_gate_channels:
            y = [slow_gate(0.5 * x, p[name + "head_gate"])[h] * v for x, v in zip(xs, y)]
        heads.append(y)
    return [p[name + "proj.weight"] @ torch.cat(y) for y in zip(*heads)]


def slow_mlp(p: dict, layer: int, x):
    """leaky_relu with slope 0.5, squared, between two matrices."""
    h = p[f"layers.{layer}.mlp.fc.weight"] @ x
    return p[f"layers.{layer}.mlp.proj.weight"] @ torch.where(h > 0, h, 0.5 * h) ** 2


def slow_block(cfg: Config, p: dict, layer: int, xs, lanes, x0s, ids):
    """One layer over lists of vectors: both lanes after attention and MLP, in a row or parallel."""
    name, depth = f"layers.{layer}.", 1 / math.sqrt(layer + 1)
    mix = p[name + "resid_mix"]
    hs = [mix[0] * x + mix[1] * x0 for x, x0 in zip(xs, x0s)]
    attended = slow_attention(cfg, p, layer, [slow_norm(h) * depth for h in hs], ids)
    attended = [p[name + "attn_scale"] * a for a in attended]
    us = [h + a for h, a in zip(hs, attended)]
    two = layer >= cfg.num_layers - cfg.two_lanes
    bases = lanes if two else hs if layer >= cfg.parallel_residual_start else us
    after = [p[name + "mlp_scale"] * slow_mlp(p, layer, slow_norm(b) * depth) for b in bases]
    if not two:
        xs = [u + m for u, m in zip(us, after)]
        return xs, xs
    keep, add = p[name + "lane_keep"], p[name + "lane_add"]
    return tuple([keep[k] * x + add[0, k] * a + add[1, k] * m
                  for x, a, m in zip(lane, attended, after)] for k, lane in enumerate((xs, lanes)))


def slow_order(cfg: Config, looped: bool) -> list[int]:
    """Layers in running order: the looped ones num_loops times more."""
    first, last = (cfg.loop_start, cfg.loop_end) if looped and cfg.num_loops else (0, -1)
    before = list(range(first))
    passes = [*range(first, last + 1)] * (cfg.num_loops + 1)
    return before + passes + list(range(last + 1, cfg.num_layers))


def slow_hidden(cfg: Config, p: dict, ids: list[int], looped: bool):
    """Final normed states of one sequence."""
    x0s = xs = lanes = slow_embed(cfg, p, ids)
    order, stack = slow_order(cfg, looped), []
    half = len(order) // 2
    for i, layer in enumerate(order):
        if i >= half and stack:
            skips, w = stack.pop(), p["skip_weights"][i - half]
            if cfg.skip_gates_enabled:
                g = torch.sigmoid(p["skip_gates"][i - half])
                xs = [(1 - g) * (w * s) + g * x for s, x in zip(skips, xs)]
            else:
                xs = [x + w * s for s, x in zip(skips, xs)]
        xs, lanes = slow_block(cfg, p, layer, xs, lanes, x0s, ids)
        if i < half:
            stack.append(xs)
    return [slow_norm((x + lane) / 2) for x, lane in zip(xs, lanes)]


def slow_nll(cfg: Config, p: dict, hidden, target: int) -> float:
    """Cross-entropy of one target on softly capped logits of the tied head."""
    logits = [cfg.logit_softcap * math.tanh(float(row @ hidden) / cfg.logit_softcap)
              for row in p["tok_emb"]]
    return math.log(sum(map(math.exp, logits))) - logits[target]


@pytest.mark.parametrize("looped", [False, True])
def test_the_model_agrees_with_a_slow_one(shape, looped):
    """Hidden states and losses equal those of a model computed one vector at a time."""
    model = stirred(shape)
    p = {name: value.detach() for name, value in model.named_parameters()}
    ids, targets = some_tokens(shape, 2, 7), some_tokens(shape, 2, 3)
    with torch.no_grad():
        hidden, nll = model(ids, looped=looped), model(ids, targets, looped)
    for b in range(2):
        expected = slow_hidden(shape, p, ids[b].tolist(), looped)
        torch.testing.assert_close(hidden[b], torch.stack(expected), atol=1e-5, rtol=0)
        losses = [slow_nll(shape, p, h, int(t)) for h, t in zip(expected[-3:], targets[b])]
        torch.testing.assert_close(nll[b], torch.tensor(losses), atol=3e-5, rtol=0)


# ------------------------------------------------------------------------------------------------
# What each position may know
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("looped", [False, True])
def test_a_token_moves_nothing_before_it(shape, looped):
    """Editing token t leaves the states before t alone and moves all from t on, in every recipe;
    where attention stays within documents, up to the end of its document."""
    T, model = 12, stirred(shape)
    ids = some_tokens(shape, 1, T)
    edited = ids.repeat(T, 1)
    edited[range(T), range(T)] = torch.where(ids[0] == 5, 6, 5)
    with torch.no_grad():
        moved = model(edited, looped=looped) - model(ids, looped=looped)
    moved = moved.abs().amax(-1)                                        # (T, T)
    for t in range(T):
        end = SECOND if shape.documents and t < SECOND else T
        assert moved[t, t:end].min() > 1e-7, f"token {t}"
        assert moved[t, :t].sum() + moved[t, end:].sum() < 1e-12, f"token {t}"


def test_states_of_a_prefix_are_the_prefix_of_states(shape):
    """The states of a sequence's first tokens do not depend on its length, nor on the batch."""
    model, ids = stirred(shape), some_tokens(shape, 3, 32)
    with torch.no_grad():
        whole = model(ids)
        for n in (1, 2, 17, 31):
            torch.testing.assert_close(model(ids[1:2, :n]), whole[1:2, :n], atol=1e-12, rtol=0)


def test_recurrence_changes_the_result(cfg):
    """A looped pass is another function than a plain one."""
    model, ids = stirred(cfg), some_tokens(cfg, 1, 8)
    assert not torch.allclose(model(ids), model(ids, looped=False))


# ------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [1, 2, 4])
def test_exclude_self_leaves_nothing_along_the_own_value(K):
    """The output is orthogonal to the value of its kv group, and only that direction was taken."""
    y, v = torch.randn(2, 5, 4, 16).double(), torch.randn(2, 5, K, 16).double()
    before = y.clone(), v.clone()
    out, own = train_gpt.exclude_self(y, v), v.repeat_interleave(4 // K, dim=2)
    taken = (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    assert (out * own).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(y - out, taken)
    torch.testing.assert_close(out, train_gpt.exclude_self(y, own))
    assert torch.equal(y, before[0]) and torch.equal(v, before[1])


def test_exclude_self_survives_a_zero_value():
    """A value of zero has no direction; the output stays as it is."""
    y = torch.randn(1, 1, 2, 8)
    assert torch.equal(train_gpt.exclude_self(y, torch.zeros(1, 1, 1, 8)), y)


def test_layers_with_xsa_exclude_their_value(cfg):
    """In the last xsa_last_n layers what enters the output matrix has nothing of the own value."""
    model = stirred(cfg)
    ids = some_tokens(cfg, 2, 16)
    seen = model.capture_linear_inputs(ids, model.mask(ids), True)
    inputs = {names[0]: x for names, x in seen}
    for i, layer in enumerate(model.layers):
        x, y = inputs[f"layers.{i}.attn.c_q.weight"], inputs[f"layers.{i}.attn.proj.weight"]
        v = F.linear(x, layer.attn.c_v.weight).view(2, 16, 2, 16).repeat_interleave(2, dim=2)
        along = (y.view(2, 16, 4, 16) * F.normalize(v, dim=-1)).sum(-1).abs()
        assert along.max() < 1e-12 if i >= 3 - cfg.xsa_last_n else along.mean() > 1e-3, f"layer {i}"


def test_shared_heads_equal_repeated_ones(make_cfg):
    """Grouped-query attention is attention whose k and v heads are repeated in each group."""
    cfg = make_cfg(xsa_last_n=3)
    model, wide = stirred(cfg), GPT(make_cfg(xsa_last_n=3, num_kv_heads=4), torch.float64).double()
    weights = {name: w.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64)
               if name.endswith(("c_k.weight", "c_v.weight")) else w
               for name, w in model.state_dict().items()}
    wide.load_state_dict(weights)
    ids = some_tokens(cfg, 2, 16)
    torch.testing.assert_close(model(ids), wide(ids))


def test_rotation_pairs_the_halves(make_cfg):
    """Channels r and r + R are one complex number turned back by the angle; the rest stays."""
    cfg = make_cfg(rope_dims=8)
    angles = train_gpt.rotary_angles(cfg, torch.arange(cfg.seq_len))          # (T, 4)
    speeds = 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(angles, torch.arange(32.0)[:, None] * speeds)
    x = torch.randn(2, 32, 3, 16)
    out = train_gpt.rotate(x, angles.cos()[:, None], angles.sin()[:, None])
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.exp(-1j * angles)[:, None]
    torch.testing.assert_close(torch.complex(out[..., :4], out[..., 4:8]), turned)
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_rotated_products_know_distances_only(cfg):
    """The product of a rotated query and key depends on how far apart they are, not on where."""
    angles = train_gpt.rotary_angles(cfg, torch.arange(cfg.seq_len)).double()[:, None]
    q, k = (torch.randn(16).double().expand(1, 32, 1, 16) for _ in range(2))
    q, k = (train_gpt.rotate(x, angles.cos(), angles.sin())[0, :, 0] for x in (q, k))
    products = q @ k.T                                                  # (T, T)
    for distance in range(-31, 32):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)
    assert products[0].std() > 0.01


def test_two_lanes_start_in_the_decoder(make_cfg):
    """A layer with two lanes among those that leave skips, plain or looped, raises."""
    for fits, overrides in ((True, dict(two_lanes=1)), (False, dict(two_lanes=3)),
                            (False, dict(two_lanes=1, loop_start=2, loop_end=2, num_loops=4))):
        with nullcontext() if fits else pytest.raises(train_gpt.ConfigError, match="TWO_LANES="):
            GPT(make_cfg(**overrides))


# ------------------------------------------------------------------------------------------------
# Activation
# ------------------------------------------------------------------------------------------------

def test_the_activation_knows_its_derivative():
    """The value is leaky_relu(p, 0.5)^2; the derivative beside it is that of the value."""
    p = torch.linspace(-3, 3, 61, dtype=torch.float64)      # with 0, where both sides meet
    value, slope = train_gpt.torch_activation(p)
    torch.testing.assert_close(value, F.leaky_relu(p, 0.5).square())
    ends = [train_gpt.torch_activation(p + step)[0] for step in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(Activation.apply, p.requires_grad_())


# ------------------------------------------------------------------------------------------------
# Layers and parameters
# ------------------------------------------------------------------------------------------------

def test_schedule_of_the_challenge():
    """The default model's layers, plain and looped, as the public runs log them."""
    assert layer_schedule(Config(), False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert layer_schedule(Config(), True) == (
        [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])


def test_schedule_runs_each_layer_as_often_as_it_should(make_cfg):
    """For any loop: the looped layers run num_loops times more, the encoder is the shorter half."""
    for n, loops in itertools.product(range(1, 7), range(3)):
        for start, end in itertools.combinations_with_replacement(range(n), 2):
            cfg = make_cfg(num_layers=n, num_loops=loops, loop_start=start, loop_end=end)
            encoder, decoder = layer_schedule(cfg, True)
            assert encoder + decoder == slow_order(cfg, True)
            assert 0 <= len(decoder) - len(encoder) <= 1
            assert sum(layer_schedule(cfg, False), []) == list(range(n))


def test_parameter_counts_of_the_challenge(full_model):
    """35,944,536 parameters, and so many of each kind as the spec's table says."""
    counts = Counter()
    for name, p in full_model.named_parameters():
        kind = "matrices" if name.endswith(".weight") else name.split(".")[-1]
        counts[kind] += p.numel()
    assert counts == dict(
        tok_emb=4_194_304, matrices=11 * 2_883_584, q_gain=11 * 8, resid_mix=11 * 1024,
        attn_scale=11 * 512, mlp_scale=11 * 512, skip_weights=4096, skip_gates=4096)
    assert sum(counts.values()) == 35_944_536
    assert full_model.skip_weights.shape == (8, 512)


@pytest.mark.parametrize("recipe,count", [("pr1858", 35_944_536), ("pr1060", 27_038_812)])
def test_parameter_counts_of_the_recipes(monkeypatch, recipe, count):
    """Each published system has as many parameters as its logs say."""
    monkeypatch.setattr(train_gpt.nn.init, "orthogonal_", lambda weight, generator: weight)
    cfg, _ = train_gpt.config_from_env({"RECIPE": recipe})
    if cfg.group("model") == Config().group("model"):
        assert count == 35_944_536                          # counted above
    else:
        assert sum(p.numel() for p in GPT(cfg).parameters()) == count


def test_first_loss_is_that_of_guessing(shape):
    """Before training any model's loss is ln(vocab)."""
    model, ids = GPT(shape), some_tokens(shape, 8, 33)
    with torch.no_grad():
        nll = model(ids[:, :-1], ids[:, 1:])
    assert abs(nll.mean().item() - math.log(shape.vocab_size)) < 0.01


def test_initial_weights(make_cfg):
    """Input matrices are orthogonal, output matrices zero, vectors where the spec puts them."""
    model = GPT(make_cfg(qk_gain_init=1.5, tied_embed_init_std=0.01, mlp_mult=4.0))
    for name, p in model.named_parameters():
        if name.endswith("proj.weight"):
            assert not p.any(), name
        elif name.endswith(".weight"):
            gram = p.T @ p if p.size(0) > p.size(1) else p @ p.T
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
        elif not name.endswith(("tok_emb", "resid_mix")):
            start = dict(q_gain=1.5, skip_gates=0.0).get(name.split(".")[-1], 1.0)
            assert (p == start).all(), name
    assert abs(model.tok_emb.std().item() / 0.01 - 1) < 0.02
    assert all((b.resid_mix[0] == 1).all() and not b.resid_mix[1].any() for b in model.layers)


def test_initial_weights_depend_on_the_seed_only(make_cfg):
    """Other settings and torch's own generator change nothing; another SEED changes every draw."""
    first = dict(GPT(make_cfg()).named_parameters())
    torch.manual_seed(99)
    same = GPT(make_cfg(matrix_lr=0.5, data_dir="x", warmdown_frac=0.5), torch.bfloat16)
    other = dict(GPT(make_cfg(seed=2)).named_parameters())
    for name, p in same.named_parameters():
        assert torch.equal(p, first[name]), name
        drawn = first[name].std() > 0 and name.endswith((".weight", "tok_emb"))
        assert torch.equal(p, other[name]) != drawn, name
    assert sum(torch.equal(p, first[n]) for n, p in other.items()) < len(first)


def test_activations_have_the_dtype_asked_for(cfg):
    """Parameters stay fp32 whatever the activations are; the loss is fp32."""
    model, ids = GPT(cfg, torch.bfloat16), some_tokens(cfg, 2, 9)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16
    assert model(ids[:, :-1], ids[:, 1:]).dtype == torch.float32


def test_precise_logits_are_those_of_fp32(cfg):
    """For scoring, bf16 states meet the head in fp32; a training pass rounds the logits."""
    model, ids = GPT(cfg, torch.bfloat16), some_tokens(cfg, 2, 9)
    model.tok_emb.data.mul_(20)                             # or all logits would be near 0
    targets = ids.roll(1)
    with torch.no_grad():
        exact = exact_nll(model(ids).double() @ model.tok_emb.double().T, targets, 30.0)
        errors = [(model(ids, targets, precise=precise) - exact).abs().max().item()
                  for precise in (True, False)]
    assert errors[0] < 1e-4 and errors[1] > 1e-3


def test_every_parameter_learns(shape):
    """In a looped pass of a stirred model no parameter is without a gradient."""
    model, ids = stirred(shape), some_tokens(shape, 2, 17)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().amax() > 0, name


@pytest.mark.parametrize("looped", [False, True])
def test_calibration_sees_every_matrix(shape, looped):
    """The tap sees the input of every matrix, once a pass over its layer, and of the head."""
    model, ids = stirred(shape), some_tokens(shape, 2, 9)
    seen, passes = Counter(), Counter(slow_order(shape, looped))
    shown = model.capture_linear_inputs(ids, model.mask(ids), looped)
    for names, x in shown:
        for name in names:
            assert x.shape == (2, 9, model.get_parameter(name).size(1)), name
            seen[name] += 1
    matrices = [n for n, p in model.named_parameters() if n.endswith(".weight")]
    assert seen == {"tok_emb": 1} | {n: passes[int(n.split(".")[1])] for n in matrices}
    torch.testing.assert_close(shown[-1][1], model(ids, looped=looped))


def test_calibration_sees_what_the_matrices_meet(cfg, monkeypatch):
    """The inputs shown are those that the layers' own matrix products get, one after the other."""
    model, met, linear, ids = stirred(cfg), [], F.linear, some_tokens(cfg, 2, 9)
    monkeypatch.setattr(F, "linear", lambda x, weight: met.append(x) or linear(x, weight))
    shown = model.capture_linear_inputs(ids, model.mask(ids), True)
    assert len(met) == len(shown) - 1 and shown[-1][0] == ["tok_emb"]
    assert all(torch.equal(x, seen) for (_, x), seen in zip(shown, met))


def test_the_challenge_has_67_matrices_to_calibrate(full_model):
    """Six matrices a layer and the head, as the public runs log."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        seen = full_model.capture_linear_inputs(ids, full_model.mask(ids), True)
    assert len({name for names, _ in seen for name in names}) == 67


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

def exact_nll(logits, targets, cap: float):
    """Cross-entropy on softly capped logits in float64, by PyTorch."""
    z = cap * torch.tanh(logits / cap)
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@pytest.mark.parametrize("cap", [5.0, 30.0, 70.0])
@pytest.mark.parametrize("spread", [0.1, 10.0, 200.0])
def test_loss_and_gradient_equal_exact_ones(cap, spread):
    """Value and gradient are those of float64 autograd, from flat logits to far over the cap."""
    logits, targets = spread * torch.randn(3, 5, 64), torch.randint(64, (3, 5))
    weight = torch.randn(3, 5)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    nll, expected = SoftcapNLL.apply(ours, targets, cap), exact_nll(exact, targets, cap)
    (nll * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(nll.double(), expected, atol=3e-5, rtol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=3e-6, rtol=1e-4)


def test_loss_of_low_precision_logits():
    """bf16 logits are capped and summed in fp32; their gradient comes back in bf16."""
    logits, targets = (5 * torch.randn(2, 4, 64)).bfloat16(), torch.randint(64, (2, 4))
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    nll, expected = SoftcapNLL.apply(logits, targets, 30.0), exact_nll(exact, targets, 30.0)
    nll.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(nll.double(), expected, atol=3e-5, rtol=0)
    assert nll.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-4, rtol=0.01)


def test_extreme_logits_stay_finite():
    """Logits beyond any use, at the largest cap allowed, give a finite loss and gradient."""
    logits = torch.tensor([[[1e30, -1e30, 0.0]], [[-1e30, -1e30, -1e30]]], requires_grad=True)
    nll = SoftcapNLL.apply(logits, torch.tensor([[1], [0]]), 70.0)
    nll.sum().backward()
    torch.testing.assert_close(nll, torch.tensor([[140.0], [math.log(3)]]), atol=1e-4, rtol=0)
    assert logits.grad.isfinite().all()


def test_probabilities_sum_to_one(cfg):
    """exp(-nll) over all possible targets of a position is 1."""
    model = stirred(cfg, torch.float32)
    hidden = model(some_tokens(cfg, 1, 4)).repeat(cfg.vocab_size, 1, 1)
    every = torch.arange(cfg.vocab_size)[:, None].expand(-1, 4)
    total = (-model.per_token_loss(hidden, every)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(4), atol=1e-4, rtol=0)
