"""A decoding step as flat numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_engine.batch import Batch, Chunk
from local_engine.rows import MOST_ROWS, bucket_for, bucket_sizes, rows_of, short
from local_engine.sequence import Sequence


def chunk(start: int, tokens: tuple[int, ...], blocks: tuple[int, ...], *, samples: bool = True) -> Chunk:
    sequence = Sequence(id="a", prompt_length=1, tokens=[1], max_tokens=1)
    return Chunk(sequence, start, tokens, blocks, samples=samples, guessed=len(tokens) - 1)


def test_every_token_is_a_row_that_sees_itself_and_what_comes_before_it() -> None:
    rows = rows_of([chunk(5, (50,), (7, 9)), chunk(3, (60, 61, 62), (2, 8, 4))], block_size=4)
    assert rows.ids == [50, 60, 61, 62]
    assert rows.positions == [5, 3, 4, 5]
    assert rows.slots == [9 * 4 + 1, 2 * 4 + 3, 8 * 4 + 0, 8 * 4 + 1]
    assert rows.lengths == [6, 4, 5, 6]
    assert rows.starts == [0, 2, 2, 2]
    assert rows.blocks == [7, 9, 2, 8]  # the last block of the second is for later
    assert rows.all_kept


def test_a_prompts_single_token_that_chooses_nothing_has_no_logits() -> None:
    rows = rows_of([chunk(0, (5,), (0,)), chunk(0, (6,), (1,), samples=False), chunk(0, (7,), (2,))], block_size=4)
    assert (rows.keep, rows.all_kept) == ([0, 2], False)


@pytest.mark.parametrize(
    ("prompts", "decoding", "recorded", "expected"),
    [
        ([], 3, True, True),
        ([(0, 60)], 3, False, True),  # 1,830 seen
        ([(0, 70)], 3, False, False),  # 2,485
        ([(0, 60)] * 20, 3, False, True),  # as many as there are
        ([(0, 250)], 3, True, True),  # 31,375, in a step that can be recorded
        ([(0, 250)], 6, True, True),  # 256 rows
        ([(0, 250)], 7, True, False),  # too many rows for one
        ([(0, 250)], 3, False, False),
        ([(992, 16)], 0, True, True),  # what is left of a prompt whose beginning is cached
        ([(4000, 16)], 0, True, False),
    ],
)
def test_short_prompts_are_rows(prompts: list[tuple[int, int]], decoding: int, recorded: bool, expected: bool) -> None:
    prefill = tuple(chunk(start, (1,) * size, (0,)) for start, size in prompts)
    decode = (chunk(5, (50,), (7, 9)),) * decoding
    assert short(Batch(decode=decode, prefill=prefill), recorded=recorded) is expected
    guessed = (chunk(5, (50,) * decoding, (7, 9)),) if decoding else ()
    assert short(Batch(verify=guessed, prefill=prefill), recorded=recorded) is expected  # guesses are rows too


@given(st.integers(1, 400))
def test_recorded_sizes_hold_every_number_of_rows_up_to_the_most_and_waste_little(most: int) -> None:
    sizes = bucket_sizes(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] >= min(most, MOST_ROWS)
    for rows in range(1, sizes[-1] + 1):
        size = bucket_for(rows, sizes)
        assert size is not None
        assert rows <= size <= max(4, 2 * rows)
    assert bucket_for(sizes[-1] + 1, sizes) is None


@pytest.mark.parametrize(("most", "expected"), [(1, (1,)), (3, (1, 2, 4)), (20, (1, 2, 4, 8, 16, 24))])
def test_no_size_is_recorded_that_no_step_needs(most: int, expected: tuple[int, ...]) -> None:
    assert bucket_sizes(most) == expected
    assert bucket_for(0, expected) is None
