"""Bytes that the passes between kernels read and write in a step of `solo`, counted without a GPU.

    python passes.py train_gpt.py [--list]      in an environment with PyTorch 2.11 for CUDA

The forward and the backward graph of GPT.hidden are traced on a CPU and lowered by the compiler's
scheduler as for an H100, of which it is told that it is there; nothing is generated or run.  A pass
is one fused kernel: it reads what other kernels leave, and writes what they need.  Milliseconds are
bytes at 2.9 TB/s.  Checked against a profile of 2026-11-27: 8.4 ms counted, 7.3 ms measured.
"""
import collections
import importlib.util
import os
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

import torch
import torch.utils._triton as detect

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    shared_memory_per_block=49152, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, L2_cache_size=50 << 20, gcnArchName="", is_integrated=0)
cuda = torch.cuda                       # the compiler copies these functions when it is imported
cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
cuda.get_device_properties, cuda.get_device_capability = lambda *a: H100, lambda *a: (9, 0)
cuda.is_available = lambda: False
cuda.synchronize = cuda._lazy_init = lambda *a: None
cuda.current_stream = lambda *a: SimpleNamespace(cuda_stream=0)
for name in ("has_triton", "has_triton_package", "has_triton_stable_tma_api",
             "has_triton_tensor_descriptor_host_tma"):
    setattr(detect, name, lambda *a: True)

import torch._inductor.config as inductor
import torch._subclasses.fake_tensor as fake
import triton
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

RATE = 2900.0       # MB a millisecond


class Driver:
    """What Triton asks its driver."""
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


def pretend():
    """Tell Triton and the compiler of it, too."""
    triton.runtime.driver.set_active(Driver())
    fake.init_gpu_context = lambda device: None
    inductor.fx_graph_cache = False
    inductor.triton.mix_order_reduction = False             # as in train_gpt.compiler


def load(path: str):
    """The program as a module; the number of multiprocessors is a constant for the tracer."""
    text = open(path).read().replace("torch.cuda.get_device_properties(x.device)."
                                     "multi_processor_count if x.is_cuda else 1", "132")
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(text)
    spec = importlib.util.spec_from_file_location("program", file.name)
    module = sys.modules["program"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.unlink(file.name)
    return module


def flash_operators():
    """FlashAttention-4's operators, of which only the shapes are needed."""
    def absent(*args):
        raise RuntimeError("nothing is run")
    operator = partial(torch.library.custom_op, mutates_args=())
    operator("golf::flash_forward", absent, schema="(Tensor q, Tensor k, Tensor v, Tensor starts, "
             "int window) -> (Tensor, Tensor)").register_fake(
        lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0)).float()))
    operator("golf::flash_backward", absent, schema="(Tensor grad, Tensor q, Tensor k, Tensor v, "
             "Tensor out, Tensor lse, Tensor starts, int window) -> (Tensor, Tensor, Tensor)"
             ).register_fake(lambda grad, *saved: tuple(map(torch.empty_like, saved[:3])))


def count(graph: GraphLowering, which: str, found: list):
    """Append (which, kind, MB, shape) of each fused kernel of a lowered graph."""
    def size(name):
        buffer = graph.name_to_buffer.get(name) or graph.graph_inputs.get(name)
        try:
            return buffer.get_numel() * buffer.get_dtype().itemsize / 1e6
        except (AttributeError, NotImplementedError, TypeError):
            return 0.0
    for node in graph.scheduler.nodes:
        if "Extern" in type(node).__name__ or "Nop" in type(node).__name__:
            continue
        own, operations = set(node.get_buffer_names()), set(node.get_operation_names())
        reads = {d.name for d in node.read_writes.reads} - own
        writes = {b for b in own if any(u.node.get_name() not in operations
                                        for u in graph.scheduler.name_to_buf[b].users)}
        kind = "sums" if node.is_reduction() else "points"
        found.append((which, kind, float(sum(map(size, reads | writes))), str(node.group[1])))


def lowering(which: str, found: list):
    """A compiler that counts and returns empty results."""
    def compile(module, inputs):
        mode = next(i.fake_mode for i in inputs if hasattr(i, "fake_mode"))
        for node in module.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        module.recompile()
        with mode:
            inputs = [torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device="cuda:0")
                      if isinstance(i, torch.Tensor) else i for i in inputs]
        FakeTensorProp(module, mode=mode).propagate(*inputs)
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(module, is_inference=False)
        graph = GraphLowering(module, example_inputs=inputs, is_backward=which == "backward",
                              shape_env=None, is_inference=False)
        with V.set_debug_handler(DebugContext()), V.set_fake_mode(mode), V.set_graph_handler(graph):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            count(graph, which, found)
        values = [getattr(o, "meta", {}).get("val") for o in list(module.graph.nodes)[-1].args[0]]
        return lambda *args: [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)
                              if isinstance(v, torch.Tensor) else None for v in values]
    return compile


def main(path: str, listed: bool):
    pretend()
    t, found = load(path), []
    flash_operators()

    class Flash(t.FlashAttention4):
        def __init__(self):
            self.crowded = torch.tensor(False)
    cfg = t.Config(**t.RECIPES["solo"])
    t.nn.init.orthogonal_ = lambda w, generator=None: w
    t.nn.init.normal_ = lambda w, std=1.0, generator=None: w
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        model = t.GPT(cfg, torch.bfloat16, True, Flash())
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape))
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
        tokens = torch.empty(cfg.batch_seqs, cfg.seq_len, dtype=torch.int64)
        starts = torch.empty(257, dtype=torch.int32)
        backend = aot_autograd(
            fw_compiler=lowering("forward", found), bw_compiler=lowering("backward", found),
            decompositions=select_decomp_table(), partition_fn=min_cut_rematerialization_partition)
        masks = [(starts, 0), (starts, cfg.attention_window)]
        hidden = lambda tokens, starts: model.hidden(
            tokens, [(starts, window) for _, window in masks], False)
        torch.compile(hidden, backend=backend, fullgraph=True, dynamic=False)(
            tokens, starts).sum().backward()
    if listed:
        for which, kind, mb, shape in found:
            print(f"{which:8} {kind:6} {mb:6.0f} MB {shape}")
    total = collections.Counter()
    for which, _, mb, _ in found:
        total[which] += mb
    print(f"{path}: forward {total['forward']:.0f} MB, backward {total['backward']:.0f} MB, "
          f"{sum(total.values()) / RATE:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1], "--list" in sys.argv)
