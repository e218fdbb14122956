"""Trains the demo's captioner from nothing: BLIP's own classes, small, on pictures of `assets.demo.draw`.

    python -m assets.demo.captioner.train --work SCRATCH_FOLDER

It goes on where it stopped. Like BLIP it begins every caption with "a picture of", which is cut off again, and it
says what it sees as tags, always in the same order. Unlike the demo's base model it knows blue hair and eye
patches too: a captioner describes what is there.

Letters in tensor names: B batch, C channels, H height, W width, L tokens.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from assets.demo import draw, train_base

SEED: Final = 31
PICTURES: Final = 12_000
SIZE_PX: Final = 64
PROMPT: Final = "a picture of"
HERE: Final = Path(__file__).parent / "blip"
SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def random_portrait(rng: random.Random) -> draw.Portrait:
    """A portrait of the whole world: now and then with blue hair or an eye patch, as the demo's subject has."""
    portrait = draw.random_portrait(rng)
    if rng.random() < 0.15:
        portrait = replace(portrait, hair="blue")
    return replace(portrait, eye_patch=rng.random() < 0.2)


def attributes(portrait: draw.Portrait) -> dict[str, str]:
    """What a caption says, by name; "" for what it passes over."""
    return {
        "hair": f"{portrait.style} {portrait.hair} hair",
        "skin": f"{portrait.skin} skin",
        "clothes": f"{portrait.clothes} {portrait.garment}",
        "background": draw.background_phrase(portrait),
        "facing": draw.facing_phrase(portrait),
        "mood": "smiling" if portrait.smile else "serious",
        "glasses": "glasses" if portrait.glasses else "",
        "eye patch": "eye patch" if portrait.eye_patch else "",
    }


def caption(portrait: draw.Portrait) -> str:
    """The caption that the model learns, without its prompt."""
    return ", ".join(["person", *(tag for tag in attributes(portrait).values() if tag)])


def make_tokenizer() -> BertTokenizer:
    """BERT's tokenizer, as BLIP has it, over the words of the demo world."""
    rng = random.Random(0)
    texts = [PROMPT, *(caption(random_portrait(rng)) for _ in range(3000))]
    words = sorted({word for text in texts for word in text.replace(",", " ,").split()})
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL, *words])})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def make_model(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """BLIP with two layers of width 192 to look and two of width 96 to write."""
    config = BlipConfig(
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE_PX,
            "patch_size": 16,
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 96,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=64,
        image_text_hidden_size=64,
    )
    return BlipForConditionalGeneration(config)


def make_image_processor() -> BlipImageProcessorPil:
    """BLIP's preparation of pictures, at the demo's size."""
    return BlipImageProcessorPil(size={"height": SIZE_PX, "width": SIZE_PX})


def draw_pictures(work: Path) -> tuple[list[draw.Portrait], Tensor]:
    """The portraits of the training set, and their pixels as BCHW in 0..255, as the processor resizes them."""
    rng = random.Random(f"captioner {SEED}")
    portraits = [random_portrait(rng) for _ in range(PICTURES)]
    file = work / "pictures.npy"
    if not file.exists():
        processor = make_image_processor()
        parts = []
        for start in range(0, PICTURES, 100):
            pictures = [draw.draw(portrait) for portrait in portraits[start : start + 100]]
            found = processor(
                pictures, do_rescale=False, do_normalize=False, return_tensors="np"
            ).pixel_values
            parts.append(np.rint(found).clip(0, 255).astype(np.uint8))
        unfinished = file.with_suffix(".tmp")
        with unfinished.open("wb") as handle:
            np.save(handle, np.concatenate(parts))
        unfinished.replace(file)
    return portraits, torch.from_numpy(np.load(file))


@torch.no_grad()
def start_from_patches(model: BlipForConditionalGeneration, values_BCHW: Tensor) -> None:
    """Lets the first layer begin with the main directions in which patches differ, about equally loud."""
    embedding = model.vision_model.embeddings.patch_embedding
    edge = embedding.kernel_size[0]
    patches_NK = torch.nn.functional.unfold(values_BCHW, edge, stride=edge).transpose(1, 2).flatten(0, 1)
    mean_K = patches_NK.mean(0)
    strength_K, directions_KK = torch.linalg.eigh(torch.cov(patches_NK.T))
    count = embedding.out_channels
    strength, directions = strength_K.flip(0)[:count], directions_KK.flip(1)[:, :count]
    rows = (directions / (strength + 0.002 * strength[0]).sqrt()).T
    embedding.weight.copy_(rows.reshape(embedding.weight.shape))
    embedding.bias.copy_(-rows @ mean_K)


def train(work: Path, steps: int, batch_size: int) -> BlipForConditionalGeneration:
    """The averaged model after ``steps`` steps of ``batch_size`` pictures."""
    portraits, pictures_BCHW = draw_pictures(work)
    tokenizer, processor = make_tokenizer(), make_image_processor()
    mean_C = torch.tensor(processor.image_mean).reshape(3, 1, 1)
    deviation_C = torch.tensor(processor.image_std).reshape(3, 1, 1)
    prompt_length = len(tokenizer(PROMPT).input_ids) - 1
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    start_from_patches(model, (pictures_BCHW[:2000].float() / 255 - mean_C) / deviation_C)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"captioner {SEED} {step}")
        chosen = [rng.randrange(PICTURES) for _ in range(batch_size)]
        values_BCHW = pictures_BCHW[chosen].float()
        values_BCHW = values_BCHW + torch.randn(batch_size, 3, 1, 1) * 4 + torch.randn_like(values_BCHW) * 2
        values_BCHW = (values_BCHW / 255 - mean_C) / deviation_C
        texts = [f"{PROMPT} {caption(portraits[index])}" for index in chosen]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        ids_BL = tokens.input_ids
        ids_BL[:, 0] = model.config.text_config.bos_token_id
        labels_BL = ids_BL.masked_fill(tokens.attention_mask == 0, -100)
        labels_BL[:, :prompt_length] = -100
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(
                pixel_values=values_BCHW,
                input_ids=ids_BL,
                attention_mask=tokens.attention_mask,
                labels=labels_BL,
            ).loss
        return loss

    averaged = train_base.run_steps(
        "captioner-training", {"blip": model}, loss_of, work, steps, 1e-3, 0.02, ema_decay=0.995
    )["blip"]
    assert isinstance(averaged, BlipForConditionalGeneration)
    return averaged


def export(out: Path, model: BlipForConditionalGeneration) -> None:
    """Writes model and processor in fp16, as transformers reads them."""
    model.eval().to(torch.float16).save_pretrained(out)
    BlipProcessor(make_image_processor(), make_tokenizer()).save_pretrained(out)
    file = out / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Trains, or with --export-now writes the model from the newest checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished model goes")
    parser.add_argument("--steps", type=int, default=560)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--export-now", action="store_true", help="no training: write what the checkpoint holds"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.export_now:
        model = make_model(make_tokenizer())
        state = torch.load(given.work / "captioner-training.pt", weights_only=True)
        model.load_state_dict(state["averaged"]["blip"])
    else:
        model = train(given.work, given.steps, given.batch_size)
    export(given.out, model)


if __name__ == "__main__":
    main()
