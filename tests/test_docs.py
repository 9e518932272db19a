"""The documents keep up with the code: names, files, layers and snippets they mention exist."""

import ast
import re
from pathlib import Path

import pytest

from svdq_compile import errors
from svdq_compile.ops import plan
from svdq_compile.spec import COMPONENTS, MODELOPT_LEAF

ROOT = Path(__file__).parents[1]
DOCS = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if file.exists()]
FILE_SUFFIXES = ("py", "md", "toml", "yaml", "jinja")

per_document = pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level, _ = title.split(" ", 1)
    body = text.split(f"\n{title}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", body, maxsplit=1)[0]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, without its heading and ruler."""
    found, rows = [], []
    outside_fences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in (*outside_fences.splitlines(), ""):
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            assert len({len(row) for row in rows}) == 1, f"uneven table, first row {rows[0]}"
            found.append(rows[2:])
            rows = []
    return found


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def python_fences(text: str) -> list[str]:
    return re.findall(r"^```(?:python|py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_error_is_in_the_table_and_every_row_is_an_error():
    (rows,) = tables(section(read("format.md"), "## Errors"))
    listed = [name for row in rows for name in names(row[0])]
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SvdqError) and value.__module__ == errors.__name__
    ]
    assert listed == classes, "one row a class, in the order of errors.py"
    assert all(row[1] for row in rows)


def test_the_vocabulary_is_the_specs():
    rows = tables(section(read("format.md"), "## Vocabulary"))[0]
    assert [names(row[0]) for row in rows] == [[name] for name in COMPONENTS]
    assert [names(row[1]) for row in rows] == [[MODELOPT_LEAF[name]] for name in COMPONENTS]


def test_every_key_of_a_linear_is_in_the_key_table():
    (rows,) = tables(section(read("format.md"), "## Keys of a linear").split("\n### ", 1)[0])
    assert [names(row[0])[0] for row in rows] == [f"m.{leaf}" for leaf in (*MODELOPT_LEAF.values(), "bias")]


def layers() -> dict[str, set[str]]:
    """LAYERS of the test that enforces the arrows."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(a.value) for a in assignments if ast.unparse(a.targets[0]) == "LAYERS")


def test_the_layers_are_those_the_architecture_test_enforces():
    (rows,) = tables(section(read("design.md"), "## Import arrows"))
    documented = {names(row[0])[0]: set(names(row[1])) for row in rows}
    assert documented == {layer: allowed - {layer} for layer, allowed in layers().items()}


def test_the_kernels_are_those_a_plan_can_name():
    (rows,) = tables(section(read("design.md"), "## What computes a linear"))
    tree = ast.parse(Path(plan.__file__).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Plan"]
    assert {name for row in rows for name in names(row[0])} == {call.args[0].value for call in calls}


@per_document
def test_tables_are_even(file):
    tables(file.read_text(encoding="utf-8"))


@per_document
def test_relative_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (file.parent / target.split("#")[0]).exists(), target


@per_document
def test_files_that_are_mentioned_exist(file):
    for name in names(file.read_text(encoding="utf-8")):
        is_file = re.fullmatch(rf"[\w.-]+(/[\w.-]+)+\.({'|'.join(FILE_SUFFIXES)})", name)
        is_folder = re.fullmatch(r"(svdq_compile|triton_kernels|tests|examples|docs)(/[\w.-]+)*/", name)
        if is_file or is_folder:
            assert (ROOT / name).exists(), name


@per_document
def test_python_snippets_compile(file):
    for snippet in python_fences(file.read_text(encoding="utf-8")):
        # Snippets of notebooks and scripts may await.
        compile(snippet, str(file), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_document_is_there():
    """The tests above take what they find."""
    found = {file.name for file in DOCS}
    assert {"design.md", "format.md", "numerics.md", "performance-log.md"} <= found
