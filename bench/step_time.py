#!/usr/bin/env python3
"""Where the time of one optimiser step goes, part by part, and how far each part is from its floor.

    TRAIN_BATCH_TOKENS=131072 python bench/step_time.py              one GPU
    TRAIN_BATCH_TOKENS=131072 python bench/step_time.py --kernels    also what the profiler saw

Settings are environment variables, those of train_gpt.py, whose functions are what is timed: on
random tokens, on one device, plain and looped.  No data set is read and nothing is left on disk.
Every time is a median over --steps calls after a warm-up; on a GPU between device events.

    attention kernel          the kernel alone, both ways, times the layers that run
    attention, MLP products  their matrix products alone, one forward and two backward
    embedding, head, loss     the program's own loss of a model without layers, both ways
    gradient upkeep           zeroing and clipping the flat gradient
    elementwise rest          forward and backward less all of the above: norms, rotation, sums,
                              activation, casts, and the time in which no kernel runs
    optimiser, EMA            inside the step
    loader                    what the host waits for a batch at the pace of the steps

A floor is FLOPs over the rate of one large matrix product, plus bytes over the rate of a large
copy, both measured here first; for the attention kernel it is its own time.  Bytes count what a
part must read and write if all between two matrix products were one kernel, and the MLP's
activation the end of a product, as it is with KERNELS_ENABLED=1.  Model FLOPs a token are 6 times
the weights used (a weight of a layer that runs thrice counts thrice) and, a layer that runs, the 7
products of causal attention (2 forward, 5 backward) over half the positions.

Sections: Timing, Counts, Measurements, Kernels, Command line.
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt  # noqa: E402
from train_gpt import Config, ConfigError, Dist, GolfError, Run, Trainer  # noqa: E402

GRAPHS = {"plain": False, "looped": True}


# ------------------------------------------------------------------------------------------------
# Timing: medians between device events, or between looks at a clock on a CPU
# ------------------------------------------------------------------------------------------------
# Calls are queued without waiting for the device, as training does, so a kernel that the host
# launches too late shows in the figures of the part that waits for it.

WARM_CALLS = 3          # untimed calls; the first one compiles


def mark(dist: Dist):
    """A point in time: an event in the device's queue, or seconds on the CPU's clock."""
    if not dist.on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(dist: Dist, start, end) -> float:
    """Time between two marks that the device has passed."""
    return start.elapsed_time(end) if dist.on_cuda else 1000 * (end - start)


def time_phases(dist: Dist, phases: list[Callable], calls: int) -> list[float]:
    """Median milliseconds of each of `phases`, which run in turn, and last that of a whole turn.

    The device is waited for once, after the last turn; the sum of the medians need not be the last.
    """
    for _ in range(WARM_CALLS):
        for phase in phases:
            phase()
    dist.wait()
    turns = []
    for _ in range(calls):
        marks = [mark(dist)]
        for phase in phases:
            phase()
            marks.append(mark(dist))
        turns.append(marks)
    dist.wait()
    times = [
        [milliseconds(dist, a, b) for a, b in [*itertools.pairwise(m), (m[0], m[-1])]]
        for m in turns]
    return [statistics.median(column) for column in zip(*times)]


def time_call(dist: Dist, work: Callable, calls: int) -> float:
    """Median milliseconds of `work()`."""
    return time_phases(dist, [work], calls)[-1]


class Ceilings(NamedTuple):
    """What this device does at best, and so the floors of everything else."""
    flops: float        # a second, in one large matrix product
    bytes: float        # a second, read and written, in one large copy

    def floor_ms(self, flops: float, moved: float) -> float:
        """Least milliseconds of a part with so many FLOPs in products and bytes moved."""
        return 1000 * (flops / self.flops + moved / self.bytes)


LARGE = {True: (8192, 1 << 29), False: (512, 1 << 22)}      # on a GPU: side, elements of a copy


def measure_ceilings(dist: Dist, calls: int) -> Ceilings:
    """Rates of a square matrix product and of a copy, both in the dtype of activations.

    Numbers are random, as zeros cost a GPU less power and so would let it run faster.
    """
    side, elements = LARGE[dist.on_cuda]
    kind = dict(device=dist.device, dtype=dist.dtype)
    A, B = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    product_ms = time_call(dist, lambda: A @ B, calls)
    source = torch.randn(elements, **kind)
    target = torch.empty_like(source)
    copy_ms = time_call(dist, lambda: target.copy_(source), calls)
    moved = 2 * elements * source.element_size()
    return Ceilings(2 * side ** 3 / product_ms * 1000, moved / copy_ms * 1000)


# ------------------------------------------------------------------------------------------------
# Counts: FLOPs and bytes of each part, from the model's own shapes
# ------------------------------------------------------------------------------------------------

class Product(NamedTuple):
    """A matrix product of the forward pass: (tokens, I) -> (tokens, O), for `part`."""
    part: str           # attn, mlp or head
    O: int
    I: int  # noqa: E741


def products(run: Run, looped: bool) -> list[Product]:
    """Every matrix product of a forward pass, in order, as the model shows them to an observer.

    It does not show those behind tables of token pairs and values, which are thin.
    """
    found, shapes = [], run.flat.shapes

    def note(x: Tensor, *names: str):
        """Matrices with one input are one product."""
        part = re.search("attn|mlp", names[0])
        O = sum(shapes[n][0] for n in names)
        found.append(Product(part.group() if part else "head", O, x.size(-1)))

    tokens = torch.zeros(1, min(run.cfg.seq_len, 128), dtype=torch.int64, device=run.dist.device)
    # Any attention will do for a look at shapes; this one runs everywhere.
    with torch.no_grad(), torch_attention.sdpa_kernel(torch_attention.SDPBackend.MATH):
        run.model.features(tokens, looped, note)
    return found


def product_flops(found: list[Product], *parts: str) -> int:
    """FLOPs a token of the products of some parts (all if none is named), both ways."""
    return sum(6 * p.O * p.I for p in found if not parts or p.part in parts)


def layers_run(cfg: Config, looped: bool) -> list[int]:
    """Layers in the order they run."""
    encoder, decoder = train_gpt.layer_schedule(cfg, looped)
    return encoder + decoder


def attention_flops(cfg: Config, looped: bool) -> int:
    """FLOPs a token of the attention kernels, both ways."""
    width, half = cfg.num_heads * cfg.head_dim, cfg.seq_len // 2
    return len(layers_run(cfg, looped)) * 7 * 2 * half * width


def layer_elements(cfg: Config, layer: int) -> int:
    """Elements a token that must pass through memory around the products of one layer, both ways.

    Each term is one region between products; a comment says what it reads -> writes.
    """
    C, M, K = cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim), cfg.num_kv_heads * cfg.head_dim
    serial = layer < cfg.parallel_residual_start
    xsa = layer >= cfg.num_layers - cfg.xsa_last_n
    forward = (
        4 * C,                          # mix, norm: x, x0 -> h, n
        2 * (C + K),                    # norm, rotate: q, k -> q, k
        (2 * C + K) * xsa,              # exclude self: y, v -> y
        3 * C + C * serial,             # h, attention's output -> u, and n of u
        M,                              # leaky ReLU, written beside its square
        3 * C)                          # u, MLP's output -> x
    backward = (
        M,                              # leaky ReLU, read where its gradient is made
        4 * C * serial,                 # norm of u: dn, u, dx -> du
        (3 * C + 2 * K) * xsa,          # exclude self: dy, y, v -> dy, dv
        3 * C + 6 * K,                  # norm, rotate: dq, dk, dv, dv, q, k -> dq, dk, dv
        7 * C + C * (not serial))       # mix, norm: dn (twice if parallel), du, x, x0, dx0 -> 2
    return sum(forward) + sum(backward)


def rest_bytes(bench: "Bench", looped: bool) -> int:
    """Bytes that the elementwise rest of a step must move.

    Sums over tokens (gradients of vectors) are by-products of what is read anyway: nothing extra.
    """
    run, size = bench.run, bench.run.dist.dtype.itemsize
    cfg = run.cfg
    skips = len(train_gpt.layer_schedule(cfg, looped)[0])
    elements = sum(layer_elements(cfg, i) for i in layers_run(cfg, looped))
    elements += skips * 9 * cfg.model_dim       # x, skip -> x; dx, x, skip -> both; one more sum
    # Each matrix is read and cast for its products; its gradient is read, cast and added to the
    # flat one, once a micro-batch.
    casts = len(run.flat.part(run.flat.data, "matrices")) * (4 + size + size + 8)
    return bench.tokens * size * elements + bench.micro[0] * casts


def ends_bytes(run: Run, tokens: int) -> int:
    """Bytes that embedding, final norm and loss must move beside the head's products.

    The loss reads the logits, for its gradient once more, and replaces them by it; products read
    and write them on top of that, which their own rate includes.
    """
    cfg, size = run.cfg, run.dist.dtype.itemsize
    logits = 3 * cfg.vocab_size                 # read by the loss, read and replaced by its slope
    norms = 7 * cfg.model_dim                   # x0; final norm 2, its slope 3; gradient of x0
    table = 3 * 4 * cfg.model_dim               # fp32 rows read; their gradient read and written
    return tokens * (size * (logits + norms) + table)


def optimizer_work(run: Run) -> tuple[int, int]:
    """(FLOPs, bytes) of Newton-Schulz and of both updates.

    An iteration on an (m, n) matrix, m the smaller side, is X X^T, its square, and their sum by X.
    """
    flat, flops = run.flat, 0
    for _, W in flat.stacks(flat.data):
        N, m, n = W.size(0), min(W.shape[1:]), max(W.shape[1:])
        flops += run.cfg.muon_backend_steps * N * (2 * m * m * n + 2 * m ** 3 + 2 * m * m * n)
    muon = len(flat.part(flat.data, "matrices"))
    adam = len(flat.data) - muon
    # Muon: gradient; momentum and weight, both read and written; update, cast, each way.  AdamW:
    # weight, gradient and two moments read, all but the gradient written.
    return flops, muon * (5 * 4 + 2 * run.dist.dtype.itemsize) + adam * 7 * 4


# ------------------------------------------------------------------------------------------------
# Measurements: the step as a whole, then its parts on their own at the shapes of a micro-batch
# ------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """One line of the table."""
    name: str
    ms: float
    floor_ms: float
    flops: float        # of products, a step; 0: none
    basis: str          # what the floor is made of


class Bench(NamedTuple):
    """What all measurements share."""
    run: Run
    rows: Tensor            # (B, T + 1) int64 random tokens, a whole step
    trainer: Trainer
    ceilings: Ceilings
    calls: int              # timed calls of everything

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.run.cfg.train_batch_tokens

    @property
    def micro(self) -> tuple[int, int]:
        """(micro-batches a step, sequences in each)."""
        parts = train_gpt.micro_batches(self.rows, self.run.cfg)
        return len(parts), len(parts[0])

    def time(self, work: Callable) -> float:
        """Milliseconds a step of `work()`, which is done once a micro-batch."""
        return self.micro[0] * time_call(self.run.dist, work, self.calls)


class StepTimes(NamedTuple):
    """What timing a graph's whole step tells, milliseconds."""
    phases: list[float]     # train_step, optimiser, EMA, all of it
    waited_ms: float        # for a batch, on the host
    read_ms: float          # that the loader's thread takes for a batch


class TimedBatches:
    """The program's own loader on two shards of random tokens; `seconds` that each call took.

    The shards were just written, so they are read from memory, not from the disk.
    """

    def __init__(self, run: Run, folder: Path):
        """Write the shards into `folder` and start reading."""
        cfg, rng, shards = run.cfg, np.random.default_rng(0), []
        header = np.zeros(256, "<i4")
        count = 8 * cfg.train_batch_tokens + 1
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, count
        for name in ("random_train_000000.bin", "random_train_000001.bin"):
            ids = rng.integers(cfg.vocab_size, size=count).astype("<u2")
            (folder / name).write_bytes(header.tobytes() + ids.tobytes())
            shards.append(train_gpt.read_shard(folder / name))
        self.batches, self.seconds = train_gpt.Batches(cfg, shards, run.dist), []

    def next(self) -> Tensor:
        """The next batch."""
        started = time.perf_counter()
        rows = self.batches.next()
        self.seconds.append(time.perf_counter() - started)
        return rows

    def pace_ms(self, calls: int) -> float:
        """Milliseconds that the reader takes for a batch when it never has to wait."""
        for _ in range(self.batches.AHEAD + 1):
            self.next()                         # those that lay ready
        started = time.perf_counter()
        for _ in range(calls):
            self.next()
        return 1000 * (time.perf_counter() - started) / calls

    def waited_ms(self, calls: int) -> float:
        """Median milliseconds that the last calls took on the host."""
        return 1000 * statistics.median(self.seconds[-calls:])


def step_phases(bench: Bench, looped: bool) -> list[Callable]:
    """The three things that `Trainer.advance` does with a batch, the same tokens every time.

    Weights move and are not put back: after the first step no matrix is zero, as in training.
    """
    run, trainer = bench.run, bench.trainer
    return [lambda: train_gpt.train_step(run, bench.rows, looped, (0.0, 0.0)),
            lambda: trainer.optimizer.step(1.0, run.cfg.muon_momentum),
            lambda: trainer.average.lerp_(run.flat.data, 1 - trainer.schedule.ema_decay())]


def time_program(bench: Bench, looped: bool) -> float:
    """Milliseconds of a step as training runs it: fresh batches, the report read a step late."""
    trainer = bench.trainer
    trainer.looping = looped

    def one_step():
        """What the training loop does between two looks at the clock."""
        trainer.advance(0.0, False)
        trainer.late.swap(bench.run.flat.report)

    return time_call(bench.run.dist, one_step, bench.calls)


def time_launch(bench: Bench, looped: bool) -> float:
    """Milliseconds that the host takes to queue a step on an idle device.

    Near the step's own time it says little: the queue was full.  On a CPU it is the step's time.
    """
    times = []
    for _ in range(3):
        bench.run.dist.wait()
        started = time.perf_counter()
        for phase in step_phases(bench, looped):
            phase()
        times.append(1000 * (time.perf_counter() - started))
    bench.run.dist.wait()
    return statistics.median(times)


def attention_work(bench: Bench) -> Callable:
    """A function that runs the attention kernel of one layer, forward and backward."""
    cfg, dist, B = bench.run.cfg, bench.run.dist, bench.micro[1]
    H, K = cfg.num_heads, cfg.num_kv_heads
    q, k, v, grad = (                                               # (B, T, H or K, D)
        torch.randn(B, cfg.seq_len, heads, cfg.head_dim, device=dist.device, dtype=dist.dtype)
        for heads in (H, K, K, H))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def work():
        """As in train_gpt.Attention."""
        y = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in inputs), is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, inputs, grad.transpose(1, 2))

    return work


def product_work(bench: Bench, shape: tuple[int, int]) -> Callable:
    """A function that runs one matrix product and the two of its gradients; `shape` is (O, I)."""
    cfg, dist, (O, I) = bench.run.cfg, bench.run.dist, shape  # noqa: E741
    tokens, kind = bench.micro[1] * cfg.seq_len, dict(device=dist.device, dtype=dist.dtype)
    x = torch.randn(tokens, I, **kind).requires_grad_()
    W = (torch.randn(O, I, **kind) / I ** 0.5).requires_grad_()
    grad = torch.randn(tokens, O, **kind)
    return lambda: torch.autograd.grad(F.linear(x, W), (x, W), grad)


def time_products(bench: Bench) -> dict[tuple[int, int], float]:
    """Milliseconds a step of the products of each shape (O, I) in the layers, run once each."""
    shapes = {(p.O, p.I) for p in products(bench.run, False) if p.part != "head"}
    return {shape: bench.time(product_work(bench, shape)) for shape in sorted(shapes)}


@contextlib.contextmanager
def without_layers():
    """While entered, the program's model consists of embedding, final norm and head.

    Compiled functions notice that the schedule is another one, and compile once more.
    """
    with mock.patch.object(train_gpt, "layer_schedule", lambda cfg, looped: ([], [])):
        yield


def time_ends(bench: Bench) -> float:
    """Milliseconds a step of embedding, final norm, head and loss, forward and backward."""
    run = bench.run
    part = train_gpt.micro_batches(bench.rows, run.cfg)[0]
    with without_layers():
        return bench.time(lambda: run.loss_rows(part, False).mean().backward())


def time_upkeep(bench: Bench) -> float:
    """Milliseconds of zeroing the gradients and clipping them."""
    flat, limit = bench.run.flat, bench.run.cfg.grad_clip_norm
    return time_phases(bench.run.dist, [
        lambda: flat.buffer.zero_(),
        lambda: train_gpt.clip_(flat.grad, limit)], bench.calls)[-1]


class Shared(NamedTuple):
    """Milliseconds of what costs the same plain and looped; attention and products run once."""
    attention: float
    products: dict[tuple[int, int], float]
    ends: float
    upkeep: float


def measure_shared(bench: Bench) -> Shared:
    """Time the parts on their own."""
    return Shared(bench.time(attention_work(bench)), time_products(bench), time_ends(bench),
                  time_upkeep(bench))


def make_parts(bench: Bench, looped: bool, shared: Shared, phases: list[float]) -> list[Part]:
    """The table's lines; `phases` are the times of train_step, optimiser, EMA and a whole step.

    Parts timed on their own may run a little faster or slower than between others; the difference
    ends up in the elementwise rest, which is what they leave of train_step.
    """
    run, tokens, floor = bench.run, bench.tokens, bench.ceilings.floor_ms
    found, params = products(run, looped), len(run.flat.data)
    attention_ms = shared.attention * len(layers_run(run.cfg, looped))
    parts = [Part("attention kernel", attention_ms, attention_ms,
                  tokens * attention_flops(run.cfg, looped), "its own time")]
    for part in ("attn", "mlp"):
        ms = sum(shared.products[p.O, p.I] for p in found if p.part == part)
        flops = tokens * product_flops(found, part)
        name = dict(attn="attention products", mlp="MLP products")[part]
        parts.append(Part(name, ms, floor(flops, 0), flops, "FLOPs"))
    flops = tokens * product_flops(found, "head")
    moved = ends_bytes(run, tokens)
    parts.append(Part("embedding, head, loss", shared.ends, floor(flops, moved), flops,
                      "FLOPs, bytes"))
    parts.append(Part("gradient upkeep", shared.upkeep, floor(0, 16 * params), 0, "bytes"))
    rest = phases[0] - sum(p.ms for p in parts)
    moved = rest_bytes(bench, looped)
    parts.append(Part("elementwise rest", rest, floor(0, moved), 0, "bytes"))
    flops, moved = optimizer_work(run)
    parts.append(Part("optimiser", phases[1], floor(flops, moved), flops, "FLOPs, bytes"))
    parts.append(Part("EMA", phases[2], floor(0, 12 * params), 0, "bytes"))
    return parts


# ------------------------------------------------------------------------------------------------
# Kernels: what the profiler saw on the GPU, by class, and the time in which nothing ran
# ------------------------------------------------------------------------------------------------
# Phases are told apart by a tiny kernel between them that the model does not use.  The first step
# is dropped, as the host is not yet ahead of the device there.

MARKER = "triu_tril"
CLASSES = (                             # the first that matches the name of a kernel
    ("our kernels", "^(heads|exclusion)_"),
    ("compiled pointwise", "^triton_(poi|for)"),
    ("compiled reductions", "^triton_(?!tem|mm)"),
    ("attention kernel", "sdpa|fmha|flash|cudnn|attention"),
    ("matrix products", "nvjet|gemm|gemv|cublas|cutlass|splitK|^product_kernel|^triton_"),
    ("copies, zeroing", "^Mem(cpy|set)|FillFunctor"),
    ("other kernels", ""))
PHASES = ("", "optimiser", "EMA")       # forward and backward are told by class
LONG_GAP_US = 10.0                      # a gap beyond it is not just the way from kernel to kernel


class Kernel(NamedTuple):
    """One kernel, copy or memset that the device ran; microseconds."""
    name: str
    start: float
    end: float


def record_kernels(bench: Bench, looped: bool, steps: int) -> list[Kernel]:
    """What the device runs in so many steps, in order, with a marker around each phase."""
    profiler, square = torch.profiler, torch.ones(2, 2, device=bench.run.dist.device)
    bench.run.dist.wait()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            for phase in step_phases(bench, looped):
                square.triu()
                phase()
        square.triu()
        bench.run.dist.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return read_trace(path)


def read_trace(path: Path) -> list[Kernel]:
    """What the device ran, in order of start, from a trace in Chrome's format.

    Ranges that annotate others (of compiled graphs, of optimisers) have categories of their own.
    """
    events = json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]
    found = [
        Kernel(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(found, key=lambda k: k.start)


def kernel_class(name: str) -> str:
    """Class of a kernel of the forward or backward pass."""
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name))


class Tallied(NamedTuple):
    """Kernels of some steps after the first; milliseconds a step."""
    step_ms: float
    rows: dict[tuple[str, str], tuple[float, float]]    # (class, name): ms, count, both a step
    gaps: list[tuple[float, str]]                       # all gaps: ms (not a step), what followed


def tally_kernels(found: list[Kernel], steps: int) -> Tallied:
    """Sort kernels into classes and phases; raises GolfError if markers are missing."""
    marks = [i for i, k in enumerate(found) if MARKER in k.name]
    if len(marks) != len(PHASES) * steps + 1 or steps < 2:
        raise GolfError(f"the profiler saw {len(marks)} of {len(PHASES) * steps + 1} markers among "
                        f"{len(found)} kernels in {steps} steps; no table of kernels")
    kept, rows = steps - 1, {}
    marks = marks[len(PHASES):]
    for i, (a, b) in enumerate(itertools.pairwise(marks)):
        for k in found[a + 1:b]:
            key = PHASES[i % len(PHASES)] or kernel_class(k.name), k.name
            ms, count = rows.get(key, (0.0, 0.0))
            rows[key] = ms + (k.end - k.start) / 1000 / kept, count + 1 / kept
    window = found[marks[0]:marks[-1] + 1]
    step_ms = (window[-1].start - window[0].start) / 1000 / kept
    return Tallied(step_ms, rows, find_gaps(window))


def find_gaps(window: list[Kernel]) -> list[tuple[float, str]]:
    """(milliseconds, next kernel) of every time in which the device ran nothing.

    Kernels of several streams may overlap; what counts is when the last of them ended.
    """
    gaps, busy_until = [], window[0].end
    for k in window[1:]:
        if k.start > busy_until:
            gaps.append(((k.start - busy_until) / 1000, k.name))
        busy_until = max(busy_until, k.end)
    return gaps


def kernel_lines(graph: str, tallied: Tallied, steps: int, top: int) -> list[str]:
    """The tables of classes and of the slowest kernels."""
    kept, sums = steps - 1, {}
    for (kind, _), (ms, count) in tallied.rows.items():
        old = sums.get(kind, (0.0, 0.0))
        sums[kind] = old[0] + ms, old[1] + count
    short, long = (
        [g for g in tallied.gaps if (1000 * g[0] > LONG_GAP_US) == over] for over in (False, True))
    for name, gaps in (("gaps", short), (f"gaps over {LONG_GAP_US:g} us", long)):
        sums[name] = sum(ms for ms, _ in gaps) / kept, len(gaps) / kept
    rows = [[kind, f"{ms:.2f}", f"{count:.0f}", f"{100 * ms / tallied.step_ms:.1f} %"]
            for kind, (ms, count) in sorted(sums.items(), key=lambda item: -item[1][0])]
    rows.append(["step under the profiler", f"{tallied.step_ms:.2f}", "", "100.0 %"])
    lines = [f"kernels, {graph}: mean of {kept} steps after the first",
             *align([["class", "ms", "count", "share"], *rows])]
    for ms, name in sorted(long, reverse=True)[:3]:
        lines.append(f"  gap of {1000 * ms:.0f} us before {name[:80]}")
    slowest = sorted(tallied.rows.items(), key=lambda item: -item[1][0])[:top]
    return lines + ["", *align([["kernel", "ms", "count", "class"]] + [
        [name[:90], f"{ms:.2f}", f"{count:.0f}", kind] for (kind, name), (ms, count) in slowest])]


# ------------------------------------------------------------------------------------------------
# Command line: what is printed, and what can go wrong
# ------------------------------------------------------------------------------------------------

def say(*lines: str):
    """Print at once, so that what was measured stays if something later fails."""
    print(*lines, sep="\n", flush=True)


def align(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column left, numbers right, words in the last left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = any(re.match("[a-z]", row[-1]) for row in rows[1:])
    lines = []
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        cells[-1] = row[-1] if words else cells[-1]
        lines.append("  ".join(cells).rstrip())
    return lines


def part_lines(parts: list[Part], times: StepTimes) -> list[str]:
    """The table of parts, then the whole step, then the loader, which works beside it."""
    step_ms, floor = times.phases[-1], sum(p.floor_ms for p in parts)
    rows = [["part", "ms", "share", "TFLOP/s", "floor ms", "over floor", "floor from"]]
    for p in [*parts, Part("whole step", step_ms, floor, 0, "sum of the above")]:
        rate = f"{p.flops / p.ms / 1e9:.3g}" if p.flops else ""
        rows.append([p.name, f"{p.ms:.2f}", f"{100 * p.ms / step_ms:.1f} %", rate,
                     f"{p.floor_ms:.2f}", f"{p.ms / p.floor_ms:.2f}", p.basis])
    rows.append(["loader, host waits", f"{times.waited_ms:.2f}", "", "", "0.00", "",
                 f"a thread reads ahead, {times.read_ms:.2f} ms a batch"])
    return align(rows)


def product_lines(bench: Bench, shared: Shared) -> list[str]:
    """The table of the shapes of products, with the attention kernel, a layer of one step each."""
    tokens, rows = bench.tokens, [["one layer, both ways", "ms", "TFLOP/s"]]
    for (O, I), ms in shared.products.items():
        rows.append([f"({tokens} x {I}) x ({I} x {O})", f"{ms:.3f}",
                     f"{tokens * 6 * O * I / ms / 1e9:.3g}"])
    flops = tokens * attention_flops(bench.run.cfg, False) / bench.run.cfg.num_layers
    rows.append(["attention kernel", f"{shared.attention:.3f}",
                 f"{flops / shared.attention / 1e9:.3g}"])
    return align(rows)


def peak_memory(dist: Dist) -> str:
    """What a step needs at most, or nothing on a CPU."""
    return f", peak {torch.cuda.max_memory_allocated() >> 20} MiB" if dist.on_cuda else ""


def report_step(bench: Bench, graph: str) -> StepTimes:
    """Time a graph on its own and as the program runs it, and print that."""
    looped, dist = GRAPHS[graph], bench.run.dist
    if dist.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for phase in step_phases(bench, looped):                        # compiles
        phase()
    dist.wait()
    first_seconds = time.perf_counter() - started
    phases = time_phases(dist, step_phases(bench, looped), bench.calls)
    program_ms, loader = time_program(bench, looped), bench.trainer.batches
    times = StepTimes(phases, loader.waited_ms(bench.calls), loader.pace_ms(bench.calls))
    flops, step_ms = train_gpt.flops_per_token(bench.run.cfg, looped), phases[-1]
    rate = bench.tokens * flops / step_ms * 1000
    say("", f"{graph}: {step_ms:.2f} ms a step, {1000 * bench.tokens / step_ms:,.0f} tokens/s, "
        f"{flops / 1e6:.4g} MFLOP a token, {rate / 1e12:.4g} TFLOP/s = "
        f"{100 * rate / bench.ceilings.flops:.1f} % of the matmul ceiling",
        f"  with a fresh batch and the report, as training runs it: {program_ms:.2f} ms "
        f"({100 * (program_ms / step_ms - 1):+.1f} %)",
        f"  host: {time_launch(bench, looped):.2f} ms to queue a step on an idle device; first "
        f"call {first_seconds:.1f} s{peak_memory(dist)}")
    return times


def report_kernels(bench: Bench, graph: str, steps: int = 4, top: int = 25):
    """Print what the profiler sees of a graph."""
    found = record_kernels(bench, GRAPHS[graph], steps)
    say("", *kernel_lines(graph, tally_kernels(found, steps), steps, top))


def measure(cfg: Config, dist: Dist, args: argparse.Namespace, folder: Path):
    """Build the model, time everything and print it; `folder` takes the loader's shards."""
    run = train_gpt.start_run(cfg, dist, lambda event, **values: None)
    ceilings = measure_ceilings(dist, args.steps)
    say(f"ceilings: matrix product {ceilings.flops / 1e12:.4g} TFLOP/s, copy "
        f"{ceilings.bytes / 1e12:.4g} TB/s")
    rows = torch.randint(cfg.vocab_size, (cfg.batch_seqs, cfg.seq_len + 1), device=dist.device)
    loader = TimedBatches(run, folder)
    bench = Bench(run, rows, Trainer(run, loader, 0.0, cfg.iterations), ceilings, args.steps)
    graphs = [args.graph] if args.graph else list(GRAPHS)[:2 if cfg.num_loops else 1]
    # What is least likely to fail and wanted most comes first; the profiler, which may slow down
    # whatever follows it, last.
    try:
        steps = {graph: report_step(bench, graph) for graph in graphs}
        shared = measure_shared(bench)
        say("", *product_lines(bench, shared))
        for graph, times in steps.items():
            parts = make_parts(bench, GRAPHS[graph], shared, times.phases)
            say("", f"{graph}, part by part", *part_lines(parts, times))
        for graph in graphs if args.kernels else ():
            report_kernels(bench, graph)
    finally:
        loader.batches.close()


def check(args: argparse.Namespace, cfg: Config, dist: Dist):
    """Raise ConfigError for what cannot be measured here."""
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: must be 1 or more")
    if args.kernels and not dist.on_cuda:
        raise ConfigError("--kernels: only a GPU has kernels to profile")
    if args.graph == "looped" and not cfg.num_loops:
        raise ConfigError("--graph looped: NUM_LOOPS=0 leaves no layer to loop over")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: times one device; start it "
                          "without torchrun")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N",
                        help="timed calls of every part, and of the step (default: 20)")
    parser.add_argument("--graph", choices=list(GRAPHS), help="only this one (default: both)")
    parser.add_argument("--kernels", action="store_true",
                        help="also profile four steps: kernels by class, the slowest 25, gaps")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line and the environment say; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        cfg, chosen = train_gpt.config_from_env()
        dist = Dist({})
        check(args, cfg, dist)
        name, backend = train_gpt.choose_attention(cfg, dist)
        device = torch.cuda.get_device_name() if dist.on_cuda else "CPU"
        settings = " ".join(f"{n.upper()}={getattr(cfg, n)}" for n in chosen)
        say(f"{device}, torch {torch.__version__}, attention {name}, medians of {args.steps}; "
            f"settings: {settings or 'none'}")
        with torch_attention.sdpa_kernel(backend), tempfile.TemporaryDirectory() as folder:
            measure(cfg, dist, args, Path(folder))
        return 0
    except GolfError as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'output or ' + tempfile.gettempdir()}: {e.strerror}"
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        problem = "out of memory; lower MICRO_BATCH_SEQS, TRAIN_BATCH_TOKENS or the model's size"
    print(f"step_time: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
