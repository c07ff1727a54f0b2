"""Rules of the house, read off the source with `ast`: nothing is imported, so a broken module is still judged.

Each rule is a function from a module to the places that break it. Two tests a rule: the package keeps it, and planted
violations are caught (a rule that cannot fail holds nothing).
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

GROUND = ("errors",)  # what a user is told; for every floor but `process`, which raises ValueError
FLOORS = (
    ("process",),
    ("data", "metrics", "models"),
    ("calibrate", "sample", "gradients"),
    ("train", "expect", "reward"),
    ("profile", "report", "schedulers", "testing", "own_pipelines"),
    ("pipeline_folders",),  # model folders opened as data; needs the scheduler class
    ("pipelines", "adapters"),  # their networks as denoisers, and models of other code bases
    ("evaluation",),  # runs samplers and peers on an opened model and scores them
    ("cli",),
)
FLOOR = {name: level for level, names in enumerate((GROUND, *FLOORS)) for name in names}
# On floor 4 a package may use another's public names, except between these two; never in a circle (tested below).
NEIGHBOURS = frozenset(FLOORS[3])
STRANGERS = frozenset({"reward", "expect"})


@dataclass(frozen=True)
class Module:
    """A source file of the package under its dotted name, `lowvar.process.noise`."""

    name: str
    tree: ast.Module
    is_package: bool = False

    @property
    def part(self) -> str:
        """The package on a floor that it belongs to; empty for `lowvar` itself."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def is_public(self) -> bool:
        return not any(piece.startswith("_") for piece in self.name.split("."))


def package() -> list[Module]:
    modules = []
    for file in sorted(SRC.glob("lowvar/**/*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, ast.parse(file.read_text(), str(file)), is_package))
    return modules


def planted(name: str, source: str) -> Module:
    return Module(name, ast.parse(source))


# ---------------------------------------------------------------------------------------------------- reading a module


def imports(module: Module) -> Iterator[tuple[int, str, str | None]]:
    """Every import, wherever it stands: line, absolute dotted module, imported name or None."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                pieces = module.name.split(".")
                keep = len(pieces) - node.level + module.is_package
                base = ".".join([*pieces[:keep], *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, base, alias.name
        elif isinstance(node, ast.Call) and dotted(node.func, {}).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield node.lineno, target.value, None


def own_imports(module: Module) -> Iterator[tuple[int, str, str]]:
    """Imports of this package: line, package on a floor, what was taken from it (the dotted rest)."""
    for line, base, name in imports(module):
        path = base.split(".") + ([name] if name else [])
        if path[0] != "lowvar" or path == ["lowvar"]:
            continue
        if path[1] not in FLOOR and base == "lowvar" and name in ("__version__",):
            continue
        yield line, path[1], ".".join(path[2:])


def aliases(module: Module) -> dict[str, str]:
    """Local name -> dotted origin, for every import in the module."""
    names: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`th.randn` -> `torch.randn`, given `import torch as th`; a leading `.` where the object is not a plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    names = aliases(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func, names)


# ------------------------------------------------------------------------------------------------------------ the rules

Rule = Callable[[Module], list[str]]


def floors(module: Module) -> list[str]:
    """A module imports its own package and lower floors only."""
    broken = []
    if module.part and module.part not in FLOOR:
        return [f"{module.name}: {module.part} stands on no floor; give it one in tests/test_house.py"]
    for line, target, rest in own_imports(module):
        where = f"{module.name}:{line}: imports lowvar.{target}"
        if target not in FLOOR:
            broken.append(f"{where}, which stands on no floor")
        elif not module.part:
            broken.append(f"{where}, but lowvar itself imports nothing of the package")
        elif target == module.part or FLOOR[target] < FLOOR[module.part]:
            continue
        elif {target, module.part} <= NEIGHBOURS and {target, module.part} != STRANGERS:
            if any(piece.startswith("_") for piece in rest.split(".")):
                broken.append(f"{where}.{rest}, a private name of another package")
        else:
            broken.append(f"{where}, which is not on a lower floor")
    return broken


def process_is_plain(module: Module) -> list[str]:
    """`process` is torch and the standard library, nothing else of the package, and neither opens nor writes a file."""
    if module.part != "process":
        return []
    allowed = {*sys.stdlib_module_names, "torch", "lowvar"} - {"pathlib", "io", "shutil", "tempfile", "os"}
    broken = [
        f"{module.name}:{line}: process imports {base}: it is torch only, without input or output"
        for line, base, _ in imports(module)
        if base.split(".")[0] not in allowed
    ]
    broken += [
        f"{module.name}:{line}: process imports lowvar.{target}"
        for line, target, _ in own_imports(module)
        if target != "process"
    ]
    return broken + [f"{module.name}:{c.lineno}: process opens a file" for c, name in calls(module) if name == "open"]


TORCH_DRAWS = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like normal multinomial bernoulli poisson".split()
)
IN_PLACE_DRAWS = frozenset(
    "normal_ uniform_ random_ bernoulli_ exponential_ cauchy_ log_normal_ geometric_ kaiming_normal_ kaiming_uniform_ "
    "xavier_normal_ xavier_uniform_ trunc_normal_ orthogonal_".split()
)
# Objects that carry a seed and are handed about are noise as an argument; without a seed they are not.
SEEDED = frozenset("default_rng Generator SeedSequence PCG64 Philox RandomState Random".split())


def no_bare_draw(module: Module) -> list[str]:
    """Noise is an argument: nobody draws from torch's, NumPy's or Python's own generators outside process/noise.py."""
    if module.name == "lowvar.process.noise":
        return []
    broken = []
    for call, name in calls(module):
        head, _, last = name.rpartition(".")
        bare = (
            (head in ("torch", "torch.functional") and last in TORCH_DRAWS)
            or (last in IN_PLACE_DRAWS and isinstance(call.func, ast.Attribute | ast.Name))
            or (head in ("numpy.random", "random") and last not in SEEDED and last != "seed")
            or (head in ("numpy.random", "random") and last in SEEDED and not call.args and not call.keywords)
        )
        if bare:
            broken.append(f"{module.name}:{call.lineno}: {name.lstrip('.')} draws outside process/noise.py")
    return broken


def documented(module: Module) -> list[str]:
    """A public module says what it is and what it offers."""
    if not module.is_public:
        return []
    broken = [] if ast.get_docstring(module.tree) else [f"{module.name}: no docstring"]
    offers = any(
        isinstance(target, ast.Name) and target.id == "__all__"
        for node in module.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )
    return broken if offers else [*broken, f"{module.name}: no __all__"]


def no_pickle(module: Module) -> list[str]:
    """Nothing that is loaded can run code."""
    broken = []
    for call, name in calls(module):
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        head, _, last = name.rpartition(".")
        unsafe = (
            (head in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib") and last in ("load", "loads"))
            or (last == "Unpickler")
            or (name in ("torch.load", "torch.serialization.load") and given.get("weights_only") is not True)
            or (name == "numpy.load" and given.get("allow_pickle", False) is not False)
            or (name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"))
        )
        if unsafe:
            broken.append(f"{module.name}:{call.lineno}: {name} may run what it loads")
    return broken


def no_stub(module: Module) -> list[str]:
    """Abstract methods say so with `abc`; nothing else is left open."""
    return [
        f"{module.name}:{node.lineno}: raises NotImplementedError"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.dump(node.exc)
    ]


RULES: tuple[Rule, ...] = (floors, process_is_plain, no_bare_draw, documented, no_pickle, no_stub)

PLANTED: list[tuple[Rule, str, str]] = [
    (floors, "lowvar.process.kernel", "from lowvar.sample import generate"),
    (floors, "lowvar.process.kernel", "from ..sample import generate"),
    (floors, "lowvar.process.kernel", "from lowvar import data"),
    (floors, "lowvar.process.kernel", "def f():\n    import lowvar.calibrate.mmse as m"),
    (floors, "lowvar.process.kernel", "import importlib\nimportlib.import_module('lowvar.cli')"),
    (floors, "lowvar.process.kernel", "from lowvar.gpu import fast"),
    (floors, "lowvar.calibrate.mmse", "from lowvar.sample import generate"),
    (floors, "lowvar.metrics.frechet", "from lowvar.data import digits"),
    (floors, "lowvar.report.html", "from lowvar.schedulers import ReverseVarianceScheduler"),
    (floors, "lowvar.reward.loop", "from lowvar.expect import designs"),
    (floors, "lowvar.expect.loop", "from lowvar.reward.loop import tune"),
    (floors, "lowvar.reward.loop", "from lowvar.train.loop import _step"),
    (floors, "lowvar.gpu.fast", "import torch"),
    (floors, "lowvar", "from lowvar.process import noise"),
    (floors, "lowvar.errors", "from lowvar.process import noise"),
    (process_is_plain, "lowvar.process.twin", "import safetensors.torch"),
    (process_is_plain, "lowvar.process.twin", "from pathlib import Path"),
    (process_is_plain, "lowvar.process.twin", "open('x')"),
    (process_is_plain, "lowvar.process.twin", "from lowvar.errors import UserError"),
    (no_bare_draw, "lowvar.sample.loop", "import torch\nz = torch.randn(3)"),
    (no_bare_draw, "lowvar.sample.loop", "import torch as th\nz = th.randn_like(x)"),
    (no_bare_draw, "lowvar.testing.mixture", "from torch import randint as r\nr(3, (2,))"),
    (no_bare_draw, "lowvar.sample.loop", "import torch\nz = torch.empty(3).normal_()"),
    (no_bare_draw, "lowvar.sample.loop", "from torch import nn\nnn.init.normal_(w)"),
    (no_bare_draw, "lowvar.data.digits", "import numpy as np\nnp.random.permutation(3)"),
    (no_bare_draw, "lowvar.data.digits", "import numpy as np\nnp.random.default_rng()"),
    (no_bare_draw, "lowvar.data.digits", "import random\nrandom.shuffle(x)"),
    (documented, "lowvar.sample.loop", "__all__ = []"),
    (documented, "lowvar.sample.loop", '"""Words."""'),
    (no_pickle, "lowvar.train.loop", "import torch\ntorch.load('x')"),
    (no_pickle, "lowvar.train.loop", "import torch\ntorch.load('x', weights_only=False)"),
    (no_pickle, "lowvar.train.loop", "from pickle import load\nload(f)"),
    (no_pickle, "lowvar.train.loop", "import joblib\njoblib.load(f)"),
    (no_pickle, "lowvar.data.table", "import numpy as np\nnp.load(f, allow_pickle=True)"),
    (no_pickle, "lowvar.cli.config", "import yaml\nyaml.load(f, Loader=yaml.Loader)"),
    (no_stub, "lowvar.sample.loop", "def f():\n    raise NotImplementedError('later')"),
    (no_stub, "lowvar.sample.loop", "def f():\n    raise NotImplementedError"),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (floors, "lowvar.sample.loop", "from lowvar.process.noise import NoiseSource\nfrom lowvar import __version__"),
    (floors, "lowvar.sample.loop", "from lowvar.sample.state import State"),
    (floors, "lowvar.data.digits", "from lowvar.errors import UserError"),
    (floors, "lowvar.reward.loop", "from lowvar.train.loop import train"),
    (floors, "lowvar.cli.main", "import lowvar.report\nimport lowvar.testing"),
    (process_is_plain, "lowvar.process.twin", "import math\nimport torch\nfrom lowvar.process import noise"),
    (process_is_plain, "lowvar.data.digits", "from pathlib import Path"),
    (no_bare_draw, "lowvar.process.noise", "import torch\ntorch.randn(3)"),
    (no_bare_draw, "lowvar.data.digits", "import numpy as np\nnp.random.default_rng(0).permutation(3)"),
    (no_bare_draw, "lowvar.sample.loop", "source.normal(3)\nkernel.sample(z)"),
    (documented, "lowvar.sample._step", "x = 1"),
    (no_pickle, "lowvar.train.loop", "import torch\ntorch.load('x', weights_only=True)"),
    (no_pickle, "lowvar.cli.config", "import json, yaml\njson.load(f)\nyaml.safe_load(f)"),
    (no_stub, "lowvar.sample.loop", "def f():\n    raise ValueError"),
]


def _id(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("rule", RULES, ids=_id)
def test_package_keeps_rule(rule: Rule) -> None:
    broken = [line for module in package() for line in rule(module)]
    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize(("rule", "name", "source"), PLANTED, ids=_id)
def test_rule_catches(rule: Rule, name: str, source: str) -> None:
    assert rule(planted(name, source))


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED, ids=_id)
def test_rule_allows(rule: Rule, name: str, source: str) -> None:
    assert rule(planted(name, source)) == []


def test_every_rule_is_planted() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES) == {rule for rule, _, _ in ALLOWED}


def _circles(modules: list[Module]) -> list[str]:
    """Pairs of packages on floor 4 that import each other."""
    edges = {(m.part, target) for m in modules for _, target, _ in own_imports(m) if m.part in NEIGHBOURS & {m.part}}
    return sorted(f"{a} and {b} import each other" for a, b in edges if a < b and b in NEIGHBOURS and (b, a) in edges)


def test_neighbours_import_one_way() -> None:
    there = planted("lowvar.reward.loop", "from lowvar.train import fit")
    back = planted("lowvar.train.loop", "from lowvar.reward import advantage")
    assert _circles([there, back]) == ["reward and train import each other"]
    assert _circles([there]) == []
    assert _circles(package()) == []


# ------------------------------------------------------------------------------------------------------------ start-up


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["lowvar", "lowvar.cli"])
def test_import_is_light(name: str) -> None:
    heavy = "torch", "diffusers", "scipy", "sklearn", "matplotlib"
    done = _python(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", f"import {name} loads {done.stdout or done.stderr}"


def test_help_is_quick() -> None:
    """`lowvar --help` within half a second of processor time, which other programs on the machine do not change."""
    command = Path(sys.executable).with_name("lowvar")
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
        after = os.times()
        assert done.returncode == 0, done.stderr
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(used)
    assert min(seconds) < 0.5, f"lowvar --help takes {min(seconds):.2f} s"


def test_unknown_attribute_names_the_known() -> None:
    import lowvar

    with pytest.raises(AttributeError, match=r"it has .*process"):
        _ = lowvar.proces
