"""The house style, measured: sizes of files and functions, order, documentation, what README names.

Run alone: python -m pytest -q tests/test_style.py
"""
import ast
import importlib
import inspect
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
PROGRAMS = [*map(ROOT.joinpath, SCRIPTS), *sorted(ROOT.glob("experiments/*.py")),
            *sorted(ROOT.glob("bench/*.py"))]
COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

MOST_LINES = {
    "train_gpt.py": 3331,           # target 2,100
    "submit.py": 920, "prepare_data.py": 900}

# Names of train_gpt.py that may be used above their definition, and why.
FORWARD = {
    "FusedHeads": "Attention and MLP choose between their own code and the kernels, an appendix",
    "FusedExclusion": "the same",
    "FusedMLP": "the same",
    "kernels_fit": "build_run asks whether the appendix can run here",
    "Extras": "Attention reads a constant of it; parts of one recipe follow those of all",
}

SECTION_TESTS = {
    "Configuration": "test_config", "Runtime": "test_data", "Tokens": "test_data",
    "Batches": "test_data", "Model": "test_model", "Optimizer": "test_optim",
    "Quantization": "test_quantize", "Artifact": "test_artifact", "Evaluation": "test_eval",
    "Test-time training": "test_ttt", "Training": "test_train", "Kernels": "test_kernels",
    "Main": "test_train"}


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def read(name: str | Path) -> str:
    """Text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def functions(tree: ast.Module):
    """Every function of a module, layout and docstring removed: (name, code lines, parameters)."""
    for node in ast.walk(ast.parse(ast.unparse(tree))):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
            # A kernel sees nothing but its arguments; no other function may have as many.
            kernel = any(ast.unparse(d).endswith("jit") for d in node.decorator_list)
            yield node.name, lines, 0 if kernel else len(node.args.args + node.args.kwonlyargs)


def depth(node: ast.AST, above: int = 0) -> int:
    """Deepest chain of compound statements below `node`."""
    below = (depth(c, above + isinstance(c, COMPOUND)) for c in ast.iter_child_nodes(node))
    return max(below, default=above)


def local_names(node: ast.AST) -> set[str]:
    """Parameters of a function, and names that it assigns or defines."""
    found = {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments)
             for a in (*n.posonlyargs, *n.args, *n.kwonlyargs, n.vararg, n.kwarg) if a}
    found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id and
              isinstance(n.ctx, ast.Store)}
    return found | {n.name for n in ast.walk(node) if n is not node and isinstance(
        n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name}


def used_above(source: str) -> dict[str, list[int]]:
    """Lines on which a name of the module is read above the line that first defines it."""
    tree, defined, used = ast.parse(source), {}, {}
    for top in tree.body:
        names = {top.name} if hasattr(top, "name") else {
            n.id for n in ast.walk(top) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for name in names:
            defined.setdefault(name, top.lineno)

    def visit(node, hidden):
        if isinstance(node, FUNCTIONS):
            hidden = hidden | local_names(node)
        if (isinstance(node, ast.Name) and node.id not in hidden
                and node.lineno < defined.get(node.id, 0)):
            used.setdefault(node.id, []).append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, hidden)
    visit(tree, set())
    return used


def undocumented(name: str):
    """Public classes, functions and methods of a script without a docstring, own or inherited."""
    tree, module = ast.parse(read(name)), importlib.import_module(Path(name).stem)
    for top in tree.body:
        if isinstance(top, (ast.ClassDef, ast.FunctionDef)) and not top.name.startswith("_"):
            if not ast.get_docstring(top):
                yield top.name
        if isinstance(top, ast.ClassDef) and not top.name.startswith("_"):
            for node in top.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    if not inspect.getdoc(getattr(getattr(module, top.name), node.name)):
                        yield f"{top.name}.{node.name}"


# ------------------------------------------------------------------------------------------------
# Programs
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MOST_LINES)
def test_files_are_short(name):
    """The long scripts have at most so many lines."""
    lines = read(name).count("\n")
    assert lines <= MOST_LINES[name]


def test_names_stand_above_their_uses():
    """train_gpt.py can be read from top to bottom: no name is used above the line defining it.

    Function bodies count; annotations in quotes do not.
    """
    example = "def f(a, c):\n    b = a\n    return b + c + g(d)\nd = c = b = 1\ng = f"
    assert used_above(example) == dict(g=[3], d=[3])
    used = used_above(read("train_gpt.py"))
    above = [f"{name} in line {lines[0]}" for name, lines in used.items() if name not in FORWARD]
    assert above == []
    assert set(used) == set(FORWARD), "an exception that nothing needs"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_functions_are_short_and_shallow(path):
    """Code lines of functions: p90 at most 18, longest 60; 6 parameters; nesting 5.

    The median of train_gpt.py is at most 7, that of the other scripts 9.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = sorted(functions(tree), key=lambda row: row[1])
    sizes = [lines for _, lines, _ in found]
    assert statistics.median(sizes) <= (7 if path.name == "train_gpt.py" else 9)
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 18
    assert sizes[-1] <= 60, found[-1]
    assert [row for row in found if row[2] > 6] == []
    assert depth(ast.parse(ast.unparse(tree))) <= 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_public_names_are_documented(name):
    """Every module, public class, function and method has a docstring or inherits one."""
    assert ast.get_docstring(ast.parse(read(name)))
    assert list(undocumented(name)) == []


@pytest.mark.parametrize("path", [*PROGRAMS, *sorted(ROOT.glob("tests/*.py"))],
                         ids=lambda path: path.name)
def test_lines_fit(path):
    """No line is wider than 100 columns."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_sections_and_their_tests():
    """train_gpt.py has its banners in the order of its header, each with a test file."""
    text = read("train_gpt.py")
    banners = re.findall(r"^# -{90,}\n# ([\w -]+): .*\n# -{90,}$", text, re.M)
    assert banners == list(SECTION_TESTS)
    header = text.split('"""')[1]
    listed = re.search(r"Sections: (.*), in the order", header, re.S).group(1)
    assert re.split(r",\s+", listed) == banners
    for name in set(SECTION_TESTS.values()):
        assert (ROOT / "tests" / f"{name}.py").is_file()


# ------------------------------------------------------------------------------------------------
# README and the rest of the repository
# ------------------------------------------------------------------------------------------------

def test_readme_names_what_exists():
    """Every script of the repository is in the README, and all that it names exists."""
    readme = read("README.md")
    for path in PROGRAMS:
        name = str(path.relative_to(ROOT))
        assert f"`{name}`" in readme, name
    for name in re.findall(r"python ([\w/]+\.py)|`((?:tests|bench|experiments)/[\w.]+)`", readme):
        assert (ROOT / "".join(name)).is_file(), name


def test_every_requirement_is_pinned_and_explained():
    """requirements.txt holds exact versions, per Python where needed; the README explains each."""
    readme = read("README.md")
    lines = read("requirements.txt").splitlines()
    for line in filter(lambda text: text and not text.startswith("#"), lines):
        match = re.fullmatch(r"([\w-]+)==\d[\d.]*( *; *\w+ *[<>=!]+ *['\"][\w.]+['\"])?", line)
        assert match, line
        assert f"`{match[1]}`" in readme, match[1]


def test_nothing_names_this_machine():
    """No text contains an absolute path of a user's machine or a mark of unfinished work."""
    texts = [*PROGRAMS, *ROOT.glob("tests/*.py"), *ROOT.glob("*.md"), *ROOT.glob("bench/*.md"),
             *ROOT.glob("*.json"), ROOT / "requirements.txt"]
    for path in texts:
        if path.name != Path(__file__).name:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w./-])/(work|home|root|Users|tmp)/\w", text), path.name
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path.name
