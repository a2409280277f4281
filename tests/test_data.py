"""train_gpt.py, Ranks and logging, Tokens, Batches: sound files, every byte, one order anywhere.

Run alone: python -m pytest -q tests/test_data.py
"""
import itertools
import json
import math
import os
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import PROGRAM, VAL_SIZE, VOCAB, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import train_gpt
from train_gpt import BudgetError, Clock, DataError, Shard

LOADERS = ("coprime", "shuffled")
SIZES = (203, 90, 57, 41)       # tokens of the shards of most plans below
BOS = prepare_data.BOS


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def ranked(rank: int, world: int) -> train_gpt.Dist:
    """Rank `rank` of `world`, without the other processes."""
    dist = train_gpt.Dist({})
    dist.rank, dist.world, dist.is_main = rank, world, rank == 0
    return dist


def blank_shards(sizes) -> list[Shard]:
    """Shards of so many tokens that nobody is going to read."""
    return [Shard(f"toy_train_{i:06d}.bin", np.zeros(n, np.uint16)) for i, n in enumerate(sizes)]


@pytest.fixture
def make_plan(make_cfg):
    """A function that returns a plan of 8-token windows in batches of `seqs` over blank shards."""
    def make(loader="coprime", seqs=5, sizes=SIZES, **overrides):
        cfg = make_cfg(seq_len=8, train_batch_tokens=8 * seqs, loader=loader, **overrides)
        return plan_class(loader)(cfg, blank_shards(sizes))
    return make


def plan_class(loader: str):
    """The class behind a value of LOADER."""
    return dict(coprime=train_gpt.CoprimePlan, shuffled=train_gpt.ShuffledPlan)[loader]


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
    shards = train_gpt.open_shards(cfg, "train", Clock(cfg), lambda *a, **k: None)
    batches = train_gpt.Batches(cfg, shards, dist, state)
    try:
        return [batches.next() for _ in range(count)], batches.state
    finally:
        batches.close()


def make_corpus(make_cfg, tmp_path, **splits):
    """A `Config` of a corpus of its own, whose shards hold the given arrays of ids."""
    cfg = make_cfg(data_dir=str(tmp_path / "own"))
    for split, shards in splits.items():
        for i, ids in enumerate(shards):
            write_shard(cfg.dataset_dir / f"toy_{split}_{i:06d}.bin", np.asarray(ids))
    return cfg


def scoring_clock(cfg) -> Clock:
    """A clock whose training data is closed."""
    clock = Clock(cfg)
    clock.close_training_data(0.0, 0.0)
    return clock


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
def test_damaged_shards_are_refused(tmp_path, data):
    """A shard whose header or size cannot be right is a DataError that begins with its path."""
    path = tmp_path / "toy_train_000000.bin"
    path.write_bytes(data)
    with pytest.raises(DataError) as e:
        train_gpt.read_shard(path)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


def test_sound_shards_are_read_whole(tmp_path):
    """What prepare_data.py writes comes back id for id, up to the largest of 16 bits."""
    ids = np.array([0, 1, 255, 256, 65535], np.uint16)
    write_shard(tmp_path / "x.bin", ids)
    shard = train_gpt.read_shard(tmp_path / "x.bin")
    assert shard.name == "x.bin" and shard.tokens.tolist() == ids.tolist()


def test_missing_and_unreadable_files_are_refused(tmp_path):
    """No file, or a folder or pipe in its place, is a DataError that begins with the path."""
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("none.bin", "folder.bin", "pipe.bin"):
        with pytest.raises(DataError, match=f"^{tmp_path / name}: cannot be read"):
            train_gpt.read_shard(tmp_path / name)


def test_no_shards_at_all_is_an_error(make_cfg, tmp_path, quiet):
    """Without a data folder, or with an empty one, the message says what was looked for where."""
    cfg = make_cfg(data_dir=str(tmp_path / "nowhere"))
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^{cfg.dataset_dir}: no toy_train_\*.bin;.*DATA_DIR"):
            train_gpt.open_shards(cfg, "train", Clock(cfg), quiet)
        cfg.dataset_dir.mkdir(parents=True, exist_ok=True)


def test_shards_stand_in_name_order(cfg, quiet):
    """Shards are listed by name, and the log says how many tokens they hold."""
    shards = train_gpt.open_shards(cfg, "train", Clock(cfg), quiet)
    assert [s.name for s in shards] == [f"toy_train_{i:06d}.bin" for i in range(3)]
    assert quiet.of("data")[0]["tokens"] == sum(len(s.tokens) for s in shards)


def test_token_beyond_the_vocabulary_in_training(make_cfg, tmp_path):
    """The trainer is told of an id that the model has no row for; the largest valid one passes."""
    ids = np.full(200, VOCAB - 1)
    take_batches(make_corpus(make_cfg, tmp_path, train=[ids]), ranked(0, 1), 1)
    ids[100] = VOCAB
    cfg = make_corpus(make_cfg, tmp_path, train=[ids])
    with pytest.raises(DataError, match=f"token id {VOCAB} with VOCAB_SIZE={VOCAB}"):
        take_batches(cfg, ranked(0, 1), 1)


def test_token_beyond_the_vocabulary_in_validation(make_cfg, tmp_path, quiet):
    """Scoring refuses a stream with an id beyond the vocabulary; the largest valid one passes."""
    ids = np.full(200, VOCAB - 1)
    cfg = make_corpus(make_cfg, tmp_path, val=[ids])
    train_gpt.load_validation(cfg, scoring_clock(cfg), quiet)
    ids[7] = 65535
    cfg = make_corpus(make_cfg, tmp_path, val=[ids])
    with pytest.raises(DataError, match="token id 65535"):
        train_gpt.load_validation(cfg, scoring_clock(cfg), quiet)


def test_the_file_with_the_bad_token_is_named(make_cfg, tmp_path, quiet):
    """Of several shards the message names the one that holds the bad id."""
    good, bad = np.ones(33, int), np.full(300, VOCAB)
    cfg = make_corpus(make_cfg, tmp_path, train=[good, bad], val=[good, bad])
    with pytest.raises(DataError, match="toy_train_000001.bin"):
        for _ in range(3):
            take_batches(cfg, ranked(0, 1), 1)
    with pytest.raises(DataError, match="toy_val_000001.bin"):
        train_gpt.load_validation(cfg, scoring_clock(cfg), quiet)


@pytest.mark.parametrize("sizes", [[65], [66], [96], [97], [40, 57], [1, 32], [33, 1, 1, 30]])
def test_validation_is_the_longest_multiple_of_windows(make_cfg, tmp_path, quiet, sizes):
    """All val shards end to end, cut to a multiple of seq_len targets and the token before them."""
    ids = np.arange(sum(sizes))
    cfg = make_corpus(make_cfg, tmp_path, val=np.split(ids, np.cumsum(sizes)[:-1]))
    tokens = train_gpt.load_validation(cfg, scoring_clock(cfg), quiet)
    assert tokens.tolist() == list(range((sum(sizes) - 1) // 32 * 32 + 1))


def test_too_little_validation_is_refused(make_cfg, tmp_path, quiet):
    """A stream shorter than one window is a DataError with both numbers."""
    cfg = make_corpus(make_cfg, tmp_path, val=[np.ones(32)])
    with pytest.raises(DataError, match="32 validation tokens; .*SEQ_LEN=32 needs 33"):
        train_gpt.load_validation(cfg, scoring_clock(cfg), quiet)


# ------------------------------------------------------------------------------------------------
# Tokens: the clock is the key
# ------------------------------------------------------------------------------------------------

def test_validation_stays_shut_while_training_data_is_open(cfg, quiet, monkeypatch):
    """Before training data is closed no validation file is opened, however one asks."""
    monkeypatch.setattr(train_gpt, "read_shard", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(BudgetError, match="val files may not be opened in the train phase"):
        train_gpt.load_validation(cfg, Clock(cfg), quiet)
    with pytest.raises(BudgetError):
        train_gpt.open_shards(cfg, "val", Clock(cfg), quiet)


def test_training_data_stays_shut_while_scoring(cfg, quiet, monkeypatch):
    """Once training data has been closed no training file is opened, and validation is."""
    clock = scoring_clock(cfg)
    assert len(train_gpt.load_validation(cfg, clock, quiet)) == (VAL_SIZE - 1) // 32 * 32 + 1
    monkeypatch.setattr(train_gpt, "read_shard", lambda path: pytest.fail(f"{path} was opened"))
    with pytest.raises(BudgetError, match="train files may not be opened in the eval phase"):
        train_gpt.open_shards(cfg, "train", clock, quiet)


def test_clock_counts_from_its_start(cfg):
    """The training clock shows the seconds since its start, and those of an earlier run."""
    clock = Clock(cfg, now=iter([100.0, 107.5, 200.0, 201.0]).__next__)
    clock.start()
    assert clock.elapsed() == 7.5
    clock.start(spent=30.0)
    assert clock.elapsed() == 31.0


@pytest.mark.parametrize("data,scoring,wrong", [
    (5.0, 7.0, None), (5.1, 7.0, r"^training data was read for 5\.1 s.* 5\.0 s"),
    (5.0, 7.1, r"^scoring went on for 7\.1 s.* 7\.0 s")])
def test_overtime_is_refused(make_cfg, data, scoring, wrong):
    """A run that read training data or scored for longer than its budget does not count."""
    clock = Clock(make_cfg(max_wallclock_seconds=5.0, warmup_steps=1, eval_wallclock_seconds=7.0))
    clock.close_training_data(4.0, data)
    clock.eval_seconds = scoring
    if wrong:
        with pytest.raises(BudgetError, match=wrong):
            clock.refuse_overtime()
    else:
        clock.refuse_overtime()


def test_no_budget_no_overtime(make_cfg):
    """A budget of 0 is none."""
    clock = Clock(make_cfg(max_wallclock_seconds=0.0, eval_wallclock_seconds=0.0))
    clock.close_training_data(1e6, 1e6)
    clock.eval_seconds = 1e6
    clock.refuse_overtime()


# ------------------------------------------------------------------------------------------------
# Tokens: bytes
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(toy_data):
    """The toy corpus's tokenizer."""
    model = (toy_data / "tokenizers" / f"toy_{VOCAB}_bpe.model").read_bytes()
    return prepare_data.load_tokenizer(model)


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
    """What `target_bytes` says of the targets of a stream."""
    return train_gpt.target_bytes(np.array(ids, np.uint16), tokenizer).tolist()


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(st.one_of(st.characters(exclude_categories=["Cs"]),
                                        st.sampled_from("the model 0. \n\u2581")), max_size=40)))
def test_bytes_of_documents_are_bytes_of_their_text(tokenizer, texts):
    """Documents that each begin with BOS count as many bytes as the decoded texts have in UTF-8."""
    documents = [tokenizer.encode(text) for text in texts]
    ids = [i for document in documents for i in [BOS, *document]] + [BOS]
    text_bytes = [len(tokenizer.decode(document).encode()) for document in documents]
    assert sum(count_bytes(tokenizer, ids)) == sum(text_bytes)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60))
def test_bytes_follow_the_rule_for_any_ids(tokenizer, ids):
    """Any sequence of ids, likely or not, is counted target by target as the rule says."""
    expected = [slow_bytes(tokenizer, *pair) for pair in itertools.pairwise(ids)]
    assert count_bytes(tokenizer, ids) == expected


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(260, VOCAB - 1), max_size=40))
def test_bytes_within_a_document_are_those_decoding_adds(tokenizer, ids):
    """After a first piece, what targets count is what they add to the decoded text, spaces too."""
    first = tokenizer.piece_to_id("e")
    added = len(tokenizer.decode([first, *ids]).encode()) - 1
    assert sum(count_bytes(tokenizer, [first, *ids, BOS])) == added


def test_bytes_of_every_kind_of_piece(tokenizer):
    """Literal cases: spaces pay except after BOS, byte pieces are 1, a new document is free."""
    the, e, space = (tokenizer.piece_to_id(p) for p in ("\u2581the", "e", "\u2581"))
    byte, unk, pad = tokenizer.piece_to_id("<0xC3>"), tokenizer.unk_id(), tokenizer.pad_id()
    ids = [BOS, the, the, e, space, the, byte, byte, the, unk, the, BOS, BOS, space, e, pad, e]
    assert count_bytes(tokenizer, ids) == [3, 4, 1, 1, 4, 1, 1, 4, 0, 3, 0, 0, 0, 1, 0, 1]


def test_long_and_unused_pieces_are_counted():
    """A piece of many bytes fits the type of the counts; an unused id is silent like BOS."""
    class Odd:
        """A tokenizer of four pieces: control, unused, long, spaced."""
        pieces = ["<s>", "\u2581gone", "\u00e9" * 300, "\u2581x"]
        vocab_size, id_to_piece = lambda self: 4, lambda self, i: self.pieces[i]
        is_control, is_unused = lambda self, i: i == 0, lambda self, i: i == 1
        is_unknown = is_byte = lambda self, i: False
    sizes = train_gpt.target_bytes(np.array([2, 2, 1, 3, 3, 0, 3], np.uint16), Odd())
    assert sizes.dtype == np.int16 and sizes.tolist() == [600, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "other size"])
def test_wrong_tokenizers_are_refused(make_cfg, toy_data, tmp_path, damage):
    """A tokenizer that is missing, broken or of another size is a DataError with its path."""
    cfg = make_cfg(data_dir=str(tmp_path), vocab_size=VOCAB + (damage == "other size"))
    cfg.tokenizer_path.parent.mkdir(parents=True)
    good = (toy_data / "tokenizers" / f"toy_{VOCAB}_bpe.model").read_bytes()
    data = {"garbage": b"no model", "empty": b"", "other size": good}.get(damage)
    if data is not None:
        cfg.tokenizer_path.write_bytes(data)
    with pytest.raises(DataError) as e:
        train_gpt.load_tokenizer(cfg)
    assert str(e.value).startswith(f"{cfg.tokenizer_path}: ") and "\n" not in str(e.value)


def test_a_tokenizer_without_a_space_is_refused(make_cfg, tmp_path, monkeypatch):
    """Where a lone space is no piece of its own its byte would go uncounted."""
    monkeypatch.setitem(prepare_data.TOKENIZER_SETTINGS, "required_chars", "")
    cfg = make_cfg(data_dir=str(tmp_path), vocab_size=270)
    cfg.tokenizer_path.parent.mkdir(parents=True)
    cfg.tokenizer_path.write_bytes(prepare_data.train_tokenizer(["abcabc", "bcdabd"] * 50, 270))
    with pytest.raises(DataError, match=r"\.model: .*space"):
        train_gpt.load_tokenizer(cfg)


def test_the_right_tokenizer_is_accepted(cfg):
    """The dataset's own tokenizer is loaded."""
    assert train_gpt.load_tokenizer(cfg).vocab_size() == VOCAB


# ------------------------------------------------------------------------------------------------
# Batches: the plan
# ------------------------------------------------------------------------------------------------

def test_strides_are_coprime_for_every_number_of_blocks(make_plan):
    """For 1 to 500 blocks the walk visits every block once and stays within its shard."""
    plan = make_plan(sizes=[8 * (n + 1) for n in range(1, 501)])
    for i, (phase, start, stride, blocks) in enumerate(plan.walks):
        assert blocks == i + 1 and math.gcd(stride, blocks) == 1 and 0 <= phase < 8
        offsets = plan.take(i, blocks)[:, 1]
        assert sorted(offsets) == list(range(phase, phase + 8 * blocks, 8)), f"{blocks} blocks"
        assert offsets[0] == phase + 8 * start and max(offsets) + 9 <= plan.sizes[i]


def test_walks_differ_between_shards_epochs_and_seeds(make_plan):
    """Phase, start and stride are drawn anew for every shard, epoch and SEED."""
    plan, other = make_plan(sizes=[8000] * 3), make_plan(sizes=[8000] * 3, seed=2)
    walks = plan.walks + other.walks
    plan.start_epoch(1)
    assert len(set(walks + plan.walks)) == 9


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("seqs", [1, 5, 7, 46, 64, 200])
def test_each_block_is_used_once_an_epoch(make_plan, loader, seqs):
    """After any batch: all blocks of the epochs before, and of the present one some, once each."""
    plan, seen, whole, epoch = make_plan(loader, seqs), Counter(), Counter(), 0
    present = blocks_of_epoch(plan)
    for _ in range(-(-200 // seqs)):
        seen.update(rows_of(plan.next()))
        while epoch < plan.epoch:                           # also several epochs in one batch
            whole, epoch = whole + present, epoch + 1
            reference = make_plan(loader, seqs)
            reference.start_epoch(epoch)
            present = blocks_of_epoch(reference)
        assert not whole - seen, "a block of a finished epoch was left out"
        assert not (seen - whole) - present, "a block was used twice, or is none"
    assert epoch >= 3 and sum(present.values()) < sum(SIZES) / 8


@pytest.mark.parametrize("loader", LOADERS)
def test_epochs_differ_in_more_than_their_phase(make_plan, loader):
    """The same blocks come in another order in the next epoch."""
    plan = make_plan(loader, seqs=30, sizes=[9] * 30)       # one block a shard, one phase
    first, second = (stream(plan, 1) for _ in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_batches_mix_different_shards(make_plan):
    """Which shards a batch mixes is drawn anew for every batch."""
    plan = make_plan(seqs=8, sizes=[8001] * 100)
    mixed = [{shard for shard, _ in stream(plan, 1)} for _ in range(5)]
    assert all(len(shards) == 8 for shards in mixed) and len(set.union(*mixed)) > 16


@pytest.mark.parametrize("loader", LOADERS)
def test_windows_stay_within_their_shards(make_plan, loader):
    """Inputs and the target after them lie inside the shard, also inside the shortest possible."""
    sizes = (9, 10, 16, 17, 100)
    for shard, offset in stream(make_plan(loader, seqs=16, sizes=sizes), 20):
        assert 0 <= offset and offset + 9 <= sizes[shard]


@pytest.mark.parametrize("loader", LOADERS)
def test_order_depends_on_the_seed_and_the_files(make_plan, loader):
    """Same seed and files, same order; another SEED, size, name or batch size, another order."""
    first = stream(make_plan(loader, seqs=20), 2)
    assert stream(make_plan(loader, seqs=20), 2) == first
    assert stream(make_plan(loader, seqs=20, seed=2), 2) != first
    assert stream(make_plan(loader, seqs=20, sizes=(211, *SIZES[1:])), 2) != first
    renamed = [s._replace(name="x" + s.name) for s in blank_shards(SIZES)]
    plan = make_plan(loader, seqs=20)
    assert stream(plan_class(loader)(plan.cfg, renamed), 2) != first


def test_loaders_differ(make_plan):
    """LOADER=shuffled is another order of the same blocks."""
    total = sum(make_plan().blocks)
    orders = [stream(make_plan(loader, seqs=int(total)), 1) for loader in LOADERS]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_shards_shorter_than_a_window_are_refused(make_plan, loader):
    """A shard without room for one sequence and its target is a DataError with its name."""
    with pytest.raises(DataError, match="^toy_train_000001.bin: shorter .*SEQ_LEN=8"):
        make_plan(loader, sizes=(100, 8, 9))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("seqs", [5, 46])
def test_state_goes_through_json_and_on(make_plan, loader, seqs):
    """From any batch on, a plan that loads the state goes on as if it had never stopped."""
    plan, batches = make_plan(loader, seqs), []
    states = [json.dumps(plan.state_dict())]
    for _ in range(24):                                     # more than one epoch
        batches.append(rows_of(plan.next()))
        states.append(json.dumps(plan.state_dict()))
    for k in range(22):
        copy = make_plan(loader, seqs)
        copy.load_state_dict(json.loads(states[k]))
        assert stream(copy, 2) == batches[k] + batches[k + 1]
        assert json.dumps(copy.state_dict()) == states[k + 2]
    assert plan.epoch >= 2


@pytest.mark.parametrize("loader", LOADERS)
def test_digest_tells_orders_apart(make_plan, loader):
    """The digest is that of all batches so far: equal for equal orders, never the same twice."""
    plan, same, other = make_plan(loader), make_plan(loader), make_plan(loader, seed=2)
    digests = []
    for _ in range(5):
        for p in (plan, same, other):
            p.next()
        digests += [plan.digest, other.digest]
        assert plan.digest == same.digest
    assert len(set(digests)) == 10


@pytest.mark.parametrize("loader", LOADERS)
def test_digest_remembers_every_batch_and_its_order(make_plan, loader):
    """Equal last batches do not make equal digests, which have digits enough to be compared."""
    a, b, c = (np.array([[0, offset]]) for offset in (0, 8, 16))
    digests = set()
    for batches in ((a, b), (b, a), (c, b), (b,), (a, a)):
        plan = make_plan(loader)
        for windows in batches:
            plan.emit(windows)
        digests.add(plan.digest)
    assert len(digests) == 5 and all(len(digest) >= 12 for digest in digests)


# ------------------------------------------------------------------------------------------------
# Batches: weights of shards
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part,epoch,alpha", [(0.0, 0, 0.9), (0.5, 0, 0.7), (1.0, 0, 0.5),
                                              (0.0, 1, 0.5)])
def test_shards_are_drawn_by_what_is_left_in_them(make_plan, part, epoch, alpha):
    """A single draw takes shard i with weight left_i**alpha, alpha falling as data is used."""
    plan = make_plan(sizes=[8 * 1001, 8 * 101, 8 * 11])
    plan.start_epoch(epoch)
    plan.taken = (part * plan.blocks).astype(int)
    left, draws, rng = np.array([600, 60, 6]), 4000, np.random.default_rng(0)
    counts = sum(plan.draw(rng, left, 1) for _ in range(draws))
    p = left ** alpha / (left ** alpha).sum()
    assert counts.sum() == draws
    assert (abs(counts - draws * p) < 4 * np.sqrt(draws * p * (1 - p))).all()


def test_large_draws_give_each_mixed_shard_one_and_the_rest_by_weight(make_plan):
    """Of 64 windows over 3 shards each gets 1, the other 61 go by weight."""
    plan, draws, rng = make_plan(sizes=[8 * 5001, 8 * 501, 8 * 51]), 400, np.random.default_rng(0)
    counts = np.array([plan.draw(rng, plan.blocks, 64) for _ in range(draws)])
    p = plan.blocks ** 0.9 / (plan.blocks ** 0.9).sum()
    assert counts.min() >= 1 and (counts.sum(1) == 64).all()
    assert (abs(counts.mean(0) - 1 - 61 * p) < 4 * np.sqrt(61 * p * (1 - p) / draws)).all()


@pytest.mark.parametrize("part,epoch,mixed", [(0.0, 0, 8), (0.5, 0, 36), (1.0, 0, 64),
                                              (0.0, 2, 64)])
def test_more_shards_are_mixed_as_data_is_used(make_plan, part, epoch, mixed):
    """A batch mixes 8 shards at first and 64 at last, in a straight line over the first epoch."""
    plan = make_plan(sizes=[8 * 21] * 100)
    plan.start_epoch(epoch)
    plan.taken = (part * plan.blocks).astype(int)
    counts = plan.draw(np.random.default_rng(0), np.full(100, 10 ** 6), 300)
    assert np.count_nonzero(counts) == mixed and counts.sum() == 300


def test_draws_never_exceed_what_is_left(make_plan):
    """No shard gives more than it has, and an exhausted one gives nothing."""
    plan, rng, left = make_plan(), np.random.default_rng(0), np.array([20, 2, 0, 1])
    for need in (1, 3, 23, 100):
        counts = plan.draw(rng, left, need)
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

@pytest.mark.parametrize("loader", LOADERS)
def test_batches_hold_the_tokens_of_the_plan(make_cfg, quiet, loader):
    """Row r of a batch is the window r of the plan: seq_len inputs and one target more."""
    cfg = make_cfg(loader=loader)
    shards = train_gpt.open_shards(cfg, "train", Clock(cfg), quiet)
    plan = plan_class(loader)(cfg, shards)
    for rows in take_batches(cfg, ranked(0, 1), 5)[0]:
        assert rows.dtype == torch.int64 and rows.shape == (8, 33)
        for row, (i, offset) in zip(rows, plan.next()):
            assert row.tolist() == shards[i].tokens[offset:offset + 33].tolist()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_global_batch(make_cfg, loader, world):
    """At any world size the ranks' parts together are the batch of one process, row for row."""
    cfg = make_cfg(loader=loader)
    alone, _ = take_batches(cfg, ranked(0, 1), 6)
    parts = [take_batches(cfg, ranked(rank, world), 6)[0] for rank in range(world)]
    for whole, *shares in zip(alone, *parts):
        assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)


@pytest.mark.parametrize("loader", LOADERS)
def test_order_does_not_depend_on_the_folder(make_cfg, toy_data, tmp_path, monkeypatch, loader):
    """A copy elsewhere, a relative path or another micro-batch reads the same; another SEED not."""
    shutil.copytree(toy_data, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    here, other, small, seed = (
        torch.stack(take_batches(make_cfg(loader=loader, **o), ranked(0, 1), 4)[0])
        for o in ({}, dict(data_dir="moved"), dict(micro_batch_seqs=1), dict(seed=2)))
    assert torch.equal(here, other) and torch.equal(here, small)
    assert not torch.equal(here, seed)


@pytest.mark.parametrize("loader", LOADERS)
def test_reading_goes_on_after_the_batch_of_the_state(make_cfg, loader):
    """The state is that of the last batch handed out, not of those read ahead."""
    cfg = make_cfg(loader=loader)
    whole, _ = take_batches(cfg, ranked(0, 1), 6)
    shards = train_gpt.open_shards(cfg, "train", Clock(cfg), lambda *a, **k: None)
    batches = train_gpt.Batches(cfg, shards, ranked(0, 1))
    for _ in range(2):
        batches.next()
    wait_until(batches.ready.full)
    assert batches.state["batch"] == 2
    batches.close()
    rest, state = take_batches(cfg, ranked(0, 1), 4, json.loads(json.dumps(batches.state)))
    assert torch.equal(torch.stack(rest), torch.stack(whole[2:])) and state["batch"] == 6


def wait_until(claim, seconds: float = 10.0):
    """Return once `claim()` holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_fresh_reader_stands_at_the_start(cfg):
    """The state before the first batch is that of no batch at all, however many are read ahead."""
    assert take_batches(cfg, ranked(0, 1), 0)[1]["batch"] == 0


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError("no room"), ValueError("odd")])
def test_errors_of_the_reader_reach_the_trainer(cfg, monkeypatch, error):
    """Whatever ends the reader thread is raised where the next batch is asked for."""
    def fail(self, windows):
        raise error
    monkeypatch.setattr(train_gpt.Batches, "read", fail)
    with pytest.raises(type(error), match=str(error)):
        take_batches(cfg, ranked(0, 1), 1)


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_close_ends_the_thread(cfg, quiet, taken):
    """After close no thread is left, whether the queue was empty, in use or full."""
    before = threading.active_count()
    shards = train_gpt.open_shards(cfg, "train", Clock(cfg), quiet)
    batches = train_gpt.Batches(cfg, shards, ranked(0, 1))
    assert threading.active_count() == before + 1
    for _ in range(taken):
        batches.next()
    wait_until(batches.ready.full)
    batches.close()
    assert not batches.thread.is_alive() and threading.active_count() == before


# ------------------------------------------------------------------------------------------------
# Batches: one order on all ranks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mine,theirs", [("0", "0"), ("ab" * 8, "ab" * 8), ("f" * 64, "f" * 64)])
def test_equal_digests_pass(mine, theirs):
    """Ranks that hold the same digest go on."""
    beside(theirs).check_same("the order", mine)


@pytest.mark.parametrize("mine,theirs", [("0", "1"), ("1", "0"), ("ab" * 8, "ab" * 5 + "ac"),
                                         ("fffffffffffe", "ffffffffffff")])
def test_unequal_digests_are_refused(mine, theirs):
    """One differing digit is a DataError, on the rank with the larger and the smaller alike."""
    with pytest.raises(DataError, match="^the order differs between ranks"):
        beside(theirs).check_same("the order", mine)


def beside(digest: str) -> train_gpt.Dist:
    """A rank whose only neighbour holds `digest`: the largest value is the larger of two."""
    dist, theirs = ranked(0, 2), float(int(digest[:12], 16))
    dist.max = lambda value: max(value, math.copysign(theirs, value))     # -0.0 has a sign
    return dist


def test_ranks_with_different_files_stop(run_program, toy_env, toy_data, tmp_path):
    """Two real ranks whose shards differ end with the reason instead of training on."""
    shutil.copytree(toy_data, tmp_path / "other")
    next((tmp_path / "other").glob("datasets/*/toy_train_000002.bin")).unlink()
    program = tmp_path / "ranks.py"
    program.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        f"if os.environ['RANK'] == '1': os.environ['DATA_DIR'] = {str(tmp_path / 'other')!r}\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n")
    done = run_program(toy_env | dict(STAGES="train"), world=2, program=program)
    assert done.returncode != 0
    assert "train_gpt: the order of training data differs between ranks" in done.stderr


# ------------------------------------------------------------------------------------------------
# Ranks and logging: numbers read late, lines written once
# ------------------------------------------------------------------------------------------------

def test_late_hands_out_the_numbers_of_the_call_before():
    """Each swap returns what the one before took in, copied, so that the tensor may be reused."""
    late, values = train_gpt.Late(), torch.zeros(2)
    assert late.flush() is None
    seen = [late.swap(values.fill_(i)) for i in range(3)]
    values.fill_(9.0)
    assert seen == [None, [0.0, 0.0], [1.0, 1.0]]
    assert late.flush() == [2.0, 2.0] and late.flush() is None, "numbers are handed out once"


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


@pytest.mark.parametrize("settings,kept", [
    ({}, False), (dict(stages="train"), False), (dict(stages="eval"), True),
    (dict(stages="quantize,eval"), True), (dict(resume=True), True)])
def test_a_new_training_starts_a_new_log(make_cfg, tmp_path, settings, kept):
    """Later stages and resumed trainings add to the log of the run; a new training replaces it."""
    path = tmp_path / "logs" / "one.txt"
    path.parent.mkdir()
    path.write_text("before\n")
    train_gpt.Log(make_cfg(run_id="one", **settings), ranked(0, 1))("after")
    assert path.read_text() == "before\n" * kept + "after\n"


def test_only_the_first_rank_writes(make_cfg, tmp_path, capsys):
    """Other ranks leave no file and print nothing."""
    train_gpt.Log(make_cfg(), ranked(1, 2))("step", n=1)
    assert not (tmp_path / "logs").exists() and capsys.readouterr().out == ""


def test_a_log_that_cannot_be_written_is_refused(make_cfg, tmp_path):
    """A file where the folder should be is a ConfigError that names the path and the setting."""
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(train_gpt.ConfigError, match="logs.*cannot be written.*OUT_DIR"):
        train_gpt.Log(make_cfg(), ranked(0, 1))
