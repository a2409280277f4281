"""train_gpt.py, Kernels: each equals its twin in PyTorch, forward and backward, on any shape.

Run alone: python -m pytest -q tests/test_kernels.py
Triton's interpreter runs the kernels here, so that no GPU is needed; see conftest.py.  It has no
bfloat16, so float16 takes its place.
"""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch for CPUs comes without it: pip install triton")

import torch.nn.functional as F  # noqa: E402

import train_gpt  # noqa: E402
from conftest import PARTS, ROOT, imported  # noqa: E402
from train_gpt import (  # noqa: E402
    Activation, Config, FusedExclusion, FusedHeads, FusedMLP, exclude_self, kernels_fit,
    split_heads)

# Compiles the products of the MLP for an H100, without one; prints the bytes of its fast memory
# that each takes.
COMPILE = """
import torch, train_gpt
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
kernel, calls = train_gpt.product_kernel, []
class Recorder:
    def __getitem__(self, grid):
        return lambda *args, **options: calls.append((args, options))
train_gpt.product_kernel = Recorder()
shapes = (1, 128, 512), (2048, 512), (512, 2048)
x, up, down = (torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
train_gpt.FusedMLP.apply(x, up, down).sum().backward()
kinds = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
for args, options in calls:
    signature, constants = {}, {}
    for p, value in zip(kernel.params, args, strict=True):
        signature[p.name] = "i32"
        if p.is_constexpr:
            signature[p.name], constants[p.name] = "constexpr", value
        elif hasattr(value, "block_shape"):
            signature[p.name] = f"tensordesc<{kinds[value.base.dtype]}{value.block_shape}>"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared)
"""

pytestmark = pytest.mark.filterwarnings(        # of the interpreter about NumPy
    "ignore:Conversion of an array:DeprecationWarning")


# (B, T, H, K, D, R): one block and many, rows that fill no block, one pair turned and all of them.
HEADS = [(1, 1, 1, 1, 4, 1), (2, 5, 4, 2, 8, 2), (1, 33, 1, 1, 16, 8), (2, 16, 2, 1, 32, 4)]
MATRICES = [(1, 128, 64, 256), (2, 5, 128, 512), (1, 140, 64, 512)]        # (B, T, C, hidden)
PRECISIONS = [(torch.float32, 1e-5), (torch.float16, 2e-3)]                 # dtype, tolerance


def gradients(outputs, inputs) -> list[Tensor]:
    """Gradients of a random linear form of the outputs, the same form for equal shapes."""
    rng = torch.Generator().manual_seed(3)
    form = sum((y.float() * torch.randn(y.shape, generator=rng)).sum() for y in outputs)
    return list(torch.autograd.grad(form, inputs))


def assert_near(ours: Tensor, twin: Tensor, relative: float):
    """The difference is short beside `twin`."""
    assert (ours.double() - twin).norm() <= relative * twin.double().norm()


@pytest.fixture
def all_bits(monkeypatch):
    """The MLP's kernels keep all bits of what stands before the activation.

    Where a mantissa carries over, the interpreter rounds to eight bits wrongly, as a GPU does not:
    test_gpu.py has that rounding.
    """
    monkeypatch.setattr(torch, "float8_e4m3fn", torch.float32)


@pytest.mark.parametrize("dtype,relative", PRECISIONS)
@pytest.mark.parametrize("B, T, C, O", MATRICES)
def test_the_mlp_equals_its_twin(all_bits, B, T, C, O, dtype, relative):  # noqa: E741
    """Outputs and all gradients; tokens that fill no tile, several tiles each way."""
    shapes = (B, T, C), (O, C), (C, O)
    args = [torch.randn(shape).mul(0.5).to(dtype).requires_grad_() for shape in shapes]
    exact = [a.detach().float().requires_grad_() for a in args]
    ours = FusedMLP.apply(*args)
    twin = F.linear(Activation.apply(F.linear(exact[0], exact[1])), exact[2])
    pairs = zip([ours, *gradients([ours], args)], [twin, *gradients([twin], exact)], strict=True)
    for a, b in pairs:
        assert a.dtype == dtype
        assert_near(a, b, relative)


@pytest.mark.parametrize("dtype,relative", PRECISIONS)
@pytest.mark.parametrize("B, T, H, K, D, R", HEADS)
def test_the_heads_equal_their_twin(B, T, H, K, D, R, dtype, relative):
    """Queries, keys, values, and the gradients of activations and gains, also of a zero vector."""
    angles, x = torch.rand(T, 1, R) * 6, torch.randn(B, T, H + 2 * K, D).to(dtype)
    x[0, 0] = 0                                             # a norm without a length
    args = x.requires_grad_(), (torch.rand(H) + 0.5).requires_grad_()
    exact = [a.detach().float().requires_grad_() for a in args]
    ours = FusedHeads.apply(*args, angles.cos().to(dtype), angles.sin().to(dtype))
    twin = split_heads(*exact, angles.cos(), angles.sin())
    pairs = zip([*ours, *gradients(ours, args)], [*twin, *gradients(twin, exact)], strict=True)
    for a, b in pairs:
        assert_near(a, b, relative)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype,relative", PRECISIONS)
@pytest.mark.parametrize("B, T, H, K, D, R", HEADS[1:])     # the sum of a lone gate may cancel
def test_the_exclusion_equals_its_twin(B, T, H, K, D, R, dtype, relative, gated):
    """Outputs, and the gradients of heads, values and gates."""
    shapes = [(B, T, H, D), (B, T, K, D), *[(B, T, H)] * gated]
    args = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [a.detach().float().requires_grad_() for a in args]
    none = [None] * (not gated)
    ours, twin = FusedExclusion.apply(*args, *none), exclude_self(*exact, *none)
    pairs = zip([ours, *gradients([ours], args)], [twin, *gradients([twin], exact)], strict=True)
    for a, b in pairs:
        assert a.dtype == dtype
        assert_near(a, b, relative)


def test_layouts_of_gradients_do_not_matter():
    """Attention hands back transposed gradients; the kernels read them as they are."""
    x = torch.randn(2, 6, 4, 16).requires_grad_()
    gain, angles = torch.ones(2), torch.rand(6, 1, 4)
    q, k, v = FusedHeads.apply(x, gain, angles.cos(), angles.sin())
    grads = [torch.randn(2, h.size(2), 6, 16).transpose(1, 2) for h in (q, k, v)]
    one = torch.autograd.grad((q, k, v), x, grads, retain_graph=True)[0]
    other = torch.autograd.grad((q, k, v), x, [g.contiguous() for g in grads])[0]
    assert torch.equal(one, other)


def loss_and_gradients(module, fused: bool) -> list[Tensor]:
    """Loss of a small model of the program `module`, and the gradients of its parameters."""
    parts = {name: PARTS["golf"][name] for name in Config().group("model") if name in PARTS["golf"]}
    cfg = module.Config(**parts | dict(
        vocab_size=64, seq_len=16, num_layers=2, model_dim=64, rope_dims=8, num_loops=0,
        two_lanes=1, train_batch_tokens=16, ttt_chunk_tokens=16, eval_stride=16))
    model, rng = module.GPT(cfg, fused=fused), torch.Generator().manual_seed(1)
    for p in model.parameters():                            # no projection stays zero
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    rows = torch.randint(64, (1, 17), generator=rng)
    loss = model(rows[:, :-1], rows[:, 1:]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("program", ["train_gpt.py", "packed/train_gpt.py"])
def test_a_model_with_kernels_is_the_model(all_bits, program):
    """Loss and every gradient; also of the packed program, as Triton reads the source."""
    with imported(ROOT / program) as module:
        ours, twin = (loss_and_gradients(module, fused) for fused in (True, False))
    for a, b in zip(ours, twin, strict=True):
        assert_near(a, b, 1e-4)


def test_a_cpu_runs_the_twin(cfg, make_run):
    """Kernels are for GPUs: elsewhere no model asks for them."""
    assert not make_run(cfg).model.fused


@pytest.mark.parametrize("kib, settings, fit", [
    (227, {}, True),
    (227, train_gpt.RECIPES["pr1060"], True),
    (163, {}, False),                                       # an A100
    (227, dict(compile_enabled=False), False),
    (227, dict(model_dim=480, num_heads=4), False),
    (227, dict(model_dim=768), False),                      # heads 96 wide
    (227, dict(rope_dims=0), False),
    (227, dict(mlp_mult=3.1), False)])
def test_kernels_run_where_they_fit(monkeypatch, kib, settings, fit):
    """The GPU's memory on the chip and the model's widths decide."""
    properties = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    dist = SimpleNamespace(on_cuda=True, device="cuda:0")
    assert kernels_fit(Config(**settings), dist) == fit


def test_the_products_fit_on_a_chip(tmp_path):
    """Compiled for an H100, without one, they need no more memory than `kernels_fit` asks for."""
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 2 and max(sizes) <= 227 << 10, sizes
