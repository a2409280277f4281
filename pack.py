#!/usr/bin/env python3
"""Pack train_gpt.py into the two lines that are submitted and counted: packed/train_gpt.py.

    python pack.py                  write packed/train_gpt.py; print its sizes and what they leave
    python pack.py --check          fail, naming what differs, unless packed/train_gpt.py is current
    python pack.py --unpack FILE    print the program inside a packed FILE without running it

The packed file is the same program: comments, docstrings and annotations that only document are
gone, and names are short where nothing but the program itself can see them.  Its first line says
that each byte is a character (Latin-1).  Its second imports, unpacks a bzip2 stream that stands in
a string as it is, a fifth shorter than in base85, and runs it as the module that was started.  The
program is entered in `linecache` under the packed file's own name: tracebacks,
`inspect.getsource` and Triton see real lines, numbered as `--unpack` prints them.

The bytes depend on the source text alone, and the program in them runs on Python 3.11 and later.
"""
import console  # first: from here on Ctrl-C ends in one line
from console import Failure

import ast
import base64
import bz2
import hashlib
import io
import lzma
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

LIMIT_BYTES = 16_000_000   # code and model together, by the challenge's rules
OLDEST = (3, 11)           # Python that the packed file must still run on
HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------
# Minify: the same program without what only readers need
# ------------------------------------------------------------------------------------------------

# Every switch that may change what a program does (dropping asserts, for example) is off.  Literals
# stay where they are: named once at the top they make the text shorter but the stream longer.
SWITCHES = dict(
    remove_literal_statements=True,
    remove_annotations=False,          # `Bare` has done it, with exceptions the library lacks
    hoist_literals=False,
    rename_locals=False,               # `shorten_names` does it
    rename_globals=False,
    convert_posargs_to_args=False,
    remove_builtin_exception_brackets=False,
    preserve_shebang=False,
    remove_asserts=False,
    remove_debug=False,
)


class Bare(ast.NodeTransformer):
    """Drop annotations that only document: all but class fields' and Triton's `constexpr`."""
    in_class = False        # whether the statements at hand are a class body

    def visit_within(self, node, in_class: bool):
        """Transform the children of `node`."""
        outside, self.in_class = self.in_class, in_class
        self.generic_visit(node)
        self.in_class = outside
        return node

    def visit_ClassDef(self, node):
        """Keep the fields' annotations: `dataclass` and `NamedTuple` read them."""
        return self.visit_within(node, in_class=True)

    def visit_FunctionDef(self, node):
        """Drop the annotation of the result."""
        node.returns = None
        return self.visit_within(node, in_class=False)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node):
        """Drop a parameter's annotation."""
        if not is_constexpr(node.annotation):
            node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        """Turn `x: int = 1` into `x = 1` and `x: int`, which makes x a local, into `x: 0`."""
        if self.in_class or is_constexpr(node.annotation):
            return node
        if node.value is None:
            node.annotation = ast.Constant(0)
            return node
        return ast.Assign([node.target], node.value)


def is_constexpr(annotation: ast.expr | None) -> bool:
    """Whether an annotation is Triton's `constexpr`, which decides how a kernel compiles."""
    return annotation is not None and "constexpr" in ast.unparse(annotation)


def parse(source: str, what: str) -> ast.Module:
    """Parse `source`; raises Failure where the oldest supported Python could not."""
    try:
        tree = ast.parse(source, feature_version=OLDEST)
    except (SyntaxError, ValueError) as e:
        raise Failure(f"{what} is no Python {OLDEST[0]}.{OLDEST[1]} program: {e}") from None
    check_fstrings(tree, what)
    return tree


def check_fstrings(tree: ast.Module, what: str):
    """Raise Failure for strings in an f-string's braces that may take Python 3.12 (PEP 701).

    python-minifier takes care of all but strings with quotes or backslashes, and strings in the
    braces of an inner f-string.
    """
    for outer in (node for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)):
        inner = [part for node in ast.walk(outer.value) if isinstance(node, ast.FormattedValue)
                 for part in ast.walk(node.value)]
        for node in ast.walk(outer):
            text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
            if text and (node in inner or re.search(r"[\"'\\]", repr(node.value).strip("b")[1:-1])):
                raise Failure(f"{what}, line {outer.lineno}: {node.value!r} within an f-string may "
                              "need Python 3.12; use a variable")


def old_fstrings():
    """Context in which python-minifier quotes f-strings as Python 3.11 reads them (no PEP 701)."""
    from python_minifier.f_string import OuterFString
    start = OuterFString.__init__
    return mock.patch.object(
        OuterFString, "__init__", lambda self, node, pep701=False: start(self, node))


def minify_source(source: str) -> str:
    """Return a shorter text of the same program; raises Failure for what is no program."""
    try:
        import python_minifier
    except ImportError:
        raise Failure("packing needs python-minifier: pip install -r requirements.txt") from None
    bare = ast.fix_missing_locations(Bare().visit(parse(source, "the source")))
    try:
        with old_fstrings():
            text = shorten_names(python_minifier.minify(bare, **SWITCHES))
    except (ValueError, RuntimeError) as e:
        raise Failure(f"python-minifier gave up: {e}") from None
    parse(text, "the minified source")
    return text


def shorten_names(text: str) -> str:
    """Give short names to locals, parameters, functions and variables of the module.

    Attributes, fields and classes keep their names (a repr or a traceback shows a class), and so
    does a parameter that a call may pass by keyword.  python-minifier knows the scopes; its own
    switches would also name builtins (`A=len`), which Triton's kernels must not see, and give a
    parameter a second name, which keeps a tensor alive that the function lets go of.
    """
    from python_minifier import unparse
    from python_minifier.ast_annotation import add_parent
    from python_minifier.rename import (add_namespace, allow_rename_globals, bind_names, rename,
                                        resolve_names)
    from python_minifier.rename.binding import NameBinding
    from python_minifier.rename.renamer import all_bindings
    module = ast.parse(text)
    for analyse in (add_parent, add_namespace, bind_names, resolve_names):
        analyse(module)
    if module.tainted:                       # exec, locals() and the like see names: none changes
        return text
    passed, spelled = names_passed(module), names_spelled(module)
    allow_rename_globals(module, True)       # but for __all__
    for _, binding in all_bindings(module):
        if type(binding) is not NameBinding or binding.name in spelled or any(
                is_seen(node, passed) for node in binding.references):
            binding.disallow_rename()
    # Names are given in order of appearance, so functions of one shape get the same ones, and the
    # stream is 1 % shorter than with the shortest names for the most frequent.
    with mock.patch.dict(rename.__globals__, sorted_bindings=all_bindings), \
            mock.patch.dict(NameBinding.rename.__globals__, arg_rename_in_place=lambda node: True):
        rename(module, preserved_globals=module.preserved)
    return unparse(module)


def names_passed(module: ast.Module) -> set[str]:
    """Names that calls in the module may pass as keywords: by `f(name=1)`, or by `f(**values)`."""
    return {node.arg if isinstance(node, ast.keyword) else node.value for node in ast.walk(module)
            if isinstance(node, (ast.keyword, ast.Constant))}


def names_spelled(module: ast.Module) -> set[str]:
    """Names in annotations with `constexpr`: Triton may read these as text, `tl.constexpr`."""
    annotations = [getattr(node, "annotation", None) for node in ast.walk(module)]
    return {node.id for annotation in annotations if is_constexpr(annotation)
            for node in ast.walk(annotation) if isinstance(node, ast.Name)}


def is_seen(node: ast.AST, passed: set[str]) -> bool:
    """Whether a name is seen outside its scope: that of a class, or of a keyword parameter."""
    if not isinstance(node, ast.arg):
        return isinstance(node, ast.ClassDef)
    of = node.namespace.args
    if node in (*of.posonlyargs, of.vararg, of.kwarg):
        return False
    # A short name could also be a key of **kwargs.
    return node.arg in passed or node in of.kwonlyargs or of.kwarg is not None


# ------------------------------------------------------------------------------------------------
# Pack: compress, and frame the stream with the two lines that run it
# ------------------------------------------------------------------------------------------------

# bzip2 makes 75 KB of such text 1.5 % smaller than the best settings of LZMA, and its decoder takes
# no options.  A string may hold every Latin-1 character but a few.  Up to Python 3.12 the
# interpreter's own printer of tracebacks reads files, never linecache: hence the hook.  Two blank
# lines come first in the program, since a traceback begins with the frame of line 2 of this file
# and prints whatever line 2 of the program is beside it.  Lines end at line feeds alone, as Python
# counts them; a string of the program may hold what str.splitlines also takes for an end.
ESCAPES = str.maketrans({"\0": r"\000", "\n": r"\n", "\r": r"\r", "'": r"\'", "\\": r"\\"})
LINE_1 = "#coding:latin1\n"
LINE_2 = ("import bz2,linecache,re,sys,traceback;s=bz2.decompress('",
          "'.encode('latin1')).decode();"
          r"linecache.cache[__file__]=len(s),None,re.findall('.*\n?',s),__file__;"
          "sys.excepthook=traceback.print_exception;exec(compile(s,__file__,'exec'))\n")
BLANK = "\n\n"


def frame(program: str) -> bytes:
    """Return the packed file that runs `program`."""
    stream = bz2.compress((BLANK + program).encode())
    return (LINE_1 + stream.decode("latin1").translate(ESCAPES).join(LINE_2)).encode("latin1")


def pack_source(source: str) -> bytes:
    """Return the packed file for a source text, always the same; raises Failure."""
    program = minify_source(source)
    if is_packed(source.encode()):
        raise Failure("the source is packed already")
    return frame(program)


# ------------------------------------------------------------------------------------------------
# Unpack and check: packed files are read as data, never run
# ------------------------------------------------------------------------------------------------

def payloads(packed: bytes) -> Iterator[bytes]:
    """Yield what may be the compressed stream in a packed file: its longest literal.

    It stands there as it is, or in base85 as in public entries.
    """
    try:
        constants = [n.value for n in ast.walk(ast.parse(packed)) if isinstance(n, ast.Constant)]
        texts = [value for value in constants if isinstance(value, (str, bytes))]
        longest = max(texts, key=len, default="")
        yield longest if isinstance(longest, bytes) else longest.encode("latin1")
        yield base64.b85decode(longest)
    except (SyntaxError, ValueError):               # UnicodeEncodeError is a ValueError
        return


def decompress(stream: bytes) -> bytes | None:
    """Decompress bzip2, or LZMA as in public entries; None for anything else."""
    raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    for decoder in (bz2.BZ2Decompressor(), raw, lzma.LZMADecompressor(lzma.FORMAT_XZ)):
        with suppress(OSError, lzma.LZMAError):
            data = decoder.decompress(stream)
            if decoder.eof and not decoder.unused_data:
                return data
    return None


def unpack_source(packed: bytes) -> str:
    """Return the program inside a packed file, ours or a public entry's; raises Failure."""
    found = next((data for data in map(decompress, payloads(packed)) if data is not None), None)
    if found is None:
        raise Failure("holds no whole bzip2 or LZMA stream")
    try:
        return found.decode()
    except UnicodeDecodeError as e:
        raise Failure(f"holds no text: {e}") from None


def is_packed(data: bytes) -> bool:
    """Whether a file wraps a program in a compressed literal."""
    try:
        return bool(unpack_source(data))
    except Failure:
        return data.startswith(LINE_1.encode())


def first_change(old: ast.Module, new: ast.Module) -> str:
    """Name the first statement in which two programs differ; empty if they are equal."""
    for before, after in zip(old.body, new.body):
        if ast.dump(before) != ast.dump(after):
            return f"`{ast.unparse(after).splitlines()[0]}` differs"
    return "" if len(old.body) == len(new.body) else "it ends elsewhere"


def check(source: str, packed: bytes) -> str:
    """Return the fault of `packed` as the packed form of `source`, empty if there is none."""
    program = minify_source(source)
    try:
        inside = parse(unpack_source(packed), "the program inside")
    except Failure as e:
        return f"is damaged: {e}"
    if change := first_change(inside, ast.parse(program)):
        return f"is stale: {change}; run pack.py"
    fresh = frame(program)
    if packed == fresh:
        return ""
    same = len(os.path.commonprefix([packed, fresh]))
    return f"holds the right program in other bytes, the first at offset {same}; run pack.py"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def read_source(path: Path) -> str:
    """Return the text of a readable program; raises Failure for a packed one."""
    data = console.read_file(path)
    if is_packed(data):
        raise Failure(f"{path} is packed already; --source must be the readable program")
    try:
        return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig").read()
    except UnicodeDecodeError as e:
        raise Failure(f"{path} is no UTF-8 text: {e}") from None


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Put `path` in front of the message of a Failure."""
    try:
        yield
    except Failure as e:
        raise Failure(f"{path}: {e}") from None


def report(source: str, packed: bytes, folder: Path) -> None:
    """Print sizes, hash and the room left beside the newest artifact, runs/*/model.golf."""
    sizes = dict(source=len(source.encode()), minified=len(unpack_source(packed).encode()),
                 compressed=len(next(payloads(packed))), packed=len(packed))
    for name, size in sizes.items():
        print(f"{name:<10} {size:>10,} bytes")
    print(f"{'sha256':<10} {hashlib.sha256(packed).hexdigest()}")
    model = max(folder.glob("runs/*/model.golf"), key=lambda p: p.stat().st_mtime_ns, default=None)
    size = model.stat().st_size if model else 0
    left = LIMIT_BYTES - len(packed) - size
    name = model.relative_to(folder) if model else "model (no runs/*/model.golf yet)"
    print(f"{LIMIT_BYTES:,} bytes: {len(packed):,} code + {size:,} {name}, "
          + (f"{left:,} left" if left >= 0 else f"OVER BY {-left:,}"))


def run_unpack(path: Path) -> int:
    """Print the program inside a packed file."""
    data = console.read_file(path)
    with about(path):
        text = unpack_source(data)
    sys.stdout.buffer.write(text.encode() + b"\n" * (not text.endswith("\n")))
    return 0


def run_check(source_path: Path, out: Path) -> int:
    """Say whether the packed file is the one that the source packs to; 0 if it is, else 1."""
    source, fault = read_source(source_path), "is missing; run pack.py"
    if out.exists():
        packed = console.read_file(out)
        with about(source_path):
            fault = check(source, packed)
    if fault:
        print(f"{out} {fault}", file=sys.stderr)
        return 1
    print(f"{out} is current: {source_path} packs to these bytes")
    report(source, packed, source_path.parent)
    return 0


def run_pack(source_path: Path, out: Path) -> int:
    """Write the packed file and print its sizes."""
    if source_path.resolve() == out.resolve():
        raise Failure(f"--out {out} would overwrite the source")
    source = read_source(source_path)
    with about(source_path):
        packed = pack_source(source)
    console.write_atomic(out, [packed])
    print(f"{source_path} -> {out}")
    report(source, packed, source_path.parent)
    return 0


def run(argv: list[str] | None) -> int:
    """Do what the command line asks; returns the exit code."""
    parser = console.Parser(prog="pack.py", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if the packed file is stale")
    action.add_argument("--unpack", metavar="FILE", type=Path, help="print the program inside FILE")
    beside = Path(os.path.relpath(HERE / "train_gpt.py"))
    parser.add_argument("--source", type=Path, default=beside, help="readable program to pack")
    parser.add_argument("--out", type=Path, help="packed file (packed/ beside the source)")
    args = parser.parse_args(argv)
    if args.unpack:
        return run_unpack(args.unpack)
    out = args.out or args.source.parent / "packed" / args.source.name
    return (run_check if args.check else run_pack)(args.source, out)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 stale or the reader of the output has gone, 2 bad input."""
    return console.run("pack.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
