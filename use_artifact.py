#!/usr/bin/env python3
"""Use a trained artifact: sample text from the model, or compress text with it and get it back.

    python use_artifact.py sample     runs/demo_seed1337/model.golf --prompt "The function"
    python use_artifact.py compress   runs/demo_seed1337/model.golf notes.txt
    python use_artifact.py decompress runs/demo_seed1337/model.golf notes.txt.golfz
    python use_artifact.py verify     runs/demo_seed1337/model.golf notes.txt --max-bytes 20000

`compress` feeds the predictions behind the score to an arithmetic coder.  The loop is
train_gpt.evaluate itself, test-time training included, with a scorer that also codes each target.
`decompress` runs the same loop with nothing but the artifact, the tokenizer and the code, and so it
can rebuild the text only if the score is legal:

    causal              the decoder has not seen the token that it predicts, nor any later one
    normalised          an arithmetic coder needs probabilities that sum to 1 over the vocabulary
    scored, then learnt the decoder learns from a chunk only after it has decoded all of it
    in one pass         there is one code, and its length is the sum of the scores

`verify` does both, compares the texts and the length of the code with the bits of the evaluation,
and prints the sizes that gzip, xz, zstd and brotli reach on the same text.

Exit code: 0 success, 1 `verify` found a difference, 2 bad input, explained in one line.

Sections: Reading an artifact, Text and tokens, Predictions, The compressed file, Sampling,
Verification, Command line.
"""
import console  # first: from here on Ctrl-C ends in one line

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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import train_gpt
from train_gpt import Config, GolfError, Run


# ------------------------------------------------------------------------------------------------
# Reading an artifact: the model, its scoring and its tokenizer, from files alone
# ------------------------------------------------------------------------------------------------

class NoLog(train_gpt.Log):
    """A log that writes nothing."""

    def __init__(self):
        self.file, self.on_terminal = None, False


def digest(data: bytes, size: int = 8) -> bytes:
    """First `size` bytes of the SHA-256 of `data`."""
    return hashlib.sha256(data).digest()[:size]


class Opened(NamedTuple):
    """An opened artifact whose weights have learnt nothing yet."""
    run: Run
    text: "TextCoder"
    digest: bytes           # of the artifact's file


def open_artifact(path: Path, data_dir: str, tokenizer: Path | None = None) -> Opened:
    """Open an artifact, ready to run on this machine's device.

    Args: `tokenizer` is a SentencePiece model; None = that of the artifact's dataset in data_dir.
    Raises: GolfError if a file is missing, damaged, or from another version of the program.
    """
    container = train_gpt.open_container(path, "artifact")
    cfg = config_of(container, data_dir)
    tokenizer = train_gpt.load_tokenizer(
        tokenizer or cfg.tokenizer_path, cfg.vocab_size, container.meta["tokenizer"])
    run = train_gpt.build_run(cfg, train_gpt.Dist({}), NoLog())
    train_gpt.dequantize(container.tensors(train_gpt.artifact_layout(run.flat)), run.flat)
    return Opened(run.for_artifact(container), TextCoder(tokenizer), digest(path.read_bytes()))


def config_of(container: train_gpt.Container, data_dir: str) -> Config:
    """The settings that an artifact records; raises GolfError if another version wrote it.

    Compiler and kernels are off: a compiler that picks code by timing it may pick differently in
    the next process, and another version of Triton may add in another order.
    """
    meta = container.meta
    for group in ("model", "scoring"):
        if other := set(Config().group(group)) ^ set(meta.get(group, ())):
            raise GolfError(f"{container.path}: written by another version of train_gpt.py, whose "
                            f"{group} settings differ in {', '.join(sorted(other))}; use that "
                            "version, or train again")
    return Config(**meta["model"], **meta["scoring"], dataset=meta["dataset"], data_dir=data_dir,
                  compile_enabled=False, train_batch_tokens=meta["model"]["seq_len"])


# ------------------------------------------------------------------------------------------------
# Text and tokens: any bytes at all to token ids and back
# ------------------------------------------------------------------------------------------------
# SentencePiece normalises before it tokenizes: it joins spaces, drops line ends, rewrites
# characters.  That is right for a model's input and wrong for a compressor's.  Fields of a protocol
# buffer may be repeated and the last value counts, so six bytes appended to the tokenizer switch
# normalisation off and leave ordinary text its usual pieces.  Parts that still do not survive
# (invalid UTF-8, the word mark itself, line ends) are encoded with the 256 byte pieces.

# Field 3, the normalizer: an empty character map (2), no prefix (3), no joining of spaces (4).
NO_NORMALISATION = b"\x1a\x06" b"\x12\x00" b"\x18\x00" b"\x20\x00"
NEEDS_BYTE_PIECES = re.compile(f"([\n{train_gpt.WORD_MARK}\udc80-\udcff]+)")


class TextCoder:
    """Lossless tokenization: any bytes to ids of a tokenizer's text pieces, and back.

    The bytes of a sequence of ids are those of its pieces, concatenated, the word mark read as a
    space.  So a part that SentencePiece would change is found by decoding it.
    """

    def __init__(self, tokenizer: SentencePieceProcessor):
        """Raises GolfError if the tokenizer lacks a byte piece or a BOS."""
        self.proto = tokenizer.serialized_model_proto()
        self.tokenizer = SentencePieceProcessor(model_proto=self.proto + NO_NORMALISATION)
        ids = range(tokenizer.vocab_size())
        self.bytes = [self.bytes_of(i) for i in ids]
        self.byte_pieces = {self.bytes[i]: i for i in ids if tokenizer.is_byte(i)}
        self.bos = tokenizer.bos_id()
        if len(self.byte_pieces) != 256 or self.bos < 0:
            raise GolfError(f"the tokenizer has {len(self.byte_pieces)} byte pieces; 256 are "
                            "needed, and one for the start of a document; see prepare_data.py")

    def bytes_of(self, i: int) -> bytes:
        """Bytes of text of id `i`; empty for control pieces."""
        pieces = self.tokenizer
        if pieces.is_byte(i):
            return bytes([int(pieces.id_to_piece(i)[1:-1], 16)])        # such as <0x0A>
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i):
            return b""
        return pieces.id_to_piece(i).replace(train_gpt.WORD_MARK, " ").encode()

    def encode(self, data: bytes) -> list[int]:
        """Ids whose bytes, concatenated, are `data`; each has at least one byte."""
        ids = []
        parts = NEEDS_BYTE_PIECES.split(data.decode("utf-8", "surrogateescape"))
        for i, part in enumerate(parts):                    # odd parts are the separators
            raw = part.encode("utf-8", "surrogateescape")
            found = [] if i % 2 else self.tokenizer.encode(part)
            if self.decode(found) != raw:
                found = [self.byte_pieces[raw[j:j + 1]] for j in range(len(raw))]
            ids += found
        return ids

    def decode(self, ids: list[int]) -> bytes:
        """The bytes of `ids`."""
        return b"".join([self.bytes[i] for i in ids])


# ------------------------------------------------------------------------------------------------
# Predictions: evaluate() drives a coder, and both directions compute the same bits
# ------------------------------------------------------------------------------------------------
# An encoder knows the whole text, a decoder only the tokens that it has decoded; if one probability
# differs by one bit, everything after it is lost.  So both run every forward pass at one shape, one
# window of seq_len tokens, in which a decoder fills the unknown positions with FILLER.  Masked
# attention gives later positions weights of exactly zero, and all other operations compute a row
# from that row alone, in a fixed order, so the filler cannot reach earlier rows: the encoder reads
# all targets of a window off one pass, the decoder runs one pass per target.  Both compute logits
# row by row, as a product with 64 rows may add in another order than one with a single row.

FILLER = 0          # id in place of tokens that are not known yet, or beyond the end of the text
FIXED_BITS = 24     # the coder's probabilities are multiples of 2^-24, none of them zero
ROUNDING = dict(lazy=True, perfect=False)                   # how it rounds to them
EVAL_WINDOWS = 16   # windows that `verify` scores at once; changes memory, not results


def library(name: str):
    """A library that only some subcommands need; raises GolfError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise GolfError(f"{name} is not installed; pip install -r requirements.txt") from None


def by_documents(cfg: Config) -> bool:
    """Whether a text is scored as one document, which teaches changes of its own."""
    return cfg.ttt_enabled and cfg.ttt_documents


def text_stream(run: Run, bos: int, ids: list[int], count: int) -> train_gpt.Stream:
    """The stream of BOS, the known `ids`, and FILLER; its first `count` targets are text.

    Targets of text have 1 byte, padding to whole windows 0.  The padding is shorter than seq_len,
    which divides a chunk: it lies within the last chunk, from which nothing is learnt.  A text that
    is one document needs no padding.
    """
    n = count if by_documents(run.cfg) else -(-count // run.cfg.seq_len) * run.cfg.seq_len
    tokens = torch.full((n + 1,), FILLER, dtype=torch.int32)                    # (n + 1,)
    tokens[:1 + len(ids)] = torch.tensor([bos, *ids])
    sizes = (torch.arange(n) < count).short()                                   # (n,)
    return train_gpt.Stream(*(x.to(run.rt.dist.device) for x in (tokens, sizes)))


def choose_scoring(run: Run, stream: train_gpt.Stream):
    """Scorer, plan and learner of a text: those of the headline score, in smaller batches."""
    most = 1 if by_documents(run.cfg) else EVAL_WINDOWS
    cfg = replace(run.cfg, eval_batch_seqs=min(run.cfg.eval_batch_seqs, most))
    return train_gpt.choose_scoring(run._replace(cfg=cfg), stream, cfg.ttt_enabled)


@contextmanager
def repeatable() -> Iterator[None]:
    """Context in which equal inputs give equal bits, in this process and in the next one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False         # a sixth of a pass
    # Before the first call of this function MKL counts cores for itself, and splits sums otherwise
    # than after it: a text of several chunks did not come back.
    torch.set_num_threads(torch.get_num_threads())
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    # FlashAttention where it supports the heads, plain products elsewhere: shapes alone decide.
    # cuDNN is left out, as it picks among its engines by heuristics of its own.
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class HiddenStates:
    """Hidden states of one window of seq_len tokens.

    On CUDA a pass is recorded once and replayed: launching its kernels one by one takes five times
    as long as running them.
    """

    @torch.no_grad()
    def __init__(self, run: Run):
        """Record the graph; it reads the weights in place, and so follows their changes."""
        self.run, self.graph, dist = run, None, run.rt.dist
        self.window = torch.zeros(                                              # (1, T)
            1, run.cfg.seq_len, dtype=torch.int64, device=dist.device)
        if dist.on_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                   # libraries initialise themselves first
                run.forward(self.window)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = run.forward(self.window)                             # (1, T, C)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Hidden states (T, C) of tokens (T,), valid until the next call."""
        self.window[0].copy_(tokens)
        if self.graph is None:
            self.out = self.run.forward(self.window)                            # (1, T, C)
        else:
            self.graph.replay()
        return self.out[0]


def next_logits(run: Run, hidden: Tensor,
                learner: train_gpt.DocumentWeights | None = None) -> Tensor:
    """Logits (1 or 2, V) float32 of the next token, by the model's hidden state (C,) or, with a
    learner, by those of the model and of the document's (2, C); raises GolfError."""
    if learner:
        logits = learner.logits(hidden[:, None, None])[:, 0, 0]
    else:
        logits = torch.mv(run.model.tok_emb, hidden.float())[None]
    logits = train_gpt.soft_cap(logits, run.cfg.logit_softcap)
    if not logits.isfinite().all():
        raise GolfError("the model's predictions are not finite; if test-time training broke the "
                        "model, lower TTT_LR and quantize it again")
    return logits


class Coder(train_gpt.Scorer):
    """A scorer that also codes each target; base class of Encoder and Decoder.

    `evaluate` gives it the windows of a chunk, and lets the learner learn from the chunk after it.
    """
    pass_per_target = False     # run a pass for each target, as what follows it is unknown
    learner = None              # of a document, which mixes its probabilities with the model's

    def __init__(self, run: Run, stream: train_gpt.Stream):
        super().__init__(run.cfg, run.rt, run.forward, stream)
        self.run, self.count = run, int(stream.bytes.sum())
        self.library = library("constriction").stream

    def code(self, target: int, distribution) -> int:
        """Code the token of `target`, drawn from `distribution`, and return it."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, windows: list[range], tally: train_gpt.Tally):
        """Score and code the targets of `windows` that are not beyond the end of the text."""
        for window in windows:
            start = window.start if self.learner else window.stop - self.cfg.seq_len
            nats = self.code_window(start, range(window.start, min(window.stop, self.count)))
            nats = tally.sums.new_tensor([nats])                                # (1, coded)
            tally.add(nats, torch.ones_like(nats), [window])
            if self.learner:                                # the chunk is decoded: go on after it
                chunk = self.stream.tokens[window.start:window.stop + 1].long()[None]
                self.learner.forward(*map(self.padded, (chunk[:, :-1], chunk[:, 1:])))

    def padded(self, tokens: Tensor) -> Tensor:
        """tokens (1, t) with FILLER up to the length of a chunk, (1, T)."""
        return F.pad(tokens, (0, self.cfg.ttt_chunk_tokens - tokens.size(1)), value=FILLER)

    def chunk_states(self, tokens: Tensor) -> Tensor:
        """Hidden states (2, T, C) of a document's next tokens (t,), of which a chunk takes T."""
        tokens = self.padded(tokens[None, :self.cfg.ttt_chunk_tokens].long())
        return self.learner.states(tokens)[0][:, 0]

    def code_window(self, start: int, targets: range) -> list[float]:
        """Code `targets` of the window that begins at `start`; returns the nats of each."""
        nats, known = [], self.stream.tokens[start:start + self.cfg.seq_len]    # a view
        states = self.chunk_states if self.learner else self.hidden_states
        for target in targets:
            if self.pass_per_target or not nats:
                hidden = states(known)                                  # (T, C) or (2, T, C)
            logits = next_logits(self.run, hidden[..., target - start, :], self.learner)
            # The mean of one or two distributions, as DocumentWeights.forward scores.
            p = logits.double().softmax(1).mean(0).cpu().numpy()                # (V,)
            token = self.code(target, self.library.model.Categorical(p, **ROUNDING))
            nats.append(-math.log(max(p[token], 1e-300)))
            self.bar.update()
        return nats

    def run_through(self, label: str) -> train_gpt.Tally:
        """Code the whole stream in the program's own loop, with a progress bar on terminals."""
        with repeatable(), tqdm(total=self.count, desc=label, unit=" tokens", leave=False,
                                disable=None) as bar:
            self.bar, self.hidden_states = bar, HiddenStates(self.run)
            _, plan, learner = choose_scoring(self.run, self.stream)
            self.learner = learner if by_documents(self.cfg) else None
            return train_gpt.evaluate(self, plan, learner)


class Encoder(Coder):
    """Codes the tokens of a stream that is known from the start."""

    def __init__(self, run: Run, stream: train_gpt.Stream):
        super().__init__(run, stream)
        self.queue = self.library.queue.RangeEncoder()

    def code(self, target: int, distribution) -> int:
        """Append a token to the code."""
        token = int(self.stream.tokens[target + 1])
        self.queue.encode(token, distribution)
        return token


class Decoder(Coder):
    """Fills in the tokens of a stream of which only the first is known."""
    pass_per_target = True

    def __init__(self, run: Run, stream: train_gpt.Stream, code: "Code"):
        super().__init__(run, stream)
        self.name, self.queue = code.name, self.library.queue.RangeDecoder(code.words)

    def code(self, target: int, distribution) -> int:
        """Read a token from the code and write it into the stream."""
        try:
            token = int(self.queue.decode(distribution))
        except AssertionError:                              # the library's error for invalid data
            raise GolfError(f"{self.name}: holds no code of this artifact; compress the text "
                            "again") from None
        self.stream.tokens[target + 1] = token
        return token


# ------------------------------------------------------------------------------------------------
# The compressed file: a header and the code
# ------------------------------------------------------------------------------------------------
# magic | SHA-256 of all that follows, 8 bytes | header | words of the range coder, 4 bytes each.
# The last bits of a product differ between machines, so a file decodes on the kind of machine and
# with the version of PyTorch that made it; the header says whether this is such a machine.

MAGIC = b"GOLFZ\x01\r\n"
HEADER = struct.Struct("<8s4s4s8sIIH")
MOST_BYTES = 1 << 28        # of a text or a compressed file


class Header(NamedTuple):
    """How a code was made, and the text that it must decode to."""
    artifact: bytes         # first bytes of SHA-256, here and below
    tokenizer: bytes
    machine: bytes          # see `machine`
    text: bytes
    size: int               # bytes of text
    count: int              # tokens
    threads: int            # of the CPU


def machine(dist: train_gpt.Dist) -> str:
    """All that the last bits of a prediction depend on, except the number of threads."""
    device = torch.cuda.get_device_name() if dist.on_cuda else \
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"PyTorch {torch.__version__} on {device}"


def compress(opened: Opened, text: bytes) -> bytes:
    """The compressed file of `text`; SGD leaves the artifact's weights adapted."""
    run, coder, ids = opened.run, opened.text, opened.text.encode(text)
    encoder = Encoder(run, text_stream(run, coder.bos, ids, len(ids)))
    encoder.run_through("encode")
    header = Header(opened.digest, digest(coder.proto, 4), digest(machine(run.rt.dist).encode(), 4),
                    digest(text), len(text), len(ids), torch.get_num_threads())
    words = encoder.queue.get_compressed().astype("<u4")
    body = HEADER.pack(*header) + words.tobytes()
    return MAGIC + digest(body) + body


class Code(NamedTuple):
    """The parts of an undamaged compressed file."""
    name: object            # of the file, for messages
    header: Header
    words: np.ndarray       # of the range coder, uint32


def parse_code(name, blob: bytes) -> Code:
    """The parts of a compressed file; raises GolfError if it is damaged or another kind of file."""
    at = len(MAGIC) + 8
    if blob[:len(MAGIC)] != MAGIC:
        raise GolfError(f"{name}: not a file that `use_artifact.py compress` wrote")
    if blob[len(MAGIC):at] != digest(blob[at:]):
        raise GolfError(f"{name}: damaged (checksum differs); compress the text again")
    words = np.frombuffer(blob[at + HEADER.size:], "<u4").astype(np.uint32)
    return Code(name, Header(*HEADER.unpack(blob[at:at + HEADER.size])), words)


def decompress(opened: Opened, code: Code) -> bytes:
    """The text behind a compressed file; SGD leaves the artifact's weights adapted.

    Raises: GolfError if another artifact or tokenizer made the file, or if it decodes to anything
    but the text that was compressed.
    """
    name, header, text = code.name, code.header, opened.text
    for what, theirs, ours in (("artifact", header.artifact, opened.digest),
                               ("tokenizer", header.tokenizer, digest(text.proto, 4))):
        if theirs != ours:
            raise GolfError(f"{name}: made with the {what} whose SHA-256 begins with "
                            f"{theirs.hex()}, this one's begins with {ours.hex()}; use that one")
    # Another machine may still compute the same bits, so we try.
    here = machine(opened.run.rt.dist)
    elsewhere = header.machine != digest(here.encode(), 4)
    if elsewhere:
        print(f"use_artifact: {name} was made on another kind of machine or with another PyTorch "
              f"than {here}; it may not decode here", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(header.threads)                   # sums are split among threads
    try:
        stream = text_stream(opened.run, text.bos, [], header.count)
        Decoder(opened.run, stream, code).run_through("decode")
    finally:
        torch.set_num_threads(threads)
    found = text.decode(stream.tokens[1:1 + header.count].tolist())
    if len(found) != header.size or digest(found) != header.text:
        raise GolfError(f"{name}: does not decode to the text it was made from; " + (
            "decode it on the kind of machine that made it" if elsewhere else
            "the code is damaged or the artifact's predictions are not repeatable"))
    return found


# ------------------------------------------------------------------------------------------------
# Sampling: text that the model generates
# ------------------------------------------------------------------------------------------------
# Every token takes a forward pass over up to seq_len tokens before it: slow for long texts, but the
# very model that is scored, without a second implementation that caches keys and values.

class Sampling(NamedTuple):
    """How tokens are drawn."""
    temperature: float      # divides the logits; 0 = always the most likely token
    top_k: int              # draw among the k most likely tokens; 0 = all
    seed: int


@torch.no_grad()
def generate(run: Run, ids: list[int], tokens: int, sampling: Sampling) -> Iterator[int]:
    """Yield `tokens` tokens that continue `ids`; the same for the same seed."""
    rng, ids, V = torch.Generator().manual_seed(sampling.seed), list(ids), run.cfg.vocab_size
    k = min(sampling.top_k or V, V) if sampling.temperature else 1
    for _ in range(tokens):
        window = torch.tensor([ids[-run.cfg.seq_len:]], device=run.rt.dist.device)      # (1, T)
        logits = next_logits(run, run.forward(window)[0, -1])[0]                        # (V,)
        best, candidates = logits.cpu().double().topk(k)                                # (k,) each
        # Subtracting the largest first keeps the quotient finite at any temperature.
        p = ((best - best[0]) / (sampling.temperature or 1)).softmax(0)
        ids.append(int(candidates[torch.multinomial(p, 1, generator=rng)]))
        yield ids[-1]


def sample(opened: Opened, prompt: bytes, tokens: int, sampling: Sampling) -> Iterator[str]:
    """Yield the prompt and its continuation, until the model begins another document.

    Invalid UTF-8, which a model may well generate, becomes replacement characters.
    """
    text, utf8 = opened.text, codecs.getincrementaldecoder("utf-8")("replace")
    yield utf8.decode(prompt)
    for token in generate(opened.run, [text.bos, *text.encode(prompt)], tokens, sampling):
        if token == text.bos:
            break
        yield utf8.decode(text.bytes[token])
    yield utf8.decode(b"", True)


# ------------------------------------------------------------------------------------------------
# Verification: compress and decompress, and the length of the code against the evaluation's bits
# ------------------------------------------------------------------------------------------------
# A text that comes back shows that the coder's predictions are legal.  A code as long as the
# evaluation says shows that they are the predictions that were scored: the evaluation computes
# them in its own way, many windows at once, with the loss of training.

MOST_DIFFERENCE, TAIL_BITS = 0.005, 64      # of the evaluation's bits; cost of ending a code


class Limited:
    """A scorer that also sums the nats of the targets that are not padding.

    An all but impossible token can cost any number of nats in a score, but at most FIXED_BITS in a
    fixed-point code: `nats` holds the sum without and with this limit.
    """

    def __init__(self, scorer: train_gpt.Scorer):
        self.scorer, self.rt, self.stream = scorer, scorer.rt, scorer.stream
        self.nats = torch.zeros(2, dtype=torch.float64, device=self.rt.dist.device)

    def score(self, windows: list[range], tally: train_gpt.Tally):
        """Score `windows` as usual, reading along what is added to the tally."""
        floor = 2.0 ** -FIXED_BITS

        def add(nll: Tensor, sizes: Tensor, windows: list[range]):
            tally.add(nll, sizes, windows)
            p = (-nll.double()).exp() * (1 - floor * self.scorer.cfg.vocab_size) + floor
            self.nats += torch.stack([(x * sizes).sum() for x in (nll.double(), -p.log())])
        self.scorer.score(windows, SimpleNamespace(add=add))


def evaluation_bits(opened: Opened, text: bytes) -> tuple[float, float]:
    """Bits of `text` by the program's own evaluation: as scored, and limited as in the code."""
    run, ids = opened.run, opened.text.encode(text)
    scorer, plan, learner = choose_scoring(
        run, text_stream(run, opened.text.bos, ids, len(ids)))
    limited = Limited(scorer)
    with repeatable():
        train_gpt.evaluate(limited, plan, learner)
    return tuple((limited.nats / math.log(2)).tolist())


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """General compressors at their strongest, by name."""
    zstd, brotli = library("zstandard"), library("brotli")
    return {"gzip -9": lambda text: gzip.compress(text, 9),
            "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
            "zstd -19": zstd.ZstdCompressor(level=19).compress,
            "brotli -11": lambda text: brotli.compress(text, quality=11, lgwin=24)}


class Measured(NamedTuple):
    """Measurements of `verify`."""
    text: bytes
    tokens: int
    blob: bytes             # the compressed file
    problem: str            # why the text does not come back; empty = it does
    bits: float             # of the evaluation
    limited: float          # of the evaluation, no token above FIXED_BITS
    seconds: dict[str, float]

    @property
    def code_bytes(self) -> int:
        """Bytes that the range coder wrote."""
        return len(self.blob) - len(MAGIC) - 8 - HEADER.size

    @property
    def excess(self) -> float:
        """Bits of the code beyond the evaluation's limited bits."""
        return 8 * self.code_bytes - self.limited

    @property
    def close(self) -> bool:
        """Whether the code is as long as the score says."""
        most = MOST_DIFFERENCE * self.limited
        return -most <= self.excess <= most + TAIL_BITS


def measure(open_fresh: Callable[[], Opened], text: bytes) -> Measured:
    """Compress, decompress and evaluate `text`, each with a freshly opened artifact."""
    seconds, problem = {}, ""

    def timed(name: str, work: Callable):
        opened, started = open_fresh(), time.perf_counter()
        result = work(opened)
        seconds[name] = time.perf_counter() - started
        return result

    blob = timed("encode", lambda opened: compress(opened, text))
    code = parse_code("the code", blob)
    try:
        if timed("decode", lambda opened: decompress(opened, code)) != text:
            problem = "the decoded text differs"
    except GolfError as e:
        problem = str(e)
    bits = timed("evaluate", lambda opened: evaluation_bits(opened, text))
    return Measured(text, code.header.count, blob, problem, *bits, seconds)


def report(found: Measured, artifact: Path) -> int:
    """Print the tables of `verify`; returns 0, or 1 if code and evaluation disagree."""
    rows = [row("text", f"{len(found.text):,} bytes", f"{found.tokens:,} tokens"),
            row("decodes", "no" if found.problem else "yes", found.problem or "byte for byte"),
            size_row("code", found.code_bytes, found),
            size_row("evaluation", found.bits / 8, found),
            size_row("with a limit", found.limited / 8, found,
                     f", no token above {FIXED_BITS} bits"),
            row("difference", f"{100 * found.excess / max(found.limited, 1):+.3f} %", "fine" if
                found.close else f"more than {100 * MOST_DIFFERENCE} % and {TAIL_BITS // 8} bytes")]
    for name, seconds in found.seconds.items():
        rate = 1000 * seconds / max(1, found.tokens)
        rows.append(row(name, f"{seconds:,.1f} s", f"{rate:.2f} ms per token"))
    rows += ["", size_row("this artifact", len(found.blob), found, ", with header")]
    rows += [size_row(name, len(compressor(found.text)), found)
             for name, compressor in compressors().items()]
    rows.append(row(artifact.name, f"{artifact.stat().st_size:,} bytes",
                    "needed to decode, besides programs and the tokenizer"))
    print("\n".join(rows))
    return 0 if found.close and not found.problem else 1


def row(name: str, value: str, remark: str) -> str:
    """A line of the report."""
    return f"{name:<15}{value:>18}   {remark}"


def size_row(name: str, size: float, found: Measured, remark: str = "") -> str:
    """A line of the report that gives a size of the compressed text."""
    rate = 8 * size / max(1, len(found.text))
    return row(name, f"{size:,.0f} bytes", f"{rate:.4f} bits per byte{remark}")


# ------------------------------------------------------------------------------------------------
# Command line: arguments and files are checked before a model is built
# ------------------------------------------------------------------------------------------------

SUFFIX = ".golfz"


def number(kind: type, least: float, most: float) -> Callable[[str], float]:
    """A parser of numbers of `kind` from `least` to `most`."""
    def parse(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {least} to {most}"          # argparse quotes it
    return parse


def make_parser() -> console.Parser:
    """The command line."""
    parser = console.Parser(prog="use_artifact.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, work, about in (
            ("sample", run_sample, "print text that the model generates"),
            ("compress", run_compress, "compress a file"),
            ("decompress", run_decompress, "restore a compressed file"),
            ("verify", run_verify, "do both, compare with the evaluation and other compressors")):
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:])
        command.set_defaults(work=work)
        add = command.add_argument
        add("artifact", type=Path, metavar="ARTIFACT", help="runs/<name>/model.golf of a run")
        if name != "sample":
            add("file", type=Path, metavar="FILE", help="the compressed file" if
                name == "decompress" else "any file; text like that of training compresses best")
        if name in ("compress", "verify"):
            add("--max-bytes", type=number(int, 0, MOST_BYTES), metavar="N",
                help="read only the first N bytes of FILE")
        if name in ("compress", "decompress"):
            add("--out", type=Path, metavar="PATH", help="file to write (default: FILE with "
                f"{SUFFIX} {'added' if name == 'compress' else 'removed'}, if there is none yet)")
        if name == "sample":
            add_sample_arguments(add)
        add("--data-dir", default=os.environ.get("DATA_DIR", "data"), metavar="DIR",
            help="folder that holds tokenizers/ (default: DATA_DIR, else data)")
        add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use instead")
    return parser


def add_sample_arguments(add: Callable):
    """Options of `sample`."""
    add("--prompt", default="", metavar="TEXT",
        help="text to continue (default: none, the start of a document)")
    add("--tokens", type=number(int, 0, 1 << 20), default=200, metavar="N",
        help="most tokens to generate (default: 200); the end of the document stops earlier")
    add("--temperature", type=number(float, 0.0, 100.0), default=0.8, metavar="T",
        help="divides the logits; 0 = always the most likely token (default: 0.8)")
    add("--top-k", type=number(int, 0, 1 << 16), default=50, metavar="K",
        help="draw among the K most likely tokens; 0 = all (default: 50)")
    add("--seed", type=number(int, 0, (1 << 63) - 1), default=1337, metavar="S",
        help="the same seed generates the same text (default: 1337)")


def open_for(args: argparse.Namespace) -> Opened:
    """The artifact that the command line names."""
    return open_artifact(args.artifact, args.data_dir, args.tokenizer)


def read_text(args: argparse.Namespace) -> bytes:
    """The text to compress."""
    console.check_regular(args.file)
    with args.file.open("rb") as f:
        text = f.read(MOST_BYTES + 1 if args.max_bytes is None else args.max_bytes)
    if len(text) > MOST_BYTES:
        raise GolfError(f"{args.file}: more than {MOST_BYTES:,} bytes; compress a part of it with "
                        "--max-bytes")
    return text


def output_path(args: argparse.Namespace, default: Path) -> Path:
    """The file to write; raises GolfError, before any work is done, if it cannot be written."""
    path = args.out or default
    if path.exists():
        if path.samefile(args.file):
            raise GolfError(f"{path}: is the file to read; name another with --out")
        if not path.is_file():
            raise GolfError(f"{path}: is not a regular file; name one with --out")
        if not args.out:
            raise GolfError(f"{path}: exists already; remove it, or name a file with --out")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as e:
        raise GolfError(f"{path}: cannot be written ({e.strerror}); name another with --out"
                        ) from None


def run_sample(args: argparse.Namespace) -> int:
    """Print the sample token by token."""
    sampling = Sampling(args.temperature, args.top_k, args.seed)
    for piece in sample(open_for(args), os.fsencode(args.prompt), args.tokens, sampling):
        print(piece, end="", flush=True)
    print()
    return 0


def run_compress(args: argparse.Namespace) -> int:
    """Write the compressed file and print its size."""
    text, out = read_text(args), output_path(args, Path(f"{args.file}{SUFFIX}"))
    blob = compress(open_for(args), text)
    console.write_atomic(out, [blob])
    print(f"{out}: {len(text):,} bytes in {len(blob):,}, "
          f"{8 * len(blob) / max(1, len(text)):.4f} bits per byte")
    return 0


def run_decompress(args: argparse.Namespace) -> int:
    """Write the text behind a compressed file."""
    code = parse_code(args.file, console.read_file(args.file, MOST_BYTES))
    if not args.out and args.file.suffix != SUFFIX:
        raise GolfError(f"{args.file}: does not end with {SUFFIX}; name the file to write with "
                        "--out")
    out = output_path(args, Path(str(args.file).removesuffix(SUFFIX)))
    text = decompress(open_for(args), code)
    console.write_atomic(out, [text])
    print(f"{out}: {len(text):,} bytes")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Print the tables of `verify`."""
    text = read_text(args)
    compressors()                           # a missing library must fail before the model's work
    return report(measure(lambda: open_for(args), text), args.artifact)


def run_command(argv: list[str] | None) -> int:
    """Run the subcommand that `argv` names; returns its exit code."""
    args = make_parser().parse_args(argv)
    try:
        return args.work(args)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
            raise GolfError("out of memory; use a smaller artifact or a larger machine") from None
        raise


def main(argv: list[str] | None = None) -> int:
    """Run; exit code 0 success, 1 `verify` found a difference, 2 bad input, 130 Ctrl-C."""
    return console.run("use_artifact", lambda: run_command(argv), GolfError)


if __name__ == "__main__":
    sys.exit(main())
