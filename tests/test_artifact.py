"""train_gpt.py, Artifact: containers written, read back, damaged, of another model, half written.

Run alone: python -m pytest -q tests/test_artifact.py
"""
import errno
import itertools
import json
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stirred

import train_gpt
from train_gpt import CODECS, MAGIC, GolfError, layout_of, open_container, write_atomic

DTYPES = torch.int8, torch.float16, torch.float32, torch.int64
SHAPES = (), (1,), (7,), (5, 3), (3, 0), (0, 3), (1, 1, 1), (2, 3, 4, 5), (0,), (3, 0, 2)
META = dict(model=dict(a=1, b="ü", c=0.1), steps=2 ** 53 + 1, none=None, nested=[[], {}, [True]])

each_codec = pytest.mark.parametrize("codec", CODECS)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def random_bits(dtype: torch.dtype, shape: tuple) -> torch.Tensor:
    """A tensor of any bit pattern: NaNs, infinities and negative zeros included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> tuple:
    """Dtype, shape and every bit of a tensor."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return tensor.dtype, tuple(tensor.shape), raw


def same(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors have the same names and bits."""
    return a.keys() == b.keys() and all(bits(a[n]) == bits(b[n]) for n in a)


def some_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every dtype that a run writes, 101 bytes in all."""
    return {"q": random_bits(torch.int8, (5, 7)), "q.scale": random_bits(torch.float16, (5,)),
            "w": random_bits(torch.float32, (3, 4)), "step": torch.tensor(7)}


def pack(tensors: dict, codec: str = "range", meta=META, kind: str = "artifact") -> bytes:
    """The bytes of a container."""
    return b"".join(train_gpt.pack_tensors(kind, meta, tensors, codec))


@pytest.fixture
def read(tmp_path):
    """A function that writes a container, and reads its tensors back by an expected layout."""
    def read(data: bytes, expected: dict, kind: str = "artifact") -> dict[str, torch.Tensor]:
        path = tmp_path / "model.golf"
        path.write_bytes(data)
        return open_container(path, kind).tensors(expected)
    return read


def rejects(read, *args) -> str:
    """The error of reading a container: one line that names the file."""
    with pytest.raises(GolfError, match="model.golf: ") as caught:
        read(*args)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------
# Write and read
# ------------------------------------------------------------------------------------------------

@each_codec
def test_a_container_gives_back_its_tensors(tmp_path, codec):
    """Every dtype and odd shape comes back with the same bits, and so do the meta data."""
    tensors = {f"{d}/{s} ü\"\n": random_bits(d, s) for d in DTYPES for s in SHAPES}
    tensors[""] = random_bits(torch.int8, (4,))
    path = tmp_path / "new" / "folder" / "model.golf"
    for given in (tensors, {}, {"a": torch.zeros(0)}):
        write_atomic(path, train_gpt.pack_tensors("artifact", META, given, codec))
        container = open_container(path, "artifact")
        found = container.tensors(layout_of(given))
        assert container.meta == META and same(found, given)
    for tensor in found.values():
        tensor.fill_(1)                                     # memory of its own, and writable


def test_strides_do_not_matter():
    """Transposed, sliced and gradient-tracking tensors are stored as the plain ones they equal."""
    base = torch.randn(6, 8)
    odd = dict(a=base.T, b=base[::2, 1::3], c=base.clone().requires_grad_(),
               d=base[:1].expand(4, 8))
    assert pack(odd) == pack({n: torch.tensor(t.tolist()) for n, t in odd.items()})


@each_codec
def test_same_input_same_bytes(monkeypatch, codec):
    """Neither the order of names nor the number of cores makes a difference."""
    tensors = some_tensors()
    data = pack(tensors, codec)
    for order in itertools.permutations(tensors):
        assert pack({n: tensors[n] for n in order}, codec) == data
    for cores in (1, 3, 64):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert pack(tensors, codec) == data


def test_other_input_other_bytes():
    """A bit of a tensor, a name, a shape, a dtype, the kind or the meta data change the file."""
    base = torch.arange(6, dtype=torch.int8)
    files = {pack(dict(a=base)), pack(dict(b=base)), pack(dict(a=base.view(2, 3))),
             pack(dict(a=base.view(torch.uint8))), pack(dict(a=base), meta={}),
             pack(dict(a=base), kind="checkpoint"), pack(dict(a=base), "raw")}
    for i, bit in itertools.product(range(6), range(8)):
        changed = base.view(torch.uint8).clone()
        changed[i] ^= 1 << bit
        files.add(pack(dict(a=changed.view(torch.int8))))
    assert len(files) == 7 + 6 * 8


def test_regular_tensors_are_compressed():
    """Zeros take next to nothing, and halves of one size little more than their low bytes."""
    for zeros in (torch.zeros(100_000), torch.zeros(250, 400, dtype=torch.int8)):
        assert len(pack(dict(a=zeros))) < 1000
    assert len(pack(dict(a=1 + torch.rand(100_000).half()))) < 150_000
    assert len(pack(dict(a=torch.zeros(100_000)), "raw")) > 400_000


def normal_codes(O: int, I: int, spread: float) -> torch.Tensor:
    """Codes (O, I) of normal weights whose rows differ in size by so many octaves."""
    size = 2.0 * torch.exp2(spread * torch.randn(O, 1))
    return (torch.randn(O, I) * size).round().clamp(-127, 127).to(torch.int8)


@pytest.mark.parametrize("spread, most", [(0.0, 1.001), (0.3, 0.995), (0.6, 0.97)])
def test_codes_take_less_than_their_entropy(spread, most):
    """Matrices take their order-0 entropy, less than that if rows differ in size."""
    tensors = {str(i): normal_codes(512, 512, spread) for i in range(8)}
    entropy = 0.0
    for codes in tensors.values():
        p = np.unique(codes, return_counts=True)[1] / codes.numel()
        entropy -= codes.numel() * (p @ np.log2(p)) / 8
    assert len(pack(tensors)) < most * entropy


def test_entropy_of_a_matrix_is_what_it_takes():
    """Alone in a file it takes its entropy by class and little more, for counts and sizes."""
    for spread in (0.0, 0.6):
        codes = normal_codes(512, 512, spread)
        entropy = train_gpt.entropy_bytes(codes.numpy())
        assert entropy < len(pack(dict(a=codes))) < 1.04 * entropy
    assert train_gpt.entropy_bytes(np.full((9, 7), 5, np.int8)) == 0.0
    classes = np.repeat([[1, -1], [16, -16]], 50, 0).astype(np.int8)      # a bit each, by row
    assert train_gpt.entropy_bytes(classes) == 200 / 8


def test_rare_codes_of_any_size_come_back(read):
    """One code unlike all others, of its matrix or of its class, costs bytes and nothing else."""
    tensors = dict(a=torch.zeros(40, 30, dtype=torch.int8), b=torch.ones(7, 9, dtype=torch.int8))
    tensors["a"][3, 4], tensors["a"][5, 6], tensors["b"][0, 8] = -128, 127, -127
    assert same(read(pack(tensors), layout_of(tensors)), tensors)


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------

@each_codec
def test_every_damage_is_seen(read, codec):
    """A flipped bit in any byte, an end or a beginning that is missing, bytes that follow."""
    tensors = some_tensors()
    data, layout = pack(tensors, codec), layout_of(tensors)
    assert same(read(data, layout), tensors)
    for i in range(len(data)):
        for flip in (1 << i % 8, 255) if i >= 12 else (1, 2, 4, 8, 16, 32, 64, 128, 255):
            rejects(read, data[:i] + bytes([data[i] ^ flip]) + data[i + 1:], layout)
        rejects(read, data[:i], layout)
        rejects(read, data[i + 1:], layout)
    for more in (b"\0", b"\n", MAGIC, data):
        rejects(read, data + more, layout)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, MAGIC, MAGIC + b"\xff" * 4,
                                  MAGIC + b"\0" * 36, b"not a model\n" * 9])
def test_other_files_are_rejected(read, data):
    """Files of other programs, and beginnings of ours, are no containers."""
    assert "damaged or no artifact" in rejects(read, data, {})


def test_the_version_before_is_rejected(read):
    """A container of another version of the format is named as such."""
    data = pack(some_tensors())
    assert "no container of this version" in rejects(read, data[:5] + b"\1" + data[6:], {})


@pytest.mark.parametrize("kind, other", [("artifact", "checkpoint"), ("checkpoint", "artifact")])
def test_the_other_kind_is_rejected(read, kind, other):
    """A checkpoint is no artifact nor the other way round, and the message says which it is."""
    assert f"it is a {other}" in rejects(read, pack({}, kind=other), {}, kind)


def test_a_pickle_is_rejected_and_never_run(read, tmp_path):
    """A file of torch.save is no container, and nothing in it is executed."""
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trapped",)
    torch.save(dict(a=Trap()), tmp_path / "x")
    rejects(read, (tmp_path / "x").read_bytes(), {})
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["nowhere/x", ".", "pipe", "loop", "x" * 300])
def test_paths_that_are_no_files_are_named(tmp_path, name):
    """A file that is not there, a folder, a pipe, a loop: the message says to run its stage."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(GolfError, match="run its stage first"):
        open_container(tmp_path / name, "artifact")


# ------------------------------------------------------------------------------------------------
# The right model
# ------------------------------------------------------------------------------------------------

def test_another_layout_is_rejected(read):
    """A tensor more or fewer, or one of another dtype, shape or name: the message names it."""
    tensors = some_tensors()
    data, layout = pack(tensors), layout_of(tensors)
    for name in tensors:
        rest = {n: v for n, v in layout.items() if n != name}
        for other in (rest, {**layout, "more": ("int8", (1,))}, {**layout, name: ("int16", (5,))},
                      {**layout, name: (layout[name][0], (*layout[name][1], 2))},
                      {**rest, "new\n": layout[name]}):
            assert "; use the settings that it was made with" in rejects(read, data, other)
        assert repr(name) in rejects(read, data, rest)


def container_of(model: dict) -> train_gpt.Container:
    """A container whose meta data went through JSON, as in a file."""
    meta = json.loads(json.dumps(dict(model=model)))
    return train_gpt.Container(Path("a/model.golf"), meta, "range", {}, [])


def test_another_model_is_rejected_by_the_name_of_its_setting(cfg):
    """A file made with one other setting of the model, or without it: which, theirs and ours."""
    ours = cfg.group("model")
    for name, value in ours.items():
        other = not value if isinstance(value, bool) else value + type(value)(1)
        for made, theirs in (({**ours, name: other}, other),
                             ({n: v for n, v in ours.items() if n != name}, None)):
            with pytest.raises(GolfError) as caught:
                train_gpt.check_made_for(container_of(made), cfg)
            assert str(caught.value).startswith(
                f"a/model.golf: made with {name.upper()}={theirs}, this run has {value}; ")


def test_the_same_model_is_accepted_whatever_else_differs(make_cfg):
    """Settings of training, quantization and scoring may differ; a setting of old may be gone."""
    container = container_of({**make_cfg().group("model"), "gone": 1})
    train_gpt.check_made_for(container, make_cfg(matrix_lr=0.5, seed=3, ttt_lr=0.1, code_step=0.5,
                                                 iterations=9))


@pytest.fixture
def state(make_cfg, make_run) -> train_gpt.TrainState:
    """The state of a very small run after a step, saved."""
    cfg = make_cfg(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4)
    state = train_gpt.TrainState(stirred(make_run(cfg)), 10, True)
    state.looped = True
    state.train_step(torch.randint(cfg.vocab_size, (4, 33)), 0.0)
    state.loader, state.seconds = dict(digest="0" * 16), 1.5
    state.save()
    return state


def test_a_checkpoint_gives_back_the_state(state, make_run):
    """Every tensor bit for bit, and step, seconds, schedule and place in the data."""
    found = train_gpt.TrainState.load(make_run(state.run.cfg))
    assert same(found.tensors(), state.tensors())
    assert (found.step, found.seconds, found.loader) == (1, 1.5, state.loader)
    assert (found.schedule.expected_steps, found.schedule.recurrent) == (10, True)
    assert found.looped


def test_an_artifact_fits_its_own_model_only(state, make_cfg, make_run, read):
    """The tensors of a quantized model have the layout of its artifact, and of no other model's."""
    run = state.run
    hessians = {n: torch.eye(s[1]) for n, s in run.flat.shapes.items() if len(s) == 2}
    steps = train_gpt.wanted_steps(run.cfg, run.flat, state.ema, {}, 0.4)
    tensors, _ = train_gpt.quantize_model(run.cfg, run.flat, state.ema, hessians, steps, run.rt.log)
    data = pack(tensors)
    assert same(read(data, train_gpt.artifact_layout(run.flat)), tensors)
    wider = make_run(make_cfg(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, rope_dims=4))
    rejects(read, data, train_gpt.artifact_layout(wider.flat))


def test_a_checkpoint_of_no_use_is_rejected(state, make_run):
    """Another order of parameters, numbers that are not finite: one line, and the run is as it was.

    The order is another one if another version of the program has laid the weights out.
    """
    run = make_run(state.run.cfg)
    before = run.flat.data.clone()
    names = state.run.flat.names
    state.run.flat.names = names[::-1]
    state.save()
    with pytest.raises(GolfError, match="parameters in another order"):
        train_gpt.TrainState.load(run)
    state.run.flat.names = names
    for tensor in state.tensors().values():
        kept = tensor.clone()
        tensor.view(-1)[-1:] = float("nan")
        state.save()
        with pytest.raises(GolfError, match="not finite; train again"):
            train_gpt.TrainState.load(run)
        tensor.copy_(kept)
    assert torch.equal(run.flat.data, before)


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


def failed_write(path: Path, parts) -> str:
    """The message of a write that fails."""
    with pytest.raises(GolfError) as caught:
        write_atomic(path, parts)
    assert str(caught.value).startswith(f"{path}: cannot be written (")
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writing_replaces_the_old_file(tmp_path):
    """The parts of a file end up in it, one after the other, and nothing is left beside it."""
    for parts in ([b"old"], [b"n", b"", b"e" * 100_000, memoryview(b"w")], []):
        write_atomic(tmp_path / "x", parts)
        assert content(tmp_path) == {"x": b"".join(parts)}


@pytest.mark.parametrize("old", [{}, {"x": b"old"}])
def test_a_full_disk_leaves_the_old_file(tmp_path, old):
    """However much of it fits, a file that cannot be written whole leaves the folder as it was."""
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    for size in (0, 1, 1000, 99_999):
        with small_files_only(size):
            message = failed_write(tmp_path / "x", [b"x" * 50_000, b"y" * 50_000])
        assert os.strerror(errno.EFBIG) in message and content(tmp_path) == old


def test_a_read_only_folder_is_named():
    """Without permission to write nothing is written, and the reason is in the message."""
    with ordinary_user() as folder:
        (folder / "x").write_bytes(b"old")
        folder.chmod(0o500)
        for path in (folder / "x", folder / "new", folder / "deeper" / "x"):
            assert os.strerror(errno.EACCES) in failed_write(path, [b"new"])
        assert content(folder) == {"x": b"old"}


def test_paths_that_cannot_be_files_are_named(tmp_path):
    """A file where a folder is needed, and a folder where the file should be."""
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    failed_write(tmp_path / "file" / "x", [b"new"])
    failed_write(tmp_path / "folder", [b"new"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"kept" and not content(tmp_path / "folder")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch, call):
    """Where the disk fails only at the end, the folder is as it was before."""
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    assert os.strerror(errno.EIO) in failed_write(tmp_path / "x", [b"new"])
    assert content(tmp_path) == {"x": b"old"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """After Ctrl-C the old file is whole, and the next write sweeps up what was left beside it."""
    def parts():
        yield b"new"
        raise KeyboardInterrupt
    write_atomic(tmp_path / "x", [b"old"])
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", parts())
    assert content(tmp_path)["x"] == b"old"
    write_atomic(tmp_path / "x", [b"newer"])
    assert content(tmp_path) == {"x": b"newer"}


def test_the_file_appears_whole(tmp_path, monkeypatch):
    """At the moment it gets its name the data are complete and were handed to the disk."""
    seen, (sync, move) = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda f: seen.append(os.fstat(f).st_size) or sync(f))

    def watched(part, path):
        seen.append((Path(part).read_bytes(), Path(path).read_bytes()))
        move(part, path)
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", watched)
    write_atomic(tmp_path / "x", [b"new", b"er"])
    assert seen == [5, (b"newer", b"old")] and content(tmp_path) == {"x": b"newer"}
