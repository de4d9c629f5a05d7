"""Text while it is written: a streamer for transformers' `generate` that knows the task tokens."""

from __future__ import annotations

from typing import Any

from transformers import TextIteratorStreamer

from pipeline.data.tokens import TokenMap


class AnswerStreamer(TextIteratorStreamer):
    """Iterates over an answer's text, tags included, as whole words come; another thread runs the model.

        streamer = model.streamer()
        thread = threading.Thread(target=model.reason, args=(picture, question), kwargs={"streamer": streamer})

    Args:
        timeout: seconds to wait for the next word before `queue.Empty` is raised; None waits for ever.
    """

    def __init__(self, token_map: TokenMap, timeout: float | None = None) -> None:
        # TextStreamer asks its tokenizer for `decode` alone.
        tokenizer: Any = token_map
        super().__init__(tokenizer, skip_prompt=True, timeout=timeout)
