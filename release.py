# SPDX-License-Identifier: MIT
"""Weights of others as this project names them: the authors' released checkpoint, tcl.pth, and
Hugging Face's CLIPModel. Translates state dicts.

gcl.load and backbone.py call it. Imports nothing of this project.
"""

import math
import re

import torch

BLOCK = r"masker\.image_encoder\.backbone\.transformer\.resblocks\.\d+\."
DECODER = r"masker\.image_encoder\.decoder\."

# Start of the release's key -> ours. The first that fits counts, what fits none is left out.
NAMES = (
    (r"clip_text_encoder\.", "clip."),
    (r"clip_image_encoder\.clip_proj\.ln\.", "clip.visual.ln_post."),
    (r"clip_image_encoder\.(clip_proj|clip_visual)\.", "clip.visual."),
    (BLOCK, "block."),  # the trained copy of the last block
    (DECODER + r"decoder\.net\.(\d)\.conv\.(gate\.)?", r"adapter.stages.\1.1."),
    (DECODER + r"decoder\.net\.(\d)\.conv2\.(gate\.)?", r"adapter.stages.\1.2."),
    (DECODER + r"image_proj\.ln\.", "head.ln_post."),
    (DECODER + r"image_proj\.", "head."),
    (r"masker\.sim2mask\.", ""),
    (r"tcli_loss\.logit_scale", "log_scale.gcl_v"),
    (r"tclf_loss\.logit_scale", "log_scale.gcl_f"),
)


def rename(state, names):
    """The tensors that one of the (pattern, name) pairs fits at the start of their key, renamed."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in names:
            if match := re.match(pattern, key):
                renamed[match.expand(name) + key[match.end() :]] = value
                break
    return renamed


def translate(state):
    """A checkpoint of this project from the state dict of tcl.pth, all but its format and recipe.

    The frozen CLIP's tensors start with "clip."; a stripped file has none, and names OpenAI's.
    """
    ours = rename(state, NAMES)
    scale = torch.tensor(math.log(1 / 0.07))  # the release lacks both that are set to it
    ours["log_scale.cl"] = scale
    clip = {"model": "ViT-B-16-quickgelu", "pretrained": "openai", "config": None}
    if "clip.visual.proj" in ours:
        ours["clip.logit_scale"] = scale
        clip = {"model": None, "pretrained": None, "config": config_of(ours)}
    fields = {"losses": ("gcl_v", "gcl_f"), "area_prior": 0.4}
    return {**fields, "clip": clip, "clip_crc": None, "model": ours}


RESBLOCK = r"\1transformer.resblocks.\2."
LAYER = r"(|visual\.)encoder\.layers\.(\d+)\."
HUGGING_FACE = (  # theirs -> open_clip's, once the towers are named
    (LAYER + r"self_attn\.out_proj\.", RESBLOCK + "attn.out_proj."),
    (LAYER + r"self_attn\.([qkv])_proj\.", RESBLOCK + r"attn.in_proj_\3."),
    (LAYER + r"layer_norm", RESBLOCK + "ln_"),
    (LAYER + r"mlp\.fc1\.", RESBLOCK + "mlp.c_fc."),
    (LAYER + r"mlp\.fc2\.", RESBLOCK + "mlp.c_proj."),
    (r"(|visual\.)embeddings\.position_embedding\.weight", r"\1positional_embedding"),
    (r"visual\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"(|visual\.)embeddings\.", r"\1"),
    (r"visual\.pre_layrnorm\.", "visual.ln_pre."),
    (r"visual\.post_layernorm\.", "visual.ln_post."),
    (r"final_layer_norm\.", "ln_final."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"text_projection\.weight", "text_projection"),
    (r"", ""),
)


def from_hugging_face(state):
    """open_clip's names and shapes for the state dict of transformers' CLIPModel."""
    towers = ((r"text_model\.", ""), (r"vision_model\.", "visual."), (r"", ""))
    state = rename(rename(state, towers), HUGGING_FACE)
    for name in ("visual.proj", "text_projection"):
        if name in state:
            state[name] = state[name].T  # [C, D] -> [D, C]
    for key in [key for key in state if "in_proj_q." in key]:  # three matrices become one
        parts = [state.pop(key.replace("_q.", f"_{name}.")) for name in "qkv"]
        state[key.replace("_q.", "_")] = torch.cat(parts)  # 3 x [D, D] -> [3D, D]
    return state


def config_of(state):
    """Model config of an OpenAI-style CLIP from its tensors' shapes; its heads are 64 wide, its
    GELU quick."""

    def layers(tower):
        return sum(key.startswith(tower) and key.endswith("ln_1.weight") for key in state)

    width, _, patch, _ = state["clip.visual.conv1.weight"].shape  # [D, 3, patch, patch]
    patches = len(state["clip.visual.positional_embedding"]) - 1  # [1 + L, D]
    vocabulary, text_width = state["clip.token_embedding.weight"].shape
    return {
        "embed_dim": state["clip.text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "width": width,
            "patch_size": patch,
            "image_size": patch * math.isqrt(patches),
            "layers": layers("clip.visual.transformer."),
        },
        "text_cfg": {
            "width": text_width,
            "heads": text_width // 64,
            "layers": layers("clip.transformer."),
            "vocab_size": vocabulary,
            "context_length": len(state["clip.positional_embedding"]),
        },
    }
