"""train_gpt.py, Kernels: each equals its twin in PyTorch, forward and backward, on any shape.

Run alone: python -m pytest -q tests/test_kernels.py
Triton's interpreter runs the kernels here, so that no GPU is needed; see conftest.py.
"""
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch for CPUs comes without it: pip install triton")

import train_gpt  # noqa: E402
from conftest import ROOT, imported  # noqa: E402
from train_gpt import (  # noqa: E402
    FusedExclusion, FusedHeads, FusedMLP, exclude_self, kernels_work, split_heads, squared_mlp)

pytestmark = pytest.mark.filterwarnings(        # of the interpreter about NumPy
    "ignore:Conversion of an array:DeprecationWarning")

# (B, T, H, K, D, R): one block and many, rows that fill no block, one pair turned and all of them.
SHAPES = [(1, 1, 1, 1, 4, 1), (2, 5, 4, 2, 8, 2), (1, 33, 4, 4, 16, 8), (3, 40, 8, 4, 64, 8),
          (2, 64, 2, 1, 32, 4)]
EXACT = dict(rtol=1e-5, atol=1e-6)      # both work in float32, in another order


@pytest.fixture(params=SHAPES, ids=str)
def heads(request):
    """x, gain, cos and sin of a shape, with gradients wanted for the first two."""
    B, T, H, K, D, R = request.param
    angles = torch.rand(T, 1, R) * 6
    x = torch.randn(B, T, H + 2 * K, D)
    x[0, 0] = 0                                             # a norm without a length
    return (x.requires_grad_(), (torch.rand(H) + 0.5).requires_grad_(), angles.cos(), angles.sin())


def gradients(outputs, inputs) -> list[Tensor]:
    """Gradients of a random linear form of the outputs, the same form for equal shapes."""
    rng = torch.Generator().manual_seed(3)
    form = sum((y * torch.randn(y.shape, generator=rng)).sum() for y in outputs)
    return list(torch.autograd.grad(form, inputs))


def assert_near(ours: Tensor, twin: Tensor, relative: float):
    """The difference is short beside `twin`."""
    assert (ours - twin).norm() <= relative * twin.norm()


def test_heads_equal_their_twin(heads):
    """Queries, keys, values, and the gradients of activations and gains."""
    ours, twin = FusedHeads.apply(*heads), split_heads(*heads)
    for a, b in zip(ours, twin):
        torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(gradients(ours, heads[:2]), gradients(twin, heads[:2])):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exclusion_equals_its_twin(shape):
    """Outputs and the gradients of both arguments, also where a value is zero."""
    B, T, H, K, D, _ = shape
    y, v = torch.randn(B, T, H, D), torch.randn(B, T, K, D)
    v[0, 0] = 0
    pair = y.requires_grad_(), v.requires_grad_()
    ours, twin = FusedExclusion.apply(*pair), exclude_self(*pair)
    torch.testing.assert_close(ours, twin, **EXACT)
    dy, dv = gradients([ours], pair)
    dy_twin, dv_twin = gradients([twin], pair)
    torch.testing.assert_close(dy, dy_twin, **EXACT)
    alive = v.detach().norm(dim=-1) > 0                     # at zero there is no derivative
    torch.testing.assert_close(dv[alive], dv_twin[alive], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B, T, C, O", [(1, 128, 64, 256), (2, 5, 128, 512), (1, 300, 64, 768)])
def test_mlp_equals_its_twin(B, T, C, O):  # noqa: E741
    """Hidden and output, and all gradients; tokens that fill no tile, several tiles each way."""
    args = [torch.randn(shape).requires_grad_() for shape in ((B, T, C), (O, C), (C, O))]
    ours, twin = FusedMLP.apply(*args), squared_mlp(*args)
    for a, b in zip(ours, twin):
        assert_near(a, b, 1e-5)
    for a, b in zip(gradients(ours[1:], args), gradients(twin[1:], args)):
        assert_near(a, b, 1e-5)
    assert not ours[0].requires_grad                        # it is shown, not used


def test_layouts_of_gradients_do_not_matter():
    """Attention hands back transposed gradients; they count as what they are."""
    x = torch.randn(2, 6, 8, 16).requires_grad_()
    gain, angles = torch.ones(4), torch.rand(6, 1, 4)
    q, k, v = FusedHeads.apply(x, gain, angles.cos(), angles.sin())
    grads = [torch.randn(2, h.size(2), 6, 16).transpose(1, 2) for h in (q, k, v)]
    one = torch.autograd.grad((q, k, v), x, grads, retain_graph=True)[0]
    other = torch.autograd.grad((q, k, v), x, [g.contiguous() for g in grads])[0]
    assert torch.equal(one, other)


def loss_and_gradients(module, fused: bool) -> list[Tensor]:
    """Loss of the looped model of the program `module`, and the gradients of its parameters."""
    cfg = module.Config(
        vocab_size=64, seq_len=32, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2,
        rope_dims=8, xsa_last_n=3, num_loops=1, loop_start=1, loop_end=2, parallel_residual_start=3,
        train_batch_tokens=64, ttt_chunk_tokens=64, eval_stride=16, value_embed_dim=8)
    model, rng = module.GPT(cfg), torch.Generator().manual_seed(1)
    model.fused = fused
    for p in model.parameters():                            # no projection stays zero
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    rows = torch.randint(64, (2, 33), generator=rng)
    loss = model.token_nll(model.features(rows[:, :-1], True), rows[:, 1:]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("program", ["train_gpt.py", "packed/train_gpt.py"])
def test_a_model_of_kernels_is_the_model(program):
    """Loss and every gradient of the looped model; also packed, as Triton reads the source."""
    with imported(ROOT / program) as module:
        ours, twin = (loss_and_gradients(module, fused) for fused in (True, False))
    for a, b in zip(ours, twin, strict=True):
        assert_near(a, b, 1e-4)


def test_a_cpu_runs_the_twins(cfg):
    """Kernels are for GPUs: elsewhere nothing asks for them."""
    assert not kernels_work(cfg, train_gpt.Dist({}))


@pytest.mark.parametrize("kib, settings, works", [
    (227, {}, True),
    (227, train_gpt.RECIPES["pr1060"], True),
    (163, {}, False),                                       # an A100
    (227, dict(kernels_enabled=False), False),
    (227, dict(model_dim=768), False),                      # heads 96 wide
    (227, dict(rope_dims=0), False),
    (227, dict(mlp_mult=3.1), False)])
def test_kernels_run_where_they_fit(monkeypatch, kib, settings, works):
    """All of them or none, by the GPU's room and the model's widths."""
    room = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    dist = SimpleNamespace(on_cuda=True, device="cuda:0")
    assert kernels_work(train_gpt.Config(**settings), dist) == works
