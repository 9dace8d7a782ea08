"""data.py's RoboVLMs forms: recorded windows and frames, CALVIN on disk, official JSONs, Open-X windows."""
import json
import pickle

import numpy as np
import pytest

import data
import robovlms
import test_robovlms
import train
from forks import shared
from test_robovlms import OFFICIAL, action_tokens, openx_chunks, stand_in_ids


# ---- Recordings of the official code ----------------------------------------------------------------------

@test_robovlms.replays("windows")
def test_windows_match(case):
    c = case.config
    W, K, ids = c["window_size"], c["chunk"], np.array(c["episode"]["episode_idx_range"])
    for sample in c["episode"]["window_sample"]:
        for pad in c["episode"]["left_pad"]:
            frames, counts = data.episode_windows(len(ids), W, K, sample, pad)
            case.compare(f"episode_{sample}_leftpad{int(pad)}_idx", ids[frames])
            case.compare(f"episode_{sample}_leftpad{int(pad)}_mask", counts)
    case.compare("tensor_chunk_out", robovlms.chunks_of(case["tensor_chunk_in"].numpy(), K))
    case.compare("generate_chunk_out", np.stack([robovlms.chunks_of(x[:-1], K)
                                                 for x in case["generate_chunk_in"].numpy()]))


@test_robovlms.replays("calvin_index")
def test_calvin_index_matches(case):                                                   # sheet 12.21
    """The last window of (0, 12) loads frames 9, 10, 11, 12, 12, of which three count."""
    c = case.config
    which, frames, counts = data.calvin_windows(c["segments"], c["window_size"], c["fwd_pred_next_n"],
                                                c["skip_frames"])
    case.compare("frame_ids", frames)
    case.compare("mask", counts)
    case.compare("lang_lookup", which)
    case.compare("episode_lookup", frames[:, 0])
    case.compare("right_pad", counts.sum(1) - counts.shape[1])
    assert frames[9].tolist() == [9, 10, 11, 12, 12] and counts[9].tolist() == [1, 1, 1, 0, 0]


@test_robovlms.replays("tcp_frame")
def test_gripper_frame_matches(case):
    action, pose = (case[n].flatten(0, 1).numpy()
                    for n in ("action", "robot_obs"))       # float32, as recorded
    tcp = robovlms.gripper_frame(action, pose)
    case.compare("tcp", tcp.reshape(2, 3, 7))
    back = robovlms.gripper_frame(case["tcp"].flatten(0, 1).numpy(), pose, back=True)
    case.compare("world_back", back.reshape(2, 3, 7))
    action, pose = (x.astype(np.float64) for x in (action, pose))
    once = abs(pose[:, 4]) < 1.5               # beyond, the angles of a rotation are others (as officially)
    there = robovlms.gripper_frame(action, pose)
    assert once.sum() > 1 and np.allclose(robovlms.gripper_frame(there, pose, back=True)[once], action[once],
                                          atol=1e-9)


@test_robovlms.replays("oxe_transform_segment_discrete")
def test_openx_segments_match(case):
    c = case.config
    a, mask, images = openx_chunks(case)
    W, K, e, lang = c["window_size"], c["fwd_pred_next_n"], c["tokenizer"]["encode"], c["lang"]
    prompt = stand_in_ids("Input:", e) + e["suffix_with_special"]
    ask = stand_in_ids(robovlms.openx_prompt(lang, K, "<s>", "</s>").removeprefix("Input: "), e)[1:]
    past, now = a[:W - 1][mask[:W - 1] > 0], slice(W - 1, W - 1 + K)
    ids, labels = robovlms.action_row(prompt, a[now], mask[now], action_tokens(c["action_tokenizer"]), 2,
                                      True, past, ask)
    case.compare("out_input_ids", ids)
    case.compare("out_labels", labels)
    case.compare("out_attention_mask", np.ones(len(ids), np.uint8))
    case.compare("out_image_tensors", images)


# ---- CALVIN on disk ---------------------------------------------------------------------------------------

def calvin(folder, tasks=("lift", "push"), evil=None):
    """A data set of two segments per split: frames 0 .. 12 and 20 .. 29; a picture shows its number."""
    for split in ("training", "validation"):
        (folder / split / "lang_annotations").mkdir(parents=True)
        about = {"info": {"indx": [(0, 12), (20, 29)]},
                 "language": {"ann": [f"{t} it" for t in tasks], "task": list(tasks)}}
        np.save(folder / split / "lang_annotations" / "auto_lang_ann.npy", evil or about, allow_pickle=True)
        for n in (*range(13), *range(20, 30)):
            action = np.array([0.01 * n] * 6 + [1 if n % 2 else -1])
            np.savez(folder / split / f"episode_{n:07d}.npz", rgb_static=np.full((20, 20, 3), n, np.uint8),
                     rgb_gripper=np.full((8, 8, 3), 100 + n, np.uint8), rel_actions=action,
                     robot_obs=np.full(15, 0.1 * n), actions=action, scene_obs=np.zeros(24))
    return folder


def written(folder, **changes):
    """An official JSON whose data block names `folder`."""
    block = {"type": "DiskCalvinDataset", "data_dir": str(folder), "shuffle": True}
    about = {**OFFICIAL, "window_size": 3, "fwd_pred_next_n": 2, "train_dataset": {**block, **changes},
             "val_dataset": block}
    (folder / "config.json").write_text(json.dumps(about))
    return str(folder / "config.json")


def opened(path, split="train", **more):
    return data.open_dataset(path, split, **{"horizon": 2, "history": 3, "views": ("third", "wrist"), **more})


def test_calvin_samples_show_the_window_and_hold_the_next_actions(tmp_path, capsys):  # sheet 12.21, 12.22
    train = opened(written(calvin(tmp_path)))
    assert len(train) == 17 and "no effect: shuffle" in capsys.readouterr().err
    sample = train[9]                                          # frames 9, 10, 11 | 12, 12
    assert sample["images"]["third"][0, 0, 0] == 11 and sample["images"]["wrist"][0, 0, 0] == 111
    assert sample["history_images"]["third"][:, 0, 0, 0].tolist() == [9, 10]
    assert np.allclose(sample["history_actions"][:, 0], [0.09, 0.10])
    assert np.allclose(sample["actions"][:, 0], [0.11, 0.12]) and sample["loss_mask"].tolist() == [True,
                                                                                                   False]
    assert sample["instruction"] == "lift it" and np.allclose(sample["state"],
                                                              1.1) and train[10]["instruction"] == "push it"
    assert opened(str(tmp_path / "config.json"), "val")[0]["dataset"] == "calvin"
    alone = opened(str(tmp_path / "config.json"), views=("third",), history=1)[0]
    assert "history_images" not in alone and list(alone["images"]) == ["third"]


def test_calvin_options_act(tmp_path):
    calvin(tmp_path)
    assert len(opened(written(tmp_path, skip_frames=3))) == 4 + 3
    assert len(opened(written(tmp_path, exclude_tasks=["lift"]))) == 7
    (tmp_path / "list.json").write_text('{"segments": [[20, 29]]}')
    for key in ("few_shot", "partial_data"):
        assert len(opened(written(tmp_path, **{key: str(tmp_path / "list.json")}))) == 7
    assert len(opened(written(tmp_path, few_shot=True))) == 17
    plain, turned = (opened(written(tmp_path, tcp_rel=on))[9] for on in (False, True))
    assert not np.allclose(plain["actions"], turned["actions"]) and turned["actions"].dtype == np.float32
    back = robovlms.gripper_frame(turned["actions"][:1].astype(float), turned["state"][None].astype(float),
                                  True)
    assert np.allclose(back, plain["actions"][:1], atol=1e-4)
    twelve = [(i, i + 4) for i in range(0, 120, 10)]           # few_shot: ten segments of a task
    about = {"info": {"indx": twelve}, "language": {"ann": ["a"] * 12, "task": ["t"] * 12}}
    np.save(tmp_path / "training" / "lang_annotations" / "auto_lang_ann.npy", about, allow_pickle=True)
    assert len(data.Calvin(tmp_path, "train", 2, 3, ("third",), few_shot=True)) == 20
    assert len(data.Calvin(tmp_path, "train", 2, 3, ("third",))) == 24


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("change, complaint", [
    ({"type": "DiskCalvin"}, "type: there is no 'DiskCalvin'"),
    ({"data_dir": "gone"}, "no language of CALVIN"),
    ({"partial_data": True}, "not public"), ({"exclude_tasks": ["lift", "push"]}, "no window of 3 frames"),
    ({"type": "OpenVLADataset", "data_root_dir": "/x"}, "wanted a folder of sets"),
    ({"few_shot": "gone.json"}, "gone.json")])
def test_a_wrong_data_block_is_one_line(change, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint) as caught:
        opened(written(calvin(tmp_path), **change))
    assert "\n" not in str(caught.value)


def test_nothing_in_the_language_file_is_executed(tmp_path, capsys):
    path = written(calvin(tmp_path, evil=np.array(Evil(), object)))
    with pytest.raises(ValueError, match="no language of CALVIN"):
        opened(path)
    assert "executed" not in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(Evil())) is None and "executed" in capsys.readouterr().out


# ---- Windows of whole episodes ----------------------------------------------------------------------------

EPISODES = '''
import numpy as np
class Set(list):
    stats = {"mine": {"action": {k: v for k, v in (("q01", [-1.0] * 7), ("q99", [1.0] * 7),
                                                   ("min", [-1.0] * 7),
                                                   ("max", [1.0] * 7), ("mask", [True] * 6 + [False]))}}}
def make(split):
    pictures = lambda n: np.tile(np.uint8(7 + np.arange(n))[:, None, None, None], (1, 8, 8, 3))
    return Set({"images": {"third": pictures(n)},
                "actions": np.arange(n)[:, None] * np.full(7, 0.1), "instruction": "go", "dataset": "mine"}
               for n in ((7,) if split == "train" else (4,)))
'''


def test_windows_of_episodes_follow_the_block(tmp_path):
    (tmp_path / "eps.py").write_text(EPISODES)
    block = {"type": "OpenVLADataset", "data_root_dir": f"{tmp_path / 'eps.py'}:make"}
    sizes = {(): 7, (("left_pad", False),): 5, (("window_sample", "range"),): 21,
             (("organize_type", "segment"),): 21,
             (("window_sample", "range"), ("left_pad", False)): 15}
    for more, size in sizes.items():
        assert len(opened(written(tmp_path, **block, **dict(more)), views=("third",))) == size
    sliding = opened(written(tmp_path, **block), views=("third",))
    newest, first = sliding[4], sliding[0]
    assert newest["images"]["third"][0, 0, 0] == 11 and newest["history_images"]["third"][:, 0, 0,
                                                                                          0].tolist() == [9,
                                                                                                          10]
    assert np.allclose(newest["actions"][:, 0], [0.4, 0.5]) and newest["loss_mask"].all()
    assert "history_images" not in first and sliding[6]["loss_mask"].tolist() == [True, False]
    ranged = opened(written(tmp_path, **block, window_sample="range"), views=("third",))
    assert [len(ranged[i].get("history_images", {"third": ()})["third"]) for i in (12, 13, 14)] == [2, 1, 0]
    assert sliding.stats.keys() == {"mine"}


def test_describe_tells_what_an_official_json_names(tmp_path, capsys):
    path = written(calvin(tmp_path), val_dataset=None)
    (tmp_path / "training" / "episode_0000007.npz").write_text("torn")
    with pytest.raises(ValueError, match="1 parts are damaged"):
        data.describe(path)
    said = capsys.readouterr().out
    for text in ("17 windows of 3 + 2 frames: 2 episodes, 1 of them damaged; 9 frames", "CALVIN, training: 2 language",
                 "30 frames per second", "CALVIN, validation", "2 episodes, 0 of them", "episode_0000007.npz is not as"):
        assert text in said, text
    (tmp_path / "eps.py").write_text(EPISODES)
    data.describe(written(tmp_path, type="OpenVLADataset", data_root_dir=f"{tmp_path / 'eps.py'}:make"))
    assert "1 episodes, 0 of them damaged; 7 windows, 7 to 7 in an episode" in capsys.readouterr().out


# ---- train.py reads the JSON ------------------------------------------------------------------------------

def test_train_runs_an_official_json(tmp_path):
    """--set config=FILE.json: data, window, frozen parts, precision are the JSON's; sizes are tiny."""
    path = written(calvin(tmp_path), rgb_pad=2, gripper_pad=1)
    about = json.loads((tmp_path / "config.json").read_text())
    about["train_setup"] |= {"train_vision": False}
    (tmp_path / "config.json").write_text(json.dumps(about))
    small = {k: v for k, v in vars(robovlms.PRESETS["tiny"]).items() if k.startswith(("vit_", "llm_"))
             and k != "llm"}
    small |= {"image_size": 24, "patch_size": 12, "image_tokens": 4, "vocab": 512, "pad_id": 4, "width": 32,
              "depth": 1,
              "mlp_widths": "32", "tokenizer": "tiny", "prompt": "plain", "warmup": 1}
    flags = "--out run --batch 2 --steps 3 --val-every 3 --val-samples 2"
    done = shared()(f"train.py --model robovlms {flags} --set",
                    f"config={path}", *(f"{k}={v}" for k, v in small.items()), cwd=tmp_path)
    assert done.rc == 0, done.err
    assert 'precision "16" (fp16 mixed) runs as bf16' in done.err and "some_future_key: no effect" in done.err
    for said in ("history=3 horizon=2", "freeze=('vision',)", "shift=(2,1)"):
        assert said in done.out
    assert "17 training and 17 validation samples" in done.out
    saved = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert saved["config"]["gripper"] == "signed" and saved["config"]["history"] == 3
    assert saved["preset"] == "custom"


@pytest.mark.parametrize("change, complaint", [
    ({"train_setup": {"predict_forward": True}}, "predict_forward=True"),
    ({"train_setup": {"bits": 4}}, "bits=4"),
    ({"train_setup": {"predict_caption": True}}, "predict_caption=True"),
    ({"window_size": None}, "window_size is missing"),
    ({"act_head": {}}, "act_head.type is missing"), ({"fwd_pred_next_n": None}, "fwd_pred_next_n is missing"),
    ({"robovlm_name": None, "model": None}, "robovlm_name is missing"),
    ({"robovlm_name": "RoboX"}, "no backbone 'x'"),
    ({"act_head": "LSTMDecoder"}, "act_head='LSTMDecoder': a value like {} is wanted"),
    ({"train_dataset": "calvin"}, "train_dataset='calvin': a value"), ({"trainer": [1]}, "trainer="),
    ({"train_setup": {"train_decoder_layers": "2"}}, "train_decoder_layers='2'"), ({"parent": 3}, "parent 3"),
    ({"train_dataset": {"rgb_pad": "x"}}, "rgb_pad='x'"), ({"window_size": "16"}, "history='16'")])
def test_a_wrong_json_is_one_line(change, complaint, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({**OFFICIAL, **change}))
    with pytest.raises(ValueError, match=complaint) as caught:
        train.parse(["--model", "robovlms", "--set", f"config={tmp_path / 'c.json'}"])
    assert "\n" not in str(caught.value)


def test_a_wrong_json_is_exit_code_2(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({**OFFICIAL, "window_size": None}))
    for name, complaint in (("c.json", "window_size is missing"), ("", "config= names no file")):
        done = shared()("train.py --model robovlms --set", f"config={name}", cwd=tmp_path)
        assert done.rc == 2 and complaint in done.err and len(done.err.strip().splitlines()) == 1
