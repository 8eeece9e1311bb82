"""The layer rule, and that importing nest_fast needs nothing but torch."""

import ast

import pytest
from common import ROOT, run_python

# What each module of nest_fast may import of nest_fast.
ALLOWED = {
    "reference": set(),
    "weights": {"reference"},
    "testing": set(),
    "info": {"ops"},
    "ops": {"reference", "ops", "kernels"},
    "fusion": {"ops", "weights"},
    "modules": {"ops", "fusion"},
    "nest": {"ops", "fusion", "modules", "weights"},
    "explanation": {"ops", "fusion", "modules"},
    "interpretation": {"ops"},
    "export": {"reference"},
    "integrations": {"ops", "fusion", "explanation", "integrations"},
    "__init__": {"reference", "weights", "ops", "modules", "nest", "integrations", "interpretation", "export"},
    "kernels": {"kernels"},
}
SOURCES = [*(ROOT / "nest_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def layer_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported(tree):
    """Every ``nest_fast.x`` that a module imports, at its top or inside a function."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, "an import from the package above hides the layer"
            if node.level == 1:
                continue  # a neighbour, in the same layer
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            assert package != "kernels", "kernels are imported as nest_fast.kernels"
            if package == "nest_fast":
                yield rest[0] if rest else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert set(imported(ast.parse(path.read_text()))) <= ALLOWED[layer_of(path)]


def test_kernels_know_no_modules_autograd_or_registration():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for word in ("torch.nn", "torch.autograd", "torch.library"):
            assert word not in text, f"{path.name} uses {word}"


def test_import_needs_only_torch():
    """In a fresh interpreter without triton, timm, numpy or the compiled parts: no CUDA, no compiler, and it works."""
    code = """
import subprocess, sys
for name in ("triton", "timm", "numpy", "torchvision"):
    sys.modules[name] = None
import torch
def no_process(*args, **kwargs):
    raise AssertionError("a process was started")
subprocess.Popen.__init__ = no_process
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("blocked for the test"))
import nest_fast
from nest_fast.ops import _extension
assert "blocked for the test" in _extension.cpu_error or "not built" in _extension.cpu_error
assert not torch.cuda.is_initialized()
model = nest_fast.NesT(img_size=16, num_levels=2, patch_size=2, embed_dims=32, num_heads=1, depths=1, num_classes=3)
assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
try:
    nest_fast.block_attention(*torch.randn(3, 1, 1, 4, 1, 32), impl="cpp")
except RuntimeError as error:
    assert "cannot run block_attention here" in str(error), error
else:
    raise AssertionError("impl='cpp' ran without the extension")
"""
    run_python("-c", code)


def test_info_prints_what_loaded():
    lines = run_python("-m", "nest_fast.info").splitlines()
    names = [line[:16].strip() for line in lines]
    assert names == [
        "python", "nest_fast", "torch", "triton", "timm", "numpy",
        "processor", "GPU", "extension, CPU", "extension, CUDA", "Triton kernels",
    ]  # fmt: skip
    assert not any("failed:" in line for line in lines)


def test_every_operation_says_what_its_gradient_is():
    """One that does not, a backward most likely, would make gradients of gradients wrong, with a warning at most."""
    code = """
import torch, nest_fast
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nest_fast::")]
assert len(names) > 20, names
without = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")]
assert set(without) <= {"nest_fast::cpp_isa", "nest_fast::cpp_set_isa"}, without
"""
    run_python("-c", code)
