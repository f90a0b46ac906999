"""OpenVLA's decoding and likelihood, in both forms and at the sizes that ship."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.openvla import assemble
from vlarl_bench.policies.openvla_inputs import from_bins, to_bins
from vlarl_bench.policies.presets import OPENVLA_7B, OPENVLA_AR_TINY, OPENVLA_TINY, OPENVLA_TINY_PIXELS
from vlarl_bench.policies.vocabulary import Vocabulary
from vlarl_bench.suite import Embodiment, Observation

from .conftest import INSTRUCTIONS, OBJECTS, make, observe
from .openvla_tiny import AUTOREGRESSIVE, small

FORMS = ["parallel", "autoregressive", "pixels"]


def reshape(policy, **changes):
    """The same policy with another architecture, its weights kept where their shapes stay."""
    made = assemble(policy.name, dataclasses.replace(policy.architecture, **changes), policy.vocabulary, seed=0)
    kept = {k: v for k, v in policy.state_dict().items() if k in made.state_dict()}
    made.load_state_dict(kept, strict=False)
    return made


def build(form):
    if form == "pixels":
        return make(OPENVLA_TINY_PIXELS)
    return reshape(make(OPENVLA_AR_TINY), chunk=2) if form == "autoregressive" else make(OPENVLA_TINY)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def policy(form):
    return build(form)


def look(policy, n=4):
    spec = OPENVLA_TINY_PIXELS if policy.architecture.observation == "pixels" else OPENVLA_TINY
    return [observe(i, spec, INSTRUCTIONS[i % 2], OBJECTS[: 3 + i % 2]) for i in range(n)]


@pytest.fixture
def context(policy):
    """Four observations, two instructions and (in state mode) two numbers of objects."""
    with torch.no_grad():
        return policy.encode(policy.preprocess(look(policy)))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def executed(policy, n=4):
    return torch.ones(n, policy.chunk)


def test_the_registered_sizes():
    for spec in (OPENVLA_TINY, OPENVLA_TINY_PIXELS, OPENVLA_AR_TINY):
        policy = make(spec)
        one_by_one = spec is OPENVLA_AR_TINY
        assert policy.architecture.decoding == ("autoregressive" if one_by_one else "parallel")
        assert spec.capabilities == policy.capabilities
        assert 0.5e6 < sum(p.numel() for p in policy.parameters()) < 2.5e6
    with pytest.raises(BenchError, match="openvla-7b starts from a published folder"):
        OPENVLA_7B.create(Embodiment(7, 8), ["x"])


@pytest.mark.parametrize("noise", [0.5, 1.0, 1.6])
def test_sampled_log_probability_is_the_teacher_forced_one(policy, context, noise):
    """What was drawn came from the distributions that `log_prob` names: the draw inverts their cumulative sums."""
    sample = policy.explore(context, generators(0, 1, 2, 3), noise)
    n = policy.architecture.numbers
    uniform = torch.stack([torch.rand(n, generator=g, dtype=torch.float64) for g in generators(0, 1, 2, 3)])
    with torch.no_grad():
        scored = policy.log_prob(context, sample.trace, executed(policy), noise)
        p = (policy.logits(context, sample.trace[..., 0]) / noise).double().softmax(-1)
    assert sample.trace.shape == scored.logp.shape == (4, n, 1)
    index = sample.trace[..., 0]
    above = p.cumsum(-1).gather(-1, index[..., None])[..., 0]
    drawn = p.gather(-1, index[..., None])
    assert (uniform < above + 1e-5).all()
    assert (uniform > above - drawn[..., 0] - 1e-5).all()
    torch.testing.assert_close(scored.logp.double(), drawn.log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.entropy.double()[..., 0], -(p * p.log()).sum(-1), atol=1e-4, rtol=0)
    latent = from_bins(index, 256).view(4, policy.chunk, 7)
    assert torch.equal(sample.latent, latent)


def test_cached_decoding_is_teacher_forcing():
    """The logits that each token was chosen by, with the cache, are those of one pass over the whole chunk."""
    policy = build("autoregressive")
    with torch.no_grad():
        context = policy.encode(policy.preprocess(look(policy)))
        greedy = policy.sample(context, None).trace[..., 0]
        assert torch.equal(policy.logits(context, greedy).argmax(-1), greedy)
        steps = []
        original = policy.network.bin_logits
        policy.network.bin_logits = lambda x: steps.append(original(x)) or steps[-1]
        sample = policy.explore(context, generators(0, 1, 2, 3), 1.0)
        del policy.network.bin_logits
        whole = policy.logits(context, sample.trace[..., 0])
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=0)
    spread = (whole[0, 1:] - whole[1, 1:]).abs().max()
    assert spread > 0.1, "the logits hardly depend on anything"


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_likelihood_by_enumeration(decoding):
    """Three bins, two numbers: nine chunks, whose probabilities are found one token at a time, and sum to one."""
    base = make(OPENVLA_TINY)
    end = base.architecture.action_end
    changes = {"chunk": 1, "action_dim": 2, "bins": 3, "frozen_layers": 0, "decoding": decoding, "action_end": end}
    policy = assemble("x", dataclasses.replace(base.architecture, **changes), base.vocabulary, seed=1)
    seen = [observe(0, OPENVLA_TINY)]
    with torch.no_grad():
        context = policy.encode(policy.preprocess(seen))
        chunks = torch.tensor(list(itertools.product(range(3), repeat=2)))
        rows = context.index(torch.zeros(9, dtype=torch.long))
        logp = policy.log_prob(rows, chunks[..., None], torch.ones(9, 1), 1.0).logp.sum((1, 2))
        assert logp.exp().sum() == pytest.approx(1, abs=1e-5)
        # By hand: the whole vocabulary's logits, token after token, through transformers' own forward.
        net = policy.network.language_model
        for chunk, found in zip(chunks, logp, strict=True):
            expected = 0.0
            for i in range(2):
                if decoding == "autoregressive":
                    x = torch.cat(
                        (context.hidden[:, context.mask[0]], policy.network.embed(end - 1 - chunk[None, :i])), 1
                    )
                    positions = torch.cat((context.positions[:, context.mask[0]], context.positions[:, -1:] + 1), 1)
                    out = net(inputs_embeds=x, position_ids=positions[:, : x.shape[1]]).logits[0, -1]
                else:
                    x = context.hidden[:, context.mask[0]]
                    see_all = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
                    positions = context.positions[:, context.mask[0]]
                    out = net(inputs_embeds=x, position_ids=positions, attention_mask=see_all).logits[0, -4 + i]
                three = out[[end - 1, end - 2, end - 3]]
                expected += float(three.log_softmax(0)[chunk[i]])
            assert float(found) == pytest.approx(expected, abs=1e-5)
        draws = policy.explore(context.index(torch.zeros(600, dtype=torch.long)), generators(*range(600)), 1.0).trace
    frequency = torch.bincount(draws[:, 0, 0] * 3 + draws[:, 1, 0], minlength=9) / 600
    error = (logp.exp() * (1 - logp.exp()) / 600).sqrt()
    assert ((frequency - logp.exp()).abs() < 4 * error).all()


def test_temperature(policy, context):
    cold = policy.explore(context, generators(0, 1, 2, 3), 1e-7)
    assert torch.equal(cold.trace, policy.sample(context, None).trace)
    plain, warm = policy.sample(context, generators(0, 1, 2, 3)), policy.explore(context, generators(0, 1, 2, 3), 1.0)
    assert torch.equal(plain.trace, warm.trace)
    with torch.no_grad():
        entropies = [policy.log_prob(context, warm.trace, executed(policy), t).entropy.mean() for t in (0.5, 1.0, 2.0)]
    assert entropies[0] < entropies[1] < entropies[2] < np.log(256)
    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(BenchError, match=r"noise: .*must be above 0"):
            policy.explore(context, generators(0, 1, 2, 3), noise)
        with pytest.raises(BenchError, match=r"noise: .*must be above 0"):
            policy.log_prob(context, warm.trace, executed(policy), noise)


def test_what_was_not_executed_does_not_count(policy, context):
    mask = executed(policy)
    mask[1:, policy.chunk // 2 :] = 0
    trace = policy.sample(context, generators(0, 1, 2, 3)).trace
    with torch.no_grad():
        whole, part = (policy.log_prob(context, trace, m, 1.0) for m in (executed(policy), mask))
    assert part.mask.sum(1).flatten().tolist() == [7 * policy.chunk] + [7 * (policy.chunk // 2)] * 3
    assert torch.equal(part.logp, whole.logp * part.mask)
    assert torch.equal(part.entropy, whole.entropy * part.mask)
    assert (whole.logp < 0).all()


def test_gradients_from_a_detached_context_reach_exactly_the_actor(policy, context):
    trace = policy.sample(context, generators(0, 1, 2, 3)).trace
    scored = policy.log_prob(context.detach(), trace, executed(policy), 1.0)
    (scored.logp.mean() + scored.entropy.mean()).backward()
    actor = {id(p) for p in policy.actor_parameters()}
    reached = {id(p) for p in policy.parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == actor


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


def test_sft_loss_is_the_mean_negative_log_probability(policy, context):
    actions = policy.unnormalise(torch.rand(4, policy.chunk, 7, generator=generators(0)[0]) * 2 - 1)
    mask = executed(policy)
    mask[0, 1:] = 0
    trace = to_bins(policy.normalise(actions), 256).flatten(1)[..., None]
    with torch.no_grad():
        loss = policy.sft_loss(context, actions, mask, None)
        scored = policy.log_prob(context, trace, mask, 1.0)
    assert float(loss) == pytest.approx(float(-scored.logp.sum() / scored.mask.sum()), rel=1e-5)


def test_room_for_more_padding_changes_nothing(policy, context):
    roomy = reshape(policy, max_words=33, max_objects=17, max_name_words=9)
    with torch.no_grad():
        other = roomy.encode(roomy.preprocess(look(policy)))
        assert context.mask.shape[1] < other.mask.shape[1]
        trace = policy.sample(context, None).trace
        torch.testing.assert_close(roomy.features(other), policy.features(context), atol=1e-5, rtol=0)
        logits = policy.logits(context, trace[..., 0])
        torch.testing.assert_close(roomy.logits(other, trace[..., 0]), logits, atol=2e-5, rtol=0)
    assert torch.equal(roomy.sample(other, None).trace, trace)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_decision_scores_alike_in_batches_of_other_sizes(dtype):
    """As `ratio` demands, which is 1 before the first update; at widths where bfloat16's rounding shows."""
    policy = small(**AUTOREGRESSIVE, dtype=dtype, layers=6, width=256, mlp=512)
    draw = np.random.default_rng(0)
    images = [{"agentview": draw.integers(0, 256, (28, 28, 3), dtype=np.uint8)} for _ in range(12)]
    seen = [Observation("pick up the milk", np.zeros(8, np.float32), images=image) for image in images]
    with torch.no_grad():
        context = policy.encode(policy.preprocess(seen))
    trace = policy.explore(context, generators(*range(12)), 1.0).trace
    scored = []
    for size in (12, 5, 1):
        parts = [policy.log_prob(context.index(i), trace[i], executed(policy, len(i)), 1.0) for i in batches(size)]
        scored.append(torch.cat([part.logp for part in parts]))
    assert scored[0].requires_grad
    with torch.no_grad():
        scored.append(policy.log_prob(context, trace, executed(policy, 12), 1.0).logp)
    for other in scored[1:]:
        assert ((other - scored[0]).exp() - 1).abs().max() < 1e-4
    assert scored[0].std() > 0.1


def batches(size):
    return torch.arange(12).split(size)


def test_padding_is_never_read(policy, context):
    dirty = torch.where(context.mask[..., None], context.hidden, torch.full((), 50.0))
    assert not torch.equal(dirty, context.hidden)
    other = dataclasses.replace(context, hidden=dirty)
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
        logits = policy.logits(context, torch.zeros(len(context), policy.architecture.numbers, dtype=torch.long))
    assert ((logits[1:] - logits[0]).abs().amax((1, 2)) > 1e-3).all()


def test_placeholders_differ_or_are_zero():
    """Zeros are OFT's own; the first layer then makes the same of each, and only later ones tell them apart."""
    learned = make(OPENVLA_TINY)
    zero = reshape(learned, placeholders="zero")
    assert set(learned.state_dict()) - set(zero.state_dict()) == {"placeholders"}
    with torch.no_grad():
        batch = zero.preprocess([observe(0, OPENVLA_TINY)])
        for policy, same in ((zero, True), (learned, False)):
            first = reshape(policy, frozen_layers=1).encode(batch).hidden[0, -57:-1]
            assert torch.allclose(first[0], first[1:], atol=1e-5) == same


def test_regression_head():
    policy = reshape(make(OPENVLA_TINY), head="l1")
    assert policy.capabilities == {"sft"}
    batch = policy.preprocess(look(policy))
    with torch.no_grad():
        context = policy.encode(batch)
        chunk = policy.action_head(policy._read(context))
    assert torch.equal(policy.sample(context, None).latent, policy.sample(context, generators(0, 1, 2, 3)).latent)
    torch.testing.assert_close(policy.sample(context, None).latent, chunk)  # which several threads round otherwise
    with torch.no_grad():
        alone = [policy.sample(policy.encode(policy.preprocess([seen])), None).latent for seen in look(policy)]
    torch.testing.assert_close(torch.cat(alone), chunk, rtol=1e-4, atol=1e-5)
    # Off by 0.5 in one number of seven at one of two steps that count.
    actions, mask = chunk.clone(), torch.zeros(4, 8)
    mask[0, 0] = mask[2, 3] = 1
    actions[0, 0, 4] += 0.5
    actions[1] += 9
    loss = policy.sft_loss(context, policy.unnormalise(actions), mask, None)
    assert loss.item() == pytest.approx(0.5 / 7 / 2, rel=1e-4)
    shares = [
        policy.sft_loss(context.index(rows), policy.unnormalise(actions), mask, None, rows)
        for rows in (torch.tensor([0, 3]), torch.tensor([1, 2]))
    ]
    assert sum(share.item() for share in shares) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    actor = {id(p) for p in policy.actor_parameters()}
    assert {id(p) for p in policy.parameters() if p.grad is not None} == actor


def test_checkpointed_gradients_are_the_gradients(policy):
    """And blocks of the towers, and layers below and above the cut, are computed twice for them."""
    batch, results, computed = policy.preprocess(look(policy, 2)), [], []
    hooked = [policy.network.language_model.model.layers[i] for i in (0, -1)]
    if policy.architecture.observation == "pixels":
        backbone = policy.network.vision_backbone
        hooked += [tower.blocks[1] for tower in (backbone.featurizer, backbone.fused_featurizer)]
    for layer in hooked:
        layer.register_forward_pre_hook(lambda layer, _: computed.append(layer))
    for checkpointed in (False, True):
        policy.network.checkpointed = checkpointed
        policy.zero_grad()
        policy.sft_loss(policy.encode(batch), torch.zeros(2, policy.chunk, 7), executed(policy, 2), None).backward()
        results.append([p.grad.clone() for p in policy.parameters()])
    assert [computed.count(layer) for layer in hooked] == [3] * len(hooked)
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("changes", [{"frozen_layers": 2}, {"frozen_layers": 0, "head": "l1"}])
def test_autoregressive_decoding_needs_all_layers_and_tokens(changes):
    a = dataclasses.replace(make(OPENVLA_TINY).architecture, decoding="autoregressive", **changes)
    with pytest.raises(BenchError, match="decoding: 'autoregressive' needs"):
        assemble("x", a, Vocabulary.of(["x"]))


# Normalisation


def test_quantiles_become_one(policy):
    draw = np.random.default_rng(1)
    demonstrated = draw.uniform([-1, 0, 2, -3, 0, 0, 5], [1, 1, 6, -1, 1e-3, 4, 5], (20_000, 7))
    policy.fit_normalisation([demonstrated], draw.uniform(-0.2, 0.4, (20_000, 8)))
    ends = policy.unnormalise(torch.tensor([[-1.0] * 7, [1.0] * 7]))
    expected = np.quantile(demonstrated, (0.01, 0.99), axis=0)
    np.testing.assert_allclose(ends[:, [0, 1, 2, 3, 5]], expected[:, [0, 1, 2, 3, 5]], atol=1e-5)
    # Numbers that hardly moved keep a width of 0.1 around their middle.
    np.testing.assert_allclose(ends[:, 4], [5e-4 - 0.05, 5e-4 + 0.05], atol=1e-4)
    np.testing.assert_allclose(ends[:, 6], [4.95, 5.05], atol=1e-5)
    seen = dataclasses.replace(look(policy)[0], proprio=np.array([-9, -0.2, 0.1, 0.4, 9, 0.1, 0.1, 0.1], np.float32))
    with torch.no_grad():
        proprio = policy.encode(policy.preprocess([seen])).proprio[0]
    np.testing.assert_allclose(proprio, [-1, -1, 0, 1, 1, 0, 0, 0], atol=0.02)


def test_masked_numbers_and_the_gripper_by_hand():
    """q01 = -0.5, q99 = 1.5: a latent of 0.25 is 0.75. The gripper is not scaled: 1 is open, the robot's -1."""
    policy = reshape(make(OPENVLA_TINY), gripper="inverted")
    policy.action_low.fill_(-0.5)
    policy.action_high.fill_(1.5)
    policy.action_scaled[6] = False
    latent = torch.tensor([[0.25, -1, 1, 0, 0, 0, 0.9], [0, 0, 0, 0, 0, 0, 0.1]])
    actions = policy.unnormalise(latent)
    torch.testing.assert_close(actions[0], torch.tensor([0.75, -0.5, 1.5, 0.5, 0.5, 0.5, -1]))
    assert actions[1, 6] == 1
    torch.testing.assert_close(policy.normalise(actions)[0], torch.tensor([0.25, -1, 1, 0, 0, 0, 1]))
    assert policy.normalise(actions)[1, 6] == 0
