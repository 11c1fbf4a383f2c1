"""Settings as frozen dataclasses, validated on construction.

`DraftConfig` says how to draft (with `TreeConfig`, a tree; with `LookupConfig`, also from the text itself; with
`DecideConfig`, only as far as it pays),
`SamplingConfig` how to choose tokens, `EngineConfig` how much to take on at a time, `ServeConfig` what a server takes
from its clients, `TrainConfig` how to train an adapter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kangaroo_jax.buckets import is_bucket
from kangaroo_jax.checks import check_count, check_positive, is_integer, is_number
from kangaroo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The shape of a drafted tree (paper, NeurIPS version).

    Attributes:
      topk: K, the most nodes of a level that are drafted on from, and the children that each of them gets.
      budget: M, the most drafted tokens that a round verifies: the likeliest of the tree.

    Raises:
      InputError: for a value out of range.
    """

    topk: int = 10
    budget: int = 32

    def __post_init__(self) -> None:
        check_count("tree_topk", self.topk)
        check_count("tree_budget", self.budget)

    def drafted(self, levels: int) -> int:
        """The most tokens of a tree of so many levels that are verified: what a draft holds, what verification passes
        over and what the caches reserve room for. The first level has K candidates, each later one K^2."""
        return min(self.budget, self.topk + (levels - 1) * self.topk**2)


_MOST_SEARCHED = 32  # last tokens; each is a comparison in the compiled program
_MOST_SLOTS, _MOST_STEPS = 1 << 20, 1e6  # beyond any machine's batch size, and cost of a round


@dataclasses.dataclass(frozen=True)
class LookupConfig:
    """Drafts that are looked up in the sequence's own tokens: its last few tokens are searched for in what comes before
    them, and what followed there is drafted (section "Drafts from the text itself" of docs/drafts.md).

    Attributes:
      max_tokens: tokens that a look-up drafts; may be more than gamma, as each costs no draft step.
      min_ngram: with fewer last tokens found again than this, nothing is looked up.
      max_ngram: the most last tokens that are searched for; the place where the most of them are found is taken.

    Raises:
      InputError: for a value out of range.
    """

    max_tokens: int = 10
    min_ngram: int = 3
    max_ngram: int = 4

    def __post_init__(self) -> None:
        check_count("lookup_tokens", self.max_tokens)
        check_count("lookup_min_ngram", self.min_ngram)
        check_count("lookup_max_ngram", self.max_ngram)
        if self.max_ngram > _MOST_SEARCHED:
            raise InputError(f"lookup_max_ngram must be at most {_MOST_SEARCHED}, found {self.max_ngram!r:.40}")
        if self.max_ngram < self.min_ngram:
            raise InputError(
                f"lookup_max_ngram must be at least lookup_min_ngram ({self.min_ngram}), found {self.max_ngram}"
            )


@dataclasses.dataclass(frozen=True)
class RoundCosts:
    """What the parts of a round cost at one batch size, in plain steps of that batch.

    Attributes:
      batch_size: sequences decoded together.
      draft_step: one more drafted token.
      verification: (tokens, cost) pairs, by ascending tokens from 1 on: a round that verifies so many tokens of each
        sequence and takes no draft step. Costs between them are taken to lie on a straight line.
      shallow: share of a plain step that the shallow layers take.

    Raises:
      InputError: for a value out of range.
    """

    batch_size: int
    draft_step: float
    verification: tuple[tuple[int, float], ...]
    shallow: float

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if self.batch_size > _MOST_SLOTS:
            raise InputError(f"batch_size must be at most {_MOST_SLOTS}, found {self.batch_size!r:.40}")
        for name, value in (("draft_step", self.draft_step), ("shallow", self.shallow)):
            if not is_number(value) or not 0 <= value <= _MOST_STEPS:
                raise InputError(f"{name} must be a number of plain steps, 0 to {_MOST_STEPS}, found {value!r:.40}")
        tokens = [pair[0] for pair in self.verification]
        if not tokens or tokens[0] != 1 or sorted(set(tokens)) != tokens:
            raise InputError(f"verification must be of ascending numbers of tokens, from 1 on, found {tokens}")
        for count, cost in self.verification:
            check_count("verification", count)
            if not is_number(cost) or not 0 < cost <= _MOST_STEPS:
                raise InputError(
                    f"the cost of verifying {count} must be a number of plain steps, above 0 and at most "
                    f"{_MOST_STEPS}, found {cost!r:.40}"
                )


@dataclasses.dataclass(frozen=True)
class DecideConfig:
    """Each sequence decides before each round what to draft, and how far (section "Deciding how far to draft" of
    docs/drafts.md).

    Attributes:
      costs: by batch size; an engine takes those of the nearest one. None at all: they are predicted from the bytes
        that a round reads.
      acceptance: chance that a drafted token is accepted, for sequences that know nothing of their own yet.
      machine: that the costs were measured on; "" where they were not.
      from_slots: engines of fewer slots keep to gamma and eta, for where these were measured to be faster. In a batch
        they hardly are: all sequences wait for the longest draft.

    Raises:
      InputError: for a value out of range, or a batch size that is there twice.
    """

    costs: tuple[RoundCosts, ...] = ()
    acceptance: float = 0.7
    machine: str = ""
    from_slots: int = 1

    def __post_init__(self) -> None:
        check_count("from_slots", self.from_slots)
        if not is_number(self.acceptance) or not 0 <= self.acceptance <= 1:
            raise InputError(f"acceptance must be between 0 and 1, found {self.acceptance!r}")
        if not isinstance(self.machine, str):
            raise InputError(f"machine must be a name, found {self.machine!r}")
        sizes = [costs.batch_size for costs in self.costs]
        if len(set(sizes)) < len(sizes):
            raise InputError(f"costs must be of different batch sizes, found {sizes}")

    def nearest(self, batch_size: int) -> RoundCosts:
        """The costs of the batch size whose ratio to `batch_size` is nearest to 1; of two, the larger."""
        return min(self.costs, key=lambda costs: (abs(math.log(costs.batch_size / batch_size)), -costs.batch_size))


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """How a round drafts (paper, section 3.2).

    Attributes:
      exit_layer: number of shallow layers l; None means the one the adapter was trained for.
      max_draft_len: gamma, the most tokens drafted in a round one after another: the depth of a tree.
      threshold: eta; drafting stops after a token whose top-1 draft probability was below it, and in a tree at a depth
        where no path has this probability. 0 never stops early.
      tree: None drafts a single sequence.
      lookup: a round drafts what is looked up where something is found, and else as the other settings say; None never
        looks up.
      decide: each sequence decides before a round whether to draft nothing, what was looked up, or with the draft model
        up to gamma tokens; eta is then not used. None: the paper's rule, gamma and eta in every round.

    Raises:
      InputError: for a value out of range, or a tree together with look-ups or with deciding.
    """

    exit_layer: int | None = None
    max_draft_len: int = 6
    threshold: float = 0.6
    tree: TreeConfig | None = None
    lookup: LookupConfig | None = None
    decide: DecideConfig | None = None

    def __post_init__(self) -> None:
        if self.exit_layer is not None:
            check_count("exit_layer", self.exit_layer)
        check_count("max_draft_len", self.max_draft_len)
        if not is_number(self.threshold) or not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"threshold must be between 0 and 1, found {self.threshold!r}")
        if self.tree is not None and self.lookup is not None:
            raise InputError("trees and look-ups exclude each other; leave one out (--notree, or --lookup_tokens=0)")
        if self.tree is not None and self.decide is not None:
            raise InputError("trees and deciding how far to draft exclude each other; use --notree or --nodecide")
        if self.tree is not None and self.tree.budget < self.max_draft_len:
            raise InputError(
                f"tree_budget must be at least max_draft_len ({self.max_draft_len}), or the deepest path cannot be "
                f"verified; found {self.tree.budget}"
            )

    def at(self, slots: int) -> DraftConfig:
        """What it comes to in an engine of so many slots: without deciding where that is for more of them."""
        if self.decide is None or slots >= self.decide.from_slots:
            return self
        return dataclasses.replace(self, decide=None)

    def __str__(self) -> str:
        """How a report names it: gamma, eta or deciding, a tree's shape, and look-ups."""
        shape = "" if self.tree is None else f", trees of K {self.tree.topk} and budget {self.tree.budget}"
        lookup = self.lookup
        if lookup is not None:
            shape = f", look-ups of {lookup.max_tokens} tokens by {lookup.min_ngram} to {lookup.max_ngram}"
        how = f"eta {self.threshold}" if self.decide is None else "each sequence decides how far"
        return f"gamma {self.max_draft_len}, {how}{shape}"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen from the target's distribution. The default is greedy decoding.

    The same prompt and seed give the same text whatever else is in the batch; so prompts that are equal, with one
    seed, give equal texts. (Where sequences decide how far to draft, the text also depends on the number of slots.) For
    several samples of one prompt, give it several times, with a seed for each.

    Attributes:
      temperature: logits are divided by it; 0 is greedy, and the other settings then have no effect.
      top_p: the fewest most probable tokens that have this much probability together are kept; 1 keeps all.
      top_k: this many most probable tokens are kept; 0 keeps all. Comes before top_p, as in transformers.
      seed: one for all prompts, or a sequence of one per prompt; 0 to 2**32 - 1.

    Raises:
      InputError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number, 0 or above, found {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise InputError(f"top_k must be an integer, 0 or above, found {self.top_k!r}")
        several = isinstance(self.seed, Sequence) and not isinstance(self.seed, str)
        for seed in self.seed if several else (self.seed,):
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
                raise InputError(f"seed must be an integer from 0 to 2**32 - 1, found {seed!r}")
        if several:
            object.__setattr__(self, "seed", tuple(self.seed))  # hashable, whatever sequence was given


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at a time.

    Attributes:
      max_batch: slots: sequences that are decoded together.
      max_length: most tokens of a prompt and its answer together; None, or more, means the target's context.
      online: whether requests come while others run: rounds then come back to the host as soon as a sequence ends,
        and more often while a slot is free, so that the next request does not wait for the others.

    Raises:
      InputError: for a value out of range.
    """

    max_batch: int = 8
    max_length: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        check_count("max_batch", self.max_batch)
        if self.max_length is not None:
            check_count("max_length", self.max_length)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What a server takes from its clients.

    Attributes:
      queue_size: sequences that may wait for a slot; a request that has no place is refused.
      deadline: seconds after which a request that has not ended does.
      grace: seconds that running requests have to end after SIGTERM.
      api_keys: of which a request needs one; none are needed where there are none.
      hosts: names that the Host header may have. Empty: any. Keeps out sites whose name is made to resolve to a
        loopback address.
      allow_origins: other sites whose pages may use the server ("https://chat.example.org"); "*" allows all.
      max_body_bytes: of a request.
      max_messages: of a conversation.
      max_choices: answers to one request: its prompts times `n`.

    Raises:
      InputError: for a value out of range.
    """

    queue_size: int = 64
    deadline: float = 300.0
    grace: float = 30.0
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_messages: int = 1000
    max_choices: int = 16

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_messages", "max_choices"):
            check_count(name, getattr(self, name))
        for name in ("deadline", "grace"):
            check_positive(name, getattr(self, name))
        if not is_integer(self.queue_size) or self.queue_size < 0:
            raise InputError(f"queue_size must be an integer, 0 or above, found {self.queue_size!r}")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InputError(
                    f"allow_origin must be like https://chat.example.org, without a path, or *; found {origin!r}"
                )


def _check_settings(config: Any, section: str, *, zero: Sequence[str] = (), rest: Sequence[str] = ()) -> None:
    """What all settings of a training run have in common: their types, and that numbers are above zero.

    Args:
      config: a dataclass of settings.
      section: what stands before its fields' names in messages: "" or, for example, "data.".
      zero: numbers that may also be 0.
      rest: numbers that may also be -1.

    Raises:
      InputError: for a value of the wrong type, out of range, or not among a field's choices.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                choices = " or ".join(choice or '""' for choice in get_args(kind))
                raise InputError(f"{section}{name}: expected {choices}, found {value!r}")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{section}{name}: expected a value of type {kind.__name__}, found {value!r}")
        if kind in (int, float) and not (0 < value < math.inf or (value == 0 and name in zero)):
            if value == -1 and name in rest:
                continue
            least = "zero or more" if name in zero else "more than zero"
            raise InputError(f"{section}{name}: expected a number that is {least}, found {value}")


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """Conversations that the target writes itself (data/synthesize/).

    Attributes:
      conversations: how many; more can be added to those that are there.
      seed: a conversation depends on it and on its own number alone; 0 to 2**32 - 1.
      turns: most questions of a conversation.
      several_turns: share of the conversations that have more than one; each number up to `turns` is as frequent.
      greedy: share of the conversations whose answers are greedy; the others' are sampled.
      temperature: of the questions.
      top_p: of the questions.
      answer_temperature: of the sampled answers.
      question_tokens: at most so many in a question, besides its opening; a question that is cut there is left out.
      answer_tokens: at most so many in an answer; a conversation ends with an answer that is cut there.
      conversation_tokens: at most so many in a conversation that the target asks itself. One long conversation makes
        the caches of all that are decoded with it as long.
      batch_size: sequences decoded together; what is written depends on it only where an adapter's sequences decide
        how far to draft.
      openings: file of beginnings of questions, one on a line: each conversation's first question begins with one of
        them, which is drawn evenly, and the target writes the rest. An empty line leaves the question to the target,
        and so does an empty name. They say what is asked about.
      texts: for a base model, which has no chat template: texts that it continues, as `data.files` names them. A record
        is then a text: it begins with up to `question_tokens` tokens of one, and has up to `answer_tokens` new ones.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    conversations: int = 10_000
    seed: int = 0
    turns: int = 3
    several_turns: float = 0.25
    greedy: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0
    answer_temperature: float = 0.7
    question_tokens: int = 256
    answer_tokens: int = 512
    conversation_tokens: int = 1000
    batch_size: int = 16
    openings: str = ""
    texts: str = ""

    def __post_init__(self) -> None:
        _check_settings(self, "data.synthesis.", zero=("seed", "several_turns", "greedy"))
        for name in ("several_turns", "greedy", "top_p"):
            if getattr(self, name) > 1:
                raise InputError(f"data.synthesis.{name}: expected a share of at most 1, found {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"data.synthesis.seed: expected less than 2**32, found {self.seed}")
        if self.openings and self.texts:
            raise InputError("data.synthesis.openings: is for questions, but there are texts to continue; give one")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a training run reads.

    Attributes:
      files: conversations and texts: paths, globs, gs:// and s3:// paths, separated by commas. Or
        python:MODULE.FUNCTION, a function that gives them (see data/records.py). Or self: the target writes them before
        the first step, into a file beside the run's folder.
      evaluation_files: the same for held-out data. Empty: the held-out part that the function gives, else a share
        `held_out` of the records of `files`.
      held_out: share of the records, at most 0.5, that are kept for evaluation where there are no evaluation files. A
        long text is several records.
      template: chat template of the conversations; empty for the tokenizer's own. A base model has none.
      cache: folder for the token ids and a cached teacher; empty for ~/.cache/kangaroo_jax/data. On a cluster, a folder
        that all processes share, or one in a bucket, of which each machine keeps a copy.
      max_bad_share: up to this share of the records may be bad: they are skipped, counted and listed. More than that
        is an error. 0 allows none.
      synthesis: what the target writes where `files` is self.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    files: str
    evaluation_files: str = ""
    held_out: float = 0.005
    template: Literal["vicuna_v1.1", "llama-2", "llama-3", ""] = ""
    cache: str = ""
    max_bad_share: float = 0.01
    synthesis: SynthesisConfig = SynthesisConfig()

    def __post_init__(self) -> None:
        _check_settings(self, "data.", zero=("max_bad_share",))
        if not self.files.strip():
            raise InputError("data.files: empty; give some with --config.data.files=...")
        if self.held_out > 0.5:
            raise InputError(f"data.held_out: expected a share of at most 0.5, found {self.held_out}")

    @property
    def is_self(self) -> bool:
        """Whether the target writes the data itself."""
        return self.files.strip() == "self"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained.

    Attributes:
      kind: what drafts: memory, which also takes the target's own newest hidden state (model/drafts/memory.py), and is
        accepted further (docs/dev/adapter-ablations.md); or kangaroo, the paper's adapter.
      num_layers: layers of norm and attention. The paper's adapter has one; each more makes every draft step longer.
      mlp_size: width of an MLP after them. 0: none, as in the paper; what it adds makes every draft step longer.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    kind: Literal["kangaroo", "memory"] = "memory"
    num_layers: int = 1
    mlp_size: int = 0

    def __post_init__(self) -> None:
        _check_settings(self, "adapter.", zero=("mlp_size",))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with betas 0.9 and 0.95. The defaults are those of the authors' code.

    Attributes:
      learning_rate: of each step, once it is warmed up.
      warmup_steps: steps over which the rate rises linearly from 0; less than the run's steps. 0: none.
      schedule: the rate after the warm-up: constant, or cosine, which ends at 0 with the last step.
      weight_decay: per step and unit of learning rate, of matrices alone. 0: none.
      clip_norm: larger gradients are scaled to this global norm.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    learning_rate: float = 5e-5
    warmup_steps: int = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01
    clip_norm: float = 0.5

    def __post_init__(self) -> None:
        _check_settings(self, "optimizer.", zero=("warmup_steps", "weight_decay"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices. -1, on one axis: all that the others
    leave.

    Attributes:
      data: splits the batch alone.
      fsdp: splits batch and weights; a weight is gathered where it is used.
      model: splits each layer's heads and width, and the vocabulary.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    data: int = 1
    fsdp: int = -1
    model: int = 1

    def __post_init__(self) -> None:
        _check_settings(self, "mesh.", rest=("data", "fsdp", "model"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. The defaults are the paper's recipe for a 7B target (arXiv 2404.18911, section 4, and the
    authors' code), but for the adapter's kind; configs/*.py say what differs from them.

    Attributes:
      target: the frozen target: a folder in Hugging Face format, here or in a bucket, or a hub id.
      output: the run's folder: checkpoints and TensorBoard events; gs:// or s3:// for one in a bucket. The same
        settings go on with the run in it.
      data: what the run reads.
      dtype: of the target, and of the adapter's computations; its weights and the optimizer's state are float32.
        float16 is for decoding alone: the gradients of a mean over a batch underflow in it.
      weights: of the target: float, or int8, for an adapter of the target that --weights=int8 decodes with.
      exit_layer: l, the number of shallow layers, 1 to the target's layers - 1.
      adapter: its shape.
      teacher: online computes the target's last hidden states in each step; cached computes them once, before the
        first, and keeps them in `data.cache`.
      seed: of the order of the data, of what is held out and of a random start; 0 to 2**32 - 1.
      steps: optimizer steps of the run.
      batch_size: rows of a step, over all devices.
      sequence_length: tokens of a row, at most the target's context. Short records share a row, long ones are cut.
      loss_chunk: positions of each row whose logits exist at once: less takes less memory and more time.
      loss: cross_entropy, as the authors; total_variation, which is 1 - expected acceptance; or both, their sum.
      cross_entropy_steps: the first so many steps train on cross entropy, whatever `loss` says; less than the run's
        steps. Total variation has next to no gradient where the two distributions hardly overlap yet. 0: none.
      draft_vocabulary: the tokens that drafts are made of, stored with the adapter: so many of those that the training
        data has most often; "0": all; or "auto": the number with which decoding is predicted to be fastest
        (train/draft_vocabulary.py says how).
      initialization: where the adapter starts: layer, the target's attention of layer `exit_layer` (and of those after
        it, for several layers); zero_output, an attention that adds nothing; or random.
      optimizer: how it is trained.
      mesh: how devices share the work.
      log_every: steps between TensorBoard's training figures.
      evaluate_every: steps between held-out figures. Steps that save a checkpoint have them in any case.
      evaluation_windows: rows that the held-out figures are measured on, at most.
      save_every: steps between checkpoints. The last step is always saved.
      keep_checkpoints: newest checkpoints that stay on disk, besides the best one.

    Raises:
      InputError: for a value of the wrong type or out of range.
    """

    target: str
    output: str
    data: DataConfig
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weights: Literal["float", "int8"] = "float"
    exit_layer: int = 2
    adapter: AdapterConfig = AdapterConfig()
    teacher: Literal["online", "cached"] = "online"
    seed: int = 0
    steps: int = 100_000
    batch_size: int = 16
    sequence_length: int = 2048
    loss_chunk: int = 128
    loss: Literal["cross_entropy", "total_variation", "both"] = "cross_entropy"
    cross_entropy_steps: int = 0
    draft_vocabulary: str = "0"
    initialization: Literal["layer", "zero_output", "random"] = "layer"
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    evaluate_every: int = 2000
    evaluation_windows: int = 64
    save_every: int = 2000
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.draft_vocabulary, int) and not isinstance(self.draft_vocabulary, bool):
            # A string, so that a flag can say auto: absl reads a flag as the type that the setting has.
            object.__setattr__(self, "draft_vocabulary", str(self.draft_vocabulary))
        _check_settings(self, "", zero=("seed", "cross_entropy_steps"))
        if self.draft_vocabulary != "auto" and not self.draft_vocabulary.isdecimal():
            raise InputError(
                f'draft_vocabulary: expected a number of tokens, 0 or "auto", found {self.draft_vocabulary!r}'
            )
        for name in ("target", "output"):
            if not getattr(self, name).strip():
                raise InputError(f"{name}: empty; give one with --config.{name}=...")
        for name, place in (("output", self.output), ("data.cache", self.data.cache)):
            if "://" in place and not is_bucket(place):
                raise InputError(f"{name}: expected a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, found {place}")
        if self.seed >= 2**32:
            raise InputError(f"seed: expected less than 2**32, found {self.seed}")
        if self.optimizer.warmup_steps >= self.steps:
            raise InputError(
                f"optimizer.warmup_steps: expected less than steps ({self.steps}), found {self.optimizer.warmup_steps}"
            )
        if self.cross_entropy_steps >= self.steps:
            raise InputError(
                f"cross_entropy_steps: expected less than steps ({self.steps}), found {self.cross_entropy_steps}"
            )
