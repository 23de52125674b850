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
import itertools
import json
import os
import re
import reprlib
import struct
import sys
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image

import files
from files import InputError

IGNORE, INVALID = 255, -1  # in a label lookup table: not scored, and not allowed
MOST = 10_000  # classes of a set
SHOWN = 5  # files of a set that are named when many are wrong or missing


# ---- the eight benchmarks ----


def lookup_table(values, ignored=(255,), rest=INVALID):
    """int16 [256]: values[k] -> k, each of ignored -> IGNORE, everything else -> rest.

    With values past 255: int16 [65536], and what is not scored is the number of classes, if that is
    above IGNORE, so that it is never one of them.
    """
    size = 256 if max([0, *values, *ignored]) < 256 else 65_536
    table = np.full(size, rest, dtype=np.int16)
    table[list(values)] = np.arange(len(values))
    table[list(ignored)] = max(IGNORE, len(values))
    return table


def names(text):
    """Class names between commas; a blank belongs to its name (ADE20K's "bed " ends in one)."""
    return text.replace("\n", "").split(",")


def numbers(text):
    """Integers between blanks."""
    return [int(word) for word in text.split()]


def colours(text):
    """[[r, g, b], ...] of six hexadecimal digits per colour."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3).tolist()  # [3 n] -> [n, 3]


def voc_palette(n):
    """The PASCAL VOC colour map: n distinct colours, bits of the index spread over the channels."""
    bits = np.arange(n)[:, None] >> np.arange(24) & 1  # [n, 24], the lowest first
    spread = np.packbits(bits.reshape(n, 8, 3), axis=1)  # [n, 24] -> [n, bit, channel] -> [n, 1, 3]
    return spread[:, 0].tolist()  # [n, 1, 3] -> [n, 3]


VOC_CLASSES = names("""
aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,
pottedplant,sheep,sofa,train,tvmonitor""")

CONTEXT_CLASSES = names("""
aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,
ceiling,chair,cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,
horse,keyboard,light,motorbike,mountain,mouse,person,plate,platform,pottedplant,road,rock,sheep,
shelves,sidewalk,sign,sky,snow,sofa,table,track,train,tree,truck,tvmonitor,wall,water,window,
wood""")

# The first 80 are COCO-Object's.
COCO_CLASSES = names("""
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,
bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,
bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,
clothes,clouds,counter,cupboard,curtain,desk-stuff,dirt,door-stuff,fence,floor-marble,
floor-other,floor-stone,floor-tile,floor-wood,flower,fog,food-other,fruit,furniture-other,grass,
gravel,ground-other,hill,house,leaves,light,mat,metal,mirror-stuff,moss,mountain,mud,napkin,net,
paper,pavement,pillow,plant-other,plastic,platform,playingfield,railing,railroad,river,road,
rock,roof,rug,salad,sand,sea,shelf,sky-other,skyscraper,snow,solid-other,stairs,stone,straw,
structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,wall-concrete,
wall-other,wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,
window-other,wood""")

CITYSCAPES_CLASSES = names("""
road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,
rider,car,truck,bus,train,motorcycle,bicycle""")

ADE_CLASSES = names("""
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
glass,clock,flag""")

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


@dataclass(frozen=True)
class Benchmark:
    """What a set is and where it lies: full images under root, {id} in the paths of each.

    ids: a file with one a line, or a glob (with a *) of the ids of the images that are there.
    labels: {path: lookup table}; the first path that exists is taken. partial: Table 3's classes.
    """

    classes: list
    palette: list
    full: int | None
    root: str
    images: str
    ids: str
    labels: dict
    partial: list | tuple = ()

    @property
    def background(self):
        """Is the first class whatever no text describes?"""
        return self.classes[0] == "background"


VOC = (1449, "VOCdevkit/VOC2012", "JPEGImages/{id}.jpg", "ImageSets/Segmentation/val.txt")
VOC_LABEL = "SegmentationClass/{id}.png"
CONTEXT = (
    5104,
    "VOCdevkit/VOC2010",
    "JPEGImages/{id}.jpg",
    "ImageSets/SegmentationContext/val.txt",
)
CONTEXT_LABEL = "SegmentationClassContext/{id}.png"
COCO = (5000, "coco_stuff164k", "images/val2017/{id}.jpg", "*")
COCO_LABEL = "annotations/val2017/{id}"
CITY_LABEL = "gtFine/val/{id}_gtFine_label"

BENCHMARKS = {  # in the order of Table 1
    "voc": Benchmark(
        ["background", *VOC_CLASSES],
        voc_palette(21),
        *VOC,
        {VOC_LABEL: lookup_table(range(21))},
    ),
    "context": Benchmark(
        ["background", *CONTEXT_CLASSES],
        ADE_PALETTE[:60],
        *CONTEXT,
        {CONTEXT_LABEL: lookup_table(range(60))},
    ),
    "coco_object": Benchmark(
        ["background", *COCO_CLASSES[:80]],
        [[0, 0, 0], *COCO_PALETTE[:80]],
        *COCO,
        {
            COCO_LABEL + "_instanceTrainIds.png": lookup_table(range(81)),
            # The stuffthingmaps: 80 things are 1 to 80; stuff and 255 are background, class 0.
            COCO_LABEL + ".png": lookup_table([255, *COCO_IDS[:80]], [], rest=0),
        },
    ),
    "voc20": Benchmark(
        VOC_CLASSES,
        voc_palette(21)[1:],
        *VOC,
        {VOC_LABEL: lookup_table(range(1, 21), [0, 255])},
        names("pottedplant,sheep,sofa,train,tvmonitor"),
    ),
    "context59": Benchmark(
        CONTEXT_CLASSES,
        ADE_PALETTE[1:60],
        *CONTEXT,
        {CONTEXT_LABEL: lookup_table(range(1, 60), [0, 255])},
        names("cow,motorbike,sofa,cat"),
    ),
    "coco_stuff": Benchmark(
        COCO_CLASSES,
        COCO_PALETTE,
        *COCO,
        {
            COCO_LABEL + "_labelTrainIds.png": lookup_table(range(171)),
            COCO_LABEL + ".png": lookup_table(COCO_IDS, rest=IGNORE),
        },
        names("""frisbee,skateboard,cardboard,carrot,scissors,suitcase,giraffe,cow,road,
wall-concrete,tree,grass,river,clouds,playingfield"""),
    ),
    "cityscapes": Benchmark(
        CITYSCAPES_CLASSES,
        CITYSCAPES_PALETTE,
        500,
        "cityscapes",
        "leftImg8bit/val/{id}_leftImg8bit.png",
        "*/*",
        {
            CITY_LABEL + "TrainIds.png": lookup_table(range(19)),
            CITY_LABEL + "Ids.png": lookup_table(CITYSCAPES_IDS, rest=IGNORE),
        },
    ),
    "ade20k": Benchmark(
        ADE_CLASSES,
        ADE_PALETTE,
        2000,
        "ade/ADEChallengeData2016",
        "images/validation/{id}.jpg",
        "*",
        {"annotations/validation/{id}.png": lookup_table(range(1, 151), [0, 255])},
    ),
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


def spans(values):
    """Sorted integers in short: [0, 1, 2, 255] is "0-2 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    words = [f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs if len(r)]
    return brief(" ".join(words))


def allowed(lut):
    """The stored values that a rule allows, in short."""
    return spans(np.flatnonzero(lut != INVALID))


def misfit(path, values, lut):
    """What to say of the first stored value that the rule does not allow; None where all are."""
    for value in values:
        if not 0 <= value < len(lut) or lut[value] == INVALID:
            return (
                f"{path}: label value {value} is outside the class list of this set "
                f"(it allows {allowed(lut)})"
            )


def read_label(path, lut):
    """Class indices int64 [h, w], as lookup_table says; InputError names a value without one."""
    stored = read_stored(path)
    if wrong := misfit(path, np.unique(stored), lut):
        raise InputError(wrong)
    return lut[stored].astype(np.int64)  # [h, w]


# ---- sets on disk ----


@dataclass
class SegmentationSet:
    """A labelled set. items: (image id, image path, label path, lut), lut of lookup_table.

    Class 0 is the background where there is one. full: how many images the whole benchmark has.
    """

    name: str
    classes: list
    background: bool
    items: list
    palette: list
    full: int | None = None
    partial: list | tuple = ()

    def __len__(self):
        return len(self.items)

    def prompts(self):
        """The class names that become texts: "background" never does (Sec. 4.1)."""
        return self.classes[1:] if self.background else self.classes


def read_set(name_or_spec, data_root):
    """A SegmentationSet of a benchmark's name or a SPEC.json; InputError has the close names."""
    if name_or_spec in BENCHMARKS:
        return read_files(name_or_spec, BENCHMARKS[name_or_spec], data_root)
    if name_or_spec.endswith(".json"):
        return read_spec(name_or_spec)
    close = difflib.get_close_matches(name_or_spec.lower(), BENCHMARKS) or list(BENCHMARKS)
    raise InputError(
        f"--datasets {name_or_spec}: unknown; did you mean {', '.join(close)}, or a SPEC.json?"
    )


def read_files(name, bench, data_root):
    """The SegmentationSet of a Benchmark; InputError says in one line what of it is missing."""
    root, items = Path(data_root, bench.root), []
    patterns = [bench.images, *bench.labels, bench.ids]
    places = dict.fromkeys(root / re.split(r"{id}|\*", pattern)[0] for pattern in patterns)
    missing = [place for place in places if not place.exists()] if root.is_dir() else [root]
    forms = [bench.images, capitals(bench.images)]
    for i in [] if missing else find_ids(root, bench.ids, forms):
        images = [root / path.replace("{id}", i) for path in forms]
        image = next(filter(Path.is_file, images), images[0])
        labels = {root / path.replace("{id}", i): lut for path, lut in bench.labels.items()}
        label = next(filter(Path.is_file, labels), [*labels][-1])
        missing += [path for path in (image, label) if not path.is_file()]
        items.append((i, str(image), str(label), labels[label]))
    if missing or not items:
        shown = ", ".join(map(str, missing[:SHOWN] or [root / bench.images]))
        more = f" and {len(missing) - SHOWN} more images or labels" if missing[SHOWN:] else ""
        prepared = bench.root == CONTEXT[1] and root.is_dir()
        hint = " (python benchmarks.py prepare-context makes labels and list)" if prepared else ""
        raise InputError(f"{name}: {shown}{more} missing{hint}")
    facts = (bench.classes, bench.background, items, bench.palette, bench.full, bench.partial)
    return SegmentationSet(name, *facts)


def find_ids(root, ids, forms):
    """The image ids of a Benchmark, from its list or from its folder of images."""
    if "*" not in ids:
        return read_list(root / ids)
    folder, endings = root / forms[0].split("{id}")[0], [path.split("{id}")[1] for path in forms]
    # Some archives bring ._ files along.
    found = [path for path in folder.glob(ids) if path.name[0] != "."]
    names = [path.relative_to(folder).as_posix() for path in found]
    return sorted({n.removesuffix(e) for n in names for e in endings if n.endswith(e)})


def capitals(path):
    """The same path with its suffix in capitals, as cameras write it."""
    stem, suffix = os.path.splitext(path)
    return stem + suffix.upper()


def read_list(path):
    """Image ids, one a line; InputError when there are none, or one is there twice or no id.

    An id becomes the path of a prediction that is written: it stays below its folder.
    """
    ids = Counter(line.strip() for line in files.read_text(path).splitlines() if line.strip())
    if not ids:
        raise InputError(f"{path}: holds no image ids")
    for i, times in ids.items():
        plain = PureWindowsPath(i)  # knows both slashes, and drives
        if plain.anchor or ".." in plain.parts or plain.as_posix() != i:
            raise InputError(f"{path}: {i[:99]!r} is no image id; a plain path below the folder is")
        if times > 1:
            raise InputError(f"{path}: holds {i} twice")
    return list(ids)


@dataclass
class Spec:
    """SPEC.json of a set of the user's own; folders and list are relative to the file.

    list: a file of image ids, one a line; null takes every image of the folder. With background,
    the first class is "background". values: the stored value of each class, as [0, 255]; null is 0,
    1, ..., or with zero_is_ignored 1, 2, ... ignore: stored values that are not scored; null is
    255, or with values past it 65535 (labels have 16 bits then), where that is no class. palette:
    [r, g, b] for each class; null is VOC's.
    """

    name: str
    images: str
    labels: str
    classes: list
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    background: bool = False
    ignore: list | None = None
    zero_is_ignored: bool = False
    values: list | None = None
    palette: list | None = None
    list: str | None = None


def read_spec(path):
    """A labelled set of the user's own from a SPEC.json; InputError when it is none."""
    text = files.read_text(path)
    try:
        spec = Spec(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        fields, why = ", ".join(Spec.__annotations__), files.first_line(error)
        raise InputError(f"{path}: must be a JSON object of {fields} ({why})") from error
    if wrong := next(spec_problems(spec), None):
        raise InputError(f"{path}: {wrong}")
    n, shift = len(spec.classes), int(spec.zero_is_ignored)
    stored = spec.values or range(shift, n + shift)
    top = 255 if max(stored) < 256 else 65_535
    ignored = [top] * (top not in stored) if spec.ignore is None else spec.ignore
    lut = lookup_table(stored, [0] * shift + ignored)
    if {*lut.tolist()} - {INVALID, max(IGNORE, n)} != {*range(n)}:
        raise InputError(f"{path}: each class needs one stored value that is not ignored")
    images = os.path.join(spec.images, "{id}" + spec.image_suffix)
    labels = os.path.join(spec.labels, "{id}" + spec.label_suffix)
    bench = Benchmark(
        spec.classes,
        (spec.palette or voc_palette(n + 1)[1 - spec.background :])[:n],
        None,
        "",
        images,
        spec.list or "*",
        {capitals(labels): lut, labels: lut},
    )
    dataset = read_files(spec.name, bench, Path(path).parent)
    if not spec.list:
        say_left_out(spec, Path(path).parent, dataset.items)
    return dataset


def say_left_out(spec, root, items):
    """On stderr: pictures of another suffix, labels without a picture."""
    taken, known = {file for item in items for file in item[1:3]}, Image.registered_extensions()
    for folder in {root / spec.images, root / spec.labels}:
        found = [p for p in folder.iterdir() if p.suffix.lower() in known and p.name[0] != "."]
        if rest := sorted(p.name for p in found if str(p) not in taken):
            pair = f"no pair of *{spec.image_suffix} and *{spec.label_suffix}"
            line = f"{len(rest)} files of {folder} are left out, {pair}"
            note(f"{spec.name}: {line}: {brief(', '.join(rest))}")


def spec_problems(spec):
    """Yields what is wrong with a Spec; each line relies on those before it."""
    for field, kind in Spec.__annotations__.items():
        value = getattr(spec, field)
        if not isinstance(value, kind) or (isinstance(value, str) and not is_line(value)):
            yield f"{field} cannot be {reprlib.repr(value)}"
    classes, palette = spec.classes, spec.palette or [[0, 0, 0]] * len(spec.classes)
    if not all(map(is_line, classes)):
        yield "classes must be names of at most 999 letters"
    if not spec.background < len(classes) <= MOST:
        yield f"classes must be 1 to {MOST} names"
    read = [" ".join(c.lower().split()) for c in classes]  # as CLIP reads them
    if "" in read or len({*read}) < len(read):
        yield "class names must differ in more than case and blanks, and none is empty"
    if [c for c in read if c == "background"] != classes[: spec.background]:
        yield '"background" is the first class with "background": true, and none without'
    if len(palette) < len(classes) or not all(are_whole(c, 255) and len(c) == 3 for c in palette):
        yield "palette needs one [r, g, b] of 0 to 255 per class"
    if not are_whole([*(spec.ignore or []), *(spec.values or [])], 65_535):
        yield "ignore and values must be lists of stored values, 0 to 65535"
    if spec.name in BENCHMARKS or not re.fullmatch(r"\w[\w.-]{,99}", spec.name):
        yield (
            f"name {reprlib.repr(spec.name)} becomes a file name: of letters, digits, '.', '_' "
            "and '-' alone, and not the name of a benchmark"
        )


def is_line(value):
    """Is it a text that a message, a path or a prompt can hold?"""
    return isinstance(value, str) and re.fullmatch(r"[^\0-\x1f]{,999}", value)


def are_whole(value, most):
    """Is it a list of integers of 0 to most? true and false are none."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= most for v in value)


# ---- python benchmarks.py check ----


def check_item(item):
    """(distinct stored values of one item's label, what is wrong or None), for a pool.

    Both files are decoded whole; the picture upright, as evaluated, must have the label's size.
    """
    _, image, label, lut = item
    try:
        width, height = files.read_picture(image).size
        stored = read_stored(label)
    except InputError as error:
        return [], str(error)
    values, wrong = np.unique(stored).tolist(), None
    if stored.shape != (height, width):
        sizes = f"{width}x{height} upright, its label {label} {stored.shape[1]}x{stored.shape[0]}"
        wrong = f"{image}: the image is {sizes}; they must agree"
    wrong = wrong or misfit(label, values, lut)
    return values[: 99 if wrong else None], wrong  # ids of instances would be millions


def survey(dataset, workers):
    """check_item of a whole set: ([what is wrong with it, ...], distinct stored values).

    Says on stderr which classes no label holds: a rule that takes a class for ignored shows here.
    """
    items, classes = dataset.items, dataset.classes
    found = list(files.in_parallel(check_item, items, workers, f"checking {dataset.name}"))
    wrong = [line for _, line in found if line]
    stored = sorted({value for values, _ in found for value in values})
    if wrong:
        return wrong, stored
    held = {k for item, (values, _) in zip(items, found, strict=True) for k in item[-1][values]}
    absent = [name for k, name in enumerate(classes) if k not in held]
    ignored = spans([value for value in stored if items[0][-1][value] >= len(classes)])
    if len(absent) == len(classes):
        wrong = [f"no pixel of {dataset.name} is scored: its labels hold {ignored} alone, ignored"]
    elif absent:
        of = f"{len(absent)} of {len(classes)} classes"
        unscored = f"stored {ignored or 'none'} is not scored"
        note(f"{dataset.name}: {unscored}, no label holds {of}: {brief(', '.join(absent))}")
    return wrong, stored


def note(line):
    """To stderr, once where several ranks run."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def brief(text):
    """As many of its words as fit in a line."""
    return textwrap.shorten(text, 200, placeholder=" ...")


def check_labels(dataset, workers=1):
    """InputError unless every picture and label is whole, of one size, with values that fit.

    Before any long work, as a cut picture would end it hours later. Costs 5 ms for a picture of
    500 x 375, 120 ms for one of Cityscapes, on one core.
    """
    wrong, _ = survey(dataset, workers)
    if wrong:
        more = f" (and {len(wrong) - 1} more files)" if wrong[1:] else ""
        raise InputError(wrong[0] + more)


def check_sets(names, data_root, workers=1):
    """Prints a table of sets and what is wrong with them; exit code 0 only when all are whole."""
    row, report = "{:<12} {:<8} {:<13} {:<23} {}", []
    print(row.format("set", "state", "images", "label values", "allowed by the rule"))
    for name in names:
        try:
            dataset = read_set(name, data_root)
        except InputError as error:
            print(f"{name:<13}missing")
            report.append(str(error))
            continue
        wrong, stored = survey(dataset, workers)
        if len(wrong) > SHOWN:
            wrong[SHOWN:] = [f"and {len(wrong) - SHOWN} more files"]
        n, full = len(dataset), dataset.full or len(dataset)
        if n != full:
            wrong.append(f"{n} images, the benchmark has {full}: results will be marked partial")
        facts = (f"{n} of {full}", spans(stored), allowed(dataset.items[0][-1]))
        print(row.format(dataset.name, "wrong" if wrong else "ok", *facts))
        report += [f"{dataset.name}: {line}" for line in wrong]
    if report:
        print("", *report, sep="\n")
    return int(bool(report))


# ---- python benchmarks.py prepare-context ----

MAT_FOLDER = "trainval"  # as trainval.tar.gz unpacks
MAT_TYPES = " bBhHiIf d  qQ"  # numpy's letter of each number type, by the format's own number
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_ODD = dict(enumerate("cell struct object char sparse".split(), start=1))  # kinds of matrix
MAT_BYTES = 64 << 20  # of a file, unpacked; nothing is packed twice, so it is below 1,032 times too


def mat_elements(content):
    """(type, bytes) of the data elements in a part of a MATLAB 5 MAT-file, little-endian."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        at += 8
        if kind >> 16:  # a small element: size, type and up to 4 bytes in the place of a tag
            yield kind & 0xFFFF, content[at - 4 : at - 4 + (kind >> 16)]
        else:
            yield kind, content[at : at + size]
            at += size + (-size % 8 if kind != MAT_COMPRESSED else 0)


def read_mat(path, name):
    """The real matrix [h, w] of this name in a MATLAB 5 MAT-file; InputError without one."""
    try:
        with open(path, "rb") as file:
            content, room = file.read(MAT_BYTES), MAT_BYTES
        if content[124:128] != b"\0\1IM":
            raise ValueError("no header of version 1, little-endian")
        for kind, body in mat_elements(content[128:]):
            if kind == MAT_COMPRESSED:
                unpack = zlib.decompressobj()
                body = unpack.decompress(body, room + 1)
                room -= len(body)
                if room < 0 or not unpack.eof:
                    raise ValueError("cut off, or unpacks to more than 64 MB")
                [(kind, body)] = mat_elements(body)
            if kind == MAT_MATRIX:
                parts = itertools.islice(mat_elements(body), 4)
                (_, flags), (_, shape), (_, called), *rest = parts
                if called == name.encode():
                    if odd := MAT_ODD.get(flags[0]) or "complex" * (flags[1] >> 3 & 1):
                        raise ValueError(f"it is {odd}")
                    height, width = struct.unpack("<2i", shape)
                    flat = np.frombuffer(rest[0][1], "<" + MAT_TYPES[rest[0][0]])
                    return flat.reshape(width, height).T  # column by column -> [h, w]
        raise ValueError("it is not there")
    except Exception as error:  # whatever a broken file makes them stumble over
        raise InputError(
            f"{path}: no whole MATLAB 5 MAT-file with a matrix {name} of real numbers ({error})"
        ) from error


def context_label(paths):
    """One (.mat, .png): the 459 classes become 60; an id that is not of CONTEXT_IDS is 0."""
    mat, png = paths
    stored = read_mat(mat, "LabelMap")  # [h, w]
    odd = np.setdiff1d(stored, range(460))
    if odd.size or not stored.size:
        raise InputError(f"{mat}: LabelMap holds {odd[:1]}; PASCAL Context's ids are 0 to 459")
    table = np.zeros(460, dtype=np.uint8)
    table[CONTEXT_IDS] = np.arange(60)
    label = Image.fromarray(table[stored.astype(int)])
    label.putpalette(sum(ADE_PALETTE[:60], []))
    files.save_png(png, label)


def context_val_ids(root, mats):
    """The ids of PASCAL Context's validation images.

    Paper silent: which. The benchmark's 5,104 (MMSegmentation's) are those that
    trainval_merged.json calls val; where neither it nor a val.txt is there, VOC2010's val images,
    one more, and the result is marked.
    """
    own, merged = root / BENCHMARKS["context"].ids, root / "trainval_merged.json"
    if own.is_file():
        return read_list(own)
    if not merged.is_file():
        ids = read_list(root / "ImageSets/Main/val.txt")
        return [i for i in ids if (mats / f"{i}.mat").is_file()]
    try:
        images = json.loads(files.read_text(merged))["images"]
        return sorted(Path(image["file_name"]).stem for image in images if image["phase"] == "val")
    except Exception as error:  # of JSON, or of another structure
        raise InputError(f"{merged}: has no images with file_name and phase ({error!r})") from error


def prepare_context(data_root, mats=None, workers=1):
    """SegmentationClassContext/*.png from the 459-class .mat files, then val.txt; keeps what is."""
    bench = BENCHMARKS["context"]
    root = Path(data_root, bench.root)
    mats, listed = Path(mats or root / MAT_FOLDER), root / bench.ids
    ids = context_val_ids(root, mats)
    pairs = [(mats / f"{i}.mat", root / CONTEXT_LABEL.replace("{id}", i)) for i in ids]
    todo = [(mat, png) for mat, png in pairs if not png.is_file()]
    missing = [mat for mat, _ in todo if not mat.is_file()] if ids else [mats]
    if missing:
        raise InputError(
            f"{missing[0]}: {len(missing)} of the val images' .mat files are missing; unpack "
            f"PASCAL Context's trainval.tar.gz in {root}, or give --mat"
        )
    list(files.in_parallel(context_label, todo, workers, "PASCAL Context"))
    if not listed.is_file():  # last: what it lists is there
        files.write_text(listed, "\n".join(ids) + "\n")
    print(
        f"{listed}: {len(ids)} images; {len(todo)} PNGs written, {len(ids) - len(todo)} were there"
    )
    if len(ids) != bench.full:
        print(
            f"warning: the benchmark has {bench.full} images, so results are marked partial; for "
            f"its own list put trainval_merged.json into {root}, delete {listed.name}, run again",
            file=sys.stderr,
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
    add(
        "--mat",
        help=f"for prepare-context: the .mat files (default: {MAT_FOLDER} beside JPEGImages)",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return p.parse_args(argv)


def main(args):
    """One command; returns the exit code."""
    if args.command == "prepare-context":
        return prepare_context(args.data_root, args.mat, args.workers)
    return check_sets(args.datasets or list(BENCHMARKS), args.data_root, args.workers)


if __name__ == "__main__":
    sys.exit(files.command(main, parse_args()))
