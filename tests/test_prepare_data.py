"""prepare_data.py: real files and processes, damage and kills of every kind; the hub is a folder.

Run alone: python -m pytest -q tests/test_prepare_data.py
"""
import ctypes
import fnmatch
import gzip
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import console  # noqa: E402
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


def text_command(data_dir: Path, files: list[str], *more: str) -> list[str]:
    """Arguments of `text` with a vocabulary that small texts can fill."""
    return ["text", "--data-dir", str(data_dir), "--vocab-size", "330", *files, *more]


def run_text(data_dir: Path, files: list[str], *more: str) -> int:
    """Run the `text` subcommand in this process."""
    return prepare_data.main(text_command(data_dir, files, *more))


def read_tree(directory: Path) -> dict[str, bytes]:
    """Bytes of every file below a directory, without the locks."""
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"}


def made(directory: Path) -> dict[str, bytes]:
    """Bytes of the shards and tokenizers below a directory, without unfinished ones."""
    return {name: data for name, data in read_tree(directory).items()
            if name.endswith((".bin", ".model")) and "/.new/" not in name}


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
    entries = [(directory.parents[1] / "tokenizers", manifest["tokenizer"])]
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
        if place == directory:
            ids = np.frombuffer(data[1024:], "<u2")
            assert (entry["tokens"], entry["documents"]) == (len(ids), (ids == 1).sum())
    assert {p.name for p in directory.glob("*.bin")} == {e["name"] for _, e in entries[1:]}
    return manifest


def load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer at `path`."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def complaint(capsys) -> str:
    """The one line on standard error."""
    err = capsys.readouterr().err
    assert err.startswith("prepare_data: ") and err.count("\n") == 1, err
    return err


def start(argv: list, prelude: str = "", **options) -> subprocess.Popen:
    """Start prepare_data in a process of its own, after `prelude` has run there."""
    code = f"import sys, prepare_data\n{prelude}\nsys.exit(prepare_data.main({argv!r}))"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **options.pop("env", {}))
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def forked(work) -> int:
    """Exit code of `work()` in a copy of this process; negative if a signal ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(work())
    finally:
        os._exit(99)


def flip_byte(path: Path):
    """Change one byte in the middle of a file, keeping its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


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
    """Sizes, shares, ids, the decoded text and what compressors need for it are as promised."""
    data_dir, out = demo
    directory = data_dir / "datasets" / "demo_sp1024"
    manifest = check_manifest(directory)
    train, val = manifest["train"]["text_bytes"], manifest["val"]["text_bytes"]
    assert train + val > 1_500_000 and 0.04 < val / (train + val) <= 0.06
    tokenizer = load_model(data_dir / "tokenizers" / "demo_1024_bpe.model")
    documents = read_split(directory, "train")
    assert max(map(max, documents)) < tokenizer.get_piece_size() == 1024
    assert all(document.count(1) == 1 and 2 not in document for document in documents)
    text = " ".join(tokenizer.decode(document) for document in documents)
    assert min(text.count(word) for word in (" the ", " is ", " returns ", " of ")) > 300
    held_out = "".join(tokenizer.decode(read_split(directory, "val"))).encode()
    gz = 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    xz = 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    assert f"{len(held_out):,} bytes; gzip -9 {gz:.2f}, xz -9e {xz:.2f} bits per byte\n" in out


def test_demo_tokenizer_has_the_settings_of_the_challenge(demo):
    """Special ids, byte fallback, marker piece, split digits and no dummy prefix."""
    tokenizer = load_model(demo[0] / "tokenizers" / "demo_1024_bpe.model")
    specials = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert specials == (0, 1, 2, 3)
    assert tokenizer.piece_to_id("\u2581") != 3
    assert not tokenizer.encode("the", out_type=str)[0].startswith("\u2581")
    assert tokenizer.encode("2024", out_type=str) == list("2024")
    assert tokenizer.decode(tokenizer.encode("\u6f22 \U0001f40d")) == "\u6f22 \U0001f40d"
    assert sum(map(tokenizer.is_byte, range(1024))) == 256


def test_demo_needs_no_network_runs_once_and_names_the_next_command(demo):
    """Neither torch nor the hub's client is imported; a second run and `check` touch nothing."""
    data_dir, out = demo
    lines = out.splitlines()
    assert lines[-1] == "imported"
    assert lines[-3] == f"prepare_data: next: DATA_DIR={data_dir} RECIPE=demo python train_gpt.py"
    assert lines[-2] == (f"prepare_data: then: DATA_DIR={data_dir} python use_artifact.py sample "
                         "runs/demo_seed1337/model.golf")
    stamps = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    for command in ("demo", "check"):
        assert prepare_data.main([command, "--data-dir", str(data_dir)]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}


def test_demo_reads_prose_only(tmp_path):
    """Short texts and the library's tests are no documents; topics and docstrings are."""
    (tmp_path / "test").mkdir()
    (tmp_path / "plain.py").write_text(f'def f():\n    """{prose(1)}"""\n')
    (tmp_path / "short.py").write_text('"""Too short."""\n')
    (tmp_path / "test" / "more.py").write_text(f'"""{prose(2)}"""\n')
    topics = b"topics = {'if': %r, 'digits': %r}" % (prose(3), "12 " * 200)
    assert list(prepare_data.demo_documents(tmp_path, topics)) == [prose(3), prose(1).strip()]


# ------------------------------------------------------------------------------------------------
# text: what comes out
# ------------------------------------------------------------------------------------------------

def test_text_shards_decode_to_the_files(tmp_path, capsys):
    """Every document is BOS and ids that decode to its text; the next command names the corpus."""
    files = write_texts(tmp_path / "in")
    assert run_text(tmp_path / "data", files, "--name", "notes", "--val-docs", "3") == 0
    directory = tmp_path / "data" / "datasets" / "notes_sp330"
    check_manifest(directory)
    tokenizer = load_model(tmp_path / "data" / "tokenizers" / "notes_330_bpe.model")
    splits = {split: {tokenizer.decode(ids) for ids in read_split(directory, split)}
              for split in ("train", "val")}
    assert len(splits["val"]) == 3 and not splits["val"] & splits["train"]
    assert splits["val"] | splits["train"] == {prose(i).strip() for i in range(12)}
    out = capsys.readouterr().out
    assert re.search(r"validation text: [\d,]+ bytes; gzip -9 \d\.\d\d, xz -9e \d\.\d\d bits", out)
    assert out.splitlines()[-2].endswith(
        "RECIPE=demo DATASET=notes_sp330 VOCAB_SIZE=330 python train_gpt.py")


def test_json_lines_equal_files_and_order_and_names_do_not_matter(tmp_path):
    """Documents give the same bytes as files, renamed, with a BOM, or as lines of one file."""
    marked = write_texts(tmp_path / "elsewhere")[::-1]
    for path in map(Path, marked):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lines = [json.dumps({"text": prose(i), "id": i}) for i in range(12)]
    (tmp_path / "all.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    trees = []
    for i, sources in enumerate((write_texts(tmp_path / "in"), marked,
                                 [str(tmp_path / "all.jsonl")])):
        assert run_text(tmp_path / str(i), sources) == 0
        trees.append(made(tmp_path / str(i)))
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
    check_manifest(directory)
    documents = read_split(directory, "train") + read_split(directory, "val")
    assert len(documents) == len(set(map(tuple, documents))) == 6


def test_documents_straddle_shards_of_the_size_asked_for(tmp_path):
    """All shards but the last are full, and a new size is a new dataset without old shards."""
    files = write_texts(tmp_path / "in", 12)
    for size in (1000, 1700):
        assert run_text(tmp_path / "data", files, "--shard-tokens", str(size)) == 0
        manifest = check_manifest(tmp_path / "data" / "datasets" / "text_sp330")
        sizes = [entry["tokens"] for entry in manifest["train"]["files"]]
        assert len(sizes) > 2 and set(sizes[:-1]) == {size} and 0 < sizes[-1] <= size
        assert manifest["train"]["documents"] + manifest["val"]["documents"] == 12


def test_one_long_file_can_be_cut_into_documents(tmp_path, capsys):
    """A book is one document, which cannot be split; the complaint names the option that cuts."""
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(prose(i) for i in range(20)))
    assert run_text(tmp_path / "data", [str(book)]) == 2
    assert re.search("distinct documents: 1, needed 2;.*--split-chars", complaint(capsys))
    assert run_text(tmp_path / "data", [str(book)], "--split-chars", "2000") == 0
    manifest = check_manifest(tmp_path / "data" / "datasets" / "text_sp330")
    assert manifest["train"]["documents"] + manifest["val"]["documents"] >= 10


def test_the_bounds_named_for_the_vocabulary_are_its_bounds(tmp_path, capsys):
    """A vocabulary too large or too small is rejected with the bound, which is exact."""
    files = [*write_texts(tmp_path / "in", 8), "--val-docs", "3", "--vocab-size"]
    for wrong, beyond in ((60000, 1), (261, -1)):
        assert run_text(tmp_path / "data", [*files, str(wrong)]) == 2
        bound = int(complaint(capsys).split("set --vocab-size ")[1].split()[0])
        assert run_text(tmp_path / "data", [*files, str(bound)]) == 0
        assert run_text(tmp_path / "data", [*files, str(bound + beyond)]) == 2
        capsys.readouterr()


# ------------------------------------------------------------------------------------------------
# text: parts, by their properties
# ------------------------------------------------------------------------------------------------

texts = st.lists(st.text(max_size=20), max_size=12)


@given(texts, st.floats(0.01, 0.9), st.integers(0, 5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_validation_is_a_proper_part_and_ignores_order(texts, val_frac, val_docs, random):
    """The choice depends on the set of texts alone, and leaves something on both sides."""
    documents = prepare_data.unique_documents(texts)
    assert set(documents.values()) == {text for text in texts if text.strip()}
    wanted = prepare_data.Settings(val_frac=val_frac, val_docs=val_docs)
    if len(documents) <= max(val_docs, 1):
        with pytest.raises(console.Failure):
            prepare_data.choose_validation(documents, wanted)
        return
    chosen = prepare_data.choose_validation(documents, wanted)
    assert 0 < len(set(chosen)) == len(chosen) < len(documents)
    assert not val_docs or len(chosen) == val_docs
    random.shuffle(texts)
    assert prepare_data.choose_validation(prepare_data.unique_documents(texts), wanted) == chosen


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_pieces_of_a_text_are_short_and_join_to_it(text, size):
    """Cutting loses nothing; 0 leaves the text whole."""
    pieces = list(prepare_data.split_text(text, size))
    assert "".join(pieces) == text and max(map(len, pieces)) <= size
    assert list(prepare_data.split_text(text, 0)) == [text]


@given(st.lists(st.lists(st.integers(2, 9), max_size=9), min_size=1, max_size=9),
       st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_documents_survive_any_shard_size(tmp_path_factory, contents, size):
    """Shards are full but for the last, and reading them back gives each document."""
    documents = [np.array([1, *ids], "<u2") for ids in contents]
    shards = list(prepare_data.cut_into_shards(iter(documents), size))
    assert {len(shard) for shard in shards[:-1]} <= {size} and 0 < len(shards[-1]) <= size
    layout = prepare_data.Layout(tmp_path_factory.mktemp("shards"), "x", "x_sp10", 10)
    layout.directory.mkdir(parents=True)
    for split in ("train", "val"):
        for i, ids in enumerate(shards):
            data = prepare_data.shard_header(len(ids)) + ids.tobytes()
            layout.shard(split, i).write_bytes(data)
            assert prepare_data.inspect_shard(layout.shard(split, i), 10)["tokens"] == len(ids)
    found = prepare_data.read_documents(layout.shards_present("train"))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in documents]
    with pytest.raises(console.Failure, match="equal validation documents"):
        prepare_data.check_disjoint(layout)


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

BAD_FILES = {       # name -> content and words of the complaint
    "empty.txt": (b"", "empty.txt: empty"),
    "blank.txt": (b" \n\n", "blank.txt: empty"),
    "latin.txt": ("na\u00efve".encode("latin-1"), "not UTF-8: byte 0xef"),
    "utf16.txt": ("text".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    "mark.txt": (b"\xef\xbb\xbfab\xff", "not UTF-8: byte 0xff at offset 5"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": }\n', "bad.jsonl:3: not JSON"),
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}', 'key.jsonl:2: needed an object with a string '
                  'under "text", found {"body": "b"}'),
    "list.jsonl": (b'["text"]', "list.jsonl:1: needed"),
    "number.jsonl": (b'{"text": 3}', "number.jsonl:1: needed"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', "bytes.jsonl:2: not UTF-8"),
    "half.jsonl": (b'{"text": "\\ud800"}', "half.jsonl:1: lone surrogate"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, "deep.jsonl:2: not JSON"),
    "digits.jsonl": (b'{"text": ' + b"1" * 4301 + b"}", "digits.jsonl:1: n"),
}
BAD_OPTIONS = (
    (["--name", "my-notes"], "'my-notes', needed letters a to z"),
    (["--name", "demo"], "'demo', needed letters a to z only, and not demo"),
    (["--vocab-size", "65536"], "--vocab-size: '65536', needed 260 to 65535"),
    (["--vocab-size", "1e3"], "--vocab-size: '1e3'"),
    (["--val-frac", "nan"], "--val-frac: 'nan', needed 0.001 to 0.999"),
    (["--val-docs", "3"], "distinct documents: 3, needed 4;"))


def bad_arguments(tmp_path: Path):
    """Yield arguments of `text` that must be rejected, and what the complaint must contain."""
    good = write_texts(tmp_path / "good", 3)
    for name, (data, expected) in BAD_FILES.items():
        (tmp_path / name).write_bytes(data)
        yield [*good, str(tmp_path / name)], expected
    for options, expected in BAD_OPTIONS:
        yield [*good, *options], expected
    for i in range(3):
        (tmp_path / f"zero{i}.txt").write_text("\u200b" * (i + 1))
    yield [str(tmp_path / f"zero{i}.txt") for i in range(3)], "no visible text"
    (tmp_path / "tiny.txt").write_text("abc")
    yield [*good[:2], str(tmp_path / "tiny.txt")], "val split would have 4 tokens, needed 257"
    os.mkfifo(tmp_path / "pipe")
    yield [str(tmp_path / "pipe"), *good], "pipe: a pipe or device, needed a regular file"
    yield [str(tmp_path / "no.txt")], "no.txt: cannot be read"
    yield [str(tmp_path)], "a folder, needed a regular file"
    yield [], "FILE"


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    """Each bad argument or file ends with exit code 2, one line that names it, and no file."""
    for arguments, expected in bad_arguments(tmp_path):
        assert run_text(tmp_path / "data", arguments) == 2, expected
        assert expected in complaint(capsys), expected
        assert read_tree(tmp_path / "data") == {}, expected


def test_a_failed_rebuild_keeps_the_old_dataset(tmp_path):
    """A dataset that is there outlives a later command that cannot be carried out."""
    files = write_texts(tmp_path / "in")
    assert run_text(tmp_path / "data", files) == 0
    before = read_tree(tmp_path / "data")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert run_text(tmp_path / "data", [*files, str(tmp_path / "bad.txt")]) == 2
    assert run_text(tmp_path / "data", files[:1]) == 2
    assert read_tree(tmp_path / "data") == before


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"


def obey_permissions():
    """Take from root, in a process about to start, the capability to write where it may not."""
    if os.geteuid() == 0 and sys.platform == "linux":
        pr_capbset_drop, cap_dac_override = 24, 1
        ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    """A write that the system rejects names the file and leaves none behind."""
    argv = text_command(tmp_path / "data", write_texts(tmp_path / "in"))
    rc, _, err = finish(start(argv, FULL_DISK))
    assert rc == 2 and err.count("\n") == 1 and "cannot be written (File too large)" in err
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
    rc, out, err = finish(start(text_command(locked, files), preexec_fn=obey_permissions))
    if rc == 0:
        pytest.skip("this user may write everywhere")
    assert rc == 2 and err.count("\n") == 1 and "Permission denied" in err and str(locked) in err
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("name, put", [
    (".lock", os.mkfifo), (".lock", os.mkdir), ("manifest.json", os.mkdir),
    ("text_train_000000.bin", os.mkdir), ("../../tokenizers/text_330_bpe.model", os.mkdir)])
def test_what_cannot_be_replaced_is_named_before_the_work(tmp_path, capsys, name, put):
    """A FIFO or folder in the place of a file of the dataset ends in one line with a remedy."""
    directory, files = tmp_path / "data" / "datasets" / "text_sp330", write_texts(tmp_path / "in")
    for folder in (directory, tmp_path / "data" / "tokenizers"):
        folder.mkdir(parents=True)
    put(directory / name)
    assert run_text(tmp_path / "data", files) == 2
    out, err = capsys.readouterr()
    told = f"prepare_data: .*{Path(name).name}: not a regular file; move it away\n"
    assert re.fullmatch(told, err)
    assert out == "" and read_tree(tmp_path / "data") == {}


def test_odd_streams_and_names_end_in_at_most_one_line(tmp_path):
    """An ASCII console, a name that is not UTF-8, closed streams and a full disk behind stdout."""
    files = write_texts(tmp_path / "in", 8)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(tmp_path / "in", strange)
    command = text_command(Path(strange, "d\u00e9"), [f"{strange}/note{i}.txt" for i in range(8)])
    failing = f"assert prepare_data.main({[*command, strange]!r}) == 2"
    rc, _, err = finish(start(command, failing, env={"PYTHONIOENCODING": "ascii"}))
    assert rc == 0 and err.count("\n") == 1 and "a folder, needed a regular file" in err
    closed = dict(preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])
    assert finish(start(text_command(tmp_path / "data", files), **closed))[0] == 0
    check_manifest(tmp_path / "data" / "datasets" / "text_sp330")
    with open("/dev/full", "w") as full:
        rc, _, err = finish(start(["check", "--data-dir", str(tmp_path / "data")], stdout=full))
    assert rc == 2 and err == "prepare_data: the console: No space left on device\n"


def test_help_covers_every_subcommand(capsys):
    """Each --help leaves with 0 and names its options."""
    for argv, expected in ((["--help"], "fineweb"), (["demo", "--help"], "--data-dir"),
                           (["text", "--help"], "--split-chars"), (["fineweb", "-h"], "--shards"),
                           (["check", "-h"], "--write")):
        assert prepare_data.main(argv) == 0 and expected in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Damage and interruption
# ------------------------------------------------------------------------------------------------

def edit_manifest(path: Path, change):
    """Apply `change` to a manifest's dictionary."""
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def swap_ids(path: Path):
    """Exchange two ids of a shard: header, size, counts and the set of ids stay as they were."""
    data = bytearray(path.read_bytes())
    assert data[1030:1032] != data[1032:1034]
    data[1030:1034] = data[1032:1034] + data[1030:1032]
    path.write_bytes(bytes(data))


def halve(path: Path):
    """Keep half of a shard's ids, with a header that fits."""
    ids = np.frombuffer(path.read_bytes()[1024:], "<u2")
    ids = ids[:len(ids) // 2]
    path.write_bytes(prepare_data.shard_header(len(ids)) + ids.tobytes())


def other_tokenizer(path: Path):
    """Replace a tokenizer by one of the same size that learned from other text."""
    path.write_bytes(prepare_data.train_tokenizer([prose(i)[::-1] for i in range(12)], 330))


def edited(change):
    """A kind of damage: `change` a manifest's dictionary."""
    return "manifest.json", lambda path: edit_manifest(path, change)


DAMAGE = dict(      # file and what happens to it
    swapped=("text_train_000000.bin", swap_ids), halved=("text_val_000000.bin", halve),
    cut=("text_val_000000.bin", lambda path: os.truncate(path, 1500)),
    missing=("text_train_000000.bin", Path.unlink),
    pipe=("text_train_000000.bin", lambda path: (path.unlink(), os.mkfifo(path))),
    stranger=("text_train_mine.bin", lambda p: shutil.copy(p.with_name("text_val_000000.bin"), p)),
    tokenizer=("text_330_bpe.model", other_tokenizer),
    flipped_tokenizer=("text_330_bpe.model", flip_byte),
    no_tokenizer=("text_330_bpe.model", Path.unlink),
    no_manifest=("manifest.json", Path.unlink),
    half_manifest=("manifest.json", lambda path: os.truncate(path, 200)),
    odd_manifest=("manifest.json", lambda path: path.write_text("[1]")),
    deep_manifest=("manifest.json", lambda path: path.write_text("[" * 100_000)),
    old_format=edited(lambda m: m.update(format=0)),
    listed_twice=edited(lambda m: m["val"]["files"].append(m["val"]["files"][0])),
    no_name=edited(lambda m: m["val"]["files"][0].update(name=5)),
    odd_settings=edited(lambda m: m.update(settings=3)),
    few_settings=edited(lambda m: m["settings"].pop("val_frac")),
    odd_source=edited(lambda m: m.update(source=[])),
    odd_files=edited(lambda m: m["source"].update(files=[3])),
    unlisted=edited(lambda m: m["val"]["files"].clear()),
    miscounted=edited(lambda m: m["val"]["files"][0].update(documents=9)),
    wrong_totals=edited(lambda m: m["train"].update(tokens=1)))


def test_every_damage_is_named_by_check_and_mended_by_the_command_that_it_names(tmp_path, capsys):
    """Whatever is damaged, `check` says so, and the next run restores the bytes of the first."""
    data_dir, notes = tmp_path / "data", tmp_path / "all notes.jsonl"
    notes.write_text("\n".join(json.dumps({"text": prose(i)}) for i in range(12)))
    command, check = text_command(data_dir, [str(notes)]), ["check", "--data-dir", str(data_dir)]
    assert prepare_data.main(command) == 0
    before, directory = read_tree(data_dir), data_dir / "datasets" / "text_sp330"
    for kind, (name, damage) in DAMAGE.items():
        damage((data_dir / "tokenizers" if name.endswith(".model") else directory) / name)
        capsys.readouterr()
        assert prepare_data.main(check) == 2, kind
        told = capsys.readouterr().err
        counts = kind in ("unlisted", "miscounted")         # the file and its entry disagree
        assert ("text_val_000000.bin" if counts else
                "text_sp330: no manifest" if kind == "no_manifest" else name) in told, kind
        assert told.count("\n") == 1, told
        named = re.search(r"; run python prepare_data\.py (.*)\n", told)
        assert prepare_data.main(shlex.split(named[1]) if named else command) == 0, kind
        assert read_tree(data_dir) == before, kind
        assert prepare_data.main(check) == 0


def test_check_names_every_file_that_differs_and_writes_a_missing_manifest(tmp_path, capsys):
    """Two faults are two lines; files copied by hand get a manifest that train_gpt.py can use."""
    data_dir, directory = tmp_path / "data", tmp_path / "data" / "datasets" / "text_sp330"
    check = ["check", "--data-dir", str(data_dir)]
    assert prepare_data.main(check) == 2 and "no datasets" in complaint(capsys)
    files = write_texts(tmp_path / "in")
    assert run_text(data_dir, files, "--shard-tokens", "1000", "--val-docs", "2") == 0
    shutil.copytree(directory, directory.with_name("text10B_sp330"))
    (directory.with_name("text10B_sp330") / "manifest.json").unlink()
    capsys.readouterr()
    assert prepare_data.main([*check, "text10B_sp330"]) == 2
    assert "prepare_data.py check --write text10B_sp330" in complaint(capsys)
    assert prepare_data.main([*check, "--write"]) == 0
    check_manifest(directory.with_name("text10B_sp330"))
    for i in (1, 3):
        swap_ids(directory.with_name("text10B_sp330") / f"text_train_00000{i}.bin")
    capsys.readouterr()
    assert prepare_data.main([*check, "--write"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [re.search(r"train_00000(\d)", line)[1] for line in told] == ["1", "3"]
    assert all("sha256; copy the file again" in line for line in told)
    assert prepare_data.main([*check, "nothing"]) == 2
    assert "'nothing' is not the name of a dataset" in complaint(capsys)


def test_an_intact_dataset_in_a_read_only_directory_is_enough(tmp_path):
    """Checking writes nothing: no lock, no temporary file, no new time stamp."""
    files, data_dir = write_texts(tmp_path / "in"), tmp_path / "data"
    assert run_text(data_dir, files) == 0
    (data_dir / "datasets" / "text_sp330" / ".lock").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert run_text(data_dir, files) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}


def test_a_kill_at_any_step_leaves_nothing_that_passes_for_whole(tmp_path):
    """SIGKILL before each sync, removal and rename: old, none or new, but never a mixture."""
    files = write_texts(tmp_path / "in", 6)
    assert run_text(tmp_path / "old", files[:5]) == run_text(tmp_path / "new", files) == 0
    whole = [read_tree(tmp_path / run) for run in ("old", "new")]

    def killed(data_dir: Path, count: int) -> int:
        scope = {}
        exec(ARM, scope)
        scope["arm"](["fsync", "replace", "unlink"], count)
        return run_text(data_dir, files)

    for count in range(1, 100):
        data_dir = tmp_path / f"killed{count}"
        shutil.copytree(tmp_path / "old", data_dir)
        code = forked(lambda: killed(data_dir, count))
        left = {name: data for name, data in read_tree(data_dir).items()
                if "/.new/" not in name and not name.endswith(".part")}
        if "datasets/text_sp330/manifest.json" in left:
            assert left in whole
        for name, data in left.items():
            assert any(tree.get(name) == data for tree in whole), name
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert run_text(data_dir, files) == 0
        assert made(data_dir) == made(tmp_path / "new")
        check_manifest(data_dir / "datasets" / "text_sp330")
    assert count > 10


def test_a_second_run_waits_for_the_first_and_then_finds_the_work_done(tmp_path):
    """While one process holds the lock, another says that it waits, and then changes nothing."""
    files = write_texts(tmp_path / "in")
    assert run_text(tmp_path / "first", files) == 0
    layout = prepare_data.Layout(tmp_path / "data", "text", "text_sp330", 330)
    with prepare_data.exclusive(layout):
        second = start(text_command(layout.data_dir, files))
        assert "waiting for another prepare_data" in second.stdout.readline()
        shutil.copytree(tmp_path / "first", layout.data_dir, dirs_exist_ok=True)
        before = read_tree(layout.data_dir)
    rc, out, err = finish(second)
    assert (rc, err) == (0, "") and "there and intact" in out
    assert read_tree(layout.data_dir) == before


# ------------------------------------------------------------------------------------------------
# fineweb, from a folder in the place of the hub
# ------------------------------------------------------------------------------------------------

def shard_bytes(seed: int, num_tokens: int = 3000, largest: int = 1023) -> bytes:
    """A shard of random ids in which about every 500th begins a document."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, largest + 1, num_tokens).astype("<u2")
    ids[rng.random(num_tokens) < 0.002] = 1
    ids[0], ids[1] = 1, largest
    return prepare_data.shard_header(num_tokens) + ids.tobytes()


class LocalHub:
    """Stands in for huggingface_hub.snapshot_download: copies files of a dictionary.

    As the library does, it keeps complete files, trusts those that its .cache folder knows, and
    replaces others whose bytes differ.  `allowed` is how many files it copies before `end()`.
    """

    def __init__(self, tokenizer: bytes):
        shards = "datasets/datasets/fineweb10B_sp1024"
        self.files = {f"{shards}/fineweb_train_{i:06d}.bin": shard_bytes(i) for i in range(3)}
        self.files[f"{shards}/fineweb_val_000000.bin"] = shard_bytes(9)
        self.files["datasets/tokenizers/fineweb_1024_bpe.model"] = tokenizer
        self.files[f"{shards}/README.md"] = b"not a shard"
        self.files["datasets/tokenizers/fineweb_8192_bpe.model"] = b"of another variant"
        self.revision, self.copied, self.announced, self.allowed = "ab" * 20, [], 0, 100

    def end(self):
        """What happens when no more files are allowed."""
        raise ConnectionError("line\ndead")

    def __call__(self, repository, *, repo_type, local_dir, allow_patterns, revision=None,
                 dry_run=False):
        assert repo_type == "dataset" and revision in (None, self.revision)
        if repository != prepare_data.REPOSITORIES["sp1024"]:
            raise ConnectionError("no such repository")
        wanted = {path: data for path, data in self.files.items()
                  if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)}
        if dry_run:
            return [SimpleNamespace(filename=path, file_size=self.announced or len(data),
                                    will_download=not (local_dir / path).exists(),
                                    commit_hash=self.revision) for path, data in wanted.items()]
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        for path, data in wanted.items():
            known = local_dir / ".cache" / path.replace("/", "-")
            target = local_dir / path
            if not target.exists() or not known.exists() and target.read_bytes() != data:
                if len(self.copied) == self.allowed:
                    self.end()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                self.copied.append(target.name)
            known.touch()
        return str(local_dir)


@pytest.fixture
def hub(demo, monkeypatch) -> LocalHub:
    """The hub in its first state; its tokenizer is the demo's, of the right size."""
    local = LocalHub((demo[0] / "tokenizers" / "demo_1024_bpe.model").read_bytes())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", local)
    return local


@pytest.fixture
def fetch(hub, tmp_path, capsys):
    """A function (shards, rc) that runs `fineweb`; returns the shards copied and the output."""
    def run(shards: int = 3, rc: int = 0) -> tuple[list[str], str]:
        hub.copied.clear()
        found = prepare_data.main(["fineweb", "--variant", "sp1024", "--shards", str(shards),
                                   "--data-dir", str(tmp_path / "data")])
        out, err = capsys.readouterr()
        assert found == rc and err.count("\n") == (rc != 0), out + err
        return sorted(n for n in hub.copied if n.endswith(".bin")), err if rc else out
    return run


def folder_of(tmp_path: Path) -> Path:
    """Where the shards go."""
    return tmp_path / "data" / "datasets" / "fineweb10B_sp1024"


def check_fetched(hub: LocalHub, tmp_path: Path) -> dict:
    """Every file is the hub's, none is left over, and the manifest tells the truth."""
    manifest = check_manifest(folder_of(tmp_path))
    served = {path.rpartition("/")[2]: data for path, data in hub.files.items()}
    found = read_tree(tmp_path / "data")
    for path, data in found.items():
        assert path.endswith("/manifest.json") or data == served[path.rpartition("/")[2]], path
    assert len(found) == 2 + len(manifest["train"]["files"]) + len(manifest["val"]["files"])
    assert manifest["source"]["revision"] == hub.revision
    return manifest


def test_fineweb_copies_once_mends_damage_and_keeps_what_it_has(hub, fetch, tmp_path, capsys):
    """A file is fetched once, a damaged one again; an intact dataset needs no hub."""
    copied, out = fetch(2)
    assert " DATASET=fineweb10B_sp1024 VOCAB_SIZE=1024 python train_gpt.py\n" in out
    assert len(copied) == 3 and len(check_fetched(hub, tmp_path)["train"]["files"]) == 2
    assert fetch(3)[0] == ["fineweb_train_000002.bin"]
    flip_byte(folder_of(tmp_path) / "fineweb_train_000001.bin")
    assert prepare_data.main(["check", "--data-dir", str(tmp_path / "data")]) == 2
    assert "fineweb --variant=sp1024 --shards=3" in complaint(capsys)
    assert fetch(2)[0] == ["fineweb_train_000001.bin"]
    assert len(check_fetched(hub, tmp_path)["train"]["files"]) == 3
    before, hub.files = read_tree(tmp_path / "data"), {}
    assert "there and intact" in fetch(1)[1] and read_tree(tmp_path / "data") == before
    assert prepare_data.main(["check", "--data-dir", str(tmp_path / "data")]) == 0


def test_fineweb_takes_files_that_were_copied_by_hand(hub, fetch, tmp_path):
    """Shards without a manifest are compared with the hub's, not fetched again."""
    fetch()
    (folder_of(tmp_path) / "manifest.json").unlink()
    flip_byte(folder_of(tmp_path) / "fineweb_val_000000.bin")
    assert fetch()[0] == ["fineweb_val_000000.bin"]
    hub.revision = "cd" * 20
    hub.files[next(iter(hub.files))] = shard_bytes(77)
    (folder_of(tmp_path) / "manifest.json").unlink()
    assert fetch()[0] == ["fineweb_train_000000.bin"]
    check_fetched(hub, tmp_path)


@pytest.mark.parametrize("killed", [False, True])
def test_fineweb_continues_where_a_run_ended(hub, fetch, tmp_path, killed):
    """A line that breaks or SIGKILL after any file leaves no manifest, and no file comes twice."""
    if killed:
        hub.end = lambda: os.kill(os.getpid(), signal.SIGKILL)
    for allowed in range(5):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        hub.allowed = allowed
        hub.copied.clear()
        if killed:
            assert forked(lambda: prepare_data.main(
                ["fineweb", "--variant", "sp1024", "--shards", "3", "--data-dir",
                 str(tmp_path / "data")])) == -signal.SIGKILL
        else:
            assert "dead" in fetch(rc=2)[1]
        assert not (folder_of(tmp_path) / "manifest.json").exists()
        hub.allowed = 100
        assert len(fetch()[0]) == 4 - allowed
        check_fetched(hub, tmp_path)


def test_fineweb_rejects_files_that_are_of_no_use(hub, fetch, tmp_path):
    """A file of the hub that train_gpt.py cannot use is named, and no manifest lists it."""
    shard, tokenizer = list(hub.files)[0], list(hub.files)[4]
    good = dict(hub.files)
    for path, data, expected in (
            (shard, good[shard][:-2], "but the 3,000 ids of its header take 7,024"),
            (shard, b"\0" * 2000, "not a token shard"),
            (shard, shard_bytes(0, largest=1024), "token id 1024, but the vocabulary ends at 1023"),
            (tokenizer, prepare_data.train_tokenizer(map(prose, range(9)), 330), "330 pieces"),
            (tokenizer, b"of no kind", "fineweb_1024_bpe.model: not a SentencePiece model")):
        hub.files = dict(good, **{path: data})
        assert expected in fetch(1, rc=2)[1]
        assert not (folder_of(tmp_path) / "manifest.json").exists()


def test_fineweb_bad_conditions_are_one_line_and_change_nothing(hub, fetch, tmp_path, monkeypatch):
    """Too many shards, a full disk, a stranger, an unknown repository, and a dead line."""
    fetch(2)
    before = read_tree(tmp_path / "data")
    assert "the hub has 3 of 4 files *_train_*" in fetch(4, rc=2)[1]
    hub.announced = 10**16
    assert "bytes needed" in fetch(3, rc=2)[1]
    hub.announced = 0
    stranger = folder_of(tmp_path) / "fineweb_train_000009.bin"
    stranger.write_bytes(shard_bytes(9))
    assert "fineweb_train_000009.bin: not among the hub's files" in fetch(3, rc=2)[1]
    stranger.unlink()
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no/repository")
    assert "no/repository on the hub: ConnectionError('no such repository')" in fetch(3, rc=2)[1]
    assert read_tree(tmp_path / "data") == before
