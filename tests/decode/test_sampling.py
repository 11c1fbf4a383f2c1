"""Sampling: Kangaroo's tokens are distributed as the target's own.

Truth: a model with a vocabulary of 16, whose distribution over the first three tokens after a prompt is enumerated:
the target run on all 256 beginnings without a cache, its logits shaped by the numpy implementation below. Counts of
samples are compared with it by chi-square. A correct sampler fails one such test with probability 1e-4, so one of all
of them with less than 0.003; seeds are fixed, so a run on one platform always gives the same answer.

Samples are independent sequences with a seed each, decoded by the compiled functions that `generate` runs, with many
small batches side by side under `jax.vmap`; another test ties this to `generate` itself.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from kangaroo_jax import DraftConfig, InputError, LookupConfig, SamplingConfig, TreeConfig, generate, generate_plain
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.decode import draft_lookup, pick, sampling
from kangaroo_jax.decode.decide import Costs
from kangaroo_jax.decode.prefill import Admission, prefill
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

FALSE_ALARM = 1e-4
SAMPLES = 200_000
NEW = 3  # tokens whose joint distribution is enumerated
EXIT_LAYER = 1
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)
PROMPTS = ([3, 14, 1], [7, 7], [0, 5, 10, 15], [9])
# For look-ups: every token has been there, so that the first rounds look up; tokens that are in the text already; and
# few, so that the other rows draft.
REPETITIVE = ([*range(0, 16, 3), *range(1, 16, 3), *range(2, 16, 3)], [7, 1, 12, 5, 2, 7, 9, 14, 10], [9, 4, 11], [6])
NO_EOS = np.full(4, -1, np.int32)


@functools.cache
def small_models():
    """A target whose distributions are neither flat nor sure, and an adapter whose differ clearly from them."""
    target = TargetModel(CONFIG, rngs=nnx.Rngs(0))
    target = jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, target)
    target.lm_head[...] *= 2.2  # so that the draft model is sure at times
    for projection in (target.layers[1].self_attn.o_proj, target.layers[1].mlp.down_proj):
        projection[...] *= 0.6  # so that drafts are accepted at times
    adapter = Adapter(CONFIG, rngs=nnx.Rngs(1))
    return target, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, adapter)


def shaped(logits, config):
    """Temperature, top-k, top-p in float64, as their definitions say, by sorting. No two logits here are equal."""
    logits = logits.astype(np.float64) / config.temperature
    order = np.argsort(-logits, axis=-1)
    probs = np.exp(np.take_along_axis(logits, order, -1) - logits.max(-1, keepdims=True))
    if config.top_k:
        probs[..., config.top_k :] = 0
    probs /= probs.sum(-1, keepdims=True)
    if config.top_p < 1:
        probs[np.cumsum(probs, axis=-1) - probs >= config.top_p] = 0  # those before it are enough
        probs /= probs.sum(-1, keepdims=True)
    result = np.zeros_like(probs)
    np.put_along_axis(result, order, probs, -1)
    return result


@functools.cache
def target_logits(prompt, length):
    """The target's logits for each of the next tokens, after every possible beginning: [16**(length-1), length, 16]."""
    beginnings = np.asarray(list(itertools.product(range(16), repeat=length - 1)), np.int32)
    tokens = np.concatenate([np.tile(np.asarray(prompt, np.int32), (len(beginnings), 1)), beginnings], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def forward(target, tokens):
        hidden, _ = shallow_apply(target, tokens, positions, exit_layer=EXIT_LAYER)
        hidden, _ = deep_apply(target, hidden, positions, exit_layer=EXIT_LAYER)
        return lm_head(target, hidden[:, -length:])

    return np.asarray(forward(small_models()[0], tokens))


def exact(prompt, config, length=NEW):
    """The joint distribution of the first `length` tokens: [16] * length."""
    probs = shaped(target_logits(tuple(prompt), length), config)
    beginnings = np.asarray(list(itertools.product(range(16), repeat=length - 1)))
    joint = np.ones(16 ** (length - 1))
    for place in range(length - 1):
        joint *= probs[np.arange(len(joint)), place, beginnings[:, place]]
    return (joint[:, None] * probs[:, -1]).reshape([16] * length)


@functools.cache
def program(gamma, batch, widths, new, accepts, residual, tree, walk, lookup, certain, decides, of_round):
    """From keys and settings to tokens and statistics, in batches of `batch`; gamma 0 is plain decoding. `accepts` and
    `residual`, or with a tree `walk`, or with look-ups also `certain`, or where sequences decide how far to draft also
    `of_round`, are the rule's functions, which become part of what is compiled."""
    prompts = batch_prompts(batch, lookup)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((batch, lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    shape = RoundShape(EXIT_LAYER, gamma, tree, widths, lookup) if gamma else RoundShape.plain(lookup)
    if decides:
        shape = dataclasses.replace(shape, kept=shape.max_commit + 1)
    capacity = int(lengths.max()) + new + shape.positions
    # Not the CPU's own: it updates sequence by sequence, which thousands are too many for.
    static = {"exit_layer": shape.exit_layer, "capacity": capacity, "backend": DenseBackend(), "sampled": True}
    static |= {"looks_up": lookup is not None, "kept": shape.kept}
    eos = np.tile(NO_EOS, (batch, 1))

    def one_batch(target, adapter, settings, eta, costs, key_words):
        settings = settings.replace(key_words=key_words)
        state = prefill(
            target, adapter, tokens, lengths, Admission(np.full(batch, new, np.int32), eos, settings), **static
        )
        first = state.token
        _, chunk = run_rounds(
            target, adapter, state, ~state.finished, eta, 0, new, costs, shape=shape, sampled=True, tokens=new
        )
        # A chunk ends with the first sequence that has so many tokens: rounds go on until all have.
        return jnp.concatenate([first[:, None], chunk.tokens[:, : new - 1]], axis=1), chunk

    def run(target, adapter, settings, eta, costs):
        # A few thousand sequences at a time, so that their caches stay near the core.
        key_words = settings.key_words.reshape(-1, max(1, 4000 // batch), batch, 2)
        settings = jax.tree.map(lambda x: x[:batch], settings)
        return jax.lax.map(jax.vmap(functools.partial(one_batch, target, adapter, settings, eta, costs)), key_words)

    # Half the time goes into compiling.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 1})


def draw(
    config, gamma, eta, batch, widths=None, count=SAMPLES, new=NEW, tree=None, drafted=None, lookup=None, costs=None
):
    """Tokens [count, new] of `count` sequences with a seed each; and the numbers of tokens that each round drafted and
    committed. `drafted`: the tokens that drafts are made of, if not all. `costs`: of rounds, where sequences decide."""
    target, adapter = small_models()
    if drafted is not None:
        adapter = nnx.clone(adapter)
        adapter.draft_vocabulary = DraftVocabulary(target, jnp.asarray(drafted))
    most = max(gamma, 0 if lookup is None else lookup.max_tokens) if tree is None else tree.budget
    rule = (sampling.accepts, sampling.residual, tree, pick.walk, lookup, draft_lookup.certain)
    rule += (costs is not None, sampling.Sampling.of_round)
    run = program(gamma, batch, widths or (most + 1,), new, *rule)
    prompts = [prompt for _ in range(count // batch) for prompt in batch_prompts(batch, lookup)]
    configs = [dataclasses.replace(config, seed=seed) for seed in range(count)]
    settings = sampling.Sampling.create(configs, prompts)
    tokens, chunk = jax.device_get(run(target, adapter if gamma else None, settings, np.float32(eta), costs))
    used = np.arange(chunk.draft_lengths.shape[-1]) < chunk.num_rounds[..., None]
    steps = chunk.draft_lengths if lookup is None else chunk.draft_lengths + 100 * chunk.lookup_lengths
    return tokens.reshape(count, new), steps[used], chunk.accept_lengths[used]


def batch_prompts(batch, lookup=None):
    prompts = PROMPTS if lookup is None else REPETITIVE
    return [prompts[i % len(prompts)] for i in range(batch)]


def chi_square(counts, probs):
    """The statistic and its degrees of freedom; cells with fewer than 10 expected are one cell."""
    assert counts[probs == 0].sum() == 0, "a token that is filtered out was drawn"
    expected = probs * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 10:  # too few even together: into the cell before
        observed, expected = (np.append(x[:-2], x[-2:].sum()) for x in (observed, expected))
    return ((observed - expected) ** 2 / expected).sum(), len(expected) - 1


def p_value(tokens, batch, distribution, places=slice(0, NEW), prompts=PROMPTS):
    """The probability that right samples are as far from the enumerated distributions as these, or farther.

    Args:
      tokens: from `draw`.
      batch: as it was for `draw`.
      distribution: from a prompt to the exact distribution of the tokens at `places`.
    """
    statistic, freedom = 0.0, 0
    prompts = prompts[:batch]
    for i, prompt in enumerate(prompts):
        expected = distribution(prompt)
        cells = np.ravel_multi_index(tokens[i :: len(prompts), places].T, expected.shape)
        one, cells = chi_square(np.bincount(cells, minlength=expected.size), expected.ravel())
        statistic, freedom = statistic + one, freedom + cells
    result = scipy.stats.chi2.sf(statistic, freedom)
    print(f"chi-square {statistic:.0f} with {freedom} degrees of freedom, p = {result:.3g}")
    return result


# Every gamma with two of the three etas, every eta with two temperatures or more; batches of one, of four different
# prompts, and of thousands; each filter alone, both and none. Settings of one gamma share a compiled program.
SETTINGS = [
    # temperature, top_p, top_k, gamma, eta, batch
    pytest.param(1.0, 0.8, 9, 1, 0.0, 1, marks=pytest.mark.long),
    pytest.param(0.7, 0.95, 9, 1, 1.0, 1, marks=pytest.mark.long),
    (1.0, 1.0, 0, 1, 0.0, 4000),  # the settings that a wrong rule is found with, below
    pytest.param(1.0, 1.0, 0, 2, 0.0, 4, marks=pytest.mark.long),
    pytest.param(1.3, 1.0, 0, 2, 0.6, 4, marks=pytest.mark.long),
    pytest.param(1.3, 0.9, 0, 3, 1.0, 4000, marks=pytest.mark.long),
    pytest.param(0.7, 0.8, 0, 3, 0.0, 4000, marks=pytest.mark.long),
    pytest.param(1.3, 1.0, 4, 5, 0.0, 4000, marks=pytest.mark.long),
    pytest.param(1.0, 1.0, 4, 5, 0.6, 4000, marks=pytest.mark.long),
    pytest.param(1.0, 0.9, 9, 0, 0.0, 4, marks=pytest.mark.long),  # plain decoding
]


def test_without_drafts_a_token_is_the_one_behind_an_empty_draft_and_nothing_is_gathered():
    batch, vocabulary = 64, 50
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (batch, 1, vocabulary)))
    keys, places, none = jax.random.split(jax.random.key(2), batch), jnp.arange(batch), jnp.zeros(batch, int)
    empty = p, jnp.zeros((batch, 0, vocabulary)), jnp.zeros((batch, 0), int), none, keys, places
    q, drafted = jnp.full((batch, 1, vocabulary), 1 / vocabulary), jnp.ones((batch, 1), int)
    tokens, count = sampling.accept_and_resample(*empty)
    expected, _ = sampling.accept_and_resample(jnp.concatenate([p, p], 1), q, drafted, none, keys, places)
    assert tokens.tolist() == expected[:, :1].tolist()
    assert len(set(tokens[:, 0].tolist())) > 20
    assert count.tolist() == none.tolist()
    assert "gather" not in str(jax.make_jaxpr(sampling.accept_and_resample)(*empty))


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "gamma", "eta", "batch"), SETTINGS)
def test_tokens_are_distributed_as_the_target_s(temperature, top_p, top_k, gamma, eta, batch):
    config = SamplingConfig(temperature, top_p, top_k)
    # With gamma 2, further tokens: those after a draft accepted whole, and rounds that begin after one.
    new = 5 if gamma == 2 else NEW
    tokens, drafted, committed = draw(config, gamma, eta, batch, new=new)
    assert p_value(tokens, batch, lambda prompt: exact(prompt, config)) > FALSE_ALARM
    if gamma == 2:
        first = tokens[::4]  # enough to enumerate one prompt's
        assert p_value(first, 1, lambda prompt: exact(prompt, config, 5).sum((0, 1, 2)), slice(3, 5)) > FALSE_ALARM
        assert set(committed) == {1, 2, 3}
    # The cases must be worth testing: drafts both accepted and refused, of several lengths.
    if gamma:
        assert 0.1 < (committed == 1).mean() < 0.9
        assert set(drafted) == {0.0: {gamma}, 0.6: set(range(1, gamma + 1)), 1.0: {1}}[eta]


@pytest.mark.long
def test_a_draft_vocabulary_leaves_the_distribution_alone():
    config = SamplingConfig(1.0)
    # In an order of its own, so that a probability left at its place in the list would show.
    drafted = [9, 2, 14, 0, 7, 5, 12, 3, 10]
    tokens, _, committed = draw(config, 1, 0.0, 4000, drafted=drafted)
    assert p_value(tokens, 4, lambda prompt: exact(prompt, config)) > FALSE_ALARM
    assert 0.1 < (committed == 1).mean() < 0.9


def accept_always(p, q, uniform):
    return jnp.full(uniform.shape, True)


def target_itself(p, q):
    return p


@pytest.mark.long
@pytest.mark.parametrize(("name", "rule"), [("accepts", accept_always), ("residual", target_itself)])
def test_a_wrong_rule_is_found(monkeypatch, name, rule):
    monkeypatch.setattr(sampling, name, rule)
    config = SamplingConfig(1.0)
    tokens, _, _ = draw(config, 1, 0.0, 4000)
    assert p_value(tokens, 4, lambda prompt: exact(prompt, config)) < FALSE_ALARM


TREES = [
    # temperature, top_p, top_k, gamma, eta, batch, K, budget
    pytest.param(1.0, 1.0, 0, 2, 0.0, 1, 3, 7, marks=pytest.mark.long),
    pytest.param(1.3, 0.9, 9, 3, 0.6, 4, 2, 5, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "gamma", "eta", "batch", "topk", "budget"), TREES)
def test_tokens_of_trees_are_distributed_as_the_target_s(temperature, top_p, top_k, gamma, eta, batch, topk, budget):
    config = SamplingConfig(temperature, top_p, top_k)
    tokens, levels, committed = draw(config, gamma, eta, batch, tree=TreeConfig(topk, budget))
    assert p_value(tokens, batch, lambda prompt: exact(prompt, config)) > FALSE_ALARM
    assert 0.1 < (committed == 1).mean() < 0.9
    assert set(levels) == ({gamma} if eta == 0 else set(range(1, gamma + 1)))


@pytest.mark.long
def test_a_tree_that_is_accepted_always_is_found(monkeypatch):
    walk = pick.walk

    def first_child(choices, drafted, length, tree):
        nodes = jnp.arange(choices.shape[1])
        follows = tree.parents[:, None, : drafted.shape[1]] == nodes[:, None]
        child = jnp.take_along_axis(drafted, jnp.argmax(follows, axis=-1), axis=1)
        return walk(jnp.where(jnp.any(follows, axis=-1), child, choices), drafted, length, tree)

    monkeypatch.setattr(pick, "walk", first_child)
    config = SamplingConfig(1.0)
    tokens, _, _ = draw(config, 2, 0.0, 1, tree=TreeConfig(3, 7))
    assert p_value(tokens, 1, lambda prompt: exact(prompt, config)) < FALSE_ALARM


LOOKUPS = [
    # temperature, top_p, top_k, gamma, tokens, shortest and longest n-gram
    (1.0, 1.0, 0, 2, 3, 1, 2),
    (1.3, 0.9, 9, 3, 2, 1, 3),
    (1.0, 1.0, 0, 0, 2, 1, 2),  # without a draft model
]


@pytest.mark.long
@pytest.mark.parametrize(("temperature", "top_p", "top_k", "gamma", "length", "min_ngram", "max_ngram"), LOOKUPS)
def test_tokens_with_look_ups_are_distributed_as_the_target_s(
    temperature, top_p, top_k, gamma, length, min_ngram, max_ngram
):
    config, lookup = SamplingConfig(temperature, top_p, top_k), LookupConfig(length, min_ngram, max_ngram)
    tokens, steps, committed = draw(config, gamma, 0.0, 4, lookup=lookup)
    assert p_value(tokens, 4, lambda prompt: exact(prompt, config), prompts=REPETITIVE) > FALSE_ALARM
    # The cases must be worth testing: rounds of both kinds, looked-up drafts accepted in part and in full.
    assert set(steps) == {gamma, 100 * length}
    looked_up = committed[steps == 100 * length]
    assert 0.1 < (looked_up == 1).mean() < 0.95
    assert set(looked_up) == set(range(1, min(NEW, length + 2)))
    assert 0.2 < (steps == gamma).mean() < 0.8


@pytest.mark.long
def test_looked_up_tokens_that_are_accepted_as_if_they_were_drawn_are_found(monkeypatch):
    def as_a_draft_model(tokens, vocabulary):
        return 0.5 * jax.nn.one_hot(tokens, vocabulary) + 0.5 / vocabulary

    monkeypatch.setattr(draft_lookup, "certain", as_a_draft_model)
    config = SamplingConfig(1.0)
    tokens, _, _ = draw(config, 2, 0.0, 4, lookup=LookupConfig(3, 1, 2))
    assert p_value(tokens, 4, lambda prompt: exact(prompt, config), prompts=REPETITIVE) < FALSE_ALARM


# Costs by which a sequence goes on with some confidences and not with others, and tries again soon; and a look-up that
# is dear enough to be left at times.
DECIDING = RoundCosts(1, 0.4, ((1, 1.0), (3, 1.1)), 0.0)


def deciding(gamma, lookup=None):
    costs = Costs.of(DECIDING, 0.5, 1, gamma, lookup)
    return costs.replace(pause=np.asarray([2, 2], np.int32), doubled=np.int32(1))


@pytest.mark.long
@pytest.mark.parametrize("lookup", [None, LookupConfig(2, 1, 2)], ids=["drafts", "look-ups"])
def test_tokens_of_sequences_that_decide_are_distributed_as_the_target_s(lookup):
    config, new = SamplingConfig(1.0), 6
    costs = deciding(2, lookup)
    tokens, steps, _ = draw(config, 2, 0.0, 4, (1, 3), new=new, lookup=lookup, costs=costs)
    prompts = PROMPTS if lookup is None else REPETITIVE
    assert p_value(tokens, 4, lambda prompt: exact(prompt, config), prompts=prompts) > FALSE_ALARM
    # Tokens by which a sequence has learned something.
    first = tokens[::4]
    late = exact(prompts[0], config, 5).sum((0, 1))
    assert p_value(first, 1, lambda prompt: late, slice(2, 5), prompts) > FALSE_ALARM
    # The cases must be worth testing: rounds of all kinds and lengths.
    assert set(steps) == {0, 1, 2} | ({200} if lookup else set())
    assert (steps == 0).mean() > 0.02


def test_chi_square_is_calibrated():
    # Samples drawn from the enumeration itself: p-values are uniform, and a slightly different distribution is found.
    rng = np.random.default_rng(0)
    probs = exact(PROMPTS[0], SamplingConfig(1.0)).ravel()
    probs /= probs.sum()

    def p_of(distribution):
        statistic, freedom = chi_square(rng.multinomial(SAMPLES, distribution), probs)
        return scipy.stats.chi2.sf(statistic, freedom)

    p_values = [p_of(probs) for _ in range(200)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert p_of(0.95 * probs + 0.05 * np.roll(probs, 1)) < FALSE_ALARM


# --- The public calls.


@functools.cache
def small_pair():
    target, adapter = small_models()
    return Target(target, None, "small", "small", ()), TrainedAdapter(adapter, EXIT_LAYER, "small adapter", None)


DRAFT = DraftConfig(EXIT_LAYER, 2, 0.6)


@pytest.mark.long
def test_generate_gives_the_tokens_whose_distribution_is_tested():
    config = SamplingConfig(1.3)
    tokens, _, _ = draw(config, 2, 0.6, 4, new=5)
    for i in (0, 4, 8):
        seeded = dataclasses.replace(config, seed=range(i, i + 4))
        out = generate(*small_pair(), list(PROMPTS), 40, DRAFT, seeded, eos_token_ids=())
        assert [sequence[:5] for sequence in out.tokens] == tokens[i : i + 4].tolist()


def ways():
    """Kangaroo and plain decoding of prompts with a `SamplingConfig`, until token 11 or for 40 tokens."""
    target, adapter = small_pair()
    return (
        lambda prompts, config: generate(target, adapter, prompts, 40, DRAFT, config, eos_token_ids=[11]),
        lambda prompts, config: generate_plain(target, prompts, 40, config, eos_token_ids=[11]),
    )


@pytest.mark.long
@pytest.mark.parametrize("way", [0, 1], ids=["kangaroo", "plain"])
def test_the_same_seed_gives_the_same_text_whatever_the_batch(way):
    call, config = ways()[way], SamplingConfig(0.9, seed=5)
    prompts = [[1, 2, 3], [7], [5] * 17, [7]]
    together = call(prompts, config)
    assert together.tokens[1] == together.tokens[3]  # equal prompts, one seed
    assert call(prompts[::-1], config).tokens == together.tokens[::-1]
    for i, prompt in enumerate(prompts[:3]):
        alone = call([prompt], config)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.accept_lengths[0] == together.accept_lengths[i]
        assert alone.draft_lengths[0] == together.draft_lengths[i]
    several = call(prompts, dataclasses.replace(config, seed=[5, 5, 6, 8]))
    assert [a == b for a, b in zip(several.tokens, together.tokens, strict=True)] == [True, True, False, False]
    sequences = together.tokens + several.tokens
    assert any(11 in sequence for sequence in sequences)
    for sequence in sequences:
        assert 11 not in sequence[:-1]
        assert len(sequence) == 40 or sequence[-1] == 11


@pytest.mark.long
def test_small_temperatures_and_the_most_probable_token_alone_are_greedy_rounds():
    # Drafts, confidences and all: a threshold does not change its meaning with the temperature.
    prompts = [[1, 2, 3], [7], [5] * 17, [7]]
    kangaroo, plain = ways()
    greedy = kangaroo(prompts, SamplingConfig())
    for settings in (SamplingConfig(1e-6), SamplingConfig(1e-45), SamplingConfig(1.0, top_k=1)):
        out = kangaroo(prompts, settings)
        assert out.tokens == greedy.tokens
        assert out.accept_lengths == greedy.accept_lengths
        assert out.draft_lengths == greedy.draft_lengths
        assert plain(prompts, settings).tokens == greedy.tokens


def test_seeds_that_are_not_one_per_prompt_are_named():
    with pytest.raises(InputError, match="seed must be one integer or one per prompt, found 3 for 2"):
        generate_plain(small_pair()[0], [[1], [2]], 4, sampling=SamplingConfig(1.0, seed=[1, 2, 3]))


# --- The parts.


probabilities = jax.jit(sampling.probabilities)


def sampling_of(*settings, rows=1):
    return sampling.Sampling.create([SamplingConfig(*settings)] * rows, [[0]] * rows)


SHAPES = list(itertools.product((0.3, 1.0, 2.5), (1.0, 0.95, 0.5, 0.01), (0, 1, 7, 300, 1000)))


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_distributions_equal_transformers(settings):
    torch = pytest.importorskip("torch", reason="compares with transformers' logits warpers, which need torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_p, top_k = settings
    logits = np.random.default_rng(0).normal(0, 3, (20, 300)).astype(np.float32)
    # The order that transformers' `generate` builds them in, each where it is not off.
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = torch.from_numpy(logits)
    for warper in warpers:
        theirs = warper(None, theirs)
    theirs = theirs.softmax(-1).numpy()
    ours = np.asarray(probabilities(jnp.asarray(logits), sampling_of(*settings, rows=len(logits))))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    np.testing.assert_allclose(ours, shaped(logits, SamplingConfig(*settings)), rtol=1e-4)


@pytest.mark.parametrize(
    ("probs", "settings", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], (1.0, 0.75, 0), 2),  # exactly reached
        ([0.5, 0.25, 0.125, 0.125], (1.0, 0.751, 0), 4),
        ([0.4, 0.3, 0.2, 0.1], (1.0, 0.71, 0), 3),
        ([0.4, 0.3, 0.2, 0.1], (1e-45, 1.0, 0), 1),
        ([0.4, 0.3, 0.2, 0.1], (5.0, 1.0, 1), 1),
        ([0.25, 0.25, 0.25, 0.25], (1.0, 0.3, 0), 4),  # ties with the last of the nucleus
        ([0.25, 0.25, 0.25, 0.25], (1.0, 1.0, 1), 4),  # ties with the k-th
        ([0.5, 0.2, 0.2, 0.1], (1.0, 0.6, 0), 3),
        ([0.5, 0.2, 0.2, 0.1], (1.0, 1.0, 2), 3),
        ([0.5, 0.2, 0.2, 0.1], (1.0, 0.5, 2), 1),
        ([0.1, 0.9, 0.0, 0.0], (1.0, 1e-30, 0), 1),
        ([0.1, 0.9, 0.0, 0.0], (1.0, 0.999999, 3), 2),
    ],
)
def test_filters_at_their_edges(probs, settings, kept):
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray([probs], np.float32))
    ours = np.asarray(probabilities(jnp.asarray(logits), sampling_of(*settings, rows=len(logits))))[0]
    assert (ours > 0).sum() == kept
    np.testing.assert_allclose(ours.sum(), 1, rtol=1e-6)


def test_acceptance_at_its_edges():
    p = jnp.asarray([0.0, 0.0, 0.5, 0.2, 0.2, 1.0])
    q = jnp.asarray([0.5, 0.5, 0.5, 0.4, 0.4, 1e-30])
    uniform = jnp.asarray([0.0, 0.9, 0.9999999, 0.49, 0.51, 0.9999999])
    assert sampling.accepts(p, q, uniform).tolist() == [False, False, True, True, False, True]


def test_residual_is_a_distribution_even_without_excess():
    p = jnp.asarray([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    q = jnp.asarray([[0.5, 0.5, 0.0], [0.7, 0.3, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(sampling.residual(p, q), [[0.5, 0.5, 0], [0, 0, 1], [0.6, 0.4, 0]], rtol=1e-6)


def test_random_numbers_for_different_purposes_are_independent():
    configs = [SamplingConfig(1.0, seed=seed) for seed in range(20_000)]
    keys = sampling.Sampling.create(configs, [[0]] * 20_000).keys
    places = jnp.full(20_000, 9)
    flat = jnp.full((20_000, 64), 1 / 64)
    columns = [sampling.sample(keys, places, purpose, flat) for purpose in (sampling.DRAFT, sampling.TARGET)]
    columns += [sampling.sample(keys, places + 1, sampling.DRAFT, flat)]
    columns += [sampling.uniforms(keys, places[:, None])[:, 0]]
    correlation = np.corrcoef(np.asarray(columns, np.float64))
    assert np.abs(correlation - np.eye(4)).max() < 0.04  # more than 5 standard errors
