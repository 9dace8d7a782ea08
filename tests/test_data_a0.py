"""data.py's readers of A0's official sets: the recorded draws, small trees of every form, what is refused."""
import contextlib
import hashlib
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import a0
import data
import forks
from golden_cases import Recordings

GOLDEN = Recordings("a0")
TRACKED, SPLIT = ("maniskill", "droid_cotrack", "droid_molmo_sam2"), "train_test_split.json"


class Draws(list):
    """Recorded draws, given out in their order; whoever asks for another one fails."""

    def randint(self, low, high):
        assert self[0][:3] == ["randint", low, high]
        return self.pop(0)[3]

    def choice(self, options):
        assert self[0][::2] == ["choice", len(options)]
        return options[self.pop(0)[1]]

    def random(self):
        assert self[0][0] == "random"
        return self.pop(0)[1]


def replay(root, case, **how):
    often, draws = 0.3 if case["dataset"] == "hoi4d_frame" else 0.4, Draws(case["draws"])    # in tests, too
    how = {"first_frame": case["first_frame"], "single_image": often} | how
    sample = data.a0_dataset(case["dataset"], root, case["split"], **how).sample(case["index"], draws)
    assert not draws and sample["dataset"] == case["dataset"]
    return sample


@GOLDEN.replays("dataset_tree")
def test_recorded_trees_are_whole(case):
    assert sum(path.is_file() for path in case.path(case.file).rglob("*")) == case.config["num_files"]
    case.seen.add("num_files")


@GOLDEN.replays("datasets_expected_cases")
def test_instructions_and_the_official_mixture(case):
    recorded, root = case.json(), case.folder / "datasets"
    mixture = data.open_dataset(f"a0={root}")
    found = [[name, len(one)] for (name, _), one in zip(recorded["concat_order"], mixture.datasets)]
    case.compare("concat_order", found, recorded["concat_order"])      # the order: see the consumer's cases
    for i, one in enumerate(recorded["reader_cases"]):
        sample = replay(root, one)
        ours = {"instruction": sample["instruction"], "one_image": "history_images" not in sample}
        case.compare(f"reader_cases/{i}/meta", ours, {key: one["meta"].get(key, ours[key]) for key in ours})
    for i, one in enumerate(recorded["consumer_cases"]):
        name = mixture[one["index"]]["dataset"].replace("hoi4d_frame", "hoi4d_images")
        case.compare(f"consumer_cases/{i}/dataset_name", name, one["dataset_name"])


@GOLDEN.replays("datasets_expected")
def test_readers_reproduce_the_recorded_draws_c18(case):
    recorded, root = case.json(case.config["cases_file"]), case.folder / "datasets"
    for one in recorded["reader_cases"]:
        sample, two = replay(root, one), replay(root, one, single_image=0)
        case.compare(f"{one['key']}.actions", sample["waypoints"])
        case.compare(f"{one['key']}.cam_high", [*two["history_images"]["current"], two["images"]["current"]])
        case.compare(f"{one['key']}.cam_high_mask", ["history_images" in sample, True])
    how, mixture, prepared = case.config["consumer"], data.open_dataset(f"a0={root}"), []
    cfg = a0.Config(image_size=how["image_size"], patch_size=4, pad=how["pad"], vocab=64, pad_id=0)
    def tokenizer(text, **_):
        return SimpleNamespace(input_ids=[1 + ord(c) % 50 for c in text[:24:3]])
    def compare(name, batch):
        images = (batch["images"].movedim(-1, -3) * how["rescale"] - how["mean"]) / how["std"]
        case.compare(f"{name}.images", images)
        case.compare(f"{name}.actions", batch["waypoints"])
        case.compare(f"{name}.input_ids", batch["ids"])
    for one in recorded["consumer_cases"]:
        sample = mixture.sample(one["index"], Draws(one["draws"]))
        prepared.append(a0.prepare(sample, cfg, tokenizer))
        compare(f"consumer.{one['index']}", prepared[-1])
    compare("collated", batch := a0.collate(prepared, cfg))
    case.compare("collated.lang_attn_mask", batch["mask"])


@GOLDEN.replays("hoi4d_mask_centers")
def test_label_colours_and_centres_of_masks_match(case):
    recorded = case.json()
    case.compare("color_map_rgb_first_16", data.label_colours(16).tolist(),
                 recorded["color_map_rgb_first_16"])
    mask = data.label_colours(256)[np.array(recorded["mask_index_image"])]             # (h, w, 3)
    for query in case.config["queries"]:
        for way, largest in (("mean_of_pixels", False), ("largest_contour_moments", True)):
            found, want = data.mask_centre(mask, query["labels"],
                                           largest), recorded["centers_xy"][query["key"]][way]
            assert (found is None) == (want is None)
            if want:
                case.compare(f"centers_xy/{query['key']}/{way}", found, want)


def test_largest_outline_counts_its_holes_and_no_other_thing():
    mask = np.zeros((12, 20, 3), np.uint8)
    mask[2:9, 3:10] = mask[0, 0] = mask[10, 12:20] = data.label_colours(4)[3]
    mask[3:8, 3 + 1:9] = 0                                             # a ring, a dot, and a line: no area
    mask[5, 6] = data.label_colours(4)[3]                              # what is within the ring is the ring's
    assert data.mask_centre(mask, [3], largest=True) == [6, 5] != data.mask_centre(mask, [3])
    mask[2:9] = 0
    assert data.mask_centre(mask, [3], largest=True) is None and data.mask_centre(mask, [3]) == [13, 8]


def raw_hoi4d(root):
    """HOI4D_annotations of a bottle, a drawer, a bucket, each at x = 2 i + 1 in frame i; and definitions."""
    write(root / "def/task/task_definitions.csv", "Category ID,Category,T1,T2\nC5,Bottle,Pick and place,N/A\n"
          "C4,Storage Furniture,N/A,Open and close the drawer\nC8,Bucket,Pick and place,N/A\n")
    write(root / "def/motion segmentation/label.csv", "Category ID,Category,Lable 1,Lable 2,Lable 3,Lable 4\n"
          "C5,Bottle,Bottle,Right Hand,Mug,\nC8,Bucket,Body of the Bucket,Right Hand,Handle,Handle\n"
          "C4,Storage Furniture,Door,Right Hand,Body of the Cabinet,Drawer\n")
    events = [("rest", 0, 0.2), ("Pickup", 0.2, 1.34)]
    for name, label, kind, seconds in (("C5/N1/S1/s1/T1", 1, "mask", 20), ("C4/N1/S1/s1/T2", 4, "mask", 10.0),
                                       ("C8/N1/S1/s1/T1", 5, "shift_mask", 20)):
        clip, scale = root / "HOI4D_annotations/ZY1/H1" / name, seconds / 20
        names = ("hdTimeStart", "hdTimeEnd") if kind == "shift_mask" else ("startTime", "endTime")
        marks = [{"id": i, "event": e, names[0]: a * scale, names[1]: b * scale} for i,
                 (e, a, b) in enumerate(events)]
        marks = {"markResult": {"marks": marks}} if kind == "shift_mask" else {"events": marks}
        write(clip / "action/color.json",
              {"info": {"Duration" if seconds == 10 else "duration": seconds}, **marks})
        for i in range(21):
            index = np.full((10, 50), 2)                               # a hand everywhere
            index[4:7, 2 * i:2 * i + 3] = label
            write(clip / f"2Dseg/{kind}/{i:05d}.png", Image.fromarray(data.label_colours(6)[index]))
            write(root / f"HOI4D_release/ZY1/H1/{name}/align_rgb/{i:05d}.jpg", grey(i, (50, 10)))
    return ["--root", str(root), "--definitions", str(root / "def"), "--workers", "0"]


def test_raw_hoi4d_becomes_a_set_to_train_on(tmp_path, monkeypatch, capsys):
    flags, clips = raw_hoi4d(tmp_path), tmp_path / "HOI4D_annotations/ZY1/H1"
    shutil.copytree(clips / "C5/N1/S1/s1/T1/action", clips / "C5/N2/S1/s1/T1/action")  # a clip without masks
    write(clips / "C8/N1/S1/s1/T1/action/color.json", ("info", {}))                    # that is 20 s, then
    monkeypatch.setattr(sys, "argv", ["data.py", "hoi4d-metadata", *flags])
    data.main()
    made = {path.parts[-6]: path for path in tmp_path.glob("hoi4d_metadata/**/metadata.json")}
    before = {path: path.stat().st_mtime_ns for path in made.values()}
    data.main()                                                        # what is done is done
    said = capsys.readouterr()
    assert before == {path: path.stat().st_mtime_ns for path in made.values()}
    assert said.out.count("3 clips") == said.err.count("1 clips have no masks") == 2
    for category, words, label in (("C5", "pick and place", "Bottle"),
                                   ("C8", "pick and place", "Handle of Bucket"),
                                   ("C4", "open and close the drawer", "Drawer of Storage Furniture")):
        clip = json.loads(made[category].read_text())
        assert (clip["task_name"], clip["label_name"]) == (words, label)
        assert [frame["center"] for frame in clip["frames"]] == [[2 * i + 1, 5] for i in range(21)]
        assert [(e["start_frame"], e["end_frame"]) for e in clip["events_frame"]] == [(0, 3), (3, 20)]
        assert [clip["frames"][i]["event"] for i in (0, 3, 4)] == ["rest", "rest", "Pickup"]
    sets = [data.a0_dataset("hoi4d", tmp_path, split, single_image=0) for split in ("train", "test")]
    samples = [one[i] for one in sets for i in range(len(one))]
    assert len(samples) == 3 and "Task: pick and place. Pickup Bottle." in {s["instruction"] for s in samples}
    for sample in samples:                                             # its points lie where the masks were
        at = round(float(sample["images"]["current"].mean()) / 5)
        assert sample["waypoints"][[0, -1], 0].tolist() == pytest.approx([(2 * at + 1) / 50, 41 / 50])


@pytest.mark.parametrize("path, content, message", [
    ("HOI4D_annotations", None, "no HOI4D_annotations/"),
    ("def/task", None, "task_definitions.csv is not as .*No such"),
    ("HOI4D_annotations/ZY1/H1/C5/N1/S1/s1/T1/action/color.json", ("events", [{}]),
     "color.json is not as .*'event'"),
    ("HOI4D_annotations/ZY1/H1/C5/N1/S1/s1/T1/action/color.json", ("info", {"duration": "long"}),
     "color.json is not as .*'long'"),
    ("HOI4D_annotations/ZY1/H1/C5/N1/S1/s1/T1/2Dseg/mask/00003.png", "torn",
     "00003.png is not as .*Unidentified")])
def test_bad_raw_hoi4d_is_one_line_that_names_the_file(tmp_path, path, content, message):
    raw_hoi4d(tmp_path)
    write(tmp_path / path, content)
    with pytest.raises(ValueError, match=message) as error:
        data.hoi4d_metadata(tmp_path, tmp_path / "def", workers=0)
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path) in str(error.value)


# ---- Small trees: frame i is grey of brightness 5 i, and the object is at x = i of 20 ---------------------

SIM, HOI = "maniskill/task/label/out_0.json", "hoi4d_metadata/ZY1/C0/align_rgb/metadata.json"
CSV, MOLMO = "hoi4d_frame/HOI4D_points_rectification.csv", "hoi4d_frame/HOI4D_points_molmo"
NPY = "hoi4d_frame/HOI4D_points/train/ZY1/C0/00006/points2d.npy"


def write(path, content):
    """A picture, points, a text, a JSON object; (field, value): changed in one; None: remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, (Image.Image, np.ndarray)):
        content.save(path) if isinstance(content, Image.Image) else np.save(path, content)
    else:
        content = json.loads(path.read_text()) | dict([content]) if isinstance(content, tuple) else content
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def grey(i, size=(20, 10)):
    return Image.new("RGB", size, (5 * i,) * 3)


@pytest.fixture
def root(tmp_path):
    for form in TRACKED:                                   # three episodes of each set, without split files
        sim, text = form == "maniskill", ["", "wave", "nod"] if form == "droid_cotrack" else "wave"
        numbers = range(2 if sim else 0, 20)               # of the frames with points and pictures
        episode = {"metadata": {"validRange": {"start": 2, "end": 14}, "instructions": text},
                   "waypoints2d": [[[i, 5]] if sim else [i / 20, 0.5] for i in numbers],
                   "cam_highs": [f"rgb/{i}.png" for i in numbers]}
        for i in numbers:
            write(tmp_path / form / ("task/rgb" if sim else "rgb") / f"{i}.png", grey(i))
        for i in range(3):
            write(tmp_path / form / (f"task/label/out_{i}.json" if sim else f"episode_{i}.json"), episode)
    clip = {"label_name": "Bottle", "task_name": "tidy up",
            "frames": [{"frame_index": i, "center": [i, 5]} for i in range(20)],
            "events_frame": [{"id": 1, "event": event, "start_frame": start, "end_frame": end}
                             for event, start, end in (("rest", 0, 9), ("Pickup", 4, 20), ("Turn", 8, 13))]}
    for name in (f"ZY1/C{number}/align_rgb" for number in range(3)):
        write(tmp_path / "hoi4d_metadata" / name / "metadata.json", {"image_dir": name, **clip})
        for i in range(20):
            write(tmp_path / "HOI4D_release" / name / f"{i:05d}.jpg", grey(i))
    entry = {"id": 1, "index": "ZY1/C0", "img": 6, "action": "pickup", "object": "Mug", "kpst_part": []}
    door = {"action": "close", "object": "Storage Furniture", "kpst_part": ["Body of the Cabinet", "Door"]}
    val, test = [{**entry, "id": 2, "img": 0}, {**entry, "id": 3}], [{**entry, **door, "id": 4}]
    write(tmp_path / "hoi4d_frame/hoi4d_frame_metadata.json", {"train": [entry], "val": val, "test": test})
    write(tmp_path / CSV, "\ufeffid,base,molmo,manual,instruction\n1,1,1,1,\n2,0,1,1,hold\n3,0,0,0,\n4,0,1,0")
    four = np.array([[0, 0], [5, 5], [10, 5], [20, 10]], np.float32)
    for name in (NPY, f"{MOLMO}/val/2_points2d_manual.npy", f"{MOLMO}/test/4_points2d_molmo.npy"):
        write(tmp_path / name, np.stack([four] * 5) if name == NPY else four[None])
    return tmp_path


def look(sample):
    """(number of the reference frame or None, of the current one, where the object is)"""
    two = [*sample.get("history_images", {"current": [None]})["current"], sample["images"]["current"]]
    return (*(None if image is None else round(float(image.mean()) / 5) for image in two),
            (sample["waypoints"][:, 0] * 20).round().astype(int).tolist())


def draws(dataset, index=0, n=40):
    return [dataset.draw(index, key) for key in range(n)]


@pytest.mark.parametrize("form", TRACKED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_windows_begin_anywhere_in_the_range_with_stride_4_or_5(root, form, split):
    seen = draws(data.a0_dataset(form, root, split, single_image=0), n=60)
    for before, at, x in map(look, seen):
        assert before == (2 if split == "train" else max(at - 1, 2 if form == "maniskill" else 0))
        wanted = [[*range(at, 20, stride)][:5] for stride in (4, 5)]
        ends = [19 if form == "maniskill" else one[-1] for one in wanted]
        assert x in [one[:-1] + [end] * (6 - len(one)) for one, end in zip(wanted, ends)]
    assert {look(sample)[1] for sample in seen} == set(range(2, 10))
    assert {sample["instruction"] for sample in seen} == {"wave", "nod" if "cotrack" in form else "wave"}


def test_last_waypoint_of_a_maniskill_window_is_the_episodes(root):
    assert {look(sample)[2][4] for sample in draws(data.a0_dataset("maniskill", root))} == {19}
    assert len({look(sample)[2][4] for sample in draws(data.a0_dataset("droid_cotrack", root))}) > 1


def test_hoi4d_draws_events_that_fit_and_ends_at_the_last_frame(root, capsys):
    write(root / HOI.replace("C0", "C1"), ("events_frame", []))
    write(root / HOI.replace("C0", "C2"), ("frames", [{"frame_index": 0, "center": None}]))
    listed = ["/mnt/authors/" + HOI.replace("C0", f"C{i}") for i in range(3)]
    write(root / "hoi4d_metadata" / SPLIT, {"train": listed, "test": ["ZY1/C0/align_rgb/metadata.json"]})
    train, test = (data.a0_dataset("hoi4d", root, split, single_image=0) for split in ("train", "test"))
    assert "1 with frames or centres missing, 1 without an event of 6 frames." in capsys.readouterr().err
    assert {sample["instruction"] for sample in draws(train)} == {"Task: tidy up. Pickup Bottle."}
    for before, at, x in map(look, draws(train)):
        assert before == 4 and 4 <= at <= 14 and x == list(map(int, np.linspace(at, 19, 5)))
    assert {look(sample)[:2] for sample in draws(test)} == {(3, 4)}


def test_hoi4d_frames_take_the_best_points_and_words(root, capsys):
    train, test = (data.a0_dataset("hoi4d_frame", root, split, single_image=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 1) and "1 without good points" in capsys.readouterr().err
    for sample, numbers, words in ((train[0], (5, 6), "pick up the mug"), (train[1], (0, 0), "hold"), (
            test[0], (5, 6), "close the door of the cabinet body in the storage furniture.")):
        assert look(sample)[:2] == numbers and sample["instruction"] == words
        assert sample["waypoints"].tolist() == [[0, 0], [0.25, 0.5], [0.5, 0.5], [0.75, 0.75], [1, 1]]


def test_samples_say_what_class_the_official_tests_count_them_in(root):
    found = {form: data.a0_dataset(form, root, "test")[0].get("class") for form in list(data.A0_FORMS)[:5]}
    assert found == {"maniskill": "task", "hoi4d": "Bottle", "hoi4d_frame": "Storage Furniture",
                     "droid_cotrack": None, "droid_molmo_sam2": None}


@pytest.mark.parametrize("form", list(data.A0_FORMS)[:5])
def test_single_images_are_as_frequent_as_officially(root, form):
    share = np.mean([look(sample)[0] is None for sample in draws(data.a0_dataset(form, root), n=200)])
    assert abs(share - (0.3 if form == "hoi4d_frame" else 0.4)) < 0.1
    test = data.a0_dataset(form, root, "test")
    assert all(look(sample)[0] is not None for sample in draws(test)) and str(test[0]) == str(test[0])


def test_split_without_a_file_is_seeded_and_not_written(root):
    folder = (root / "droid_cotrack").rename(root / "droid-cotrack")   # the official readme's spelling
    for i in range(3, 40):
        shutil.copy(folder / "episode_0.json", folder / f"episode_{i}.json")
    before = sorted(root.rglob("*"))
    def names(split, seed=0):
        return [row[0].name for row in data.a0_dataset("droid_cotrack", root, split, seed).rows]
    assert names("train") == names("train") != names("train", 1) and len(names("train")) == 36
    assert sorted(names("train") + names("test")) == sorted(f"episode_{i}.json" for i in range(40))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("kind", ["list.json", "lines.json", "data/train-0.parquet"])
def test_pixmo_gives_labels_and_their_only_point(tmp_path, capsys, kind):
    rows = [{"image_url": f"http://x/{i % 30}", "label": f"thing {i}",
             "points": [{"x": 25.0, "y": 50.0}] * (1 + i % 2)} for i in range(60)]
    for i in (*range(25), 28):
        name = hashlib.sha256(rows[i]["image_url"].encode()).hexdigest()
        write(tmp_path / f"images/{name}.png", grey(i) if i < 25 else "404: not found")
    write(tmp_path / kind, rows if kind == "list.json" else "\n".join(map(json.dumps, rows)))
    if kind.endswith("parquet"):
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / kind)
    both = [data.a0_dataset("pixmo-points", tmp_path, split) for split in ("train", "test")]
    samples, err = [one[i] for one in both for i in range(len(one))], capsys.readouterr().err
    assert len(samples) == 26 and "1 no picture" in err and "32 without a label, one point and a d" in err
    for sample in samples:
        assert look(sample) == (None, int(sample["instruction"].split()[1]) % 30, [5] * 5)


def test_mixture_visits_every_episode_once_an_epoch(root):
    spec = f"hoi4d={root}+droid_cotrack={root}/droid_cotrack"
    mixture = data.open_dataset(spec, horizon=5, action_dim=2)
    assert [len(one) for one in mixture.datasets] == [2, 2] and len(data.open_dataset(spec, "val")) == 2
    def four(**how):
        batches = data.loader(mixture, lambda x, key: (x["dataset"], look(x)), list, batch=2, seed=1, **how)
        return [str(item) for _, batch in zip(range(4), batches) for item in batch]
    first = four()
    assert sum("hoi4d" in item for item in first[:4]) == sum("droid" in item for item in first[:4]) == 2
    assert four(start_step=1)[:6] == first[2:] and four(workers=1) == first
    assert sorted(first[:4]) != sorted(first[4:])                      # other windows


def test_waypoints_do_for_actions_only_where_actions_are_points(root):
    sample, where = data.open_dataset(f"maniskill={root}")[0], f"hoi4d={root}"
    assert data.check_sample(sample, horizon=5, action_dim=2, views=("current",)) is sample
    assert data.dataset_statistics(data.open_dataset(f"maniskill={root}")) == {}
    write(root / SIM, ("waypoints2d", [[25, -5]] * 18))                # outside, and kept, as officially
    assert [1.25, -0.5] in [x["waypoints"][0].tolist() for x in data.a0_dataset("maniskill", root)]
    for message, call in (
            ("no 'state'", lambda: data.check_sample(sample, action_dim=7)),
            ("'waypoints' is", lambda: data.check_sample(sample | {"waypoints": sample["waypoints"][:4]})),
            ("has points, no actions", lambda: data.open_dataset(where, action_dim=7)),
            ("did you mean 'hoi4d'", lambda: data.open_dataset(f"{where}+hoid4={root}")),
            ("no align_rgb/image.mp4 below it", lambda: data.run_command("hoi4d-frames", ["--root", "nowhere"]))):
        with pytest.raises(ValueError, match=message):
            call()


def test_describe_tells_all_forms_of_a_folder_and_lists_their_damage(root, capsys):
    data.describe(str(root), root.parent / "sheet.png")
    said = capsys.readouterr().out
    assert said.count("0 of them damaged") == 10 and Image.open(root.parent / "sheet.png").size[1] == 6 * 112
    for text in ("hoi4d_frame=", "A0's maniskill, train; of each", "waypoints: (5, 2)", "Task: tidy up. Pickup Bottle."):
        assert text in said, text
    write(root / SIM, ("waypoints2d", []))
    write(root / "droid_cotrack/rgb", None)
    for spec, forms, bad in ((f"a0={root}", 5, 4), (str(root / "maniskill"), 1, 1), (f"hoi4d={root}", 1, 0)):
        with contextlib.nullcontext() if not bad else pytest.raises(ValueError, match=f"{bad} parts are damaged"):
            data.describe(spec)
        said = capsys.readouterr().out
        assert said.count("of them damaged; ") == 2 * forms and said.count("\ndamaged ") == bad
        assert not bad or "out_0.json: validRange 2..14, 0 points" in said
    with pytest.raises(ValueError, match="has no manifest.json: .* nor one of A0's"):
        data.describe(str(root / "HOI4D_release"))


BAD = [                                # form, a file or folder, what becomes of it, message
    ("maniskill", "maniskill", None, "no episode of maniskill"),
    ("maniskill", f"maniskill/{SPLIT}", {"train": ["out_9.json"]}, f"out_9.json is missing; .*{SPLIT} names"),
    ("maniskill", SIM, ("metadata", {}), "out_0.json is not as .*KeyError: 'validRange'"),
    ("maniskill", SIM, ("waypoints2d", []), "out_0.json: validRange 2..14, 0 points"),
    ("maniskill", SIM, ("waypoints2d", [[1, 2]] * 4), "out_0.json: validRange 2..14, 4 points"),
    ("maniskill", SIM, ("waypoints2d", [[float("nan"), 2]] * 18), r"\(20 x 10\), are far outside"),
    ("maniskill", SIM, ("waypoints2d", [[400, 2]] * 18), r"\(20 x 10\), are far outside"),
    ("maniskill", "maniskill/task/rgb/2.png", grey(0, (4, 4)), r"2.png is \(4, 4, 3\), .*Copy"),
    ("droid_cotrack", "droid_cotrack/rgb/2.png", "x", "2.png is not as .*Unidentified"),
    ("hoi4d", "HOI4D_release", None, "come from data.py hoi4d-frames"),
    ("hoi4d", HOI, ("frames", []), "metadata.json: its list of frames is empty"),
    ("hoi4d_frame", NPY, None, "points2d.npy is missing; .*csv has it"),
    ("hoi4d_frame", NPY, np.array([{}]), "points2d.npy is not as .*allow_pickle"),
    ("hoi4d_frame", NPY, np.ones((1, 3, 2)), "points2d.npy is not as .*reshape"),
    ("pixmo-points", "rows.json", "[]", "images is not as .*No such file")]


@pytest.mark.parametrize("form, path, content, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_data_is_one_line_that_names_the_file(root, form, path, content, message):
    write(root / path, content)
    with pytest.raises(ValueError, match=message) as error:
        for dataset in (data.a0_dataset(form, root, split, single_image=0) for split in ("train", "test")):
            assert all(draws(dataset, i) for i in range(len(dataset)))
    assert len(str(error.value).splitlines()) == 1 and str(root) in str(error.value)


def test_interrupted_decoding_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    for name, rate in (("one/a", 15), ("one/b", 30)):                  # of b, every other frame counts
        (tmp_path / name / "align_rgb").mkdir(parents=True)
        with av.open(str(tmp_path / name / "align_rgb/image.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=rate, width=32, height=16, pix_fmt="yuv420p")
            for i in range(20 * rate // 15):
                picture = np.full((16, 32, 3), 8 * (i * 15 // rate), np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    written, real = [], data.atomic_write
    def breaks_off(path, writer):
        written.append(path)
        real(path, writer if len(written) != 27 else None)
    monkeypatch.setattr(data, "atomic_write", breaks_off)
    with pytest.raises(TypeError):
        data.hoi4d_frames(tmp_path / "one", workers=0)
    assert [data.hoi4d_frames(tmp_path / name, workers=0) for name in ("one", "two", "two")] == [2] * 3
    one, two = (sorted((tmp_path / name).rglob("*.jpg")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two] and len(written) == 81
    assert all(abs(np.array(Image.open(path)).mean() - 8 * (i % 20)) < 5 for i, path in enumerate(two))


@pytest.mark.parametrize("module, call", [("pyarrow.parquet", partial(data.a0_dataset, "pixmo-points")),
                                          ("av", partial(data.hoi4d_frames, workers=0))])
def test_torn_table_or_video_or_missing_package_is_one_line(tmp_path, monkeypatch, module, call):
    for name in ("images/0.png", "rows.parquet", "align_rgb/image.mp4"):
        write(tmp_path / name, "torn")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="run: pip install [a-z]*$"):
        patch.setitem(sys.modules, module, None)
        call(root=tmp_path)
    pytest.importorskip(module)
    with pytest.raises(ValueError, match="(rows.parquet|image.mp4) is not as in A0's sets: .*Copy it again"):
        call(root=tmp_path)


# ---- Through train.py -------------------------------------------------------------------------------------

def train(root, flags, horizon=5, **how):
    """train.py in `root` with a model of nothing but corners; its validation, too."""
    small = "image_size=24 width=16 depth=2 heads=2 siglip_width=16 qwen_width=16 views=current"
    return forks.shared()(f"train.py --model a0 --init none --device cpu --save-every 0 --log-every 10 "
                          f"--set {small} horizon={horizon} execute={horizon} {flags}", cwd=root, **how)


def losses(root, run):
    rows = map(json.loads, (root / run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], *(x for name, x in row.items() if name in ("loss", "val_loss"))) for row in rows]


def pixmo(root):
    """pixmo-points of 40 pictures, a label and a point for each."""
    names = [f"http://x/{i}" for i in range(200)]
    for i, url in enumerate(names):
        write(root / f"pixmo-points/images/{hashlib.sha256(url.encode()).hexdigest()}.png",
              grey(i % 40, (8, 4)))
    rows = [{"image_url": url, "label": "mug", "points": [{"x": 25, "y": 50}]} for url in names]
    write(root / "pixmo-points/rows.json", json.dumps(rows))


@pytest.mark.parametrize("form", list(data.A0_FORMS)[:5])
def test_every_official_form_trains_twenty_steps(root, form):
    done = train(root, f"--data {form}={root} --steps 20 --batch 2 --val-every 20 --out out")
    assert done.rc == 0, done.err
    assert [step for step, *_ in losses(root, "out")] == [10, 20, 20]
    assert np.isfinite(losses(root, "out")).all()
    assert (root / "out/last/model.safetensors").is_file()


@pytest.mark.parametrize("path, content, message", [
    ("maniskill/task/rgb/2.png", None, "2.png"), (SIM, ("waypoints2d", []), "out_0.json"),
    ("maniskill/task/rgb/2.png", grey(0, (4, 4)), "2.png is (4, 4, 3)"),
    (SIM, ("waypoints2d", [[400, 2]] * 18), "out_0.json")])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_folder_ends_training_in_one_line(root, path, content, message, workers):
    write(root / path, content)
    done = train(root, f"--data maniskill={root} --steps 20 --batch 4 --val-every 0 --workers {workers}")
    said = [line for line in done.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert done.rc == 2
    assert len(said) == 1
    assert f"{root}/{path}"[:-4] in said[0]
    assert message in said[0], done.err
    assert "Traceback" not in done.err


def test_first_two_averages_are_the_weights(root):
    """The official warm-up of the average; see test_a0.py::test_ema_decays_match_c17."""
    for steps, same in ((2, True), (4, False)):
        done = train(root, f"warmup=0 --data maniskill={root} --steps {steps} --batch 2 --ema 0.9999 "
                     f"--val-every 0 --out {steps}")
        assert done.rc == 0, done.err
        averaged, state = (load_file(root / f"{steps}/last" / name) for name in (
            "model.safetensors", "training_state/state.safetensors"))
        name = "model.final_layer.ffn_final.fc2.weight"
        assert torch.equal(averaged[name], state[f"weights/{name}"]) == same


@pytest.mark.slow
def test_pretrained_run_begins_one_with_five_points(root):
    """One point and one picture first, on pixmo-points; what does not fit then is named, and starts fresh."""
    pixmo(root)
    first = train(root, f"history=1 --data pixmo-points={root} --steps 4 --batch 2 --val-every 4 --out first",
                  horizon=1)
    assert first.rc == 0 and [step for step, *_ in losses(root, "first")] == [4, 4], first.err
    begun = load_file(root / "first/last/model.safetensors")
    assert begun["model.x_pos_embed"].shape[1] == 2
    for init in ("first/last", "first/last/model.safetensors"):        # our folder, or its weights alone
        done = train(root, f"lr=1e-9 --data maniskill={root} --steps 1 --batch 2 --val-every 0 --init {init} "
                     "--out out --overwrite")
        assert done.rc == 0, done.err
        for name in ("model.x_pos_embed", "model.img_cond_pos_embed"):
            assert f"{name} (1, " in done.err and "starts fresh with (1, " in done.err
        assert "fresh: model.x_pos_embed, model.img_cond_pos_embed\n" in done.out
        state = load_file(root / "out/last/model.safetensors")
        assert state["model.x_pos_embed"].shape[1] == 6
        assert np.allclose(state["img_adaptor.0.weight"], begun["img_adaptor.0.weight"], atol=1e-6)
    done = train(root, f"width=32 --data maniskill={root} --out x --init first/last/model.safetensors")
    assert done.rc == 2 and "does not fit" in done.err             # other sizes remain an error
