"""Writes the pages that repeat what the code says: the API from its docstrings, the command line from its --help.

The API is read off the source with `ast`, so no import is needed and what the page shows is what the file says.
Docstrings are Markdown with Google-style sections. Run by conf.py; `python docs/_generate.py` writes the pages alone.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import docstring_parser
from docstring_parser import Docstring, DocstringStyle

COMMANDS = ("demo", "train", "calibrate", "sample", "evaluate", "tune", "estimate", "profile", "report")
FENCE = "`````"


def write(folder: Path, src: Path) -> None:
    """Write api.md, its pages and cli.md into the folder; a page that has not changed keeps its time."""
    pages = {"cli.md": "\n".join(command_line())}
    entries = []
    for package, modules in packages(src).items():
        body = "\n".join(line for file, name in modules for line in module_page(file, name))
        if body:
            pages[f"api/{package}.md"] = f"# `{package}`\n\n{body}\n"
            entries.append(f"/_generated/api/{package}")
    pages["api_toc.md"] = "\n".join([":::{toctree}", ":maxdepth: 1", "", *entries, ":::", ""]) if entries else ""
    for name, text in pages.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    for stale in set(folder.rglob("*.md")) - {folder / name for name in pages}:
        stale.unlink()


# ------------------------------------------------------------------------------------------------------------------ API


def packages(src: Path) -> dict[str, list[tuple[Path, str]]]:
    """Public modules by the package on a floor they belong to: {"lowvar.process": [(file, "lowvar.process.noise")]}."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for file in sorted(src.glob("lowvar/**/*.py"), key=lambda f: (f.parent, f.stem != "__init__", f.stem)):
        parts = file.relative_to(src).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(piece.startswith("_") for piece in parts):
            found.setdefault(".".join(parts[:2]), []).append((file, ".".join(parts)))
    return found


def offered(tree: ast.Module) -> set[str]:
    """The strings in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return set()


def module_page(file: Path, name: str) -> Iterator[str]:
    tree = ast.parse(file.read_text(), str(file))
    names = offered(tree)
    text = ast.get_docstring(tree)
    members = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name in names]
    if not text and not members:
        return
    if name.count(".") > 1:
        yield f"\n## `{name}`\n"
    yield f"{FENCE}{{py:module}} {name}\n{FENCE}\n"
    yield markdown(text or "")
    for node in members:
        yield from class_entry(node, name) if isinstance(node, ast.ClassDef) else function_entry(node, name, FENCE)


def class_entry(node: ast.ClassDef, module: str) -> Iterator[str]:
    yield f"\n{FENCE}`{{py:class}} {node.name}{constructor(node)}\n:module: {module}\n"
    bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
    if bases:
        yield f"Bases: {bases}\n"
    yield docstring(ast.get_docstring(node))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            yield from function_entry(item, "", FENCE, method=True)
    yield f"{FENCE}`\n"


def function_entry(node: ast.FunctionDef, module: str, fence: str, *, method: bool = False) -> Iterator[str]:
    marks = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
    if marks & {"overload", "setter", "deleter"}:
        return
    is_property = bool(marks & {"property", "cached_property"})
    kind = ("property" if is_property else "method") if method else "function"
    arguments = "" if is_property else f"({parameters(node, skip_first=method and 'staticmethod' not in marks)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not is_property else ""
    yield f"\n{fence}{{py:{kind}}} {node.name}{arguments}{returns}"
    if module:
        yield f":module: {module}"
    if is_property and node.returns:
        yield f":type: {ast.unparse(node.returns)}"
    yield from (f":{mark}:" for mark in ("classmethod", "staticmethod") if mark in marks)
    yield from (":abstractmethod:" for _ in range("abstractmethod" in marks))
    yield f"\n{docstring(ast.get_docstring(node))}\n{fence}\n"


def parameters(node: ast.FunctionDef, *, skip_first: bool) -> str:
    arguments = node.args
    if skip_first:
        first = arguments.posonlyargs or arguments.args
        del first[:1]
    return ast.unparse(arguments)


def constructor(node: ast.ClassDef) -> str:
    """The parameters of __init__, or the annotated fields of a dataclass or named tuple."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return f"({parameters(item, skip_first=True)})"
    is_record = any("dataclass" in ast.unparse(d) for d in node.decorator_list) or any(
        ast.unparse(base).endswith(("NamedTuple", "BaseModel")) for base in node.bases
    )
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    shown = [
        ast.unparse(f)
        for f in fields
        if "ClassVar" not in ast.unparse(f.annotation) and "init=False" not in ast.unparse(f)
    ]
    return f"({', '.join(s for s in shown if not s.startswith('_'))})" if is_record else ""


def docstring(text: str | None) -> str:
    """A Google-style docstring as Markdown: the prose, then one list a section."""
    if not text:
        return ""
    parsed = docstring_parser.parse(text, style=DocstringStyle.GOOGLE)
    lines = [markdown("\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))), ""]
    for title, entries in sections(parsed):
        lines += [f"**{title}**", "", *entries, ""]
    for example in parsed.examples:
        code = textwrap.dedent((example.description or "").strip("\n"))
        lines += ["**Example**", "", "```pycon", code, "```", ""] if ">>>" in code else [markdown(code), ""]
    return "\n".join(lines)


def sections(parsed: Docstring) -> Iterator[tuple[str, list[str]]]:
    attributes = [p for p in parsed.params if p.args[0] == "attribute"]
    arguments = [p for p in parsed.params if p.args[0] != "attribute"]
    for title, params in (("Arguments", arguments), ("Attributes", attributes)):
        if params:
            yield title, [item(f"`{p.arg_name}`", p.description) for p in params]
    if parsed.many_returns:
        name = "Yields" if any(r.is_generator for r in parsed.many_returns) else "Returns"
        yield name, [item(f"`{r.type_name}`" if r.type_name else "", r.description) for r in parsed.many_returns]
    if parsed.raises:
        yield "Raises", [item(f"`{r.type_name}`", r.description) for r in parsed.raises]


def item(name: str, text: str | None) -> str:
    words = markdown(" ".join((text or "").split()))
    return f"- {name}: {words}" if name and words else f"- {name}{words}"


def markdown(text: str) -> str:
    """Prose as Markdown: a header of a docstring is no header of the page, and roles become code."""
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^(#+ )", r"\\\1", text, flags=re.MULTILINE)
    text = re.sub(r"^([=-]{3,})$", "", text, flags=re.MULTILINE)
    return prose(text)


def prose(text: str) -> str:
    """Escape what Markdown would read as markup in a formula, outside code spans and indented formulas."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("    "):
            lines.append(line)
            continue
        pieces = re.split(r"(`[^`]*`)", line)
        pieces[::2] = [re.sub(r"([\[\]<>$|])", r"\\\1", piece) for piece in pieces[::2]]
        lines.append("".join(pieces))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- command line


def command_line() -> Iterator[str]:
    """What `lowvar --help` and each command's --help print; a sentence where the command cannot be run."""
    whole = shown("--help")
    if whole is None:
        yield "The command `lowvar` does not run in the environment that built this page.\n"
        return
    yield f"```text\n{whole}\n```\n"
    for name in COMMANDS:
        text = shown(name, "--help")
        if text is not None:
            yield f"## `lowvar {name}`\n\n```text\n{text}\n```\n"


def shown(*arguments: str) -> str | None:
    command = [sys.executable, "-c", "import sys; from lowvar.cli import main; sys.exit(main())", *arguments]
    settings = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False, stdin=subprocess.DEVNULL)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace("usage: -c", "usage: lowvar")
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) if done.returncode == 0 and text else None


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write(here / "_generated", here.parent / "src")
