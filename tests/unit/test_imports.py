"""Which part may import which: arrows point down, and no two modules import each other.

Read from the sources, so that imports inside functions count too. Those under TYPE_CHECKING do
not: they never run. Modules that gptj.extras imports when they are used are no arrows either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "gptj": ROOT / "platform/gptj",
    "gptj_bench": ROOT / "platform/gptj_bench",
    "gptj_cli": ROOT / "platform/gptj_cli",
    "gptj_local": ROOT / "platform/gptj_local",
    "deployments": ROOT / "deployments",
    "jobs": ROOT / "jobs",
}

# From the bottom up: each line may import its own and those above it, but not beside it.
LAYERS = [
    "gptj.errors gptj.extras",
    "gptj.devices gptj.kv_cache gptj.linear_cross_entropy "
    "gptj.live_bytes gptj.sampling gptj.varlen_attention",
    "gptj.outputs gptj.serialization gptj.storage",
    "gptj.checkpoints",
    "gptj.adapters",
    "gptj.config gptj.int4 gptj.tokenizer",
    "gptj.chat gptj.generation gptj.resizing gptj.saving gptj.weight_loading",
    "gptj.pretrained",
    "gptj.model",
    "gptj",  # its names for users
    "gptj.workers",
    "gptj.data gptj.engine gptj.interop gptj_local",
    "gptj.quantization gptj.serving gptj.training",
    "deployments",
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


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a module's statements but those under `if TYPE_CHECKING`."""
    below = [tree]
    while below:
        for node in ast.iter_child_nodes(below.pop()):
            if isinstance(node, ast.expr):
                continue  # holds no statements
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                yield from node.orelse
                below += node.orelse
            else:
                yield node
                below.append(node)


def imported(node: ast.AST, modules: set[str]) -> set[str]:
    """Which of the modules a statement imports: `from gptj import storage` is gptj.storage."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.module is not None and node.level == 0, "imports are absolute"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else node.module for name in whole]
    else:
        return set()
    return {name for name in names if name in modules}


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    return {name for node in statements(tree) for name in imported(node, modules)}


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@pytest.fixture(scope="module")
def arrows(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    return {name: imports(tree, set(MODULES)) for name, tree in trees.items()}


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
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_no_function_imports_a_module_of_ours(trees: dict[str, ast.AST]) -> None:
    found = [
        f"{module} line {node.lineno}"
        for module, tree in trees.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and imported(node, set(MODULES))
    ]
    assert found == []


def test_the_library_needs_no_ray_and_no_transformers(trees: dict[str, ast.AST]) -> None:
    found = [
        f"{module} imports {name}"
        for module, tree in trees.items()
        if module.partition(".")[0] == "gptj"
        for node in ast.walk(tree)
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
    )
    modules = {"gptj", "gptj.storage", "gptj.model", "gptj.engine", "gptj.data", "gptj.config"}
    assert imports(ast.parse(source), modules) == modules - {"gptj", "gptj.engine"}
