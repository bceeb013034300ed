"""Every feature loss once more, in NumPy, float64, as its paper writes it, token by token."""

import numpy as np
import pytest
import torch

from trt_kd.losses import FEATURE_LOSSES


def unit(x):
    return x / np.linalg.norm(x)


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def mse(loss, s, t):
    return sum(np.mean((a - b) ** 2) for a, b in zip(s, t, strict=True))


def hint(loss, s, t):
    return 0.5 * np.linalg.norm(s - t) ** 2


def cosine(loss, s, t):
    return sum(1 - unit(a) @ unit(b) for a, b in zip(s, t, strict=True))


def logsum(loss, s, t):
    sums = [sum(abs(x) ** loss.alpha for x in a - b) for a, b in zip(s, t, strict=True)]
    return sum(np.log((x + loss.floor) / loss.floor) for x in sums)


def pkd(loss, s, t):
    return len(s) * np.linalg.norm(unit(s[-1]) - unit(t[-1])) ** 2


def attention_transfer(loss, s, t):
    maps = [unit(np.array([sum(abs(v) ** loss.power for v in row) for row in x])) for x in (s, t)]
    return len(s) * np.linalg.norm(maps[0] - maps[1]) ** 2


def nst(loss, s, t):
    patterns = [[unit(channel) for channel in x.T] for x in (s, t)]

    def kernel(one, other):
        return np.mean([[(a @ b) ** loss.degree for a in one] for b in other])

    student, teacher = patterns
    mmd = kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)
    return len(s) * mmd


def pkt(loss, s, t):
    def chances(x, i):
        others = [j for j in range(len(x)) if j != i]
        similarity = np.array([(unit(x[i]) @ unit(x[j]) + 1) / 2 for j in others])
        return similarity / similarity.sum()

    rows = [(chances(s, i), chances(t, i)) for i in range(len(s))]
    return sum(np.sum(p * np.log(p / q)) for q, p in rows)


def gram(loss, s, t):
    matrices = [np.array([unit(row) for row in x @ x.T]) for x in (s, t)]
    return np.linalg.norm(matrices[0] - matrices[1]) ** 2


def rkd_distance(loss, s, t):
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]

    def relative(x):
        distances = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        return distances / distances.mean()

    return len(s) * np.mean([huber(a - b) for a, b in zip(relative(s), relative(t), strict=True)])


def rkd_angle(loss, s, t):
    n = range(len(s))
    triples = [(i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3]

    def cosines(x):
        return [unit(x[i] - x[j]) @ unit(x[k] - x[j]) for i, j, k in triples]

    return len(s) * np.mean([huber(a - b) for a, b in zip(cosines(s), cosines(t), strict=True)])


def minilm(loss, s, t):
    def relation(x, head, i):
        width = x.shape[1] // loss.heads
        part = x[:, head * width : (head + 1) * width]
        seen = part[: i + 1] if loss.causal else part
        e = np.exp(seen @ part[i] / np.sqrt(width))
        return e / e.sum()

    total = 0.0
    for head in range(loss.heads):
        for i in range(len(s)):
            p, q = relation(t, head, i), relation(s, head, i)
            total += np.sum(p * np.log(p / q)) / loss.heads
    return total


def minilm_v1(loss, s, t):
    def attention(queries, keys, i):
        e = np.exp(keys[: i + 1] @ queries[i])
        return e / e.sum()

    def parts(x, head):
        """Queries, keys and values of one head, and the values scaled for their relation."""
        width = x.shape[1] // 3 // loss.heads
        q, k, v = (third[:, head * width : (head + 1) * width] for third in np.split(x, 3, 1))
        return (q, k), (v / np.sqrt(width), v)

    total = 0.0
    for head in range(loss.heads):
        for one, other in zip(parts(s, head), parts(t, head), strict=True):
            for i in range(len(s)):
                p, q = attention(*other, i), attention(*one, i)
                total += np.sum(p * np.log(p / q)) / loss.heads
    return total


REFERENCES = {
    f.__name__: f
    for f in (
        mse, cosine, logsum, hint, pkd, attention_transfer, nst, pkt, gram, rkd_distance, rkd_angle,
        minilm, minilm_v1,
    )
}  # fmt: skip
CASES = [
    *((name, {}) for name in REFERENCES),
    ("logsum", {"alpha": 5.0, "floor": 0.3}),
    ("attention_transfer", {"power": 3.0}),
    ("nst", {"degree": 3}),
    ("minilm", {"heads": 2}),
    ("minilm_v1", {"heads": 2}),
    ("minilm", {"heads": 4, "causal": False}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_loss_is_the_papers_formula(name, options):
    loss = FEATURE_LOSSES.load(name).model_validate(options)
    generator = np.random.default_rng(0)
    teacher_width = 24 if loss.same_width else 48
    student, teacher = (
        generator.normal(size=(2, 7, 24)),
        generator.normal(size=(2, 7, teacher_width)),
    )
    mask = np.ones((2, 7), dtype=bool)
    mask[0, 2] = mask[1, 6] = False
    found = loss(*(torch.from_numpy(x) for x in (student, teacher, mask)))
    expected = sum(
        REFERENCES[name](loss, s[m], t[m]) for s, t, m in zip(student, teacher, mask, strict=True)
    )
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_every_loss_but_the_contrastive_one_has_its_reference_here():
    assert sorted([*REFERENCES, "crd"]) == sorted(FEATURE_LOSSES.names())


def critic(s, t, temperature, mean, count):
    """CRD's h: the chance that the two are of one token."""
    e = np.exp(unit(s) @ unit(t) / temperature) / mean
    return e / (e + count)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_contrastive_loss_and_its_gradient_are_the_papers(temperature):
    loss = FEATURE_LOSSES.load("crd")(temperature=temperature)
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 4, 8))
    memory = generator.normal(size=(5, 8))

    def means(x):
        return [np.mean([np.exp(unit(row) @ unit(m) / temperature) for m in memory]) for row in x]

    def value(x, scale):
        total = 0.0
        for row, same, mean in zip(x, teacher, scale, strict=True):
            total -= np.log(critic(row, same, temperature, mean, len(memory)))
            total -= sum(np.log(1 - critic(row, m, temperature, mean, 5)) for m in memory)
        return total

    x = torch.from_numpy(student)[None].requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = loss(x, torch.from_numpy(teacher)[None], mask, torch.from_numpy(memory))
    found.backward()
    scale = means(student)
    assert found.item() == pytest.approx(value(student, scale), rel=1e-9)
    for row, channel in ((0, 0), (2, 5), (3, 7)):
        step = np.zeros_like(student)
        step[row, channel] = 1e-6
        slope = (value(student + step, scale) - value(student - step, scale)) / 2e-6
        assert x.grad[0, row, channel].item() == pytest.approx(slope, rel=1e-5)


def test_the_contrastive_loss_without_a_memory_yet_is_zero():
    loss = FEATURE_LOSSES.load("crd")()
    x = torch.randn(1, 3, 4, requires_grad=True)
    for memory in (None, torch.zeros(0, 4)):
        value = loss(x, torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool), memory)
        value.backward()
        assert value.item() == 0.0
    assert x.grad.abs().sum() == 0.0


def test_patient_kd_reads_the_last_valid_token_only():
    loss = FEATURE_LOSSES.load("pkd")()
    student, teacher = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False, False]])
    other = student.clone()
    other[0, :2] = 7.0
    assert loss(student, teacher, mask) == loss(other, teacher, mask) > 0
    teacher[0, 2] = 3 * student[0, 2]
    assert loss(student, teacher, mask).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_at_most_so_many_tokens_are_related_the_first_and_last_among_them(name):
    loss = FEATURE_LOSSES.load(name)(tokens=4)
    student, teacher = torch.randn(2, 1, 10, 4, generator=torch.Generator().manual_seed(0))
    chosen = [0, 3, 6, 9]
    few = loss(student[:, chosen], teacher[:, chosen], torch.ones(1, 4, dtype=torch.bool))
    whole = loss(student, teacher, torch.ones(1, 10, dtype=torch.bool))
    assert whole.item() == pytest.approx(few.item() * 10 / 4, rel=1e-5)


def test_relations_do_not_see_a_rotation_or_a_scale_that_they_should_not():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 8, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    mask = torch.ones(2, 6, dtype=torch.bool)
    for name in ("pkt", "gram", "rkd_distance", "rkd_angle", "attention_transfer"):
        loss = FEATURE_LOSSES.load(name)()
        changed = 3 * student if name == "attention_transfer" else 3 * student @ turn
        torch.testing.assert_close(loss(changed, teacher, mask), loss(student, teacher, mask))
