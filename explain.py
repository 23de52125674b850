# SPDX-License-Identifier: MIT
"""One training step of the toy world as a picture story, each part under its equation.

python explain.py                    # OUT/explain.png of the toy world in runs/toy; where it is missing, toy.py runs
python explain.py --out runs/toy1
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import backbone
import data
import gcl
import ops
from toy import CLASSES, OBJECTS, SIZE, clip_of, folder_of, normalised, write

# fmt: off
STORY = [  # title, numbers of its equations, what is to be seen; {other} is another pair's caption
    ("A pair", (),
     "A picture and its caption, as the web has them. Nobody has drawn a mask: that this text belongs to this picture "
     "is all that the model is ever told."),
    ("Patch similarities", (3,),
     "CLIP, which is never changed, makes one vector of the text and one of each of 36 patches. The darker the blue, "
     "the more a patch is like the text: coarse and noisy."),
    ("Soft mask", (4, 5),
     "The adapter, the only network that learns, turns the patches into a grid four times finer. White: this place "
     "belongs to the text. Black: it does not. Grey: between."),
    ("Yes or no, Figure 3 line 14", (),
     "To cut out of the picture, every place is drawn to be in or out: white with the soft mask's probability "
     "(Gumbel). What is learned still flows back to the soft mask."),
    ("Masked picture", (2, 6),
     "What is left goes through CLIP as a picture of its own. It has to be like its text and unlike the other texts, "
     "so the mask must keep what the text means. Grey is cut out."),
    ("A negative mask", (5, 8, 9),
     'The mask of another pair\'s text, "{other}", in this picture. It should be empty. The places of each mask are '
     "averaged to one vector per picture and text."),
    ("Masked pictures against texts", (6, 7),
     "Row: one of the pictures below, cut by its own text's mask. Column: a text. The loss raises the outlined "
     "diagonal, the true pairs, above all others."),
    ("Averaged places against texts", (8, 9),
     "The same, but each picture averaged over the mask of each text. Only here do negative masks take part, and learn "
     "to stay empty."),
    ("What the step minimises", (10, 11, 12),
     "The two losses; how far the area of true masks is from 40 % of the picture and that of negative masks from 0; "
     "roughness (TV); and their weighted sum."),
]


TERMS = {"gcl_v": "loss of 7.", "gcl_f": "loss of 8.", "area_pos": "true area", "area_neg": "negative area",
         "tv_mask": "mask TV", "tv_dense": "feature TV", "total": "sum"}


# fmt: on
def one_step(net, images, tokens, noise):
    """What one training step computes for B pairs, by name: the lines of Figure 3, with the net's own methods.

    images [B, 3, h, w] normalised, tokens [B, context], noise [B, 1, 4H, 4W]. Returns a dict of tensors.
    """
    with torch.no_grad():
        t, v_d = (
            net.encode_text(tokens),
            backbone.dense_features(
                net.last_block,
                backbone.trunk(net.clip.visual, images),
                backbone.patch_grid(images, net.patch),
            ),
        )  # [B, D, H, W]
        visual = net.clip.visual
        patches = gcl.normalize(
            visual.ln_post(v_d.permute(0, 2, 3, 1)) @ visual.proj
        )  # [B, H, W, C]
        v_n = gcl.normalize(net.dense_embedding(v_d), dim=1)  # [B, C, 4H, 4W]
        logits = net.mask_logits(v_n, t)  # [B, B, 4H, 4W]
        mask, own = logits.sigmoid(), torch.arange(len(images))
        sample = ops.gumbel_sigmoid(logits[own, own].unsqueeze(1), noise)  # [B, 1, 4H, 4W]
        masked = (
            F.interpolate(sample, size=images.shape[-2:], mode="nearest") * images
        )  # [B, 3, h, w]
        step = {"mask": mask, "sample": sample, "masked": masked}
        step["patches"] = torch.einsum("bhwc,nc->bnhw", patches, t)  # [B, B, H, W]
        step["s_m"] = backbone.global_embedding(net.clip.visual, masked) @ t.T  # [B, B]
        step["s_f"] = torch.einsum(
            "bnc,nc->bn", gcl.normalize(ops.masked_pool(v_n, mask)), t
        )  # [B, B]
        losses = net(images, tokens, noise)
        return step | {"losses": losses | {"total": gcl.total_loss(losses)}}


def story_pairs(shard, count=6):
    """The first pairs of a shard whose captions name one object and nothing else, each another object."""
    pairs, found = data.PairDataset([str(shard)], None, None, (1, 1)), {}
    for image, text in map(pairs.read, range(len(pairs))):
        named = [name for name in CLASSES if name in text]
        if len(named) == 1 and named[0] in OBJECTS and len(found) < count:
            found.setdefault(named[0], (np.array(image), text))
    story = [*found.values()]
    story = (
        story[2:] + story[:2]
    )  # seed 0's third picture, a ladybug on grass, holds nothing that its text leaves out
    return [image for image, _ in story], [text for _, text in story]


def as_blue(values, low, high):
    """Values [h, w] as uint8 [h, w, 3]: white at low, deep blue at high."""
    share = ((values - low) / max(high - low, 1e-6)).clip(0, 1)[..., None]
    return (255 - share * (255 - np.float32((0, 60, 140)))).astype(np.uint8)


def story_cells(images, texts, before, after):
    """Nine pairs of cells, one pair for each of STORY: uint8 arrays, or text."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in gcl.CLIP_NORM)  # [3, 1, 1]
    steps, cells = (before, after), [(images[0], f'"{texts[0]}"')]
    patches = before["patches"][0, 0].numpy()
    cells.append((images[0], as_blue(patches, patches.min(), patches.max())))
    cells.append([(255 * step["mask"][0, 0]).byte().numpy() for step in steps])
    cells.append([(255 * step["sample"][0, 0]).byte().numpy() for step in steps])
    masked = [255 * (step["masked"][0] * std + mean).clamp(0, 1) for step in steps]
    cells.append([picture.round().byte().permute(1, 2, 0).numpy() for picture in masked])
    cells.append([(255 * step["mask"][0, 1]).byte().numpy() for step in steps])
    cells += [[step[name].numpy() for step in steps] for name in ("s_m", "s_f")]
    rows = [("", "before", "after")]
    rows += [
        (TERMS[name], *(f"{step['losses'][name].item():.3f}" for step in steps)) for name in TERMS
    ]
    return [*cells, (rows, None)]


def draw_cell(page, x, y, cell, side):
    """One cell of the story at (x, y): a caption, a table, a picture or mask (uint8), or similarities (float)."""
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(20)
    if isinstance(cell, (str, list)):
        rows = [(line,) for line in textwrap.wrap(cell, 20)] if isinstance(cell, str) else cell
        for r, row in enumerate(rows):
            for c, word in enumerate(row):
                pen.text((x + 150 * c, y + 10 + 30 * r), word, "black", font)
        return
    low, high = cell.min(), cell.max()
    picture = cell if cell.dtype == np.uint8 else as_blue(cell, low, high)
    page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
    pen.rectangle((x - 1, y - 1, x + side, y + side), None, "black")
    for (r, c), value in np.ndenumerate(cell) if cell.dtype != np.uint8 else ():
        size, colour = side / len(cell), "white" if value > (low + high) / 2 else "black"
        left, top = x + c * size, y + r * size
        if r == c:
            pen.rectangle(
                (left + 1, top + 1, left + size - 2, top + size - 2), None, (213, 94, 0), 3
            )
        pen.text(
            (left + size / 2, top + size / 2),
            f"{value:.2f}",
            colour,
            ImageFont.load_default(14),
            anchor="mm",
        )


def draw_story(path, images, texts, before, after, side=250):
    """Write the nine steps of STORY as one page, with the pairs of the batch below them."""
    width, height = 2 * side + 70, side + 170
    page = Image.new("RGB", (3 * width + 30, 90 + 3 * height + 190), "white")
    pen, big, small = ImageDraw.Draw(page), ImageFont.load_default(24), ImageFont.load_default(18)
    pen.text(
        (40, 20),
        "One training step of Grounded Contrastive Learning",
        "black",
        ImageFont.load_default(32),
    )
    text = "From step 3 on, the left one of two is before training, the right one after: two models, one pair."
    pen.text((40, 62), text, "black", small)
    cells = story_cells(images, texts, before, after)
    for k, ((title, equations, what), pair) in enumerate(zip(STORY, cells, strict=True)):
        x, y = 40 + k % 3 * width, 100 + k // 3 * height
        numbers = ", ".join(f"({n})" for n in equations)
        pen.text((x, y), f"{k + 1}. {title}{', Eq. ' if equations else ''}{numbers}", "black", big)
        for n, line in enumerate(textwrap.wrap(what.format(other=texts[1]), 62)):
            pen.text((x, y + 32 + 22 * n), line, "black", small)
        for c, cell in enumerate(pair):
            if cell is not None:
                draw_cell(page, x + c * (side + 12), y + 130, cell, side)
    y = page.height - 180
    pen.text((40, y), "The pairs of this step, in the order of rows and columns:", "black", small)
    for k, (image, text) in enumerate(zip(images, texts, strict=True)):
        page.paste(
            Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST),
            (40 + 280 * k, y + 36),
        )
        pen.text((40 + 280 * k, y + 140), f"{k + 1}. {text}", "black", small)
    write(path, lambda p: page.save(p, "PNG", optimize=True))


def explain(out):
    """Write OUT/explain.png from the toy world in OUT: its pairs, its CLIP, its trained GCL."""
    images, texts = story_pairs(out / "data/train-000.tar")
    clip, tokenizer = gcl.load_clip(*map(str, clip_of(out)[1::2]))
    trained = gcl.load(folder_of(out, "GCL") / "last.pt", *map(str, clip_of(out)[1::2]))
    batch = normalised(np.stack(images)), tokenizer(texts)  # [6, 3, 48, 48], [6, 20]
    side = 4 * SIZE // trained.patch
    noise = torch.rand(len(images), 1, side, side, generator=torch.Generator().manual_seed(0))
    before, after = (one_step(net, *batch, noise) for net in (gcl.GCL(clip), trained))
    draw_story(out / "explain.png", images, texts, before, after)
    print(f"{out / 'explain.png'}: one training step, before and after training")


def parse_args():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the toy world")
    return p.parse_args()


if __name__ == "__main__":
    explain(parse_args().out)
