"""vla0.py's decoding: exact whatever the draft, well formed whatever the weights, streamed step by step.

`# sheet 14.N`: see test_vla0.py.
"""
import itertools
import os
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import CountReads
from test_vla0 import batch_of, drawing, make, samples, small, writes
from vla0 import END, PRESETS, SYMBOLS, Reader, Writer, answer_ids, parse_safe, to_text


# ---- The same text as symbol by symbol, for any draft -----------------------------------------------------

def prompts(cfg, B, generator):
    """B random prompts, each of its own length: (batch, embeddings (B, L, D) float64).

    Half of their tokens are symbols, which the repetition penalty must not overlook.
    """
    length = torch.randint(2, 9, (B,), generator=generator)
    L = int(length.max())
    ids = torch.tensor(cfg.legal + [7] * 12)[torch.randint(0, 24, (B, L), generator=generator)]
    ids[torch.arange(L) >= length[:, None]] = cfg.pad_id
    batch = {"length": length, "delta": -torch.randint(0, 3, (B,), generator=generator), "ids": ids,
             "positions": torch.arange(L).expand(B, 3, L)}
    return batch, torch.randn(B, L, cfg.llm_width, generator=generator, dtype=torch.float64)


def rows_of(prompt, part):
    batch = {name: x[part] for name, x in prompt[0].items()}
    L = int(batch["length"].max())
    return {**batch, **{n: batch[n][..., :L] for n in ("ids", "positions")}}, prompt[1][part, :L]


@torch.no_grad()
def write(cfg, reader, prompt, drafts=None, seed=None):
    batch, rows = prompt
    writer = Writer(cfg, reader, batch, rows.to(reader.embedding.dtype), drafts or [None] * len(rows), seed)
    for _ in writer:
        pass
    return writer


def reading(cfg, seed=0, double=True):
    """(model, its Reader)."""
    model = make(cfg, seed)
    model = model.double() if double else model
    return model, Reader(cfg, model.model, alias=True)


def may_follow(text, cfg):
    """Which of the 12 symbols keep a text well formed: the grammar, said again in plain Python."""
    words = text.split(" ")
    last, full = words[-1], len(words) == cfg.horizon * cfg.action_dim
    digits = [str(int(last + d)) == last + d and int(last + d) <= cfg.num_bins for d in SYMBOLS[:10]]
    return torch.tensor([*digits, bool(last) and not full, bool(last) and full])


@torch.no_grad()
def next_scores(model, cfg, prompt, text):
    """Scores (12,) behind one prompt and `text`, by transformers' forward over all of it and plain Python."""
    (batch, rows), legal = prompt, torch.tensor(cfg.legal)
    n, said = int(batch["length"][0]), legal[[SYMBOLS.index(c) for c in text]]
    x = torch.cat([rows[0, :n].to(model.model.norm.weight.dtype), model.model.embed_tokens(said)])
    place = torch.cat([batch["positions"][0, :, :n],
                       (torch.arange(n, n + len(text)) + batch["delta"][0]).expand(3, -1)], 1)      # (3, L)
    hidden = model.model(inputs_embeds=x[None], position_ids=place[:, None], attention_mask=None,
                         use_cache=False).last_hidden_state[0, -1]
    scores = model.model.embed_tokens.weight[legal] @ hidden
    known = torch.isin(legal, torch.cat([batch["ids"][0, :n], said]))
    p = cfg.repetition_penalty
    scores = torch.where(known, torch.where(scores > 0, scores / p, scores * p), scores)
    return scores.masked_fill(~may_follow(text, cfg), -torch.inf) if cfg.grammar else scores


def margin(model, cfg, prompt, text):
    """How far apart the two best continuations of a text are."""
    best = next_scores(model, cfg, prompt, text).topk(2).values
    return float(best[0] - best[1])


DRAFTS = {
    "random": lambda text, rng: "".join(rng.choice(SYMBOLS) for _ in range(rng.randint(1, 40))),
    "empty": lambda text, rng: "",
    "perfect": lambda text, rng: text,
    "too short": lambda text, rng: text[:rng.randint(0, len(text))],
    "too long": lambda text, rng: text + " 99 1 0" * rng.randint(1, 4),
    "adversarial": lambda text, rng: "".join(
        SYMBOLS[(SYMBOLS.index(c) + rng.randint(1, 10)) % 11] for c in text),
    "other length": lambda text, rng: re.sub(r"\d+", rng.choice(("7", "100", "42")), text, count=1)}
KINDS, WINDOWS = list(DRAFTS), (0, 1, 2, 5, 0, 40)


def differing(reader, cfg, prompt, rng, B, drafts_each=1):
    """Decode the prompts plainly, and B at a time with drafts of all kinds, each row its own.

    Returns the rows that differ: (prompt, text, plain text), and checks what must hold for every draft.
    """
    plain, differ = write(replace(cfg, draft="none"), reader, prompt), []
    texts, turns = plain.texts(), itertools.count()
    assert (plain.passes < plain.count).all()                  # the prefill says the first symbol
    for first, _ in itertools.product(range(0, len(texts), B), range(drafts_each)):
        part, turn = slice(first, min(first + B, len(texts))), next(turns)
        names = [KINDS[(turn * B + i) % len(KINDS)] for i in range(part.stop - first)]
        drafts = [DRAFTS[name](text, rng) for name, text in zip(names, texts[part])]
        how = replace(cfg, window=WINDOWS[turn % len(WINDOWS)])
        got = write(how, reader, rows_of(prompt, part), drafts)
        for i, text in enumerate(got.texts()):
            if text != texts[first + i]:
                differ.append((rows_of(prompt, slice(first + i, first + i + 1)), text, texts[first + i]))
                continue
            assert got.count[i] == plain.count[first + i] and got.passes[i] < got.count[i]
            if names[i] == "perfect" and text and not how.window:
                assert got.passes[i] == (got.count[i] > 1)
    return differ


REDRAFTS = "jacobi", "align"
CASES = [dict(repetition_penalty=p, grammar=g, redraft=r, max_new_tokens=24)
         for p, g, r in itertools.product((1.0, 1.05), (True, False), REDRAFTS)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8), ids=["-".join(map(str, list(how.values())[:3])) for how in CASES])
def test_speculative_text_is_the_plain_text(seed):                                 # sheet 14.24
    """8 x 130 random chunks, in batches of 8 and of 1, every kind of draft and window: equal in float64.

    In float32 (8 x 32 more) they differ only where the two best words are near enough for rounding to decide.
    """
    cfg, rng, g = small(**CASES[seed]), random.Random(seed), drawing(seed)
    _, reader = reading(cfg, seed)
    assert differing(reader, cfg, prompts(cfg, 116, g), rng, 8) == []
    assert differing(reader, cfg, prompts(cfg, 14, g), rng, 1, drafts_each=2) == []
    model, reader = reading(cfg, seed, double=False)
    differ = differing(reader, cfg, prompts(cfg, 32, g), rng, 8)
    for prompt, text, plain in differ:
        assert margin(model, cfg, prompt, os.path.commonprefix([text, plain])) < 1e-4, (text, plain)
    assert len(differ) < 8


def test_plain_text_is_that_of_transformers_forward():
    """Symbol by symbol, with the whole text read again each time; nothing of our decoding is used."""
    for seed, how in enumerate(CASES[::2]):
        cfg = small(**how)
        model, reader = reading(cfg, seed)
        prompt = prompts(cfg, 5, drawing(seed))
        for i, got in enumerate(write(cfg, reader, prompt).texts()):
            one, text = rows_of(prompt, slice(i, i + 1)), ""
            while len(text) < cfg.max_new_tokens:
                symbol = int(next_scores(model, cfg, one, text).argmax())
                if symbol == END:
                    break
                text += SYMBOLS[symbol]
            assert text == got or margin(model, cfg, one, os.path.commonprefix([text, got])) < 1e-4


def test_perfect_draft_of_an_official_chunk_is_one_pass():                         # sheet 14.24
    """56 numbers of up to 4 digits, some 210 symbols: the window shrinks to what is left, never below it."""
    cfg = small(horizon=8, action_dim=7, gripper_index=6, num_bins=1000, max_new_tokens=1024)
    _, reader = reading(cfg, 4)
    prompt = prompts(cfg, 2, drawing(3))
    plain = write(cfg, reader, prompt)
    perfect = write(cfg, reader, prompt, plain.texts())
    assert perfect.texts() == plain.texts() and perfect.passes.tolist() == [1, 1]
    assert min(plain.count) > 100 and (plain.passes < plain.count).all()
    for redraft, draft in (("jacobi", "1000 " * 55 + "1000"), ("align", "1 2")):
        got = write(replace(cfg, redraft=redraft), reader, prompt, [draft, plain.texts()[1][8:]])
        assert got.texts() == plain.texts() and (got.passes < got.count).all()


def test_jacobi_learns_all_numbers_in_one_pass_where_they_do_not_hang_together():
    """After a wrong draft of the right shape: one pass to read it, one to confirm what that pass said."""
    true, wrong = (to_text(np.full((8, 3), n)) for n in (77, 33))
    model, (look,) = writes(true, horizon=8)
    passes = {how: model.act([{**look, "draft": wrong}], redraft=how)[1]["passes"][0] for how in REDRAFTS}
    assert passes["jacobi"] == 2 and passes["align"] > 24      # keeping the draft: a pass per number at least


@pytest.mark.parametrize("true, drafted", [
    ("42", "7"), ("7", "42"), ("100", "10"), ("10", "100"), ("100", "7"), ("0", "100"), ("43", "42")])
def test_number_of_another_length_moves_the_rest_of_the_draft_along(true, drafted):
    """What was drafted behind it still fits: at most a pass per digit, then one for all the rest."""
    for place in (0, 1, 11, 22, 23):
        words = [str(n) for n in np.random.default_rng(0).integers(0, 101, 24)]
        text, draft = (" ".join([*words[:place], n, *words[place + 1:]]) for n in (true, drafted))
        model, (look,) = writes(text, horizon=8)
        _, info = model.act([{**look, "draft": draft}], redraft="align")
        assert info["texts"] == [text] and info["passes"][0] <= 1 + max(len(true), len(drafted))


@pytest.mark.parametrize("grammar", [True, False])
def test_text_ends_at_max_new_tokens_with_any_draft(grammar):
    cfg = small(grammar=grammar, max_new_tokens=60)
    _, reader = reading(cfg)
    prompt = prompts(cfg, 4, drawing(1))
    whole = write(cfg, reader, prompt).texts()
    for limit in (1, 2, 5, 17):
        cut = replace(cfg, max_new_tokens=limit)
        plain, drafted = write(cut, reader, prompt), write(cut, reader, prompt, whole)
        assert plain.texts() == drafted.texts() == [text[:limit] for text in whole]
        assert (drafted.count <= limit).all()


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("grammar", [True, False])
def test_sampled_text_is_the_same_with_and_without_speculation(B, grammar):
    cfg, rng = small(temperature=0.7, grammar=grammar), random.Random(1)
    _, reader = reading(cfg)
    prompt, ways = prompts(cfg, B, drawing(2)), itertools.cycle(({}, {"window": 3}, {"redraft": "align"}))
    plain = write(cfg, reader, prompt, seed=11)
    for make_draft, how in zip(DRAFTS.values(), ways):
        drafts = [make_draft(text, rng) for text in plain.texts()]
        assert write(replace(cfg, **how), reader, prompt, drafts, seed=11).texts() == plain.texts()
    assert write(cfg, reader, prompt, seed=12).texts() != plain.texts()
    cold = write(replace(cfg, temperature=1e-6), reader, prompt, seed=11).texts()
    assert cold == write(replace(cfg, temperature=0.0), reader, prompt).texts()


def test_sampling_follows_torchs_seed_and_leaves_it_alone():
    """eval_sim.py --seed: torch.manual_seed fixes a model's draws."""
    model, texts = make(small(temperature=1.0)), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(model.act(samples(model.cfg, 2))[1]["texts"])
    assert texts[0] == texts[1] != texts[2]


def test_grammar_yields_the_right_count_of_integers_in_range():                    # sheet 14.29
    """Whatever the weights, the draft, the temperature: H x D integers in 0..bins, no leading zero."""
    for seed, bins in enumerate((5, 10, 99, 100, 1000, 4095)):
        cfg = small(num_bins=bins, horizon=3, max_new_tokens=1024, temperature=float(seed % 2) * 3)
        (_, reader), rng = reading(cfg, seed), random.Random(seed)
        drafts = [DRAFTS["random"]("", rng) for _ in range(8)]
        for text in write(cfg, reader, prompts(cfg, 8, drawing(seed)), drafts, seed).texts():
            q, problem = parse_safe(text, bins, 3, 3)
            assert problem == "" and text == to_text(q) and 0 <= q.min() <= q.max() <= bins


def test_symbols_are_the_tokens_of_digits_space_and_end():                         # sheet 14.15
    model, (cfg, official) = make(), (small(), PRESETS["3b"])
    assert cfg.legal == [*range(22, 32), 3, 501] and official.legal == [*range(15, 25), 220, 151645]
    for c in (cfg, official):
        assert answer_ids(SYMBOLS, c) == c.legal[:END] and c.legal[END] == c.im_end_id
    assert model.tokenizer.convert_ids_to_tokens(cfg.legal[:11]) == [*"0123456789", "▁"]
    with torch.no_grad():                                      # it would like to say what is no symbol
        model.model.embed_tokens.weight[7] = 9 * model.model.embed_tokens.weight[cfg.legal[4]]
    prompt = prompts(cfg, 4, drawing(0))
    assert write(cfg, Reader(cfg, model.model, alias=False), prompt).texts() == \
        write(cfg, reading(cfg, double=False)[1], prompt).texts()


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])])
def test_a_pass_reads_nothing_back_from_the_device(device):
    penalty = 1.05 if device == "cuda" else 1.0                # (F.one_hot reads on a CPU, and only there)
    model = make(small(repetition_penalty=penalty)).to(device)
    batch = {name: x.to(device) for name, x in batch_of(model, 2).items()}
    with model.reading() as reader:
        writer = Writer(model.cfg, reader, batch, model.embed(batch), ["1 2 3", None])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with CountReads() as count:
            writer.read(writer.window)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert count.reads == 0


# ---- The cache, the fused weights -------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(llm_heads=2, llm_kv_heads=1, mrope_section=(2, 2, 4)),
                                     dict(llm_heads=4, llm_kv_heads=4), dict(views=("a", "b"), tile=False)])
def test_cached_decoding_equals_the_full_forward(changes):
    """In several steps of several sizes, over a cache that holds a rejected draft: it leaves no trace."""
    model = make(small(**changes))
    batch = batch_of(model)
    want, (B, L) = model(batch), batch["ids"].shape
    with model.reading() as reader:
        rows, cache, parts = model.embed(batch), reader.new_cache(B, L + 3), []
        place, slots = batch["positions"].transpose(0, 1), torch.arange(L).expand(B, -1)
        reader(torch.randn_like(rows), place, slots, cache)
        for a, b in itertools.pairwise((0, 5, 6, 7, L - 4, L)):
            parts.append(reader(rows[:, a:b], place[:, :, a:b], slots[:, a:b], cache))
        for i, n in enumerate(batch["length"].tolist()):
            torch.testing.assert_close(torch.cat(parts, 1)[i, :n], want[i, :n], rtol=1e-4, atol=1e-4)
        logits = F.linear(want, model.model.embed_tokens.weight)[..., model.cfg.legal]
        torch.testing.assert_close(reader.logits(want), logits)            # (B, L, 12)


def test_training_goes_on_in_the_fused_weights():
    """The Reader's projections and the model's are one memory: a step of the optimizer reaches both."""
    model, fresh = make(), make()
    seen, batch = samples(model.cfg, 2), batch_of(model)
    optimizer = torch.optim.AdamW(model.param_groups(0.05, 0.0))
    before = model.act(seen)[1]["texts"]
    reader = model.reader
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    after = model.act(seen)[1]["texts"]
    fresh.load_state_dict(model.state_dict())
    assert model.reader is reader and reader.current(model.model)
    assert after == fresh.act(seen)[1]["texts"] != before
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{x}_proj").weight for x in "qkv")
    assert torch.equal(reader.layers[0][1], torch.cat([q, k, v]))
    assert reader.layers[0][1].data_ptr() == q.data_ptr()


@pytest.mark.parametrize("change", ["in place", "assigned", "wider", "wider and back"])
def test_reader_notices_other_weights(change):
    model, other = make(), make(seed=7)
    seen = samples(model.cfg, 2)
    model.act(seen)
    model.load_state_dict(other.state_dict(), assign=change == "assigned")
    if "wider" in change:
        model, other = model.double(), other.double()
    if "back" in change:
        model, other = model.float(), other.float()
    assert model.act(seen)[1]["texts"] == other.act(seen)[1]["texts"] != make().act(seen)[1]["texts"]


# ---- act and stream ---------------------------------------------------------------------------------------

def test_draft_changes_the_passes_and_never_the_actions():                         # sheet 14.24
    model = make().double()
    seen = samples(model.cfg, 3)
    plain, info = model.act(seen, draft="none")
    drafts = (info["texts"][0], "5 5 5", None)
    other, fast = model.act([{**o, "draft": d} for o, d in zip(seen, drafts)])
    assert np.array_equal(plain, other) and fast["passes"][0] == 1 and (fast["passes"] < fast["tokens"]).all()
    off = model.act([{**seen[0], "draft": drafts[0]}], draft="none")[1]                # the switch is off
    assert off["passes"][0] == info["passes"][0]
    for grammar in (True, False):                              # drafts that are no numbers only cost time
        want = model.act(seen[:1], grammar=grammar)[1]["texts"]
        for draft in ("5X 3?", "4\n5 <|im_end|>", "take it", "9" * 100_000, " ", "  1", "१"):
            got = model.act([{**seen[0], "draft": draft}], grammar=grammar)[1]
            assert got["texts"] == want and got["passes"][0] < max(2, got["tokens"][0]), draft


def test_act_ignores_autocast():
    model = make()
    seen = samples(model.cfg, 2)
    (want, _), (_, info) = model.act(seen), model.act(seen[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(model.act(seen)[0], want)
        for t, action in model.stream(seen[0]):
            assert np.array_equal(action, info["actions"][0, t])
            assert torch.is_autocast_enabled("cpu")            # for the caller, while it has its turn


def streamed(model, look, info, **how):
    """How many steps a stream gave: each once, in order, as act has them; and it says what act says."""
    problems = []

    def through():
        problems.append((yield from model.stream(look, **how)))
    steps = list(through())
    assert [bool(problem) for problem in problems] == info["parse_failed"].tolist()
    assert [t for t, _ in steps] == list(range(len(steps)))
    for t, action in steps:
        assert np.array_equal(action, info["actions"][0, t]) and action.dtype == np.float64
    return len(steps)


@pytest.mark.parametrize("grammar", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_equals_act_step_by_step(grammar, temperature):                     # sheet 14.25
    """Also without a draft, with a wrong one, and with a right one."""
    model = make(small(horizon=4, grammar=grammar, temperature=temperature, max_new_tokens=80)).double()
    seen = samples(model.cfg, 1)[0]
    _, info = model.act([seen], seed=5)
    for draft, how in itertools.product((None, info["texts"][0], "100 " * 11 + "1"), ({}, {"window": 2})):
        assert streamed(model, {**seen, "draft": draft}, info, seed=5, **how) == 4 or not grammar


@pytest.mark.parametrize("text, steps", [
    ("1 2 3 4 5 6", 2), ("1 2 3  4 5 6", 1), (" 1 2 3 4 5", 1), ("1 2  3 4 5 6", 0), ("1 2 3 ", 1),
    ("1 2", 0), ("1 2 3 4 5 6 7 8 9", 2), ("", 0), ("100 100 100 10 10 10", 2), ("1 2 3 999 5 6", 2)])
def test_stream_ends_at_the_first_flaw(text, steps):
    """act repeats the last whole step, or holds the pose; a stream gives what there is, and the reason."""
    model, (seen,) = writes(text, grammar=False)
    _, info = model.act([seen])
    for draft in (None, text, "5 5 5 5 5 5"):
        assert streamed(model, {**seen, "draft": draft}, info) == steps


def test_stream_does_not_go_on_behind_a_flaw():
    model, (look,) = writes("1 2 3  4 5 6 " + "7 " * 400, grammar=False)
    model.act([look])
    whole, model.reader.calls = model.reader.calls, 0
    assert [t for t, _ in model.stream(look)] == [0] and model.reader.calls < whole / 20


@pytest.mark.parametrize("grammar", [True, False])
def test_number_that_was_cut_is_not_executed_and_is_reported(grammar):             # sheet 14.25
    """... 7 instead of 72; and a 72 that could have become 720, as only the end can tell."""
    text = "50 50 100 50 50 72"
    for limit, cut in ((17, True), (18, True), (19, False)):
        model, (look,) = writes(text, grammar=grammar, max_new_tokens=limit)
        for draft in (None, text):
            _, info = model.act([{**look, "draft": draft}])
            assert info["texts"] == [text[:limit]]
            assert info["problems"] == ["5 numbers instead of 6" * cut]
            np.testing.assert_allclose(info["actions"][0], [[0, 0, 1], [0, 0, 1 if cut else 0.72]], atol=1e-7)
            assert streamed(model, {**look, "draft": draft}, info) == 2 - cut
    strict = writes(text, grammar=False, max_new_tokens=17, strict=True)
    np.testing.assert_allclose(strict[0].act(strict[1])[0], [[[0, 0, 1], [0, 0, 0.07]]], atol=1e-7)


def test_step_is_streamed_as_soon_as_its_numbers_stand_and_gradients_stay_on():
    model, (look,) = writes(to_text(np.full((8, 3), 77)), horizon=8)
    steps, when = model.stream({**look, "draft": to_text(np.full((8, 3), 33))}, redraft="align"), []
    for _ in steps:
        when.append(steps.gi_frame.f_locals["writer"].passes.item())
        assert torch.is_grad_enabled()                         # for the caller, while it has its turn
    assert when == sorted(when) and when[0] < when[-1] / 4 and len(when) == 8
    one, two = model.stream(look), model.stream(look)
    next(one), next(two)
    assert one.gi_frame.f_locals["writer"].passes.item() < len("77 77 77 ")        # without a draft, too
    one.close()
    two.close()
    assert torch.is_grad_enabled()
