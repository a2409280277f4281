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
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import brotli
import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import MAGIC, ArtifactError, pack_tensors, read_container, write_atomic

DTYPES = (torch.int8, torch.float16, torch.float32, torch.int64, torch.bfloat16, torch.uint8,
          torch.float64, torch.bool, torch.int32)
SHAPES = ((), (1,), (7,), (0,), (3, 0, 2), (5, 3), (1, 1, 1), (2, 3, 4, 5))
META = dict(model=dict(a=1, b="ü", c=0.1), steps=2 ** 53 + 1, none=None, nested=[[], {}, [True]])
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


@contextmanager
def little_memory():
    """Fail if what happens inside takes more memory than a small file may take."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BOUND, f"{peak} bytes"


# ------------------------------------------------------------------------------------------------
# Write and read
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compress", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, compress):
    """Every dtype and odd shape comes back with the same bits, and so do the meta data."""
    tensors = {f"{d}/{s} ü\"\n": random_bits(d, s) for d in DTYPES for s in SHAPES} | {"": a_model(
        )["q"]}
    path = tmp_path / "new" / "folder" / "model.golf"
    write_atomic(path, pack_tensors("artifact", META, tensors, compress))
    meta, found = read_container(path, "artifact")
    assert meta == META and same(found, tensors)
    for tensor in found.values():
        tensor.fill_(1)                                     # memory of its own, and writable


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(0)}, {"a": torch.tensor(2.0)}])
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
    odd = dict(a=base.T, b=base[::2, 1::3], c=base.clone().requires_grad_(), d=base[:1].expand(4, 8))
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
    assert "damaged or not a artifact" in refuse(data)


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


@pytest.mark.parametrize("name", ["nowhere/x", "."])
def test_missing_files_are_told(tmp_path, name):
    """A file that cannot be read is named, and which stage writes it."""
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
    cfg = make_cfg(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4)
    run = make_run(cfg)
    batches = SimpleNamespace(state=dict(digest="00", steps=3))
    trainer = train_gpt.Trainer(run, batches, 0.0, 10)
    run.flat.data.copy_(torch.randn(len(run.flat.data)))
    trainer.optimizer.step(1.0, 0.9)
    trainer.save(1.0)
    hessians = {n: torch.eye(s[1]) for n, s in run.flat.shapes.items() if len(s) == 2}
    tensors, _ = train_gpt.quantize_model(run, run.flat.data, hessians, 12.85)
    return dict(artifact=pack(tensors, dict(model=cfg.group("model"))),
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
    with little_memory():
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
    with little_memory():
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
    with little_memory():
        refuse(data)


def test_a_segment_that_is_a_bomb_is_refused():
    """A segment may inflate to its own size and not to a hundred times that."""
    bomb = brotli.compress(bytes(500 << 20), quality=1)
    header, _ = split(pack())
    for size in (2 ** 20, 500 << 20, 10 ** 15):
        with little_memory():
            refuse(forge(header, bomb, segments=[len(bomb)], bytes=size))
