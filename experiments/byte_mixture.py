#!/usr/bin/env python3
"""Score an artifact with the byte mixture of parameter-golf #1858: as published, and made valid.

    python experiments/byte_mixture.py runs/demo_seed42/model.golf

A PPM of order 5 learns the scored text byte by byte and is mixed into the model's score.  #1858
spreads a token's probability evenly over its bytes, p^(1/n) each, and mixes byte by byte: the
result is no distribution, so its "bits per byte" are not bits (#1872, #1905, #1916).  The valid
form walks the trie of the vocabulary and mixes only among the bytes that can follow; it sums to 1
over all tokens whatever the model, the text and the gate.  The table has both, the plain neural
score, and the mass that each spreads over the vocabulary.  None can be a headline.

One difference from #1858 as published: its mixture drops the nats of tokens without bytes, such as
BOS, which every row here counts.

Sections: Alphabet, Neural odds, PPM, Mixtures, Masses, Command line.

Shapes: n targets with M bytes in all;  V tokens, N nodes of their trie, L bytes in the longest;
        B rows of a batch, S sampled contexts.
"""
import argparse
import functools
import itertools
import math
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before what takes long: from here on Ctrl-C ends in one line.
import console  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import GolfError, Run, Scorer, Stream  # noqa: E402
from use_artifact import open_artifact  # noqa: E402


# ------------------------------------------------------------------------------------------------
# Alphabet: the bytes behind each token, and the trie of all of them
# ------------------------------------------------------------------------------------------------
# The byte count of the challenge lets a piece with the marker stand for a space and its letters,
# or for its letters alone right after a control piece: two tries.  Control pieces stand for no
# byte and end at the root, so the whole vocabulary has a place and all of it can sum to 1.

class Trie:
    """Byte strings of a vocabulary; its nodes are their prefixes, node 0 the empty one.

    A node may end tokens, several where strings are equal, and go on to others: row i of `members`
    marks all tokens from node i on, row N + i those that do not end there.
    """

    def __init__(self, strings: list[bytes]):
        """Build the trie; strings may be empty or equal to each other."""
        self.strings, V = strings, len(strings)
        self.sizes = np.array([len(s) for s in strings])                                # (V,)
        prefixes = [[s[:k] for k in range(len(s) + 1)] for s in strings]
        nodes = sorted(set(itertools.chain([b""], *prefixes)))
        number, N = {prefix: i for i, prefix in enumerate(nodes)}, len(nodes)
        self.paths = [[number[p] for p in own] for own in prefixes]     # root first, V of them
        self.kids: list[dict[int, int]] = [{} for _ in nodes]           # byte: node, N of them
        for prefix in nodes[1:]:
            parent = number[prefix[:-1]]
            self.kids[parent][prefix[-1]] = number[prefix]
        L = self.sizes.max()
        self.padded = torch.tensor([                # (V, L + 1), the last node again and again
            path + path[-1:] * (L + 1 - len(path)) for path in self.paths])
        rows = [i for path in self.paths for i in path + [N + node for node in path[:-1]]]
        columns = np.repeat(np.arange(V), 2 * self.sizes + 1)
        self.members = torch.sparse_coo_tensor(                                         # (2N, V)
            np.stack([rows, columns]), torch.ones(len(rows), dtype=torch.float64), (2 * N, V),
            check_invariants=True).coalesce()

    def to(self, device: torch.device) -> "Trie":
        """This trie with its tensors on `device`."""
        self.padded, self.members = self.padded.to(device), self.members.to(device)
        return self


class Alphabet(NamedTuple):
    """The bytes of all tokens by the challenge's rule."""
    silent: np.ndarray          # (V,) bool, tokens that stand for no text, such as BOS
    tries: tuple[Trie, Trie]    # after a token with text; after one without


def read_alphabet(tokenizer) -> Alphabet:
    """The alphabet of a SentencePiece model; `train_gpt.bytes_per_target` counts the same bytes."""
    spaced, bare, silent = [], [], []
    for i in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(i)
        silent.append(tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i))
        text = piece.removeprefix(train_gpt.WORD_MARK).encode()
        if tokenizer.is_byte(i):
            text = bytes([int(piece[1:-1], 16)])            # <0x41>
        text = b"" if silent[-1] else text
        marked = piece.startswith(train_gpt.WORD_MARK) and not silent[-1]
        spaced.append(b" " + text if marked else text)
        bare.append(text)
    return Alphabet(np.array(silent), (Trie(spaced), Trie(bare)))


class Text(NamedTuple):
    """The targets of a stream as tokens of one of the two tries each."""
    tokens: np.ndarray          # (n,) int64
    after: np.ndarray           # (n,) int64, which trie: 1 where the token before is silent
    sizes: np.ndarray           # (n,) int64, bytes


def read_text(alphabet: Alphabet, stream: Stream) -> Text:
    """The targets of `stream`; their bytes are those that its scores are counted over."""
    tokens = stream.tokens.cpu().numpy().astype(np.int64)                                 # (n + 1,)
    after = alphabet.silent[tokens[:-1]].astype(np.int64)                               # (n,)
    by_trie = np.stack([trie.sizes for trie in alphabet.tries])                         # (2, V)
    sizes = by_trie[after, tokens[1:]]                                                  # (n,)
    assert (sizes == stream.bytes.cpu().numpy()).all(), "bytes differ from bytes_per_target"
    return Text(tokens[1:], after, sizes)


# ------------------------------------------------------------------------------------------------
# Neural odds: probabilities of the model at each node of the walk to a target
# ------------------------------------------------------------------------------------------------
# The mass of a node is the sum over all tokens below it.  (Differences of running sums over the
# sorted vocabulary would be cheaper, but lose masses below 1e-16, which PPM may find likely.)

class Odds(NamedTuple):
    """The walks to B tokens; its product, with exp(rest), is the model's p(token) exactly."""
    nats: Tensor                # (B,) float64, -log p(token)
    rest: Tensor                # (B,) log of p(END) at its node times its share of that END
    stay: Tensor                # (B, L) 1 - p(END) at the node before each byte
    child: Tensor               # (B, L) p(byte | not END) there; both are padded with noise


def walk_odds(trie: Trie, log_probs: Tensor, tokens: Tensor) -> Odds:
    """Odds along the walks to tokens (B,) under log_probs (B, V) or, for all of them, (1, V)."""
    B, N = len(tokens), len(trie.kids)
    probs = log_probs.exp().T.contiguous()                                  # (V, B) or (V, 1)
    masses = torch.sparse.mm(trie.members, probs).expand(-1, B)                         # (2N, B)
    path, row = trie.padded[tokens], torch.arange(B, device=tokens.device)[:, None]
    node, below = masses[path, row], masses[N + path, row]                              # (B, L + 1)
    log_p = log_probs.expand(B, -1).gather(1, tokens[:, None])[:, 0]                    # (B,)
    return Odds(
        nats=-log_p,
        rest=log_p - node[:, -1].log(),
        stay=(below / node)[:, :-1],
        child=node[:, 1:] / below[:, :-1])


class Capture(Scorer):
    """A scorer that also keeps the odds of every target's walk, and S whole distributions."""

    def __init__(self, run: Run, stream: Stream, alphabet: Alphabet, samples: np.ndarray):
        """Score as `Scorer` does; `samples` (S,) are the targets of the whole distributions."""
        super().__init__(run.cfg, run.rt, self.observe, stream)
        self.model, self.hidden_states, self.samples = run.model, run.forward, samples
        self.text = text = read_text(alphabet, stream)
        device = run.rt.dist.device
        self.tries = [trie.to(device) for trie in alphabet.tries]
        self.after = torch.from_numpy(text.after).to(device)                            # (n,)
        self.sizes = torch.from_numpy(text.sizes).to(device)                            # (n,)
        self.first = self.sizes.cumsum(0) - self.sizes                                  # (n,)
        n, S, new = len(text.sizes), len(samples), dict(dtype=torch.float64, device=device)
        self.nats, self.rest = torch.zeros(2, n, **new)                                 # (n,) each
        self.stay, self.child = torch.zeros(2, text.sizes.sum(), **new)                 # (M,) each
        self.slot = torch.full((n,), -1, device=device)             # (n,) row in `sampled`, if any
        self.slot[samples] = torch.arange(S, device=device)
        self.sampled = torch.zeros(S, run.cfg.vocab_size, **new)                        # (S, V)

    def score_batch(self, starts: Tensor, windows: list[range], tally: train_gpt.Tally):
        """Score `windows` as `Scorer` does; `observe` sees their targets on the way."""
        tail = len(windows[0])
        first = starts[:len(windows), None]                     # the rest is padding
        self.at = (first + self.steps[-tail:]).flatten()                                # (B tail,)
        super().score_batch(starts, windows, tally)

    def observe(self, tokens: Tensor, targets: Tensor, precise: bool) -> Tensor:
        """GPT.forward for scoring, in its two steps; keeps the odds of `targets` in between."""
        hidden = self.hidden_states(tokens)[:, -targets.size(1):].float()
        rows = max(1, MOST_NUMBERS // sum(self.tries[0].members.shape))
        parts = zip(*(
            x.split(rows) for x in (self.at, hidden.flatten(0, 1), targets.flatten())))
        for at, x, tokens in parts:
            self.keep(at, x[:len(at)], tokens[:len(at)])
        return self.model.per_token_loss(hidden, targets)

    def keep(self, at: Tensor, hidden: Tensor, tokens: Tensor):
        """Keep the odds of the targets at (B,), which are `tokens` after hidden states (B, C)."""
        logits = F.linear(hidden, self.model.tok_emb)
        logits = train_gpt.soft_cap(logits, self.cfg.logit_softcap)
        log_probs = logits.double().log_softmax(1)                                      # (B, V)
        for which, trie in enumerate(self.tries):
            mine = (self.after[at] == which).nonzero()[:, 0]                            # (b,)
            if len(mine):
                odds = walk_odds(trie, log_probs[mine], tokens[mine])
                self.put(at[mine], odds)
        slot = self.slot[at]                                                            # (B,)
        self.sampled[slot[slot >= 0]] = log_probs[slot >= 0]

    def put(self, at: Tensor, odds: Odds):
        """Store the odds of targets at (b,) where they belong in the stream."""
        self.nats[at], self.rest[at] = odds.nats, odds.rest
        depth = torch.arange(odds.stay.size(1), device=at.device)                       # (L,)
        real = depth < self.sizes[at][:, None]                                          # (b, L)
        where = (self.first[at][:, None] + depth)[real]
        self.stay[where] = odds.stay[real]
        self.child[where] = odds.child[real]

    def walks(self, guesses: "Guesses") -> "Walks":
        """The walks to all targets, once all have been scored, with PPM's `guesses` (M,)."""
        columns = self.nats, self.rest, self.stay, self.child
        return Walks(self.text.sizes, *(x.cpu().numpy() for x in columns), guesses)

    def contexts(self, explored: list["Guesses"]) -> list["Context"]:
        """The S sampled contexts, with the guesses of PPM in each of them."""
        log_probs, tries = self.sampled.cpu(), self.text.after[self.samples]
        return [Context(self.tries[which], *found)
                for which, *found in zip(tries, log_probs, explored)]


MOST_NUMBERS = 1 << 23      # probabilities and masses held at once, float64


# ------------------------------------------------------------------------------------------------
# PPM: counts of the bytes that followed each context of up to five bytes
# ------------------------------------------------------------------------------------------------
# As in #1858, which calls it PPM-D: escape method C (u / (n + u) after n bytes of u kinds) without
# exclusion of bytes that longer contexts have seen, so that it sums to less than 1 over bytes.

ORDER = 5
TOTAL, BEST = 256, 257      # no bytes: where a context's counts keep their sum and their largest
EVERY_BYTE = dict.fromkeys(range(256), 1)


class PPM:
    """A model of bytes that has read some text; a context is absent until a byte has followed it.

    `now` are the counts of the present contexts, longest first, None where absent.
    """

    def __init__(self):
        """Nothing has been read."""
        self.tables: list[dict] = [{} for _ in range(ORDER + 1)]        # key of context: counts
        # Nine bits a byte, so that no context is mistaken for one that began before the text.
        self.masks = [(1 << 9 * k) - 1 for k in range(ORDER, -1, -1)]
        self.history, self.now = 0, [None] * (ORDER + 1)

    def push(self, byte: int) -> tuple:
        """Read a byte; returns the state that `pop` needs to forget it."""
        before, bests = (self.history, self.now), []
        for table, mask, counts in zip(self.tables, self.masks, self.now):
            if counts is None:
                table[self.history & mask] = {TOTAL: 1, BEST: 1, byte: 1}
                bests.append(None)
                continue
            bests.append(counts[BEST])
            counts[TOTAL] += 1
            counts[byte] = count = counts.get(byte, 0) + 1
            if count > counts[BEST]:
                counts[BEST] = count
        self.history = history = (self.history << 9 | 256 | byte) & self.masks[0]
        self.now = [
            table.get(history & mask) for table, mask in zip(self.tables, self.masks)]
        return before, bests, byte

    def pop(self, pushed: tuple):
        """Forget the byte read last."""
        (self.history, self.now), bests, byte = pushed
        for table, mask, counts, best in zip(self.tables, self.masks, self.now, bests):
            if counts is None:
                del table[self.history & mask]
                continue
            counts[TOTAL] -= 1
            counts[BEST] = best
            counts[byte] -= 1
            if not counts[byte]:
                del counts[byte]

    def confidence(self) -> float:
        """Part of its longest context's mass that the likeliest byte gets; 0 without a context."""
        for counts in self.now:
            if counts:
                return counts[BEST] / (counts[TOTAL] + len(counts) - 2)
        return 0.0

    def spread(self, children):
        """Yield (scale, counts, bytes) parting `children`, a set: each byte gets scale * count."""
        escape = 1.0
        for counts in self.now:
            if counts is None:
                continue
            unique = len(counts) - 2
            scale = escape / (counts[TOTAL] + unique)
            if found := children & counts.keys():
                yield scale, counts, found
                children = children - found
                if not children:
                    return
            escape = scale * unique
        yield escape / 256, EVERY_BYTE, children


class Guesses(NamedTuple):
    """PPM at each of M bytes; `ppm` depends on the byte, the others only on the bytes before."""
    ppm: np.ndarray             # (M,) its probability of the byte
    mass: np.ndarray            # (M,) its probability of all bytes that the trie allows there
    confidence: np.ndarray      # (M,) that of its likeliest byte, which gates


def read_stream(alphabet: Alphabet, text: Text, samples: np.ndarray) -> tuple[Guesses, list]:
    """Guesses for the bytes of `text`, and `explore` before each of the targets `samples`."""
    model, wanted, explored = PPM(), set(samples.tolist()), {}
    columns = ppm, mass, confidence = array("d"), array("d"), array("d")
    targets = zip(text.tokens.tolist(), text.after.tolist())
    for t, (token, after) in enumerate(targets):
        trie = alphabet.tries[after]
        if t in wanted:
            explored[t] = explore(model, trie)
        for node, byte in zip(trie.paths[token], trie.strings[token]):
            total = 0.0
            for scale, counts, found in model.spread(trie.kids[node].keys()):
                total += scale * sum(map(counts.__getitem__, found))
                if byte in found:
                    ppm.append(scale * counts[byte])
            mass.append(total)
            confidence.append(model.confidence())
            model.push(byte)
    return Guesses(*map(np.array, columns)), [explored[t] for t in samples.tolist()]


def explore(model: PPM, trie: Trie) -> Guesses:
    """Guesses (N,) for the walk to every token from here: of a node's byte, and at the node."""
    ppm, mass, confidence = np.zeros((3, len(trie.kids)))                               # (N,) each

    def visit(node: int):
        """Fill in a node's own guesses and those of its children, having read its prefix."""
        kids = trie.kids[node]
        confidence[node] = model.confidence()
        for scale, counts, found in model.spread(kids.keys()):
            for byte in found:
                ppm[kids[byte]] = scale * counts[byte]
                mass[node] += scale * counts[byte]
        for byte, kid in kids.items():
            if trie.kids[kid]:
                pushed = model.push(byte)
                visit(kid)
                model.pop(pushed)
    visit(0)
    return Guesses(ppm, mass, confidence)


# ------------------------------------------------------------------------------------------------
# Mixtures: the published form and the normalised one, from the same numbers
# ------------------------------------------------------------------------------------------------

class Walks(NamedTuple):
    """Both models along the walks of n tokens of M bytes in all: the input of a mixture."""
    sizes: np.ndarray           # (n,) bytes of each token
    nats: np.ndarray            # (n,) -log of the model's p(token)
    rest: np.ndarray            # (n,) see `Odds`
    stay: np.ndarray            # (M,)
    child: np.ndarray           # (M,)
    guesses: Guesses            # (M,)


class Scores(NamedTuple):
    """A mixture's score of n tokens: exp(rest) times the product of its bytes' scores."""
    bytes: np.ndarray           # (M,)
    rest: np.ndarray            # (n,)

    def nats(self, sizes: np.ndarray) -> np.ndarray:
        """-log score of each token, (n,)."""
        token = np.repeat(np.arange(len(sizes)), sizes)                                 # (M,)
        return -self.rest - np.bincount(token, np.log(self.bytes), len(sizes))


class Gate(NamedTuple):
    """The model's weight: `low` where PPM is at least so confident, else `high`."""
    low: float = 0.05
    high: float = 0.9
    threshold: float = 0.9

    def weight(self, guesses: Guesses) -> np.ndarray:
        """The model's weight at each byte (M,), from the bytes before it alone."""
        return np.where(guesses.confidence >= self.threshold, self.low, self.high)


def neural(walks: Walks, gate: Gate) -> Scores:
    """The model alone, byte by byte; `gate` is not used."""
    return Scores(walks.stay * walks.child, walks.rest)


def published(walks: Walks, gate: Gate, hijack: float = 0.0) -> Scores:
    """The mixture of #1858, which is no distribution.  Tokens without bytes keep their nats.

    With `hijack`, as in its third version: the model alone where it spends fewer nats than that on
    the byte *that came*, so that the choice between the two depends on the answer.
    """
    sizes = walks.sizes
    nats = np.repeat(walks.nats / np.maximum(sizes, 1), sizes)                          # (M,)
    weight = np.where(nats < hijack, 1.0, gate.weight(walks.guesses))                   # (M,)
    score = weight * np.exp(-nats) + (1 - weight) * walks.guesses.ppm
    return Scores(score, np.where(sizes > 0, 0.0, -walks.nats))


def normalised(walks: Walks, gate: Gate) -> Scores:
    """The mixture among the bytes that can follow at each node; it sums to 1 over all tokens.

    Whether the token ends is left to the model: PPM knows bytes, not where tokens are cut.
    """
    guesses, weight = walks.guesses, gate.weight(walks.guesses)
    mixed = weight * walks.child + (1 - weight) * guesses.ppm / guesses.mass            # (M,)
    return Scores(walks.stay * mixed, walks.rest)


# ------------------------------------------------------------------------------------------------
# Masses: the sum of a score over all possible continuations
# ------------------------------------------------------------------------------------------------

class Context(NamedTuple):
    """One sampled context: the tokens that can follow it, and both models' odds of them."""
    trie: Trie
    log_probs: Tensor           # (V,) float64, the model's, on the host
    guesses: Guesses            # (N,) from `explore`


def all_walks(context: Context) -> Walks:
    """The walks to every token of the vocabulary."""
    trie, V = context.trie, len(context.trie.strings)
    log_probs = context.log_probs[None].to(trie.padded.device)         # (1, V)
    odds = walk_odds(trie, log_probs, torch.arange(V, device=log_probs.device))
    nats, rest, stay, child = (x.cpu().numpy() for x in odds)
    real = np.arange(stay.shape[1]) < trie.sizes[:, None]                               # (V, L)
    path = trie.padded.cpu().numpy()                                                    # (V, L + 1)
    node, kid = path[:, :-1][real], path[:, 1:][real]                                   # (M,) each
    ppm, mass, confidence = context.guesses
    guesses = Guesses(ppm[kid], mass[node], confidence[node])
    return Walks(trie.sizes, nats, rest, stay[real], child[real], guesses)


def masses(form: Callable, gate: Gate, context: Context) -> tuple[float, float]:
    """Sums of a form's scores over all tokens, and over all first bytes.

    A published byte score depends on the token that the byte turns out to belong to; a first byte
    counts with its mean score, weighted by the model's odds of the tokens that begin with it.
    """
    walks = all_walks(context)
    scores, sizes = form(walks, gate), walks.sizes
    over_tokens = np.exp(-scores.nats(sizes)).sum()
    begun = sizes > 0
    first = np.array([s[0] for s in context.trie.strings if s], int)                    # (v,)
    odds = np.exp(-walks.nats[begun])                                                   # (v,)
    score = scores.bytes[(np.cumsum(sizes) - sizes)[begun]]                             # (v,)
    weights = np.bincount(first, odds, 256)                                             # (256,)
    means = np.bincount(first, odds * score, 256)[weights > 0] / weights[weights > 0]
    over_bytes = means.sum() + np.exp(scores.rest[~begun]).sum()
    return float(over_tokens), float(over_bytes)


def all_masses(form: Callable, gate: Gate, contexts: list[Context]) -> np.ndarray:
    """`masses` of a form in each context, (S, 2)."""
    return np.array([masses(form, gate, context) for context in contexts])


# ------------------------------------------------------------------------------------------------
# Command line: one pass of the model, one of PPM, and a table
# ------------------------------------------------------------------------------------------------

HIJACK_NATS = 0.277         # of the realised byte; 0.40 bits, as #1858's third version has it
HEADER = ("| variant | valid? | bits per byte | mass over the vocabulary: min / mean / max "
          "| mass over the next byte | seconds |\n|---|---|--:|--:|--:|--:|")
NO_HEADLINE = ("An experiment: nothing in this table can become the headline of a submission, the "
               "normalised row included; the headline is the score in the log of train_gpt.py.")


class Form(NamedTuple):
    """A way to score tokens."""
    name: str
    verdict: str
    score: Callable             # (Walks, Gate) -> Scores


class Row(NamedTuple):
    """The results of a form."""
    form: Form
    bpb: float
    masses: np.ndarray          # (S, 2) see `masses`
    seconds: float

    def line(self) -> str:
        """This row of the table."""
        tokens, first = (
            f"{x.min():.4f} / {x.mean():.4f} / {x.max():.4f}" for x in self.masses.T)
        return (f"| {self.form.name} | {self.form.verdict} | {self.bpb:.5f} | {tokens} | {first} "
                f"| {self.seconds:.1f} |")


def forms(ttt: bool, hijack: float) -> list[Form]:
    """The rows of the table but for their numbers, the plain neural score first."""
    gated = functools.partial(published, hijack=hijack)
    return [Form(f"neural score, {'test-time training' if ttt else 'frozen weights'}",
                 "yes", neural),
            Form("byte mixture of #1858, p^(1/n) for each byte",
                 "INVALID: its scores do not sum to 1", published),
            Form("the same with its anti-hijack gate",
                 "INVALID: the gate reads the target; scores do not sum to 1", gated),
            Form("normalised: mixed along the token trie", "sums to 1", normalised)]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raises console.Failure."""
    parser = console.Parser(prog="byte_mixture.py", description=__doc__)
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="model.golf of a run")
    add("--data-dir", default="data", help="as DATA_DIR of train_gpt.py (data)")
    add("--tokens", type=int, metavar="N", help="score the first N targets only (all of them)")
    add("--no-ttt", action="store_true", help="score frozen weights, without test-time training")
    add("--gate", nargs=3, type=float, default=Gate(), metavar=("LOW", "HIGH", "CONFIDENCE"),
        help="the model's weight where PPM is at least so confident, and its weight elsewhere "
        f"({' '.join(map(str, Gate()))})")
    add("--hijack", type=float, default=HIJACK_NATS, metavar="NATS",
        help=f"bound of the anti-hijack gate ({HIJACK_NATS})")
    add("--contexts", type=int, default=32, metavar="S", help="contexts whose mass is summed (32)")
    add("--report", type=Path, metavar="FILE", help="also write the output to this file")
    args = parser.parse_args(argv)
    if not all(0 <= value <= 1 for value in args.gate):
        parser.error(f"--gate {' '.join(map(str, args.gate))}: must be three numbers from 0 to 1")
    if not args.hijack >= 0:
        parser.error(f"--hijack {args.hijack}: must be 0 or more")
    if args.contexts < 1:
        parser.error(f"--contexts {args.contexts}: must be 1 or more")
    report = args.report
    if report and (report.exists() and not report.is_file() or not report.parent.is_dir()):
        parser.error(f"--report {report}: no file can be written there")
    return args


def open_stream(run: Run, tokenizer, most: int | None) -> Stream:
    """The validation stream, or the whole windows of its first `most` targets."""
    run.rt.clock.close_training_data()
    identity = train_gpt.check_data(replace(run.cfg, stages="eval"), run.rt)
    stream, T = train_gpt.open_validation(run, tokenizer, identity), run.cfg.seq_len
    if most is None:
        return stream
    if most < T:
        raise GolfError(f"--tokens {most}: must be {T} or more, which is one window")
    n = min(most // T * T, len(stream.bytes))
    return Stream(stream.tokens[:n + 1], stream.bytes[:n])


def timed(work, *args):
    """(result of `work`, seconds it took)."""
    started = time.perf_counter()
    return work(*args), time.perf_counter() - started


def neural_pass(run: Run, capture: Capture) -> float:
    """Bits per byte of the evaluation of `capture`'s stream, which fills `capture`."""
    with train_gpt.sdpa_backends(run.rt.dist):
        _, plan, learner = train_gpt.choose_scoring(run, capture.stream, run.cfg.ttt_enabled)
        tally = train_gpt.evaluate(capture, plan, learner)
    return train_gpt.report_score("neural", tally, run.rt, 0.0)[1]


def measure(run: Run, stream: Stream, alphabet: Alphabet, args) -> list[str]:
    """Lines of the report on `stream`, which the model scores once and PPM reads once."""
    n, gate = len(stream.bytes), Gate(*args.gate)
    samples = np.random.default_rng(0).permutation(n)[:args.contexts]                   # (S,)
    capture = Capture(run, stream, alphabet, samples)
    plain, seconds = timed(neural_pass, run, capture)
    (guesses, explored), ppm_seconds = timed(read_stream, alphabet, capture.text, samples)
    walks, contexts = capture.walks(guesses), capture.contexts(explored)
    rows, mass_seconds = [], 0.0
    for form in forms(run.cfg.ttt_enabled, args.hijack):
        bpb, mixing = timed(bits_per_byte, form.score, walks, gate)
        sums, summing = timed(all_masses, form.score, gate, contexts)
        rows.append(Row(form, bpb, sums, ppm_seconds + mixing))
        mass_seconds += summing
    # The first row is the evaluation's own number; the walks, of which the others are made, add up
    # to it but for the rounding of its fp32 logarithms.
    assert math.isclose(rows[0].bpb, plain, rel_tol=1e-4), (rows[0].bpb, plain)
    rows[0] = rows[0]._replace(bpb=plain, seconds=seconds)
    return [HEADER, *(row.line() for row in rows), "", NO_HEADLINE, "",
            *remarks(walks, gate, args, ppm_seconds, mass_seconds)]


def bits_per_byte(score: Callable, walks: Walks, gate: Gate) -> float:
    """Bits per byte that a form says it needs for all tokens of `walks`."""
    nats = score(walks, gate).nats(walks.sizes)                                         # (n,)
    return float(nats.sum() / math.log(2) / walks.sizes.sum())


def remarks(walks: Walks, gate: Gate, args, ppm_seconds: float, mass_seconds: float):
    """Lines below the table: the text, the constants and the speed."""
    size, guesses = int(walks.sizes.sum()), walks.guesses
    alone = -np.log2(guesses.ppm).sum() / size
    sure = (guesses.confidence >= gate.threshold).mean()
    return [
        f"{args.artifact}: {len(walks.sizes):,} targets, {size:,} bytes of text. The model weighs "
        f"{gate.low} where PPM is at least {gate.threshold} confident ({sure:.1%} of the bytes) "
        f"and {gate.high} elsewhere; the anti-hijack bound is {args.hijack} nats. PPM alone: "
        f"{alone:.5f} bits per byte. Masses are those of {args.contexts} contexts drawn at random.",
        "",
        "Seconds: the whole neural pass in the first row, in the others the time on top: "
        f"{ppm_seconds:.1f} s of PPM, once for all of them ({size / ppm_seconds:,.0f} bytes/s on "
        f"one core), and the mixing. The masses took {mass_seconds:.1f} s beside that."]


def report(args: argparse.Namespace) -> str:
    """The report that the command line asks for, as Markdown."""
    run, coder, _ = open_artifact(args.artifact, args.data_dir)
    if args.no_ttt:
        run = run._replace(cfg=replace(run.cfg, ttt_enabled=False))
    if run.cfg.ttt_enabled and run.cfg.ttt_documents:
        raise GolfError(f"{args.artifact}: its documents learn one by one, and only windows are "
                        "mixed here; add --no-ttt")
    stream = open_stream(run, coder.tokenizer, args.tokens)
    return "\n".join(measure(run, stream, read_alphabet(coder.tokenizer), args)) + "\n"


def work(argv: list[str] | None) -> int:
    """Print the report, and write it to a file if one is named."""
    args = arguments(argv)
    text = report(args)
    print(text, end="")
    if args.report:
        console.write_atomic(args.report, [text.encode(errors="surrogateescape")])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; exit code 0 success, 2 bad input, explained in one line."""
    return console.run("byte_mixture", lambda: work(argv), GolfError)


if __name__ == "__main__":
    sys.exit(main())
