"""Text models with an encoder of images around them, of which the text model is what is run.

Their config.json has the text model's configuration inside, and their files have its tensors under
other names, beside the encoder's.
"""

import re

WRAPPERS = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration")
# The architectures of text models, by the type of the configuration that is inside.
TEXT_MODELS = {"gemma3_text": "Gemma3ForCausalLM", "mistral": "MistralForCausalLM"}
# What the names of their tensors begin with, and what that is without the wrapper: as the hub has
# them, and as transformers names its modules since 4.52.
TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
IMAGE_TENSOR = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def is_wrapper(architectures: object) -> bool:
    """Whether the "architectures" of a config.json, which may be anything, name a wrapper."""
    return isinstance(architectures, list) and architectures != [] and architectures[0] in WRAPPERS


def text_name(name: str) -> str | None:
    """The name of a wrapped model's tensor in the text model; None if it is of the image encoder.

    A name that is of neither is returned as it is: the loader will not know it.
    """
    if IMAGE_TENSOR.match(name):
        return None
    for prefix, replacement in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
