import numpy as np
import pytest

from heron.data.sampling import SampleOrder, check_prime, cubic_slot, is_prime, magic_prime, permuted_starts
from heron.errors import ConfigError, DataError

MINIPILE = 2_926_181
MINIPILE_SLOTS = {
    1: 1808479,
    2: 2763108,
    3: 2010037,
    17214: 636658,
    40320: 1326902,
    40321: 1232952,
    1_000_000: 224577,
    MINIPILE - 1: 1117702,
    MINIPILE: 0,
}


@pytest.mark.parametrize(
    ("n_tokens", "ctx_len", "prime"),
    [
        (1_498_226_207, 512, MINIPILE),
        (332_115_325_534, 4096, 81_082_817),
        (10_000, 64, 149),
        (100_000, 128, 773),
        (12, 1, 11),
        (11, 1, None),
        (13, 1, None),
        (63, 64, None),
    ],
)
def test_magic_prime_golden(n_tokens, ctx_len, prime):
    assert magic_prime(n_tokens, ctx_len) == prime


@pytest.mark.parametrize(
    ("prime", "words"),
    [
        (113, None),
        (109, "leaves 1 when divided by 3"),
        (3, "leaves 0"),
        (111, "no prime"),
        (0, "no prime"),
        (-113, "no prime"),
        (107, "at most 0.9 of the 120 samples"),
        (131, "more than the 120 samples"),
    ],
)
def test_a_prime_is_taken_or_refused_as_upstream_does(prime, words):
    if words is None:
        check_prime(prime, 120 * 16, 16)
    else:
        with pytest.raises(ConfigError, match=f"magic_prime {prime}, .*{words}.*; type 113, or drop it"):
            check_prime(prime, 120 * 16, 16)


def test_every_prime_that_upstream_takes_is_taken_where_its_samples_lie_in_the_data():
    for slots in range(1, 300):
        for prime in range(2, slots + 2):
            if is_prime(prime) and prime % 3 == 2 and prime / slots > 0.9 and prime / slots <= 1:
                check_prime(prime, slots * 4 + 1, 4)
                starts = cubic_slot(np.arange(1, prime + 1), prime) * 4
                assert starts.max() + 5 <= slots * 4 + 1
    with pytest.raises(ConfigError, match="lacks a next token.* drop the flag"):
        check_prime(2, 2 * 4, 4)  # upstream would read past the end


def test_magic_prime_is_the_largest_one():
    primes = [n for n in range(2, 3000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    for slots in range(3000):
        fit = [p for p in primes if p <= slots - 1 and p % 3 == 2 and p / slots > 0.9]
        assert magic_prime(slots, 1) == max(fit, default=None), slots


@pytest.mark.parametrize("prime", [2, 3, 37, 41, 2**31 - 1, 2**61 - 1, 2**64 - 59])
def test_primes(prime):
    assert is_prime(prime)


@pytest.mark.parametrize("n", [-7, 0, 1, 41 * 43, 561, 3215031751, 3825123056546413051, (2**31 - 1) * (2**31 - 19)])
def test_composites(n):
    assert not is_prime(n)


@pytest.mark.parametrize(("sample", "slot"), MINIPILE_SLOTS.items())
def test_cubic_slot_golden(sample, slot):
    assert cubic_slot(sample, MINIPILE) == slot


def test_cubic_slot_golden_vectorised():
    slots = cubic_slot(np.array(list(MINIPILE_SLOTS)), MINIPILE)
    assert slots.dtype == np.int64
    assert slots.tolist() == list(MINIPILE_SLOTS.values())


@pytest.mark.parametrize(
    ("prime", "slots"), [(149, [92, 140, 100, 77, 27, 55, 117]), (773, [477, 724, 511, 381, 104, 223, 508])]
)
def test_cubic_slot_golden_small(prime, slots):
    assert cubic_slot(np.arange(1, 8), prime).tolist() == slots


@pytest.mark.parametrize("prime", [11, 149, 773, 81_017])
def test_cubic_slot_is_a_bijection(prime):
    assert np.array_equal(np.sort(cubic_slot(np.arange(1, prime + 1), prime)), np.arange(prime))


@pytest.mark.parametrize("below", [3_037_000_499, 3_037_000_700, 2**40, 2**62])
def test_cubic_slot_does_not_overflow(below):
    prime = next(p for p in range(below, 0, -1) if p % 3 == 2 and is_prime(p))
    factor = int(prime * ((5**0.5 - 1) / 2))
    samples = [1, 2, prime // 2, prime - 2, prime - 1, prime, 2**62]
    wanted = [factor * s**3 % prime for s in samples]
    assert cubic_slot(np.array(samples), prime).tolist() == wanted
    assert [cubic_slot(s, prime) for s in samples] == wanted


def test_cubic_order_counts_from_upstreams_first_sample():
    order = SampleOrder(10_000, 64, seed=0, prime=149)
    assert order.starts(0, 7).tolist() == [64 * slot for slot in (92, 140, 100, 77, 27, 55, 117)]
    assert order.starts(5, 2).tolist() == [64 * 55, 64 * 117]
    assert order.starts(149, 7).tolist() == order.starts(0, 7).tolist()
    assert order.starts(0, 149).max() + 64 + 1 <= 10_000
    assert order.samples_per_epoch == 149
    assert "149" in order.description


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_order(world):
    order, micro_bsz, steps = SampleOrder(100_000, 128, seed=0, prime=773), 3, 5
    upstream = [
        477 * (1 + idx * world + rank) ** 3 % 773 * 128 for idx in range(micro_bsz * steps) for rank in range(world)
    ]
    assert order.starts(0, micro_bsz * steps * world).tolist() == upstream


@pytest.mark.parametrize("first", [0, 3, 14, 15, 40])
@pytest.mark.parametrize("prime", [11, None])
def test_starts_are_a_function_of_the_number(first, prime):
    order = SampleOrder(1000, 64, seed=1, prime=prime)
    assert order.starts(first, 33).tolist() == [int(order.starts(first + i, 1)[0]) for i in range(33)]
    assert order.starts(first, 33).dtype == np.int64
    assert order.starts(first, 0).tolist() == []


@pytest.mark.parametrize(("epoch", "first"), [(0, [695, 567, 119]), (1, [645, 133, 581])])
def test_permutation_is_pinned(epoch, first):
    assert permuted_starts(1000, 64, 0, epoch)[:3].tolist() == first


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**64 - 1, 5), (2**70, 1)])
def test_permutation_in_python_integers(seed, epoch):
    def mixed(value):
        for key in (seed, epoch):
            value = (value + (key + 1) * 0x9E3779B97F4A7C15) % 2**64
            value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
            value ^= value >> 31
        return value

    order = sorted(range(15), key=mixed)
    assert permuted_starts(1000, 64, seed, epoch).tolist() == [min(mixed(15) % 64 + 64 * i, 935) for i in order]


@pytest.mark.parametrize(
    ("n_tokens", "ctx_len"), [(1000, 64), (961, 64), (960, 64), (129, 64), (128, 64), (65, 64), (2, 1)]
)
def test_each_epoch_is_a_shifted_grid(n_tokens, ctx_len):
    windows, last = (n_tokens - 1) // ctx_len, n_tokens - 1 - ctx_len
    offsets = set()
    for epoch in range(200):
        starts = np.sort(permuted_starts(n_tokens, ctx_len, 3, epoch))
        offset = int(starts[0])
        offsets.add(offset)
        assert 0 <= offset < ctx_len
        assert starts.tolist() == [min(offset + i * ctx_len, last) for i in range(windows)]
    assert len(offsets) >= min(last + 1, ctx_len) * 0.75


def test_orders_differ_by_epoch_and_seed():
    ranks = {tuple(np.argsort(permuted_starts(20_000, 16, seed, epoch))) for seed in range(6) for epoch in range(6)}
    assert len(ranks) == 36


def test_permutation_is_even():
    """Each window comes first about as often as any other."""
    firsts = np.bincount([permuted_starts(1025, 64, 0, epoch)[0] // 64 for epoch in range(3200)], minlength=16)
    assert firsts.min() > 140
    assert firsts.max() < 260


def test_too_little_data():
    with pytest.raises(DataError, match="ctx_len 64 needs 65 tokens, the data hold 64; .* at most 63"):
        SampleOrder(64, 64, seed=0, prime=None)
