"""pack.py: the packed file is the same program, and nothing but the source decides its bytes."""
import ast
import base64
import dis
import importlib.util
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack
import train_gpt
from conftest import ROOT, imported

TRAIN, PACKED_TRAIN = ROOT / "train_gpt.py", ROOT / "packed" / "train_gpt.py"
MOST_CODE_BYTES = 28_000       # growth beyond it needs a reason; the aim is 26,000

TOY = '''\
#!/usr/bin/env python3
"""A program with a little of everything that packing could break."""
import inspect
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

GREETING: str = "good day"
BREAKS = f"{GREETING} \\v \\f \\x1c \\x85 \\u2028"     # str.splitlines ends lines there
total_calls: int = 0


@dataclass(frozen=True)
class Config:
    """Fields live in annotations."""
    width: int = 3       # prose
    name: str = "toy"
    double = property(lambda config: 2 * config.width)

    def scaled(self, factor_of_width: float = 2.0) -> float:
        """Multiply."""
        scaled_width: float = self.width * factor_of_width
        return scaled_width


class Pair(NamedTuple):
    """Two numbers."""
    left: int
    right: int = 7


def keyword_only(long_parameter_name: int, *others: int, option_name: str = "x", **rest) -> list:
    """Callers use these names, and `rest` may hold any."""
    global total_calls
    total_calls += 1
    collected_values = [long_parameter_name * value for value in others]
    return [collected_values, option_name, sorted(rest)]


def from_mapping(left_side, right_side):
    """Called with names that are strings."""
    return left_side - right_side


def make_counter(start_value):
    """A closure over a parameter and a local."""
    current_value = start_value

    def advance():
        """Move on."""
        nonlocal current_value
        current_value += 1
        return current_value, start_value
    return advance


def fail(divisor):
    """Raise two frames down."""
    message_text = f"cannot divide by {divisor!r}"
    assert divisor != 13, "unlucky"
    return json.dumps([message_text, 1 // divisor])


def facts() -> dict:
    """What the tests compare between the readable and the packed program."""
    counter = make_counter(start_value=4)
    counter()
    letters = {"A": 1, "B": 2, "a": 3, "b": 4}
    return {
        "main": __name__, "file": Path(__file__).name, "argv": sys.argv[1:],
        "fields": [(f.name, f.type.__name__, f.default) for f in fields(Config)],
        "scaled": Config(width=5).scaled(factor_of_width=1.5), "pair": Pair(left=1)._asdict(),
        "shown": [repr(Config()), repr(Pair(2)), Config(4).double],
        "keywords": keyword_only(long_parameter_name=2, option_name="y", **letters),
        "stars": keyword_only(2, 3, 4), "calls": total_calls, "counter": counter(),
        "mapping": from_mapping(**{"right_side": 1, "left_side": 9}),
        "greeting": GREETING, "quotes": f"{GREETING!r:>12} {'a' + 'b'} \\n \\x00 {{}}",
        "source": ["cannot divide" in inspect.getsource(fail), "width" in inspect.getsource(Config),
                   "nonlocal" in inspect.getsource(make_counter)],
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["fail"]:
        fail(divisor=0)
    print(json.dumps(facts(), sort_keys=True))
'''

NEW_FSTRINGS = ['f"{d["k"]}"', "f'{f'{1}'}'", 'f"{chr(10)}{"\\n"}"', "f'''{f\"{'''x'''}\"}'''",
                'f"{1 + f"{2}"}"', "f'{d[\n1]}'", 'f"{f\'a"b\'}"', "f'{1:{\"'\"}}'"]
OLD_FSTRINGS = ["f\"{d['k']}\"", 'f"\\n{1}\\t"', "f'{1:>{3}} {{}}'",
                "f\"{f'{1}'}\"", "f'''{1}\n'a' \"b\"'''", "rf'{1}\\d'", "f'{d[\"#\"]}' # note",
                "f'a' 'b' f\"c{1}\""]


def find_pythons():
    """Return one working interpreter a version, from 3.11 on, by what is on this machine."""
    named = [shutil.which(f"python3.{minor}") for minor in range(11, 20)]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    kept_aside = sorted(str(path) for path in versions.glob("3.1[1-9]*/bin/python"))
    found = {}
    for path in [sys.executable, *filter(None, named), *kept_aside]:
        code = "import bz2, sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if not done.returncode:
            found.setdefault(done.stdout.strip(), path)
    return found


PYTHONS = find_pythons()


def run(path, *args, python=sys.executable, cwd=None, env=None):
    """Run a Python file in a subprocess with text output."""
    return subprocess.run([python, str(path), *args], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}, timeout=60)


def cli(capsys, *args):
    """Run the command line in this process: exit code, lines printed, lines of error."""
    code = pack.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def program(source):
    """The minified text of a source, for looking at."""
    return pack.minify_source(source)


def defined(text):
    """Names of the functions and classes of a module, in order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(text).body if isinstance(node, kinds)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy program as toy.py with packed/toy.py beside it."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)
    assert pack.main(["--source", str(folder / "toy.py")]) == 0
    return folder


@pytest.fixture(scope="module")
def packed_train(tmp_path_factory):
    """train_gpt.py as it is now, packed."""
    path = tmp_path_factory.mktemp("train") / "train_gpt.py"
    path.write_bytes(pack.pack_source(TRAIN.read_text()))
    return path


# ------------------------------------------------------------------------------------------------
# The same program
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", PYTHONS)
def test_packed_does_what_the_source_does_on_every_python_here(toy, version):
    """Output, exit code, __main__, __file__, fields, keywords, closures and getsource agree."""
    runs = [run(toy / name, "a", "b c", python=PYTHONS[version])
            for name in ("toy.py", "packed/toy.py")]
    assert runs[0].stdout == runs[1].stdout and not runs[1].stderr
    facts = json.loads(runs[1].stdout)
    assert facts["main"] == "__main__" and facts["argv"] == ["a", "b c"]
    assert facts["source"] == [True, True, True] and facts["mapping"] == 8


def test_packed_runs_from_another_directory_as_a_launcher_starts_it(toy, tmp_path):
    """A relative path, another working directory and a rank in the environment change nothing."""
    relative = os.path.relpath(toy / "packed" / "toy.py", tmp_path)
    ranked = run("-u", relative, cwd=tmp_path, env={"RANK": "1", "LOCAL_RANK": "1"})
    assert ranked.stdout == run(toy / "toy.py").stdout and ranked.returncode == 0


@pytest.mark.parametrize("version", PYTHONS)
def test_traceback_shows_the_real_lines(toy, version):
    """Each frame prints the line that --unpack prints under that number, and never the payload."""
    done = run(toy / "packed" / "toy.py", "fail", python=PYTHONS[version])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 300
    lines = pack.unpack_source((toy / "packed" / "toy.py").read_bytes()).split("\n")
    frames = re.findall(r'toy\.py", line (\d+), in \S+\n    (.*)', done.stderr)
    assert len(frames) == 2 and "json" not in frames[0][1] and "//" in frames[1][1]
    assert all(shown in lines[int(number) - 1] for number, shown in frames)


def test_packed_file_can_be_imported(toy):
    """As a module it keeps its name, runs no main block, and its classes are where they were."""
    with imported(toy / "packed" / "toy.py") as module:
        text = pack.unpack_source((toy / "packed" / "toy.py").read_bytes())
        names = dict(zip(defined(TOY), defined(text), strict=True))
        facts = getattr(module, names["facts"])()
        assert module.Config().width == 3 and module.Config.__name__ == "Config"
    assert facts["main"] == "imported_program"


def test_exactly_two_lines(toy):
    """The packed file is two lines, for tools that end lines at a return too, and has no zeros."""
    data = (toy / "packed" / "toy.py").read_bytes()
    assert data.count(b"\n") == 2 and data.endswith(b"\n") and not {0, 13} & {*data}
    assert data.splitlines()[0] == b"#coding:latin1"


def test_every_byte_survives_the_frame(monkeypatch):
    """Whatever the compressor returns stands in the string, also zeros before digits."""
    stream = bytes([*range(256), *reversed(range(256))]) + b"\0001\\'\\n\r\n\0"
    monkeypatch.setattr(pack.bz2, "compress", lambda data: stream)
    assert next(pack.payloads(pack.frame(""))) == stream


@pytest.mark.skipif(train_gpt.triton is None, reason="needs Triton, whose interpreter runs here")
def test_triton_reads_the_packed_kernels(packed_train):
    """Triton compiles kernels and what they call from source: value and gradients agree."""
    def value_and_gradients(module):
        rng = torch.Generator().manual_seed(0)
        shapes = (1, 8, 64), (256, 64), (64, 256)
        x, up, down = (torch.randn(s, generator=rng).requires_grad_() for s in shapes)
        y = module.FusedMLP.apply(x, up, down)
        return y, *torch.autograd.grad(y.square().sum(), (x, up, down))
    with imported(packed_train) as module:
        packed = value_and_gradients(module)
    assert all(map(torch.equal, packed, value_and_gradients(train_gpt)))


def steps_of(code):
    """The steps of a code object and those in it: (operation, value) or (operation, value, 0).

    Locals are numbered, parameters first and the others by order of use; the third form names a
    variable of the module.  Left out: how cells are set up (by order of names) and how a method
    call is prepared (Python does it otherwise for a local that is called like an import).
    """
    silent = {"NOP", "MAKE_CELL", "LOAD_CLOSURE", "COPY_FREE_VARS", "PUSH_NULL",
              "EXTENDED_ARG"}           # a longer jump, over instructions that are compared
    parameters = code.co_argcount + code.co_kwonlyargcount
    order = {name: i for i, name in enumerate(code.co_varnames[:parameters])}
    yield "parameters", parameters
    for op in dis.get_instructions(code):
        if op.opcode in (*dis.haslocal, *dis.hasfree) and op.opname not in silent:
            yield op.opname, order.setdefault(op.argval, len(order))
        elif isinstance(op.argval, type(code)):
            yield from steps_of(op.argval)
        elif op.opname.endswith("_GLOBAL") or op.opname == "LOAD_NAME":
            yield op.opname, op.argval, 0
        elif op.opname not in silent and op.opcode not in (*dis.hasjrel, *dis.hasjabs):
            yield op.opname.replace("METHOD", "ATTR"), repr(op.argval)


def functions(tree):
    """Steps of all functions and classes in a module, in order, whatever lines they are on."""
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.lineno = node.end_lineno = 1
            node.col_offset = node.end_col_offset = 0
    code = compile(ast.fix_missing_locations(tree), "here", "exec")
    return [step for inner in code.co_consts if isinstance(inner, type(code))
            for step in steps_of(inner)]


def without_prose(source):
    """Parse a source without annotations that document and without docstrings."""
    tree = pack.Bare().visit(ast.parse(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    return tree


SAMPLES = [Path(importlib.util.find_spec(name).origin) for name in ("statistics", "http.client")]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="newer bytecode pairs and shares locals")
@pytest.mark.parametrize("path", [TRAIN, *SAMPLES], ids=lambda p: p.stem)
def test_minified_functions_run_the_same_instructions(path):
    """Beside names, every function compiles to the instructions it had; names map one to one."""
    source = path.read_text()
    before, after = functions(without_prose(source)), functions(ast.parse(program(source)))
    assert len(before) == len(after) > 1000
    there, back = {}, {}
    for old, new in zip(before, after):
        if len(old) == 3:
            assert new[0] == old[0]
            assert there.setdefault(old[1], new[1]) == new[1]
            assert back.setdefault(new[1], old[1]) == old[1]
        else:
            assert old == new


# ------------------------------------------------------------------------------------------------
# What goes and what stays
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, gone", [
    ('"""module prose"""\nx = 1', "prose"),
    ("def f():\n    'docstring'\n    return 1  # note", "docstring"),
    ("def f():\n    return 1  # note", "note"),
    ("def f(a: int) -> str: return a", "int"),
    ("def f(a: int) -> str: return a", "str"),
    ("async def f(*a: int, **b: 'bool'): c: float = 1; return c", "bool"),
    ("x: float = 1", "float"),
    ("def f():\n    long_local_name = 1\n    return long_local_name * long_local_name", "local"),
    ("def f(parameter_name): return parameter_name * parameter_name", "parameter"),
    ("module_name = 1\ndef f(): return module_name", "module"),
])
def test_what_goes(source, gone):
    """Prose, documenting annotations, and names that the program alone can see."""
    assert gone not in program(source)


@pytest.mark.parametrize("source, kept", [
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    b: int = 1", "b:int=1"),
    ("class LongName:\n    b: int", "class LongName:b:int"),
    ("class A:\n    if 1:\n        b: int = 2", "b:int=2"),
    ("import triton.language as tl\ndef f(a: int, B: tl.constexpr): return B", ":tl.constexpr"),
    ("import triton.language as tl\nB: tl.constexpr = 3", ":tl.constexpr=3"),
    ("def f(a):\n    assert a, 'message'", ",'message'"),
    ("def f(name): return name * name\nf(name=1)", "def A(name)"),
    ("def f(name): return name * name\nf(**{'name': 1})", "def A(name)"),
    ("def f(name, **rest): return name, name, rest", "(name,**"),
    ("def f(a, b, /, c): return a", ",/,"),
    ("x = other.attribute_name", ".attribute_name"),
    ("class A:\n    def f(self): self.field_name = 1", ".field_name=1"),
    ("def f(a): return len(a), len(a), len(a), isinstance(a, str), isinstance(a, int)",
     "len(A),len(A),len(A),isinstance(A,str),isinstance(A,int)"),
    ("def f(x): return locals(), [long_name for long_name in x]", "long_name"),
])
def test_what_stays(source, kept):
    """Annotations that mean something, asserts, builtins, and every name that others can see."""
    assert kept in program(source)


def test_parameters_get_no_alias():
    """A second name would keep a tensor alive that the function rebinds or deletes."""
    body = "".join(f"    big_parameter = big_parameter + {i}\n" for i in range(20))
    text = program(f"def f(big_parameter):\n{body}    del big_parameter\nf(big_parameter=1)")
    assert "=big_parameter\n" not in text and "=big_parameter;" not in text


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_strings_survive(first, second):
    """Any string comes back."""
    source = (f"def f():\n A = {first!r}\n B = f'{{A}}' {second!r}\n"
              f" return A, B, [{second!a}, {first.encode('utf8')!r}]\nf = {{'f': f}}\n")
    names = {}
    exec(pack.unpack_source(pack.pack_source(source)), names)
    found = next(value for value in names.values() if isinstance(value, dict) and "f" in value)
    assert found["f"]() == (first, first + second, [second, first.encode()])


# ------------------------------------------------------------------------------------------------
# Bytes that depend on the source alone, and on Python 3.11
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with python-minifier, for other Pythons to import."""
    folder = tmp_path_factory.mktemp("library")
    origin = Path(importlib.util.find_spec("python_minifier").origin).parent
    shutil.copytree(origin, folder / "python_minifier", ignore=shutil.ignore_patterns("*.pyc"))
    return {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.parametrize("version", PYTHONS)
def test_every_python_packs_to_the_same_bytes(toy, tmp_path, library, version):
    """Python's version and hash seed do not show in the result."""
    done = run(ROOT / "pack.py", "--source", str(toy / "toy.py"), "--out", str(tmp_path / "p.py"),
               python=PYTHONS[version], env=library)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.py").read_bytes() == (toy / "packed" / "toy.py").read_bytes()


def test_line_endings_and_byte_order_mark_do_not_matter(toy, tmp_path):
    """A checkout with CRLF packs to the same bytes."""
    (tmp_path / "toy.py").write_bytes(b"\xef\xbb\xbf" + TOY.replace("\n", "\r\n").encode())
    assert pack.main(["--source", str(tmp_path / "toy.py")]) == 0
    packed = (tmp_path / "packed" / "toy.py").read_bytes()
    assert packed == (toy / "packed" / "toy.py").read_bytes()


def test_every_python_compiles_train_gpt(packed_train, tmp_path):
    """Both layers of the packed program, on all that are here, and by the grammar of the oldest."""
    inside = tmp_path / "inside.py"
    inside.write_text(pack.unpack_source(packed_train.read_bytes()))
    for path in (packed_train, inside):
        ast.parse(path.read_bytes(), feature_version=pack.OLDEST)
        for python in PYTHONS.values():
            code = "import sys; compile(open(sys.argv[1], 'rb').read(), 'it', 'exec')"
            done = run("-c", code, str(path), python=python)
            assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("source", ["type X = int", "def f[T](x: T): return x", "x = 'a", "\0",
                                    "x = '\ud800'"])
def test_newer_grammar_is_refused(source):
    """Grammar that 3.11 cannot read is refused with one line."""
    with pytest.raises(pack.Failure, match="^the source is no Python 3.11 program: [^\n]*$"):
        pack.pack_source(source)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="takes a Python that cannot read PEP 701")
def test_fstrings_are_packed_for_the_oldest_python(library):
    """Whichever f-strings a Python can read, it packs them so that 3.11 can, or refuses them."""
    code = ("import json, sys, pack\n"
            "def packed(text):\n"
            "    try: return pack.minify_source('y = ' + text)\n"
            "    except pack.Failure: return ''\n"
            "print(json.dumps([packed(text) for text in json.loads(sys.argv[1])]))")
    samples = json.dumps(NEW_FSTRINGS + OLD_FSTRINGS)
    for python in PYTHONS.values():
        done = run("-W", "ignore", "-c", code, samples, python=python, env=library)
        texts = json.loads(done.stdout)
        assert all(texts[len(NEW_FSTRINGS):])
        for text in texts:
            ast.parse(text)


# ------------------------------------------------------------------------------------------------
# Unpacking, checking, refusing
# ------------------------------------------------------------------------------------------------

def test_unpack_round_trips(toy, capsys):
    """--unpack prints the minified program, line for line as tracebacks number it."""
    packed = toy / "packed" / "toy.py"
    code, lines, _ = cli(capsys, "--unpack", packed)
    text = pack.unpack_source(packed.read_bytes())
    assert code == 0 and lines == text.splitlines()
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(program(TOY)))


@pytest.mark.parametrize("raw", [True, False])
def test_unpack_reads_other_wrappers_and_runs_nothing(tmp_path, capsys, raw):
    """The public entries' forms, raw LZMA2 and .xz, are read as data."""
    inside = b"open('ran', 'w')\nprint('hello')\n" * 9
    if raw:
        data = lzma.compress(inside, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
        call = 'exec(L.decompress(B.b85decode("%s"),format=L.FORMAT_RAW,filters=[F]))'
    else:
        data, call = lzma.compress(inside), "exec(L.decompress(B.b85decode('%s')))"
    path = tmp_path / "entry.py"
    path.write_text("import lzma as L,base64 as B\n" + call % base64.b85encode(data).decode())
    code, lines, _ = cli(capsys, "--unpack", path)
    assert code == 0 and lines == inside.decode().splitlines()
    assert pack.is_packed(path.read_bytes()) and not (tmp_path / "ran").exists()


def test_packed_input_is_refused(toy, capsys, tmp_path):
    """No wrapper in a wrapper, whichever way the packed file comes in."""
    packed = toy / "packed" / "toy.py"
    with pytest.raises(pack.Failure, match="packed already"):
        pack.pack_source(packed.read_text("latin1"))
    for args in (["--source", packed], ["--check", "--source", packed]):
        code, lines, errors = cli(capsys, *args, "--out", tmp_path / "twice.py")
        assert code == 2 and not lines and len(errors) == 1 and "packed already" in errors[0]
    assert not (tmp_path / "twice.py").exists()
    assert not pack.is_packed(TOY.encode())


def test_a_changed_byte_is_noticed_everywhere(toy, monkeypatch):
    """Every 7th byte of both lines, the payload and the last newline; an intact file passes."""
    text, data = program(TOY), (toy / "packed" / "toy.py").read_bytes()
    monkeypatch.setattr(pack, "minify_source", lambda source: text)
    assert pack.check(TOY, data) == ""
    for at in {*range(0, len(data), 7), *range(40), *range(len(data) - 20, len(data))}:
        for change in (1, 1 + at % 255):
            damaged = data[:at] + bytes([data[at] ^ change]) + data[at + 1:]
            assert pack.check(TOY, damaged) != "", at


@pytest.mark.parametrize("damage, named", [
    (lambda data: data, ""),
    (lambda data: data[:-9], "damaged"),
    (lambda data: data.replace(b"decompress('", b"decompress('~~"), "damaged"),
    (lambda data: b"print('no payload at all')\n", "damaged"),
    (lambda data: b"\0\1", "damaged"),
    (lambda data: data.replace(b"sys,", b"os,"), "other bytes, the first at offset"),
    (lambda data: data + b"\n", "other bytes, the first at offset"),
])
def test_check_names_what_is_wrong(toy, capsys, tmp_path, damage, named):
    """Exit code 1 and one line; sizes and exit code 0 if nothing is wrong."""
    out = tmp_path / "toy.py"
    out.write_bytes(damage((toy / "packed" / "toy.py").read_bytes()))
    code, lines, errors = cli(capsys, "--check", "--source", toy / "toy.py", "--out", out)
    if named:
        assert code == 1 and not lines and len(errors) == 1 and named in errors[0]
    else:
        assert code == 0 and "is current" in lines[0] and not errors


@pytest.mark.parametrize("old, new, named", [
    ("GREETING!r:>12", "GREETING!r:>13", "differs"),
    ("left: int", "left: float", "`class Pair("),
    ('"good day"', '"good night"', "'good night'` differs"),
    ('if __name__', 'x = 1\nif __name__', "=1` differs"),
    ("    print(json.dumps(facts(), sort_keys=True))\n", "    pass\nx = 1\n", "stale"),
])
def test_stale_file_is_noticed(toy, capsys, tmp_path, old, new, named):
    """A changed source makes the packed file stale, and the message shows the statement."""
    source = tmp_path / "toy.py"
    source.write_text(TOY.replace(old, new))
    assert source.read_text() != TOY
    packed = toy / "packed" / "toy.py"
    code, lines, errors = cli(capsys, "--check", "--source", source, "--out", packed)
    assert code == 1 and not lines and len(errors) == 1 and "stale" in errors[0]
    assert named in errors[0].replace(" = ", "=")


def test_prose_does_not_make_it_stale(toy, capsys, tmp_path):
    """Comments, docstrings and annotations may change without packing again."""
    source = tmp_path / "toy.py"
    source.write_text(TOY.replace("# prose", "# longer prose").replace('"""Multiply."""', "'x'")
                      .replace("start_value):", "start_value: int):"))
    assert cli(capsys, "--check", "--source", source, "--out", toy / "packed" / "toy.py")[0] == 0


def test_missing_packed_file_fails_the_check(toy, capsys, tmp_path):
    """--check does not make one."""
    out = tmp_path / "none.py"
    code, _, errors = cli(capsys, "--check", "--source", toy / "toy.py", "--out", out)
    assert code == 1 and "missing" in errors[0] and len(errors) == 1 and not out.exists()


@pytest.mark.parametrize("content", [None, b"x = (", b"\xff\xfe", b"x = 'a\0b'", b"\tx=1\n y",
                                     b"type X = int"])
def test_bad_source_is_one_line_and_leaves_the_packed_file(capsys, tmp_path, content):
    """Exit code 2; what was packed before stays whole and no half-written file remains."""
    source, out = tmp_path / "bad.py", tmp_path / "packed" / "bad.py"
    out.parent.mkdir()
    out.write_bytes(b"before")
    if content is not None:
        source.write_bytes(content)
    for action in ([], ["--check"]):
        code, lines, errors = cli(capsys, *action, "--source", source)
        assert code == 2 and not lines and len(errors) == 1
        assert re.match("pack.py: .*bad.py", errors[0])
    assert out.read_bytes() == b"before" and os.listdir(out.parent) == ["bad.py"]


@pytest.mark.parametrize("content", [None, b"print('plain')", b"x = (", b"", b"\0"])
def test_unpack_of_something_else_is_one_line(capsys, tmp_path, content):
    """Exit code 2 and the file named."""
    path = tmp_path / "other.py"
    if content is not None:
        path.write_bytes(content)
    code, lines, errors = cli(capsys, "--unpack", path)
    assert code == 2 and not lines and len(errors) == 1 and "other.py" in errors[0]


def test_the_source_is_never_overwritten(toy, capsys, tmp_path):
    """--out may not be the source, under any spelling of its path."""
    source = tmp_path / "toy.py"
    source.write_text(TOY)
    (tmp_path / "link.py").symlink_to(source)
    for out in (source, tmp_path / "sub" / ".." / "toy.py", tmp_path / "link.py"):
        code, _, errors = cli(capsys, "--source", source, "--out", out)
        assert code == 2 and "overwrite" in errors[0]
    assert source.read_text() == TOY


def test_a_reader_that_leaves_is_no_traceback(toy):
    """As with `| head`: exit code 1 and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, ROOT / "pack.py", "--unpack", toy / "packed" / "toy.py"],
                          stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_missing_minifier_is_one_line(toy, capsys, monkeypatch):
    """Without python-minifier packing says what to install; unpacking works."""
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    code, _, errors = cli(capsys, "--check", "--source", toy / "toy.py")
    assert code == 2 and len(errors) == 1 and "pip install" in errors[0]
    assert cli(capsys, "--unpack", toy / "packed" / "toy.py")[0] == 0


# ------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("newest, room", [(15_000_000, "{:,} left"), (16_000_000, "OVER BY {:,}")])
def test_report_counts_what_is_there(toy, capsys, tmp_path, newest, room):
    """Sizes, hash and room left are those of the files; the newest artifact counts."""
    source = tmp_path / "toy.py"
    source.write_text(TOY)
    for age, (name, size) in enumerate([("new", newest), ("old", 9)]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        path = tmp_path / "runs" / name / "model.golf"
        with path.open("wb") as file:
            file.truncate(size)
        os.utime(path, (1000 - age, 1000 - age))
    code, lines, _ = cli(capsys, "--source", source)
    packed = (toy / "packed" / "toy.py").read_bytes()
    shown, left = "\n".join(lines), abs(16_000_000 - newest - len(packed))
    assert code == 0
    assert all(f"{len(data):,} bytes" in shown for data in (TOY.encode(), packed))
    assert f"{newest:,} {Path('runs/new/model.golf')}, {room.format(left)}" in shown
    assert re.search(r"^sha256 +[0-9a-f]{64}$", shown, re.M)


def test_train_gpt_is_packed_and_current(packed_train):
    """The committed packed file is the one that the committed source packs to."""
    assert PACKED_TRAIN.read_bytes() == packed_train.read_bytes(), "run pack.py and commit packed/"


def test_train_gpt_does_not_grow(packed_train):
    """Packed code stays where it is or shrinks."""
    assert packed_train.stat().st_size <= MOST_CODE_BYTES
