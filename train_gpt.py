#!/usr/bin/env python3
"""Train a language model in ten minutes, compress it to 16,000,000 bytes, and score it legally.

A run trains on the wall clock, quantizes the averaged weights with GPTQ, writes one artifact, reads
it back, and scores it in bits per byte of held-out text; test-time training learns from a chunk of
that text only after the chunk has been scored.

    RECIPE=demo python train_gpt.py                                      # laptop, a few minutes
    SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py        # the challenge: 8 x H100

`python train_gpt.py --help` lists every setting; each is an environment variable.

Sections: Configuration, Runtime, Tokens, Batches, Model, Optimizer, Quantization, Artifact,
Evaluation, Test-time training, Training, Kernels, Main, in the order in which data meets them.

Shapes: B sequences, T positions, C model width, H query heads, K kv heads, G = H/K, D head width,
        R rotated channel pairs, V vocabulary;  N matrices of one shape with O outputs and I inputs.
"""
import difflib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))     # imports take seconds; see main()

import brotli
import constriction
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit = triton.jit
except ImportError:         # PyTorch for CPUs comes without Triton and needs none
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: kernel


class GolfError(Exception):
    """Base class for expected failures; main() prints them as one line and exits with status 2."""


class ConfigError(GolfError):
    """A setting is unknown, malformed, or contradicts another setting or this machine."""


# ------------------------------------------------------------------------------------------------
# Configuration: every setting of a run, typed, checked, and read from the environment
# ------------------------------------------------------------------------------------------------
# Defaults are parameter-golf #1876; `RECIPES` holds the differences of other systems: #1858 without
# its byte mixture (see experiments/), #1060 without recurrence but with tables of token pairs and
# values, and a demo for laptops.  Constants that were tuned there for 4,550 steps (momentum warm-up
# of 1,500 steps, averaging over 286) are fractions of the run here, so short runs behave alike.

def setting(default, low: float | None = None, below: float = 1 << 60):
    """A field of Config with low <= value < below; without `low` a number must be positive."""
    return field(default=default, metadata=dict(low=low, below=below))


# A field's place in Config gives its group: from a field named here to the next one.  The artifact
# holds "model" and "scoring"; another "model" is refused, also for the lack of a new field.
GROUPS = dict(recipe="run", data_dir="data", vocab_size="model", iterations="training",
              lookahead="optimizer", code_step="quantization", eval_stride="scoring")


def find_problems(c):
    """Yield a message for each value of a Config that its bounds or another setting rule out."""
    for f in fields(c):
        value, name = getattr(c, f.name), f.name.upper()
        low, below = f.metadata.get("low"), f.metadata.get("below", 1 << 60)
        if type(value) in (int, float):
            if value <= 0 if low is None else value < low:
                yield f"{name}={value}: must be {'positive' if low is None else f'at least {low}'}"
            if value >= below:
                yield f"{name}={value}: must be below {below}"
    for part, whole in (("num_heads", "model_dim"), ("num_kv_heads", "num_heads"),
                        ("eval_stride", "seq_len"), ("seq_len", "train_batch_tokens")):
        a, b = getattr(c, part), getattr(c, whole)
        if b % a:
            yield f"{part.upper()}={a} does not divide {whole.upper()}={b}"
    for name in ("smear_channels", "head_gate_channels"):
        if getattr(c, name) > c.model_dim:
            yield f"{name.upper()}={getattr(c, name)}: must be at most MODEL_DIM={c.model_dim}"
    for wrong, message in (
            (not c.ttt_documents and c.ttt_chunk_tokens % c.seq_len,
             f"SEQ_LEN={c.seq_len} does not divide TTT_CHUNK_TOKENS={c.ttt_chunk_tokens}"),
            (c.ttt_documents and c.ttt_chunk_tokens > c.seq_len, f"TTT_CHUNK_TOKENS="
             f"{c.ttt_chunk_tokens}: must be at most SEQ_LEN={c.seq_len} with TTT_DOCUMENTS"),
            (c.ttt_documents and c.extras_1060, "TTT_DOCUMENTS=1: must be 0 with EXTRAS_1060"),
            (c.stage_list != [s for s in ("train", "quantize", "eval") if s in c.stage_list],
             f"STAGES={c.stages}: must name some of train,quantize,eval in this order"),
            (c.flash_attn not in ("auto", "0", "4"),
             f"FLASH_ATTN={c.flash_attn}: must be one of auto, 0, 4"),
            (not c.corpus, f"DATASET={c.dataset}: must begin with lower-case letters"),
            (not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", c.name),
             f"RUN_ID={c.name}: must be letters, digits and . _ - after the first"),
            (c.hidden_dim < 1,
             f"MLP_MULT={c.mlp_mult}: leaves no hidden channel at MODEL_DIM={c.model_dim}"),
            (c.rope_dims % 2 or c.rope_dims > c.head_dim,
             f"ROPE_DIMS={c.rope_dims}: must be even and at most the head width {c.head_dim}"),
            (c.num_loops and not c.loop_start <= c.loop_end < c.num_layers,
             f"LOOP_START={c.loop_start}, LOOP_END={c.loop_end}: must be layers in order, the last "
             f"at most {c.num_layers - 1}"),
            (c.max_wallclock_seconds and c.warmup_steps < 2,
             f"WARMUP_STEPS={c.warmup_steps}: a run on the wall clock compiles and then times its "
             "steps; set it to 2 or more")):
        if wrong:
            yield message


@dataclass(frozen=True)
class Config:
    """Every setting of a run, with its meaning and unit: TTT_LR=0.01 sets the field `ttt_lr`."""
    recipe: str = "golf"  # named set of defaults, which settings override; those here are pr1876's
    seed: int = setting(1337, low=0)  # fixes initial weights and data order
    run_id: str = ""  # name of the log and of the run's folder; empty = recipe and seed
    out_dir: str = "."  # folder of logs/ and runs/
    stages: str = "train,quantize,eval"  # stages to run; each reads the files of the one before
    compile_enabled: bool = True  # use torch.compile and Triton kernels on CUDA devices
    flash_attn: str = "auto"  # FlashAttention: 4, 0 = PyTorch's attention, auto = 4 where it runs
    checkpoint_seconds: float = setting(0.0, low=0)  # checkpoint interval; 0 = only at the end
    resume: bool = False  # continue training from this run's checkpoint
    data_dir: str = "data"  # folder of datasets/<dataset>/ and tokenizers/
    dataset: str = "fineweb10B_sp8192"  # folder of shards; its leading letters begin shard names
    vocab_size: int = setting(8192, low=4, below=65537)  # tokenizer pieces; shards hold uint16
    seq_len: int = 2048  # context length in training and scoring
    num_layers: int = 11  # distinct transformer layers
    model_dim: int = 512  # width of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads
    mlp_mult: float = setting(4.0, below=1 << 20)  # MLP hidden width as a multiple of model_dim
    rope_dims: int = setting(16, low=0)  # rotated channels of a head; the rest are not
    rope_base: float = 10000.0  # rotary base
    qk_gain_init: float = 5.25  # initial query gain of each head, applied after QK norm
    xsa_last_n: int = setting(11, low=0)  # exclusive self attention in this many last layers
    logit_softcap: float = setting(30.0, below=70.5)  # cap * tanh(logits / cap); exp(70) is finite
    tied_embed_init_std: float = 0.005  # initial std of the embedding, also the output head
    num_loops: int = setting(2, low=0)  # extra passes over layers loop_start..loop_end; 0 = off
    loop_start: int = setting(3, low=0)  # first recurrent layer
    loop_end: int = setting(5, low=0)  # last recurrent layer
    parallel_residual_start: int = setting(7, low=0)  # first layer with parallel attention and MLP
    skip_gates_enabled: bool = True  # sigmoid gates on U-Net skips; off = weighted sums
    extras_1060: bool = False  # #1060's token-pair table, value embedding and smear gate
    smear_channels: int = setting(0, low=0)  # SmearGate computed from this many channels; 0 = off
    head_gate_channels: int = setting(0, low=0)  # gate heads from this many channels; 0 = off
    two_lanes: int = setting(0, low=0)  # last layers with two residual lanes
    documents: bool = False  # no attention between the documents of a window
    attention_window: int = setting(0, low=0)  # tokens seen by 3 layers of 4, not the last; 0 = all
    iterations: int = 20000  # maximum number of optimiser steps
    max_wallclock_seconds: float = setting(600.0, low=0)  # training + calibration; 0 = no limit
    train_batch_tokens: int = 786432  # tokens per step over all ranks
    micro_batch_seqs: int = 64  # maximum sequences per forward pass; memory, not results
    warmup_steps: int = setting(20, low=0)  # untimed steps that compile both graphs, then undone
    train_log_every: int = 50  # steps between log lines
    held_out_every: int = setting(0, low=0)  # steps between losses on held-out windows; 0 = off
    warmdown_frac: float = setting(0.72, low=0, below=1.0001)  # linear LR decay, share of training
    min_lr: float = setting(0.0, low=0)  # final learning rate as a share of the peak
    enable_looping_at: float = setting(0.35, low=0)  # share of training before recurrence starts
    looping_min_steps: int = setting(0, low=0)  # no recurrence with fewer expected steps of it
    ema_horizon_frac: float = setting(0.063, low=0)  # EMA horizon over expected steps; 0 = no EMA
    lookahead: float = setting(0.0, low=0)  # EMA-Nesterov, in mean steps; 0 = off
    tied_embed_lr: float = 0.03  # AdamW learning rate of the token tables
    matrix_lr: float = 0.022  # Muon learning rate
    scalar_lr: float = 0.02  # AdamW learning rate of gains and other vectors
    muon_wd: float = setting(0.095, low=0)  # weight decay of the matrices
    embed_wd: float = setting(0.085, low=0)  # weight decay of the token tables
    adam_wd: float = setting(0.02, low=0)  # weight decay of gains and other vectors
    beta1: float = setting(0.9, below=1)  # AdamW beta1
    beta2: float = setting(0.95, below=1)  # AdamW beta2
    muon_momentum: float = setting(0.99, below=1)  # Muon momentum after its warm-up
    muon_momentum_warmup_start: float = setting(0.92, below=1)  # Muon momentum at step 0
    muon_momentum_warmup_frac: float = setting(0.33, low=0)  # its warm-up over expected steps
    muon_momentum_warmup_steps: int = 1500  # upper bound of that warm-up
    muon_row_normalize: bool = True  # normalise rows of the update before orthogonalisation
    grad_clip_norm: float = setting(0.3, low=0)  # clip the global gradient norm to this; 0 = off
    code_step: float = setting(0.0, low=0)  # rounding step in row std, typical; 0 fits target_bytes
    embed_step: float = setting(0.15748, low=0)  # the embedding's; 0 = all steps by their damage
    gptq_calibration_batches: int = 64  # maximum batches of calibration
    gptq_damping: float = 0.01  # added to a Hessian's diagonal, relative to its mean
    target_bytes: int = 16000000  # size limit of code and model together
    eval_stride: int = 64  # targets between two sliding windows
    eval_batch_seqs: int = 64  # windows or documents at once; changes memory, not results
    sliding_enabled: bool = True  # also score sliding windows with frozen weights
    ttt_enabled: bool = True  # headline score with test-time training
    ttt_documents: bool = False  # each document teaches changes of its own; off: one SGD for all
    ttt_lr: float = setting(0.005, low=0)  # of a head, or SGD's peak, cosine to 0 over chunks
    ttt_attention: float = setting(0.0, low=0)  # of attention, over a head's; 0 = heads alone learn
    ttt_momentum: float = setting(0.9, low=0, below=1)  # SGD momentum, kept between chunks
    ttt_epochs: int = 3  # SGD steps on a chunk after it has been scored
    ttt_chunk_tokens: int = 32768  # targets scored before they may be learnt from
    eval_wallclock_seconds: float = setting(600.0, low=0)  # scoring the artifact; 0 = no limit

    def __post_init__(self):
        if problem := next(find_problems(self), None):
            raise ConfigError(problem)

    # Derived values.
    corpus = property(lambda c: re.match("[a-z]*", c.dataset).group())  # begins file names
    name = property(lambda c: c.run_id or f"{c.recipe}_seed{c.seed}")  # of log and run folder
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    hidden_dim = property(lambda c: int(c.mlp_mult * c.model_dim))  # of the MLP
    batch_seqs = property(lambda c: c.train_batch_tokens // c.seq_len)  # over all ranks
    stage_list = property(lambda c: c.stages.split(","))
    dataset_dir = property(lambda c: Path(c.data_dir) / "datasets" / c.dataset)
    tokenizer_path = property(
        lambda c: Path(c.data_dir) / "tokenizers" / f"{c.corpus}_{c.vocab_size}_bpe.model")
    run_dir = property(lambda c: Path(c.out_dir) / "runs" / c.name)
    checkpoint_path = property(lambda c: c.run_dir / "checkpoint.golf")
    artifact_path = property(lambda c: c.run_dir / "model.golf")

    def group(self, name: str) -> dict:
        """Values of the fields of one group of `GROUPS`."""
        current, values = "", {}
        for key, value in asdict(self).items():
            current = GROUPS.get(key, current)
            if current == name:
                values[key] = value
        return values


# Step counts of #1060 (warm-down 3,500, momentum 1,500, averaging 333) are fractions of its 6,700
# steps here; its rotary base is the value that its length rule made of 10,000 in every run.  Its
# original quantizes by another rule (percentile clips, LZMA); here every recipe uses one quantizer.
GOLF = dict(
    seq_len=4096, micro_batch_seqs=32, num_heads=4, num_kv_heads=2, rope_dims=32,
    rope_base=50000.0, smear_channels=12, head_gate_channels=12, two_lanes=3, documents=True,
    attention_window=512, looping_min_steps=2000, warmdown_frac=0.85, min_lr=0.1, matrix_lr=0.02,
    ema_horizon_frac=0.055, lookahead=0.5, beta2=0.99, muon_momentum=0.95,
    muon_momentum_warmup_frac=0.15, muon_momentum_warmup_steps=300, embed_step=0.0,
    gptq_calibration_batches=16, gptq_damping=0.1, ttt_documents=True, ttt_lr=4.0,
    ttt_attention=0.005, ttt_chunk_tokens=48)
RECIPES = {
    "pr1876": {},
    "pr1858": dict(ttt_epochs=2),
    "pr1060": dict(
        dataset="fineweb10B_sp1024", vocab_size=1024, mlp_mult=3.0, rope_base=22081.8,
        qk_gain_init=1.5, num_loops=0, parallel_residual_start=11, skip_gates_enabled=False,
        extras_1060=True, warmdown_frac=0.52, ema_horizon_frac=0.05, tied_embed_lr=0.035,
        matrix_lr=0.025, scalar_lr=0.025, muon_wd=0.04, embed_wd=0.04, adam_wd=0.04,
        muon_momentum_warmup_frac=0.22, muon_row_normalize=False, ttt_enabled=False),
    "golf": GOLF,
    "solo": dict(GOLF, num_loops=0, train_batch_tokens=65536),
    "demo": dict(
        dataset="demo_sp1024", vocab_size=1024, seq_len=256, num_layers=4, model_dim=128,
        num_heads=4, num_kv_heads=2, num_loops=0, qk_gain_init=2.0, xsa_last_n=4,
        parallel_residual_start=3, smear_channels=12, head_gate_channels=12, two_lanes=1,
        max_wallclock_seconds=90.0, train_batch_tokens=1024, warmup_steps=3, warmdown_frac=0.85,
        min_lr=0.05, tied_embed_lr=0.06, matrix_lr=0.02, scalar_lr=0.03, beta2=0.99,
        muon_momentum=0.95, muon_momentum_warmup_frac=0.15, code_step=0.45, embed_step=0.0,
        gptq_damping=0.1, ttt_documents=True, ttt_lr=1.4, ttt_chunk_tokens=32),
}

# Names that the challenge's own scripts read, with the setting that does their work here.
FOREIGN = dict(
    TRAIN_SEQ_LEN="SEQ_LEN", EVAL_SEQ_LEN="SEQ_LEN", TOKENIZER_PATH="DATA_DIR and DATASET",
    DATA_PATH="DATA_DIR and DATASET", WARMDOWN_ITERS="WARMDOWN_FRAC, a share of the run",
    GPTQ_RESERVE_SECONDS="MAX_WALLCLOCK_SECONDS, which covers calibration",
    EMA_DECAY="EMA_HORIZON_FRAC, a share of the run", SLIDING_WINDOW_ENABLED="SLIDING_ENABLED",
    VAL_BATCH_SIZE="EVAL_BATCH_SEQS", VAL_BATCH_TOKENS="EVAL_BATCH_SEQS")
EXPECTED = {bool: "0 or 1", int: "a whole number", float: "a finite number", str: "text"}


def parse_as(kind: type, text: str):
    """`text` as a bool, int, finite float or str, or None if it is none."""
    with suppress(KeyError, ValueError):
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        value = kind(text)
        return None if kind is float and not math.isfinite(value) else value


def config_from_env(env=os.environ) -> tuple[Config, list[str]]:
    """The run's `Config` and the names of the settings that `env` sets; raises ConfigError."""
    kinds = {f.name: type(f.default) for f in fields(Config)}
    recipe, chosen = env.get("RECIPE", Config.recipe), {}
    if recipe not in RECIPES:
        raise ConfigError(f"RECIPE={recipe}: must be one of {', '.join(RECIPES)}")
    for var, text in env.items():
        name = var.lower()
        if var.isupper() and name in kinds:
            chosen[name] = parse_as(kinds[name], text)
            if chosen[name] is None:
                raise ConfigError(f"{var}={text!r}: expected {EXPECTED[kinds[name]]}")
        elif var in FOREIGN:
            raise ConfigError(f"{var} is not a setting here; use {FOREIGN[var]}")
        else:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.85) or [
                k for k in kinds if sorted(k) == sorted(name)]
            # MODEL_DIR=/models resembles MODEL_DIM, but no number: it is another program's.
            if near and parse_as(kinds[near[0]], text) is not None:
                raise ConfigError(f"{var} is not a setting; did you mean {near[0].upper()}?")
    return Config(**{**RECIPES[recipe], **chosen}), list(chosen)


def own_source() -> bytes:
    """The running file: the readable program or the packed one."""
    return Path(__file__).read_bytes()


def print_help():
    """Print every setting with its default and, from the comments of `Config`, its meaning."""
    source = own_source().decode("latin1")
    meanings = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    print("usage: [SETTING=value ...] python train_gpt.py\n\nSettings and defaults "
          f"(RECIPE: {', '.join(RECIPES)}):")
    for f in fields(Config):
        if f.name in GROUPS:
            print(f"\n{GROUPS[f.name]}")
        print(f"  {f.name.upper() + '=' + str(f.default):<36} {meanings.get(f.name, '')}")


# ------------------------------------------------------------------------------------------------
# Runtime: ranks, log and clocks; all communication between processes
# ------------------------------------------------------------------------------------------------
# One rank and many are one code path: outside this section nobody asks how many there are, except
# to slice work.  The log is the proof of a run, so all that a reviewer needs is in it: settings,
# hashes of code, data, data order and artifact, and the order of scoring and learning.

class Dist:
    """This process among `world` equal ranks; every collective is the identity on one rank."""

    def __init__(self, env=os.environ):
        """Join the process group that torchrun describes in `env`; raises ConfigError."""
        values = {n: env.get(n, d) for n, d in dict(WORLD_SIZE=1, RANK=0, LOCAL_RANK=0).items()}
        ranks = self.world, self.rank, self.local_rank = [parse_as(int, v) for v in values.values()]
        port = parse_as(int, env.get("MASTER_PORT", "")) or 0
        launched = all(n in env for n in (*values, "MASTER_ADDR")) and 0 < port < 1 << 16
        if (None in ranks or not 0 <= self.rank < self.world < 1 << 16 or self.local_rank < 0
                or self.world > 1 and not launched):
            raise ConfigError(" ".join(f"{n}={v}" for n, v in values.items()) + ", MASTER_PORT: "
                              "no launcher's; start with torchrun, or unset WORLD_SIZE and RANK")
        self.is_main = self.rank == 0
        self.on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.on_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32      # of activations
        if self.on_cuda:
            if self.local_rank >= (count := torch.cuda.device_count()):
                raise ConfigError(f"LOCAL_RANK={self.local_rank}: this machine has {count} GPUs; "
                                  "lower --nproc_per_node")
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # AdamW imports this late; after gloo's threads have started that can abort the exit.
            from torch import _dynamo
            backend, device = ("nccl", self.device) if self.on_cuda else ("gloo", None)
            torch.distributed.init_process_group(backend, device_id=device)

    def local_slice(self, items):
        """This rank's share of `items`, every world-th of them."""
        return items[self.rank::self.world]

    def equal_slice(self, x: Tensor) -> Tensor:
        """This rank's slice of `x` along dimension 0, padded with zeros to one length on all."""
        each = -(-len(x) // self.world)
        mine = x[self.rank * each:(self.rank + 1) * each]
        padding = x.new_zeros(each - len(mine), *x.shape[1:])
        return torch.cat([mine, padding]) if len(padding) else mine

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Replace `x` by its sum over ranks."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over ranks."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
        return x.tolist()

    def all_gather(self, part: Tensor) -> Tensor:
        """Equal parts of all ranks, concatenated along dimension 0 in rank order."""
        if self.world == 1:
            return part
        whole = part.new_empty(self.world * part.size(0), *part.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, part.contiguous())
        return whole

    def check_same(self, what: str, digest: str):
        """Raise GolfError unless every rank holds the same hex `digest`."""
        value = float(int(digest[:12], 16))                                 # exact: 48 bits
        high, low = self.all_reduce_max(value, -value)
        if high != -low:
            raise GolfError(f"{what} differs between ranks; give all of them the same files")

    def barrier(self):
        """Return when every rank has come here and this device has finished its work."""
        if self.on_cuda:
            torch.cuda.synchronize()
        if self.world > 1:
            torch.distributed.barrier()

    def close(self):
        """Leave the process group."""
        if self.world > 1:
            torch.distributed.destroy_process_group()


def format_value(key: str, value) -> str:
    """`value` as the log spells it: scores to 8 decimals, other floats to 6 digits."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.8f}" if key.endswith(("bpb", "loss")) else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    text = str(value)
    return json.dumps(text) if re.search(r'[\s"]', text) or not text else text


def check_output(path: Path):
    """Raise GolfError if `path` exists and is no regular file: a FIFO would block forever."""
    if os.path.lexists(path) and not path.is_file():
        raise GolfError(f"{path}: is there and no regular file; move it away, or set RUN_ID")


class Log:
    """Rank 0 prints events as logfmt, also to logs/<run>.txt, and draws bars on a terminal."""

    def __init__(self, cfg: Config, dist: Dist):
        self.file, self.console = None, True
        self.on_terminal = dist.is_main and sys.stderr.isatty()
        if dist.is_main:
            path = self.path = Path(cfg.out_dir) / "logs" / f"{cfg.name}.txt"
            check_output(path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = path.open("a", encoding="utf-8", errors="backslashreplace")
                import fcntl                                # not on Windows, where main() refuses
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if "train" in cfg.stage_list and not cfg.resume:
                    self.file.truncate(0)
            except BlockingIOError:
                raise GolfError(f"{path}: another run is writing it; set another RUN_ID") from None
            except OSError as e:
                raise GolfError(f"{path}: cannot be written ({e.strerror}); see OUT_DIR") from None

    def __call__(self, event: str, **values):
        """Log `event` with its values."""
        self.line(" ".join([event, *(f"{k}={format_value(k, v)}" for k, v in values.items())]))

    def line(self, text: str):
        """Write a line as it is; a console that is gone (a lost ssh session) costs no run."""
        if self.file and self.console:
            try:
                tqdm.write(text) if self.on_terminal else print(text, flush=True)
            except OSError as e:
                self.console = self.on_terminal = False
                self("note", text=f"the console is gone ({e.strerror}); this file has the rest")
        if self.file:
            try:
                print(text, file=self.file, flush=True)
            except OSError as e:
                raise GolfError(f"{self.path}: cannot be written ({e.strerror})") from None

    def track(self, items: Iterable | None, what: str, total: float) -> tqdm:
        """A bar of `total` units over `items`, or moved by hand; drawn on a terminal only."""
        form = "{desc} {percentage:3.0f} % {bar:20} {remaining} left{postfix}"
        return tqdm(items, what, total, leave=False, bar_format=form, dynamic_ncols=True,
                    disable=not self.on_terminal)


class Clock:
    """Seconds of training, of access to training data and of scoring, against their budgets.

    It is also the key to the data: training shards can be opened only before training data is
    closed and validation shards only after, so no text can be learnt from before it is scored.
    """

    def __init__(self, cfg: Config, now=time.perf_counter):
        self.cfg, self.now, self.phase, self.started = cfg, now, "train", 0.0
        self.train_seconds = self.data_seconds = self.eval_seconds = 0.0

    def start(self, spent: float = 0.0):
        """Start the training clock with `spent` seconds of an earlier run on it."""
        self.started = self.now() - spent

    def elapsed(self) -> float:
        """Seconds on the training clock."""
        return self.now() - self.started

    def allow(self, split: str):
        """Raise GolfError unless tokens of `split` may be read in this phase."""
        if (split == "train") != (self.phase == "train"):
            raise GolfError(f"{split} shards must not be opened in the {self.phase} phase")

    def close_training_data(self, train_seconds: float = 0.0, data_seconds: float = 0.0):
        """End access to training data for good."""
        self.phase, self.train_seconds, self.data_seconds = "eval", train_seconds, data_seconds

    def overtime(self) -> list[tuple[str, float, float]]:
        """(clock, seconds, limit) of each budget that was exceeded; such a run does not count."""
        used = (("data", self.data_seconds, self.cfg.max_wallclock_seconds),
                ("eval", self.eval_seconds, self.cfg.eval_wallclock_seconds))
        return [(clock, s, limit) for clock, s, limit in used if limit and s > limit]


class Runtime(NamedTuple):
    """The surroundings of a run: its ranks, its log and its clocks."""
    dist: Dist
    log: Log
    clock: Clock


def compiler(cfg: Config, dist: Dist) -> Callable:
    """torch.compile with this program's options, or the identity where nothing is compiled."""
    if not cfg.compile_enabled or not dist.on_cuda:
        return lambda function: function
    # Inductor's fusion of row and column sums costs 7 to 12 ms a step here (bench/RESULTS.md).
    name = "triton.mix_order_reduction"
    options = {name: False} if name in torch._inductor.list_options() else {}
    return partial(torch.compile, dynamic=False, fullgraph=True, options=options)


def median_seconds(dist: Dist, times: int, work: Callable) -> float:
    """Median time of `work`, max over ranks; of two calls or more it discards the compiling one."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return dist.all_reduce_max(sorted(seconds)[(times - 1) // 2])[0]


def hex_digest(*parts) -> str:
    """SHA-256 of the parts' text, as hex."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def generator(*key) -> np.random.Generator:
    """Random numbers that depend on `key` alone, the same on every machine."""
    return np.random.Generator(np.random.PCG64(int(hex_digest(*key)[:16], 16)))


def write_atomic(path: Path, parts: Iterable[bytes]):
    """Write the byte strings `parts` to `path`, which appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")              # a killed run's is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise GolfError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        with suppress(OSError):                             # renamed, if all went well
            part.unlink()


# ------------------------------------------------------------------------------------------------
# Tokens: shards and their identity, the validation stream, and the bytes behind each token
# ------------------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (magic, version, count, zeros) and `count` uint16 token ids.
# Documents begin with BOS and may continue in the next shard.  manifest.json, by prepare_data.py,
# lists the SHA-256 of every file: a score on other data than that is a score of something else.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
WORD_MARK = "\u2581"    # SentencePiece's sign for a space before a piece
BOS = 1                 # the token that begins a document


class Shard(NamedTuple):
    """A file of tokens."""
    name: str               # of the file, without its folder
    tokens: np.ndarray      # (count,) uint16, mapped from the file


def read_shard(path: Path) -> Shard:
    """Map a shard into memory; raises GolfError naming the file and its fault."""
    try:
        size = path.stat().st_size
        if not path.is_file():                              # opening a FIFO would block forever
            raise GolfError(f"{path}: cannot be read (not a file)")
        header = np.fromfile(path, "<i4", 256).tolist()
        if len(header) < 256 or header[:2] != [SHARD_MAGIC, SHARD_VERSION]:
            raise GolfError(f"{path}: not a token shard (magic and version {header[:2]}, "
                            f"not {[SHARD_MAGIC, SHARD_VERSION]}); see prepare_data.py")
        count, whole = header[2], SHARD_HEADER_BYTES + 2 * header[2]
        if count < 1 or size != whole:
            raise GolfError(f"{path}: {size} bytes, but the {count} tokens of its header take "
                            f"{whole}; see prepare_data.py")
        return Shard(path.name, np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,)))
    except OSError as e:
        raise GolfError(f"{path}: cannot be read ({e.strerror})") from None


def find_shards(cfg: Config, split: str) -> list[Path]:
    """Paths of the shards of `split` in name order; raises GolfError if there is none."""
    unfinished = (cfg.dataset_dir / ".lock").is_file()
    if unfinished and not os.path.lexists(cfg.dataset_dir / "manifest.json"):
        raise GolfError(f"{cfg.dataset_dir}: not finished; run the same prepare_data.py again")
    paths = sorted(cfg.dataset_dir.glob(f"{cfg.corpus}_{split}_*.bin"))
    if not paths:
        raise GolfError(f"{cfg.dataset_dir}: no {cfg.corpus}_{split}_*.bin; make them with "
                        "prepare_data.py, or set DATA_DIR and DATASET")
    return paths


def read_json(path: Path):
    """Value of a JSON file; raises OSError, ValueError or RecursionError."""
    if path.exists() and not path.is_file():                # opening a FIFO would block forever
        raise ValueError("not a file")
    return json.loads(path.read_bytes())


def digest_files(paths: list[Path], cache_path: Path, log: Log) -> dict[str, str]:
    """SHA-256 of each file by name, hashed in parallel; `cache_path` makes a second start free.

    The cache maps "name size ctime inode" to SHA-256; unlike mtime, no program can set ctime back.
    """
    try:
        known, check = read_json(cache_path)
        known = known if check == hex_digest(known) else {}
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}                                          # whatever is wrong with it, hash again

    def digest(path: Path) -> tuple[str, str]:
        with path.open("rb") as f:
            stat = os.fstat(f.fileno())
            key = f"{path.name} {stat.st_size} {stat.st_ctime_ns} {stat.st_ino}"
            return key, known.get(key) or hashlib.file_digest(f, "sha256").hexdigest()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(log.track(pool.map(digest, paths), "hashing data", len(paths)))
    cache = dict(found)
    if not known.items() >= cache.items():
        with suppress(GolfError):                           # a folder that cannot be written to
            write_atomic(cache_path, [json.dumps([cache, hex_digest(cache)]).encode()])
    return {path.name: sha256 for path, (_, sha256) in zip(paths, found)}


class Identity(NamedTuple):
    """SHA-256 of the files that a run reads."""
    sha256: dict[str, str]  # of each file by name
    manifest: str           # "checked" against manifest.json, or "none" if there is none


def compare_with_manifest(cfg: Config, sha256: dict[str, str], prefixes: tuple[str, ...]) -> str:
    """Raise GolfError unless manifest.json, if there is one, lists these files."""
    path, remedy = cfg.dataset_dir / "manifest.json", "run the same prepare_data.py again"
    if not path.exists():
        return "none"
    try:
        manifest = read_json(path)
        entries = [*manifest["train"]["files"], *manifest["val"]["files"], manifest["tokenizer"]]
        listed = {str(entry["name"]): entry["sha256"] for entry in entries}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise GolfError(f"{path}: not a manifest; {remedy}") from None
    for name in sorted({*sha256, *(n for n in listed if n.startswith(prefixes))}):
        if sha256.get(name) != listed.get(name):
            fault = ("is missing" if name not in sha256 else
                     "is not in manifest.json" if name not in listed else
                     f"has SHA-256 {sha256[name][:12]}..., not that of manifest.json")
            raise GolfError(f"{cfg.dataset}: {name} {fault}; restore it, or {remedy}")
    return "checked"


def check_data(cfg: Config, rt: Runtime) -> Identity:
    """Hash the files that the stages need and compare them with the manifest; raises GolfError.

    Only digests leave this function, so it may read validation shards before training.
    """
    needed = dict(train=cfg.stage_list != ["eval"], val="eval" in cfg.stage_list)
    shards = {split: find_shards(cfg, split) for split in needed if needed[split]}
    # Headers first: they are cheap, and a FIFO must not be opened for hashing.
    counts = {split: sum(len(read_shard(p).tokens) for p in shards[split]) for split in shards}
    if counts.get("val", math.inf) <= cfg.seq_len:
        raise GolfError(f"{shards['val'][0]}: {counts['val']} validation tokens; one window of "
                        f"SEQ_LEN={cfg.seq_len} needs {cfg.seq_len + 1}")
    paths = [path for split in shards for path in shards[split]]
    if cfg.tokenizer_path.is_file():
        paths.append(cfg.tokenizer_path)
    elif "val" in shards:
        raise GolfError(f"{cfg.tokenizer_path}: no tokenizer of VOCAB_SIZE={cfg.vocab_size}; "
                        "prepare_data.py makes it")
    for first in (True, False):                 # local rank 0 first: the others read its cache
        if first == (rt.dist.local_rank == 0):
            sha256 = digest_files(paths, cfg.dataset_dir / ".sha256.json", rt.log)
        rt.dist.barrier()
    rt.dist.check_same("the dataset", hex_digest(*sorted(sha256.items())))
    prefixes = tuple(f"{cfg.corpus}_{split}_" for split in shards)
    return Identity(sha256, compare_with_manifest(cfg, sha256, prefixes))


def open_shards(cfg: Config, split: str, rt: Runtime, identity: Identity) -> list[Shard]:
    """All shards of `split` in name order, in the phase in which they may be read."""
    rt.clock.allow(split)
    shards = [read_shard(path) for path in find_shards(cfg, split)]
    sha256 = hex_digest(*(f"{s.name}:{identity.sha256[s.name]}" for s in shards))
    rt.log("data", split=split, dataset=cfg.dataset, files=len(shards),
           tokens=sum(len(s.tokens) for s in shards), sha256=sha256, manifest=identity.manifest)
    return shards


def check_ids(cfg: Config, tokens: np.ndarray, where: str):
    """Raise GolfError if a token id is beyond the vocabulary."""
    top = int(tokens.max())
    if top >= cfg.vocab_size:
        raise GolfError(f"{where}: token id {top} with VOCAB_SIZE={cfg.vocab_size}; set the "
                        "vocabulary size of the tokenizer that made the shards")


def load_validation(cfg: Config, rt: Runtime, identity: Identity) -> np.ndarray:
    """The validation stream (n + 1,) uint16, cut to n targets, a multiple of seq_len."""
    shards = open_shards(cfg, "val", rt, identity)
    for name, tokens in shards:
        check_ids(cfg, tokens, name)
    tokens = np.concatenate([s.tokens for s in shards])
    return tokens[:(len(tokens) - 1) // cfg.seq_len * cfg.seq_len + 1]


def load_tokenizer(path: Path, vocab_size: int, sha256: str = ""):
    """The SentencePiece model at `path`, with SHA-256 `sha256` if given; raises GolfError."""
    from sentencepiece import SentencePieceProcessor        # needed for scoring only
    try:
        if not path.is_file():
            raise GolfError(f"{path}: no tokenizer of VOCAB_SIZE={vocab_size}; see prepare_data.py")
        model, tokenizer = path.read_bytes(), SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(model)            # the constructor accepts an empty one
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))          # each must be text
    except (OSError, RuntimeError, ValueError):
        raise GolfError(f"{path}: not a SentencePiece model; see prepare_data.py") from None
    size, marked = tokenizer.vocab_size(), tokenizer.piece_to_id(WORD_MARK) != tokenizer.unk_id()
    if size != vocab_size or not marked:
        raise GolfError(f"{path}: {size} pieces and VOCAB_SIZE={vocab_size} must agree, and a "
                        "lone space must be a piece; see prepare_data.py")
    if sha256 and sha256 != hashlib.sha256(model).hexdigest():
        raise GolfError(f"{path}: not the tokenizer of this artifact; use the one it was made with")
    return tokenizer


def bytes_per_target(tokens: np.ndarray, tokenizer) -> np.ndarray:
    """Bytes of text that each target tokens[1:] stands for, (n,) int16, by the challenge's rule.

    A normal piece counts its UTF-8 bytes, a byte piece 1, a control piece 0; a leading space counts
    1 unless the previous token is a control piece, as at the start of a document.
    """
    ids = range(tokenizer.vocab_size())
    pieces = [tokenizer.id_to_piece(i) for i in ids]
    # Control tokens decode to nothing; the word after one has no leading space to count.
    control = np.array([tokenizer.is_control(i) or tokenizer.is_unknown(i)
                        or tokenizer.is_unused(i) for i in ids])                        # (V,)
    spaced = np.array([p.startswith(WORD_MARK) for p in pieces]) & ~control             # (V,)
    sizes = [1 if tokenizer.is_byte(i) else len(p.removeprefix(WORD_MARK).encode())
             for i, p in zip(ids, pieces)]
    size = np.array(sizes) * ~control                                                   # (V,)
    previous, target = tokens[:-1], tokens[1:]
    return (size[target] + (spaced[target] & ~control[previous])).astype(np.int16)      # (n,)


# ------------------------------------------------------------------------------------------------
# Batches: coprime strides through all shards; the same global batches on any machine
# ------------------------------------------------------------------------------------------------
# The loader of parameter-golf #726/#1060 as a pure function of (seed, shard names and sizes, batch
# index, batch size): no path, rank, world size or micro-batch enters it.  Every rank computes the
# whole plan, which is cheap, and reads every world-th window of it; a digest of all windows so far
# is compared across ranks and logged.
#
# A shard is cut into blocks of seq_len tokens.  With 7 blocks, start 2 and stride 3 it is read as
#     2 5 1 4 0 3 6        (start + t * stride) mod 7: a permutation, since gcd(3, 7) = 1
# so neighbours in the corpus are far apart in training, without a shuffled index of all blocks.

HELD_OUT = 64       # windows at the end of the last shard that no batch reads, with HELD_OUT_EVERY


def interleave(rng, buckets: list[np.ndarray]) -> np.ndarray:
    """Round-robin merge of shuffled buckets, in a random order of buckets each round."""
    buckets = [rng.permutation(b).tolist() for b in buckets]
    dealt = []
    while buckets:
        dealt += [buckets[i].pop() for i in rng.permutation(len(buckets))]
        buckets = [b for b in buckets if b]
    return np.array(dealt)


class CoprimePlan:
    """Endless sequence of global batches, each (seqs, 2) int64: shard index and token offset."""

    # Shards are drawn with weight blocks_left**alpha: alpha .9 follows their size while few of them
    # are mixed into a batch, .5 flattens it as more are, so that no shard is left over for the end.
    # Progress is that through the epoch and not, as in #1876, through training: neither clock nor
    # step count may enter the plan, or another machine would read other data.
    ALPHA, SHARDS_PER_BATCH = (0.9, 0.5), (8, 64)           # at the start, at the end of an epoch

    def __init__(self, cfg: Config, shards: list[Shard]):
        self.cfg, self.names = cfg, [s.name for s in shards]
        self.sizes = np.array([len(s.tokens) for s in shards])
        if cfg.held_out_every:
            self.sizes[-1] -= HELD_OUT * cfg.seq_len
        short = self.sizes <= cfg.seq_len
        if short.any():
            beside = f", beside {HELD_OUT} held-out ones" if cfg.held_out_every else ""
            raise GolfError(f"{self.names[int(short.argmax())]}: shorter than one sequence of "
                            f"SEQ_LEN={cfg.seq_len} and its target{beside}; lower it")
        self.batch, self.digest = 0, ""         # batches so far, and a digest of them
        self.key = hex_digest(cfg.seed, cfg.seq_len, cfg.batch_seqs, *self.names, *self.sizes)
        self.start_epoch(0)

    def start_epoch(self, epoch: int):
        """Draw a fresh phase, start and stride for every shard."""
        self.epoch, L = epoch, self.cfg.seq_len
        self.used, self.walks = np.zeros(len(self.names), np.int64), []
        for name, size in zip(self.names, self.sizes.tolist()):
            rng = generator(self.cfg.seed, "walk", name, size, epoch)
            phase = int(rng.integers(min(L, size - L)))
            blocks = (size - 1 - phase) // L
            candidates = (int(rng.integers(1, blocks + 1)) for _ in itertools.count())
            stride = next(s for s in candidates if math.gcd(s, blocks) == 1)
            self.walks.append((phase, int(rng.integers(blocks)), stride, blocks))
        self.blocks = np.array([w[3] for w in self.walks])

    def next_blocks(self, shard: int, count: int) -> np.ndarray:
        """The next `count` blocks of a shard, (count, 2)."""
        phase, start, stride, blocks = self.walks[shard]
        t = self.used[shard] + np.arange(count)
        self.used[shard] += count
        offset = phase + (start + t * stride) % blocks * self.cfg.seq_len
        return np.stack([np.full(count, shard), offset], 1)

    def draw_counts(self, rng, left: np.ndarray, need: int) -> np.ndarray:
        """How many blocks to read from each shard, (S,), at most what is `left` there."""
        p = 1.0 if self.epoch else self.used.sum() / self.blocks.sum()
        weight = left ** (self.ALPHA[0] + p * (self.ALPHA[1] - self.ALPHA[0]))
        few, many = self.SHARDS_PER_BATCH
        mixed = min(round(few + p * (many - few)), np.count_nonzero(left), need)
        chosen = rng.choice(len(left), mixed, replace=False, p=weight / weight.sum())
        counts = np.zeros_like(left)
        counts[chosen] = 1 + rng.multinomial(need - mixed, weight[chosen] / weight[chosen].sum())
        return np.minimum(counts, left)

    def next(self) -> np.ndarray:
        """The next global batch; its order interleaves the shards."""
        rng = generator(self.cfg.seed, "batch", self.batch)
        buckets, need = [], self.cfg.batch_seqs
        while need:
            left = self.blocks - self.used
            if not left.any():
                self.start_epoch(self.epoch + 1)
                continue
            counts = self.draw_counts(rng, left, need)
            buckets += [self.next_blocks(i, counts[i]) for i in np.flatnonzero(counts)]
            need -= counts.sum()
        windows, self.batch = interleave(rng, buckets), self.batch + 1
        self.digest = hex_digest(self.digest, windows.tobytes().hex())[:16]
        return windows

    def state_dict(self) -> dict:
        """Position in the plan, in values that JSON can hold."""
        return dict(key=self.key, batch=self.batch, epoch=self.epoch, digest=self.digest,
                    used=self.used.tolist())

    def load_state_dict(self, state: dict):
        """Continue from `state`; raises GolfError if it belongs to another order."""
        if state["key"] != self.key:
            raise GolfError("the checkpoint read its data in another order; use its SEED, SEQ_LEN, "
                            "TRAIN_BATCH_TOKENS, HELD_OUT_EVERY and shards")
        self.start_epoch(state["epoch"])
        self.batch, self.digest = state["batch"], state["digest"]
        self.used = np.array(state["used"])


class Batches:
    """Reads this rank's part of each global batch ahead of time, in a thread of its own."""
    AHEAD = 4       # batches read before they are asked for

    def __init__(self, cfg: Config, shards: list[Shard], dist: Dist, state: dict | None = None):
        self.cfg, self.shards, self.dist = cfg, shards, dist
        self.plan = CoprimePlan(cfg, shards)
        if state:
            self.plan.load_state_dict(state)
        self.state = self.plan.state_dict()     # after the last batch that `next` returned
        self.pool = ThreadPoolExecutor(1)
        self.ready = deque(self.pool.submit(self.read) for _ in range(self.AHEAD))

    def read(self) -> tuple[Tensor, dict]:
        """The next batch with its targets, (B, T + 1) uint16, and the plan's state after it."""
        windows = self.dist.local_slice(self.plan.next())
        shape, pinned = (len(windows), self.cfg.seq_len + 1), self.dist.on_cuda
        tokens = torch.empty(shape, dtype=torch.uint16, pin_memory=pinned)
        for row, (i, offset) in zip(tokens.numpy(), windows):
            row[:] = self.shards[i].tokens[offset:offset + len(row)]
            check_ids(self.cfg, row, self.shards[i].name)
        return tokens, self.plan.state_dict()

    def next(self) -> Tensor:
        """This rank's part of the next batch, (B, T + 1) int64 on its device."""
        tokens, self.state = self.ready.popleft().result()
        self.ready.append(self.pool.submit(self.read))
        return tokens.to(self.dist.device, non_blocking=True).long()

    def held_out(self) -> Tensor:
        """This rank's share of the held-out windows with their targets, (B, T + 1) int64."""
        T, rest = self.cfg.seq_len, self.shards[-1].tokens[self.plan.sizes[-1] - 1:]
        windows = torch.from_numpy(rest.astype(np.int64)).unfold(0, T + 1, T)
        return self.dist.local_slice(windows).to(self.dist.device)

    def close(self):
        """Stop reading and let go of the files."""
        self.pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------
# Model: a GPT with recurrent layers, exclusive self attention and gated U-Net skips
# ------------------------------------------------------------------------------------------------
# parameter-golf #1493/#1876.  One precision rule: parameters are fp32, activations have the dtype
# of the device, and a weight is cast to the dtype of its input.  Norms have no gain.  Output
# projections start at zero, so the branches of every layer begin at zero.
#
# A parameter's optimiser group is declared where it is created: "muon" for matrices, "embed" for
# the token tables, "scalar" for everything else.

class Context(NamedTuple):
    """Inputs that all layers of a forward pass share."""
    x0: Tensor                      # (B, T, C) normed embedding, where the residual stream began
    cos: Tensor                     # (T, 1, R) of the rotation angles
    sin: Tensor
    values: Tensor | None           # (B, T, K, D) value embedding of #1060
    attend: Callable                # (q, k, v, windowed): a backend's with its mask, or a `Past`'s
    tap: Callable | None            # tap(names, x) sees the input x of the matrices `names`
    adapt: Callable | None          # adapt(names, x, y): outputs y of x, changed by a learner
    fused: bool                     # run Triton kernels instead of their twins in PyTorch


def param(tensor: Tensor, group: str) -> nn.Parameter:
    """A parameter of an optimiser group."""
    p = nn.Parameter(tensor)
    p.group = group
    return p


def orthogonal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """A random matrix (rows, columns) with orthogonal rows or columns."""
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=rng)


class Linear(nn.Module):
    """A bias-free linear layer, (O, I): where matrices meet activations, and GPTQ sees them."""
    name = ""           # of the weight within the model; GPT sets it

    def __init__(self, in_features: int, out_features: int, rng: torch.Generator | None):
        super().__init__()
        shape = out_features, in_features                                       # (O, I)
        self.weight = param(orthogonal(*shape, rng) if rng else torch.zeros(shape), "muon")

    def forward(self, x: Tensor, ctx: Context, scale: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O) in the dtype of `x`, times `scale` (O,) if given."""
        return Linear.group([self], x, ctx, scale)

    def cast(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight (O, I) in `dtype`, its rows times `scale` (O,) if given."""
        # Scaling the rows is scaling the outputs, without a pass over all outputs and another over
        # their gradients: 3 ms of a looped step (bench/RESULTS.md).
        return (self.weight if scale is None else self.weight * scale[:, None]).to(dtype)

    @staticmethod
    def group(linears: list["Linear"], x: Tensor, ctx: Context, scale=None) -> Tensor:
        """Outputs of several matrices of one input x (..., I), concatenated, by one product."""
        if ctx.tap is not None:
            ctx.tap([linear.name for linear in linears], x)
        weights = [linear.cast(x.dtype, scale) for linear in linears]
        y = F.linear(x, torch.cat(weights) if len(weights) > 1 else weights[0])
        return y if ctx.adapt is None else ctx.adapt([linear.name for linear in linears], x, y)


def rms_norm(x: Tensor) -> Tensor:
    """`x` over its root mean square along the last dimension."""
    # The published systems leave eps at PyTorch's default, 1.2e-7 in fp32.  The embedding starts at
    # a mean square of 2.5e-5, so their first gradients are 2 % larger; scores were not compared.
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_angles(cfg: Config, positions: Tensor) -> Tensor:
    """Rotation angle of each of the positions (T,) and channel pair, (T, R) float32."""
    pairs = torch.arange(cfg.rope_dims // 2, dtype=torch.float64, device=positions.device)
    return torch.outer(positions.double(), cfg.rope_base ** -(pairs / len(pairs))).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 R channels of x (B, T, H, D) by the angles behind cos, sin (T, 1, R).

    Half-split layout: channel r is paired with r + R.  Source: RoFormer, arXiv:2104.09864.
    """
    R = cos.size(-1)
    a, b, rest = x.split([R, R, x.size(-1) - 2 * R], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def split_heads(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of all heads, after QK norm, rotation and query gain.

    Args: x (B, T, H + 2 K, D); gain (H,), length of a query over that of a key; cos, sin (T, 1, R).
    Returns: q (B, T, H, D), k (B, T, K, D), v (B, T, K, D).
    """
    H = len(gain)
    K = (x.size(2) - H) // 2
    q, k, v = x.split([H, K, K], dim=2)
    return (rotate(rms_norm(q), cos, sin) * gain.to(x.dtype)[:, None],
            rotate(rms_norm(k), cos, sin), v)


def exclude_self(y: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """Remove from each head's output its component along the token's own value.

    Args: y (B, T, H, D) attention output; v (B, T, K, D) values, K dividing H; gate (B, T, H),
        which the result is multiplied with.
    Source: exclusive self attention (XSA), arXiv:2603.09078; parameter-golf #265, #1019.
    """
    B, T, H, D = y.shape
    K = v.size(2)
    v = F.normalize(v, dim=-1).unsqueeze(3)                             # (B, T, K, 1, D)
    y = y.view(B, T, K, H // K, D)                                      # (B, T, K, G, D)
    y = (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, D)
    return y if gate is None else y * gate[..., None]


class Sdpa:
    """PyTorch's attention, base of the others; documents are a dense mask, too slow for GPUs."""
    name = "sdpa"

    def masks(self, tokens: Tensor, documents: bool, windows: list[int]) -> list:
        """Pairs of tokens (B, T) that see each other, for each window (0 = all); None: causal."""
        if not documents and not any(windows):              # nothing to build for every batch
            return [None] * len(windows)
        document = ((tokens == BOS) & documents).cumsum(1)                          # (B, T)
        visible = (document[:, None] == document[:, :, None]).tril()[:, None]       # (B, 1, T, T)
        return [visible.triu(1 - w) if w else visible if documents else None for w in windows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Causal grouped-query attention: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)

    def check(self):
        """Raise GolfError if a batch so far was more than this attention can do."""


class FlexAttention(Sdpa):
    """PyTorch's compiled attention, which skips blocks of 128 positions without a common document.

    Its mask is made outside of the graph that uses it: inside, torch 2.11 freed it too early.
    """
    name = "flex"

    def __init__(self, compiled: Callable):
        self.create = compiled(create_block_mask)

    def masks(self, tokens: Tensor, documents: bool, windows: list[int]) -> list[BlockMask]:
        """Blocks that the queries of each block of tokens (B, T) see, for each window."""
        document, (B, T) = ((tokens == BOS) & documents).cumsum(1), tokens.shape

        def within(window):
            def visible(b, h, query, key):
                same = document[b, query] == document[b, key]
                return same & (query >= key) & (query - key < window)
            return visible
        return [self.create(within(w or T), B, None, T, T, tokens.device) for w in windows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


class FlashFunction(torch.autograd.Function):
    """FlashAttention-4 on q (n, H, D), k and v (n, K, D) within documents from `starts` on."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> Tensor:
        out, lse = torch.ops.golf.flash_forward(q, k, v, starts, window)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = torch.ops.golf.flash_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window)
        return *grads, None, None


class FlashAttention4(Sdpa):
    """FlashAttention-4 (arXiv:2603.05451) over all documents of a batch, one after the other.

    Two custom operators keep the compiler out of it.  Raises ImportError without the package.
    """
    name = "flash4"
    VERSION = "4.0.0b36"    # the operators call functions below its public ones

    def __init__(self):
        if (version := metadata.version("flash-attn-4")) != self.VERSION:
            raise ImportError(f"flash-attn-4 {version}, not {self.VERSION}")
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        def extent(starts, window):
            return dict(cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True,
                        window_size_left=window - 1 if window else None)

        def forward(q, k, v, starts, window):
            return _flash_attn_fwd(q, k, v, **extent(starts, window), return_lse=True)[:2]

        def backward(grad, *saved):
            q, k, v, out, lse, starts, window = saved
            grads = dq, dk, dv = [torch.empty_like(x) for x in (q, k, v)]
            _flash_attn_bwd(q, k, v, out, grad, lse, **extent(starts, window), dq=dq, dk=dk, dv=dv)
            return tuple(grads)

        def shapes_forward(q, *rest):
            return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)

        def shapes_backward(grad, *saved):
            return tuple(torch.empty_like(x) for x in saved[:3])
        operator = partial(torch.library.custom_op, mutates_args=())
        operator("golf::flash_forward", forward, schema="(Tensor q, Tensor k, Tensor v, Tensor "
                 "starts, int window) -> (Tensor, Tensor)").register_fake(shapes_forward)
        operator("golf::flash_backward", backward, schema="(Tensor grad, Tensor q, Tensor k, "
                 "Tensor v, Tensor out, Tensor lse, Tensor starts, int window) -> (Tensor, Tensor, "
                 "Tensor)").register_fake(shapes_backward)
        self.crowded = torch.tensor(False)

    def masks(self, tokens: Tensor, documents: bool, windows: list[int]) -> list:
        """Where documents of tokens (B, T) begin in the flattened batch, padded, and the window."""
        # Of fixed length, as graphs are: the backward pass clears memory for every entry.
        n, room = tokens.numel(), 128 + tokens.numel() // 512
        first = (tokens == BOS) & documents                                         # (B, T)
        first[:, 0] = True                                  # windows do not see each other
        first, at = first.flatten(), torch.arange(n, dtype=torch.int32, device=tokens.device)
        slot = first.cumsum(0) - 1                          # of each token's document
        self.crowded = self.crowded | (slot[-1] >= room)
        slot = torch.where(first & (slot < room), slot, room + 1)
        starts = torch.full((room + 2,), n, dtype=torch.int32, device=tokens.device)
        starts = starts.scatter_(0, slot, at)[:-1]          # the last took all that begins nothing
        return [(starts, window) for window in windows]

    def check(self):
        """Raise GolfError if documents did not find room, and saw others; waits for the device."""
        if self.crowded:
            raise GolfError("FLASH_ATTN=4: a batch has more documents than one per 512 tokens; set "
                            "FLASH_ATTN=0")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, int]) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return FlashFunction.apply(*flat, *mask).view_as(q)


def choose_attention(cfg: Config, dist: Dist, compiled: Callable) -> Sdpa:
    """The fastest attention here, or FLASH_ATTN's; raises ConfigError if that does not run here."""
    if cfg.flash_attn != "0":
        try:
            if not dist.on_cuda or torch.cuda.get_device_capability()[0] < 9:
                raise ImportError("it takes a GPU of Hopper's generation or later")
            if cfg.head_dim not in (64, 128):               # narrower ones were less exact
                raise ImportError(f"heads of {cfg.head_dim} channels, tested are 64 and 128")
            return FlashAttention4()
        except ImportError as e:
            if cfg.flash_attn == "4":
                raise ConfigError(f"FLASH_ATTN=4: {e}; see README, or set FLASH_ATTN=0") from None
    masked = cfg.documents or cfg.attention_window
    return FlexAttention(compiled) if dist.on_cuda and masked else Sdpa()


class Memory(NamedTuple):
    """What documents side by side, read as far as position `at`, leave to their next chunk."""
    kept: list[Tensor]  # of each pass of a layer: keys and values (2, B, S, K, D) of S tokens
    last: Tensor        # (B, 1, C) embedding of the last token, for SmearGate
    at: int


class Past:
    """The pass over T tokens after a `memory`, whose keys and values are read, not recomputed."""
    def __init__(self, cfg: Config, memory: Memory, T: int, adapt: Callable | None):
        self.last, self.kept, self.after, self.adapt = memory.last, iter(memory.kept), [], adapt
        self.most, at, window = cfg.seq_len, memory.at, cfg.attention_window
        key = torch.arange(at - memory.kept[0].size(2), at + T, device=memory.last.device)
        angles = rotary_angles(cfg, key[-T:])[:, None]                          # (T, 1, R)
        self.rotation = [x.to(memory.last.dtype) for x in (angles.cos(), angles.sin())]
        ago = key[-T:, None] - key                                              # (T, S + T)
        self.visible = [(ago >= 0) & (ago < n)
                        for n in (cfg.seq_len, min(cfg.seq_len, window or cfg.seq_len))]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, windowed: int) -> Tensor:
        """As `Context.attend`, over what is kept for this layer and then over the chunk."""
        (B, T, H, D), K = q.shape, k.size(2)
        both = torch.cat([next(self.kept), torch.stack([k, v])], 2)         # (2, B, S + T, K, D)
        self.after.append(both[:, :, -self.most:].detach())
        # Queries that share a key are rows of one product; no backend takes such a mask everywhere.
        q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
        k, v = both.transpose(2, 3)                                         # (B, K, S + T, D)
        scores = (q @ k.mT).float() * D ** -0.5                             # (B, K, G T, S + T)
        scores = scores.masked_fill(~self.visible[windowed].repeat(H // K, 1), -torch.inf)
        y = scores.softmax(-1).to(v.dtype) @ v
        return y.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def sdpa_backends(dist: Dist):
    """Context in which PyTorch's attention takes the first backend that supports the model."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order if dist.on_cuda else [SDPBackend.MATH], set_priority=True)


def channel_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Sigmoid gates (..., O) from the first n channels of x by weight (O, n); #1667, #1787."""
    return F.linear(x[..., :weight.size(1)], weight.to(x.dtype)).sigmoid()


class Attention(nn.Module):
    """Causal grouped-query attention, QK norm, partial rotation, windows (arXiv:2004.05150)."""

    def __init__(self, cfg: Config, layer: int, rng: torch.Generator):
        super().__init__()
        C, D, K = cfg.model_dim, cfg.head_dim, cfg.num_kv_heads
        self.head_dim = D
        self.windowed = int(layer % 4 != 3 and layer < cfg.num_layers - 1)      # of two masks
        self.xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        self.c_q, self.c_k, self.c_v = (Linear(C, width, rng) for width in (C, K * D, K * D))
        self.proj = Linear(C, C, None)
        self.q_gain = param(torch.full((cfg.num_heads,), cfg.qk_gain_init), "scalar")
        gate = torch.zeros(cfg.num_heads, cfg.head_gate_channels)
        self.head_gate = param(gate, "scalar") if cfg.head_gate_channels else None
        embeds = cfg.extras_1060 and layer >= cfg.num_layers - Extras.VALUE_LAYERS
        self.value_gain = param(torch.ones(1), "scalar") if embeds else None

    def forward(self, x: Tensor, ctx: Context, scale: Tensor) -> Tensor:
        """Attend over x (B, T, C); outputs (B, T, C) times `scale` (C,)."""
        B, T, C = x.shape
        qkv = Linear.group([self.c_q, self.c_k, self.c_v], x, ctx)
        split = FusedHeads.apply if ctx.fused else split_heads
        q, k, v = split(qkv.view(B, T, -1, self.head_dim), self.q_gain, ctx.cos, ctx.sin)
        if self.value_gain is not None:                     # before XSA, which excludes this too
            v = v + self.value_gain.to(x.dtype) * ctx.values
        y = ctx.attend(q, k, v, self.windowed)                          # (B, T, H, D)
        gate = None if self.head_gate is None else channel_gate(x, 0.5 * self.head_gate)    # #1855
        if self.xsa:
            y = (FusedExclusion.apply if ctx.fused else exclude_self)(y, v, gate)
        elif gate is not None:
            y = y * gate[..., None]
        return self.proj(y.reshape(B, T, C), ctx, scale)


@jit
def activation(p):
    """(value, derivative) of the squared leaky ReLU with slope 0.5, in PyTorch and in Triton."""
    slope = 0.5 + 0.5 * (p > 0)
    return p * p * (slope * slope), 2 * p * (slope * slope)


torch_activation = getattr(activation, "fn", activation)    # without Triton it is a function


class Activation(torch.autograd.Function):
    """`activation` with its own derivative, so that PyTorch and the kernels agree."""

    @staticmethod
    def forward(ctx, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return torch_activation(p)[0].to(p.dtype)           # comparisons make it fp32

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return (grad * torch_activation(ctx.saved_tensors[0])[1]).to(grad.dtype)


class MLP(nn.Module):
    """Two matrices around the activation."""

    def __init__(self, cfg: Config, rng: torch.Generator):
        super().__init__()
        self.fc = Linear(cfg.model_dim, cfg.hidden_dim, rng)
        self.proj = Linear(cfg.hidden_dim, cfg.model_dim, None)

    def forward(self, x: Tensor, ctx: Context, scale: Tensor) -> Tensor:
        """From a normed x (B, T, C) to outputs (B, T, C) times `scale` (C,), fused on a GPU."""
        if ctx.fused:
            return FusedMLP.apply(x, self.fc.cast(x.dtype), self.proj.cast(x.dtype, scale))
        return self.proj(Activation.apply(self.fc(x, ctx)), ctx, scale)


def weighted_sum(w: Tensor, *inputs: Tensor) -> Tensor:
    """Sum of inputs (B, T, C), each times its row of w (n, C)."""
    first, *rest = (row.to(x.dtype) * x for row, x in zip(w, inputs))
    return sum(rest, first)


class Block(nn.Module):
    """One transformer layer on a mix of the residual stream and the embedding it began as."""

    def __init__(self, cfg: Config, layer: int, rng: torch.Generator):
        super().__init__()
        C = cfg.model_dim
        self.attn, self.mlp = Attention(cfg, layer, rng), MLP(cfg, rng)
        self.attn_scale = param(torch.ones(C), "scalar")
        self.mlp_scale = param(torch.ones(C), "scalar")
        self.resid_mix = param(torch.stack([torch.ones(C), torch.zeros(C)]), "scalar")  # (2, C)
        self.ln_scale = (layer + 1) ** -0.5
        self.parallel = layer >= cfg.parallel_residual_start
        self.two_lanes = layer >= cfg.num_layers - cfg.two_lanes
        if self.two_lanes:
            self.lane_keep = param(torch.full((2,), 1.1), "scalar")     # 1.1: #1529
            self.lane_add = param(torch.ones(2, 2), "scalar")           # from (attn, MLP) to lanes

    def forward(self, x: Tensor, lane: Tensor | None, ctx: Context,
                skip: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """The next residual stream (B, T, C) from x (B, T, C), and the second lane if there is one.

        A skip, with weights (2, C) of x and of itself, joins x first.  Parallel layers feed
        attention and MLP from one norm, GPT-J style; others feed the MLP from the output of
        attention.  With two lanes (#1529) attention reads the first and the MLP the second, and
        both write to both.
        """
        if skip and self.two_lanes:                         # the first lane is needed by itself
            x, skip = weighted_sum(skip[0], x, skip[1]), None
        mix, inputs = self.resid_mix, (x, ctx.x0)
        if skip:                                            # one pass over memory for both sums
            weights, earlier = skip
            mix, inputs = torch.cat([mix[:1] * weights, mix[1:]]), (x, earlier, ctx.x0)
        h = weighted_sum(mix, *inputs)
        n = rms_norm(h) * self.ln_scale
        if self.two_lanes:
            # Before attention: after it the compiler would keep the lane in fp32 for its norm.
            m = self.mlp(rms_norm(lane) * self.ln_scale, ctx, self.mlp_scale)
        a = self.attn(n, ctx, self.attn_scale)
        if self.two_lanes:
            keep, add = self.lane_keep.to(x.dtype), self.lane_add.to(x.dtype)
            return (keep[0] * x + add[0, 0] * a + add[1, 0] * m,
                    keep[1] * lane + add[0, 1] * a + add[1, 1] * m)
        u = h + a
        if not self.parallel:
            n = rms_norm(u) * self.ln_scale
        return u + self.mlp(n, ctx, self.mlp_scale), None


class Extras(nn.Module):
    """The parts that only #1060 has: a table of token pairs, a value embedding, a smear gate."""
    PAIRS, PAIR_DIM = 2816, 112             # rows and width of the table of token pairs
    VALUE_DIM, VALUE_LAYERS = 128, 2        # width of the value embedding, last layers that add it

    def __init__(self, cfg: Config, rng: torch.Generator):
        super().__init__()
        C, self.heads = cfg.model_dim, (cfg.num_kv_heads, cfg.head_dim)
        self.pair_emb = param(torch.zeros(self.PAIRS, self.PAIR_DIM), "embed")
        self.pair_proj = param(orthogonal(C, self.PAIR_DIM, rng), "scalar")
        self.pair_scale = param(torch.full((1,), 0.05), "scalar")
        table = torch.empty(cfg.vocab_size, self.VALUE_DIM)
        self.value_emb = param(nn.init.normal_(table, std=0.01, generator=rng), "embed")
        self.value_proj = param(orthogonal(math.prod(self.heads), self.VALUE_DIM, rng), "scalar")
        self.value_scale = param(torch.full((1,), 0.1), "scalar")
        self.smear_gate = param(torch.zeros(C), "scalar")

    def pairs(self, tokens: Tensor) -> Tensor:
        """Embedding of each token with the one before, found by hashing: (B, T, C) float32."""
        last = len(self.pair_emb) - 1       # this row stands for the pair that begins a window
        hashes = (36313 * tokens[:, 1:]) ^ (27191 * tokens[:, :-1])                 # (B, T - 1)
        buckets = F.pad(hashes % last, (1, 0), value=last)                          # (B, T)
        return F.linear(F.embedding(buckets, self.pair_emb), self.pair_proj) * self.pair_scale

    def values(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Addition to the values of the last layers, (B, T, K, D)."""
        values = F.linear(F.embedding(tokens, self.value_emb), self.value_proj)
        return (values * self.value_scale).unflatten(-1, self.heads).to(dtype)

    def smear(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, T, C), each position mixed with the one before in its document (#1851)."""
        gate = self.smear_gate.sigmoid().to(x.dtype) * (tokens != BOS)[..., None]   # (B, T, C)
        return x + gate * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)


def layer_schedule(cfg: Config, looped: bool) -> tuple[list[int], list[int]]:
    """Layers in the order they run, split into the encoder, which leaves skips, and the decoder."""
    layers = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        end = cfg.loop_end + 1
        layers = layers[:end] + cfg.num_loops * layers[cfg.loop_start:end] + layers[end:]
    return layers[:len(layers) // 2], layers[len(layers) // 2:]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in fp32, by way of the cheaper sigmoid."""
    return 2 * cap * torch.sigmoid(logits.float() * (2 / cap)) - cap


class SoftcapNLL(torch.autograd.Function):
    """-log softmax(z)[target] for z = cap tanh(logits / cap), recomputing z in the backward pass.

    As |z| < cap, exp cannot overflow and no maximum is needed: one pass over the logits each way.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        lse = soft_cap(logits, cap).exp().sum(-1).log()                             # (B, T)
        ctx.save_for_backward(logits, targets, lse)
        ctx.cap = cap
        return lse - soft_cap(logits.gather(-1, targets[..., None]), cap)[..., 0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        # (softmax - one at the target) times the slope of the cap, in one fused pass.
        logits, targets, lse = ctx.saved_tensors
        z = soft_cap(logits, ctx.cap)
        hit = torch.arange(logits.size(-1), device=logits.device) == targets[..., None]
        d = ((z - lse[..., None]).exp() - hit.float()) * (1 - (z / ctx.cap).square())
        return (d * grad[..., None]).to(logits.dtype), None, None


class GPT(nn.Module):
    """The language model; its initial weights depend on cfg.seed alone."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32, fused: bool = False,
                 attention: Sdpa | None = None):
        super().__init__()
        self.cfg, self.dtype, self.fused, self.attention = cfg, dtype, fused, attention or Sdpa()
        rng = torch.Generator().manual_seed(int(hex_digest(cfg.seed, "weights")[:15], 16))
        table = torch.empty(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(table, std=cfg.tied_embed_init_std, generator=rng)
        self.tok_emb = param(table, "embed")                                        # (V, C)
        self.layers = nn.ModuleList(Block(cfg, i, rng) for i in range(cfg.num_layers))
        self.extras = Extras(cfg, rng) if cfg.extras_1060 else None
        encoder, _ = layer_schedule(cfg, looped=True)
        if any(self.layers[i].two_lanes for i in encoder):
            raise ConfigError(f"TWO_LANES={cfg.two_lanes}: its layers must all be in the second "
                              "half of the schedule; lower it")
        if cfg.smear_channels:
            self.smear_weight = param(torch.zeros(1, cfg.smear_channels), "scalar")
            self.smear_strength = param(torch.zeros(1), "scalar")
        ones = torch.ones(len(encoder), cfg.model_dim)
        self.skip_weights = param(ones, "scalar")
        self.skip_gates = param(0 * ones, "scalar") if cfg.skip_gates_enabled else None
        angles = rotary_angles(cfg, torch.arange(cfg.seq_len))[:, None]             # (T, 1, R)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name = f"{name}.weight"

    def forward(self, tokens: Tensor, targets: Tensor | None = None, looped: bool = True,
                precise: bool = False) -> Tensor:
        """Nats of each target, or without targets the hidden state.

        Args: tokens (B, T) int64; targets (B, t) int64 follow the last t tokens; looped: recurrence
            is on; precise: fp32 logits, for scoring.
        Returns: (B, t) float32, or (B, T, C).
        """
        # build_run compiles both halves and not this: as one graph, scoring took twice as long.
        hidden = self.hidden(tokens, self.mask(tokens), looped)
        if targets is None:
            return hidden
        if targets.size(1) < tokens.size(1):
            hidden = hidden[:, -targets.size(1):]
        return self.per_token_loss(hidden.float() if precise else hidden, targets)

    def mask(self, tokens: Tensor) -> list:
        """What attention over tokens (B, T) sees in layers without and with a window."""
        windows = sorted({0, self.cfg.attention_window})
        masks = self.attention.masks(tokens, self.cfg.documents, windows)
        return [masks[0], masks[-1]]

    def hidden(self, tokens: Tensor, mask, looped: bool, tap: Callable | None = None,
               past: Past | None = None) -> Tensor:
        """State of every position after the final norm, (B, T, C); `tap` as in Context."""
        T, extras, values = tokens.size(1), self.extras, None
        x = F.embedding(tokens, self.tok_emb)                                       # (B, T, C)
        x = (x if extras is None else x + extras.pairs(tokens)).to(self.dtype)
        if self.cfg.smear_channels:                         # SmearGate, #1667, masked as in #1851
            gate = self.smear_strength.to(x.dtype) * channel_gate(x, self.smear_weight)
            gate = gate * (tokens != BOS)[..., None]                                # (B, T, 1)
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            if past:                                        # a chunk follows tokens of its document
                before = torch.cat([past.last, x[:, :-1]], 1)
                past.last = x[:, -1:].contiguous()
            x = x + gate * before
        x = rms_norm(x)
        if extras is not None:
            x, values = extras.smear(x, tokens), extras.values(tokens, x.dtype)
        attend = lambda q, k, v, windowed: self.attention.attend(q, k, v, mask[windowed])
        fused = self.fused and tap is None
        ctx = Context(x, self.cos[:T], self.sin[:T], values, attend, tap, None, fused)
        if past:
            ctx = Context(x, *past.rotation, None, past.attend, tap, past.adapt, False)
        hidden = rms_norm(self.run_layers(x, ctx, looped))
        if tap is not None:
            tap(["tok_emb"], hidden)
        return hidden

    def run_layers(self, x: Tensor, ctx: Context, looped: bool) -> Tensor:
        """The residual stream (B, T, C) after all layers.

        The encoder's layers push their outputs onto a stack and the decoder's pop them, so the
        first output meets the last layer.  Recurrence adds layers, and so uses more rows of the
        skip weights; a row's meaning changes at that moment, as in #1493.
        """
        encoder, decoder = layer_schedule(self.cfg, looped)
        skips, lane, add = [], None, self.skip_weights
        if self.skip_gates is None:
            keep = torch.ones_like(add)                     # a skip is added
        else:
            keep = self.skip_gates.sigmoid()                # or blended in
            add = (1 - keep) * add
        weights = torch.stack([keep, add], 1).unbind()      # (2, C) of stream and skip, for each
        for i in encoder:
            x, _ = self.layers[i](x, None, ctx)
            skips.append(x)
        for j, i in enumerate(decoder):
            lane = x if lane is None else lane              # skips reach the first lane only
            skip = (weights[j], skips.pop()) if skips else None
            x, lane = self.layers[i](x, lane, ctx, skip)
        return x if lane is None else 0.5 * (x + lane)

    def per_token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats of targets (B, t) by hidden states (B, t, C), as (B, t) float32."""
        logits = F.linear(hidden, self.tok_emb.to(hidden.dtype))                    # (B, t, V)
        return SoftcapNLL.apply(logits, targets, self.cfg.logit_softcap)

    def capture_linear_inputs(self, tokens: Tensor, mask, looped: bool) -> list:
        """(names, input (B, T, I)) of the matrices in a pass, in the order they run."""
        seen = []
        self.hidden(tokens, mask, looped, lambda names, x: seen.append((names, x)))
        return seen


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices, AdamW for the rest, all on one flat vector
# ------------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024) with row normalisation before orthogonalisation (parameter-golf #1285).
# The flat layout keeps the optimiser short and fast: clipping, averaging, weight decay and the sum
# over ranks are one operation on one tensor each, and Newton-Schulz runs on a whole stack of equal
# matrices at once.  Modules and compiled graphs see ordinary parameters: views.

CODED = "muon", "embed"     # groups that the artifact holds as codes; the others are float16


class Flat:
    """All parameters of a model as one fp32 vector, all gradients as another, without copies.

    Groups follow each other; "muon" is sorted by shape, so a stack (N, O, I) of equal matrices is a
    view.  The last element of the gradients' buffer is the loss: one all-reduce sums both.
    """

    def __init__(self, model: GPT, device: torch.device):
        named = dict(model.named_parameters())
        self.shapes = {n: tuple(p.shape) for n, p in named.items()}
        self.groups = {group: [n for n, p in named.items() if p.group == group]
                       for group in dict.fromkeys([*CODED, *(p.group for p in named.values())])}
        self.groups["muon"].sort(key=lambda n: (self.shapes[n], n))
        self.names = [n for group in self.groups.values() for n in group]
        self.sizes = [named[n].numel() for n in self.names]
        self.group_sizes = [sum(named[n].numel() for n in names) for names in self.groups.values()]
        self.data = torch.cat([named[n].detach().flatten() for n in self.names]).to(device)  # (P,)
        self.buffer = torch.zeros(len(self.data) + 1, device=device)
        self.grad, self.loss = self.buffer[:-1], self.buffer[-1:]
        self.steps = {}         # of coded rows, by name, once an artifact has been read
        data, grad = self.named(self.data), self.named(self.grad)
        for name, p in named.items():
            p.data, p.grad = data[name], grad[name]
        self.parameters, self.grads = list(named.values()), [p.grad for p in named.values()]
        model.to(device)                                    # buffers; the parameters are there

    def backward(self, loss: Tensor, add: bool = False):
        """Put loss and gradient into the buffer, or add them: faster than `loss.backward()`."""
        grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        write = torch._foreach_add_ if add else torch._foreach_copy_
        write([*self.grads, self.loss], [*grads, loss.detach()[None]])

    def part(self, vector: Tensor, group: str) -> Tensor:
        """The slice of a flat `vector` that belongs to a group."""
        return dict(zip(self.groups, vector.split(self.group_sizes)))[group]

    def uncoded(self) -> list[str]:
        """Names of the parameters that the artifact holds as float16."""
        return [n for group, names in self.groups.items() if group not in CODED for n in names]

    def stacks(self, vector: Tensor) -> list[tuple[list[str], Tensor]]:
        """Names and views (N, O, I) of the matrices of each shape in a flat `vector`."""
        found, at = [], 0
        for shape, names in itertools.groupby(self.groups["muon"], self.shapes.get):
            names = list(names)
            size = len(names) * math.prod(shape)
            found.append((names, vector[at:at + size].view(-1, *shape)))
            at += size
        return found

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat `vector` by parameter name."""
        return {n: v.view(self.shapes[n]) for n, v in zip(self.names, vector.split(self.sizes))}


def clip_gradient_(grad: Tensor, limit: float):
    """Scale a flat gradient to an L2 norm of at most `limit`, without waiting for the device."""
    if limit:       # fp64: an fp32 sum over 36 M squares is 0.2 % short on a CPU
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        grad.mul_((limit / (norm + 1e-6)).clamp(max=1).float())


# Odd polynomials a s + b s^3 + c s^5 that in turn bring singular values s from 0.0025 to 1 nearest
# to 1, found as in Polar Express (arXiv:2505.16932): four come as near as Jordan et al.'s five.
QUINTICS = ((8.3639, -24.4838, 17.9725), (4.0588, -2.9916, 0.5584),
            (3.5964, -2.6668, 0.5220), (2.6226, -1.9304, 0.4410))


def orthogonalize(G: Tensor, row_normalize: bool, dtype: torch.dtype) -> Tensor:
    """Approximately orthogonalise each matrix by `QUINTICS` of it, a Newton-Schulz iteration.

    Args: G (N, O, I), not modified; row_normalize: first scale each row to unit length.
    Returns: (N, O, I) in `dtype`, singular values roughly within 0.75 and 1.25.
    """
    if row_normalize:
        G = G / G.norm(dim=2, keepdim=True).clamp_min(1e-7)
    X = (G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    tall = X.size(1) > X.size(2)
    X = X.mT.contiguous() if tall else X
    eye = torch.eye(X.size(1), dtype=dtype, device=X.device)
    for a, b, c in QUINTICS:
        A = X @ X.mT                                        # (N, min(O, I), min(O, I))
        X = (a * eye + b * A + c * (A @ A)) @ X
    return X.mT if tall else X


class Muon:
    """Nesterov momentum on a group of matrices, orthogonalised in stacks, shared by ranks."""

    def __init__(self, cfg: Config, flat: Flat, dist: Dist, group: str):
        self.cfg, self.flat, self.dist, self.grad = cfg, flat, dist, flat.part(flat.grad, group)
        self.orthogonalize = compiler(cfg, dist)(orthogonalize)
        self.state = dict(momentum=torch.zeros_like(self.grad))

    def step(self, lr_scale: float, momentum: float):
        """Move the matrices along the gradient, which is overwritten."""
        cfg, grad, average = self.cfg, self.grad, self.state["momentum"]
        lr = cfg.matrix_lr * lr_scale
        torch.add(grad, average, alpha=momentum, out=average)
        grad.add_(average, alpha=momentum)                  # Nesterov
        for (_, G), (_, W) in zip(self.flat.stacks(grad), self.flat.stacks(self.flat.data)):
            U = self.orthogonalize_sharded(G)
            # A tall U has unit columns and shorter rows; the factor makes its rows unit length.
            factor = max(1, W.size(1) / W.size(2)) ** 0.5
            W.mul_(1 - lr * cfg.muon_wd).add_(U, alpha=-lr * factor)

    def orthogonalize_sharded(self, G: Tensor) -> Tensor:
        """Orthogonalise a stack (N, O, I), each rank an equal part of it."""
        mine, dist = self.dist.equal_slice(G), self.dist
        mine = self.orthogonalize(mine, self.cfg.muon_row_normalize, dist.dtype)
        return dist.all_gather(mine)[:len(G)]


class AdamW:
    """torch.optim.AdamW on the slice of the flat vector that holds one group."""

    def __init__(self, cfg: Config, flat: Flat, dist: Dist, group: str):
        rates = dict(embed=(cfg.tied_embed_lr, cfg.embed_wd), scalar=(cfg.scalar_lr, cfg.adam_wd))
        (self.lr, decay), p = rates[group], nn.Parameter(flat.part(flat.data, group))
        p.grad = flat.part(flat.grad, group)
        self.adam = torch.optim.AdamW([p], self.lr, (cfg.beta1, cfg.beta2), weight_decay=decay,
                                      fused=p.is_cuda)
        self.state = self.adam.state[p] = dict(
            step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p))

    def step(self, lr_scale: float, momentum: float):
        """Move the group along its gradient; `momentum` is Muon's alone."""
        self.adam.param_groups[0]["lr"] = self.lr * lr_scale
        self.adam.step()


OPTIMIZERS = dict(embed=AdamW, scalar=AdamW, muon=Muon)     # by group; the log has their names


class Schedule:
    """Learning rate, recurrence, momentum and EMA decay as functions of training progress."""
    TRAIL = 0.03        # of expected steps: horizon of the EMA that lookahead moves away from

    def __init__(self, cfg: Config, expected_steps: int, recurrent: bool):
        self.cfg, self.expected_steps, self.recurrent = cfg, expected_steps, recurrent

    def lr_scale(self, progress: float) -> float:
        """1, then a linear decay to min_lr over the last warmdown_frac of training."""
        left = (1 - progress) / self.cfg.warmdown_frac if self.cfg.warmdown_frac else 1.0
        return max(min(1.0, left), self.cfg.min_lr)

    def looped(self, progress: float) -> bool:
        """Whether recurrence is on."""
        return self.recurrent and progress >= self.cfg.enable_looping_at

    def momentum(self, step: int) -> float:
        """Muon's momentum, rising linearly during its warm-up."""
        cfg, start = self.cfg, self.cfg.muon_momentum_warmup_start
        share = cfg.muon_momentum_warmup_frac * self.expected_steps
        steps = min(share, cfg.muon_momentum_warmup_steps)
        p = min(step / steps, 1.0) if steps else 1.0
        return start + p * (cfg.muon_momentum - start)

    def lookahead(self, progress: float) -> float:
        """How far ahead the gradient is taken, as a share of the way from the trail to the weights.

        The mean step, of decay d, is (1 - d) / d of it.  Zero early, and late, when it overshoots.
        """
        d = self.decay(self.TRAIL)
        ahead = self.cfg.lookahead * self.lr_scale(progress) if 0.15 < progress < 0.75 else 0.0
        return ahead * (1 - d) / d if d else 0.0

    def decay(self, share: float) -> float:
        """Decay of an average whose horizon is a share of the expected steps."""
        horizon = share * self.expected_steps
        return 1 - 1 / horizon if horizon > 1 else 0.0

    def average_every(self, step: int) -> int:
        """Steps between two updates of the averages: to a long one each fourth step says enough."""
        return 4 if min(step, self.TRAIL * self.expected_steps) >= 64 else 1


# ------------------------------------------------------------------------------------------------
# Quantization: round each matrix to a few bits, pushing every column's error into later columns
# ------------------------------------------------------------------------------------------------
# Frantar et al., GPTQ, ICLR 2023, on the trellis of dependent quantization (ISO/IEC 15938-17, VVC):
# a code stands for whole steps or, by the codes before it in its row, for half a step more.  That
# packs the points of a row's weights better: .1 bit a weight (bench/RESULTS.md).  Calibration reads
# training batches: validation text is off limits here.  The seeds' steps are multiples of a row's
# standard deviation (#1394); ours are c / g for one c and the size g of a row's gradient.  Errors e
# add about (g e)^2 to the loss, as squared gradients estimate its curvature (Fisher's information):
# a bit then buys the same in every row.
# Matrices of one shape are quantized together: the loop over columns is the slow part, and its
# length does not depend on the number of matrices.

LOOKUP_TABLES = "extras.pair_emb", "extras.value_emb"       # no product reads them: no Hessian
GPTQ_BLOCK = 128            # columns between two large updates, at which one way is left
MOST_CODE = 126             # codes are int8, and an odd one may be one larger
GRADIENT_BATCHES = 8        # batches whose gradients say how harmful errors are
PRIOR_POWER = 0.25          # added to a row's squared gradient, over the mean of its matrix's
STEPS_PER_OCTAVE = 8        # steps are stored as logarithms, in one byte


def micro_batches(rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Equal parts of rows (B, T + 1), each of at most `most` sequences."""
    B = len(rows)
    return rows.split(max(d for d in range(1, min(B, most) + 1) if B % d == 0))


def calibration_batches(rt: Runtime, batches, count: int, seconds: float):
    """Yield this rank's part of `count` batches, fewer if the next one would end past `seconds`."""
    started = time.perf_counter()
    for done in rt.log.track(range(1, count + 1), "calibrating", count):
        yield batches.next()
        rt.dist.barrier()
        spent = rt.dist.all_reduce_max(time.perf_counter() - started)[0]
        if spent * (done + 1) / done > seconds:
            break


def collect_gradients(cfg: Config, rt: Runtime, flat: Flat, forward: Callable, batches,
                      seconds: float = math.inf) -> dict[str, Tensor]:
    """Size (O,) of every coded row's gradient, a root mean square over weights and micro-batches.

    As a sum over these, so in no unit.  `forward` maps tokens and targets to nats.
    """
    power = torch.zeros_like(flat.grad)
    for batch in calibration_batches(rt, batches, GRADIENT_BATCHES, seconds):
        for rows in micro_batches(batch, cfg.micro_batch_seqs):
            flat.backward(forward(rows[:, :-1], rows[:, 1:]).mean())
            power += flat.grad.square()
    named = flat.named(rt.dist.all_reduce_(power))
    return {n: named[n].mean(1).sqrt() for group in CODED for n in flat.groups[group]}


@torch.no_grad()
def collect_hessians(cfg: Config, rt: Runtime, capture: Callable, batches, count: int,
                     seconds: float = math.inf) -> dict[str, Tensor]:
    """Sum of x x^T (I, I) float32 over the inputs x of every matrix in `calibration_batches`.

    Matrices with one input share one tensor; a layer that runs several times counts every pass.
    `capture` maps tokens to inputs.
    """
    sums, wide = {}, {} if rt.dist.dtype == torch.float32 else dict(out_dtype=torch.float32)
    for batch in calibration_batches(rt, batches, count, seconds):
        for rows in micro_batches(batch, cfg.micro_batch_seqs):
            for names, x in capture(rows[:, :-1]):
                x, key = x.flatten(0, 1), tuple(names)
                gram = torch.mm(x.mT, x, **wide)                                    # (I, I)
                sums[key] = sums[key].add_(gram) if key in sums else gram
    for H in sums.values():
        rt.dist.all_reduce_(H)
    return {name: H for names, H in sums.items() for name in names}


def inverse_factor(H: Tensor, damping: float, name: str, log: Log) -> Tensor:
    """Upper triangular U with U^T U = (H + damping mean(diag H))^-1, for H (N, I, I)."""
    # With J the reversal of an axis, in three steps: reverse, J H J = L L^T; invert, L^-1; reverse,
    # U = J L^-1 J.  Then U is upper triangular, as J turns lower into upper, and
    # U^T U = J L^-T L^-1 J = H^-1.  No inverse of H is ever formed.
    eye = torch.eye(H.size(1), device=H.device)
    mean = H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]                        # (N, 1, 1)
    mean = mean.masked_fill(mean == 0, 1.0)                 # inputs that were always zero
    if not mean.isfinite().all():
        raise GolfError(f"{name}: its inputs in calibration are too large; training has diverged, "
                        "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
    for strength in (damping, 10 * damping, 100 * damping):         # until it is positive definite
        L, info = torch.linalg.cholesky_ex((H + strength * mean * eye).flip(1, 2))
        if not info.any() and L.isfinite().all():
            return torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False).flip(1, 2)
        log("damping", matrix=name, damping=strength, failed=int(info.count_nonzero()))
    raise GolfError(f"{name}: Hessian is not positive definite (pivot {int(info.max())} of "
                    f"{H.size(1)}, damping {strength:g}); raise GPTQ_DAMPING (now {damping:g})")


def half_steps(codes: Tensor) -> Tensor:
    """0 or 1/2, float32, that the trellis adds to each of the codes (..., I) int8 of a row.

    It is 1/2 where an odd number of the codes before, at distances 1, 3, 5, ..., are odd.
    """
    I = codes.size(-1)
    odd = F.pad(codes & 1, (1, (I + 1) % 2)).unflatten(-1, (-1, 2))     # [t]: of code t - 1
    return (odd.cumsum(-2).flatten(-2)[..., :I] & 1) * 0.5


def gptq(W: Tensor, U: Tensor, step: Tensor) -> Tensor:
    """Codes (N, O, I) int8 of W (N, O, I): each column's rounding error goes to later columns.

    Each of the states 2 h + h' of a row (h: its half step now, h': the one before) keeps the way
    with the least sum of squared errors, as in Viterbi's algorithm; as errors go along with the
    ways, no minimum is guaranteed.
    Args: U (N, I, I) from `inverse_factor`; step (N, O) of a row's codes.
    """
    W, Q, I = W.clone(), torch.empty_like(W, dtype=torch.int8), W.size(2)
    state, way = torch.arange(4, device=W.device), torch.arange(2, device=W.device)[:, None]
    half = (state >> 1)[:, None, None] / 2                                          # (4, 1, 1)
    # Two ways lead to each state: from the state `source` by an even (0) or odd (1) code.
    source, parity = 2 * (state & 1) + way, (state >> 1) ^ way                      # (2, 4)
    row = torch.arange(W[..., 0].numel(), device=W.device).view(W.shape[:2])        # (N, O)
    cost = W.new_zeros(4, *W.shape[:2])                     # of the best way to each state so far
    cost[1:] = math.inf
    for lo in range(0, I, GPTQ_BLOCK):
        hi = min(lo + GPTQ_BLOCK, I)
        block, u = W[..., lo:hi], U[:, lo:hi, lo:hi]
        errors = block.new_zeros(4, *block.shape)           # on the best way to each state
        for j in range(hi - lo):
            x = block[..., j] - (errors[..., :j] @ u[:, :j, j, None])[..., 0]       # (4, N, O)
            y = (x / step - half).clamp(-MOST_CODE, MOST_CODE)
            code = torch.stack([2 * (y / 2).round(), 2 * ((y - 1) / 2).round() + 1])
            e = (x - (code + half) * step) / u[:, j, j, None]                       # (2, 4, N, O)
            costs, e = (cost + e.square())[parity, source], e[parity, source]
            cost, best = costs.min(0)                                               # (4, N, O)
            origin = source[best, state[:, None, None]]
            errors = errors.flatten(0, 2)[origin * row.numel() + row]
            errors[..., j] = e.gather(0, best[None])[0]
        best = cost.argmin(0)                               # one way is left after each block
        cost = torch.where(state[:, None, None] == best, 0.0, math.inf)
        errors = errors.flatten(0, 2)[best * row.numel() + row]                     # (N, O, b)
        Q[..., lo:hi] = ((block - errors @ u) / step[..., None]).mul(2).round().div(2).floor()
        W[..., hi:] -= errors @ U[:, lo:hi, hi:]            # later blocks: one product
    return Q


def wanted_steps(cfg: Config, flat: Flat, weights: Tensor, gradients: dict[str, Tensor],
                 step: float) -> dict[str, Tensor]:
    """Step (O,) of every coded row of flat `weights`, if a typical one has `step` row std.

    By standard deviations or, without an EMBED_STEP, by `gradients` as of `collect_gradients`.
    """
    named = flat.named(weights)
    deviation = {n: named[n].std(1) for group in CODED for n in flat.groups[group]}
    if cfg.embed_step:
        return {n: d * (cfg.embed_step if n in flat.groups["embed"] else step)
                for n, d in deviation.items()}
    # Few tokens say little about a row with small gradients, such as a rare token's.
    powers = {n: g.square() for n, g in gradients.items()}
    harm = {n: (power + PRIOR_POWER * power.mean()).sqrt() for n, power in powers.items()}
    logs = torch.cat([(harm[n] * deviation[n]).log() for n in flat.groups["muon"]])
    typical = logs[logs.isfinite()].mean().exp()
    return {n: step * typical / h for n, h in harm.items()}


def stored_steps(logs: Tensor) -> Tensor:
    """Steps float32 of the int8 logarithms that an artifact holds."""
    return torch.exp2(logs.double() / STEPS_PER_OCTAVE - 10).float()


def restore(codes: Tensor, logs: Tensor) -> Tensor:
    """Weights (O, I) float32 of codes (O, I) int8 and the `logs` (O,) int8 of their steps."""
    return (codes + half_steps(codes)) * stored_steps(logs)[:, None]


def round_steps(W: Tensor, step: Tensor, name: str) -> Tensor:
    """Logarithms (N, O) int8 of the steps for rows of W (N, O, I): see `stored_steps`.

    They are nearest to `step` (N, O), but not so fine that a code would leave int8.  Raises
    GolfError for rows too small or too large for such steps.
    """
    largest = W.abs().amax(2)
    finest, logs = (STEPS_PER_OCTAVE * (s.log2() + 10) for s in (largest / MOST_CODE, step))
    logs = torch.maximum(finest.ceil(), logs.round().clamp(max=127))
    logs = logs.masked_fill(largest == 0, 0.0)              # a row of zeros: any step will do
    if (bad := ~((logs >= -128) & (logs <= 127))).any():
        raise GolfError(f"{name}: a row of weights up to {largest[bad][0].item():g} is outside the "
                        "range of steps; train longer or lower MATRIX_LR")
    return logs.to(torch.int8)


def quantize_model(cfg: Config, flat: Flat, weights: Tensor, hessians: dict[str, Tensor],
                   steps: dict[str, Tensor], log: Log) -> tuple[dict[str, Tensor], list[dict]]:
    """Quantize flat `weights`: the artifact's tensors by name, and a dict of errors per matrix."""
    named = flat.named(weights)
    tensors, rows = {n: named[n].half() for n in flat.uncoded()}, []
    stacks = flat.stacks(weights) + [([n], named[n][None]) for n in flat.groups["embed"]]
    for names, W in log.track(stacks, "quantizing", len(stacks)):
        if missing := [n for n in names if n not in hessians and n not in LOOKUP_TABLES]:
            raise GolfError(f"{missing[0]}: calibration saw no input of this matrix")
        # With the identity GPTQ finds the nearest points of the trellis.
        eye = torch.eye(W.size(2), device=W.device)
        H = torch.stack([eye if n in LOOKUP_TABLES else hessians[n] for n in names])
        logs = round_steps(W, torch.stack([steps[n] for n in names]), names[0])
        Q = gptq(W, inverse_factor(H, cfg.gptq_damping, names[0], log), stored_steps(logs))
        for name, w, q, e in zip(names, W, Q, logs):
            tensors[name], tensors[f"{name}.step"] = q, e
            variance = w.var().clamp_min(torch.finfo(w.dtype).tiny)         # of a matrix of zeros
            mse = ((w - restore(q, e)).square().mean() / variance).item()
            rows.append(dict(name=name, mse=mse))
    return tensors, rows


def dequantize(tensors: dict[str, Tensor], flat: Flat):
    """Write the weights that an artifact's tensors stand for, and their steps, into `flat`."""
    for name, w in flat.named(flat.data).items():
        value, logs = (tensors[key].to(w.device) if key in tensors else None
                       for key in (name, f"{name}.step"))
        w.copy_(value if logs is None else restore(value, logs))
        if logs is not None:
            flat.steps[name] = stored_steps(logs)


FIRST_STEP, LEAST_STEP, MOST_TRIES = 0.45, 0.1, 6           # row std, row std, attempts
STEP_SLACK = 2_000                                          # bytes that may stay unused


def next_step(step: float, spare: int, weights: int) -> float:
    """The step to try after `step` left `spare` bytes (negative: too large).

    A code of step s has entropy h - log2(s) bits, so `weights` codes shrink by weights / 8 bytes
    when the step doubles.  The aim is the middle of the slack.
    """
    doublings = 8 * (STEP_SLACK / 2 - spare) / weights
    return max(LEAST_STEP, step * 2 ** min(doublings, 8))


# ------------------------------------------------------------------------------------------------
# Artifact: one deterministic file that holds tensors and nothing that could be executed
# ------------------------------------------------------------------------------------------------
# magic | header length | SHA-256 of all that follows | Brotli JSON header | segments of a codec.
# Codes are normal to within 0.01 bit, so all that their range coder (constriction, Bamler,
# arXiv:2201.01741) knows is a count of codes in rows of about the same size.
# A damaged file fails its digest, a file of another model fails the comparison of its listing;
# both are found before a tensor is decoded.  Files forged with valid digests are not defended
# against beyond that: nothing in a file is executed.

MAGIC = b"GOLF\x00\x04\r\n"
CLASSES_PER_OCTAVE = 4      # of the size of a row's codes


def tensor_bytes(tensors: dict[str, Tensor], shuffle: bool) -> bytes:
    """Bytes of all tensors, one after the other; `shuffle` separates low and high bytes."""
    parts = []
    for tensor in tensors.values():
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        planes = raw.reshape(-1, tensor.element_size()).T if shuffle else raw
        parts.append(planes.tobytes())
    return b"".join(parts)


def bytes_to_tensors(raw: bytes, layout: dict, shuffle: bool) -> dict[str, Tensor]:
    """Inverse of `tensor_bytes` for tensors of `layout`: name -> (dtype, shape)."""
    tensors, at = {}, 0
    for name, (dtype, shape) in layout.items():
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        planes = np.frombuffer(raw, np.uint8, size, at)
        if shuffle:
            planes = planes.reshape(kind.itemsize, -1).T
        tensors[name] = torch.tensor(planes).flatten().view(kind).view(shape)
        at += size
    if at != len(raw):
        raise ValueError(f"{len(raw)} bytes of tensors, not {at}")
    return tensors


def layout_of(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of tensors by dtype and name, the order in which files hold them."""
    layout = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors.items()}
    return dict(sorted(layout.items(), key=lambda item: (item[1][0], item[0])))


def split_layout(layout: dict) -> tuple[dict, dict]:
    """{name: shape} of the matrices of codes in a layout, and the layout of what Brotli holds.

    That is all else, the class of each row of a matrix as (name,), and counts by class as ().
    """
    coded = {n: shape for n, (dtype, shape) in layout.items()
             if dtype == "int8" and len(shape) == 2 and min(shape)}
    rest = {n: entry for n, entry in layout.items() if n not in coded}
    classes = {(n,): ("uint8", shape[:1]) for n, shape in coded.items()}
    return coded, {**rest, **classes, (): ("int32", (256, 256))}


def row_classes(codes: np.ndarray) -> np.ndarray:
    """Class (O,) uint8 of each row of codes (O, I): the logarithm of their root mean square."""
    power = np.square(codes, dtype=np.float64).mean(1)
    return np.rint(CLASSES_PER_OCTAVE / 2 * np.log2(power + 1e-6) + 64).astype(np.uint8)


def entropy_bytes(codes: np.ndarray) -> float:
    """Bytes that an ideal coder needs for single codes (O, I) of rows whose classes it knows."""
    bits, classes = 0.0, row_classes(codes)
    for c in np.unique(classes):
        counts = np.unique(codes[classes == c], return_counts=True)[1]
        bits -= counts @ np.log2(counts / counts.sum())
    return bits / 8


def class_models(counts: np.ndarray) -> dict:
    """The distribution of codes in each class, by counts (class, code): exact on every machine."""
    return {c: constriction.stream.model.Categorical(row.astype(np.float64), perfect=False)
            for c, row in enumerate(counts) if row.any()}


def encode_range(tensors: dict[str, Tensor]) -> list[bytes]:
    """Matrices of codes by a range coder, which takes their entropy by class, and the rest."""
    coded, rest = split_layout(layout_of(tensors))
    small = {n: tensors[n] for n in rest if n in tensors}
    counts, parts = np.zeros((256, 256), np.int32), []
    for n in coded:
        codes = tensors[n].detach().cpu().numpy()
        small[n,] = torch.from_numpy(classes := row_classes(codes))
        for c in np.unique(classes):
            parts.append((c, codes[classes == c].ravel().view(np.uint8)))
            counts[c] += np.bincount(parts[-1][1], minlength=256)
    small[()] = torch.from_numpy(counts)
    coder, models = constriction.stream.queue.RangeEncoder(), class_models(counts)
    for c, part in parts:
        coder.encode(part.astype(np.int32), models[c])
    return [brotli.compress(tensor_bytes(small, shuffle=True)),
            coder.get_compressed().astype("<u4").tobytes()]


def decode_range(segments: list[bytes], layout: dict) -> dict[str, Tensor]:
    """Inverse of `encode_range`."""
    coded, rest = split_layout(layout)
    tensors = bytes_to_tensors(brotli.decompress(segments[0]), rest, shuffle=True)
    words = np.frombuffer(segments[1], "<u4").astype(np.uint32)
    coder, models = constriction.stream.queue.RangeDecoder(words), class_models(tensors[()].numpy())
    for n, (O, I) in coded.items():
        codes, classes = np.empty((O, I), np.uint8), tensors[n,].numpy()
        for c in np.unique(classes):
            rows = classes == c
            codes[rows] = coder.decode(models[c], rows.sum() * I).reshape(-1, I)
        tensors[n] = torch.from_numpy(codes.view(np.int8))
    return {n: tensors[n] for n in layout}


# name -> (encode: tensors of any dtype to segments, decode: segments and layout to tensors, which
# raises what `Container.tensors` catches if they are damaged).  fit_artifact names "range".
CODECS = dict(                                              # raw: for checkpoints
    raw=(lambda tensors: [tensor_bytes(tensors, shuffle=False)],
         lambda segments, layout: bytes_to_tensors(b"".join(segments), layout, shuffle=False)),
    range=(encode_range, decode_range))


def pack_tensors(kind: str, meta: dict, tensors: dict[str, Tensor], codec: str) -> list[bytes]:
    """Parts of a container file of `kind`, the same for the same input on every machine."""
    layout = layout_of(tensors)
    segments = CODECS[codec][0]({name: tensors[name] for name in layout})
    header = dict(kind=kind, meta=meta, codec=codec, tensors=layout,
                  segments=list(map(len, segments)))
    text = brotli.compress(json.dumps(header, separators=(",", ":")).encode())
    digest = hashlib.sha256(text)
    for segment in segments:
        digest.update(segment)
    return [MAGIC, len(text).to_bytes(4, "little"), digest.digest(), text, *segments]


class Container(NamedTuple):
    """An opened container file whose digest holds."""
    path: Path
    meta: dict
    codec: str
    layout: dict[str, tuple[str, tuple[int, ...]]]
    segments: list[bytes]

    def tensors(self, expected: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
        """Decode the tensors; raises GolfError unless the file lists exactly the expected ones."""
        for name in {**expected, **self.layout}:
            theirs, ours = self.layout.get(name), expected.get(name)
            if theirs != ours:
                raise GolfError(f"{self.path}: {ascii(name)} is {theirs}, this model's is {ours}; "
                                "use the settings that it was made with")
        try:
            return CODECS[self.codec][1](self.segments, self.layout)
        except (ValueError, LookupError, RuntimeError, brotli.error) as e:
            raise GolfError(f"{self.path}: damaged ({e}); make it again") from None


def open_container(path: Path, kind: str) -> Container:
    """Read a container file of `kind`; raises GolfError if it is missing, damaged or another."""
    try:
        if not path.is_file():                              # opening a FIFO would block forever
            raise GolfError(f"{path}: no such file, or no regular one; run its stage first")
        data = path.read_bytes()
        at = len(MAGIC) + 4 + 32
        end = at + int.from_bytes(data[len(MAGIC):len(MAGIC) + 4], "little")
        if data[:len(MAGIC)] != MAGIC:
            raise ValueError("no container of this version")
        if hashlib.sha256(memoryview(data)[at:]).digest() != data[at - 32:at]:
            raise ValueError("checksum differs")
        header = json.loads(brotli.decompress(data[at:end]))
        if header["kind"] != kind:
            raise ValueError(f"it is a {header['kind']}")
        bounds = itertools.accumulate(header["segments"], initial=end)
        segments = [data[a:b] for a, b in itertools.pairwise(bounds)]
        layout = {n: (dtype, tuple(shape)) for n, (dtype, shape) in header["tensors"].items()}
        return Container(path, header["meta"], header["codec"], layout, segments)
    except OSError as e:
        raise GolfError(f"{path}: cannot be read ({e.strerror}); run its stage first") from None
    except (ValueError, LookupError, TypeError, AttributeError, brotli.error) as e:
        raise GolfError(f"{path}: damaged or no {kind} ({e}); make it again") from None


def artifact_layout(flat: Flat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Layout of an artifact of this model: int8 codes, int8 steps per row, float16 vectors."""
    layout = {n: ("float16", flat.shapes[n]) for n in flat.uncoded()}
    for name in (n for group in CODED for n in flat.groups[group]):
        layout[name] = "int8", flat.shapes[name]
        layout[f"{name}.step"] = "int8", flat.shapes[name][:1]
    return layout


def check_made_for(container: Container, cfg: Config):
    """Raise GolfError unless the container was made for this run's model."""
    for name, ours in cfg.group("model").items():
        theirs = container.meta.get("model", {}).get(name)
        if theirs != ours:
            raise GolfError(f"{container.path}: made with {name.upper()}={theirs}, this run has "
                            f"{ours}; use the settings that it was made with")


# ------------------------------------------------------------------------------------------------
# Evaluation: every target scored exactly once, in nats and in bytes of text
# ------------------------------------------------------------------------------------------------
# Sliding windows as in parameter-golf #1493.  Batches have one shape for each length of window, so
# nothing compiles while the clock runs; logits are fp32, as rounding them to bf16 before the soft
# cap costs 0.001 bits per byte (#1923 and its siblings).

class Stream(NamedTuple):
    """A stream of n targets on the device; target i is token i + 1."""
    tokens: Tensor          # (n + 1,) int32
    bytes: Tensor           # (n,) int16, bytes of text of each target


class Chunk(NamedTuple):
    """Windows that are scored by the same weights."""
    windows: list[range]            # targets that each scores, the last ones of its seq_len
    told: dict | None = None        # what the log tells of it; None = nothing
    goes_on: tuple[bool, ...] = ()  # of each document: later chunks of it can learn from this one


def plain_plan(n: int, cfg: Config) -> list[Chunk]:
    """One chunk of windows side by side over n targets; each scores all of its own."""
    return [Chunk([range(at, at + cfg.seq_len) for at in range(0, n, cfg.seq_len)])]


def sliding_plan(n: int, cfg: Config) -> list[Chunk]:
    """Chunks of ttt_chunk_tokens targets, scored by windows `eval_stride` apart.

    The first window scores all of its targets, every other one the last `eval_stride`.
    """
    T, size = cfg.seq_len, n if cfg.ttt_documents else cfg.ttt_chunk_tokens
    ends = range(T, n + 1, cfg.eval_stride)
    windows = [range(end - cfg.eval_stride if end > T else 0, end) for end in ends]
    groups = [list(group) for _, group in itertools.groupby(windows, lambda w: w.start // size)]
    return [Chunk(group, dict(chunk=f"{i}/{len(groups)}", first=group[0].start,
                              last=group[-1].stop), (i < len(groups),))
            for i, group in enumerate(groups, 1)]


def document_plan(tokens: Tensor, cfg: Config, world: int) -> list[Chunk]:
    """Chunks of documents side by side, by length, `eval_batch_seqs` a rank.

    A document of the stream (n + 1,) begins with BOS or with the stream; the next one's BOS is its
    last target.  Window i of a chunk is that of its batch's document i, empty after its end.
    """
    n, size, most = len(tokens) - 1, cfg.ttt_chunk_tokens, cfg.eval_batch_seqs
    cuts = sorted({0, n, *(tokens[:n] == BOS).nonzero()[:, 0].tolist()})
    documents = sorted(map(range, cuts, cuts[1:]), key=lambda d: (-len(d), d.start))
    batches = [documents[i:i + most * world] for i in range(0, len(documents), most * world)]
    chunks, last = [], 0
    for i, batch in enumerate(batches, 1):
        first, last = last, last + sum(map(len, batch))
        told = dict(chunk=f"{i}/{len(batches)}", first=first, last=last, documents=len(batch),
                    updates=(len(batch[0]) - 1) // size)
        for at in range(0, len(batch[0]), size):
            windows = [d[at:at + size] for d in batch]
            goes_on = tuple(len(d) > at + size for d in batch)
            chunks.append(Chunk(windows, None if any(goes_on) else told, goes_on))
    return chunks


class Tally:
    """Sums of nats, targets and bytes in float64, and how often each target was scored."""

    def __init__(self, n: int, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.ledger = np.zeros(n, np.int32)

    def add(self, nll: Tensor, sizes: Tensor, windows: list[range]):
        """Count nats and bytes, both (B, tail), of the targets that `windows` score."""
        self.sums[0] += nll.double().sum()
        self.sums[1] += nll.numel()
        self.sums[2] += sizes.double().sum()
        for w in windows:
            self.ledger[w.start:w.stop] += 1

    def total(self, dist: Dist) -> tuple[float, float, int, int]:
        """(nats per token, bits per byte, targets, bytes of text) over all ranks so far."""
        nats, targets, size = dist.all_reduce_(self.sums.clone()).tolist()
        return nats / targets, nats / math.log(2) / size, int(targets), int(size)

    def times_scored(self, dist: Dist) -> tuple[int, int]:
        """Least and most times any target was scored, over all ranks."""
        counts = dist.all_reduce_(torch.tensor(self.ledger, device=self.sums.device))
        return int(counts.min()), int(counts.max())


class Scorer:
    """Scores windows of a stream with the weights that the model has at that moment."""

    def __init__(self, cfg: Config, rt: Runtime, forward: Callable, stream: Stream):
        self.cfg, self.rt, self.forward, self.stream = cfg, rt, forward, stream
        self.steps = torch.arange(cfg.seq_len, device=rt.dist.device)               # (T,)

    @torch.no_grad()
    def score(self, windows: list[range], tally: Tally):
        """Score this rank's slice of `windows`, in batches of one shape for each length."""
        mine, size = self.rt.dist.local_slice(windows), self.cfg.eval_batch_seqs
        for tail in sorted(set(map(len, mine))):
            same = [w for w in mine if len(w) == tail]
            starts = [w.stop - self.cfg.seq_len for w in same]
            starts += [0] * (-len(same) % size)                                 # pad the last
            starts = torch.tensor(starts).to(self.rt.dist.device).view(-1, size)
            for i, part in enumerate(starts):
                self.score_batch(part, same[i * size:(i + 1) * size], tally)

    def score_batch(self, starts: Tensor, windows: list[range], tally: Tally):
        """Score `windows`, whose inputs begin at `starts` (B,); the rest of B is padding."""
        B, tail = len(windows), len(windows[0])
        at = starts[:, None] + self.steps                                           # (B, T)
        tokens, targets = self.stream.tokens[at], self.stream.tokens[at[:, -tail:] + 1]
        nll = self.forward(tokens.long(), targets.long(), precise=True)             # (B, tail)
        sizes = self.stream.bytes[at[:B, -tail:]]
        tally.add(nll[:B], sizes, windows)                                      # without padding


class DocumentScorer(Scorer):
    """Scores chunks of documents side by side; its `forward` is that of their heads."""

    @torch.no_grad()
    def score(self, windows: list[range], tally: Tally):
        """Score this rank's documents of a batch, padded to one shape."""
        cfg, mine, T = self.cfg, self.rt.dist.local_slice(windows), self.cfg.ttt_chunk_tokens
        starts = [w.start for w in mine] + [0] * cfg.eval_batch_seqs
        real = [T * i + j for i, w in enumerate(mine) for j in range(len(w))]
        starts, real = (torch.tensor(x, device=self.rt.dist.device).long() for x in (starts, real))
        at = starts[:cfg.eval_batch_seqs, None] + self.steps[:T]
        at = at.clamp(max=len(self.stream.bytes) - 1)                                       # (B, T)
        nll = self.forward(self.stream.tokens[at].long(), self.stream.tokens[at + 1].long())
        tally.add(nll.flatten()[real], self.stream.bytes[at.flatten()[real]], mine)


class Frozen:
    """No test-time training; base of learners: some have a `forward`, none ever sees the tally."""
    learns = False

    def before(self, chunk: Chunk):
        """Called right before a chunk is scored."""

    def after(self, chunk: Chunk) -> dict:
        """Called once a chunk has been scored, except for the last; returns values for the log."""
        return {}


def evaluate(scorer: Scorer, plan: list[Chunk], learner: Frozen) -> Tally:
    """Score a stream chunk by chunk; `learner` may learn from a chunk once it has been scored.

    Every target is scored exactly once, by weights that have seen no token at or after it.
    """
    dist, log = scorer.rt.dist, scorer.rt.log
    tally = Tally(len(scorer.stream.bytes), dist.device)
    for chunk in log.track(plan, "scoring", len(plan)):
        learner.before(chunk)
        scorer.score(chunk.windows, tally)      # score: the weights know earlier chunks only
        if learner.learns and chunk.told:
            log("score", **chunk.told, bpb=tally.total(dist)[1])
        if learner.learns and any(chunk.goes_on):       # nothing is scored after a last chunk
            values = learner.after(chunk)                           # learn: the chunk is scored
            if chunk.told:
                log("update", **chunk.told, **values)
    return tally


def report_score(name: str, tally: Tally, rt: Runtime, seconds: float) -> tuple[float, float]:
    """Log score and ledger of a finished pass; returns (nats per token, bits per byte)."""
    loss, bpb, targets, size = tally.total(rt.dist)
    least, most = tally.times_scored(rt.dist)
    rt.log("eval", name=name, val_loss=loss, val_bpb=bpb, targets=targets, bytes=size,
           seconds=seconds, clock_s=rt.clock.eval_seconds)
    rt.log("ledger", name=name, targets=targets, scored_min=least, scored_max=most)
    assert least == most == 1 and targets == len(tally.ledger), "each target is scored once"
    if not math.isfinite(loss):
        raise GolfError(f"{name}: the loss is {loss}; the weights are broken, train again")
    return loss, bpb


# ------------------------------------------------------------------------------------------------
# Test-time training: learners, which adapt to a chunk after it has been scored
# ------------------------------------------------------------------------------------------------
# Score-first adaptation of parameter-golf #549/#1413/#1493, by documents of #1530.

class SGD(Frozen):
    """Test-time SGD with momentum on all weights, a few steps on each scored chunk."""
    learns = True
    CLIP_NORM = 1.0         # of the global gradient norm

    def __init__(self, run: "Run", forward: Callable, stream: Stream, chunks: int):
        self.run, self.forward, self.stream = run, forward, stream
        self.chunks, self.done = chunks, 0
        self.velocity = torch.zeros_like(run.flat.data)                             # (P,)

    def after(self, chunk: Chunk) -> dict:
        """Take ttt_epochs steps on the chunk; the learning rate falls as a cosine over chunks."""
        cfg, share = self.run.cfg, self.done / (self.chunks - 1)
        lr = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * share))
        self.done += 1
        tokens = self.stream.tokens[chunk.windows[0].start:chunk.windows[-1].stop + 1]
        for _ in range(cfg.ttt_epochs):
            self.step(tokens, lr)
        return dict(lr=lr)

    def step(self, tokens: Tensor, lr: float):
        """One SGD step on scored `tokens` (n + 1,), split over ranks."""
        dist, flat, T = self.run.rt.dist, self.run.flat, self.run.cfg.seq_len
        rows = tokens.unfold(0, T + 1, T).long()                                    # (B, T + 1)
        weight = torch.full((len(rows),), 1 / len(rows), device=rows.device)        # of padding: 0
        mine, weight = dist.equal_slice(rows), dist.equal_slice(weight)
        flat.backward((self.forward(mine[:, :-1], mine[:, 1:]).mean(1) * weight).sum())
        dist.all_reduce_(flat.buffer)
        clip_gradient_(flat.grad, self.CLIP_NORM)
        self.velocity.mul_(self.run.cfg.ttt_momentum).add_(flat.grad)
        flat.data.add_(self.velocity, alpha=-lr)


def whitening(inputs: list[Tensor], damping: float) -> Tensor:
    """(n, B, T, T): (x x^T / m + damping)^-1 of each x (B, T, I), m the mean of x^T x's diagonal.

    x^T times that is (x^T x / m + damping)^-1 x^T, which has the larger matrix to invert.
    """
    grams = torch.stack([x @ x.mT for x in inputs])
    widths = torch.tensor([x.size(-1) for x in inputs], device=grams.device)[:, None]
    m = grams.diagonal(dim1=2, dim2=3).sum(2).clamp_min(1e-30) / widths                 # (n, B)
    eye = torch.eye(grams.size(-1), device=grams.device)
    return torch.linalg.inv(grams / m[..., None, None] + damping * eye)


class DocumentWeights(Frozen):
    """For each document changes of the weights, none at first, which learn from its chunks by SGD.

    A prediction is the mean of the probabilities of the model and of the changed model: as a wrong
    change costs one bit at most, it may learn three times as fast as alone.  The output head
    learns, a row at a rate in proportion to its quantization step, without EMBED_STEP nearly to its
    inverse gradient: rare tokens are not left behind.  With TTT_ATTENTION the matrices of attention
    learn as well.  Their inputs share a large part, along which plain steps are noise, so steps are
    whitened by the chunk's own inputs.  This gains more than adapters (LoRA, #1530; RESULTS.md).
    """
    learns = True
    BIAS = 0.25     # square of a constant input of the head beside the state, whose length is 1
    DAMPING = 3.0   # of the whitening, over the mean power of an input's channel

    def __init__(self, run: "Run", looped: bool):
        self.run, self.looped, self.over = run, looped, True
        self.passes = sum(map(len, layer_schedule(run.cfg, looped)))
        self.models = 2 if run.cfg.ttt_attention else 1     # whose layers differ, side by side
        step = run.flat.steps["tok_emb"]
        self.rates = run.cfg.ttt_lr * step / step.mean()                            # (V,)
        run.model.requires_grad_(False)                     # what learns are the changes

    def before(self, chunk: Chunk):
        """At the first chunk of a batch: no changes and an empty memory."""
        cfg, B, rows = self.run.cfg, self.run.cfg.eval_batch_seqs, self.models
        if self.over:
            new, kind = self.rates.new_zeros, dict(dtype=self.run.model.dtype)
            self.head, self.changes = new(B, cfg.model_dim + 1, cfg.vocab_size), {}
            nothing = new(2, rows * B, 0, cfg.num_kv_heads, cfg.head_dim, **kind)
            last = new(rows * B, 1, cfg.model_dim, **kind)
            self.memory = Memory([nothing] * self.passes, last, 0)
        self.over = not any(chunk.goes_on)

    def adapt(self, names: list[str], x: Tensor, y: Tensor) -> Tensor:
        """As `Context.adapt`: changes y of the second model, and notes how for `after`."""
        name = names[0]
        if self.models == 1 or ".mlp." in name:
            return y
        _, x = x.chunk(2)
        if name not in self.changes:
            self.changes[name] = self.rates.new_zeros(len(x), x.size(-1), y.size(-1))
        change = (x @ self.changes[name].to(x.dtype)).requires_grad_(torch.is_grad_enabled())
        self.seen.append((name, x.detach().float(), change))
        return y + torch.cat([torch.zeros_like(change), change])

    def states(self, tokens: Tensor) -> tuple[Tensor, Memory]:
        """Hidden states (1 or 2, B, T, C) fp32 on the next tokens (B, T), and what they leave."""
        past, self.seen = Past(self.run.cfg, self.memory, tokens.size(1), self.adapt), []
        tokens = tokens.repeat(self.models, 1)
        # Not compiled: keys and values grow with every chunk (bench/RESULTS.md).
        hidden = GPT.hidden(self.run.model, tokens, None, self.looped, past=past).float()
        memory = Memory(past.after, past.last, self.memory.at + tokens.size(1))
        return hidden.unflatten(0, (self.models, -1)), memory

    def inputs(self, hidden: Tensor) -> Tensor:
        """What the change of a head is multiplied with: (..., C) -> (..., C + 1)."""
        return F.pad(hidden * hidden.size(-1) ** -0.5, (0, 1), value=self.BIAS ** 0.5)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits before the soft cap, (2, B, T, V), of the model and the changed one."""
        logits = F.linear(hidden, self.run.model.tok_emb)
        return torch.stack([logits[0], logits[-1] + self.inputs(hidden[-1]) @ self.head])

    @torch.enable_grad()
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Nats of the next targets (B, T) of all documents, after tokens (B, T): what is scored."""
        hidden, self.memory = self.states(tokens)
        self.x = self.inputs(hidden[-1]).detach()                                   # (B, T, C + 1)
        self.both, cap = self.logits(hidden).requires_grad_(), self.run.cfg.logit_softcap
        self.nll = SoftcapNLL.apply(self.both, targets.expand(2, -1, -1), cap)      # (2, B, T)
        return math.log(2) - torch.logaddexp(*-self.nll.detach())

    def after(self, chunk: Chunk) -> dict:
        """Take a step for each document that goes on, by its summed loss over the chunk."""
        mine = torch.tensor(self.run.rt.dist.local_slice(chunk.goes_on)).float()
        mine = F.pad(mine, (0, self.nll.size(1) - len(mine))).to(self.nll.device)   # (B,)
        loss = (self.nll[1] * mine[:, None]).sum()
        (_, own), *grads = torch.autograd.grad(loss, [self.both, *(c for _, _, c in self.seen)])
        self.head.baddbmm_(self.x.mT, own * self.rates, alpha=-1)
        inverses = whitening([x for _, x, _ in self.seen], self.DAMPING) if self.seen else []
        rate = self.run.cfg.ttt_lr * self.run.cfg.ttt_attention
        for (name, x, _), grad, inverse in zip(self.seen, grads, inverses):
            self.changes[name].baddbmm_(x.mT, inverse @ grad.float(), alpha=-rate)
        return {}


def choose_scoring(run: "Run", stream: Stream, learns: bool) -> tuple[Scorer, list[Chunk], Frozen]:
    """What `evaluate` takes to score a stream by an artifact, here and in use_artifact.py."""
    cfg = run.cfg
    if learns and cfg.ttt_documents:
        learner = DocumentWeights(run, run.looped)
        scorer = DocumentScorer(cfg, run.rt, learner.forward, stream)
        return scorer, document_plan(stream.tokens, cfg, run.rt.dist.world), learner
    plan = sliding_plan(len(stream.bytes), cfg)
    learner = SGD(run, run.forward, stream, len(plan)) if learns else Frozen()
    return Scorer(cfg, run.rt, run.forward, stream), plan, learner


# ------------------------------------------------------------------------------------------------
# Training: one loop on the wall clock, after an untimed warm-up that compiles and measures
# ------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """A model and what it needs to run."""
    cfg: Config
    rt: Runtime
    model: GPT
    flat: Flat
    forward: Callable       # model.forward, whose two halves are compiled on CUDA
    capture: Callable       # model.capture_linear_inputs with its mask, likewise
    looped: bool = False    # whether an artifact, once it is read, has recurrence

    def for_artifact(self, container: Container) -> "Run":
        """This run with the forward pass of an artifact."""
        looped = container.meta["looped"]
        return self._replace(forward=partial(self.forward, looped=looped), looped=looped)


def build_run(cfg: Config, dist: Dist, log: Log) -> Run:
    """Build the model with its initial weights on this rank's device."""
    # Equal parts on all ranks keep the mean over ranks equal to the mean over sequences.
    if cfg.batch_seqs % dist.world:
        raise ConfigError(f"WORLD_SIZE={dist.world} does not divide the {cfg.batch_seqs} sequences "
                          f"of TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}; change one of them")
    compiled = compiler(cfg, dist)
    model = GPT(cfg, dist.dtype, kernels_fit(cfg, dist), choose_attention(cfg, dist, compiled))
    flat, inputs = Flat(model, dist.device), compiled(model.capture_linear_inputs)
    capture = lambda tokens, looped: inputs(tokens, model.mask(tokens), looped)
    model.hidden, model.per_token_loss = compiled(model.hidden), compiled(model.per_token_loss)
    log("model", params=len(flat.data), kernels=model.fused, attention=model.attention.name)
    for name, names in flat.groups.items():
        log("group", name=name, optimizer=OPTIMIZERS[name].__name__.lower(), tensors=len(names),
            params=len(flat.part(flat.data, name)))
    return Run(cfg, Runtime(dist, log, Clock(cfg)), model, flat, model.forward, capture)


def forward_backward(run: Run, rows: Tensor, looped: bool):
    """Gradient and loss of a batch, of which `rows` (B, T + 1) is this rank's part, in run.flat."""
    flat, dist = run.flat, run.rt.dist
    parts = micro_batches(rows, run.cfg.micro_batch_seqs)
    for part in parts:
        loss = run.forward(part[:, :-1], part[:, 1:], looped).mean() / (len(parts) * dist.world)
        flat.backward(loss, add=part is not parts[0])
    dist.all_reduce_(flat.buffer)           # a step's only other collective is Muon's
    clip_gradient_(flat.grad, run.cfg.grad_clip_norm)


class TrainState:
    """All that training changes: weights, two EMAs, optimisers, step, clock, loader position."""

    def __init__(self, run: Run, expected_steps: int, recurrent: bool):
        self.run, self.schedule = run, Schedule(run.cfg, expected_steps, recurrent)
        self.optimizers = {group: OPTIMIZERS[group](run.cfg, run.flat, run.rt.dist, group)
                           for group in run.flat.groups}
        self.ema = run.flat.data.clone()                                            # (P,)
        self.trail = run.flat.data.clone()                      # a shorter EMA, for lookahead
        self.step, self.seconds, self.loader = 0, 0.0, None     # loader: state of the batches
        self.looped = False                                     # recurrence has been switched on

    def train_step(self, rows: Tensor, progress: float):
        """One optimiser step on this rank's part rows (B, T + 1) of a global batch."""
        schedule, weights = self.schedule, self.run.flat.data
        # EMA-Nesterov, arXiv:2605.25395.  The displacement stays in the weights.
        if ahead := schedule.lookahead(progress):
            weights.lerp_(self.trail, -ahead)
        forward_backward(self.run, rows, self.looped)
        for optimizer in self.optimizers.values():
            optimizer.step(schedule.lr_scale(progress), schedule.momentum(self.step))
        self.step += 1
        every = schedule.average_every(self.step)
        if self.step % every == 0:
            if schedule.cfg.lookahead:
                self.trail.lerp_(weights, 1 - schedule.decay(schedule.TRAIL) ** every)
            self.ema.lerp_(weights, 1 - schedule.decay(schedule.cfg.ema_horizon_frac) ** every)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name, not copied."""
        moments = {f"{group}.{name}": t for group, optimizer in self.optimizers.items()
                   for name, t in optimizer.state.items()}
        return dict(weights=self.run.flat.data, ema=self.ema, trail=self.trail, **moments)

    def save(self):
        """Write the checkpoint from which RESUME=1 continues as if nothing had happened."""
        cfg, (dist, log, _), path = self.run.cfg, self.run.rt, self.run.cfg.checkpoint_path
        if dist.is_main:
            meta = dict(model=cfg.group("model"), order=self.run.flat.names, step=self.step,
                        seconds=self.seconds, loader=self.loader, looped=self.looped,
                        recurrent=self.schedule.recurrent,
                        expected_steps=self.schedule.expected_steps)
            write_atomic(path, pack_tensors("checkpoint", meta, self.tensors(), "raw"))
            log("checkpoint", file=path, step=self.step, bytes=path.stat().st_size)

    @classmethod
    def load(cls, run: Run) -> "TrainState":
        """The state that `save` wrote; raises GolfError if it is damaged or of another model."""
        container = open_container(run.cfg.checkpoint_path, "checkpoint")
        check_made_for(container, run.cfg)
        path, meta = container.path, container.meta
        state = cls(run, meta["expected_steps"], meta["recurrent"])
        mine = state.tensors()
        loaded = container.tensors(layout_of(mine))
        if meta["order"] != run.flat.names:
            raise GolfError(f"{path}: has its parameters in another order, by another version of "
                            "this program; train again")
        if not all(t.isfinite().all() for t in loaded.values()):
            raise GolfError(f"{path}: holds numbers that are not finite; train again")
        for name, t in mine.items():
            t.copy_(loaded[name])
        state.step, state.seconds, state.loader = meta["step"], meta["seconds"], meta["loader"]
        state.looped = meta["looped"]
        return state


def warm_up(run: Run) -> tuple[dict[bool, float], float]:
    """Compile and time both training graphs and calibration on random tokens; moves no weight.

    Returns: seconds per step by `looped`, seconds per calibration batch.
    """
    cfg, (dist, log, _), flat, recurrent = run.cfg, run.rt, run.flat, bool(run.cfg.num_loops)
    initial, state, seconds = flat.data.clone(), TrainState(run, cfg.iterations, recurrent), {}
    shape = cfg.batch_seqs // dist.world, cfg.seq_len + 1
    rows = torch.randint(cfg.vocab_size, shape, device=dist.device)
    rows[torch.rand(shape, device=dist.device) < 1e-3] = BOS    # documents as long as web text's
    for looped in (False, True)[:1 + recurrent]:
        started, graph, state.looped = time.perf_counter(), "looped" if looped else "plain", looped
        step = partial(state.train_step, rows, 0.0)
        with log.track(None, f"warming up the {graph} step", 1):
            seconds[looped] = median_seconds(dist, cfg.warmup_steps, step)
        log("warm_up", graph=graph, step_ms=1000 * seconds[looped],
            seconds=time.perf_counter() - started)
    flat.data.copy_(initial)
    loader, capture = SimpleNamespace(next=lambda: rows), partial(run.capture, looped=recurrent)
    batch = median_seconds(dist, 3, lambda: collect_hessians(cfg, run.rt, capture, loader, 1))
    log("warm_up", graph="calibration", batch_ms=1000 * batch)
    return seconds, batch


def plan_run(run: Run) -> tuple[float, int, bool, int]:
    """Warm up, and divide the wall clock between training and calibration; raises GolfError.

    Returns: seconds of training (inf = no limit), expected steps, recurrence, calibration batches.
    """
    cfg, log, limit = run.cfg, run.rt.log, run.cfg.max_wallclock_seconds
    seconds, batch = warm_up(run) if cfg.warmup_steps else ({}, 0.0)
    wanted, onset = cfg.gptq_calibration_batches, min(cfg.enable_looping_at, 1.0)
    budget, count, total = math.inf, wanted, cfg.iterations
    looped_steps = (1 - onset) * total
    if limit:
        # Calibration reads training data, so it is on the clock, for at most a fifth of it: a slow
        # machine calibrates on fewer batches.  Margins: a tenth of its measured time, and three
        # steps for those that start before the clock is read.
        slowest = max(seconds.values())
        count = min(wanted, max(1, int(limit / 5 / (1.1 * batch))))
        gradients = 0 if cfg.embed_step else min(GRADIENT_BATCHES, 1 + int(limit / 10 / slowest))
        reserve = 1.1 * (batch * count + slowest * gradients) + 3 * slowest + 0.5
        budget = limit - reserve
        looped_steps = min(looped_steps, budget * (1 - onset) / slowest)
    if count < wanted:
        log("note", text=f"calibration reads {count} of {wanted} batches, to take at most a fifth "
                         f"of {limit:g} s")
    recurrent = bool(cfg.num_loops) and looped_steps >= max(1, cfg.looping_min_steps)
    if cfg.num_loops:
        log("recurrence", on=recurrent, looped_steps=int(looped_steps),
            needed=cfg.looping_min_steps)
    if limit:
        plain = onset if recurrent else 1.0
        steps = budget * (plain / seconds[False] + (1 - plain) / slowest)
        if steps < 1:
            raise GolfError(f"MAX_WALLCLOCK_SECONDS={limit:g}: one step and calibration take "
                            f"{reserve + seconds[False]:.1f} s on this machine; raise it")
        total = min(total, int(steps))
        log("budget", train_s=budget, reserve_s=reserve, limit_s=limit, expected_steps=total)
    return budget, total, recurrent, count


class StopRequest:
    """The first Ctrl-C, SIGTERM or SIGHUP ends training gracefully, the second the process."""
    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:                   # as by nohup
                self.before[number] = handler
                signal.signal(number, self.ask)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        """Remember the request and restore the signal's usual effect."""
        self.asked = True
        signal.signal(number, self.before[number])


@torch.no_grad()
def held_out_loss(run: Run, rows: Tensor, looped: bool) -> float:
    """Nats per target of held-out windows, of which `rows` (B, T + 1) are this rank's."""
    nats = rows.new_zeros((), dtype=torch.float64)
    for part in rows.split(run.cfg.micro_batch_seqs):
        nats += run.forward(part[:, :-1], part[:, 1:], looped).double().sum()
    return run.rt.dist.all_reduce_(nats).item() / (HELD_OUT * run.cfg.seq_len)


READ_SECONDS = 1.0      # between two reads of the device; each drains its queue once


def train(run: Run, state: TrainState, batches: Batches, budget: float) -> str:
    """Train until the clock, the last iteration or a signal ends it; returns the reason.

    The host runs ahead of the device and reads loss, clock and stop requests about once a second.
    In between, time is extrapolated from numbers that all ranks share, so all take equal steps.
    """
    cfg, (dist, log, clock), schedule = run.cfg, run.rt, state.schedule
    step_seconds, first = 0.0, state.step + 1
    ended = lambda now: ("iterations" if state.step >= cfg.iterations else
                         "wallclock" if now >= budget else "")
    reason = ended(state.seconds)           # a training that is resumed may be over already
    dist.barrier()
    clock.start(state.seconds)
    now = saved = state.seconds                             # `now` is extrapolated between reads
    read = logged = state.step, state.seconds
    with StopRequest() as stop, log.track(None, "training", 100) as bar:
        while not reason:
            progress = max(state.step / cfg.iterations, now / budget)
            if schedule.looped(progress) and not state.looped:
                state.looped, (encoder, decoder) = True, layer_schedule(cfg, True)
                log("loop_on", n=state.step + 1, frac=progress, elapsed_s=now, encoder=encoder,
                    decoder=decoder)
            state.train_step(batches.next(), progress)
            now += step_seconds
            log_due, late = state.step % cfg.train_log_every == 0, now - read[1] >= READ_SECONDS
            held_out_due = cfg.held_out_every and state.step % cfg.held_out_every == 0
            if not (ended(now) or log_due or held_out_due or late or state.step == first):
                continue
            loss = run.flat.loss.item()                     # waits for the device
            run.model.attention.check()
            now, asked = dist.all_reduce_max(clock.elapsed(), stop.asked)
            step_seconds = (now - read[1]) / (state.step - read[0])
            read, state.seconds, state.loader = (state.step, now), now, batches.state
            if not math.isfinite(loss):
                raise GolfError(f"step {state.step}: the training loss is {loss}; lower MATRIX_LR "
                                "or TIED_EMBED_LR")
            reason = "signal" if asked else ended(now)
            if log_due or reason or state.step == 1:
                dist.check_same("the order of training data", state.loader["digest"])
                step_s = (now - logged[1]) / (state.step - logged[0])
                log("step", n=f"{state.step}/{cfg.iterations}", train_loss=loss,
                    lr_scale=schedule.lr_scale(progress), step_ms=1000 * step_s,
                    tokens_per_s=round(cfg.train_batch_tokens / step_s), elapsed_s=now)
                logged = read
            if held_out_due:
                held_out = held_out_loss(run, batches.held_out(), state.looped)
                log("held_out", n=state.step, loss=held_out, elapsed_s=now)
                clock.start(now)                            # that was off the clock
            bar.update(max(0.0, 100 * min(1.0, progress) - bar.n))
            bar.set_postfix_str(f"step {state.step}, loss {loss:.3f}", refresh=False)
            if cfg.checkpoint_seconds and now - saved >= cfg.checkpoint_seconds:
                saved = now
                state.save()
    dist.barrier()
    state.seconds = dist.all_reduce_max(clock.elapsed())[0]
    return reason


# ------------------------------------------------------------------------------------------------
# Kernels: the MLP with its activation inside the products, and the passes around attention
# ------------------------------------------------------------------------------------------------
# In Triton, for GPUs of Hopper's size; elsewhere their twins run as PyTorch compiles them, which
# takes 2 to 5 % of a step more for each (bench/RESULTS.md).  The MLP's product is built like the
# persistent one in Triton's documentation, with the activation applied where a tile is finished.
# Around attention a program works on ROWS positions of a head: b = ROWS in shapes.

TILE = 128, 256, 64         # rows, columns and depth of a tile of the MLP's products
ROWS = 16                   # positions of a program around attention


def kernels_fit(cfg: Config, dist: Dist) -> bool:
    """Whether the kernels run on this device, for this model, and may be compiled."""
    if triton is None or not dist.on_cuda or not cfg.compile_enabled:
        return False
    powers_of_two = all(n and n & n - 1 == 0 for n in (cfg.head_dim, cfg.rope_dims // 2))
    memory = torch.cuda.get_device_properties(dist.device).shared_memory_per_block_optin
    return (powers_of_two and memory >= 227 << 10 and cfg.hidden_dim % TILE[1] == 0
            and cfg.model_dim % TILE[2] == 0)


@jit
def finish_tile(product, p, out, row, column, BACKWARD: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, PART: tl.constexpr):
    """Apply the activation to the tile (M, N) at (row, column), and store it, in parts of PART."""
    if N > PART:
        left, right = product.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        finish_tile(left, p, out, row, column, BACKWARD, M, N // 2, PART)
        finish_tile(right, p, out, row, column + N // 2, BACKWARD, M, N // 2, PART)
    elif BACKWARD:
        _, slope = activation(p.load([row, column]).to(tl.float32))
        out.store([row, column], (product * slope).to(out.dtype))
    else:
        p.store([row, column], product.to(p.dtype))
        value, _ = activation(product)
        out.store([row, column], value.to(out.dtype))


@jit
def product_kernel(x, w, p, out, rows, O, I, BACKWARD: tl.constexpr, M: tl.constexpr,
                   N: tl.constexpr, K: tl.constexpr, PART: tl.constexpr, PROGRAMS: tl.constexpr):
    """Tiles (M, N) of `activated_product`; all arguments before `rows` are tensor descriptors."""
    # Each multiprocessor takes tile after tile, so that loads for the next tile overlap the end of
    # this one; the end works on parts of a tile, as memory on the chip is short.
    across = O // N
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, M) * across, PROGRAMS, flatten=True):
        row = tile // across * M
        column = tile % across * N
        product = tl.zeros((M, N), tl.float32)
        for i in range(0, I, K):
            product = tl.dot(x.load([row, i]), w.load([column, i]).T, product)
        finish_tile(product, p, out, row, column, BACKWARD, M, N, PART)


def activated_product(x: Tensor, w: Tensor, p: Tensor, out: Tensor, backward: bool):
    """Forward: p = x w^T, out = value of the activation at p.  Backward: out = x w^T slope(p).

    Args: x (B, T, I), w (O, I), p and out (B, T, O).
    """
    M, N, K = TILE
    part, stages = (N // 2, 3) if backward else (N // 4, 4)     # all that fits on the chip
    x, p, out = (t.flatten(0, 1) for t in (x, p, out))
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    tiles = (x, [M, K]), (w, [N, K]), (p, [M, part]), (out, [M, part])
    product_kernel[(count,)](
        *(TensorDescriptor.from_tensor(*tile) for tile in tiles), len(x), *w.shape, backward, *TILE,
        part, count, num_warps=8, num_stages=stages)


class FusedMLP(torch.autograd.Function):
    """down(activation(up(x))): x (B, T, C), up (O, C), down (C, O) -> (B, T, C)."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = x.new_empty(*x.shape[:2], len(up))              # after the activation
        # What stands before it is kept for its slope alone: eight bits will do (bench/RESULTS.md).
        p = torch.empty_like(h, dtype=torch.float8_e4m3fn)
        activated_product(x, up, p, h, backward=False)
        ctx.save_for_backward(x, up, down, p, h)
        return F.linear(h, down)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, up, down, p, h = ctx.saved_tensors
        grad, dp = grad.contiguous(), torch.empty_like(h)
        activated_product(grad, down.T.contiguous(), p, dp, backward=True)
        rows = lambda t: t.flatten(0, 1)
        return dp @ up, rows(dp).T @ rows(x), rows(grad).T @ rows(h)


# Channel d of a head is paired with d + R.  Rotation turns the first R pairs; the others are there
# because loads of whole rows cost less than loads of some channels (bench/RESULTS.md).

@jit
def find_head(q_ptr, k_ptr, v_ptr, head, row, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """Where `head` of H + 2 K begins in each row: in q (rows, H, D), k or v (rows, K, D)."""
    at = v_ptr + (row * K + head - H - K) * D
    if head < H + K:
        at = k_ptr + (row * K + head - H) * D
    if head < H:
        at = q_ptr + (row * H + head) * D
    return at


@jit
def load_pairs(at, R: tl.constexpr, inside):
    """Both channels of all pairs, in float32."""
    a = tl.load(at, inside, 0.0)
    b = tl.load(at + R, inside, 0.0)
    return a.to(tl.float32), b.to(tl.float32)


@jit
def load_angles(cos_ptr, sin_ptr, position, pair, R: tl.constexpr, inside):
    """Cosine and sine of the angle that a pair is turned by: 0 beyond the first R."""
    turned = inside & (pair < R)
    cos = tl.load(cos_ptr + position * R + pair, turned, 1.0)
    sin = tl.load(sin_ptr + position * R + pair, turned, 0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@jit
def heads_forward(x_ptr, q_ptr, k_ptr, v_ptr, gain_ptr, cos_ptr, sin_ptr, rows, T,
                  H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                  ROWS: tl.constexpr):
    """Split x (rows, H + 2 K, D) into q (rows, H, D), k and v (rows, K, D)."""
    head = tl.program_id(0) % (H + 2 * K)
    row = tl.program_id(0) // (H + 2 * K) * ROWS + tl.arange(0, ROWS)[:, None]          # (b, 1)
    pair = tl.arange(0, D // 2)[None]                                                   # (1, D / 2)
    inside = row < rows
    d = pair // R * (2 * R) + pair % R
    a, b = load_pairs(x_ptr + (row * (H + 2 * K) + head) * D + d, R, inside)
    out = find_head(q_ptr, k_ptr, v_ptr, head, row, H, K, D) + d
    if head < H + K:
        cos, sin = load_angles(cos_ptr, sin_ptr, row % T, pair, R, inside)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + 1e-6)                  # (b, 1)
        scale *= tl.load(gain_ptr + head, head < H, 1.0)
        a, b = scale * (a * cos + b * sin), scale * (b * cos - a * sin)
    tl.store(out, a, inside)
    tl.store(out + R, b, inside)


@jit
def heads_backward(dq_ptr, dk_ptr, dv_ptr, x_ptr, dx_ptr, sums_ptr, gain_ptr, cos_ptr, sin_ptr,
                   rows, T, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                   ROWS: tl.constexpr):
    """Gradient of x from those of q, k and v; of each gain, one sum a block (blocks, H)."""
    head = tl.program_id(0) % (H + 2 * K)
    block = tl.program_id(0) // (H + 2 * K)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]                                    # (b, 1)
    pair = tl.arange(0, D // 2)[None]                                                   # (1, D / 2)
    inside = row < rows
    d = pair // R * (2 * R) + pair % R
    at = (row * (H + 2 * K) + head) * D + d
    da, db = load_pairs(find_head(dq_ptr, dk_ptr, dv_ptr, head, row, H, K, D) + d, R, inside)
    if head < H + K:
        # Turned back, the gradient loses its part along the normed x: a norm does not see length.
        a, b = load_pairs(x_ptr + at, R, inside)
        cos, sin = load_angles(cos_ptr, sin_ptr, row % T, pair, R, inside)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + 1e-6)                  # (b, 1)
        a *= scale
        b *= scale
        da, db = da * cos - db * sin, da * sin + db * cos
        along = tl.sum(da * a + db * b, 1)[:, None]         # also what a larger gain would change
        if head < H:
            tl.store(sums_ptr + block * H + head, tl.sum(along))
        scale *= tl.load(gain_ptr + head, head < H, 1.0)
        da = scale * (da - a * along / D)
        db = scale * (db - b * along / D)
    tl.store(dx_ptr + at, da, inside)
    tl.store(dx_ptr + at + R, db, inside)


class FusedHeads(torch.autograd.Function):
    """`split_heads` by kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous()
        B, T, heads, D = x.shape
        H = len(gain)
        K = (heads - H) // 2
        q, k, v = (x.new_empty(B, T, n, D) for n in (H, K, K))
        grid = (-(-B * T // ROWS) * heads,)
        heads_forward[grid](x, q, k, v, gain, cos, sin, B * T, T, H, K, D, cos.size(-1), ROWS)
        ctx.save_for_backward(x, gain, cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        x, gain, cos, sin = ctx.saved_tensors
        B, T, heads, D = x.shape
        H = len(gain)
        dx = torch.empty_like(x)
        sums = gain.new_empty(-(-B * T // ROWS), H)                                 # (blocks, H)
        heads_backward[(len(sums) * heads,)](
            dq.contiguous(), dk.contiguous(), dv.contiguous(), x, dx, sums, gain, cos, sin,
            B * T, T, H, (heads - H) // 2, D, cos.size(-1), ROWS)
        return dx, sums.sum(0), None, None


@jit
def exclusion_forward(y_ptr, v_ptr, gate_ptr, out_ptr, rows, GATED: tl.constexpr,
                      G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """y (rows, G, D) less its component along v (rows, D), times gate (rows, G) if GATED."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]                         # (b, 1)
    d = tl.arange(0, D)[None]                                                           # (1, D)
    inside = row < rows
    v = tl.load(v_ptr + row * D + d, inside, 0.0).to(tl.float32)                        # (b, D)
    length = tl.maximum(tl.sum(v * v, 1)[:, None], 1e-24)                               # (b, 1)
    for g in range(G):
        at = (row * G + g) * D + d
        y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
        y -= tl.sum(y * v, 1)[:, None] / length * v
        if GATED:
            y *= tl.load(gate_ptr + row * G + g, inside, 0.0).to(tl.float32)            # (b, 1)
        tl.store(out_ptr + at, y, inside)


@jit
def exclusion_backward(grad_ptr, y_ptr, v_ptr, gate_ptr, dy_ptr, dv_ptr, dgate_ptr, rows,
                       GATED: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of y (rows, G, D), v (rows, D) and gate (rows, G)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]                         # (b, 1)
    d = tl.arange(0, D)[None]                                                           # (1, D)
    inside = row < rows
    v = tl.load(v_ptr + row * D + d, inside, 0.0).to(tl.float32)                        # (b, D)
    length = tl.maximum(tl.sum(v * v, 1)[:, None], 1e-24)                               # (b, 1)
    # With out = y - share v and share = y.v / v.v, the loss sees v through both factors.
    dv = tl.zeros_like(v)
    for g in range(G):
        at = (row * G + g) * D + d
        y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32)
        share = tl.sum(y * v, 1)[:, None] / length                                      # (b, 1)
        along = tl.sum(grad * v, 1)[:, None] / length
        if GATED:
            gate = tl.load(gate_ptr + row * G + g, inside, 0.0).to(tl.float32)          # (b, 1)
            dgate = tl.sum(grad * (y - share * v), 1)[:, None]
            tl.store(dgate_ptr + row * G + g, dgate, inside)
            grad *= gate
            along *= gate
        tl.store(dy_ptr + at, grad - along * v, inside)
        dv -= share * grad + along * (y - 2 * share * v)
    tl.store(dv_ptr + row * D + d, dv, inside)


class FusedExclusion(torch.autograd.Function):
    """`exclude_self` by kernels."""

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        ctx.gated = gate is not None
        y, v, gate = y.contiguous(), v.contiguous(), gate.contiguous() if ctx.gated else y
        out, rows, D = torch.empty_like(y), v.shape[:3].numel(), v.size(3)
        exclusion_forward[(-(-rows // ROWS),)](
            y, v, gate, out, rows, ctx.gated, y.size(2) // v.size(2), D, ROWS)
        ctx.save_for_backward(y, v, gate)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        y, v, gate = ctx.saved_tensors
        dy, dv, rows, D = torch.empty_like(y), torch.empty_like(v), v.shape[:3].numel(), v.size(3)
        dgate = torch.empty_like(gate) if ctx.gated else dy         # ungated, no kernel writes it
        exclusion_backward[(-(-rows // ROWS),)](
            grad.contiguous(), y, v, gate, dy, dv, dgate, rows, ctx.gated,
            y.size(2) // v.size(2), D, ROWS)
        return dy, dv, dgate if ctx.gated else None


# ------------------------------------------------------------------------------------------------
# Main: the three stages of a run, and the lines that say what it was and what came out
# ------------------------------------------------------------------------------------------------
# Training leaves a checkpoint, quantization the artifact; scoring starts from its bytes alone.

def train_stage(run: Run, identity: Identity) -> tuple[TrainState, int]:
    """Train, and leave a checkpoint; returns the state and the number of calibration batches."""
    cfg, rt = run.cfg, run.rt
    shards = open_shards(cfg, "train", rt, identity)
    budget, expected_steps, recurrent, count = plan_run(run)
    state = TrainState.load(run) if cfg.resume else TrainState(run, expected_steps, recurrent)
    if cfg.resume:
        rt.log("resume", step=state.step, elapsed_s=state.seconds)
    with closing(Batches(cfg, shards, rt.dist, state.loader)) as batches:
        reason = train(run, state, batches, budget)
    rt.log("train_end", steps=state.step, reason=reason, elapsed_s=state.seconds,
           seen_tokens=state.step * cfg.train_batch_tokens, plan=state.loader["digest"],
           peak_mib=torch.cuda.max_memory_allocated() >> 20 if rt.dist.on_cuda else 0)
    if not run.flat.data.isfinite().all():
        raise GolfError("training left weights that are not finite; lower MATRIX_LR, SCALAR_LR or "
                        "TIED_EMBED_LR")
    state.save()
    return state, count


def fit_artifact(run: Run, state: TrainState, hessians: dict, gradients: dict,
                 identity: Identity) -> list[bytes]:
    """Bytes of the artifact, by the set step or the finest one that fits target_bytes."""
    cfg, log, flat = run.cfg, run.rt.log, run.flat
    step, limit = cfg.code_step or FIRST_STEP, cfg.target_bytes
    moving = flat.groups["muon"] + ([] if cfg.embed_step else flat.groups["embed"])
    weights = sum(math.prod(flat.shapes[n]) for n in moving)
    code = len(own_source())
    meta = dict(model=cfg.group("model"), scoring=cfg.group("scoring"), dataset=cfg.dataset,
                steps=state.step, looped=state.looped,
                tokenizer=identity.sha256.get(cfg.tokenizer_path.name, ""))
    for attempt in range(1, MOST_TRIES + 1):
        started = time.perf_counter()
        steps = wanted_steps(cfg, flat, flat.data, gradients, step)
        tensors, rows = quantize_model(cfg, flat, flat.data, hessians, steps, log)
        quantized = time.perf_counter()
        parts = pack_tensors("artifact", meta, tensors, "range")
        size = sum(map(len, parts))
        log("compress", attempt=attempt, code_step=step, model_bytes=size,
            total_bytes=size + code, gptq_s=quantized - started,
            seconds=time.perf_counter() - quantized)
        spare = limit - size - code
        if cfg.code_step or 0 <= spare <= STEP_SLACK or (step == LEAST_STEP and spare > 0):
            break
        step = next_step(step, spare, weights)
    if spare < 0:
        raise GolfError(f"model {size} + code {code} = {size + code} bytes, more than TARGET_BYTES="
                        f"{limit}; raise CODE_STEP (0 searches) or shrink the model")
    for row in rows:
        codes = tensors[row["name"]].cpu().numpy()
        size = entropy_bytes(codes)
        log("matrix", **row, bits_per_weight=8 * size / codes.size, entropy_bytes=round(size))
    return parts


def quantize_stage(run: Run, state: TrainState, count: int, identity: Identity):
    """Calibrate on the `count` training batches that come next, quantize, write the artifact."""
    cfg, (dist, log, clock), limit = run.cfg, run.rt, run.cfg.max_wallclock_seconds
    batches = Batches(cfg, open_shards(cfg, "train", run.rt, identity), dist, state.loader)
    run.flat.data.copy_(state.ema)
    # #1858's "void fraction": weights with |w| <= mean |w|, 0.575 for a normal distribution.
    matrices = run.flat.part(run.flat.data, "muon").abs()
    log("weights", below_mean_frac=(matrices <= matrices.mean()).float().mean().item())
    started = time.perf_counter()
    left = limit - state.seconds if limit else math.inf
    forward, capture = (partial(f, looped=state.looped) for f in (run.forward, run.capture))
    gradients, spent, first = {}, 0.0, state.loader["batch"]
    if not cfg.embed_step:
        gradients = collect_gradients(cfg, run.rt, run.flat, forward, batches, left / 2)
        spent, first = dist.all_reduce_max(time.perf_counter() - started)[0], batches.state["batch"]
        log("gradients", batches=first - state.loader["batch"], seconds=spent)
    hessians = collect_hessians(cfg, run.rt, capture, batches, count, left - spent)
    seconds = dist.all_reduce_max(time.perf_counter() - started)[0]
    batches.close()
    log("hessians", count=len({id(H) for H in hessians.values()}),
        batches=batches.state["batch"] - first, seconds=seconds - spent)
    clock.close_training_data(state.seconds, state.seconds + seconds)
    log("data_closed", split="train", elapsed_s=clock.data_seconds, limit_s=limit)
    if check_data(cfg, run.rt) != identity:
        raise GolfError(f"{cfg.dataset_dir}: its files changed while training ran; train again")
    if dist.is_main:
        path, parts = cfg.artifact_path, fit_artifact(run, state, hessians, gradients, identity)
        write_atomic(path, parts)
        identical = path.read_bytes() == b"".join(parts)
        log("read_back", file=path, identical=identical)
        if not identical:
            raise GolfError(f"{path}: does not read back as written; check the disk")
    dist.barrier()


def open_artifact(cfg: Config, log: Log) -> tuple[Container, dict]:
    """This run's artifact and its sizes; logs them with the hash that freezes it."""
    container, data = open_container(cfg.artifact_path, "artifact"), cfg.artifact_path.read_bytes()
    check_made_for(container, cfg)
    sizes = dict(model_bytes=len(data), code_bytes=len(own_source()))
    total = sum(sizes.values())
    log("artifact", file=container.path, **sizes, total_bytes=total, limit_bytes=cfg.target_bytes,
        sha256=hashlib.sha256(data).hexdigest())
    return container, dict(artifact_bytes=total, **sizes)


def open_validation(run: Run, tokenizer, identity: Identity) -> Stream:
    """The validation stream on this rank's device, with the bytes of text of every target."""
    tokens = load_validation(run.cfg, run.rt, identity)
    sizes = bytes_per_target(tokens, tokenizer)
    run.rt.log("validation", targets=len(sizes), text_bytes=int(sizes.sum(dtype=np.int64)))
    arrays = tokens.astype(np.int32), sizes
    return Stream(*(torch.from_numpy(a).to(run.rt.dist.device) for a in arrays))


def warm_up_scoring(run: Run):
    """Compile every shape that scoring and SGD use, on random tokens."""
    cfg, (dist, log, _) = run.cfg, run.rt
    started, shape = time.perf_counter(), (cfg.eval_batch_seqs, cfg.seq_len)
    with log.track(None, "warming up scoring", 1), torch.no_grad():
        tokens = torch.randint(cfg.vocab_size, shape, device=dist.device)
        for tail in {cfg.seq_len, cfg.eval_stride}:
            run.forward(tokens, tokens[:, -tail:].contiguous(), precise=True)   # as in score_batch
    if cfg.ttt_enabled and not cfg.ttt_documents:           # documents are not compiled
        shape = (cfg.ttt_chunk_tokens + 1,)
        chunk = torch.randint(cfg.vocab_size, shape, dtype=torch.int32, device=dist.device)
        SGD(run, run.forward, Stream(chunk, chunk), 2).step(chunk, 0.0)         # moves nothing
    dist.barrier()
    log("warm_up", graph="scoring", seconds=time.perf_counter() - started)


def score(name: str, scorer: Scorer, plan: list[Chunk], learner: Frozen, timed: bool = True):
    """Evaluate and report a pass, on the scoring clock if `timed`: (name, nats per token, bpb)."""
    rt, started = scorer.rt, time.perf_counter()
    tally = evaluate(scorer, plan, learner)
    rt.dist.barrier()
    seconds = rt.dist.all_reduce_max(time.perf_counter() - started)[0]
    rt.clock.eval_seconds += seconds if timed else 0.0
    return name, *report_score(name, tally, rt, seconds)


def eval_stage(run: Run, weights: dict[str, Tensor], identity: Identity) -> dict:
    """Score the artifact, and flat `weights` by name; returns the final block."""
    cfg, rt = run.cfg, run.rt
    container, sizes = open_artifact(cfg, rt.log)
    run, tensors = run.for_artifact(container), container.tensors(artifact_layout(run.flat))
    tokenizer = load_tokenizer(cfg.tokenizer_path, cfg.vocab_size, container.meta["tokenizer"])
    warm_up_scoring(run)
    if rt.clock.phase == "train":                           # this run has not calibrated
        rt.clock.close_training_data()
    started = time.perf_counter()
    stream = open_validation(run, tokenizer, identity)
    rt.clock.eval_seconds += time.perf_counter() - started
    plain = Scorer(cfg, rt, run.forward, stream), plain_plan(len(stream.bytes), cfg), Frozen()
    # The scores before quantization say what it costs.  These passes lead to no headline, so they
    # are off the clock; all passes over the artifact are on it.
    for name, vector in weights.items():
        run.flat.data.copy_(vector)
        score(name, *plain, timed=False)
    dequantize(tensors, run.flat)
    headline = score("quantized", *plain)
    if cfg.sliding_enabled:
        headline = score("sliding", *choose_scoring(run, stream, learns=False))
    if cfg.ttt_enabled:                                     # last: SGD leaves other weights behind
        headline = score("ttt", *choose_scoring(run, stream, learns=True))
    name, loss, bpb = headline
    block = dict(val_bpb=bpb, val_loss=loss, score=name, train_seconds=rt.clock.train_seconds,
                 data_seconds=rt.clock.data_seconds, eval_seconds=rt.clock.eval_seconds,
                 steps=container.meta["steps"], **sizes, seed=cfg.seed)
    for clock, seconds, limit in rt.clock.overtime():
        rt.log("overtime", clock=clock, seconds=seconds, limit_s=limit)
        block["counts"] = f"0 ({clock} clock: {seconds:.1f} s of {limit:g} s)"
    return block


def log_run(cfg: Config, dist: Dist, log: Log, chosen: list[str]):
    """Log versions, machine, the exact code, and every setting, overrides with a `*`."""
    source = own_source()
    cpu = f"CPU, {torch.get_num_threads()} threads"
    log("run", program=Path(__file__).name, python=platform.python_version(),
        torch=torch.__version__, device=torch.cuda.get_device_name() if dist.on_cuda else cpu,
        world=dist.world, code_bytes=len(source), code_sha256=hashlib.sha256(source).hexdigest(),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), stages=cfg.stages)
    for group in GROUPS.values():
        values = {("*" if n in chosen else "") + n: v for n, v in cfg.group(group).items()}
        log("config", group=group, **values)


def slow_parts(run: Run):
    """Yield what keeps this machine from its best, each with a remedy."""
    if not run.rt.dist.on_cuda:
        if len(run.flat.data) > 5e6:
            yield "no GPU, for which this model is made; RECIPE=demo suits a CPU"
    elif not run.cfg.compile_enabled:
        yield "the compiler is off; set COMPILE_ENABLED=1"
    elif not run.model.fused:
        yield ("the Triton kernels do not run; they take a GPU with 227 KB of shared memory per "
               "block, and widths that fit")


def check_room(cfg: Config, flat: Flat):
    """Raise GolfError, before any clock starts, if the run's files cannot be written later."""
    check_output(cfg.checkpoint_path)
    check_output(cfg.artifact_path)
    needed = 20 * len(flat.data) + cfg.target_bytes         # at most 5 fp32 numbers per parameter
    free = shutil.disk_usage(cfg.out_dir).free
    if free < needed:
        raise GolfError(f"{cfg.out_dir}: {free >> 20} MiB free, checkpoint and artifact may take "
                        f"{needed >> 20}; set OUT_DIR")


def run_stages(cfg: Config, chosen: list[str], dist: Dist):
    """The whole run, from the first log line to the final block."""
    log, weights = Log(cfg, dist), {}
    log_run(cfg, dist, log, chosen)
    with sdpa_backends(dist):
        run = build_run(cfg, dist, log)
        for reason in slow_parts(run):
            log("note", text=f"slow here: {reason}")
        if cfg.stage_list != ["eval"]:
            check_room(cfg, run.flat)
        identity, count = check_data(cfg, run.rt), cfg.gptq_calibration_batches
        if "train" in cfg.stage_list:
            state, count = train_stage(run, identity)
            weights = dict(raw=run.flat.data.clone(), ema=state.ema)
        elif "quantize" in cfg.stage_list:
            state = TrainState.load(run)
        if "quantize" in cfg.stage_list:
            quantize_stage(run, state, count, identity)
        if "eval" in cfg.stage_list:
            block = eval_stage(run, weights, identity)
            log.line("---")
            for key, value in block.items():
                text = value if isinstance(value, str) else format_value(key, value)
                log.line(f"{key + ':':<17} {text}")
        elif "quantize" in cfg.stage_list:
            open_artifact(cfg, log)


def open_streams():
    """Replace closed standard streams by /dev/null; print what an encoding lacks as escapes."""
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        if getattr(sys, name) is None:          # or the next file would take the stream's number
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def flush_stdout():
    """Flush stdout, or discard what a full disk or a closed pipe does not take."""
    try:
        sys.stdout.flush()
    except OSError:                             # Python's exit would fail on it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Run as the environment says; returns the exit code."""
    open_streams()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 2
    try:
        if os.name == "nt":
            raise ConfigError("Windows is not supported; run in WSL")
        if sys.argv[1:] in (["--help"], ["-h"]):
            print_help()
            return 0
        if sys.argv[1:]:
            raise ConfigError(f"{sys.argv[1]}: settings are environment variables; see --help")
        cfg, chosen = config_from_env()
        dist = Dist()
        run_stages(cfg, chosen, dist)
        dist.close()
        return 0
    except BrokenPipeError:                     # the reader of --help, for example `head`, has gone
        return 1
    except GolfError as e:
        problem = str(e)
    except OSError as e:                        # a folder that cannot be entered, a full disk
        problem = f"{e.filename or 'the console'}: {e.strerror}"
    except RuntimeError as e:
        # Gloo has no error type of its own: a lost peer shows in the message alone.
        if isinstance(e, torch.distributed.DistError) or "peer" in str(e):
            problem = "another rank has died, its own message says why; RESUME=1 continues"
        elif isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            problem = "out of memory; lower MICRO_BATCH_SEQS, EVAL_BATCH_SEQS or the model's size"
        else:
            raise
    except KeyboardInterrupt:
        code, problem = 130, "stopped; STAGES can leave out what is done"
    finally:
        flush_stdout()
    # A message may quote any file: print one line of it, and not all of a long one.
    problem = "".join(c if c.isprintable() else " " for c in problem)[:1000]
    with suppress(OSError):
        print(f"train_gpt: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
