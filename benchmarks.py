# SPDX-License-Identifier: MIT
"""Labelled sets: the eight benchmarks of the unified protocol (Sec. 4.1), and sets of your own.

    python benchmarks.py check --data-root data    # are the eight there and whole? a table
    python benchmarks.py check --datasets voc mine/SPEC.json
    python benchmarks.py prepare-context           # PASCAL Context's PNGs from its .mat files

    data/VOCdevkit/VOC2012/...     a benchmark in the layout of its download (BENCHMARKS below)
    mine/SPEC.json                 any labelled set of your own (see Spec)

In the file's order: the constants of the eight, label files, sets on disk, check, prepare-context.
"""

import argparse
import difflib
import glob
import json
import os
import re
import reprlib
import struct
import sys
import textwrap
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

import files
from files import InputError

IGNORE, INVALID = 255, -1  # in a label lookup table: not scored, and not allowed
MOST = 10_000  # classes of a set
SHOWN = 5  # files of a set that are named when many are wrong or missing


@dataclass
class SegmentationSet:
    """A labelled set: what it is, where it lies, and, once it is read, its items.

    Class 0 is the background where there is one. items: (image id, image path, label path, lut),
    lut of lookup_table. full: how many images the whole benchmark has. partial: Table 3's classes.
    Where it lies: root, and below it paths with {id} in them. ids: a file with one a line, or a
    glob (with a *) of images that are there. labels: {path: lut}; the first that exists is taken.
    """

    name: str
    classes: list
    background: bool
    items: list
    palette: list
    full: int | None = None
    partial: list | tuple = ()
    root: str = ""
    images: str = ""
    ids: str = "*"
    labels: dict | None = None

    def __len__(self):
        return len(self.items)

    def prompts(self):
        """The class names that become texts: "background" never does (Sec. 4.1)."""
        return self.classes[1:] if self.background else self.classes


# ---- the eight benchmarks ----


def lookup_table(values, ignored=(-1,)):
    """int16 [256]: values[k] -> k, each other of ignored -> IGNORE, everything else -> INVALID.

    With values past 255: int16 [65536], and what is not scored is the number of classes, if that is
    above IGNORE, so that it is never one of them. -1 in ignored is the largest: 255, or 65535.
    """
    size = 256 if max([*values, *ignored]) < 256 else 65_536
    table = np.full(size, INVALID, np.int16)
    table[list(ignored)] = max(IGNORE, len(values))
    table[list(values)] = np.arange(len(values))
    return table


def numbers(text):
    """Integers between blanks."""
    return [int(word) for word in text.split()]


def colours(text):
    """[[r, g, b], ...] of six hexadecimal digits per colour."""
    return [[*bytes.fromhex(word)] for word in text.split()]


def voc_palette(n, start=0):
    """The PASCAL VOC colour map: n distinct colours, bits of the index spread over the channels."""
    bits = np.arange(start, start + n)[:, None] >> np.arange(24) & 1  # [n, 24], the lowest first
    # [n, 24] -> [n, bit, channel] -> [n, 1, 3] -> [n, 3]
    return np.packbits(bits.reshape(n, 8, 3), axis=1)[:, 0].tolist()


# Class names stand between commas; a blank belongs to its name (ADE20K's "bed " ends in one).
VOC_CLASSES = """
aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,
pottedplant,sheep,sofa,train,tvmonitor"""

CONTEXT_CLASSES = """
aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,
ceiling,chair,cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,
horse,keyboard,light,motorbike,mountain,mouse,person,plate,platform,pottedplant,road,rock,sheep,
shelves,sidewalk,sign,sky,snow,sofa,table,track,train,tree,truck,tvmonitor,wall,water,window,
wood"""

COCO_OBJECT_CLASSES = """
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,
bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"""

COCO_STUFF_CLASSES = """
banner,blanket,branch,bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,
ceiling-tile,cloth,clothes,clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,
floor-marble,floor-other,floor-stone,floor-tile,floor-wood,flower,fog,food-other,fruit,
furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,mirror-stuff,moss,
mountain,mud,napkin,net,paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,
railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,
stairs,stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,
wall-concrete,wall-other,wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,
window-blind,window-other,wood"""

CITYSCAPES_CLASSES = """
road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,
rider,car,truck,bus,train,motorcycle,bicycle"""

ADE_CLASSES = """
wall,building,sky,floor,tree,ceiling,road,bed ,windowpane,grass,cabinet,sidewalk,person,earth,
door,table,mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,
field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,
signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,path,
stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,
coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,
swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,
streetlight,booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,
ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,canopy,washer,plaything,
swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,
trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,
vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,radiator,
glass,clock,flag"""

# Values of the original label maps: the k-th is class k. In PASCAL Context's 459-class maps 0 is
# the background and 2 is aeroplane, class 1.
CONTEXT_IDS = numbers("""
0 2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187
189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420
424 427 440 445 454 458""")
COCO_IDS = [i for i in range(182) if i not in numbers("11 25 28 29 44 65 67 68 70 82 90")]
CITYSCAPES_IDS = numbers("7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33")

COCO_PALETTE = colours("""
00c040 00c040 004060 80c0c0 004040 00c0e0 00c0c0 80c040 00c060 80c040 8020c0 0000e0 000040
00a0c0 800060 8000c0 0020c0 8080e0 0000c0 80a0c0 808000 800020 802000 800080 408020 00a000
000000 c080a0 002000 008080 4080a0 80a000 008000 c08020 806080 000080 400020 00e080 800000
c000a0 006080 808080 4000a0 80e080 808040 c00020 806000 8000c0 008020 40e000 000040 8080a0
406000 0080c0 0080a0 c0e000 008040 808020 c02080 0040c0 000020 40a080 804040 8000a0 402080
80c0c0 0000a0 c0a080 80c000 800060 c02000 804080 408060 40a000 004000 c080e0 402000 00c080
4080e0 c0a000 00c000 c08060 c06080 004080 400060 40e080 804000 c000e0 406080 80c080 4000e0
c0e080 80c040 c00060 c06000 8040c0 008060 00e000 404040 8080e0 006000 40c0c0 0080e0 80e000
40c040 808060 802080 4000c0 004060 00a080 c00040 8040e0 002080 c080c0 0040e0 80a080 c08000
804020 802040 c00080 40c020 00a040 400000 c0c0a0 002040 408080 40c0a0 80a040 408000 c0c020
8060c0 400080 404020 00e0c0 c00000 c040a0 0060c0 c08080 4040a0 80e0c0 c08040 c04020 806040
c000c0 00c020 40e040 400040 80c0a0 406040 4080c0 00c0a0 c0e040 408040 80c020 c020c0 4040c0
004020 40a0c0 c04040 8040a0 4020c0 c0c0c0 0040a0 c0a0c0 c0c000 804060 c02040 c04080 40c060
40a040 404000""")

CITYSCAPES_PALETTE = colours("""
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
00008e 000046 003c64 005064 0000e6 770b20""")

# PASCAL Context uses the first 60.
ADE_PALETTE = colours("""
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff""")


# How many images, their folder, and in it the images, their ids and the labels, as each download is
# unpacked. Where there are two label files, the first is what older tool chains made of the second.
VOC = """
1449 VOCdevkit/VOC2012 JPEGImages/{id}.jpg ImageSets/Segmentation/val.txt
SegmentationClass/{id}.png"""
CONTEXT_LABEL = "SegmentationClassContext/{id}.png"
CONTEXT = f"""
5104 VOCdevkit/VOC2010 JPEGImages/{{id}}.jpg ImageSets/SegmentationContext/val.txt
{CONTEXT_LABEL}"""
COCO_OBJECT = """
5000 coco_stuff164k images/val2017/{id}.jpg *
annotations/val2017/{id}_instanceTrainIds.png annotations/val2017/{id}.png"""
COCO_STUFF = """
5000 coco_stuff164k images/val2017/{id}.jpg *
annotations/val2017/{id}_labelTrainIds.png annotations/val2017/{id}.png"""
CITYSCAPES = """
500 cityscapes leftImg8bit/val/{id}_leftImg8bit.png */*
gtFine/val/{id}_gtFine_labelTrainIds.png gtFine/val/{id}_gtFine_labelIds.png"""
ADE = """
2000 ade/ADEChallengeData2016 images/validation/{id}.jpg *
annotations/validation/{id}.png"""


def benchmark(name, place, names, palette, first=0, original=None, partial=""):
    """One of the eight, not yet read. first: the stored value of class 0; a 0 below is ignored.

    original: the lookup table of the second label file.
    """
    full, root, images, ids, *labels = place.split()
    classes = names.replace("\n", "").split(",")
    lut = lookup_table(range(first, first + len(classes)), [0, 255])
    return SegmentationSet(
        name,
        classes,
        classes[0] == "background",
        [],
        palette,
        int(full),
        partial.split(),
        root,
        images,
        ids,
        dict(zip(labels, [lut, original], strict=False)),
    )


# In the order of Table 1.
BENCHMARKS = {
    dataset.name: dataset
    for dataset in (
        benchmark("voc", VOC, f"background,{VOC_CLASSES}", voc_palette(21)),
        benchmark("context", CONTEXT, f"background,{CONTEXT_CLASSES}", ADE_PALETTE[:60]),
        benchmark(
            "coco_object",
            COCO_OBJECT,
            f"background,{COCO_OBJECT_CLASSES}",
            [[0, 0, 0], *COCO_PALETTE[:80]],
            # The stuffthingmaps: 80 things are 1 to 80; the rest, INVALID + 1, is background.
            original=lookup_table(COCO_IDS[:80], []) + 1,
        ),
        benchmark(
            "voc20",
            VOC,
            VOC_CLASSES,
            voc_palette(20, 1),
            1,
            partial="pottedplant sheep sofa train tvmonitor",
        ),
        benchmark(
            "context59",
            CONTEXT,
            CONTEXT_CLASSES,
            ADE_PALETTE[1:60],
            1,
            partial="cow motorbike sofa cat",
        ),
        benchmark(
            "coco_stuff",
            COCO_STUFF,
            f"{COCO_OBJECT_CLASSES},{COCO_STUFF_CLASSES}",
            COCO_PALETTE,
            0,
            lookup_table(COCO_IDS, range(256)),
            "frisbee skateboard cardboard carrot scissors suitcase giraffe cow road wall-concrete "
            "tree grass river clouds playingfield",
        ),
        benchmark(
            "cityscapes",
            CITYSCAPES,
            CITYSCAPES_CLASSES,
            CITYSCAPES_PALETTE,
            0,
            lookup_table(CITYSCAPES_IDS, range(256)),
        ),
        benchmark("ade20k", ADE, ADE_CLASSES, ADE_PALETTE, 1),
    )
}


# ---- label files ----


def read_stored(path):
    """The values of a label PNG as stored, integers [h, w]; InputError where it is none."""
    try:
        with Image.open(path, formats=files.FORMATS) as image:
            packed = str(image.tile[0][3]) if image.tile else ""  # how the pixels lie in the file
            mode, stored = image.mode, np.array(image)
    except Exception as error:  # whatever a decoder stumbles over, as in files.read_picture
        raise InputError(
            f"{path}: not a label that can be read ({files.first_line(error)})"
        ) from error
    if stored.ndim != 2 or stored.dtype.kind == "f":
        raise InputError(
            f"{path}: stored as {mode}, not as class indices; a label is a palette or grey PNG "
            "(saved again by an image editor? Take the original file)"
        )
    return stored // {"L;2": 85, "L;4": 17}.get(packed, 1)  # PIL spreads few bits over 0 to 255


def read_label(path, lut):
    """Class indices int64 [h, w], as lookup_table says; InputError names a value without one."""
    stored, known = read_stored(path), np.flatnonzero(lut != INVALID)
    odd = np.setdiff1d(stored, known)
    if odd.size:
        raise InputError(
            f"{path}: label value {odd[0]} is outside the class list of this set "
            f"(it allows {spans(known)})"
        )
    return lut[stored].astype(np.int64)  # [h, w]


def spans(values):
    """Sorted integers in short: [0, 1, 2, 255] is "0-2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return brief(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs if len(r))


def brief(words):
    """As many as fit in a line."""
    return textwrap.shorten(", ".join(words), 200, placeholder=" ...")


# ---- sets on disk ----


def read_set(name_or_spec, data_root):
    """A SegmentationSet of a benchmark's name or a SPEC.json; InputError has the close names."""
    if name_or_spec in BENCHMARKS:
        return read_files(BENCHMARKS[name_or_spec], data_root)
    if name_or_spec.endswith(".json"):
        return read_spec(name_or_spec)
    close = difflib.get_close_matches(name_or_spec.lower(), BENCHMARKS) or BENCHMARKS
    raise InputError(
        f"--datasets {name_or_spec}: unknown; did you mean {', '.join(close)}, or a SPEC.json?"
    )


def read_files(dataset, data_root):
    """The set with its items; InputError says in one line what of it is missing."""
    root, items = Path(data_root, dataset.root), []
    listed = root / dataset.ids.split("*")[0]  # the root where there is no list
    missing = [] if listed.exists() else [listed]
    for i in [] if missing else find_ids(root, dataset):
        image = root / dataset.images.replace("{id}", i)
        labels = {root / path.replace("{id}", i): lut for path, lut in dataset.labels.items()}
        label = next(filter(Path.is_file, labels), [*labels][-1])
        missing += [path for path in (image, label) if not path.is_file()]
        items.append((i, str(image), str(label), labels[label]))
    if missing or not items:
        shown = ", ".join(map(str, missing[:SHOWN] or [root / dataset.images]))
        more = f" and {len(missing) - SHOWN} more images or labels" if missing[SHOWN:] else ""
        prepared = dataset.root == BENCHMARKS["context"].root
        hint = " (python benchmarks.py prepare-context makes labels and list)" * prepared
        raise InputError(f"{dataset.name}: {shown}{more} missing{hint}")
    return replace(dataset, items=items)


def find_ids(root, dataset):
    """The ids of its images, from its list or from its folder of images."""
    if "*" not in dataset.ids:
        return read_list(root / dataset.ids)
    before, _, after = dataset.images.partition("{id}")
    names = glob.glob(dataset.ids, root_dir=root / before)  # none of the ._ files of some archives
    return sorted(name.removesuffix(after) for name in names if name.endswith(after))


def read_list(path):
    """Image ids, one a line, each once; InputError when there are none, or one is no id.

    An id becomes the path of a prediction that is written: it stays below its folder.
    """
    ids = list(filter(None, dict.fromkeys(map(str.strip, files.read_text(path).splitlines()))))
    # A backslash, a drive, or a part between slashes that is empty, . or ..
    wrong = [i for i in ids if re.search(r"\\|^.:|(^|/)\.{,2}(/|$)", i)]
    if wrong or not ids:
        what = f"{wrong[0][:99]!r} is no image id" if wrong else "holds no image ids"
        raise InputError(f"{path}: {what}; a plain path below the folder is")
    return ids


@dataclass
class Spec:
    """SPEC.json of a set of the user's own: fields, kinds ([int] is a list of them), defaults.

    Folders and list are relative to the file. list: a file of image ids, one a line; null takes
    every image of the folder. With background, the first class is "background". values: the stored
    value of each class, as [0, 255]; without, it is 0, 1, ..., or with zero_is_ignored 1, 2, ...
    ignore: stored values that are not scored; without, 255, or where values go past it 65535
    (labels have 16 bits then), if that is no class. palette: [r, g, b] for each class; null is
    VOC's.
    """

    name: str
    images: str
    labels: str
    classes: [str]
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    background: bool = False
    ignore: [int] = (-1,)
    zero_is_ignored: bool = False
    values: [int] = ()
    palette: [[int]] = None
    list: str = None


def read_spec(path):
    """A labelled set of the user's own from a SPEC.json; InputError when it is none."""
    text, root = files.read_text(path), Path(path).parent
    try:
        spec = Spec(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        fields, why = ", ".join(Spec.__annotations__), files.first_line(error)
        raise InputError(f"{path}: must be a JSON object of {fields} ({why})") from error
    if wrong := next(spec_problems(spec), None):
        raise InputError(f"{path}: {wrong}")
    n, shift = len(spec.classes), int(spec.zero_is_ignored)
    stored = spec.values or range(shift, n + shift)
    ignored = [0] * shift + [*spec.ignore]
    if not n == len(stored) == len({*stored}.difference(ignored)):
        raise InputError(f"{path}: each class needs one stored value that is not ignored")
    dataset = SegmentationSet(
        spec.name,
        spec.classes,
        spec.background,
        [],
        spec.palette or voc_palette(n, 1 - spec.background),
        images=f"{spec.images}/{{id}}{spec.image_suffix}",
        ids=spec.list or "*",
        labels={f"{spec.labels}/{{id}}{spec.label_suffix}": lookup_table(stored, ignored)},
    )
    dataset = read_files(dataset, root)
    if not spec.list:
        say_left_out(spec, root, dataset.items)
    return dataset


def say_left_out(spec, root, items):
    """On stderr: pictures of another suffix, labels without a picture."""
    taken, known = {file for item in items for file in item[1:3]}, Image.registered_extensions()
    for folder in {root / spec.images, root / spec.labels}:
        found = {str(p) for p in folder.glob("[!.]*") if p.suffix.lower() in known}
        if rest := sorted(found - taken):
            pair = f"no pair of *{spec.image_suffix} and *{spec.label_suffix}"
            names = brief(map(os.path.basename, rest))
            note(f"{spec.name}: {len(rest)} files of {folder} are left out, {pair}: {names}")


def spec_problems(spec):
    """Yields what is wrong with a Spec; each line relies on those before it."""
    for field, kind in Spec.__annotations__.items():
        value = getattr(spec, field)
        if value is not getattr(Spec, field, "") and not fits(value, kind):
            yield f"{field} cannot be {reprlib.repr(value)}"
    n, classes = len(spec.classes), [" ".join(c.lower().split()) for c in spec.classes]
    if not spec.background < n <= MOST:
        yield f"classes must be 1 to {MOST} names"
    if "" in classes or len({*classes}) < n:  # as CLIP reads them
        yield "class names must differ in more than case and blanks, and none is empty"
    if "background" in classes[1:] or (classes[0] == "background") != spec.background:
        yield '"background" is the first class with "background": true, and none without'
    palette = spec.palette or voc_palette(n)
    if len(palette) != n or any(len(c) != 3 or max(c) > 255 for c in palette):
        yield "palette needs one [r, g, b] of 0 to 255 per class"
    if spec.name in BENCHMARKS or not re.fullmatch(r"\w[\w.-]{,99}", spec.name):
        yield (
            f"name {reprlib.repr(spec.name)} becomes a file name: of letters, digits, '.', '_' "
            "and '-' alone, and not the name of a benchmark"
        )


def fits(value, kind):
    """Is a value of its kind? A text is a line that a message, a path or a prompt can hold.

    So it has no control characters, and no half of a character but what Python makes of the bytes
    of a path that are no UTF-8 (from U+DC80 to U+DCFF).
    """
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(v, *kind) for v in value)
    if kind is str:
        return isinstance(value, str) and re.fullmatch(
            r"[^\0-\x1f\ud800-\udc7f\udd00-\udfff]{,999}", value
        )
    return type(value) is kind and 0 <= value < 65_536  # true and false are no integers


# ---- python benchmarks.py check ----


def check_item(item):
    """(the classes that one item's label holds, what is wrong or None), for a pool.

    Both files are decoded whole; the picture upright, as evaluated, must have the label's size.
    """
    _, image, path, lut = item
    try:
        picture, label = files.read_picture(image), read_label(path, lut)
    except InputError as error:
        return [], str(error)
    if label.shape[::-1] != picture.size:
        sizes = f"{picture.size} upright, its label {path} {label.shape[::-1]}"
        return [], f"{image}: the image is {sizes}; widths and heights must agree"
    return np.flatnonzero(np.bincount(label.ravel())).tolist(), None  # [h, w] -> [h w]


def survey(dataset, workers):
    """check_item of a whole set: what is wrong with it, a line for each file.

    Says on stderr which classes no label holds: a rule that takes a class for ignored shows here.
    """
    items, name, classes = dataset.items, dataset.name, dataset.classes
    found = list(files.in_parallel(check_item, items, workers, f"checking {name}"))
    wrong = [line for _, line in found if line]
    held = {k for label, _ in found for k in label}
    absent = [c for k, c in enumerate(classes) if k not in held]
    ignored = spans(np.flatnonzero(items[0][-1] >= len(classes))) or "none"
    if wrong or not absent:
        return wrong
    if len(absent) == len(classes):
        return [f"no pixel of {name} is scored: its labels hold {ignored} alone, ignored"]
    of = f"{len(absent)} of {len(classes)} classes"
    note(f"{name}: stored {ignored} is not scored, no label holds {of}: {brief(absent)}")
    return []


def note(line):
    """To stderr, once where several ranks run."""
    if os.environ.get("RANK", "0") == "0":
        print(files.printable(line), file=sys.stderr)  # names of files may hold anything


def check_labels(dataset, workers=1):
    """InputError unless every picture and label is whole, of one size, with values that fit.

    Before any long work, as a cut picture would end it hours later. Costs 5 ms for a picture of
    500 x 375, 120 ms for one of Cityscapes, on one core.
    """
    if wrong := survey(dataset, workers):
        more = f" (and {len(wrong) - 1} more files)" if wrong[1:] else ""
        raise InputError(wrong[0] + more)


def check_sets(names, data_root, workers=1):
    """Prints a table of sets, below each what is wrong; exit code 0 only when all are whole."""
    status = 0
    for name in names:
        images = "missing"
        try:
            dataset = read_set(name, data_root)
            name, full = dataset.name, dataset.full or len(dataset)
            images = f"{len(dataset)} of {full} images"
            wrong = survey(dataset, workers)
            if len(dataset) != full:
                wrong.append(f"the benchmark has {full} images: results will be marked partial")
        except InputError as error:
            wrong = [str(error)]
        state = f"wrong ({len(wrong)})" if wrong else "ok"
        shown = map(files.printable, wrong[:SHOWN])
        print(f"{name:<13}{state:<11}{images}", *shown, sep="\n    ")
        status |= bool(wrong)
    return status


# ---- python benchmarks.py prepare-context ----

CONTEXT_CLASS = np.zeros(460, np.uint8)  # of each id; the others are background
CONTEXT_CLASS[CONTEXT_IDS] = range(60)
MAT_KINDS = """? cell struct object char sparse double single int8 uint8 int16 uint16 int32 uint32
int64 uint64""".split()  # of a matrix, by the format's own number


def read_mat(path):
    """The class of each pixel, uint8 [h, w], of a .mat file of PASCAL Context; InputError if none.

    MATLAB 5's format is a header of 128 bytes, then elements: type, size, body. Here it is a matrix
    (14), or that packed by zlib (15); its own elements are flags, shape, name and numbers.
    """
    try:
        content = path.read_bytes()
        version, element = struct.unpack_from("<124x4sI", content)
        if version != b"\0\1IM":
            raise ValueError("no header of version 1, little-endian")
        matrix = content[128:]
        if element == 15:
            unpack = zlib.decompressobj()
            matrix = unpack.decompress(content[136:], 64 << 20)
            if not unpack.eof:
                raise ValueError("cut off, or unpacks to more than 64 MB")
        # 8x: type and size of an element; the last one's say how the numbers after it are packed.
        layout = "<I4x 8xBB6x 8x2I 8x8s I4x"
        element, kind, bits, height, width, name, packed = struct.unpack_from(layout, matrix)
        if element != 14 or name != b"LabelMap" or height * width == 0:
            raise ValueError("it is not there")
        found = "complex" if bits & 8 else MAT_KINDS[kind]
        if found != "uint16":
            raise ValueError(f"it is {found}")
        number = {2: "<u1", 4: "<u2"}[packed]  # in 8 bits where they suffice
        flat = np.frombuffer(matrix, number, height * width, offset=struct.calcsize(layout))
        return CONTEXT_CLASS[flat.reshape(width, height).T]  # column by column -> [h, w]
    except Exception as error:  # whatever a broken file makes them stumble over
        raise InputError(
            f"{path}: no whole MATLAB 5 MAT-file with a uint16 matrix LabelMap of ids 0 to 459 "
            f"({error}); PASCAL Context's trainval.tar.gz has them"
        ) from error


def context_label(path):
    """The bytes of a PNG for one .mat: the 459 classes become 60."""
    label = Image.fromarray(read_mat(path))
    label.putpalette(sum(BENCHMARKS["context"].palette, []))
    return files.png_bytes(label)


def context_val_ids(root):
    """The ids of PASCAL Context's validation images.

    Paper silent: which. The benchmark's 5,104 (MMSegmentation's) are those that
    trainval_merged.json calls val; where neither it nor a val.txt is there, VOC2010's val images,
    one more, and the result is marked.
    """
    own, merged = root / BENCHMARKS["context"].ids, root / "trainval_merged.json"
    if own.is_file():
        return read_list(own)
    if not merged.is_file():
        return read_list(root / "ImageSets/Main/val.txt")
    try:
        images = json.loads(files.read_text(merged))["images"]
        return sorted(Path(image["file_name"]).stem for image in images if image["phase"] == "val")
    except Exception as error:  # of JSON, or of another structure
        raise InputError(f"{merged}: has no images with file_name and phase ({error!r})") from error


def prepare_context(data_root, mats=None, workers=1):
    """SegmentationClassContext/*.png from the 459-class .mat files, then val.txt; keeps what is."""
    bench = BENCHMARKS["context"]
    root = Path(data_root, bench.root)
    mats, listed = Path(mats or root / "trainval"), root / bench.ids
    ids = context_val_ids(root)
    pngs = [root / CONTEXT_LABEL.replace("{id}", i) for i in ids]
    todo = [png for png in pngs if not png.is_file()]
    read = [mats / f"{png.stem}.mat" for png in todo]
    labels = files.in_parallel(context_label, read, workers, "PASCAL Context")
    for png, content in zip(todo, labels, strict=True):
        files.write_bytes(png, content)
    if not listed.is_file():  # last: what it lists is there
        files.write_text(listed, "\n".join(ids) + "\n")
    print(
        f"{listed}: {len(ids)} images; {len(todo)} PNGs written, {len(ids) - len(todo)} were there"
    )
    if len(ids) != bench.full:
        note(
            f"warning: the benchmark has {bench.full} images, so results are marked partial; for "
            f"its own list put trainval_merged.json into {root}, delete {listed.name}, run again"
        )


# ---- command line ----


def parse_args(argv=None):
    """The command line of check and prepare-context."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add(
        "command",
        choices=["check", "prepare-context"],
        help="exit code of check: 0 when all is whole",
    )
    add("--data-root", default="data", help="folder of the benchmarks (default: data)")
    add("--datasets", nargs="+", metavar="NAME|SPEC.json", help="for check (default: the eight)")
    add("--mat", help="for prepare-context: the .mat files (default: trainval beside JPEGImages)")
    add(
        "--workers",
        type=files.count,
        default=os.cpu_count() or 1,
        help="processes (default: all cores)",
    )
    return p.parse_args(argv)


def main(args):
    """One command; returns the exit code."""
    if args.command == "prepare-context":
        return prepare_context(args.data_root, args.mat, args.workers)
    return check_sets(args.datasets or BENCHMARKS, args.data_root, args.workers)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
