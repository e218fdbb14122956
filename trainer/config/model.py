"""The base model and its family, names and formats of what is saved."""

from __future__ import annotations

from typing import Annotated

from trainer.config._section import Section
from trainer.config.ui import ANIMA, FLUX, HUNYUAN, LUMINA, SD, SD3, SDXL, Ui

__all__ = ["ModelFields"]


class ModelFields(Section):
    """The base model and its family, names and formats of what is saved."""

    pretrained_model_name_or_path: Annotated[
        str,
        Ui(
            tab="Model",
            label="Pretrained model name or path",
            widget="dropdown",
            choices=(
                "stabilityai/stable-diffusion-xl-base-1.0",
                "stabilityai/stable-diffusion-xl-refiner-1.0",
                "stabilityai/stable-diffusion-2-1-base/blob/main/v2-1_512-ema-pruned",
                "stabilityai/stable-diffusion-2-1-base",
                "stabilityai/stable-diffusion-2-base",
                "stabilityai/stable-diffusion-2-1/blob/main/v2-1_768-ema-pruned",
                "stabilityai/stable-diffusion-2-1",
                "stabilityai/stable-diffusion-2",
                "CompVis/stable-diffusion-v1-4",
            ),
            free_text=True,
            path="model",
            effect="honoured",
            sd_scripts_arg="--pretrained_model_name_or_path",
            since="2022-12-28",
        ),
    ] = "runwayml/stable-diffusion-v1-5"
    """The model that the LoRA is trained on: a .safetensors or .ckpt file, a diffusers folder, or the
    name of a Hugging Face repository. A LoRA works best with this model and its relatives."""

    output_name: Annotated[
        str,
        Ui(
            tab="Model",
            label="Trained Model output name",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--output_name",
            since="2023-01-09",
        ),
    ] = "last"
    """Name of the LoRA file, without an ending. Saves in between, samples and the JSON of the run start
    with it too."""

    train_data_dir: Annotated[
        str,
        Ui(
            tab="Model",
            label="Image folder (containing training images subfolders)",
            widget="dropdown",
            free_text=True,
            path="folder",
            effect="adapted",
            reason="EXIF orientation is honoured, and a folder without numbered sub-folders is taken too.",
            sd_scripts_arg="--train_data_dir",
            since="2022-12-28",
        ),
    ] = ""
    """Folder with the training pictures, sorted into sub-folders named "repeats_name", for example
    "20_sks dog". A larger number of repeats makes those pictures count more often in each epoch."""

    dataset_config: Annotated[
        str,
        Ui(
            tab="Model",
            label="Dataset config file (Optional. Select the toml configuration file to use for the dataset)",
            widget="dropdown",
            free_text=True,
            path="file",
            effect="honoured",
            sd_scripts_arg="--dataset_config",
            since="2024-03-19",
            rare=True,
        ),
    ] = ""
    """A TOML file in the format of sd-scripts that describes several data sets. If given, it takes the
    place of the picture folder, resolution and batch size."""

    v2: Annotated[
        bool,
        Ui(
            tab="Model",
            label="v2",
            widget="checkbox",
            families=("sd2",),
            effect="honoured",
            sd_scripts_arg="--v2",
            since="2022-12-28",
        ),
    ] = False
    """Tick it if the base model is Stable Diffusion 2.x. Its text encoder differs from that of 1.x, so
    the wrong setting stops the model from loading."""

    v_parameterization: Annotated[
        bool,
        Ui(
            tab="Model",
            label="v_param",
            widget="checkbox",
            families=SD,
            effect="honoured",
            sd_scripts_arg="--v_parameterization",
            since="2022-12-28",
        ),
    ] = False
    """Tick it if the base model was trained to predict velocity instead of noise, as SD 2.x for 768
    pixels and NoobAI's v-pred models of SDXL were. The wrong setting ruins the result."""

    sdxl: Annotated[
        bool,
        Ui(
            tab="Model",
            label="SDXL",
            widget="checkbox",
            families=SDXL,
            effect="honoured",
            sd_scripts_arg=None,
            since="2023-06-30",
        ),
    ] = False
    """Tick it if the base model is SDXL or one of its relatives, such as Pony or Illustrious."""

    sd3_checkbox: Annotated[
        bool,
        Ui(
            tab="Model",
            label="SD3",
            widget="checkbox",
            families=SD3,
            effect="adapted",
            reason="A run with this switch on is refused before it starts: SD3 is not trained.",
            sd_scripts_arg=None,
            since="2024-12-31",
        ),
    ] = False
    """Tick it if the base model is Stable Diffusion 3 or 3.5."""

    flux1_checkbox: Annotated[
        bool,
        Ui(
            tab="Model",
            label="Flux.1",
            widget="checkbox",
            families=FLUX,
            effect="honoured",
            sd_scripts_arg=None,
            since="2024-08-10",
        ),
    ] = False
    """Tick it if the base model is FLUX.1 or Chroma."""

    hunyuan_image_checkbox: Annotated[
        bool,
        Ui(
            tab="Model",
            label="HunyuanImage-2.1",
            widget="checkbox",
            families=HUNYUAN,
            effect="adapted",
            reason="A run with this switch on is refused before it starts: HunyuanImage is not trained.",
            sd_scripts_arg=None,
            since="2026-07-08",
            rare=True,
        ),
    ] = False
    """Tick it if the base model is HunyuanImage 2.1."""

    anima_checkbox: Annotated[
        bool,
        Ui(
            tab="Model",
            label="Anima",
            widget="checkbox",
            families=ANIMA,
            effect="adapted",
            reason="A run with this switch on is refused before it starts: Anima is not trained.",
            sd_scripts_arg=None,
            since="2026-02-11",
            rare=True,
        ),
    ] = False
    """Tick it if the base model is Anima."""

    lumina_checkbox: Annotated[
        bool,
        Ui(
            tab="Model",
            label="Lumina",
            widget="checkbox",
            families=LUMINA,
            effect="adapted",
            reason="A run with this switch on is refused before it starts: Lumina is not trained.",
            sd_scripts_arg=None,
            since="2026-02-10",
            rare=True,
        ),
    ] = False
    """Tick it if the base model is Lumina Image 2.0."""

    training_comment: Annotated[
        str,
        Ui(
            tab="Model",
            label="Training comment",
            widget="textbox",
            effect="honoured",
            sd_scripts_arg="--training_comment",
            since="2023-01-22",
        ),
    ] = ""
    """A note stored inside the LoRA file. Many people put the trigger word here."""

    save_model_as: Annotated[
        str,
        Ui(
            tab="Model",
            label="Save trained model as",
            widget="dropdown",
            choices=("ckpt", "safetensors"),
            effect="honoured",
            sd_scripts_arg="--save_model_as",
            since="2022-12-28",
        ),
    ] = "safetensors"
    """File format of the LoRA. Every program reads safetensors; ckpt is an older format that can carry
    harmful code."""

    save_precision: Annotated[
        str,
        Ui(
            tab="Model",
            label="Save precision",
            widget="dropdown",
            choices=("float", "fp16", "bf16"),
            effect="honoured",
            sd_scripts_arg="--save_precision",
            since="2022-12-28",
        ),
    ] = "fp16"
    """Number format inside the LoRA file. fp16 and bf16 halve its size and lose nothing that can be
    seen; float keeps full precision."""

    model_list: Annotated[
        str,
        Ui(
            tab="Model",
            label="",
            widget="textbox",
            hidden=True,
            effect="none",
            reason="Left over from a list that Kohya removed; only kept so that files stay the same.",
            sd_scripts_arg=None,
            since="2023-01-09",
            rare=True,
        ),
    ] = ""
    """Value of a menu that no longer exists."""
