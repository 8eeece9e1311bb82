"""tests/README.md says which test shows which property of which operation, and nothing is left out of it."""

from helpers.common import ROOT
from helpers.matrix import ELSEWHERE, EMPTY, END, OPERATIONS, PART_OF, PROPERTIES, README, START, matrix, tables


def test_the_tables_are_those_of_the_tests():
    written = README.read_text().partition(START)[2].partition(END)[0]
    assert written == tables(), "python tests/helpers/matrix.py"


def test_no_operation_is_missing():
    folders = (ROOT / "nest_fast" / "ops", ROOT / "kernels")
    files = {path.stem for folder in folders for path in folder.glob("[!_]*.py")}
    assert files == set(OPERATIONS)
    assert not set(PART_OF) & files


def test_a_cell_is_empty_for_a_reason_only():
    for operation, row in matrix().items():
        assert row.keys() == PROPERTIES.keys()
        for prop, tests in row.items():
            reason = EMPTY.get(prop, {}).get(operation)
            assert bool(tests) != bool(reason), f"{operation}: {prop}"


def test_what_is_named_exists():
    named = {(prop, operation) for table in (ELSEWHERE, EMPTY) for prop, row in table.items() for operation in row}
    assert named <= {(prop, operation) for prop in PROPERTIES for operation in OPERATIONS}
    found = {(t.file, t.name) for row in matrix().values() for tests in row.values() for t in tests}
    assert {test for row in ELSEWHERE.values() for test in row.values()} <= found
