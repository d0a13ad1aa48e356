"""Limits of a model's sizes.

A limit stands once, as the type of a size. The config types of the models and the schema of params.yaml use the same
types, so config.json and params.yaml are held to the same limits. They lie far above any use and keep what is computed
from sizes within 64 bits. Nothing here needs torch: params.yaml is checked without it.
"""

from typing import Annotated

from pydantic import Field

VocabularySize = Annotated[int, Field(ge=1, le=1 << 24)]
PatchSize = Annotated[int, Field(ge=1, le=16)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
"""Features of a vector, entries of a head's noise, attention heads."""
Layers = Annotated[int, Field(ge=1, le=1000)]
HalvedLayers = Annotated[int, Field(ge=2, le=1000)]
"""Layers of an autoencoder's half, which works with some on tokens and with some on the patch."""
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
"""Calls of a denoiser's network for one sample."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def require_heads(hidden_size: int, heads: int, key_value_heads: int) -> None:
    """Raise ValueError unless attention heads share the features, and key/value heads serve the heads, evenly."""
    if hidden_size % heads:
        raise ValueError(f"heads {heads} does not divide hidden_size {hidden_size}")
    # A rotation turns features in pairs.
    if hidden_size // heads % 2:
        raise ValueError(f"hidden_size / heads is {hidden_size // heads}; rotary embeddings need it even")
    if heads % key_value_heads:
        raise ValueError(f"key_value_heads {key_value_heads} does not divide heads {heads}")
