#!/usr/bin/env python3
"""Make or fetch what train_gpt.py reads: shards of token ids and the tokenizer that made them.

    python prepare_data.py demo                        2 MB of English from Python's own library
    python prepare_data.py text notes/*.txt --name notes         your files, one document a file
    python prepare_data.py fineweb --train-shards 10   the challenge's published shards (network)

What a dataset is, under --data-dir (default: DATA_DIR, else `data`):

    datasets/demo_sp1024/demo_train_000000.bin ...   training documents, 100,000,000 ids a shard
    datasets/demo_sp1024/demo_val_000000.bin         documents held out for scoring
    datasets/demo_sp1024/manifest.json               sizes, SHA-256, counts, settings, source
    tokenizers/demo_1024_bpe.model                   SentencePiece byte-pair encoding

A shard is 256 little-endian int32 (magic, version, number of ids, zeros), then uint16 ids.  A
document is BOS and its ids, with nothing after them; it may go on in the next shard of its split.

The rule that keeps a dataset whole: every file is written under a temporary name, synced and then
renamed; the manifest goes first when anything changes and comes back last.  So a manifest means
that all it lists was complete, and even then each file's SHA-256 is checked before it is trusted.
"""
import argparse
import ast
import codecs
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 4 * 256
PAD, BOS, EOS, UNK = 0, 1, 2, 3
MANIFEST_FORMAT = 1                     # raise it when equal sources and settings give other ids
CHUNK_BYTES = 1 << 22                   # files are hashed in pieces of this size
TOKENIZER_TEXT_CHARS = 200_000_000      # the tokenizer learns from this much training text at most
MAX_DOCUMENT_CHARS = 32_000_000         # encoding takes about 40 bytes of memory a character
ENCODE_BATCH = 256                      # documents encoded at a time
WORKERS = 8                             # files verified or fetched at a time
RESERVED_NAMES = ("demo", "fineweb")    # corpora that have their own subcommand


class DataError(Exception):
    """A cause outside this program (a file, an argument, the network, the disk) and its remedy."""


def say(text: str):
    """Print one line for the person who waits."""
    print(f"prepare_data: {text}", flush=True)


# ------------------------------------------------------------------------------------------------
# Files: a name holds either nothing or the whole thing
# ------------------------------------------------------------------------------------------------
# A rename is atomic, but neither it nor the bytes are on the disk until both the file and its
# directory are synced.  All writing happens under a lock that dies with its process, so whatever
# lies around under a temporary name when the lock is taken is left over and can go.

@dataclass(frozen=True)
class Layout:
    """Where the files of one dataset are; train_gpt.py relies on these names."""
    data_dir: Path
    corpus: str                         # prefix of shard and tokenizer names: demo, text, fineweb
    dataset: str                        # directory: demo_sp1024, fineweb10B_sp8192
    vocab_size: int

    @property
    def directory(self) -> Path:
        """Directory of the shards and the manifest."""
        return self.data_dir / "datasets" / self.dataset

    @property
    def manifest(self) -> Path:
        """The JSON file that lists the others."""
        return self.directory / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model."""
        return self.data_dir / "tokenizers" / f"{self.corpus}_{self.vocab_size}_bpe.model"

    def shard(self, split: str, i: int) -> Path:
        """Path of shard i of a split."""
        return self.directory / f"{self.corpus}_{split}_{i:06d}.bin"

    def shards_present(self) -> list[Path]:
        """Every file that train_gpt.py would read as a shard, sorted by name."""
        return sorted(path for split in ("train", "val")
                      for path in self.directory.glob(f"{self.corpus}_{split}_*.bin"))


def temporary(path: Path) -> Path:
    """Name beside `path` under which it is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def write_synced(path: Path, pieces: Iterable[bytes]):
    """Write the pieces to `path` and wait until they are on the disk.

    Raises: DataError with the system's reason (no space, no permission) and the remedy.
    """
    try:
        with open(path, "wb") as f:
            for piece in pieces:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free some disk space "
                        "or choose another --data-dir") from None


def sync_directory(path: Path):
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path, algorithm: str = "sha256", prefix: bytes = b"") -> str:
    """Hexadecimal digest of `prefix` and a file's bytes."""
    state = hashlib.new(algorithm, prefix)
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def exclusive(layout: Layout):
    """Hold the dataset's lock, so that two runs do not write one dataset; a dead run holds none."""
    for directory in (layout.directory, layout.tokenizer.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with open(layout.directory / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another prepare_data that writes {layout.directory}")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@dataclass
class Staging:
    """Files of a dataset under temporary names, until all of them are there and checked."""
    layout: Layout
    staged: dict[Path, Path] = field(default_factory=dict)      # final path -> temporary path

    def __enter__(self):
        """Sweep away what a killed run left; the lock is held, so nobody else is writing it."""
        for path in [*self.layout.directory.glob(".*.tmp"), temporary(self.layout.tokenizer)]:
            path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_):
        """Remove what was not published."""
        for path in self.staged.values():
            path.unlink(missing_ok=True)

    def add(self, final: Path, pieces: Iterable[bytes]):
        """Write a file that `publish` will rename to `final`."""
        self.staged[final] = temporary(final)
        write_synced(self.staged[final], pieces)

    def publish(self, manifest: dict):
        """Replace the dataset by the staged files; the manifest goes first and comes last."""
        retract_manifest(self.layout)
        for path in self.layout.shards_present():
            path.unlink()
        for final, path in self.staged.items():
            os.replace(path, final)
        write_manifest(self.layout, manifest)


# ------------------------------------------------------------------------------------------------
# Shards: header, ids, and what a look at a file can tell
# ------------------------------------------------------------------------------------------------
# The format is the challenge's (parameter-golf, data/download_hf_docs_and_tokenize.py).

def shard_header(num_tokens: int) -> bytes:
    """The 1,024 bytes in front of the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def shard_tokens_in(path: Path) -> int:
    """Number of ids in a shard, after its header and size have been checked."""
    if path.is_fifo():                                      # which would be waited for, for ever
        raise DataError(f"{path}: no token shard: not a file")
    with open(path, "rb") as f:
        header = np.frombuffer(f.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    if (header[0], header[1]) != (MAGIC, VERSION):
        raise DataError(f"{path}: no token shard: magic and version are {header[0]} and "
                        f"{header[1]}, needed {MAGIC} and {VERSION}")
    needed = HEADER_BYTES + 2 * int(header[2])
    if path.stat().st_size != needed:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, but its header announces "
                        f"{header[2]:,} ids, which take {needed:,}")
    return int(header[2])


def inspect_shard(path: Path, vocab_size: int) -> dict:
    """The manifest's entry for a shard, from its bytes alone.

    Returns: name, size in bytes, SHA-256, number of ids, number of documents that begin in it.
    Raises: DataError if the header, the size or an id cannot be right.
    """
    num_tokens, documents, largest = shard_tokens_in(path), 0, 0
    state = hashlib.sha256()
    with open(path, "rb") as f:
        state.update(f.read(HEADER_BYTES))
        while chunk := f.read(CHUNK_BYTES):
            state.update(chunk)
            ids = np.frombuffer(chunk, "<u2")
            documents += int(np.count_nonzero(ids == BOS))
            largest = max(largest, int(ids.max()))
    if largest >= vocab_size:
        raise DataError(f"{path}: token id {largest}, but the vocabulary ends at {vocab_size - 1}")
    return dict(name=path.name, bytes=path.stat().st_size, sha256=state.hexdigest(),
                tokens=num_tokens, documents=documents)


def cut_into_shards(documents: Iterable[np.ndarray], shard_tokens: int) -> Iterator[np.ndarray]:
    """Join documents' ids and yield them `shard_tokens` at a time, the last piece shorter."""
    waiting, count = [], 0
    for ids in documents:
        waiting.append(ids)
        count += len(ids)
        if count >= shard_tokens:
            joined, whole = np.concatenate(waiting), count // shard_tokens * shard_tokens
            yield from np.split(joined[:whole], whole // shard_tokens)
            waiting, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)


def document_hashes(paths: Iterable[Path]) -> Iterator[bytes]:
    """SHA-256 of each document's ids in one split's shards, read back in order."""
    rest = np.empty(0, "<u2")
    for path in paths:
        ids = np.concatenate([rest, np.fromfile(path, "<u2", offset=HEADER_BYTES)])
        starts = np.flatnonzero(ids == BOS).tolist()
        for lo, hi in zip(starts, starts[1:]):
            yield hashlib.sha256(ids[lo:hi].tobytes()).digest()
        rest = ids[starts[-1]:] if starts else ids
    if len(rest):
        yield hashlib.sha256(rest.tobytes()).digest()


def check_disjoint(train_paths: Iterable[Path], val_paths: Iterable[Path]):
    """Raise DataError if a validation document is in the training shards; ids, not texts, count."""
    held_out = set(document_hashes(val_paths))
    leaked = sum(digest in held_out for digest in document_hashes(train_paths))
    if leaked:
        raise DataError(f"{leaked} training documents equal validation documents; "
                        "please report this, with the command that you ran")


# ------------------------------------------------------------------------------------------------
# Manifest: what was written, and whether it is still there
# ------------------------------------------------------------------------------------------------
# Plain JSON: format, corpus, dataset, vocab_size; settings, source_sha256 and source for what was
# made here, source alone for what was fetched; tokenizer; train and val, each with totals and one
# entry a file.  No time and no machine in it: the same input gives the same manifest.

def retract_manifest(layout: Layout):
    """Remove the manifest before anything that it lists is touched."""
    if layout.manifest.exists():
        layout.manifest.unlink()
        sync_directory(layout.directory)


def write_manifest(layout: Layout, manifest: dict):
    """Write the manifest, after all that it lists has reached the disk."""
    for directory in (layout.directory, layout.tokenizer.parent):
        sync_directory(directory)
    staged = temporary(layout.manifest)
    write_synced(staged, [json.dumps(manifest, indent=1).encode() + b"\n"])
    os.replace(staged, layout.manifest)
    sync_directory(layout.directory)


def describe_split(entries: list[dict], **more) -> dict:
    """The manifest's part about a split: totals, then one entry a file."""
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    return dict(totals, **more, files=entries)


def describe_file(name: str, path: Path) -> dict:
    """The manifest's entry for a file that is no shard."""
    return dict(name=name, bytes=path.stat().st_size, sha256=digest_of(path))


def describe_dataset(layout: Layout, splits: dict, origin: dict) -> dict:
    """The whole manifest of files that lie, or will lie, where `layout` says."""
    return dict(format=MANIFEST_FORMAT, corpus=layout.corpus, dataset=layout.dataset,
                vocab_size=layout.vocab_size, **origin, **splits)


def read_manifest(layout: Layout) -> dict:
    """The manifest as it stands; raises DataError if there is none or it is no manifest."""
    try:
        manifest = json.loads(layout.manifest.read_bytes())
        if manifest["format"] != MANIFEST_FORMAT:
            raise DataError(f"{layout.manifest}: format {manifest['format']}, "
                            f"needed {MANIFEST_FORMAT}")
    except FileNotFoundError:
        raise DataError(f"{layout.manifest}: no such file") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{layout.manifest}: not a manifest") from None
    return manifest


def check_dataset(layout: Layout, manifest: dict):
    """Raise DataError unless the files are exactly those of the manifest, bytes and counts.

    Nothing is taken from the manifest: it is compared with what reading every file gives.  A
    shard too many is a fault like a missing one, because train_gpt.py would train on it.
    """
    try:
        parts = {split: manifest[split] for split in ("train", "val")}
        entries = [entry for part in parts.values() for entry in part["files"]]
        listed = {entry["name"]: entry for entry in entries}
        if len(listed) < len(entries) or not all(type(name) is str for name in listed):
            raise TypeError("a name twice, or none")
        if describe_file(layout.tokenizer.name, layout.tokenizer) != manifest["tokenizer"]:
            raise DataError(f"{layout.tokenizer}: not the file that the manifest describes")
    except (KeyError, TypeError):
        raise DataError(f"{layout.manifest}: not a manifest") from None
    except FileNotFoundError:
        raise DataError(f"{layout.tokenizer}: no such file") from None
    present = {path.name for path in layout.shards_present()}
    for name in sorted(present ^ set(listed)):
        fault = "not in the manifest" if name in present else "no such file"
        raise DataError(f"{layout.directory / name}: {fault}")
    for found in inspect_all(layout, sorted(listed)):
        if found != listed[found["name"]]:
            raise DataError(f"{layout.directory / found['name']}: not the file that the manifest "
                            "describes")
    for part in parts.values():
        if part != dict(part, **describe_split(part["files"])):
            raise DataError(f"{layout.manifest}: its totals are not those of its files")


def inspect_all(layout: Layout, names: list[str]) -> Iterator[dict]:
    """Inspect the named shards, several at a time: hashing leaves Python's lock to the others."""
    with ThreadPoolExecutor(WORKERS) as pool:
        paths = [layout.directory / name for name in names]
        found = pool.map(inspect_shard, paths, itertools.repeat(layout.vocab_size))
        yield from progress(found, "verify", "shard", len(names))


def progress(items: Iterable, label: str, unit: str, total: int | None = None) -> tqdm:
    """Iterate with a bar on a terminal, and without one elsewhere."""
    return tqdm(items, desc=label, unit=unit, total=total, disable=None, leave=False)


# ------------------------------------------------------------------------------------------------
# Tokenizer: SentencePiece byte-pair encoding with the challenge's settings
# ------------------------------------------------------------------------------------------------
# No dummy prefix: the first word of a document has no leading marker, which the byte rule of the
# score relies on.  The marker itself must be a piece, or a lone space would count as three bytes.

MARKER = "\u2581"
TOKENIZER_SETTINGS = dict(
    model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True,
    normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, hard_vocab_limit=False,
    pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, required_chars=MARKER,
    # Same text, same model: one thread, and no sampling or shuffling by SentencePiece, whose
    # generator is seeded from the machine.  The limit below is for whole documents as sentences.
    num_threads=1, input_sentence_size=0, shuffle_input_sentence=False,
    max_sentence_length=1 << 30, minloglevel=2)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train on the first `TOKENIZER_TEXT_CHARS` of the texts and return the serialized model.

    Without a hard limit SentencePiece stops where no pair of pieces is left to merge; the size it
    stopped at is therefore the largest that this text supports.
    Raises: DataError if the model would not have exactly `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=limited(texts, TOKENIZER_TEXT_CHARS), model_writer=model,
            vocab_size=vocab_size, **TOKENIZER_SETTINGS)
    except RuntimeError as error:
        raise tokenizer_error(str(error), vocab_size) from None
    size = load_tokenizer(model.getvalue()).get_piece_size()
    if size != vocab_size:
        raise DataError(f"vocab size {vocab_size} is too large for this text: the largest that "
                        f"works is {size}; set --vocab-size {size} or give more text")
    return model.getvalue()


def limited(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield texts until `limit` characters have gone by."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def tokenizer_error(message: str, vocab_size: int) -> DataError:
    """Translate SentencePiece's complaint into one that names the remedy."""
    small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if small:
        return DataError(f"vocab size {vocab_size} is too small for this text: its characters and "
                         f"the 256 bytes take {small[1]}; set --vocab-size {small[1]} or more")
    if "all_chars_count" in message:
        return DataError("the training documents hold no visible text; add files")
    return DataError(f"SentencePiece cannot train on this text: {' '.join(message.split())}")


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Make a processor from a serialized model."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def encode(tokenizer, texts: Iterable[str], seen: set[bytes]) -> Iterator[np.ndarray]:
    """Yield BOS + ids of each text whose ids are not in `seen`; adds to `seen` what it yields.

    Texts that differ may become equal ids (spaces, composed characters), so that only this test
    keeps a validation document out of the training shards.
    """
    texts = iter(texts)
    while batch := list(itertools.islice(texts, ENCODE_BATCH)):
        for ids in tokenizer.encode(batch, add_bos=True):
            ids = np.array(ids, "<u2")
            digest = hashlib.sha256(ids.tobytes()).digest()
            if len(ids) > 1 and digest not in seen:
                seen.add(digest)
                yield ids


# ------------------------------------------------------------------------------------------------
# Building: documents in, a dataset out
# ------------------------------------------------------------------------------------------------
# Documents are kept in the order of their SHA-256: a shuffle that needs no seed and that no file
# name, file system or Python version can change.  Validation is cut from the front of it.

@dataclass(frozen=True)
class Source:
    """Where documents come from: `digest` tells two sources apart without reading the documents."""
    digest: str
    about: dict                         # for the manifest: what a person would want to know
    read: Callable[[], Iterable[str]]   # the documents' texts; called only if a dataset is built


@dataclass(frozen=True)
class Settings:
    """What decides, together with the source, every byte of a dataset."""
    vocab_size: int = 1024
    val_frac: float = 0.06              # share of the text's bytes held out for scoring
    val_docs: int = 0                   # number of documents held out; 0: val_frac decides
    split_chars: int = 0                # cut documents at this many characters; 0: leave them whole
    shard_tokens: int = 100_000_000     # ids in a shard; the last one of a split has fewer


def unique_documents(texts: Iterable[str]) -> tuple[dict[bytes, str], int]:
    """The distinct texts by SHA-256, and how many were dropped for being empty or seen before."""
    documents, count = {}, 0
    for text in texts:
        count += 1
        if text.strip():
            documents[hashlib.sha256(text.encode()).digest()] = text
    return documents, count - len(documents)


def choose_validation(documents: dict[bytes, str], settings: Settings) -> list[bytes]:
    """Digests of the documents to hold out; they depend on the contents, not on names or order.

    Walks in the order of the digests, which is random but the same everywhere, and takes what
    fits into the share; if nothing fits, the smallest document.  Never takes all of them.
    """
    order = sorted(documents)
    if len(order) <= max(settings.val_docs, 1):
        raise DataError(f"{len(order)} distinct document{'s' * (len(order) != 1)}, needed "
                        f"{max(settings.val_docs, 1) + 1} or more (training and validation share "
                        "none); add files, or cut long ones: --split-chars 5000")
    if settings.val_docs:
        return order[:settings.val_docs]
    sizes = {digest: len(documents[digest].encode()) for digest in order}
    chosen, room = [], settings.val_frac * sum(sizes.values())
    for digest in order:
        if sizes[digest] <= room:
            chosen.append(digest)
            room -= sizes[digest]
    return chosen or [min(order, key=lambda digest: (sizes[digest], digest))]


def write_split(staging: Staging, split: str, documents: Iterable[np.ndarray], shard_tokens: int):
    """Stage one split's shards.

    Args: documents: arrays of ids, one a document, in the order in which they are written.
    Returns: the shards' temporary paths, and their manifest entries under their final names.
    """
    paths, entries = [], []
    for i, ids in enumerate(cut_into_shards(documents, shard_tokens)):
        final = staging.layout.shard(split, i)
        staging.add(final, [shard_header(len(ids)), ids.tobytes()])
        paths.append(staging.staged[final])
        entry = inspect_shard(paths[-1], staging.layout.vocab_size)
        entries.append(dict(entry, name=final.name))
    if not entries:
        raise DataError(f"no text is left for the {split} split once duplicates and documents "
                        "without visible text are dropped; add files")
    return paths, entries


def write_splits(staging: Staging, splits: dict[str, list[str]], settings: Settings) -> dict:
    """Stage the tokenizer and both splits; returns the manifest's part about them.

    The tokenizer learns from training documents alone.  Validation is encoded first, so that
    a document whose ids turn out equal is dropped from training.
    """
    tokenizer_path = staging.layout.tokenizer
    say(f"training a tokenizer of {settings.vocab_size} pieces")
    staging.add(tokenizer_path, [train_tokenizer(splits["train"], settings.vocab_size)])
    tokenizer = load_tokenizer(staging.staged[tokenizer_path].read_bytes())
    described = dict(tokenizer=describe_file(tokenizer_path.name, staging.staged[tokenizer_path]))
    seen, paths = set(), {}
    for split in ("val", "train"):
        texts = progress(splits[split], f"encode {split}", "document")
        documents = encode(tokenizer, texts, seen)
        paths[split], entries = write_split(staging, split, documents, settings.shard_tokens)
        text_bytes = sum(len(text.encode()) for text in splits[split])
        described[split] = describe_split(entries, text_bytes=text_bytes)
    check_disjoint(paths["train"], paths["val"])
    return described


def build(layout: Layout, source: Source, settings: Settings) -> dict:
    """Build a dataset from its source and return its manifest; on any error nothing has changed."""
    documents, dropped = unique_documents(source.read())
    held_out = choose_validation(documents, settings)
    chosen = set(held_out)
    splits = dict(
        val=[documents[digest] for digest in held_out],
        train=[documents[digest] for digest in sorted(documents) if digest not in chosen])
    with Staging(layout) as staging:
        described = write_splits(staging, splits, settings)
        encoded = described["train"]["documents"] + described["val"]["documents"]
        origin = dict(request(source, settings), source=source.about,
                      dropped_documents=dropped + len(documents) - encoded,
                      sentencepiece=sentencepiece.__version__)
        manifest = describe_dataset(layout, described, origin)
        staging.publish(manifest)
    return manifest


def request(source: Source, settings: Settings) -> dict:
    """The part of a manifest that must agree before a dataset counts as the one asked for."""
    return dict(settings=vars(settings).copy(), source_sha256=source.digest)


def check_request(layout: Layout, source: Source, settings: Settings) -> dict:
    """The manifest of the dataset asked for; raises DataError if it is not there and intact."""
    manifest = read_manifest(layout)
    for key, wanted in request(source, settings).items():
        if manifest.get(key) != wanted:
            raise DataError(f"{layout.manifest}: made from another source or with other settings")
    check_dataset(layout, manifest)
    return manifest


def prepare(layout: Layout, source: Source, settings: Settings) -> dict:
    """Build the dataset unless it is there and intact; returns its manifest.

    The first check takes no lock, so that an intact dataset may be on a read-only disk.
    """
    try:
        manifest = check_request(layout, source, settings)
        say(f"{layout.directory} is there and intact (SHA-256 checked); nothing to do")
        return manifest
    except DataError as error:
        reason = str(error)
    if layout.shards_present() or layout.manifest.exists():
        say(f"{reason}; rebuilding")
    with exclusive(layout):
        try:
            return check_request(layout, source, settings)      # another run may have built it
        except DataError:
            return build(layout, source, settings)


# ------------------------------------------------------------------------------------------------
# demo: English out of the running Python itself
# ------------------------------------------------------------------------------------------------
# Library sources are parsed, never imported: an import may print, open windows or need a terminal.

DEMO_BYTES = 1_500_000                  # with less than this, the packages in EXTRA are read too
MIN_DOCUMENT_CHARS = 200                # shorter ones are names and notes rather than prose
NOT_PROSE = {"site-packages", "dist-packages", "_bundled", "encodings", "pydoc_data"}
EXTRA = ("idlelib", "lib2to3", "turtledemo", "test", "tests")


def library_files(root: Path, extra: bool) -> list[Path]:
    """Python sources below the standard library's directory, in a fixed order."""
    kept = []
    for path in root.rglob("*.py"):
        parts = set(path.relative_to(root).parts)
        if not parts & NOT_PROSE and extra == bool(parts & set(EXTRA)):
            kept.append(path)
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def parse_source(source: bytes) -> ast.Module:
    """Syntax tree of a source file; an empty one where this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in old test files
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module(body=[], type_ignores=[])


def docstrings(source: bytes) -> str:
    """The docstrings of a module, its classes and its functions, joined by blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(parse_source(source)) if isinstance(node, documented)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def reference_topics(source: bytes) -> list[str]:
    """The language reference's topics: values of the one dictionary in pydoc_data/topics.py."""
    for node in parse_source(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return list(ast.literal_eval(node.value).values())
    return []


def is_prose(text: str) -> bool:
    """Say whether a document is long enough, and letters and spaces for the most part."""
    letters = sum(char.isalpha() or char.isspace() for char in text)
    return len(text) >= MIN_DOCUMENT_CHARS and letters > 0.7 * len(text)


def demo_documents(root: Path, topics: bytes) -> list[str]:
    """One document a reference topic, then one a module, until there is enough."""
    documents = list(filter(is_prose, reference_topics(topics)))
    for extra in (False, True):
        if sum(map(len, documents)) < DEMO_BYTES:
            paths = progress(library_files(root, extra), "read Python's library", "file")
            texts = (docstrings(path.read_bytes()) for path in paths)
            documents += filter(is_prose, texts)
    return documents


def demo_source(root: Path) -> Source:
    """The standard library in `root` as a source of documents."""
    topics_path = root / "pydoc_data" / "topics.py"
    topics = topics_path.read_bytes() if topics_path.exists() else b""
    state = hashlib.sha256(sys.version.encode() + topics)
    for path in library_files(root, extra=False):
        state.update(path.read_bytes())
    about = dict(what="docstrings and language reference of Python", python=sys.version)
    return Source(state.hexdigest(), about, lambda: demo_documents(root, topics))


def run_demo(args) -> str:
    """Prepare the demo corpus; returns the environment that its training command needs."""
    settings = Settings()
    layout = Layout(args.data_dir, "demo", f"demo_sp{settings.vocab_size}", settings.vocab_size)
    report(layout, prepare(layout, demo_source(Path(sysconfig.get_path("stdlib"))), settings))
    return "RECIPE=demo"


# ------------------------------------------------------------------------------------------------
# text: a person's own files
# ------------------------------------------------------------------------------------------------
# Every complaint about a file names the file, and the line where there are lines: the person has
# to find the place in an editor.  Texts are held in memory while a corpus is built.

CUT_MARKS = ("\n\n", "\n", " ")         # where --split-chars may cut, best first


def read_source_file(path: Path) -> bytes:
    """Bytes of a file that the person named; raises DataError if there are none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give text files or .jsonl files") from None
    if not data.strip():
        raise DataError(f"{path}: empty; leave it out or give a file with text")
    return data


def decode_text(data: bytes, place: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: byte 0x{data[error.start]:02x} at offset "
                        f"{error.start}; convert it (iconv -f ENCODING -t UTF-8)") from None


def decode_line(line: bytes, place: str) -> str:
    """The text of one JSON line."""
    try:
        text = json.loads(decode_text(line, place))["text"]
        text.encode()                           # JSON can spell half a character, UTF-8 cannot
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: bad JSON: {error.msg} at column {error.colno}") from None
    except (KeyError, TypeError, IndexError, AttributeError):
        raise DataError(f'{place}: needed an object with a string under "text", '
                        f"found {line.decode().strip()[:60]}") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: lone surrogate at character {error.start} of the text; "
                        "write it as UTF-8 or as a \\u pair") from None
    return text


def split_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters; joined, they are the text.

    Cuts after a blank line, else after a line, else after a space, in the second half of a piece;
    anywhere if there is none.
    """
    lo = 0
    while size and len(text) - lo > size:
        found = ((text.rfind(mark, lo + size // 2, lo + size), mark) for mark in CUT_MARKS)
        hi = next((at + len(mark) for at, mark in found if at >= 0), lo + size)
        yield text[lo:hi]
        lo = hi
    yield text[lo:]


def file_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each document of one file: the file, or its lines if it is .jsonl."""
    data = read_source_file(path)
    if path.suffix.lower() != ".jsonl":
        yield str(path), decode_text(data, str(path))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", decode_line(line, f"{path}:{number}")


def text_documents(paths: list[Path], split_chars: int) -> Iterator[str]:
    """The documents of all files, cut to `split_chars` characters unless that is 0.

    Raises: DataError at the first file or line that cannot be used.
    """
    for path in progress(paths, "read", "file"):
        for place, text in file_documents(path):
            if len(text) > MAX_DOCUMENT_CHARS and not split_chars:
                raise DataError(f"{place}: a document of {len(text):,} characters, at most "
                                f"{MAX_DOCUMENT_CHARS:,} fit; cut it: --split-chars 5000")
            yield from split_text(text, split_chars)


def text_source(paths: list[Path], settings: Settings) -> Source:
    """A person's files as a source; its digest depends on contents, not on names or order."""
    digests = []
    for path in paths:
        digest = hashlib.sha256(read_source_file(path)).hexdigest()
        digests.append(f"{path.suffix.lower() == '.jsonl'} {digest}")
    about = dict(what="files", files=[str(path) for path in paths])
    return Source(hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(), about,
                  lambda: text_documents(paths, settings.split_chars))


def run_text(args) -> str:
    """Prepare a person's own files; returns the environment that their training command needs."""
    settings = Settings(vocab_size=args.vocab_size, val_frac=args.val_frac, val_docs=args.val_docs,
                        split_chars=args.split_chars, shard_tokens=args.shard_tokens)
    dataset = f"{args.name}_sp{args.vocab_size}"
    layout = Layout(args.data_dir, args.name, dataset, args.vocab_size)
    report(layout, prepare(layout, text_source(args.files, settings), settings))
    return f"RECIPE=demo DATASET={dataset} VOCAB_SIZE={args.vocab_size}"


# ------------------------------------------------------------------------------------------------
# fineweb: the challenge's published shards and tokenizer, from the Hugging Face hub
# ------------------------------------------------------------------------------------------------
# One listing, pinned to a commit, says every file's size and digest; a file gets its name only
# when its bytes agree.  The hub's own hf_hub_download forgets a transfer that was cut off with its
# process, so the transfers here go to part files that the next run continues.

REPOSITORIES = {"sp8192": "kevclark/parameter-golf", "sp1024": "willdepueoai/parameter-golf"}
DEFAULT_TRAIN_SHARDS = 80               # what the challenge's own download takes
ATTEMPTS = 4                            # transfers of one file before giving up
RETRY_SECONDS = 1.0                     # pause before the second attempt; the next ones grow
SPARE_BYTES = 50_000_000                # to leave free on the disk


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub and its place here."""
    path: str                           # within the repository
    url: str
    target: Path
    size: int
    algorithm: str                      # sha256 for large files; git's sha1 for small ones
    digest: str

    @property
    def part(self) -> Path:
        """Where its bytes gather; the digest in the name keeps two revisions apart."""
        return self.target.with_name(f".{self.target.name}.{self.digest[:12]}.part")

    @property
    def part_bytes(self) -> int:
        """How much has been transferred so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    def fault(self, path: Path) -> str:
        """What is wrong with the bytes at `path`, or an empty string."""
        if not path.exists():
            return "no such file"
        if path.stat().st_size != self.size:
            return f"{path.stat().st_size:,} bytes, needed {self.size:,}"
        prefix = b"blob %d\0" % self.size if self.algorithm == "sha1" else b""
        found = digest_of(path, self.algorithm, prefix)
        return "" if found == self.digest else f"{self.algorithm} {found}, needed {self.digest}"


@dataclass(frozen=True)
class Transfer:
    """What the transfers of one run share: the progress bar and the signal to stop."""
    bar: tqdm
    stop: threading.Event

    def progress(self, num_bytes: int):
        """Count bytes that arrived; negative if they must come again."""
        with self.bar.get_lock():
            self.bar.update(num_bytes)


class PartFile:
    """The file object that the hub's client writes into: counts bytes, and stops when told to."""

    def __init__(self, file, transfer: Transfer):
        """Wrap a file that is open for appending."""
        self.file, self.transfer = file, transfer

    def write(self, piece: bytes):
        """Append what arrived."""
        if self.transfer.stop.is_set():
            raise DataError("stopped")
        self.file.write(piece)
        self.transfer.progress(len(piece))

    def tell(self) -> int:
        """Current position."""
        return self.file.tell()

    def seek(self, position: int):
        """Move; the client goes back when a server ignores where it was asked to resume."""
        self.transfer.progress(position - self.file.tell())
        self.file.seek(position)

    def truncate(self):
        """Drop what is behind the position."""
        self.file.truncate()


def load_hub():
    """Import the hub's client, silenced: its bars and warnings would run into ours."""
    try:
        import huggingface_hub
        import huggingface_hub.file_download
    except ImportError as error:
        raise DataError(f"{error}; install it: pip install -r requirements.txt") from None
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
    return huggingface_hub


def is_final(error: Exception) -> bool:
    """Say whether asking the hub again is of no use: it answered, and the answer was no."""
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return isinstance(error, ValueError) or 400 <= status < 500 and status not in (408, 429)


def summary(error: Exception) -> str:
    """An error in one line; the client's own explanations take paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"


def ask_hub(question: Callable, repository: str):
    """Answer of one call to the hub, asked again while the network fails.

    Every Exception counts as the network's, because the client passes those of its transport on.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(attempt * RETRY_SECONDS)
        try:
            return question()
        except Exception as error:
            fault = summary(error)
            if is_final(error):
                break
    raise DataError(f"cannot list {repository} on the hub: {fault}; check the network, HF_ENDPOINT "
                    "and MATCHED_FINEWEB_REPO_ID, or verify what is here with --offline")


def list_files(hub, repository: str, folder: str, revision: str) -> list:
    """Files directly in a folder of a dataset repository at a revision, sorted by path."""
    tree = ask_hub(lambda: list(hub.HfApi().list_repo_tree(
        repository, folder, revision=revision, repo_type="dataset")), repository)
    return sorted((f for f in tree if isinstance(f, hub.RepoFile)), key=lambda f: f.path)


def list_remote(layout: Layout, repository: str) -> tuple[str, list[RemoteFile]]:
    """The commit that the hub has, and every file of the dataset in it.

    Small files that the repository keeps in git itself have no SHA-256 in the listing; git's own
    digest, the SHA-1 of a short header and the bytes, stands in for it.
    """
    hub = load_hub()
    root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    revision = ask_hub(lambda: hub.HfApi().dataset_info(repository, timeout=30), repository).sha
    remotes = []
    shard_name = re.compile(rf"{layout.corpus}_(train|val)_\d{{6}}\.bin")
    for folder in (f"datasets/{layout.dataset}", "tokenizers"):
        for f in list_files(hub, repository, f"{root}/{folder}".strip("/"), revision):
            name = f.path.rpartition("/")[2]
            if name == layout.tokenizer.name or shard_name.fullmatch(name):
                url = hub.hf_hub_url(repository, f.path, repo_type="dataset", revision=revision)
                known = ("sha256", f.lfs.sha256) if f.lfs else ("sha1", f.blob_id)
                remotes.append(RemoteFile(f.path, url, layout.data_dir / folder / name, f.size,
                                          *known))
    return revision, remotes


def choose_remote(layout: Layout, remotes: list[RemoteFile], train_shards: int) -> list[RemoteFile]:
    """The files wanted: tokenizer, validation, the first training shards, and others that are here.

    Shards from an earlier, larger run stay in use, because train_gpt.py reads all that it finds.
    """
    kinds = {kind: [r for r in remotes if kind in r.target.name]
             for kind in ("_bpe.model", "_val_", "_train_")}
    for kind, needed in zip(kinds, (1, 1, train_shards)):
        if len(kinds[kind]) < needed:
            raise DataError(f"{layout.dataset}: the hub has {len(kinds[kind])} files *{kind}*, "
                            f"needed {needed}; set --train-shards or MATCHED_FINEWEB_REPO_ID")
    for path in sorted(set(layout.shards_present()) - {r.target for r in remotes}):
        raise DataError(f"{path}: not among the hub's files; move it away, or train_gpt.py would "
                        "read it too")
    train = kinds.pop("_train_")
    kept = [r for r in train[train_shards:] if r.target.exists()]
    return [*itertools.chain(*kinds.values()), *train[:train_shards], *kept]


def accept(layout: Layout, remote: RemoteFile, path: Path) -> dict:
    """The manifest's entry for a file whose bytes are the hub's; checks that they are of use."""
    if remote.target != layout.tokenizer:
        return dict(inspect_shard(path, layout.vocab_size), name=remote.target.name)
    try:
        tokenizer = load_tokenizer(path.read_bytes())
    except RuntimeError:
        raise DataError(f"{remote.path}: not a SentencePiece model; set another "
                        "MATCHED_FINEWEB_REPO_ID") from None
    found = (tokenizer.get_piece_size(), tokenizer.bos_id())
    if found != (layout.vocab_size, BOS):
        raise DataError(f"{remote.path}: a tokenizer with {found[0]} pieces and BOS {found[1]}, "
                        f"needed {layout.vocab_size} and {BOS}")
    return describe_file(remote.target.name, path)


def check_space(layout: Layout, missing: list[RemoteFile]):
    """Raise DataError if what is missing does not fit on the disk."""
    needed = sum(remote.size - remote.part_bytes for remote in missing) + SPARE_BYTES
    free = shutil.disk_usage(layout.directory).free
    if needed > free:
        raise DataError(f"{layout.directory}: {needed:,} bytes needed, {free:,} free on the disk; "
                        "free some, choose another --data-dir or set fewer --train-shards")


def download(hub, remote: RemoteFile, transfer: Transfer) -> str:
    """Transfer what is missing of the part file; returns what went wrong, or an empty string.

    The client itself resumes a broken connection a few times while bytes keep coming.
    Raises: DataError if the hub says that there is nothing to transfer.
    """
    if remote.part_bytes > remote.size:
        remote.part.unlink()
    try:
        with open(remote.part, "ab") as f:
            hub.file_download.http_get(
                remote.url, PartFile(f, transfer), resume_size=f.tell(),
                expected_size=remote.size, headers=hub.utils.build_hf_headers())
            f.flush()
            os.fsync(f.fileno())
    except Exception as error:                  # whatever the client's transport raises
        if is_final(error):
            raise DataError(f"{remote.path}: {summary(error)}") from None
        return summary(error)
    return ""


def fetch(layout: Layout, remote: RemoteFile, hub, transfer: Transfer) -> dict:
    """Fetch one file, check it, give it its name; returns its manifest entry.

    A part that is cut short is kept and continued, by the next attempt or by the next run; one
    that is complete but has another digest is thrown away.
    """
    for attempt in range(1, ATTEMPTS + 1):
        fault = download(hub, remote, transfer) or remote.fault(remote.part)
        if not fault:
            entry = accept(layout, remote, remote.part)
            os.replace(remote.part, remote.target)
            return entry
        if remote.part_bytes == remote.size:    # complete but wrong: nothing of it can be kept
            transfer.progress(-remote.size)
            remote.part.unlink()
        if transfer.stop.is_set():
            break
        tqdm.write(f"prepare_data: {remote.target.name}: {fault}; attempt {attempt} of {ATTEMPTS}")
        transfer.stop.wait(attempt * RETRY_SECONDS)
    raise DataError(f"{remote.path}: not fetched: {fault}; run the same command again, it goes on "
                    "where this one stopped")


def fetch_all(layout: Layout, missing: list[RemoteFile]) -> dict[Path, dict]:
    """Fetch files in parallel; the first that cannot be had stops the others."""
    hub, total = load_hub(), sum(remote.size for remote in missing)
    bar = tqdm(desc="fetch", total=total, initial=sum(remote.part_bytes for remote in missing),
               unit="B", unit_scale=True, disable=None, leave=False)
    transfer = Transfer(bar, threading.Event())
    with bar, ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(fetch, layout, r, hub, transfer): r.target for r in missing}
        try:
            return {futures[future]: future.result() for future in as_completed(futures)}
        finally:
            transfer.stop.set()                 # on an error or Ctrl-C: at their next piece
            pool.shutdown(wait=False, cancel_futures=True)


def examine(layout: Layout, remotes: list[RemoteFile]) -> dict[Path, dict]:
    """Manifest entries of those files that are here with the hub's very bytes."""
    def entry_of(remote: RemoteFile) -> dict | None:
        """Entry of one file, or None if it must be fetched."""
        return None if remote.fault(remote.target) else accept(layout, remote, remote.target)

    with ThreadPoolExecutor(WORKERS) as pool:
        found = progress(pool.map(entry_of, remotes), "verify", "file", len(remotes))
        return {r.target: entry for r, entry in zip(remotes, found) if entry}


def sweep_parts(layout: Layout, remotes: list[RemoteFile]):
    """Remove part files that none of these files can continue; other variants' parts stay."""
    found = {*layout.directory.glob(f".{layout.corpus}_*.part"),
             *layout.tokenizer.parent.glob(f".{layout.tokenizer.name}.*.part")}
    for path in found - {remote.part for remote in remotes}:
        path.unlink()


def describe_fineweb(layout: Layout, entries: dict[Path, dict], source: dict) -> dict:
    """The manifest of fetched files."""
    tokenizer = entries[layout.tokenizer]
    splits = {split: describe_split([entries[path] for path in sorted(entries)
                                     if f"_{split}_" in path.name]) for split in ("train", "val")}
    return describe_dataset(layout, dict(tokenizer=tokenizer, **splits), dict(source=source))


def fetch_fineweb(layout: Layout, repository: str, train_shards: int) -> dict:
    """Make the dataset equal to the hub's and return its manifest.

    The manifest is retracted only once the hub has answered and there is room on the disk: until
    then a run that cannot succeed leaves everything as it was.
    """
    revision, remotes = list_remote(layout, repository)
    with exclusive(layout):
        remotes = choose_remote(layout, remotes, train_shards)
        entries = examine(layout, remotes)
        missing = [remote for remote in remotes if remote.target not in entries]
        sweep_parts(layout, missing)
        if missing:
            check_space(layout, missing)
            retract_manifest(layout)
            for remote in missing:              # a damaged file must not be trained on meanwhile
                remote.target.unlink(missing_ok=True)
            say(f"fetching {len(missing)} file(s), {sum(r.size for r in missing):,} bytes, "
                f"from {repository} at {revision[:12]}")
            entries.update(fetch_all(layout, missing))
        source = dict(what="hub", repository=repository, revision=revision)
        return settle_manifest(layout, describe_fineweb(layout, entries, source))


def settle_manifest(layout: Layout, manifest: dict) -> dict:
    """Write the manifest unless it already says so; returns it."""
    try:
        if read_manifest(layout) == manifest:
            say(f"{layout.directory} is there and intact (checked against the hub); nothing to do")
            return manifest
    except DataError:
        pass                                    # none yet, or a damaged one: write it
    write_manifest(layout, manifest)
    return manifest


def verify_offline(layout: Layout, train_shards: int) -> dict:
    """Check every file against the manifest, without the network; returns the manifest."""
    try:
        manifest = read_manifest(layout)
        check_dataset(layout, manifest)
    except DataError as error:
        raise DataError(f"{error}; run the command without --offline: it fetches what is not "
                        "intact and keeps the rest") from None
    found = len(manifest["train"]["files"])
    if found < train_shards:
        raise DataError(f"{layout.directory}: {found} training shards, needed {train_shards}; run "
                        "the command without --offline, or set fewer --train-shards")
    say(f"{layout.directory} is intact (SHA-256 checked, offline)")
    return manifest


def run_fineweb(args) -> str:
    """Prepare the challenge's corpus; returns the environment that its training command needs."""
    vocab_size = int(args.variant.removeprefix("sp"))
    layout = Layout(args.data_dir, "fineweb", f"fineweb10B_{args.variant}", vocab_size)
    if args.offline:
        manifest = verify_offline(layout, args.train_shards or 1)
    else:
        repository = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPOSITORIES[args.variant]
        manifest = fetch_fineweb(layout, repository, args.train_shards or DEFAULT_TRAIN_SHARDS)
    report(layout, manifest)
    return "" if vocab_size == 8192 else f"DATASET={layout.dataset} VOCAB_SIZE={vocab_size}"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------
# Each `run_*` above returns the environment variables that its training command needs.

class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message):
        """Leave with exit code 2; argparse would print the usage in front."""
        self.exit(2, f"prepare_data: {message}; see --help\n")


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    """Make an argparse type: whole numbers in [lowest, highest]."""
    def parse(text: str) -> int:
        """Read one number."""
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"{text!r}, needed a whole number from {lowest} to {highest}")
        return value
    return parse


def share(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}, needed a number between 0 and 1, like 0.05")
    return value


def corpus_name(text: str) -> str:
    """An argparse type: a to z only, as train_gpt.py expects; no corpus with its own subcommand."""
    if not re.fullmatch("[a-z]+", text) or text in RESERVED_NAMES:
        raise argparse.ArgumentTypeError(
            f"{text!r}, needed letters a to z only, and not {' or '.join(RESERVED_NAMES)}")
    return text


def add_text_arguments(parser: Parser):
    """The arguments of `text`."""
    default, large = Settings(), 2**31 - 1
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text, one "
                        "document a file; or .jsonl, one object with a \"text\" key a line")
    parser.add_argument("--name", type=corpus_name, default="text",
                        help="name of the corpus, letters a to z only (default: text)")
    parser.add_argument("--vocab-size", type=integer(260, 65_535), default=default.vocab_size,
                        metavar="N", help="pieces in the tokenizer (default: 1024)")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--val-frac", type=share, default=default.val_frac, metavar="SHARE",
                          help="share of the text's bytes to hold out for scoring, in whole "
                          f"documents (default: {default.val_frac})")
    held_out.add_argument("--val-docs", type=integer(1, large), default=0, metavar="N",
                          help="number of documents to hold out instead")
    parser.add_argument("--split-chars", type=integer(100, MAX_DOCUMENT_CHARS), default=0,
                        metavar="N", help="cut texts into documents of at most N characters, at "
                        "blank lines where there are any (default: leave them whole)")
    parser.add_argument("--shard-tokens", type=integer(1000, large), default=default.shard_tokens,
                        metavar="N", help=f"ids in a shard (default: {default.shard_tokens:,})")


def add_fineweb_arguments(parser: Parser):
    """The arguments of `fineweb`."""
    parser.add_argument("--variant", choices=sorted(REPOSITORIES, reverse=True), default="sp8192",
                        help="tokenizer of the shards (default: sp8192)")
    parser.add_argument("--train-shards", type=integer(1, 10_000), metavar="N", help="training "
                        f"shards of 200 MB to have at least (default: {DEFAULT_TRAIN_SHARDS})")
    parser.add_argument("--offline", action="store_true",
                        help="fetch nothing: check what is here against its manifest")


COMMANDS = (
    ("demo", run_demo, lambda parser: None,
     "a small corpus of English documentation out of the running Python; no network"),
    ("text", run_text, add_text_arguments, "a corpus and a tokenizer from your own files"),
    ("fineweb", run_fineweb, add_fineweb_arguments,
     "the challenge's published shards and tokenizer, from the Hugging Face hub; a cut-off run "
     "goes on where it stopped"))


def make_parser() -> Parser:
    """The whole command line."""
    overview, _, details = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="prepare_data", description=overview, epilog=details, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|text|fineweb")
    for name, run, add_arguments, about in COMMANDS:
        command = commands.add_parser(name, help=about, description=f"Prepare {about}.")
        command.add_argument("--data-dir", type=Path, metavar="DIR",
                             default=Path(os.environ.get("DATA_DIR") or "data"),
                             help="where datasets and tokenizers are (default: DATA_DIR, or data)")
        command.set_defaults(run=run)
        add_arguments(command)
    return parser


def report(layout: Layout, manifest: dict):
    """Print what the dataset holds."""
    for split in ("train", "val"):
        part = manifest[split]
        say(f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes']:,} bytes in {len(part['files'])} shard(s)")
    say(f"shards in {layout.directory}, tokenizer {layout.tokenizer}")


def next_command(environment: str, data_dir: Path) -> str:
    """The command that trains on what was prepared."""
    elsewhere = [] if data_dir == Path("data") else [f"DATA_DIR={shlex.quote(str(data_dir))}"]
    return " ".join([*elsewhere, *environment.split(), "python train_gpt.py"])


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    try:
        environment = args.run(args)
    except DataError as error:
        line = "".join(c if c.isprintable() else " " for c in str(error))   # names may hold any
        print(f"prepare_data: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data: {error.filename or args.data_dir}: {error.strerror}; give a "
              "--data-dir that can be written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: stopped; run the same command again", file=sys.stderr)
        return 130
    say(f"next: {next_command(environment, args.data_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
