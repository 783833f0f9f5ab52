"""A Sphinx extension that writes what would go stale if people wrote it: three things, each time the book is built.

`<!-- api -->` in a page becomes the reference of the package: every public name with its signature, in which the types
say shapes, and the comments beside the parameters, which say units and ranges. `<!-- differences -->` becomes the
chapters' tables of where we differ from the paper and its released code. And a page that is a notebook ends in the
commit it is from, and when and with what its outputs were made (`tools/chapter.py` notes that).
"""
import ast
import copy
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from html import escape
from pathlib import Path

from nbdev_directives import FIGURE_REFERENCE

ROOT = Path(__file__).resolve().parent.parent
DIFFERENCES = re.compile(r"^## Where [^\n]*differs?\b[^\n]*\n(.*?)(?=^#{1,2} |\Z)", re.MULTILINE | re.DOTALL)
ABOVE = re.compile(r"^(?![|]).*\babove\b.*\n?", re.MULTILINE)  # what only the chapter itself can say
Function = ast.FunctionDef | ast.AsyncFunctionDef


def chapters() -> dict[str, tuple[str, list[str]]]:
    "The chapters in their order: for each notebook's name its title and its cells of prose."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        title = next(line for text in prose for line in text.splitlines() if line.startswith("# "))
        found[path.stem] = title.removeprefix("# "), prose
    return found


def differences() -> str:
    "The chapters' sections `Where we differ`, each under its chapter's title."
    text = []
    for name, (title, prose) in chapters().items():
        for section in DIFFERENCES.findall("\n".join(prose)):
            section = ABOVE.sub("", section).strip()
            text.append(f"## {title}\n\n[Chapter {name[:2]}]({name}.ipynb)\n\n{section}\n")
    return FIGURE_REFERENCE.sub(r"{numref}`\1`", "\n".join(text))


def comments_of(source: str) -> dict[int, str]:
    "The comment on each line that has one."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def notes_of(args: ast.arguments, comments: dict[int, str]) -> dict[str, str]:
    "The comment beside each parameter; of several on one line it is that of the last, or of the one that it names."
    places = [*args.posonlyargs, *args.args]
    defaults = dict(zip([part.arg for part in places][::-1], args.defaults[::-1]))
    defaults |= {part.arg: default for part, default in zip(args.kwonlyargs, args.kw_defaults) if default is not None}
    parts = [*places, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]
    last = {defaults.get(part.arg, part).end_lineno: part.arg for part in parts}
    found = {name: comments[line] for line, name in last.items() if line in comments}
    named = {name: note.partition(": ") for name, note in found.items()}
    return {first if first in {part.arg for part in parts} else name: rest if first in {part.arg for part in parts}
            else found[name] for name, (first, _, rest) in named.items()}


def signature_of(node: Function, comments: dict[int, str], bound: bool) -> tuple[str, list[str]]:
    "The signature as it is called, and a field for each comment in it."
    args = copy.deepcopy(node.args)
    if bound:
        del (args.posonlyargs or args.args)[:1]
    fields = [f":param {name}: {note}" for name, note in notes_of(args, comments).items()]
    line = node.body[0].lineno - 1
    if node.returns is None:
        return f"({ast.unparse(args)})", fields
    if note := comments.get(node.returns.end_lineno if node.returns.end_lineno <= line else None):
        fields += [f":returns: {note}"] * (note not in " ".join(fields))
    result = node.returns.value if isinstance(node.returns, ast.Constant) else ast.unparse(node.returns)
    return f"({ast.unparse(args)}) -> {result}", fields


def class_signature(cls: ast.ClassDef, comments: dict[int, str]) -> tuple[str, list[str]]:
    "What one passes to make one: the fields of a named tuple or a dataclass, else what `__init__` takes."
    made = [ast.unparse(node) for node in (*cls.bases, *cls.decorator_list)]
    if any(re.search(r"NamedTuple|dataclass|Struct", word) for word in made):
        fields = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
        notes = {ast.unparse(field.target): comments.get(field.end_lineno) for field in fields}
        return (f"({', '.join(map(ast.unparse, fields))})",
                [f":param {name}: {note}" for name, note in notes.items() if note])
    start = next((node for node in cls.body if isinstance(node, Function) and node.name == "__init__"), None)
    return signature_of(start, comments, bound=True) if start else ("", [])


def directive(kind: str, name: str, signature: str, body: list[str], options: str = "") -> str:
    "One description of Sphinx's Python domain."
    fence = "`" * (3 + max((len(run) for run in re.findall("`{3,}", "\n".join(body))), default=0))
    return "\n".join([f"{fence}{{py:{kind}}} {name}{signature}", *filter(None, [options]), "", *body, fence, ""])


def describe(node: ast.AST, name: str, comments: dict[int, str]) -> str:
    "A public function, class or value of a module, with what is public in it."
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return directive("data", name, "", [comments.get(node.end_lineno, "")])
    doc = [ast.get_docstring(node) or "", ""]
    if isinstance(node, Function):
        signature, fields = signature_of(node, comments, bound=False)
        return directive("function", name, signature, doc + fields)
    signature, fields = class_signature(node, comments)
    for part in node.body:
        if isinstance(part, Function) and (not part.name.startswith("_") or part.name == "__call__"):
            words = {ast.unparse(decorator) for decorator in part.decorator_list}
            call, notes = signature_of(part, comments, bound="staticmethod" not in words)
            kind, call = ("property", "") if words & {"property", "cached_property"} else ("method", call)
            said = [ast.get_docstring(part) or "", "", *notes]
            fields += ["", directive(kind, f"{name}.{part.name}", call, said)]
    return directive("class", name, signature, doc + fields)


def described(path: Path) -> Iterator[tuple[str, str]]:
    "Every public name of a module with its description."
    source = path.read_text(encoding="utf-8")
    comments, body = comments_of(source), ast.parse(source).body
    nodes = {node.name: node for node in body if isinstance(node, Function | ast.ClassDef)}
    values = [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    for node in values:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        nodes |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    for name in ast.literal_eval(nodes["__all__"].value):
        if name in nodes:
            yield name, describe(nodes[name], f"detr_nb.{path.stem}.{name}", comments)


def reference() -> str:
    "All modules in the order of their chapters."
    text = []
    for chapter, (title, _) in chapters().items():
        module = chapter.split("_", 1)[1]
        text.append(f"## detr_nb.{module}\n\nChapter {chapter[:2]}: [{title}]({chapter}.ipynb)\n")
        text += [description for _, description in described(ROOT / f"detr_nb/{module}.py")]
    return "\n".join(text)


WRITTEN = {"api": ("<!-- api -->", reference), "differences": ("<!-- differences -->", differences)}


def write(app, docname: str, source: list[str]) -> None:
    "Put what is written here into the pages that ask for it."
    if docname in WRITTEN:
        place, text = WRITTEN[docname]
        source[0] = source[0].replace(place, text())


def commits(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    "For each file of the book the last commit that changed it, and its day; empty where git does not know."
    git = ["git", "log", "--format=commit %h %cs", "--name-only", "--relative", "--", "nbs"]
    try:
        log = subprocess.run(git, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found, commit = {}, None
    for line in log.splitlines():
        if line.startswith("commit "):
            commit = tuple(line.split()[1:])
        elif line:
            found.setdefault(line, commit)
    return found


def record_of(notebook: dict, commit: tuple[str, str] | None) -> str:
    "From which commit a page is, and when, with what and on what its outputs were made: as far as it is known."
    said, made = [], notebook["metadata"].get("outputs_made")
    if commit:
        said.append(f"This page as of commit {commit[0]}, {commit[1]}.")
    if made:
        said.append(f"Its outputs were made on {made['date']} with {made['versions']}, on {made['machine']}.")
    return " ".join(said)


def sign(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    "End a notebook's page in what is known about its outputs."
    path = Path(app.srcdir, f"{pagename}.ipynb")
    if "body" in context and path.exists():
        app.commits = getattr(app, "commits", None) or commits()
        said = record_of(json.loads(path.read_text(encoding="utf-8")), app.commits.get(f"nbs/{path.name}"))
        context["body"] += f'<p class="page-record">{escape(said)}</p>' if said else ""


def setup(app):
    app.connect("source-read", write)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: [
        name for name in WRITTEN if name in env.found_docs])
    app.connect("html-page-context", sign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
