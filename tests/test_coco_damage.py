"""Generated COCO files, sound and damaged in named ways: each loads as it should, or stops and names the culprit.

Every damage says what must come of it. A file that loads must equal, number for number, what a plain loop over the
undamaged file gives, less what a warning named. So no damage can change the data set in silence.
"""
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detr_nb.annotations import CocoIndex, DataError, DataWarning
from detr_nb.coco import read_index


@st.composite
def coco_files(draw) -> dict:
    "Sound files: two or three images, two or more classes, four or more annotations, ids of any size in any order."
    ids = st.integers(-(2**62), 2**62).filter(bool)
    side = st.integers(40, 900)
    images = [{"id": i, "file_name": f"{n}.png", "width": draw(side), "height": draw(side)}
              for n, i in enumerate(draw(st.lists(ids, min_size=2, max_size=3, unique=True)))]
    categories = [{"id": i, "name": f"class {n}"}
                  for n, i in enumerate(draw(st.lists(ids, min_size=2, max_size=4, unique=True)))]
    annotations = []
    for n, number in enumerate(draw(st.lists(ids, min_size=4, max_size=7, unique=True))):
        image = draw(st.sampled_from(images))
        x, y = draw(st.floats(0, image["width"] - 10)), draw(st.floats(0, image["height"] - 10))
        w, h = draw(st.floats(2, image["width"] - x)), draw(st.floats(2, image["height"] - y))
        annotations.append({
            "id": number, "image_id": image["id"], "category_id": draw(st.sampled_from(categories))["id"],
            "bbox": [x, y, w, h], "area": draw(st.floats(1, w * h)), "iscrowd": draw(st.integers(0, 1)) if n > 2 else 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}


def by_loop(content: dict) -> dict:
    "What a sound file says, read with plain loops: for each image its file, size and annotations in their order."
    labels = {number: label for label, number in enumerate(sorted(entry["id"] for entry in content["categories"]))}
    return {
        "classes": [entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])],
        "images": [(image["id"], image["file_name"], image["height"], image["width"],
                    [(a["id"], labels[a["category_id"]], *map(float, a["bbox"]), float(a["area"]), bool(a["iscrowd"]))
                     for a in content["annotations"] if a["image_id"] == image["id"]])
                   for image in content["images"]],
    }  # fmt: skip


def from_index(index: CocoIndex) -> dict:
    "The same of what we read."
    images, objects, categories = index
    table = list(zip(objects.ids.tolist(), objects.labels.tolist(), *objects.boxes.T.tolist(), objects.areas.tolist(),
                     objects.crowd.tolist()))
    bounds = objects.offsets.tolist()
    names = [name.decode() for name in images.names.unpack()]
    rows = zip(images.ids.tolist(), names, images.sizes.tolist(), bounds, bounds[1:])
    return {"classes": list(categories.names),
            "images": [(i, name, *size, table[start:end]) for i, name, size, start, end in rows]}


class Damage(NamedTuple):
    "A way to damage a file."
    outcome: str  # "stops", "warns" or "loads"
    apply: Callable  # (content, i) changes the content, i a place in its lists; returns what must be named, as a list
    expect: Callable = lambda content, i: content  # (sound content, i) to what must be loaded


def damage(name: str, outcome: str, **more):
    "Put a function into the list of damages."
    def put(function):
        DAMAGES[name] = Damage(outcome, function, **more)
        return function

    return put


DAMAGES: dict[str, Damage] = {}


def at(entries: list, i: int) -> dict:
    return entries[i % len(entries)]


# ---------------------------------------------------------------- the file as a whole (applied to its text)


@damage("cut short", "stops")
def cut(text: bytes, i: int):
    return text[: i % len(text)], ["cut short or not JSON"]


@damage("a brace lost", "stops")
def lose_brace(text: bytes, i: int):
    places = [place for place, letter in enumerate(text) if letter in b"{}"]
    place = places[i % len(places)]
    return text[:place] + text[place + 1 :], ["cut short or not JSON"]


@damage("a bracket of a list lost", "stops")
def lose_bracket(text: bytes, i: int):
    place = text.index((b'"images": [', b'"annotations": [', b'"categories": [')[i % 3]) + len(b'"images": ')
    place = text.index(b"[", place - 1)
    return text[:place] + text[place + 1 :], ["cut short or not JSON"]


@damage("a bracket of an outline that nobody needs lost", "stops")
def lose_outline_bracket(text: bytes, i: int):
    place = text.index(b'"segmentation": [[') + len(b'"segmentation": [')
    return text[:place] + text[place + 1 :], ["cut short or not JSON"]


@damage("bytes that are no text", "stops")
def no_text(text: bytes, i: int):
    place = text.index(b"file_name") + 2
    return text[:place] + b"\xff\xfe" + text[place:], ["cut short or not JSON"]


@damage("a page of an error in its place", "stops")
def page(text: bytes, i: int):
    return b"<html><body>404</body></html>", ["cut short or not JSON"]


@damage("a list of detections", "stops")
def detections(text: bytes, i: int):
    return json.dumps(json.loads(text)["annotations"]).encode(), ["not a COCO object"]


@damage("two files one behind the other", "stops")
def twice(text: bytes, i: int):
    return text + b"\n" + text, ["cut short or not JSON", "Extra data"]


@damage("a list written twice", "stops")
def list_twice(text: bytes, i: int):
    name = ("images", "annotations", "categories")[i % 3]
    again = json.dumps(json.loads(text)[name])
    return text[:-1] + f', "{name}": {again}}}'.encode(), [f"{name!r} twice"]


@damage("a byte order mark", "loads")
def byte_order_mark(text: bytes, i: int):
    return b"\xef\xbb\xbf" + text, []


@damage("written with indents", "loads")
def indented(text: bytes, i: int):
    return json.dumps(json.loads(text), indent=1).encode(), []


OF_TEXT = set(DAMAGES)

# ---------------------------------------------------------------- lists


for section in ("images", "annotations", "categories"):
    @damage(f"no {section}", "stops")
    def no_section(content, i, section=section):
        del content[section]
        return [f"has no {section}"]

    @damage(f"{section} empty", "stops")
    def empty_section(content, i, section=section):
        content[section] = []
        return [f"has no {section}"]

    @damage(f"{section}: an entry that is no object", "stops")
    def no_object(content, i, section=section):
        place = i % len(content[section])
        content[section][place] = [1, 2]
        return [f"entry {place} of {section!r}", "not an object"]

    @damage(f"{section}: an id twice", "stops")
    def id_twice(content, i, section=section):
        entries = content[section]
        entries[(i + 1) % len(entries)]["id"] = at(entries, i)["id"]
        return [f"{section} repeat an id", str(at(entries, i)["id"])]

    @damage(f"{section}: an id that is text", "stops")
    def id_text(content, i, section=section):
        at(content[section], i)["id"] = "7"
        return [f"entry {i % len(content[section])} of {section!r}", "id '7'"]

    @damage(f"{section}: an id missing", "stops")
    def id_missing(content, i, section=section):
        del at(content[section], i)["id"]
        return [f"entry {i % len(content[section])} of {section!r}", "id None"]


# ---------------------------------------------------------------- entries that stop


def wrong_value(name: str, section: str, key: str, value, *words: str) -> None:
    "A damage that sets one field, after which the reading must stop and name the entry's id."
    @damage(name, "stops")
    def put(content, i):
        entry = at(content[section], i)
        entry[key] = value
        if value is KeyError:
            del entry[key]
        return [str(entry["id"]), *words]


wrong_value("an id with a fraction", "annotations", "image_id", 6.5, "image_id 6.5")
wrong_value("an id that is true", "annotations", "category_id", True, "category_id True")
wrong_value("an id beyond 64 bits", "annotations", "image_id", 2**70, f"image_id {2**70}")
wrong_value("an image without width", "images", "width", KeyError, "width None")
wrong_value("an image without height", "images", "height", None, "height None")
wrong_value("an image of no height", "images", "height", 0, "height 0")
wrong_value("an image of negative width", "images", "width", -5, "width -5")
wrong_value("a size with a fraction", "images", "width", 640.5, "width 640.5")
wrong_value("an image without a file", "images", "file_name", KeyError, "file_name None")
wrong_value("an image with an empty file name", "images", "file_name", "", "file_name ''")
wrong_value("a box of three numbers", "annotations", "bbox", [1, 2, 3], "[1.0, 2.0, 3.0]")
wrong_value("a box of text", "annotations", "bbox", ["1", "2", "3", "4"], "['1', '2', '3', '4']")
wrong_value("a box of corners in lists", "annotations", "bbox", [[1, 2], [3, 4]], "[[1, 2], [3, 4]]")
wrong_value("a box with a number beyond all", "annotations", "bbox", [1, 2, 10**400, 4], "bbox")
wrong_value("iscrowd two", "annotations", "iscrowd", 2, "iscrowd 2")
wrong_value("iscrowd text", "annotations", "iscrowd", "no", "iscrowd 'no'")


@damage("an annotation of no image", "stops")
def lost_image(content, i):
    unknown = max(image["id"] for image in content["images"]) + 1
    at(content["annotations"], i)["image_id"] = unknown
    return ["image_id", str(unknown), str(at(content["annotations"], i)["id"])]


@damage("an annotation of no category", "stops")
def lost_category(content, i):
    unknown = max(category["id"] for category in content["categories"]) + 1
    at(content["annotations"], i)["category_id"] = unknown
    return ["category_id", str(unknown), str(at(content["annotations"], i)["id"])]


@damage("boxes as shares of the image", "stops")
def shares(content, i):
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        width, height = sizes[entry["image_id"]]
        entry["bbox"] = [n / m for n, m in zip(entry["bbox"], (width, height, width, height))]
    return ["first pixel", "in pixels"]


@damage("no box of use", "stops")
def no_boxes(content, i):
    for entry in content["annotations"]:
        entry["bbox"] = [5, 5, 0, 0]
    return [f"none of its {len(content['annotations'])} annotations has a usable box"]


@damage("crowds only", "stops")
def crowds_only(content, i):
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    return ["has a usable box"]


# ---------------------------------------------------------------- entries that are left out, or mended, with a warning


def without(content, i):
    "The sound content less the i-th annotation."
    gone = at(content["annotations"], i)
    return {**content, "annotations": [entry for entry in content["annotations"] if entry is not gone]}


def skipped(name: str, change: Callable[[dict], None], reason: str) -> None:
    "A damage of one annotation, after which it is left out with a warning that names it."
    @damage(name, "warns", expect=without)
    def put(content, i):
        entry = at(content["annotations"], i)
        change(entry)
        return [f"skipped 1 of {len(content['annotations'])}", reason, f"annotation ids {entry['id']}"]


def set_box(place: int, value) -> Callable[[dict], None]:
    return lambda entry: entry["bbox"].__setitem__(place, value)


skipped("a box without width", set_box(2, 0), "without positive width")
skipped("a box of negative height", set_box(3, -4.5), "without positive width")
skipped("a box with not-a-number", set_box(0, math.nan), "without a finite box")
skipped("a box without end", set_box(2, math.inf), "without a finite box")
skipped("a box with nothing for a number", set_box(1, None), "without a finite box")
skipped("no box", lambda entry: entry.pop("bbox"), "without a finite box")
skipped("an empty box", lambda entry: entry.update(bbox=[]), "without a finite box")
skipped("a box right of the image", set_box(0, 901), "outside the image")
skipped("a box above the image", lambda entry: entry.update(bbox=[3, -50, 5, 20]), "outside the image")


def wide(content, i):
    at(content["annotations"], i)["bbox"][2] = 2000.0
    return content


@damage("a box over the edge", "warns", expect=wide)
def over_edge(content, i):
    wide(content, i)
    return ["clipped 1 of", f"annotation ids {at(content['annotations'], i)['id']}"]


def zero_id(content, i):
    at(content["annotations"], i)["id"] = 0
    return content


@damage("an annotation with the id 0", "warns", expect=zero_id)
def with_zero(content, i):
    zero_id(content, i)
    return ["annotation id 0", f"entry {i % len(content['annotations'])}"]


def listed_twice(content, i):
    content["images"].append({**at(content["images"], i), "id": 2**62 + 1})
    return content


@damage("an image listed under two ids", "warns", expect=listed_twice)
def same_file(content, i):
    name = at(content["images"], i)["file_name"]
    listed_twice(content, i)
    return ["share a file", name]


def same_names(content, i):
    content["categories"][1]["name"] = content["categories"][0]["name"]
    return content


@damage("two categories of one name", "warns", expect=same_names)
def one_name(content, i):
    same_names(content, i)
    return ["stand for several ids", "class 0"]


@damage("a category that is the others' heading", "warns")
def heading(content, i):
    for entry in content["categories"]:
        entry["supercategory"] = "things"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    return ["left out category 0 (things)"]


def box_area(content, i):
    "The area of the outline, which is a box here, drawn in whole pixels as pycocotools does; checked apart."
    at(content["annotations"], i)["area"] = None
    return content


for what, value in (("negative", -3), ("text", "12"), ("not-a-number", math.nan)):
    @damage(f"an area that is {what}", "warns", expect=box_area)
    def wrong_area(content, i, value=value):
        at(content["annotations"], i)["area"] = value
        return ["replaced 1 of", f"annotation ids {at(content['annotations'], i)['id']}"]


# ---------------------------------------------------------------- no damage, whatever it looks like


@damage("no area", "loads", expect=box_area)
def no_area(content, i):
    del at(content["annotations"], i)["area"]
    return []


def no_crowd(content, i):
    at(content["annotations"], 0)["iscrowd"] = 0
    return content


@damage("no iscrowd", "loads", expect=no_crowd)
def missing_crowd(content, i):
    del content["annotations"][0]["iscrowd"]
    return []


@damage("a broken outline that nobody needs", "loads")
def broken_outline(content, i):
    at(content["annotations"], i)["segmentation"] = [[1, 2], "x", None]
    return []


@damage("fields that we do not know", "loads")
def more_fields(content, i):
    content["info"] = {"year": "segmentation"}
    at(content["images"], i)["flickr_url"] = '"segmentation": [1, 2]'
    at(content["annotations"], i)["attributes"] = {"id": 3, "bbox": [0, 0, 0, 0], "segmentation": [[1.5, 2e3]]}
    return []


@damage("categories in another order", "loads")
def other_order(content, i):
    content["categories"].reverse()
    return []


# ---------------------------------------------------------------- the test


def blank_areas(read: dict, wanted: dict) -> dict:
    "`read` with None for each area that is None in `wanted`, and that area between nothing and the image's."
    for got, want in zip(read["images"], wanted["images"]):
        for n, (ours, theirs) in enumerate(zip(got[4], want[4])):
            if math.isnan(theirs[6]):
                assert 0 <= ours[6] <= got[2] * got[3]
                got[4][n] = want[4][n]
    return read


@pytest.mark.parametrize("name", DAMAGES)
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(content=coco_files(), i=st.integers(0, 10**6))
def test_a_damaged_file_loads_as_it_should_or_stops_and_names_the_culprit(tmp_path, name, content, i):
    outcome, apply, expect = DAMAGES[name]
    sound = json.dumps(content)
    if name in OF_TEXT:
        data, words = apply(sound.encode(), i)
    else:
        words = apply(content, i)
        data = json.dumps(content).encode()
    path = tmp_path / "damaged.json"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if outcome == "stops":
            with pytest.raises(DataError) as error:
                read_index(path)
            said = str(error.value)
        else:
            index = read_index(path)
            assert all(issubclass(warning.category, DataWarning) for warning in caught)
            said = "; ".join(str(warning.message) for warning in caught)
            assert bool(said) == (outcome == "warns"), said
            wanted = expect(json.loads(sound), i)
            unknown = [entry for entry in wanted["annotations"] if entry["area"] is None]
            for entry in unknown:
                entry["area"] = math.nan
            wanted = by_loop(wanted)
            read = from_index(index)
            assert (blank_areas(read, wanted) if unknown else read) == wanted
    assert "\n" not in said and (outcome == "loads" or str(path) in said)
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


def outcome_of(path: Path) -> tuple:
    "What comes of reading a file: what it says, or why it is refused; and the warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read = from_index(read_index(path))
        except DataError as error:
            read = str(error)
    return repr(read), [str(warning.message) for warning in caught]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=coco_files(), place=st.integers(0, 10**6), letter=st.integers(0, 255))
def test_one_changed_byte_never_crashes_the_reader(tmp_path, content, place, letter):
    "Whatever a wrong byte makes of a file, it loads or is refused by its name."
    data = bytearray(json.dumps(content).encode())
    data[place % len(data)] = letter
    path = tmp_path / "changed.json"
    path.write_bytes(data)
    said = outcome_of(path)[0]
    if not said.startswith("{"):
        assert str(path) in said and "\n" not in said
