"""Write the map in docs/architecture.md from the modules' imports and docstrings.

python scripts/architecture.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "src" / "sphere_rl", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: written by scripts/architecture.py -->", "<!-- end of the map -->"
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))
LAYERS = [
    ["errors", "extras", "kernels", "measuring", "numbers", "penalty", "plugins", "seeding", "statistics"],
    ["conversion", "correlations"],
    ["experts", "runs", "runtime", "suites"],
    ["learner", "spectrum"],
    ["integrations", "methods"],
    ["config", "labels", "settings"],
    ["training"],
    ["protocol", "results"],
    ["terminal"],
    ["report", "sweep"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
"""From the ground up; a part of the package imports those below and those beside it, never in a circle."""


def module_of(name: str) -> str:
    """The module that a path of names lies in; empty where that is the package itself."""
    while name and name not in MODULES:
        if f"{name}/__init__" in MODULES:
            return f"{name}/__init__"
        name = name.rpartition("/")[0]
    return name


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere, those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sphere_rl":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sphere_rl.")}
    return {module_of("/".join(name.split(".")[1:])) for name in found} - {"", module}


def part(module: str) -> str:
    """The top-level package or module that a module is part of."""
    return module.split("/")[0]


def imports() -> dict[str, set[str]]:
    """What each module imports; the package itself, which only forwards names, left out."""
    return {module: imports_of(module) for module in MODULES if module != "__init__"}


def of_parts(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same of whole parts."""
    parts: dict[str, set[str]] = {}
    for module, found in modules.items():
        parts.setdefault(part(module), set()).update({part(name) for name in found} - {part(module)})
    return parts


def sentence(module: str) -> str:
    """What a module says of itself, up to the first full stop."""
    text = " ".join((ast.get_docstring(ast.parse((SOURCE / f"{module}.py").read_text())) or "").split())
    return re.split(r"(?<! al)\. ", text)[0].rstrip(".")


def drawn() -> str:
    """The map: parts from the top to the ground, each with what it imports and its modules."""
    graph, lines = of_parts(imports()), []
    for layer in reversed(LAYERS):
        for name in layer:
            inside = [module for module in MODULES if part(module) == name]
            home = f"{name}/__init__" if f"{name}/__init__" in inside else name
            below = ", ".join(f"`{other}`" for other in sorted(graph[name])) or "nothing of the package"
            lines += [f"**`{name}`**: {sentence(home)}. Imports {below}.", ""]
            rows = [module for module in inside if module != home]
            lines += [f"- `{module.removeprefix(f'{name}/')}`: {sentence(module)}" for module in rows]
            lines += [""] if rows else []
    return "\n".join(lines).rstrip()


def page(text: str) -> str:
    """The page with its map drawn anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{drawn()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
