"""prepare_data.py: real files and processes, a loopback hub, and damage of every kind.

Run alone: python -m pytest -q tests/test_prepare_data.py
"""
import contextlib
import ctypes
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from conftest import ARM  # noqa: E402

WORDS = ("the model reads a page and learns from every line that it has scored before any weight "
         "may move while the clock runs and bytes are counted in the open").split()


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def prose(seed: int, num_words: int = 200) -> str:
    """A made-up text, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return " ".join(f"{word}{rng.integers(10)}" if rng.random() < 0.1 else word
                    for word in rng.choice(WORDS, num_words)) + ".\n"


def write_texts(directory: Path, count: int = 12) -> list[str]:
    """Write `count` texts as files and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"note{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text(prose(i))
    return list(map(str, paths))


def run_text(data_dir: Path, files: list[str], *more: str) -> int:
    """Run the `text` subcommand in this process, with a vocabulary that small texts can fill."""
    return prepare_data.main(["text", *files, "--data-dir", str(data_dir), "--vocab-size", "330",
                              *more])


def read_tree(directory: Path) -> dict[str, bytes]:
    """Bytes of every file below a directory, without the locks."""
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"}


def read_split(directory: Path, split: str) -> list[list[int]]:
    """Documents of a split as lists of ids, BOS included; checks each header on the way."""
    ids = []
    for path in sorted(directory.glob(f"*_{split}_*.bin")):
        data = path.read_bytes()
        header = np.frombuffer(data[:1024], "<i4")
        assert (header[0], header[1], header[2]) == (20240520, 1, (len(data) - 1024) // 2)
        assert not header[3:].any()
        ids += np.frombuffer(data[1024:], "<u2").tolist()
    starts = [i for i, token in enumerate(ids) if token == 1] + [len(ids)]
    assert starts[0] == 0
    return [ids[lo:hi] for lo, hi in zip(starts, starts[1:])]


def check_manifest(directory: Path) -> dict:
    """Compare a manifest with the files beside it, by this file's own reading of both."""
    manifest = json.loads((directory / "manifest.json").read_text())
    tokenizers = directory.parents[1] / "tokenizers"
    entries = [(tokenizers, manifest["tokenizer"])]
    for split in ("train", "val"):
        part = manifest[split]
        entries += [(directory, entry) for entry in part["files"]]
        documents = read_split(directory, split)
        assert part["documents"] == len(documents)
        assert part["tokens"] == sum(map(len, documents))
    for place, entry in entries:
        data = (place / entry["name"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    listed = {entry["name"] for place, entry in entries[1:]}
    assert {path.name for path in directory.glob("*.bin")} == listed
    return manifest


def complaint(capsys) -> str:
    """The one line on standard error."""
    err = capsys.readouterr().err
    assert err.startswith("prepare_data: ") and err.count("\n") == 1, err
    return err


def start(argv: list[str], prelude: str = "", **options) -> subprocess.Popen:
    """Start prepare_data in a process of its own, after `prelude` has run there.

    Ctrl-C has its usual effect there, also where the tests' own parent ignores it (a background job).
    """
    code = (f"import signal, sys, prepare_data\nsignal.signal(signal.SIGINT, "
            f"signal.default_int_handler)\n{prelude}\nsys.exit(prepare_data.main({argv!r}))")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **options.pop("env", {}))
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------
# demo
# ------------------------------------------------------------------------------------------------

NO_NETWORK = """
import atexit, socket
def refuse(*_): raise AssertionError("demo opened a socket")
socket.socket.connect = socket.getaddrinfo = refuse
atexit.register(lambda: print("imported", *{"torch", "huggingface_hub"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One demo corpus, made without network: its data directory and what the command printed."""
    data_dir = tmp_path_factory.mktemp("demo") / "data"
    rc, out, err = finish(start(["demo"], NO_NETWORK, env={"DATA_DIR": str(data_dir)}))
    assert (rc, err) == (0, "")
    return data_dir, out


def test_demo_has_two_megabytes_of_english_and_a_true_manifest(demo):
    """Sizes, shares, ids and the decoded text of the demo corpus are what was promised."""
    data_dir, out = demo
    manifest = check_manifest(data_dir / "datasets" / "demo_sp1024")
    train, val = manifest["train"], manifest["val"]
    assert train["text_bytes"] + val["text_bytes"] > 1_500_000
    assert 0.04 < val["text_bytes"] / (train["text_bytes"] + val["text_bytes"]) <= 0.06
    model = str(data_dir / "tokenizers" / "demo_1024_bpe.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    documents = read_split(data_dir / "datasets" / "demo_sp1024", "train")
    assert max(map(max, documents)) < tokenizer.get_piece_size() == 1024
    assert all(document.count(1) == 1 and 2 not in document for document in documents)
    text = " ".join(tokenizer.decode(document) for document in documents)
    assert min(text.count(word) for word in (" the ", " is ", " returns ", " of ")) > 300


def test_demo_tokenizer_has_the_settings_of_the_challenge(demo):
    """Special ids, byte fallback, marker piece, split digits and no dummy prefix."""
    model = str(demo[0] / "tokenizers" / "demo_1024_bpe.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    specials = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert specials == (0, 1, 2, 3)
    assert tokenizer.piece_to_id("\u2581") != 3
    assert not tokenizer.encode("the", out_type=str)[0].startswith("\u2581")
    assert tokenizer.encode("2024", out_type=str) == list("2024")
    assert tokenizer.decode(tokenizer.encode("\u6f22 \U0001f40d")) == "\u6f22 \U0001f40d"
    assert sum(map(tokenizer.is_byte, range(1024))) == 256


def test_demo_needs_no_network_and_says_what_comes_next(demo):
    """Neither torch nor the hub's client is imported; the last line is the training command."""
    data_dir, out = demo
    lines = out.splitlines()
    assert lines[-1] == "imported"
    assert lines[-2] == f"prepare_data: next: DATA_DIR={data_dir} RECIPE=demo python train_gpt.py"


def test_demo_runs_once_and_rebuilds_the_same_bytes_when_damaged(demo, capsys):
    """A second run touches nothing; after damage the rebuilt corpus is byte for byte the first."""
    data_dir = demo[0]
    before, directory = read_tree(data_dir), data_dir / "datasets" / "demo_sp1024"
    stamps = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert prepare_data.main(["demo", "--data-dir", str(data_dir)]) == 0
    assert "there and intact" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    flip_byte(directory / "demo_val_000000.bin")
    assert prepare_data.main(["demo", "--data-dir", str(data_dir)]) == 0
    assert "rebuilding" in capsys.readouterr().out
    assert read_tree(data_dir) == before


def test_demo_reads_more_of_a_library_that_is_small(tmp_path):
    """Extra packages are read only where the others do not give enough, and junk is skipped."""
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "plain.py").write_text(f'"""{prose(1)}"""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "short.py").write_text('"""Too short."""\n')
    (tmp_path / "idlelib" / "more.py").write_text(f'def f():\n    """{prose(2)}"""\n')
    assert prepare_data.demo_documents(tmp_path, b"") == [prose(1).strip(), prose(2).strip()]
    topics = b"topics = {'if': %r}" % (prose(3) * 2000)
    assert prepare_data.demo_documents(tmp_path, topics) == [prose(3) * 2000]


def flip_byte(path: Path):
    """Change one byte in the middle of a file, keeping its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# ------------------------------------------------------------------------------------------------
# text: what comes out
# ------------------------------------------------------------------------------------------------

def test_text_shards_decode_to_the_files(tmp_path, capsys):
    """Every document is BOS and ids that decode to its text; the next command names the corpus."""
    files = write_texts(tmp_path / "in")
    assert run_text(tmp_path / "data", files, "--name", "notes", "--val-docs", "3") == 0
    directory = tmp_path / "data" / "datasets" / "notes_sp330"
    check_manifest(directory)
    model = str(tmp_path / "data" / "tokenizers" / "notes_330_bpe.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    splits = {split: {tokenizer.decode(ids) for ids in read_split(directory, split)}
              for split in ("train", "val")}
    assert len(splits["val"]) == 3 and not splits["val"] & splits["train"]
    assert splits["val"] | splits["train"] == {prose(i).strip() for i in range(12)}
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "RECIPE=demo DATASET=notes_sp330 VOCAB_SIZE=330 python train_gpt.py")


def test_json_lines_equal_files_and_order_and_names_do_not_matter(tmp_path):
    """The same documents give the same bytes as files, renamed files, or lines of one file."""
    files = write_texts(tmp_path / "in")
    renamed = write_texts(tmp_path / "elsewhere")[::-1]
    lines = [json.dumps({"text": prose(i), "id": i}) for i in range(12)]
    (tmp_path / "all.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    trees = []
    for i, sources in enumerate((files, renamed, [str(tmp_path / "all.jsonl")])):
        assert run_text(tmp_path / str(i), sources) == 0
        trees.append({name: data for name, data in read_tree(tmp_path / str(i)).items()
                      if name.endswith((".bin", ".model"))})
    assert trees[0] == trees[1] == trees[2] and len(trees[0]) == 3


def test_equal_documents_never_meet_across_the_split(tmp_path):
    """Copies, copies that differ in spaces, and documents without visible text are dropped."""
    files = write_texts(tmp_path / "in", 6)
    for i in range(6):
        (tmp_path / f"copy{i}.txt").write_text(prose(i))
        (tmp_path / f"spaced{i}.txt").write_text("  " + prose(i).replace(" ", "\n "))
    (tmp_path / "zero_width.txt").write_text("\u200b")
    files += map(str, sorted(tmp_path.glob("*.txt")))
    assert run_text(tmp_path / "data", files, "--val-frac", "0.4") == 0
    directory = tmp_path / "data" / "datasets" / "text_sp330"
    documents = read_split(directory, "train") + read_split(directory, "val")
    assert len(documents) == len(set(map(tuple, documents))) == 6
    assert check_manifest(directory)["dropped_documents"] == 13


def test_documents_straddle_shards_of_the_size_asked_for(tmp_path):
    """All shards but the last are full, and a new size is a new dataset without old shards."""
    files = write_texts(tmp_path / "in", 12)
    for size in (1000, 1700):
        assert run_text(tmp_path / "data", files, "--shard-tokens", str(size)) == 0
        directory = tmp_path / "data" / "datasets" / "text_sp330"
        manifest = check_manifest(directory)
        sizes = [entry["tokens"] for entry in manifest["train"]["files"]]
        assert len(sizes) > 2 and set(sizes[:-1]) == {size} and 0 < sizes[-1] <= size
        assert manifest["train"]["documents"] + manifest["val"]["documents"] == 12


def test_one_long_file_can_be_cut_into_documents(tmp_path, capsys):
    """A book is one document, which cannot be split; the complaint names the option that cuts."""
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(prose(i) for i in range(20)))
    assert run_text(tmp_path / "data", [str(book)]) == 2
    assert "1 distinct document, needed 2" in (err := complaint(capsys)) and "--split-chars" in err
    assert run_text(tmp_path / "data", [str(book)], "--split-chars", "2000") == 0
    manifest = check_manifest(tmp_path / "data" / "datasets" / "text_sp330")
    assert manifest["train"]["documents"] + manifest["val"]["documents"] >= 10


def test_the_largest_vocabulary_named_is_the_largest_that_works(tmp_path, capsys):
    """Too large a vocabulary is refused with the bound; the bound works, one more does not."""
    files = write_texts(tmp_path / "in", 4)
    assert run_text(tmp_path / "data", files, "--vocab-size", "60000") == 2
    bound = int(complaint(capsys).split("largest that works is ")[1].split(";")[0])
    assert run_text(tmp_path / "data", files, "--vocab-size", str(bound)) == 0
    assert run_text(tmp_path / "data", files, "--vocab-size", str(bound + 1)) == 2
    capsys.readouterr()
    assert run_text(tmp_path / "data", files, "--vocab-size", "261") == 2
    bound = int(complaint(capsys).split("set --vocab-size ")[1].split()[0])
    assert run_text(tmp_path / "data", files, "--vocab-size", str(bound)) == 0
    assert run_text(tmp_path / "data", files, "--vocab-size", str(bound - 1)) == 2


# ------------------------------------------------------------------------------------------------
# text: parts, by their properties
# ------------------------------------------------------------------------------------------------

texts = st.lists(st.text(max_size=40), max_size=30)


@given(texts, st.floats(0.01, 0.9), st.integers(0, 5), st.randoms())
@settings(max_examples=60, deadline=None)
def test_validation_is_a_proper_part_and_ignores_order(texts, val_frac, val_docs, random):
    """The choice depends on the set of texts alone, and leaves something on both sides."""
    documents, dropped = prepare_data.unique_documents(texts)
    assert set(documents.values()) == {text for text in texts if text.strip()}
    assert dropped == len(texts) - len(documents)
    wanted = prepare_data.Settings(val_frac=val_frac, val_docs=val_docs)
    if len(documents) <= max(val_docs, 1):
        with pytest.raises(prepare_data.DataError):
            prepare_data.choose_validation(documents, wanted)
        return
    chosen = prepare_data.choose_validation(documents, wanted)
    assert 0 < len(set(chosen)) == len(chosen) < len(documents)
    assert not val_docs or len(chosen) == val_docs
    random.shuffle(texts)
    shuffled, _ = prepare_data.unique_documents(texts)
    assert prepare_data.choose_validation(shuffled, wanted) == chosen


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_text_are_short_and_join_to_it(text, size):
    """Cutting loses nothing; 0 leaves the text whole."""
    pieces = list(prepare_data.split_text(text, size))
    assert "".join(pieces) == text and max(map(len, pieces)) <= size
    assert list(prepare_data.split_text(text, 0)) == [text]


@given(st.lists(st.lists(st.integers(2, 9), max_size=12), min_size=1, max_size=12),
       st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_documents_survive_any_shard_size(tmp_path_factory, contents, size):
    """Shards are full but for the last, and reading them back gives each document's hash."""
    documents = [np.array([1, *ids], "<u2") for ids in contents]
    shards = list(prepare_data.cut_into_shards(iter(documents), size))
    assert {len(shard) for shard in shards[:-1]} <= {size} and 0 < len(shards[-1]) <= size
    directory, paths = tmp_path_factory.mktemp("shards"), []
    for i, ids in enumerate(shards):
        paths.append(directory / f"{i}.bin")
        paths[-1].write_bytes(prepare_data.shard_header(len(ids)) + ids.tobytes())
        assert prepare_data.inspect_shard(paths[-1], 10)["tokens"] == len(ids)
    expected = [hashlib.sha256(ids.tobytes()).digest() for ids in documents]
    assert list(prepare_data.document_hashes(paths)) == expected
    with pytest.raises(prepare_data.DataError, match="equal validation documents"):
        prepare_data.check_disjoint(paths, paths)


# ------------------------------------------------------------------------------------------------
# Bad input, damage, interruption
# ------------------------------------------------------------------------------------------------

def bad_files(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of `text` that must be refused, and what the complaint must contain."""
    contents = dict(
        empty_txt=b"", blank_txt=b" \n\n", latin_txt="na\u00efve".encode("latin-1"),
        utf16_txt="text".encode("utf-16"), bad_jsonl=b'{"text": "a"}\n\n{"text": }\n',
        key_jsonl=b'{"text": "a"}\n{"body": "b"}', list_jsonl=b'["text"]',
        number_jsonl=b'{"text": 3}', bytes_jsonl=b'{"text": "a"}\n{"text": "\xff"}',
        half_jsonl=b'{"text": "\\ud800"}')
    paths = {}
    for name, data in contents.items():
        paths[name] = tmp_path / name.replace("_", ".")
        paths[name].write_bytes(data)
    good = write_texts(tmp_path / "good", 3)
    found = dict(
        empty_txt="empty.txt: empty", blank_txt="blank.txt: empty",
        latin_txt="not UTF-8: byte 0xef", utf16_txt="not UTF-8: byte 0xff at offset 0",
        bad_jsonl="bad.jsonl:3: bad JSON",
        key_jsonl='key.jsonl:2: needed an object with a string under "text", found {"body": "b"}',
        list_jsonl="list.jsonl:1: needed", number_jsonl="number.jsonl:1: needed",
        bytes_jsonl="bytes.jsonl:2: not UTF-8", half_jsonl="half.jsonl:1: lone surrogate")
    cases = {name: ([*good, str(paths[name])], text) for name, text in found.items()}
    cases.update(
        missing=([str(tmp_path / "no.txt")], "no.txt: No such file"),
        directory=([str(tmp_path)], "Is a directory"),
        no_file=([], "FILE"),
        name=([*good, "--name", "my-notes"], "'my-notes', needed letters a to z"),
        capital=([*good, "--name", "Notes"], "'Notes', needed letters a to z"),
        reserved=([*good, "--name", "demo"], "'demo', needed letters a to z only, and not demo"),
        huge_vocab=([*good, "--vocab-size", "65536"], "needed a whole number from 260 to 65535"),
        vocab=([*good, "--vocab-size", "1e3"], "--vocab-size: '1e3'"),
        share=([*good, "--val-frac", "nan"], "--val-frac: 'nan', needed a number between 0 and 1"),
        share_of_all=([*good, "--val-frac", "1"], "--val-frac: '1'"),
        too_many_held_out=([*good, "--val-docs", "3"], "3 distinct documents, needed 4"),
        invisible=([str(tmp_path / f"zero{i}.txt") for i in range(3)], "no visible text"))
    for i in range(3):
        (tmp_path / f"zero{i}.txt").write_text("\u200b" * (i + 1))
    return cases


def test_a_pipe_is_no_shard(tmp_path):
    """It is refused, not waited for."""
    os.mkfifo(tmp_path / "x_train_000000.bin")
    with pytest.raises(prepare_data.DataError, match="no token shard: not a file"):
        prepare_data.inspect_shard(tmp_path / "x_train_000000.bin", 10)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """Each bad argument or file ends with exit code 2, one line that names it, and no file."""
    for name, (arguments, expected) in bad_files(tmp_path).items():
        try:
            rc = run_text(tmp_path / "data", arguments)
        except SystemExit as stop:
            rc = stop.code
        assert rc == 2, name
        assert expected in complaint(capsys), name
        assert read_tree(tmp_path / "data") == {}, name


def test_a_failed_rebuild_keeps_the_old_dataset(tmp_path, capsys):
    """A dataset that is there outlives a later command that cannot be carried out."""
    files = write_texts(tmp_path / "in")
    assert run_text(tmp_path / "data", files) == 0
    before = read_tree(tmp_path / "data")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert run_text(tmp_path / "data", [*files, str(tmp_path / "bad.txt")]) == 2
    assert run_text(tmp_path / "data", files[:1]) == 2
    assert read_tree(tmp_path / "data") == before


def edit_manifest(path: Path, change):
    """Apply `change` to a manifest's dictionary."""
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE = dict(
    flipped=lambda d: flip_byte(d / "text_train_000000.bin"),
    cut=lambda d: os.truncate(d / "text_val_000000.bin", 1500),
    missing=lambda d: (d / "text_train_000000.bin").unlink(),
    stranger=lambda d: shutil.copy(d / "text_val_000000.bin", d / "text_train_mine.bin"),
    tokenizer=lambda d: flip_byte(d.parents[1] / "tokenizers" / "text_330_bpe.model"),
    no_tokenizer=lambda d: (d.parents[1] / "tokenizers" / "text_330_bpe.model").unlink(),
    no_manifest=lambda d: (d / "manifest.json").unlink(),
    half_manifest=lambda d: os.truncate(d / "manifest.json", 200),
    odd_manifest=lambda d: (d / "manifest.json").write_text("[1]"),
    empty_manifest=lambda d: (d / "manifest.json").write_text('{"format": 1}'),
    old_format=lambda d: edit_manifest(d / "manifest.json", lambda m: m.update(format=0)),
    unlisted=lambda d: edit_manifest(d / "manifest.json", lambda m: m["val"]["files"].clear()),
    miscounted=lambda d: edit_manifest(
        d / "manifest.json", lambda m: m["val"]["files"][0].update(documents=9)),
    wrong_totals=lambda d: edit_manifest(
        d / "manifest.json", lambda m: m["train"].update(tokens=1)),
    other_source=lambda d: edit_manifest(
        d / "manifest.json", lambda m: m.update(source_sha256="0" * 64)))


def test_every_damage_is_noticed_and_mended(tmp_path, capsys):
    """Whatever is damaged, the next run says so and restores the bytes of the first."""
    files, data_dir = write_texts(tmp_path / "in"), tmp_path / "data"
    assert run_text(data_dir, files) == 0
    before = read_tree(data_dir)
    for name, damage in DAMAGE.items():
        damage(data_dir / "datasets" / "text_sp330")
        capsys.readouterr()
        assert run_text(data_dir, files) == 0, name
        assert "rebuilding" in capsys.readouterr().out, name
        assert read_tree(data_dir) == before, name


KILLER = ARM + """
import sys, prepare_data
first, data_dir, files = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
arm(["fsync", "replace", "unlink"], first)
sys.exit(prepare_data.main(["text", *files, "--data-dir", data_dir, "--vocab-size", "330"]))
"""


def test_a_kill_at_any_step_leaves_nothing_that_passes_for_whole(tmp_path, capsys):
    """SIGKILL before each sync, removal and rename: old, none or new, but never a mixture."""
    old, new = write_texts(tmp_path / "in", 12)[:11], write_texts(tmp_path / "in", 12)
    assert run_text(tmp_path / "old", old) == run_text(tmp_path / "new", new) == 0
    whole = {run: read_tree(tmp_path / run) for run in ("old", "new")}
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    runs, killed = [], 0
    for first in range(1, 24):
        data_dir = tmp_path / f"killed{first}"
        shutil.copytree(tmp_path / "old", data_dir)
        runs.append((data_dir, subprocess.Popen(
            [sys.executable, "-c", KILLER, str(first), str(data_dir), *new], env=environment,
            stdout=subprocess.DEVNULL)))
        if len(runs) % 3 == 0:
            runs[-1][1].wait(30)
    for data_dir, process in runs:
        assert (code := process.wait(30)) in (0, -signal.SIGKILL)
        killed += code != 0
        left = {name: data for name, data in read_tree(data_dir).items() if ".tmp" not in name}
        if "datasets/text_sp330/manifest.json" in left:
            assert left in whole.values()
        for name, data in left.items():
            assert any(tree.get(name) == data for tree in whole.values()), name
        assert run_text(data_dir, new) == 0
        left = read_tree(data_dir)
        assert {n: d for n, d in left.items() if "json" not in n} == {
            n: d for n, d in whole["new"].items() if "json" not in n}
        check_manifest(data_dir / "datasets" / "text_sp330")
    assert 12 <= killed < len(runs)


def test_two_runs_at_once_agree(tmp_path):
    """The second run waits for the first and then finds the work done."""
    files = write_texts(tmp_path / "in")
    argv = ["text", *files, "--data-dir", str(tmp_path / "data"), "--vocab-size", "330"]
    pairs = [finish(process) for process in [start(argv), start(argv)]]
    assert [rc for rc, _, _ in pairs] == [0, 0], pairs
    check_manifest(tmp_path / "data" / "datasets" / "text_sp330")


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"


def obey_permissions():
    """Take from root, in a process about to start, the capability to write where it may not."""
    if os.geteuid() == 0 and sys.platform == "linux":
        pr_capbset_drop, cap_dac_override = 24, 1
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    """A write that the system refuses names the file and the remedy, and leaves no file behind."""
    files = write_texts(tmp_path / "in")
    argv = ["text", *files, "--data-dir", str(tmp_path / "data"), "--vocab-size", "330"]
    rc, _, err = finish(start(argv, FULL_DISK))
    assert rc == 2 and err.count("\n") == 1
    assert err.startswith("prepare_data: cannot write") and "free some disk space" in err
    assert read_tree(tmp_path / "data") == {}


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, capsys):
    """A read-only data directory, and one that is a file, are named; nothing is written."""
    files = write_texts(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    assert run_text(tmp_path / "file", files) == 2
    assert str(tmp_path / "file") in complaint(capsys)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    argv = ["text", *files, "--data-dir", str(locked), "--vocab-size", "330"]
    rc, out, err = finish(start(argv, preexec_fn=obey_permissions))
    if rc == 0:
        pytest.skip("this user may write everywhere")
    assert rc == 2 and err.count("\n") == 1 and "Permission denied" in err and str(locked) in err
    assert list(locked.iterdir()) == []


def test_an_intact_dataset_in_a_read_only_directory_is_enough(tmp_path, capsys):
    """Checking writes nothing: no lock, no temporary file, no new time stamp."""
    files, data_dir = write_texts(tmp_path / "in"), tmp_path / "data"
    assert run_text(data_dir, files) == 0
    (data_dir / "datasets" / "text_sp330" / ".lock").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert run_text(data_dir, files) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}


def test_help_covers_every_subcommand(capsys):
    """Each --help leaves with 0 and names its options."""
    for argv, expected in ((["--help"], "fineweb"), (["demo", "--help"], "--data-dir"),
                           (["text", "--help"], "--split-chars"), (["fineweb", "-h"], "--offline")):
        with pytest.raises(SystemExit) as stop:
            prepare_data.main(argv)
        assert stop.value.code == 0 and expected in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# fineweb, against a loopback server that speaks the hub's download calls
# ------------------------------------------------------------------------------------------------

REPOSITORY, REVISION = "someone/parameter-golf", "ab" * 20
QUICK = """
prepare_data.RETRY_SECONDS, prepare_data.SPARE_BYTES = 0.02, 0
import huggingface_hub.constants as constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
import huggingface_hub.file_download as file_download
class time(type(sys)): sleep = staticmethod(lambda seconds: None)
file_download.time = time
"""


def shard_bytes(seed: int, num_tokens: int = 30_000, largest: int = 1023) -> bytes:
    """A shard of random ids in which about every 500th begins a document."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, largest + 1, num_tokens).astype("<u2")
    ids[rng.random(num_tokens) < 0.002] = 1
    ids[0], ids[1] = 1, largest
    return prepare_data.shard_header(num_tokens) + ids.tobytes()


class FakeHub(http.server.ThreadingHTTPServer):
    """The hub's answers about one dataset repository; `faults` spoil the next transfers of a file.

    A fault is `cut` (half of the bytes, then the line goes dead), `corrupt` (one bit differs),
    `whole` (asked to resume, it sends everything), `busy` (503), `gone` (404) or `stall` (half of
    the bytes, then nothing until the test ends).  As on the hub, files lie on another host.
    """
    daemon_threads = True

    def __init__(self):
        """Listen on a free port; `stock` gives it something to serve."""
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    def stock(self, tokenizer: bytes):
        """Serve three training shards, one of validation, and the tokenizer, without faults."""
        shards = "datasets/datasets/fineweb10B_sp1024"
        self.files = {f"{shards}/fineweb_train_{i:06d}.bin": shard_bytes(i) for i in range(3)}
        self.files[f"{shards}/fineweb_val_000000.bin"] = shard_bytes(9)
        self.files[f"{shards}/README.md"] = b"not a shard"
        self.files["datasets/tokenizers/fineweb_1024_bpe.model"] = tokenizer
        self.files["datasets/tokenizers/fineweb_8192_bpe.model"] = b"of another variant"
        self.revision, self.faults, self.announced, self.log = REVISION, {}, {}, []
        self.released, self.told = threading.Event(), False

    def path_of(self, name: str) -> str:
        """Path in the repository of the file with this name."""
        return next(path for path in self.files if path.endswith("/" + name))

    def spoil(self, name: str, *faults: str):
        """Let the next transfers of a file go wrong, one fault each."""
        self.faults[self.path_of(name)] = list(faults)

    def transfers(self) -> list[tuple[str, str]]:
        """File name and Range header of the transfers since the last call."""
        log, self.log = self.log, []
        return sorted(log)


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers of the loopback hub."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Stay quiet."""

    def reply(self, status: int, body: bytes, headers: dict = {}, sent: int | None = None):
        """Send a response, of whose body only the first `sent` bytes arrive."""
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()

    def do_GET(self):
        """Route one request."""
        url = urllib.parse.urlsplit(self.path)
        path, hub = urllib.parse.unquote(url.path), self.server
        if path == f"/api/datasets/{REPOSITORY}":
            self.reply(200, json.dumps({"id": REPOSITORY, "sha": hub.revision}).encode())
        elif path.startswith(tree := f"/api/datasets/{REPOSITORY}/tree/{hub.revision}/"):
            self.list_folder(path[len(tree):], urllib.parse.parse_qs(url.query))
        elif path.startswith(root := f"/datasets/{REPOSITORY}/resolve/{hub.revision}/"):
            elsewhere = f"http://localhost:{hub.server_port}/storage/{path[len(root):]}"
            self.reply(302, b"", {"Location": elsewhere})
        elif path.startswith(root := "/storage/"):
            hub.told |= "hf_secret" in str(self.headers)
            self.send_file(path[len(root):])
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def list_folder(self, folder: str, query: dict):
        """Send a page of two entries; a Link header leads to the next."""
        hub, entries = self.server, []
        for path, data in sorted(hub.files.items()):
            if path.rpartition("/")[0] == folder:
                size, blob = hub.announced.get(path, len(data)), b"blob %d\0" % len(data) + data
                entry = dict(type="file", path=path, size=size, oid=hashlib.sha1(blob).hexdigest())
                if path.endswith(".bin"):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = dict(oid=digest, size=size, pointerSize=134)
                entries.append(entry)
        first = int(query.get("cursor", ["0"])[0])
        address = hub.endpoint + urllib.parse.urlsplit(self.path).path
        link = {"Link": f'<{address}?cursor={first + 2}>; rel="next"'}
        more = link if entries[first + 2:] else {}
        self.reply(200, json.dumps(entries[first:first + 2]).encode(), more)

    def send_file(self, path: str):
        """Send a file or the rest of it, spoiled by the next fault, if there is one."""
        hub, data, asked = self.server, self.server.files[path], self.headers.get("Range", "")
        hub.log.append((path.rpartition("/")[2], asked))
        fault = hub.faults[path].pop(0) if hub.faults.get(path) else ""
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "whole" else 0
        if fault in ("busy", "gone"):
            return self.reply({"busy": 503, "gone": 404}[fault], b"")
        body = bytearray(data[start:])
        body[len(body) // 2] ^= fault == "corrupt"
        half = len(body) // 2 if fault in ("cut", "stall") else None
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.reply(206 if start else 200, bytes(body), more, half)
        if fault == "stall":
            hub.released.wait(30)
        self.close_connection = True


def forget_hub_client():
    """Let the hub's client be imported afresh: it reads its endpoint once, when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory):
    """One loopback hub for all tests, with the client in this process set to it."""
    server, patch = FakeHub(), pytest.MonkeyPatch()
    patch.setenv("HF_ENDPOINT", server.endpoint)
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.setenv("HF_TOKEN", "hf_secret")
    patch.setenv("MATCHED_FINEWEB_REPO_ID", REPOSITORY)
    patch.setattr(prepare_data, "RETRY_SECONDS", 0.0)
    patch.setattr(prepare_data, "SPARE_BYTES", 0)
    forget_hub_client()
    exec(QUICK, dict(sys=sys, prepare_data=prepare_data))
    yield server
    forget_hub_client()
    patch.undo()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(hub_server, demo):
    """The loopback hub in its first state; its tokenizer is the demo's, of the right size."""
    hub_server.stock((demo[0] / "tokenizers" / "demo_1024_bpe.model").read_bytes())
    yield hub_server
    hub_server.released.set()
    assert not hub_server.told, "the person's token went to another host than the hub"


def fineweb_arguments(data_dir: Path, *more: str) -> list[str]:
    """The command line for three shards."""
    return ["fineweb", "--variant", "sp1024", "--train-shards", "3", "--data-dir", str(data_dir),
            *more]


def fineweb(data_dir: Path, *more: str, rc: int = 0) -> str:
    """Run `fineweb` here, expect its exit code, and return what the stream that counts got."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = prepare_data.main(fineweb_arguments(data_dir, *more))
    return check_outcome((found, out.getvalue(), err.getvalue()), rc)


def fineweb_process(data_dir: Path, *more: str, rc: int = 0, **env: str) -> str:
    """The same in a process of its own, with a changed environment."""
    return check_outcome(finish(start(fineweb_arguments(data_dir, *more), QUICK, env=env)), rc)


def check_outcome(outcome: tuple[int, str, str], rc: int) -> str:
    """Standard output of a success, standard error of a failure, which must be one line."""
    found, out, err = outcome
    assert found == rc, out + err
    assert err.count("\n") == (rc != 0), err
    assert not rc or err.startswith("prepare_data: "), err
    return err if rc else out


def fineweb_directory(data_dir: Path) -> Path:
    """Where the shards go."""
    return data_dir / "datasets" / "fineweb10B_sp1024"


def check_fetched(hub: FakeHub, data_dir: Path) -> dict:
    """Every file is the hub's, none is left over, and the manifest tells the truth."""
    manifest = check_manifest(fineweb_directory(data_dir))
    found = read_tree(data_dir)
    for entry in [manifest["tokenizer"], *manifest["train"]["files"], *manifest["val"]["files"]]:
        place = next(path for path in found if path.endswith("/" + entry["name"]))
        assert found[place] == hub.files[hub.path_of(entry["name"])]
    assert len(found) == 2 + len(manifest["train"]["files"]) + len(manifest["val"]["files"])
    assert manifest["source"]["revision"] == hub.revision
    return manifest


def test_fineweb_fetches_once_and_verifies_offline(hub, tmp_path):
    """One transfer a file; later runs transfer nothing; offline needs no server and no network."""
    data_dir = tmp_path / "data"
    out = fineweb_process(data_dir, "--train-shards", "2")
    assert out.splitlines()[-1].endswith(
        " DATASET=fineweb10B_sp1024 VOCAB_SIZE=1024 python train_gpt.py")
    assert len(check_fetched(hub, data_dir)["train"]["files"]) == 2
    assert [asked for _, asked in hub.transfers()] == [""] * 4
    fineweb(data_dir)
    assert [name for name, _ in hub.transfers()] == ["fineweb_train_000002.bin"]
    before = read_tree(data_dir)
    assert "there and intact" in fineweb(data_dir, "--train-shards", "1")
    assert "intact (SHA-256 checked, offline)" in fineweb_process(
        data_dir, "--offline", HF_ENDPOINT="http://127.0.0.1:9")
    assert hub.transfers() == [] and read_tree(data_dir) == before


def test_fineweb_survives_cut_corrupt_and_refused_transfers(hub, tmp_path):
    """Cut transfers go on where they stopped, corrupt ones start afresh; the files are right."""
    hub.spoil("fineweb_train_000000.bin", "cut", "cut", "corrupt")
    hub.spoil("fineweb_train_000001.bin", "corrupt", "busy")
    hub.spoil("fineweb_train_000002.bin", "cut", "whole")
    hub.spoil("fineweb_1024_bpe.model", "corrupt", "cut")
    out = fineweb(tmp_path / "data")
    check_fetched(hub, tmp_path / "data")
    assert "sha256" in out and "attempt 1 of 4" in out
    asked = [asked for name, asked in hub.transfers() if name == "fineweb_train_000002.bin"]
    assert len(asked) == 2 and asked[0] == "" and int(asked[1][6:-1]) > 0


def test_fineweb_gives_up_in_one_line_and_goes_on_later(hub, tmp_path):
    """A file that never arrives whole is named; no manifest claims it; a later run fetches it."""
    data_dir = tmp_path / "data"
    hub.spoil("fineweb_train_000001.bin", *["corrupt"] * 4)
    err = fineweb(data_dir, rc=2)
    assert "fineweb_train_000001.bin: not fetched: sha256" in err and "same command" in err
    left = fineweb_directory(data_dir)
    assert not (left / "manifest.json").exists()
    assert not (left / "fineweb_train_000001.bin").exists()
    hub.spoil("fineweb_train_000001.bin", "gone")
    assert "404" in fineweb(data_dir, rc=2)
    fineweb(data_dir)
    check_fetched(hub, data_dir)


@pytest.mark.parametrize("signal_number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_fineweb_resumes_after_a_kill_and_after_ctrl_c(hub, tmp_path, signal_number, code):
    """A run that ends in the middle of a file leaves a part file, which the next run continues."""
    data_dir = tmp_path / "data"
    hub.spoil("fineweb_train_000001.bin", "stall")
    process = start(fineweb_arguments(data_dir), QUICK)
    part = wait_for_part(fineweb_directory(data_dir), "fineweb_train_000001.bin", 20_000)
    process.send_signal(signal_number)
    time.sleep(0.1)
    hub.released.set()
    assert finish(process)[0] == code
    assert not (fineweb_directory(data_dir) / "fineweb_train_000001.bin").exists()
    assert not (fineweb_directory(data_dir) / "manifest.json").exists()
    hub.transfers()
    fineweb(data_dir)
    check_fetched(hub, data_dir)
    resumed = dict(hub.transfers())["fineweb_train_000001.bin"]
    assert int(resumed.removeprefix("bytes=").rstrip("-")) >= 20_000 and not part.exists()


def wait_for_part(directory: Path, name: str, size: int) -> Path:
    """Wait until a part file has grown to `size` bytes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for part in directory.glob(f".{name}.*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.02)
    raise AssertionError(f"no part file of {name}")


def test_fineweb_mends_local_damage_and_never_keeps_a_stale_manifest(hub, tmp_path):
    """Damage is refetched, and only it; a new revision on the hub replaces what it changes."""
    data_dir = tmp_path / "data"
    directory, name = fineweb_directory(data_dir), "fineweb_train_000001.bin"
    fineweb(data_dir)
    hub.transfers()
    flip_byte(directory / name)
    assert f"{name}: not the file" in fineweb(data_dir, "--offline", rc=2)
    fineweb(data_dir)
    assert [found for found, _ in hub.transfers()] == [name]
    hub.revision, hub.files[hub.path_of(name)] = "cd" * 20, shard_bytes(77)
    fineweb(data_dir)
    assert [found for found, _ in hub.transfers()] == [name]
    check_fetched(hub, data_dir)
    (directory / "manifest.json").write_text("{")
    assert "not a manifest" in fineweb(data_dir, "--offline", rc=2)
    fineweb(data_dir)
    check_fetched(hub, data_dir)
    assert hub.transfers() == []


def test_fineweb_checks_what_the_hub_has_before_it_trusts_it(hub, tmp_path):
    """Files that are what the hub says, but of no use, are refused by name."""
    shard = hub.path_of("fineweb_train_000000.bin")
    tokenizer = hub.path_of("fineweb_1024_bpe.model")
    good = dict(hub.files)
    for path, data, expected in (
            (shard, good[shard][:-2], "but its header announces 30,000 ids"),
            (shard, b"\0" * 2000, "no token shard"),
            (shard, shard_bytes(0, largest=1024), "token id 1024, but the vocabulary ends at 1023"),
            (tokenizer, prepare_data.train_tokenizer(map(prose, range(9)), 330), "330 pieces"),
            (tokenizer, b"of no kind", "fineweb_1024_bpe.model: not a SentencePiece model")):
        hub.files = dict(good, **{path: data})
        assert expected in fineweb(tmp_path / "data", "--train-shards", "1", rc=2)
        assert not (fineweb_directory(tmp_path / "data") / "manifest.json").exists()


def test_fineweb_bad_conditions_are_one_line(hub, tmp_path):
    """Too many shards, a full disk, a stranger, an unknown repository, no network, no manifest."""
    data_dir = tmp_path / "data"
    assert "the hub has 3 files *_train_*, needed 4" in fineweb(
        data_dir, "--train-shards", "4", rc=2)
    assert "RepositoryNotFoundError" in fineweb_process(
        data_dir, rc=2, MATCHED_FINEWEB_REPO_ID="no/repository")
    assert "check the network" in fineweb_process(data_dir, rc=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "manifest.json: no such file" in fineweb(data_dir, "--offline", rc=2)
    hub.announced[hub.path_of("fineweb_train_000000.bin")] = 10**16
    assert "bytes needed" in fineweb(data_dir, rc=2)
    hub.announced.clear()
    fineweb_directory(data_dir).mkdir(parents=True, exist_ok=True)
    stranger = fineweb_directory(data_dir) / "fineweb_train_000009.bin"
    stranger.write_bytes(shard_bytes(9))
    assert "fineweb_train_000009.bin: not among the hub's files" in fineweb(data_dir, rc=2)
    assert hub.transfers() == []
    stranger.unlink()
    fineweb(data_dir, "--train-shards", "1")
    assert "1 training shards, needed 3" in fineweb(data_dir, "--offline", rc=2)
