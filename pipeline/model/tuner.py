"""The tuned model: a frozen LM with sparse networks, new tokens, picture tokens, a mask decoder and a CLIP head.

Training (`forward`), free-running decoding (`generate`) and teacher-forced decoding (`teacher_forced`) share the code
that fills picture slots and hands states to the decoders. The state that PREDICTS a task token, at the position before
it, is the one its decoder gets, in all three.

Each forward calls the same modules in the same order whatever the batch holds, a decoder without work with one row of
weight zero: under ZeRO-3, ranks that call different modules compute with mixed weights or hang.

Shape suffixes: B rows, T tokens, D hidden, R samples, P picture tokens, N labelled tokens, M masks, G pictures, S mask
side, L answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested

from pipeline.data.batch import IGNORE, Batch, PromptBatch, VisionFeatures
from pipeline.model import losses
from pipeline.model.adapters import AdaptedProjection
from pipeline.model.attention import SDPA_VARLEN
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.embedding import ExtendedHead, NewTokenEmbedding, install_new_tokens
from pipeline.model.generation import (
    Generation,
    end_token_ids,
    evaluating,
    find_mentions,
    prefix_cache,
    recorded_states,
    until_end,
)
from pipeline.model.heads import TaskHead, task_losses
from pipeline.model.losses import LossWeights, Norms
from pipeline.model.sparse import SparseNetwork

KINDS = ("sparse", "adapter", "projector", "tokens", "mask_decoder", "clip_head", "heads")
"""The trained parts; each can have a learning rate of its own."""
TASKS = ("reasoning", "referring", "caption", "generation")


class NeuralTuner(nn.Module):
    """An LM already wrapped by `tune_layers` or adapted by PEFT, and all else that is trained. CLIP stays outside."""

    llm: Any

    def __init__(
        self,
        llm: PreTrainedModel,
        *,
        max_objects: int,
        projector: ImageProjector,
        mask_decoder: MaskDecoder,
        clip_head: ClipHead,
        train_embeddings: str = "new",
        tasks: Sequence[str] = TASKS,
        heads: Mapping[str, TaskHead] | None = None,
    ) -> None:
        """Installs max_objects + 1 new tokens in the LM and freezes all but the trained parts.

        train_embeddings: "new", the new tokens' rows (paper); "all", the LM's tables as well (released). tasks: names
        that forward's sums are split by. heads: the tasks' own decoders. Run
        `pipeline.model.initialise.initialise` on the result.
        """
        super().__init__()
        if train_embeddings not in ("new", "all"):
            raise ValueError(f"train_embeddings must be 'new' or 'all', not {train_embeddings!r}")
        embedding, _ = install_new_tokens(llm, max_objects + 1)
        self.llm, self.projector, self.mask_decoder, self.clip_head = llm, projector, mask_decoder, clip_head
        self.heads = nn.ModuleDict(heads or {})
        self.max_objects, self.train_embeddings, self.tasks = max_objects, train_embeddings, tuple(tasks)
        self.first_object = embedding.n_base
        self.image_id = embedding.n_base + embedding.n_new
        self._fired: dict[int, list[Tensor]] = {}
        self.networks = [module for module in llm.modules() if isinstance(module, SparseNetwork)]
        self.freeze()

    def freeze(self) -> None:
        """Leaves gradients to the trained parts alone."""
        self.requires_grad_(False)
        for _, _, parameter in self._trained():
            parameter.requires_grad_(True)

    def _trained(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(kind, name, parameter) of everything that is trained, tied tables once."""
        seen: set[int] = set()
        for name, module in self.named_modules():
            kind, whole = "", True
            if isinstance(module, SparseNetwork):
                kind = "sparse"
            elif isinstance(module, NewTokenEmbedding | ExtendedHead):
                kind, whole = "tokens", self.train_embeddings == "all"
            elif module in (self.projector, self.mask_decoder, self.clip_head):
                kind = name
            elif isinstance(module, TaskHead):
                kind = "heads"
            if isinstance(module, AdaptedProjection):
                kind, own = "adapter", module.adapter_parameters(name)
            else:
                own = module.named_parameters(prefix=name, recurse=whole)
            for path, parameter in own if kind else ():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield kind, path, parameter

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: parameter for _, name, parameter in self._trained()}

    def parameter_groups(
        self, lr: float, *, weight_decay: float = 0.0, lrs: dict[str, float | None] | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups: per kind one with weight decay (matrices) and one without (norms, biases).

        lrs: a kind's own learning rate, `lr` where it is None or missing. Raises ValueError for an unknown kind.
        """
        lrs = lrs or {}
        if unknown := set(lrs) - set(KINDS):
            raise ValueError(f"no such parts to train: {sorted(unknown)}; there are {KINDS}")
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for kind, _, parameter in self._trained():
            # A parameter that ZeRO-3 has cut up shows its true shape here.
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            own = lrs.get(kind)
            group = groups.setdefault(
                (kind, decays),
                {
                    "name": kind if decays else f"{kind}/no_decay",
                    "lr": lr if own is None else own,
                    "weight_decay": weight_decay if decays else 0.0,
                    "params": [],
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    def set_step(self, step: int) -> None:
        """Makes the sparse networks' draws for one optimizer step."""
        for network in self.networks:
            network.set_step(step)

    def watch_units(self, on: bool) -> None:
        """Whether forwards note which sparse units fire; `unit_rates` tells."""
        for network in self.networks:
            network.observe = self._note_units if on else None

    def _note_units(self, layer: int, za_BTZ: Tensor) -> None:
        self._fired.setdefault(layer, []).append((za_BTZ.detach() != 0).flatten(0, -2).float().mean(0))

    def unit_rates(self) -> dict[str, float]:
        """Of the forwards on this rank since the last call: the share of units that fire for a token (padding counts),
        on average and by layer, and the share that fired for any token at all. {} where nothing was watched."""
        fired = {f"activation/layer_{at:02d}": torch.stack(seen).mean(0) for at, seen in sorted(self._fired.items())}
        self._fired.clear()
        if not fired:
            return {}
        # One copy to the host for all figures.
        rates = torch.stack([share_Z.mean() for share_Z in fired.values()])
        used = torch.stack([(share_Z > 0).float().mean() for share_Z in fired.values()]).mean()
        *layers, mean, ever = torch.cat([rates, rates.mean()[None], used[None]]).tolist()
        return dict(zip(fired, layers, strict=True)) | {"activation/mean": mean, "activation/ever": ever}

    def _embed(self, ids_BT: Tensor, features: VisionFeatures, segments_BT: Tensor | None = None) -> Tensor:
        """[B,T,D] embeddings with each sample's picture tokens in its image slots, in order.

        segments_BT: the sample (row of `features`) of each token, whose tokens stand together; None: each row is one.
        """
        if segments_BT is None:
            segments_BT = torch.arange(ids_BT.shape[0], device=ids_BT.device).unsqueeze(1).expand_as(ids_BT)
        embeds_BTD = self.llm.get_input_embeddings()(ids_BT)
        pictures_RPD = self.projector(features.tokens).to(embeds_BTD.dtype)
        slots_BT = ids_BT == self.image_id
        sample_of_slot = segments_BT[slots_BT]
        places = pictures_RPD.shape[1]
        found = set(sample_of_slot.bincount(minlength=1).tolist())
        if found - {0, places}:
            raise ValueError(
                f"samples hold {sorted(found)} image slots, but the projector makes {places} tokens of a picture: "
                "make image_prefix and image_merge / image_cls agree"
            )
        # Row by row, so sample by sample: each has all of its slots or none.
        place_of_slot = torch.arange(sample_of_slot.shape[0], device=ids_BT.device) % places
        return embeds_BTD.masked_scatter(slots_BT.unsqueeze(-1), pictures_RPD[sample_of_slot, place_of_slot])

    def _hidden(self, embeds_BTD: Tensor, mask_BT: Tensor | None, positions_BT: Tensor) -> Tensor:
        """[B,T,D] last states. Without a mask attention is causal within each run of positions (see Batch)."""
        by_sample: dict[str, Any] = {}
        implementation = self.llm.config._attn_implementation
        if mask_BT is None and (implementation == SDPA_VARLEN or is_flash_attention_requested(self.llm.config)):
            (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions_BT)
            if implementation == SDPA_VARLEN:
                by_sample = {"sample_lengths": ends.diff().tolist()}
            else:
                by_sample = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
                by_sample |= dict.fromkeys(("max_length_q", "max_length_k"), int(longest))
        out = self.llm.model(
            inputs_embeds=embeds_BTD, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False, **by_sample
        )
        return out.last_hidden_state

    def _masks(self, features: VisionFeatures, samples_M: Tensor, states_MD: Tensor) -> Tensor:
        return self.mask_decoder(tuple(tap.index_select(0, samples_M) for tap in features.taps), states_MD)

    def forward(
        self, batch: Batch, features: VisionFeatures, norms: Norms, weights: LossWeights | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, sums): loss = Σce/tokens + λseg Σdice/masks + λbce Σbce/masks + λgen Σmse/pictures (Eq. 10).

        features: of batch.pixel_values. sums: detached fp32 scalars, the same keys in every call: ce, dice,
        bce, mse with their counts tokens, masks, pictures, and ce/<task>, tokens/<task>, dice/<task>, masks/<task>.
        """
        weights = weights or LossWeights()
        device = batch.labels.device
        # Logits of labelled positions only: the full [B,T,V] would be the largest tensor of the step. Their places are
        # counted before the LM runs, since counting waits for the GPU.
        rows_N, at_N = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        n_tokens, n_masks, n_pictures = rows_N.shape[0], batch.masks.shape[0], batch.gen_rows.shape[0]
        labels_N, samples_N = batch.labels[rows_N, at_N + 1], batch.segment_ids[rows_N, at_N]
        if not n_tokens:
            rows_N = at_N = torch.zeros(1, dtype=torch.long, device=device)
            labels_N = torch.full((1,), IGNORE, device=device)
        embeds_BTD = self._embed(batch.input_ids, features, batch.segment_ids)
        hidden_BTD = self._hidden(embeds_BTD, None, batch.position_ids)
        logits_NV = self.llm.get_output_embeddings()(hidden_BTD[rows_N, at_N])
        ce_N = losses.answer_losses(logits_NV, labels_N, IGNORE)

        samples_M, states_MD = _states_before(hidden_BTD, batch.segment_ids, batch.mask_rows, batch.mask_positions)
        mask_logits = self._masks(features, samples_M, states_MD)
        masks = batch.masks if n_masks else torch.zeros_like(mask_logits)
        work = 1.0 if n_masks else 0.0
        dice_M = losses.dice_losses(mask_logits, masks) * work
        bce_M = losses.bce_losses(mask_logits, masks) * work

        samples_G, states_GD = _states_before(hidden_BTD, batch.segment_ids, batch.gen_rows, batch.gen_positions)
        embedding_GE = self.clip_head(states_GD)
        target_GE = features.embedding.index_select(0, samples_G)
        if n_pictures and batch.clip_targets is not None:
            target_GE = batch.clip_targets
        mse_G = losses.picture_losses(embedding_GE, target_GE) * (1.0 if n_pictures else 0.0)

        ce, dice, bce, mse = ce_N.sum(), dice_M.sum(), bce_M.sum(), mse_G.sum()
        loss = losses.share(ce, norms.tokens) + weights.seg * losses.share(dice, norms.masks)
        loss = loss + weights.bce * losses.share(bce, norms.masks) + weights.gen * losses.share(mse, norms.pictures)
        of_heads, sums = task_losses(self.heads, batch.values, norms.values, features, samples_M, states_MD)
        loss = loss + of_heads
        counts = {"tokens": n_tokens, "masks": n_masks, "pictures": n_pictures}
        sums |= {"ce": ce.detach(), "dice": dice.detach(), "bce": bce.detach(), "mse": mse.detach()}
        sums |= {name: torch.tensor(float(count), device=device) for name, count in counts.items()}
        sums |= self._by_task("ce", "tokens", batch.tasks, samples_N, ce_N[:n_tokens])
        sums |= self._by_task("dice", "masks", batch.tasks, samples_M[:n_masks], dice_M[:n_masks])
        return loss, sums

    def _by_task(self, name: str, count: str, tasks: list[str], samples: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Sums and counts of values [n] (of the batch's samples [n]) for each task."""
        places = [self.tasks.index(task) if task in self.tasks else len(self.tasks) for task in tasks]
        task_of_sample = torch.tensor(places, dtype=torch.long, device=samples.device)
        total, number = values.new_zeros(2, len(self.tasks) + 1)
        if places:
            total.index_add_(0, task_of_sample[samples], values.detach())
            number.index_add_(0, task_of_sample[samples], torch.ones_like(values))
        sums = {f"{name}/{task}": total[i] for i, task in enumerate(self.tasks)}
        return sums | {f"{count}/{task}": number[i] for i, task in enumerate(self.tasks)}

    def generate(
        self,
        prompts: PromptBatch,
        features: VisionFeatures,
        *,
        max_new_tokens: int,
        pictures: Tensor | None = None,
        shared: int = 0,
        **options: Any,
    ) -> list[Generation]:
        """Free-running answers, greedy unless `options` (of Hugging Face's generate) say otherwise.

        pictures [B]: which row of `features` each prompt is about; None: its own. shared: how many first positions
        prompts about the same picture have in common; they are computed once for each picture. Raises ValueError for
        beam search or several answers per prompt, whose states cannot be told apart.
        """
        if options.get("num_beams", 1) != 1 or options.get("num_return_sequences", 1) != 1:
            raise ValueError("generate follows one answer per prompt: leave num_beams and num_return_sequences at 1")
        ends = end_token_ids(self.llm, options)
        if options.get("pad_token_id") is None:
            config = self.llm.generation_config
            options["pad_token_id"] = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
        with evaluating(self):
            if pictures is not None:
                features = features.select(pictures)
            embeds_BTD = self._embed(prompts.input_ids, features)
            if pictures is not None and shared:
                options["past_key_values"] = prefix_cache(self.llm, embeds_BTD, pictures, shared)
            with recorded_states(self.llm.get_output_embeddings()) as states:
                ids_BL = self.llm.generate(
                    inputs_embeds=embeds_BTD,
                    attention_mask=attended(prompts.attention_mask),
                    max_new_tokens=max_new_tokens,
                    **{"do_sample": False, **options},
                )
            states_BLD = torch.stack(states, dim=1)
            assert states_BLD.shape[:2] == ids_BL.shape, (states_BLD.shape, ids_BL.shape)
            answers = [until_end(row, ends) for row in ids_BL.tolist()]
            return self._decode(prompts, features, states_BLD, answers, answers)

    def teacher_forced(self, prompts: PromptBatch, features: VisionFeatures) -> list[Generation]:
        """Decodes with the right answers (prompts.answer_ids) as the past: masks and pictures at their task tokens.

        `ids` holds the model's own most likely token at each place, so that text scores mean something too.
        """
        with evaluating(self):
            before = prompts.input_ids.shape[1]
            length = max([len(ids) for ids in prompts.answer_ids], default=0) or 1
            rows = prompts.input_ids.shape[0]
            answer_BL, filled_BL = prompts.input_ids.new_zeros(2, rows, length)
            for row, ids in enumerate(prompts.answer_ids):
                answer_BL[row, : len(ids)] = torch.tensor(ids, device=answer_BL.device)
                filled_BL[row, : len(ids)] = 1
            mask_BT = torch.cat([attended(prompts.attention_mask), filled_BL], dim=1)
            embeds_BTD = self._embed(torch.cat([prompts.input_ids, answer_BL], dim=1), features)
            positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
            # The state at the prompt's last position predicts the answer's first token.
            states_BLD = self._hidden(embeds_BTD, mask_BT, positions_BT)[:, before - 1 : before - 1 + length]
            likely = self.llm.get_output_embeddings()(states_BLD).argmax(-1).tolist()
            ends = end_token_ids(self.llm, {})
            right = [until_end(ids, ends) for ids in prompts.answer_ids]
            written = [until_end(row[: len(ids)], ends) for row, ids in zip(likely, prompts.answer_ids, strict=False)]
            return self._decode(prompts, features, states_BLD, right, written)

    def _decode(
        self,
        prompts: PromptBatch,
        features: VisionFeatures,
        states_BLD: Tensor,
        answers: list[list[int]],
        written: list[list[int]],
    ) -> list[Generation]:
        """Masks and embeddings of each answer's task tokens; a row without a picture in its prompt has no masks."""
        results = []
        device = states_BLD.device
        pictured = (prompts.input_ids == self.image_id).any(1).tolist()
        rows_M, places_M, rows_G, places_G = [], [], [], []
        for row in range(len(prompts.keys)):
            found = find_mentions(answers[row], first_object=self.first_object, max_objects=self.max_objects)
            result = Generation(ids=written[row])
            results.append(result)
            if pictured[row]:
                result.object_numbers = found.numbers
                rows_M += [row] * len(found.places)
                places_M += found.places
            if found.picture is not None:
                rows_G.append(row)
                places_G.append(found.picture)
        wanted = [torch.tensor(x, dtype=torch.long, device=device) for x in (rows_M, places_M, rows_G, places_G)]
        masked_rows, states_MD = _states_at(states_BLD, wanted[0], wanted[1])
        masks = self._masks(features, masked_rows, states_MD).float()
        chances_MV = self.llm.get_output_embeddings()(states_MD).float().softmax(-1)
        embeddings = self.clip_head(_states_at(states_BLD, wanted[2], wanted[3])[1]).float()
        for i, row in enumerate(rows_G):
            results[row].embedding = embeddings[i]
        first = 0
        for row, result in enumerate(results):
            if count := len(result.object_numbers):
                result.mask_logits = masks[first : first + count]
                if (task := prompts.tasks[row]) in self.heads:
                    own = slice(first, first + count)
                    result.values = self.heads[task](features.select(masked_rows[own]), states_MD[own]).float()
                result.object_chances = [
                    float(chances_MV[first + k, self.first_object + number - 1])
                    for k, number in enumerate(result.object_numbers)
                ]
                first += count
        return results


def attended(mask_BT: Tensor) -> Tensor:
    """The attention mask, with rows of nothing but padding attended in full: softmax over nothing would be NaN."""
    return torch.where(mask_BT.any(1, keepdim=True), mask_BT, 1)


def _states_at(hidden_BTD: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, states [n,D]) at the given places; one arbitrary state when there are none, for a row of weight zero."""
    if not rows.shape[0]:
        rows = places = torch.zeros(1, dtype=torch.long, device=hidden_BTD.device)
    return rows, hidden_BTD[rows, places]


def _states_before(hidden_BTD: Tensor, segments_BT: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(samples [n], states [n,D] that predict the tokens at the given places): one position earlier; as _states_at."""
    rows, states = _states_at(hidden_BTD, rows, places - 1)
    if not places.shape[0]:
        return rows, states
    return segments_BT[rows, places], states
