"""Which part may import which: arrows point down, and no two modules or packages import each other.

Read from the sources, so that imports inside functions and under TYPE_CHECKING count too, as do
modules that gptj.environment.extras imports when they are used.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "gptj": ROOT / "platform/gptj",
    "gptj_bench": ROOT / "platform/gptj_bench",
    "gptj_cli": ROOT / "platform/gptj_cli",
    "gptj_jobs": ROOT / "platform/gptj_jobs",
    "gptj_local": ROOT / "platform/gptj_local",
    "deployments": ROOT / "deployments",
    "jobs": ROOT / "jobs",
}

# From the bottom up: each line may import its own and those above it, but not beside it.
LAYERS = [
    "gptj.environment gptj.errors",
    "gptj.kv_cache gptj.sampling gptj.serialization gptj.storage",
    "gptj.checkpoints gptj.outputs",
    "gptj.adapters",
    "gptj.config gptj.layers gptj.tokenizer",
    "gptj.chat gptj.generation gptj.pretrained",
    "gptj.model",
    "gptj",  # its names for users
    "gptj.workers",
    "gptj.data gptj.engine gptj.interop gptj_local",
    "gptj.quantization gptj.serving gptj.training",
    "deployments",
    "gptj_jobs",
    "jobs",
    "gptj_bench gptj_cli",
]
HEIGHT = {part: height for height, line in enumerate(LAYERS) for part in line.split()}


def module_of(path: Path, package: str) -> str:
    parts = [package, *path.relative_to(SOURCES[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path, package): path
    for package, folder in SOURCES.items()
    for path in folder.rglob("*.py")
}


def part_of(module: str) -> str:
    """The part that a module belongs to: of the library, its package or file."""
    first, *rest = module.split(".")
    return f"gptj.{rest[0]}" if first == "gptj" and rest else first


Found = list[tuple[ast.AST, bool]]  # nodes that may import, and whether a function holds them


def imported(node: ast.AST, modules: set[str]) -> set[str]:
    """Which of the modules a node imports: `from gptj import storage` is gptj.storage."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.module is not None and node.level == 0, "imports are absolute"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else node.module for name in whole]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Extra":
        names = [str(ast.literal_eval(node.args[0]))]
    else:
        return set()
    return {name for name in names if name in modules}


def imports(nodes: Found, modules: set[str]) -> set[str]:
    return {name for node, _ in nodes for name in imported(node, modules)}


def siblings(module: str, other: str) -> tuple[str, str] | None:
    """The two names where the paths of two modules part; None if one's package holds the other."""
    one, two = module.split("."), other.split(".")
    for depth, (a, b) in enumerate(zip(one, two, strict=False), start=1):
        if a != b:
            return ".".join(one[:depth]), ".".join(two[:depth])
    return None


def fail_on_circles(arrows: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def importing(tree: ast.AST, in_function: bool = False) -> Found:
    """What `imported` reads, in a tree."""
    found: Found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            found.append((node, in_function))
        if isinstance(node, ast.stmt | ast.expr | ast.excepthandler | ast.match_case | ast.keyword):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            found += importing(node, in_function or inside)
    return found


@pytest.fixture(scope="module")
def nodes() -> dict[str, Found]:
    return {name: importing(ast.parse(path.read_text())) for name, path in MODULES.items()}


@pytest.fixture(scope="module")
def arrows(nodes: dict[str, Found]) -> dict[str, set[str]]:
    return {name: imports(found, set(MODULES)) for name, found in nodes.items()}


def test_every_part_has_a_layer(arrows: dict[str, set[str]]) -> None:
    assert {part_of(module) for module in MODULES} == set(HEIGHT)


def test_imports_only_point_down(arrows: dict[str, set[str]]) -> None:
    wrong = sorted(
        f"{module} imports {other}"
        for module, others in arrows.items()
        for other in others
        if part_of(module) != part_of(other) and HEIGHT[part_of(module)] <= HEIGHT[part_of(other)]
    )
    assert wrong == []


def test_no_modules_import_each_other(arrows: dict[str, set[str]]) -> None:
    fail_on_circles(arrows)


def test_no_packages_import_each_other(arrows: dict[str, set[str]]) -> None:
    """At each level: gptj.serving.chat and .completions, like gptj.engine and gptj.training."""
    found: dict[str, set[str]] = {}
    for module, others in arrows.items():
        for pair in filter(None, (siblings(module, other) for other in others)):
            found.setdefault(pair[0], set()).add(pair[1])
    fail_on_circles(found)


def test_no_function_imports_a_module_of_ours(nodes: dict[str, Found]) -> None:
    found = [
        f"{module} line {node.lineno}"
        for module, nodes_of_module in nodes.items()
        for node, in_function in nodes_of_module
        if in_function and isinstance(node, ast.Import | ast.ImportFrom)
        if imported(node, set(MODULES))
    ]
    assert found == []


def test_the_library_needs_no_ray_and_no_transformers(nodes: dict[str, Found]) -> None:
    found = [
        f"{module} imports {name}"
        for module, nodes_of_module in nodes.items()
        if module.partition(".")[0] == "gptj"
        for node, _ in nodes_of_module
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.partition(".")[0] in ("ray", "transformers", "deployments", "jobs")
    ]
    assert found == []


def test_nested_imports_are_found() -> None:
    source = (
        "from gptj import storage\n"
        "from gptj.model import GPTJModel\n"
        "if TYPE_CHECKING:\n    import gptj.engine\nelse:\n    import gptj.data\n"
        "def f():\n    import gptj.config\n"
        "chat, ray = Extra('gptj.chat', 'a test'), Extra('ray', 'a test')\n"
    )
    names = ("storage", "model", "engine", "data", "config", "chat")
    modules = {"gptj", *(f"gptj.{name}" for name in names)}
    found = importing(ast.parse(source))
    assert imports(found, modules) == modules - {"gptj"}
    assert [node.lineno for node, in_function in found if in_function] == [8]  # type: ignore[attr-defined]


def test_siblings_are_where_paths_part() -> None:
    assert siblings("gptj.serving.chat.service", "gptj.serving.app") == (
        "gptj.serving.chat",
        "gptj.serving.app",
    )
    assert siblings("gptj.data", "gptj.data.rows") is None
