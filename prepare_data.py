#!/usr/bin/env python3
"""Make or fetch what train_gpt.py reads: shards of token ids and the tokenizer that made them.

    python prepare_data.py demo                          2 MB of English from Python's own library
    python prepare_data.py text notes/*.txt --name notes           your files, one document a file
    python prepare_data.py fineweb --shards 10           the challenge's published shards (network)
    python prepare_data.py check                         compare every dataset with its manifest

A dataset lies under --data-dir (default: DATA_DIR, else `data`):

    datasets/demo_sp1024/demo_train_000000.bin ...   training documents, 100,000,000 ids a shard
    datasets/demo_sp1024/demo_val_000000.bin         documents held out for scoring
    datasets/demo_sp1024/manifest.json               SHA-256, size and counts of every file
    tokenizers/demo_1024_bpe.model                   SentencePiece byte-pair encoding

A shard is 256 little-endian int32 (magic, version, number of ids, zeros), then uint16 ids.  A
document is BOS and its ids, with nothing after them; it may continue in its split's next shard.

Files are written in a hidden folder and moved into place when all of them are complete; the
manifest is removed first and written last.  A killed run therefore leaves the old dataset, the new
one, or files without a manifest.
"""
import console  # first: from here on Ctrl-C ends in one line
from console import Failure

import argparse
import ast
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 4 * 256
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPLITS = ("train", "val")
MANIFEST_FORMAT = 1                     # raise it when equal sources and settings give other ids
TOKENIZER_TEXT_CHARS = 200_000_000      # the tokenizer learns from this much training text at most
MAX_DOCUMENT_CHARS = 32_000_000         # encoding takes about 40 bytes of memory a character
MIN_SPLIT_TOKENS = 257                  # one window of the demo recipe, SEQ_LEN=256, and its target
ENCODE_BATCH = 256                      # documents encoded at a time


def say(text: str):
    """Print one line of progress."""
    print(f"prepare_data: {text}", flush=True)


def progress(items: Iterable, label: str, unit: str) -> tqdm:
    """Iterate with a progress bar on a terminal, and without one elsewhere."""
    return tqdm(items, desc=label, unit=unit, disable=None, leave=False)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Paths of one dataset; train_gpt.py derives the same ones from DATA_DIR and DATASET."""
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

    def shards_present(self, split: str = "*") -> list[Path]:
        """Every file that train_gpt.py would read as a shard, sorted by name."""
        return sorted(path for known in SPLITS if split in (known, "*")
                      for path in self.directory.glob(f"{self.corpus}_{known}_*.bin"))


def layout_of(data_dir: Path, dataset: str) -> Layout:
    """The layout of a dataset by its name, like demo_sp1024; raises Failure for any other name."""
    parts = re.fullmatch(r"([a-z]+)\w*_sp(\d{1,5})", dataset)
    if not parts:
        raise Failure(f"{dataset!r} is not the name of a dataset, like demo_sp1024")
    return Layout(data_dir, parts[1], dataset, int(parts[2]))


@contextmanager
def exclusive(layout: Layout):
    """Hold the dataset's lock, which dies with its process, so that two runs do not write it."""
    for directory in (layout.directory, layout.tokenizer.parent):
        directory.mkdir(parents=True, exist_ok=True)
    lock = layout.directory / ".lock"
    for path in (lock, layout.manifest, layout.tokenizer, *layout.shards_present()):
        if path.is_dir() or path == lock and path.exists() and not path.is_file():
            raise Failure(f"{path}: not a regular file; move it away")
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another prepare_data that writes {layout.directory}")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def publish(staged: Layout, layout: Layout, manifest: dict):
    """Replace a dataset by the files at `staged`: remove the manifest first, write it last."""
    layout.manifest.unlink(missing_ok=True)
    for path in layout.shards_present():
        path.unlink()
    for path in staged.shards_present():
        os.replace(path, layout.directory / path.name)
    console.write_atomic(layout.tokenizer, [staged.tokenizer.read_bytes()])
    write_manifest(layout, manifest)


# ------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------
# The format is the challenge's (parameter-golf, data/download_hf_docs_and_tokenize.py).

def shard_header(num_tokens: int) -> bytes:
    """The 1,024 bytes in front of the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def inspect_shard(path: Path, vocab_size: int) -> dict:
    """The manifest's entry for a shard; raises Failure if its header, size or an id is wrong."""
    data = console.read_file(path)
    magic, version, num_tokens = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise Failure(f"{path}: not a token shard: magic and version are {magic} and {version}, "
                      f"needed {MAGIC} and {VERSION}")
    if num_tokens < 1 or len(data) != HEADER_BYTES + 2 * num_tokens:
        raise Failure(f"{path}: {len(data):,} bytes, but the {num_tokens:,} ids of its header take "
                      f"{HEADER_BYTES + 2 * num_tokens:,}")
    ids = np.frombuffer(data, "<u2", offset=HEADER_BYTES)
    if ids.max() >= vocab_size:
        raise Failure(f"{path}: token id {ids.max()}, but the vocabulary ends at {vocab_size - 1}")
    return dict(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(),
                tokens=num_tokens, documents=int(np.count_nonzero(ids == BOS)))


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


def read_documents(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Ids of each document, BOS included, in one split's shards."""
    rest = np.empty(0, "<u2")
    for path in paths:
        ids = np.concatenate([rest, np.fromfile(path, "<u2", offset=HEADER_BYTES)])
        starts = np.flatnonzero(ids == BOS).tolist()
        for lo, hi in zip(starts, starts[1:]):
            yield ids[lo:hi]
        rest = ids[starts[-1]:] if starts else ids
    if len(rest):
        yield rest


def check_disjoint(layout: Layout):
    """Raise Failure if a validation document, compared by its ids, is in the training shards."""
    val, train = (read_documents(layout.shards_present(split)) for split in ("val", "train"))
    held_out = {hashlib.sha256(ids.tobytes()).digest() for ids in val}
    leaked = sum(hashlib.sha256(ids.tobytes()).digest() in held_out for ids in train)
    if leaked:
        raise Failure(f"{leaked} training documents equal validation documents; "
                      "please report this, with the command that you ran")


# ------------------------------------------------------------------------------------------------
# Manifest
# ------------------------------------------------------------------------------------------------
# Plain JSON: format, corpus, dataset, vocab_size; settings and source; tokenizer; train and val,
# each with totals and one entry a file.  It names no time and no machine, so that the same input
# gives the same manifest.

def inspect_file(layout: Layout, path: Path) -> dict:
    """The manifest's entry for a shard or the tokenizer; raises Failure if it cannot be used."""
    if path != layout.tokenizer:
        return inspect_shard(path, layout.vocab_size)
    data = console.read_file(path)
    try:
        tokenizer = load_tokenizer(data)
    except RuntimeError:
        raise Failure(f"{path}: not a SentencePiece model") from None
    found = (tokenizer.get_piece_size(), tokenizer.bos_id())
    if found != (layout.vocab_size, BOS):
        raise Failure(f"{path}: a tokenizer with {found[0]} pieces and BOS {found[1]}, needed "
                      f"{layout.vocab_size} and {BOS}")
    return dict(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def describe_split(entries: list[dict]) -> dict:
    """The manifest's part about a split: totals, then one entry a file."""
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "bytes")}
    return dict(totals, files=entries)


def describe(layout: Layout, origin: dict) -> dict:
    """The manifest of the files that are there, and of their origin (settings, source).

    Raises: Failure if a file is missing, damaged, or not of the dataset's vocabulary.
    """
    parts = dict(tokenizer=inspect_file(layout, layout.tokenizer))
    for split in SPLITS:
        paths = progress(layout.shards_present(split), f"verify {split}", "shard")
        parts[split] = describe_split([inspect_file(layout, path) for path in paths])
        if not parts[split]["files"]:
            raise Failure(f"{layout.directory}: no {split} shards")
    return dict(format=MANIFEST_FORMAT, corpus=layout.corpus, dataset=layout.dataset,
                vocab_size=layout.vocab_size, **origin, **parts)


def write_manifest(layout: Layout, manifest: dict):
    """Write the manifest, after everything that it lists."""
    console.write_atomic(layout.manifest, [json.dumps(manifest, indent=1).encode(), b"\n"])


def listed_files(manifest: dict) -> list[dict]:
    """Entries of all files in a manifest: the tokenizer, training shards, validation shards."""
    shards = [entry for split in SPLITS for entry in manifest[split]["files"]]
    return [manifest["tokenizer"], *shards]


def read_manifest(layout: Layout) -> dict:
    """The manifest; raises Failure if there is none, or for values of other types."""
    manifest = console.load_json(console.read_file(layout.manifest), layout.manifest)
    with suppress(AttributeError, KeyError, TypeError):
        names = [entry["name"] for entry in listed_files(manifest)]
        texts = [*names, *manifest.get("source", {}).get("files", [])]
        settings = manifest.get("settings", {}).keys()      # of check --write, fineweb, the others
        if (manifest["format"] == MANIFEST_FORMAT and len(set(names)) == len(names)
                and all(isinstance(text, str) for text in texts)
                and settings in (set(), {"repository"}, set(asdict(Settings())))):
            return manifest
    raise Failure(f"{layout.manifest}: not a manifest of format {MANIFEST_FORMAT}")


def differences(layout: Layout, manifest: dict) -> list[str]:
    """One line for each file that is missing, too many, or not as the manifest says."""
    tokenizer, *shards = listed_files(manifest)
    listed = {layout.tokenizer: tokenizer, **{layout.directory / s["name"]: s for s in shards}}
    present = layout.shards_present()
    lines = [f"{path}: not in the manifest" for path in present if path not in listed]
    for path, entry in progress(listed.items(), "verify", "file"):
        try:
            found = inspect_file(layout, path)
        except Failure as e:
            lines.append(str(e))
            continue
        wrong = [key for key in found if found[key] != entry.get(key)]
        if wrong:
            lines.append(f"{path}: differs from the manifest in {', '.join(wrong)}")
    return lines or [
        f"{layout.manifest}: the totals of {split} are not those of its files" for split in SPLITS
        if manifest[split] != {**manifest[split], **describe_split(manifest[split]["files"])}]


def outdated(layout: Layout, wanted: dict, num_shards: int) -> str:
    """Why an intact dataset with the `wanted` values in its manifest is not there; else ""."""
    try:
        manifest = read_manifest(layout)
    except Failure as e:
        return str(e)
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return f"{layout.manifest}: made from another source or with other settings"
    if len(manifest["train"]["files"]) < num_shards:
        return f"{layout.manifest}: fewer than {num_shards} training shards"
    return next(iter(differences(layout, manifest)), "")


def prepare(layout: Layout, wanted: dict, make: Callable[[], dict], num_shards: int = 1) -> dict:
    """Return the manifest of the dataset asked for; `make` it unless it is there and intact.

    The first check takes no lock, so that an intact dataset may be on a read-only disk.
    """
    if outdated(layout, wanted, num_shards):
        with exclusive(layout):
            if reason := outdated(layout, wanted, num_shards):      # another run may have made it
                if layout.shards_present() or layout.manifest.exists():
                    say(f"{reason}; making it anew")
                return make()
    say(f"{layout.directory} is there and intact (SHA-256 checked); nothing to do")
    return read_manifest(layout)


# ------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------
# SentencePiece byte-pair encoding with the challenge's settings.  There is no dummy prefix: the
# first word of a document has no leading marker, which the byte count of the score relies on.  The
# marker itself must be a piece, or a lone space would count as three bytes.

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

    Without a hard limit SentencePiece stops when no pair of pieces is left to merge; the size it
    stopped at is therefore the largest that this text supports.
    Raises: Failure if the model would not have exactly `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=limited(texts, TOKENIZER_TEXT_CHARS), model_writer=model,
            vocab_size=vocab_size, **TOKENIZER_SETTINGS)
    except RuntimeError as e:
        if small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e)):
            reason = (f"vocab size {vocab_size} is too small for this text: its characters and the "
                      f"256 bytes take {small[1]}; set --vocab-size {small[1]} or more")
        elif "all_chars_count" in str(e):
            reason = "the training documents hold no visible text; add files"
        else:
            reason = f"SentencePiece cannot train on this text: {e}"
        raise Failure(reason) from None
    size = load_tokenizer(model.getvalue()).get_piece_size()
    if size != vocab_size:
        raise Failure(f"vocab size {vocab_size} is too large for this text: the largest that "
                      f"works is {size}; set --vocab-size {size} or give more text")
    return model.getvalue()


def limited(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield texts until `limit` characters have gone by."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


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
# Building
# ------------------------------------------------------------------------------------------------
# Documents are sorted by their SHA-256: a shuffle that needs no seed and does not depend on file
# names, file system or Python version.  Validation documents come from the front of that order.

@dataclass(frozen=True)
class Source:
    """Where documents come from."""
    digest: str                         # of all that the documents depend on
    about: dict                         # for the manifest: what a person would want to know
    documents: Iterator[str]            # their texts; nothing is read unless a dataset is built


@dataclass(frozen=True)
class Settings:
    """The options of `text`: together with the source they decide every byte of a dataset."""
    vocab_size: int = 1024
    val_frac: float = 0.06              # share of the text's bytes held out for scoring
    val_docs: int = 0                   # number of documents held out; 0: val_frac decides
    split_chars: int = 0                # cut documents at this many characters; 0: leave them whole
    shard_tokens: int = 100_000_000     # ids in a shard; the last one of a split has fewer


def unique_documents(texts: Iterable[str]) -> dict[bytes, str]:
    """The distinct texts that are not blank, by their SHA-256."""
    return {hashlib.sha256(text.encode()).digest(): text for text in texts if text.strip()}


def choose_validation(documents: dict[bytes, str], settings: Settings) -> list[bytes]:
    """Digests of the documents to hold out; they depend on the contents, not on names or order.

    Goes through the digests in order, which is random but the same everywhere, and takes each
    document that still fits into the share; if none fits, the smallest one.  Never takes all.
    """
    order = sorted(documents)
    needed = max(settings.val_docs, 1) + 1
    if len(order) < needed:
        raise Failure(f"distinct documents: {len(order)}, needed {needed}; add files, or cut long "
                      "ones: --split-chars 5000")
    if settings.val_docs:
        return order[:settings.val_docs]
    sizes = {digest: len(documents[digest].encode()) for digest in order}
    chosen, room = [], settings.val_frac * sum(sizes.values())
    for digest in order:
        if sizes[digest] <= room:
            chosen.append(digest)
            room -= sizes[digest]
    return chosen or [min(order, key=lambda digest: (sizes[digest], digest))]


def write_files(staged: Layout, texts: dict[str, list[str]], shard_tokens: int):
    """Write the tokenizer and the shards of both splits at `staged`.

    The tokenizer learns from training documents alone.  Validation is encoded first, so that
    a document whose ids turn out equal is dropped from training.
    """
    say(f"training a tokenizer of {staged.vocab_size} pieces")
    model = train_tokenizer(texts["train"], staged.vocab_size)
    console.write_atomic(staged.tokenizer, [model])
    tokenizer, seen = load_tokenizer(model), set()
    for split in ("val", "train"):
        documents = encode(tokenizer, progress(texts[split], f"encode {split}", "document"), seen)
        num_tokens = 0
        for i, ids in enumerate(cut_into_shards(documents, shard_tokens)):
            console.write_atomic(staged.shard(split, i), [shard_header(len(ids)), ids.tobytes()])
            num_tokens += len(ids)
        if num_tokens < MIN_SPLIT_TOKENS:
            raise Failure(f"the {split} split would have {num_tokens} tokens, needed "
                          f"{MIN_SPLIT_TOKENS} (one window of the demo recipe); add text, cut long "
                          "documents (--split-chars 5000) or hold out another share (--val-frac)")
    check_disjoint(staged)
    report_compressors(tokenizer, staged.shards_present("val"))


def report_compressors(tokenizer, paths: list[Path]):
    """Print what general compressors need for the validation text, to compare scores with."""
    ids = [document.tolist() for document in read_documents(paths)]
    text = "".join(tokenizer.decode(ids)).encode()
    window = min(max(len(text), 4096), 1 << 26)     # xz -9e reserves memory for 64 MiB of text
    xz9e = dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=window)
    packed = gzip.compress(text, 9), lzma.compress(text, filters=[xz9e])
    gz, xz = (8 * len(data) / len(text) for data in packed)
    say(f"validation text: {len(text):,} bytes; gzip -9 {gz:.2f}, xz -9e {xz:.2f} bits per byte")


def build(layout: Layout, source: Source, settings: Settings, wanted: dict) -> dict:
    """Build a dataset and return its manifest; on any failure nothing has changed."""
    documents = unique_documents(source.documents)
    held_out = choose_validation(documents, settings)
    order = dict(val=held_out, train=sorted(documents.keys() - set(held_out)))
    texts = {split: [documents[digest] for digest in order[split]] for split in order}
    staging = layout.directory / ".new"
    shutil.rmtree(staging, ignore_errors=True)          # left by a killed run
    staged = replace(layout, data_dir=staging)
    try:
        write_files(staged, texts, settings.shard_tokens)
        made_with = dict(source=source.about, sentencepiece=sentencepiece.__version__)
        manifest = describe(staged, wanted | made_with)
        for split in SPLITS:
            manifest[split]["text_bytes"] = sum(len(text.encode()) for text in texts[split])
        publish(staged, layout, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def prepare_documents(layout: Layout, source: Source, settings: Settings) -> dict:
    """Build the dataset unless it is there and intact; returns its manifest."""
    wanted = dict(settings=asdict(settings), source_sha256=source.digest)
    return prepare(layout, wanted, lambda: build(layout, source, settings, wanted))


# ------------------------------------------------------------------------------------------------
# demo: English out of the running Python itself
# ------------------------------------------------------------------------------------------------
# Library sources are parsed, never imported: an import may print, open windows or need a terminal.

MIN_DOCUMENT_CHARS = 200                # shorter ones are names and notes rather than prose
SKIPPED = {"site-packages", "dist-packages", "_bundled", "encodings", "pydoc_data", "idlelib",
           "lib2to3", "turtledemo", "test", "tests"}


def library_files(root: Path) -> list[Path]:
    """Python sources below the standard library's directory, in a fixed order."""
    kept = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def docstrings(source: bytes) -> str:
    """The docstrings of a module, its classes and its functions, joined by blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def reference_topics(source: bytes) -> list[str]:
    """The language reference's topics: values of the one dictionary in pydoc_data/topics.py."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return list(ast.literal_eval(node.value).values())
    return []


def demo_documents(root: Path, topics: bytes) -> Iterator[str]:
    """One document a reference topic, then one a module, if letters and spaces prevail in it."""
    paths = progress(library_files(root), "read Python's library", "file")
    modules = (docstrings(path.read_bytes()) for path in paths)
    for text in itertools.chain(reference_topics(topics), modules):
        letters = sum(char.isalpha() or char.isspace() for char in text)
        if len(text) >= MIN_DOCUMENT_CHARS and letters > 0.7 * len(text):
            yield text


def demo_source(root: Path) -> Source:
    """The standard library in `root` as a source of documents."""
    topics = (root / "pydoc_data" / "topics.py").read_bytes()
    state = hashlib.sha256(sys.version.encode() + topics)
    for path in library_files(root):
        state.update(path.read_bytes())
    about = dict(what="docstrings and language reference of Python", python=sys.version)
    return Source(state.hexdigest(), about, demo_documents(root, topics))


def run_demo(args) -> int:
    """Prepare the demo corpus."""
    layout = layout_of(args.data_dir, "demo_sp1024")
    source = demo_source(Path(sysconfig.get_path("stdlib")))
    return announce(layout, prepare_documents(layout, source, Settings()))


# ------------------------------------------------------------------------------------------------
# text: a person's own files
# ------------------------------------------------------------------------------------------------
# Every message about a file names the file, and the line where there are lines: the person has
# to find the place in an editor.  Texts are held in memory while a corpus is built.

CUT_MARKS = ("\n\n", "\n", " ")         # where --split-chars may cut, best first


def decode_text(data: bytes, place: object) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = e.start + len(data) - len(e.object)        # the object is without the mark
        raise Failure(f"{place}: not UTF-8: byte 0x{data[at]:02x} at offset {at}; "
                      "convert it (iconv -f ENCODING -t UTF-8)") from None


def decode_line(line: bytes, place: str) -> str:
    """The text of one JSON line."""
    value = console.load_json(decode_text(line, place), place)
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise Failure(f'{place}: needed an object with a string under "text", found '
                      f"{line.decode().strip()[:60]}")
    try:
        text.encode()                           # JSON can spell half a character, UTF-8 cannot
    except UnicodeEncodeError as e:
        raise Failure(f"{place}: lone surrogate at character {e.start} of the text; write it as "
                      "UTF-8 or as a \\u pair") from None
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


def file_documents(path: Path, split_chars: int) -> Iterator[str]:
    """The documents of one file, or of its lines if it is .jsonl, cut to `split_chars` unless 0."""
    data = console.read_file(path)
    if path.suffix.lower() == ".jsonl":
        lines = ((f"{path}:{i}", line) for i, line in enumerate(data.split(b"\n"), 1))
        texts = ((place, decode_line(line, place)) for place, line in lines if line.strip())
    else:
        texts = [(path, decode_text(data, path))]
    for place, text in texts:
        if len(text) > MAX_DOCUMENT_CHARS and not split_chars:
            raise Failure(f"{place}: a document of {len(text):,} characters, at most "
                          f"{MAX_DOCUMENT_CHARS:,} fit; cut it: --split-chars 5000")
        yield from split_text(text, split_chars)


def text_source(paths: list[Path], settings: Settings) -> Source:
    """A person's files as a source; its digest depends on contents, not on names or order."""
    digests = []
    for path in paths:
        data = console.read_file(path)
        if not data.strip():
            raise Failure(f"{path}: empty; leave it out or give a file with text")
        digests.append(f"{path.suffix.lower() == '.jsonl'} {hashlib.sha256(data).hexdigest()}")
    return Source(hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(),
                  dict(what="files", files=[str(path) for path in paths]),
                  (text for path in paths for text in file_documents(path, settings.split_chars)))


def run_text(args) -> int:
    """Prepare a person's own files."""
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    layout = layout_of(args.data_dir, f"{args.name}_sp{args.vocab_size}")
    source = text_source(args.files, settings)
    return announce(layout, prepare_documents(layout, source, settings))


# ------------------------------------------------------------------------------------------------
# fineweb: the challenge's published shards and tokenizer, from the Hugging Face hub
# ------------------------------------------------------------------------------------------------
# The hub's client downloads into a folder of its own below the dataset's, where it keeps complete
# files after a kill and compares files that it finds there with the hub's SHA-256.  So the shards
# that are already here are moved there first, and everything is moved back at the end.

REPOSITORIES = {"sp8192": "kevclark/parameter-golf", "sp1024": "willdepueoai/parameter-golf"}
DEFAULT_SHARDS = 80                     # what the challenge's own download takes


def ask_hub(repository: str, folder: Path, patterns: list[str], **options):
    """Call the hub's snapshot_download for a dataset repository; raises Failure for any error."""
    import huggingface_hub                      # demo and text do without the network
    huggingface_hub.logging.set_verbosity_error()
    try:
        return huggingface_hub.snapshot_download(
            repository, repo_type="dataset", local_dir=folder, allow_patterns=patterns, **options)
    except Exception as e:                      # the client passes on those of its transport
        reason = repr(e.__cause__ or e)[:300]
        raise Failure(f"{repository} on the hub: {reason}; check the network, HF_ENDPOINT and "
                      "MATCHED_FINEWEB_REPO_ID, then run the same command again: it keeps complete "
                      "files") from None


def check_plan(layout: Layout, plan: list, shards: int):
    """Raise Failure unless the hub, by a dry run's plan, has all shards and the disk has room."""
    sizes = {Path(f.filename).name: f.will_download * (f.file_size or 0) for f in plan}
    for part, needed in (layout.tokenizer.name, 1), ("_val_", 1), ("_train_", shards):
        found = sum(part in name for name in sizes)
        if found < needed:
            raise Failure(f"{layout.dataset}: the hub has {found} of {needed} files *{part}*; set "
                          "fewer --shards or another MATCHED_FINEWEB_REPO_ID")
    for path in layout.shards_present():
        if path.name not in sizes:
            raise Failure(f"{path}: not among the hub's files, but train_gpt.py would read it; "
                          "move it away")
        del sizes[path.name]                    # needs no more room
    free = shutil.disk_usage(layout.directory).free
    if sum(sizes.values()) > free:
        raise Failure(f"{layout.directory}: {sum(sizes.values()):,} bytes needed, {free:,} free on "
                      "the disk; free some, choose another --data-dir or set fewer --shards")


def fetch(layout: Layout, repository: str, shards: int) -> dict:
    """Make the dataset equal to the hub's and return its manifest.

    Shards of an earlier, larger run are kept and checked too.  Nothing is touched before the hub
    has answered; a run that ends later continues with the files that are still missing.
    """
    folder = layout.directory / ".hub"
    root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    staged = replace(layout, data_dir=folder / root)
    shutil.rmtree(folder / ".cache", ignore_errors=True)    # makes the client hash what is there
    here = [staged.directory / path.name for path in layout.shards_present()]
    paths = {staged.tokenizer, staged.directory / f"{layout.corpus}_val_*.bin",
             *(staged.shard("train", i) for i in range(shards)), *here, *staged.shards_present()}
    patterns = sorted(path.relative_to(folder).as_posix() for path in paths)
    plan = ask_hub(repository, folder, patterns, dry_run=True)
    check_plan(layout, plan, shards)
    revision = plan[0].commit_hash
    say(f"fetching or checking {len(plan)} files from {repository} at {revision[:12]}")
    layout.manifest.unlink(missing_ok=True)
    staged.directory.mkdir(parents=True, exist_ok=True)
    for path in layout.shards_present():
        os.replace(path, staged.directory / path.name)
    ask_hub(repository, folder, patterns, revision=revision)
    origin = dict(settings=dict(repository=repository), source=dict(what="hub", revision=revision))
    manifest = describe(staged, origin)
    publish(staged, layout, manifest)
    shutil.rmtree(folder)
    return manifest


def run_fineweb(args) -> int:
    """Prepare the challenge's corpus."""
    repository = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPOSITORIES[args.variant]
    layout = layout_of(args.data_dir, f"fineweb10B_{args.variant}")
    wanted = dict(settings=dict(repository=repository))
    return announce(layout, prepare(
        layout, wanted, lambda: fetch(layout, repository, args.shards), args.shards))


# ------------------------------------------------------------------------------------------------
# check: files against their manifests
# ------------------------------------------------------------------------------------------------

def making_command(layout: Layout, manifest: dict) -> str:
    """The command that makes a dataset again; an empty text if its manifest does not say."""
    settings, source, words = manifest.get("settings", {}), manifest.get("source", {}), []
    if "repository" in settings:
        words = ["fineweb", f"--variant=sp{layout.vocab_size}",
                 f"--shards={len(manifest['train']['files'])}"]
    elif settings and layout.corpus == "demo":
        words = ["demo"]
    elif settings and "files" in source:
        words = ["text", *source["files"], f"--name={layout.corpus}"]
        words += [f"--{name.replace('_', '-')}={settings[name]}"
                  for name, default in asdict(Settings()).items() if settings[name] != default]
    if words and layout.data_dir != Path("data"):
        words.append(f"--data-dir={layout.data_dir}")
    command = shlex.join(["python", "prepare_data.py", *words]) if words else ""
    return command if len(command) < 400 else command[:300] + " ... (all in manifest.json)"


def check(layout: Layout, write: bool) -> list[str]:
    """One line for each fault of a dataset, with its remedy; may `write` a missing manifest."""
    if write and not layout.manifest.exists():
        with exclusive(layout):
            origin = dict(source=dict(what="files found by check --write"))
            write_manifest(layout, describe(layout, origin))
        say(f"{layout.manifest}: written")
    if not layout.manifest.exists():
        words = ["check", "--write", layout.dataset, f"--data-dir={layout.data_dir}"]
        return [f"{layout.directory}: no manifest to compare with; make the dataset again, or let "
                f"python prepare_data.py {shlex.join(words)} write one from the files as they are"]
    try:
        manifest = read_manifest(layout)
    except Failure as e:
        return [f"{e}; make the dataset again with the command that made it"]
    command = making_command(layout, manifest)
    remedy = f"run {command}" if command else "copy the file again from its origin"
    return [f"{line}; {remedy}" for line in differences(layout, manifest)]


def run_check(args) -> int:
    """Check datasets; returns 0 if all are as their manifests say, else 2."""
    folders, code = args.data_dir / "datasets", 0
    datasets = args.datasets or sorted({path.parent.name for path in folders.glob("*/*.bin")})
    if not datasets:
        raise Failure(f"{folders}: no datasets; give another --data-dir")
    for layout in [layout_of(args.data_dir, dataset) for dataset in datasets]:
        lines = check(layout, args.write)
        for line in lines:
            code = 2
            print(f"prepare_data: {console.one_line(line)}", file=sys.stderr)
        if not lines:
            say(f"{layout.directory} is as its manifest says (SHA-256 checked)")
    return code


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def number(kind: type, lowest: float, highest: float) -> Callable[[str], float]:
    """Make an argparse type: numbers of a kind, int or float, in [lowest, highest]."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:      # holds for NaN too
            raise argparse.ArgumentTypeError(f"{text!r}, needed {lowest} to {highest}")
        return value
    return parse


def corpus_name(text: str) -> str:
    """An argparse type: a to z only, as train_gpt.py expects; no corpus with its own subcommand."""
    if not re.fullmatch("[a-z]+", text) or text in ("demo", "fineweb"):
        raise argparse.ArgumentTypeError(
            f"{text!r}, needed letters a to z only, and not demo or fineweb")
    return text


def make_parser() -> console.Parser:
    """The whole command line."""
    overview, _, details = (__doc__ or "").partition("\n\n")
    parser = console.Parser(prog="prepare_data", description=overview, epilog=details)
    commands = parser.add_subparsers(required=True, metavar="demo|text|fineweb|check")
    shared = console.Parser(add_help=False)
    shared.add_argument("--data-dir", type=Path, metavar="DIR",
                        default=Path(os.environ.get("DATA_DIR") or "data"),
                        help="where datasets and tokenizers are (default: DATA_DIR, or data)")
    added = {}
    for name, run, about in (
            ("demo", run_demo, "make a corpus of English from the running Python's own library"),
            ("text", run_text, "make a corpus and a tokenizer from your own files"),
            ("fineweb", run_fineweb, "fetch the challenge's shards from the Hugging Face hub"),
            ("check", run_check, "compare datasets with their manifests")):
        added[name] = commands.add_parser(name, parents=[shared], help=about, description=about)
        added[name].set_defaults(run=run)
    add_text_arguments(added["text"].add_argument)
    add = added["fineweb"].add_argument
    add("--variant", choices=sorted(REPOSITORIES, reverse=True), default="sp8192",
        help="tokenizer of the shards (default: sp8192)")
    add("--shards", type=number(int, 1, 10_000), default=DEFAULT_SHARDS, metavar="N",
        help=f"training shards of 200 MB to have at least (default: {DEFAULT_SHARDS})")
    add = added["check"].add_argument
    add("datasets", nargs="*", metavar="DATASET", help="like demo_sp1024 (default: all)")
    add("--write", action="store_true", help="write the manifest of a dataset that has none")
    return parser


def add_text_arguments(add: Callable):
    """The arguments of `text`, by the parser's add_argument."""
    large = 2**31 - 1
    add("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text, one document a file; or "
        "a .jsonl file, one object with a \"text\" key a line")
    add("--name", type=corpus_name, default="text",
        help="name of the corpus, letters a to z only (default: text)")
    for name, kind, metavar, about in (
            ("--vocab-size", number(int, 260, 65_535), "N", "pieces in the tokenizer"),
            ("--val-frac", number(float, 0.001, 0.999), "SHARE",
             "share of the text's bytes to hold out for scoring, in whole documents"),
            ("--val-docs", number(int, 0, large), "N",
             "number of documents to hold out; 0: --val-frac decides"),
            ("--split-chars", number(int, 0, MAX_DOCUMENT_CHARS), "N",
             "cut texts into documents of at most N characters, best at blank lines; 0: do not"),
            ("--shard-tokens", number(int, 1000, large), "N", "ids in a shard")):
        default = vars(Settings())[name[2:].replace("-", "_")]
        add(name, type=kind, default=default, metavar=metavar, help=f"{about} (default: {default})")


def announce(layout: Layout, manifest: dict) -> int:
    """Print the size of a dataset and the commands that come next; returns exit code 0."""
    for split in SPLITS:
        part = manifest[split]
        say(f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{part['bytes']:,} bytes in {len(part['files'])} shard(s)")
    say(f"shards in {layout.directory}, tokenizer {layout.tokenizer}")
    recipe, words = ("golf", []) if layout.corpus == "fineweb" else ("demo", ["RECIPE=demo"])
    home = f"DATA_DIR={shlex.quote(str(layout.data_dir))} " * (layout.data_dir != Path("data"))
    if layout.dataset not in ("demo_sp1024", "fineweb10B_sp8192"):      # the recipes' own
        words += [f"DATASET={layout.dataset}", f"VOCAB_SIZE={layout.vocab_size}"]
    say(f"next: {home}{' '.join([*words, 'python train_gpt.py'])}")
    say(f"then: {home}python use_artifact.py sample runs/{recipe}_seed1337/model.golf")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    def work() -> int:
        args = make_parser().parse_args(argv)
        return args.run(args)
    return console.run("prepare_data", work)


if __name__ == "__main__":
    sys.exit(main())
