"""train_gpt.py, Runtime, Tokens, Batches: sound files, known by content, in one order anywhere.

Run alone: python -m pytest -q tests/test_data.py
"""
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TRAIN_SIZES, VAL_SIZE, VOCAB, QuietLog, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import train_gpt
from train_gpt import BOS, Clock, ConfigError, Dist, GolfError, Runtime, Shard, check_data

SIZES = (203, 90, 57, 41)       # tokens of the shards of most plans below


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> Dist:
    """Rank `rank` of `world`, without the other processes."""
    dist = Dist({})
    dist.rank, dist.world, dist.is_main = rank, world, rank == 0
    return dist


def beside(digest: str) -> Dist:
    """The first of two ranks; the other one holds `digest`."""
    dist, theirs = ranked(0, 2), float(int(digest[:12], 16))
    dist.barrier = lambda: None
    dist.all_reduce_max = lambda *values: [
        max(v, math.copysign(theirs, v)) for v in values]               # -0.0 has a sign
    return dist


def runtime(cfg, split: str = "train", log=None) -> Runtime:
    """The surroundings of a run on one rank, in the phase in which `split` may be read."""
    clock = Clock(cfg)
    if split == "val":
        clock.close_training_data()
    return Runtime(Dist({}), log or QuietLog(), clock)


def open_shards(cfg, split: str = "train", log=None) -> list[Shard]:
    """The shards of a split, opened as a run opens them."""
    rt = runtime(cfg, split, log)
    return train_gpt.open_shards(cfg, split, rt, check_data(cfg, rt))


def load_validation(cfg) -> np.ndarray:
    """The validation stream, loaded as a run loads it."""
    rt = runtime(cfg, "val")
    return train_gpt.load_validation(cfg, rt, check_data(cfg, rt))


def blank_shards(sizes) -> list[Shard]:
    """Shards of so many tokens that nobody is going to read."""
    return [Shard(f"toy_train_{i:06d}.bin", np.zeros(n, np.uint16)) for i, n in enumerate(sizes)]


@pytest.fixture
def make_plan(make_cfg):
    """A function that returns a plan of 8-token windows in batches of `seqs` over blank shards."""
    def make(seqs=5, sizes=SIZES, **overrides):
        cfg = make_cfg(seq_len=8, train_batch_tokens=8 * seqs, **overrides)
        return train_gpt.CoprimePlan(cfg, blank_shards(sizes))
    return make


def rows_of(windows: np.ndarray) -> list[tuple[int, int]]:
    """Windows as (shard, offset) pairs that can be counted and compared."""
    return [tuple(w) for w in windows.tolist()]


def stream(plan, batches: int) -> list[tuple[int, int]]:
    """The windows of the next batches, one after the other."""
    return [w for _ in range(batches) for w in rows_of(plan.next())]


def blocks_of_epoch(plan) -> Counter:
    """Every block that the plan's present epoch holds, by the phase of each shard's walk."""
    return Counter((i, phase + 8 * b) for i, (phase, _, _, blocks) in enumerate(plan.walks)
                   for b in range(blocks))


def take_batches(cfg, dist, count: int, state=None) -> tuple[list[torch.Tensor], dict]:
    """The next `count` batches that a rank reads, and the state after the last of them."""
    batches = train_gpt.Batches(cfg, open_shards(cfg), dist, state)
    try:
        return [batches.next() for _ in range(count)], batches.state
    finally:
        batches.close()


def write_manifest(cfg):
    """List the files of a corpus as prepare_data.py does."""
    def entry(path):
        return dict(name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    manifest = {split: dict(files=list(map(entry, cfg.dataset_dir.glob(f"toy_{split}_*.bin"))))
                for split in ("train", "val")}
    manifest["tokenizer"] = entry(cfg.tokenizer_path)
    (cfg.dataset_dir / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def make_corpus(make_cfg, tmp_path):
    """A function of arrays of ids by split: the `Config` of a corpus of its own, of such shards."""
    def make(train=(np.ones(99),), val=(np.ones(99),)):
        cfg = make_cfg(data_dir=str(tmp_path / "own"))
        for split, shards in dict(train=train, val=val).items():
            for i, ids in enumerate(shards):
                write_shard(cfg.dataset_dir / f"toy_{split}_{i:06d}.bin", np.asarray(ids))
        cfg.tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        cfg.tokenizer_path.write_bytes(b"takes the place of a tokenizer")
        for path in (*cfg.dataset_dir.iterdir(), cfg.tokenizer_path):
            os.utime(path, (0, 0))                          # written long ago
        return cfg
    return make


@pytest.fixture
def listed(make_corpus):
    """The `Config` of a corpus of three shards of random ids with a manifest."""
    ids = np.random.default_rng(0).integers(VOCAB, size=1000)
    cfg = make_corpus(train=[ids[:300], ids[300:500]], val=[ids[500:]])
    write_manifest(cfg)
    return cfg


# ------------------------------------------------------------------------------------------------
# Runtime: ranks and clocks
# ------------------------------------------------------------------------------------------------

LAUNCHED = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize("env", [
    dict(WORLD_SIZE="2"), dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"), dict(WORLD_SIZE="x"),
    dict(WORLD_SIZE="0"), dict(WORLD_SIZE="-1"), dict(WORLD_SIZE=""), dict(RANK="1"),
    dict(RANK="x"), dict(RANK="-1"), dict(LOCAL_RANK="x"), dict(LOCAL_RANK="-1"),
    LAUNCHED | dict(RANK="3"), LAUNCHED | dict(LOCAL_RANK="x"), LAUNCHED | dict(MASTER_PORT="x"),
    LAUNCHED | dict(MASTER_PORT="99999"), LAUNCHED | dict(WORLD_SIZE="9" * 20)], ids=str)
def test_rank_variables_that_no_launcher_sets_raise(env):
    """Missing, malformed and impossible rank variables raise with their values and the remedy."""
    with pytest.raises(ConfigError, match="start with torchrun, or unset") as e:
        Dist(env)
    shown = {name: value for name, value in env.items() if "MASTER" not in name}
    assert all(f"{name}={value}" in str(e.value) for name, value in shown.items())


@pytest.mark.parametrize("env", [{}, dict(RANK="0"), dict(WORLD_SIZE="1"), dict(LOCAL_RANK="0"),
                                 dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")], ids=str)
def test_one_rank_needs_no_launcher(env):
    """A process alone is rank 0 of 1, whichever variables say so."""
    dist = Dist(env)
    assert (dist.rank, dist.world, dist.is_main) == (0, 1, True)


@pytest.mark.parametrize("mine,theirs", [
    ("0", "0"), ("ab" * 8, "ab" * 8), ("f" * 64, "f" * 64), ("0", "1"), ("1", "0"),
    ("ab" * 8, "ab" * 5 + "ac"), ("fffffffffffe", "ffffffffffff")])
def test_ranks_compare_digests(mine, theirs):
    """Equal digests pass; one other digit raises, on the rank with the larger and the smaller."""
    if mine == theirs:
        beside(theirs).check_same("the order", mine)
    else:
        with pytest.raises(GolfError, match="^the order differs between ranks; give all of them"):
            beside(theirs).check_same("the order", mine)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_slices_partition_the_items(world):
    """Every item belongs to one rank, neighbours to different ones; numbers are alike."""
    for n in range(20):
        slices = [ranked(rank, world).local_slice(list(range(n))) for rank in range(world)]
        assert sorted(sum(slices, [])) == list(range(n))
        assert world == 1 or all(b - a == world for s in slices for a, b in zip(s, s[1:]))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_clock_counts_from_its_start(cfg):
    """The training clock shows the seconds since its start, and those of an earlier run."""
    clock = Clock(cfg, now=iter([100.0, 107.5, 200.0, 201.0]).__next__)
    clock.start()
    assert clock.elapsed() == 7.5
    clock.start(spent=30.0)
    assert clock.elapsed() == 31.0


@pytest.mark.parametrize("limits,used,over", [
    ((5.0, 7.0), (5.0, 7.0), []), ((5.0, 7.0), (5.1, 7.0), [("data", 5.1, 5.0)]),
    ((5.0, 7.0), (5.1, 7.1), [("data", 5.1, 5.0), ("eval", 7.1, 7.0)]),
    ((0.0, 0.0), (1e6, 1e6), [])])
def test_overtime_is_listed(make_cfg, limits, used, over):
    """The clock lists each exceeded budget, of training data and of scoring; 0 is no budget."""
    clock = Clock(make_cfg(max_wallclock_seconds=limits[0], warmup_steps=2,
                           eval_wallclock_seconds=limits[1]))
    clock.close_training_data(4.0, used[0])
    clock.eval_seconds = used[1]
    assert clock.overtime() == over


# ------------------------------------------------------------------------------------------------
# Runtime: log
# ------------------------------------------------------------------------------------------------

def test_log_lines_can_be_read_back(make_cfg, tmp_path, capsys, read_log):
    """An event's values come back as they were; the console shows the same lines."""
    log = train_gpt.Log(make_cfg(run_id="one"), ranked(0, 1))
    log("step", n="1/6", train_loss=2 / 3, val_bpb=1.0, step_ms=2 / 3, on=True, off=False, none="",
        layers=[1, 2], file="a b.bin", quote='say "x=1"')
    log.line("---")
    path = tmp_path / "logs" / "one.txt"
    assert path.read_text() == capsys.readouterr().out
    assert read_log(path) == [("step", dict(
        n="1/6", train_loss="0.66666667", val_bpb="1.00000000", step_ms="0.666667", on="1", off="0",
        none="", layers="1,2", file="a b.bin", quote='say "x=1"')), ("---", {})]


@pytest.mark.parametrize("overrides,kept", [
    ({}, False), (dict(stages="train"), False), (dict(stages="eval"), True),
    (dict(stages="quantize,eval"), True), (dict(resume=True), True)])
def test_a_new_training_starts_a_new_log(make_cfg, tmp_path, overrides, kept):
    """Later stages and resumed trainings add to the log of the run; a new training replaces it."""
    path = tmp_path / "logs" / "one.txt"
    path.parent.mkdir()
    path.write_text("before\n")
    train_gpt.Log(make_cfg(run_id="one", **overrides), ranked(0, 1))("after")
    assert path.read_text() == "before\n" * kept + "after\n"


def test_only_the_first_rank_writes(make_cfg, tmp_path, capsys):
    """Other ranks leave no file and print nothing."""
    train_gpt.Log(make_cfg(), ranked(1, 2))("step", n=1)
    assert not (tmp_path / "logs").exists() and capsys.readouterr().out == ""


def test_a_log_that_cannot_be_written_raises(make_cfg, tmp_path):
    """A file in the place of the folder raises with the path and the setting."""
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(GolfError, match="logs.*cannot be written.*OUT_DIR"):
        train_gpt.Log(make_cfg(), ranked(0, 1))


# ------------------------------------------------------------------------------------------------
# Tokens: files
# ------------------------------------------------------------------------------------------------

def header(magic=train_gpt.SHARD_MAGIC, version=train_gpt.SHARD_VERSION, count=100) -> bytes:
    """A shard's header with these numbers."""
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, count
    return numbers.tobytes()


@pytest.mark.parametrize("data", [
    b"", b"x", header()[:1000], header(),
    header(magic=1) + bytes(200), header(version=2) + bytes(200), header(count=101) + bytes(200),
    header(count=99) + bytes(200), header(count=0), header(count=-1) + bytes(200),
    header() + bytes(199), header() + bytes(201)],
    ids=["empty", "one byte", "half a header", "no tokens", "magic", "version", "count too high",
         "count too low", "count zero", "count negative", "a byte short", "a byte more"])
def test_damaged_shards_raise(tmp_path, data):
    """A shard whose header or size cannot be right raises one line that begins with its path."""
    path = tmp_path / "toy_train_000000.bin"
    path.write_bytes(data)
    with pytest.raises(GolfError) as e:
        train_gpt.read_shard(path)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


def test_sound_shards_are_read_whole(tmp_path):
    """A shard comes back id for id, up to the largest of 16 bits."""
    ids = np.array([0, 1, 255, 256, 65535], np.uint16)
    write_shard(tmp_path / "x.bin", ids)
    shard = train_gpt.read_shard(tmp_path / "x.bin")
    assert shard.name == "x.bin" and shard.tokens.tolist() == ids.tolist()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)],
                         ids=["folder", "FIFO", "broken link"])
@pytest.mark.parametrize("name", ["toy_train_000001.bin", "toy_val_000001.bin"])
def test_shards_that_are_no_files_raise(make_corpus, make, name):
    """A folder, a FIFO or a broken link in the place of a shard raises; nobody waits for it."""
    cfg = make_corpus()
    path = cfg.dataset_dir / name
    make(path)
    with pytest.raises(GolfError, match=f"^{path}: cannot be read"):
        check_data(cfg, runtime(cfg))


def test_no_shards_at_all_raise(make_cfg, tmp_path):
    """Without a data folder, or with an empty one, the message names pattern, folder, settings."""
    cfg = make_cfg(data_dir=str(tmp_path / "nowhere"))
    for _ in range(2):
        with pytest.raises(GolfError, match=rf"^{cfg.dataset_dir}: no toy_train_\*.bin;.*DATA_DIR"):
            check_data(cfg, runtime(cfg))
        cfg.dataset_dir.mkdir(parents=True, exist_ok=True)


def test_an_unfinished_corpus_raises(listed):
    """Shards beside prepare_data.py's lock are not read until their manifest is there."""
    (listed.dataset_dir / ".lock").touch()
    check_data(listed, runtime(listed))
    (listed.dataset_dir / "manifest.json").unlink()
    with pytest.raises(GolfError, match="not finished; run the same prepare_data.py again"):
        check_data(listed, runtime(listed))


def test_shards_stand_in_name_order(cfg, quiet):
    """Shards are listed by name, and the log says how many tokens they hold."""
    shards = open_shards(cfg, log=quiet)
    assert [s.name for s in shards] == [f"toy_train_{i:06d}.bin" for i in range(3)]
    assert quiet.of("data")[0]["tokens"] == sum(TRAIN_SIZES)


def test_tokens_beyond_the_vocabulary_raise(make_corpus):
    """In either split the file with an id beyond the vocabulary is named; the largest id passes."""
    good, bad = np.full(99, VOCAB - 1), np.full(99, VOCAB)
    cfg = make_corpus([good], [good])
    take_batches(cfg, ranked(0, 1), 1)
    load_validation(cfg)
    cfg, fault = make_corpus([good, bad], [good, bad]), f"token id {VOCAB} with VOCAB_SIZE={VOCAB}"
    with pytest.raises(GolfError, match=f"^toy_train_000001.bin: {fault}"):
        take_batches(cfg, ranked(0, 1), 3)
    with pytest.raises(GolfError, match=f"^toy_val_000001.bin: {fault}"):
        load_validation(cfg)


@pytest.mark.parametrize("sizes", [[65], [66], [96], [97], [40, 57], [1, 32], [33, 1, 1, 30]])
def test_validation_is_the_longest_multiple_of_windows(make_corpus, sizes):
    """All val shards end to end, cut to a multiple of seq_len targets and the token before them."""
    ids = np.arange(sum(sizes))
    cfg = make_corpus(val=np.split(ids, np.cumsum(sizes)[:-1]))
    assert load_validation(cfg).tolist() == list(range((sum(sizes) - 1) // 32 * 32 + 1))


def test_too_little_validation_raises_before_training(make_corpus):
    """A validation split shorter than one window raises with both numbers, if it will be scored."""
    cfg = make_corpus(val=[np.ones(32)])
    with pytest.raises(GolfError, match="32 validation tokens; .*SEQ_LEN=32 needs 33"):
        check_data(cfg, runtime(cfg))
    check_data(replace(cfg, stages="train,quantize"), runtime(cfg))


# ------------------------------------------------------------------------------------------------
# Tokens: identity
# ------------------------------------------------------------------------------------------------

def rewrite_ids(path, change):
    """Replace the ids of a shard by `change` of them, under a header that fits."""
    write_shard(path, change(np.array(train_gpt.read_shard(path).tokens)))
    os.utime(path, ns=(0, time.time_ns()))                  # file systems count in milliseconds


def exchange_two(ids: np.ndarray) -> np.ndarray:
    """Ids whose first two are exchanged: the same ones, as many of each."""
    ids[:2] = ids[1::-1]
    return ids


EXCHANGES = {
    "tokenizer": (lambda data, _: (data / "tokenizers" / f"toy_{VOCAB}_bpe.model").write_bytes(
        b"takes the place of another one"), f"toy_{VOCAB}_bpe.model has SHA-256"),
    "val shard cut in half": (lambda _, folder: rewrite_ids(
        folder / "toy_val_000000.bin", lambda ids: ids[:250]), "toy_val_000000.bin has SHA-256"),
    "two ids exchanged": (lambda _, folder: rewrite_ids(
        folder / "toy_train_000001.bin", exchange_two), "toy_train_000001.bin has SHA-256"),
    "shard renamed": (lambda _, folder: (folder / "toy_train_000001.bin").rename(
        folder / "toy_train_000002.bin"), "toy_train_000001.bin is missing"),
    "shard missing": (lambda _, folder: (folder / "toy_train_000000.bin").unlink(),
                      "toy_train_000000.bin is missing"),
    "shard more": (lambda _, folder: shutil.copy(folder / "toy_val_000000.bin",
                                                 folder / "toy_val_000001.bin"),
                   "toy_val_000001.bin is not in manifest.json"),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_data_that_is_not_the_manifests_raises(listed, name):
    """Other contents of any file, a file missing or one too many raise with its name and a remedy.

    That the first start has cached the digests makes no difference.
    """
    exchange, message = EXCHANGES[name]
    assert check_data(listed, runtime(listed)).manifest == "checked"
    exchange(listed.dataset_dir.parents[1], listed.dataset_dir)
    with pytest.raises(GolfError, match=f"^toy_sp{VOCAB}: {message}.*the same prepare_data.py"):
        check_data(listed, runtime(listed))


def test_flipped_bits_raise(listed, monkeypatch):
    """A shard with any one of its bits flipped raises with the shard's name."""
    monkeypatch.setattr(os, "fsync", lambda file: None)     # 400 caches need not survive a crash
    path = listed.dataset_dir / "toy_train_000000.bin"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    bits = rng.choice(8 * len(data), 400, replace=False)
    for bit in bits.tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(GolfError, match=path.name):
            check_data(listed, runtime(listed))


def test_stages_need_their_own_files_only(listed):
    """Training alone passes with a damaged val shard, scoring alone with a damaged train shard."""
    alone = dict(train="train,quantize", val="eval")
    for split, other in (("train", "val"), ("val", "train")):
        rewrite_ids(listed.dataset_dir / f"toy_{other}_000000.bin", exchange_two)
        check_data(replace(listed, stages=alone[split]), runtime(listed))
        with pytest.raises(GolfError, match=f"toy_{other}_000000.bin"):
            check_data(replace(listed, stages=alone[other]), runtime(listed))
        rewrite_ids(listed.dataset_dir / f"toy_{other}_000000.bin", exchange_two)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '{"train": {"files": []}, "val": {"files": []}}', "[" * 9000,
    '{"train": {"files": [3]}, "val": {"files": []}, "tokenizer": {}}', "\u00e9"], ids=range(9))
def test_broken_manifests_raise(listed, text):
    """A manifest that cannot be read raises with its path; it does not count as none."""
    path = listed.dataset_dir / "manifest.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(GolfError, match=f"^{path}: not a manifest"):
        check_data(listed, runtime(listed))


def test_the_log_knows_contents(make_corpus):
    """The digest in the log is of names and contents: shuffled ids are other data, a copy is not.

    Without a manifest the log says so.
    """
    ids, events = np.arange(300), []
    for train in ([ids], [ids[::-1]], [ids[:200], ids[200:]], [ids]):
        log, cfg = QuietLog(), make_corpus(train)
        open_shards(cfg, log=log)
        shutil.rmtree(cfg.data_dir)
        events += log.of("data")
    digests = [event["sha256"] for event in events]
    assert len(set(digests)) == 3 and digests[0] == digests[3]
    assert {event["manifest"] for event in events} == {"none"}


def test_a_second_start_hashes_only_what_changed(listed, monkeypatch):
    """Digests are cached beside the shards, by name, size and time of change."""
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest",
                        lambda file, kind: hashed.append(file.name) or digest(file, kind))
    first = check_data(listed, runtime(listed))
    assert len(hashed) == 4                                 # three shards and the tokenizer
    assert check_data(listed, runtime(listed)) == first and len(hashed) == 4
    (listed.dataset_dir / "manifest.json").unlink()
    path = listed.dataset_dir / "toy_val_000000.bin"
    rewrite_ids(path, exchange_two)
    second = check_data(listed, runtime(listed))
    assert hashed[4:] == [str(path)]
    assert {n for n in first.sha256 if first.sha256[n] != second.sha256[n]} == {path.name}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[3]", '{"a": 3}', "[" * 9000, "\u00e9"],
                         ids=range(8))
def test_a_damaged_cache_is_ignored(listed, text):
    """Whatever the cache holds, files are hashed, and the next start finds a sound cache."""
    first = check_data(listed, runtime(listed))
    cache = listed.dataset_dir / ".sha256.json"
    sound = cache.read_bytes()
    cache.write_text(text, encoding="latin-1")
    assert check_data(listed, runtime(listed)) == first
    assert cache.read_bytes() == sound


def test_the_cache_can_be_left_out(listed):
    """A folder that cannot be written to, here with a folder in the cache's place, is read."""
    (listed.dataset_dir / ".sha256.json").mkdir()
    assert check_data(listed, runtime(listed)).manifest == "checked"


def test_a_missing_tokenizer_raises_before_training(listed):
    """A run that is going to score raises at once without its tokenizer."""
    listed.tokenizer_path.unlink()
    with pytest.raises(GolfError, match=f"^{listed.tokenizer_path}: no tokenizer of VOCAB_SIZE"):
        check_data(listed, runtime(listed))
    check_data(replace(listed, stages="train"), runtime(listed))


def test_ranks_with_other_files_raise_before_training(cfg):
    """A rank raises if another one has hashed other files."""
    with pytest.raises(GolfError, match="^the dataset differs between ranks"):
        check_data(cfg, runtime(cfg)._replace(dist=beside("ab" * 32)))


# ------------------------------------------------------------------------------------------------
# Tokens: the clock is the key
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split,phase", [("val", "train"), ("train", "eval")])
def test_a_split_stays_shut_outside_its_phase(cfg, monkeypatch, split, phase):
    """No validation shard is opened before training data is closed, no training shard after."""
    identity = check_data(cfg, runtime(cfg))
    monkeypatch.setattr(train_gpt, "read_shard", lambda path: pytest.fail(f"{path} was opened"))
    rt = runtime(cfg, dict(train="train", eval="val")[phase])
    with pytest.raises(GolfError, match=f"{split} shards must not be opened in the {phase} phase"):
        train_gpt.open_shards(cfg, split, rt, identity)
    if split == "val":
        with pytest.raises(GolfError):
            train_gpt.load_validation(cfg, rt, identity)


def test_validation_opens_after_training_data_is_closed(cfg):
    """Then the whole validation stream can be read."""
    assert len(load_validation(cfg)) == (VAL_SIZE - 1) // 32 * 32 + 1


# ------------------------------------------------------------------------------------------------
# Tokens: bytes
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(toy_data):
    """The toy corpus's tokenizer."""
    return train_gpt.load_tokenizer(toy_data / "tokenizers" / f"toy_{VOCAB}_bpe.model", VOCAB)


def slow_bytes(tokenizer, before: int, target: int) -> int:
    """The challenge's rule for one target, spelled out."""
    def is_silent(i):
        return tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
    if is_silent(target):
        return 0
    if tokenizer.is_byte(target):
        return 1
    piece = tokenizer.id_to_piece(target)
    if piece[0] != "\u2581":
        return len(piece.encode())
    return len(piece[1:].encode()) + (0 if is_silent(before) else 1)


def count_bytes(tokenizer, ids) -> list[int]:
    """The bytes of the targets of a stream by `bytes_per_target`."""
    return train_gpt.bytes_per_target(np.array(ids, np.uint16), tokenizer).tolist()


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(st.one_of(st.characters(exclude_categories=["Cs"]),
                                        st.sampled_from("the model 0. \n\u2581")), max_size=40)))
def test_bytes_of_documents_are_bytes_of_their_text(tokenizer, texts):
    """Documents that each begin with BOS count as many bytes as the decoded texts have in UTF-8."""
    documents = [tokenizer.encode(text) for text in texts]
    ids = [i for document in documents for i in [BOS, *document]] + [BOS]
    text_bytes = [len(tokenizer.decode(document).encode()) for document in documents]
    assert sum(count_bytes(tokenizer, ids)) == sum(text_bytes)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60))
def test_bytes_follow_the_rule_for_any_ids(tokenizer, ids):
    """Any sequence of ids, likely or not, is counted target by target as the rule says."""
    expected = [slow_bytes(tokenizer, *pair) for pair in itertools.pairwise(ids)]
    assert count_bytes(tokenizer, ids) == expected


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(260, VOCAB - 1), max_size=40))
def test_bytes_within_a_document_are_those_decoding_adds(tokenizer, ids):
    """After a first piece, targets count the bytes that they add to the decoded text."""
    first = tokenizer.piece_to_id("e")
    added = len(tokenizer.decode([first, *ids]).encode()) - 1
    assert sum(count_bytes(tokenizer, [first, *ids, BOS])) == added


def test_bytes_of_every_kind_of_piece(tokenizer):
    """Literal cases: a space counts except after BOS, byte pieces are 1, a new document is free."""
    the, e, space = (tokenizer.piece_to_id(p) for p in ("\u2581the", "e", "\u2581"))
    byte, unk, pad = tokenizer.piece_to_id("<0xC3>"), tokenizer.unk_id(), tokenizer.pad_id()
    ids = [BOS, the, the, e, space, the, byte, byte, the, unk, the, BOS, BOS, space, e, pad, e]
    assert count_bytes(tokenizer, ids) == [3, 4, 1, 1, 4, 1, 1, 4, 0, 3, 0, 0, 0, 1, 0, 1]


def test_bytes_of_long_and_unused_pieces():
    """A piece of many bytes fits the type of the counts; an unused id is silent like BOS."""
    class Odd:
        """A tokenizer of four pieces: control, unused, long, spaced."""
        pieces = ["<s>", "\u2581gone", "\u00e9" * 300, "\u2581x"]
        vocab_size, id_to_piece = lambda self: 4, lambda self, i: self.pieces[i]
        is_control, is_unused = lambda self, i: i == 0, lambda self, i: i == 1
        is_unknown = is_byte = lambda self, i: False
    sizes = train_gpt.bytes_per_target(np.array([2, 2, 1, 3, 3, 0, 3], np.uint16), Odd())
    assert sizes.dtype == np.int16 and sizes.tolist() == [600, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("damage,message", [
    ("missing", "no tokenizer"), ("folder", "no tokenizer"), ("FIFO", "no tokenizer"),
    ("garbage", "not a SentencePiece model"), ("empty", "not a SentencePiece model"),
    ("cut", "not a SentencePiece model"), ("size", "must agree"),
    ("artifact", "not the tokenizer of this artifact")])
def test_wrong_tokenizers_raise(toy_data, tmp_path, damage, message):
    """A tokenizer that is missing, broken, of another size or another artifact's raises by path."""
    path, good = tmp_path / "one.model", toy_data / "tokenizers" / f"toy_{VOCAB}_bpe.model"
    good = good.read_bytes()
    make = dict(missing=lambda path: None, folder=os.mkdir, FIFO=os.mkfifo)
    data = dict(garbage=b"no model", empty=b"", cut=good[:-5])
    make.get(damage, lambda path: path.write_bytes(data.get(damage, good)))(path)
    with pytest.raises(GolfError) as e:
        train_gpt.load_tokenizer(path, VOCAB + (damage == "size"), "ab" * 32)
    assert str(e.value).startswith(f"{path}: ") and message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_tokenizer_without_a_space_raises(tmp_path, monkeypatch):
    """Where a lone space is no piece of its own its byte would not be counted."""
    monkeypatch.setitem(prepare_data.TOKENIZER_SETTINGS, "required_chars", "")
    path = tmp_path / "one.model"
    path.write_bytes(prepare_data.train_tokenizer(["abcabc", "bcdabd"] * 50, 270))
    with pytest.raises(GolfError, match=r"\.model: .*space"):
        train_gpt.load_tokenizer(path, 270)


# ------------------------------------------------------------------------------------------------
# Batches: the plan
# ------------------------------------------------------------------------------------------------

def test_strides_are_coprime_for_every_number_of_blocks(make_plan):
    """For 1 to 500 blocks the walk visits every block once and stays within its shard."""
    plan = make_plan(sizes=[8 * (n + 1) for n in range(1, 501)])
    for i, (phase, start, stride, blocks) in enumerate(plan.walks):
        assert blocks == i + 1 and math.gcd(stride, blocks) == 1 and 0 <= phase < 8
        offsets = plan.next_blocks(i, blocks)[:, 1]
        assert sorted(offsets) == list(range(phase, phase + 8 * blocks, 8)), f"{blocks} blocks"
        assert offsets[0] == phase + 8 * start and max(offsets) + 9 <= plan.sizes[i]


def test_walks_differ_between_shards_epochs_and_seeds(make_plan):
    """Phase, start and stride are drawn anew for every shard, epoch and SEED."""
    plan, other = make_plan(sizes=[8000] * 3), make_plan(sizes=[8000] * 3, seed=2)
    walks = plan.walks + other.walks
    plan.start_epoch(1)
    assert len(set(walks + plan.walks)) == 9


@pytest.mark.parametrize("seqs", [1, 5, 46, 200])
def test_each_block_is_used_once_an_epoch(make_plan, seqs):
    """After any batch: all blocks of the epochs before, and of the present one some, once each."""
    plan, seen, whole, epoch = make_plan(seqs), Counter(), Counter(), 0
    present = blocks_of_epoch(plan)
    for _ in range(-(-200 // seqs)):
        seen.update(rows_of(plan.next()))
        while epoch < plan.epoch:                           # also several epochs in one batch
            whole, epoch = whole + present, epoch + 1
            reference = make_plan(seqs)
            reference.start_epoch(epoch)
            present = blocks_of_epoch(reference)
        assert not whole - seen, "a block of a finished epoch was left out"
        assert not (seen - whole) - present, "a block was used twice, or is none"
    assert epoch >= 3 and sum(present.values()) < sum(SIZES) / 8


def test_epochs_differ_in_more_than_their_phase(make_plan):
    """The same blocks come in another order in the next epoch."""
    plan = make_plan(seqs=30, sizes=[9] * 30)       # one block a shard, one phase
    first, second = (stream(plan, 1) for _ in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_batches_mix_different_shards(make_plan):
    """Which shards a batch mixes is drawn anew for every batch."""
    plan = make_plan(seqs=8, sizes=[8001] * 100)
    mixed = [{shard for shard, _ in stream(plan, 1)} for _ in range(5)]
    assert all(len(shards) == 8 for shards in mixed) and len(set.union(*mixed)) > 16


def test_windows_stay_within_their_shards(make_plan):
    """Inputs and the target after them lie inside the shard, also inside the shortest possible."""
    sizes = (9, 10, 16, 17, 100)
    for shard, offset in stream(make_plan(seqs=16, sizes=sizes), 20):
        assert 0 <= offset and offset + 9 <= sizes[shard]


def test_order_depends_on_the_seed_and_the_files(make_plan):
    """Same seed and files, same order; another SEED, size or name, another order."""
    first = stream(make_plan(seqs=20), 2)
    assert stream(make_plan(seqs=20), 2) == first
    assert stream(make_plan(seqs=20, seed=2), 2) != first
    assert stream(make_plan(seqs=20, sizes=(211, *SIZES[1:])), 2) != first
    renamed = [s._replace(name="x" + s.name) for s in blank_shards(SIZES)]
    plan = make_plan(seqs=20)
    assert stream(train_gpt.CoprimePlan(plan.cfg, renamed), 2) != first


def test_no_batch_reads_held_out_windows(make_plan):
    """With HELD_OUT_EVERY the last 64 windows of the last shard stay unread, and no others."""
    sizes = (90, 8 * train_gpt.HELD_OUT + 203)
    plain, plan = make_plan(seqs=10, sizes=sizes), make_plan(seqs=10, sizes=sizes, held_out_every=1)
    ends = {(shard, offset + 8) for shard, offset in stream(plan, 40)}
    assert plan.epoch >= 3 and 195 < max(end for shard, end in ends if shard) <= 202
    assert 80 < max(end for shard, end in ends if not shard) <= 89
    assert max(offset + 8 for _, offset in stream(plain, 90)) > 600
    with pytest.raises(GolfError, match="SEQ_LEN=8 and its target, beside 64 held-out ones"):
        make_plan(sizes=(90, 8 * train_gpt.HELD_OUT + 8), held_out_every=1)


def test_shards_shorter_than_a_window_raise(make_plan):
    """A shard without room for one sequence and its target raises with its name."""
    with pytest.raises(GolfError, match="^toy_train_000001.bin: shorter .*SEQ_LEN=8"):
        make_plan(sizes=(100, 8, 9))


@pytest.mark.parametrize("seqs", [5, 46])
def test_a_plan_continues_from_its_state(make_plan, seqs):
    """From any batch on, a plan that loads the state continues as if it had never stopped."""
    plan, batches = make_plan(seqs), []
    states = [json.dumps(plan.state_dict())]
    for _ in range(24):                                     # more than one epoch
        batches.append(rows_of(plan.next()))
        states.append(json.dumps(plan.state_dict()))
    for k in range(22):
        copy = make_plan(seqs)
        copy.load_state_dict(json.loads(states[k]))
        assert stream(copy, 2) == batches[k] + batches[k + 1]
        assert json.dumps(copy.state_dict()) == states[k + 2]
    assert plan.epoch >= 2


@pytest.mark.parametrize("other", [dict(seed=2), dict(seqs=6),
                                   dict(sizes=(204, *SIZES[1:]))], ids=str)
def test_a_state_of_another_order_raises(make_plan, other):
    """A plan does not continue from the state of another seed, batch or set of files."""
    with pytest.raises(GolfError, match="read its data in another order; use its SEED, SEQ_LEN"):
        make_plan().load_state_dict(make_plan(**other).state_dict())


def test_digest_tells_orders_apart(make_plan):
    """Equal orders have equal digests after each batch; no other two digests are equal."""
    plan, same, other = make_plan(), make_plan(), make_plan(seed=2)
    digests = []
    for _ in range(5):
        for p in (plan, same, other):
            p.next()
        digests += [plan.digest, other.digest]
        assert plan.digest == same.digest
    assert len(set(digests)) == 10


def test_digest_remembers_every_batch_and_its_order(make_plan, monkeypatch):
    """Equal last batches do not make equal digests, which have digits enough to be compared."""
    a, b, c = (np.array([[0, offset]]) for offset in (0, 8, 16))
    digests = set()
    for batches in ((a, b), (b, a), (c, b), (b,), (a, a)):
        plan = make_plan()
        for windows in batches:
            monkeypatch.setattr(train_gpt, "interleave", lambda *_, windows=windows: windows)
            plan.next()
        digests.add(plan.digest)
    assert len(digests) == 5 and all(len(digest) >= 12 for digest in digests)


# ------------------------------------------------------------------------------------------------
# Batches: weights of shards
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("progress,epoch,alpha", [(0.0, 0, 0.9), (0.5, 0, 0.7), (1.0, 0, 0.5),
                                                  (0.0, 1, 0.5)])
def test_shards_are_drawn_by_what_is_left_in_them(make_plan, progress, epoch, alpha):
    """A single draw takes shard i with weight left_i**alpha, alpha falling as data is used."""
    plan = make_plan(sizes=[8 * 1001, 8 * 101, 8 * 11])
    plan.start_epoch(epoch)
    plan.used = (progress * plan.blocks).astype(int)
    left, draws, rng = np.array([600, 60, 6]), 4000, np.random.default_rng(0)
    counts = sum(plan.draw_counts(rng, left, 1) for _ in range(draws))
    p = left ** alpha / (left ** alpha).sum()
    assert counts.sum() == draws
    assert (abs(counts - draws * p) < 4 * np.sqrt(draws * p * (1 - p))).all()


def test_large_draws_give_each_mixed_shard_one_and_the_rest_by_weight(make_plan):
    """Of 64 windows over 3 shards each gets 1, the other 61 go by weight."""
    plan, draws, rng = make_plan(sizes=[8 * 5001, 8 * 501, 8 * 51]), 400, np.random.default_rng(0)
    counts = np.array([plan.draw_counts(rng, plan.blocks, 64) for _ in range(draws)])
    p = plan.blocks ** 0.9 / (plan.blocks ** 0.9).sum()
    assert counts.min() >= 1 and (counts.sum(1) == 64).all()
    assert (abs(counts.mean(0) - 1 - 61 * p) < 4 * np.sqrt(61 * p * (1 - p) / draws)).all()


@pytest.mark.parametrize("progress,epoch,mixed", [(0.0, 0, 8), (0.5, 0, 36), (1.0, 0, 64),
                                                  (0.0, 2, 64)])
def test_more_shards_are_mixed_as_data_is_used(make_plan, progress, epoch, mixed):
    """A batch mixes 8 shards at first and 64 at last, in a straight line over the first epoch."""
    plan = make_plan(sizes=[8 * 21] * 100)
    plan.start_epoch(epoch)
    plan.used = (progress * plan.blocks).astype(int)
    counts = plan.draw_counts(np.random.default_rng(0), np.full(100, 10 ** 6), 300)
    assert np.count_nonzero(counts) == mixed and counts.sum() == 300


def test_draws_never_exceed_what_is_left(make_plan):
    """No shard gives more than it has, and an exhausted one gives nothing."""
    plan, rng, left = make_plan(), np.random.default_rng(0), np.array([20, 2, 0, 1])
    for need in (1, 3, 23, 100):
        counts = plan.draw_counts(rng, left, need)
        assert (counts <= left).all() and 0 < counts.sum() <= need


def test_shards_are_interleaved():
    """Buckets are dealt in rounds, one window of each that is left, so that neighbours differ."""
    buckets = [np.stack([np.full(n, i), np.arange(n)], 1) for i, n in enumerate((5, 3, 1, 5))]
    dealt = train_gpt.interleave(np.random.default_rng(0), list(buckets))
    assert sorted(rows_of(dealt)) == sorted(rows_of(np.concatenate(buckets)))
    ends = [0, 4, 7, 10, 12, 14]                            # rounds of 4, 3, 3, 2, 2 windows
    for lo, hi in itertools.pairwise(ends):
        assert len(set(dealt[lo:hi, 0])) == hi - lo
    first = dealt[dealt[:, 0] == 0, 1].tolist()
    assert first not in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]), "a bucket was not shuffled"


# ------------------------------------------------------------------------------------------------
# Batches: reading
# ------------------------------------------------------------------------------------------------

def test_batches_hold_the_tokens_of_the_plan(make_cfg):
    """Row r of a batch is the window r of the plan: seq_len inputs and one target more."""
    cfg = make_cfg()
    shards = open_shards(cfg)
    plan = train_gpt.CoprimePlan(cfg, shards)
    for rows in take_batches(cfg, ranked(0, 1), 5)[0]:
        assert rows.dtype == torch.int64 and rows.shape == (8, 33)
        for row, (i, offset) in zip(rows, plan.next()):
            assert row.tolist() == shards[i].tokens[offset:offset + 33].tolist()


def test_ranks_share_the_held_out_windows(make_cfg):
    """Side by side they are the end of the last shard, a target beside each token."""
    cfg = make_cfg(held_out_every=1, seq_len=8, train_batch_tokens=64)
    shards = blank_shards((90, 8 * train_gpt.HELD_OUT + 203))
    shards[1].tokens[:] = np.arange(len(shards[1].tokens)) % cfg.vocab_size
    rows = torch.zeros(train_gpt.HELD_OUT, 9, dtype=torch.int64)
    for rank in range(3):
        batches = train_gpt.Batches(cfg, shards, ranked(rank, 3))
        rows[rank::3] = batches.held_out()
        batches.close()
    assert rows[:, :-1].flatten().tolist() == shards[1].tokens[-513:-1].tolist()
    assert rows[:, 1:].flatten().tolist() == shards[1].tokens[-512:].tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_global_batch(make_cfg, world):
    """At any world size the ranks' parts together are the batch of one process, row for row."""
    cfg = make_cfg()
    alone, _ = take_batches(cfg, ranked(0, 1), 6)
    parts = [take_batches(cfg, ranked(rank, world), 6)[0] for rank in range(world)]
    for whole, *slices in zip(alone, *parts):
        assert torch.equal(torch.stack(slices, 1).flatten(0, 1), whole)


def test_order_does_not_depend_on_the_folder(make_cfg, toy_data, tmp_path, monkeypatch):
    """A copy elsewhere, a relative path or another micro-batch reads the same; another SEED not."""
    shutil.copytree(toy_data, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    here, other, small, seed = (
        torch.stack(take_batches(make_cfg(**o), ranked(0, 1), 4)[0])
        for o in ({}, dict(data_dir="moved"), dict(micro_batch_seqs=1), dict(seed=2)))
    assert torch.equal(here, other) and torch.equal(here, small)
    assert not torch.equal(here, seed)


def wait_until(claim, seconds: float = 10.0):
    """Return once `claim()` holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_reading_continues_after_the_batch_of_the_state(make_cfg):
    """The state is that of the last batch handed out, not of those read ahead."""
    cfg = make_cfg()
    whole, _ = take_batches(cfg, ranked(0, 1), 6)
    batches = train_gpt.Batches(cfg, open_shards(cfg), ranked(0, 1))
    for count in range(3):
        wait_until(lambda: all(read.done() for read in batches.ready))
        assert batches.state["batch"] == count < batches.plan.batch
        if count < 2:
            batches.next()
    batches.close()
    rest, state = take_batches(cfg, ranked(0, 1), 4, json.loads(json.dumps(batches.state)))
    assert torch.equal(torch.stack(rest), torch.stack(whole[2:])) and state["batch"] == 6


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError("no room"), ValueError("odd")])
def test_errors_of_the_reader_reach_the_trainer(cfg, monkeypatch, error):
    """An error in the reading thread is raised where the next batch is asked for."""
    def fail(self):
        raise error
    monkeypatch.setattr(train_gpt.Batches, "read", fail)
    with pytest.raises(type(error), match=str(error)):
        take_batches(cfg, ranked(0, 1), 1)


@pytest.mark.parametrize("taken", [0, 9])
def test_close_ends_the_thread(cfg, taken):
    """After close no thread is left, whatever has been read ahead."""
    before, shards = threading.active_count(), open_shards(cfg)
    batches = train_gpt.Batches(cfg, shards, ranked(0, 1))
    assert threading.active_count() == before + 1
    for _ in range(taken):
        batches.next()
    batches.close()
    assert threading.active_count() == before
