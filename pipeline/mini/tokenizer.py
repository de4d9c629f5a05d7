"""The word-level tokenizer that the mini LLM and the mini CLIP share, in Hugging Face's form."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.mini.grammar import VOCABULARY


def build_tokenizer(*, add_special_tokens: bool) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer over `VOCABULARY`; punctuation marks are tokens of their own.

    Args:
        add_special_tokens: put <s> ... </s> round every text, as the CLIP text tower wants.
    """
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[,.?:]"), behavior="isolated")]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if add_special_tokens:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
