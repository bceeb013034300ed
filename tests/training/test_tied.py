"""A tied embedding's rows, added to the head's gradient where that stands."""

import pytest
import torch
from torch import nn

from trt_kd.training.tied import rows_into_head

IDS = torch.tensor([[3, 5, 3, 0], [7, 3, 9, 0]])


class Tied(nn.Module):
    """An embedding and a head of one weight, with a map between them."""

    def __init__(self, embedding, *, tied=True):
        super().__init__()
        self.embedding, self.between = embedding, nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(torch.tanh(self.between(self.embedding(ids))))


def gradients(model, passes=1):
    model.zero_grad()
    for number in range(passes):
        model((IDS + number) % 11).logsumexp(-1).square().sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()}


def make(**options):
    torch.manual_seed(0)
    return nn.Embedding(11, 6, **options).double()


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=["plain", "padded"])
def test_gradients_are_those_of_plain_autograd(options, passes):
    model = Tied(make(**options)).double()
    plain = gradients(model, passes)
    with rows_into_head(model):
        assert "forward" in vars(model.embedding)
        torch.testing.assert_close(gradients(model, passes), plain)
    assert "forward" not in vars(model.embedding)
    torch.testing.assert_close(gradients(model, passes), plain, rtol=0, atol=0)


def test_no_second_gradient_of_the_vocabulary_is_made():
    model = Tied(make()).double()
    events = []
    for lean in (False, True):
        with torch.profiler.profile(record_shapes=True) as profile:
            if lean:
                with rows_into_head(model):
                    gradients(model)
            else:
                gradients(model)
        events.append({event.name for event in profile.events()})
    assert "aten::embedding_dense_backward" in events[0]
    assert "aten::embedding_dense_backward" not in events[1]


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


def frozen():
    return make().requires_grad_(False)


@pytest.mark.parametrize(
    "model",
    [
        Tied(make(), tied=False),
        Tied(Scaled(11, 6)),
        Tied(make(max_norm=1.0)),
        Tied(make(scale_grad_by_freq=True)),
        Tied(frozen()),
    ],
    ids=["untied", "another kind", "max_norm", "by frequency", "frozen"],
)
def test_what_is_not_a_plain_tied_embedding_stays_as_it_is(model):
    with rows_into_head(model):
        assert "forward" not in vars(model.embedding)
