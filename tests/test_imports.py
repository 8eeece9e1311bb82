"""The layer rule, and that importing nest_fast needs nothing but torch."""

import ast

import pytest

from helpers.common import ROOT, run_python

# What each layer may import of nest_fast; the picture in DESIGN.md.
ALLOWED = {
    "reference": set(),
    "weights": {"reference"},
    "testing": set(),
    "info": {"ops"},
    "tuning": {"ops", "testing"},
    "tune": {"__init__", "testing", "train", "tuning"},
    "ops": {"reference", "ops", "kernels"},
    "frozen": {"ops"},
    "fusion": {"frozen", "ops", "weights"},
    "modules": {"ops", "fusion"},
    "nest": {"ops", "fusion", "modules", "weights"},
    "explanation": {"frozen", "ops", "fusion", "modules"},
    "interpretation": {"ops"},
    "export": {"reference"},
    "integrations": {"ops", "fusion", "explanation", "testing", "integrations"},
    "train": {"__init__", "testing", "train"},
    "classify": {"__init__", "weights", "testing", "train"},
    "__init__": {
        *("reference", "weights", "ops", "frozen", "modules", "nest", "integrations", "interpretation", "export"),
        "tuning",
    },
    "kernels": {"kernels"},
}
# A name with an underscore is for its own layer. These are for others, too, but not what is private inside; and how a
# kernel cuts its work has tests of its own.
SHARED = {
    "frozen": {"ops._modes"},
    "fusion": {"ops._gelu_linear", "ops._layer", "ops._modes", "ops._tape"},
    "modules": {"ops._checks"},
    "nest": {"ops._checks"},
    "explanation": {"ops._plan"},
    "interpretation": {"ops._checks"},
    "info": {"ops._extension", "ops._gpu", "ops._tuned"},
    "ops": {"kernels._launch", "kernels._search"},
    "tuning": {"ops._tuned"},
    "tests": {
        *("ops._backends", "ops._extension", "ops._gpu", "ops._layer_norm", "ops._modes", "ops._tuned", "kernels.*"),
        *("ops._tape", "ops._windows"),
        *("classify._free_memory", "fusion._operation", "interpretation._walk"),
    },
    "benchmarks": {
        *("ops._extension", "kernels._configs", "kernels._launch", "kernels._layer_configs", "kernels._primitives"),
    },
    "scripts": {"kernels._configs", "kernels._launch", "kernels._mlp_gradients", "kernels._wide_mlp"},
}
SOURCES = [*(ROOT / "nest_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
OUTSIDE = [path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]


def layer_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "nest_fast" else parts[0]


def imported(tree):
    """What a module imports of nest_fast, at its top or inside a function: ``ops.linear`` for nest_fast.ops.linear."""
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
            package, _, rest = name.partition(".")
            assert package != "kernels", "kernels are imported as nest_fast.kernels"
            if package == "nest_fast":
                yield rest or "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    layers = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert layers <= ALLOWED[layer_of(path)]


def taken(tree):
    """What a module imports of nest_fast, and the attributes that it takes of what it imported."""
    yield from imported(tree)
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] == "nest_fast":
            prefix = node.module.partition(".")[2]
            aliases |= {alias.asname or alias.name: f"{prefix}.{alias.name}".lstrip(".") for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}"


def is_private(name):
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def is_in(name, shared):
    if shared.endswith(".*"):
        return name.startswith(shared[:-1])
    return name == shared or (name.startswith(f"{shared}.") and not is_private(name[len(shared) :]))


@pytest.mark.parametrize("layer", sorted({layer_of(path) for path in SOURCES + OUTSIDE}))
def test_private_names_stay_in_their_layer(layer):
    paths = [path for path in SOURCES + OUTSIDE if layer_of(path) == layer]
    names = {name for path in paths for name in taken(ast.parse(path.read_text()))}
    private = {name for name in names if name.partition(".")[0] != layer and is_private(name)}
    shared = SHARED.get(layer, set())
    assert {name for name in private if not any(is_in(name, one) for one in shared)} == set()
    assert {one for one in shared if not any(is_in(name, one) for name in private)} == set(), "nobody takes it any more"


def test_kernels_know_no_modules_autograd_or_registration():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for word in ("torch.nn", "torch.autograd", "torch.library"):
            assert word not in text, f"{path.name} uses {word}"


def test_of_many_blocks_no_grid_is_on_y():
    """Nor on z: they end at 65,535 programs, x at 2^31. Kernels are launched in _launch alone."""
    grids = []
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert not isinstance(node.func, ast.Subscript), f"{path.name}, line {node.lineno}"
                grids += [(path.name, ast.unparse(word.value)) for word in node.keywords if word.arg == "grid"]
    assert grids == [("_launch.py", "(programs,)")] * 2


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
images = torch.randn(2, 3, 16, 16)
assert model(images).shape == (2, 3)
model.eval()
with torch.no_grad():
    assert torch.equal(model(images), model(images))
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
        "processor", "GPU", "extension, CPU", "extension, CUDA", "Triton kernels", "tuned choices",
    ]  # fmt: skip
    assert not any("failed:" in line for line in lines)


def test_every_operation_says_what_its_gradient_is():
    """One that does not, a backward most likely, would make gradients of gradients wrong, with a warning at most."""
    code = """
import torch, nest_fast
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nest_fast::")]
assert len(names) > 20, names
without = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")]
others = {"cpp_isa", "cpp_set_isa", "cuda_why_not", "peak_move", "peak_multiply"}
assert {name.partition("::")[2] for name in without} <= others, without
"""
    run_python("-c", code)
