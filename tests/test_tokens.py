"""Text to ids and back with three kinds of tokenizer, each made here in a moment: no download."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data import prompts
from pipeline.data.tokens import TokenMap, strip_tags

TEXTS = ["In this picture, the dog on the left belongs to the cat.", "Question: what is it? Answer: a cup and I."] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As GPT-2, LLaMA-3, Qwen: a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As LLaMA-2 and Mistral: puts a space before every text it is given."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator([*TEXTS, "\n"], trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL))
    return tokenizer


def words() -> Tokenizer:
    """Whole words, spaces lost."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return tokenizer


@pytest.fixture(params=[byte_level, metaspace, words], ids=lambda make: make.__name__)
def tokens(request) -> TokenMap:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=request.param(), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return TokenMap(fast, len(fast) + 6, 4)


def test_ids_follow_the_model_s_own_rows(tokens):
    base = tokens.base_vocab
    assert [tokens.obj_id(i) for i in (1, 4)] == [base, base + 3]
    assert (tokens.gen_id, tokens.image_id, tokens.new_tokens) == (base + 4, base + 5, 5)
    assert [tokens.object_number(i) for i in (base - 1, base, base + 3, base + 4)] == [None, 1, 4, None]
    with pytest.raises(ValueError, match="outside 1..4"):
        tokens.obj_id(5)


@pytest.mark.parametrize(
    "text",
    [
        "the dog <OBJ-1>, the cat <OBJ-2> and the cup <OBJ-3>.",
        "In this picture, the dog <OBJ-1> belongs to the cat <OBJ-2>",
        "<OBJ-1> is a dog",
        "a dog. <OBJ-1> <OBJ-2>",
        "<GEN>",
    ],
)
def test_text_with_tags_comes_back(tokens, text):
    ids = tokens.encode(" " + text, continued=True)
    # A tokenizer of whole words has lost where spaces were between its own words; that is not the tags' affair.
    decoded = tokens.decode([tokens.bos_id, *ids, tokens.eos_id, tokens.pad_id])
    assert decoded == tokens.decode(ids)
    assert decoded.replace(" ,", ",").replace(" .", ".") == text


def test_aliases_and_image_slots(tokens):
    assert tokens.encode("<LCL-2><GLB><image>") == [tokens.obj_id(2), tokens.gen_id, tokens.image_id]
    with pytest.raises(ValueError, match="raise max_objects"):
        tokens.encode("<OBJ-9>")


def test_prompt_and_answer_apart_equal_the_whole(tokens):
    prompt, answer = prompts.dialogue("what is it?"), " the dog <OBJ-1>, the cat <OBJ-2>."
    apart = tokens.encode(prompt) + tokens.encode(answer, continued=True)
    assert apart == tokens.encode(prompt + answer)


def test_ids_are_those_of_the_tokenizers_own_call(tokens):
    for text in (*TEXTS, "", "Two  spaces, </s> and\nlines.", "Ünïcödé 猫"):
        assert tokens.encode(text) == tokens.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_truncation_that_a_tokenizer_brings_along_is_not_applied():
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    ids = TokenMap(fast, len(fast) + 6, 4).encode(TEXTS[0])
    assert fast.decode(ids) == TEXTS[0]


def test_a_mismatched_tokenizer_is_refused(tokens):
    with pytest.raises(ValueError, match="they do not belong together"):
        TokenMap(tokens.tokenizer, len(tokens.tokenizer) - 1, 4)
    with pytest.raises(ValueError, match="max_objects"):
        TokenMap(tokens.tokenizer, 10**6, 0)


def test_tags_in_free_text_are_removed():
    assert strip_tags("a <GEN> dog <image><OBJ-3>, <LCL-1> yes") == "a dog, yes"


def test_phrases_and_prefix():
    assert prompts.join_phrases(["a"]) == "a"
    assert prompts.join_phrases(["a", "b", "c"]) == "a, b and c"
    assert prompts.image_prefix("", 3) == "<image><image><image>"
    assert prompts.image_prefix("x <image> y <image>", 2) == "x <image> y <image>"
    with pytest.raises(ValueError, match="holds 1 <image> slots but the picture gives 2 tokens"):
        prompts.image_prefix("<image>", 2)
    assert len({*prompts.CAPTION, *prompts.REFERRING, *prompts.GENERATION}) == 9
