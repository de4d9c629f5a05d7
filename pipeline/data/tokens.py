"""Text to token ids and back, with the task tokens <OBJ-1>..<OBJ-N> and <GEN> and the picture's slots.

The task tokens are no part of the tokenizer: their ids follow the rows of the language model's own embedding, so that
the tokenizer's files stay as published. Rows of the extended embedding and head:

    0 .. base_vocab-1                    the language model's own
    base_vocab .. +max_objects-1         <OBJ-1> .. <OBJ-max_objects>
    base_vocab + max_objects             <GEN>
    base_vocab + max_objects + 1         an image slot: an id without a row, filled by the image projector

<LCL-i> and <GLB>, the names in the MMUD files and the released code, are read as <OBJ-i> and <GEN>.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.prompts import IMAGE_SLOT

TAG = re.compile(r"<(?:OBJ|LCL)-([0-9]{1,6})>|<(?:GEN|GLB)>|<image>")
_SENTINEL = "\n"


def strip_tags(text: str) -> str:
    """`text` without any task tag or image slot, and without the space before each: for text that may hold none."""
    return re.sub(rf"\s*(?:{TAG.pattern})", "", text).strip()


class TokenMap:
    """Ids for text with tags. `tokenizer` is a Hugging Face fast tokenizer, `base_vocab` the number of rows of the
    language model's input embedding (which may be more than the tokenizer's words)."""

    def __init__(self, tokenizer: Any, base_vocab: int, max_objects: int) -> None:
        if len(tokenizer) > base_vocab:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} words but the model's embedding only {base_vocab} rows: "
                "they do not belong together; check --base"
            )
        if max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, found {max_objects}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.base_vocab = base_vocab
        self.max_objects = max_objects
        self.gen_id = base_vocab + max_objects
        self.new_tokens = max_objects + 1
        self.image_id = base_vocab + max_objects + 1
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        # LLaMA has no padding token; padding is masked everywhere, so the end token serves.
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # transformers' own call around the tokenizers library takes several times as long as the library: each call
        # sets truncation and padding anew, which a tokenizer.json may bring along.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._sentinel_ids = self._find_sentinel()

    def _find_sentinel(self) -> list[int]:
        """Ids of a line break, where they are needed: SentencePiece-like tokenizers put a space before every text
        they are given, so that "." after a tag would become " .". Encoding behind a sentinel and cutting it off
        prevents that. Empty for the tokenizers that add nothing, or where the sentinel does not come off cleanly."""
        first = self.tokenizer.convert_ids_to_tokens(self._plain("a")[:1])
        if not first or not first[0].startswith("▁"):
            return []
        ids = self._plain(_SENTINEL)
        clean = all(self._plain(_SENTINEL + probe)[: len(ids)] == ids for probe in ("a", " a", "."))
        return ids if clean else []

    def _plain(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, text: str) -> list[int]:
        if not self._sentinel_ids:
            return self._plain(text)
        return self._plain(_SENTINEL + text)[len(self._sentinel_ids) :]

    def obj_id(self, number: int) -> int:
        """The id of <OBJ-number>, number = 1..max_objects."""
        if not 1 <= number <= self.max_objects:
            raise ValueError(f"<OBJ-{number}> is outside 1..{self.max_objects}; raise max_objects")
        return self.base_vocab + number - 1

    def object_number(self, token_id: int) -> int | None:
        """i if `token_id` is <OBJ-i>, else None."""
        number = token_id - self.base_vocab + 1
        return number if 1 <= number <= self.max_objects else None

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of `text`, no begin or end token added. A space right before a tag belongs to the tag.

        `continued`: the text goes on after other text, so the tokenizer must not add a space of its own before it.
        """
        ids: list[int] = []
        position = 0
        for tag in TAG.finditer(text):
            ids += self._piece(text[position : tag.start()].removesuffix(" "), continued)
            ids.append(self._tag_id(tag))
            position, continued = tag.end(), True
        return ids + self._piece(text[position:], continued)

    def _piece(self, text: str, continued: bool) -> list[int]:
        if not text:
            return []
        return self._continued(text) if continued else self._plain(text)

    def _tag_id(self, tag: re.Match[str]) -> int:
        if tag[0] == IMAGE_SLOT:
            return self.image_id
        return self.obj_id(int(tag[1])) if tag[1] else self.gen_id

    def tag_text(self, token_id: int) -> str | None:
        """The tag of a task token or image slot; None for a word."""
        number = self.object_number(token_id)
        if number is not None:
            return f"<OBJ-{number}>"
        return {self.gen_id: "<GEN>", self.image_id: IMAGE_SLOT}.get(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: tags as <OBJ-i> and <GEN> with one space before each, begin, end and padding left out."""
        text = ""
        words: list[int] = []
        for token_id in ids:
            tag = self.tag_text(int(token_id))
            if tag is None:
                if token_id not in (self.bos_id, self.eos_id, self.pad_id):
                    words.append(int(token_id))
                continue
            text = self._joined(text, words) + ("" if not text and not words else " ") + tag
            words = []
        return self._joined(text, words).strip()

    def _joined(self, text: str, words: Sequence[int]) -> str:
        if not words:
            return text
        piece = self.tokenizer.decode(list(words), skip_special_tokens=True)
        # Tokenizers differ in whether the first word of a decoded run keeps its space.
        gap = " " if text and piece and piece[0].isalnum() else ""
        return text + gap + piece
