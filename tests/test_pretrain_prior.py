"""pretrain_prior.py as it is typed: from packed pictures to a folder for --prior, over a resume on other ranks."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.batch import PictureBatch
from pipeline.data.order import Item
from pipeline.data.pictures import PictureCollator
from pipeline.data.schema import Sample
from pipeline.mini.source import foundation_folder
from pipeline.model.losses import Norms
from pipeline.model.painter import Painter, Sampling
from pipeline.model.prior import ImagePrior, PriorConfig
from pipeline.model.prior_training import Coded, PriorTuner
from pipeline.model.vision import VisionTower
from pipeline.runtime.ranks import free_port
from pipeline.scoring.pictures import embed_pictures

REPO = Path(__file__).resolve().parent.parent
MMUD = REPO / "tests" / "data" / "mmud"


class Job:
    """A run of pretrain_prior.py on packed MMUD pictures with the mini world's CLIP and VQGAN."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MLFLOW_TRACKING_URI")}
        self.env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{self.env.get('PATH', '')}"}
        packed = ["--source", "mmud", "--mmud_root", MMUD, "--image_root", MMUD / "images", "--workers", "1"]
        self.start(sys.executable, "pipeline/shard_mmud.py", *packed, "--out", root / "shards")

    def start(self, *words: object, code: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in words], cwd=REPO, env=self.env, capture_output=True, text=True, timeout=550
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def flags(self, folder: str, *more: object) -> list[object]:
        sizes = ["--layers", 2, "--width", 96, "--global_batch", 2, "--max_steps", 4, "--save_steps", 2]
        sizes += ["--logging_steps", 1, "--num_workers", 0, "--warmup_ratio", 0, "--condition_noise", 0, "--lr", 2e-3]
        return ["--data", self.root / "shards", "--output_dir", self.root / folder, *sizes, *more]

    def losses(self, folder: str) -> list[float]:
        lines = [
            json.loads(line)["metrics"] for line in (self.root / folder / "metrics.jsonl").read_text().splitlines()
        ]
        return [line["loss"] for line in lines if "loss" in line]


def test_from_pictures_to_a_prior_over_other_ranks(tmp_path: Path) -> None:
    job = Job(tmp_path)
    alone = [sys.executable, "pipeline/pretrain_prior.py", "--deepspeed", "ds_configs/z2.json"]
    told = job.start(*alone, *job.flags("one", "--eval_steps", 2))
    assert f"{tmp_path / 'one' / 'prior'}, for --prior" in told
    whole = job.losses("one")
    assert len(whole) == 4
    assert whole[0] == pytest.approx(math.log(512), rel=0.05)
    assert whole[-1] < whole[0]
    valid = [line for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines() if "valid/ce" in line]
    assert len(valid) == 2

    # What two ranks under ZeRO-3 make of the second half, from the first half of one rank under ZeRO-2.
    (tmp_path / "two").mkdir()
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    launcher = Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", free_port()
    more = "--deepspeed", "ds_configs/z3.json"
    job.start(*launcher, "pipeline/pretrain_prior.py", *job.flags("two", "--micro_batch", 1, *more))
    assert job.losses("two") == pytest.approx(whole[2:], rel=1e-5)
    one, two = (ImagePrior.load(tmp_path / name / "prior") for name in ("one", "two"))
    assert one.config == PriorConfig(
        embed_dim=128, n_codes=512, n_tokens=64, width=96, layers=2, heads=6, dropout=0.0, condition_slots=16
    )
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, two.state_dict()[name], atol=2e-5), name

    # It takes the place of the mini prior beside the mini VQGAN and CLIP.
    folder = foundation_folder()
    vision = VisionTower.from_local(f"local-dir:{folder / 'clip'}")
    embed = partial(embed_pictures, vision)
    sampling, device = Sampling(candidates=1), torch.device("cpu")
    place = str(tmp_path / "one/prior"), str(folder / "vqgan")
    painter = Painter.load(*place, embed, vision.embed_dim, sampling, device)
    assert painter.paint(torch.randn(1, 128), seed=0)[0].startswith(b"\x89PNG")

    told = job.start(*alone, *job.flags("one", "--heads", 4), code=2)
    assert "heads: 6 -> 4" in told
    told = job.start(*alone, *job.flags("other", "--preset", "clipgen"), code=2)
    assert "preset clipgen needs --vqgan, --clip_weights" in told


def test_the_frozen_models_see_what_they_were_trained_on() -> None:
    """CLIP's view and the decoder's are the whole picture, squashed, each in its own scale of values."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    data = io.BytesIO()
    picture.save(data, "PNG")
    sample = Sample(
        key="a",
        image=data.getvalue(),
        image_format="png",
        height=40,
        width=60,
        caption="a",
        question="",
        answer="",
        objects=(),
        source="test",
    )
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    collator = PictureCollator(clip_size=16, mean=mean, std=std, decoder_size=32, n_codes=9)
    item = Item(0, 0, "generation")
    batch = collator([(sample, item), (dataclasses.replace(sample, key="b", image=b"cut"), item)], ["c: gone"])
    assert batch.keys == ["a"]
    assert [line[:2] for line in batch.skipped] == ["c:", "b:"]
    seen, coded = batch.pixel_values
    assert batch.counts().tokens == 9
    for pixels, side, middle, scale in ((seen, 16, mean, std), (coded, 32, (0.5,) * 3, (0.5,) * 3)):
        small = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        wanted = (small - np.float32(middle)) / np.float32(scale)
        assert torch.allclose(pixels[0], torch.from_numpy(wanted).permute(2, 0, 1), atol=1e-5)
    assert coded.abs().max() <= 1
    empty = collator([])
    assert (empty.keys, empty.counts().tokens, len(empty.pixel_values[0])) == ([], 0, 1)


def test_the_loss_is_the_priors_and_an_empty_batch_weighs_nothing() -> None:
    torch.manual_seed(0)
    config = PriorConfig(embed_dim=3, n_codes=7, n_tokens=4, width=16, layers=1, heads=2, dropout=0.0)
    model = PriorTuner(ImagePrior(config), condition_noise=0.5).eval()
    features = Coded(torch.randn(2, 3), torch.randint(7, (2, 4)))
    pixels = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    batch = PictureBatch(keys=["a", "b"], pixel_values=pixels, attention_mask=torch.ones(2, 4, dtype=torch.long))
    loss, sums = model(batch, features, Norms(tokens=8, masks=0, pictures=0))
    assert loss.item() == pytest.approx(model.prior.loss(features.embedding, features.codes).item(), rel=1e-6)
    assert sums["tokens"] == 8
    empty = dataclasses.replace(batch, keys=[], attention_mask=torch.zeros(2, 4, dtype=torch.long))
    loss, sums = model(empty, features, Norms(tokens=8, masks=0, pictures=0))
    loss.backward()
    assert loss == sums["tokens"] == 0
    # Noise only while training.
    assert torch.equal(
        model(batch, features, Norms(tokens=8, masks=0, pictures=0))[0],
        model(batch, features, Norms(tokens=8, masks=0, pictures=0))[0],
    )
    model.train()
    assert model(batch, features, Norms(tokens=8, masks=0, pictures=0))[0] != loss
    grouped = [id(p) for group in model.parameter_groups(1e-3, 0.01) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
