"""Scores of a set of pictures against a set of true ones: FID, KID and IS, with torchmetrics' arithmetic.

FID, KID and IS are defined by one network, the Inception v3 of 2015-12-05; features of any other give other figures.
`Inception` therefore reads its weights from a file that it knows by its sha256 and takes no other. The same distances
in the space of the run's CLIP are named CLIP Fréchet and CLIP kernel distance, never FID or KID.

torchmetrics is given features instead of pictures (its metrics take any module for the network, here none), so that
features are computed once, saved with the predictions, and scored again without a network. They are all there on the
first rank, which scores alone: its metrics must not wait for the others (sync_on_compute). Its random draws (KID's
subsets, IS's splits) are seeded here.

Letters in shapes: n pictures, E features, C classes.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

INCEPTION_SHA256 = "6726825d"
"""The first digits of the sha256 of weights-inception-2015-12-05-6726825d.pth (torch-fidelity's release v0.2.0)."""
KID_SUBSETS, KID_SUBSET = 100, 1000
IS_SPLITS = 10


class Inception:
    """The Inception v3 that FID, KID and IS are defined by: pictures -> pool features [n,2048] and logits [n,1008].

    Raises:
        ValueError: the file is missing or holds other weights.
    """

    def __init__(self, weights: str | Path, device: torch.device) -> None:
        path = Path(weights)
        if not path.is_file():
            raise ValueError(f"--inception_weights {path}: there is no such file")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(INCEPTION_SHA256):
            raise ValueError(
                f"--inception_weights {path} has sha256 {digest[:8]}..., not {INCEPTION_SHA256}...: FID, KID and IS "
                "are figures of the one Inception of 2015-12-05 (weights-inception-2015-12-05-6726825d.pth); leave the "
                "flag out to go without them"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.device = device
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        ).to(device)
        self.network.eval()

    def __call__(self, pictures: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(pool features [n,2048], logits without bias [n,1008]) of picture files, float32.

        Each picture goes alone, since their sizes differ; the network takes it to 299 x 299 as the original graph did.
        """
        rows = []
        for picture in pictures:
            pixels_HWC = torch.from_numpy(np.array(Image.open(io.BytesIO(picture)).convert("RGB")))
            with torch.no_grad():
                found = self.network(pixels_HWC.permute(2, 0, 1)[None].to(self.device))
            rows.append([part[0].float().cpu() for part in found])
        pools, logits = (torch.stack(list(parts)).numpy() for parts in zip(*rows, strict=True))
        return pools, logits


class _Given(nn.Module):
    """In place of a network: features pass through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(true_nE: np.ndarray, made_nE: np.ndarray) -> float | None:
    """Fréchet distance of two sets of features, each taken as a Gaussian, in float64; None with fewer than two of each.

    Of Inception's pool features this is FID. It is biased upwards in small sets: compare equal numbers only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(true_nE), len(made_nE)) < 2:
        return None
    metric = FrechetInceptionDistance(feature=_Given(true_nE.shape[1]), sync_on_compute=False)
    metric.update(torch.from_numpy(true_nE).double(), real=True)
    metric.update(torch.from_numpy(made_nE).double(), real=False)
    return float(metric.compute())


def kernel_distance(true_nE: np.ndarray, made_nE: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Unbiased squared MMD of two sets of features with the kernel (x·y/E + 1)³; of Inception's, this is KID.

    Returns mean and std over 100 random subsets of 1000 (of all, if there are fewer: "subset_size" says how many), None
    with fewer than two of each. Papers print the mean times 1000.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(true_nE), len(made_nE))
    if size < 2:
        return {"mean": None, "std": None, "subset_size": size, "subsets": KID_SUBSETS}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Given(true_nE.shape[1]), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
        metric.update(torch.from_numpy(true_nE).double(), real=True)
        metric.update(torch.from_numpy(made_nE).double(), real=False)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std), "subset_size": size, "subsets": KID_SUBSETS}


def inception_score(logits_nC: np.ndarray, *, seed: int = 0, splits: int = IS_SPLITS) -> dict[str, Any]:
    """Inception score exp(E KL(p(y|x) || p(y))): mean and std over `splits` random parts; None with fewer pictures.

    Parts are equal but for the last, so that a few pictures make fewer of them: "splits" says how many there were.
    """
    from torchmetrics.image.inception import InceptionScore

    if len(logits_nC) < splits:
        return {"mean": None, "std": None, "splits": splits}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        metric = InceptionScore(feature=_Given(logits_nC.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(torch.from_numpy(logits_nC).double())
        mean, std = metric.compute()
    # As torchmetrics cuts them.
    return {"mean": float(mean), "std": float(std), "splits": len(torch.arange(len(logits_nC)).chunk(splits))}
