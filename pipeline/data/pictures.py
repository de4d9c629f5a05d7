"""From samples to batches of pictures alone, for the image prior: what CLIP sees and what the image decoder codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.data.batch import PictureBatch
from pipeline.data.images import load, pixels_of
from pipeline.data.order import Item
from pipeline.data.schema import Sample

_HALF = (0.5, 0.5, 0.5)


class PictureCollator:
    """Samples to a PictureBatch; a damaged picture is left out and named. Both views are squashed to their square.

    clip_size, mean, std: CLIP's input and its normalisation. decoder_size: side of the image decoder's pictures.
    n_codes: codes of a picture.
    """

    def __init__(
        self, *, clip_size: int, mean: Sequence[float], std: Sequence[float], decoder_size: int, n_codes: int
    ) -> None:
        self.clip_size, self.mean, self.std = clip_size, tuple(mean), tuple(std)
        self.decoder_size, self.n_codes = decoder_size, n_codes

    def __call__(self, pairs: Sequence[tuple[Sample, Item]], skipped: Sequence[str] = ()) -> PictureBatch:
        """One batch; `skipped` names what could not be read before."""
        keys, seen, coded, left_out = [], [], [], list(skipped)
        for sample, _ in pairs:
            try:
                picture = load(sample.image, draft=2 * max(self.clip_size, self.decoder_size))
            except ValueError as error:
                left_out.append(f"{sample.key}: {error}")
                continue
            keys.append(sample.key)
            seen.append(pixels_of(picture, image_size=self.clip_size, mean=self.mean, std=self.std))
            coded.append(pixels_of(picture, image_size=self.decoder_size, mean=_HALF, std=_HALF))
        mask = torch.ones(len(keys), self.n_codes, dtype=torch.long)
        if not keys:
            seen.append(torch.zeros(3, self.clip_size, self.clip_size))
            coded.append(torch.zeros(3, self.decoder_size, self.decoder_size))
            mask = torch.zeros(1, self.n_codes, dtype=torch.long)
        return PictureBatch(
            keys=keys,
            pixel_values=(torch.stack(seen), torch.stack(coded)),
            attention_mask=mask,
            skipped=left_out,
        )
