"""use_artifact.py: text comes back from its code, and only where the predictions are honest.

Run alone: python -m pytest -q tests/test_use_artifact.py
"""
import gzip
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare_data
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, VOCAB, finish, prose, stirred
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
import use_artifact
from use_artifact import (HEADER, MAGIC, Header, Opened, Taste, TextCoder, UseError, compress,
                          decompress, digest, open_artifact, parse_code)

# Enough tokens to fill several chunks, and a pass in a millisecond: the decoder makes one a token.
SMALL = dict(
    seq_len=16, eval_stride=8, ttt_chunk_tokens=1024, ttt_lr=0.02, train_batch_tokens=512,
    iterations=60, matrix_lr=0.04, num_layers=2, loop_start=1, loop_end=1, xsa_last_n=1,
    parallel_residual_start=1, model_dim=32, num_heads=2, num_kv_heads=1)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def artifact(toy_data, tmp_path_factory) -> Path:
    """The artifact of a small model, trained for some steps and quantized by the program."""
    folder = tmp_path_factory.mktemp("use")
    cfg = train_gpt.Config(**{**TINY, **SMALL, "data_dir": str(toy_data), "out_dir": str(folder)})
    torch.manual_seed(0)
    run = train_gpt.start_run(cfg, train_gpt.Dist({}), use_artifact.Silence())
    train_gpt.quantize_stage(run, train_gpt.train_stage(run))
    return cfg.run_dir / train_gpt.FILE_NAMES["artifact"]


@pytest.fixture(scope="session")
def tokenizer(toy_data):
    """The toy corpus's tokenizer."""
    return train_gpt.load_tokenizer(train_gpt.Config(**TINY, data_dir=str(toy_data)))


@pytest.fixture(scope="session")
def pieces(tokenizer) -> TextCoder:
    """The lossless layer over the toy tokenizer."""
    return TextCoder(tokenizer)


@pytest.fixture(scope="session")
def fresh(artifact, toy_data):
    """A function that opens the artifact, as it is or with other settings of scoring."""
    def fresh(**scoring) -> Opened:
        run, tokenizer = open_artifact(artifact, str(toy_data))
        run = run._replace(cfg=replace(run.cfg, **scoring))
        return Opened(run, TextCoder(tokenizer), digest(artifact.read_bytes()))
    return fresh


@pytest.fixture
def cli(artifact, toy_data, capsys):
    """A function that runs `main` with the artifact: (exit code, stdout, stderr)."""
    def cli(command: str, *args, artifact=artifact, data=toy_data) -> tuple[int, str, str]:
        code = use_artifact.main([command, str(artifact), *map(str, args), "--data-dir", str(data)])
        return code, *capsys.readouterr()
    return cli


def refused(result: tuple[int, str, str], message: str = ""):
    """Assert exit code 2 and one line on stderr that matches `message`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("use_artifact: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    return True


def english(size: int, seed: int = 3) -> bytes:
    """`size` bytes of made-up prose, a line a document."""
    rng, text = np.random.default_rng(seed), b""
    while len(text) < size:
        text += prose(rng).encode() + b"\n"
    return text[:size]


def there_and_back(fresh, text: bytes, **scoring) -> bytes:
    """`text` compressed and decompressed, each by a fresh model."""
    blob = compress(fresh(**scoring), text).blob
    return decompress(fresh(**scoring), parse_code("code", blob))


def sealed(body: bytes) -> bytes:
    """A compressed file whose checksum is right, whatever its body says."""
    return MAGIC + digest(body) + body


def body_of(blob: bytes, **changes) -> bytes:
    """The body of a compressed file, fields of its header replaced."""
    body = blob[len(MAGIC) + 8:]
    header = Header(*HEADER.unpack(body[:HEADER.size]))._replace(**changes)
    return HEADER.pack(*header) + body[HEADER.size:]


# ------------------------------------------------------------------------------------------------
# Reading an artifact
# ------------------------------------------------------------------------------------------------

def test_the_artifact_alone_says_what_to_run(artifact, toy_data):
    """Model, scoring and weights are those of the run that wrote the artifact."""
    run, tokenizer = open_artifact(artifact, str(toy_data))
    theirs = train_gpt.Config(**{**TINY, **SMALL})
    for group in ("model", "scoring"):
        assert run.cfg.group(group) == theirs.group(group)
    assert not run.cfg.compile_enabled and not run.cfg.kernels_enabled      # they may change
    _, tensors = train_gpt.read_container(artifact, "artifact")
    weights = run.flat.data.clone()
    train_gpt.dequantize(tensors, run.flat)
    assert torch.equal(weights, run.flat.data)
    assert tokenizer.vocab_size() == run.cfg.vocab_size


def test_a_tokenizer_from_elsewhere(artifact, toy_data, tmp_path):
    """The tokenizer may be given by its path, without the dataset's folder."""
    path = next((toy_data / "tokenizers").iterdir())
    run, tokenizer = open_artifact(artifact, str(tmp_path), path)
    assert tokenizer.serialized_model_proto() == path.read_bytes()


def test_parameters_are_counted_before_a_model_is_built(make_cfg, make_run):
    """The count in advance is that of all that is large: matrices, embedding, tables."""
    for more in ({}, dict(bigram_buckets=64, bigram_dim=8, value_embed_dim=16)):
        run = make_run(make_cfg(**more))
        large = sum(math.prod(shape) for name, shape in run.flat.shapes.items()
                    if len(shape) == 2 and not re.search("mix|skip", name))
        assert use_artifact.num_parameters(run.cfg) == large


HOSTILE_META = {
    "no model": (lambda m: m.pop("model"), "model settings"),
    "no scoring": (lambda m: m.pop("scoring"), "scoring settings"),
    "model is a list": (lambda m: m.update(model=[1]), "model settings"),
    "a setting too few": (lambda m: m["model"].pop("num_heads"), "model settings"),
    "a setting too many": (lambda m: m["scoring"].update(x=1), "scoring settings"),
    "no dataset": (lambda m: m.pop("dataset"), "trained on"),
    "dataset is a number": (lambda m: m.update(dataset=7), "trained on"),
    "dataset is a path": (lambda m: m.update(dataset="/etc/passwd"), "trained on"),
    "dataset of two lines": (lambda m: m.update(dataset="toy\n\nroot: fine"), "trained on"),
    "text for a number": (lambda m: m["model"].update(num_layers="2"), "NUM_LAYERS='2': expected"),
    "a truth for a number": (lambda m: m["model"].update(num_layers=True), "NUM_LAYERS=True"),
    "a number for a truth": (lambda m: m["scoring"].update(ttt_enabled=1), "TTT_ENABLED=1"),
    "null": (lambda m: m["scoring"].update(ttt_lr=None), "TTT_LR=None"),
    "not a number": (lambda m: m["scoring"].update(ttt_lr=math.nan), "TTT_LR=nan"),
    "infinite": (lambda m: m["model"].update(rope_base=math.inf), "ROPE_BASE=inf"),
    "negative": (lambda m: m["model"].update(model_dim=-32), "MODEL_DIM=-32"),
    "whole beyond floats": (lambda m: m["scoring"].update(ttt_lr=10 ** 400), "TTT_LR=1000"),
    "endless layers": (lambda m: m["model"].update(num_layers=10 ** 9), "NUM_LAYERS=10000"),
    "endless learning": (lambda m: m["scoring"].update(ttt_epochs=10 ** 9), "TTT_EPOCHS=10000"),
    "odd length": (lambda m: m["model"].update(seq_len=17), "SEQ_LEN|EVAL_STRIDE"),
    "giant": (lambda m: m["model"].update(model_dim=1 << 14), "parameters in"),
    "large for its file": (lambda m: m["model"].update(model_dim=2048), "parameters in 10"),
    "other model": (lambda m: m["model"].update(num_layers=3), "damaged or no artifact"),
    "no meta": (lambda m: m.clear(), "trained on"),
}


@pytest.mark.parametrize("what", HOSTILE_META)
def test_hostile_settings_are_refused_in_one_line(artifact, tmp_path, cli, what):
    """Types, sizes and the listing of tensors are checked before anything is built or inflated."""
    change, message = HOSTILE_META[what]
    meta, tensors = train_gpt.read_container(artifact, "artifact")
    change(meta)
    path = tmp_path / "model.golf"
    path.write_bytes(b"".join(train_gpt.pack_tensors("artifact", meta, tensors, compress=True)))
    refused(cli("sample", artifact=path), message)


def test_weights_that_are_no_numbers_are_refused(artifact, tmp_path, cli):
    """An infinite scale is told when the artifact is read, not when its predictions fail."""
    meta, tensors = train_gpt.read_container(artifact, "artifact")
    tensors["tok_emb.scale"][3] = math.inf
    path = tmp_path / "model.golf"
    path.write_bytes(b"".join(train_gpt.pack_tensors("artifact", meta, tensors, compress=True)))
    refused(cli("sample", artifact=path), "no finite numbers")


def test_files_that_are_not_what_they_should_be(artifact, tmp_path, toy_data, cli):
    """A missing, damaged or wrong artifact, and a missing, wrong or damaged tokenizer."""
    data, path = artifact.read_bytes(), tmp_path / "model.golf"
    refused(cli("sample", artifact=tmp_path / "none"), "cannot be read")
    refused(cli("sample", artifact=tmp_path), "cannot be read")
    for damaged in (b"", data[:-1], data[:40], data[:900] + b"?" + data[901:], b"x" * 3000):
        path.write_bytes(damaged)
        refused(cli("sample", artifact=path), "damaged or no artifact")
    refused(cli("sample", artifact=artifact.with_name("checkpoint.golf")), "damaged or no artifact")
    refused(cli("sample", data=tmp_path), "no tokenizer")
    refused(cli("sample", "--tokenizer", tmp_path), "no tokenizer")
    refused(cli("sample", "--tokenizer", artifact), "not a SentencePiece model")
    other = tmp_path / "other.model"
    for size, message in ((310, "310 pieces"), (VOCAB, "not the tokenizer")):
        other.write_bytes(prepare_data.train_tokenizer([english(20000).decode()], size))
        refused(cli("sample", "--tokenizer", other), message)


# ------------------------------------------------------------------------------------------------
# Text and tokens
# ------------------------------------------------------------------------------------------------

NASTY = ["\n", "\r\n", " ", "  ", "\t", "\u2581", "\x00", "\ufeff", "\u00a0", "\u200b", "\ufb01",
         "e\u0301", "\u00e9", "\U0001f600", "\ufffd", "the", " the", "<s>", "</s>", "<0x0A>"]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode),
                 st.lists(st.sampled_from(NASTY), max_size=30).map(lambda x: "".join(x).encode()),
                 st.lists(st.sampled_from([t.encode() for t in NASTY]) | st.binary(max_size=2),
                          max_size=20).map(b"".join)))
@example(b"")
@example(bytes(range(256)) * 2)
@example("\u2581 \u2581\u2581x\u2581".encode())
@example(b"\xed\xa0\x80\xed\xb3\xbf\xf4\x90\x80\x80\xc0\xaf")       # surrogates, too far, too long
def test_any_bytes_come_back_from_their_tokens(pieces, data):
    """encode and decode are inverse for all bytes, and every token stands for at least one."""
    ids = pieces.encode(data)
    assert pieces.decode(ids) == data
    assert all(pieces.bytes[i] for i in ids) and len(ids) <= len(data)


def test_prose_costs_its_usual_tokens(pieces, tokenizer):
    """What SentencePiece would not change keeps its pieces; a line end costs one byte piece."""
    rng = np.random.default_rng(0)
    lines = [prose(rng) for _ in range(30)]
    assert all(pieces.encode(line.encode()) == tokenizer.encode(line) for line in lines)
    together = pieces.encode("\n".join(lines).encode())
    assert len(together) == sum(len(tokenizer.encode(line)) for line in lines) + len(lines) - 1


def test_one_odd_byte_does_not_spoil_the_rest(pieces):
    """Raw bytes cost one token each, and the text around them what it costs without them."""
    text = english(400)
    for odd in (b"\xff", b"\xe2\x96\x81", b"\xf0\x9f\x98"):
        assert len(pieces.encode(text + odd + text)) == 2 * len(pieces.encode(text)) + len(odd)


def test_a_tokenizer_that_loses_text_is_corrected(tokenizer):
    """Whatever pieces SentencePiece answers with, a part that they do not spell is spelled."""
    pieces, text = TextCoder(tokenizer), english(200)
    for answer in ([], [tokenizer.unk_id()], [300, 301]):
        pieces.pieces = SimpleNamespace(encode=lambda part, answer=answer: answer)
        assert pieces.decode(pieces.encode(text)) == text


def test_a_tokenizer_without_byte_pieces_is_refused():
    """Without a piece for every byte some text could not be spelled."""
    model = prepare_data.io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([english(4000).decode()]), model_writer=model, vocab_size=60,
        **{**prepare_data.TOKENIZER_SETTINGS, "byte_fallback": False})
    with pytest.raises(train_gpt.DataError, match="has 0 byte pieces; 256 are"):
        TextCoder(prepare_data.load_tokenizer(model.getvalue()))


# ------------------------------------------------------------------------------------------------
# Predictions: what an encoder sees that a decoder does not must not matter
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    {}, dict(seq_len=256, eval_stride=64, train_batch_tokens=256),
    dict(model_dim=128, bigram_buckets=50, smear_enabled=True, value_embed_dim=16)])
def test_unknown_tokens_do_not_reach_earlier_bits(make_cfg, make_run, more):
    """Features of a prefix are bit for bit the same, whatever stands behind it in the window."""
    run = stirred(make_run(make_cfg(**more)))
    T, rng = run.cfg.seq_len, np.random.default_rng(0)
    with use_artifact.repeatable(run), torch.no_grad():
        features = use_artifact.Features(run)
        window = torch.from_numpy(rng.integers(run.cfg.vocab_size, size=T))
        whole = features(window).clone()
        for known in {1, 2, T - 1, *rng.integers(1, T, size=12).tolist()}:
            blind = window.clone()
            blind[known:] = use_artifact.FILLER
            found = features(blind)
            assert torch.equal(found[:known], whole[:known])
            assert not torch.equal(found[known:], whole[known:])


def test_an_encoder_that_sees_no_further_writes_the_same_code(fresh, monkeypatch):
    """One pass a window and one pass a target, as the decoder needs, give one code."""
    text = english(4000)
    quick = compress(fresh(), text).blob
    monkeypatch.setattr(use_artifact.Encoder, "blind", True)
    assert compress(fresh(), text).blob == quick


def test_settings_of_torch_are_left_as_they_were(make_run, cfg):
    """Deterministic algorithms are asked for while coding, and no longer."""
    run = make_run(cfg)
    with pytest.raises(ValueError), use_artifact.repeatable(run):
        assert torch.are_deterministic_algorithms_enabled()
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------
# There and back
# ------------------------------------------------------------------------------------------------

def test_a_long_text_comes_back_and_costs_its_score(fresh, artifact, capsys):
    """30,000 bytes over chunks that are learnt from: the code is as long as the score says."""
    text = english(30_000)          # so long that the code's last word of 32 bits is in the bound
    found = use_artifact.measure(fresh, text)
    chunks = len(found.coded.tokens) / SMALL["ttt_chunk_tokens"]
    assert chunks > 4 and not found.problem
    assert abs(found.excess) < 0.001 * found.bits
    assert use_artifact.report(found, artifact) == 0
    out = capsys.readouterr().out
    assert re.search(r"decodes +yes +byte for byte", out) and "fine" in out
    assert re.search(rf"gzip -9 +{len(gzip.compress(text, 9)):,} bytes", out)
    assert re.search(rf"model.golf +{artifact.stat().st_size:,} bytes", out)
    # Learning pays here, so that a code this short cannot come from frozen weights.
    frozen = len(compress(fresh(ttt_enabled=False), text).blob)
    assert len(found.coded.blob) < 0.99 * frozen


def test_without_learning(fresh):
    """An artifact that is scored frozen codes with frozen weights."""
    text = english(3000)
    opened = fresh(ttt_enabled=False)
    weights = opened.run.flat.data.clone()
    blob = compress(opened, text).blob
    assert torch.equal(opened.run.flat.data, weights)
    assert decompress(fresh(ttt_enabled=False), parse_code("code", blob)) == text


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 24, 25, 31, 32, 33])
def test_every_place_where_a_window_may_end(fresh, size):
    """Texts of one token a byte that end within, at and after the first windows."""
    text = b"\n" * size
    assert there_and_back(fresh, text, ttt_chunk_tokens=16) == text


@settings(max_examples=20, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
def test_any_bytes_come_back_from_their_code(fresh, data):
    """Random bytes, which no model expects, come back as well."""
    assert there_and_back(fresh, data, ttt_chunk_tokens=32) == data


@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_the_evaluation_leaves_padding_out(fresh, count):
    """Batches of windows give the nats that the coder gives one by one, padding not counted."""
    opened = fresh(ttt_chunk_tokens=32)
    ids = [opened.text.spelling[b"?"]] * count
    tokens = use_artifact.stream_of(opened.run, opened.text.bos, ids, count)
    with use_artifact.repeatable(opened.run):
        coder = use_artifact.Encoder(opened.run, tokens, count, lambda done: None)
        tally = train_gpt.eval_chunks(opened.run, coder, learn=True)
    nats, targets, _ = tally.sums.tolist()
    bits, floored = use_artifact.evaluation_bits(
        fresh(ttt_chunk_tokens=32).run, opened.text.bos, ids)
    assert targets == count and bits * math.log(2) == pytest.approx(nats, rel=1e-4)
    assert floored < bits                                   # these tokens are rare
    assert 0 <= 32 * len(coder.queue.get_compressed()) - floored < 0.001 * floored + 64


def test_noise_costs_no_more_than_the_coder_can_charge(fresh):
    """Bytes held for impossible: the score has no bounds, the code keeps within its floor."""
    found = use_artifact.measure(fresh, np.random.default_rng(0).bytes(800))
    assert found.close and not found.problem
    assert found.floored < 0.995 * found.bits
    assert found.floored <= use_artifact.FIXED_BITS * len(found.coded.tokens)


def test_padding_is_never_learnt_from(fresh, monkeypatch):
    """The fill behind the text lies in the last chunk, and `adapt` sees the earlier ones only."""
    seen, adapt = [], train_gpt.adapt
    monkeypatch.setattr(train_gpt, "adapt", lambda run, tokens, *rest: (
        seen.append(tokens.clone()), adapt(run, tokens, *rest)))
    for size, learnt_chunks in ((32, 0), (64, 1), (65, 2), (80, 2), (96, 2)):
        seen.clear()
        opened = fresh(ttt_chunk_tokens=32)
        ids = compress(opened, b"\n" * size).tokens
        assert len(seen) == learnt_chunks * opened.run.cfg.ttt_epochs
        known = torch.tensor([opened.text.bos, *ids])
        for i, tokens in enumerate(seen):
            first = 32 * (i // opened.run.cfg.ttt_epochs)
            assert tokens.tolist() == known[first:first + 33].tolist()


# ------------------------------------------------------------------------------------------------
# Dishonest predictions do not decode
# ------------------------------------------------------------------------------------------------

def peeking(opened: Opened, strength: float = 8.0) -> Opened:
    """The same artifact, but each position's features lean towards the token that follows it."""
    model, forward = opened.run.model, opened.run.forward

    def forward_and_peek(tokens, looped):
        """Features with the answer added."""
        answer = F.embedding(tokens.roll(-1, 1), model.tok_emb)
        return forward(tokens, looped) + strength * answer / answer.norm(dim=-1, keepdim=True)
    return opened._replace(run=opened.run._replace(forward=forward_and_peek))


def test_a_model_that_peeks_scores_well_and_does_not_decode(fresh):
    """Predictions that depend on the token to come make a short code that nobody can read."""
    text = english(1500)
    honest = compress(fresh(), text)
    cheat = compress(peeking(fresh()), text)
    assert cheat.words < 0.9 * honest.words
    with pytest.raises(UseError, match="does not decode|holds no code"):
        decompress(peeking(fresh()), parse_code("cheat", cheat.blob))


def learn_first(run, scorer, learn):
    """eval_chunks, but each chunk is learnt from before it is graded."""
    cfg, n = run.cfg, len(scorer.data.bytes)
    tally, velocity = train_gpt.Tally(n, run.dist.device), torch.zeros_like(run.flat.data)
    windows = train_gpt.sliding_windows(n, cfg.seq_len, cfg.eval_stride)
    chunks = train_gpt.chunks_of(windows, cfg.seq_len, cfg.ttt_chunk_tokens)
    for i, part in enumerate(chunks):
        first, last = i * cfg.ttt_chunk_tokens, min((i + 1) * cfg.ttt_chunk_tokens, n)
        for _ in range(20):
            train_gpt.adapt(run, scorer.data.tokens[first:last + 1], velocity, cfg.ttt_lr)
        scorer.score(part, tally)
    return tally


def test_learning_before_scoring_scores_well_and_does_not_decode(fresh, monkeypatch):
    """A decoder cannot learn from a chunk that it has not decoded."""
    text = english(1500)
    honest = compress(fresh(), text)
    monkeypatch.setattr(train_gpt, "eval_chunks", learn_first)
    cheat = compress(fresh(), text)
    assert cheat.words < 0.98 * honest.words
    with pytest.raises(UseError, match="does not decode|holds no code"):
        decompress(fresh(), parse_code("cheat", cheat.blob))


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_scores_that_are_no_probabilities_do_not_match_the_code(fresh, artifact, capsys, factor):
    """Nats that claim more than a probability of 1 to share out, or less, differ from the code."""
    def boasting() -> Opened:
        """The artifact with nats that are off by 2 %."""
        opened = fresh(ttt_enabled=False)
        nll = opened.run.token_nll
        return opened._replace(run=opened.run._replace(token_nll=lambda *x: factor * nll(*x)))
    found = use_artifact.measure(boasting, english(3000))
    assert not found.problem and 0.01 < abs(found.excess) / found.bits < 0.03
    assert use_artifact.report(found, artifact) == 1
    assert "more than 0.5 % and 8 bytes" in capsys.readouterr().out


def test_verify_says_when_text_does_not_come_back(fresh, artifact, capsys):
    """A code that cannot be read is a finding, exit code 1, not bad input."""
    found = use_artifact.measure(lambda: peeking(fresh()), english(300))
    assert use_artifact.report(found, artifact) == 1
    assert re.search(r"decodes +no +", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# The compressed file
# ------------------------------------------------------------------------------------------------

def test_hundreds_of_mutations_are_refused(fresh):
    """Whatever is changed, cut or added anywhere is told before anything is decoded."""
    blob, rng = compress(fresh(), english(600)).blob, np.random.default_rng(1)
    for _ in range(600):
        at, to = sorted(rng.integers(len(blob) + 1, size=2).tolist())
        noise = rng.bytes(int(rng.integers(1, 5)))
        mutated = [blob[:at], blob[:at] + blob[to:], blob[:at] + noise + blob[at + len(noise):],
                   blob[:at] + noise + blob[at:], blob[at:]][rng.integers(5)]
        if mutated != blob:
            with pytest.raises(UseError, match=r"^code: (damaged|not a file)"):
                parse_code("code", mutated)


def test_forged_files_decode_to_the_text_or_are_refused(fresh):
    """With the checksum made right, wrong words still never yield another text."""
    text, rng = english(120), np.random.default_rng(2)
    blob, refusals = compress(fresh(), text).blob, 0
    for _ in range(40):
        body = bytearray(body_of(blob))
        body[rng.integers(HEADER.size, len(body))] ^= 1 << rng.integers(8)
        try:
            assert decompress(fresh(), parse_code("code", sealed(bytes(body)))) == text
        except UseError as e:
            assert re.match("code: (does not decode|damaged)", str(e))
            refusals += 1
    assert refusals > 30


FORGED = {
    "more tokens than bytes": (dict(count=601), "cannot be"),
    "endless tokens": (dict(count=(1 << 32) - 1, size=(1 << 32) - 1), "cannot be"),
    "no tokens": (dict(count=0), "cannot be"),
    "no threads": (dict(threads=0), "cannot be"),
    "endless threads": (dict(threads=65535), "cannot be"),
    "fewer tokens": (dict(count=100), "does not decode"),
    "less text": (dict(size=599), "does not decode"),
    "other text": (dict(text=b"12345678"), "does not decode"),
    "other artifact": (dict(artifact=b"12345678"), "artifact whose SHA-256 begins with 3132"),
    "other tokenizer": (dict(tokenizer=b"1234"), "tokenizer whose SHA-256 begins with 31323334"),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_headers_are_refused_by_name(fresh, cli, tmp_path, what):
    """Each field of the header is checked against the artifact, the words and the text."""
    changes, message = FORGED[what]
    path = tmp_path / "text.golfz"
    path.write_bytes(sealed(body_of(compress(fresh(), english(600)).blob, **changes)))
    refused(cli("decompress", path), message)
    assert not (tmp_path / "text").exists()


def test_another_machine_is_named(fresh, capsys, monkeypatch):
    """A file from elsewhere is tried, with a warning; if it fails, the reason is given."""
    blob = compress(fresh(), b"the model reads").blob
    monkeypatch.setattr(use_artifact, "machine", lambda run: "an abacus")
    assert decompress(fresh(), parse_code("code", blob)) == b"the model reads"
    assert "another PyTorch than an abacus; it may not decode here" in capsys.readouterr().err
    with pytest.raises(UseError, match="decode it on the kind of machine that made it"):
        decompress(fresh(), parse_code("code", sealed(body_of(blob, text=b"12345678"))))


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------

def test_samples_repeat_and_differ(fresh):
    """The same seed makes the same text, another seed another one."""
    opened = fresh()
    draw = lambda seed: b"".join(
        map(str.encode, use_artifact.sample(opened, b"the page", 60, Taste(1.0, 0, seed))))
    assert draw(1) == draw(1) != draw(2)
    assert draw(1).startswith(b"the page")


def test_one_choice_is_the_likeliest(fresh):
    """top_k 1 and temperature 0 take the argmax of the last position of a plain forward pass."""
    opened = fresh()
    run, ids = opened.run, [opened.text.bos, *opened.text.encode(b"the clock runs")]
    greedy = list(use_artifact.continuation(run, ids, 30, Taste(0.0, 0, 1)))
    assert list(use_artifact.continuation(run, ids, 30, Taste(1.7, 1, 5))) == greedy
    for token in greedy:
        with torch.no_grad():
            features = run.model.features(torch.tensor([ids[-run.cfg.seq_len:]]), True)
        assert token == int((features[0, -1] @ run.model.tok_emb.T).argmax())
        ids.append(token)
    assert len(ids) > run.cfg.seq_len


def test_a_sample_ends_with_its_document(fresh, monkeypatch):
    """Where the model begins another document the text is over; odd bytes do no harm."""
    opened = fresh()
    ids = opened.text.encode("é!".encode())
    made = [opened.text.spelling[b"\xff"], *ids, opened.text.bos, *ids]
    monkeypatch.setattr(use_artifact, "continuation", lambda *given: iter(made))
    assert "".join(use_artifact.sample(opened, b"a", 9, Taste(1.0, 0, 0))) == "a\ufffdé!"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def run_script(*args, **env) -> subprocess.CompletedProcess:
    """use_artifact.py in a process of its own."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    clean |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "use_artifact.py"), *map(str, args)], env=clean, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return finish(process, 60)


def test_two_processes_understand_each_other(artifact, toy_data, tmp_path):
    """What one process compresses another one decompresses, learning included."""
    text, source = english(5000), tmp_path / "text.txt"
    source.write_bytes(text)
    done = run_script("compress", artifact, source, "--data-dir", toy_data)
    assert (done.returncode, done.stderr) == (0, "")
    said = r".*text\.txt\.golfz: 5,000 bytes in [\d,]+, [\d.]+ bits per byte\n"
    assert re.fullmatch(said, done.stdout)
    source.unlink()
    done = run_script("decompress", artifact, tmp_path / "text.txt.golfz", DATA_DIR=str(toy_data))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{source}: 5,000 bytes\n", "")
    assert source.read_bytes() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "text.txt.golfz"]


def test_sample_prints_even_where_the_console_knows_little(artifact, toy_data):
    """Text goes to a console of ASCII and is the same each time."""
    command = "sample", artifact, "--prompt", "caf\u00e9", "--tokens", 20, "--data-dir", toy_data
    done = run_script(*command, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("caf?")
    assert len(done.stdout) > 10


def test_verify_command(cli, tmp_path):
    """verify takes the first bytes of a file and prints both tables."""
    path = tmp_path / "text"
    path.write_bytes(english(2000))
    code, out, err = cli("verify", path, "--max-bytes", 700)
    assert (code, err) == (0, "")
    assert re.search(r"^text +700 bytes", out) and "xz -9e" in out and "brotli -11" in out
    path.write_bytes(b"")
    assert cli("verify", path)[0] == 0


def test_libraries_that_are_missing_are_named(cli, fresh, tmp_path, monkeypatch, capsys):
    """Without constriction nothing can be coded; other compressors are only left out."""
    (tmp_path / "text").write_bytes(b"the page")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, out, _ = cli("verify", tmp_path / "text")
    assert code == 0 and re.search("zstd -19 .*not installed", out)
    monkeypatch.setitem(sys.modules, "constriction", None)
    refused(cli("compress", tmp_path / "text"), "constriction is not installed; pip install")


WRONG = {
    "nothing": ([], "required"),
    "no such command": (["eat", "A"], "invalid choice"),
    "no artifact": (["sample"], "required"),
    "no file": (["compress", "A"], "required"),
    "tokens": (["sample", "A", "--tokens", "many"], "--tokens: 'many': expected a whole number"),
    "temperature": (["sample", "A", "--temperature", "nan"], "'nan': expected a finite number"),
    "top-k": (["sample", "A", "--top-k", "-1"], "from 0 to"),
    "seed": (["sample", "A", "--seed", "1.5"], "'1.5': expected a whole number"),
    "max-bytes": (["verify", "A", "F", "--max-bytes", "1e3"], "'1e3'"),
    "unknown option": (["sample", "A", "--heat", "2"], "unrecognized arguments: --heat"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_command_lines_are_told_in_one_line(capsys, what):
    """The option, what was given and what is needed."""
    argv, message = WRONG[what]
    refused((use_artifact.main(argv), *capsys.readouterr()), re.escape(message))


def test_files_of_the_user_are_checked_first(cli, tmp_path, monkeypatch):
    """Unreadable input and unwritable output are told before the model runs; all files stay."""
    monkeypatch.setattr(use_artifact, "open_artifact", None)        # would raise TypeError
    text, packed = tmp_path / "text", tmp_path / "text.golfz"
    refused(cli("compress", text), "text: cannot be read")
    refused(cli("compress", tmp_path), "cannot be read")
    text.write_bytes(b"one")
    refused(cli("compress", text, "--out", tmp_path), "is a directory")
    refused(cli("compress", text, "--out", tmp_path / "no" / "x"), "cannot be written")
    refused(cli("compress", text, "--out", text / "x"), "cannot be written")
    refused(cli("compress", text, "--out", text), "is the file to be read")
    packed.write_bytes(b"two")
    refused(cli("compress", text), "is there already")
    refused(cli("decompress", packed), "is there already")
    refused(cli("decompress", text), "does not end with .golfz")
    refused(cli("decompress", text, "--out", tmp_path / "new"), "not a file that")
    refused(cli("decompress", tmp_path / "none.golfz"), "cannot be read")
    monkeypatch.setattr(use_artifact, "MOST_TEXT_BYTES", 2)
    refused(cli("verify", text), "more than 2 bytes")
    assert (text.read_bytes(), packed.read_bytes()) == (b"one", b"two")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing(cli, tmp_path, monkeypatch):
    """A write that fails is told with the system's reason, and no part of the file stays."""
    (tmp_path / "text").write_bytes(b"the page")

    def full(*given):
        """What a full disk answers."""
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_gpt.os, "fsync", full)
    refused(cli("compress", tmp_path / "text"), r"No space left on device\); name another")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_paths_that_no_system_takes(cli):
    """A name that is too long and the root of all files are refused like others."""
    refused(cli("compress", "x" * 5000), "File name too long")
    refused(cli("compress", "/"), "/: cannot be read")
    refused(cli("decompress", "/", "--out", "/"), "is the file to be read")
    refused(cli("sample", artifact="x" * 5000), "cannot be read")


def test_faults_while_working_are_told_in_one_line(cli, monkeypatch):
    """Ctrl-C, too little memory, and a reader that goes away leave no traceback."""
    for fault, code, message in (
            (KeyboardInterrupt(), 130, "use_artifact: stopped\n"),
            (MemoryError(), 2, "use_artifact: out of memory; use a smaller artifact"),
            (torch.OutOfMemoryError("CUDA\nout"), 2, "use_artifact: out of memory"),
            (RuntimeError("[enforce] can't allocate memory: 9 bytes"), 2, "out of memory"),
            (UseError("two\nlines\x1b[31m"), 2, r"use_artifact: two lines \[31m\n")):
        def work(args, fault=fault):
            """What runs into the fault."""
            raise fault
        monkeypatch.setattr(use_artifact, "run_sample", work)
        found, out, err = cli("sample")
        assert (found, out, err.count("\n")) == (code, "", 1) and re.search(message, err)
    monkeypatch.setattr(use_artifact, "run_sample", lambda args: {}["a bug"])
    with pytest.raises(KeyError):                           # a bug of ours is no bad input
        cli("sample")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_console_is_told(artifact, toy_data):
    """Output that goes nowhere is a failure, not a success."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "use_artifact.py"), "sample", str(artifact), "--data-dir",
             str(toy_data)], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "use_artifact: the console: No space left on device\n"


def test_too_many_tokens_are_refused(fresh, monkeypatch):
    """A text that would take days is told so at once."""
    monkeypatch.setattr(use_artifact, "MOST_TOKENS", 10)
    with pytest.raises(UseError, match="has 11 tokens, more than 10; take a part of it"):
        compress(fresh(), b"\n" * 11)


def test_help_names_every_option(capsys):
    """Each command explains its arguments; the default values are in the text."""
    for command in ("sample", "compress", "decompress", "verify"):
        with pytest.raises(SystemExit) as end:
            use_artifact.main([command, "--help"])
        out = capsys.readouterr().out
        assert end.value.code == 0 and "--data-dir" in out and "ARTIFACT" in out
        assert not re.search(r"^  --?\w[\w-]*( \w+)?$\n^  -", out, re.M), "an option without help"
