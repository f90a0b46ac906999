"""pi0-FAST's decoding and likelihood, at the sizes that ship and against transformers' and the authors' code."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.fast_tokens import FastTokenizer
from vlarl_bench.policies.pi0_fast import END, Pi0Fast, Pi0FastArchitecture
from vlarl_bench.policies.presets import PI0_FAST_TINY, PI0_FAST_TINY_PIXELS
from vlarl_bench.policies.vocabulary import Vocabulary
from vlarl_bench.suite import Embodiment

from .conftest import INSTRUCTIONS, OBJECTS, make, observe
from .openvla_tiny import weight
from .test_fast_tokens import waves

GOLDEN = json.loads((Path(__file__).parent / "fast_golden.json").read_text())


def reshape(policy, **changes):
    """The same policy with another architecture, its weights kept where their shapes stay."""
    made = Pi0Fast(policy.name, dataclasses.replace(policy.architecture, **changes), policy.vocabulary, policy.fast)
    made.load_state_dict(policy.state_dict())
    return made


@pytest.fixture(params=[PI0_FAST_TINY, PI0_FAST_TINY_PIXELS], ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture
def policy(spec):
    """Random weights, with a head that ends some chunks early and none at once."""
    policy = make(spec)
    policy.fit_normalisation(list(0.8 * waves(20, 40, 7)), np.random.default_rng(0).normal(0.1, 0.3, (500, 8)))
    with torch.no_grad():
        policy.network.lm_head.weight[policy.architecture.words] *= 12
    return policy


def look(policy, n=4):
    spec = PI0_FAST_TINY_PIXELS if policy.architecture.observation == "pixels" else PI0_FAST_TINY
    return [observe(i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 3 + i % 2]) for i in range(n)]


def encoded(policy, n=4):
    with torch.no_grad():
        return policy.encode(policy.preprocess(look(policy, n)))


@pytest.fixture
def context(policy):
    """Four observations, two instructions and (in state mode) two numbers of objects."""
    return encoded(policy)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def executed(policy, n=4):
    return torch.ones(n, policy.chunk)


def lengths(trace):
    """Decisions in each row of a trace, the end among them."""
    return [row.index(END) + 1 if END in row else len(row) for row in trace[..., 0].tolist()]


def test_the_registered_sizes(spec):
    policy = make(spec)
    assert spec.capabilities == policy.capabilities
    assert 0.5e6 < sum(p.numel() for p in policy.parameters()) < 1.6e6
    assert policy.architecture.max_tokens == 57
    assert spec.create(Embodiment(14, 14, chunk=20), ["x"]).architecture.max_tokens == 281


@pytest.mark.parametrize("noise", [0.5, 1.0, 1.6])
def test_sampled_log_probability_is_the_teacher_forced_one(policy, context, noise):
    """What was drawn, with the cache, came from the distributions that `log_prob` names in one pass."""
    sample = policy.explore(context, generators(0, 1, 2, 3), noise)
    n = policy.architecture.max_tokens
    uniform = torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in generators(0, 1, 2, 3)])
    with torch.no_grad():
        scored = policy.log_prob(context, sample.trace, executed(policy), noise)
        p = (policy.logits(context, sample.trace[..., 0]) / noise).double().softmax(-1)
    index = sample.trace[..., 0]
    assert scored.mask.sum(1).flatten().tolist() == lengths(sample.trace)
    assert sample.trace.shape == scored.logp.shape == (4, n, 1)
    real = scored.mask[..., 0]
    drawn = p.gather(-1, index[..., None])[..., 0]
    above = p.cumsum(-1).gather(-1, index[..., None])[..., 0]
    assert (uniform < above + 1e-5)[real].all()
    assert (uniform > above - drawn - 1e-5)[real].all()
    torch.testing.assert_close(scored.logp[..., 0].double()[real], drawn.log()[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scored.entropy[..., 0].double()[real], torch.special.entr(p).sum(-1)[real], atol=1e-4, rtol=0
    )
    assert (index[~real] == END).all()
    assert not scored.logp[~scored.mask].any()
    assert not scored.entropy[~scored.mask].any()


def test_cached_decoding_is_teacher_forcing(policy, context):
    """The logits that each token was chosen by, with the cache, are those of one pass over the whole chunk."""
    steps, original = [], policy._possible
    policy._possible = lambda logits, said: steps.append(original(logits, said)) or steps[-1]
    sample = policy.explore(context, generators(0, 1, 2, 3), 1.0)
    del policy._possible
    with torch.no_grad():
        whole = policy.logits(context, sample.trace[..., 0])
        greedy = policy.sample(context, None).trace[..., 0]
        likeliest = policy.logits(context, greedy).argmax(-1)
    assert len(set(lengths(sample.trace))) > 1
    for row, n in enumerate(lengths(sample.trace)):
        torch.testing.assert_close(torch.stack(steps, 1)[row, :n], whole[row, :n], atol=1e-5, rtol=0)
    for row, n in enumerate(lengths(greedy[..., None])):
        assert torch.equal(greedy[row, :n], likeliest[row, :n])
    assert (whole[0, 1:4] - whole[1, 1:4]).abs().max() > 0.1, "the logits hardly depend on anything"


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_the_network_is_transformers_paligemma(policy, cut):
    """One pass of `PaliGemmaForConditionalGeneration` over the embeddings, with its own masks."""
    policy = reshape(policy, frozen_layers=cut, grammar=False)
    a, index = policy.architecture, torch.randint(0, 40, (4, 9), generator=generators(0)[0])
    with torch.no_grad():
        batch = policy.preprocess(look(policy))
        found = policy.logits(policy.encode(batch), index)
        x, real, positions = policy._prefix(batch, policy.normalise_proprio(batch.proprio))
        tokens = policy.network.get_input_embeddings()(a.words + index[:, :-1])
        spelled = np.array([0, *policy.fast.lengths])[index[:, :-1].numpy()]
        tokens = tokens + policy.places.weight[torch.from_numpy(spelled.cumsum(1)).clamp_max(56)]
        suffix = torch.ones_like(index[:, :-1])
        whole = policy.network(
            inputs_embeds=torch.cat((x, tokens), 1),
            attention_mask=torch.cat((real, suffix), 1).long(),
            token_type_ids=torch.cat((0 * real, suffix), 1),
            position_ids=torch.cat((positions, positions[:, -1:] + suffix.cumsum(1)), 1),
        ).logits[:, x.shape[1] - 1 :, a.words : a.words + 1 + len(policy.fast)]
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)


def test_patches_are_what_paligemma_sees():
    policy = make(PI0_FAST_TINY_PIXELS)
    batch = policy.preprocess(look(policy, 2))
    with torch.no_grad():
        seen, _ = policy._images(batch)
        for camera in range(2):
            out = policy.network.model.get_image_features(batch.images[:, camera].float() / 255 * 2 - 1)
            torch.testing.assert_close(seen[:, 16 * camera : 16 * camera + 16], out.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_logits_are_those_of_the_authors_code(cut):
    """A prompt of words alone, of 9 and 12 tokens, and 6 action tokens; the numbers' making is told in the file."""
    a = Pi0FastArchitecture(
        "state", 7, 8, words=12, grammar=False, action_tokens=27, frozen_layers=cut, layers=3, heads=4, head_dim=8,
        width=32, mlp=48
    )  # fmt: skip
    policy = Pi0Fast("x", a, Vocabulary(f"w{i}" for i in range(12)), FastTokenizer.plain(1, 13.0))
    with torch.no_grad():
        for key, parameter in policy.network.named_parameters():
            parameter.copy_(weight(key, tuple(parameter.shape)))
        policy.places.weight.zero_()  # the published model counts by itself
        prompt = torch.tensor([[3, 9, 4, 1, 7, 5, 2, 8, 0, 0, 0, 6], [5, 1, 8, 8, 2, 3, 9, 7, 4, 6, 1, 2]])
        index = torch.tensor([[4, 9, 1, 17, 25, 0], [2, 2, 20, 11, 8, 3]])
        real = prompt != 0
        policy._prefix = lambda batch, proprio: (policy._embed(prompt), real, real.cumsum(1) - 1)
        context = policy.encode(policy.preprocess([observe(0, instruction="w1", objects=["w2"])] * 2))
        logits = policy.logits(context, index)
    torch.testing.assert_close(logits, torch.tensor(GOLDEN["logits"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grammar", [False, True])
def test_likelihood_by_enumeration(grammar):
    """Three coefficients, chunks of two numbers: every sequence of at most three tokens, found one token at a time."""
    base = make(PI0_FAST_TINY)
    changes = {"chunk": 1, "action_dim": 2, "action_tokens": 3, "grammar": grammar}
    policy = Pi0Fast(
        "x", dataclasses.replace(base.architecture, **changes), base.vocabulary, FastTokenizer.plain(1, 1.0), seed=1
    )
    assert len(policy.fast) == 3
    assert policy.architecture.max_tokens == 3
    first = policy.architecture.words
    texts = [t for n in range(4) for t in itertools.product((1, 2, 3), repeat=n)]
    texts = [(*t, END)[:3] for t in texts]
    traces = torch.tensor([[*t, *[END] * (3 - len(t))] for t in texts])
    with torch.no_grad():
        context = policy.encode(policy.preprocess([observe(0, objects=OBJECTS[:3])]))
        rows = context.index(torch.zeros(len(texts), dtype=torch.long))
        scored = policy.log_prob(rows, traces[..., None], torch.ones(len(texts), 1), 1.0)
        logp = scored.logp.sum((1, 2))
        assert scored.mask.sum((1, 2)).tolist() == [len(t) for t in texts]
        assert len(texts) == 1 + 3 + 9 + 27
        assert logp.exp().sum() == pytest.approx(1, abs=1e-5)
        # By hand: the whole vocabulary's logits, token after token, through transformers' own forward.
        batch = policy.preprocess([observe(0, objects=OBJECTS[:3])])
        x, real, positions = policy._prefix(batch, policy.normalise_proprio(batch.proprio))
        x, positions = x[:, real[0]], positions[:, real[0]]
        for text, found in zip(texts, logp, strict=True):
            expected = 0.0
            for i, token in enumerate(text):
                said = torch.tensor([text[:i]], dtype=torch.long)
                spoken = policy.network.get_input_embeddings()(first + said) + policy.places.weight[1 : i + 1]
                whole = torch.cat((x, spoken), 1)
                out = policy.network(
                    inputs_embeds=whole,
                    attention_mask=torch.ones(whole.shape[:2]),  # without one, equal positions are taken for packing
                    token_type_ids=(torch.arange(whole.shape[1]) >= x.shape[1])[None].long(),
                    position_ids=torch.cat((positions, positions[:, -1:] + 1 + torch.arange(i)), 1),
                ).logits[0, -1]
                out = out[first : first + 4]
                if grammar:  # after two tokens the end alone, before that anything else
                    out[[1, 2, 3] if i == 2 else [END]] = -1e4
                expected += float(out.log_softmax(0)[token])
            assert math.exp(found) == pytest.approx(math.exp(expected), rel=2e-5)
        draws = policy.explore(context.index(torch.zeros(600, dtype=torch.long)), generators(*range(600)), 1.0)
    code = torch.tensor([16, 4, 1])
    place = {int((trace * code).sum()): i for i, trace in enumerate(traces)}
    drawn = torch.tensor([place[int(n)] for n in (draws.trace[..., 0] * code).sum(1)])
    frequency = torch.bincount(drawn, minlength=len(texts)) / 600
    assert ((frequency - logp.exp()).abs() < 4 * (logp.exp() * (1 - logp.exp()) / 600).sqrt() + 1e-3).all()
    # A chunk is two coefficients and the end; all else is told.
    assert draws.invalid.tolist() == [len(texts[i]) != 3 or texts[i][2] != END for i in drawn]
    assert draws.invalid.any() != grammar


def test_the_grammar_keeps_every_chunk_whole(policy, context):
    """Whatever the network says, and in tokens of several coefficients: what is drawn spells exactly a chunk."""
    assert max(policy.fast.lengths) > 1
    for seed in range(5):
        sample = policy.sample(context, generators(*range(4 * seed, 4 * seed + 4)))
        assert not sample.invalid.any()
        assert policy.spelled[sample.trace[..., 0]].sum(1).tolist() == [policy.chunk * policy.action_dim] * 4
    free = Pi0Fast.restore({**policy.config, "architecture": {**policy.config["architecture"], "grammar": False}})
    free.load_state_dict(policy.state_dict())
    assert free.sample(context, generators(0, 1, 2, 3)).invalid.any()


def test_temperature(policy, context):
    cold = policy.explore(context, generators(0, 1, 2, 3), 1e-7)
    assert torch.equal(cold.trace, policy.sample(context, None).trace)
    plain, warm = policy.sample(context, generators(0, 1, 2, 3)), policy.explore(context, generators(0, 1, 2, 3), 1.0)
    assert torch.equal(plain.trace, warm.trace)
    with torch.no_grad():
        scored = [policy.log_prob(context, warm.trace, executed(policy), t).entropy.sum() for t in (0.5, 1.0, 2.0)]
    assert scored[0] < scored[1] < scored[2]
    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(BenchError, match=r"noise: .*must be above 0"):
            policy.explore(context, generators(0, 1, 2, 3), noise)
        with pytest.raises(BenchError, match=r"noise: .*must be above 0"):
            policy.log_prob(context, warm.trace, executed(policy), noise)


def test_all_tokens_count_unless_nothing_was_executed(policy, context):
    mask = executed(policy)
    mask[1, 1:] = 0
    mask[2] = 0
    trace = policy.sample(context, generators(0, 1, 2, 3)).trace
    with torch.no_grad():
        whole, part = (policy.log_prob(context, trace, m, 1.0) for m in (executed(policy), mask))
    spoken = lengths(trace)
    assert part.mask.sum(1).flatten().tolist() == [spoken[0], spoken[1], 0, spoken[3]]
    assert torch.equal(part.logp, whole.logp * part.mask)
    assert torch.equal(part.entropy, whole.entropy * part.mask)


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_gradients_from_a_detached_context_are_exact(policy, cut):
    """They are those of a pass over everything in which only the actor may learn."""
    policy = reshape(policy, frozen_layers=cut)
    batch = policy.preprocess(look(policy))
    trace = policy.sample(policy.encode(batch), generators(0, 1, 2, 3)).trace
    actor, found = policy.actor_parameters(), []
    for detached in (True, False):
        policy.zero_grad()
        context = policy.encode(batch)
        scored = policy.log_prob(context.detach() if detached else context, trace, executed(policy), 1.0)
        (scored.logp.sum() + scored.entropy.sum()).backward()
        if detached:
            reached = {id(p) for p in policy.parameters() if p.grad is not None}
            assert reached - {id(p) for p in actor} == set()
        found.append([p.grad.clone() for p in actor])
    for cut_off, whole in zip(*found, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(cut_off, whole, rtol=1e-4, atol=1e-5)


def test_a_context_stays_true_while_only_the_actor_learns(policy):
    seen = policy.preprocess(look(policy))
    with torch.no_grad():
        before = policy.encode(seen)
        for parameter in policy.actor_parameters():
            parameter.add_(0.01)
        after = policy.encode(seen)
    for field in dataclasses.fields(before):
        assert torch.equal(getattr(before, field.name), getattr(after, field.name)), field.name


def test_supervised_gradients_reach_what_the_policy_sees_with(policy):
    loss = policy.sft_loss(
        policy.encode(policy.preprocess(look(policy))), torch.zeros(4, policy.chunk, 7), executed(policy), None
    )
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def demonstrated(policy):
    return torch.from_numpy(0.8 * waves(20, 40, 7)[:4, : policy.chunk]).float()


def test_sft_loss_is_the_mean_negative_log_probability_of_a_chunks_tokens(policy, context):
    actions = demonstrated(policy)
    tokens = policy.fast.encode(policy.normalise(actions).numpy())
    trace = torch.full((4, policy.architecture.max_tokens, 1), END)
    for row, ids in zip(trace, tokens, strict=True):
        row[: len(ids), 0] = torch.tensor(ids) + 1
    with torch.no_grad():
        loss = policy.sft_loss(context, actions, executed(policy), None)
        scored = policy.log_prob(context, trace, executed(policy), 1.0)
    assert scored.mask.sum(1).flatten().tolist() == [len(ids) + 1 for ids in tokens]
    expected = -(scored.logp.sum((1, 2)) / scored.mask.sum((1, 2))).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_missing_steps_hold_the_last_action_and_missing_chunks_do_not_count(policy, context):
    actions, mask = demonstrated(policy), executed(policy)
    mask[0, 5:] = 0
    mask[1, :2] = 0
    mask[3] = 0
    held = actions.clone()
    held[0, 5:] = actions[0, 4]
    held[1, :2] = actions[1, 2]
    actions[mask == 0] = 7.0  # must not matter
    with torch.no_grad():
        loss = policy.sft_loss(context, actions, mask, None)
        three = torch.tensor([0, 1, 2])
        expected = policy.sft_loss(context.index(three), held[:3], torch.ones(3, policy.chunk), None)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_greedy_decoding_gives_back_a_chunk_that_was_learned(policy):
    """End to end: fitted on four chunks, the policy says them, and the actions are those demonstrated."""
    actions = demonstrated(policy)
    batch = policy.preprocess(look(policy))
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    for _ in range(60):
        loss = policy.sft_loss(policy.encode(batch), actions, executed(policy), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sample = policy.sample(policy.encode(batch), None)
    assert not sample.invalid.any()
    said, _ = policy.fast.decode(policy.fast.encode(policy.normalise(actions).numpy()), policy.chunk, 7)
    torch.testing.assert_close(sample.latent, torch.from_numpy(said).float(), atol=1e-6, rtol=0)
    assert (sample.actions - actions).abs().max() < 0.15


def test_room_for_more_padding_changes_nothing(policy, context):
    roomy = reshape(policy, max_words=33, max_objects=17, max_name_words=9)
    other = encoded(roomy)
    assert context.mask.shape[1] < other.mask.shape[1]
    with torch.no_grad():
        trace = policy.sample(context, None).trace
        torch.testing.assert_close(roomy.features(other), policy.features(context), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            roomy.logits(other, trace[..., 0]), policy.logits(context, trace[..., 0]), atol=2e-5, rtol=0
        )
    assert torch.equal(roomy.sample(other, None).trace, trace)


def test_padding_is_never_read(policy, context):
    dirty = torch.where(context.mask[..., None], context.hidden, torch.full((), 50.0))
    lower = torch.where(context.mask[:, None, None, None, :, None], context.lower, torch.full((), 50.0))
    assert not torch.equal(dirty, context.hidden)
    other = dataclasses.replace(context, hidden=dirty, lower=lower)
    with torch.no_grad():
        trace = policy.sample(context, generators(0, 1, 2, 3)).trace
        assert torch.equal(policy.sample(other, generators(0, 1, 2, 3)).trace, trace)
        assert torch.equal(policy.logits(other, trace[..., 0]), policy.logits(context, trace[..., 0]))


def test_a_batch_is_its_rows(policy, context):
    trace = policy.sample(context, generators(0, 1, 2, 3)).trace
    with torch.no_grad():
        together = policy.logits(context, trace[..., 0])
        for i in range(4):
            alone = policy.encode(policy.preprocess(look(policy)[i : i + 1]))
            one = policy.logits(alone, trace[i : i + 1, :, 0])
            torch.testing.assert_close(one[0], together[i], atol=2e-5, rtol=0)
            assert torch.equal(policy.sample(alone, generators(i)).trace[0], trace[i])


def test_everything_seen_matters(policy):
    """The instruction, its word order, each camera or object, and proprioception all reach the logits."""
    base = look(policy)[1]
    replace = dataclasses.replace
    others = [
        replace(base, instruction=INSTRUCTIONS[0]),
        replace(base, instruction=" ".join(reversed(base.instruction.split()))),
        replace(base, proprio=base.proprio + np.float32(0.1) * np.eye(8, dtype=np.float32)[6]),
    ]
    if base.images:
        others += [replace(base, images={**base.images, name: image[::-1]}) for name, image in base.images.items()]
    else:
        for name in OBJECTS:
            moved = base.objects[name] + np.float32(0.3) * np.eye(7, dtype=np.float32)[0]
            others.append(replace(base, objects={**base.objects, name: moved}))
        others.append(replace(base, objects={n: p for n, p in base.objects.items() if n != "ketchup_1"}))
    with torch.no_grad():
        context = policy.encode(policy.preprocess([base, *others]))
        logits = policy.logits(context, torch.ones(len(context), 3, dtype=torch.long))
    assert ((logits[1:] - logits[0]).abs().amax((1, 2)) > 1e-3).all()


def test_a_tokenizer_that_does_not_fit_is_refused():
    policy = make(PI0_FAST_TINY)
    small = dataclasses.replace(policy.architecture, action_tokens=8)
    with pytest.raises(BenchError, match=r"action_tokens: 8, but the FAST tokenizer has \d+"):
        Pi0Fast("x", small, policy.vocabulary, policy.fast)
