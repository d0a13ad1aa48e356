"""The token head: a distribution of whole patches, by the chain rule, and its loss and gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise

SIZE, HIDDEN = 3, 5

every_patch_size = pytest.mark.parametrize("patch_size", [1, 2, 3])


def built(patch_size: int, layers: int = 2, vocabulary: int = SIZE) -> TokenHead:
    """Weights that all matter."""
    head = TokenHead(TokenHeadConfig(6, 7, layers), vocabulary, patch_size, HIDDEN)
    initialise(head, torch.Generator().manual_seed(patch_size), embedding_std=1.0)
    return head


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(9))


def logits_by_hand(head: TokenHead, hidden_state: Tensor, patch: list[int], place: int) -> Tensor:
    """Of the token at ``place``, spelt out with sums over the tokens before it."""
    size = head.config.hidden_size
    state = head.from_hidden_state(hidden_state)[place * size : (place + 1) * size]
    for earlier in range(place):
        weight = head.from_earlier[place - 1][:, earlier * size : (earlier + 1) * size]
        state = state + weight @ head.embedding.weight[patch[earlier]]
    for layer in head.layers:
        normed = state / (state.square().mean() + 1e-6).sqrt() * layer.norm.weight
        mlp = layer.mlp
        state = state + mlp.down.weight @ (F.silu(mlp.gate.weight @ normed) * (mlp.up.weight @ normed))
    normed = state / (state.square().mean() + 1e-6).sqrt() * head.norm.weight
    return head.unembedding.weight @ normed


@every_patch_size
def test_probabilities_of_all_patches_sum_to_one(patch_size: int) -> None:
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=patch_size)))
    hidden_states = states(4, 1).expand(-1, len(every), -1)
    log_p = built(patch_size).log_probabilities(hidden_states, every.expand(4, -1, -1)).sum(dim=-1)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4))
    assert log_p.exp().max() > 1.5 / len(every)  # far from even


@every_patch_size
def test_each_way_to_the_logits_is_that_by_hand(patch_size: int) -> None:
    head, hidden_states = built(patch_size), states(2, 4)
    patches = torch.randint(SIZE, (2, 4, patch_size), generator=torch.Generator().manual_seed(0))
    log_p, loss = head.log_probabilities(hidden_states, patches), head.loss(hidden_states, patches)
    total = 0.0
    for row, column, place in itertools.product(range(2), range(4), range(patch_size)):
        patch = patches[row, column].tolist()
        expected = logits_by_hand(head, hidden_states[row, column], patch, place)
        found = head.logits(hidden_states[row, column], patches[row, column, :place])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        nats = F.cross_entropy(expected, patches[row, column, place])
        torch.testing.assert_close(-log_p[row, column, place], nats, rtol=1e-4, atol=1e-5)
        total += float(nats.detach())
    assert loss.item() == pytest.approx(total / patches.numel(), rel=1e-5)


def test_a_token_sees_those_before_it_and_no_other() -> None:
    head, hidden_state = built(3), states(1)
    patch = torch.tensor([[0, 1, 2]])
    log_p = head.log_probabilities(hidden_state, patch)
    for place in range(3):
        other = patch.clone()
        other[0, place] = (patch[0, place] + 1) % SIZE
        changed = (head.log_probabilities(hidden_state, other) != log_p)[0].tolist()
        assert changed == [False] * place + [True] * (3 - place)


def test_gradients_are_those_of_finite_differences() -> None:
    head = built(3).double()
    patches = torch.randint(SIZE, (4, 3), generator=torch.Generator().manual_seed(0))
    names = list(dict(head.named_parameters()))
    hidden_states = states(4).double().requires_grad_()

    def nats(hidden_states: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        found: Tensor = torch.func.functional_call(head, given, (hidden_states, patches))
        return found

    # In float64 as a whole; the code rounds states and logits to float32.
    head.forward = lambda hidden_states, patches: head.log_probabilities(hidden_states, patches)  # type: ignore[method-assign]
    inputs = (hidden_states, *(weight.detach().requires_grad_() for weight in head.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        assert torch.autograd.gradcheck(nats, inputs, fast_mode=True)


@every_patch_size
def test_the_loss_has_the_gradients_of_cross_entropy(patch_size: int) -> None:
    head, hidden_states = built(patch_size), states(3, 4).requires_grad_()
    patches = torch.randint(SIZE, (3, 4, patch_size), generator=torch.Generator().manual_seed(0))
    # Of a single token none of the patch is read.
    read = [weight for weight in head.parameters() if patch_size > 1 or weight is not head.embedding.weight]
    inputs = [hidden_states, *read]
    found = torch.autograd.grad(head.loss(hidden_states, patches), inputs)
    wanted = torch.autograd.grad(-head.log_probabilities(hidden_states, patches).mean(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_fresh_weights_are_unsure_and_the_unembedding_is_no_embedding() -> None:
    model = Calm(CalmConfig(500, 4, 64, BackboneConfig(64, 96, 1, 2, 2), TokenHeadConfig(64, 96, 1)))
    model.initialise(torch.Generator().manual_seed(0))
    head = model.head
    assert isinstance(head, TokenHead)
    assert head.embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    assert head.unembedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert [weight.shape[1] * weight.var().item() for weight in head.from_earlier] == pytest.approx([1] * 3, rel=0.1)
    assert not head.layers[0].mlp.down.weight.any()
    patches = torch.randint(500, (8, 5, 4), generator=torch.Generator().manual_seed(1))
    # Logits of unit scale cost about half a nat beside even odds.
    assert head.loss(model(patches), patches).item() == pytest.approx(math.log(500) + 0.5, abs=0.2)


def test_bfloat16_keeps_states_and_the_softmax_in_float32() -> None:
    head, hidden_states = built(3, vocabulary=50), states(4)
    patches = torch.randint(50, (4, 3), generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    for norm in (head.norm, *(layer.norm for layer in head.layers)):
        norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.loss(hidden_states, patches)
        log_p = head.log_probabilities(hidden_states, patches)
        head.logits(hidden_states, patches[:, :2])
    assert set(seen) == {torch.float32}
    assert found.dtype == log_p.dtype == torch.float32
    assert float(found) == pytest.approx(-float(log_p.mean()), rel=2e-2)
    assert float(found) == pytest.approx(float(head.loss(hidden_states, patches)), rel=5e-2)
