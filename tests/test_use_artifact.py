"""use_artifact.py: text comes back from its code, and only where the predictions are legal.

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
from conftest import PARTS, ROOT, TINY, VOCAB, prose, stirred
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
import use_artifact
from train_gpt import GolfError
from use_artifact import (HEADER, MAGIC, Header, Opened, Sampling, TextCoder, compress, decompress,
                          digest, open_artifact, parse_code)

# Enough tokens to fill several chunks, and a pass in a millisecond: decoding takes one per token.
SMALL = dict(
    seq_len=16, eval_stride=8, ttt_chunk_tokens=256, ttt_lr=0.06, train_batch_tokens=512,
    iterations=40, matrix_lr=0.04, num_layers=2, num_loops=0, xsa_last_n=1,
    parallel_residual_start=1, model_dim=32, num_heads=2, num_kv_heads=1)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def artifact(toy_data, tmp_path_factory) -> Path:
    """The artifact of a small model, trained for some steps and quantized by the program."""
    folder = tmp_path_factory.mktemp("use")
    cfg = train_gpt.Config(**{**TINY, **SMALL, "data_dir": str(toy_data), "out_dir": str(folder)})
    torch.manual_seed(0)
    run = train_gpt.build_run(cfg, train_gpt.Dist({}), use_artifact.NoLog())
    identity = train_gpt.check_data(cfg, run.rt)
    train_gpt.quantize_stage(run, *train_gpt.train_stage(run, identity), identity)
    return cfg.artifact_path


@pytest.fixture(scope="module")
def tokenizer(toy_data):
    """The toy corpus's tokenizer."""
    cfg = train_gpt.Config(**TINY, data_dir=str(toy_data))
    return train_gpt.load_tokenizer(cfg.tokenizer_path, cfg.vocab_size)


@pytest.fixture(scope="module")
def pieces(tokenizer) -> TextCoder:
    """Lossless tokenization with the toy tokenizer."""
    return TextCoder(tokenizer)


@pytest.fixture(scope="module")
def fresh(artifact, toy_data):
    """A function that opens the artifact, with its own or other settings of scoring."""
    def fresh(**scoring) -> Opened:
        opened = open_artifact(artifact, str(toy_data))
        run = opened.run
        return opened._replace(run=run._replace(cfg=replace(run.cfg, **scoring)))
    return fresh


@pytest.fixture(scope="module")
def honest(fresh) -> tuple[bytes, bytes]:
    """A text of some chunks, and its compressed file."""
    text = english(800)
    return text, compress(fresh(), text)


@pytest.fixture
def cli(artifact, toy_data, capsys):
    """A function that runs `main` with the artifact: (exit code, stdout, stderr)."""
    def cli(command: str, *args, artifact=artifact, data=toy_data) -> tuple[int, str, str]:
        code = use_artifact.main([command, str(artifact), *map(str, args), "--data-dir", str(data)])
        return code, *capsys.readouterr()
    return cli


def rejected(result: tuple[int, str, str], message: str = ""):
    """Assert exit code 2 and one line on stderr that matches `message`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("use_artifact: ") and err.count("\n") == 1, err
    assert re.search(message, err), err


def english(size: int, seed: int = 3) -> bytes:
    """`size` bytes of made-up prose, a line per document."""
    rng, text = np.random.default_rng(seed), b""
    while len(text) < size:
        text += prose(rng).encode() + b"\n"
    return text[:size]


def round_trip(open_fresh, text: bytes) -> bytes:
    """`text` compressed and decompressed, each by a fresh model."""
    return decompress(open_fresh(), parse_code("code", compress(open_fresh(), text)))


def code_bytes(blob: bytes) -> int:
    """Bytes of a compressed file without its header."""
    return len(blob) - len(MAGIC) - 8 - HEADER.size


def changed(blob: bytes, flip: int | None = None, **header) -> bytes:
    """A compressed file with a bit of its code or fields of its header changed, resealed."""
    body = bytearray(blob[len(MAGIC) + 8:])
    if flip is not None:
        body[HEADER.size + flip // 8] ^= 1 << flip % 8
    fields = Header(*HEADER.unpack(body[:HEADER.size]))._replace(**header)
    body[:HEADER.size] = HEADER.pack(*fields)
    return MAGIC + digest(bytes(body)) + bytes(body)


# ------------------------------------------------------------------------------------------------
# Reading an artifact
# ------------------------------------------------------------------------------------------------

def test_an_artifact_alone_gives_model_and_scoring(artifact, toy_data, tmp_path):
    """Settings and weights are those of its run; the tokenizer may also be given by its path."""
    path = next((toy_data / "tokenizers").iterdir())
    run, text, _ = open_artifact(artifact, str(tmp_path), path)
    theirs = train_gpt.Config(**{**TINY, **SMALL})
    for group in ("model", "scoring"):
        assert run.cfg.group(group) == theirs.group(group)
    assert not run.model.fused
    weights = run.flat.data.clone()
    container = train_gpt.open_container(artifact, "artifact")
    train_gpt.dequantize(container.tensors(train_gpt.artifact_layout(run.flat)), run.flat)
    assert torch.equal(weights, run.flat.data)
    assert text.proto == path.read_bytes()


def test_artifacts_of_other_versions_are_rejected_by_name(artifact, tmp_path, cli):
    """A setting too many, too few, or renamed: a default would score another model in silence."""
    container, path = train_gpt.open_container(artifact, "artifact"), tmp_path / "model.golf"
    tensors = container.tensors(container.layout)
    for group, removed, added in (("model", "rope_base", ""), ("scoring", "", "ttt_warmup"),
                                  ("scoring", "eval_stride", "stride")):
        meta = {**container.meta, group: {**container.meta[group], added: 1}}
        meta[group].pop("" if added else removed, None)
        meta[group].pop(removed, None)
        meta[group].pop("", None)
        path.write_bytes(b"".join(train_gpt.pack_tensors("artifact", meta, tensors, "range")))
        names = ", ".join(sorted(filter(None, (removed, added))))
        rejected(cli("sample", artifact=path), f"another version .* {group} settings .* {names};")


def test_recurrence_is_on_only_where_it_was_trained(artifact, toy_data, tmp_path):
    """An artifact says whether its model ever ran its recurrent layers again."""
    container, path = train_gpt.open_container(artifact, "artifact"), tmp_path / "model.golf"
    tensors, tokens = container.tensors(container.layout), torch.arange(16)[None]
    plain = open_artifact(artifact, str(toy_data)).run.forward(tokens)
    model = {**container.meta["model"], "num_loops": 1, "loop_start": 1, "loop_end": 1}
    for looped in (False, True):
        meta = {**container.meta, "model": model, "looped": looped}
        path.write_bytes(b"".join(train_gpt.pack_tensors("artifact", meta, tensors, "range")))
        found = open_artifact(path, str(toy_data)).run.forward(tokens)
        assert torch.equal(found, plain) != looped


def test_files_of_another_kind(artifact, tmp_path, toy_data, cli):
    """A missing, damaged or wrong artifact, and a missing, wrong or damaged tokenizer."""
    data, path = artifact.read_bytes(), tmp_path / "model.golf"
    rejected(cli("sample", artifact=tmp_path / "none"), "no such file")
    rejected(cli("sample", artifact=tmp_path), "no such file")
    rejected(cli("sample", artifact="x" * 300), "File name too long|no such file")
    for damaged in (b"", data[:-1], data[:40], data[:900] + b"?" + data[901:], b"x" * 3000):
        path.write_bytes(damaged)
        rejected(cli("sample", artifact=path), "damaged or no artifact")
    checkpoint = artifact.with_name("checkpoint.golf")
    rejected(cli("sample", artifact=checkpoint), "damaged or no artifact")
    rejected(cli("sample", data=tmp_path), "no tokenizer")
    rejected(cli("sample", "--tokenizer", tmp_path), "no tokenizer")
    rejected(cli("sample", "--tokenizer", artifact), "not a SentencePiece model")
    other = tmp_path / "other.model"
    for size, message in ((310, "310 pieces"), (VOCAB, "not the tokenizer")):
        other.write_bytes(prepare_data.train_tokenizer([english(20000).decode()], size))
        rejected(cli("sample", "--tokenizer", other), message)


def test_broken_weights_give_no_text(fresh):
    """Predictions that are not finite end sampling and coding with a remedy."""
    opened = fresh()
    opened.run.flat.data.fill_(math.nan)
    with pytest.raises(GolfError, match="not finite; .* lower TTT_LR"):
        list(use_artifact.sample(opened, b"", 1, Sampling(1.0, 0, 0)))
    with pytest.raises(GolfError, match="not finite"):
        compress(opened, b"a page")


# ------------------------------------------------------------------------------------------------
# Text and tokens
# ------------------------------------------------------------------------------------------------

NASTY = ["\n", "\r\n", " ", "  ", "\t", "\u2581", "\x00", "\ufeff", "\u00a0", "\u200b", "\ufb01",
         "e\u0301", "\u00e9", "\U0001f600", "\ufffd", "the", " the", "<s>", "</s>", "<0x0A>"]


@settings(max_examples=300, deadline=None)
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
    """Text that SentencePiece would not change keeps its pieces; a line end costs one."""
    rng = np.random.default_rng(0)
    lines = [prose(rng) for _ in range(30)]
    assert all(pieces.encode(line.encode()) == tokenizer.encode(line) for line in lines)
    together = pieces.encode("\n".join(lines).encode())
    assert len(together) == sum(len(tokenizer.encode(line)) for line in lines) + len(lines) - 1


def test_one_odd_byte_does_not_spoil_the_rest(pieces):
    """Raw bytes cost one token each, and the text around them its cost without them."""
    text = english(400)
    for odd in (b"\xff", b"\xe2\x96\x81", b"\xf0\x9f\x98"):
        assert len(pieces.encode(text + odd + text)) == 2 * len(pieces.encode(text)) + len(odd)


def test_a_tokenizer_that_loses_text_is_corrected(tokenizer):
    """Whatever pieces SentencePiece returns, a part that they do not spell is spelled in bytes."""
    pieces, text = TextCoder(tokenizer), english(200)
    for answer in ([], [tokenizer.unk_id()], [300, 301]):
        pieces.tokenizer = SimpleNamespace(encode=lambda part, answer=answer: answer)
        assert pieces.decode(pieces.encode(text)) == text


def test_a_tokenizer_without_byte_pieces_is_rejected():
    """Without a piece for every byte some text could not be spelled."""
    model = prepare_data.io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([english(4000).decode()]), model_writer=model, vocab_size=60,
        **{**prepare_data.TOKENIZER_SETTINGS, "byte_fallback": False})
    with pytest.raises(GolfError, match="has 0 byte pieces; 256 are"):
        TextCoder(prepare_data.load_tokenizer(model.getvalue()))


# ------------------------------------------------------------------------------------------------
# Predictions: tokens that an encoder sees and a decoder does not must not matter
# ------------------------------------------------------------------------------------------------

LONG = dict(seq_len=256, eval_stride=64, train_batch_tokens=256)
RECIPES = [pytest.param({**TINY, **parts}, id=name) for name, parts in PARTS.items()]


@pytest.mark.parametrize("parts", [*RECIPES, pytest.param(LONG, id="long")])
def test_unknown_tokens_do_not_reach_earlier_bits(make_cfg, make_run, parts):
    """Hidden states of a prefix are bit for bit the same, whatever follows it in the window."""
    run = stirred(make_run(make_cfg(**parts)))
    T, rng = run.cfg.seq_len, np.random.default_rng(0)
    with use_artifact.repeatable(), torch.no_grad():
        hidden_states = use_artifact.HiddenStates(run)
        window = torch.from_numpy(rng.integers(run.cfg.vocab_size, size=T))
        whole = hidden_states(window).clone()
        for known in {1, 2, T - 1, *rng.integers(1, T, size=12).tolist()}:
            blind = window.clone()
            blind[known:] = use_artifact.FILLER
            found = hidden_states(blind)
            assert torch.equal(found[:known], whole[:known])
            assert not torch.equal(found[known:], whole[known:])


def test_an_encoder_that_sees_no_further_writes_the_same_code(fresh, honest, monkeypatch):
    """One pass per window and one per target, as the decoder needs, give one code."""
    text, quick = honest
    monkeypatch.setattr(use_artifact.Encoder, "pass_per_target", True)
    assert compress(fresh(), text) == quick


GRADIENTS = """
import torch, train_gpt, use_artifact
cfg = train_gpt.config_from_env({"RECIPE": "demo"})[0]
model = train_gpt.GPT(cfg)
flat = train_gpt.Flat(model, torch.device("cpu"))
flat.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
rows = torch.arange(16 * 256).view(16, 256) % 1000
found = []
for _ in range(2):
    with use_artifact.repeatable():
        flat.buffer.zero_()
        model(rows, rows).mean().backward()
    found.append(flat.grad.clone())
    torch.set_num_threads(torch.get_num_threads())          # as decompress does
assert torch.equal(*found)
"""


def test_gradients_are_the_same_whether_threads_were_set_before():
    """In a fresh process MKL counts cores for itself until a number of threads is set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    subprocess.run([sys.executable, "-c", GRADIENTS], cwd=ROOT, env=env, check=True)


def test_settings_of_torch_are_restored():
    """Deterministic algorithms are on while coding, and no longer."""
    with pytest.raises(ValueError), use_artifact.repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------
# Round trips
# ------------------------------------------------------------------------------------------------

def test_a_long_text_comes_back_and_costs_its_score(fresh, artifact, capsys):
    """5,000 bytes over chunks that are learnt from: the code is as long as the score says."""
    text = english(5000)
    found = use_artifact.measure(fresh, text)
    assert found.tokens / SMALL["ttt_chunk_tokens"] > 4 and not found.problem
    assert abs(found.excess) < 0.001 * found.bits + 32      # the coder writes words of 32 bits
    assert use_artifact.report(found, artifact) == 0
    out = capsys.readouterr().out
    assert re.search(r"decodes +yes +byte for byte", out) and "fine" in out
    assert re.search(rf"gzip -9 +{len(gzip.compress(text, 9)):,} bytes", out)
    assert re.search(rf"model.golf +{artifact.stat().st_size:,} bytes", out)
    # Learning pays here, so a code this short cannot come from frozen weights.
    assert len(found.blob) < 0.99 * len(compress(fresh(ttt_enabled=False), text))


HEADS = dict(ttt_documents=True, ttt_chunk_tokens=4, ttt_lr=1.0, ttt_attention=0.02)


def test_a_document_and_its_head_come_back(fresh):
    """Decoder and encoder teach the same head; the code is as long as the score, and shorter."""
    text = 20 * b"A jackdaw vexed 47 quick zebus, 9 by 9, as XYZ had it.\n"      # unlike the corpus
    found = use_artifact.measure(lambda: fresh(**HEADS), text)
    assert not found.problem and abs(found.excess) < 0.001 * found.bits + 32
    frozen = compress(fresh(**{**HEADS, "ttt_lr": 0.0}), text)
    assert len(found.blob) < 0.99 * len(frozen)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 15, 16, 17, 33])
def test_every_place_where_a_document_may_end(fresh, size):
    """Texts that end within, at and after the first chunks, and after the context."""
    text = b"\n" * size
    assert round_trip(lambda: fresh(**HEADS), text) == text


@pytest.mark.parametrize("parts", [r for r in RECIPES if r.id in ("golf", "pr1876")])
def test_documents_of_recipes_come_back(make_cfg, make_run, pieces, parts):
    """Recurrence, gates, lanes and SmearGate go on from chunk to chunk in the decoder, too."""
    cfg = make_cfg(**{**parts, **HEADS, "ttt_enabled": True})
    recurrent = SimpleNamespace(meta=dict(looped=True))

    def untrained() -> Opened:
        run = stirred(make_run(cfg))
        run.flat.steps["tok_emb"] = torch.ones(cfg.vocab_size)      # as if from an artifact
        return Opened(run.for_artifact(recurrent), pieces, b"untested")
    text = english(200)
    assert round_trip(untrained, text) == text


@pytest.mark.parametrize("parts", RECIPES)
def test_every_recipe_comes_back(make_cfg, make_run, pieces, parts):
    """All parts of a recipe's model and test-time training compute the same bits twice."""
    cfg = make_cfg(**{**parts, "ttt_chunk_tokens": 32, "ttt_enabled": True})

    def untrained() -> Opened:
        return Opened(stirred(make_run(cfg)), pieces, b"untested")
    text = english(200)
    assert round_trip(untrained, text) == text


def test_without_learning(fresh):
    """An artifact that is scored frozen codes with frozen weights."""
    text, opened = english(500), fresh(ttt_enabled=False)
    weights = opened.run.flat.data.clone()
    blob = compress(opened, text)
    assert torch.equal(opened.run.flat.data, weights)
    assert decompress(opened, parse_code("code", blob)) == text


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 24, 25, 31, 32, 33])
def test_every_place_where_a_window_may_end(fresh, size):
    """Texts of one token per byte that end within, at and after the first windows."""
    text = b"\n" * size
    assert round_trip(lambda: fresh(ttt_chunk_tokens=16), text) == text


@settings(max_examples=20, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)))
def test_any_bytes_come_back_from_their_code(fresh, data):
    """Random bytes, which no model expects, come back as well."""
    assert round_trip(lambda: fresh(ttt_chunk_tokens=32), data) == data


@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_the_evaluation_leaves_padding_out(fresh, count):
    """Batches of windows give the nats that the coder gives one by one, padding not counted."""
    opened = fresh(ttt_chunk_tokens=32)
    text = b"?" * count
    ids = opened.text.encode(text)
    stream = use_artifact.text_stream(opened.run, opened.text.bos, ids, len(ids))
    coder = use_artifact.Encoder(opened.run, stream)
    nats, targets, _ = coder.run_through("test").sums.tolist()
    bits, limited = use_artifact.evaluation_bits(fresh(ttt_chunk_tokens=32), text)
    assert targets == count and bits * math.log(2) == pytest.approx(nats, rel=1e-4)
    assert limited < bits                                   # these tokens are rare
    assert 0 <= 32 * len(coder.queue.get_compressed()) - limited < 0.001 * limited + 64


def test_noise_costs_no_more_than_the_coder_can_charge(fresh):
    """Bytes held for impossible: the score has no bound, the code keeps within its limit."""
    def overconfident() -> Opened:
        opened = fresh(ttt_enabled=False)
        opened.run.model.tok_emb.data.mul_(4)               # and so the logits
        return opened
    found = use_artifact.measure(overconfident, np.random.default_rng(0).bytes(300))
    assert found.close and not found.problem
    assert found.limited < 0.995 * found.bits
    assert found.limited <= use_artifact.FIXED_BITS * found.tokens


def test_padding_is_never_learnt_from(fresh, monkeypatch):
    """The padding behind the text lies in the last chunk; learning sees the earlier ones only."""
    seen, step = [], train_gpt.SGD.step
    monkeypatch.setattr(train_gpt.SGD, "step", lambda self, tokens, lr: (
        seen.append(tokens.clone()), step(self, tokens, lr)))
    for size, learnt_chunks in ((32, 0), (64, 1), (65, 2), (80, 2), (96, 2)):
        seen.clear()
        opened = fresh(ttt_chunk_tokens=32)
        epochs = opened.run.cfg.ttt_epochs
        compress(opened, b"\n" * size)
        known = [opened.text.bos, *opened.text.encode(b"\n" * size)]
        assert len(seen) == learnt_chunks * epochs
        for i, tokens in enumerate(seen):
            first = 32 * (i // epochs)
            assert tokens.tolist() == known[first:first + 33]


# ------------------------------------------------------------------------------------------------
# Illegal predictions do not decode
# ------------------------------------------------------------------------------------------------

def with_forward(opened: Opened, forward) -> Opened:
    """The same artifact with another forward pass, a function of the true one and its arguments."""
    true = opened.run.forward
    run = opened.run._replace(forward=lambda *args, **how: forward(true, *args, **how))
    return opened._replace(run=run)


def peeking(opened: Opened, strength: float = 8.0) -> Opened:
    """The same artifact, but each hidden state leans towards the token that follows it."""
    table = opened.run.model.tok_emb

    def forward(true, tokens, targets=None, **how):
        if targets is not None:
            return true(tokens, targets, **how)
        answer = F.embedding(tokens.roll(-1, 1), table)
        return true(tokens) + strength * answer / answer.norm(dim=-1, keepdim=True)
    return with_forward(opened, forward)


def test_a_model_that_peeks_scores_well_and_does_not_decode(fresh, honest):
    """Predictions that depend on the token to come make a short code that nobody can read."""
    cheat = compress(peeking(fresh()), honest[0])
    assert code_bytes(cheat) < 0.9 * code_bytes(honest[1])
    with pytest.raises(GolfError, match="does not decode|holds no code"):
        decompress(peeking(fresh()), parse_code("cheat", cheat))


def learn_first(scorer, plan, learner):
    """train_gpt.evaluate, but each chunk is learnt from before it is scored."""
    tally = train_gpt.Tally(len(scorer.stream.bytes), scorer.rt.dist.device)
    for chunk in plan:
        for _ in range(20):
            first, last = chunk.windows[0].start, chunk.windows[-1].stop
            learner.step(scorer.stream.tokens[first:last + 1], scorer.cfg.ttt_lr)
        scorer.score(chunk.windows, tally)
    return tally


def test_learning_before_scoring_scores_well_and_does_not_decode(fresh, honest, monkeypatch):
    """A decoder cannot learn from a chunk that it has not decoded."""
    monkeypatch.setattr(train_gpt, "evaluate", learn_first)
    cheat = compress(fresh(), honest[0])
    assert code_bytes(cheat) < 0.98 * code_bytes(honest[1])
    with pytest.raises(GolfError, match="does not decode|holds no code"):
        decompress(fresh(), parse_code("cheat", cheat))


def test_scores_that_are_no_probabilities_do_not_match_the_code(fresh, artifact, capsys):
    """Nats that share out more than a probability of 1, or less, differ from the code."""
    def frozen() -> Opened:
        return fresh(ttt_enabled=False)
    text = np.random.default_rng(0).bytes(400).hex().encode()       # expensive for its length
    found = use_artifact.measure(frozen, text)
    assert use_artifact.report(found, artifact) == 0
    for factor in (0.98, 1.02):
        boasting = with_forward(frozen(), lambda true, *args, **how: factor * true(*args, **how))
        bits, limited = use_artifact.evaluation_bits(boasting, text)
        assert bits == pytest.approx(factor * found.bits, rel=1e-6)
        capsys.readouterr()
        assert use_artifact.report(found._replace(bits=bits, limited=limited), artifact) == 1
        assert "more than 0.5 % and 8 bytes" in capsys.readouterr().out


def test_verify_reports_a_text_that_does_not_come_back(fresh, artifact, capsys):
    """A code that cannot be decoded is a finding, exit code 1, not bad input."""
    found = use_artifact.measure(lambda: peeking(fresh()), english(300))
    assert use_artifact.report(found, artifact) == 1
    assert re.search(r"decodes +no +", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# The compressed file
# ------------------------------------------------------------------------------------------------

def test_damaged_files_are_rejected(fresh):
    """A change, cut or addition anywhere is found before anything is decoded."""
    blob, rng = compress(fresh(), english(600)), np.random.default_rng(1)
    for _ in range(600):
        at, to = sorted(rng.integers(len(blob) + 1, size=2).tolist())
        noise = rng.bytes(int(rng.integers(1, 5)))
        mutated = [blob[:at], blob[:at] + blob[to:], blob[:at] + noise + blob[at + len(noise):],
                   blob[:at] + noise + blob[at:], blob[at:]][rng.integers(5)]
        if mutated != blob:
            with pytest.raises(GolfError, match=r"^code: (damaged|not a file)"):
                parse_code("code", mutated)


def test_another_code_never_gives_another_text(fresh):
    """Flipped bits behind a valid checksum are found by the digest of the text."""
    text, rng, problems = english(120), np.random.default_rng(2), 0
    blob = compress(fresh(), text)
    for flip in rng.integers(8 * code_bytes(blob), size=12).tolist():
        try:
            assert decompress(fresh(), parse_code("code", changed(blob, flip))) == text
        except GolfError as e:
            assert re.match("code: (does not decode|holds no code)", str(e))
            problems += 1
    assert problems > 8


def test_a_file_of_another_artifact_or_tokenizer_is_rejected_by_name(fresh):
    """The header names both by their SHA-256."""
    blob = compress(fresh(), english(60))
    for field, value, message in (("artifact", b"12345678", "artifact whose .* 3132333435363738"),
                                  ("tokenizer", b"1234", "tokenizer whose .* 31323334")):
        with pytest.raises(GolfError, match=message):
            decompress(fresh(), parse_code("code", changed(blob, **{field: value})))


def test_another_machine_is_named(fresh, capsys, monkeypatch):
    """A file from elsewhere is tried, with a warning; if it fails, the message has the reason."""
    blob = compress(fresh(), b"the model reads")
    monkeypatch.setattr(use_artifact, "machine", lambda dist: "an abacus")
    assert decompress(fresh(), parse_code("code", blob)) == b"the model reads"
    assert "another PyTorch than an abacus; it may not decode here" in capsys.readouterr().err
    with pytest.raises(GolfError, match="decode it on the kind of machine that made it"):
        decompress(fresh(), parse_code("code", changed(blob, text=b"12345678")))


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------

def test_samples_repeat_and_differ(fresh):
    """The same seed gives the same text, another seed another one."""
    opened = fresh()
    draw = lambda seed: "".join(use_artifact.sample(opened, b"the page", 60, Sampling(1, 0, seed)))
    assert draw(1) == draw(1) != draw(2)
    assert draw(1).startswith("the page")


def test_one_candidate_is_the_most_likely(fresh):
    """top_k 1 and temperature 0 take the argmax of the last position of a plain forward pass."""
    opened = fresh()
    run, ids = opened.run, [opened.text.bos, *opened.text.encode(b"the clock runs")]
    greedy = list(use_artifact.generate(run, ids, 30, Sampling(0.0, 0, 1)))
    assert list(use_artifact.generate(run, ids, 30, Sampling(1.7, 1, 5))) == greedy
    for token in greedy:
        with torch.no_grad():
            hidden = run.model(torch.tensor([ids[-run.cfg.seq_len:]]))
        assert token == int((hidden[0, -1] @ run.model.tok_emb.T).argmax())
        ids.append(token)
    assert len(ids) > run.cfg.seq_len


def test_a_sample_ends_with_its_document(fresh, monkeypatch):
    """Where the model begins another document the text is over; odd bytes do no harm."""
    opened = fresh()
    ids = opened.text.encode("é!".encode())
    made = [opened.text.byte_pieces[b"\xff"], *ids, opened.text.bos, *ids]
    monkeypatch.setattr(use_artifact, "generate", lambda *given: iter(made))
    assert "".join(use_artifact.sample(opened, b"a", 9, Sampling(1.0, 0, 0))) == "a\ufffdé!"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def run_script(*args, redirect: str = "", **env) -> subprocess.CompletedProcess:
    """use_artifact.py in a process of its own, its output redirected by a shell."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    clean |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env)
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "", sys.executable, ROOT / "use_artifact.py", *args],
        env=clean, capture_output=True, timeout=60)


def test_two_processes_understand_each_other(artifact, toy_data, tmp_path):
    """One process decompresses the file of another; names need not be UTF-8, nor the console."""
    text, source = english(500), os.fsencode(tmp_path) + b"/text\xff.txt"
    Path(os.fsdecode(source)).write_bytes(text)
    done = run_script("compress", artifact, source, "--data-dir", toy_data, PYTHONUTF8="1",
                      PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    said = rb".*text\\udcff\.txt\.golfz: 500 bytes in [\d,]+, [\d.]+ bits per byte\n"
    assert re.fullmatch(said, done.stdout)
    os.unlink(source)
    done = run_script("decompress", artifact, source + b".golfz", DATA_DIR=str(toy_data))
    assert (done.returncode, done.stderr) == (0, b"") and b".txt: 500 bytes\n" in done.stdout
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"text\xff.txt", b"text\xff.txt.golfz"]
    assert Path(os.fsdecode(source)).read_bytes() == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("redirect, code, message", [
    (">&-", 0, b""), (">/dev/full", 2, b"use_artifact: the console: No space left on device\n")])
def test_a_closed_or_full_console(artifact, toy_data, redirect, code, message):
    """Closed output goes nowhere; output that is lost is a failure in one line."""
    done = run_script("sample", artifact, "--tokens", "3", "--data-dir", toy_data,
                      redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", message)


def test_verify_command(cli, tmp_path):
    """verify reads the first bytes of a file and prints both tables, also of an empty file."""
    path = tmp_path / "text"
    path.write_bytes(english(2000))
    code, out, err = cli("verify", path, "--max-bytes", 300)
    assert (code, err) == (0, "")
    assert re.search(r"^text +300 bytes", out) and "xz -9e" in out and "brotli -11" in out
    path.write_bytes(b"")
    assert cli("verify", path)[0] == 0


def test_sample_command(cli):
    """The sample goes to stdout, after its prompt."""
    code, out, err = cli("sample", "--prompt", "the café", "--tokens", 5, "--temperature", 0)
    assert (code, err) == (0, "") and out.startswith("the café") and out.endswith("\n")


def test_missing_libraries_are_named(cli, tmp_path, monkeypatch):
    """Commands that need a library say so before the model works; `sample` needs neither."""
    (tmp_path / "text").write_bytes(b"the page")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    rejected(cli("verify", tmp_path / "text"), "zstandard is not installed; pip install")
    monkeypatch.setitem(sys.modules, "constriction", None)
    rejected(cli("compress", tmp_path / "text"), "constriction is not installed; pip install")
    assert cli("sample", "--tokens", 1)[0] == 0


WRONG = {
    "no command": ([], "required"),
    "no such command": (["eat", "A"], "invalid choice"),
    "no file": (["compress", "A"], "required"),
    "not a number": (["sample", "A", "--tokens", "many"], "--tokens: .*int from 0 to .*'many'"),
    "nan": (["sample", "A", "--temperature", "nan"], "--temperature: .*float from .*'nan'"),
    "below the least": (["sample", "A", "--top-k", "-1"], "--top-k: .*from 0 to .*'-1'"),
    "unknown option": (["sample", "A", "--heat", "2"], "unrecognized arguments: --heat"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_command_lines_are_rejected_in_one_line(capsys, what):
    """The message has the option, the value found and the value needed."""
    argv, message = WRONG[what]
    rejected((use_artifact.main(argv), *capsys.readouterr()), message)


def test_files_of_the_user_are_checked_first(cli, tmp_path, monkeypatch):
    """Unreadable input and unwritable output are found before the model runs; all files stay."""
    monkeypatch.setattr(use_artifact, "open_artifact", None)        # would raise TypeError
    text, packed, fifo = (tmp_path / name for name in ("text", "text.golfz", "fifo"))
    os.mkfifo(fifo)
    for command in ("compress", "decompress", "verify"):
        rejected(cli(command, fifo), "fifo: a pipe or device, needed a regular file")
        rejected(cli(command, tmp_path), "a folder, needed a regular file")
        rejected(cli(command, tmp_path / "none.golfz"), "none.golfz: cannot be read")
        rejected(cli(command, "x" * 300), "File name too long")
    text.write_bytes(b"one")
    rejected(cli("compress", text, "--out", tmp_path), "is not a regular file")
    rejected(cli("compress", text, "--out", fifo), "is not a regular file")
    rejected(cli("compress", text, "--out", tmp_path / "no" / "x"), "cannot be written")
    rejected(cli("compress", text, "--out", text / "x"), "cannot be written")
    rejected(cli("compress", text, "--out", text), "is the file to read")
    packed.write_bytes(b"two")
    rejected(cli("compress", text), "exists already")
    rejected(cli("decompress", packed, "--out", tmp_path / "new"), "not a file that")
    packed.write_bytes(MAGIC + digest(bytes(HEADER.size)) + bytes(HEADER.size))
    rejected(cli("decompress", packed), "exists already")
    packed.rename(tmp_path / "other")
    rejected(cli("decompress", tmp_path / "other"), "does not end with .golfz")
    monkeypatch.setattr(use_artifact, "MOST_BYTES", 2)
    rejected(cli("verify", text), "more than 2 bytes; .* --max-bytes")
    assert text.read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_leaves_nothing(cli, tmp_path, monkeypatch):
    """A failed write is reported with the system's reason, and no part of the file stays."""
    (tmp_path / "text").write_bytes(b"the page")

    def full(*given):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    rejected(cli("compress", tmp_path / "text"), "cannot be written .No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_faults_at_work_are_reported_in_one_line(cli, monkeypatch):
    """Ctrl-C and too little memory leave no traceback; a bug of ours does."""
    for fault, code, message in (
            (KeyboardInterrupt(), 130, "use_artifact: stopped"),
            (MemoryError(), 2, "use_artifact: out of memory; use a smaller artifact"),
            (torch.OutOfMemoryError("CUDA\nout"), 2, "use_artifact: out of memory"),
            (RuntimeError("[enforce] can't allocate memory: 9 bytes"), 2, "out of memory"),
            (GolfError("two\nlines\x1b[31m"), 2, r"use_artifact: two lines \[31m\n")):
        def work(args, fault=fault):
            raise fault
        monkeypatch.setattr(use_artifact, "run_sample", work)
        found, out, err = cli("sample")
        assert (found, out, err.count("\n")) == (code, "", 1) and re.search(message, err)
    monkeypatch.setattr(use_artifact, "run_sample", lambda args: {}["a bug"])
    with pytest.raises(KeyError):
        cli("sample")


@pytest.mark.parametrize("command", ["sample", "compress", "decompress", "verify"])
def test_help_explains_every_option(capsys, command):
    """Each option has a help text."""
    assert use_artifact.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--data-dir" in out and "ARTIFACT" in out
    assert not re.search(r"^  --?\w[\w-]*( \w+)?$\n^  -", out, re.M), "an option without help"
