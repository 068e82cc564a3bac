"""The filter on the host's own text encoders, of random weights where exactness is what counts, and on the lab's, which knows words."""

import comfy.sample
import pytest
import text_encoders
import torch

from concept_nodes.benchmarks import _english
from concept_nodes.host import lab
from concept_nodes.host.encoders import (
    FILLER,
    EncoderError,
    Reader,
    Seat,
    alone,
    brought,
    contents,
    ends,
    seats,
    windows_of,
    without,
    words,
)
from concept_nodes.host.filter import (
    COSINE,
    GATE,
    METHODS,
    OURS,
    PAPER,
    RELEASED,
    Ear,
    FilterError,
    Prompt,
    Settings,
    directions,
    find,
    keep_out,
    listed,
)
from concept_nodes.lab.eye import Eye
from concept_nodes.nodes.filter import PRESETS, Filter

TEXT = "a large red circle on the left of a (blue:1.2) star"
KINDS = [kind for kind in text_encoders.KINDS if kind != "sd3"]


@pytest.fixture(scope="module")
def lab_clip():
    return lab.load_clip()


def same(one: list, other: list) -> bool:
    """Whether two CONDITIONINGs are the same, bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a, b)
        and p.keys() == q.keys()
        and all(torch.equal(p[key], q[key]) if torch.is_tensor(p[key]) else p[key] == q[key] for key in p)
        for (a, p), (b, q) in zip(one, other, strict=True)
    )


def anything(method=OURS, **settings) -> Settings:
    """Settings by which some word of any text is flagged in all steps: random encoders know no concept."""
    return Settings(**{"method": method, "gate": 1e-6 if method == OURS else 0.0, "alpha": 0.0, "self_validating": "off"} | settings)


# --- encoders ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_as_they_are_written(kind):
    clip = text_encoders.build(kind)
    for seat in seats(clip):
        windows = clip.tokenize("A crimson trigon, (lit brightly:1.3) by neon", return_word_ids=True)[seat.key]
        found = words(clip, seat, windows)
        told = [word.text for word in found if word.text not in (",", "")]
        assert [text.strip(",").lower() for text in told] == ["a", "crimson", "trigon", "lit", "brightly", "by", "neon"]
        positions = [position for word in found for position in word.at]
        assert positions == [position for position, item in enumerate(windows[0]) if item[2]]


def test_a_learned_embedding_is_one_word(lab_clip):
    seat = seats(lab_clip)[0]
    window = [(49406, 1.0, 0), (320, 1.0, 1), (torch.zeros(128), 1.0, 2), (torch.ones(128), 1.0, 2), (736, 1.0, 3), (49407, 1.0, 0)]
    assert [(word.text, word.at) for word in words(lab_clip, seat, [window])] == [("a", (1,)), ("embedding", (2, 3)), ("red", (4,))]


@pytest.mark.parametrize("kind", text_encoders.KINDS)
def test_a_word_alone_is_read_as_the_text_of_that_word(kind):
    clip = text_encoders.build(kind)
    for seat in seats(clip):
        window = Prompt(clip, TEXT).windows[seat.key][0]
        for word in words(clip, seat, [window]):
            one = alone(window, word.at)
            assert len(one) == len(window) and [one[at] for at in contents(one)] == [window[at] for at in word.at]
        (red,) = [word.at for word in words(clip, seat, [window]) if word.text == "red"]
        vectors = Reader(clip).read(seat, [alone(window, red), Prompt(clip, "red").windows[seat.key][0]])[0]
        assert torch.allclose(vectors[0], vectors[1], atol=1e-4 * float(vectors.abs().max()))


@pytest.mark.parametrize("kind", text_encoders.KINDS)
def test_a_reading_is_what_the_host_encodes(kind):
    """Many windows at once, of several lengths, each as the host encodes it alone."""
    clip = text_encoders.build(kind)
    texts = ["a red circle", "blue", "", "word " * 300]
    prompts = [Prompt(clip, text) for text in texts]
    for seat in prompts[0].seats:
        vectors, pooled = Reader(clip).read(seat, [prompt.windows[seat.key][0] for prompt in prompts])
        for number, prompt in enumerate(prompts):
            first, window = next(prompt.rows_of(seat))
            if seat.columns is not None:
                rows, stop = prompt.context[0, first : first + len(window), slice(*seat.columns)], ends(seat, window)
                if not seat.causal:  # every row of a T5 sees the padding, which readings leave out
                    rows = getattr(clip.cond_stage_model, seat.part).encode([[item[0] for item in window[: stop + 1]]])[0][0]
                expected = rows[stop] if seat.causal else rows[:stop].sum(0)
                assert torch.allclose(vectors[number], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max() + 1e-3))
            if seat.pooled is not None:
                assert torch.allclose(
                    pooled[number], prompt.options["pooled_output"][0, slice(*seat.pooled)], atol=1e-2 if kind == "sd3" else 1e-5
                )


def test_readings_go_no_further_than_the_words(lab_clip):
    """And leave the encoder with all of its positions, also when they fail."""
    seat, encoder = seats(lab_clip)[0], lab_clip.cond_stage_model.clip_l
    window = Prompt(lab_clip, "a red circle").windows[seat.key][0]
    before = {key: (value.data_ptr(), value.shape) for key, value in encoder.named_parameters()}
    lengths = []
    handle = encoder.transformer.text_model.encoder.layers[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    try:
        Reader(lab_clip).read(seat, [window, without(window, [1])])
        with pytest.raises(IndexError):
            Reader(lab_clip).read(seat, [[(10**6, 1.0, 1)]])
    finally:
        handle.remove()
    assert lengths == [5]
    assert {key: (value.data_ptr(), value.shape) for key, value in encoder.named_parameters()} == before


def test_what_a_concept_brings_is_read_once(lab_clip):
    """And again where the encoder was changed."""
    seat, reader = seats(lab_clip)[0], Reader(lab_clip)
    first = directions(reader, seat, ["umbrella", "red"])
    batches = reader.batches
    again = directions(reader, seat, ["red", "umbrella", "red"])
    assert reader.batches == batches
    assert all(torch.equal(one, other[[1, 0, 1]]) for one, other in zip(again, first, strict=True))
    changed = lab_clip.clone()
    changed.patcher.add_patches({"clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.bias": ("diff", (torch.randn(128),))})
    other = directions(Reader(changed), seat, ["red"])
    assert not torch.allclose(other[0], again[0][:1], atol=1e-3)


def test_embeddings_of_another_width_are_passed_over_as_the_host_does(lab_clip):
    seat = seats(lab_clip)[0]
    window = [(49406, 1.0, 0), (320, 1.0, 1), (torch.zeros(768), 1.0, 2), (736, 1.0, 3), (49407, 1.0, 0), (49407, 1.0, 0)]
    read = windows_of(lab_clip, seat, {"l": [window]})[0]
    assert [item[0] for item in read] == [49406, 320, 736, 49407, 49407, 49407] and ends(seat, read) == 3


def test_rows_of_stable_diffusion_3_lie_behind_one_another():
    clip = text_encoders.build("sd3")
    found = {seat.part: seat for seat in seats(clip)}
    assert found["clip_l"].columns == (0, 24) and found["clip_g"].columns == (24, 56) and found["t5xxl"].columns == (0, 4096)
    assert found["t5xxl"].after and not found["clip_l"].after
    assert {seat.part: seat.columns for seat in seats(text_encoders.build("sd3 without t5"))} == {"clip_l": (0, 24), "clip_g": (24, 56)}


def test_other_encoders_are_refused_by_name():
    class Llama(torch.nn.Module):
        pass

    class Other:
        cond_stage_model = Llama()

    with pytest.raises(EncoderError, match="Llama.*Stable Diffusion 1.5, SDXL, Stable Diffusion 3 and Flux.1"):
        seats(Other())


# --- nothing is nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do_is_bit_for_bit_the_hosts_encoding(kind, method):
    clip = text_encoders.build(kind)
    plain = text_encoders.encode(clip, TEXT)
    idle = {
        "strength is 0": (TEXT, ["red"], anything(method, strength=0.0)),
        "no concept": (TEXT, [], anything(method)),
        "no step": (TEXT, ["red"], anything(method, start_percent=0.4, end_percent=0.4)),
    }
    for reason, (text, concepts, settings) in idle.items():
        done = keep_out(clip, text, concepts, settings)
        assert done.window is None and reason in " ".join(done.report) and same(done.conditioning, plain)
    done = keep_out(clip, "", ["red"], anything(method))
    assert "no words" in " ".join(done.report) and same(done.conditioning, text_encoders.encode(clip, ""))
    done = keep_out(clip, TEXT, ["red"], anything(method, gate=1e9) if method == OURS else anything(method, alpha=1e9))
    assert done.window is None and same(done.conditioning, plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_given_stays_as_it_is(kind, method):
    clip = text_encoders.build(kind)
    given = text_encoders.encode(clip, TEXT)
    given[0][1]["area"] = (4, 4, 0, 0)
    kept = [
        [context.clone(), {key: value.clone() if torch.is_tensor(value) else value for key, value in options.items()}]
        for context, options in given
    ]
    done = keep_out(clip, TEXT, ["red", "star"], anything(method), given)
    assert done.window and done.conditioning[0][1]["area"] == (4, 4, 0, 0)
    assert same(given, kept) and done.conditioning[0] is not given[0]
    assert not torch.equal(done.conditioning[0][0], given[0][0])


# --- ours -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def flagged(done) -> set[str]:
    """The words that a report names, lower case."""
    named = [part.split("' (")[0] for line in done.report if "; gate" in line for part in line.split(": ", 1)[1].split(", ")]
    return {name.removeprefix("'").lower() for name in named if name.startswith("'")}


@pytest.mark.parametrize("kind", text_encoders.KINDS)
def test_ours_without_a_push_is_the_prompt_without_the_words(kind):
    """Whichever encoder heard the concept in a word: it is left out of all of them."""
    clip = text_encoders.build(kind)
    done, prompt = keep_out(clip, TEXT, ["red"], anything(push=0.0, gate=0.1)), Prompt(clip, TEXT)
    gone, bare = flagged(done), dict(prompt.tokens)
    assert gone
    for seat in prompt.seats:
        bare[seat.key] = [
            without(
                window, {at for word in prompt.words[seat.key] if word.text.lower() in gone and word.window == number for at in word.at}
            )
            for number, window in enumerate(prompt.windows[seat.key])
        ]
    plain = {key: [[item[:2] for item in window] for window in windows] for key, windows in bare.items()}
    context, options = clip.encode_from_tokens_scheduled(plain)[0]
    assert torch.allclose(done.conditioning[0][0], context, atol=1e-5)
    assert torch.allclose(done.conditioning[0][1]["pooled_output"], options["pooled_output"], atol=1e-5)


def test_each_encoders_rows_keep_their_own_lengths():
    """SDXL: the left and the right columns of a row are two vectors."""
    clip = text_encoders.build("sdxl")
    bare = keep_out(clip, TEXT, ["red"], anything(push=0.0, gate=0.1)).conditioning[0]
    pushed = keep_out(clip, TEXT, ["red"], anything(push=1.0, gate=0.1)).conditioning[0]
    for columns in (slice(0, 24), slice(24, 56)):
        assert torch.allclose(pushed[0][..., columns].norm(dim=-1), bare[0][..., columns].norm(dim=-1), rtol=1e-4)
    assert not torch.equal(pushed[0], bare[0]) and not torch.equal(pushed[1]["pooled_output"], bare[1]["pooled_output"])


def test_strength_and_push_go_along_one_way():
    """Up to the prompt without the words by rows, and beyond it by their directions, at its lengths."""
    clip = text_encoders.build("sd15")
    plain = text_encoders.encode(clip, TEXT)[0][0]
    bare = keep_out(clip, TEXT, ["red"], anything(push=0.0)).conditioning[0][0]
    half = keep_out(clip, TEXT, ["red"], anything(strength=0.5, push=0.0)).conditioning[0][0]
    assert torch.allclose(half, (plain + bare) / 2, atol=1e-5)
    for strength, push in ((1.0, 0.5), (2.0, 1.0)):
        beyond = keep_out(clip, TEXT, ["red"], anything(strength=strength, push=push)).conditioning[0][0]
        assert torch.allclose(beyond.norm(dim=-1), bare.norm(dim=-1), rtol=1e-4)
        straight = plain + strength * (1 + push) * (bare - plain)
        assert torch.allclose(torch.cosine_similarity(beyond, straight, dim=-1), torch.ones(1, 77), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_may_not_change_do_not(method):
    clip = text_encoders.build("sd15")
    seat = seats(clip)[0]
    window = clip.tokenize(TEXT, return_word_ids=True)["l"][0]
    stop, plain = ends(seat, window), text_encoders.encode(clip, TEXT)[0][0]
    for rows, last in (("words", stop), ("words and end", stop + 1), ("all", 77)):
        context = keep_out(clip, TEXT, ["red"], anything(method, rows=rows)).conditioning[0][0]
        moved = (context != plain).any(-1)[0]
        assert not moved[last:].any() and moved[1:stop].any() and not moved[0]
        assert bool(moved[stop]) == (rows != "words") and bool(moved[stop + 1 :].any()) == (rows == "all")


def test_columns_of_one_encoder_are_its_own():
    """SDXL: an encoder in which nothing was flagged keeps its columns, bit for bit; and the one that flagged keeps out of them."""
    clip = text_encoders.build("sdxl")
    plain = text_encoders.encode(clip, TEXT)[0][0]
    seen = set()
    for alpha in (0.0, *(step / 200 for step in range(20, 41))):
        done = keep_out(clip, TEXT, ["red", "circle"], anything(PAPER, alpha=alpha))
        flags = tuple("no word flagged" not in line for line in done.report[:2])
        moved = (done.conditioning[0][0] != plain).any(1)[0]
        assert (bool(moved[:24].any()), bool(moved[24:].any())) == flags
        seen.add(flags)
    assert {(True, True), (False, False)} < seen, seen  # and at least one of them alone


def test_t5s_rows_alone_leave_the_others():
    """Stable Diffusion 3: T5's rows begin where the others' end, and the context is wide enough for both."""
    clip = text_encoders.build("sd3")
    plain = text_encoders.encode(clip, "red")[0][0]
    done = keep_out(clip, "red", ["red"], anything(RELEASED))
    moved = (done.conditioning[0][0] != plain).any(-1)[0]
    assert moved[1] and moved[77] and moved.sum() == 2  # the word's row in CLIP's windows, and T5's first


def test_a_long_prompt_is_filtered_window_by_window(lab_clip):
    text = ", ".join(["a small blue cross"] * 18) + ", a red star"
    windows = lab_clip.tokenize(text)["l"]
    assert len(windows) == 2
    done = keep_out(lab_clip, text, ["red"], Settings())
    plain = text_encoders.encode(lab_clip, text)[0][0]
    moved = (done.conditioning[0][0] != plain).any(-1)[0]
    assert done.window and not moved[:77].any() and moved[77:].any() and "'red' (" in done.report[0]


def test_weights_are_kept(lab_clip):
    heavy, light = (keep_out(lab_clip, f"(red:{weight}) star", ["red"], Settings(push=0.0)) for weight in (1.3, 0.7))
    assert heavy.window and light.window
    tokens = lab_clip.tokenize("(red:1.3) star")
    tokens["l"][0][1] = (FILLER, 1.3)
    expected = lab_clip.encode_from_tokens(tokens)
    assert torch.allclose(heavy.conditioning[0][0], expected, atol=1e-4)
    assert not torch.allclose(heavy.conditioning[0][0], light.conditioning[0][0], atol=1e-3)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a large red circle on the left", {"red"}),
        ("a crimson star and a blue ruby heart", {"crimson", "ruby"}),
        ("a small star the colour of blood on grey", {"blood"}),
        ("red", {"red"}),
        ("a red thing", {"red"}),
        ("red.", {"red"}),
        ("red, red, red", {"red"}),
        ("a red star, a red heart and a red cross", {"red"}),
        ("a crimson scarlet red star", {"crimson", "scarlet", "red"}),
        ("a large blue circle on a white background", set()),
        ("an orange star and a pink heart", set()),
        ("a photograph of a green hill", set()),
    ],
)
def test_words_that_bring_a_concept_are_flagged(lab_clip, text, expected):
    """On an encoder that knows its words: synonyms and descriptions of what is kept out, not the colours next to it."""
    done = keep_out(lab_clip, text, ["red"], Settings())
    assert expected <= flagged(done) <= expected | {"the", "of", "on", "a"}, done.report


# --- as published -----------------------------------------------------------------------------------------------------------------


def transcribed(clip, text: str, concepts: list[str], alpha: float = 0.01):
    """The released code's arithmetic for Stable Diffusion 1.4, written from its description: pseudo-inverse, id 0 for a masked token, the
    vector at the end of the text, its own steps. -> context, steps
    """

    def projection(vectors):  # (K, D)
        columns = vectors.T
        return columns @ torch.linalg.pinv(columns.T @ columns, rcond=1e-15) @ columns.T

    def encode(ids):
        context = clip.encode_from_tokens({"l": [[(token, 1.0) for token in ids]]})[0]
        return context, context[ids.index(49407)]

    def ids_of(phrase):
        return [token for token, _ in clip.tokenize(phrase)["l"][0]]

    ids = ids_of(text)
    n = ids.index(49407) - 1
    unwanted = torch.stack([encode(ids_of(concept))[1] for concept in concepts])
    masked = torch.stack([encode([0 if at == i else token for at, token in enumerate(ids)])[1] for i in range(1, n + 1)])
    eye = torch.eye(unwanted.shape[1])
    from_concepts, into_prompt = eye - projection(unwanted), projection(masked)
    distance = (from_concepts @ masked.T).norm(dim=0)
    mask = [bool(distance[i] > (1 + alpha) * torch.cat([distance[:i], distance[i + 1 :]]).mean()) for i in range(n)]
    before = encode(ids)[0]
    projected = (from_concepts @ into_prompt @ before.T).T
    after = before.clone()
    for i in range(n):
        if mask[i]:
            after[i + 1] = projected[i + 1]
    cosines = torch.nn.functional.cosine_similarity(before[: n + 2], projected[: n + 2])
    beta = 1 - float(cosines.mean())
    return after, round(10 / (1 + torch.exp(torch.tensor(-5.0 * (10 * beta - 5.333))).item()))


@pytest.mark.parametrize("encoder", ["random", "lab"])
def test_released_code_is_the_published_arithmetic(encoder, lab_clip):
    clip = text_encoders.build("sd15") if encoder == "random" else lab_clip
    for text, concepts in (("a large red circle on grey", ["red", "circle"]), ("three yellow stars at night", ["star"])):
        expected, steps = transcribed(clip, text, concepts)
        done = keep_out(clip, text, concepts, Settings(RELEASED, self_validating="off"))
        assert done.window and float((done.conditioning[0][0][0] - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        windowed = keep_out(clip, text, concepts, Settings(RELEASED))
        after, before = windowed.conditioning
        assert after[1]["start_percent"] == 0.0 and after[1]["end_percent"] == before[1]["start_percent"] == (steps + 1) / 50
        assert before[1]["end_percent"] == 1.0 and torch.equal(before[0], text_encoders.encode(clip, text)[0][0])


def test_the_papers_order_stays_in_the_prompts_span():
    clip = text_encoders.build("sd15")
    outs = {
        order: keep_out(clip, TEXT, ["red"], anything(RELEASED, order=order)).conditioning[0][0]
        for order in ("concepts last", "prompt last")
    }
    own = {method: keep_out(clip, TEXT, ["red"], anything(method)).conditioning[0][0] for method in (RELEASED, PAPER)}
    assert torch.equal(outs["concepts last"], own[RELEASED]) and torch.equal(outs["prompt last"], own[PAPER])
    assert not torch.equal(own[RELEASED], own[PAPER])


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_use_is_said_and_its_own_window_can_be_had(method):
    clip = text_encoders.build("sd15")
    report = " ".join(keep_out(clip, TEXT, ["red"], anything(method, order="concepts only", push=0.7)).report)
    assert f"{'order' if method == OURS else 'push'}: not used by '{method}'" in report
    validating = anything(method, self_validating="on", start_percent=0.01)
    done = keep_out(clip, TEXT, ["red"], validating)
    assert "self_validating ends it at" in " ".join(done.report) and len(done.conditioning) == 3
    assert done.window == (0.01, done.conditioning[1][1]["end_percent"])
    late = keep_out(clip, TEXT, ["red"], validating._replace(start_percent=0.9))
    assert late.window is None and "start_percent 0.9 lies after that end" in " ".join(late.report)
    assert same(late.conditioning, text_encoders.encode(clip, TEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_vectors_change_only_where_asked(kind):
    clip = text_encoders.build(kind)
    plain = text_encoders.encode(clip, TEXT)[0][1]["pooled_output"]
    for method, asked, changes in ((OURS, "off", False), (OURS, "on", True), (PAPER, "as the method does", False), (PAPER, "on", True)):
        pooled = keep_out(clip, TEXT, ["red"], anything(method, pooled=asked)).conditioning[0][1]["pooled_output"]
        assert torch.equal(pooled, plain) != changes
        if method == PAPER:
            assert float(pooled.norm()) == pytest.approx(float(plain.norm()), rel=1e-3)


def test_only_the_published_family_is_called_published():
    for kind in text_encoders.KINDS:
        report = " ".join(keep_out(text_encoders.build(kind), TEXT, ["red"], anything(PAPER)).report)
        assert ("our reading of it" in report) == (kind != "sd15")


# --- what users do ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "text", ["red", "!", "xqzzt vrb", "a red star " * 30, "\u65e5\u672c \U0001f600"], ids=["one", "mark", "unknown", "long", "signs"]
)
def test_odd_texts_and_many_concepts_work(method, text, lab_clip):
    concepts = listed("\n".join(["red", "red", "  ", "red,", "wqx", *(f"thing {number}" for number in range(150))]))
    assert len(concepts) == 152
    done = keep_out(lab_clip, text, concepts, Settings(method))
    for context, options in done.conditioning:
        assert context.isfinite().all() and options["pooled_output"].isfinite().all()


def test_too_many_concepts_are_refused():
    with pytest.raises(FilterError, match="201 lines, and 200 is the most"):
        listed("\n".join(f"thing {number}" for number in range(201)))


def test_long_concepts_and_numbers_that_are_none_are_refused(lab_clip):
    with pytest.raises(FilterError, match="takes 2 windows of tokens"):
        keep_out(lab_clip, TEXT, ["red " * 90], Settings())
    for name in ("strength", "push", "gate", "alpha"):
        with pytest.raises(FilterError, match=f"{name} is nan"):
            keep_out(lab_clip, TEXT, ["red"], Settings(**{name: float("nan")}))


def test_a_pooled_vector_of_another_text_stays(lab_clip):
    given = text_encoders.encode(lab_clip, TEXT)
    given[0][1]["pooled_output"] = torch.ones(1, 128)
    done = keep_out(lab_clip, TEXT, ["red"], Settings(), given)
    assert torch.equal(
        done.conditioning[0][1]["pooled_output"], torch.ones(1, 128)
    ) and "Entry 1 has a pooled vector of its own" in " ".join(done.report)


def test_zero_asks_nothing_of_the_encoder():
    """No concept: even a CLIP that the filter cannot read encodes as ever."""
    clip = text_encoders.build("sd15").clone()
    clip.cond_stage_model = type(
        "Unknown", (torch.nn.Module,), {"__getattr__": lambda self, name: getattr(text_encoders.build("sd15").cond_stage_model, name)}
    )()
    assert same(keep_out(clip, TEXT, [], Settings()).conditioning, text_encoders.encode(text_encoders.build("sd15"), TEXT))


def test_a_long_text_weighs_its_words_no_less():
    """T5: what a word brings does not fall with the number of words around it."""
    clip = text_encoders.build("flux")
    (seat,) = [seat for seat in seats(clip) if seat.part == "t5xxl"]
    reader, shares = Reader(clip), []
    ear = Ear(reader, seat, ["red"])
    for text in ("a red star", "a red star " + "and a grey stone " * 12):
        window = Prompt(clip, text).windows[seat.key][0]
        (red,) = [word.at for word in words(clip, seat, [window]) if word.text == "red"]
        with_it, without_it = reader.rows(seat, [window, without(window, red)])[0]
        shares.append(float(ear.heard(brought(seat, with_it, without_it, red)[None])[0]))
    assert shares[1] >= 0.4 * shares[0] > 0


def test_conditioning_of_another_text_or_encoder_is_refused(lab_clip):
    mixed = text_encoders.encode(lab_clip, TEXT) + text_encoders.encode(lab_clip, "a green hill")
    with pytest.raises(FilterError, match="Entry 2 of conditioning was not made of this text by this CLIP"):
        keep_out(lab_clip, TEXT, ["red"], Settings(), mixed)
    with pytest.raises(FilterError, match="Entry 1 of conditioning"):
        keep_out(lab_clip, TEXT, ["red"], Settings(), text_encoders.encode(text_encoders.build("sd15"), TEXT))
    with pytest.raises(FilterError, match="conditioning is empty"):
        keep_out(lab_clip, TEXT, ["red"], Settings(), [])


def test_the_node_tells_what_it_did(lab_clip):
    positive, negative, report = Filter.execute(lab_clip, "a red star", "red", "lettering", OURS, 1.0).result
    assert report.startswith("Kept out: red, text, letters,") and "'red' (" in report and "in all steps" in report
    assert same(negative, text_encoders.encode(lab_clip, ", ".join(["red", *PRESETS["lettering"]])))
    windowed, _, report = Filter.execute(lab_clip, "a red star", "red", "none", OURS, 1.0, start_percent=0.2, end_percent=0.6).result
    assert [(one["start_percent"], one["end_percent"]) for _, one in windowed] == [
        (0.0, 0.2),
        (0.2, 0.6),
        (0.6, 1.0),
    ] and "0.2 to 0.6" in report
    plain, _, report = Filter.execute(lab_clip, "a red star", "", "none", OURS, 1.0).result
    assert same(plain, text_encoders.encode(lab_clip, "a red star")) and "Nothing done" in report
    with pytest.raises(FilterError, match="no text encoder"):
        Filter.execute(None, "a red star", "red", "none", OURS, 1.0)


# --- what is drawn ----------------------------------------------------------------------------------------------------------------

COLOUR_OF = ("red", "crimson", "ruby", "the colour of blood")


def test_words_may_point_to_a_concept_together(lab_clip):
    """Words that a search found: none of them is enough, and in a text without them nothing is flagged."""
    seat, reader = seats(lab_clip)[0], Reader(lab_clip)
    text = "there is a large striped {} heart in the centre with a grey background"
    prompt = Prompt(lab_clip, text.format("romantic ability four golf ep"))
    found = find(reader, seat, prompt, ["red"], GATE)
    assert {"romantic", "four"} <= {one.word.text for one in found}
    window, ear = prompt.windows[seat.key][0], Ear(reader, seat, ["red"])
    for one in found:
        with_it, without_it = reader.rows(seat, [window, without(window, one.word.at)])[0]
        share, cosine = ear.heard(brought(seat, with_it, without_it, one.word.at)[None])
        assert share < GATE or cosine < COSINE
    assert not find(reader, seat, prompt, ["red"], 1.4 * GATE)  # what is enough of them goes with the gate
    assert not find(reader, seat, Prompt(lab_clip, text.format("blue")), ["red"], GATE)


def test_what_words_bring_to_rows():
    """A CLIP's rows behind the words, a T5's all: by hand."""
    clip, t5 = (Seat("x", "x", None, False, None, causal) for causal in (True, False))
    rows, less = torch.arange(10.0).view(5, 2) ** 2, torch.zeros(5, 2)
    assert torch.equal(brought(clip, rows, less, [1, 2]), rows[3:].mean(0))
    assert torch.equal(brought(clip, rows, less, [1, 3]), rows[[2, 4]].mean(0))
    assert torch.equal(brought(t5, rows, less, [1]), rows[:4].sum(0))


def test_words_are_found_in_english():
    """The words that bring a concept, and none in prompts without it, whatever else these say."""
    reader = _english.English(_english.installed())
    nudity = PRESETS["nudity"]
    for text, word in (
        ("a naked man on a beach", "naked"),
        ("an oil painting of a nude woman", "nude"),
        ("a pornographic photo", "pornographic"),
    ):
        assert word in [found.word.text for found in _english.flagged(reader, text, nudity, GATE)]
    harmless = [*_english.ordinary(20, seed=5), "a bouquet of tulips, studio ghibli mood", "sunflowers in a desert canyon, macro shot"]
    assert not any(_english.flagged(reader, text, nudity, GATE) for text in harmless)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_what_is_kept_out_is_not_drawn(cfg, lab_clip):
    """On the lab's UNet: 24 requests in four ways, nine of ten drawn red without the filter, next to none with it; at CFG 1, too."""
    model, eye = lab.load("unet"), Eye.load()
    asked = [
        f"a large {shape} in {colour} {place} on a {ground} background"
        for colour in COLOUR_OF
        for shape, place, ground in (
            ("star", "on the left", "grey"),
            ("square", "in the centre", "white"),
            ("heart", "on the right", "black"),
        )
    ] * 2

    def red(contexts):
        drawn = draw_contexts(model, contexts, cfg=cfg)
        return sum(any(seen.colour == "red" for seen in reading.objects) for reading in eye.read(drawn)) / len(contexts)

    guarded = [keep_out(lab_clip, text, ["red"], Settings()) for text in asked]
    assert all(done.window for done in guarded)
    assert red([text_encoders.encode(lab_clip, text)[0][0] for text in asked]) >= 0.9
    assert red([done.conditioning[0][0] for done in guarded]) <= 0.05


def draw_contexts(loaded, contexts: list[torch.Tensor], *, cfg: float) -> torch.Tensor:
    """Pictures of 64 pixels, each from noise of its own."""
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(len(contexts))])
    empty = text_encoders.encode(loaded.clip, "")
    with torch.inference_mode():
        latent = comfy.sample.sample(
            loaded.model, noise, 20, cfg, "euler", "normal", [[torch.cat(contexts), {}]], empty, torch.zeros_like(noise), disable_pbar=True
        )
        return loaded.vae.decode(latent).cpu()
