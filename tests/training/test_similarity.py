"""CKA against its definition, its invariances, and pairs measured on models."""

import numpy as np
import pytest
import torch

from trt_kd.errors import DataError
from trt_kd.losses.features.tokens import Cosine
from trt_kd.training import similarity
from trt_kd.training.features import Feature
from trt_kd.training.similarity import _gram_matrices, _hsic, by_similarity, layer_similarity


def naive_hsic(k, m):
    """The unbiased estimate of Song et al., term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


def test_hsic_is_the_estimate_of_song_et_al():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 9, 4)), generator.normal(size=(3, 9, 7))
    found = _hsic(*(_gram_matrices([torch.from_numpy(x) for x in xs]) for xs in (one, other)))
    expected = [[naive_hsic(x @ x.T, y @ y.T) for y in other] for x in one]
    np.testing.assert_allclose(found.numpy(), expected)


def test_hsic_is_without_bias_independent_features_have_none_on_average():
    generator = np.random.default_rng(0)
    values = []
    for _ in range(400):
        x, y = generator.normal(size=(2, 8, 3))
        values.append(_hsic(*(_gram_matrices([torch.from_numpy(a)]) for a in (x, y))).item())
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(0, 512, size=(12, 24))


def test_a_model_is_itself_layer_by_layer(make_model, blocks):
    model = make_model(num_hidden_layers=3)
    found = layer_similarity(model, model, blocks)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(np.diag(found), 1.0)
    np.testing.assert_allclose(found, found.T)
    assert found.max() <= 1.0 + 1e-9


def heard(model, tokens):
    """What the final norm is given: the last layer's output."""
    found = []
    hook = model.model.norm.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0]))
    model(tokens)
    hook.remove()
    return found[0]


def test_the_matrix_is_cka_of_the_models_own_hidden_states(make_model, blocks):
    student, teacher = make_model(1, num_hidden_layers=2, hidden_size=32), make_model(2)
    few = blocks[:4]
    found = layer_similarity(student, teacher, few)
    states = []
    for model in (student, teacher):
        tokens = torch.from_numpy(few)
        with torch.no_grad():
            x = model.model(tokens, output_hidden_states=True).hidden_states[1:-1]
            last = heard(model, tokens)
        states.append([x[:, 1:].flatten(0, 1).double().numpy() for x in (*x, last)])
    for i, x in enumerate(states[0]):
        for j, y in enumerate(states[1]):
            k, m = x @ x.T, y @ y.T
            cka = naive_hsic(k, m) / np.sqrt(naive_hsic(k, k) * naive_hsic(m, m))
            assert found[i, j] == pytest.approx(cka)


def test_turning_and_scaling_a_models_residual_stream_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 6, generator=generator, dtype=torch.float64)
    turn = 3 * torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q

    def cka(a, b):
        k, m = _gram_matrices([a]), _gram_matrices([b])
        return _hsic(k, m) / (_hsic(k, k) * _hsic(m, m)).sqrt()

    torch.testing.assert_close(cka(x @ turn, y), cka(x, y))
    torch.testing.assert_close(cka(x + 5, y - 2), cka(x, y))


def test_hooks_are_gone_afterwards(make_model, blocks):
    model = make_model()
    layer_similarity(model, model, blocks[:1])
    assert not any(module._forward_hooks for module in model.modules())


def test_too_little_text_is_an_error(make_model):
    model = make_model(num_hidden_layers=1)
    with pytest.raises(DataError, match="too few"):
        layer_similarity(model, model, np.zeros((1, 3), dtype=np.int64))


def test_half_of_the_layers_find_themselves_and_a_resumed_run_its_pairs(
    make_model, blocks, tmp_path, monkeypatch
):
    teacher, student = make_model(num_hidden_layers=6), make_model(num_hidden_layers=6)
    student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in (0, 1, 4)])
    student.config.num_hidden_layers = 3
    wanted = [Feature(loss=Cosine(), pairs="cka", count=2)]
    (found,) = by_similarity(wanted, student, teacher, blocks, tmp_path)
    assert found.pairs[0] == (0, 0)
    assert found.count is None
    monkeypatch.setattr(similarity, "layer_similarity", None)
    assert by_similarity(wanted, student, teacher, blocks, tmp_path) == [found]


def test_pairs_that_are_given_are_not_measured(make_model, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "layer_similarity", None)
    given = [Feature(loss=Cosine(), pairs=[(0, 0)])]
    assert by_similarity(given, None, None, blocks, tmp_path) == given
