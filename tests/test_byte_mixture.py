"""experiments/byte_mixture.py against slow, obvious references, and what makes a score valid.

Run alone: python -m pytest -q tests/test_byte_mixture.py
"""
import copy
import math
import os
import re
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, QuietLog, stirred
from hypothesis import given, settings
from hypothesis import strategies as st

import submit
import train_gpt
from train_gpt import Stream

sys.path.insert(0, str(ROOT / "experiments"))

import byte_mixture as bm  # noqa: E402
from byte_mixture import PPM, Alphabet, Context, Gate, Trie  # noqa: E402

few = settings(max_examples=60, deadline=None)
texts = st.text("ab c", max_size=60).map(str.encode)
pieces = st.text("ab c", max_size=4).map(str.encode)
vocabularies = st.lists(pieces, min_size=1, max_size=12).filter(any)
gates = st.builds(Gate, *[st.floats(0, 1)] * 3)
MODEL_ONLY = Gate(1.0, 1.0, 0.0)


# ------------------------------------------------------------------------------------------------
# The slow way
# ------------------------------------------------------------------------------------------------

def slow_ppm(text: bytes) -> tuple[list[float], float]:
    """(PPM's probability of every byte after `text`, its confidence), by searching the text."""
    probs, confidence, escape, seen = [0.0] * 256, None, 1.0, set()
    for k in range(min(5, len(text)), -1, -1):
        context = text[len(text) - k:]
        counts = Counter(text[i + k] for i in range(len(text) - k) if text[i:i + k] == context)
        if not counts:
            continue
        denominator = counts.total() + len(counts)
        if confidence is None:
            confidence = max(counts.values()) / denominator
        for byte in counts.keys() - seen:
            probs[byte] = escape * counts[byte] / denominator
        seen |= counts.keys()
        escape *= len(counts) / denominator
    for byte in set(range(256)) - seen:
        probs[byte] = escape / 256
    return probs, confidence or 0.0


def slow_weight(gate: Gate, text: bytes) -> float:
    """The model's weight after `text`."""
    return gate.low if slow_ppm(text)[1] >= gate.threshold else gate.high


def slow_published(strings, probs, token: int, text: bytes, gate: Gate, hijack=0.0) -> float:
    """Score of a token after `text` by #1858's recipe, byte by byte."""
    string, score = strings[token], 1.0
    if not string:
        return probs[token]
    share = probs[token] ** (1 / len(string))
    for k, byte in enumerate(string):
        weight = 1.0 if -math.log(share) < hijack else slow_weight(gate, text + string[:k])
        score *= weight * share + (1 - weight) * slow_ppm(text + string[:k])[0][byte]
    return score


def slow_normalised(strings, probs, token: int, text: bytes, gate: Gate) -> float:
    """Score of a token after `text` by the walk, each node by enumerating every token."""
    string, score = strings[token], 1.0

    def total(prefix: bytes, proper: bool) -> float:
        """The model's probability of all tokens that go on from, or are, `prefix`."""
        return sum(p for s, p in zip(strings, probs)
                   if s.startswith(prefix) and not (proper and s == prefix))
    for k in range(len(string)):
        prefix, weight = string[:k], slow_weight(gate, text + string[:k])
        going_on = total(prefix, proper=True)
        allowed = {s[k] for s in strings if s.startswith(prefix) and len(s) > k}
        ppm = slow_ppm(text + prefix)[0]
        child = total(string[:k + 1], proper=False) / going_on
        guess = ppm[string[k]] / sum(ppm[byte] for byte in allowed)
        score *= going_on / total(prefix, False) * (weight * child + (1 - weight) * guess)
    return score * probs[token] / total(string, False)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def odds_of(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    """Random probabilities of `size` tokens; the larger `spread`, the farther apart."""
    logits = np.random.default_rng(seed).normal(size=size) * spread
    return np.exp(logits) / np.exp(logits).sum()


def context_of(strings: list[bytes], probs: np.ndarray, text: bytes) -> Context:
    """The context after `text` of a model that gives `probs` to tokens of these strings."""
    model, trie = PPM(), Trie(strings)
    for byte in text:
        model.push(byte)
    return Context(trie, torch.from_numpy(np.log(probs)), bm.explore(model, trie))


def scores_of(form, gate: Gate, context: Context) -> np.ndarray:
    """Score of every token of the vocabulary."""
    walks = bm.all_walks(context)
    return np.exp(-form(walks, gate).nats(walks.sizes))


@pytest.fixture(scope="module")
def toy_tokenizer(toy_data):
    """The toy corpus' tokenizer."""
    from sentencepiece import SentencePieceProcessor
    return SentencePieceProcessor(model_file=str(next((toy_data / "tokenizers").iterdir())))


@pytest.fixture(scope="module")
def alphabet(toy_tokenizer) -> Alphabet:
    """The toy tokenizer's alphabet."""
    return bm.read_alphabet(toy_tokenizer)


def toy_stream(cfg, tokenizer, n: int) -> Stream:
    """The first n targets of the toy validation text."""
    path = next(cfg.dataset_dir.glob("*_val_*.bin"))
    tokens = np.array(train_gpt.read_shard(path).tokens[:n + 1])
    sizes = train_gpt.bytes_per_target(tokens, tokenizer)
    return Stream(torch.from_numpy(tokens.astype(np.int32)), torch.from_numpy(sizes))


def evaluate(run, scorer: train_gpt.Scorer, learn: bool) -> train_gpt.Tally:
    """The tally of a pass over sliding windows, with or without test-time training."""
    _, plan, learner = train_gpt.choose_scoring(run, scorer.stream, learn)
    return train_gpt.evaluate(scorer, plan, learner)


def captured(run, data: Stream, alphabet: Alphabet, learn: bool, samples=(3, 70, 8)):
    """(tally, walks, contexts) of a pass over `data`."""
    samples = np.array(samples)
    capture = bm.Capture(run, data, alphabet, samples)
    tally = evaluate(run, capture, learn)
    guesses, explored = bm.read_stream(alphabet, capture.text, samples)
    return tally, capture.walks(guesses), capture.contexts(explored)


# ------------------------------------------------------------------------------------------------
# Alphabet
# ------------------------------------------------------------------------------------------------

@few
@given(strings=vocabularies)
def test_trie_holds_what_it_says(strings):
    """From a node on lie all tokens that begin with its prefix; those equal to it end there."""
    trie, N = Trie(strings), len({s[:k] for s in strings for k in range(len(s) + 1)})
    members = trie.members.to_dense()
    assert members.shape == (2 * N, len(strings))
    prefixes = {node: s[:k] for s, path in zip(strings, trie.paths) for k, node in enumerate(path)}
    assert sorted(prefixes) == list(range(N)) and prefixes[0] == b""
    for node, prefix in prefixes.items():
        begins = [s.startswith(prefix) for s in strings]
        assert members[node].tolist() == begins
        assert members[N + node].tolist() == [b and s != prefix for b, s in zip(begins, strings)]
        assert {prefixes[kid] for kid in trie.kids[node].values()} == {
            s[:len(prefix) + 1] for s in strings if s.startswith(prefix) and s != prefix}


def test_bytes_are_those_of_the_text(cfg, toy_tokenizer, alphabet):
    """Strings of the targets, one after the other, are the text that the tokenizer decodes."""
    data = toy_stream(cfg, toy_tokenizer, 1400)
    text = bm.read_text(alphabet, data)
    found = [alphabet.tries[a].strings[t] for t, a in zip(text.tokens.tolist(), text.after)]
    bos = np.flatnonzero(text.tokens == toy_tokenizer.bos_id())
    assert len(bos) > 5
    for first, last in zip(bos, bos[1:]):
        ids = text.tokens[first:last].tolist()
        assert b"".join(found[first:last]).decode() == toy_tokenizer.decode(ids)


def test_every_token_has_a_place(toy_tokenizer, alphabet):
    """Control pieces end at the root; a byte piece ends where the letter of that byte does."""
    for trie in alphabet.tries:
        assert trie.members.to_dense()[0].tolist() == [1] * toy_tokenizer.vocab_size()
        assert trie.paths[toy_tokenizer.bos_id()] == [0]
        ids = [toy_tokenizer.piece_to_id(p) for p in ("<0x61>", "a")]
        assert trie.strings[ids[0]] == b"a" and trie.paths[ids[0]] == trie.paths[ids[1]]
    marked = toy_tokenizer.piece_to_id(train_gpt.WORD_MARK)
    assert [trie.strings[marked] for trie in alphabet.tries] == [b" ", b""]


# ------------------------------------------------------------------------------------------------
# PPM
# ------------------------------------------------------------------------------------------------

@few
@given(text=texts, children=st.sets(st.sampled_from(b"ab cxyz\0"), min_size=1))
def test_ppm_equals_a_search_of_the_text(text, children):
    """After any text, probabilities of any set of bytes and the confidence are the slow ones."""
    model = PPM()
    for byte in text:
        model.push(byte)
    probs, confidence = slow_ppm(text)
    found = {b: scale * counts[b] for scale, counts, part in model.spread(children) for b in part}
    assert found == pytest.approx({b: probs[b] for b in children}, rel=1e-12)
    assert model.confidence() == confidence
    assert sum(probs) <= 1 + 1e-12


@few
@given(text=texts, more=texts)
def test_pop_forgets(text, more):
    """Bytes read and forgotten leave the model as it was, to the last count."""
    model = PPM()
    for byte in text:
        model.push(byte)
    before = copy.deepcopy(vars(model))
    for pushed in reversed([model.push(byte) for byte in more]):
        model.pop(pushed)
    assert vars(model) == before
    assert all(a is b for a, b in zip(model.now, (
        table.get(model.history & mask) for table, mask in zip(model.tables, model.masks))))


def test_guesses_equal_the_slow_ones(cfg, toy_tokenizer, alphabet):
    """Along a real text: each byte's probability, that of all bytes allowed there, confidence."""
    text = bm.read_text(alphabet, toy_stream(cfg, toy_tokenizer, 150))
    guesses, (explored,) = bm.read_stream(alphabet, text, np.array([120]))
    past, at = b"", 0
    for t, (token, after) in enumerate(zip(text.tokens.tolist(), text.after.tolist())):
        trie = alphabet.tries[after]
        if t == 120:
            check_explored(explored, trie, past)
        for node, byte in zip(trie.paths[token], trie.strings[token]):
            probs, confidence = slow_ppm(past)
            want = probs[byte], sum(probs[b] for b in trie.kids[node]), confidence
            assert [x[at] for x in guesses] == pytest.approx(want, rel=1e-12)
            past, at = past + bytes([byte]), at + 1
    assert at == len(guesses.ppm) and past.count(b" ") > 20


def check_explored(found: bm.Guesses, trie: Trie, past: bytes):
    """Fail unless guesses for every tenth walk of a trie are the slow ones."""
    for string, path in list(zip(trie.strings, trie.paths))[::10]:
        for k, (node, kid) in enumerate(zip(path, path[1:])):
            probs, confidence = slow_ppm(past + string[:k])
            want = probs[string[k]], sum(probs[b] for b in trie.kids[node]), confidence
            assert (found.ppm[kid], found.mass[node], found.confidence[node]) == pytest.approx(
                want, rel=1e-12)


# ------------------------------------------------------------------------------------------------
# Mixtures
# ------------------------------------------------------------------------------------------------

@few
@given(strings=vocabularies, text=texts, gate=gates, hijack=st.sampled_from([0.0, 0.277, 2.0]))
def test_forms_equal_the_slow_ones(strings, text, gate, hijack):
    """Every token of any vocabulary in any context: both forms are what their words say."""
    probs = odds_of(len(strings), len(text))
    context = context_of(strings, probs, text)
    for form, slow in (
            (partial(bm.published, hijack=hijack), partial(slow_published, hijack=hijack)),
            (bm.normalised, slow_normalised)):
        want = [slow(strings, probs, t, text, gate) for t in range(len(strings))]
        np.testing.assert_allclose(scores_of(form, gate, context), want, rtol=1e-9)


@few
@given(strings=vocabularies, text=texts, gate=gates, spread=st.floats(0, 20))
def test_normalised_scores_sum_to_one(strings, text, gate, spread):
    """Whatever vocabulary, text, gate and model: 1 over all tokens, and 1 over the next byte."""
    context = context_of(strings, odds_of(len(strings), len(text), spread), text)
    assert bm.masses(bm.normalised, gate, context) == pytest.approx((1, 1), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(text=st.text("the modl\n", max_size=40), gate=gates, which=st.integers(0, 1))
def test_a_real_vocabulary_sums_to_one(alphabet, text, gate, which):
    """All 320 pieces of a SentencePiece vocabulary, bytes and control pieces included, add to 1."""
    strings = alphabet.tries[which].strings
    context = context_of(strings, odds_of(len(strings), len(text)), text.encode())
    assert bm.masses(bm.normalised, gate, context) == pytest.approx((1, 1), abs=1e-9)
    assert bm.masses(bm.neural, gate, context) == pytest.approx((1, 1), abs=1e-9)


@few
@given(strings=vocabularies, text=texts, spread=st.floats(0, 12))
def test_without_ppm_the_walk_is_the_model(strings, text, spread):
    """With all weight on the model the walk multiplies to p(token) exactly, for every token."""
    probs = odds_of(len(strings), len(text), spread)
    context = context_of(strings, probs, text)
    for form in (bm.neural, bm.normalised, bm.published):
        np.testing.assert_allclose(scores_of(form, MODEL_ONLY, context), probs, rtol=1e-9)


def test_improbable_tokens_survive():
    """Probabilities far below what sums near 1 can resolve still come out exactly."""
    strings = [b"", b"a", b"ab", b"abc", b"b", b"abcd"]
    probs = np.array([1 - 1e-9, 1e-9, 1e-20, 1e-25, 1e-26, 1e-24])
    context = context_of(strings, probs, b"abab")
    np.testing.assert_allclose(scores_of(bm.normalised, MODEL_ONLY, context), probs, rtol=1e-9)
    for gate in (Gate(), Gate(0, 0, 0)):
        assert bm.masses(bm.normalised, gate, context) == pytest.approx((1, 1), abs=1e-9)


def test_even_spread_gives_first_bytes_too_much():
    """Tokens ab, cd and e of 1/4, 1/4 and 1/2: p^(1/n) gives each first byte 1/2, 1.5 in all."""
    context = context_of([b"ab", b"cd", b"e"], np.array([0.25, 0.25, 0.5]), b"")
    assert bm.masses(bm.published, MODEL_ONLY, context) == pytest.approx((1.0, 1.5))
    assert bm.masses(bm.normalised, MODEL_ONLY, context) == pytest.approx((1.0, 1.0))


def test_published_scores_exceed_one():
    """Where PPM is sure of a text, it pays a token and the tokens it begins with, all at once."""
    strings = [b"a", b"ab", b"abc", b"abca"]
    context = context_of(strings, np.full(4, 0.25), b"abc" * 40)
    for form in (bm.published, partial(bm.published, hijack=bm.HIJACK_NATS)):
        assert bm.masses(form, Gate(), context)[0] > 3
    assert bm.masses(bm.normalised, Gate(), context)[0] == pytest.approx(1)


# ------------------------------------------------------------------------------------------------
# A pass over a stream
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("learn", [False, True])
def test_a_pass_is_the_evaluation(cfg, make_run, toy_tokenizer, alphabet, learn):
    """Capturing moves no score; walks add up to the evaluation, target by target and in all."""
    data = toy_stream(cfg, toy_tokenizer, 544)
    run = stirred(make_run(cfg))
    plain = evaluate(run, train_gpt.Scorer(cfg, run.rt, run.forward, data), learn)
    run = stirred(make_run(cfg))
    tally, walks, contexts = captured(run, data, alphabet, learn)
    assert torch.equal(tally.sums, plain.sums) and tally.times_scored(run.rt.dist) == (1, 1)
    for form, gate in ((bm.neural, Gate()), (bm.normalised, MODEL_ONLY)):
        nats = form(walks, gate).nats(walks.sizes)
        np.testing.assert_allclose(nats, walks.nats, rtol=1e-9, atol=1e-9)
        assert bm.bits_per_byte(form, walks, gate) == pytest.approx(
            plain.total(run.rt.dist)[1], rel=1e-6)
    for t, context in zip((3, 70, 8), contexts):
        assert -context.log_probs[data.tokens[t + 1]] == pytest.approx(walks.nats[t])
        assert bm.masses(bm.normalised, Gate(), context) == pytest.approx((1, 1), abs=1e-9)


@pytest.mark.parametrize("shuffled", [False, True])
def test_sampled_contexts_are_those_of_the_stream(cfg, make_run, toy_tokenizer, alphabet, shuffled):
    """A sampled context gives the token that came the very score that the stream gives it."""
    data, run = toy_stream(cfg, toy_tokenizer, 96), stirred(make_run(cfg))
    if shuffled:
        data = with_documents_anywhere(data, toy_tokenizer)
    samples = range(0, 96, 3)
    _, walks, contexts = captured(run, data, alphabet, False, samples)
    for form in (bm.published, partial(bm.published, hijack=5.0), bm.normalised):
        nats = form(walks, Gate(threshold=0.5)).nats(walks.sizes)
        for t, context in zip(samples, contexts):
            score = scores_of(form, Gate(threshold=0.5), context)[data.tokens[t + 1]]
            assert -math.log(score) == pytest.approx(nats[t], rel=1e-9)


def with_documents_anywhere(data: Stream, tokenizer) -> Stream:
    """The stream with every third token a BOS, so that marked pieces follow some of them."""
    tokens = data.tokens.clone()
    tokens[::3] = tokenizer.bos_id()
    pieces = [tokenizer.id_to_piece(t) for t in tokens[1::3].tolist()]
    assert sum(p.startswith(train_gpt.WORD_MARK) for p in pieces) > 3
    sizes = train_gpt.bytes_per_target(tokens.numpy(), tokenizer)
    return Stream(tokens, torch.from_numpy(sizes))


def test_nothing_reads_ahead(cfg, make_run, toy_tokenizer, alphabet):
    """Editing a token moves no earlier score, nor how the model and PPM are weighed for it."""
    data, gate = toy_stream(cfg, toy_tokenizer, 320), Gate(threshold=0.5)

    def scored(tokens):
        """(nats of each target, weight at each target's first byte, sizes), learning on the way."""
        sizes = train_gpt.bytes_per_target(tokens.numpy(), toy_tokenizer)
        edited = Stream(tokens, torch.from_numpy(sizes))
        _, walks, _ = captured(stirred(make_run(cfg)), edited, alphabet, True)
        at = np.cumsum(walks.sizes) - walks.sizes
        return (bm.normalised(walks, gate).nats(walks.sizes),
                np.append(gate.weight(walks.guesses), 0)[at], walks.sizes)
    nats, weights, sizes = scored(data.tokens)
    assert 0 < (weights == gate.low).mean() < 1
    for t in (1, 40, 255, 257, 319):
        tokens = data.tokens.clone()
        tokens[t + 1:] = torch.randint(262, 320, tokens[t + 1:].shape, dtype=torch.int32)
        other = scored(tokens)
        np.testing.assert_array_equal(other[0][:t], nats[:t])
        assert (other[0][t:] != nats[t:]).any()
        both = (other[2][:t + 1] > 0) & (sizes[:t + 1] > 0)         # a weight needs a byte
        np.testing.assert_array_equal(other[1][:t + 1][both], weights[:t + 1][both])


def test_the_gate_closes_at_its_threshold():
    """A context that was followed 9 times by one byte is 0.9 confident: exactly enough."""
    context = context_of([b"a", b"b"], np.array([0.5, 0.5]), b"a" * 14)
    assert context.guesses.confidence[0] == 0.9
    assert set(Gate().weight(bm.all_walks(context).guesses)) == {0.05}
    assert set(Gate(threshold=0.91).weight(bm.all_walks(context).guesses)) == {0.9}


def test_the_anti_hijack_gate_reads_the_target():
    """In one context its choice between model and PPM is another for another token."""
    context = context_of([b"a", b"b"], np.array([0.9, 0.1]), b"ab" * 9)
    walks = bm.all_walks(context)
    assert len(set(Gate().weight(walks.guesses))) == 1
    free, gated = (scores_of(form, Gate(), context) for form in (
        bm.published, partial(bm.published, hijack=bm.HIJACK_NATS)))
    assert gated[0] == pytest.approx(0.9) and free[0] != pytest.approx(0.9)
    assert gated[1] == free[1]


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(toy_data, tmp_path_factory):
    """(folder of a run of the toy, its scores by name)."""
    folder, log = tmp_path_factory.mktemp("run"), QuietLog()
    cfg = train_gpt.Config(**{**TINY, "data_dir": str(toy_data), "out_dir": str(folder),
                              "run_id": "toy"})
    run = train_gpt.build_run(cfg, train_gpt.Dist({}), log)
    identity = train_gpt.check_data(cfg, run.rt)
    train_gpt.quantize_stage(run, *train_gpt.train_stage(run, identity), identity)
    train_gpt.eval_stage(run, {}, identity)
    return folder, {values["name"]: values["val_bpb"] for values in log.of("eval")}


def command(capsys, *args) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the script."""
    return bm.main(list(map(str, args))), *capsys.readouterr()


@pytest.mark.parametrize("ttt", [True, False])
def test_the_table_holds_the_score_of_the_log(finished, toy_data, capsys, ttt):
    """The first row is the score that train_gpt.py logged; the others carry their verdicts."""
    folder, scores = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    artifact, report = folder / "runs/toy/model.golf", folder / "report.md"
    code, out, err = command(capsys, artifact, "--data-dir", toy_data, "--contexts", 4,
                             "--report", report, *([] if ttt else ["--no-ttt"]))
    assert (code, err, report.read_text()) == (0, "", out)
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[1].partition(":")[0] for row in rows] == [
        "valid?", "yes", "INVALID", "INVALID", "sums to 1"]
    assert rows[1][2] == f"{scores['ttt' if ttt else 'sliding']:.5f}"
    assert rows[1][3] == rows[4][3] == rows[4][4] == "1.0000 / 1.0000 / 1.0000"
    assert "nothing in this table can become the headline" in out
    report.unlink()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_submit_takes_no_score_from_a_report(finished, toy_data, capsys):
    """The report is no log: submit.py rejects it."""
    folder, _ = finished
    report = folder / "table.txt"
    command(capsys, folder / "runs/toy/model.golf", "--data-dir", toy_data, "--no-ttt",
            "--tokens", 70, "--contexts", 1, "--report", report)
    assert " 64 targets" in report.read_text()
    assert submit.main([str(report)]) == 2
    assert re.fullmatch("submit: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("args, complaint", [
    ([], "ARTIFACT"), (["none.golf"], "none.golf: no such file"),
    (["x", "--gate", "1", "2", "0"], "--gate 1.0 2.0 0.0"), (["x", "--hijack", "-1"], "--hijack"),
    (["x", "--contexts", "0"], "--contexts 0"), (["x", "--report", "no/where.md"], "no/where.md"),
    (["x", "--report", os.devnull], os.devnull),
    (["ARTIFACT", "--tokens", "31"], "--tokens 31: must be 32 or more"),
    (["ARTIFACT", "--data-dir", "nowhere"], "nowhere")])
def test_bad_input_is_rejected_in_one_line(finished, toy_data, capsys, args, complaint):
    """Exit code 2 and one line that names the argument or the file."""
    real = [str(finished[0] / "runs/toy/model.golf"), "--data-dir", str(toy_data)]
    args = [part for a in args for part in (real if a == "ARTIFACT" else [a])]
    code, out, err = command(capsys, *args)
    assert (code, out) == (2, "") and complaint in err
    assert re.fullmatch("byte_mixture: .*\n", err)


def test_an_artifact_whose_documents_learn_is_rejected(finished, toy_data, tmp_path, capsys):
    """Only windows are mixed, so the score of documents must be left out by name."""
    container = train_gpt.open_container(finished[0] / "runs/toy/model.golf", "artifact")
    tensors, path = container.tensors(container.layout), tmp_path / "model.golf"
    scoring = {**container.meta["scoring"], "ttt_documents": True, "ttt_chunk_tokens": 8}
    meta = {**container.meta, "scoring": scoring}
    path.write_bytes(b"".join(train_gpt.pack_tensors("artifact", meta, tensors, "range")))
    code, out, err = command(capsys, path, "--data-dir", toy_data)
    assert (code, out) == (2, "") and re.fullmatch("byte_mixture: .* add --no-ttt\n", err)
    code, out, err = command(capsys, path, "--data-dir", toy_data, "--no-ttt", "--contexts", 1)
    assert (code, err) == (0, "") and "sums to 1" in out
