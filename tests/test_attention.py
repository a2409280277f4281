"""train_gpt.py, Model: documents in attention, by every backend that is at hand.

FlashAttention-4 runs on GPUs alone: here two slow functions stand in for the two of its package
that the program calls, and tests/test_gpu.py runs the package's own.

Run alone: python -m pytest -q tests/test_attention.py
"""
import gc
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

import train_gpt
from conftest import ROOT, imported
from train_gpt import BOS, GPT, FlashAttention4, FlexAttention, GolfError, Sdpa

compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def probabilities(q, k, starts, most):
    """Attention of q on k (n, H, D) within documents (H, n, n), and log-sum-exp (H, n).

    A query sees `most` positions before its own, or all of its document.
    """
    at = torch.arange(len(q))
    document = torch.searchsorted(starts, at.int(), right=True)
    hidden = ~(document[:, None] == document).tril()
    if most is not None:
        hidden |= at[:, None] - at > most
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


def shared(x, like):
    """Keys or values (n, K, D) once for every query head of `like` (n, H, D)."""
    return x.repeat_interleave(like.size(1) // x.size(1), 1)


def slow_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size_left, return_lse):
    """What `_flash_attn_fwd` returns, as far as the program reads it."""
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k
    p, lse = probabilities(q, shared(k, q), cu_seqlens_q, window_size_left)
    return torch.einsum("hqk,khd->qhd", p, shared(v, q)).contiguous(), lse, None, None, None


def slow_backward(q, k, v, out, dout, lse, causal, window_size_left, cu_seqlens_q, cu_seqlens_k,
                  dq, dk, dv):
    """What `_flash_attn_bwd` writes: gradients by the formulas of softmax, from `lse` as given."""
    assert causal and dout.is_contiguous()
    scale = q.size(-1) ** -0.5
    p, _ = probabilities(q, shared(k, q), cu_seqlens_q, window_size_left)
    along = (dout * out).sum(-1).T[:, :, None]                                      # (H, n, 1)
    ds = p * (torch.einsum("qhd,khd->hqk", dout, shared(v, q)) - along) * scale
    summed = lambda x: x.unflatten(1, (k.size(1), -1)).sum(2)
    dq.copy_(torch.einsum("hqk,khd->qhd", ds, shared(k, q)))
    dk.copy_(summed(torch.einsum("hqk,qhd->khd", ds, q)))
    dv.copy_(summed(torch.einsum("hqk,qhd->khd", p, dout)))


@pytest.fixture
def flash(monkeypatch) -> FlashAttention4:
    """The program's operators over the slow functions."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package = sys.modules["flash_attn.cute.interface"]
    package._flash_attn_fwd, package._flash_attn_bwd = slow_forward, slow_backward
    monkeypatch.setattr(train_gpt.metadata, "version", lambda name: FlashAttention4.VERSION)
    found = FlashAttention4()
    gc.collect()        # operators of an earlier test, whose end would take these out of torch.ops
    return found


@pytest.fixture(params=["dense", "flex", "flash"])
def attention(request) -> Sdpa:
    """Each backend in turn."""
    if request.param == "flash":
        return request.getfixturevalue("flash")
    return Sdpa() if request.param == "dense" else FlexAttention(lambda function: function)


def some_rows(B: int = 2, T: int = 256) -> torch.Tensor:
    """Tokens (B, T) with documents of many lengths: of one token, over several rows of blocks."""
    rows = torch.randint(2, 300, (B, T))
    rows[0, [0, 1, 7, 130, 131, 255]] = BOS
    rows[1, [40, 200]] = BOS
    return rows


def heads(B: int = 2, T: int = 256):
    """Queries, keys and values of 4 and 2 heads, which collect gradients."""
    return [torch.randn(B, T, n, 16, requires_grad=True) for n in (4, 2, 2)]


# ------------------------------------------------------------------------------------------------
# The claims
# ------------------------------------------------------------------------------------------------

def test_no_document_sees_another(attention):
    """Noise in one document's keys and values moves no other's outputs, and each moves its own."""
    rows, (q, k, v) = some_rows(), [x.detach() for x in heads()]
    mask = attention.masks(rows, True, [0])[0]
    firsts = (rows == BOS).index_put((torch.tensor([0, 1]), torch.tensor([0, 0])),
                                     torch.tensor(True))
    document = firsts.flatten().cumsum(0).view(rows.shape)
    with torch.no_grad():
        before = attention.attend(q, k, v, mask)
        for d in document.unique():
            mine = document == d
            noise = mine[..., None, None] * torch.randn_like(k)
            moved = (attention.attend(q, k + noise, v + noise, mask) - before).abs().amax((2, 3))
            assert moved[~mine].max() == 0 and moved[mine].min() > 1e-4, f"document {d}"


@pytest.mark.parametrize("attention", ["dense", "flash"], indirect=True)
def test_no_gradient_leaves_a_document(attention):
    """The loss of one document has no gradient in another's keys, values and queries.

    FlexAttention has no gradients on a CPU; tests/test_gpu.py makes this claim of it.
    """
    rows, inputs = some_rows(), heads()
    out = attention.attend(*inputs, attention.masks(rows, True, [0])[0])
    for grad in torch.autograd.grad(out[0, 7:130].square().sum(), inputs):
        assert grad[0, 7:130].abs().max() > 0
        grad[0, 7:130] = 0
        assert grad.abs().max() == 0


@pytest.mark.parametrize("window", [0, 1, 50])
@pytest.mark.parametrize("documents", [False, True])
def test_backends_agree(flash, documents, window):
    """Outputs of all backends, and gradients of those that have them here, are the dense mask's."""
    rows, inputs, dense = some_rows(), heads(), Sdpa()
    grad = torch.randn(2, 256, 4, 16)
    expected = dense.attend(*inputs, dense.masks(rows, documents, [window])[0])
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    out = flash.attend(*inputs, flash.masks(rows, documents, [window])[0])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    for mine, theirs in zip(torch.autograd.grad(out, inputs, grad), expected_grads):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    flex = FlexAttention(lambda function: function)
    with torch.no_grad():
        out = flex.attend(*(x.detach() for x in inputs), flex.masks(rows, documents, [window])[0])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_window_hides_what_is_before_it(attention):
    """Noise at one position moves the outputs of the next `window` positions, and no others."""
    rows, (q, k, v) = torch.full((1, 256), 7), [x.detach() for x in heads(B=1)]
    mask, noise = attention.masks(rows, False, [50])[0], torch.zeros(1, 256, 1, 1)
    noise[:, 100] = 1
    with torch.no_grad():
        moved = attention.attend(q, k + noise, v + noise, mask) - attention.attend(q, k, v, mask)
    assert moved.abs().amax((0, 2, 3)).nonzero()[:, 0].tolist() == list(range(100, 150))


def test_the_packed_operators_are_the_same(flash):
    """Packing drops annotations and renames parameters, from which operators may be inferred."""
    with imported(ROOT / "packed" / "train_gpt.py") as program:
        [kind] = [c for c in vars(program).values() if getattr(c, "name", "") == "flash4"]
        packed, inputs, rows = kind(), heads(), some_rows()
        out, expected = (f.attend(*inputs, f.masks(rows, True, [0])[0]) for f in (packed, flash))
        grads, same = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
    torch.testing.assert_close((out, *grads), (expected, *same), atol=0, rtol=0)


def test_the_whole_model_compiles_around_each_backend(flash, make_cfg):
    """One graph each, whose losses and captured inputs are those of the plain model; a second batch
    compiles nothing."""
    cfg = make_cfg(documents=True, seq_len=256, ttt_chunk_tokens=256, train_batch_tokens=512,
                   attention_window=50)
    plain, batches = GPT(cfg), [some_rows(), some_rows()]
    for attention in (flash, FlexAttention(compiled)):
        torch._dynamo.reset()
        model = GPT(cfg, attention=attention)
        hidden, capture = compiled(model.hidden), compiled(model.capture_linear_inputs)
        masks = [model.mask(rows) for rows in batches]
        with torch.no_grad():
            for i, (rows, mask) in enumerate(zip(batches, masks)):
                stance = "fail_on_recompile" if i else "default"
                with torch.compiler.set_stance(stance):
                    found, seen = hidden(rows, mask, True), capture(rows, mask, True)
                expected = plain.hidden(rows, plain.mask(rows), True)
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
                inputs = plain.capture_linear_inputs(rows, plain.mask(rows), True)
                for (names, x), (same, y) in zip(seen, inputs, strict=True):
                    assert names == same
                    torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_flash_attention_says_when_documents_find_no_room(flash):
    """A batch of more documents than entries is an error, not another result."""
    flash.masks(torch.full((1, 128), BOS), True, [0])
    flash.check()
    flash.masks(torch.full((2, 512), BOS), True, [0])
    with pytest.raises(GolfError, match="FLASH_ATTN=0"):
        flash.check()


def test_another_version_of_flash_attention_is_not_used(monkeypatch):
    """Its functions are not public, so only the version that was tested runs."""
    monkeypatch.setattr(train_gpt.metadata, "version", lambda name: "9.9")
    with pytest.raises(ImportError, match="9.9, not"):
        FlashAttention4()
