# SPDX-License-Identifier: MIT
"""Labelled sets for evaluation: the eight benchmarks of the unified protocol (Sec. 4.1), and sets of your own.

    python benchmarks.py check --data-root data    # are the eight there and whole? a table
    python benchmarks.py check --datasets voc mine/SPEC.json
    python benchmarks.py prepare-context           # PASCAL Context's label PNGs and val.txt from its .mat files

    data/VOCdevkit/VOC2012/...     the eight benchmarks in the layout of their downloads (the table BENCHMARKS below)
    mine/SPEC.json                 any labelled set of your own (see read_spec)

Needs files.py beside it, numpy, pillow and tqdm.
"""

import argparse
import difflib
import json
import os
import re
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import files
from files import InputError

SHOWN = 5  # files of a set that are named when many are wrong or missing


UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # PIL says SyntaxError for a broken PNG


IGNORE, INVALID = 255, -1  # in a label lookup table: not scored, and not allowed


@dataclass
class SegmentationSet:
    """A labelled set. items: (image id, image path, label path, lut); lut is int16 [256], stored value -> class index,
    IGNORE or INVALID. Class 0 is the background where there is one. full: how many images the whole benchmark has."""

    name: str
    classes: list
    background: bool
    items: list
    palette: list
    full: int | None = None
    partial: tuple = ()

    def __len__(self):
        return len(self.items)

    def prompts(self):
        """The class names that become texts: "background" never does (Sec. 4.1)."""
        return self.classes[1:] if self.background else self.classes


def lookup_table(values, ignored, rest=INVALID):
    """int16 [256]: values[k] -> k, each of ignored -> IGNORE, everything else -> rest."""
    table = np.full(256, rest, dtype=np.int16)
    table[list(values)] = np.arange(len(values))
    table[list(ignored)] = IGNORE
    return table


def voc_palette(n):
    """The PASCAL VOC colour map: n distinct colours, bits of the index spread over the channels."""
    bits = [
        [(k >> (3 * j + c) & 1) << (7 - j) for j in range(8)] for k in range(n) for c in range(3)
    ]
    return [[sum(bits[3 * k + c]) for c in range(3)] for k in range(n)]


def read_stored(path):
    """The values of a label PNG as stored, integers [h, w]; InputError names a file that is no such PNG."""
    try:
        with Image.open(path) as image:
            packed = str(image.tile[0][3]) if image.tile else ""  # how the pixels lie in the file
            mode, stored = image.mode, np.array(image)
    except UNREADABLE as error:
        raise InputError(f"{path}: not a label that can be read ({error})") from error
    if stored.ndim != 2 or stored.dtype.kind == "f":
        hint = "saved again by an image editor? Take the original file"
        raise InputError(
            f"{path}: stored as {mode}, not as class indices; a label is a palette or grey PNG ({hint})"
        )
    if spread := {"L;2": 85, "L;4": 17}.get(
        packed
    ):  # PIL spreads grey of 2 and 4 bits over 0 to 255
        stored = stored // spread
    return stored.astype(np.uint8) if stored.dtype == bool else stored


def values_of(stored):
    """The distinct values of a label, sorted, as a list of int."""
    fast = stored.dtype == np.uint8  # counting beats sorting
    return (np.flatnonzero(np.bincount(stored.ravel())) if fast else np.unique(stored)).tolist()


def misfit(path, values, lut):
    """What to say of the first stored value that the rule does not allow; None when all are allowed."""
    for value in values:
        if not 0 <= value < 256 or lut[value] == INVALID:
            return f"{path}: label value {value} is outside the class list of this set (it allows {allowed(lut)})"


def allowed(lut):
    """The stored values that a rule allows, in short: "0-20 255"."""
    return spans(np.flatnonzero(lut != INVALID).tolist())


def spans(values):
    """Integers in short: [0, 1, 2, 255] is "0-2 255"."""
    starts, ends = ([v for v in values if v + step not in values] for step in (-1, 1))
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def read_label(path, lut):
    """Class indices int64 [h, w], IGNORE where not scored. InputError names the file and the value that does not fit."""
    stored = read_stored(path)
    if wrong := misfit(path, values_of(stored), lut):
        raise InputError(wrong)
    return lut[stored].astype(np.int64)  # [h, w]


def label_values(image_path, label_path):
    """The distinct stored values of an image's label; InputError when a file is broken or their sizes disagree."""
    stored = read_stored(label_path)
    try:
        with Image.open(image_path) as image:  # the header alone
            width, height = image.size
    except UNREADABLE as error:
        raise InputError(f"{image_path}: not an image that can be read ({error})") from error
    if stored.shape != (height, width):
        sizes = f"{width}x{height}, its label {label_path} is {stored.shape[1]}x{stored.shape[0]}"
        raise InputError(f"{image_path}: the image is {sizes}; they must agree")
    return values_of(stored)


def check_labels(dataset):
    """Reads every label and every image's header before any long work: sizes must agree, values must fit."""
    with tqdm(dataset.items, desc=f"checking {dataset.name}", leave=False) as bar:
        for _, image, label, lut in bar:
            if wrong := misfit(label, label_values(image, label), lut):
                raise InputError(wrong)


SPEC_DEFAULTS = {
    "list": None,
    "image_suffix": ".jpg",
    "label_suffix": ".png",
    "background": False,
    "ignore": [255],
    "zero_is_ignored": False,
    "palette": None,
}


SPEC_KINDS = {
    **dict.fromkeys(("name", "images", "labels", "image_suffix", "label_suffix"), str),
    **{
        "list": str | None,
        "background": bool,
        "zero_is_ignored": bool,
        "ignore": list,
        "palette": list | None,
    },
}


def read_spec(path):
    """A labelled set of the user's own from a SPEC.json, paths relative to the file. Raises InputError.

    {"name": "mine", "images": "images", "labels": "labels", "list": null, "image_suffix": ".jpg", "label_suffix":
    ".png", "classes": ["background", "cat", ...], "background": true, "ignore": [255], "zero_is_ignored": false,
    "palette": null}. list: a file of image ids, one a line; null takes every image of the folder. With background,
    the first class is "background". zero_is_ignored: 0 is not scored and stored k is class k - 1.
    """
    spec = _spec_fields(path)
    folder, classes = Path(path).parent, spec["classes"]
    images, labels = folder / spec["images"], folder / spec["labels"]
    if spec["list"]:
        ids = read_list(folder / spec["list"])
    else:
        ids = sorted(
            p.name.removesuffix(spec["image_suffix"])
            for p in images.glob("*" + spec["image_suffix"])
        )
    if not ids:
        raise InputError(f"{path}: no *{spec['image_suffix']} in {images}")
    shift = int(spec["zero_is_ignored"])
    lut = lookup_table(range(shift, len(classes) + shift), [0] * shift + list(spec["ignore"]))
    items = [
        (i, str(images / (i + spec["image_suffix"])), str(labels / (i + spec["label_suffix"])), lut)
        for i in ids
    ]
    for _, image, label, _ in items:
        for needed in (image, label):
            if not os.path.isfile(needed):
                raise InputError(f"{path}: {needed} is missing")
    palette = (spec["palette"] or voc_palette(len(classes) + 1)[1 - int(spec["background"]) :])[
        : len(classes)
    ]
    return SegmentationSet(spec["name"], classes, spec["background"], items, palette)


def _spec_fields(path):
    """The checked fields of a SPEC.json with their defaults."""
    try:
        given = json.loads(files.read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    needed = {"name", "images", "labels", "classes"}
    if not isinstance(given, dict) or needed - given.keys():
        raise InputError(f"{path}: needs the fields {', '.join(sorted(needed))}")
    if unknown := given.keys() - needed - SPEC_DEFAULTS.keys():
        raise InputError(f"{path}: unknown field {sorted(unknown)[0]!r}")
    spec = SPEC_DEFAULTS | given
    for field, kind in SPEC_KINDS.items():
        if not isinstance(spec[field], kind):
            raise InputError(f"{path}: {field} cannot be {spec[field]!r}")
    classes, palette = spec["classes"], spec["palette"]
    if (
        not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
        or not 0 < len(classes) < 255
    ):
        raise InputError(f"{path}: classes must be a list of 1 to 254 names")
    if spec["background"] and (classes[0] != "background" or len(classes) < 2):
        raise InputError(
            f'{path}: with "background": true the first class is "background", then at least one more'
        )
    if len(set(classes)) < len(classes) or "background" in classes[int(spec["background"]) :]:
        raise InputError(
            f'{path}: class names must differ, and "background" is a class only with "background": true'
        )
    if palette and (len(palette) < len(classes) or not all(map(_is_colour, palette))):
        raise InputError(f"{path}: palette needs one [r, g, b] of 0 to 255 per class")
    if not all(isinstance(value, int) and 0 <= value <= 255 for value in spec["ignore"]):
        raise InputError(f"{path}: ignore must be a list of stored values, 0 to 255")
    if spec["name"] in BENCHMARKS:
        raise InputError(f"{path}: {spec['name']} is the name of a benchmark; choose another")
    if not re.fullmatch(r"[\w.-]+", spec["name"]):
        raise InputError(
            f"{path}: name {spec['name']!r} becomes a file name; use letters, digits, '.', '_' and '-'"
        )
    return spec


def _is_colour(value):
    whole = isinstance(value, list) and all(isinstance(v, int) and 0 <= v <= 255 for v in value)
    return whole and len(value) == 3


def read_list(path):
    """Image ids, one a line; InputError when the file is missing or empty."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: the list of image ids is missing")
    ids = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    if not ids:
        raise InputError(f"{path}: holds no image ids")
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: holds {max(ids, key=ids.count)} twice")
    return ids


# One line per fact, to be checked by eye. Names are separated by commas; ADE20K's "bed " has a blank at its end there.
VOC_CLASSES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor"
).split(",")


CONTEXT_CLASSES = (
    "aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,chair,"
    "cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,"
    "mountain,mouse,person,plate,platform,pottedplant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,"
    "track,train,tree,truck,tvmonitor,wall,water,window,wood"
).split(",")


# The ids of PASCAL Context's 459-class maps: the k-th is class k, so 0 is the background and 2 is aeroplane, class 1.
CONTEXT_IDS = (
    [
        0,
        2,
        9,
        18,
        19,
        22,
        23,
        25,
        31,
        33,
        34,
        44,
        45,
        46,
        59,
        65,
        68,
        72,
        80,
        85,
        98,
        104,
        105,
        113,
        115,
        144,
        158,
        159,
    ]
    + [
        162,
        187,
        189,
        207,
        220,
        232,
        258,
        259,
        260,
        284,
        295,
        296,
        308,
        324,
        326,
        347,
        349,
        354,
        355,
        360,
        366,
        368,
    ]
    + [397, 415, 416, 420, 424, 427, 440, 445, 454, 458]
)


# The first 80 are COCO-Object's.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,"
    "bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,"
    "counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,"
    "floor-wood,flower,fog,food-other,fruit,furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,"
    "metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,"
    "railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,"
    "stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,wall-other,"
    "wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
).split(",")


CITYSCAPES_CLASSES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle"
).split(",")


ADE_CLASSES = (
    "wall,building,sky,floor,tree,ceiling,road,bed ,windowpane,grass,cabinet,sidewalk,person,earth,door,table,"
    "mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,"
    "rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,"
    "skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,"
    "river,bridge,bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,"
    "computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,"
    "booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,"
    "poster,stage,van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,"
    "waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,"
    "dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,"
    "monitor,bulletin board,shower,radiator,glass,clock,flag"
).split(",")


# Stored values of the original maps: the k-th id is class k.
COCO_IDS = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]


CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def colours(text):
    """[[r, g, b], ...] of a string of six hexadecimal digits per colour."""
    return [list(bytes.fromhex(text[i : i + 6])) for i in range(0, len(text), 6)]


COCO_PALETTE = colours(
    "00c04000c04000406080c0c000404000c0e000c0c080c04000c06080c0408020c00000e000004000a0c08000608000c00020c08080e0"
    "0000c080a0c080800080002080200080008040802000a000000000c080a00020000080804080a080a000008000c08020806080000080"
    "40002000e080800000c000a00060808080804000a080e080808040c000208060008000c000802040e0000000408080a04060000080c0"
    "0080a0c0e000008040808020c020800040c000002040a0808040408000a040208080c0c00000a0c0a08080c000800060c02000804080"
    "40806040a000004000c080e040200000c0804080e0c0a00000c000c08060c0608000408040006040e080804000c000e040608080c080"
    "4000e0c0e08080c040c00060c060008040c000806000e0004040408080e000600040c0c00080e080e00040c0408080608020804000c0"
    "00406000a080c000408040e0002080c080c00040e080a080c08000804020802040c0008040c02000a040400000c0c0a0002040408080"
    "40c0a080a040408000c0c0208060c040008040402000e0c0c00000c040a00060c0c080804040a080e0c0c08040c04020806040c000c0"
    "00c02040e04040004080c0a04060404080c000c0a0c0e04040804080c020c020c04040c000402040a0c0c040408040a04020c0c0c0c0"
    "0040a0c0a0c0c0c000804060c02040c0408040c06040a040404000"
)


CITYSCAPES_PALETTE = colours(
    "804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"
)


# PASCAL Context uses the first 60.
ADE_PALETTE = colours(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies under --data-root and how its stored labels become classes.

    labels: (path, lookup table) pairs; the first path that exists is taken. {id} comes from the list file, or from the
    images that are there ({id} with its folder, as in Cityscapes' city/name). partial: the classes of Table 3.
    """

    title: str
    full: int
    root: str
    images: str
    labels: tuple
    list: str | None
    classes: list
    palette: list
    background: bool = False
    partial: tuple = ()


def _from_zero(n):
    return lookup_table(range(n), [255])


def _from_one(n):
    return lookup_table(range(1, n + 1), [0, 255])


def _things():
    """stuffthingmaps -> COCO-Object: the 80 things become 1..80; stuff and 255 are background, 0."""
    table = np.zeros(256, dtype=np.int16)
    table[COCO_IDS[:80]] = np.arange(1, 81)
    return table


_VOC = {
    "root": "VOCdevkit/VOC2012",
    "images": "JPEGImages/{id}.jpg",
    "list": "ImageSets/Segmentation/val.txt",
}


_CONTEXT = {"root": "VOCdevkit/VOC2010", "images": "JPEGImages/{id}.jpg"}


_CONTEXT["list"] = "ImageSets/SegmentationContext/val.txt"


_COCO = {"root": "coco_stuff164k", "images": "images/val2017/{id}.jpg", "list": None}


_VOC_LABEL, _CONTEXT_LABEL = "SegmentationClass/{id}.png", "SegmentationClassContext/{id}.png"


_COCO_LABEL, _CITY_LABEL = "annotations/val2017/{id}", "gtFine/val/{id}_gtFine"


BENCHMARKS = {  # in the order of Table 1
    "voc": Benchmark(
        title="PASCAL VOC",
        full=1449,
        labels=((_VOC_LABEL, _from_zero(21)),),
        classes=["background", *VOC_CLASSES],
        palette=voc_palette(21),
        background=True,
        **_VOC,
    ),
    "context": Benchmark(
        title="PASCAL Context",
        full=5104,
        labels=((_CONTEXT_LABEL, _from_zero(60)),),
        classes=["background", *CONTEXT_CLASSES],
        palette=ADE_PALETTE[:60],
        background=True,
        **_CONTEXT,
    ),
    "coco_object": Benchmark(
        title="COCO-Object",
        full=5000,
        labels=(
            (_COCO_LABEL + "_instanceTrainIds.png", _from_zero(81)),
            (_COCO_LABEL + ".png", _things()),
        ),
        classes=["background", *COCO_CLASSES[:80]],
        palette=[[0, 0, 0], *COCO_PALETTE[:80]],
        background=True,
        **_COCO,
    ),
    "voc20": Benchmark(
        title="PASCAL VOC20",
        full=1449,
        labels=((_VOC_LABEL, _from_one(20)),),
        classes=VOC_CLASSES,
        palette=voc_palette(21)[1:],
        partial=("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
        **_VOC,
    ),
    "context59": Benchmark(
        title="PASCAL Context59",
        full=5104,
        labels=((_CONTEXT_LABEL, _from_one(59)),),
        classes=CONTEXT_CLASSES,
        palette=ADE_PALETTE[1:60],
        partial=("cow", "motorbike", "sofa", "cat"),
        **_CONTEXT,
    ),
    "coco_stuff": Benchmark(
        title="COCO-Stuff",
        full=5000,
        labels=(
            (_COCO_LABEL + "_labelTrainIds.png", _from_zero(171)),
            (_COCO_LABEL + ".png", lookup_table(COCO_IDS, [255], rest=IGNORE)),
        ),
        classes=COCO_CLASSES,
        palette=COCO_PALETTE,
        partial=(
            "frisbee",
            "skateboard",
            "cardboard",
            "carrot",
            "scissors",
            "suitcase",
            "giraffe",
            "cow",
            "road",
        )
        + ("wall-concrete", "tree", "grass", "river", "clouds", "playingfield"),
        **_COCO,
    ),
    "cityscapes": Benchmark(
        title="Cityscapes",
        full=500,
        root="cityscapes",
        images="leftImg8bit/val/{id}_leftImg8bit.png",
        labels=(
            (_CITY_LABEL + "_labelTrainIds.png", _from_zero(19)),
            (_CITY_LABEL + "_labelIds.png", lookup_table(CITYSCAPES_IDS, [255], rest=IGNORE)),
        ),
        list=None,
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
    ),
    "ade20k": Benchmark(
        title="ADE20K",
        full=2000,
        root="ade/ADEChallengeData2016",
        images="images/validation/{id}.jpg",
        labels=(("annotations/validation/{id}.png", _from_one(150)),),
        list=None,
        classes=ADE_CLASSES,
        palette=ADE_PALETTE,
    ),
}


def read_benchmark(name, data_root):
    """A benchmark under data_root as a SegmentationSet; InputError says in one line what is missing of it."""
    bench = BENCHMARKS[name]
    root = Path(data_root) / bench.root
    folders = [root / pattern.split("{id}")[0] for pattern in (bench.images, bench.labels[-1][0])]
    listed = [root / bench.list] if bench.list else []
    if missing := [p for p in folders + listed if not p.exists()] if root.is_dir() else [root]:
        prepared = name.startswith("context") and root.is_dir()
        hint = " (python benchmarks.py prepare-context makes labels and list)" if prepared else ""
        raise InputError(f"{name}: {', '.join(map(str, missing))} missing{hint}")
    if bench.list:
        ids = read_list(root / bench.list)
    else:
        after = bench.images.split("{id}")[1]
        found = [
            p for p in folders[0].glob("**/*" + after) if p.name[0] != "."
        ]  # some archives bring ._ files along
        ids = sorted(p.relative_to(folders[0]).as_posix().removesuffix(after) for p in found)
        if not ids:
            raise InputError(f"{name}: no *{after} under {folders[0]}")
    items, missing = [], []
    for i in ids:
        image = root / bench.images.format(id=i)
        choices = [(root / path.format(id=i), lut) for path, lut in bench.labels]
        label, lut = next(
            ((path, lut) for path, lut in choices if path.is_file()), (choices[-1][0], None)
        )
        missing += [
            path
            for path, there in ((image, image.is_file()), (label, lut is not None))
            if not there
        ]
        items.append((i, str(image), str(label), lut))
    if missing:
        more = f" and {len(missing) - SHOWN} more images or labels" if len(missing) > SHOWN else ""
        raise InputError(f"{name}: {', '.join(map(str, missing[:SHOWN]))}{more} missing")
    return SegmentationSet(
        name, bench.classes, bench.background, items, bench.palette, bench.full, bench.partial
    )


def read_set(name_or_spec, data_root):
    """A SegmentationSet from a benchmark's name or a SPEC.json; InputError for an unknown name, with the close ones."""
    if name_or_spec in BENCHMARKS:
        return read_benchmark(name_or_spec, data_root)
    if name_or_spec.endswith(".json"):
        return read_spec(name_or_spec)
    close = difflib.get_close_matches(name_or_spec.lower(), BENCHMARKS) or list(BENCHMARKS)
    raise InputError(
        f"--datasets {name_or_spec}: unknown; did you mean {', '.join(close)}, or a SPEC.json?"
    )


TABLE = "{:<13}{:<9}{:<14}{:<24}{}"  # a line of the table


def pair_or_error(paths):
    """label_values, for a pool: the text of its InputError instead of the error."""
    try:
        return label_values(*paths)
    except InputError as error:
        return str(error)


def check_sets(names, data_root, workers=1):
    """Prints a table of the sets, then what is wrong with them; returns the exit code, 0 only when all are whole."""
    seen, report = {}, []
    print(TABLE.format("set", "state", "images", "label values", "allowed by the rule"))
    for name in names:
        try:
            dataset = read_set(name, data_root)
        except InputError as error:
            report.append(str(error))
            print(TABLE.format(name, "missing", "", "", "").rstrip())
            continue
        todo = [
            item[1:3] for item in dataset.items if item[1:3] not in seen
        ]  # voc and voc20 share their files
        seen.update(
            zip(
                todo,
                files.in_parallel(pair_or_error, todo, workers, f"checking {name}"),
                strict=True,
            )
        )
        row, wrong = check_set(dataset, seen)
        print(TABLE.format(dataset.name, "wrong" if wrong else "ok", *row))
        report += [f"{dataset.name}: {line}" for line in wrong]
    print("".join(f"\n{line}" for line in report), end="\n" if report else "")
    return int(bool(report))


def check_set(dataset, seen):
    """One set, of the values or errors that were seen: (columns of the table, lines of what is wrong)."""
    found = [(label, seen[image, label], lut) for _, image, label, lut in dataset.items]
    wrong = [v if isinstance(v, str) else misfit(label, v, lut) for label, v, lut in found]
    wrong = [line for line in wrong if line]
    if len(wrong) > SHOWN:
        wrong[SHOWN:] = [f"and {len(wrong) - SHOWN} more files"]
    full = dataset.full or len(dataset)
    if len(dataset) != full:
        wrong.append(
            f"{len(dataset)} images, the benchmark has {full}: results will be marked partial"
        )
    values = sorted({value for _, v, _ in found if not isinstance(v, str) for value in v})
    rules = " or ".join(
        {allowed(lut): None for *_, lut in found}
    )  # more than one where some files are converted
    return (f"{len(dataset)} of {full}", spans(values), rules), wrong


MAT_FOLDER = "trainval"  # as trainval.tar.gz unpacks


MAT_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}


MAT_MATRIX, MAT_COMPRESSED = 14, 15


def mat_elements(content, order):
    """(type, bytes) of the data elements in the body of a MATLAB 5 MAT-file; compressed ones are unpacked."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(order + "II", content, at)
        start, at = at + 8, at + 8 + size + (-size % 8 if kind != MAT_COMPRESSED else 0)
        if kind >> 16:  # a small element: size, type and up to 4 bytes in the place of a tag
            kind, size, start, at = kind & 0xFFFF, kind >> 16, start - 4, start
        body = content[start : start + size]
        yield from (
            mat_elements(zlib.decompress(body), order) if kind == MAT_COMPRESSED else [(kind, body)]
        )


def read_mat(path, name):
    """The real matrix [h, w] of this name in a MATLAB 5 MAT-file; InputError names a file that has none."""
    try:
        content = Path(path).read_bytes()
        order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(
            content[124:128]
        )  # version 1, in the file's own byte order
        if not order:
            raise ValueError("no such header")
        for kind, body in mat_elements(content[128:], order):
            flags, shape, called, values = (
                [*mat_elements(body, order)][:4] if kind == MAT_MATRIX else [(0, b"")] * 4
            )
            if called[1] == name.encode():
                height, width = struct.unpack(order + "2i", shape[1])
                return (
                    np.frombuffer(values[1], order + MAT_TYPES[values[0]]).reshape(width, height).T
                )  # [h, w]
    except (OSError, ValueError, KeyError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: cut off, or not a MATLAB 5 MAT-file ({error})") from error
    raise InputError(f"{path}: holds no matrix {name}")


def context_label(paths):
    """One (.mat, .png): the 459 classes become 60; every id that is not one of CONTEXT_IDS is background, 0."""
    mat, png = paths
    stored = read_mat(mat, "LabelMap")  # [h, w]
    if not np.isfinite(stored).all() or (stored != np.floor(stored)).any():
        raise InputError(
            f"{mat}: LabelMap holds values that are not whole; PASCAL Context's ids are 0 to 459"
        )
    ids = stored.astype(np.int64)
    values = np.unique(ids)
    if not values.size or values[0] < 0 or values[-1] > 459:
        raise InputError(
            f"{mat}: LabelMap holds {spans(values.tolist())}; PASCAL Context's ids are 0 to 459"
        )
    table = np.zeros(460, dtype=np.uint8)
    table[CONTEXT_IDS] = np.arange(60)
    label = Image.fromarray(table[ids])
    label.putpalette([v for colour in ADE_PALETTE[:60] for v in colour])
    files.write_whole(png, lambda temporary: label.save(temporary, "PNG"))


def context_val_ids(root, mats):
    """The ids of PASCAL Context's validation images.

    Paper silent: which. The benchmark's 5,104 (MMSegmentation's) are those that trainval_merged.json calls val; where
    neither it nor a val.txt is there, VOC2010's val images, one more, and the result is marked.
    """
    own, merged = root / BENCHMARKS["context"].list, root / "trainval_merged.json"
    if own.is_file():
        return read_list(own)
    if not merged.is_file():
        return [
            i for i in read_list(root / "ImageSets/Main/val.txt") if (mats / f"{i}.mat").is_file()
        ]
    try:
        images = json.loads(files.read_text(merged))["images"]
        return sorted(Path(image["file_name"]).stem for image in images if image["phase"] == "val")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{merged}: has no images with file_name and phase ({error!r})") from error


def prepare_context(data_root, mats=None, workers=1):
    """SegmentationClassContext/*.png, then val.txt, from the 459-class .mat files; files that are there are kept."""
    bench = BENCHMARKS["context"]
    root = Path(data_root) / bench.root
    mats, listed = Path(mats or root / MAT_FOLDER), root / bench.list
    if not mats.is_dir():
        raise InputError(
            f"{mats}: no such folder; unpack PASCAL Context's trainval.tar.gz there, or give --mat"
        )
    ids = context_val_ids(root, mats)
    pairs = [(mats / f"{i}.mat", root / bench.labels[0][0].format(id=i)) for i in ids]
    todo = [(mat, png) for mat, png in pairs if not png.is_file()]
    missing = [mat for mat, _ in todo if not mat.is_file()]
    if missing or not ids:
        raise InputError(
            f"{(missing or [mats])[0]}: {len(missing) or 'all'} of the val images' .mat files are missing"
        )
    pairs[0][1].parent.mkdir(exist_ok=True)
    list(files.in_parallel(context_label, todo, workers, "PASCAL Context"))
    if not listed.is_file():  # last: what it lists is there
        listed.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(
            listed, lambda temporary: temporary.write_text("".join(f"{i}\n" for i in ids))
        )
    print(
        f"{listed}: {len(ids)} images; {len(todo)} label PNGs written, {len(ids) - len(todo)} were there"
    )
    if len(ids) != bench.full:
        hint = f"for its own list put trainval_merged.json into {root}, delete {listed.name} and run again"
        print(
            f"warning: the benchmark has {bench.full} images, so results are marked partial; {hint}",
            file=sys.stderr,
        )
    return 0


# ---- command line ----


def parse_args(argv=None):
    """The command line of check and prepare-context."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    what = "are labelled sets there and whole? Exit code 1 when one is missing, partial or wrong"
    check = commands.add_parser("check", help=what, description=what)
    check.add_argument(
        "--datasets", nargs="+", metavar="NAME|SPEC.json", help="default: the eight benchmarks"
    )
    what = "PASCAL Context's label PNGs and val.txt from its 459-class .mat files; what is there is kept"
    prepare = commands.add_parser("prepare-context", help=what, description=what)
    prepare.add_argument(
        "--mat", help=f"folder of the .mat files; default: {MAT_FOLDER} in VOCdevkit/VOC2010"
    )
    for command in (check, prepare):
        command.add_argument(
            "--data-root", default="data", help="folder of the benchmarks (default: data)"
        )
        command.add_argument(
            "--workers",
            type=int,
            default=os.cpu_count() or 1,
            help="processes (default: all cores)",
        )
    args = p.parse_args(argv)
    if args.workers < 1:
        p.error("--workers must be at least 1")
    return args


def main(args):
    """One command; returns the exit code."""
    if args.command == "prepare-context":
        return prepare_context(args.data_root, args.mat, args.workers)
    return check_sets(args.datasets or list(BENCHMARKS), args.data_root, args.workers)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
