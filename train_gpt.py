#!/usr/bin/env python3
"""Train a language model in ten minutes, squeeze it into 16,000,000 bytes, and score it legally.

One run: train on the wall clock, quantize with GPTQ, write one artifact, read it back, and score it
in bits per byte on held-out text, learning from each chunk only after it has been scored.

    RECIPE=demo python train_gpt.py                                      # laptop, a few minutes
    SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py        # the challenge: 8 x H100

`python train_gpt.py --help` lists every setting; each is an environment variable.

Sections: Configuration, Ranks and logging, Tokens, Batches, Model, Kernels, Optimizer,
Quantization, Artifact, Evaluation, Test-time training, Training, Main, in the order in which data
meets them.

Shapes: B sequences, T positions, C model width, H query heads, K kv heads, G = H/K, D head width,
        V vocabulary;  N matrices of one shape, O and I their out and in features;  S shards.
"""
import difflib
import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import attention as torch_attention

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:         # PyTorch for CPUs comes without it, and runs no kernel
    triton, tl = None, SimpleNamespace(constexpr=None)


# ------------------------------------------------------------------------------------------------
# Configuration: every knob of a run, typed, checked, and settable by its upper-case name
# ------------------------------------------------------------------------------------------------
# Defaults are parameter-golf #1876; `RECIPES` holds what others change: #1858 (without its byte
# mixture, see experiments/), #1060 (an earlier record, with tables of pairs and values and without
# recurrence) and a demo for laptops.  Constants tuned there for a run of 4,550 steps (momentum
# warm-up 1,500 steps, averaging over 286) are fractions here, so that short runs behave alike.

class GolfError(Exception):
    """Anything a user, a file or a machine can cause; told in one line, exit code 2."""


class ConfigError(GolfError):
    """A setting is unknown, malformed or contradicts another."""


class DataError(GolfError):
    """Tokens, tokenizer or the loss are not what they must be."""


class QuantError(GolfError):
    """A matrix cannot be quantized."""


class SizeError(GolfError):
    """The artifact would not fit."""


class ArtifactError(GolfError):
    """An artifact or checkpoint is missing, damaged or made for another configuration."""


class BudgetError(GolfError):
    """A clock of the challenge ran out."""


@dataclass(frozen=True)
class Config:
    """Every knob of a run: `TTT_LR=0.01 python train_gpt.py` sets the field `ttt_lr`.

    A comment gives meaning, unit and what 0 means.  Field names in `GROUPS` open a new group.
    """
    recipe: str = "pr1876"  # named set of defaults; variables of the environment override it
    seed: int = 1337  # fixes initial weights and data order
    run_id: str = ""  # names the log and the output folder; empty: recipe and seed
    out_dir: str = "."  # where logs/ and runs/ are written
    stages: str = "train,quantize,eval"  # what to do, in this order; each reads what the last left
    compile_enabled: bool = True  # torch.compile on CUDA devices; a CPU always runs eagerly
    kernels_enabled: bool = True  # own Triton kernels on GPUs that have room for them
    flash_attn: str = "auto"  # installed FlashAttention to use: 3, 4, 2 (PyTorch's own), auto, off
    checkpoint_seconds: float = 0.0  # seconds between resumable checkpoints; 0: at the end
    resume: bool = False  # continue the training that this run's checkpoint was saved from
    data_dir: str = "data"  # holds datasets/<dataset>/ and tokenizers/
    dataset: str = "fineweb10B_sp8192"  # folder of shards; its first letters name the files
    loader: str = "coprime"  # order of training blocks: coprime strides, or shuffled
    vocab_size: int = 8192  # pieces of the tokenizer
    seq_len: int = 2048  # tokens of context in training and scoring
    num_layers: int = 11  # transformer layers with weights of their own
    model_dim: int = 512  # channels of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads, each shared by num_heads / num_kv_heads queries
    mlp_mult: float = 4.0  # hidden width of the MLP over model_dim
    rope_dims: int = 16  # head channels that are rotated by position; the rest carry no position
    rope_base: float = 10000.0  # slowest rotation has about this many positions per radian
    qk_gain_init: float = 5.25  # initial sharpness of each query head
    xsa_last_n: int = 11  # last layers whose attention excludes the token's own value; 0: none
    logit_softcap: float = 30.0  # logits are squashed smoothly into (-softcap, softcap)
    tied_embed_init_std: float = 0.005  # initial spread of the embedding, also output head
    num_loops: int = 2  # extra passes over layers loop_start..loop_end; 0: no recurrence
    loop_start: int = 3  # first recurrent layer
    loop_end: int = 5  # last recurrent layer
    parallel_residual_start: int = 7  # from this layer on attention and MLP read the same input
    skip_gates_enabled: bool = True  # learned gates on the U-Net skips; off: plain weighted sums
    bigram_buckets: int = 0  # rows of a table of hashed token pairs beside the embedding; 0: none
    bigram_dim: int = 112  # channels of that table
    smear_enabled: bool = False  # learned gates mix each position with the one before
    smear_across_documents: bool = False  # also the first of a document with the last of another
    value_embed_dim: int = 0  # channels of a second embedding, added to attention's values; 0: none
    value_embed_last_n: int = 2  # last layers that use it
    iterations: int = 20000  # most optimiser steps
    max_wallclock_seconds: float = 600.0  # training and calibration, seconds; 0: run all iterations
    train_batch_tokens: int = 786432  # tokens a step over all ranks
    micro_batch_seqs: int = 64  # most sequences a device handles at once; memory, not results
    warmup_steps: int = 20  # untimed steps that compile and time each graph, then undone
    train_log_every: int = 50  # steps between log lines
    warmdown_frac: float = 0.72  # last part of training over which learning rates fall
    min_lr: float = 0.0  # learning rate at the end over its peak
    enable_looping_at: float = 0.35  # part of training after which recurrence is on
    ema_horizon_frac: float = 0.063  # memory of the weight average over all steps; 0: none
    tied_embed_lr: float = 0.03  # AdamW step of the embedding
    matrix_lr: float = 0.022  # Muon step of the matrices
    scalar_lr: float = 0.02  # AdamW step of vectors and gains
    muon_wd: float = 0.095  # weight decay of the matrices
    embed_wd: float = 0.085  # weight decay of the embedding
    adam_wd: float = 0.02  # weight decay of vectors and gains
    beta1: float = 0.9  # AdamW memory of the gradient
    beta2: float = 0.95  # AdamW memory of its square
    adam_eps: float = 1e-8  # AdamW guard against division by zero
    muon_momentum: float = 0.99  # Muon memory of the gradient, after its warm-up
    muon_momentum_warmup_start: float = 0.92  # Muon memory at step 0
    muon_momentum_warmup_frac: float = 0.33  # part of the expected steps over which it rises
    muon_row_normalize: bool = True  # rows of the update to unit length before orthogonalisation
    muon_backend_steps: int = 5  # Newton-Schulz iterations
    grad_clip_norm: float = 0.3  # longest gradient, L2 over all parameters; 0: no limit
    matrix_bits: int = 6  # bits a matrix weight
    embed_bits: int = 8  # bits an embedding weight
    matrix_clip_sigmas: float = 0.0  # largest code, row deviations; 0: fill target_bytes
    embed_clip_sigmas: float = 20.0  # the same for the embedding
    gptq_calibration_batches: int = 64  # training batches behind the Hessians
    gptq_damping: float = 0.01  # added to a Hessian's diagonal, over its mean
    gptq_block_size: int = 128  # columns rounded between two large updates; speed, not results
    target_bytes: int = 16000000  # most bytes of code and model together
    eval_stride: int = 64  # targets a sliding window scores, all but the first window
    eval_batch_seqs: int = 64  # windows scored at once; memory, not results
    sliding_enabled: bool = True  # also score the frozen model in sliding windows
    ttt_enabled: bool = True  # headline score with test-time training; off: the frozen model's
    ttt_lr: float = 0.005  # peak SGD step of test-time training, cosine to 0 over chunks
    ttt_momentum: float = 0.9  # SGD momentum, kept from chunk to chunk
    ttt_epochs: int = 3  # passes over a chunk after it has been scored
    ttt_chunk_tokens: int = 32768  # targets scored before the weights may learn from them
    ttt_grad_clip: float = 1.0  # longest gradient in test-time training
    eval_wallclock_seconds: float = 600.0  # scoring the quantized model, seconds; 0: no limit
    baselines_enabled: bool = False  # also compress the validation text with gzip -9 and xz -9e

    def __post_init__(self):
        """Check every value that can be checked before a clock starts."""
        problem = next((text for wrong, text in checks(self) if wrong), None)
        if problem:
            raise ConfigError(problem)

    def group(self, name: str) -> dict:
        """Values of the fields of one group of `GROUPS`."""
        current, values = "", {}
        for field, value in asdict(self).items():
            current = GROUPS.get(field, current)
            if current == name:
                values[field] = value
        return values

    @property
    def corpus(self) -> str:
        """Prefix of shard and tokenizer files: `fineweb` for fineweb10B_sp8192."""
        return re.match("[a-z]*", self.dataset).group()

    @property
    def name(self) -> str:
        """Name of this run's log and folder."""
        return self.run_id or f"{self.recipe}_seed{self.seed}"

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def batch_seqs(self) -> int:
        """Sequences a step over all ranks."""
        return self.train_batch_tokens // self.seq_len

    @property
    def dataset_dir(self) -> Path:
        """Folder of the shards."""
        return Path(self.data_dir) / "datasets" / self.dataset

    @property
    def tokenizer_path(self) -> Path:
        """SentencePiece model of the dataset."""
        return Path(self.data_dir) / "tokenizers" / f"{self.corpus}_{self.vocab_size}_bpe.model"

    @property
    def run_dir(self) -> Path:
        """Folder of the checkpoint and the artifact."""
        return Path(self.out_dir) / "runs" / self.name


GROUPS = dict(recipe="run", data_dir="data", vocab_size="model", iterations="training",
              tied_embed_lr="optimizer", matrix_bits="quantization", eval_stride="scoring")

# What #1060 gives in steps (warm-down 3,500, momentum 1,500, average over 333) is here in parts of
# its 6,700; its rotary base is what its length rule made of 10,000 in every run.
RECIPES = {
    "pr1876": {},
    "pr1858": dict(ttt_epochs=2),
    "pr1060": dict(
        dataset="fineweb10B_sp1024", vocab_size=1024, mlp_mult=3.0, rope_base=22081.8,
        qk_gain_init=1.5, num_loops=0, parallel_residual_start=11, skip_gates_enabled=False,
        bigram_buckets=2816, smear_enabled=True, value_embed_dim=128, warmdown_frac=0.52,
        ema_horizon_frac=0.05, tied_embed_lr=0.035, matrix_lr=0.025, scalar_lr=0.025, muon_wd=0.04,
        embed_wd=0.04, adam_wd=0.04, muon_momentum_warmup_frac=0.22, muon_row_normalize=False,
        ttt_enabled=False),
    "demo": dict(
        dataset="demo_sp1024", vocab_size=1024, seq_len=256, num_layers=4, model_dim=128,
        num_heads=4, num_kv_heads=2, num_loops=1, loop_start=1, loop_end=2, xsa_last_n=4,
        parallel_residual_start=3, max_wallclock_seconds=90.0, train_batch_tokens=2048,
        warmup_steps=3, matrix_clip_sigmas=12.85, ttt_chunk_tokens=4096, baselines_enabled=True),
}


def checks(c: Config):
    """Yield (is wrong, message) for what types cannot check; a message names variable and value."""
    values = asdict(c)
    for name, v in values.items():
        if type(v) in (int, float):
            floor = name in MAY_BE_ZERO
            yield (v < 0 if floor else v <= 0,
                   f"{name.upper()}={v}: must be {'0 or more' if floor else 'more than 0'}")
            # Far beyond all that is meant, and where arithmetic begins to fail.
            most = 1e30 if type(v) is float else 1 << 40
            yield v > most, f"{name.upper()}={v}: must be at most {most}"
    for name, allowed in CHOICES.items():
        yield (values[name] not in allowed,
               f"{name.upper()}={values[name]}: must be one of {', '.join(allowed)}")
    stages = c.stages.split(",")
    yield (stages != [s for s in STAGES if s in stages],
           f"STAGES={c.stages}: must name some of {','.join(STAGES)}, in this order")
    yield not c.corpus, f"DATASET={c.dataset}: must begin with lower-case letters"
    yield (not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", c.name),
           f"RUN_ID={c.name}: must be letters, digits and . _ - after the first")
    for name in BELOW_ONE:
        yield values[name] >= 1, f"{name.upper()}={values[name]}: must be below 1"
    hidden = c.mlp_mult * c.model_dim
    yield (not 1 <= hidden < 1 << 40,
           f"MLP_MULT={c.mlp_mult}: makes {hidden:g} hidden channels at MODEL_DIM={c.model_dim}")
    for part, whole in DIVIDES:
        yield (values[whole] % values[part], f"{part.upper()}={values[part]} does not divide "
               f"{whole.upper()}={values[whole]}")
    yield (c.rope_dims % 2 or c.rope_dims > c.head_dim,
           f"ROPE_DIMS={c.rope_dims}: must be even and at most the head width {c.head_dim}")
    yield (c.num_loops and not c.loop_start <= c.loop_end < c.num_layers,
           f"LOOP_START={c.loop_start}, LOOP_END={c.loop_end}: must be layers in order, the last "
           f"at most {c.num_layers - 1}")
    yield (c.max_wallclock_seconds and not c.warmup_steps,
           "WARMUP_STEPS=0: a run on the wall clock times its steps first; set it to 1 or more")
    yield not 2 <= c.matrix_bits <= 8, f"MATRIX_BITS={c.matrix_bits}: must be 2 to 8"
    yield not 2 <= c.embed_bits <= 8, f"EMBED_BITS={c.embed_bits}: must be 2 to 8"
    yield (c.logit_softcap > 70,
           f"LOGIT_SOFTCAP={c.logit_softcap}: must be at most 70, or sums of exp overflow")
    yield c.vocab_size > 65536, f"VOCAB_SIZE={c.vocab_size}: shards hold 16-bit token ids"
    yield c.warmdown_frac > 1, f"WARMDOWN_FRAC={c.warmdown_frac}: must be at most 1"
    yield c.bigram_buckets == 1, "BIGRAM_BUCKETS=1: must be 0, or 2 or more"


CHOICES = dict(loader=("coprime", "shuffled"), flash_attn=("auto", "off", "2", "3", "4"))
BELOW_ONE = "beta1", "beta2", "muon_momentum", "muon_momentum_warmup_start", "ttt_momentum"
DIVIDES = (("num_heads", "model_dim"), ("num_kv_heads", "num_heads"), ("eval_stride", "seq_len"),
           ("seq_len", "train_batch_tokens"), ("seq_len", "ttt_chunk_tokens"))
STAGES = ("train", "quantize", "eval")
MAY_BE_ZERO = """seed checkpoint_seconds rope_dims xsa_last_n num_loops loop_start loop_end
    parallel_residual_start max_wallclock_seconds warmup_steps warmdown_frac min_lr ttt_lr muon_wd
    enable_looping_at ema_horizon_frac embed_wd adam_wd muon_momentum_warmup_frac grad_clip_norm
    matrix_clip_sigmas ttt_momentum eval_wallclock_seconds bigram_buckets value_embed_dim
    value_embed_last_n""".split()


def parse_as(kind: type, text: str):
    """`text` as a bool, int, finite float or str; raises ValueError or KeyError."""
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def config_from_env(env=os.environ) -> tuple[Config, list[str]]:
    """The run's `Config` and the names set by the environment.

    A variable that reads like a setting but is none is refused with the nearest name; one that
    resembles nothing cannot be told from the shell's own.  Raises ConfigError.
    """
    defaults = {f.name: f.default for f in fields(Config)}
    recipe = env.get("RECIPE", "pr1876")
    if recipe not in RECIPES:
        raise ConfigError(f"RECIPE={recipe}: must be one of {', '.join(RECIPES)}")
    chosen = {}
    for var, text in env.items():
        name = var.lower()
        if var.isupper() and name in defaults:
            kind = type(defaults[name])
            try:
                chosen[name] = parse_as(kind, text)
            except (KeyError, ValueError):
                raise ConfigError(f"{var}={text!r}: expected {NEEDED[kind]}") from None
        elif near := difflib.get_close_matches(name, defaults, n=1, cutoff=0.85) or [
                known for known in defaults if sorted(known) == sorted(name)]:
            raise ConfigError(f"{var} is not a setting; did you mean {near[0].upper()}?")
    return Config(**{**RECIPES[recipe], **chosen}), list(chosen)


NEEDED = {bool: "0 or 1", int: "a whole number", float: "a finite number", str: "text"}


def print_help():
    """Print every setting with its default and, from the comments of `Config`, its meaning."""
    meanings = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", own_source(), re.M))
    print("usage: [SETTING=value ...] python train_gpt.py\n\nSettings and defaults "
          f"(RECIPE: {', '.join(RECIPES)}):")
    for f in fields(Config):
        if f.name in GROUPS:
            print(f"\n{GROUPS[f.name]}")
        print(f"  {f.name.upper() + '=' + str(f.default):<36} {meanings.get(f.name, '')}")


def own_source() -> str:
    """Text of the file that runs: the readable program or the packed one."""
    return Path(__file__).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# Ranks and logging: the only code that knows of other processes, devices, clocks and log files
# ------------------------------------------------------------------------------------------------

# One rank and many are one code path: nothing outside this section asks how many there are, but for
# slicing work.  The log is the proof of a run, so everything a reviewer needs is in it: settings,
# hashes of code, data order and artifact, and the order in which text was scored and learnt from.

class Dist:
    """This process among `world` equal ones; every method is the identity where there is one.

    All ranks call the same methods in the same order, whatever their share of the work.
    """

    def __init__(self, env=os.environ):
        """Join the process group that torchrun describes in `env`, on this rank's device."""
        self.rank, self.world = (
            int(env.get("RANK", 0)),
            int(env.get("WORLD_SIZE", 1)))
        self.on_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(env.get("LOCAL_RANK", 0))) if self.on_cuda else \
            torch.device("cpu")
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32      # of activations
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # What AdamW would import later keeps gloo's threads alive and may abort the exit.
            from torch import _dynamo
            torch.distributed.init_process_group(
                "nccl" if self.on_cuda else "gloo",
                device_id=self.device if self.on_cuda else None)            # or NCCL must guess it
        self.is_main = self.rank == 0

    def share(self, items):
        """This rank's contiguous slice of `items`; the slices of all ranks partition it."""
        n = len(items)
        return items[n * self.rank // self.world:n * (self.rank + 1) // self.world]

    def sum_(self, x: Tensor) -> Tensor:
        """Replace `x` by its sum over ranks."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def max(self, value: float) -> float:
        """Largest `value` of any rank."""
        x = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX)
        return x.item()

    def join(self, part: Tensor) -> Tensor:
        """Equal parts of all ranks, concatenated along dimension 0 in rank order."""
        if self.world == 1:
            return part
        whole = part.new_empty(self.world * part.size(0), *part.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, part.contiguous())
        return whole

    def check_same(self, what: str, digest: str):
        """Raise DataError unless every rank holds the same hex `digest`."""
        value = float(int(digest[:12], 16))                                 # exact: 48 bits
        if self.max(value) != -self.max(-value):
            raise DataError(f"{what} differs between ranks; give all of them the same files")

    def wait(self):
        """Return when every rank has come here and this device has finished its work."""
        if self.on_cuda:
            torch.cuda.synchronize()
        if self.world > 1:
            torch.distributed.barrier()

    def close(self):
        """Leave the process group."""
        if self.world > 1:
            torch.distributed.destroy_process_group()


class Late:
    """Reads a few device numbers one call late, so that the device never waits for the host."""

    def __init__(self):
        """Nothing has been handed in yet."""
        self.pending = None

    def swap(self, values: Tensor) -> list[float] | None:
        """Take `values` (a small tensor, copied) and return those of the call before, or None."""
        before = self.flush()
        host = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(
            values, non_blocking=True)
        done = torch.cuda.Event() if values.is_cuda else None
        if done:
            done.record()
        self.pending = host, done
        return before

    def flush(self) -> list[float] | None:
        """The numbers handed in last and not yet returned, waiting for the device if need be."""
        if self.pending is None:
            return None
        (host, done), self.pending = self.pending, None
        if done:
            done.synchronize()
        return host.tolist()


class Log:
    """Writes one event a line, `event key=value ...`, to the console and to logs/<run>.txt.

    On a terminal a last line that redraws itself says how far the part at work is; no log has it.
    """

    def __init__(self, cfg: Config, dist: Dist):
        """Open the run's log on rank 0; a run that starts with training starts a new log."""
        self.file, self.drawn = None, 0.0
        self.on_terminal = dist.is_main and sys.stderr.isatty()
        if dist.is_main:
            self.path = path = Path(cfg.out_dir) / "logs" / f"{cfg.name}.txt"
            fresh = "train" in cfg.stages and not cfg.resume
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = path.open("w" if fresh else "a", encoding="utf-8")
            except OSError as e:
                raise ConfigError(f"{path}: cannot be written ({e.strerror}); see OUT_DIR") from e

    def __call__(self, event: str, **values):
        """Log `event` with its values; floats are formatted here and nowhere else."""
        self.line(" ".join([event, *(f"{k}={show(k, v)}" for k, v in values.items())]))

    def line(self, text: str):
        """Write one raw line."""
        if self.file:
            try:
                self.draw("")
                print(text, flush=True)
                print(text, file=self.file, flush=True)
            except OSError as e:
                self.file = None                            # full disk, or nobody reads the console
                raise ConfigError(f"{self.path} or the console: {e.strerror}") from None

    def progress(self, what: str, frac: float = 0.0, details: Callable[[], str] = str):
        """Say on a terminal, a few times a second, that `what` is at work and `frac` of it done.

        `details()` is what else to say; it is called only if there is somebody to say it to.
        """
        if self.on_terminal and (not frac or time.perf_counter() - self.drawn > 0.2):
            self.drawn = time.perf_counter()
            share = f" {100 * frac:3.0f} %" if frac else " ..."
            self.draw(f"{what}{share}  {details()}")

    def draw(self, text: str):
        """Replace the terminal's last line."""
        if self.on_terminal:
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[:columns - 1]}", end="", file=sys.stderr, flush=True)


def show(key: str, value) -> str:
    """`value` as the log spells it: scores to 8 decimals, other floats to 6 digits."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.8f}" if key.endswith(("bpb", "loss")) else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    text = str(value)
    return json.dumps(text) if re.search(r'[\s"]', text) or not text else text


class Clock:
    """Seconds of training, of access to training data and of scoring, against their budgets.

    It is also the key to the data: training shards open only before training data is closed,
    validation shards only after, so nothing can be learnt from validation text before it is scored.
    """

    def __init__(self, cfg: Config, now=time.perf_counter):
        """All clocks at zero, training data open; `now` reads a clock in seconds."""
        self.cfg, self.now, self.phase, self.started = cfg, now, "train", 0.0
        self.train_seconds = self.data_seconds = self.eval_seconds = 0.0

    def start(self, spent: float = 0.0):
        """Start the training clock, `spent` seconds of an earlier run already on it."""
        self.started = self.now() - spent

    def elapsed(self) -> float:
        """Seconds on the training clock."""
        return self.now() - self.started

    def allow(self, split: str):
        """Raise BudgetError unless files of `split` may be opened in this phase."""
        if (split == "train") != (self.phase == "train"):
            raise BudgetError(f"{split} files may not be opened in the {self.phase} phase")

    def close_training_data(self, train_seconds: float = 0.0, data_seconds: float = 0.0):
        """End access to training data for good, after so many seconds of training and of access."""
        self.phase, self.train_seconds, self.data_seconds = "eval", train_seconds, data_seconds

    def refuse_overtime(self):
        """Raise BudgetError if training data or scoring took longer than its budget."""
        for what, spent, limit in (
                ("training data was read", self.data_seconds, self.cfg.max_wallclock_seconds),
                ("scoring went on", self.eval_seconds, self.cfg.eval_wallclock_seconds)):
            if limit and spent > limit:
                raise BudgetError(f"{what} for {spent:.1f} s of {limit:.1f} s allowed; such a run "
                                  "does not count")


# ------------------------------------------------------------------------------------------------
# Tokens: shards on disk, the validation stream, and how many bytes of text each token stands for
# ------------------------------------------------------------------------------------------------
# A shard is 256 little-endian int32 (magic, version, count, zeros) and `count` uint16 token ids.
# Documents begin with BOS, follow each other without a gap, and may go on in the next shard.  Bits
# per byte make tokenizers comparable: nats of all targets over the bytes of text they stand for.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


class Shard(NamedTuple):
    """One file of tokens; `name` is the file's own, without its folder."""
    name: str
    tokens: np.ndarray


def read_shard(path: Path) -> Shard:
    """Map a shard into memory; raises DataError naming the file and what is wrong with it."""
    try:
        size = path.stat().st_size
        if not path.is_file():                              # a pipe would be waited for, for ever
            raise DataError(f"{path}: cannot be read (not a file)")
        header = np.fromfile(path, "<i4", 256)
        if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
            raise DataError(f"{path}: not a token shard (magic and version {header[:2].tolist()}, "
                            f"not {[SHARD_MAGIC, SHARD_VERSION]}); see prepare_data.py")
        count = int(header[2])
        if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
            raise DataError(f"{path}: {size} bytes, but {count} tokens as its header says take "
                            f"{SHARD_HEADER_BYTES + 2 * count}; see prepare_data.py")
        return Shard(path.name, np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,)))
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None


def open_shards(cfg: Config, split: str, clock: Clock, log: Log) -> list[Shard]:
    """All shards of `split` in name order, for the phase in which they may be read."""
    clock.allow(split)
    if (cfg.dataset_dir / ".lock").is_file() and not (cfg.dataset_dir / "manifest.json").is_file():
        raise DataError(f"{cfg.dataset_dir}: not finished; run the same prepare_data.py again")
    shards = [read_shard(p) for p in sorted(cfg.dataset_dir.glob(f"{cfg.corpus}_{split}_*.bin"))]
    if not shards:
        raise DataError(f"{cfg.dataset_dir}: no {cfg.corpus}_{split}_*.bin; make them with "
                        "prepare_data.py, or set DATA_DIR and DATASET")
    sizes = [f"{s.name}:{len(s.tokens)}" for s in shards]
    log("data", split=split, dataset=cfg.dataset, files=len(shards),
        tokens=sum(len(s.tokens) for s in shards), sha256=hex_digest(*sizes))
    return shards


def hex_digest(*parts) -> str:
    """SHA-256 of the parts' text, as hex."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def check_ids(cfg: Config, tokens: np.ndarray, where: str):
    """Raise DataError if a token id is beyond the vocabulary."""
    top = int(tokens.max())
    if top >= cfg.vocab_size:
        raise DataError(f"{where}: token id {top} with VOCAB_SIZE={cfg.vocab_size}; "
                        "set the vocabulary that the shards were made with")


def load_validation(cfg: Config, clock: Clock, log: Log) -> np.ndarray:
    """The validation stream (n + 1,) uint16, cut to n targets, a multiple of seq_len."""
    shards = open_shards(cfg, "val", clock, log)
    for name, tokens in shards:
        check_ids(cfg, tokens, name)
    tokens = np.concatenate([s.tokens for s in shards])
    n = (len(tokens) - 1) // cfg.seq_len * cfg.seq_len
    if not n:
        raise DataError(f"{shards[0].name}: {len(tokens)} validation tokens; one window of SEQ_LEN="
                        f"{cfg.seq_len} needs {cfg.seq_len + 1}")
    return tokens[:n + 1]


def file_hash(path: Path) -> str:
    """SHA-256 of a file as hex, or an empty text if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def load_tokenizer(cfg: Config, sha256: str = ""):
    """The dataset's SentencePiece model; raises DataError if missing, broken or of another size.

    So does one whose file has another hash than `sha256`, if that is known.
    """
    from sentencepiece import SentencePieceProcessor        # only scoring needs it
    path = cfg.tokenizer_path
    if not path.is_file():
        raise DataError(f"{path}: no tokenizer for DATASET={cfg.dataset} and "
                        f"VOCAB_SIZE={cfg.vocab_size}; prepare_data.py makes it")
    try:
        tokenizer = SentencePieceProcessor(model_file=str(path))
        tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))          # each must be text
    except (OSError, RuntimeError, ValueError):
        raise DataError(f"{path}: not a SentencePiece model; see prepare_data.py") from None
    size, marked = tokenizer.vocab_size(), tokenizer.piece_to_id(MARK) != tokenizer.unk_id()
    if size != cfg.vocab_size or not marked:
        raise DataError(f"{path}: {size} pieces and VOCAB_SIZE={cfg.vocab_size} must agree, and a "
                        "lone space must be a piece; see prepare_data.py")
    if sha256 and sha256 != file_hash(path):
        raise DataError(f"{path}: not the tokenizer that the artifact was made with; give that one")
    return tokenizer


MARK = "\u2581"       # SentencePiece's sign for a space before a piece
BOS = 1             # the token that begins a document


def target_bytes(tokens: np.ndarray, tokenizer) -> np.ndarray:
    """Bytes of text that each target tokens[1:] stands for, (n,) int16, by the challenge's rule.

    A normal piece counts its UTF-8 bytes, a byte piece 1, a control piece 0; a leading space counts
    1 unless the token before is a control piece, as at the start of a document.
    """
    ids = range(tokenizer.vocab_size())
    pieces = [tokenizer.id_to_piece(i) for i in ids]
    # Control pieces such as BOS stand for no text: they count no byte, and a word right after one
    # does not pay for the space that its piece begins with.
    silent = np.array([
        tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        for i in ids])                                                                  # (V,)
    spaced = np.array([p.startswith(MARK) for p in pieces]) & ~silent                   # (V,)
    size = np.array([
        1 if tokenizer.is_byte(i) else len(p.removeprefix(MARK).encode())
        for i, p in zip(ids, pieces)]) * ~silent                                        # (V,)
    before, target = tokens[:-1], tokens[1:]
    return (size[target] + (spaced[target] & ~silent[before])).astype(np.int16)         # (n,)


# ------------------------------------------------------------------------------------------------
# Batches: coprime strides through all shards; the same global batches on any machine
# ------------------------------------------------------------------------------------------------
# A walk of parameter-golf #726/#1060 made a pure function of (seed, shard names, batch index, batch
# size): no path, rank, world size or micro-batch enters it, and every block is used once an epoch.
# Every rank computes the whole plan, which is cheap, and reads every world-th window of it; a
# digest of all windows so far is compared across ranks and stands in the log.

def generator(*key) -> np.random.Generator:
    """Random numbers that depend on `key` alone, the same on every machine."""
    return np.random.Generator(np.random.PCG64(int(hex_digest(*key)[:16], 16)))


class CoprimePlan:
    """Endless sequence of global batches, each (seqs, 2) int64: shard index and token offset.

    Within an epoch shard i visits its blocks in the order (start + t * stride) mod blocks, a
    permutation as stride and blocks are coprime; shards are drawn with weight blocks_left**alpha.
    """
    ALPHA, SPREAD = (0.9, 0.5), (8, 64)     # alpha, shards mixed a batch: early, late

    def __init__(self, cfg: Config, shards: list[Shard]):
        """Raises DataError if a shard is shorter than one sequence."""
        self.cfg, self.names = cfg, [s.name for s in shards]
        self.sizes = np.array([len(s.tokens) for s in shards])
        short = self.sizes <= cfg.seq_len
        if short.any():
            raise DataError(f"{self.names[int(short.argmax())]}: shorter than one sequence of "
                            f"SEQ_LEN={cfg.seq_len} and its target; lower it")
        self.batch, self.digest = 0, ""
        self.key = hex_digest(cfg.seed, cfg.loader, cfg.seq_len, cfg.batch_seqs, *self.names,
                              *self.sizes)                  # all that the order depends on
        self.start_epoch(0)

    def start_epoch(self, epoch: int):
        """Draw a fresh phase, start and stride for every shard."""
        self.epoch, L = epoch, self.cfg.seq_len
        self.taken, self.walks = np.zeros(len(self.names), np.int64), []
        for name, size in zip(self.names, self.sizes.tolist()):
            rng = generator(self.cfg.seed, "walk", name, size, epoch)
            phase = int(rng.integers(min(L, size - L)))
            blocks = (size - 1 - phase) // L
            coprime = (int(rng.integers(1, blocks + 1)) for _ in itertools.count())
            stride = next(s for s in coprime if math.gcd(s, blocks) == 1)
            self.walks.append((phase, int(rng.integers(blocks)), stride, blocks))
        self.blocks = np.array([w[3] for w in self.walks])

    def take(self, shard: int, count: int) -> np.ndarray:
        """The next `count` blocks of a shard, (count, 2)."""
        phase, start, stride, blocks = self.walks[shard]
        t = self.taken[shard] + np.arange(count)
        self.taken[shard] += count
        offset = phase + (start + t * stride) % blocks * self.cfg.seq_len
        return np.stack([np.full(count, shard), offset], 1)

    def draw(self, rng, left: np.ndarray, need: int) -> np.ndarray:
        """How many blocks to take from each shard, (S,), at most what is `left` there."""
        p = 1.0 if self.epoch else self.taken.sum() / self.blocks.sum()
        # Early on, few shards and weights near proportional to what they have left; late, many
        # shards and flatter weights.  Progress is that through the data: no clock, no step count.
        weight = left ** (
            self.ALPHA[0] + p * (self.ALPHA[1] - self.ALPHA[0]))
        mixed = min(
            round(self.SPREAD[0] + p * (self.SPREAD[1] - self.SPREAD[0])),
            np.count_nonzero(left),
            need)
        chosen = rng.choice(len(left), mixed, replace=False, p=weight / weight.sum())
        counts = np.zeros_like(left)
        counts[chosen] = 1 + rng.multinomial(
            need - mixed, weight[chosen] / weight[chosen].sum())
        return np.minimum(counts, left)

    def next(self) -> np.ndarray:
        """The next global batch; its order interleaves the shards."""
        rng = generator(self.cfg.seed, "batch", self.batch)
        buckets, need = [], self.cfg.batch_seqs
        while need:
            left = self.blocks - self.taken
            if not left.any():
                self.start_epoch(self.epoch + 1)
                continue
            counts = self.draw(rng, left, need)
            buckets += [self.take(i, counts[i]) for i in np.flatnonzero(counts)]
            need -= counts.sum()
        return self.emit(interleave(rng, buckets))

    def emit(self, windows: np.ndarray) -> np.ndarray:
        """Count the batch and fold it into the plan's digest."""
        self.batch += 1
        self.digest = hex_digest(self.digest, windows.tobytes().hex())[:16]
        return windows

    def state_dict(self) -> dict:
        """Where the plan stands, as JSON can hold it."""
        return dict(
            key=self.key, batch=self.batch, epoch=self.epoch,
            digest=self.digest, taken=self.taken.tolist())

    def load_state_dict(self, state: dict):
        """Continue where `state` was taken; raises ArtifactError if that was in another order."""
        if state.get("key") != self.key:
            raise ArtifactError("the checkpoint read its data in another order; use its SEED, "
                                "LOADER, SEQ_LEN, TRAIN_BATCH_TOKENS and shards")
        taken = state["taken"] if type(state.get("taken")) is list else [None]
        place = [state.get("batch"), state.get("epoch"), *taken]
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in place):
            raise ArtifactError("the checkpoint does not say where its data ended; train again")
        self.start_epoch(state["epoch"])
        most = self.blocks if len(taken) == len(self.blocks) else self.blocks.sum()
        if len(taken) != len(self.taken) or np.any(np.array(taken) > most):
            raise ArtifactError("the checkpoint is beyond the end of the data; train again")
        self.batch, self.digest, self.taken = (
            state["batch"], state.get("digest"), np.array(taken))


def interleave(rng, buckets: list[np.ndarray]) -> np.ndarray:
    """Deal the rows of shuffled buckets in rounds, one of each bucket a round, in random order."""
    buckets = [rng.permutation(b).tolist() for b in buckets]
    dealt = []
    while buckets:
        dealt += [buckets[i].pop() for i in rng.permutation(len(buckets))]
        buckets = [b for b in buckets if b]
    return np.array(dealt)


class ShuffledPlan(CoprimePlan):
    """The same blocks in one random order an epoch: the plain loader, for comparison."""

    def start_epoch(self, epoch: int):
        """Shuffle all blocks of all shards."""
        super().start_epoch(epoch)
        every = np.concatenate([
            self.take(i, n) for i, n in enumerate(self.blocks)])                    # (blocks, 2)
        self.order = generator(self.cfg.seed, "shuffle", epoch).permutation(every)
        self.taken = np.zeros(1, np.int64)                  # position in `order`

    def next(self) -> np.ndarray:
        """The next rows of the shuffled epoch."""
        parts, need = [], self.cfg.batch_seqs
        while need:
            at = int(self.taken[0])
            parts.append(self.order[at:at + need])
            self.taken += len(parts[-1])
            need -= len(parts[-1])
            if need:
                self.start_epoch(self.epoch + 1)
        return self.emit(np.concatenate(parts))


class Batches:
    """Reads this rank's part of each global batch ahead of time, in a thread of its own.

    `state` belongs to the last batch handed out: a plan that loads it goes on with the next one.
    """
    AHEAD = 4       # batches read before they are asked for

    def __init__(self, cfg: Config, shards: list[Shard], dist: Dist, state: dict | None = None):
        """Start reading, after the batch of `state` if given."""
        self.cfg, self.shards, self.dist = cfg, shards, dist
        self.plan = {"coprime": CoprimePlan, "shuffled": ShuffledPlan}[cfg.loader](cfg, shards)
        if state:
            self.plan.load_state_dict(state)
        self.state = self.plan.state_dict()
        self.ready, self.closed = queue.Queue(self.AHEAD), False
        self.thread = threading.Thread(target=self.fill, daemon=True)
        self.thread.start()

    def fill(self):
        """Body of the thread: queue (tokens, plan state), or the exception that ended it."""
        try:
            while not self.closed:
                windows = self.plan.next()[self.dist.rank::self.dist.world]
                self.put((self.read(windows), self.plan.state_dict()))
        except Exception as e:      # handed to the trainer, which raises it
            self.put(e)

    def put(self, item):
        """Queue `item`, giving up when the reader has been closed."""
        while not self.closed:
            with suppress(queue.Full):
                return self.ready.put(item, timeout=0.1)

    def read(self, windows: np.ndarray) -> Tensor:
        """Tokens of the windows with their targets, (B, T + 1) uint16, pinned for the device."""
        span = self.cfg.seq_len + 1
        out = torch.empty(                                  # (B, T + 1)
            len(windows), span, dtype=torch.uint16, pin_memory=self.dist.on_cuda)
        rows = out.numpy()
        for row, (i, offset) in zip(rows, windows):
            row[:] = self.shards[i].tokens[offset:offset + span]
            check_ids(self.cfg, row, self.shards[i].name)
        return out

    def next(self) -> Tensor:
        """This rank's part of the next batch, (B, T + 1) int64 on its device."""
        item = self.ready.get()
        if isinstance(item, Exception):
            self.ready.put(item)                            # for whoever asks again
            raise item
        tokens, self.state = item
        return tokens.to(self.dist.device, non_blocking=True).long()

    def close(self):
        """Stop reading and let go of the files."""
        self.closed = True
        self.thread.join()


# ------------------------------------------------------------------------------------------------
# Model: a GPT with recurrent layers, exclusive self attention and gated U-Net skips
# ------------------------------------------------------------------------------------------------
# parameter-golf #1493/#1876.  One precision rule: parameters are fp32, activations have the dtype
# of the device, and a weight is cast to the dtype of what it meets.  Norms have no gain.  Output
# projections start at zero, so every layer begins as the identity.

class Linear(nn.Module):
    """A bias-free matrix, orthogonal or zero at first."""

    def __init__(self, in_features: int, out_features: int, rng: torch.Generator | None):
        """Draw the weight from `rng`; None: zeros, so that a new layer starts as the identity."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))      # (O, I)
        if rng:
            nn.init.orthogonal_(self.weight, generator=rng)

    def cast(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight (O, I) in `dtype`, its rows times `scale` (O,) if given."""
        # Scaling the rows is scaling the outputs, and spares a pass over all of those and another
        # one over their gradients: 3 ms of a looped step (bench/RESULTS.md).
        return (self.weight if scale is None else self.weight * scale[:, None]).to(dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(..., I) -> (..., O) in the dtype of `x`, times `scale` (O,) if given."""
        return F.linear(x, self.cast(x.dtype, scale))


def rms_norm(x: Tensor) -> Tensor:
    """`x` over its root mean square along the last dimension."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_angles(cfg: Config) -> Tensor:
    """Rotation angle of each position and channel pair, (T, rope_dims / 2) float32."""
    pairs = cfg.rope_dims // 2
    speed = cfg.rope_base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)    # (pairs,)
    return torch.outer(
        torch.arange(cfg.seq_len, dtype=torch.float64), speed).float()                  # (T, pairs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2R channels of x (B, T, H, D) by the angles behind cos, sin (T, 1, R).

    Half-split layout: channel r is paired with r + R.  Source: RoFormer, arXiv:2104.09864.
    """
    R = cos.size(-1)
    a, b, rest = x.split([R, R, x.size(-1) - 2 * R], dim=-1)
    return torch.cat([
        a * cos + b * sin,
        b * cos - a * sin,
        rest], dim=-1)


def split_heads(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of all heads; the first two normed and turned, queries sharpened.

    Args: x (B, T, H + 2 K, D); gain (H,), a query's length over that of a key; cos, sin (T, 1, R).
    Returns: q (B, T, H, D), k (B, T, K, D), v (B, T, K, D).
    """
    H = len(gain)
    K = (x.size(2) - H) // 2
    q, k, v = x.split([H, K, K], dim=2)
    return (rotate(rms_norm(q), cos, sin) * gain.to(x.dtype)[:, None],
            rotate(rms_norm(k), cos, sin), v)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its component along the token's own value.

    Args: y (B, T, H, D) attention output; v (B, T, K, D) values, K dividing H.
    Source: exclusive self attention, arXiv:2603.09078; parameter-golf #265, #1019.
    """
    B, T, H, D = y.shape
    K = v.size(2)
    v = F.normalize(v, dim=-1).unsqueeze(3)                             # (B, T, K, 1, D)
    y = y.view(B, T, K, H // K, D)                                      # (B, T, K, G, D)
    return (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, D)


def squared_mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Two products around leaky_relu(.)^2; its slope 0.5 keeps gradients on the negative side.

    Args: x (B, T, C); up (O, C); down (C, O).  Returns: hidden (B, T, O), output (B, T, C).
    Another activation here is another one in the kernel `activate`, or KERNELS_ENABLED=0.
    """
    h = F.leaky_relu(F.linear(x, up), 0.5).square()
    return h, F.linear(h, down)


class Shared(NamedTuple):
    """What all layers read."""
    x0: Tensor                  # (B, T, C) normed embedding, where the residual stream began
    cos: Tensor                 # (T, 1, R) of the rotation angles
    sin: Tensor
    values: Tensor | None       # (B, T, K, D) embedding for the values of the last layers
    fused: bool                 # whether kernels do what they can


class Attention(nn.Module):
    """Causal grouped-query attention with normed, partly rotated queries and keys."""

    def __init__(self, cfg: Config, layer: int, rng: torch.Generator):
        """Weights of layer `layer`."""
        super().__init__()
        C, D, K = cfg.model_dim, cfg.head_dim, cfg.num_kv_heads
        self.head_dim = D
        self.xsa, self.name = layer >= cfg.num_layers - cfg.xsa_last_n, f"layers.{layer}.attn"
        self.c_q, self.c_k, self.c_v = (Linear(C, width, rng) for width in (C, K * D, K * D))
        self.proj = Linear(C, C, None)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        embeds = cfg.value_embed_dim and layer >= cfg.num_layers - cfg.value_embed_last_n
        self.value_gain = nn.Parameter(torch.ones(1)) if embeds else None

    def forward(self, x: Tensor, shared: Shared, scale: Tensor, observe) -> Tensor:
        """Attend over x (B, T, C), outputs times `scale` (C,); `observe` sees matrices' inputs."""
        B, T, C = x.shape
        observe(x, *(f"{self.name}.{n}.weight" for n in ("c_q", "c_k", "c_v")))
        weight = torch.cat([                                            # one product for all three
            self.c_q.weight, self.c_k.weight, self.c_v.weight])
        qkv = F.linear(x, weight.to(x.dtype)).view(                     # (B, T, H + 2 K, D)
            B, T, -1, self.head_dim)
        split, exclude = (FusedHeads.apply, FusedExclusion.apply) if shared.fused else (
            split_heads, exclude_self)
        q, k, v = split(qkv, self.q_gain, shared.cos, shared.sin)
        # Here and not later, as exclusive attention is to see the value that is attended to.
        if self.value_gain is not None:
            v = v + self.value_gain.to(x.dtype) * shared.values
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=True, enable_gqa=True).transpose(1, 2)            # (B, T, H, D)
        y = (exclude(y, v) if self.xsa else y).reshape(B, T, C)
        observe(y, f"{self.name}.proj.weight")
        return self.proj(y, scale)


class MLP(nn.Module):
    """Two matrices with a squared leaky ReLU in between."""

    def __init__(self, cfg: Config, layer: int, rng: torch.Generator):
        """Hidden width is mlp_mult * model_dim."""
        super().__init__()
        self.name = f"layers.{layer}.mlp"
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc, self.proj = (
            Linear(cfg.model_dim, hidden, rng),
            Linear(hidden, cfg.model_dim, None))

    def forward(self, x: Tensor, scale: Tensor, fused: bool, observe) -> Tensor:
        """(B, T, C) -> (B, T, C), outputs times `scale` (C,)."""
        observe(x, f"{self.name}.fc.weight")
        h, y = (FusedMLP.apply if fused else squared_mlp)(              # (B, T, mlp_mult * C)
            x, self.fc.cast(x.dtype), self.proj.cast(x.dtype, scale))
        observe(h, f"{self.name}.proj.weight")
        return y


class Block(nn.Module):
    """One transformer layer on a mix of the residual stream and the embedding it began as."""

    def __init__(self, cfg: Config, layer: int, rng: torch.Generator):
        """Layer number `layer`; its sublayers see their input scaled by 1 / sqrt(layer + 1)."""
        super().__init__()
        C = cfg.model_dim
        self.attn, self.mlp = Attention(cfg, layer, rng), MLP(cfg, layer, rng)
        self.attn_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(C)),
            nn.Parameter(torch.ones(C)))
        self.resid_mix = nn.Parameter(                                                  # (2, C)
            torch.stack([torch.ones(C), torch.zeros(C)]))
        self.ln_scale = (layer + 1) ** -0.5
        self.parallel = layer >= cfg.parallel_residual_start

    def forward(self, x: Tensor, shared: Shared, observe) -> Tensor:
        """The next residual stream (B, T, C) from x (B, T, C)."""
        mix = self.resid_mix.to(x.dtype)
        h = mix[0] * x + mix[1] * shared.x0
        # Parallel layers feed both halves from one norm, GPT-J style; the others feed the MLP from
        # what attention has added.
        n = rms_norm(h) * self.ln_scale
        u = h + self.attn(n, shared, self.attn_scale, observe)
        if not self.parallel:
            n = rms_norm(u) * self.ln_scale
        return u + self.mlp(n, self.mlp_scale, shared.fused, observe)


class BigramHash(nn.Module):
    """A table of token pairs, found by hashing, in the model's width (parameter-golf #1060)."""

    def __init__(self, cfg: Config, rng: torch.Generator):
        """The table starts at zero; its last row stands for the pair that begins a window."""
        super().__init__()
        self.pair_emb = nn.Parameter(torch.zeros(cfg.bigram_buckets, cfg.bigram_dim))
        self.pair_proj = orthogonal(cfg.model_dim, cfg.bigram_dim, rng)
        self.pair_scale = nn.Parameter(torch.full((1,), 0.05))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C) float32."""
        last = len(self.pair_emb) - 1
        pairs = (36313 * tokens[:, 1:]) ^ (27191 * tokens[:, :-1])                  # (B, T - 1)
        buckets = F.pad(pairs % last, (1, 0), value=last)                           # (B, T)
        return F.linear(F.embedding(buckets, self.pair_emb), self.pair_proj) * self.pair_scale


class ValueEmbedding(nn.Module):
    """An embedding of its own for the values of the last layers (parameter-golf #1060)."""

    def __init__(self, cfg: Config, rng: torch.Generator):
        """One table for all layers that use it."""
        super().__init__()
        self.heads = cfg.num_kv_heads, cfg.head_dim
        self.value_emb = nn.Parameter(torch.empty(cfg.vocab_size, cfg.value_embed_dim))
        nn.init.normal_(self.value_emb, std=0.01, generator=rng)
        self.value_proj = orthogonal(math.prod(self.heads), cfg.value_embed_dim, rng)
        self.value_scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, K, D) float32."""
        values = F.linear(F.embedding(tokens, self.value_emb), self.value_proj)
        return (values * self.value_scale).unflatten(-1, self.heads)


def orthogonal(rows: int, columns: int, rng: torch.Generator) -> nn.Parameter:
    """A random matrix (rows, columns) with orthogonal rows or columns."""
    return nn.Parameter(nn.init.orthogonal_(torch.empty(rows, columns), generator=rng))


def layer_schedule(cfg: Config, looped: bool) -> tuple[list[int], list[int]]:
    """Layers in the order they run, split into the encoder, which leaves skips, and the decoder.

    Looped, layers loop_start..loop_end run num_loops more times before the rest.
    """
    layers = list(range(cfg.num_layers))
    if looped and cfg.num_loops:
        end = cfg.loop_end + 1
        layers = layers[:end] + cfg.num_loops * layers[cfg.loop_start:end] + layers[end:]
    return layers[:len(layers) // 2], layers[len(layers) // 2:]


def unobserved(x: Tensor, *names: str):
    """Ignore x, the input of the matrices `names`; what `observe` is outside of calibration."""


class GPT(nn.Module):
    """The language model; `features` and `token_nll` are the two halves of a forward pass."""

    def __init__(self, cfg: Config, dtype: torch.dtype = torch.float32):
        """Initial weights depend on cfg.seed alone; `dtype` is that of the activations."""
        super().__init__()
        self.cfg, self.dtype, self.fused = cfg, dtype, False
        rng = torch.Generator().manual_seed(int(hex_digest(cfg.seed, "weights")[:15], 16))
        self.tok_emb = nn.Parameter(torch.empty(cfg.vocab_size, cfg.model_dim))     # (V, C)
        nn.init.normal_(self.tok_emb, std=cfg.tied_embed_init_std, generator=rng)
        self.layers = nn.ModuleList(Block(cfg, i, rng) for i in range(cfg.num_layers))
        self.pairs = BigramHash(cfg, rng) if cfg.bigram_buckets else None
        self.values = ValueEmbedding(cfg, rng) if cfg.value_embed_dim else None
        self.smear_gate = nn.Parameter(torch.zeros(cfg.model_dim)) if cfg.smear_enabled else None
        skips = len(layer_schedule(cfg, True)[0])
        self.skip_weights = nn.Parameter(torch.ones(skips, cfg.model_dim))
        if cfg.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, cfg.model_dim))
        angles = rotary_angles(cfg)[:, None]                                        # (T, 1, R)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Normed embedding of tokens (B, T) int64: (B, T, C)."""
        x = F.embedding(tokens, self.tok_emb)
        if self.pairs:
            x = x + self.pairs(tokens)
        x = rms_norm(x.to(self.dtype))
        if self.smear_gate is None:
            return x
        # A document's first token has nothing before it: what stands there is another document,
        # which #1060 let through (mended by #1851).
        gate = self.smear_gate.sigmoid().to(x.dtype)                                # (C,)
        if not self.cfg.smear_across_documents:
            gate = gate * (tokens != BOS)[..., None]                                # (B, T, C)
        return x + gate * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)

    def merge_skip(self, x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
        """Blend a skip, scaled by `weight` (C,), into x: a lerp by the gate, or just a sum."""
        if gate is None:
            return x + weight.to(x.dtype) * skip
        # As two scaled terms, whose gradients are two plain sums: 1 % of a step (bench/RESULTS.md).
        share = gate.sigmoid()
        return share.to(x.dtype) * x + ((1 - share) * weight).to(x.dtype) * skip

    def features(self, tokens: Tensor, looped: bool, observe=unobserved) -> Tensor:
        """Normed final state of every position, (B, T, C), for tokens (B, T) int64."""
        T = tokens.size(1)
        values = self.values(tokens).to(self.dtype) if self.values else None
        x = self.embed(tokens)                                                      # (B, T, C)
        shared = Shared(x, self.cos[:T], self.sin[:T], values, self.fused)
        # The first half leaves its states on a stack, the second half takes them off again, so that
        # first meets last.  More layers run once recurrence is on, and then more rows of the skips
        # are used: what a row stands for changes at that moment, as in #1493.
        encoder, decoder = layer_schedule(self.cfg, looped)
        weights, skips = self.skip_weights.unbind(), []     # unbind: one gradient, not one a row
        gates = self.skip_gates.unbind() if self.cfg.skip_gates_enabled else [None] * len(weights)
        for i in encoder:
            x = self.layers[i](x, shared, observe)
            skips.append(x)
        for j, i in enumerate(decoder):
            if skips:
                x = self.merge_skip(x, skips.pop(), weights[j], gates[j])
            x = self.layers[i](x, shared, observe)
        x = rms_norm(x)
        observe(x, "tok_emb")
        return x

    def matrix_inputs(self, tokens: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
        """(names, input (B, T, I)) of the matrices in a looped pass, in the order they are met."""
        seen = []
        self.features(tokens, True, lambda x, *names: seen.append((names, x)))
        return seen

    def token_nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target (B, T) given features (B, T, C): (B, T) float32.

        Logits have the dtype of the features; soft cap and sum over the vocabulary are fp32.
        """
        logits = F.linear(features, self.tok_emb.to(features.dtype))                # (B, T, V)
        return SoftcapNLL.apply(logits, targets, self.cfg.logit_softcap)


class SoftcapNLL(torch.autograd.Function):
    """-log softmax(z)[target] for z = cap tanh(logits / cap); z is not kept.

    As |z| < cap, exp cannot overflow and no maximum is needed: one pass over the logits each way.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        """(B, T, V), (B, T) int64 -> (B, T) float32."""
        lse = soft_cap(logits, cap).exp().sum(-1).log()                             # (B, T)
        ctx.save_for_backward(logits, targets, lse)
        ctx.cap = cap
        return lse - soft_cap(logits.gather(-1, targets[..., None]), cap)[..., 0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradient of the logits: (softmax - one at the target) times the slope of the cap."""
        logits, targets, lse = ctx.saved_tensors
        z = soft_cap(logits, ctx.cap)
        hit = torch.arange(logits.size(-1), device=logits.device) == targets[..., None]
        d = ((z - lse[..., None]).exp() - hit.float()) * (              # (B, T, V), one fused pass
            1 - (z / ctx.cap).square())
        return (d * grad[..., None]).to(logits.dtype), None, None


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in fp32, by way of the cheaper sigmoid."""
    return 2 * cap * torch.sigmoid(logits.float() * (2 / cap)) - cap


def choose_attention(cfg: Config, dist: Dist) -> tuple[str, torch_attention.SDPBackend]:
    """Name and PyTorch backend of the fastest attention that works here for this model.

    FLASH_ATTN=3 or 4 plugs an installed FlashAttention into PyTorch's flash backend; auto does so
    if one is there.  Otherwise PyTorch's own: cuDNN, flash, memory-efficient or math.
    """
    if cfg.flash_attn in ("3", "4"):
        return activate_flash(cfg.flash_attn, must=True)
    kinds = torch_attention.SDPBackend
    if cfg.flash_attn == "auto" and dist.on_cuda:
        for version in ("3", "4"):
            if found := activate_flash(version, must=False):
                return found
    ours = [("math", kinds.MATH)]
    if dist.on_cuda:
        ours = [("cudnn", kinds.CUDNN_ATTENTION), ("flash", kinds.FLASH_ATTENTION),
                ("efficient", kinds.EFFICIENT_ATTENTION), *ours]
    if cfg.flash_attn == "2":
        ours = [("flash", kinds.FLASH_ATTENTION)]
    for name, backend in ours:
        if attention_works(cfg, dist, backend):
            return name, backend
    raise ConfigError(f"FLASH_ATTN={cfg.flash_attn}: no such attention runs here; set it to off")


def activate_flash(version: str, must: bool):
    """Plug FlashAttention `version` into PyTorch: (name, backend), or None if it is not there."""
    try:
        torch_attention.activate_flash_attention_impl(f"FA{version}")
    except Exception as e:              # whatever a foreign package raises while it is imported
        if must:
            raise ConfigError(f"FLASH_ATTN={version}: cannot be activated ({e}); install it, or "
                              "set FLASH_ATTN=off") from None
        return None
    return f"flash{version}", torch_attention.SDPBackend.FLASH_ATTENTION


def attention_works(cfg: Config, dist: Dist, backend) -> bool:
    """Whether `backend` runs a small forward and backward pass of this model's heads."""
    q, k, v = (
        torch.zeros(1, heads, 128, cfg.head_dim, device=dist.device, dtype=dist.dtype,
                    requires_grad=True)
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads))
    try:
        with torch_attention.sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y.sum().backward()
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------
# Kernels: three functions of the model, each in as few passes over memory as it can do with
# ------------------------------------------------------------------------------------------------
# In Triton; what the compiler makes of these takes 5 % of a step more (bench/RESULTS.md).  Each has
# a twin above, which runs where the kernels cannot and which tests compare it to.  Around attention
# a program works on ROWS positions of one head: b = ROWS in shapes.  A kernel sees nothing but its
# arguments, all addresses and sizes, hence their number.  The MLP's product is built like the
# persistent one in Triton's documentation, with the activation where a tile is finished.

class FusedHeads(torch.autograd.Function):
    """`split_heads` by kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """(B, T, H + 2 K, D) -> (B, T, H, D), (B, T, K, D), (B, T, K, D)."""
        x = x.contiguous()
        B, T, heads, D = x.shape
        H = len(gain)
        K = (heads - H) // 2
        q, k, v = (x.new_empty(B, T, n, D) for n in (H, K, K))
        heads_forward[programs(x)](
            x,
            q, k, v,
            gain, cos, sin,
            B * T, T,
            H, K, D, cos.size(-1),
            ROWS)
        ctx.save_for_backward(x, gain, cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        """Gradients of x and gain."""
        x, gain, cos, sin = ctx.saved_tensors
        B, T, heads, D = x.shape
        H = len(gain)
        dx = torch.empty_like(x)
        sums = gain.new_empty(-(-B * T // ROWS), H)                                 # (blocks, H)
        heads_backward[programs(x)](
            dq.contiguous(), dk.contiguous(), dv.contiguous(),
            x,
            dx, sums,
            gain, cos, sin,
            B * T, T,
            H, (heads - H) // 2, D, cos.size(-1),
            ROWS)
        return dx, sums.sum(0), None, None


class FusedExclusion(torch.autograd.Function):
    """`exclude_self` by kernels."""

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, K, D) -> (B, T, H, D)."""
        y, v = y.contiguous(), v.contiguous()
        B, T, K, D = v.shape
        out = torch.empty_like(y)
        exclusion_forward[programs(v)](
            y, v, out,
            B * T,
            K, y.size(2) // K, D,
            ROWS)
        ctx.save_for_backward(y, v)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of y and v."""
        y, v = ctx.saved_tensors
        B, T, K, D = v.shape
        dy, dv = torch.empty_like(y), torch.empty_like(v)
        exclusion_backward[programs(v)](
            grad.contiguous(), y, v,
            dy, dv,
            B * T,
            K, y.size(2) // K, D,
            ROWS)
        return dy, dv


class FusedMLP(torch.autograd.Function):
    """`squared_mlp` with the activation in the kernels of the products around it."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C), (O, C), (C, O) -> (B, T, O), (B, T, C)."""
        h = x.new_empty(*x.shape[:2], len(up))
        a = torch.empty_like(h)             # leaky_relu, whose square is h
        squared_product(x, up, a, h, backward=False)
        ctx.save_for_backward(x, up, down, a, h)
        ctx.mark_non_differentiable(h)      # shown to whoever observes, used by nobody
        return h, F.linear(h, down)

    @staticmethod
    def backward(ctx, _, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, up and down."""
        x, up, down, a, h = ctx.saved_tensors
        grad, dp = grad.contiguous(), torch.empty_like(h)   # dp: gradient before the activation
        squared_product(grad, down.T.contiguous(), a, dp, backward=True)
        rows = lambda t: t.flatten(0, 1)
        return dp @ up, rows(dp).T @ rows(x), rows(grad).T @ rows(h)


ROWS = 16                   # positions of a program around attention
TILE = 128, 256, 64         # rows, columns and depth of a tile of the MLP's products


def kernels_work(cfg: Config, dist: Dist) -> bool:
    """Whether all kernels can run here for this model, and are asked for."""
    if triton is None or not dist.on_cuda or not cfg.kernels_enabled:
        return False
    widths = cfg.head_dim, cfg.rope_dims // 2
    room = torch.cuda.get_device_properties(dist.device).shared_memory_per_block_optin
    return (all(n and n & n - 1 == 0 for n in widths) and room >= 227 << 10
            and int(cfg.mlp_mult * cfg.model_dim) % TILE[1] == 0 and cfg.model_dim % TILE[2] == 0)


def programs(x: Tensor) -> tuple[int]:
    """How many programs work on x (B, T, heads, D)."""
    return (-(-x.size(0) * x.size(1) // ROWS) * x.size(2),)


def squared_product(x: Tensor, w: Tensor, a: Tensor, out: Tensor, backward: bool):
    """out (B, T, O) from p = x w^T, with x (B, T, I), w (O, I) and a (B, T, O) the leaky ReLU.

    Forward writes a = leaky_relu(p) and out = a^2; backward reads a, and out is p times the slope
    of the square there.
    """
    M, N, K = TILE
    x, a, out = (t.flatten(0, 1) for t in (x, a, out))
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    tiles = (x, [M, K]), (w, [N, K]), (a, [M, N // 2]), (out, [M, N // 2])
    product_kernel[(count,)](
        *(TensorDescriptor.from_tensor(*tile) for tile in tiles),
        len(x), *w.shape,
        backward,
        *TILE,
        count,
        num_warps=8,
        num_stages=3 if backward else 4)    # depths on the chip at once: all that it holds


jit = triton.jit if triton else lambda kernel: kernel


@jit
def heads_forward(
        x_ptr,
        q_ptr, k_ptr, v_ptr,
        gain_ptr, cos_ptr, sin_ptr,
        rows, T,
        H: tl.constexpr, K: tl.constexpr,
        D: tl.constexpr, R: tl.constexpr,
        ROWS: tl.constexpr):
    """Split x (rows, H + 2 K, D) into q (rows, H, D), k and v (rows, K, D)."""
    head = tl.program_id(0) % (H + 2 * K)
    row = tl.program_id(0) // (H + 2 * K) * ROWS + tl.arange(0, ROWS)[:, None]          # (b, 1)
    pair = tl.arange(0, D // 2)[None]                                                   # (1, D / 2)
    inside = row < rows
    d = first_of(pair, R)
    a, b = load_pairs(x_ptr + (row * (H + 2 * K) + head) * D + d, R, inside)
    out = find_head(q_ptr, k_ptr, v_ptr, head, row, H, K, D) + d
    if head < H + K:
        cos, sin = load_angles(cos_ptr, sin_ptr, row % T, pair, R, inside)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + 1e-6)                  # (b, 1)
        scale *= tl.load(gain_ptr + head, head < H, 1.0)
        left = scale * (a * cos + b * sin)
        b = scale * (b * cos - a * sin)
        a = left
    store_pairs(out, R, inside, a, b)


@jit
def heads_backward(
        dq_ptr, dk_ptr, dv_ptr,
        x_ptr,
        dx_ptr, sums_ptr,
        gain_ptr, cos_ptr, sin_ptr,
        rows, T,
        H: tl.constexpr, K: tl.constexpr,
        D: tl.constexpr, R: tl.constexpr,
        ROWS: tl.constexpr):
    """Gradient of x from those of q, k and v; of each gain, one sum a block (blocks, H)."""
    head = tl.program_id(0) % (H + 2 * K)
    block = tl.program_id(0) // (H + 2 * K)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]                                    # (b, 1)
    pair = tl.arange(0, D // 2)[None]                                                   # (1, D / 2)
    inside = row < rows
    d = first_of(pair, R)
    at = (row * (H + 2 * K) + head) * D + d
    da, db = load_pairs(find_head(dq_ptr, dk_ptr, dv_ptr, head, row, H, K, D) + d, R, inside)
    if head < H + K:
        # Turned back, the gradient loses its part along the normed x: a norm does not see length.
        a, b = load_pairs(x_ptr + at, R, inside)
        cos, sin = load_angles(cos_ptr, sin_ptr, row % T, pair, R, inside)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / D + 1e-6)                  # (b, 1)
        a *= scale
        b *= scale
        left = da * cos - db * sin
        db = da * sin + db * cos
        along = tl.sum(left * a + db * b, 1)[:, None]       # also what a larger gain would change
        if head < H:
            tl.store(sums_ptr + block * H + head, tl.sum(along))
        scale *= tl.load(gain_ptr + head, head < H, 1.0)
        da = scale * (left - a * along / D)
        db = scale * (db - b * along / D)
    store_pairs(dx_ptr + at, R, inside, da, db)


@jit
def first_of(pair, R: tl.constexpr):
    """Channels that a rotation pairs with those R further on.

    The first R pairs are turned, the others are there so that all channels are in one: loads of
    whole rows cost less than loads of some channels (bench/RESULTS.md).
    """
    return pair // R * (2 * R) + pair % R


@jit
def find_head(
        q_ptr, k_ptr, v_ptr,
        head, row,
        H: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
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
def store_pairs(at, R: tl.constexpr, inside, a, b):
    """Inverse of `load_pairs`."""
    tl.store(at, a, inside)
    tl.store(at + R, b, inside)


@jit
def load_angles(cos_ptr, sin_ptr, position, pair, R: tl.constexpr, inside):
    """Cosine and sine of the angle that a pair is turned by: 0 beyond the first R."""
    turned = inside & (pair < R)
    cos = tl.load(cos_ptr + position * R + pair, turned, 1.0)
    sin = tl.load(sin_ptr + position * R + pair, turned, 0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@jit
def exclusion_forward(
        y_ptr, v_ptr, out_ptr,
        rows,
        K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
        ROWS: tl.constexpr):
    """y (rows, K, G, D) less its component along v (rows, K, D)."""
    row = tl.program_id(0) // K * ROWS + tl.arange(0, ROWS)[:, None]                    # (b, 1)
    head = tl.program_id(0) % K
    d = tl.arange(0, D)[None]                                                           # (1, D)
    inside = row < rows
    v = tl.load(v_ptr + (row * K + head) * D + d, inside, 0.0).to(tl.float32)           # (b, D)
    length = tl.maximum(tl.sum(v * v, 1)[:, None], 1e-24)                               # (b, 1)
    for g in range(G):
        at = ((row * K + head) * G + g) * D + d
        y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
        y -= tl.sum(y * v, 1)[:, None] / length * v
        tl.store(out_ptr + at, y, inside)


@jit
def exclusion_backward(
        grad_ptr, y_ptr, v_ptr,
        dy_ptr, dv_ptr,
        rows,
        K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
        ROWS: tl.constexpr):
    """Gradients of y (rows, K, G, D) and v (rows, K, D)."""
    row = tl.program_id(0) // K * ROWS + tl.arange(0, ROWS)[:, None]                    # (b, 1)
    head = tl.program_id(0) % K
    d = tl.arange(0, D)[None]                                                           # (1, D)
    inside = row < rows
    v_at = (row * K + head) * D + d
    v = tl.load(v_ptr + v_at, inside, 0.0).to(tl.float32)                               # (b, D)
    length = tl.maximum(tl.sum(v * v, 1)[:, None], 1e-24)                               # (b, 1)
    # With out = y - share v and share = y.v / v.v, the loss sees v through both factors.
    dv = tl.zeros_like(v)
    for g in range(G):
        at = ((row * K + head) * G + g) * D + d
        y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32)
        share = tl.sum(y * v, 1)[:, None] / length                                      # (b, 1)
        along = tl.sum(grad * v, 1)[:, None] / length
        tl.store(dy_ptr + at, grad - along * v, inside)
        dv -= share * grad + along * (y - 2 * share * v)
    tl.store(dv_ptr + v_at, dv, inside)


@jit
def product_kernel(
        x, w, a, out,
        rows, O, I,
        BACKWARD: tl.constexpr,
        M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
        PROGRAMS: tl.constexpr):
    """Tiles (M, N) of `squared_product`, all arguments before `rows` descriptors of matrices."""
    # One program for each multiprocessor takes tile after tile, so that the loads for the next one
    # are under way while this one is finished; in two halves, as memory on the chip is short.
    across = O // N
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, M) * across, PROGRAMS, flatten=True):
        row = tile // across * M
        column = tile % across * N
        p = tl.zeros((M, N), tl.float32)
        for i in range(0, I, K):
            p = tl.dot(x.load([row, i]), w.load([column, i]).T, p)
        left, right = p.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        activate(left, a, out, row, column, BACKWARD)
        activate(right, a, out, row, column + N // 2, BACKWARD)


@jit
def activate(p, a_desc, out, row, column, BACKWARD: tl.constexpr):
    """Finish the part p of a tile that begins at (row, column)."""
    if BACKWARD:
        # The slope of a^2 is 2 a where a is positive and, as a is p / 2 there, a where it is not.
        a = a_desc.load([row, column]).to(tl.float32)
        out.store([row, column], (p * (a + tl.maximum(a, 0.0))).to(out.dtype))
    else:
        a = tl.maximum(p, 0.5 * p)
        a_desc.store([row, column], a.to(out.dtype))
        out.store([row, column], (a * a).to(out.dtype))


# ------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices, AdamW for the rest, all on one flat vector
# ------------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024) with unit rows before orthogonalisation (parameter-golf #1285).

VECTORS = ("q_gain", "attn_scale", "mlp_scale", "resid_mix", "skip_weights", "skip_gates",
           "smear_gate", "pair_proj", "pair_scale", "value_proj", "value_scale", "value_gain")


# The flat layout is what makes the optimiser short and fast: clipping, averaging, weight decay
# and the sum over ranks are one operation on one tensor each, and Newton-Schulz runs on a whole
# stack of equal matrices at once.  Modules and compiled graphs see ordinary parameters: views.

class Flat:
    """All parameters of a model as one fp32 vector, all gradients as another, without copies.

    Matrices of one shape are neighbours, so that a whole stack (N, O, I) is a view; then come the
    embedding and the vectors.  `report` is a tail of the gradients for numbers that ranks sum.
    """
    REPORT = 3          # loss, seconds on rank 0's clock, ranks that were asked to stop

    def __init__(self, model: GPT, device: torch.device):
        """Move the parameters of `model` into the vector; each lands in exactly one group."""
        named = dict(model.named_parameters())
        self.groups = dict(
            matrices=sorted((n for n in named if n.endswith(".weight")),
                            key=lambda n: (named[n].shape, n)),
            embedding=[n for n in named if n.endswith("_emb")],
            vectors=[n for n in named if n.rpartition(".")[2] in VECTORS])
        self.names = [n for group in self.groups.values() for n in group]
        assert sorted(self.names) == sorted(named), "every parameter belongs to exactly one group"
        self.sizes = [named[n].numel() for n in self.names]
        self.data = torch.cat([
            named[n].detach().flatten() for n in self.names]).to(device)                # (P,)
        self.buffer = torch.zeros(len(self.data) + self.REPORT, device=device)
        self.grad, self.report = self.buffer[:-self.REPORT], self.buffer[-self.REPORT:]
        self.shapes = {n: tuple(named[n].shape) for n in self.names}
        self.digest = hex_digest(*self.shapes.items())      # of what lies where
        data, grad = self.named(self.data), self.named(self.grad)
        for name, p in named.items():
            p.data, p.grad = data[name], grad[name]
        model.to(device)                                    # buffers; the parameters are there

    def part(self, vector: Tensor, group: str) -> Tensor:
        """The slice of a flat `vector` that belongs to a group."""
        sizes = [
            sum(math.prod(self.shapes[n]) for n in names)
            for names in self.groups.values()]
        return dict(zip(self.groups, vector.split(sizes)))[group]

    def stacks(self, vector: Tensor) -> list[tuple[list[str], Tensor]]:
        """Views (N, O, I) of the matrices of each shape in a flat `vector`, with their names."""
        found, at = [], 0
        for shape, names in itertools.groupby(self.groups["matrices"], self.shapes.get):
            names = list(names)
            size = len(names) * math.prod(shape)
            found.append((names, vector[at:at + size].view(-1, *shape)))
            at += size
        return found

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a flat `vector` by parameter name."""
        return {
            n: v.view(self.shapes[n])
            for n, v in zip(self.names, vector.split(self.sizes))}


def orthogonalize(G: Tensor, steps: int, row_normalize: bool, dtype: torch.dtype) -> Tensor:
    """Nearest matrices with all singular values about 1, by a quintic Newton-Schulz iteration.

    Args: G (N, O, I), not modified; `row_normalize` first scales each row to unit length.
    Returns: (N, O, I) in `dtype`, singular values roughly within 0.7 and 1.2.
    """
    # Coefficients of Jordan et al.: small singular values grow as fast as they can, at the price of
    # ending near 1 and not at it.
    a, b, c = 3.4445, -4.7750, 2.0315
    if row_normalize:
        G = G / G.norm(dim=2, keepdim=True).clamp_min(1e-7)
    X = (G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    tall = X.size(1) > X.size(2)
    X = X.mT.contiguous() if tall else X
    for _ in range(steps):
        A = X @ X.mT                                        # (N, min(O, I), min(O, I))
        X = torch.baddbmm(                                  # a X + (b A + c A A) X
            X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Optimizer:
    """One step on a `Flat`: Muon on its matrices, AdamW on its embedding and vectors."""

    def __init__(self, cfg: Config, flat: Flat, dist: Dist):
        """All memory of gradients is zero."""
        self.cfg, self.flat, self.dist = cfg, flat, dist
        self.orthogonalize = compiler(cfg, dist)(orthogonalize)
        self.momentum = torch.zeros_like(flat.part(flat.grad, "matrices"))
        groups = []
        for name, lr, decay in (("embedding", cfg.tied_embed_lr, cfg.embed_wd),
                                ("vectors", cfg.scalar_lr, cfg.adam_wd)):
            p = nn.Parameter(flat.part(flat.data, name))
            p.grad = flat.part(flat.grad, name)
            groups.append(dict(params=[p], lr=lr, peak=lr, weight_decay=decay))
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                      fused=dist.on_cuda)

    def step(self, lr_scale: float, momentum: float):
        """Move the parameters along the gradient in `flat.grad`, which is left changed."""
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * lr_scale
        self.adam.step()
        cfg, grad = self.cfg, self.flat.part(self.flat.grad, "matrices")
        self.momentum.mul_(momentum).add_(grad)
        grad.add_(self.momentum, alpha=momentum)            # Nesterov: look ahead along the memory
        lr = cfg.matrix_lr * lr_scale
        for (_, G), (_, W) in zip(self.flat.stacks(grad), self.flat.stacks(self.flat.data)):
            U = self.orthogonalize_shared(G)
            # A tall U has columns of length 1 and shorter rows; the factor makes the rows 1 long.
            W.mul_(1 - lr * cfg.muon_wd).add_(
                U, alpha=-lr * max(1, W.size(1) / W.size(2)) ** 0.5)

    def orthogonalize_shared(self, G: Tensor) -> Tensor:
        """Orthogonalise a stack (N, O, I), each rank an equal part of it."""
        N, world = G.size(0), self.dist.world
        each = -(-N // world)
        mine = G[self.dist.rank * each:(self.dist.rank + 1) * each]
        if len(mine) < each:                                # equal parts: fill up with zeros
            mine = torch.cat([mine, G.new_zeros(each - len(mine), *G.shape[1:])])
        mine = self.orthogonalize(mine, self.cfg.muon_backend_steps, self.cfg.muon_row_normalize,
                             self.dist.dtype)
        return self.dist.join(mine)[:N]

    def memory(self) -> dict[str, Tensor]:
        """Everything the optimiser remembers, by name; steps are counted by the caller."""
        states = [self.adam.state[g["params"][0]] for g in self.adam.param_groups]
        return dict(momentum=self.momentum, **{f"{key}.{i}": s[key] for i, s in enumerate(states)
                                               for key in ("exp_avg", "exp_avg_sq", "step")})

    def remember(self, memory: dict[str, Tensor]):
        """Take over what `memory` of an earlier run returned."""
        self.momentum.copy_(memory["momentum"])
        for i, group in enumerate(self.adam.param_groups):
            p = group["params"][0]
            device = {"exp_avg": p.device, "exp_avg_sq": p.device,
                      "step": p.device if self.dist.on_cuda else "cpu"}
            self.adam.state[p] = {
                k: memory[f"{k}.{i}"].to(d, copy=True)
                for k, d in device.items()}


def clip_(grad: Tensor, limit: float):
    """Shorten a flat gradient to L2 length `limit`, without asking the device for its length."""
    if limit:
        grad.mul_((limit / (grad.norm() + 1e-6)).clamp(max=1))


class Schedule:
    """What depends on how far training is, by `frac` of the clock (or of all steps) or `step`."""

    def __init__(self, cfg: Config, expected_steps: int):
        """`expected_steps` is how many steps the budget is expected to hold."""
        self.cfg, self.expected_steps = cfg, expected_steps

    def lr_scale(self, frac: float) -> float:
        """1, then a straight line to min_lr over the last warmdown_frac of training."""
        left = (1 - frac) / self.cfg.warmdown_frac if self.cfg.warmdown_frac else 1.0
        return max(min(1.0, left), self.cfg.min_lr)

    def looped(self, frac: float) -> bool:
        """Whether recurrence is on."""
        return bool(self.cfg.num_loops) and frac >= self.cfg.enable_looping_at

    def momentum(self, step: int) -> float:
        """Muon's momentum, rising in a straight line from its warm-up value."""
        cfg, steps = self.cfg, self.cfg.muon_momentum_warmup_frac * self.expected_steps
        p, start = min(step / steps, 1.0) if steps else 1.0, cfg.muon_momentum_warmup_start
        return start + p * (cfg.muon_momentum - start)

    def ema_decay(self) -> float:
        """Decay of the weight average, whose memory is ema_horizon_frac of the expected steps."""
        horizon = self.cfg.ema_horizon_frac * self.expected_steps
        return 1 - 1 / horizon if horizon > 1 else 0.0


# ------------------------------------------------------------------------------------------------
# Quantization: round each matrix to a few bits, pushing every column's error into later columns
# ------------------------------------------------------------------------------------------------
# Frantar et al., GPTQ, ICLR 2023, with act-order, and a scale of k standard deviations a row
# (parameter-golf #1394).  Hessians come from training batches: validation text is off limits here.
# Matrices of one shape are quantized together: the loop over columns is the slow part, and its
# length does not depend on how many matrices take part.

@torch.no_grad()
def collect_hessians(run: "Run", batches, count: int, seconds: float = 0.0) -> dict[str, Tensor]:
    """Sum of x x^T (I, I) over the inputs x of every matrix in `count` global training batches.

    Stops before the batch that would take it past `seconds`, where that is not 0.

    Products of bf16 are summed in fp32.  Matrices with one input share one tensor; a layer that
    runs several times counts every pass; the embedding counts as output head.  Same on all ranks.
    """
    sums, spent, started = {}, 0.0, time.perf_counter()
    for done in range(count):
        if seconds and done and spent * (done + 1) / done > seconds:
            run.log("hessians_cut", batches=done, wanted=count, seconds=spent)
            break
        run.log.progress("calibrating", (done + 1) / count)
        for rows in micro_batches(batches.next(), run.cfg):
            for names, x in run.matrix_inputs(rows[:, :-1]):
                gram = gram_matrix(x.flatten(0, 1))                                 # (I, I)
                sums[names] = sums[names].add_(gram) if names in sums else gram
        run.dist.wait()
        spent = run.dist.max(time.perf_counter() - started)
    for H in sums.values():
        run.dist.sum_(H)
    return {name: H for names, H in sums.items() for name in names}


def gram_matrix(x: Tensor) -> Tensor:
    """x^T x (I, I) float32 of x (n, I) in any float dtype, summed in fp32."""
    wide = {} if x.dtype == torch.float32 else dict(out_dtype=torch.float32)
    return torch.mm(x.mT, x, **wide)


def inverse_factor(H: Tensor, damping: float, name: str, log) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1, for H (N, I, I); raises QuantError.

    One Cholesky of H with its axes reversed and one triangular inverse give U directly.  A stack
    that is not positive definite is damped tenfold, then a hundredfold, and the log says so.
    """
    eye = torch.eye(H.size(1), device=H.device)
    mean = H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]                        # (N, 1, 1)
    for strength in (damping, 10 * damping, 100 * damping):
        # H = R R^T with R upper triangular is the Cholesky factor of H read backwards, and
        # H^-1 = R^-T R^-1, so U = R^-1: no inverse of H is ever formed.
        L, info = torch.linalg.cholesky_ex(
            (H + strength * mean * eye).flip(1, 2))
        if not info.any() and L.isfinite().all():
            return torch.linalg.solve_triangular(
                L, eye.expand_as(L), upper=False).flip(1, 2)
        log("damping", matrix=name, damping=strength, failed=int(info.count_nonzero()))
    raise QuantError(f"{name}: Hessian is not positive definite (pivot {int(info.max())} of "
                     f"{H.size(1)}, damping {strength:g}); raise GPTQ_DAMPING (now {damping:g})")


def gptq(W: Tensor, U: Tensor, scale: Tensor, qmax: int, block: int) -> Tensor:
    """Codes (N, O, I) of W (N, O, I): each column is rounded, its error folded into those to come.

    Args: U (N, I, I) from `inverse_factor`; scale (N, O) of a code; |code| <= qmax.
    """
    W, Q, I = W.clone(), torch.empty_like(W, dtype=torch.int8), W.size(2)
    for lo in range(0, I, block):
        hi = min(lo + block, I)
        errors = torch.zeros_like(W[..., lo:hi])                                    # (N, O, b)
        for j in range(lo, hi):
            q = (W[..., j] / scale).round().clamp(-qmax, qmax)                      # (N, O)
            e = (W[..., j] - q * scale) / U[:, j, j, None]
            W[..., j:hi] -= e[..., None] * U[:, None, j, j:hi]
            errors[..., j - lo], Q[..., j] = e, q
        W[..., hi:] -= errors @ U[:, lo:hi, hi:]        # later blocks: one product
    return Q


def quantize_stack(W: Tensor, H: Tensor, grid: tuple[int, float], cfg: Config, name: str, log):
    """Quantize a stack of matrices with GPTQ, columns in order of falling diag(H).

    Args: W (N, O, I) float32; H (N, I, I) sums of x x^T, a zero diagonal (dead input) is fine;
        `grid`: bits of a code, and the largest code in standard deviations of its row.
    Returns: Q (N, O, I) int8 in W's column order, scale (N, O) float16 with W ~ Q * scale.
    """
    (bits, clip_sigmas), tiny = grid, torch.finfo(torch.half).tiny
    qmax = 2 ** (bits - 1) - 1
    scale = (clip_sigmas / qmax * W.std(2)).clamp_min(tiny).half()         # (N, O)
    power = H.diagonal(dim1=1, dim2=2)                                              # (N, I)
    dead = power == 0
    W = W.masked_fill(dead[:, None], 0.0)
    H = H + torch.diag_embed(dead.float())
    order = power.argsort(dim=1, descending=True, stable=True)                      # (N, I)
    W = W.gather(2, order[:, None].expand_as(W))
    H = H.gather(1, order[:, :, None].expand_as(H)).gather(
        2, order[:, None].expand_as(H))                                             # (N, I, I)
    U = inverse_factor(H, cfg.gptq_damping, name, log)
    Q = gptq(W, U, scale.float(), qmax, cfg.gptq_block_size)
    return Q.gather(2, order.argsort(1)[:, None].expand_as(Q)), scale


def quantize_model(run: "Run", weights: Tensor, hessians: dict, clip_sigmas: float):
    """Quantize flat `weights`.

    Returns: tensors of the artifact by name (int8 codes, float16 scales, float16 for all vectors),
    and for each matrix a dict of what rounding did: mse over variance, codes at the limit, bytes.
    """
    cfg, flat, named = run.cfg, run.flat, run.flat.named(weights)
    tensors, rows = {n: named[n].half() for n in flat.groups["vectors"]}, []
    # Codes are wide but clipped far out: most of them are small, so that they compress to about
    # 3.3 bits a weight.  A finer clip means better weights and more bytes (#1394).
    stacks = [
        (names, W, (cfg.matrix_bits, clip_sigmas))
        for names, W in flat.stacks(weights)]
    stacks += [
        ([n], named[n][None], (cfg.embed_bits, cfg.embed_clip_sigmas))
        for n in flat.groups["embedding"]]
    for i, (names, W, (bits, clip)) in enumerate(stacks, 1):
        run.log.progress("quantizing", i / len(stacks))
        # A table that is only looked up is input to no product: its codes are the nearest ones.
        eye = torch.eye(W.size(2), device=W.device)
        H = torch.stack([hessians.get(n, eye) for n in names])
        Q, scale = quantize_stack(W, H, (bits, clip), cfg, names[0], run.log)
        for name, w, q, s in zip(names, W, Q, scale):
            tensors[name], tensors[f"{name}.scale"] = q, s
            least = torch.finfo(w.dtype).tiny               # a matrix of zeros has no variance
            mse = ((w - q * s.float()[:, None]).square().mean() / w.var().clamp_min(least)).item()
            at_limit = (q.abs() == 2 ** (bits - 1) - 1).float().mean().item()
            rows.append(dict(name=name, bits=bits, clip_sigmas=clip, mse=mse, clip_frac=at_limit,
                             entropy_bytes=round(entropy_bytes(q))))
    return tensors, rows


def entropy_bytes(codes: Tensor) -> float:
    """Bytes that an ideal coder of single codes would need."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double()
    return -(
        counts * torch.log2(counts / codes.numel()).nan_to_num(neginf=0)
    ).sum().item() / 8


def dequantize(tensors: dict[str, Tensor], flat: Flat):
    """Write the weights that an artifact's tensors stand for into the model behind `flat`."""
    for name, w in flat.named(flat.data).items():
        value = tensors[name].to(w.device).float()
        scale = tensors.get(f"{name}.scale")
        w.copy_(
            value if scale is None
            else value * scale.to(w.device).float()[:, None])


# ------------------------------------------------------------------------------------------------
# Artifact: one deterministic file that holds tensors and nothing that could be executed
# ------------------------------------------------------------------------------------------------
# magic | header length | SHA-256 of the header | header: Brotli JSON | payload.  The payload is the
# tensors' bytes, those of 16-bit ones as low halves and high halves, in segments packed apart.

MAGIC, SEGMENT_BYTES, MAX_HEADER_BYTES = b"GOLF\x00\x01\r\n", 1 << 22, 1 << 20
MOST_INFLATION = 1000       # bytes of tensors for each of the file; a trained model has about 2
DTYPES = {str(d)[6:]: d for d in (torch.int8, torch.uint8, torch.int32, torch.int64,
                                  torch.float16, torch.float32, torch.float64)}


def to_bytes(tensor: Tensor, shuffle: bool) -> bytes:
    """Bytes of a tensor, byte planes one after the other if `shuffle`d."""
    raw = (
        tensor.detach().cpu().contiguous().reshape(-1)
        .view(torch.uint8).numpy())
    width = tensor.element_size()
    return (raw.reshape(-1, width).T if shuffle else raw).tobytes()


def from_bytes(raw, dtype: str, shape: list[int], shuffle: bool) -> Tensor:
    """Inverse of `to_bytes`."""
    kind, planes = DTYPES[dtype], np.frombuffer(raw, np.uint8)
    if not len(planes):
        return torch.empty(shape, dtype=kind)
    if shuffle:
        planes = planes.reshape(kind.itemsize, -1).T
    return torch.from_numpy(planes.flatten()).view(kind).view(shape)


def write_atomic(path: Path, parts):
    """Write the byte strings `parts` to `path`, a file below OUT_DIR, whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file appears under its name by a rename, once all of it is on the disk.  A run that is
        # killed before leaves its part behind, which nothing ever reads.
        mine = re.compile(re.escape(path.name) + r"\.\d+\.part")
        for left in path.parent.iterdir():
            if mine.fullmatch(left.name):                   # by a run that was killed
                left.unlink()
        with part.open("wb") as f:
            for data in parts:
                f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be written ({e.strerror}); see OUT_DIR") from None
    finally:
        with suppress(OSError):             # where it was not renamed, whatever the reason
            part.unlink()


def pack_tensors(kind: str, meta: dict, tensors: dict[str, Tensor], compress: bool) -> list[bytes]:
    """Parts of a container file of `kind`, the same for the same input on every machine."""
    import brotli
    names = sorted(tensors, key=lambda n: (str(tensors[n].dtype), n))
    raw = b"".join(to_bytes(tensors[n], compress) for n in names)
    cuts = [raw[i:i + SEGMENT_BYTES] for i in range(0, len(raw), SEGMENT_BYTES)]
    if compress:
        with ThreadPoolExecutor(os.cpu_count()) as pool:    # segments in parallel
            cuts = list(pool.map(lambda s: brotli.compress(s, quality=11, lgwin=24), cuts))
    listing = [
        [n, str(tensors[n].dtype)[6:], list(tensors[n].shape)]
        for n in names]
    header = dict(
        kind=kind, meta=meta, compress=compress,
        tensors=listing, bytes=len(raw), segments=list(map(len, cuts)),
        sha256=hashlib.sha256(b"".join(cuts)).hexdigest())
    text = brotli.compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    return [
        MAGIC, len(text).to_bytes(4, "little"),
        hashlib.sha256(text).digest(), text, *cuts]


def inflate(data: bytes, limit: int) -> bytes:
    """Brotli-decompress `data` to at most `limit` bytes; raises ValueError if it cannot be."""
    import brotli
    decoder = brotli.Decompressor()
    try:
        out = decoder.process(data, output_buffer_limit=limit + 1)
    except brotli.error as e:
        raise ValueError(str(e)) from None
    if len(out) > limit or not decoder.is_finished():
        raise ValueError("compressed data has the wrong length")
    return out


def read_container(path: Path, kind: str, layout=None) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors) of a container of `kind`; ArtifactError on damage; executes nothing.

    `layout` of the meta data says which tensors the file must hold, {name: (dtype, shape)}, no more
    and no fewer; a file that lists others is refused before any of it is inflated.
    """
    try:
        if path.is_fifo():                                  # which would be waited for, for ever
            raise ArtifactError(f"{path}: cannot be read (not a file); run its stage first")
        return parse_container(path.read_bytes(), kind, layout)
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror}); run its stage first") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ArtifactError(f"{path}: damaged or no {kind} ({e}); make it again") from None


def parse_container(data: bytes, kind: str, layout=None) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors) of the bytes of a container; raises ValueError and its like on damage."""
    data = memoryview(data)
    at = len(MAGIC) + 4 + 32
    end = at + int.from_bytes(data[len(MAGIC):len(MAGIC) + 4], "little")
    if data[:len(MAGIC)] != MAGIC or end > len(data):
        raise ValueError("no container header")
    if hashlib.sha256(data[at:end]).digest() != data[at - 32:at]:
        raise ValueError("header checksum differs")
    header = json.loads(inflate(bytes(data[at:end]), MAX_HEADER_BYTES))
    if header["kind"] != kind:
        raise ValueError(f"it is a {header['kind']}")
    payload = data[end:]
    intact = hashlib.sha256(payload).hexdigest() == header["sha256"]
    if not intact or sum(header["segments"]) != len(payload):
        raise ValueError(f"payload of {len(payload)} bytes does not match its checksum")
    sizes = tensor_sizes(header, layout and layout(header["meta"]))
    left = sum(sizes)
    if left > MOST_INFLATION * len(data):
        raise ValueError(f"{left} bytes of tensors in a file of {len(data)}")
    raw, start = [], 0
    for size in header["segments"]:
        segment, limit = payload[start:start + size], min(left, SEGMENT_BYTES)
        raw.append(inflate(bytes(segment), limit) if header["compress"] else segment)
        left, start = left - len(raw[-1]), start + size
    if left:
        raise ValueError(f"{left} bytes of the payload are missing")
    raw, tensors, at = b"".join(raw), {}, 0
    for (name, dtype, shape), size in zip(header["tensors"], sizes):
        tensors[name] = from_bytes(raw[at:at + size], dtype, shape, header["compress"])
        at += size
    return header["meta"], tensors


def tensor_sizes(header: dict, layout: dict | None) -> list[int]:
    """Bytes of each tensor that a header lists; raises ValueError unless all of it adds up."""
    listed = {name: (dtype, tuple(shape)) for name, dtype, shape in header["tensors"]}
    if layout is not None and listed != layout:
        name = next(n for n in {**layout, **listed} if layout.get(n) != listed.get(n))
        raise ValueError(
            f"{ascii(name)} is {listed.get(name)}, this model's is {layout.get(name)}")
    # Whatever the header says is compared before a byte is inflated: a file of some hundred bytes
    # may stand for gigabytes of zeros.
    numbers = [n for _, shape in listed.values() for n in shape] + header["segments"]
    sound = all(type(n) is int and n >= 0 for n in numbers) and all(type(n) is str for n in listed)
    sizes = [math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in listed.values()]
    if not sound or len(listed) != len(header["tensors"]) or header["bytes"] != sum(sizes) or (
            sum(sizes) > SEGMENT_BYTES * len(header["segments"])):
        raise ValueError("names, shapes and sizes in the header do not add up")
    return sizes


def check_made_for(path: Path, meta: dict, cfg: Config):
    """Raise ArtifactError unless the file at `path` was made for this run's model."""
    theirs, ours = meta.get("model") if isinstance(meta, dict) else None, cfg.group("model")
    if not isinstance(theirs, dict):
        raise ArtifactError(f"{path}: does not say what model it belongs to; make it again")
    other = next((n for n in ours if theirs.get(n) != ours[n]), None)
    if other:
        raise ArtifactError(f"{path}: made with {other.upper()}={theirs.get(other)}, this run has "
                            f"{ours[other]}; use the settings that it was made with")


def artifact_layout(flat: Flat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What an artifact of this model holds: codes and scales, and vectors as they are."""
    layout = {n: ("float16", flat.shapes[n]) for n in flat.groups["vectors"]}
    for name in flat.groups["matrices"] + flat.groups["embedding"]:
        layout[name] = "int8", flat.shapes[name]
        layout[f"{name}.scale"] = "float16", flat.shapes[name][:1]
    return layout


def checkpoint_layout(flat: Flat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a checkpoint holds: flat weights, their average and the optimiser's memory."""
    sizes = dict(weights=len(flat.data), average=len(flat.data),
                 momentum=len(flat.part(flat.data, "matrices")))
    for i, group in enumerate(("embedding", "vectors")):
        sizes |= dict.fromkeys(
            (f"exp_avg.{i}", f"exp_avg_sq.{i}"), len(flat.part(flat.data, group)))
    return {**{name: ("float32", (size,)) for name, size in sizes.items()},
            "step.0": ("float32", ()), "step.1": ("float32", ())}


def read_for_run(run: "Run", kind: str, numbers: dict[str, type]) -> tuple:
    """(meta, tensors) of this run's checkpoint or artifact, sure to hold `numbers` of these types.

    Raises ArtifactError if the file is damaged, was made for another model, or lacks any of them.
    """
    path = run.cfg.run_dir / FILE_NAMES[kind]
    layout = {"artifact": artifact_layout, "checkpoint": checkpoint_layout}[kind](run.flat)

    def expected(meta):
        """The layout of this run's model, if the file says that it was made for it."""
        check_made_for(path, meta, run.cfg)
        return layout
    meta, tensors = read_container(path, kind, expected)
    # A checksum finds damage, not forgery: numbers that a run computes with must be sane as well,
    # or a clock that starts below zero would grant more time.
    wrong = next((n for n, kind in numbers.items()
                  if type(meta.get(n)) is not kind or not 0 <= meta[n] < 1e15), None)   # nor NaN
    if wrong:
        raise ArtifactError(f"{path}: {wrong} is {meta.get(wrong)!r}; make it again")
    return meta, tensors


FILE_NAMES = dict(checkpoint="checkpoint.golf", artifact="model.golf")


# ------------------------------------------------------------------------------------------------
# Evaluation: every target scored exactly once, in nats and in bytes of text
# ------------------------------------------------------------------------------------------------
# Sliding windows as in parameter-golf #1493: context of seq_len tokens, `stride` new targets each.
# Batches have one shape for each tail, so nothing compiles while the clock runs; logits are fp32,
# as rounding them to bf16 before the soft cap costs 0.001 bits per byte (#1923 and its siblings).

class Validation(NamedTuple):
    """The validation stream on the device: n targets follow n inputs."""
    tokens: Tensor          # (n + 1,) int32
    bytes: Tensor           # (n,) int16, bytes of text of each target


class Window(NamedTuple):
    """`seq_len` inputs from `start`, of whose targets the last `tail` are scored."""
    start: int
    tail: int


def plain_windows(n: int, seq_len: int) -> list[Window]:
    """Windows side by side over n targets; each scores all of its own."""
    return [Window(start, seq_len) for start in range(0, n, seq_len)]


def sliding_windows(n: int, seq_len: int, stride: int) -> list[Window]:
    """Windows `stride` apart; the first scores all of its targets, the others the last `stride`."""
    starts = range(stride, n - seq_len + 1, stride)
    return [Window(0, seq_len), *(Window(start, stride) for start in starts)]


class Tally:
    """Sums of nats, targets and bytes in float64, and how often each target was scored."""

    def __init__(self, n: int, device: torch.device):
        """Nothing has been scored of n targets."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.scored, self.count = np.zeros(n, np.int32), 0

    def add(self, nll: Tensor, sizes: Tensor, windows: list[Window], seq_len: int):
        """Count nats and bytes, both (B, tail), of the targets that `windows` score."""
        self.sums[0] += nll.double().sum()
        self.sums[1] += nll.numel()
        self.sums[2] += sizes.double().sum()
        self.count += nll.numel()
        for start, tail in windows:
            self.scored[start + seq_len - tail:start + seq_len] += 1

    def total(self, dist: Dist) -> tuple[float, float, int, int]:
        """(nats per token, bits per byte, targets, bytes of text) over all ranks so far."""
        nats, targets, size = dist.sum_(self.sums.clone()).tolist()
        return nats / targets, nats / math.log(2) / size, int(targets), int(size)

    def ledger(self, dist: Dist) -> tuple[int, int]:
        """Least and most times any target was scored, over all ranks."""
        scored = dist.sum_(torch.from_numpy(self.scored).to(self.sums.device))
        return int(scored.min()), int(scored.max())


class Scorer:
    """Grades windows; the one place where nats and bytes are counted."""

    def __init__(self, run: "Run", data: Validation):
        """Score with the weights that `run.model` has when `score` is called."""
        self.run, self.data = run, data
        self.steps = torch.arange(run.cfg.seq_len, device=run.dist.device)          # (T,)

    def plain(self) -> Tally:
        """Grade the whole stream in windows side by side."""
        tally = Tally(len(self.data.bytes), self.run.dist.device)
        self.score(plain_windows(len(self.data.bytes), self.run.cfg.seq_len), tally)
        return tally

    @torch.no_grad()
    def score(self, windows: list[Window], tally: Tally):
        """Grade this rank's share of `windows`, in batches of one shape for each tail."""
        mine, size = self.run.dist.share(windows), self.run.cfg.eval_batch_seqs
        for tail in sorted({w.tail for w in mine}):
            same = [w for w in mine if w.tail == tail]
            starts = [w.start for w in same] + [0] * (-len(same) % size)        # pad the last
            starts = torch.tensor(starts).to(self.run.dist.device).view(-1, size)
            for i, part in enumerate(starts):
                self.score_batch(part, same[i * size:(i + 1) * size], tally)
                share = min(1.0, self.run.dist.world * tally.count / len(tally.scored))
                self.run.log.progress("scoring", share)

    def score_batch(self, starts: Tensor, windows: list[Window], tally: Tally):
        """Grade `windows`, which begin at the first of `starts` (B,); the rest of B is padding."""
        B, tail = len(windows), windows[0].tail
        at = starts[:, None] + self.steps                                           # (B, T)
        tokens, targets = self.data.tokens[at], self.data.tokens[at[:, -tail:] + 1]
        nll = self.run.window_nll(tokens.long(), targets.long())
        tally.add(
            nll[:B], self.data.bytes[at[:B, -tail:]],       # padding rows are left out here
            windows, self.run.cfg.seq_len)

    def report(self, name: str, tally: Tally, seconds: float) -> tuple[float, float]:
        """Log score and ledger of a finished pass, and return (nats per token, bits per byte)."""
        run = self.run
        loss, bpb, targets, size = tally.total(run.dist)
        least, most = tally.ledger(run.dist)
        run.log("eval", name=name, val_loss=loss, val_bpb=bpb, targets=targets, bytes=size,
                seconds=seconds, clock_s=run.clock.eval_seconds)
        run.log("ledger", name=name, targets=targets, scored_min=least, scored_max=most)
        assert least == most == 1 and targets == len(tally.scored), "each target is scored once"
        if not math.isfinite(loss):
            raise DataError(f"{name}: the loss is {loss}; the weights are broken, train again")
        return loss, bpb


# ------------------------------------------------------------------------------------------------
# Test-time training: grade a chunk, then learn from it; nothing is graded twice
# ------------------------------------------------------------------------------------------------
# Score-first adaptation of parameter-golf #549/#1413/#1493: plain SGD on all weights.  Legality
# shows in the shape of the loop: a chunk is graded, then logged as scored, then learnt from.

def chunks_of(windows: list[Window], seq_len: int, chunk_tokens: int) -> list[list[Window]]:
    """Windows grouped by the chunk of targets that their first graded target lies in."""
    key = lambda w: (w.start + seq_len - w.tail) // chunk_tokens
    return [list(group) for _, group in itertools.groupby(windows, key)]


def eval_chunks(run: "Run", scorer: Scorer, learn: bool) -> Tally:
    """Grade the stream chunk by chunk; if asked to, learn from a chunk once it has been graded.

    Every target is graded exactly once, by weights that have seen no token at or after it.
    Returns the tally; the model is left adapted.
    """
    cfg, n, velocity = run.cfg, len(scorer.data.bytes), torch.zeros_like(run.flat.data)
    tally = Tally(n, run.dist.device)
    windows = sliding_windows(n, cfg.seq_len, cfg.eval_stride)
    chunks = chunks_of(windows, cfg.seq_len, cfg.ttt_chunk_tokens)
    last = len(chunks) - 1
    for i, windows in enumerate(chunks):
        scorer.score(windows, tally)                    # grade: the weights know chunks < i only
        if not learn:
            continue
        span = dict(chunk=f"{i + 1}/{len(chunks)}", first=i * cfg.ttt_chunk_tokens,
                    last=min((i + 1) * cfg.ttt_chunk_tokens, n))
        run.log("score", **span, bpb=tally.total(run.dist)[1])
        if i < last:                                        # nothing is graded after the last chunk
            lr = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * i / last))
            run.log("update", **span, lr=lr)
            for _ in range(cfg.ttt_epochs):                 # learn: all of chunk i has been graded
                adapt(run, scorer.data.tokens[span["first"]:span["last"] + 1], velocity, lr)
    return tally


def adapt(run: "Run", tokens: Tensor, velocity: Tensor, lr: float):
    """One SGD step on graded `tokens` (chunk + 1,); `velocity` (P,) is the momentum, updated."""
    cfg, dist, flat = run.cfg, run.dist, run.flat
    rows = tokens.unfold(0, cfg.seq_len + 1, cfg.seq_len)                           # (B, T + 1)
    share = -(-len(rows) // dist.world)                     # one shape on all ranks, also the empty
    mine = rows[dist.rank * share:(dist.rank + 1) * share].long()
    weight = torch.zeros(share, device=mine.device)
    weight[:len(mine)] = 1 / len(rows)
    mine = torch.cat([
        mine, rows[:1].expand(share - len(mine), -1).long()])                       # weight 0
    flat.buffer.zero_()
    (run.loss_rows(mine, True) * weight).sum().backward()
    dist.sum_(flat.buffer)
    clip_(flat.grad, cfg.ttt_grad_clip)
    velocity.mul_(cfg.ttt_momentum).add_(flat.grad)
    flat.data.add_(velocity, alpha=-lr)


# ------------------------------------------------------------------------------------------------
# Training: a loop on the wall clock, after an untimed warm-up that compiles and measures
# ------------------------------------------------------------------------------------------------

# The clock starts after every graph has been compiled and every weight put back: a warm-up sees
# random tokens only.  The host never waits for the device inside the loop: what ranks must agree
# on (loss, rank 0's clock, wishes to stop) travels in the gradient's sum and is read a step late.

class Run(NamedTuple):
    """What every stage needs: settings, ranks, log, clock, the model and its flat parameters."""
    cfg: Config
    dist: Dist
    log: Log
    clock: Clock
    model: GPT
    flat: Flat
    forward: Callable       # model.features, compiled where that pays
    token_nll: Callable     # model.token_nll, likewise
    matrix_inputs: Callable     # model.matrix_inputs, likewise

    def loss_rows(self, rows: Tensor, looped: bool) -> Tensor:
        """Mean nats per token of each sequence of rows (B, T + 1): inputs and shifted targets."""
        return self.token_nll(                                                              # (B,)
            self.forward(rows[:, :-1], looped), rows[:, 1:]).mean(1)

    def window_nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Nats (B, tail) of `targets`, which follow the last of tokens (B, T); logits are fp32."""
        features = self.forward(tokens, True)[:, -targets.size(1):]     # (B, tail, C)
        return self.token_nll(features.float(), targets)


def compiler(cfg: Config, dist: Dist) -> Callable:
    """What to compile a function with here: torch.compile, or nothing, which returns it as it is.

    Compiled functions are made for the shapes that they meet, and anew for others.
    """
    if not cfg.compile_enabled or not dist.on_cuda:
        return lambda function: function
    # Row and column sums fused in one kernel cost 7 to 12 ms a step here (bench/RESULTS.md).
    fused = "triton.mix_order_reduction"
    options = {fused: False} if fused in torch._inductor.list_options() else {}
    return partial(torch.compile, dynamic=False, fullgraph=True, options=options)


def start_run(cfg: Config, dist: Dist, log: Log) -> Run:
    """Build the model with its initial weights on this rank's device."""
    # Equal parts on all ranks keep the mean of ranks equal to the mean of sequences.
    if cfg.batch_seqs % dist.world:
        raise ConfigError(f"WORLD_SIZE={dist.world} does not divide the {cfg.batch_seqs} sequences "
                          f"of TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}; change one of them")
    model = GPT(cfg, dist.dtype)
    flat = Flat(model, dist.device)
    model.fused = kernels_work(cfg, dist)
    work = map(compiler(cfg, dist), (model.features, model.token_nll, model.matrix_inputs))
    log("model", params=len(flat.data), kernels=model.fused)
    for name, names in flat.groups.items():
        log("group", name=name, optimizer="muon" if name == "matrices" else "adamw",
            tensors=len(names), params=len(flat.part(flat.data, name)))
    return Run(cfg, dist, log, Clock(cfg), model, flat, *work)


def micro_batches(rows: Tensor, cfg: Config) -> tuple[Tensor, ...]:
    """Equal parts of rows (B, T + 1), each of at most micro_batch_seqs sequences."""
    B = len(rows)
    return rows.split(max(
        d for d in range(1, min(B, cfg.micro_batch_seqs) + 1)
        if B % d == 0))


def train_step(run: Run, rows: Tensor, looped: bool, signs: tuple[float, float]):
    """Leave the clipped mean gradient of a global batch in flat.grad, and its loss in flat.report.

    Args: rows (B, T + 1) this rank's part; `signs` this rank's numbers for the rest of the report.
    """
    flat, parts = run.flat, micro_batches(rows, run.cfg)
    flat.buffer.zero_()
    for i, sign in enumerate(signs, 1):
        flat.report[i].fill_(sign)                          # a kernel argument: no copy, no waiting
    for part in parts:
        loss = run.loss_rows(part, looped).mean() / (len(parts) * run.dist.world)
        loss.backward()
        flat.report[0] += loss.detach()
    run.dist.sum_(flat.buffer)                              # a step's only collective but Muon's
    clip_(flat.grad, run.cfg.grad_clip_norm)


def warm_up(run: Run) -> tuple[dict[bool, float], float]:
    """Compile and time both graphs on random tokens, then undo what that did to the weights.

    Returns: seconds a step by `looped`, and the seconds that calibration will take.
    """
    cfg, dist, flat = run.cfg, run.dist, run.flat
    kept, optimizer, seconds = flat.data.clone(), Optimizer(cfg, flat, dist), {}
    shape = cfg.batch_seqs // dist.world, cfg.seq_len + 1
    rows = torch.randint(cfg.vocab_size, shape, device=dist.device)

    def one_step(looped):
        """A whole step on random tokens."""
        train_step(run, rows, looped, (0.0, 0.0))
        optimizer.step(1.0, cfg.muon_momentum)

    # Weights move in these steps, on tokens without meaning, so that the compiled graphs and the
    # kernels that they chose are those of training; they are put back below.
    for looped in (False, True):
        started = time.perf_counter()
        run.log.progress(f"warming up the {'looped' if looped else 'plain'} step")
        seconds[looped] = usual_seconds(dist, cfg.warmup_steps, lambda: one_step(looped))
        run.log("warm_up", graph="looped" if looped else "plain", step_ms=1000 * seconds[looped],
                seconds=time.perf_counter() - started)
    flat.data.copy_(kept)
    loader = SimpleNamespace(next=lambda: rows)
    batch = usual_seconds(dist, 3, lambda: collect_hessians(run, loader, 1))
    run.log("warm_up", graph="calibration", batch_ms=1000 * batch)
    return seconds, batch * cfg.gptq_calibration_batches


def usual_seconds(dist: Dist, times: int, work) -> float:
    """Median seconds of several calls of `work`, on the slowest rank; it outvotes compilation."""
    seconds = []
    for _ in range(times):
        dist.wait()
        started = time.perf_counter()
        work()
        dist.wait()
        seconds.append(time.perf_counter() - started)
    return dist.max(sorted(seconds)[(times - 1) // 2])


def matmul_rate(dist: Dist) -> float:
    """Floating-point operations a second of this device in large matrix products.

    Queued, as a step's are: waiting for each would measure the waiting, too.
    """
    n, times = (8192, 20) if dist.on_cuda else (512, 3)
    A, B = torch.randn(2, n, n, device=dist.device, dtype=dist.dtype)

    def products():
        """So many, without waiting for any."""
        for _ in range(times):
            A @ B
    # Of two rounds the faster one counts: the first warms up.
    return times * 2 * n ** 3 / usual_seconds(dist, 2, products)


def flops_per_token(cfg: Config, looped: bool) -> float:
    """Floating-point operations to train on a token: 6 a weight used, and those of attention.

    Attention makes 7 products of T / 2 positions with C channels, 2 forward and 5 backward.
    """
    C, hidden = cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim)
    layers = sum(map(len, layer_schedule(cfg, looped)))
    layer = 2 * C * C + 2 * C * cfg.num_kv_heads * cfg.head_dim + 2 * C * hidden
    return 6 * (layers * layer + C * cfg.vocab_size) + layers * 7 * cfg.seq_len * C


def plan_budget(run: Run) -> tuple[float, int]:
    """(seconds of training, 0 without a limit; steps expected in them), from a warm-up."""
    cfg = run.cfg
    seconds, calibration = warm_up(run) if cfg.warmup_steps else ({}, 0.0)
    if not cfg.max_wallclock_seconds:
        return 0.0, cfg.iterations
    # Calibration reads training data, so it belongs to the budget: what it will take was measured
    # on this machine, with a tenth to spare; two steps may be in flight when the clock says stop.
    reserve = 1.1 * calibration + 3 * seconds[True] + 0.5
    budget = cfg.max_wallclock_seconds - reserve
    if budget <= 0:
        raise BudgetError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}: calibration alone "
                          f"takes {reserve:.1f} s; lower GPTQ_CALIBRATION_BATCHES")
    plain = cfg.enable_looping_at if cfg.num_loops else 1.0
    steps = budget * (plain / seconds[False] + (1 - plain) / seconds[True])
    expected = max(1, min(cfg.iterations, int(steps)))
    run.log("budget", train_s=budget, reserve_s=reserve, limit_s=cfg.max_wallclock_seconds,
            expected_steps=expected)
    return budget, expected


class StopRequest:
    """While entered, makes a first Ctrl-C or SIGTERM a wish to end training; a second kills."""
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        """Listen to the signals."""
        self.asked = False
        self.usual = {number: signal.signal(number, self.ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception):
        """Leave the signals as they were."""
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        """Remember the wish and give the signal its usual effect back."""
        self.asked = True
        signal.signal(number, self.usual[number])


class Trained(NamedTuple):
    """What training leaves: flat weights, their average, where its data ended and what it took."""
    weights: Tensor         # (P,) at the last step
    average: Tensor         # (P,) moving average, the one that is quantized
    loader: dict            # state of the batches; calibration goes on from there
    seconds: float          # on the training clock
    steps: int


class Trainer:
    """The state of a training: weights and their average, optimiser, data position and clock."""

    def __init__(self, run: Run, batches: Batches, budget: float, expected_steps: int):
        """At step 0, the average equal to the initial weights."""
        self.run, self.batches, self.budget = run, batches, budget
        self.schedule, self.late = Schedule(run.cfg, expected_steps), Late()
        self.optimizer = Optimizer(run.cfg, run.flat, run.dist)
        self.average = run.flat.data.clone()                                        # (P,)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.ceiling = matmul_rate(run.dist)
        self.looping = self.stopping = False
        self.plain_steps = math.inf                 # steps that ran before recurrence was on
        self.logged = self.saved = (0, 0.0)         # step and second of the last log and save

    def train(self) -> str:
        """Train until the wall clock, the last iteration or a signal ends it; returns which."""
        run = self.run
        run.dist.wait()
        run.clock.start(self.seconds)
        self.logged = self.saved = (self.step, self.seconds)
        with StopRequest() as stop:
            while not (reason := self.ended()):
                frac = self.frac()
                if self.schedule.looped(frac) and not self.looping:
                    self.start_looping(frac)
                self.advance(frac, stop.asked)
                numbers = self.late.swap(run.flat.report)
                if numbers:                                 # of the step before: the device runs on
                    self.take(self.step - 1, numbers)
                self.save_if_due()
        if numbers := self.late.flush():
            self.take(self.step, numbers, last=True)
        run.dist.wait()
        self.seconds = run.dist.max(run.clock.elapsed())
        return reason

    def ended(self) -> str:
        """Why training must end now, or an empty string; the same on every rank."""
        if self.stopping:
            return "signal"
        if self.step >= self.run.cfg.iterations:
            return "iterations"
        return "wallclock" if self.budget and self.seconds >= self.budget else ""

    def frac(self) -> float:
        """How far training is, from 0 to 1."""
        steps = self.step / self.run.cfg.iterations
        return max(steps, self.seconds / self.budget) if self.budget else steps

    def start_looping(self, frac: float):
        """Turn recurrence on for the rest of training."""
        self.looping, self.plain_steps = True, self.step
        encoder, decoder = layer_schedule(self.run.cfg, True)
        self.run.log("loop_on", n=self.step + 1, frac=frac, elapsed_s=self.seconds,
                     encoder=encoder, decoder=decoder)

    def advance(self, frac: float, stop: bool):
        """One optimiser step and its effect on the average; flat.report holds its numbers."""
        run, schedule = self.run, self.schedule
        clock = run.clock.elapsed() if run.dist.is_main else 0.0
        train_step(run, self.batches.next(), self.looping, (clock, float(stop)))
        self.optimizer.step(schedule.lr_scale(frac), schedule.momentum(self.step))
        self.average.lerp_(run.flat.data, 1 - schedule.ema_decay())
        self.step += 1

    def take(self, n: int, numbers: list[float], last: bool = False):
        """Take note of step n's loss, seconds and wishes to stop, and log it if it is its turn."""
        self.loss, self.seconds, self.stopping = numbers[0], numbers[1], numbers[2] > 0
        if not math.isfinite(self.loss):
            raise DataError(f"step {n}: the training loss is {self.loss}, not a finite number; "
                            "lower MATRIX_LR or TIED_EMBED_LR")
        if last or n == 1 or n % self.run.cfg.train_log_every == 0:
            self.log_step(n)
        self.run.log.progress("training", min(self.frac(), 1.0), lambda: self.outlook(n))

    def pace(self, n: int) -> dict[str, float]:
        """Speed between the last logged step and step n, zeros where there is none between."""
        cfg, (step, second) = self.run.cfg, self.logged
        steps, seconds = (n - step, self.seconds - second) if step else (0, 0.0)
        if steps <= 0 or seconds <= 0:
            return dict(step_ms=0.0, tokens_per_s=0, mfu=0.0)
        # mfu: what the model needs, over what this device does in one large product of matrices.
        rate = steps * cfg.train_batch_tokens / seconds
        looped = (n - max(step, self.plain_steps)) / steps if n > self.plain_steps else 0.0
        needed = flops_per_token(cfg, True) * looped + flops_per_token(cfg, False) * (1 - looped)
        return dict(step_ms=1000 * seconds / steps, tokens_per_s=round(rate),
                    mfu=rate * needed / self.run.dist.world / self.ceiling)

    def outlook(self, n: int) -> str:
        """How long training will go on, and how step n went; short enough for 80 columns."""
        left, speed = self.seconds * max(1 / self.frac() - 1, 0.0), self.pace(n)["tokens_per_s"]
        return f"{left:.0f} s left  step {n}  loss {self.loss:.2f}" + (
            f"  {speed:,} tokens/s" if speed else "")

    def log_step(self, n: int):
        """Log step n, with the pace since the last logged one; check that ranks share one plan."""
        self.run.dist.check_same("the order of training data", self.batches.state["digest"] or "0")
        self.run.log("step", n=f"{n}/{self.run.cfg.iterations}", train_loss=self.loss,
                     lr_scale=self.schedule.lr_scale(self.frac()), **self.pace(n),
                     elapsed_s=self.seconds)
        self.logged = n, self.seconds

    def save_if_due(self):
        """Write a resumable checkpoint every checkpoint_seconds."""
        every = self.run.cfg.checkpoint_seconds
        if every and self.seconds - self.saved[1] >= every:
            self.saved = self.step, self.seconds
            if numbers := self.late.flush():                # logged before what it led to is saved
                self.take(self.step, numbers)
            self.save(self.run.clock.elapsed())

    def save(self, seconds: float):
        """Write the checkpoint from which RESUME=1 goes on as if nothing had happened."""
        run = self.run
        if run.dist.is_main:
            meta = dict(model=run.cfg.group("model"), seed=run.cfg.seed, step=self.step,
                        seconds=seconds, loader=self.batches.state,
                        expected_steps=self.schedule.expected_steps, layout=run.flat.digest)
            tensors = dict(weights=run.flat.data, average=self.average, **self.optimizer.memory())
            path = run.cfg.run_dir / FILE_NAMES["checkpoint"]
            write_atomic(path, pack_tensors("checkpoint", meta, tensors, compress=False))
            run.log("checkpoint", file=path, step=self.step, bytes=path.stat().st_size)

    def load(self, meta: dict, tensors: dict[str, Tensor]):
        """Take over the state that `save` wrote."""
        self.run.flat.data.copy_(tensors["weights"])
        self.average.copy_(tensors["average"])
        self.optimizer.remember(tensors)
        self.step, self.seconds = meta["step"], meta["seconds"]

    def result(self) -> Trained:
        """What later stages need."""
        weights = self.run.flat.data.clone()
        return Trained(weights, self.average, self.batches.state, self.seconds, self.step)


# ------------------------------------------------------------------------------------------------
# Main: the three stages of a run, and the lines that say what it was and what came out
# ------------------------------------------------------------------------------------------------

# Each stage reads only what the one before it left on disk or in memory: training leaves weights
# and their average, quantization the artifact; scoring starts from the artifact's bytes alone.

def read_checkpoint(run: Run) -> tuple[dict, dict[str, Tensor]]:
    """(meta, tensors) of this run's checkpoint, complete and made for this model."""
    numbers = dict(step=int, seconds=float, expected_steps=int)
    meta, tensors = read_for_run(run, "checkpoint", numbers)
    if meta.get("layout") != run.flat.digest:
        raise ArtifactError(f"{run.cfg.run_dir}: the checkpoint has its parameters in another "
                            "order, as some other version of this program had; train again")
    if type(meta.get("loader")) is not dict:
        raise ArtifactError(f"{run.cfg.run_dir}: the checkpoint lacks its place in the data")
    if min(tensors["step.0"], tensors["step.1"]) < 0 or not all(
            t.isfinite().all() for t in tensors.values()):
        raise ArtifactError(f"{run.cfg.run_dir}: the checkpoint holds numbers that no training "
                            "leaves; train again")
    return meta, tensors


def train_stage(run: Run) -> Trained:
    """Train, and leave a checkpoint."""
    cfg = run.cfg
    shards = open_shards(cfg, "train", run.clock, run.log)
    meta, tensors = read_checkpoint(run) if cfg.resume else (None, None)
    budget, expected = plan_budget(run)
    batches = Batches(cfg, shards, run.dist, meta and meta["loader"])
    trainer = Trainer(run, batches, budget, meta["expected_steps"] if meta else expected)
    if meta:
        trainer.load(meta, tensors)
        run.log("resume", step=trainer.step, elapsed_s=trainer.seconds)
    try:
        reason = trainer.train()
    finally:
        batches.close()
    run.log("train_end", steps=trainer.step, reason=reason, elapsed_s=trainer.seconds,
            seen_tokens=trainer.step * cfg.train_batch_tokens, plan=batches.state["digest"],
            peak_mib=torch.cuda.max_memory_allocated() >> 20 if run.dist.on_cuda else 0)
    trainer.save(trainer.seconds)
    return trainer.result()


def load_trained(run: Run) -> Trained:
    """What the training stage of an earlier run left in its checkpoint."""
    meta, tensors = read_checkpoint(run)
    weights, average = (tensors[n].to(run.dist.device) for n in ("weights", "average"))
    return Trained(weights, average, meta["loader"], meta["seconds"], meta["step"])


def quantize_stage(run: Run, trained: Trained):
    """Calibrate on the training batches that come next, quantize, and leave the artifact."""
    cfg, dist = run.cfg, run.dist
    # Calibration goes on where training ended: batches that no step has learnt from.
    shards = open_shards(cfg, "train", run.clock, run.log)
    batches = Batches(cfg, shards, dist, trained.loader)
    run.flat.data.copy_(trained.average)
    # The diagnostic of #1858, its "void fraction": 0.575 for a normal distribution.
    matrices = run.flat.part(trained.average, "matrices").abs()
    run.log("weights", below_mean_frac=(matrices <= matrices.mean()).float().mean().item())
    started, left = time.perf_counter(), cfg.max_wallclock_seconds - trained.seconds
    hessians = collect_hessians(run, batches, cfg.gptq_calibration_batches,
                                max(left, 1e-9) if cfg.max_wallclock_seconds else 0.0)
    seconds = dist.max(time.perf_counter() - started)
    batches.close()
    run.log("hessians", count=len({id(H) for H in hessians.values()}),
            batches=batches.state["batch"] - trained.loader["batch"], seconds=seconds)
    run.clock.close_training_data(trained.seconds, trained.seconds + seconds)
    run.log("data_closed", split="train", elapsed_s=run.clock.data_seconds,
            limit_s=cfg.max_wallclock_seconds)
    run.clock.refuse_overtime()
    if dist.is_main:
        path = cfg.run_dir / FILE_NAMES["artifact"]
        parts = fit_artifact(run, trained, hessians)
        write_atomic(path, parts)
        identical = path.read_bytes() == b"".join(parts)
        run.log("read_back", file=path, identical=identical)
        if not identical:
            raise ArtifactError(f"{path}: it does not read back as written; check the disk")
    dist.wait()


def fit_artifact(run: Run, trained: Trained, hessians: dict[str, Tensor]) -> list[bytes]:
    """Bytes of the artifact; where no clip is set, of the finest one that fits target_bytes.

    A code's entropy is a constant less log2 of the clip, so the excess in bits a weight says how to
    change it; two or three tries suffice.  Raises SizeError if the artifact would not fit.
    """
    cfg, N = run.cfg, len(run.flat.part(trained.average, "matrices"))
    clip, limit = cfg.matrix_clip_sigmas or FIRST_CLIP, cfg.target_bytes
    code = len(own_source().encode())
    for attempt in range(1, MOST_CLIPS + 1):
        started = time.perf_counter()
        tensors, rows = quantize_model(run, trained.average, hessians, clip)
        quantized = time.perf_counter()
        run.log.progress("compressing")
        meta = dict(model=cfg.group("model"), scoring=cfg.group("scoring"), dataset=cfg.dataset,
                    steps=trained.steps, tokenizer=file_hash(cfg.tokenizer_path))
        parts = pack_tensors("artifact", meta, tensors, compress=True)
        size = sum(map(len, parts))
        run.log("compress", attempt=attempt, matrix_clip_sigmas=clip, model_bytes=size,
                total_bytes=size + code, gptq_s=quantized - started,
                seconds=time.perf_counter() - quantized)
        # One more bit a weight costs N / 8 bytes and halves the step, hence the exponent below.
        spare = limit - size - code
        if cfg.matrix_clip_sigmas or 0 <= spare <= CLIP_SLACK or (clip == LEAST_CLIP and spare > 0):
            break
        clip = max(LEAST_CLIP, clip * 2 ** min(8 * (CLIP_SLACK / 4 - spare) / N, 8))
    if spare < 0:
        raise SizeError(f"model {size} + code {code} = {size + code} bytes, more than TARGET_BYTES="
                        f"{limit}; raise MATRIX_CLIP_SIGMAS (0 searches) or shrink the model")
    for row in rows:
        run.log("matrix", **row)
    return parts


FIRST_CLIP, LEAST_CLIP, MOST_CLIPS, CLIP_SLACK = 12.85, 4.0, 6, 20_000   # deviations; tries; bytes


def log_artifact(run: Run) -> dict:
    """Log the artifact on disk and the hash that freezes it; returns its sizes."""
    path, code = run.cfg.run_dir / FILE_NAMES["artifact"], own_source().encode()
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror}); run STAGES=quantize") from None
    total = len(data) + len(code)
    run.log("artifact", file=path, model_bytes=len(data), code_bytes=len(code), total_bytes=total,
            limit_bytes=run.cfg.target_bytes, sha256=hashlib.sha256(data).hexdigest())
    return dict(artifact_bytes=total, model_bytes=len(data), code_bytes=len(code))


def open_validation(run: Run, tokenizer) -> Validation:
    """The validation stream on this rank's device, with the bytes of text of every target."""
    tokens = load_validation(run.cfg, run.clock, run.log)
    sizes = target_bytes(tokens, tokenizer)
    run.log("validation", targets=len(sizes), target_bytes=int(sizes.sum(dtype=np.int64)))
    arrays = tokens.astype(np.int32), sizes
    return Validation(*(torch.from_numpy(a).to(run.dist.device) for a in arrays))


def warm_up_scoring(run: Run):
    """Compile every shape that scoring and test-time training use, on random tokens."""
    cfg, device = run.cfg, run.dist.device
    run.log.progress("warming up what scores")
    started, shape = time.perf_counter(), (cfg.eval_batch_seqs, cfg.seq_len)
    tokens = torch.randint(cfg.vocab_size, shape, device=device)
    with torch.no_grad():
        for tail in {cfg.seq_len, cfg.eval_stride}:
            run.window_nll(tokens, tokens[:, -tail:])
    if cfg.ttt_enabled:
        chunk = torch.randint(cfg.vocab_size, (cfg.ttt_chunk_tokens + 1,), device=device)
        adapt(run, chunk.int(), torch.zeros_like(run.flat.data), 0.0)               # moves nothing
    run.dist.wait()
    run.log("warm_up", graph="scoring", seconds=time.perf_counter() - started)


def eval_stage(run: Run, trained: Trained | None) -> dict:
    """Score the artifact, and the weights behind it if at hand; returns the final block."""
    cfg, clock = run.cfg, run.clock
    meta, tensors = read_for_run(run, "artifact", dict(steps=int))
    tokenizer = load_tokenizer(cfg, meta.get("tokenizer"))
    warm_up_scoring(run)
    if clock.phase == "train":                              # this run has not calibrated
        clock.close_training_data()
    started = time.perf_counter()
    scorer = Scorer(run, open_validation(run, tokenizer))
    clock.eval_seconds += time.perf_counter() - started
    # What the weights score before quantization says what it costs.  These two passes lead to no
    # headline, so they are off the clock; all passes over the artifact are on it.
    if trained:
        for name, weights in dict(raw=trained.weights, ema=trained.average).items():
            run.flat.data.copy_(weights)
            score_pass(scorer, name, scorer.plain, timed=False)
    dequantize(tensors, run.flat)
    passes = dict(quantized=scorer.plain)                   # name: what returns a full tally
    if cfg.sliding_enabled:
        passes["sliding"] = lambda: eval_chunks(run, scorer, learn=False)
    if cfg.ttt_enabled:                                     # last: it leaves other weights behind
        passes["ttt"] = lambda: eval_chunks(run, scorer, learn=True)
    for name, work in passes.items():
        loss, bpb = score_pass(scorer, name, work, timed=True)
    clock.refuse_overtime()
    block = dict(val_bpb=bpb, val_loss=loss, score=name, train_seconds=clock.train_seconds,
                 data_seconds=clock.data_seconds, eval_seconds=clock.eval_seconds,
                 steps=meta["steps"])
    if cfg.baselines_enabled:
        block.update(compressor_baselines(run, scorer, tokenizer))
    return block


def score_pass(scorer: Scorer, name: str, work, timed: bool) -> tuple[float, float]:
    """Do `work`, which returns a full tally, and report it; `timed`: on the scoring clock."""
    dist, clock = scorer.run.dist, scorer.run.clock
    started = time.perf_counter()
    tally = work()
    dist.wait()
    seconds = dist.max(time.perf_counter() - started)
    clock.eval_seconds += seconds if timed else 0.0
    return scorer.report(name, tally, seconds)


def compressor_baselines(run: Run, scorer: Scorer, tokenizer) -> dict:
    """Bits per byte of gzip -9 and xz -9e on the text that was scored."""
    text = tokenizer.decode(scorer.data.tokens.tolist()).encode()
    sizes = {"gzip-9": len(gzip.compress(text, 9)),
             "xz-9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    for name, size in sizes.items():
        run.log("baseline", name=name, bytes=size,
                text_bytes=len(text), bpb=8 * size / len(text))
    return {f"{name}_bpb": 8 * size / len(text) for name, size in sizes.items()}


def log_run(cfg: Config, dist: Dist, log: Log, chosen: list[str]):
    """Log what runs: versions, machine, the exact code, and every setting, overrides with a `*`."""
    source, values = own_source().encode(), asdict(cfg)
    python = "python" if dist.world == 1 else f"torchrun --nproc_per_node={dist.world}"
    command = " ".join([f"{n.upper()}={values[n]}" for n in chosen] + [python, sys.argv[0]])
    cpu = f"CPU, {torch.get_num_threads()} threads"
    log("run", program=Path(__file__).name, python=platform.python_version(),
        torch=torch.__version__, device=torch.cuda.get_device_name() if dist.on_cuda else cpu,
        world=dist.world, code_bytes=len(source),
        code_sha256=hashlib.sha256(source).hexdigest(), command=command,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), stages=cfg.stages)
    if dist.is_main and (Path(__file__).parent / "pack.py").is_file():
        with suppress(ImportError):
            import pack
            with suppress(pack.PackError):                  # its library is optional
                packed = pack.pack_source(source.decode())
                log("packed", code_bytes=len(packed),
                    code_sha256=hashlib.sha256(packed).hexdigest())
    for group in GROUPS.values():
        values = {
            ("*" if n in chosen else "") + n: v
            for n, v in cfg.group(group).items()}
        log("config", group=group, **values)


def summary(run: Run, attention: str) -> list[str]:
    """What this run will do, and what makes it slow here, in plain words."""
    cfg, dist, millions = run.cfg, run.dist, len(run.flat.data) / 1e6
    loops = f", {cfg.loop_start} to {cfg.loop_end} of them run {cfg.num_loops + 1} times after " \
        f"{100 * cfg.enable_looping_at:.0f} % of training" if cfg.num_loops else ""
    limit = f"{cfg.max_wallclock_seconds:g} s" if cfg.max_wallclock_seconds else "no time limit"
    score = f"within {cfg.eval_wallclock_seconds:g} s" if cfg.eval_wallclock_seconds else "untimed"
    device = torch.cuda.get_device_name() if dist.on_cuda else "CPU"
    lines = [
        f"model: {millions:.1f} M parameters in {cfg.num_layers} layers of width {cfg.model_dim}"
        f"{loops}; seed {cfg.seed}",
        f"data: {cfg.dataset_dir}, {cfg.train_batch_tokens} tokens a step",
        f"devices: {dist.world} x {device}, attention by {attention}",
        f"stages: {cfg.stages}; {limit} for training and calibration together, after an untimed "
        f"warm-up; scoring {score}",
        f"result: at most {cfg.target_bytes} bytes of code and model; the model in {cfg.run_dir}; "
        "Ctrl-C once ends training early and goes on from there"]
    return lines + [f"slow here: {reason}" for reason in slow_parts(run, attention)]


def slow_parts(run: Run, attention: str) -> list[str]:
    """What keeps this machine from its best, each with a remedy."""
    cfg, dist, found = run.cfg, run.dist, []
    if not dist.on_cuda:
        if len(run.flat.data) > 5e6:
            found.append("no GPU, for which this model is made; RECIPE=demo suits a CPU")
        return found
    if not cfg.compile_enabled:
        found.append("the compiler is off; set COMPILE_ENABLED=1")
    if not run.model.fused:
        found.append("kernels of our own are off; they take KERNELS_ENABLED=1, Triton, a GPU with "
                     "227 KB of shared memory a block and widths that fit (kernels_work)")
    if attention in ("efficient", "math"):
        found.append(f"attention by the {attention} backend; newer GPUs and PyTorch have cuDNN's")
    return found


def run_stages(cfg: Config, chosen: list[str], dist: Dist):
    """The whole run, from the first log line to the final block."""
    log = Log(cfg, dist)
    log_run(cfg, dist, log, chosen)
    name, backend = choose_attention(cfg, dist)
    log("attention", backend=name)
    with torch_attention.sdpa_kernel(backend):
        run, trained = start_run(cfg, dist, log), None
        for line in summary(run, name):
            log.line(f"# {line}")
        if "train" in cfg.stages:
            trained = train_stage(run)
        if "quantize" in cfg.stages:
            quantize_stage(run, trained or load_trained(run))
        if cfg.stages != "train":
            sizes = log_artifact(run)
        if "eval" in cfg.stages:
            block = eval_stage(run, trained)
            log.line("---")
            for key, value in {**block, **sizes, "seed": cfg.seed}.items():
                log.line(f"{key + ':':<17} {show(key, value)}")


def main() -> int:
    """Run as the command line says; returns the exit code."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print_help()
        return 0
    code = 2
    try:
        if sys.argv[1:]:
            raise ConfigError(f"{sys.argv[1]}: settings are environment variables; see --help")
        cfg, chosen = config_from_env()
        dist = Dist()
        run_stages(cfg, chosen, dist)
        dist.close()
        return 0
    except GolfError as e:
        problem = str(e)
    except OSError as e:                    # a folder that cannot be entered, a name too long
        problem = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except RuntimeError as e:
        if isinstance(e, torch.distributed.DistError) or "peer" in str(e):
            problem = "another rank has died, its own message says why; RESUME=1 continues"
        elif isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            problem = "out of memory; lower MICRO_BATCH_SEQS, EVAL_BATCH_SEQS or the model's size"
        else:
            raise
    except KeyboardInterrupt:
        code, problem = 130, "stopped; STAGES can leave out what is done"
    # A message may quote a file that someone else made: one line of it, and not all of a long one.
    problem = "".join(c if c.isprintable() else " " for c in problem)[:1000]
    erase = "\r\x1b[K" if sys.stderr.isatty() else ""       # what Log.progress has drawn there
    print(f"{erase}train_gpt: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
