"""What is encoded comes back: ids exactly, masses within a level, sums to one."""

import numpy as np
import pytest

from trt_kd.teachers.coding import LEVELS, bytes_per_row, decode, encode


def rows(count, k, size, seed=0, sharpness=3.0):
    """Random rows, kept tokens by falling probability as a top-k gives them."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(size)[:k] for _ in range(count)])
    logits = sharpness * generator.standard_normal((count, k + 1))
    logits[:, :k] = -np.sort(-logits[:, :k], -1)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return ids.astype(np.int64), logp[:, :k].astype(np.float32), logp[:, k].astype(np.float32)


def in_order(ids, logp):
    order = np.argsort(ids, -1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(logp, order, -1)


@pytest.mark.parametrize("size", [64, 256, 257, 49_152, 65_536, 65_537, 262_144, 20_000_000])
@pytest.mark.parametrize("k", [1, 50])
def test_ids_come_back_exactly_for_every_size_of_vocabulary(size, k):
    count = 3 if size > 10**6 else 20
    ids, logp, tail = rows(count, k, size)
    ids[0, 0] = size - 1 if size - 1 not in ids[0] else ids[0, 0]
    found, _, _ = decode(encode(ids, logp, tail, size), rows=count, k=k, size=size)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.sort(ids, -1))


def test_masses_come_back_within_half_a_level_and_sum_to_one():
    ids, logp, tail = rows(200, 50, 49_152)
    _, found_logp, found_tail = decode(encode(ids, logp, tail, 49_152), rows=200, k=50, size=49_152)
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
    ids, logp, tail = rows(200, 50, 49_152, sharpness=sharpness)
    _, found_logp, found_tail = decode(encode(ids, logp, tail, 49_152), rows=200, k=50, size=49_152)
    _, expected = in_order(ids, logp)
    kl = (np.exp(expected) * (expected - found_logp)).sum(-1)
    kl += np.exp(tail) * (tail - found_tail)
    assert 0 <= kl.mean() < 1e-3


def test_the_whole_vocabulary_has_no_tail():
    ids, logp, _ = rows(5, 16, 16)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    none = np.full(5, -np.inf, dtype=np.float32)
    found = decode(encode(ids, logp, none, 16), rows=5, k=16, size=16)
    np.testing.assert_array_equal(found[0], np.tile(np.arange(16), (5, 1)))
    np.testing.assert_allclose(np.exp(found[1]).sum(-1), 1.0, atol=1e-5)
    assert (found[2] == -np.inf).all()


def test_a_certain_teacher_keeps_a_finite_tail():
    ids, logp = np.array([[7, 3]]), np.array([[0.0, -60.0]], dtype=np.float32)
    packed = encode(ids, logp, np.array([-80.0], dtype=np.float32), 512)
    _, found, tail = decode(packed, rows=1, k=2, size=512)
    assert np.isfinite(found).all()
    assert tail[0] == pytest.approx(-4 * np.log(LEVELS), abs=1e-4)


def test_equal_rows_give_equal_bytes_whatever_the_order_of_the_kept_tokens():
    ids, logp, tail = rows(9, 12, 512)
    turned = encode(ids[:, ::-1], logp[:, ::-1], tail, 512)
    assert turned == encode(ids, logp, tail, 512)


def test_rows_take_less_than_the_estimate_even_where_all_sets_are_alike():
    for k, size in ((32, 49_152), (50, 49_152), (64, 151_936)):
        packed = encode(*rows(400, k, size), size)
        assert len(packed) / 400 < bytes_per_row(k, size)


@pytest.mark.parametrize("wrong", [{"rows": 4}, {"k": 11}, {"size": 70_000}])
def test_bytes_of_other_rows_are_refused(wrong):
    packed = encode(*rows(5, 12, 512), 512)
    with pytest.raises(ValueError, match="bytes for"):
        decode(packed, **{"rows": 5, "k": 12, "size": 512} | wrong)


def test_a_flipped_bit_is_noticed():
    packed = bytearray(encode(*rows(5, 12, 512), 512))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(ValueError, match=r"decompress|bytes for"):
        decode(bytes(packed), rows=5, k=12, size=512)
