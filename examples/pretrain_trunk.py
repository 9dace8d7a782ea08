"""
Make the trunk that a tiny preset starts from: a small vision-language model that knows what is where.

    python examples/pretrain_trunk.py                                      # CogACT's, into assets/
    python examples/pretrain_trunk.py --model vla0 --ask 3 --steps 7000    # VLA-0's; robobrain_x0's likewise

Real VLAs start from a vision-language model that has seen the world. So does ours, only that its world is the
simulator: random scenes of the seeds "pretrain" (never those of training, validation or evaluation), random
gripper poses, things in the hand and on top of each other. It is asked three kinds of questions, and no
action of the expert is ever shown to it:

  what is here?  at every patch, after the projector: colour, shape, where is the middle of this thing
  which is it?   after each layer but the last: which patches show X (the last token's state against the
                 patches). Without it, CogACT's went by the colour alone: after 13,000 steps X was off by
                 3.3 cm in the mean (median 0.6); one in four was another thing of that colour
  where is it?   at the last token of a prompt that names things ("pick up the red cube", "find the plate"):
                 position of X, of Y, of the gripper; is X in the hand; which task is asked. A method that
                 writes also says which way X and Y lie from the gripper (VLA-0 in text, RoboBrain-X0 in
                 action codes, of both bodies): geometry too, but the first 4 cm of it are what an action
                 says when nothing is in the way

The answering heads are linear, used here only, and thrown away. The error of the answers on unseen scenes
[cm] is printed as it falls, and written with the time it took into the card beside the weights.
"""
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a0  # noqa: E402
import cogact  # noqa: E402
import eval_sim  # noqa: E402
import robobrain_x0  # noqa: E402
import robovlms  # noqa: E402
import vla0  # noqa: E402
from common import Parser, atomic_write, cli, load_weights, read_json, within, write_json  # noqa: E402
from eval_sim import COLOURS, FAMILIES, MAX_GAP, PHRASES, REACH, SHAPES  # noqa: E402

COLOUR_NAMES = (*COLOURS, "plate", "box", "gripper", "nothing")       # classes of a patch
SHAPE_NAMES = (*SHAPES, "none")
TASKS = (*FAMILIES, "point")
POINT = ("point at the {x}", "find the {x}", "look at the {x}")       # phrasings, as eval_sim.PHRASES
SHARES = (0.17, 0.22, 0.16, 0.14, 0.06, 0.14, 0.11)                   # of the tasks, among the questions
STRIDE = 0.04                                                         # [m]
SCALE = 0.1                                                           # answers are in units of 10 cm
# of an arm's numbers as action codes: dx dy dz [m], three angles [rad], the gripper
RANGE = {"gripper": {"q01": [-STRIDE] * 3 + [0, 0, -0.1, 0], "q99": [STRIDE] * 3 + [0, 0, 0.1, 1]}}
RANGE["dual"] = {name: 2 * numbers for name, numbers in RANGE["gripper"].items()}
# the answer row: X xyz, Y xyz, gripper xyz, sin and cos of its yaw, gap, X in hand?, anything in hand?
ANSWERS, COLUMNS = 14, {"x": slice(0, 3), "y": slice(3, 6), "gripper": slice(6, 9)}
HELD_OUT = 900_000                                                    # the first scene never trained on


# ---- Scenes and questions ---------------------------------------------------------------------------------

def scene(seed, size, grid, body="gripper"):
    """One random scene, its third-person picture of size x size pixels cut into grid x grid = P patches.

    body: of the simulator; of two arms, one is rearranged. Returns the picture, uint8 (size, size, 3); what
    each patch shows, int8 (P, 2): colour, shape; where the middle of that is, float32 (P, 5): x, y in the
    picture [0, 1], x, y, z in the world [10 cm]; `questions`.
    """
    env = eval_sim.Tabletop(FAMILIES, "pretrain", image_size=size, embodiment=body)
    env.lay_out(seed)
    rng = np.random.default_rng([seed, 2])
    env.arm = int(rng.integers(len(env.arms)))
    rearrange(env, rng)
    rgb, _, owner = env.picture("third")
    patch = size // grid
    tiles = owner.reshape(grid, patch, grid, patch).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    what = np.full((grid * grid, 2), (len(COLOUR_NAMES) - 1, len(SHAPE_NAMES) - 1), np.int8)
    where = np.zeros((grid * grid, 5), np.float32)
    for p, tile in enumerate(tiles):                                  # (pixels of a patch,)
        ids, counts = np.unique(tile[tile >= 0], return_counts=True)
        if not len(ids):
            continue
        best, on_things = ids[counts.argmax()], counts * (ids < 100)  # 100, 101: arms, before things
        if on_things.max() >= patch * patch // 10:                    # a tenth of the patch is enough
            best = ids[on_things.argmax()]
        if best >= 100:
            what[p, 0], at = COLOUR_NAMES.index("gripper"), env.arms[best - 100].tcp
        else:
            thing = env.things[best]
            at, none = thing.at, len(SHAPE_NAMES) - 1
            what[p] = ((COLOUR_NAMES.index(thing.colour), SHAPE_NAMES.index(thing.shape)) if thing.movable
                       else (COLOUR_NAMES.index(thing.shape), none))
        where[p] = [*env.third.project(at, 1, 1), *(np.asarray(at) / SCALE)]
    return rgb, what, where, questions(env, rng)


def rearrange(env, rng):
    """Make a scene of the middle of an episode: things on things, any gripper pose, things in the hand."""
    movable = [t for t in env.things if t.movable]
    if rng.random() < 0.25:                                           # something lies on something
        a, b = movable[rng.integers(len(movable))], env.things[rng.integers(len(env.things))]
        if a is not b and (not b.movable or SHAPES[b.shape].flat):
            a.at = b.at + [*rng.normal(0, 0.012, 2), 0]
            a.at[2] = b.top
    env.tcp = rng.uniform([*REACH[0, :2], 0.015], [*REACH[1, :2], 0.20])
    env.gap = rng.choice([0.0, MAX_GAP / 2, MAX_GAP, MAX_GAP])
    env.rpy[2] = rng.choice([rng.uniform(-1.4, 1.4), rng.normal(0, 0.1)])
    near = rng.random()
    thing = movable[rng.integers(len(movable))] if rng.random() < 0.5 else env.x
    if near < 0.3:                                                    # close to a thing
        env.tcp[:2] = thing.at[:2] + rng.normal(0, 0.025, 2)
    elif near < 0.6:                                                  # with a thing in the hand
        env.gap = SHAPES[thing.shape].width
        place = np.array([rng.normal(0, 0.006), 0, -SHAPES[thing.shape].height * 0.45])
        env.held = (thing, place, rng.uniform(-0.3, 0.3))
        if rng.random() < 0.3:
            env.tcp[:2] = env.things[-1].at[:2] + rng.normal(0, 0.02, 2)
    env.tcp = np.clip(env.tcp, *REACH)
    env._carry()
    env._push()


def questions(env, rng, n=6):
    """`n` questions on a scene: (instruction, task index, answers (ANSWERS,), which of them count, names of X
    and Y, (body, its arm that is asked about)).

    The task index is 2 * task + (the side is left), for tasks that have a side. The arm is the one that holds
    something, else the one on X's side.
    """
    hand = env.held[0] if env.held else None
    rows = []
    movable = [t for t in env.things if t.movable]
    unique = [t for t in movable if sum(o.name == t.name for o in movable) == 1]
    bins, flats = [t for t in env.things if not t.movable], [t for t in unique if SHAPES[t.shape].flat]
    twins = [t for t in movable if t not in unique]
    for _ in range(n):
        task = TASKS[rng.choice(len(TASKS), p=SHARES)]
        x, y, side = unique[rng.integers(len(unique))], None, ("left", "right")[rng.integers(2)]
        if task in ("put", "side"):
            y = bins[rng.integers(len(bins))]
        if task == "stack":
            y = next((t for t in rng.permutation(np.array(flats, object)) if t is not x), None)
        if task == "side" and twins:
            x = max(twins, key=lambda t: t.at[1] * (1 if side == "left" else -1))
        if (task == "stack" and y is None) or (task == "side" and not twins):
            task, y = "pick", None
        if task == "point" and rng.random() < 0.3:
            x = bins[0]
        phrases = POINT if task == "point" else PHRASES[task][:-1]    # the last one is held out
        phrase, named = phrases[rng.integers(len(phrases))], y.name if y else ""
        text = phrase.format(x=x.name, y=named, side=side, on="in" if named == "box" else "on")
        if len(env.arms) > 1 and hand is None:
            env.arm = int(x.at[1] > 0)
        row, counts = np.zeros(ANSWERS, np.float32), np.ones(ANSWERS, bool)
        row[COLUMNS["x"]], row[COLUMNS["gripper"]] = x.at / SCALE, env.tcp / SCALE
        row[9:] = np.sin(env.rpy[2]), np.cos(env.rpy[2]), env.gap / MAX_GAP, hand is x, hand is not None
        counts[COLUMNS["y"]] = y is not None
        if y is not None:
            row[COLUMNS["y"]] = y.at / SCALE
        left = side == "left" and task in ("push", "turn", "side")
        rows.append((text, TASKS.index(task) * 2 + left, row, counts, (x.name, named),
                     (env.embodiment, env.arm)))
    return rows


def _many(args):
    chunk, *how = args
    return [scene(s, *how) for s in chunk]


def make_scenes(n, size, grid, start=0, bodies=("gripper",)):
    """`n` scenes of the split "pretrain" from its `start`-th on, in parallel: a list, as from `scene`."""
    ids = eval_sim.seeds("pretrain", n, start)
    jobs = [(ids[i:i + 100], size, grid, bodies[i // 100 % len(bodies)]) for i in range(0, n, 100)]
    with multiprocessing.Pool() as pool:
        parts = tqdm(pool.imap(_many, jobs), total=len(jobs), desc="scenes", unit="00")
        return [s for part in parts for s in part]


# ---- The model that answers -------------------------------------------------------------------------------

class CogACT:
    """How CogACT looks and reads. Rows: <s> | patches | question </s>."""
    method, bodies = cogact, ("gripper",)

    @staticmethod
    def sizes(cfg):
        """Width of a question's state and of a patch's, layers."""
        return cfg.llm_width, cfg.llm_width, cfg.llm_depth

    @staticmethod
    def answer(asker, batch, patches):
        return in_rows(asker, batch, patches)

    @staticmethod
    def look(m, images):
        """uint8 (B, 1, h, w, 3) -> (B, P, D)."""
        return m.projector(m.vision_backbone(images[:, 0]))

    @staticmethod
    def embedding(m):
        return m.llm_backbone.llm.model.embed_tokens

    @staticmethod
    def read(m, rows, index, see, grid):
        """rows (B, N, D), index (N,) their places, see (N, N) bool -> transformers' output, all states."""
        return m.llm_backbone.llm.model(inputs_embeds=rows, position_ids=index[None], use_cache=False,
                                        attention_mask=see[None, None], output_hidden_states=True)

    @staticmethod
    def question(cfg, tokenizer, text, *known):
        """(all that stands behind the picture, how much of it is the question): lists of ids."""
        ids = cogact.encode_prompt(text, cfg, tokenizer)[1:]
        return ids, len(ids)

    @staticmethod
    def before(cfg, tokenizer):
        return [cfg.bos_id]

    skip = ("action_model.", "llm_backbone.llm.lm_head")              # not in the trunk


class VLA0:
    """How VLA-0 looks and reads. Rows: user <|vision_start|> | patches | <|vision_end|> question answer."""
    method, start, sizes, answer, bodies = vla0, 4, CogACT.sizes, CogACT.answer, CogACT.bodies

    @staticmethod
    def look(m, images):
        patches, grid = vla0.patchify(images.flatten(0, 1), m.cfg)
        return m.visual(patches, grid_thw=grid).pooler_output.view(len(images), -1, m.cfg.llm_width)

    @staticmethod
    def embedding(m):
        return m.model.embed_tokens

    @classmethod
    def read(cls, m, rows, index, see, grid):
        # M-RoPE: a picture of grid x grid tokens takes up `grid` places on the time axis
        picture = range(cls.start, cls.start + grid * grid)
        row = [m.cfg.image_id if i in picture else 0 for i in range(int(index.max()) + 1)]
        positions = cls.places(row, m.cfg, grid)[:, index]                                         # (3, N)
        return m.model(inputs_embeds=rows, position_ids=positions[:, None].expand(-1, len(rows), -1),
                       use_cache=False, attention_mask={"full_attention": see[None, None]},
                       output_hidden_states=True)

    @staticmethod
    def question(cfg, tokenizer, text, row, counts, *known):
        ids = vla0.encode_prompt(vla0.build_prompt(text, cfg), cfg, tokenizer, 1)[VLA0.start + 1:]
        return ids + vla0.answer_ids(in_words(row, counts), cfg) + [cfg.im_end_id], len(ids)

    @staticmethod
    def before(cfg, tokenizer):
        return vla0.encode_prompt(vla0.build_prompt("x", cfg), cfg, tokenizer, 1)[:VLA0.start]

    @staticmethod
    def places(row, cfg, grid):
        return vla0.rope_positions(row, cfg, (grid, grid))[0]

    skip = ()


class RoboBrainX0(VLA0):
    """How RoboBrain-X0 looks and reads: as VLA-0, of whose family it is, with its own words."""
    method, start, bodies = robobrain_x0, 5, eval_sim.BODIES

    @staticmethod
    def look(m, images):
        patches, grids = zip(*(robobrain_x0.patchify(image.numpy(), m.cfg) for image in images.flatten(0, 1)))
        pixels = robobrain_x0.to_pixels(torch.cat(patches), m.cfg)
        out = m.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
        return out.view(len(images), -1, m.cfg.llm_width)

    @staticmethod
    def question(cfg, tokenizer, text, row, counts, names, body, rng):
        """It answers with the name of X (or Y), and with the way there, in action codes."""
        thing = "y" if names[1] and rng.random() < 0.5 else "x"
        chunk = robobrain_x0.normalize(strides(row, thing, cfg.horizon, *body), RANGE[body[0]])
        talk = [{"from": "human", "value": robobrain_x0.human_turn(
            {"instruction": text, "embodiment": body[0]}, cfg, False, False)},
            {"from": "gpt", "value": f"{names[thing == 'y']}<boa><action_token>"}]
        codes = [tokenizer.actions.encode(chunk)]
        ids, labels = robobrain_x0.encode_conversation(talk, codes, [1], tokenizer, cfg)
        return ids[RoboBrainX0.start + 1:], labels.count(-100) - RoboBrainX0.start - 1

    @staticmethod
    def before(cfg, tokenizer):
        return [cfg.im_start_id, *tokenizer.encode("user"), *tokenizer.encode("\n"), cfg.vision_start_id]

    @staticmethod
    def places(row, cfg, grid):
        return robobrain_x0.rope_positions(row, cfg, [[1, grid, grid]])[0]


class A0:
    """How A0 looks and reads: its denoiser looks at picture and text. It points at the way from X to Y."""
    method, skip, bodies = a0, (), CogACT.bodies
    shape = 3                   # weight of its loss: cube and cylinder differ by little (stage one had 1)

    @staticmethod
    def sizes(cfg):
        return cfg.width, cfg.siglip_width, cfg.depth

    @staticmethod
    def look(m, images):
        """uint8 (B, 1, h, w, 3) -> (B, P, W), with a gradient: only from here on are the encoders frozen."""
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        return m.siglip((pixels - 0.5) / 0.5).last_hidden_state

    @staticmethod
    def question(cfg, tokenizer, text, *known):
        ids = a0.encode_text(text, cfg, tokenizer)
        return ids, len(ids)

    @staticmethod
    def before(cfg, tokenizer):
        return []

    @staticmethod
    def answer(asker, batch, patches):
        """As `in_rows`, but the states are the denoiser's, and it points. The points start as pure noise, at
        the last diffusion step, so nothing is given away; the reference frame is grey."""
        m, (B, Q, L) = asker.model, batch["ids"].shape
        grey = A0.look(m, torch.full_like(batch["images"][:1], a0.GREY)).expand_as(patches)
        text = m.qwen(batch["ids"].flatten(0, 1), use_cache=False).last_hidden_state    # (B Q, L, .)
        mask = torch.arange(L) < batch["length"].view(-1, 1)                            # (B Q, L)
        lang, img, mask = m.adapt((text, mask, torch.cat([patches - grey, patches], 1)))
        states, t = [], torch.full((1,), m.cfg.num_train_steps - 1)
        keep = lambda block, given, x: states.append(x[:, 1:].mean(1).unflatten(0, (B, Q)))    # noqa: E731
        hooks = [block.register_forward_hook(keep) for block in m.blocks()]             # (B, Q, D) each
        noise = torch.randn(B * Q, m.cfg.horizon, 2)
        points = m.model(m.state_adaptor(noise), t, lang, img.repeat_interleave(Q, 0), mask)
        for hook in hooks:
            hook.remove()
        return states, None, points.unflatten(0, (B, Q))


class RoboVLMs:
    """How KosMos-2 looks and reads. Rows: <s> | latents | question ACT; latent p answers for patch p."""
    method, answer, bodies = robovlms, CogACT.answer, CogACT.bodies

    @staticmethod
    @torch.no_grad()
    def begin(m):
        """Each latent starts with a look at its own patch (weight 0.96); from all of them at once it learned
        nothing in 200 steps. Patches first differ by place, and queries and keys are the same projection."""
        project, embed = m.backbone.image_to_text_projection, m.backbone.tower.embeddings
        project.dense.weight.mul_(16)                                 # the features have length 1
        embed.position_embedding.weight.mul_(50)
        black = torch.zeros(1, 3, m.cfg.image_size, m.cfg.image_size)
        features = m.backbone.tower.post_layernorm(m.backbone.patches(black))
        place = project.dense(F.normalize(features, dim=-1))[0, 1:]                     # (P, D)
        place = place - place.mean(0)
        project.latent_query.copy_(0.4 * place / place.std())         # small: latents are among the keys
        project.x_attn.q_proj.weight.mul_(4)
        project.x_attn.k_proj.weight.copy_(project.x_attn.q_proj.weight)

    @staticmethod
    def sizes(cfg):
        return cfg.llm_width, cfg.llm_width, cfg.llm_depth

    @staticmethod
    def look(m, images):
        return m.look_at(images[:, None])[:, 0, 0]                                      # (B, P, D)

    @staticmethod
    def embedding(m):
        """Words, and one more: the learned query."""
        table = torch.cat([m.backbone.embedding.weight, m.action_token[None]])
        return lambda ids: F.embedding(ids, table)

    @staticmethod
    def read(m, rows, index, see, grid):
        decoder, states = m.backbone.decoder, []                      # its own forward makes its own mask
        places = decoder.embed_positions.weights[index + 2]                             # (N, D)
        x = rows * decoder.embed_scale + places
        mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[None, None]
        for layer in decoder.layers:
            states.append(x)
            x = layer(x, mask)
        return SimpleNamespace(hidden_states=[*states, x], last_hidden_state=decoder.layer_norm(x))

    @staticmethod
    def question(cfg, tokenizer, text, *known):
        ids = robovlms.encode_prompt(text, cfg, tokenizer)[1:-1] + [cfg.vocab]          # less <s> and </s>
        return ids, len(ids)

    @staticmethod
    def before(cfg, tokenizer):
        return robovlms.encode_prompt("x", cfg, tokenizer)[:1]

    skip = "act_head."


METHODS = {m.method.__name__: m for m in (A0, CogACT, RoboBrainX0, RoboVLMs, VLA0)}


def paths(row, counts):
    """Answers (n, Q, ANSWERS) -> where X would be seen on its way to Y (no Y: it stays), (n, Q, 5, 2)."""
    x = row[..., COLUMNS["x"]] * SCALE + [0, 0, 0.025]                                      # [m]
    y = np.where(counts[..., COLUMNS["y"]], row[..., COLUMNS["y"]] * SCALE + [0, 0, 0.025], x)
    way = x[..., None, :] + np.linspace(0, 1, 5)[:, None] * (y - x)[..., None, :]           # (n, Q, 5, 3)
    return eval_sim.Camera.look_at(**eval_sim.THIRD).project(way, 1, 1).astype(np.float32)


def in_words(row, counts):
    """The answer as text, integers 0..100: the first stride from the gripper to X (x y z, over +-4 cm), all
    of that way (over +-50 cm), and the first stride to Y if it is named. A stride is at most 4 cm sideways
    and at most 4 cm up or down.
    """
    gripper, numbers = row[COLUMNS["gripper"]] * SCALE, []                                # [m]
    for thing in ("x", "y"):
        if counts[COLUMNS[thing]].all():
            way = row[COLUMNS[thing]] * SCALE - gripper
            stride = np.append(way[:2] * min(1, STRIDE / max(np.hypot(*way[:2]), 1e-9)), way[2])
            numbers += [*(stride / STRIDE), *(way / 0.5 if thing == "x" else [])]
    return " ".join(str(int(n)) for n in np.rint(np.clip(numbers, -1, 1) * 50 + 50))


def strides(row, thing, T, body, arm):
    """The first T strides from the gripper straight to X or Y, as a chunk (T, 7 per arm) of the arm that is
    asked about; it keeps its fingers, another arm waits with open ones."""
    at, goal = (row[COLUMNS[name]] * SCALE for name in ("gripper", thing))                # [m]
    chunk = np.zeros((T, eval_sim.EMBODIMENTS[body][0]))
    chunk[:, 6::7], mine = 1, chunk[:, 7 * arm:7 * arm + 7]
    for step in mine:
        way = goal - at
        step[:2], step[2] = way[:2] * min(1, STRIDE / max(np.hypot(*way[:2]), 1e-9)), way[2]
        step[:3] = np.clip(step[:3], -STRIDE, STRIDE)
        at = at + step[:3]
    mine[:, 6] = row[11] > 0.5
    return chunk


def in_rows(asker, batch, patches):
    """Questions read by a causal language model, Q of a picture in one row.

    patches (B, P, D) -> states of each question's last token after every layer, a list of (B, Q, D); the
    questions' own last states (B, Q, L, D); no points.
    """
    m, how, (B, Q, L) = asker.model, asker.how, batch["ids"].shape
    embed = how.embedding(m)
    #  <s> | patches ... | question 1 ... | question 2 ... |       N = s + P + Q L
    #   0  | 1 ... P     | P+1 ...        | P+1 ...        |
    # each question sees the picture and itself, at the places (second row) it would have alone
    rows = torch.cat([embed(batch["before"]).expand(B, -1, -1), patches,
                      embed(batch["ids"]).flatten(1, 2)], 1)                            # (B, N, D)
    prefix = len(batch["before"]) + patches.shape[1]
    who = torch.cat([torch.zeros(prefix), torch.arange(1, Q + 1).repeat_interleave(L)])     # (N,)
    at = torch.cat([torch.arange(prefix), (prefix + torch.arange(L)).repeat(Q)])        # (N,)
    causal = torch.ones(len(who), len(who), dtype=torch.bool).tril()
    see = ((who[None] == who[:, None]) | (who[None] == 0)) & causal                     # (N, N)
    out = how.read(m, rows, at, see, int(patches.shape[1] ** 0.5))
    owns = [h[:, prefix:].unflatten(1, (Q, L))                                          # (B, Q, L, D) each
            for h in (*out.hidden_states[1:-1], out.last_hidden_state)]
    last = (batch["length"] - 1)[..., None, None].expand(-1, -1, 1, owns[0].shape[-1])
    return [own.gather(2, last)[:, :, 0] for own in owns], owns[-1], None


class Asker(torch.nn.Module):
    """The model with the linear answering heads on top. Q questions share one look at their picture."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how, (D, W, layers) = model, how, how.sizes(model.cfg)
        self.patch_head = torch.nn.Linear(W, len(COLOUR_NAMES) + len(SHAPE_NAMES) + 5)
        self.answer_head = torch.nn.Linear(D, ANSWERS)
        self.task_head = torch.nn.Linear(D, 2 * len(TASKS))
        self.said = torch.zeros(getattr(model.cfg, "vocab", 0), dtype=torch.bool)
        self.point_heads = torch.nn.ModuleList(torch.nn.Linear(D, W) for _ in range(layers - 1))

    def forward(self, batch):
        """images (B, 1, h, w, 3), ids (B, Q, L), length (B, Q) -> answers (B, P, .), (B, Q, .), (B, Q, .);
        the questions' own states (B, Q, L, D) or None, points (B, Q, 5, 2) or None, and scores of the
        patches, a list of (B, Q, P)."""
        patches = self.how.look(self.model, batch["images"])                            # (B, P, W)
        (*early, z), own, points = self.how.answer(self, batch, patches)                # (B, Q, D) each
        scores = [head(e) @ patches.transpose(1, 2) * patches.shape[-1] ** -0.5
                  for head, e in zip(self.point_heads, early)]
        return self.patch_head(patches), self.answer_head(z), self.task_head(z), own, points, scores

    def loss(self, batch):
        """(scalar, logs): answers of the text, answers of the picture."""
        dense, answer, task, own, points, scores = self(batch)
        C, S = len(COLOUR_NAMES), len(SHAPE_NAMES)
        colour, shape, where = dense.split([C, S, 5], -1)             # (B, P, .)
        what, thing = batch["what"], batch["what"][..., 0] < C - 1    # (B, P, 2), (B, P)
        error = (answer - batch["answer"]).abs() * batch["counts"]    # (B, Q, ANSWERS)
        scale = batch["where_scale"]                                  # (5,)
        logs = {"answer": error.sum() / batch["counts"].sum(),
                "task": F.cross_entropy(task.flatten(0, 1), batch["task"].flatten()),
                "colour": F.cross_entropy(colour.flatten(0, 1), what[..., 0].flatten()),
                "shape": F.cross_entropy(shape.flatten(0, 1), what[..., 1].flatten()),
                "where": F.l1_loss(where[thing] * scale, batch["where"][thing] * scale)}
        total = logs["answer"] * 2 + 0.2 * logs["task"] + logs["colour"] + logs["where"]
        total = total + getattr(self.how, "shape", 1) * logs["shape"]
        off = batch["where"][:, None, :, 2:] - batch["answer"][:, :, None, COLUMNS["x"]]    # (B, Q, P, 3)
        mine = (off.abs().amax(-1) < 1e-3) & thing[:, None]           # the patches that show X
        seen = mine.any(-1)                                           # (B, Q)
        found = [torch.logsumexp(s.log_softmax(-1).masked_fill(~mine, -torch.inf)[seen], -1) for s in scores]
        logs["point"] = -torch.stack(found).mean()
        total = total + 0.3 * logs["point"]
        targets = batch["targets"]                                    # (B, Q, L): the next token, -100: none
        if (targets >= 0).any():
            written = own[targets >= 0] @ self.how.embedding(self.model).weight.T
            self.said[targets[targets >= 0]] = True                   # the others stay as they began
            written = written.masked_fill(~self.said, -torch.inf)
            logs["text"] = F.cross_entropy(written, targets[targets >= 0])
            total = total + logs["text"]
        if points is not None:
            logs["points"] = F.l1_loss(points, batch["points"])
            total = total + 5 * logs["points"]
        return total, logs


def make_batch(scenes, picks, rng, asker, ask):
    """`ask` random questions on each of the scenes `picks`, and their answers."""
    cfg, tokenizer, how = asker.model.cfg, asker.model.tokenizer, asker.how
    asked, rows = [], []
    for i in picks:
        rgb, what, where, known = scenes[i]
        which = rng.choice(len(known), ask, replace=False)
        asked += [how.question(cfg, tokenizer, known[k][0], *known[k][2:], rng) for k in which]
        rows.append((rgb, what, where, *(np.stack([known[k][j] for k in which]) for j in (1, 2, 3))))
    rgb, what, where, task, row, counts = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
    L = max(len(ids) for ids, _ in asked)
    ids = torch.tensor([line + [cfg.pad_id] * (L - len(line)) for line, _ in asked])    # (B Q, L)
    targets = torch.full_like(ids, -100)
    for r, (line, n) in enumerate(asked):
        targets[r, n - 1:len(line) - 1] = ids[r, n:len(line)]
    return {"images": rgb[:, None], "before": torch.tensor(how.before(cfg, tokenizer)),
            "points": torch.from_numpy(paths(row.numpy(), counts.numpy())),
            "ids": ids.view(len(picks), ask, L), "targets": targets.view(len(picks), ask, L),
            "length": torch.tensor([n for _, n in asked]).view(len(picks), ask), "what": what.long(),
            "where": where, "where_scale": torch.tensor([4.0, 4.0, 1, 1, 1]), "task": task, "answer": row,
            "counts": counts.float()}


@torch.no_grad()
def localization(asker, scenes, ask=4, n=2000):
    """Median, mean and 90 % quantile of the errors [cm] of X, Y and the gripper, on the first `n` scenes."""
    asker.eval()
    found, n = {k: [] for k in COLUMNS}, min(n, len(scenes))
    for i in range(0, n, 100):
        batch = make_batch(scenes, range(i, min(i + 100, n)), np.random.default_rng(i), asker, ask)
        answer = asker(batch)[1]                                      # (B, Q, ANSWERS)
        for k, c in COLUMNS.items():
            off = torch.linalg.norm((answer - batch["answer"])[..., c], dim=-1) * SCALE * 100
            found[k] += off[batch["counts"][..., c].bool().all(-1)].tolist()
    asker.train()
    return {f"{k}_{name}_cm": round(float(f(v)), 2) for k, v in found.items()
            for name, f in (("median", np.median), ("mean", np.mean), ("p90", lambda a: np.quantile(a, 0.9)))}


# ---- Training ---------------------------------------------------------------------------------------------

def main():
    assets = Path(__file__).resolve().parent.parent / "assets"
    p = Parser(__doc__)
    p.add_argument("--model", choices=METHODS, default="cogact", help="whose tiny preset it is for")
    p.add_argument("--steps", type=within(1), default=6000, help="optimizer steps; the rate falls to 0")
    p.add_argument("--scenes", type=within(1, HELD_OUT), default=100_000, help="each has six questions")
    p.add_argument("--batch", type=within(1), default=32, help="pictures per step")
    p.add_argument("--ask", type=within(1, 6), default=4, help="questions per picture, at most 6")
    p.add_argument("--lr", type=within(1e-9, 1.0), default=1e-3, help="peak; 200 steps up, a cosine down")
    p.add_argument("--seed", type=within(0), default=0, help="of weights and order")
    p.add_argument("--init", type=Path, help="a trunk to go on from (its answering heads start anew)")
    p.add_argument("--out", type=Path, help="file to write (default: assets/MODEL_tiny_trunk.safetensors)")
    a = p.parse_args()
    a.out = a.out or assets / f"{a.model}_tiny_trunk.safetensors"
    if a.out.suffix != ".safetensors" or a.out.is_dir():
        raise ValueError(f"--out {a.out}: name a file that ends in .safetensors; its card ends in .json.")
    eval_sim.claim(a.out.parent)
    torch.manual_seed(a.seed)
    how = METHODS[a.model]
    cfg = how.method.PRESETS["tiny"]
    model = how.method.Model(cfg, how.method.load_tokenizer(cfg))
    if how is A0:
        model.requires_grad_(True)                                    # its encoders are frozen from then on
    if hasattr(how, "begin") and not a.init:
        how.begin(model)
    if a.init:
        print(f"fresh: {len(model.load_state_dict(load_weights(a.init), strict=False).missing_keys)} tensors")
    grid = cfg.image_size // cfg.patch_size // getattr(cfg, "merge_size", 1)
    held_out = make_scenes(2000, cfg.image_size, grid, HELD_OUT, how.bodies)
    scenes = make_scenes(a.scenes, cfg.image_size, grid, 0, how.bodies)
    asker = Asker(model, how)
    learns = lambda name: not name.removeprefix("model.").startswith(how.skip or "-")       # noqa: E731
    parameters = [q for n, q in asker.named_parameters() if q.requires_grad and learns(n)]
    print(f"{sum(q.numel() for q in parameters) / 1e6:.2f} M parameters, {len(scenes)} scenes")
    opt = torch.optim.AdamW(parameters, a.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, start, mean = np.random.default_rng(a.seed), time.time(), {}
    bar = tqdm(range(1, a.steps + 1), desc="trunk")
    for step in bar:
        lr = a.lr * min(1, step / 200) * (0.5 + 0.5 * np.cos(np.pi * step / a.steps))
        for g in opt.param_groups:
            g["lr"] = lr
        batch = make_batch(scenes, rng.integers(len(scenes), size=a.batch), rng, asker, a.ask)
        loss, logs = asker.loss(batch)
        opt.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(loss.detach() + norm):
            raise ValueError(f"the loss or its gradient is not finite at step {step}: lower --lr {a.lr}. "
                             f"{a.out} is as it was at the last report above.")
        opt.step()
        if step % 5 == 0:                                             # a running mean, for the bar
            mean = {k: 0.98 * mean.get(k, float(v)) + 0.02 * float(v) for k, v in logs.items()}
        if step % 50 == 0:
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
        if step % 2000 == 0 or step == a.steps:
            report = localization(asker, held_out, a.ask)
            tqdm.write(json.dumps({"step": step, "minutes": round((time.time() - start) / 60, 1), **report}))
            save(asker, a, step, time.time() - start, report)


def save(asker, a, step, seconds, report):
    """Weights of the trunk (no action head, no answering heads), and the card beside them."""
    trunk = {k: v.half().contiguous() for k, v in asker.model.state_dict().items()
             if not k.startswith(asker.how.skip or "-")}
    atomic_write(a.out, lambda part: save_file(trunk, part))
    names = ("model", "ask", "steps", "scenes", "batch", "lr", "seed")
    command = " ".join(f"--{name} {getattr(a, name)}" for name in names)
    machine = platform.processor() or platform.machine()
    write_json(a.out.with_suffix(".json"), {
        "made_by": f"python examples/pretrain_trunk.py {command}" + f" --init {a.init}" * bool(a.init),
        "went_on_from": read_json(a.init.with_suffix(".json")) if a.init else None,
        "steps": step, "pictures": step * a.batch, "questions": a.ask * step * a.batch,
        "minutes": round(seconds / 60, 1),
        "hardware": f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": f"tabletop split 'pretrain', {a.scenes} scenes; no training, validation, evaluation seeds",
        "supervision": "what each patch shows; positions of the things a prompt names, and (in text or "
                       "action codes) the way to them; no expert's actions",
        "dtype": "float16", "error_on_2000_unseen_scenes": report, "licence": "MIT"})


if __name__ == "__main__":
    cli(main)
