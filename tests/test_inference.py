"""The Python API: answers with objects, batches, shared work, streaming, neurons, pictures of every kind."""

import io
import threading

import numpy as np
import pytest
import torch
from mini_answers import ANSWERS, TWO, mini_checkpoint, saying, scene
from PIL import Image

from pipeline.data.order import Item
from pipeline.inference import NeuralTuner
from pipeline.inference.neurons import recorded
from pipeline.inference.phrases import read_answer
from pipeline.mini.source import MiniSource

QUESTIONS = [
    "Which object is highest?",
    "Which is the only large object?",
    "What lies in the left half?",
    "How many circles are there?",
    "Which two objects have the same colour?",
    "Which object could roll away?",
    "Which object has the colour of grass?",
    "Which object is farthest to the left?",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return NeuralTuner.from_pretrained(mini_checkpoint(tmp_path_factory.mktemp("run")))


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "tagged, phrases",
    [
        ("It is the large red circle <OBJ-1>.", ["the large red circle"]),
        ("They are the cat <OBJ-1> and the dog <OBJ-2>.", ["the cat", "the dog"]),
        (
            "The woman in the red dress <OBJ-1> is next to a man in a hat <OBJ-2>.",
            ["The woman in the red dress", "a man in a hat"],
        ),
        ("Two: the star<OBJ-2> and its twin <OBJ-1>.", ["the star", "its twin"]),
        ("People <OBJ-1>, cars <OBJ-2> and trees <OBJ-3>", ["People", "cars", "trees"]),
        ("The black and white cat <OBJ-1>", ["The black and white cat"]),
        ("The cat sleeps. <OBJ-1> <OBJ-2>", [None, None]),
        ("<OBJ-1> <OBJ-1> <GEN>", [None]),
        ("No such thing.", []),
    ],
)
def test_phrases_of_an_answer(tagged, phrases):
    text, mentions = read_answer(tagged)
    assert "<" not in text
    assert [mention.span and text[slice(*mention.span)] for mention in mentions] == phrases
    assert len({mention.number for mention in mentions}) == len(mentions)


def test_an_answer_names_and_marks_its_objects_at_the_pictures_own_size(model):
    with saying(model):
        answer = model.reason(png(Image.new("RGB", (403, 201), "navy")), "Which object is highest?")
    assert answer.text == "it is the large red circle, and a small star."
    assert answer.tagged == TWO
    assert answer.size == (201, 403)
    first, second = answer.objects
    assert [first.phrase, second.phrase] == ["the large red circle", "a small star"]
    assert answer.text[slice(*second.span)] == "a small star"
    assert first.mask.shape == second.mask.shape == (201, 403)
    assert first.mask[:, :98].all() and not first.mask[:, 104:].any()
    assert second.mask[:, 104:198].all() and not second.mask[:, :98].any()
    assert first.box[0] == 0 and abs(first.box[2] - 403 / 4) < 3 and first.box[3] == 201
    assert 0 < first.score < 1 / (1 + np.exp(-5.0)) + 1e-6
    assert not answer.nothing_found


def test_the_score_is_the_tokens_chance_times_the_masks_mean_probability(model):
    seen, inner = [], model.tuner.generate
    with saying(model):
        forced = model.tuner.generate
        model.tuner.generate = lambda *a, **k: seen.append(forced(*a, **k)) or seen[-1]
        answer = model.reason(scene(0), "Which object is highest?")
    assert model.tuner.generate == inner
    chances = seen[0][0].object_chances
    assert [each.score for each in answer.objects] == pytest.approx([c / (1 + np.exp(-5.0)) for c in chances])


def test_no_such_object(model):
    with saying(model, ANSWERS | {"referring": "there are no such objects."}):
        none = model.segment(scene(0), "the green star")
    assert none.nothing_found and none.objects == none.left_out == []
    with saying(model):
        unsure = model.segment(scene(0), "the red circle", min_score=1.0)
    assert unsure.nothing_found and len(unsure.left_out) == 1
    with saying(model):
        handle = model.tuner.mask_decoder.register_forward_hook(lambda _, inputs, out: torch.full_like(out, -1.0))
        empty = model.segment(scene(0), "the red circle")
        handle.remove()
    assert empty.nothing_found and empty.left_out[0].box is None and empty.left_out[0].score == 0


def test_batches_of_one_and_of_eight_answer_alike(model):
    """With the decoder's own masks, whose states depend on padding and on the prefix's cache if anything is wrong."""
    pictures = [scene(i) for i in range(8)]

    def ask(**options):
        free = model.reason(pictures, QUESTIONS, max_new_tokens=10, **options)
        with saying(model, masks=False):
            return free, model.reason(pictures, QUESTIONS, **options)

    (free_one, one), (free_eight, eight) = ask(batch_size=1), ask(batch_size=8)
    assert [a.tagged for a in free_one] == [a.tagged for a in free_eight]
    assert len({a.tagged for a in free_one}) > 1
    for a, b in zip(one, eight, strict=True):
        assert len(a.objects) + len(a.left_out) == 2
        for p, q in zip(a.objects + a.left_out, b.objects + b.left_out, strict=True):
            assert p.score == pytest.approx(q.score, abs=1e-5)
            # A pixel whose logit is 0 to the last bit may fall either way.
            assert (p.mask != q.mask).mean() < 1e-3


def test_questions_about_one_picture_share_its_features_and_prefix(model):
    alone = [model.reason(scene(3), question, max_new_tokens=10) for question in QUESTIONS]
    looked, read = [], []

    def count(module, args, kwargs):
        ids = kwargs.get("input_ids")
        read.append((kwargs["inputs_embeds"] if ids is None else ids).shape[:2])

    handles = [
        model.loaded.vision.register_forward_pre_hook(lambda _, args: looked.append(len(args[0]))),
        model.tuner.llm.model.register_forward_pre_hook(count, with_kwargs=True),
    ]
    together = model.reason(scene(3), QUESTIONS, max_new_tokens=10)
    for handle in handles:
        handle.remove()
    assert [a.tagged for a in together] == [a.tagged for a in alone]
    assert looked == [1], "CLIP sees a picture once"
    (prefix_rows, prefix), (rows, rest) = [(int(b), int(t)) for b, t in read if t > 1][:2]
    assert (prefix_rows, rows) == (1, len(QUESTIONS))
    assert prefix > 2 * 16 and rest < prefix, "the picture's tokens are read once, then the questions alone"


def test_questions_about_two_pictures_keep_to_their_own(model):
    first, second = model.look(scene(3)), model.look(scene(5))
    with saying(model, masks=False):
        alone = [model.reason(look, QUESTIONS[i]) for i, look in enumerate((first, second, second, first))]
        together = model.reason([first, second, second, first], QUESTIONS[:4])
    scores = [[each.score for each in answer.objects + answer.left_out] for answer in alone]
    assert scores[0] != pytest.approx(scores[1], rel=1e-2)
    for answer, wanted in zip(together, scores, strict=True):
        assert [each.score for each in answer.objects + answer.left_out] == pytest.approx(wanted, rel=1e-3)


def test_prompts_are_those_of_evaluation(model):
    """Free questions and a data set's samples become the same tokens and pixels."""
    sample = MiniSource().load("test", 4)
    collator = model.loaded.collator
    wanted = collator.prompts([(sample, Item(sample=4, task="reasoning", epoch=0))])
    made, shared = collator.ask(["x"], "reasoning", [sample.question], answer=64)
    assert torch.equal(made.input_ids, wanted.input_ids) and torch.equal(made.attention_mask, wanted.attention_mask)
    assert 0 < shared < made.input_ids.shape[1]
    pixels, size = model._pixels(sample.image)
    assert torch.equal(pixels, wanted.pixel_values[0]) and size == wanted.references[0]["size"]


def test_streamed_words_are_the_answers_words(model):
    streamer, found = model.streamer(timeout=60), []
    with saying(model):
        thread = threading.Thread(
            target=lambda: found.append(model.reason(scene(0), "Which is it?", streamer=streamer)), daemon=True
        )
        thread.start()
        pieces = list(streamer)
        thread.join(60)
    assert len(pieces) > 5
    assert "".join(pieces) == found[0].tagged == TWO
    with pytest.raises(ValueError, match="a streamer follows one answer"):
        model.reason(scene(0), ["a", "b"], streamer=model.streamer())


def test_sampled_answers_are_repeatable(model):
    def draw(seed):
        return model.caption(scene(0), do_sample=True, temperature=5.0, seed=seed, max_new_tokens=12).tagged

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state()), "the caller's own draws are not disturbed"


def test_neurons_that_fired(model):
    networks = model.tuner.networks
    with saying(model), recorded(networks) as firing:
        answer = model.reason(scene(0), "Which object is highest?")
    assert firing.counts.shape == (len(networks), networks[0].z_dim)
    # One reading of the prompt and one of each word but the end token.
    assert firing.tokens == len(model.token_map.encode(answer.tagged)) + 1
    assert (firing.counts.sum(1) >= firing.tokens * networks[0].n_active).all()
    assert firing.counts.sum() < firing.counts.size * firing.tokens, "units below the threshold do not count"
    assert all(network.observe is None for network in networks)
    unit, share = firing.most_active(0, 1)[0]
    assert share == firing.shares[0].max() == firing.shares[0][unit]


def test_drawing(model):
    texts = ["a large red circle", "a small blue star at the top left"]
    with saying(model):
        alone = model.generate(texts[0], n=2, seed=3, candidates=1)
        together = model.generate(texts, n=2, seed=3, candidates=1)
        other = model.generate(texts[0], n=2, seed=4, candidates=1)
    assert [image.size for image in alone.images()] == [(64, 64)] * 2
    assert alone.pictures[0] != alone.pictures[1]
    assert alone.pictures == together[0].pictures != other.pictures
    with saying(model, ANSWERS | {"generation": "a red circle."}):
        assert model.generate("a red circle").pictures == []
    with pytest.raises(ValueError, match="n, the number of pictures"):
        model.generate("a red circle", n=0)


def test_pictures_of_every_kind(model):
    wide = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, _ = model._pixels(png(wide))
    for same in (wide, np.asarray(wide), png(wide.convert("RGBA")), png(wide.convert("RGBA"), format="PNG")):
        pixels, size = model._pixels(same)
        assert size == (40, 60) and torch.equal(pixels, plain)
    turned, size = model._pixels(png(wide, format="JPEG", exif=exif, quality=100, subsampling=0))
    assert size == (60, 40)
    upright, _ = model._pixels(wide.rotate(-90, expand=True))
    assert (turned - upright).abs().mean() < 0.05 < (turned - plain).abs().mean()
    assert model._pixels(png(wide.convert("CMYK"), format="JPEG"))[1] == (40, 60)
    deep = Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) << 8)
    assert model._pixels(deep)[0].std() > 0.1


@pytest.mark.parametrize("device_dtype", [torch.bfloat16])
def test_the_language_model_runs_in_another_dtype(model, device_dtype):
    half = NeuralTuner.from_pretrained(model.loaded.trained.folder, dtype=device_dtype)
    assert half.tuner.llm.model.layers[0].layer.self_attn.q_proj.weight.dtype == device_dtype
    assert half.tuner.mask_decoder.decoder.film_mul.weight.dtype == torch.float32
    with saying(half):
        assert len(half.reason(scene(0), ["Which object is highest?", "What lies left?"])[1].objects) == 2


def test_a_static_cache_answers_as_the_growing_one_does(model):
    wanted = model.reason(scene(0), QUESTIONS[:2], max_new_tokens=8, batch_size=1)
    got = model.reason(scene(0), QUESTIONS[:2], max_new_tokens=8, batch_size=1, cache_implementation="static")
    assert [a.tagged for a in got] == [a.tagged for a in wanted]
