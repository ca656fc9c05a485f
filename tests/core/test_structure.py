"""Who may import whom: em_core knows nothing of ComfyUI, and its folders stand in one order."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "em_core").rglob("*.py"))
OUTSIDE_COMFY = [*CORE, *sorted((ROOT / "benchmarks").rglob("*.py"))]
ALL = [*OUTSIDE_COMFY, *sorted((ROOT / "nodes").rglob("*.py"))]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution", "server"}

# Lowest first; a module imports from its own line and from those above it.
ORDER = (
    {"errors"},
    {"files"},
    {"prompts", "pictures"},
    {"masks"},
    {"examples"},
    {"settings", "presets"},
    {"model"},
    {"method"},
    {"runs"},
    {"exchange"},
    {"hosts"},
    {"show"},
    {"evaluate"},
    {"demo"},
    {"jobs"},
    {"__init__", "__main__", "commands"},
)
RANK = {part: i for i, parts in enumerate(ORDER) for part in parts}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> str:
    """Dotted name; that of a package for its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in CORE}


def part_of(module: str) -> str:
    """The file or folder directly under em_core that a module is or lies in."""
    return [*module.split("."), "__init__"][1]


def imported(file: Path) -> set[str]:
    """Top-level names of all absolute imports in a file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_module_level(child)


def modules_imported(module: str, nodes: Iterable[ast.AST]) -> set[str]:
    """The modules of em_core that these nodes of a module's code import."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found & MODULES.keys()


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def cycle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A way from a node back to itself, or nothing."""
    done: set[str] = set()

    def search(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in graph[node]:
            if cycle := search(following, [*way, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in graph if (cycle := search(node, []))), [])


@pytest.mark.parametrize("file", OUTSIDE_COMFY, ids=name_of)
def test_only_the_nodes_import_the_host(file: Path) -> None:
    assert not imported(file) & HOST


@pytest.mark.parametrize("file", ALL, ids=name_of)
def test_plain_ascii(file: Path) -> None:
    assert file.read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("file", CORE, ids=name_of)
def test_core_knows_only_itself_of_the_project(file: Path) -> None:
    assert not imported(file) & {"benchmarks", "tests"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_order(module: str) -> None:
    """Imports inside functions too."""
    part = part_of(module)
    found = modules_imported(module, ast.walk(tree_of(module)))
    wrong = {other for other in found if RANK[part_of(other)] > RANK[part]}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part_of(module) for module in MODULES} == RANK.keys()


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {m: modules_imported(m, at_module_level(tree_of(m))) for m in MODULES}
    assert not cycle_in(graph), " -> ".join(cycle_in(graph))


def test_the_search_sees_imports_and_circles() -> None:
    """What the two rules above rest on: relative imports of modules, packages and their names."""
    found = modules_imported(
        "em_core.method.joint", at_module_level(tree_of("em_core.method.joint"))
    )
    assert {"em_core.method.losses", "em_core.method.loop", "em_core.model.adapters"} <= found
    found = modules_imported("em_core.masks.crf", ast.walk(tree_of("em_core.masks.crf")))
    assert "em_core.masks.crf.refine" in found
    hidden = ast.parse("class A:\n    from . import loop\ndef f():\n    from . import joint")
    found = modules_imported("em_core.method.losses", at_module_level(hidden))
    assert found == {"em_core.method.loop"}
    assert cycle_in({"a": ["b", "c"], "b": [], "c": ["d"], "d": ["c"]}) == ["c", "d", "c"]
    assert cycle_in({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []


def test_the_library_needs_no_extra() -> None:
    """All that `import em_core` offers loads without diffusers, transformers or matplotlib."""
    code = (
        "import sys, em_core, em_core.method.joint; "
        "extras = {'diffusers', 'transformers', 'matplotlib', 'pydensecrf', 'scipy'}; "
        "sys.exit(', '.join(sorted(extras & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
