"""The KV cache's bookkeeping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_engine.blocks import BlockManager
from local_engine.errors import AccountingError


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (64, 4)])
def test_a_table_grows_to_hold_its_tokens(tokens: int, blocks: int) -> None:
    manager, table = BlockManager(4, 16), list[int]()
    assert manager.extend(table, tokens)
    assert (len(table), manager.free) == (blocks, 4 - blocks)


def test_an_extension_that_does_not_fit_changes_nothing() -> None:
    manager, table = BlockManager(4, 16), list[int]()
    manager.extend(table, 20)
    assert not manager.extend(table, 65)
    assert (len(table), manager.free) == (2, 2)
    manager.check([table])


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 100)))))
def test_any_order_of_extending_and_releasing_keeps_the_accounts(actions: list[tuple[int, int | None]]) -> None:
    manager, tables = BlockManager(8, 16), [list[int]() for _ in range(4)]
    for index, tokens in actions:
        if tokens is None:
            manager.release(tables[index])
        else:
            manager.extend(tables[index], tokens)
        manager.check(tables)
    for table in tables:
        manager.release(table)
    assert manager.free == 8


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [0]], [[0, 1, 2]]])
def test_tables_that_do_not_match_the_references_are_found(tables: list[list[int]]) -> None:
    manager, table = BlockManager(4, 16), list[int]()
    manager.extend(table, 32)
    manager.check([table])
    with pytest.raises(AccountingError):
        manager.check([[table[i] if i < 2 else 3 - table[0] for i in wrong] for wrong in tables])
