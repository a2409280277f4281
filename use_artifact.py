#!/usr/bin/env python3
"""Use a trained artifact: print text that it makes up, or compress text with it and get it back.

    python use_artifact.py sample     runs/demo_seed42/model.golf --prompt "The function"
    python use_artifact.py compress   runs/demo_seed42/model.golf notes.txt
    python use_artifact.py decompress runs/demo_seed42/model.golf notes.txt.golfz
    python use_artifact.py verify     runs/demo_seed42/model.golf notes.txt --max-bytes 20000

`compress` hands the predictions behind the score to an arithmetic coder.  The loop that codes is
train_gpt.eval_chunks itself, test-time training included, with a scorer that also codes each target
it grades.  `decompress` runs the same loop with nothing but the artifact, the tokenizer and the
code, and so can only rebuild the text if the score is what it claims to be:

    causal              the decoder has not seen the token that it predicts, nor any later one
    normalised          a coder takes probabilities that sum to 1 over the whole vocabulary
    scored, then learnt the decoder learns from a chunk only when it has decoded all of it
    in one pass         there is one code, and its length is the sum of the scores

`verify` does both, compares text with text and the code's length with the bits of the evaluation,
and shows what gzip, xz, zstd and brotli make of the same text.

Exit code: 0 fine, 1 `verify` found a difference, 2 bad input, told in one line.

Sections: Reading an artifact, Text and tokens, Predictions, The compressed file, Sampling,
Verification, Command line.
"""
import argparse
import codecs
import gzip
import hashlib
import importlib
import lzma
import math
import os
import platform
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import attention as torch_attention
from tqdm import tqdm

import train_gpt
from train_gpt import ArtifactError, Config, Run


class UseError(train_gpt.GolfError):
    """A file or an argument given to this script is not what it must be."""


# ------------------------------------------------------------------------------------------------
# Reading an artifact: the model, how it is scored, and its tokenizer, from files alone
# ------------------------------------------------------------------------------------------------
# An artifact says what model it holds and how that was scored.  All of it is data from a file that
# anybody may have made: types and sizes are checked before anything is built from them.

# The largest of what takes memory or time; a published model uses a tenth of each at most.
MOST = dict(vocab_size=1 << 16, seq_len=1 << 17, num_layers=256, model_dim=1 << 14, mlp_mult=64.0,
            num_loops=64, bigram_buckets=1 << 24, bigram_dim=1 << 14, value_embed_dim=1 << 14,
            eval_batch_seqs=1 << 12, ttt_epochs=100, ttt_chunk_tokens=1 << 24)
MOST_PARAMETERS = 1 << 30


class Silence:
    """Stands in for train_gpt.Log where nothing is to be printed."""

    def __call__(self, *what, **values):
        """Ignore an event."""

    line = progress = __call__


def open_artifact(path: Path, data_dir: str,
                  tokenizer: Path | None = None) -> tuple[Run, SentencePieceProcessor]:
    """The model of an artifact, ready to run on this machine's device, and its tokenizer.

    Args: `tokenizer` is a SentencePiece model; None: the one of the artifact's dataset in data_dir.
    Raises: ArtifactError or DataError in one line, whatever is wrong with the files.
    """
    opened = []

    # The reader asks what a file must hold before it unpacks any of it.
    def expected(meta) -> dict:
        """Build the model that the file describes, and return which tensors it must then hold."""
        cfg = config_of(path, meta, data_dir)
        opened.append(train_gpt.start_run(cfg, train_gpt.Dist({}), Silence()))
        return train_gpt.artifact_layout(opened[0].flat)
    meta, tensors = train_gpt.read_container(path, "artifact", expected)
    run = opened[0]
    train_gpt.dequantize(tensors, run.flat)
    if not run.flat.data.isfinite().all():
        raise ArtifactError(f"{path}: some weights are no finite numbers; train again")
    where = tokenizer or run.cfg.tokenizer_path
    return run, train_gpt.load_tokenizer(SimpleNamespace(
        tokenizer_path=where, vocab_size=run.cfg.vocab_size, dataset=run.cfg.dataset),
        meta.get("tokenizer"))


def config_of(path: Path, meta, data_dir: str) -> Config:
    """The settings that an artifact's `meta` describes; raises ArtifactError for any that is off.

    Nothing is compiled, nor done by our own kernels: what a compiler picks by timing it may differ
    between two runs, and another version of Triton may add up in another order.
    """
    dataset = meta.get("dataset") if isinstance(meta, dict) else None
    if not isinstance(dataset, str) or not re.fullmatch("[a-z][A-Za-z0-9._-]*", dataset):
        raise ArtifactError(f"{path}: does not say what dataset it was trained on; make it again")
    values, size = {}, path.stat().st_size
    for group in ("model", "scoring"):
        wanted, found = Config().group(group), meta.get(group)
        if not isinstance(found, dict) or set(found) != set(wanted):
            raise ArtifactError(f"{path}: its {group} settings are not those of this program; use "
                                "the version that made it, or make it again")
        for name, default in wanted.items():
            values[name] = checked(path, name, found[name], type(default))
    try:
        cfg = Config(**values, dataset=dataset, data_dir=data_dir, compile_enabled=False,
                     kernels_enabled=False, train_batch_tokens=values["seq_len"])
    except train_gpt.ConfigError as e:
        raise ArtifactError(f"{path}: {e}; make it again") from None
    if num_parameters(cfg) > min(MOST_PARAMETERS, train_gpt.MOST_INFLATION * size):
        raise ArtifactError(f"{path}: {num_parameters(cfg)} parameters in {size} bytes; make it "
                            "again")
    return cfg


def checked(path: Path, name: str, value, kind: type):
    """`value` of setting `name` if it is of `kind`, finite and of sane size; else ArtifactError."""
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)                                # 1 for 1.0, as some programs write
    sane = type(value) is kind and not (kind is float and not math.isfinite(value)) and (
        kind not in (int, float) or abs(value) <= MOST.get(name, 1 << 53))
    if not sane:
        limit = f" of at most {MOST[name]}" if name in MOST else ""
        raise ArtifactError(f"{path}: {name.upper()}={ascii(value)[:40]}: expected "
                            f"{train_gpt.NEEDED[kind]}{limit}; make it again")
    return value


def num_parameters(cfg: Config) -> int:
    """Weights in the matrices and tables of a model that has not been built."""
    values = cfg.num_kv_heads * cfg.head_dim                # channels of all keys, or all values
    layer = cfg.model_dim * (2 * cfg.model_dim + 2 * values)
    layer += cfg.model_dim * 2 * int(cfg.mlp_mult * cfg.model_dim)
    pairs = cfg.bigram_dim * (cfg.bigram_buckets + cfg.model_dim) if cfg.bigram_buckets else 0
    return (cfg.num_layers * layer + cfg.vocab_size * cfg.model_dim + pairs
            + cfg.value_embed_dim * (cfg.vocab_size + values))


# ------------------------------------------------------------------------------------------------
# Text and tokens: any bytes at all to token ids and back
# ------------------------------------------------------------------------------------------------
# SentencePiece normalises before it cuts: it joins spaces, drops line ends, rewrites characters.
# That is right for a model's input and wrong for a compressor's.  A protocol buffer's fields may be
# given again, and the last ones count: six bytes behind the tokenizer's own switch all of that off
# and leave ordinary text its usual pieces.  What still does not come back (invalid UTF-8, the
# marker character itself, line ends) is spelled with the tokenizer's 256 byte pieces.

# Field 3, the normalizer: an empty character map (2), no prefix (3), no joining of spaces (4).
AS_IT_IS = b"\x1a\x06" b"\x12\x00" b"\x18\x00" b"\x20\x00"
SPELLED = re.compile(f"([\n{train_gpt.MARK}\udc80-\udcff]+)")   # what is coded byte by byte


class TextCoder:
    """Turns any bytes into ids of a tokenizer's text pieces, and such ids back into the bytes.

    The bytes behind ids are those of their pieces, one after the other, the marker read as a space.
    So whether a part of a text comes back can be seen at once, and what does not is spelled.
    """

    def __init__(self, tokenizer: SentencePieceProcessor):
        """Raises DataError if the tokenizer cannot spell every byte."""
        self.proto = tokenizer.serialized_model_proto()
        self.pieces = SentencePieceProcessor(model_proto=self.proto + AS_IT_IS)
        ids = range(tokenizer.vocab_size())
        self.bytes = [self.bytes_of(i) for i in ids]
        self.spelling = {self.bytes[i]: i for i in ids if tokenizer.is_byte(i)}
        if len(self.spelling) != 256 or tokenizer.bos_id() < 0:
            raise train_gpt.DataError(
                f"the tokenizer has {len(self.spelling)} byte pieces; 256 are needed, and one for "
                "the start of a document; see prepare_data.py")
        self.bos = tokenizer.bos_id()

    def bytes_of(self, i: int) -> bytes:
        """Bytes of text that id `i` stands for; none for control pieces."""
        piece = self.pieces.id_to_piece(i)
        if self.pieces.is_byte(i):
            return bytes([int(piece[1:-1], 16)])            # such as <0x0A>
        silent = self.pieces.is_control(i) or self.pieces.is_unknown(i) or self.pieces.is_unused(i)
        return b"" if silent else piece.replace(train_gpt.MARK, " ").encode()

    def encode(self, data: bytes) -> list[int]:
        """Ids whose bytes, one after the other, are `data`; each stands for at least one byte."""
        ids = []
        for i, part in enumerate(SPELLED.split(data.decode("utf-8", "surrogateescape"))):
            raw = part.encode("utf-8", "surrogateescape")
            found = self.pieces.encode(part) if i % 2 == 0 else []
            if self.decode(found) != raw:                   # always so for the odd parts
                found = [self.spelling[raw[j:j + 1]] for j in range(len(raw))]
            ids += found
        return ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes that `ids` stand for."""
        return b"".join([self.bytes[i] for i in ids])


# ------------------------------------------------------------------------------------------------
# Predictions: eval_chunks drives a coder, and both directions compute the same bits
# ------------------------------------------------------------------------------------------------
# An encoder knows the whole text, a decoder only what it has decoded; a single bit of difference in
# one probability and everything after it is lost.  So both run every forward pass at one shape, one
# window of seq_len tokens, with FILLER where the decoder knows nothing yet.  Masked attention gives
# later positions weights of exactly zero, and each row of the other operations is computed from its
# own row in a fixed order, so that what stands there cannot reach earlier rows: the encoder reads
# all of a window's targets off one pass, the decoder makes one pass a target.  Logits are made row
# by row in both, as a product with 64 rows may add up in another order than one with a single row.

FILLER = 0          # id in place of tokens that are not known yet, or beyond the end of the text
FIXED_BITS = 24     # of the coder's probabilities: multiples of 2^-24, none of them zero
FIXED_POINT = dict(lazy=True, perfect=False)                # one way of rounding to them


@contextmanager
def repeatable(run: Run) -> Iterator[None]:
    """While entered, equal inputs give equal bits, in this process and in the next one."""
    kinds = torch_attention.SDPBackend
    flash = train_gpt.attention_works(run.cfg, run.dist, kinds.FLASH_ATTENTION)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS starts
    settings, before = torch.utils.deterministic, torch.are_deterministic_algorithms_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False              # an aid to debugging; a sixth of a pass
    try:
        with torch_attention.sdpa_kernel(kinds.FLASH_ATTENTION if flash else kinds.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


class Features:
    """Features of one window of seq_len tokens.

    On CUDA a pass is recorded once and replayed: launching its kernels one by one takes five times
    as long as running them.
    """

    @torch.no_grad()
    def __init__(self, run: Run):
        """Record the graph; it reads the weights where they are, and so follows their changes."""
        self.run, self.graph = run, None
        self.window = torch.zeros(                                              # (1, T)
            1, run.cfg.seq_len, dtype=torch.int64, device=run.dist.device)
        if run.dist.on_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                   # libraries set themselves up first
                run.forward(self.window, True)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = run.forward(self.window, True)                       # (1, T, C)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Features (T, C) of tokens (T,), valid until the next call."""
        self.window[0].copy_(tokens)
        if self.graph is None:
            self.out = self.run.forward(self.window, True)                      # (1, T, C)
        else:
            self.graph.replay()
        return self.out[0]


def probabilities(run: Run, feature: Tensor) -> np.ndarray:
    """Probability of every token (V,) float64 after a position with this feature (C,)."""
    logits = torch.mv(run.model.tok_emb, feature.float())                       # (V,)
    p = train_gpt.soft_cap(logits, run.cfg.logit_softcap).double().softmax(0).cpu().numpy()
    if not np.isfinite(p).all():
        raise UseError("the model's predictions are no finite numbers: test-time training broke "
                       "it; lower TTT_LR when making the artifact")
    return p


class Coder(train_gpt.Scorer):
    """A scorer that codes each target as it grades it; what coding means is `code`'s to say.

    `eval_chunks` hands it the windows of a chunk, and lets the model learn from the chunk once they
    have been dealt with.
    """
    blind = False           # what follows a target is unknown: each takes a pass of its own

    def __init__(self, run: Run, tokens: Tensor, count: int, step: Callable):
        """Code `count` targets of the stream tokens (n + 1,); `step(1)` is called after each."""
        ones = torch.ones(len(tokens) - 1, dtype=torch.int16)                   # (n,)
        super().__init__(run, train_gpt.Validation(tokens, ones.to(tokens.device)))
        self.count, self.step = count, step
        self.features, self.model = Features(run), range_coding().model.Categorical

    def code(self, target: int, p: np.ndarray) -> int:
        """Code the token of `target`, whose probabilities are `p`, and return it."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, windows: list[train_gpt.Window], tally: train_gpt.Tally):
        """Grade and code the targets of `windows`, leaving out those beyond the end of the text."""
        seq_len = self.run.cfg.seq_len
        for window in windows:
            end = window.start + seq_len
            nats = self.code_window(window.start, range(end - window.tail, min(end, self.count)))
            nats = tally.sums.new_tensor([nats])                                # (1, coded)
            tally.add(nats, torch.ones_like(nats), [window], seq_len)

    def code_window(self, start: int, targets: range) -> list[float]:
        """Code `targets` of the window that begins at `start`; returns the nats of each."""
        nats, known = [], self.data.tokens[start:start + self.run.cfg.seq_len]  # a view
        for target in targets:
            if self.blind or not nats:
                features = self.features(known)                                 # (T, C)
            p = probabilities(self.run, features[target - start])
            nats.append(-math.log(max(p[self.code(target, p)], 1e-300)))
            self.step(1)
        return nats


class Encoder(Coder):
    """Codes the tokens of a stream that is known from the start."""

    def __init__(self, *stream):
        """Takes what Coder takes."""
        super().__init__(*stream)
        self.queue = range_coding().queue.RangeEncoder()

    def code(self, target: int, p: np.ndarray) -> int:
        """Append a token to the code."""
        token = int(self.data.tokens[target + 1])
        self.queue.encode(token, self.model(p, **FIXED_POINT))
        return token


class Decoder(Coder):
    """Fills in the tokens of a stream of which only the first is known."""
    blind = True

    def __init__(self, code: "Code", *stream):
        """Takes the code and what Coder takes."""
        super().__init__(*stream)
        self.name, self.queue = code.name, range_coding().queue.RangeDecoder(code.words)

    def code(self, target: int, p: np.ndarray) -> int:
        """Take a token off the code and put it into the stream."""
        try:
            token = int(self.queue.decode(self.model(p, **FIXED_POINT)))
        except AssertionError:                              # the library's word for nonsense
            raise UseError(f"{self.name}: damaged: it holds no code of this artifact; compress the "
                           "text again") from None
        self.data.tokens[target + 1] = token
        return token


def range_coding():
    """The range coder's library, which sampling does without; UseError if it is not installed."""
    try:
        return importlib.import_module("constriction").stream
    except ImportError:
        raise UseError("the library constriction is not installed; pip install -r "
                       "requirements.txt") from None


def stream_of(run: Run, bos: int, ids: list[int], count: int) -> Tensor:
    """The stream (n + 1,) int32 of BOS and `ids`, its `count` targets filled up to whole windows.

    The fill is less than seq_len, which divides a chunk: it lies within the last chunk, which
    nothing is learnt from.
    """
    n = -(-count // run.cfg.seq_len) * run.cfg.seq_len
    tokens = torch.full((n + 1,), FILLER, dtype=torch.int32)                    # (n + 1,)
    tokens[:1 + len(ids)] = torch.tensor([bos, *ids])
    return tokens.to(run.dist.device)


# ------------------------------------------------------------------------------------------------
# The compressed file: what it was made with, what must come out, and the code
# ------------------------------------------------------------------------------------------------
# magic | SHA-256 of all that follows, 8 bytes | header | words of the range coder, 4 bytes each.
# Machines differ in the last bits of a product, so that a file decodes on the kind of machine and
# the version of PyTorch that it was made with; the header tells when that is not so.  A checksum
# finds damage at once; limits keep a forged file from asking for endless memory.

MAGIC = b"GOLFZ\x01\r\n"
HEADER = struct.Struct("<8s4s4s8sIIH")
MOST_TEXT_BYTES, MOST_TOKENS, MOST_THREADS = 1 << 28, 1 << 24, 1024


class Header(NamedTuple):
    """What a code was made with, and what must come out of it."""
    artifact: bytes         # first bytes of SHA-256, here and below
    tokenizer: bytes
    machine: bytes          # of what decides about last bits: see `machine`
    text: bytes
    size: int               # bytes of text
    count: int              # tokens
    threads: int            # of the CPU


class Opened(NamedTuple):
    """An artifact at the ready, with weights that have learnt nothing since."""
    run: Run
    text: TextCoder
    digest: bytes           # of the artifact's file


def digest(data: bytes, size: int = 8) -> bytes:
    """First `size` bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:size]


def machine(run: Run) -> str:
    """What the last bits of a prediction depend on, but for the number of threads."""
    device = torch.cuda.get_device_name() if run.dist.on_cuda else \
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"PyTorch {torch.__version__} on {device}"


class Coded(NamedTuple):
    """A compressed text."""
    blob: bytes
    words: int              # bytes of it that are the coder's
    tokens: list[int]


def compress(opened: Opened, text: bytes) -> Coded:
    """Compress `text`, which leaves the artifact's weights adapted to it."""
    ids, run = opened.text.encode(text), opened.run
    if len(ids) > MOST_TOKENS:
        raise UseError(f"the text has {len(ids)} tokens, more than {MOST_TOKENS}; take a part of "
                       "it with --max-bytes")
    words = b""
    with repeatable(run), progress("encode", len(ids)) as step:
        if ids:
            tokens = stream_of(run, opened.text.bos, ids, len(ids))             # (n + 1,)
            # The program's own loop: windows, chunks, learning rates and all.
            coder = Encoder(run, tokens, len(ids), step)
            train_gpt.eval_chunks(run, coder, learn=run.cfg.ttt_enabled)
            words = coder.queue.get_compressed().astype("<u4").tobytes()
    header = Header(opened.digest, digest(opened.text.proto, 4),
                    digest(machine(run).encode(), 4), digest(text), len(text), len(ids),
                    min(torch.get_num_threads(), MOST_THREADS))
    body = HEADER.pack(*header) + words
    return Coded(MAGIC + digest(body) + body, len(words), ids)


class Code(NamedTuple):
    """A compressed file that is whole."""
    name: object            # what to call it: its path
    header: Header
    words: np.ndarray       # of the range coder, uint32


def parse_code(name, blob: bytes) -> Code:
    """The parts of a compressed file; raises UseError if it is damaged or was never one."""
    at = len(MAGIC) + 8
    body = blob[at:]
    if blob[:len(MAGIC)] != MAGIC:
        raise UseError(f"{name}: not a file that `use_artifact.py compress` wrote")
    if len(body) < HEADER.size or blob[len(MAGIC):at] != digest(body):
        raise UseError(f"{name}: damaged: its checksum differs; compress the text again")
    header, words = Header(*HEADER.unpack(body[:HEADER.size])), body[HEADER.size:]
    if len(words) % 4 or header.count > min(header.size, MOST_TOKENS) or (
            bool(words) != bool(header.count) or not 0 < header.threads <= MOST_THREADS):
        raise UseError(f"{name}: damaged: {header.count} tokens for {header.size} bytes of text in "
                       f"{len(words)} bytes cannot be; compress the text again")
    return Code(name, header, np.frombuffer(words, "<u4").astype(np.uint32))


def decompress(opened: Opened, code: Code) -> bytes:
    """The text behind a compressed file; leaves the artifact's weights adapted to it.

    Raises: UseError if the file belongs to another artifact, or decodes to anything but the very
    text that was compressed.
    """
    name, header, _ = code
    run, text = opened.run, opened.text
    for what, theirs, ours in (("artifact", header.artifact, opened.digest),
                               ("tokenizer", header.tokenizer, digest(text.proto, 4))):
        if theirs != ours:
            raise UseError(f"{name}: made with an {what} whose SHA-256 begins with {theirs.hex()}, "
                           f"this one's begins with {ours.hex()}; give the one it was made with")
    # What another machine computes may be the same after all, so a file from there is tried.
    elsewhere = header.machine != digest(machine(run).encode(), 4)
    if elsewhere:
        print(f"use_artifact: {name} was made on another kind of machine or with another PyTorch "
              f"than {machine(run)}; it may not decode here", file=sys.stderr)
    found = text.decode(decode_tokens(opened, code))
    if len(found) != header.size or digest(found) != header.text:
        raise UseError(f"{name}: does not decode to the text it was made from; " + (
            "decode it on the kind of machine that made it" if elsewhere else
            "the code or the artifact's predictions are broken"))
    return found


def decode_tokens(opened: Opened, code: Code) -> list[int]:
    """The tokens behind a code, computed with as many threads as the encoder had."""
    run, count, threads = opened.run, code.header.count, torch.get_num_threads()
    if not count:
        return []
    torch.set_num_threads(code.header.threads)
    try:
        with repeatable(run), progress("decode", count) as step:
            tokens = stream_of(run, opened.text.bos, [], count)                 # (n + 1,)
            coder = Decoder(code, run, tokens, count, step)
            train_gpt.eval_chunks(run, coder, learn=run.cfg.ttt_enabled)
    finally:
        torch.set_num_threads(threads)
    return tokens[1:1 + count].tolist()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable]:
    """A function of how many more tokens are done; shows a bar where somebody can see it."""
    with tqdm(total=total, desc=label, unit=" tokens", leave=False, disable=None) as bar:
        yield bar.update


# ------------------------------------------------------------------------------------------------
# Sampling: text that the model makes up
# ------------------------------------------------------------------------------------------------
# Every token takes a forward pass over all that stands before it, up to seq_len tokens: slow for
# long texts, but the very model that is scored, without a second implementation that remembers.

class Taste(NamedTuple):
    """How tokens are drawn."""
    temperature: float      # logits are divided by it; 0: always the likeliest token
    top_k: int              # only so many of the likeliest tokens; 0: all
    seed: int


@torch.no_grad()
def continuation(run: Run, ids: list[int], tokens: int, taste: Taste) -> Iterator[int]:
    """Yield up to `tokens` tokens that go on after `ids`; the same for the same seed."""
    rng = torch.Generator().manual_seed(taste.seed)
    ids = list(ids)
    for _ in range(tokens):
        window = torch.tensor([ids[-run.cfg.seq_len:]], device=run.dist.device)     # (1, T)
        feature = run.forward(window, True)[0, -1]                                  # (C,)
        logits = torch.mv(run.model.tok_emb, feature.float())                       # (V,)
        ids.append(draw(train_gpt.soft_cap(logits, run.cfg.logit_softcap).cpu(), taste, rng))
        yield ids[-1]


def draw(logits: Tensor, taste: Taste, rng: torch.Generator) -> int:
    """One token drawn by logits (V,)."""
    if not taste.temperature:
        return int(logits.argmax())
    best, ids = logits.double().topk(min(taste.top_k or len(logits), len(logits)))  # (k,)
    # Less the largest, so that no temperature is too low.
    p = ((best - best[0]) / taste.temperature).softmax(0)
    return int(ids[torch.multinomial(p, 1, generator=rng)])


def sample(opened: Opened, prompt: bytes, tokens: int, taste: Taste) -> Iterator[str]:
    """Yield the prompt and what the model makes of it, until it begins another document.

    Bytes that are no UTF-8, as a model may well write, come out as replacement characters.
    """
    text, utf8 = opened.text, codecs.getincrementaldecoder("utf-8")("replace")
    yield utf8.decode(prompt)
    for token in continuation(opened.run, [text.bos, *text.encode(prompt)], tokens, taste):
        if token == text.bos:
            break
        yield utf8.decode(text.bytes[token])
    yield utf8.decode(b"", True)


# ------------------------------------------------------------------------------------------------
# Verification: there and back, and the length of the code against the evaluation's bits
# ------------------------------------------------------------------------------------------------
# That the text comes back shows that the coder's predictions are honest.  That its code is as long
# as the evaluation says shows that they are the predictions that were scored: the evaluation takes
# its own path, many windows at once, with the loss that training uses.

MOST_DIFFERENCE, TAIL_BITS = 0.005, 64      # of the evaluation's bits; what ending a code may cost
EVAL_WINDOWS = 16                           # windows at once; memory, not results


class TextScorer(train_gpt.Scorer):
    """A scorer like any other that also adds up what the text alone, without padding, costs.

    A token that is all but impossible costs a score as much as you like, but a coder of fixed point
    no more than FIXED_BITS: `nats` are those of the score, and those with that floor.
    """

    def __init__(self, run: Run, data: train_gpt.Validation):
        """Targets that stand for 0 bytes are padding."""
        super().__init__(run, data)
        self.nats = torch.zeros(2, dtype=torch.float64, device=run.dist.device)

    def score_batch(self, starts: Tensor, windows: list[train_gpt.Window], tally: train_gpt.Tally):
        """Grade `windows` as usual, and take note of what the tally is told."""
        floor = 2.0 ** -FIXED_BITS

        def add(nll: Tensor, sizes: Tensor, *where):
            """Pass nats and sizes (B, tail) on; sizes are 1, and 0 beyond the end of the text."""
            tally.add(nll, sizes, *where)
            p = (-nll.double()).exp() * (1 - floor * self.run.cfg.vocab_size) + floor
            self.nats += torch.stack([(x * sizes).sum() for x in (nll.double(), -p.log())])
        super().score_batch(starts, windows, SimpleNamespace(add=add))


def evaluation_bits(run: Run, bos: int, ids: list[int]) -> tuple[float, float]:
    """Bits of `ids` as the program's own evaluation grades them, and with the coder's floor."""
    cfg = replace(run.cfg, eval_batch_seqs=min(run.cfg.eval_batch_seqs, EVAL_WINDOWS))
    run, tokens = run._replace(cfg=cfg), stream_of(run, bos, ids, len(ids))
    sizes = torch.zeros(len(tokens) - 1, dtype=torch.int16)                     # (n,)
    sizes[:len(ids)] = 1
    scorer = TextScorer(run, train_gpt.Validation(tokens, sizes.to(tokens.device)))
    with repeatable(run):
        train_gpt.eval_chunks(run, scorer, learn=cfg.ttt_enabled)
    return tuple((scorer.nats / math.log(2)).tolist())


def compressors() -> dict[str, Callable[[bytes], bytes] | None]:
    """Usual compressors at their strongest, by name; None where the library is not installed."""
    found = {"gzip -9": lambda text: gzip.compress(text, 9),
             "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    makers = {"zstd -19": ("zstandard", lambda lib: lib.ZstdCompressor(level=19).compress),
              "brotli -11": ("brotli", lambda lib: lambda text: lib.compress(
                  text, quality=11, lgwin=24))}
    for name, (library, maker) in makers.items():
        try:
            found[name] = maker(importlib.import_module(library))
        except ImportError:
            found[name] = None
    return found


class Found(NamedTuple):
    """What `verify` measured."""
    text: bytes
    coded: Coded
    problem: str            # why the text does not come back; empty: it does
    bits: float             # of the evaluation
    floored: float          # of the evaluation, no token beyond the coder's largest cost
    seconds: dict[str, float]

    @property
    def excess(self) -> float:
        """Bits that the code takes beyond the evaluation's, given the coder's floor."""
        return 8 * self.coded.words - self.floored

    @property
    def close(self) -> bool:
        """Whether the code is as long as the score says."""
        most = MOST_DIFFERENCE * self.floored
        return -most <= self.excess <= most + TAIL_BITS


def measure(open_fresh: Callable[[], Opened], text: bytes) -> Found:
    """Compress, decompress and evaluate `text`, each with an artifact read anew."""
    seconds, problem = {}, ""

    def timed(name: str, work: Callable):
        """What `work` makes of the fresh artifact."""
        opened, started = open_fresh(), time.perf_counter()
        made = work(opened)
        seconds[name] = time.perf_counter() - started
        return made

    coded = timed("encode", lambda opened: compress(opened, text))
    try:
        back = timed("decode", lambda opened: decompress(
            opened, parse_code("the code", coded.blob)))
        problem = "" if back == text else "it comes back changed"
    except UseError as e:
        problem = str(e)
    bits = timed("evaluate", lambda opened: evaluation_bits(
        opened.run, opened.text.bos, coded.tokens)) if coded.tokens else (0.0, 0.0)
    return Found(text, coded, problem, *bits, seconds)


def report(found: Found, artifact: Path) -> int:
    """Print what `verify` found; returns 0, or 1 if the artifact does not hold what it claims."""
    tokens = len(found.coded.tokens)
    rows = [row("text", f"{len(found.text):,} bytes", f"{tokens:,} tokens"),
            row("decodes", "no" if found.problem else "yes", found.problem or "byte for byte"),
            size_row("code", found.coded.words, found),
            size_row("evaluation", found.bits / 8, found),
            size_row("with a floor", found.floored / 8, found,
                     f", where no token costs more than {FIXED_BITS} bits"),
            row("difference", f"{100 * found.excess / max(found.floored, 1):+.3f} %", "fine" if
                found.close else f"more than {100 * MOST_DIFFERENCE} % and {TAIL_BITS // 8} bytes")]
    for name, seconds in found.seconds.items():
        rows.append(row(name, f"{seconds:,.1f} s", f"{1000 * seconds / max(1, tokens):.2f} ms a "
                        "token"))
    rows += ["", size_row("this artifact", len(found.coded.blob), found, ", with header")]
    for name, compressor in compressors().items():
        rows.append(size_row(name, len(compressor(found.text)), found) if compressor else
                    row(name, "unknown", "its library is not installed"))
    rows.append(row(artifact.name, f"{artifact.stat().st_size:,} bytes",
                    "needed to decode, besides programs and the tokenizer"))
    print("\n".join(rows))
    return 0 if found.close and not found.problem else 1


def row(name: str, value: str, remark: str) -> str:
    """A line of the report."""
    return f"{name:<15}{value:>18}   {remark}"


def size_row(name: str, size: float, found: Found, remark: str = "") -> str:
    """A line of the report that says what the text comes down to."""
    rate = 8 * size / max(1, len(found.text))
    return row(name, f"{size:,.0f} bytes", f"{rate:.4f} bits per byte{remark}")


# ------------------------------------------------------------------------------------------------
# Command line: what was asked for is checked before a model is built, and told in one line
# ------------------------------------------------------------------------------------------------

SUFFIX = ".golfz"


class Parser(argparse.ArgumentParser):
    """A parser that tells a wrong command line like any other bad input."""

    def error(self, message: str):
        """Raise UseError."""
        raise UseError(f"{message}; see --help")


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """A parser of numbers of `kind` from `least` to `most`."""
    def parse(text: str):
        """`text` as a number; raises ArgumentTypeError, which argparse tells with the option."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {train_gpt.NEEDED[kind]} from "
                                             f"{least} to {most}")
        return value
    return parse


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="use_artifact.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, work, about in (
            ("sample", run_sample, "print text that the model makes up"),
            ("compress", run_compress, "compress a file"),
            ("decompress", run_decompress, "get the file back"),
            ("verify", run_verify, "do both, and compare with the evaluation and others")):
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:])
        command.set_defaults(work=work)
        add = command.add_argument
        add("artifact", type=Path, metavar="ARTIFACT", help="runs/<name>/model.golf of a run")
        if name != "sample":
            add("file", type=Path, metavar="FILE", help="the compressed file" if
                name == "decompress" else "any file; text like that of training suits it best")
        if name in ("compress", "verify"):
            add("--max-bytes", type=number(int, 0, MOST_TEXT_BYTES), default=MOST_TEXT_BYTES,
                metavar="N", help="take only the first N bytes of FILE")
        if name in ("compress", "decompress"):
            add("--out", type=Path, metavar="PATH", help="file to write (default: FILE with "
                f"{SUFFIX} {'added' if name == 'compress' else 'taken off'}, if there is none yet)")
        if name == "sample":
            add_sample_arguments(add)
        add("--data-dir", default=os.environ.get("DATA_DIR", "data"), metavar="DIR",
            help="holds tokenizers/ (default: DATA_DIR, else data)")
        add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use instead")
    return parser


def add_sample_arguments(add: Callable):
    """Options of `sample`."""
    add("--prompt", default="", metavar="TEXT",
        help="text to go on from (default: none, the start of a document)")
    add("--tokens", type=number(int, 0, 1 << 20), default=200, metavar="N",
        help="most tokens to make (default: 200); fewer where the model ends the document")
    add("--temperature", type=number(float, 0.0, 100.0), default=0.8, metavar="T",
        help="below 1 keeps to what is likely, 0 takes the likeliest token only (default: 0.8)")
    add("--top-k", type=number(int, 0, 1 << 16), default=50, metavar="K",
        help="choose among the K likeliest tokens, 0: all (default: 50)")
    add("--seed", type=number(int, 0, (1 << 63) - 1), default=1337, metavar="S",
        help="the same seed makes the same text (default: 1337)")


def open_for(args: argparse.Namespace) -> Opened:
    """The artifact that the command line names."""
    run, tokenizer = open_artifact(args.artifact, args.data_dir, args.tokenizer)
    return Opened(run, TextCoder(tokenizer), digest(args.artifact.read_bytes()))


def read_file(path: Path, most: int) -> bytes:
    """Up to `most` bytes of a file; raises UseError if it cannot be read."""
    try:
        with path.open("rb") as f:
            return f.read(most)
    except OSError as e:
        raise UseError(f"{path}: cannot be read ({e.strerror}); name a file") from None


def read_text(args: argparse.Namespace) -> bytes:
    """The text to compress."""
    text = read_file(args.file, args.max_bytes + 1)
    if len(text) > MOST_TEXT_BYTES:
        raise UseError(f"{args.file}: more than {MOST_TEXT_BYTES} bytes; take a part of it with "
                       "--max-bytes")
    return text[:args.max_bytes]


def output_path(args: argparse.Namespace, usual: Path) -> Path:
    """Where to write; raises UseError, before any work is done, if that cannot be."""
    path = args.out or usual
    if path.exists() and args.file.exists() and path.samefile(args.file):
        raise UseError(f"{path}: is the file to be read; name another with --out")
    if path.is_dir():
        raise UseError(f"{path}: is a directory; name a file with --out")
    if not args.out and path.exists():
        raise UseError(f"{path}: is there already; remove it, or name a file with --out")
    # A model may work for minutes on what cannot be written then; a nameless file tells now.
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as e:
        raise UseError(f"{path}: cannot be written ({e.strerror}); name another with --out"
                       ) from None


def write(path: Path, data: bytes):
    """Write a file, whole or not at all; raises UseError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        reason = e.strerror or e
        raise UseError(f"{path}: cannot be written ({reason}); name another with --out") from None
    finally:
        with suppress(OSError):
            part.unlink()


def run_sample(args: argparse.Namespace) -> int:
    """Print the sample as it comes."""
    sys.stdout.reconfigure(errors="replace")                # a console may know few characters
    taste = Taste(args.temperature, args.top_k, args.seed)
    for piece in sample(open_for(args), os.fsencode(args.prompt), args.tokens, taste):
        print(piece, end="", flush=True)
    print()
    return 0


def run_compress(args: argparse.Namespace) -> int:
    """Write the compressed file and say how large it is."""
    out = output_path(args, Path(f"{args.file}{SUFFIX}"))
    text = read_text(args)
    coded = compress(open_for(args), text)
    write(out, coded.blob)
    print(f"{out}: {len(text):,} bytes in {len(coded.blob):,}, "
          f"{8 * len(coded.blob) / max(1, len(text)):.4f} bits per byte")
    return 0


def run_decompress(args: argparse.Namespace) -> int:
    """Write the text behind a compressed file."""
    if not args.out and args.file.suffix != SUFFIX:
        raise UseError(f"{args.file}: does not end with {SUFFIX}; name the file to write with "
                       "--out")
    out = output_path(args, Path(str(args.file).removesuffix(SUFFIX)))
    code = parse_code(args.file, read_file(args.file, MOST_TEXT_BYTES))
    text = decompress(open_for(args), code)
    write(out, text)
    print(f"{out}: {len(text):,} bytes")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Print the tables of `verify`."""
    return report(measure(lambda: open_for(args), read_text(args)), args.artifact)


def main(argv: list[str] | None = None) -> int:
    """Run; 0 fine, 1 `verify` found a difference, 2 bad input, 130 stopped by Ctrl-C."""
    code = 2
    try:
        args = make_parser().parse_args(argv)
        code = args.work(args)
        sys.stdout.flush()
        return code
    except train_gpt.GolfError as e:
        problem = str(e)
    except BrokenPipeError:                                 # the reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        problem = f"{e.filename or 'the console'}: {e.strerror}"
    except KeyboardInterrupt:
        code, problem = 130, "stopped"
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError) and (
                "allocate memory" not in str(e)):
            raise
        problem = "out of memory; use a smaller artifact or a larger machine"
    # A message may quote a file; whatever that holds, one line it is.
    problem = "".join(c if c.isprintable() else " " for c in problem)
    print(f"use_artifact: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
