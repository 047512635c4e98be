"""The house stands as the README draws it: imports point one way, and the library loads no other framework."""

import ast
import pathlib
import subprocess
import sys

import pytest

import levattn

ROOT = pathlib.Path(levattn.__file__).parent
# Each package may import itself and those in its list.
ALLOWED = {
    "core": set(),
    "universal": {"core"},
    "kernels": {"core"},
    "attention": {"core", "universal", "kernels"},
    "bench": {"core", "universal", "kernels", "attention", "models", "data", "training"},
    "models": {"core", "universal", "kernels", "attention"},
    "data": set(),
    "training": {"core", "universal", "kernels", "attention", "models", "data"},
    "analysis": {"core", "universal", "kernels", "attention", "models", "data", "training"},
}


def _imported_packages(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("levattn.")}
    return found & set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        extra = _imported_packages(path) - ALLOWED[package] - {package}
        assert not extra, f"{path.relative_to(ROOT)} must not import {extra}"


def test_every_package_is_in_the_picture():
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(ALLOWED)


def test_importing_the_library_loads_neither_tensorflow_nor_torch():
    code = (
        "import sys, levattn, levattn.models, levattn.data, levattn.training, levattn.analysis\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'torch'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_entry_points_stay_short(script):
    assert len((ROOT.parent / script).read_text().splitlines()) <= 60
