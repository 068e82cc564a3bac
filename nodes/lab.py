"""The bundled lab models: trained in minutes, drawn in seconds, no download."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import lab
from ..lab.characters import WORDS
from ..lab.pairs import CHANGES, draw_pairs
from ..lab.portraits import draw_portraits


class LabLoader(io.ComfyNode):
    """A lab model as the host's own MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_LabLoader",
            display_name="Load Lab Model",
            category="concept/lab",
            description=(
                "Loads a tiny text-to-image model that ships with this pack: it draws coloured shapes at 64 to 128 pixels in about a "
                "second on a CPU. Use it to try a workflow before running it on a real checkpoint. All samplers, LoRA loaders and VAE "
                "nodes work on it."
            ),
            search_aliases=["lab", "tiny model", "test model", "demo model", "checkpoint", "shapes"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(lab.MODELS),
                    default="unet",
                    tooltip="Which lab model: 'unet' (default) is of Stable Diffusion 1.5's class, 'dit' of Flux's class.",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The image model."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder; it knows the lab's words (see this node's help)."),
                io.Vae.Output(
                    "vae",
                    display_name="vae",
                    tooltip="The autoencoder: latents have 4 channels at a quarter (unet) or an eighth (dit) of the picture's size.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model="unet"):
        # A linked input arrives as None; `execute` checks its value.
        return True if model is None or model in lab.MODELS else lab.unknown(model)

    @classmethod
    def fingerprint_inputs(cls, model="unet"):
        return lab.fingerprint(model) if model in lab.MODELS else str(model)

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        loaded = lab.load(model)
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae)


def scene_inputs() -> list:
    """Of what size scenes are drawn, and which."""
    return [
        io.Int.Input("width", default=64, min=64, max=128, step=8, tooltip="Width of the pictures, in pixels."),
        io.Int.Input("height", default=64, min=64, max=128, step=8, tooltip="Their height, in pixels."),
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="Which scenes are drawn."),
    ]


class LabPairs(io.ComfyNode):
    """Drawn scenes that differ in one thing, to train a slider from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_LabPairs",
            display_name="Draw Lab Pairs",
            category="concept/lab",
            description=(
                "Draws scenes of the lab's world twice, before and after one change: pairs for Train Slider from Images. For other models "
                "load pictures of your own."
            ),
            search_aliases=["lab", "image pairs", "before after", "training pictures", "shapes"],
            inputs=[
                io.Combo.Input("change", options=list(CHANGES), default="flat to neon", tooltip="What differs. All else stays."),
                io.Int.Input("count", default=8, min=1, max=1024, tooltip="How many pairs."),
                *scene_inputs(),
            ],
            outputs=[
                io.Image.Output("before", display_name="before", tooltip="The scenes before the change."),
                io.Image.Output("after", display_name="after", tooltip="The same scenes after it."),
            ],
        )

    @classmethod
    def execute(cls, change, count, width, height, seed) -> io.NodeOutput:
        return io.NodeOutput(*draw_pairs(change, count, height=height, width=width, seed=seed))


class LabCharacters(io.ComfyNode):
    """Drawn pictures of one character, to teach it from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_LabCharacters",
            display_name="Draw Lab Character",
            category="concept/lab",
            description=(
                "Draws pictures of a character that the lab's models do not know, with its mask and a caption for each: what Train "
                "Personalized Residual takes. For other models load pictures of your own."
            ),
            search_aliases=["lab", "character", "subject", "training pictures", "captions"],
            inputs=[
                io.Combo.Input("character", options=list(WORDS), default="cat", tooltip="Which of the six is drawn. No value is neutral."),
                io.String.Input("word", default="ohwx", tooltip="What the captions call it: a word that means nothing to the model."),
                io.Int.Input("count", default=4, min=1, max=256, tooltip="How many pictures."),
                io.Int.Input("beside", default=0, min=0, max=5, tooltip="Ordinary objects beside it in each. Neutral: 0, it is alone."),
                *scene_inputs(),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The pictures."),
                io.Mask.Output("masks", display_name="masks", tooltip="Where the character is in each."),
                io.String.Output("captions", display_name="captions", tooltip="A line for each picture that says all that is in it."),
            ],
        )

    @classmethod
    def execute(cls, character, word, count, beside, width, height, seed) -> io.NodeOutput:
        images, masks, captions = draw_portraits(character, count, word=word, height=height, width=width, seed=seed, beside=beside)
        return io.NodeOutput(images, masks, "\n".join(captions))


NODES = [LabLoader, LabPairs, LabCharacters]
