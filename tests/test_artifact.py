"""train_gpt.py, Artifact: containers written and read back, damaged, hostile, and half written.

Run alone: python -m pytest -q tests/test_artifact.py
"""
import errno
import hashlib
import itertools
import json
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from conftest import memory_below
from train_gpt import MAGIC, ArtifactError, pack_tensors, read_container, write_atomic

DTYPES = tuple(train_gpt.DTYPES.values())
SHAPES = ((), (1,), (7,), (5, 3), (1, 1, 1), (2, 3, 4, 5))
META = dict(model=dict(a=1, b="ü", c=0.1), steps=2 ** 53 + 1, none=None, nested=[[], {}, [True]])
WRITTEN = (torch.int8, torch.float16, torch.float32, torch.int64)      # dtypes that a run writes
BOUND = 24 << 20        # bytes of memory that reading a small file may take, however hostile


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def random_bits(dtype: torch.dtype, shape: tuple) -> torch.Tensor:
    """A tensor of every bit pattern: NaNs, infinities and negative zeros included."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    raw = torch.randint(256, (int(np.prod(shape)) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple:
    """What makes two tensors the same: dtype, shape and every bit."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(
        torch.uint8).tolist()


def same(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors have the same names and bits."""
    return a.keys() == b.keys() and all(bits(a[n]) == bits(b[n]) for n in a)


def a_model() -> dict[str, torch.Tensor]:
    """Tensors of every dtype that a run writes, 101 bytes in all."""
    return {"q": random_bits(torch.int8, (5, 7)), "q.scale": random_bits(torch.float16, (5,)),
            "w": random_bits(torch.float32, (3, 4)), "step": torch.tensor(7)}


def write(path: Path, data: bytes) -> Path:
    """`path`, holding `data`."""
    path.write_bytes(data)
    return path


def pack(tensors=None, meta=None, kind="artifact", compress=True) -> bytes:
    """The bytes of a container."""
    return b"".join(pack_tensors(kind, META if meta is None else meta,
                                 a_model() if tensors is None else tensors, compress))


def split(data: bytes) -> tuple[dict, bytes]:
    """(header, payload) of a container, taken apart by its layout and not by the program."""
    size = int.from_bytes(data[8:12], "little")
    assert data[:8] == MAGIC and hashlib.sha256(data[44:44 + size]).digest() == data[12:44]
    return json.loads(brotli.decompress(data[44:44 + size])), data[44 + size:]


def forge(header, payload: bytes, **lies) -> bytes:
    """A container whose checksums are right, whatever its header says."""
    if isinstance(header, dict):
        header = {**header, "sha256": hashlib.sha256(payload).hexdigest(), **lies}
    text = brotli.compress(json.dumps(header).encode(), quality=5)
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), hashlib.sha256(text).digest(), text,
                     payload])


class Held(NamedTuple):
    """A file that is held in memory: thousands of them cost the disk nothing."""
    data: bytes

    def is_fifo(self) -> bool:
        """It is like a file."""
        return False

    def read_bytes(self) -> bytes:
        """What is in it."""
        return self.data

    def __str__(self) -> str:
        """Its path."""
        return "some/model.golf"


def read(data: bytes, kind: str = "artifact") -> dict[str, torch.Tensor]:
    """The tensors of a container."""
    return read_container(Held(data), kind)[1]


def refuse(data: bytes, kind: str = "artifact") -> str:
    """The message with which `data` is refused; it names the file."""
    with pytest.raises(ArtifactError) as caught:
        read(data, kind)
    assert str(caught.value).startswith("some/model.golf: ")
    return str(caught.value)


# ------------------------------------------------------------------------------------------------
# Write and read
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, compress):
    """Every dtype and odd shape comes back with the same bits, and so do the meta data."""
    tensors = {f"{d}/{s} ü\"\n": random_bits(d, s) for d in DTYPES for s in SHAPES}
    tensors[""] = random_bits(torch.int8, (4,))
    path = tmp_path / "new" / "folder" / "model.golf"
    write_atomic(path, pack_tensors("artifact", META, tensors, compress))
    meta, found = read_container(path, "artifact")
    assert meta == META and same(found, tensors)
    for tensor in found.values():
        tensor.fill_(1)                                     # memory of its own, and writable


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
@pytest.mark.parametrize("dtype", WRITTEN)
def test_empty_tensors_come_back(compress, dtype, shape):
    """A tensor without elements, as the skips of a one-layer model, is read as it was written."""
    tensors = dict(a=torch.ones(3), b=torch.zeros(shape, dtype=dtype), c=torch.ones(2))
    assert same(read(pack(tensors, compress=compress)), tensors)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(0, dtype=torch.int8)},
                                     {"a": torch.tensor(2.0)}])
def test_next_to_nothing(compress, tensors):
    """A container of no tensors, or of no bytes, or of one number, is one too."""
    meta, found = read_container(Held(pack(tensors, {}, compress=compress)), "artifact")
    assert meta == {} and same(found, tensors)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
def test_segments_are_put_together(monkeypatch, compress, size):
    """Whatever is left for the last segment, and whatever tensor it cuts in two."""
    monkeypatch.setattr(train_gpt, "SEGMENT_BYTES", 64)
    tensors = {"a": random_bits(torch.int8, (size,)), "b": random_bits(torch.int64, (3,))}
    data = pack(tensors, compress=compress)
    assert len(split(data)[0]["segments"]) == -(-(size + 24) // 64)
    assert same(read(data), tensors)


def test_layout_of_strides_does_not_matter():
    """Transposed, sliced and gradient-tracking tensors are stored as the plain ones they equal."""
    base = torch.randn(6, 8)
    odd = dict(a=base.T, b=base[::2, 1::3], c=base.clone().requires_grad_(),
               d=base[:1].expand(4, 8))
    plain = {n: torch.tensor(t.tolist()) for n, t in odd.items()}
    assert pack(odd) == pack(plain)


def test_same_input_same_bytes(monkeypatch):
    """Neither the order of names nor the number of cores makes a difference."""
    monkeypatch.setattr(train_gpt, "SEGMENT_BYTES", 64)
    tensors = a_model()
    data = pack(tensors)
    for order in itertools.permutations(tensors):
        assert pack({n: tensors[n] for n in order}, dict(reversed(META.items()))) == data
    for cores in (1, 3, 64):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert pack(tensors) == data


def test_other_input_other_bytes():
    """A bit of a tensor, a name, a shape, a dtype, the kind or the meta data change the file."""
    base = torch.arange(6, dtype=torch.int8)
    files = {pack(dict(a=base)), pack(dict(b=base)), pack(dict(a=base.view(2, 3))),
             pack(dict(a=base.view(torch.uint8))), pack(dict(a=base), {}),
             pack(dict(a=base), kind="checkpoint"), pack(dict(a=base), compress=False)}
    for i, bit in itertools.product(range(6), range(8)):
        changed = base.view(torch.uint8).clone()
        changed[i] ^= 1 << bit
        files.add(pack(dict(a=changed.view(torch.int8))))
    assert len(files) == 7 + 6 * 8


def test_the_layout_by_hand():
    """Halves of 16-bit tensors lie low ones first; tensors lie in order of dtype, then name."""
    scale = torch.tensor([1.0, -2.5, 65504.0]).half()
    header, payload = split(pack(dict(b=torch.tensor([1, -1], dtype=torch.int8), c=scale, a=scale)))
    low = bytes(v & 255 for v in scale.view(torch.int16).tolist())
    high = bytes(v >> 8 & 255 for v in scale.view(torch.int16).tolist())
    assert brotli.decompress(payload) == 2 * (low + high) + b"\x01\xff"
    assert header["tensors"] == [["a", "float16", [3]], ["c", "float16", [3]], ["b", "int8", [2]]]
    assert header["kind"] == "artifact" and header["meta"] == META


def test_uncompressed_payload_is_the_tensors():
    """A checkpoint holds plain little-endian numbers, one tensor after the other."""
    w, n = torch.randn(3), torch.tensor([5, -5])
    _, payload = split(pack(dict(w=w, n=n), kind="checkpoint", compress=False))
    assert payload == w.numpy().astype("<f4").tobytes() + n.numpy().astype("<i8").tobytes()


def test_regular_tensors_are_compressed():
    """Compression is real: zeros take next to nothing."""
    assert len(pack(dict(a=torch.zeros(100_000)))) < 1000 < 400_000 < len(
        pack(dict(a=torch.zeros(100_000)), compress=False))


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", [True, False])
def test_every_flipped_bit_is_seen(compress):
    """Whichever bit of a file is flipped, and if all bits of a byte are: it is refused."""
    data = pack(compress=compress)
    for i, flip in itertools.product(range(len(data)), (1, 2, 4, 8, 16, 32, 64, 128, 255)):
        refuse(data[:i] + bytes([data[i] ^ flip]) + data[i + 1:])


@pytest.mark.parametrize("compress", [True, False])
def test_every_truncation_is_seen(compress):
    """A file that ends early, at any byte, is refused; so is one whose first bytes are missing."""
    data = pack(compress=compress)
    for n in range(len(data)):
        refuse(data[:n])
        refuse(data[n + 1:])


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("more", [b"\0", b"\n", b"x" * 1000, MAGIC])
def test_appended_bytes_are_seen(compress, more):
    """Nothing may follow the payload, not even where there is none."""
    refuse(pack(compress=compress) + more)
    refuse(pack({}, compress=compress) + more)
    refuse(pack(compress=compress) * 2)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, MAGIC, MAGIC + b"\xff" * 4,
                                  MAGIC + b"\0" * 36, b"not a model\n" * 9])
def test_other_files_are_refused(data):
    """Files of other programs, and beginnings of ours, are no containers."""
    assert "damaged or no artifact" in refuse(data)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    """A file of torch.save is no container, and nothing in it is executed."""
    class Trap:
        """Leaves a file behind when it is unpickled."""

        def __reduce__(self):
            """What unpickling calls."""
            return Path.touch, (tmp_path / "trapped",)
    torch.save(dict(a=Trap()), tmp_path / "x")
    refuse((tmp_path / "x").read_bytes())
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["nowhere/x", ".", "pipe"])
def test_missing_files_are_told(tmp_path, name):
    """A file that cannot be read is named, and which stage writes it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="cannot be read .*run its stage first"):
        read_container(tmp_path / name, "artifact")


@pytest.mark.parametrize("kind, other", [("artifact", "checkpoint"), ("checkpoint", "artifact")])
def test_the_other_kind_is_refused(kind, other):
    """A checkpoint is no artifact nor the other way round, and the message says what it is."""
    assert f"it is a {other}" in refuse(pack(kind=other), kind)


MUTATIONS = (
    lambda rng, d, i, j: d[:i] + bytes([rng.integers(256)]) + d[i + 1:],
    lambda rng, d, i, j: d[:i] + rng.bytes(j - i) + d[j:],
    lambda rng, d, i, j: d[:i] + bytes(j - i) + d[j:],
    lambda rng, d, i, j: d[:i] + d[j:],
    lambda rng, d, i, j: d[:j] + d[i:j] + d[j:],
    lambda rng, d, i, j: d[:i] + rng.bytes(7) + d[i:],
    lambda rng, d, i, j: d[:i] + d[i:j][::-1] + d[j:],
    lambda rng, d, i, j: d[:j], lambda rng, d, i, j: d[j:] + d[:j])


@pytest.fixture
def real_files(make_cfg, make_run) -> dict[str, bytes]:
    """The artifact and the checkpoint of a very small model, as the program writes them."""
    cfg = small(make_cfg)
    run = make_run(cfg)
    batches = SimpleNamespace(state=dict(digest="00", steps=3))
    trainer = train_gpt.Trainer(run, batches, 0.0, 10)
    run.flat.data.copy_(torch.randn(len(run.flat.data)))
    trainer.optimizer.step(1.0, 0.9)
    trainer.save(1.0)
    hessians = {n: torch.eye(s[1]) for n, s in run.flat.shapes.items() if len(s) == 2}
    tensors, _ = train_gpt.quantize_model(run, run.flat.data, hessians, 12.85)
    meta = dict(model=cfg.group("model"), steps=1, train_seconds=1.0, data_seconds=1.0)
    return dict(artifact=pack(tensors, meta),
                checkpoint=(cfg.run_dir / "checkpoint.golf").read_bytes())


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_a_thousand_mutations(real_files, kind):
    """Damage of any kind to a real file is refused, unless the file is the same as before."""
    data, rng, refused = real_files[kind], np.random.default_rng(0), 0
    assert read(data, kind)
    for n in range(1200):
        reach = (len(data), 600)[n % 2]                     # half of them in or near the header
        i, j = sorted(map(int, rng.integers(reach + 1, size=2)))
        mutated = MUTATIONS[n % len(MUTATIONS)](rng, data, min(i, len(data) - 1), j)
        if mutated != data:
            refuse(mutated, kind)
            refused += 1
    assert refused > 1000


# ------------------------------------------------------------------------------------------------
# Hostile files: right checksums, wrong contents
# ------------------------------------------------------------------------------------------------

def test_forging_works():
    """A forged container without a lie is read: what the lies below are refused for is the lie."""
    tensors = a_model()
    for compress in (True, False):
        data = forge(*split(pack(tensors, compress=compress)))
        assert same(read(data), tensors)


ODD = (None, True, -1, 0, 1, 2 ** 31, 2 ** 63, 10 ** 30, 1e300, 0.5, float("nan"), float("inf"),
       "", "x", "float32", [], [[]], {}, dict(a=1))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("field", ["kind", "segments", "sha256", "tensors"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_fields_of_any_type_are_refused(compress, field, value):
    """A header whose field has another type or no sense is refused, in little memory."""
    header, payload = split(pack(compress=compress))
    with memory_below(BOUND):
        refuse(forge(header, payload, **{field: value}))


@pytest.mark.parametrize("field", ["kind", "meta", "compress", "tensors", "bytes", "segments",
                                   "sha256"])
def test_missing_fields_are_refused(field):
    """A header without one of its fields is refused."""
    header, payload = split(pack())
    header = {**header, "sha256": hashlib.sha256(payload).hexdigest()}
    del header[field]
    text = brotli.compress(json.dumps(header).encode())
    refuse(b"".join([MAGIC, len(text).to_bytes(4, "little"),
                                     hashlib.sha256(text).digest(), text, payload]))


@pytest.mark.parametrize("header", [*ODD, "[" * 100_000], ids=lambda v: repr(v)[:12])
def test_headers_of_any_type_are_refused(header):
    """JSON that is no header is refused."""
    refuse(forge(header, b""))


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b"", b"{", b"\xff\xfe{}",
                                  b"9" * 100_000, b'{"kind":"artifact","bytes":1e999999}'],
                         ids=lambda v: repr(v)[:12])
def test_headers_that_are_no_json_are_refused(text):
    """Text that no JSON parser can read, or only in endless recursion, is refused."""
    packed = brotli.compress(text)
    refuse(b"".join([MAGIC, len(packed).to_bytes(4, "little"),
                                     hashlib.sha256(packed).digest(), packed]))


def test_segments_that_do_not_add_up_are_refused(monkeypatch):
    """Segments shorter, longer, fewer or more than the payload holds."""
    monkeypatch.setattr(train_gpt, "SEGMENT_BYTES", 64)
    for compress in (True, False):
        header, payload = split(pack(compress=compress))
        sizes = header["segments"]
        for lie in ([], sizes[:-1], sizes + [1], [sizes[0] - 1, *sizes[1:]], [2 ** 70],
                    [str(s) for s in sizes], [None], [[s] for s in sizes], sizes * 2):
            refuse(forge(header, payload, segments=lie))


def test_segments_cut_elsewhere_are_refused(monkeypatch):
    """Compressed segments whose lengths add up, but not one by one."""
    monkeypatch.setattr(train_gpt, "SEGMENT_BYTES", 64)
    header, payload = split(pack())
    a, b, *rest = header["segments"]
    for lie in ([a + 1, b - 1, *rest], [a - 1, b + 1, *rest], [a + b, *rest], [b, a, *rest],
                [a, b, *rest, 0], [0, a, b, *rest]):
        if lie != header["segments"]:
            refuse(forge(header, payload, segments=lie))


LISTINGS = [
    ("q", "int8", [5, 8]), ("q", "int8", [5, 6]), ("q", "int8", [-5, -7]), ("q", "int8", [-1, 7]),
    ("q", "int8", [-35]), ("q", "int8", [2 ** 62]), ("q", "int8", [2 ** 64]),
    ("q", "int8", [10 ** 30, 0]), ("q", "int8", [10 ** 4000]), ("q", "int8", [5.0, 7.0]),
    ("q", "int8", ["5", 7]), ("q", "int8", [[5], 7]), ("q", "int8", [None]), ("q", "int8", 35),
    ("q", "int8", "35"), ("q", "int8", None), ("q", "int8", {}), ("q", "int16", [5, 7]),
    ("q", "nn", [5, 7]), ("q", "Tensor", [5, 7]), ("q", "no_such_type", [5, 7]), ("q", "", [5, 7]),
    ("q", "load", [5, 7]), ("q", "float", [5, 7]), ("q", "__name__", [5, 7]), ("q", 8, [5, 7]),
    ("q", None, [5, 7]), ("q", ["int8"], [5, 7]), (["q"], "int8", [5, 7]), ({}, "int8", [5, 7]),
    ("q", "int8"), ("q", "int8", [5, 7], 1), (), "abc", 5, None,
    ("q", "int8", [1] * 300_000), ("q", "int8", [2 ** 31] * 64)]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("lie", LISTINGS, ids=lambda v: repr(v)[:40])
def test_listings_that_lie_are_refused(compress, lie):
    """A name, dtype or shape that is none, or does not fit the payload, in little memory."""
    header, payload = split(pack(compress=compress))
    honest = header["tensors"]
    at = next(i for i, (name, *_) in enumerate(honest) if name == "q")
    with memory_below(BOUND):
        refuse(forge(header, payload,
                                     tensors=[*honest[:at], lie, *honest[at + 1:]]))


def test_listings_with_more_or_fewer_tensors_are_refused():
    """The tensors must take every byte of the payload and not one more."""
    for compress in (True, False):
        header, payload = split(pack(compress=compress))
        honest = header["tensors"]
        for lie in (honest[1:], honest[:-1], [], [*honest, ["more", "int8", [1]]], honest * 2):
            refuse(forge(header, payload, tensors=lie))


@pytest.mark.parametrize("size", [-1, 0, 1, -2 ** 70])
def test_a_total_that_is_too_small_is_refused(size):
    """Compressed data may not inflate to more than the header says."""
    header, payload = split(pack())
    refuse(forge(header, payload, bytes=size))


def test_a_header_that_is_a_bomb_is_refused():
    """A header of a few bytes that inflates to 500 MB is refused in little memory."""
    text = brotli.compress(b" " * (500 << 20), quality=1)
    assert len(text) < 100_000
    data = b"".join([MAGIC, len(text).to_bytes(4, "little"), hashlib.sha256(text).digest(), text])
    with memory_below(BOUND):
        refuse(data)


def test_a_segment_that_is_a_bomb_is_refused():
    """A segment may inflate to its own size and not to a hundred times that."""
    bomb = brotli.compress(bytes(500 << 20), quality=1)
    header, _ = split(pack())
    for size in (2 ** 20, 500 << 20, 10 ** 15):
        with memory_below(BOUND):
            refuse(forge(header, bomb, segments=[len(bomb)], bytes=size))


def test_many_segments_that_are_bombs_are_refused():
    """Segments of 14 bytes that inflate to 4 MiB each are refused before memory is full."""
    bomb, (header, _) = brotli.compress(bytes(train_gpt.SEGMENT_BYTES)), split(pack())
    with memory_below(BOUND):
        refuse(forge(header, bomb * 32, segments=[len(bomb)] * 32, bytes=10 ** 15))


def test_segments_that_go_back_are_refused():
    """Negative segments cannot have a payload read over and over."""
    data = pack(dict(a=torch.zeros(1 << 20, dtype=torch.int8)), compress=False)
    header, payload = split(data)
    n = len(payload)
    with memory_below(BOUND):
        refuse(forge(header, payload, segments=[n, -n] * 64 + [n]))


@pytest.mark.parametrize("compress", [True, False])
def test_a_total_that_is_too_large_is_refused(compress):
    """The header says how many bytes the tensors take, and a wrong number is refused."""
    header, payload = split(pack(compress=compress))
    refuse(forge(header, payload, bytes=header["bytes"] + 1))


@pytest.mark.parametrize("lie", [
    (None, "int8", [5, 7]), (5, "int8", [5, 7]), ("w", "int8", [5, 7]), ("q", "quint8", [5, 7]),
    ("q", "bits8", [5, 7]), ("q", "quint4x2", [5, 7]), ("q", "int8", [5, 7, True])], ids=repr)
def test_names_and_dtypes_that_no_run_writes_are_refused(lie):
    """A name that is no text or is there twice, a dtype that cannot be computed with."""
    header, payload = split(pack())
    refuse(forge(header, payload, tensors=[lie if name == "q" else [name, *rest] for name, *rest
                                           in header["tensors"]]))


def twist(rng, value):
    """A copy of a JSON value with one part of it, somewhere, changed, lost or repeated."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return ODD[rng.integers(len(ODD))]
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(
        rng.integers(len(value)))
    value = value.copy()
    if rng.random() < 0.1:
        del value[key]
    elif isinstance(value, list) and rng.random() < 0.2:
        value.insert(key, value[rng.integers(len(value))])
    else:
        value[key] = twist(rng, value[key])
    return value


@pytest.mark.parametrize("compress", [True, False])
def test_a_thousand_lies(monkeypatch, compress):
    """A header or payload with anything changed is refused, or read as tensors: never a crash."""
    monkeypatch.setattr(train_gpt, "SEGMENT_BYTES", 64)
    rng, outcomes = np.random.default_rng(1), {True: 0, False: 0}
    honest, payload = split(pack(compress=compress))
    with memory_below(BOUND):
        for n in range(1500):
            header, body, i = honest, payload, int(rng.integers(len(payload)))
            if n % 3:
                header = twist(rng, honest)
            else:
                body = payload[:i] + rng.bytes(3) + payload[i + 3:]
            try:
                found = read(forge(header, body))
                assert all(isinstance(t, torch.Tensor) for t in found.values())
                outcomes[True] += 1
            except ArtifactError:
                outcomes[False] += 1
    assert outcomes[True] > 20 and outcomes[False] > 500


# ------------------------------------------------------------------------------------------------
# The right model
# ------------------------------------------------------------------------------------------------

OTHER = dict(
    vocab_size=352, num_layers=4, model_dim=128, num_heads=2, num_kv_heads=4, mlp_mult=3.0,
    rope_dims=4, rope_base=100.0, qk_gain_init=1.0, xsa_last_n=1, logit_softcap=20.0,
    tied_embed_init_std=0.01, num_loops=2, loop_start=0, loop_end=2, parallel_residual_start=0,
    skip_gates_enabled=False, seq_len=64, bigram_buckets=8, bigram_dim=16, smear_enabled=True,
    smear_across_documents=True, value_embed_dim=8, value_embed_last_n=1)


def test_every_setting_of_the_model_has_another_value(cfg):
    """The values tried below are those of all settings of the model, and each is another one."""
    ours = cfg.group("model")
    assert ours.keys() == OTHER.keys() and all(ours[n] != OTHER[n] for n in ours)


def test_names_of_tensors_are_quoted():
    """What a file calls a tensor of its own is told without what it would do to a terminal."""
    parts = pack_tensors("artifact", META, {"a\n\x1b[2J": torch.zeros(2)}, compress=True)
    with pytest.raises(ArtifactError) as caught:
        read_container(Held(b"".join(parts)), "artifact", lambda meta: {})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("field", OTHER)
def test_another_model_is_refused_by_the_name_of_its_setting(make_cfg, field):
    """A file made with one other setting of the model is refused: which, theirs and ours."""
    made, ours = {**make_cfg().group("model"), field: OTHER[field]}, make_cfg()
    meta = json.loads(json.dumps(dict(model=made)))
    with pytest.raises(ArtifactError) as caught:
        train_gpt.check_made_for(Path("a/model.golf"), meta, ours)
    assert str(caught.value).startswith("a/model.golf: ")
    assert f"made with {field.upper()}={OTHER[field]}, " in str(caught.value)
    assert f"this run has {getattr(ours, field)};" in str(caught.value)


def test_the_same_model_is_accepted_whatever_else_differs(make_cfg):
    """Settings of training, quantization and scoring may differ; a setting of old may be gone."""
    meta = json.loads(json.dumps(dict(model={**make_cfg().group("model"), "gone": 1})))
    train_gpt.check_made_for(Path("x"), meta, make_cfg(matrix_lr=0.5, seed=3, ttt_lr=0.1,
                                                       matrix_bits=5, iterations=9))


def test_a_file_that_lacks_a_setting_is_refused(cfg):
    """A file from before a setting existed is refused by the name of that setting."""
    meta = dict(model={n: v for n, v in cfg.group("model").items() if n != "rope_base"})
    with pytest.raises(ArtifactError, match="made with ROPE_BASE=None"):
        train_gpt.check_made_for(Path("x"), meta, cfg)


@pytest.mark.parametrize("meta", [{}, [], None, dict(model=None), dict(model=[])], ids=repr)
def test_meta_data_without_a_model_are_refused(cfg, meta):
    """Meta data that do not say what model they belong to are no reason to crash."""
    with pytest.raises(ArtifactError):
        train_gpt.check_made_for(Path("x"), meta, cfg)


def small(make_cfg):
    """Settings of a model so small that a test can afford a run of it."""
    return make_cfg(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4)


def spoil(data: bytes, kind: str, how: str) -> bytes:
    """A container with one tensor or one number of its meta data lost, or of another shape."""
    meta, tensors = train_gpt.parse_container(data, kind)
    name = dict(artifact="layers.0.mlp.fc.weight", checkpoint="average")[kind]
    if how == "no number":
        del meta["steps" if kind == "artifact" else "seconds"]
    elif how == "no tensor":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    return pack(tensors, meta, kind)


def use(run, kind: str, data: bytes):
    """Have the stage that reads a file of this kind read `data` and take its weights over."""
    name = dict(artifact="model.golf", checkpoint="checkpoint.golf")[kind]
    write(run.cfg.run_dir / name, data)
    if kind == "artifact":
        train_gpt.eval_stage(run, None)
    else:
        run.flat.data.copy_(train_gpt.load_trained(run).average)


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_contents_that_fit_the_model_are_used(make_cfg, make_run, real_files, kind):
    """The same stages read the same files, taken apart and packed again, without complaint."""
    run = make_run(small(make_cfg))
    use(run, kind, pack(*reversed(train_gpt.parse_container(real_files[kind], kind)), kind))


@pytest.mark.parametrize("how", ["no tensor", "other shape", "no number"])
@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_contents_that_do_not_fit_the_model_are_refused(make_cfg, make_run, real_files, kind, how):
    """A stage that reads a sound file of the wrong tensors or numbers says so, without a crash."""
    run = make_run(small(make_cfg))
    with pytest.raises(ArtifactError):
        use(run, kind, spoil(real_files[kind], kind, how))


# ------------------------------------------------------------------------------------------------
# Half files
# ------------------------------------------------------------------------------------------------

@contextmanager
def small_files_only(size: int):
    """Let no file grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def ordinary_user():
    """A folder of a user whom its permissions bind, which they do not bind root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            os.chmod(folder, 0o700)
    finally:
        if root:
            os.seteuid(0)


def unwritten(path: Path, parts) -> str:
    """The message of a write that fails."""
    with pytest.raises(ArtifactError) as caught:
        write_atomic(path, parts)
    assert str(caught.value).startswith(f"{path}: cannot be written (")
    assert str(caught.value).endswith("see OUT_DIR")
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writing_replaces_the_old_file(tmp_path):
    """The parts of a file end up in it, one after the other, and nothing is left beside it."""
    for parts in ([b"old"], [b"n", b"", b"e" * 100_000, memoryview(b"w")], []):
        write_atomic(tmp_path / "x", parts)
        assert content(tmp_path) == {"x": b"".join(parts)}


def test_only_parts_of_the_file_itself_are_swept(tmp_path):
    """What a run that was killed left of this very file goes; whatever else is there stays."""
    others = dict.fromkeys(("x.part", "x.1.2.part", "x.notes.part", "y.1.part", "ax.1.part"), b"")
    for name in ("x.123.part", *others):
        write(tmp_path / name, b"")
    write_atomic(tmp_path / "x", [b"new"])
    assert content(tmp_path) == {"x": b"new", **others}


@pytest.mark.parametrize("old", [{}, {"x": b"old"}])
@pytest.mark.parametrize("size", [0, 1, 1000, 99_999])
def test_a_full_disk_leaves_the_old_file(tmp_path, old, size):
    """However much of it fits, a file that cannot be written whole leaves the folder as it was."""
    for name, data in old.items():
        write(tmp_path / name, data)
    with small_files_only(size):
        told = unwritten(tmp_path / "x", [b"x" * 50_000, b"y" * 50_000])
    assert os.strerror(errno.EFBIG) in told and content(tmp_path) == old


@pytest.mark.parametrize("old", [{}, {"x": b"old"}])
def test_a_read_only_folder_is_told(old):
    """Without permission to write nothing is written, and the reason is in the message."""
    with ordinary_user() as folder:
        for name, data in old.items():
            write(folder / name, data)
        folder.chmod(0o500)
        assert os.strerror(errno.EACCES) in unwritten(folder / "x", [b"new"])
        assert os.strerror(errno.EACCES) in unwritten(folder / "deeper" / "x", [b"new"])
        assert content(folder) == old


def test_paths_that_cannot_be_files_are_told(tmp_path):
    """A file where a folder is needed, and a folder where the file should be."""
    write(tmp_path / "file", b"kept")
    (tmp_path / "folder").mkdir()
    unwritten(tmp_path / "file" / "x", [b"new"])
    unwritten(tmp_path / "folder", [b"new"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"kept" and not content(tmp_path / "folder")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch, call):
    """Where the disk refuses only at the end, the folder is as it was before."""
    def fail(*_):
        """The disk gives up."""
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    write(tmp_path / "x", b"old")
    monkeypatch.setattr(os, call, fail)
    assert os.strerror(errno.EIO) in unwritten(tmp_path / "x", [b"new"])
    assert content(tmp_path) == {"x": b"old"}


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path, problem):
    """Ctrl-C, or no memory for the next part: the old file stays, and no part file beside it."""
    def parts():
        """One part, and no second one."""
        yield b"new"
        raise problem
    write(tmp_path / "x", b"old")
    with pytest.raises(problem):
        write_atomic(tmp_path / "x", parts())
    assert content(tmp_path) == {"x": b"old"}


def test_the_file_appears_whole(tmp_path, monkeypatch):
    """At the moment it gets its name the data are complete and were handed to the disk."""
    seen, (sync, move) = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda f: seen.append(os.fstat(f).st_size) or sync(f))

    def watched(part, path):
        """Look at both files, then rename one."""
        seen.append((Path(part).read_bytes(), Path(path).read_bytes()))
        move(part, path)
    monkeypatch.setattr(os, "replace", watched)
    write(tmp_path / "x", b"old")
    write_atomic(tmp_path / "x", [b"new", b"er"])
    assert seen == [5, (b"newer", b"old")] and content(tmp_path) == {"x": b"newer"}
