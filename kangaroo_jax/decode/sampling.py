"""Speculative sampling: shaped distributions, the acceptance rule, and where randomness comes from.

Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318, algorithm 2): with p the
target's distribution and q the draft model's, a token drawn from q is accepted with probability min(1, p/q), and
replaced by a draw from norm(max(0, p - q)) if not; what is committed is then distributed exactly as p. p and q are
both shaped by temperature, top-k and top-p first, so p is what plain sampling with these settings draws from.

Randomness is a function of a sequence's seed and prompt, a token's position and what the number is for, and of
nothing else: not of the batch, the row or the round. A position that is drafted again after a rejection may use its
numbers again, because what was committed before it does not depend on them. How far a round drafts may depend on what
earlier rounds drafted, where sequences decide that: rounds then have numbers of their own (`Sampling.of_round`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kangaroo_jax.config import SamplingConfig

# What a random number at a position is for; numbers for different purposes are independent.
DRAFT, ACCEPT, TARGET = range(3)
_PURPOSES = 3


@flax.struct.dataclass
class Sampling:
    """How each sequence of a batch chooses its tokens: a `SamplingConfig` per row."""

    key_words: UInt32[Array, "batch 2"]  # of each sequence; never used up, every number is derived from its position
    temperature: Float[Array, " batch"]  # 0: greedy
    top_p: Float[Array, " batch"]  # 1: off
    top_k: Int[Array, " batch"]  # 0: off

    @classmethod
    def create(cls, configs: Sequence[SamplingConfig], prompts: Sequence[Sequence[int]]) -> Sampling:
        """Host arrays for prompts (token ids), a setting with one seed for each."""
        # The prompt is part of the key so that different prompts with one seed do not share their random numbers.
        words = [(c.seed, zlib.crc32(np.asarray(ids, np.int32))) for c, ids in zip(configs, prompts, strict=True)]
        number = np.finfo(np.float32)
        # Within float32's normal numbers: these are divided by and compared with.
        temperature = [np.clip(c.temperature, number.tiny, number.max) if c.temperature else 0.0 for c in configs]
        return cls(
            key_words=np.asarray(words, np.uint32),
            temperature=np.asarray(temperature, np.float32),
            top_p=np.asarray([max(c.top_p, number.tiny) for c in configs], np.float32),
            top_k=np.asarray([c.top_k for c in configs], np.int32),
        )

    @classmethod
    def greedy(cls, batch: int) -> Sampling:
        return cls(
            key_words=jnp.zeros((batch, 2), jnp.uint32),
            temperature=jnp.zeros((batch,), jnp.float32),
            top_p=jnp.ones((batch,), jnp.float32),
            top_k=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def keys(self) -> Key[Array, " batch"]:
        # A threefry key is any 64 bits. Named, so that the text does not depend on JAX's default generator.
        return jax.random.wrap_key_data(self.key_words, impl="threefry2x32")

    def of_round(self, start: Int[Array, " batch"]) -> Sampling:
        """The same with keys of the round that begins at position `start`, for numbers that no other round has. A
        sequence has one round at most that begins there, whatever the batch."""
        # From the other end of the numbers that positions have.
        words = jax.vmap(lambda key, place: jax.random.key_data(jax.random.fold_in(key, place)))
        return self.replace(key_words=words(self.keys, jnp.uint32(2**32 - 1) - start.astype(jnp.uint32)))


def probabilities(
    logits: Float[Array, "batch *places vocab"], sampling: Sampling
) -> Float[Array, "batch *places vocab"]:
    """The distribution that is sampled from: temperature, then top-k, then top-p (transformers' order).

    Args:
      logits: float32.
      sampling: the settings of each sequence.

    Returns:
      float32, adding up to 1; 0 for tokens that are filtered out. A greedy sequence's is 1 at its most probable token:
      what is sampled from it, accepted and put in place of rejected drafts is then greedy decoding's. Tokens tied with
      the k-th are all kept (as in transformers); so are those tied with the last of the nucleus (transformers keeps
      some, by its sort's order).
    """
    with jax.named_scope("shape"):
        shape = (-1, *[1] * (logits.ndim - 1))
        temperature, top_p, top_k = (x.reshape(shape) for x in (sampling.temperature, sampling.top_p, sampling.top_k))
        best = jax.nn.one_hot(likeliest(logits), logits.shape[-1], dtype=jnp.float32)
        # The maximum goes first: divided by a small temperature, logits overflow where their differences must not.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)
        logits = jnp.where(logits < top_k_floor(logits, top_k), -jnp.inf, logits)
        probs = jax.nn.softmax(logits, axis=-1)
        probs = jnp.where(probs < nucleus_floor(probs, top_p), 0.0, probs)
        probs = jnp.where(top_p < 1, probs / jnp.sum(probs, axis=-1, keepdims=True), probs)
        return jnp.where(temperature > 0, probs, best)


def likeliest(logits: Float[Array, "*places vocab"]) -> Int[Array, "*places"]:
    """The first of the most probable tokens; -1 where a logit is NaN.

    In two passes, which XLA for CPU computes with vectors; `jnp.argmax` it computes one value after the other, which
    takes six times as long (docs/dev/performance.md). Its vectors' maximum may be any number where one is NaN."""
    last = logits.shape[-1] - 1
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(best, jnp.arange(last + 1, dtype=jnp.int32), last)
    return jnp.min(jnp.where(jnp.isnan(logits), -1, index), axis=-1)


def top_k_floor(logits: Float[Array, "... vocab"], top_k: Int[Array, "... 1"]) -> Float[Array, "... 1"]:
    """The k-th largest of logits that are at most 0; -inf where k is 0 (off) or more than there are."""
    # 0 and up: the bits are in the numbers' order. Those of -0.0 are not, and XLA leaves out an addition of 0.0.
    distance = jnp.maximum(jax.lax.bitcast_convert_type(-logits, jnp.int32), 0)

    # Found by halving the interval of candidates, as in `nucleus_floor`: the smallest distance that k or more are
    # within. No turn where no sequence asks for it.
    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(distance <= middle, axis=-1, keepdims=True) >= top_k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    infinite = jax.lax.bitcast_convert_type(jnp.full_like(logits[..., :1], jnp.inf), jnp.int32)
    turns = jnp.where(jnp.any(top_k > 0), 32, 0)
    _, high = jax.lax.fori_loop(0, turns, halve, (jnp.full_like(infinite, -1), infinite))
    return jnp.where(top_k > 0, -jax.lax.bitcast_convert_type(high, jnp.float32), -jnp.inf)


def nucleus_floor(probs: Float[Array, "... vocab"], top_p: Float[Array, "... 1"]) -> Float[Array, "... 1"]:
    """The smallest v for which the tokens more probable than v have less than `top_p` together; 0 where that is 1.

    A token is in the nucleus (Holtzman et al. 2020, arXiv 1904.09751) if its probability is at least v; the most
    probable one always is. `top_p` is above 0.
    """

    # Found by halving the interval of candidates, float32 numbers in order of their bits: 30 sums, exact, and far
    # cheaper than sorting the vocabulary (on one CPU core 0.15 ms against 8 ms for 7 rows of 4,096). No turn where no
    # sequence asks for it.
    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)
        reached = jnp.sum(jnp.where(probs > value, probs, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    high = jax.lax.bitcast_convert_type(jnp.max(probs, axis=-1, keepdims=True), jnp.int32)
    turns = jnp.where(jnp.any(top_p < 1), 30, 0)
    _, high = jax.lax.fori_loop(0, turns, halve, (jnp.full_like(high, -1), high))  # 1.0 is below bit pattern 2**30
    return jnp.where(top_p < 1, jax.lax.bitcast_convert_type(high, jnp.float32), 0.0)


def sample(
    keys: Key[Array, " batch"], positions: Int[Array, " batch"], purpose: int, weights: Float[Array, "batch vocab"]
) -> Int[Array, " batch"]:
    """One token per sequence, with probability in proportion to its weight; never one of weight 0.

    Args:
      keys: of each sequence.
      positions: of the tokens, counted in prompt and answer.
      purpose: `DRAFT` or `TARGET`.
      weights: at least one above 0.
    """

    def draw(key: Array, position: Array, row: Array) -> Array:
        # "high" takes the noise from enough bits for tokens of probability 1e-8, of which a vocabulary has many.
        return jax.random.categorical(_position_key(key, position, purpose), row, mode="high")

    return jax.vmap(draw)(keys, positions, jnp.log(weights)).astype(jnp.int32)


def uniforms(keys: Key[Array, " batch"], positions: Int[Array, "batch width"]) -> Float[Array, "batch width"]:
    """Uniform numbers in [0, 1) that decide on acceptance, for each position of each sequence."""

    def draw(key: Array, position: Array) -> Array:
        return jax.random.uniform(_position_key(key, position, ACCEPT))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, positions)


def _position_key(key: Array, position: Array, purpose: int) -> Array:
    return jax.random.fold_in(key, position * _PURPOSES + purpose)


def accepts(p: Float[Array, "*shape"], q: Float[Array, "*shape"], uniform: Float[Array, "*shape"]) -> Bool[Array, "*s"]:
    """Whether drafted tokens are accepted: with probability min(1, p/q).

    Args:
      p: the target's probability of each token.
      q: the draft model's, above 0 since the token was drawn from it.
      uniform: uniform in [0, 1).
    """
    return uniform * q < p


def residual(p: Float[Array, "... vocab"], q: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
    """norm(max(0, p - q)): what a rejected token's replacement is drawn from. p itself where that is 0 throughout,
    which only rounding can bring about."""
    excess = jnp.maximum(p - q, 0.0)
    total = jnp.sum(excess, axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), p)


def accept_and_resample(
    p: Float[Array, "batch width vocab"],
    q: Float[Array, "batch width-1 vocab"],
    drafted: Int[Array, "batch width-1"],
    length: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    positions: Int[Array, " batch"],
) -> tuple[Int[Array, "batch width"], Int[Array, " batch"]]:
    """The accepted drafts, and the token after them.

    Args:
      p: the target's distributions at the drafted positions and the next.
      q: the draft model's, that the drafted tokens were drawn from.
      drafted: the drafted tokens.
      length: how many of them a sequence has; the rest are not looked at.
      keys: of each sequence.
      positions: of each sequence's first drafted token.

    Returns:
      Tokens, and how many drafts at their beginning are accepted; the token after those is the target's own: a
      rejected one's replacement, or the one after a fully accepted draft. Tokens beyond it are meaningless.
    """
    if not drafted.shape[1]:
        # Not as below: XLA would compute what is taken from an array of zeros while it compiles, for seconds in a large
        # batch. The residual is p but for rounding, which has to be the same.
        return sample(keys, positions, TARGET, residual(p[:, 0], jnp.zeros_like(p[:, 0])))[:, None], 0 * length
    index = jnp.arange(p.shape[1])
    is_drafted = index < length[:, None]
    chosen = drafted[:, :, None]
    accepted = is_drafted[:, :-1] & accepts(
        jnp.take_along_axis(p[:, :-1], chosen, axis=-1)[..., 0],
        jnp.take_along_axis(q, chosen, axis=-1)[..., 0],
        uniforms(keys, positions[:, None] + index[:-1]),
    )
    count = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1, dtype=jnp.int32)
    # After the last draft q counts as 0, and the residual is p.
    q = jnp.where(is_drafted[:, :, None], jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
    here = count[:, None, None]
    weights = residual(jnp.take_along_axis(p, here, axis=1)[:, 0], jnp.take_along_axis(q, here, axis=1)[:, 0])
    token = sample(keys, positions + count, TARGET, weights)
    tokens = jnp.where(index < count[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), token[:, None])
    return tokens, count
