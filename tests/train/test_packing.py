"""Packing: no token lost, repeated or mixed with those of another sequence, every sequence at a block boundary."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.train.data.packing import PackedDataset, Packing, pack
from seer_jax.train.data.store import TokenStore

BLOCK = 16


def make_store(lengths: list[int]) -> TokenStore:
    """Documents whose tokens are all different, so that each can be followed."""
    ends = np.cumsum(lengths)
    return TokenStore.from_documents([np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)])


document_lengths = st.lists(st.integers(0, 200), min_size=1, max_size=40)


@given(document_lengths, st.sampled_from([32, 64, 96]), st.integers(1, 32))
def test_best_fit_keeps_every_token_of_every_sequence_once(lengths, row_length, min_length):
    store = make_store(lengths)
    if all(n < min_length for n in lengths):
        return
    data = pack(store, Packing.BEST_FIT, row_length=row_length, block_size=BLOCK, min_length=min_length)
    seen = []
    for row in map(data.__getitem__, range(len(data))):
        assert not row.tokens[row.segment_ids == 0].any() and not row.positions[row.segment_ids == 0].any()
        count = row.segment_ids.max()
        assert count > 0
        for segment in range(1, count + 1):
            places = np.flatnonzero(row.segment_ids == segment)
            first, length = places[0], len(places)
            assert first % BLOCK == 0
            np.testing.assert_array_equal(places, np.arange(first, first + length))
            np.testing.assert_array_equal(row.positions[places], np.arange(length))
            tokens = row.tokens[places]
            np.testing.assert_array_equal(np.diff(tokens), 1)  # neighbours in the corpus, in order
            document = np.searchsorted(store.ends, tokens[[0, -1]], side="right")
            assert document[0] == document[1]  # one document alone
            seen.append(tokens)
        assert (row.segment_ids.reshape(-1, BLOCK).max(1) == row.segment_ids[::BLOCK]).all()  # one sequence per block
    pieces = [(start, min(row_length, n - start)) for n in lengths for start in range(0, n, row_length)]
    kept = [n for _, n in pieces if n >= min_length]
    assert sorted(len(s) for s in seen) == sorted(kept)
    tokens = np.concatenate(seen)
    assert len(np.unique(tokens)) == len(tokens) == sum(kept)
    report = data.report
    assert report.dropped_tokens == sum(lengths) - len(tokens)
    assert report.sequences == len(seen) and report.rows == len(data)
    assert report.dropped_documents == sum(0 < n < min_length for n in lengths)
    assert report.split_documents == sum(n > row_length for n in lengths)


@given(document_lengths, st.sampled_from([16, 32, 64]))
def test_concatenate_is_the_corpus_cut_into_rows(lengths, row_length):
    store = make_store(lengths)
    if sum(lengths) < row_length:
        return
    data = pack(store, Packing.CONCATENATE, row_length=row_length, block_size=BLOCK)
    rows = [data[i] for i in range(len(data))]
    np.testing.assert_array_equal(np.concatenate([r.tokens for r in rows]), np.arange(len(rows) * row_length))
    assert all((r.segment_ids == 1).all() and (r.positions == np.arange(row_length)).all() for r in rows)
    ends = list(itertools.accumulate(lengths))
    cuts = set(range(row_length, sum(lengths), row_length))
    assert data.report.split_documents == sum(
        any(end - n < c < end for c in cuts) for n, end in zip(lengths, ends, strict=True)
    )
    assert data.report.dropped_tokens == sum(lengths) % row_length


def test_best_fit_packs_tightly():
    # Sixteen blocks in all: first fit in this order would open five rows of four blocks.
    data = pack(make_store([16, 48, 32, 48, 32, 16, 64]), Packing.BEST_FIT, row_length=64, block_size=16, min_length=1)
    assert len(data) == 4


def test_report_reads_well():
    data = pack(make_store([100, 5, 200]), Packing.BEST_FIT, row_length=128, block_size=16)
    assert str(data.report) == (
        "3 documents, 305 tokens -> 3 rows with 3 sequences; 1 documents split, 1 dropped, 5 tokens dropped"
    )


def test_rows_given_as_an_array():
    tokens = np.arange(12).reshape(3, 4)
    data = PackedDataset.from_rows(tokens)
    assert len(data) == 3
    for i, row in enumerate(tokens):
        np.testing.assert_array_equal(data[i].tokens, row)
        np.testing.assert_array_equal(data[i].segment_ids, 1)
        np.testing.assert_array_equal(data[i].positions, np.arange(4))


@pytest.mark.parametrize(
    ("lengths", "packing", "settings", "message"),
    [
        ([50], Packing.BEST_FIT, {"row_length": 100}, r"positive multiple of 16 tokens, a block; got 100"),
        ([50], Packing.CONCATENATE, {"row_length": 0}, r"positive multiple of 16 tokens, a block; got 0"),
        ([50], Packing.CONCATENATE, {"row_length": 64}, r"fill a row of 64 tokens; got 50 tokens"),
        ([0, 0], Packing.CONCATENATE, {"row_length": 64}, r"got only empty documents"),
        ([10, 20], Packing.BEST_FIT, {"row_length": 64}, r"at least 32 tokens, min_length; got at most 20"),
        ([10], Packing.BEST_FIT, {"row_length": 64, "min_length": 65}, r"at most the row length 64; got 65"),
        ([10], Packing.BEST_FIT, {"row_length": 64, "min_length": 0}, r"min_length must be at least 1 .* got 0"),
    ],
)
def test_packing_errors(lengths, packing, settings, message):
    with pytest.raises(ValueError, match=message):
        pack(make_store(lengths), packing, block_size=BLOCK, **settings)


@pytest.mark.parametrize("rows", [np.zeros((0, 4), int), np.zeros((4, 0), int), np.zeros((2, 4)), np.zeros(4, int)])
def test_rows_of_a_wrong_kind(rows):
    with pytest.raises(ValueError, match=r"integers \[N, T\] with N, T >= 1; got"):
        PackedDataset.from_rows(rows)
