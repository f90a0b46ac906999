"""The published pi0-FAST against lerobot's keys, and against numbers that lerobot's code gave."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.pi0_checkpoint import published_key
from vlarl_bench.policies.pi0_fast import END
from vlarl_bench.policies.pi0_fast_checkpoint import NAMES, load_published
from vlarl_bench.policies.pi0_fast_published import FastPrompts, PublishedPi0Fast, PublishedPi0FastArchitecture
from vlarl_bench.suite import Observation

from .conftest import characters, spelled
from .pi0_fast_small import SIZES, STATS, fast, publish, small, tokenizer
from .pi0_small import CAMERAS
from .test_fast_tokens import GOLDEN as FAST
from .test_pi0_checkpoint import restate
from .test_pi0_published import close, wave

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "pi0_fast_manifest.json").read_text())
GOLDEN = json.loads((HERE / "pi0_fast_golden.json").read_text())
TASKS = ("pick up the milk", " place_the cream cheese\nin basket ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_size_has_the_published_keys_shapes_and_dtypes(dtype):
    expected = {}
    for key, entry in MANIFEST["tensors"].items():
        for i in range(entry.get("copies", 1)):
            expected[key.replace("*", str(i))] = (entry["shape"], dtype if entry.get("half") else "float32")

    class Roomy(FastPrompts):  # PaliGemma's own tokenizer is gated
        def action_ids(self, count, known):
            return [11, *range(count)]

    with torch.device("meta"):
        architecture = PublishedPi0FastArchitecture("pixels", 7, 8, cameras=CAMERAS, dtype=dtype)
        policy = PublishedPi0Fast("pi0-fast-base", architecture, Roomy(tokenizer(), 128))
    found = {published_key(k, NAMES): v for k, v in policy.state_dict().items() if k.startswith("network.")}
    assert {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in found.items()} == expected
    assert sum(v.numel() for v in found.values()) == MANIFEST["parameters"]
    head = found["paligemma_with_expert.paligemma.lm_head.weight"]
    assert MANIFEST["parameters"] - head.numel() == 2_923_335_408  # PaliGemma's, whose two matrices are one


def observations():
    """The golden inputs: two cameras of three, prompts of unlike length."""
    state = 2 * wave("state", 2, 8)
    state[0, :4] = torch.tensor([-1.0, -1.5, 1.5, 0.999])
    images = ((wave("images", 2, 2, 3, 28, 28) + 1) * 127.5).round().to(torch.uint8)
    pixels = images.permute(0, 1, 3, 4, 2).numpy()
    return [
        Observation(task, row.numpy(), images=dict(zip(CAMERAS, pair, strict=True)))
        for task, row, pair in zip(TASKS, state, pixels, strict=True)
    ]


def test_prompts_are_the_authors():
    policy = small()
    assert [policy.prompt(seen) for seen in observations()] == GOLDEN["prompts"]
    assert " State: 0 -1 255 255 " in GOLDEN["prompts"][0], "below the first bin, and above the last"
    words = policy.preprocess(observations()).words
    for row, expected in zip(words.tolist(), GOLDEN["prompt_tokens"], strict=True):
        assert row == expected + [0] * (200 - len(expected))


def test_prompt_and_opening_literally():
    prompts = FastPrompts(characters(), 8)
    for (begin, *said), text in (
        (prompts.encode(small().prompt(observations()[1])), GOLDEN["prompts"][1]),
        (prompts.opening, "Action: "),
    ):
        assert (begin, spelled(said)) == (2, text)
    seen = replace(observations()[0], proprio=np.linspace(-1, 1, 8, dtype=np.float32))
    policy = small()
    policy.proprio_low.fill_(-1)
    policy.proprio_high.fill_(1)
    # Bins of 1/128 from -1 on: 2/7 is 36.57 of them.
    assert policy.prompt(seen) == "Task: pick up the milk, State: 0 36 73 109 146 182 219 255;\n"


def test_everything_seen_matters():
    """Each camera, the instruction, and proprioception change what the golden numbers are of."""
    base, policy = observations()[0], small()
    others = [replace(base, images={**base.images, camera: 255 - base.images[camera]}) for camera in CAMERAS]
    others += [replace(base, instruction="pick up the soup"), replace(base, proprio=base.proprio - np.float32(0.1))]
    with torch.no_grad():
        context = policy.encode(policy.preprocess([base, *others]))
        logits = policy.logits(context, index_of(FAST["published"]["tokens"][:1] * 5))
    assert ((logits[1:] - logits[0]).abs().amax((1, 2)) > 0.05).all()


def index_of(tokens):
    """[B, T] action tokens of chunks' FAST tokens, padded with the end."""
    index = torch.full((len(tokens), 1 + max(map(len, tokens))), END)
    for row, ids in zip(index, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids) + 1
    return index


def test_tokens_are_the_authors():
    policy, codes = small(), FAST["published"]["tokens"][:2]
    for ids, row, expected in zip(codes, policy.ids[index_of(codes)].tolist(), GOLDEN["action_tokens"], strict=True):
        assert policy.vocabulary.opening + row[: len(ids) + 1] == expected


def test_logits_are_the_authors():
    """Of images, prompt and opening, teacher-forced; every third step of the chunk, every ninth token."""
    policy, codes = small(), FAST["published"]["tokens"][:2]
    with torch.no_grad():
        logits = policy.logits(policy.encode(policy.preprocess(observations())), index_of(codes))
    for row, ids, expected in zip(logits, codes, GOLDEN["logits"], strict=True):
        close(row[: len(ids) + 1 : 3, ::9], expected, 1e-4)


def test_chunks_are_the_authors(monkeypatch):
    """What is said is turned into a chunk as lerobot does, and what is none is told."""
    policy, whole = small(), FAST["published"]["tokens"][0]
    index = index_of([whole, whole[:7], whole + whole[:3]])
    monkeypatch.setattr(policy, "_decode", lambda *_: index)
    sample = policy.decode(None, None, 1.0)
    close(sample.latent[:, ::3], GOLDEN["decoded"], 1e-5)
    assert sample.invalid.tolist() == [False, True, True]
    assert sample.latent[1:].abs().sum() > 0


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sampled_log_probability_is_the_teacher_forced_one():
    policy = small()
    steps, original = [], policy._possible
    policy._possible = lambda logits, said: steps.append(original(logits, said)) or steps[-1]
    with torch.no_grad():
        context = policy.encode(policy.preprocess(observations()))
        sample = policy.explore(context, generators(0, 1), 1.0)
        del policy._possible
        whole = policy.logits(context, sample.trace[..., 0])
        scored = policy.log_prob(context, sample.trace, torch.ones(2, 8), 1.0)
    cached = torch.stack(steps, 1)
    for row, n in enumerate(scored.mask.sum((1, 2)).tolist()):
        assert n > 3
        torch.testing.assert_close(cached[row, :n], whole[row, :n], atol=5e-5, rtol=0)
        drawn = cached[row, :n].log_softmax(-1).gather(-1, sample.trace[row, :n])
        torch.testing.assert_close(scored.logp[row, :n], drawn, atol=1e-5, rtol=1e-5)


def test_a_decision_scores_alike_in_batches_of_other_sizes():
    """Also in bfloat16, as `ratio` demands; at widths where its rounding shows."""
    policy = small(dtype="bfloat16", layers=6, head_dim=32, width=256, mlp=512)
    with torch.no_grad():
        context = policy.encode(policy.preprocess(observations() * 6))
        trace = policy.explore(context, generators(*range(12)), 1.0).trace
        whole = policy.log_prob(context, trace, torch.ones(12, 8), 1.0)
        for size in (5, 1):
            parts = torch.arange(12).split(size)
            found = [policy.log_prob(context.index(i), trace[i], torch.ones(len(i), 8), 1.0) for i in parts]
            for name in ("logp", "entropy", "mask"):
                torch.testing.assert_close(torch.cat([getattr(part, name) for part in found]), getattr(whole, name))
    assert whole.logp.std() > 0.1


def test_nothing_before_the_opening_sees_it():
    policy = small()
    with torch.no_grad():
        batch = policy.preprocess(observations())
        x, real, positions = policy._prefix(batch, batch.proprio)
        lookup = policy._mask(real)
        before = policy._run(x, lookup, positions, slice(None))
        x[:, -1] += 1
        after = policy._run(x, lookup, positions, slice(None))
    kept = before.shape[1] - 1
    assert torch.equal(before[:, :kept], after[:, :kept])
    assert not torch.equal(before[:, kept:], after[:, kept:])


def test_checkpointed_gradients_are_the_gradients_and_reach_all_that_learns():
    policy, found, computed = small(), [], []
    model = policy.network.model
    hooked = [model.vision_tower.encoder.layers[1].mlp.fc1, model.language_model.layers[1].mlp.down_proj]
    for layer in hooked:
        layer.register_forward_pre_hook(lambda layer, _: computed.append(layer))
    batch = policy.preprocess(observations())
    for checkpointed in (False, True):
        policy.checkpointed = checkpointed
        policy.zero_grad()
        policy.sft_loss(policy.encode(batch), 0.5 * wave("a", 2, 8, 7), torch.ones(2, 8), None).backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert [computed.count(layer) for layer in hooked] == [3, 3]  # twice where they are not kept
    assert found[0].keys() == found[1].keys() == {name for name, _ in policy.named_parameters()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    actor = {id(p) for p in policy.actor_parameters()}
    kept = {n for n, p in policy.named_parameters() if id(p) not in actor}
    outside = ("network.model.vision_tower.", "network.model.multi_modal_projector.")
    assert all(n.startswith(outside) or n == "network.model.language_model.embed_tokens.weight" for n in kept)


def test_the_gripper_stays_the_robot_s(tmp_path):
    """In lerobot's LIBERO data -1 opens and 1 closes, as LIBERO's robot does. Between quantiles of -1 and 1 it stays
    what it is, and between -1 and 0.6 closed is 1.5; back it is neither inverted nor rounded."""
    publish(tmp_path / "published")
    for high, latent in ((1.0, [-1.0, 1.0, 0.2]), (0.6, [-1.0, 1.5, 0.5])):
        ends = {"action.q01": STATS["action.q01"].clone(), "action.q99": STATS["action.q99"].clone()}
        ends["action.q01"][6], ends["action.q99"][6] = -1, high
        restate(tmp_path / "published", {**STATS, **ends})
        policy = load_published(tmp_path / "published", **SIZES)
        actions = ends["action.q01"].repeat(3, 1)
        actions[:, 6] = torch.tensor([-1.0, 1.0, 0.2])
        expected = torch.full((3, 7), -1.0)
        expected[:, 6] = torch.tensor(latent)
        torch.testing.assert_close(policy.normalise(actions), expected)
        torch.testing.assert_close(policy.unnormalise(expected), actions)


def test_half_precision_is_close():
    exact, half = small(), small(dtype="bfloat16")
    index = index_of(FAST["published"]["tokens"][:2])
    with torch.no_grad():
        a, b = (p.encode(p.preprocess(observations())) for p in (exact, half))
        assert half.features(b).dtype == torch.float32
        one, other = exact.logits(a, index), half.logits(b, index)
    assert other.dtype == torch.float32
    assert 0 < (one - other).abs().mean() < 0.1 * one.abs().mean()


def test_a_chunk_has_at_most_so_many_tokens():
    assert small().architecture.max_tokens == 57
    assert PublishedPi0FastArchitecture("pixels", 7, 8).max_tokens == 252, "50 x 7 and the end would be 351"


def test_another_robot_s_proprioception():
    seen = observations()[0]
    with pytest.raises(BenchError, match=r"^proprio: shape \(9,\), but this policy takes \(8,\)$"):
        small().preprocess([Observation(seen.instruction, np.zeros(9, np.float32), images=seen.images)])


def test_tokenizers_that_do_not_fit():
    for token in ("<bos>", "|"):
        with pytest.raises(BenchError, match=rf"has no token '\{token[0]}"):
            FastPrompts(tokenizer().replace(f'"{token}"', '"other"'), 8)
    prompts = FastPrompts(tokenizer(), 8)
    assert prompts.action_ids(3, 320) == [prompts.end, 311, 310, 309]
    for count, known in ((312, 320), (3, 311)):
        with pytest.raises(BenchError, match=rf"^tokenizer.json: FAST's {count} tokens would be 311 down to"):
            prompts.action_ids(count, known)
    assert len(fast()) == 200
