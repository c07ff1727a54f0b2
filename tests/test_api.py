"""The public API is what tests/api_snapshot.txt says: a change of it is made on purpose and reviewed.

`make api` writes the snapshot anew.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("api_snapshot.txt")


def public_modules(package: types.ModuleType) -> Iterator[types.ModuleType]:
    """The package and every module in it whose dotted name has no private piece, in alphabetical order."""
    yield package
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if info.ispkg:
            yield from public_modules(module)
        else:
            yield module


class _Plain:
    """Shows as the text it was made from: an annotation without quotes, a default without its address."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r" at 0x[0-9a-f]+", "", text)

    def __repr__(self) -> str:
        return self.text


def signature(value: Callable[..., object]) -> str:
    """The signature on one line, the same in every run."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"

    def plain(annotation: object) -> object:
        return _Plain(annotation) if isinstance(annotation, str) else annotation

    parameters = [
        p.replace(
            annotation=plain(p.annotation), default=p.default if p.default is p.empty else _Plain(repr(p.default))
        )
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=plain(found.return_annotation)))


def members(owner: type) -> Iterator[str]:
    """Public methods, properties and class attributes that the class itself defines."""
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, staticmethod | classmethod):
            yield f".{name}{signature(value.__func__)} [{type(value).__name__}]"
        elif isinstance(value, property):
            yield f".{name} [property]"
        elif inspect.isfunction(value):
            abstract = " [abstract]" if getattr(value, "__isabstractmethod__", False) else ""
            yield f".{name}{signature(value)}{abstract}"


def describe(module: types.ModuleType) -> Iterator[str]:
    yield module.__name__
    for name in sorted(module.__all__):
        value = getattr(module, name)
        home = getattr(value, "__module__", module.__name__)
        if inspect.ismodule(value):
            yield f"  {name} [module]"
        elif home != module.__name__ and isinstance(home, str) and home.startswith("lowvar."):
            yield f"  {name} <- {home}"
        elif inspect.isclass(value):
            bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
            yield f"  class {name}{f'[{bases}]' if bases else ''}{signature(value)}"
            yield from (f"    {line}" for line in members(value))
        elif callable(value):
            yield f"  {name}{signature(value)}"
        else:
            yield f"  {name}: {type(value).__name__}"


def snapshot() -> str:
    modules = public_modules(importlib.import_module("lowvar"))
    return "\n".join(line for module in modules for line in describe(module)) + "\n"


def difference(kept: str, now: str) -> str:
    lines = difflib.unified_diff(
        kept.splitlines(), now.splitlines(), "tests/api_snapshot.txt", "the code", lineterm="", n=1
    )
    return "\n".join(lines)


def test_api_is_as_reviewed() -> None:
    kept = SNAPSHOT.read_text() if SNAPSHOT.exists() else ""
    changed = difference(kept, snapshot())
    assert not changed, f"the public API has changed; if that is meant, run `make api` and commit the result\n{changed}"


def test_a_change_is_seen() -> None:
    """A new parameter, a lost method and a new name each show in the snapshot."""

    def planted(source: str) -> str:
        module = types.ModuleType("lowvar.planted")
        exec(source, module.__dict__)
        return "\n".join(describe(module))

    first = planted("__all__ = ['A', 'f']\nclass A:\n    def m(self): ...\ndef f(x, n=1): ...")
    assert "class A" in first
    assert ".m(self)" in first
    assert "f(x, n=1)" in first
    for other in (
        "__all__ = ['A', 'f']\nclass A:\n    def m(self): ...\ndef f(x, n=2): ...",
        "__all__ = ['A', 'f']\nclass A: ...\ndef f(x, n=1): ...",
        "__all__ = ['A', 'f', 'g']\nclass A:\n    def m(self): ...\ndef f(x, n=1): ...\ndef g(): ...",
    ):
        assert difference(first, planted(other))


if __name__ == "__main__":
    changed = difference(SNAPSHOT.read_text() if SNAPSHOT.exists() else "", snapshot())
    SNAPSHOT.write_text(snapshot())
    sys.stdout.write(f"{changed or 'the public API has not changed'}\n")
