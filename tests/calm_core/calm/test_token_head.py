"""The token head: a distribution of whole patches, by the chain rule, and its loss and gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.inference.decoding import Prompts, Sampling, calm_steps
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


def tokens(*shape: int, seed: int = 0, vocabulary: int = SIZE) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def logits_by_hand(head: TokenHead, hidden_state: Tensor, read: list[int], patch: list[int], place: int) -> Tensor:
    """Of the token at ``place``, spelt out with sums over ``read`` and the tokens before it."""
    size = head.config.hidden_size
    state = head.from_hidden_state(hidden_state)[place * size : (place + 1) * size]
    for position, token in enumerate([*read, *patch[:place]]):
        weight = head.from_earlier[place][:, position * size : (position + 1) * size]
        state = state + weight @ head.embedding.weight[token]
    for layer in head.layers:
        normed = state / (state.square().mean() + 1e-6).sqrt() * layer.norm.weight
        mlp = layer.mlp
        state = state + mlp.down.weight @ (F.silu(mlp.gate.weight @ normed) * (mlp.up.weight @ normed))
    normed = state / (state.square().mean() + 1e-6).sqrt() * head.norm.weight
    return head.unembedding.weight @ normed


@every_patch_size
def test_probabilities_of_all_patches_sum_to_one(patch_size: int) -> None:
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=patch_size)))
    hidden_states, read = states(4, 1).expand(-1, len(every), -1), tokens(4, 1, patch_size).expand(-1, len(every), -1)
    log_p = built(patch_size).log_probabilities(hidden_states, read, every.expand(4, -1, -1)).sum(dim=-1)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4))
    assert log_p.exp().max() > 1.5 / len(every)  # far from even


@every_patch_size
def test_each_way_to_the_logits_is_that_by_hand(patch_size: int) -> None:
    head, hidden_states = built(patch_size), states(2, 4)
    patches, read = tokens(2, 4, patch_size), tokens(2, 4, patch_size, seed=1)
    log_p, loss = head.log_probabilities(hidden_states, read, patches), head.loss(hidden_states, read, patches)
    total = 0.0
    for row, column, place in itertools.product(range(2), range(4), range(patch_size)):
        before, patch = read[row, column], patches[row, column]
        expected = logits_by_hand(head, hidden_states[row, column], before.tolist(), patch.tolist(), place)
        found = head.logits(hidden_states[row, column], torch.cat([before, patch[:place]]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        nats = F.cross_entropy(expected, patches[row, column, place])
        torch.testing.assert_close(-log_p[row, column, place], nats, rtol=1e-4, atol=1e-5)
        total += float(nats.detach())
    assert loss.item() == pytest.approx(total / patches.numel(), rel=1e-5)


def test_a_token_sees_those_before_it_and_no_other() -> None:
    head, hidden_state = built(3), states(1)
    read, patch = torch.tensor([[2, 2, 0]]), torch.tensor([[0, 1, 2]])
    log_p = head.log_probabilities(hidden_state, read, patch)
    for place in range(3):
        other = patch.clone()
        other[0, place] = (patch[0, place] + 1) % SIZE
        changed = (head.log_probabilities(hidden_state, read, other) != log_p)[0].tolist()
        assert changed == [False] * place + [True] * (3 - place)


@every_patch_size
def test_every_token_sees_all_of_the_patch_read_last(patch_size: int) -> None:
    head, hidden_state = built(patch_size), states(1)
    read, patch = tokens(1, patch_size), tokens(1, patch_size, seed=1)
    log_p = head.log_probabilities(hidden_state, read, patch)
    logits = head.logits(hidden_state, read)
    for place in range(patch_size):
        other = read.clone()
        other[0, place] = (read[0, place] + 1) % SIZE
        assert (head.log_probabilities(hidden_state, other, patch) != log_p).all()
        assert not torch.isclose(head.logits(hidden_state, other), logits).all()


@every_patch_size
def test_generation_goes_on_from_the_patch_read_last(patch_size: int) -> None:
    """Frequencies are those of the logits after the prompt's last patch, and then after the patch just written."""
    model = Calm(CalmConfig(SIZE, patch_size, 16, BackboneConfig(16, 24, 1, 2, 1), TokenHeadConfig(6, 7, 1)))
    # Large embeddings, so that it matters which patch was read.
    initialise(model, torch.Generator().manual_seed(patch_size), embedding_std=4.0)
    head, count = model.head, 4000
    assert isinstance(head, TokenHead)
    prompt = tokens(1, 3 * patch_size)
    prompts = Prompts(prompt.expand(count, -1), torch.zeros(count, dtype=torch.int64))
    steps = calm_steps(model, None, prompts, Sampling(), torch.Generator().manual_seed(0))
    first, second = next(steps).token_ids, next(steps).token_ids
    patches, counts = first.unique(dim=0, return_counts=True)
    likeliest = patches[counts.argmax()]
    text = torch.cat([prompt[0], likeliest]).view(1, -1, patch_size)
    hidden_states = model(text)[0].detach()
    for written, hidden_state, read, other in (
        (first, hidden_states[-2], text[0, -2], text[0, -1]),
        (second[(first == likeliest).all(dim=1)], hidden_states[-1], text[0, -1], text[0, -2]),
    ):
        found = torch.bincount(written[:, 0], minlength=SIZE) / len(written)
        expected = head.logits(hidden_state, read).softmax(dim=-1)
        error = (expected * (1 - expected) / len(written)).sqrt()
        assert ((found - expected).abs() < 4 * error).all()
        assert not torch.equal(read, other)
        assert ((found - head.logits(hidden_state, other).softmax(dim=-1)).abs() > 4 * error).any()


def test_gradients_are_those_of_finite_differences() -> None:
    head = built(3).double()
    patches, read = tokens(4, 3), tokens(4, 3, seed=1)
    names = list(dict(head.named_parameters()))
    hidden_states = states(4).double().requires_grad_()

    def nats(hidden_states: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        found: Tensor = torch.func.functional_call(head, given, (hidden_states, read, patches))
        return found

    # In float64 as a whole; the code rounds states and logits to float32.
    head.forward = head.log_probabilities  # type: ignore[method-assign]
    inputs = (hidden_states, *(weight.detach().requires_grad_() for weight in head.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        assert torch.autograd.gradcheck(nats, inputs, fast_mode=True)


@every_patch_size
def test_the_loss_has_the_gradients_of_cross_entropy(patch_size: int) -> None:
    head, hidden_states = built(patch_size), states(3, 4).requires_grad_()
    patches, read = tokens(3, 4, patch_size), tokens(3, 4, patch_size, seed=1)
    inputs = [hidden_states, *head.parameters()]
    found = torch.autograd.grad(head.loss(hidden_states, read, patches), inputs)
    wanted = torch.autograd.grad(-head.log_probabilities(hidden_states, read, patches).mean(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_fresh_weights_are_unsure_and_the_unembedding_is_no_embedding() -> None:
    model = Calm(CalmConfig(500, 4, 64, BackboneConfig(64, 96, 1, 2, 2), TokenHeadConfig(64, 96, 1)))
    model.initialise(torch.Generator().manual_seed(0))
    head = model.head
    assert isinstance(head, TokenHead)
    assert head.embedding.weight.std().item() == pytest.approx(1, rel=0.03)
    assert head.unembedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert [weight.shape[1] * weight.var().item() for weight in head.from_earlier] == pytest.approx([1] * 4, rel=0.1)
    assert not head.layers[0].mlp.down.weight.any()
    patches, following = tokens(2, 8, 5, 4, seed=1, vocabulary=500)
    # Logits of unit scale cost about half a nat beside even odds.
    assert head.loss(model(patches), patches, following).item() == pytest.approx(math.log(500) + 0.5, abs=0.2)


def test_bfloat16_keeps_states_and_the_softmax_in_float32() -> None:
    head, hidden_states = built(3, vocabulary=50), states(4)
    patches, read = tokens(4, 3, vocabulary=50), tokens(4, 3, seed=1, vocabulary=50)
    seen: list[torch.dtype] = []
    for norm in (head.norm, *(layer.norm for layer in head.layers)):
        norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.loss(hidden_states, read, patches)
        log_p = head.log_probabilities(hidden_states, read, patches)
        head.logits(hidden_states, torch.cat([read, patches[:, :2]], dim=1))
    assert set(seen) == {torch.float32}
    assert found.dtype == log_p.dtype == torch.float32
    assert float(found) == pytest.approx(-float(log_p.mean()), rel=2e-2)
    assert float(found) == pytest.approx(float(head.loss(hidden_states, read, patches)), rel=5e-2)
