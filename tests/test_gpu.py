"""train_gpt.py on a GPU: compiled, fused and spread over ranks, it computes what a CPU computes.

    python -m pytest -q tests/test_gpu.py

Skipped where there is no NVIDIA GPU.  conftest.py hides GPUs from the process of the tests, so
every test here does its work in a process with a clean environment.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROGRAM, ROOT, finish, parse_line
from test_train import PINNED, scores, steps

GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))
pytestmark = pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU")

# Loss by which a run of 20 steps may differ from another with the same mathematics in bf16.  With
# bf16 activations on a CPU it differs from the fp32 run, and from itself under another split into
# micro-batches, by up to 0.006; the losses of neighbouring steps differ by 0.05 and more.
NOISE = 0.02
# A bf16 number has 8 significant bits: rounding to nearest moves it by 2^-9 of its size at most.
ROUNDING = 2.0 ** -9
PEAK_GIB = 60.0     # of a micro-batch of 64 x 2,048 tokens: an 80 GB card must have room to spare

# Wide enough for the kernels of the MLP: hidden widths are multiples of 256, model widths of 64.
WIDE = dict(MODEL_DIM="128", MLP_MULT="4.0", ITERATIONS="20", TRAIN_LOG_EVERY="1",
            EMBED_STEP="0")                 # so that calibration takes gradients, too

# Runs train_gpt.py and counts, at every line of its log, what PyTorch has compiled so far; the
# backward pass of a graph is compiled apart from it, when it is first needed.
COUNTING = """
import sys
import torch._dynamo.utils as utils
import train_gpt
write = train_gpt.Log.line
def write_with_count(log, text):
    lowered = sum(n for name, n in utils.counters["inductor"].items() if "fxgraph_cache" in name)
    write(log, f"{text} compiled={utils.counters['stats']['unique_graphs'] + lowered}")
train_gpt.Log.line = write_with_count
sys.exit(train_gpt.main())
"""
# Prints, for some shapes, the error of the kernels' output and three gradients over their length,
# against a twin that takes the activation's slope, as they do, at eight bits of its argument.
FUSED_MLP = """
import json, torch
import torch.nn.functional as F
from train_gpt import Activation, FusedMLP
def twin(x, up, down):
    p = F.linear(x, up)
    near = Activation.apply(p + (p.to(torch.float8_e4m3fn).to(p.dtype) - p).detach())
    return F.linear(near + (Activation.apply(p) - near).detach(), down)
def results(function, args, grad):
    args = [a.detach().requires_grad_() for a in args]
    y = function(*args)
    return [y, *torch.autograd.grad(y, args, grad.to(y.dtype))]
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
found = []
for B, T, C, O in SHAPES:
    shapes = (B, T, C), (O, C), (C, O), (B, T, C)
    *args, grad = (torch.randn(s, device=DEVICE).mul(s[-1] ** -0.25).bfloat16() for s in shapes)
    ours = results(FusedMLP.apply, args, grad)
    exact = results(twin, [a.float() for a in args], grad)
    found += [((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]
print(json.dumps(found))
"""
# Prints, for each backend at hand, how far outputs and gradients of attention within documents are
# from a dense mask's in fp32, over their length, and how much of a gradient leaves its document.
DOCUMENTS = """
import json, torch
from train_gpt import BOS, FlashAttention4, FlexAttention, Sdpa
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
rows = torch.randint(2, 300, (2, 512), device="cuda")
rows[0, [0, 1, 7, 130, 131, 511]], rows[1, [40, 200]] = BOS, BOS
inputs = [torch.randn(2, 512, n, 128, device="cuda").bfloat16() for n in (4, 2, 2)]
grad = torch.randn(2, 512, 4, 128, device="cuda")
grad[1] = 0
def results(backend, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = torch.compile(backend.attend, fullgraph=True)(*inputs, backend.masks(rows, True, [0])[0])
    return [y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]
exact = results(Sdpa(), [x.float() for x in inputs])
found = {}
for kind in (FlexAttention, FlashAttention4):
    try:
        backend = kind(torch.compile) if kind is FlexAttention else kind()
    except ImportError:
        continue
    ours = results(backend, inputs)
    backend.check()
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]
    leak = sum(g[1].abs().max().item() for g in ours[1:])
    found[backend.name] = dict(error=max(errors), leak=leak)
print(json.dumps(found))
"""
# Prints the peak of memory in MiB of two looped micro-batches, forward and backward.
MEMORY = """
import sys, torch, train_gpt
cfg, _ = train_gpt.config_from_env()
dist = train_gpt.Dist()
with train_gpt.sdpa_backends(dist):
    run = train_gpt.build_run(cfg, dist, train_gpt.Log(cfg, dist))
    rows = torch.randint(cfg.vocab_size, (cfg.batch_seqs, cfg.seq_len + 1), device=dist.device)
    for _ in range(2):
        train_gpt.forward_backward(run, rows, True)
print(torch.cuda.max_memory_allocated() >> 20)
"""


def run_clean(folder: Path, env: dict, *command: str, seconds: float = 170.0) -> str:
    """Output of a Python command in a process that sees all GPUs and these settings only."""
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "USER", "PYTHONPATH", "CUDA_DEVICE_ORDER")
    env = {**{n: os.environ[n] for n in kept if n in os.environ}, **env}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    process = subprocess.Popen([sys.executable, *command], env=env, cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    done = finish(process, seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def train(toy_settings, tmp_path_factory):
    """A function (settings, *command) that runs train_gpt.py on the toy corpus; returns events."""
    def train(settings: dict, *command: str) -> list[tuple[str, dict]]:
        folder = tmp_path_factory.mktemp("gpu")
        env = {**toy_settings, "OUT_DIR": str(folder), **settings}
        out = run_clean(folder, env, *(command or [str(PROGRAM)]))
        return [parse_line(line) for line in out.splitlines()]
    return train


@pytest.fixture(scope="module")
def compiled(train):
    """Events of a compiled run of all stages on the wall clock, with the count of compilations."""
    settings = dict(WIDE, WARMUP_STEPS="3", MAX_WALLCLOCK_SECONDS="60")
    events = train(settings, "-c", COUNTING)
    [model] = [v for e, v in events if e == "model"]
    assert model["kernels"] == "1"              # or the tests below would be about something else
    return events


@pytest.fixture(scope="module")
def eager(train):
    """Events of a run of all stages without the compiler and the kernels."""
    return train({**WIDE, "COMPILE_ENABLED": "0"})


def test_compiled_equals_eager(compiled, eager):
    """20 losses, plain and looped, with the compiler and the kernels, and without both."""
    assert len(steps(eager)) == 20
    assert steps(compiled) == pytest.approx(steps(eager), abs=NOISE)


def test_nothing_compiles_on_a_clock(compiled):
    """Neither training and calibration nor scoring compile anything after their warm-up."""
    count = {}
    for event, values in compiled:
        key = f"warm_up {values['graph']}" if event == "warm_up" else event
        count[key] = int(values["compiled"]) if "compiled" in values else None
    assert count["warm_up plain"] > 0
    assert count["warm_up plain"] < count["warm_up looped"] < count["warm_up calibration"]
    assert "loop_on" in count and count["budget"] == count["train_end"]
    assert count["train_end"] == count["gradients"] == count["hessians"]
    assert count["warm_up scoring"] == count["eval"] == count["ledger"]


def test_pinned_losses(train):
    """The losses of test_train.py, which are those of a CPU."""
    events = train(dict(ITERATIONS="20", TRAIN_LOG_EVERY="1", STAGES="train", COMPILE_ENABLED="0"))
    assert steps(events) == pytest.approx(dict(enumerate(PINNED, 1)), abs=NOISE)


def fused_mlp_errors(folder: Path, device: str, shapes: list, **env: str) -> list[float]:
    """Relative errors of the kernels in bf16 against fp32 on the same inputs."""
    setup = f"SHAPES, DEVICE = {shapes}, {device!r}\n"
    return json.loads(run_clean(folder, env, "-c", setup + FUSED_MLP))


def test_fused_mlp_equals_its_twin(tmp_path):
    """Output and gradients are exact but for the rounding of intermediate results to bf16.

    At most four rounded numbers meet in a result: the activation or its slope, which doubles the
    error of its argument, the incoming product, and the result itself.
    """
    errors = fused_mlp_errors(tmp_path, "cuda", [(2, 128, 512, 2048), (1, 300, 128, 512)])
    assert len(errors) == 8 and max(errors) <= 4 * ROUNDING, errors


def test_documents_in_attention(tmp_path):
    """FlexAttention, and FlashAttention-4 where it is installed, are the dense mask in bf16."""
    found = json.loads(run_clean(tmp_path, {}, "-c", DOCUMENTS).splitlines()[-1])
    assert "flex" in found
    for backend, values in found.items():
        assert values["error"] <= 4 * ROUNDING and values["leak"] == 0, (backend, values)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_ranks_give_what_one_gives(eager, train):
    """20 losses and all scores of a torchrun with two ranks, without the compiler to save time."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)
    pair = train({**WIDE, "COMPILE_ENABLED": "0"}, *torchrun)
    assert steps(pair) == pytest.approx(steps(eager), abs=NOISE)
    one, two = (scores(events, "val_loss") for events in (eager, pair))     # nats, as NOISE is
    assert two == pytest.approx(one, abs=NOISE)


def test_peak_memory_of_a_micro_batch(tmp_path):
    """64 sequences of 2,048 tokens through #1876's looped model, forward and backward."""
    out = run_clean(tmp_path, dict(RECIPE="pr1876", TRAIN_BATCH_TOKENS=str(64 * 2048)), "-c",
                    MEMORY)
    assert 0 < int(out.splitlines()[-1]) < PEAK_GIB * 1024
