"""Decoding with the tuned model: batched equals one by one, the decoders' states, repeated tags, refusals."""

import pytest
import torch
from tiny_tuner import EMBED, GEN, NORMS, OBJ, OBJECTS, RELEASED, ROWS, SLOT, batch, build, features, prompts
from transformers import CompileConfig
from transformers.generation.utils import StopCheck

from pipeline.model.generation import find_mentions, until_end


@pytest.mark.parametrize("mechanism", [{}, RELEASED])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_batched_generation_equals_one_by_one(name, mechanism):
    tuner, feats, many = build(name, **mechanism), features(4), prompts()
    with_all = tuner.generate(many, feats, max_new_tokens=8, eos_token_id=2)
    assert len({tuple(g.ids) for g in with_all}) > 1
    for row in range(4):
        alone = tuner.generate(
            prompts([ROWS[row]]), feats.select(torch.tensor([row])), max_new_tokens=8, eos_token_id=2
        )[0]
        assert alone.ids == with_all[row].ids and alone.object_numbers == with_all[row].object_numbers
        if alone.mask_logits is not None:
            assert torch.allclose(alone.mask_logits, with_all[row].mask_logits, atol=1e-4)


def force(tuner, answers):
    """Makes greedy decoding write the given answers, whatever the LM would say."""
    step = {"n": 0}

    def rewrite(module, args, logits):
        if logits.dim() == 2:
            # Not a step of decoding: the chances of task tokens.
            return logits
        forced = torch.full_like(logits, -1e9)
        for row, answer in enumerate(answers):
            forced[row, -1, answer[min(step["n"], len(answer) - 1)]] = 0.0
        step["n"] += 1
        return forced

    return tuner.llm.lm_head.register_forward_hook(rewrite)


@pytest.mark.parametrize("training", [True, False])
def test_the_predicting_state_is_the_decoders_state_in_all_three_ways(training):
    """forward(), generate() and teacher_forced() hand the same states to the mask decoder and the CLIP head."""
    tuner, feats, data = build().train(training), features(4), batch()
    seen = {"mask_decoder": [], "clip_head": []}
    tuner.mask_decoder.register_forward_pre_hook(lambda _, args: seen["mask_decoder"].append(args[1].detach()))
    tuner.clip_head.register_forward_pre_hook(lambda _, args: seen["clip_head"].append(args[0].detach()))
    tuner.eval()
    tuner(data, feats, NORMS)
    tuner.train(training)
    handle = force(tuner, [answer for _, _, answer in ROWS])
    generated = tuner.generate(prompts(), feats, max_new_tokens=6)
    handle.remove()
    forced = tuner.teacher_forced(prompts(), feats)
    assert tuner.training is training, "the mode comes back"
    for states in seen.values():
        assert len(states) == 3
        assert torch.allclose(states[0], states[1], atol=1e-4) and torch.allclose(states[0], states[2], atol=1e-4)
    assert [g.ids for g in generated] == [answer[:-1] for _, _, answer in ROWS]
    for results in (generated, forced):
        assert [g.object_numbers for g in results] == [[1, 2], [], [], [3]]
        assert [g.embedding is not None for g in results] == [False, False, True, False]
        assert [None if g.mask_logits is None else tuple(g.mask_logits.shape) for g in results] == [
            (2, 16, 16),
            None,
            None,
            (1, 16, 16),
        ]
    assert torch.allclose(generated[3].mask_logits, forced[3].mask_logits, atol=1e-4)


def test_teacher_forced_ids_are_the_models_own_best_guesses():
    tuner, feats = build().eval(), features(4)
    got = tuner.teacher_forced(prompts(), feats)
    for row, (_, prompt, answer) in enumerate(ROWS):
        alone = prompts([(ROWS[row][0], prompt + answer, [])])
        embeds = tuner._embed(alone.input_ids, feats.select(torch.tensor([row])))
        best = tuner.llm(inputs_embeds=embeds).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert got[row].ids == until_end(best, {2})


def test_repeated_tags_and_rows_without_a_picture_make_no_masks():
    found = find_mentions([7, OBJ + 1, OBJ, OBJ + 1, GEN, GEN, SLOT], first_object=OBJ, max_objects=OBJECTS)
    assert (found.numbers, found.places, found.picture) == ([2, 1], [1, 2], 4)
    tuner = build()
    handle = force(tuner, [[OBJ, OBJ, OBJ + 1, 2], [OBJ, GEN, 2]])
    first, second = tuner.generate(prompts([ROWS[0], ROWS[2]]), features(2), max_new_tokens=5)
    handle.remove()
    assert first.object_numbers == [1, 2] and first.mask_logits.shape[0] == 2 and first.embedding is None
    assert second.object_numbers == [] and second.mask_logits is None and second.embedding.shape == (EMBED,)


def test_a_static_cache_is_not_compiled(monkeypatch):
    """Asked to compile on any device, as transformers does it on a GPU without being asked."""
    tuner, compiling = build(), CompileConfig()
    compiling._compile_all_devices = True
    monkeypatch.setattr(tuner.llm, "get_compiled_call", lambda config: pytest.fail("compiled"))
    options = {"max_new_tokens": 4, "cache_implementation": "static", "compile_config": compiling}
    plain = tuner.generate(prompts(), features(4), max_new_tokens=4)
    assert [g.ids for g in tuner.generate(prompts(), features(4), **options)] == [g.ids for g in plain]


def test_a_step_that_transformers_takes_back_leaves_no_state(monkeypatch):
    """Where it asks one step late whether to stop (on mps so far), the head is called once more than there are ids."""
    tuner, answer = build(), [7, OBJ, 2]
    handle = force(tuner, [answer])
    plain = tuner.generate(prompts(ROWS[:1]), features(1), max_new_tokens=6, eos_token_id=2)[0]
    handle.remove()
    calls = []

    class Late(StopCheck):
        def __call__(self, unfinished, tokens, length):
            self.late = bool(calls)
            calls.extend([1] * (not self.late and not unfinished.any()))
            return self.late

        def finish(self):
            return int(self.late)

    monkeypatch.setattr("transformers.generation.utils.StopCheck", Late)
    handle = force(tuner, [answer])
    late = tuner.generate(prompts(ROWS[:1]), features(1), max_new_tokens=6, eos_token_id=2)[0]
    handle.remove()
    assert calls and late.ids == plain.ids == [7, OBJ]
    assert torch.equal(late.mask_logits, plain.mask_logits)


def test_beams_are_refused_and_sampling_runs():
    tuner = build()
    with pytest.raises(ValueError, match="num_beams"):
        tuner.generate(prompts(), features(4), max_new_tokens=2, num_beams=2)
    assert len(tuner.generate(prompts(), features(4), max_new_tokens=2, do_sample=True, top_p=0.9)) == 4
