#!/usr/bin/env python3
"""Where the time of one optimiser step goes, part by part, and how far each part is from its floor.

    TRAIN_BATCH_TOKENS=131072 python bench/step_time.py              one GPU
    TRAIN_BATCH_TOKENS=131072 python bench/step_time.py --kernels    also the profiler's kernels
    torchrun --standalone --nproc_per_node=8 bench/step_time.py      eight, as in training

Settings are the environment variables of train_gpt.py, whose functions are timed on random tokens,
with and without recurrence.  No data set is read and nothing is left on disk.  Every time is a
median over --steps calls after a warm-up, on a GPU between device events; with several ranks, the
times, floors and FLOPs are those of rank 0, and both collectives of a step are timed alone.

    attention kernel          the kernel alone, forward and backward, times the layers that run
    attention, MLP products  their matrix products alone, one forward and two backward
    embedding, head, loss     the program's own loss of a model without layers, both ways
    gradient upkeep           writing and clipping the flat gradient
    elementwise rest          forward and backward less all of the above: norms, rotation, sums,
                              activation, casts, gates, and the time in which no kernel runs

A floor is FLOPs over the rate of one large matrix product, plus bytes over the rate of a large
copy, both measured here first; for the attention kernel it is its own time.  Bytes count the least
that a part reads and writes if all between two matrix products were one kernel, and the MLP's
activation the end of a product, as it is in the MLP's kernels.  Model FLOPs per token are 6 times
the weights used (a weight of a layer that runs thrice counts thrice) and, for each layer that runs,
the 7 products of causal attention (2 forward, 5 backward) over half the positions, whatever
documents and windows leave of them.  MFU is their rate over that of the large matrix product.

Sections: Timing, Counts, Measurements, Command line.
"""
import argparse
import contextlib
import io
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before what takes long: from here on Ctrl-C ends in one line.
import console  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import Config, ConfigError, Dist, Run, TrainState  # noqa: E402

GRAPHS = {False: "plain", True: "looped"}      # by `looped`


# ------------------------------------------------------------------------------------------------
# Timing: medians between device events, or between readings of a clock on a CPU
# ------------------------------------------------------------------------------------------------
# Calls are queued without waiting for the device, as in training, so a kernel that the host
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
    dist.barrier()
    turns = []
    for _ in range(calls):
        marks = [mark(dist)]
        for phase in phases:
            phase()
            marks.append(mark(dist))
        turns.append([*itertools.pairwise(marks), (marks[0], marks[-1])])
    dist.barrier()
    return [statistics.median(milliseconds(dist, a, b) for a, b in column)
            for column in zip(*turns)]


def time_call(dist: Dist, work: Callable, calls: int) -> float:
    """Median milliseconds of `work()`."""
    return time_phases(dist, [work], calls)[-1]


class Ceilings(NamedTuple):
    """The best rates of this device, and so the floors of everything else."""
    flops: float        # per second, in one large matrix product
    bytes: float        # per second, read and written, in one large copy

    def floor_ms(self, flops: float, moved: float) -> float:
        """Least milliseconds of a part with so many FLOPs in products and bytes moved."""
        return 1000 * (flops / self.flops + moved / self.bytes)


def measure_ceilings(dist: Dist, calls: int) -> Ceilings:
    """Rates of a square matrix product and of a copy, both in the dtype of activations.

    Numbers are random, as zeros cost a GPU less power and so would let it run faster.
    """
    side, elements = (8192, 1 << 29) if dist.on_cuda else (512, 1 << 22)
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
    """Every matrix product of a forward pass, in order, as the model shows them to a tap.

    It does not show those of gates and of tables of token pairs and values, which are thin.
    """
    found, shapes = [], run.flat.shapes

    def note(names: list[str], x: Tensor):
        """Matrices with one input are one product."""
        part = re.search("attn|mlp", names[0])
        O = sum(shapes[n][0] for n in names)
        found.append(Product(part.group() if part else "head", O, x.size(-1)))

    tokens = torch.zeros(1, min(run.cfg.seq_len, 128), dtype=torch.int64, device=run.rt.dist.device)
    with torch.no_grad():
        run.model.hidden(tokens, run.model.mask(tokens), looped, note)
    return found


def product_flops(found: list[Product], *parts: str) -> int:
    """FLOPs per token of the products of some parts (all if none is named), both ways."""
    return sum(6 * p.O * p.I for p in found if not parts or p.part in parts)


def attention_flops(cfg: Config, layers: int) -> int:
    """FLOPs per token of the attention kernels of so many layers, both ways."""
    width, half = cfg.num_heads * cfg.head_dim, cfg.seq_len // 2
    return layers * 7 * 2 * half * width


def model_flops(run: Run, looped: bool) -> int:
    """FLOPs per token of a training step's forward and backward pass."""
    layers = sum(map(len, train_gpt.layer_schedule(run.cfg, looped)))
    return product_flops(products(run, looped)) + attention_flops(run.cfg, layers)


def layer_elements(cfg: Config, layer: int) -> int:
    """Elements per token that must pass through memory around the products of one layer, both ways.

    Each term is one region between products; a comment says what it reads -> writes.
    """
    C, M, K = cfg.model_dim, cfg.hidden_dim, cfg.num_kv_heads * cfg.head_dim
    two_lanes = layer >= cfg.num_layers - cfg.two_lanes
    serial = not two_lanes and layer < cfg.parallel_residual_start
    xsa = layer >= cfg.num_layers - cfg.xsa_last_n
    gated = bool(cfg.head_gate_channels) and not xsa    # the gate follows exclusion in one kernel
    forward = (
        4 * C,                          # mix, norm: x, x0 -> h, n
        2 * (C + K),                    # norm, rotate: q, k -> q, k
        (2 * C + K) * xsa,              # exclude self: y, v -> y
        2 * C * gated,                  # gate: y -> y
        2 * C if two_lanes else         # norm: lane -> n
        3 * C + C * serial,             # h, attention's output -> u, and n of u
        M // 2,                         # leaky ReLU, in eight bits, written beside its square
        3 * C + 3 * C * two_lanes)      # u, MLP's output -> x; both lanes, both outputs -> lanes
    backward = (
        M // 2,                         # leaky ReLU, read where its gradient is made
        4 * C * serial,                 # norm of u: dn, u, dx -> du
        12 * C * two_lanes,             # lanes, outputs and their slopes; norm of the lane
        3 * C * gated,                  # gate: dy, y -> dy
        (3 * C + 2 * K) * xsa,          # exclude self: dy, y, v -> dy, dv
        3 * C + 6 * K,                  # norm, rotate: dq, dk, dv, dv, q, k -> dq, dk, dv
        7 * C + C * (not serial))       # mix, norm: dn (twice if parallel), du, x, x0, dx0 -> 2
    return sum(forward) + sum(backward)


def rest_bytes(bench: "Bench", looped: bool) -> int:
    """Bytes that the elementwise rest of a step must move.

    Sums over tokens (gradients of vectors) are by-products of what is read anyway: nothing extra.
    """
    cfg, flat, size = bench.run.cfg, bench.run.flat, bench.dist.dtype.itemsize
    encoder, decoder = train_gpt.layer_schedule(cfg, looped)
    elements = sum(layer_elements(cfg, i) for i in encoder + decoder)
    # A skip is one more term of a mix: read, read for its weight, its gradient written and added.
    elements += len(encoder) * 5 * cfg.model_dim
    # Each matrix is read and cast for its products; its gradient is read, cast and added to the
    # flat one, once per micro-batch.
    casts = len(flat.part(flat.data, "muon")) * (4 + size + size + 8)
    return bench.tokens * size * elements + len(bench.parts) * casts


def ends_bytes(run: Run, tokens: int) -> int:
    """Bytes that embedding, final norm and loss must move beside the head's products.

    The loss reads the logits, for its gradient once more, and replaces them by it; products read
    and write them on top of that, which their own rate includes.
    """
    cfg, size = run.cfg, run.rt.dist.dtype.itemsize
    logits = 3 * cfg.vocab_size                 # read by the loss, read and replaced by its slope
    norms = 7 * cfg.model_dim                   # x0; final norm 2, its slope 3; gradient of x0
    table = 3 * 4 * cfg.model_dim               # fp32 rows read; their gradient read and written
    return tokens * (size * (logits + norms) + table)


def optimizer_work(run: Run) -> tuple[float, int]:
    """(FLOPs, bytes) of Newton-Schulz, which the ranks share, and of both updates.

    An iteration on an (m, n) matrix, m the smaller side, is X X^T, its square, and their sum by X.
    """
    flat, dist, flops = run.flat, run.rt.dist, 0
    for _, W in flat.stacks(flat.data):
        N, m, n = W.size(0), min(W.shape[1:]), max(W.shape[1:])
        flops += 5 * N * (2 * m * m * n + 2 * m ** 3 + 2 * m * m * n)       # 5 iterations
    muon = len(flat.part(flat.data, "muon"))
    adam = len(flat.data) - muon
    # Muon: gradient; momentum and weight, both read and written; update, cast, each way.  AdamW:
    # weight, gradient and two moments read, all but the gradient written.
    return flops / dist.world, muon * (5 * 4 + 2 * dist.dtype.itemsize) + adam * 7 * 4


# ------------------------------------------------------------------------------------------------
# Measurements: the step as a whole, then its parts on their own at the shapes of a micro-batch
# ------------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """One line of the table."""
    name: str
    ms: float
    floor_ms: float
    flops: float        # of products, per step; 0 = none
    basis: str          # what the floor consists of


class Bench(NamedTuple):
    """All that the measurements share."""
    run: Run
    rows: Tensor            # (B, T + 1) int64 random tokens, this rank's part of a step
    state: TrainState
    ceilings: Ceilings
    calls: int              # timed calls of everything

    dist = property(lambda b: b.run.rt.dist)
    tokens = property(lambda b: len(b.rows) * b.run.cfg.seq_len)    # per step on this rank
    parts = property(lambda b: train_gpt.micro_batches(b.rows, b.run.cfg.micro_batch_seqs))

    def time(self, work: Callable) -> float:
        """Milliseconds per step of `work()`, which is done once per micro-batch."""
        return len(self.parts) * time_call(self.dist, work, self.calls)


def random_rows(run: Run) -> Tensor:
    """This rank's part (B, T + 1) of a global batch, documents about 1,000 tokens long."""
    cfg, dist = run.cfg, run.rt.dist
    shape = cfg.batch_seqs // dist.world, cfg.seq_len + 1
    rows = torch.randint(2, cfg.vocab_size, shape, device=dist.device)
    return rows.masked_fill_(torch.rand(shape, device=dist.device) < 1e-3, train_gpt.BOS)


def step_phases(bench: Bench, looped: bool) -> list[Callable]:
    """The three phases of `TrainState.train_step` without LOOKAHEAD, on the same tokens.

    Weights move and are not put back: after the first step no matrix is zero, as in training.
    """
    run, state = bench.run, bench.state
    ema_weight = 1 - state.schedule.decay(run.cfg.ema_horizon_frac)
    return [lambda: train_gpt.forward_backward(run, bench.rows, looped),
            lambda: [o.step(1.0, run.cfg.muon_momentum) for o in state.optimizers.values()],
            lambda: state.ema.lerp_(run.flat.data, ema_weight)]


def attention_work(bench: Bench, windowed: int) -> Callable:
    """A function that runs the attention kernel of a layer (0) without or (1) with a window."""
    cfg, dist, tokens = bench.run.cfg, bench.dist, bench.parts[0][:, :-1]
    q, k, v, grad = (                                               # (B, T, H or K, D)
        torch.randn(*tokens.shape, heads, cfg.head_dim, device=dist.device, dtype=dist.dtype)
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads, cfg.num_heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    attend = train_gpt.compiler(cfg, dist)(bench.run.model.attention.attend)
    mask = bench.run.model.mask(tokens)[windowed]
    return lambda: torch.autograd.grad(attend(*inputs, mask), inputs, grad)


def product_work(bench: Bench, shape: tuple[int, int]) -> Callable:
    """A function that runs one matrix product and the two of its gradients; `shape` is (O, I)."""
    (O, I), kind = shape, dict(device=bench.dist.device, dtype=bench.dist.dtype)  # noqa: E741
    tokens = len(bench.parts[0]) * bench.run.cfg.seq_len
    x = torch.randn(tokens, I, **kind).requires_grad_()
    W = (torch.randn(O, I, **kind) / I ** 0.5).requires_grad_()
    grad = torch.randn(tokens, O, **kind)
    return lambda: torch.autograd.grad(F.linear(x, W), (x, W), grad)


def ends_work(bench: Bench) -> Callable:
    """A function that runs embedding, first and last norm, head and loss, forward and backward."""
    model, rows = bench.run.model, bench.parts[0]

    def loss(tokens, targets):
        """The model's loss without layers, tables of pairs and gates."""
        x = F.embedding(tokens, model.tok_emb).to(model.dtype)
        return model.per_token_loss(train_gpt.rms_norm(train_gpt.rms_norm(x)), targets).mean()
    compiled = train_gpt.compiler(bench.run.cfg, bench.dist)(loss)
    return lambda: compiled(rows[:, :-1], rows[:, 1:]).backward()


class Shared(NamedTuple):
    """Milliseconds of parts that do not depend on recurrence, attention and products of one run."""
    attention: list[float]                      # of a layer without and one with a window
    products: dict[tuple[int, int], float]      # by shape (O, I)
    ends: float
    upkeep: float


def measure_shared(bench: Bench) -> Shared:
    """Time the parts on their own."""
    flat, limit = bench.run.flat, bench.run.cfg.grad_clip_norm
    shapes = sorted({(p.O, p.I) for p in products(bench.run, False) if p.part != "head"})
    grads = [torch.zeros_like(g) for g in flat.grads]       # as autograd leaves them, apart
    upkeep = [lambda: torch._foreach_copy_(flat.grads, grads),
              lambda: train_gpt.clip_gradient_(flat.grad, limit)]
    whole, window = bench.time(attention_work(bench, 0)), bench.run.cfg.attention_window
    return Shared([whole, bench.time(attention_work(bench, 1)) if window else whole],
                  {shape: bench.time(product_work(bench, shape)) for shape in shapes},
                  bench.time(ends_work(bench)),
                  time_phases(bench.dist, upkeep, bench.calls)[-1])


def make_parts(bench: Bench, looped: bool, shared: Shared, phases: list[float]) -> list[Part]:
    """The table's lines; `phases` are the times of `step_phases` and of a whole step.

    Parts timed on their own may run a little faster or slower than between others; the difference
    ends up in the elementwise rest, the remainder of forward_backward.
    """
    run, tokens, floor = bench.run, bench.tokens, bench.ceilings.floor_ms
    found, params = products(run, looped), len(run.flat.data)
    order = [i for half in train_gpt.layer_schedule(run.cfg, looped) for i in half]
    attention_ms = sum(shared.attention[run.model.layers[i].attn.windowed] for i in order)
    parts = [Part("attention kernel", attention_ms, attention_ms,
                  tokens * attention_flops(run.cfg, len(order)), "its own time")]
    for part, name in dict(attn="attention products", mlp="MLP products").items():
        ms = sum(shared.products[p.O, p.I] for p in found if p.part == part)
        flops = tokens * product_flops(found, part)
        parts.append(Part(name, ms, floor(flops, 0), flops, "FLOPs"))
    flops = tokens * product_flops(found, "head")
    parts += [Part("embedding, head, loss", shared.ends, floor(flops, ends_bytes(run, tokens)),
                   flops, "FLOPs, bytes"),
              Part("gradient upkeep", shared.upkeep, floor(0, 20 * params), 0, "bytes")]
    rest = phases[0] - sum(p.ms for p in parts)
    flops, moved = optimizer_work(run)
    return [*parts,
            Part("elementwise rest", rest, floor(0, rest_bytes(bench, looped)), 0, "bytes"),
            Part("optimizer", phases[1], floor(flops, moved), flops, "FLOPs, bytes"),
            Part("EMA", phases[2], floor(0, 12 * params), 0, "bytes")]


def collective_lines(bench: Bench) -> Iterator[str]:
    """Times of the all-reduce of gradients and of the all-gathers of updates, of one step each."""
    dist, flat = bench.dist, bench.run.flat
    mine = [dist.equal_slice(W).to(dist.dtype) for _, W in flat.stacks(flat.data)]
    gathered = dist.world * sum(part.nbytes for part in mine)
    reduce_ms = time_call(dist, lambda: dist.all_reduce_(flat.buffer), bench.calls)
    gather_ms = time_call(dist, lambda: [dist.all_gather(x) for x in mine], bench.calls)
    yield f"all-reduce of {flat.buffer.nbytes / 1e6:.0f} MB of gradients: {reduce_ms:.2f} ms"
    yield f"all-gathers of {gathered / 1e6:.0f} MB of updates: {gather_ms:.2f} ms"


# ------------------------------------------------------------------------------------------------
# Command line: tables, and the settings that cannot be measured
# ------------------------------------------------------------------------------------------------

def say(*lines: str):
    """Print at once, so that earlier results stay if something later fails."""
    print(*lines, sep="\n", flush=True)


def part_lines(parts: list[Part], step_ms: float) -> Iterator[str]:
    """The table of parts, then the whole step."""
    form = "{:<21}  {:>8}  {:>7}  {:>7}  {:>8}  {:>10}  {}"
    yield form.format("part", "ms", "share", "TFLOP/s", "floor ms", "over floor", "floor from")
    floor = sum(p.floor_ms for p in parts)
    for p in [*parts, Part("whole step", step_ms, floor, 0, "sum of the above")]:
        yield form.format(p.name, f"{p.ms:.2f}", f"{100 * p.ms / step_ms:.1f} %",
                          f"{p.flops / p.ms / 1e9:.3g}" if p.flops else "", f"{p.floor_ms:.2f}",
                          f"{p.ms / p.floor_ms:.2f}", p.basis)


def report_step(bench: Bench, looped: bool) -> list[float]:
    """Time a step and its phases, and print the step's rates; returns `time_phases`."""
    dist, phases = bench.dist, time_phases(bench.dist, step_phases(bench, looped), bench.calls)
    flops, step_ms = model_flops(bench.run, looped), phases[-1]
    rate = bench.tokens * flops / step_ms * 1000
    peak = f", peak {torch.cuda.max_memory_allocated() >> 20} MiB" if dist.on_cuda else ""
    say("", f"{GRAPHS[looped]}: {step_ms:.2f} ms per step, "
        f"{1000 * dist.world * bench.tokens / step_ms:,.0f} tokens/s, {flops / 1e6:.4g} MFLOP per "
        f"token, {rate / 1e12:.4g} TFLOP/s = {100 * rate / bench.ceilings.flops:.1f} % MFU{peak}")
    return phases


def profile(bench: Bench, looped: bool) -> str:
    """The profiler's table of the slowest kernels of four steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for phase in 4 * step_phases(bench, looped):
            phase()
        bench.dist.barrier()
    return seen.key_averages().table("self_device_time_total", row_limit=25)


def measure(cfg: Config, dist: Dist, args: argparse.Namespace):
    """Build the model, time everything and print it."""
    run = train_gpt.build_run(cfg, dist, lambda event, **values: None)
    ceilings = measure_ceilings(dist, args.steps)
    say(f"ceilings: matrix product {ceilings.flops / 1e12:.4g} TFLOP/s, copy "
        f"{ceilings.bytes / 1e12:.4g} TB/s")
    state = TrainState(run, cfg.iterations, bool(cfg.num_loops))
    bench = Bench(run, random_rows(run), state, ceilings, args.steps)
    graphs = [looped for looped, graph in GRAPHS.items()
              if args.graph in (None, graph) and (cfg.num_loops or not looped)]
    steps = {looped: report_step(bench, looped) for looped in graphs}
    shared = measure_shared(bench)
    whole, windowed = shared.attention
    say("", f"attention kernel of a layer: {whole:.2f} ms, with a window {windowed:.2f} ms")
    for looped, phases in steps.items():
        parts = make_parts(bench, looped, shared, phases)
        say("", f"{GRAPHS[looped]}, part by part", *part_lines(parts, phases[-1]))
    if dist.world > 1:
        say("", *collective_lines(bench))
    for looped in graphs if args.kernels else ():           # last: it may slow down what follows
        say("", f"{GRAPHS[looped]}, kernels of four steps", profile(bench, looped))


def run_benchmark(argv: list[str] | None) -> int:
    """Measure as the command line and the environment say."""
    parser = console.Parser(prog="step_time.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, metavar="N",
                        help="timed calls of every part, and of the step (default: 20)")
    parser.add_argument("--graph", choices=list(GRAPHS.values()), help="only this one")
    parser.add_argument("--kernels", action="store_true", help="also profile four steps")
    args = parser.parse_args(argv)
    cfg, chosen = train_gpt.config_from_env()
    dist = Dist()
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: must be at least 1")
    if args.kernels and not dist.on_cuda:
        raise ConfigError("--kernels: only a GPU has kernels to profile; leave it out")
    if args.graph == "looped" and not cfg.num_loops:
        raise ConfigError("--graph looped: NUM_LOOPS=0 leaves no layer to loop over; set it to 1")
    output = contextlib.nullcontext() if dist.is_main else contextlib.redirect_stdout(io.StringIO())
    with output, train_gpt.sdpa_backends(dist):
        device = torch.cuda.get_device_name() if dist.on_cuda else "CPU"
        settings = " ".join(f"{n.upper()}={getattr(cfg, n)}" for n in chosen)
        say(f"{dist.world} x {device}, torch {torch.__version__}, medians of {args.steps}; "
            f"settings: {settings or 'none'}")
        measure(cfg, dist, args)
    dist.close()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after one line about bad settings or too little memory."""
    return console.run("step_time", lambda: run_benchmark(argv), train_gpt.GolfError,
                       torch.OutOfMemoryError)


if __name__ == "__main__":
    sys.exit(main())
