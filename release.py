# SPDX-License-Identifier: MIT
"""Names and shapes of the authors' released checkpoint, tcl.pth, as this project's: a translation of state dicts.

gcl.load calls it. Imports nothing of this project.
"""

import math

RELEASE_CLIP = {  # Release's key prefixes of the frozen CLIP -> open_clip's; the first that fits counts
    "clip_text_encoder.": "",
    "clip_image_encoder.clip_proj.ln.": "visual.ln_post.",
    "clip_image_encoder.clip_proj.": "visual.",
    "clip_image_encoder.clip_visual.": "visual.",
}


DECODER = "masker.image_encoder.decoder."


RELEASE_GCL = {  # Release's key prefixes of the trained part -> ours; {last} is the last block's number
    "masker.image_encoder.backbone.transformer.resblocks.{last}.": "block.",
    DECODER + "decoder.net.0.conv.": "adapter.stages.0.1.",
    DECODER + "decoder.net.0.conv2.": "adapter.stages.0.2.",
    DECODER + "decoder.net.1.conv.": "adapter.stages.1.1.",
    DECODER + "decoder.net.1.conv2.": "adapter.stages.1.2.",
    DECODER + "image_proj.ln.": "head.ln_post.",
    DECODER + "image_proj.": "head.",
    "masker.sim2mask.": "",
    "tcli_loss.logit_scale": "log_scale.gcl_v",
    "tclf_loss.logit_scale": "log_scale.gcl_f",
}


def config_from_weights(state):
    """Model config of an OpenAI-style CLIP from its tensors' shapes; its heads are 64 wide, its GELU quick."""
    layers = {
        prefix: len(
            {key.split(".resblocks.")[1].split(".")[0] for key in state if key.startswith(prefix)}
        )
        for prefix in ("visual.transformer.resblocks.", "transformer.resblocks.")
    }
    width, _, patch, _ = state["visual.conv1.weight"].shape  # [D, 3, patch, patch]
    size = patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    vocab, text_width = state["token_embedding.weight"].shape
    vision = {
        "width": width,
        "patch_size": patch,
        "image_size": size,
        "layers": layers["visual.transformer.resblocks."],
    }
    text = {
        "width": text_width,
        "heads": text_width // 64,
        "layers": layers["transformer.resblocks."],
    }
    text |= {"vocab_size": vocab, "context_length": state["positional_embedding"].shape[0]}
    sizes = {"embed_dim": state["text_projection"].shape[1], "vision_cfg": vision, "text_cfg": text}
    return {**sizes, "quick_gelu": True}


def rename(state, prefixes):
    """The entries of a state dict that start with one of the prefixes (old -> new), under their new names."""
    renamed = {}
    for key, value in state.items():
        old = next((old for old in prefixes if key.startswith(old)), None)
        if old is not None:
            renamed[prefixes[old] + key.removeprefix(old)] = value
    return renamed
