"""What a split's documents end with, counted by hand."""

from collections import Counter
from pathlib import Path

import torch

from calm_core.tokens.openings import commonest_document_end
from calm_core.tokens.shards import TokenStream, TokenWriter

END = 1


def stream(folder: Path, documents: list[list[int]]) -> TokenStream:
    writer = TokenWriter(folder, "train", 300)
    for document in documents:
        writer.write([*document, END])
    writer.flush()
    return TokenStream(folder, "train")


def test_the_commonest_end(tmp_path: Path) -> None:
    tokens = stream(tmp_path, [[9, 5, 6], [8, 7, 6], [2, 5, 6], [4, 4, 4, 4], [9, 5, 6, 3]])
    assert commonest_document_end(tokens, 1) == [END]
    assert commonest_document_end(tokens, 2) == [6, END]
    assert commonest_document_end(tokens, 3) == [5, 6, END]
    # Two end with 5 6, each behind another token; of four equally common ends the smallest is taken.
    assert commonest_document_end(tokens, 4) == [2, 5, 6, END]


def test_documents_shorter_than_an_end(tmp_path: Path) -> None:
    tokens = stream(tmp_path, [[5], [6], [5], [6], [5]])
    assert commonest_document_end(tokens, 4) == [5, END, 6, END]


def test_it_is_the_mode_of_many(tmp_path: Path) -> None:
    lengths = torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    draws = torch.Generator().manual_seed(1)
    documents = [torch.randint(2, 5, (length,), generator=draws).tolist() for length in lengths]
    flat = [token_id for document in documents for token_id in [*document, END]]
    ends = [place + 1 for place, token_id in enumerate(flat) if token_id == END]
    counts = Counter(tuple(flat[end - 3 : end]) for end in ends if end >= 3)
    most = max(counts.values())
    found = commonest_document_end(stream(tmp_path, documents), 3)
    assert tuple(found) == min(end for end, count in counts.items() if count == most)
