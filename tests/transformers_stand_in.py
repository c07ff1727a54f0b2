"""Puts empty classes in the place of the package transformers where it is not installed.

diffusers' latent pipelines need it to be imported, and nothing of it to run when the prompts' embeddings are given. To
be run before diffusers is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from typing import Any


class Nothing(types.ModuleType):
    """A module of which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name.lower() if name.isupper() else type(name, (), {})


class Distribution(importlib.metadata.Distribution):
    """A version that diffusers is content with."""

    def read_text(self, filename: str) -> str | None:
        return "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


class Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """Finds transformers, tokenizers and everything below them."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        ours = fullname.split(".")[0] in ("transformers", "tokenizers")
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def find_distributions(self, context: Any = None) -> Any:
        return [Distribution()] if context is not None and context.name == "transformers" else []

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Nothing(spec.name)
        module.__dict__.update(__version__="4.57.0", __path__=[])
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


if importlib.util.find_spec("transformers") is None:
    sys.meta_path.insert(0, Finder())
