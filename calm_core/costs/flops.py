"""FLOPs of training and inference, analytic and counted (paper, section 6).

The accounting is the paper's: a multiply-add is 2, attention is charged over the full context, the backward
pass is twice the forward pass, norms and activations are free, and so is the frozen encoder's pass in CALM's
training. ``counted`` runs the same models under torch's own FLOP counter, on the meta device, as a check.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior
from calm_core.calm.head import HeadObjective
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.draws import GeneratorDraws
from calm_core.transformer.model import Transformer, TransformerConfig

BACKWARD = 2


class ModelFlops(NamedTuple):
    """FLOPs a token, and the parameters that they come from."""

    parameters: int
    training_per_token: float
    inference_per_token: float


def layers_parameters(config: BackboneConfig) -> int:
    """Weights of the matrices in all layers: layers * (2 D^2 + 2 D D_kv + 3 D I), D_kv = D without grouped queries."""
    hidden_size = config.hidden_size
    key_value_size = hidden_size // config.heads * config.key_value_heads
    attention = 2 * hidden_size**2 + 2 * hidden_size * key_value_size
    # Queries and output D^2 each, keys and values D D_kv each, three projections of SwiGLU. Embedding look-ups and
    # norms are free in the paper's accounting.
    return config.layers * (attention + 3 * hidden_size * config.intermediate_size)


def attention_flops(config: BackboneConfig, context: int) -> int:
    """Scores and weighted values of one position over ``context`` positions, in all layers: 4 C D layers."""
    return 4 * context * config.hidden_size * config.layers


def decoder_parameters(config: AutoencoderConfig, logits: bool = True) -> int:
    """Weights that decoding one patch passes through, token layers K times, with or without the output matrix."""
    size, patch_size = config.hidden_size, config.patch_size
    layer = 3 * size * config.intermediate_size
    per_patch = config.decoder_layers // 2
    per_token = config.decoder_layers - per_patch
    # From the latent, layers on the patch, expand, layers on each of K positions.
    hidden = config.latent_size * size + per_patch * layer + patch_size * size**2 + patch_size * per_token * layer
    return hidden + (patch_size * config.vocabulary_size * size if logits else 0)


def token_head_parameters(config: TokenHeadConfig, calm: CalmConfig) -> int:
    """Weights that one patch passes through in a token head, layers and output matrix K times."""
    size, patch_size = config.hidden_size, calm.patch_size
    # From the hidden state to K positions; to each, from the K tokens of the patch before and its own ones before it.
    earlier = patch_size**2 + patch_size * (patch_size - 1) // 2
    inputs = patch_size * calm.backbone.hidden_size * size + earlier * size**2
    return inputs + patch_size * (config.layers * 3 * size * config.intermediate_size + calm.vocabulary_size * size)


def encoder_parameters(config: AutoencoderConfig) -> int:
    """Weights that encoding one patch passes through, token layers counted K times."""
    size, patch_size = config.hidden_size, config.patch_size
    layer = 3 * size * config.intermediate_size
    per_token = config.encoder_layers // 2
    per_patch = config.encoder_layers - per_token
    return patch_size * per_token * layer + patch_size * size**2 + per_patch * layer + 2 * size * config.latent_size


def autoencoder_flops(config: AutoencoderConfig) -> ModelFlops:
    """Analytic count of the autoencoder: training 3 (encoder + decoder) / K a token; inference is decoding alone."""
    decoder = 2 * decoder_parameters(config)
    training = (1 + BACKWARD) * (2 * encoder_parameters(config) + decoder)
    parameters = _parameters(lambda: Autoencoder(config))
    return ModelFlops(parameters, training / config.patch_size, decoder / config.patch_size)


def transformer_flops(config: TransformerConfig, context: int) -> ModelFlops:
    """Analytic count of the Transformer at ``context`` tokens: f = 2 (P_layers + D V) + attention, training 3 f."""
    backbone = config.backbone
    output = backbone.hidden_size * config.vocabulary_size
    forward = 2 * (layers_parameters(backbone) + output) + attention_flops(backbone, context)
    return ModelFlops(_parameters(lambda: Transformer(config)), (1 + BACKWARD) * forward, forward)


def calm_flops(
    config: CalmConfig, autoencoder: AutoencoderConfig, context: int, samples: int, scored_targets: int = 0
) -> ModelFlops:
    """Analytic count of CALM at a context of ``context`` patches, training with ``samples`` samples a position.

    Inference (b + h + d) / K, training 3 (b + N h) / K, for backbone b, head h and decoder d; heads other than
    energy call their network once a sample in training and many times in inference. Where the
    decoder's hidden states are scored too, the samples pass through the frozen decoder forwards and, for their
    gradient alone, backwards, and ``scored_targets`` targets forwards: (2 N + M') d' / K more, which the
    published recipe does not have. Input by latents costs L D instead of K D^2 in the input projection. A token head t
    is trained and sampled by as much work forwards: inference (b + t) / K, training 3 (b + t) / K.
    """
    backbone, patch_size = config.backbone, config.patch_size
    size, latent_size = backbone.hidden_size, config.latent_size
    input_size = patch_size * size if config.input == "tokens" else latent_size
    # Two linears: to 2 D, and from there to D.
    inputs = (input_size + size) * 2 * size
    forward = 2 * (layers_parameters(backbone) + inputs) + attention_flops(backbone, context)
    parameters = _parameters(lambda: Calm(config))
    if isinstance(config.head, TokenHeadConfig):
        forward += 2 * token_head_parameters(config.head, config)
        return ModelFlops(parameters, (1 + BACKWARD) * forward / patch_size, forward / patch_size)
    # Without the encoder's frozen pass, which the paper leaves out too; stages/benchmark_flops.py reports it beside.
    training = (1 + BACKWARD) * (forward + 2 * config.head.training_weights(size, latent_size, samples))
    if scored_targets:
        # The decoder is frozen: its backward pass makes gradients of activations alone, as much work as its forward
        # pass.
        training += (2 * samples + scored_targets) * 2 * decoder_parameters(autoencoder, logits=False)
    head = 2 * config.head.sampling_weights(size, latent_size)
    inference = forward + head + 2 * decoder_parameters(autoencoder)
    return ModelFlops(parameters, training / patch_size, inference / patch_size)


def counted_autoencoder_flops(config: AutoencoderConfig, patches: int = 64) -> ModelFlops:
    """What torch's FLOP counter sees of the same model, a token, on ``patches`` patches."""
    with torch.device("meta"):
        model = Autoencoder(config)
        token_ids = torch.zeros(patches, config.patch_size, dtype=torch.int64)
        latents = torch.zeros(patches, config.latent_size)

    def train() -> None:
        posterior = model.encode(token_ids)
        # Any sum of all outputs stands in for the loss, whose softmax and KL the accounting leaves out.
        (model.logits(posterior.mean).sum() + posterior.log_std.sum()).backward()

    tokens = patches * config.patch_size
    training = _count(train)
    with torch.no_grad():
        inference = _count(lambda: model.logits(latents))
    return ModelFlops(_parameters(lambda: Autoencoder(config)), training / tokens, inference / tokens)


def counted_transformer_flops(config: TransformerConfig, context: int) -> ModelFlops:
    """What torch's FLOP counter sees of the same model, a token, on one sequence of ``context`` tokens."""
    with torch.device("meta"):
        model = Transformer(config)
        token_ids = torch.zeros(1, context, dtype=torch.int64)
    # The sum stands in for the loss, whose softmax the accounting leaves out.
    training = _count(lambda: model(token_ids).sum().backward())
    with torch.no_grad():
        inference = _count(lambda: model(token_ids))
    return ModelFlops(_parameters(lambda: Transformer(config)), training / context, inference / context)


def counted_calm_flops(
    config: CalmConfig, autoencoder: AutoencoderConfig, context: int, samples: int, scored_targets: int = 0
) -> ModelFlops:
    """What torch's FLOP counter sees of the same models, a token, on one sequence of ``context`` patches."""
    with torch.device("meta"):
        model, decoder = Calm(config), Autoencoder(autoencoder).requires_grad_(False)
        shape = (config.patch_size,) if config.input == "tokens" else (config.latent_size,)
        inputs = torch.zeros(1, context, *shape, dtype=torch.int64 if config.input == "tokens" else torch.float32)
        posterior = Posterior(*torch.zeros(2, context, config.latent_size))
        spaces = (decoder.hidden_states,) if scored_targets else ()
    if isinstance(model.head, TokenHead):
        return _counted_token_head_flops(model, inputs)
    head = model.latent_head
    # Two targets, the fewest: the counter sees the score's own matrix products, which the accounting leaves out.
    objective = HeadObjective(samples, 2, 1.0, spaces, scored_targets)
    generator = torch.Generator()
    # No generator lives on the meta device: drawn on the CPU, then moved, which keeps shapes alone.
    training_draws = head.training_draws(context, objective, GeneratorDraws(generator))
    training_draws = type(training_draws)(*(draw.to("meta") for draw in training_draws))
    sampling_draws = head.sampling_draws((1, context), generator).to("meta")

    def train() -> None:
        head.loss(model(inputs).flatten(0, 1), posterior, training_draws, objective).total.backward()

    def infer() -> Tensor:
        return decoder.logits(head.sample(model(inputs), sampling_draws))

    tokens = context * config.patch_size
    training = _count(train)
    with torch.no_grad():
        inference = _count(infer)
    return ModelFlops(_parameters(lambda: Calm(config)), training / tokens, inference / tokens)


def _counted_token_head_flops(model: Calm, patches: Tensor) -> ModelFlops:
    """The same of a CALM with a token head, on ``patches`` [1, patches, K] of the meta device."""
    head, tokens = model.head, patches.numel()
    assert isinstance(head, TokenHead)
    training = _count(lambda: head.log_probabilities(model(patches), patches, patches).sum().backward())

    def infer() -> None:
        # The hidden state is read once, each token's own row of it when its turn comes.
        hidden_states = model(patches)
        for position in range(model.config.patch_size):
            head.logits(hidden_states, torch.cat([patches, patches[..., :position]], dim=-1))

    with torch.no_grad():
        inference = _count(infer)
    return ModelFlops(_parameters(lambda: Calm(model.config)), training / tokens, inference / tokens)


def _count(work: Callable[[], object]) -> int:
    # The math kernel spells attention out in matrix products, which the counter knows on every device.
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def _parameters(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
