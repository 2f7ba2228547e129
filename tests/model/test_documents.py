"""What a sequence and an index of documents recall together, against the definition written out."""

from __future__ import annotations

import pytest
import torch

from heron.config import ModelConfig, RosaConfig
from heron.model.memory import Documents, Match, Recollection, merged
from heron.ops import _build
from heron.ops.rosa import TokenIndex, TokenStream
from heron.ops.rosa.levels import found_in

needs_cpp = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")


def config_of(**rules):
    memory = RosaConfig.preset("memory", **rules)
    return ModelConfig(variant="v7", n_layer=1, n_embd=16, head_size=16, vocab_size=40, memory=memory)


def chosen(matches, n_found):
    """Of (follower, length, origin) the longest with different followers; of equal ones the first comes first."""
    kept = []
    for match in sorted(matches, key=lambda match: -match[1]):
        if len(kept) < n_found and match[0] not in [one[0] for one in kept]:
            kept.append(match)
    return kept


def in_documents(stored, tokens, max_match, end):
    """For each of tokens, of every length the latest place in the documents: follower, length, place, longest first."""
    found = []
    for t in range(len(tokens)):
        at = {}
        for j in range(len(stored) - 1):
            n = 0
            while n < min(max_match, t + 1, j + 1) and stored[j - n] == tokens[t - n]:
                if n > 0 and tokens[t - n] == end:
                    break
                n += 1
            at |= dict.fromkeys(range(1, n + 1), j)  # later ones take the place
        longest = {j: reach for reach, j in sorted(at.items())}
        found.append(
            [(stored[j + 1], longest[j], ("documents", j)) for j in sorted(longest, key=lambda j: -longest[j])]
        )
    return found


@needs_cpp
@pytest.mark.parametrize("n_matches", [1, 2, 3])
@pytest.mark.parametrize("rules", [{}, dict(end=0), dict(window=7)], ids=["plain", "documents end", "window"])
@pytest.mark.parametrize(("model_match", "index_match"), [(64, 64), (3, 64), (64, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_longest_matches_of_both_count_and_ties_go_to_the_sequence(
    n_matches, rules, model_match, index_match, seed
):
    chance = torch.Generator().manual_seed(seed)
    stored, tokens = (torch.randint(0, 3, (n,), generator=chance) for n in (50, 40))
    rosa = config_of(n_matches=n_matches, max_match=model_match, **rules).memory
    end = rules.get("end")
    documents = Documents(
        TokenIndex.of(stored, index_match, end), config_of(n_matches=n_matches, max_match=model_match)
    )
    src, length = found_in(tokens, model_match, rules.get("window"), end, 40)
    theirs = in_documents(stored.tolist(), tokens.tolist(), min(model_match, index_match), end)
    want = []
    for t in range(len(tokens)):
        mine = [
            (int(tokens[s + 1]), int(n), ("sequence", int(s))) for s, n in zip(src[t], length[t], strict=True) if n > 0
        ]
        want.append(chosen([*mine, *theirs[t]], n_matches))
    assert {origin for matches in want for _, _, (origin, _) in matches} == {"sequence", "documents"}

    memory, pieces = Recollection(), []
    for piece in tokens.split(11):
        recalled, at, memory = memory.read(piece, rosa, documents)
        pieces.append((recalled, at))
    recalled, at = (torch.cat(part) for part in zip(*pieces, strict=True))
    one_by_one = Recollection()
    for t, matches in enumerate(want):
        filled = [list(match[:2]) for match in matches] + [[0, 0]] * (n_matches - len(matches))
        assert recalled[t].tolist() == filled
        places = [place if origin == "sequence" else -1 for _, _, (origin, place) in matches]
        assert at[t].tolist() == places + [-1] * (n_matches - len(matches))
        found, one_by_one = one_by_one.read_one(int(tokens[t]), rosa, documents)
        assert found == [
            Match(follower, n, t - place, None) if origin == "sequence" else Match(follower, n, None, place + 1)
            for follower, n, (origin, place) in matches
        ] + [Match(0, 0)] * (n_matches - len(matches))


@pytest.mark.parametrize("seed", range(5))
def test_merged_is_its_definition(seed):
    chance = torch.Generator().manual_seed(seed)

    def some(n, K):
        """Matches as a stream gives them: different followers, no longer than the one before, zeros behind them."""
        followers = torch.stack([torch.randperm(6, generator=chance)[:K] for _ in range(n)])
        length = torch.randint(0, 5, (n, K), generator=chance).sort(dim=1, descending=True).values
        there = length > 0
        src = torch.randint(0, 99, (n, K), generator=chance)
        return torch.where(there, followers, 0), length, torch.where(there, src, -1)

    for K in (1, 2, 4):
        parts = some(50, K), some(50, K)
        got = merged(*parts)
        for row in range(50):
            both = [
                (int(followers[row, k]), int(length[row, k]), (is_second, int(src[row, k])))
                for is_second, (followers, length, src) in enumerate(parts)
                for k in range(K)
                if length[row, k] > 0
            ]
            want = [(f, n, place, bool(second)) for f, n, (second, place) in chosen(both, K)]
            assert [tuple(part[row, k].item() for part in got) for k in range(len(want))] == want
            assert all(tuple(part[row, k].item() for part in got) == (0, 0, -1, False) for k in range(len(want), K))


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("rules", [{}, dict(window=5), dict(end=0)], ids=["plain", "window", "documents end"])
def test_one_token_at_a_time_is_what_many_are(impl, rules):
    if impl == "cpu" and _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    tokens = torch.randint(0, 3, (80,), generator=torch.Generator().manual_seed(0))
    want = TokenStream(4, impl=impl, **rules).recall(tokens, 2)
    single = TokenStream(4, impl=impl, **rules).going_on(0, tokens[:0])
    got = [single.recall_one(int(token), 2) for token in tokens]
    assert [torch.tensor(part).tolist() for part in zip(*got, strict=True)] == [part.tolist() for part in want]
    behind = TokenStream(4, impl=impl, **rules).going_on(1000, tokens)
    assert behind.recall_one(int(tokens[0]), 1)[2][0] >= 920
    assert behind.tokens(last=3).tolist() == [*tokens[-2:].tolist(), int(tokens[0])]
    assert behind.tokens(1000, last=3).tolist() == tokens[-3:].tolist()
