"""What SD 1.x, SD 2.x and SDXL share: a four-channel VAE, CLIP encoders and diffusers' UNet.

Axes: B batch, C channels, H/W latent height and width, T text tokens, D text width, N chunks of a
caption, L tokens of a chunk.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.families import _vae
from trainer.families._base import Family, Part, Target, Text

__all__ = [
    "ATTENTION_LAYERS",
    "TEXT_LAYERS",
    "LatentDiffusion",
    "clip_states",
    "in_kohya_order",
]

REMEMBERED_BYTES = 256 << 20
"""Text conditioning kept for captions that come again, while the text encoders do not change."""

# Order of sd-scripts' module tree inside a transformer block, where diffusers' differs.
KOHYA_ORDER = {"attn1": 0, "ff": 1, "attn2": 2}
ATTENTION_LAYERS = re.compile(r"(?:down_blocks|up_blocks|mid_block)\b.*\.?attentions\.\d+\.(.+)")
CONV_LAYERS = re.compile(
    r"(?:down_blocks|up_blocks|mid_block)\b.*\.?(?:resnets|downsamplers|upsamplers)\.\d+\..+"
)
TEXT_LAYERS = re.compile(
    r"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.[kvq]_proj|self_attn\.out_proj|mlp\.fc[12]))"
)


class LatentDiffusion(Family):
    """VAE, text memory and moving; a subclass adds loading, its text encoders and its names."""

    # diffusers' own attributes are used
    vae: Any

    latent_channels: ClassVar[int] = 4
    latent_factor: ClassVar[int] = 8
    vae_scale: ClassVar[float]
    """Model latents are the VAE's times this."""
    full_vae: ClassVar[str]
    """What a person does to have the VAE in full precision."""

    def __init__(
        self,
        *,
        unet: Callable[[], nn.Module],
        vae: Any,
        text_encoders: dict[Part, nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        keep_text: bool,
    ) -> None:
        self._read_unet: Callable[[], nn.Module] | None = unet
        self.vae = vae
        self.text_encoders = text_encoders
        self.device = device
        self.dtype = dtype
        self.keep_text = keep_text
        """Keep the conditioning of each caption: only while nothing in the text encoders changes."""
        self._fingerprint = ""
        self._kept: OrderedDict[tuple[str, bool], Text] = OrderedDict()

    def load_unet(self) -> nn.Module:
        """See `Family.load_unet`."""
        read, self._read_unet = self._read_unet, None  # which holds the file
        assert read is not None
        return read()

    # --- pictures -------------------------------------------------------------------------------

    def vae_fingerprint(self) -> str:
        """SHA-256 over the VAE's names, dtypes, shapes and bytes."""
        if not self._fingerprint:
            self._fingerprint = _vae.fingerprint(self.vae)
        return self._fingerprint

    def encode_images(self, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A sample of the VAE's posterior, unscaled."""
        mend = f"{self.full_vae}, or use another VAE"
        return _vae.sample(self.vae, pixels_BCHW, generators, what="the VAE", mend=mend)

    def to_model_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Times `vae_scale`."""
        return latents_BCHW * self.vae_scale

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Model latents to pictures in [-1, 1], float32."""
        return _vae.decode(self.vae, latents_BCHW / self.vae_scale)

    # --- text -----------------------------------------------------------------------------------

    @abstractmethod
    def encode_now(self, prompts: Sequence[str], weighted: bool) -> Text:
        """Text conditioning, worked out whether or not it is remembered."""

    def encode_prompts(self, prompts: Sequence[str], *, weighted: bool = False) -> Text:
        """Hidden states of captions, 75 n + 2 tokens; see `Family.encode_prompts`."""
        if not self.keep_text:
            return self.encode_now(prompts, weighted)
        return stack_texts(self._keep(prompts, weighted))

    def freeze_text(self) -> None:
        """Keep text conditioning from now on, of the text encoders as they are now."""
        self._kept.clear()
        self.keep_text = True

    def _keep(self, prompts: Sequence[str], weighted: bool) -> list[Text]:
        distinct = dict.fromkeys(prompts)
        missing = [prompt for prompt in distinct if (prompt, weighted) not in self._kept]
        for prompt in distinct:
            if (prompt, weighted) in self._kept:
                self._kept.move_to_end((prompt, weighted))
        if missing:
            with torch.no_grad():
                text = self.encode_now(missing, weighted)
            parts = split_text(text)
            for prompt, part in zip(missing, parts, strict=True):
                self._kept[prompt, weighted] = part
            states, pooled = parts[0].states_BTD, parts[0].pooled_BD
            room = REMEMBERED_BYTES // (states.nbytes + (0 if pooled is None else pooled.nbytes))
            while len(self._kept) > max(len(distinct), room):
                self._kept.popitem(last=False)
        return [self._kept[prompt, weighted] for prompt in prompts]

    # --- layers ---------------------------------------------------------------------------------

    def text_targets(self, part: Part, prefix: str) -> Iterator[Target]:
        """Layers of a CLIP text encoder; ``prefix`` is Kohya's: lora_te, lora_te1, lora_te2."""
        for name, module in self.text_encoders[part].named_modules():
            layer = TEXT_LAYERS.fullmatch(name)
            if layer and isinstance(module, nn.Linear):
                # transformers 5 has no level text_model in CLIPTextModel, Kohya's names do.
                stem = layer[1].replace(".", "_")
                yield Target(name=f"{prefix}_text_model_{stem}", module=module, part=part)

    def unet_layers(self) -> Iterator[tuple[str, nn.Linear | nn.Conv2d, str | None]]:
        """Layers of the UNet that a network may wrap, in diffusers' order.

        Yields:
            Diffusers' name, the layer, and for a layer of an attention block its name in there.
        """
        for name, module in self.unet.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                attention = ATTENTION_LAYERS.fullmatch(name)
                if attention or CONV_LAYERS.fullmatch(name):
                    yield name, module, attention and attention[1]

    # --- memory ---------------------------------------------------------------------------------

    def move(self, parts: Iterable[Literal["vae", "text_encoders", "unet"]], device: torch.device) -> None:
        """Move whole models."""
        for part in parts:
            if part == "vae":
                self.vae.to(device)
            elif part == "unet":
                self.unet.to(device)
            else:
                for encoder in self.text_encoders.values():
                    encoder.to(device)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations; all models go to train mode, which has no dropout to switch on."""
        self.unet.enable_gradient_checkpointing()
        self.unet.train()
        for encoder in self.text_encoders.values():
            checkpointed: Any = encoder
            checkpointed.activation_checkpointing_enable({"use_reentrant": False})
            checkpointed.train()


def split_text(text: Text) -> list[Text]:
    """One Text for each row, with memory of its own."""
    states = [state[None].clone() for state in text.states_BTD.unbind(0)]
    if text.pooled_BD is None:
        return [Text(state) for state in states]
    pooled = [row[None].clone() for row in text.pooled_BD.unbind(0)]
    return [Text(state, row) for state, row in zip(states, pooled, strict=True)]


def stack_texts(texts: Sequence[Text]) -> Text:
    """The reverse of `split_text`."""
    pooled = [text.pooled_BD for text in texts if text.pooled_BD is not None]
    return Text(torch.cat([text.states_BTD for text in texts]), torch.cat(pooled) if pooled else None)


def clip_states(encoder: Any, ids_XL: Tensor, layers: int) -> Tensor:
    """Hidden states XLD of a CLIPTextModel after its first ``layers`` layers, before the final norm.

    The layers are called one by one: those that are left out are never computed.
    """
    place = encoder.embeddings.token_embedding.weight.device
    states: Tensor = encoder.embeddings(input_ids=ids_XL.to(place, non_blocking=True))
    for layer in encoder.encoder.layers[:layers]:
        states = layer(states, None, is_causal=True)
    return states


def in_kohya_order(unet: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Sort keys of a UNet's layers by diffusers' name: their places in sd-scripts' module tree."""
    named = [name for name, _ in unet.named_modules()]
    first = {name: place for place, name in enumerate(named)}
    keys: dict[str, tuple[int, int, int]] = {}
    for place, name in enumerate(named):
        block, _, rest = name.partition(".transformer_blocks.")
        parts = rest.split(".")
        if len(parts) < 3:
            keys[name] = (place, 0, 0)
        else:
            head = f"{block}.transformer_blocks.{parts[0]}"
            keys[name] = (first[head], KOHYA_ORDER.get(parts[1], 3), place)
    return keys
