"""What is encoded comes back: ids exactly, masses within a level, sums to one."""

import numpy as np
import pytest

from trt_kd.teachers.coding import LEVELS, Kept, bytes_per_row, decode, encode


def rows(count, k, size, seed=0, sharpness=3.0):
    """Random rows, kept tokens by falling probability as a top-k gives them."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(size)[:k] for _ in range(count)])
    logits = sharpness * generator.standard_normal((count, k + 1))
    logits[:, :k] = -np.sort(-logits[:, :k], -1)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = logp.astype(np.float32)
    return Kept.without_draws(ids.astype(np.int64), values[:, :k], values[:, k])


def drawn(count, k, draws, size, seed=0):
    """Such rows with draws among the other tokens, some of them more than once."""
    generator = np.random.default_rng(seed)
    plain = rows(count, k, size, seed)
    others = [np.setdiff1d(np.arange(size), ids) for ids in plain.ids]
    ids = np.stack([generator.choice(row[: 3 * draws], draws) for row in others])
    entropy = generator.uniform(0, np.log(size - k), count).astype(np.float32)
    return plain._replace(drawn=ids, entropy=entropy)


def in_order(ids, logp):
    order = np.argsort(ids, -1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(logp, order, -1)


@pytest.mark.parametrize("size", [64, 256, 257, 49_152, 65_536, 65_537, 262_144, 20_000_000])
@pytest.mark.parametrize("k", [1, 50])
def test_ids_come_back_exactly_for_every_size_of_vocabulary(size, k):
    count = 3 if size > 10**6 else 20
    given = rows(count, k, size)
    given.ids[0, 0] = size - 1 if size - 1 not in given.ids[0] else given.ids[0, 0]
    found = decode(encode(given, size), rows=count, k=k, size=size)
    assert found.ids.dtype == np.int64
    np.testing.assert_array_equal(found.ids, np.sort(given.ids, -1))
    assert found.drawn.shape == (count, 0)


def test_masses_come_back_within_half_a_level_and_sum_to_one():
    ids, logp, tail, *_ = given = rows(200, 50, 49_152)
    _, found_logp, found_tail, *_ = decode(encode(given, 49_152), rows=200, k=50, size=49_152)
    _, expected = in_order(ids, logp)
    total = np.exp(found_logp.astype(np.float64)).sum(-1) + np.exp(found_tail)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)
    roots = [
        np.exp(np.concatenate((x, t[:, None]), -1) / 4)
        for x, t in ((found_logp, found_tail), (expected, tail))
    ]
    assert np.abs(roots[0] - roots[1]).max() < 1.1 / LEVELS
    assert found_logp.dtype == found_tail.dtype == np.float32


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 10.0])
def test_storing_costs_less_than_a_thousandth_nat(sharpness):
    ids, logp, tail, *_ = given = rows(200, 50, 49_152, sharpness=sharpness)
    _, found_logp, found_tail, *_ = decode(encode(given, 49_152), rows=200, k=50, size=49_152)
    _, expected = in_order(ids, logp)
    kl = (np.exp(expected) * (expected - found_logp)).sum(-1)
    kl += np.exp(tail) * (tail - found_tail)
    assert 0 <= kl.mean() < 1e-3


def test_the_whole_vocabulary_has_no_tail():
    ids, logp, *_ = rows(5, 16, 16)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    none = np.full(5, -np.inf, dtype=np.float32)
    packed = encode(Kept.without_draws(ids, logp, none), 16)
    found = decode(packed, rows=5, k=16, size=16)
    np.testing.assert_array_equal(found.ids, np.tile(np.arange(16), (5, 1)))
    np.testing.assert_allclose(np.exp(found.logp).sum(-1), 1.0, atol=1e-5)
    assert (found.tail == -np.inf).all()


def test_a_certain_teacher_keeps_a_finite_tail():
    ids, logp = np.array([[7, 3]]), np.array([[0.0, -60.0]], dtype=np.float32)
    given = Kept.without_draws(ids, logp, np.array([-80.0], dtype=np.float32))
    found = decode(encode(given, 512), rows=1, k=2, size=512)
    assert np.isfinite(found.logp).all()
    assert found.tail[0] == pytest.approx(-4 * np.log(LEVELS), abs=1e-4)


def test_equal_rows_give_equal_bytes_whatever_the_order_of_the_kept_tokens():
    given = drawn(9, 12, 4, 512)
    turned = [part[:, ::-1] for part in (given.ids, given.logp, given.drawn)]
    other = given._replace(**dict(zip(("ids", "logp", "drawn"), turned, strict=True)))
    assert encode(other, 512) == encode(given, 512)


@pytest.mark.parametrize("size", [200, 49_152, 65_537])
def test_draws_come_back_exactly_and_their_entropy_within_half_a_step(size):
    given = drawn(40, 12, 9, size)
    found = decode(encode(given, size), rows=40, k=12, draws=9, size=size)
    plain = decode(encode(given._replace(drawn=given.drawn[:, :0]), size), rows=40, k=12, size=size)
    assert any(len(set(row)) < 9 for row in given.drawn.tolist())
    np.testing.assert_array_equal(found.drawn, np.sort(given.drawn, -1))
    assert np.abs(found.entropy - given.entropy).max() <= 0.501 * np.log(size) / 255
    for name in ("ids", "logp", "tail"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


def test_rows_take_less_than_the_estimate_even_where_all_sets_are_alike():
    for k, size in ((32, 49_152), (50, 49_152), (64, 151_936)):
        assert len(encode(rows(400, k, size), size)) / 400 < bytes_per_row(k, size)
        given = drawn(400, k, k // 3, size)
        assert len(encode(given, size)) / 400 < bytes_per_row(k, size, k // 3)


@pytest.mark.parametrize("wrong", [{"rows": 4}, {"k": 11}, {"size": 70_000}, {"draws": 1}])
def test_bytes_of_other_rows_are_refused(wrong):
    packed = encode(rows(5, 12, 512), 512)
    with pytest.raises(ValueError, match="bytes for"):
        decode(packed, **{"rows": 5, "k": 12, "size": 512} | wrong)


def test_a_flipped_bit_is_noticed():
    packed = bytearray(encode(rows(5, 12, 512), 512))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(ValueError, match=r"decompress|bytes for"):
        decode(bytes(packed), rows=5, k=12, size=512)
