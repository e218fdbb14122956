"""diffusers and transformers, for every module that needs them: who imports this waits until all of it is there.

Both look for a class when it is first asked for. Two threads that do so at once, as a check and a start are, can each
be given modules that the other has half done ("cannot import name 'AutoModel' from 'transformers'").
"""

from __future__ import annotations

import diffusers
import diffusers.optimization
import transformers
import transformers.optimization
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "FluxTransformer2DModel",
    "T5Config",
    "T5EncoderModel",
    "T5Tokenizer",
    "UNet2DConditionModel",
    "diffusers",
    "transformers",
]
