"""Which test shows which property of which operation: the tables of tests/README.md, from the names of the tests.

``python tests/helpers/matrix.py`` writes them anew; test_matrix.py fails where they are not those of the tests.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
README = TESTS / "README.md"
START, END = "<!-- from here on by tests/helpers/matrix.py -->\n", "<!-- up to here -->\n"

# An operation, and the files that are about it alone; norm_pool is a step of block_aggregate with kernels of its own.
OPERATIONS = {
    "add_layer_norm": ("test_add_layer_norm",),
    "attention_layer": ("test_attention_layer", "test_attention_layer_kernel"),
    "bias_gelu": ("test_bias_gelu",),
    "block_aggregate": ("test_block_aggregate",),
    "block_attention": (
        *("test_block_attention", "test_block_attention_cpu", "test_block_attention_kernel"),
        "test_positions",
    ),
    "blockify": ("test_blockify",),  # and unblockify, patchify
    "layer_norm_mean": ("test_layer_norm_mean",),
    "linear": ("test_linear", "test_linear_kernel"),
    "mlp_layer": ("test_mlp_layer", "test_mlp_layer_kernel", "test_mlp_layer_gradients"),
    "norm_pool": ("test_norm_pool",),
    "projection_mlp": ("test_projection_mlp",),
}
PART_OF = {"unblockify": "blockify", "patchify": "blockify"}

# A property, and what the names of its tests have in common.
PROPERTIES = {
    "is what its definition says": "",
    "as accurate as PyTorch, or exact": "as_accurate_as|matches_reference_bit_by_bit|as_two_passes_do",
    "with every instruction set": "",
    "special values": "special_values|infinities_nans",
    "the same bits again": "repeats_bit_by_bit",
    "any shape, fuzzed": "of_any_shape",
    "any strides": "any_strides|and_strides|layout",
    "nothing": "of_nothing",
    "inside its buffers": "inside_its_buffers",
    "64-bit offsets": "offsets_are_64_bit",
    "many blocks": "of_many_blocks",
    "mixed dtypes": "mixed_dtypes",
    "autocast": "under_autocast",
    "gradcheck": "gradcheck",
    "gradients one by one": "each_gradient_alone|nobody_asked_for|gradient_of_one_output|of_pos_embed_alone",
    "gradients of gradients": "gradients_of_gradients|gradgradcheck",
    "little kept for the gradient": "saves_little",
    "opcheck": "opcheck",
    "compile": "compiles",
    "export": "exports",
    "without kernels": "",
    "meta and fake tensors": "fake_tensors",
    "vmap and torch.func": "vmap|torch_func",
    "jit and fx": "jit_trace|symbolic_tracing",
    "tensor subclasses": "tensor_subclass",
    "FLOPs": "counts_the_flops",
    "bad arguments": "refuses_bad_arguments",
    "an explicit choice stays": "never_falls_back",
    "resources": "",
}
# Fixtures that are a set of instructions, or have one.
ISAS = {"isa", "impl_and_isa", "part"}
# Tests in files about something else.
ELSEWHERE = {
    "is what its definition says": {
        "block_aggregate": ("test_reference", "test_block_aggregate_is_timms_conv_pool"),
        "block_attention": ("test_reference", "test_block_attention_entry_by_entry"),
        "blockify": ("test_reference", "test_blockify_is_timms"),
        "attention_layer": ("test_modules", "test_transformer_layer_is_timms"),
        "mlp_layer": ("test_modules", "test_transformer_layer_is_timms"),
    },
    "64-bit offsets": {"block_aggregate": ("test_norm_pool", "test_offsets_are_64_bit")},
    "gradcheck": {
        "block_aggregate": ("test_reference", "test_gradcheck_aggregate"),
        "block_attention": ("test_reference", "test_gradcheck_attention"),
    },
    "without kernels": dict.fromkeys(OPERATIONS, ("test_export", "test_decompositions_return_what_the_kernels_do")),
}
_TRITON = (
    *("add_layer_norm", "attention_layer", "bias_gelu", "block_aggregate", "block_attention"),
    *("layer_norm_mean", "linear", "mlp_layer", "norm_pool", "projection_mlp"),
)
ELSEWHERE["many blocks"] = dict.fromkeys(_TRITON, ("test_imports", "test_of_many_blocks_no_grid_is_on_y"))
ELSEWHERE["resources"] = dict.fromkeys(
    _TRITON, ("test_kernel_resources", "test_no_configuration_spills_or_overflows_or_leaves_the_matrix_units")
)
_PLAIN = "the definition is a line of PyTorch's own functions"
_NO_CPP = "no kernel in C++"
_LIBRARY = "the kernel for CPUs is oneDNN's; PyTorch tests it"
_STEP = "a step of block_aggregate, which is tested for it"
_PARTS = "linear and mlp_layer are its parts"
# Why a cell is empty, by property and operation.
EMPTY = {
    "is what its definition says": {
        **dict.fromkeys(("add_layer_norm", "bias_gelu", "layer_norm_mean", "linear"), _PLAIN),
        "norm_pool": _STEP,
        "projection_mlp": _PARTS,
    },
    "with every instruction set": {
        **dict.fromkeys(("add_layer_norm", "bias_gelu", "layer_norm_mean", "projection_mlp"), _NO_CPP),
        "blockify": "copies, in plain C++",
        "linear": _LIBRARY,
    },
    "inside its buffers": {
        "blockify": "its outputs are compared byte by byte; memory of C++ has no bands",
    },
    "little kept for the gradient": {
        "blockify": "nothing: the gradient is the inverse permutation",
        "linear": "what PyTorch keeps",
        "norm_pool": _STEP,
        "projection_mlp": _PARTS,
    },
    "resources": {
        "blockify": "CUDA in C++: `make cuda-check` compiles it for every architecture",
    },
    "gradcheck": {"linear": _PLAIN, "norm_pool": _STEP},
    **{
        name: {"norm_pool": _STEP}
        for name in (
            *("mixed dtypes", "autocast", "gradients one by one", "gradients of gradients"),
            *("meta and fake tensors", "vmap and torch.func", "jit and fx", "tensor subclasses", "FLOPs"),
            *("bad arguments", "an explicit choice stays"),
        )
    },
}
for _name in ("compile", "export"):
    EMPTY[_name] = {"norm_pool": _STEP}


class Test(NamedTuple):
    file: str
    name: str
    arguments: frozenset[str]
    operations: frozenset[str]  # that its parametrisation names


def _keys(tree: ast.Module) -> dict[str, set[str]]:
    """The keys of dictionaries at the top of a module, and what its tuples hold, by their names."""
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, (ast.Dict, ast.Tuple)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            of = node.value.keys if isinstance(node.value, ast.Dict) else ast.walk(node.value)
            names = {n.value.partition(",")[0] for n in of if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            if isinstance(target, ast.Name):
                found[target.id] = found.get(target.id, set()) | names
    return found


def tests_of(file: str) -> Iterator[Test]:
    """The tests of a file, those that it imports with ``from helpers.x import *`` among them."""
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    table = _keys(tree) if file == "test_operations" else {}
    table |= {"each": table.get("TABLE", set()), "each_way": table.get("TABLE", set())}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == "*" for alias in node.names):
            for test in tests_of(node.module.replace(".", "/")):
                yield test._replace(file=file)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = {n.id for decorator in node.decorator_list for n in ast.walk(decorator) if isinstance(n, ast.Name)}
            names = {PART_OF.get(name, name) for one in said for name in table.get(one, ())}
            yield Test(file, node.name, frozenset(a.arg for a in node.args.args), frozenset(names))


def matrix() -> dict[str, dict[str, list[Test]]]:
    """operation → property → tests."""
    shared = list(tests_of("test_operations"))
    found: dict[str, dict[str, list[Test]]] = {}
    for operation, files in OPERATIONS.items():
        own = [test for file in files for test in tests_of(file)]
        tests = own + [test for test in shared if operation in test.operations]
        row = {p: [t for t in tests if pattern and re.search(pattern, t.name)] for p, pattern in PROPERTIES.items()}
        row["with every instruction set"] = [
            t for t in row["as accurate as PyTorch, or exact"] if t in own and t.arguments & ISAS
        ]
        for prop, cells in ELSEWHERE.items():
            if operation in cells:
                file, name = cells[operation]
                row[prop] += [test for test in tests_of(file) if test.name == name]
        found[operation] = row
    return found


def tables() -> str:
    lines = []
    for operation, row in matrix().items():
        files = OPERATIONS[operation]
        lines += ["", f"## {operation}", "", f"| property | `{files[0]}.py`, unless another is named |", "|---|---|"]
        for prop, tests in row.items():
            cell = ", ".join(f"`{t.name}`" + ("" if t.file == files[0] else f" (`{t.file}.py`)") for t in tests)
            lines.append(f"| {prop} | {cell or '— ' + EMPTY.get(prop, {}).get(operation, '')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    head, _, rest = README.read_text().partition(START)
    README.write_text(head + START + tables() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
