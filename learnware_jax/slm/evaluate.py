"""How well a model does a task: multiple choice by log-likelihood, and greedy answers.

Everything takes a stack of adapters and runs them in one pass over the same items; the first axis
of what comes back is the adapter's. An adapter of zeros is the base model.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from learnware_jax.slm.decoder import (
    Adapter,
    Cache,
    Config,
    Params,
    forward,
    generate,
    init_cache,
    logits,
)

WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, *(2**i for i in range(10, 21)))


class Question(NamedTuple):
    """Tokens of a prompt, and of each answer that may follow it."""

    prompt: Sequence[int]
    choices: Sequence[Sequence[int]]


class Scores(NamedTuple):
    """Of every choice: its log-likelihood in nats, and whether it is what greedy decoding gives."""

    likelihood: Float[np.ndarray, "k n c"]
    greedy: Bool[np.ndarray, "k n c"]


class Estimate(NamedTuple):
    """A mean over items and its standard error."""

    value: float
    stderr: float


def choice_scores(
    params: Params,
    config: Config,
    questions: Sequence[Question],
    *,
    adapters: Adapter,
    dtype: str = "float32",
    batch_tokens: int = 1024,
    together: int = 1,
    reuse: bool = True,
    shared: Sequence[int] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, "k n c"]:
    """Log-likelihood in nats of every choice after its prompt; -inf where a question has fewer.

    The prompt is computed once and its cache serves all choices; without `reuse` every choice is
    run behind a prompt of its own, which gives the same numbers. Batches hold `batch_tokens` tokens
    (one question where that has more), at one of a few widths, and go through `together` adapters
    at a time: more than 1 is for accelerators. `shared` says of every question how many tokens its
    prompt begins with that others begin with too, an instruction: these are computed once, and kept
    for all adapters while this runs. `done` is told of questions as they are finished.
    ValueError for an empty prompt or choice, a prompt that is all shared, or a text beyond the
    model's positions.
    """
    return score_choices(
        params,
        config,
        questions,
        adapters=adapters,
        dtype=dtype,
        batch_tokens=batch_tokens,
        together=together,
        reuse=reuse,
        shared=shared,
        done=done,
    ).likelihood


def score_choices(
    params: Params,
    config: Config,
    questions: Sequence[Question],
    *,
    adapters: Adapter,
    dtype: str = "float32",
    batch_tokens: int = 1024,
    together: int = 1,
    reuse: bool = True,
    shared: Sequence[int] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Scores:
    """`choice_scores`, and whether every token of a choice is the likeliest (or as likely)."""
    _check(questions, config)
    shared = [0] * len(questions) if shared is None else shared
    _check_shared(questions, shared, reuse)
    most = max(len(q.choices) for q in questions)
    longest = max(len(choice) for q in questions for choice in q.choices)
    shape = (len(adapters.scale), len(questions), most)
    scores = Scores(np.full(shape, -np.inf), np.zeros(shape, bool))
    room = batch_tokens, most * longest
    own = [q.prompt[n:] for q, n in zip(questions, shared, strict=True)]
    heads = [tuple(q.prompt[:n]) for q, n in zip(questions, shared, strict=True)]
    numbers = {head: i for i, head in enumerate(sorted(set(heads)))}
    before = None
    if any(shared):
        ids, sizes = _pad(list(numbers), len(numbers), max(map(len, numbers)))
        before = _read(params, adapters, ids, config=config, dtype=dtype, together=together), sizes
    for width, rows, members in _batches([len(prompt) for prompt in own], *room):
        prompts, lengths = _pad([own[i] for i in members], rows, width)
        which = np.zeros(rows, np.int32)
        which[: len(members)] = [numbers[heads[i]] for i in members]
        flat = [choice for i in members for choice in _filled(questions[i].choices, most)]
        choices, sizes = _pad(flat, rows * most, longest)
        found = _choice_scores(
            params,
            adapters,
            prompts,
            lengths,
            choices.reshape(rows, most, longest),
            sizes.reshape(rows, most),
            before,
            which,
            config=config,
            dtype=dtype,
            together=together,
            reuse=reuse,
        )
        for row, i in enumerate(members):
            count = len(questions[i].choices)
            for kept, new in zip(scores, found, strict=True):
                kept[:, i, :count] = np.asarray(new)[:, row, :count]
        done(len(members))
    return scores


@functools.partial(jax.jit, static_argnames=("config", "dtype", "together"))
def _read(params, adapters, ids, *, config, dtype, together) -> Cache:
    """What every adapter remembers of texts (g, t): a cache of leaves (k, layers, g, t, ...)."""

    def one(adapter):
        cache = init_cache(config, *ids.shape, dtype)
        return forward(params, ids, config=config, adapter=adapter, cache=cache, dtype=dtype)[1]

    return jax.lax.map(one, adapters, batch_size=together)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "together", "reuse"))
def _choice_scores(
    params: Params,
    adapters: Adapter,
    prompts: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    choices: Int[Array, "b c w"],
    sizes: Int[Array, "b c"],
    before: tuple[Cache, Int[Array, " g"]] | None,
    which: Int[Array, " b"],
    *,
    config: Config,
    dtype: str,
    together: int,
    reuse: bool,
) -> tuple[Float[Array, "k b c"], Bool[Array, "k b c"]]:
    slots = prompts.shape[1] + choices.shape[2] - 1
    heads, begun = (None, jnp.zeros_like(lengths)) if before is None else before
    begun = begun if before is None else begun[which]
    counted = jnp.arange(choices.shape[2]) < sizes[..., None]

    def log_probability(hidden, targets):
        scores = logits(params, hidden, config=config, dtype=dtype)
        chosen = jnp.take_along_axis(scores, targets, -1)
        # No argmax: the greatest is at hand, and an index is slow to find on CPUs.
        greedy = chosen >= scores.max(-1, keepdims=True)
        return chosen - jax.nn.logsumexp(scores, -1, keepdims=True), greedy

    def over(counted, found, greedy):
        return jnp.where(counted, found[..., 0], 0).sum(-1), (greedy[..., 0] | ~counted).all(-1)

    def after_one_prompt(adapter, head):
        shared = {"config": config, "adapter": adapter, "dtype": dtype}
        if head is None:
            cache = init_cache(config, len(prompts), slots, dtype)
        else:
            # Slots behind the end of a head are written again before a token sees them.
            room = ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0))
            cache = jax.tree.map(lambda leaf: jnp.pad(leaf[:, which], room), head)
        hidden, cache = forward(params, prompts, cache=cache, start=begun, **shared)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
        first, greedy = log_probability(last, choices[..., 0])
        if choices.shape[2] == 1:
            return first, greedy

        def rest(choice, counted):
            hidden, _ = forward(
                params, choice[:, :-1], cache=cache, start=begun + lengths, **shared
            )
            return over(counted[:, 1:], *log_probability(hidden, choice[:, 1:, None]))

        others, too = jax.vmap(rest, in_axes=1, out_axes=1)(choices, counted)
        return first + others, greedy & too

    def after_own_prompts(adapter, _):
        def whole(choice, counted):
            at = lengths[:, None] + jnp.arange(choice.shape[1])
            ids = jnp.pad(prompts, ((0, 0), (0, choice.shape[1])))
            ids = jax.vmap(lambda row, i, new: row.at[i].set(new))(ids, at, choice)
            hidden, _ = forward(params, ids, config=config, adapter=adapter, dtype=dtype)
            hidden = jnp.take_along_axis(hidden, (at - 1)[..., None], 1)
            return over(counted, *log_probability(hidden, choice[..., None]))

        return jax.vmap(whole, in_axes=1, out_axes=1)(choices, counted)

    one = after_one_prompt if reuse else after_own_prompts
    return jax.lax.map(lambda each: one(*each), (adapters, heads), batch_size=together)


def answers(
    params: Params,
    config: Config,
    prompts: Sequence[Sequence[int]],
    *,
    adapters: Adapter,
    steps: int,
    end: int,
    dtype: str = "float32",
    batch_tokens: int = 1024,
    together: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[list[int]]]:
    """Greedy continuations of every prompt, at most `steps` tokens, cut before token `end`."""
    _check([Question(prompt, [[end] * steps]) for prompt in prompts], config)
    found = [[[] for _ in prompts] for _ in adapters.scale]
    for width, rows, members in _batches([len(p) for p in prompts], batch_tokens, steps):
        ids, lengths = _pad([prompts[i] for i in members], rows, width)
        tokens = _generate_many(
            params,
            adapters,
            ids,
            lengths,
            config=config,
            steps=steps,
            end=end,
            dtype=dtype,
            together=together,
        )
        for k, rows in enumerate(np.asarray(tokens)):
            for i, row in zip(members, rows.tolist(), strict=False):
                found[k][i] = row[: row.index(end)] if end in row else row
        done(len(members))
    return found


@functools.partial(jax.jit, static_argnames=("config", "steps", "end", "dtype", "together"))
def _generate_many(params, adapters, ids, lengths, *, config, steps, end, dtype, together):
    def one(adapter):
        return generate(
            params,
            ids,
            lengths,
            config=config,
            adapter=adapter,
            steps=steps,
            end=end,
            dtype=dtype,
        )

    return jax.lax.map(one, adapters, batch_size=together)


def last_number(text: str) -> float | None:
    """The last number in a text, without separators of thousands; None if there is none.

    A hyphen behind a letter or a digit is no sign: the last number of "10-20" is 20.
    """
    found = re.findall(r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)", text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(text: str, answer: str, *, tolerance: float = 1e-4) -> bool:
    """Whether the last number of a text is the answer's.

    Whole numbers must be equal; others agree to a relative or absolute `tolerance`.
    """
    found, wanted = last_number(text), last_number(answer)
    if found is None or wanted is None:
        return False
    if wanted.is_integer():
        return found == wanted
    return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)


def same_answer(text: str, answer: str) -> bool:
    """`same_number` if the answer holds a number; else equality but for case, blanks and a stop."""
    if last_number(answer) is not None:
        return same_number(text, answer)
    return _plain(text) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def accuracy(correct: Sequence[bool] | np.ndarray) -> Estimate:
    """Share of right answers, and its standard error s / sqrt(n)."""
    correct = np.asarray(correct, float)
    if len(correct) < 2:
        return Estimate(float(correct.mean()), math.nan)
    return Estimate(float(correct.mean()), float(correct.std(ddof=1) / math.sqrt(len(correct))))


def macro_f1(predicted: Sequence[str], wanted: Sequence[str]) -> Estimate:
    """Mean over the labels that occur in `wanted` of their F1 score; jackknife standard error."""
    labels = sorted(set(wanted))
    rows = np.array([labels.index(w) for w in wanted])
    # Every prediction that is no such label is one column more: wrong for all.
    columns = np.array([labels.index(p) if p in labels else len(labels) for p in predicted])
    counts = np.zeros((len(labels), len(labels) + 1))
    np.add.at(counts, (rows, columns), 1)

    def score(counts):
        right = np.diagonal(counts)
        total = counts.sum(1) + counts.sum(0)[:-1]
        present = counts.sum(1) > 0
        return (2 * right[present] / total[present]).mean()

    left_out = []
    for cell in zip(rows, columns, strict=True):
        counts[cell] -= 1
        left_out.append(score(counts) if counts.any() else math.nan)
        counts[cell] += 1
    n = len(rows)
    spread = np.sqrt((n - 1) * np.var(left_out)) if n > 1 else math.nan
    return Estimate(float(score(counts)), float(spread))


def _check(questions: Sequence[Question], config: Config) -> None:
    if not questions:
        raise ValueError("evaluate: got no items; want at least one.")
    for i, (prompt, choices) in enumerate(questions):
        if not prompt or not choices or not all(choices):
            raise ValueError(f"evaluate: item {i} has an empty prompt or choice.")
        # The last token is never an input.
        longest = len(prompt) + max(map(len, choices))
        if longest > config.positions + 1:
            raise ValueError(
                f"evaluate: item {i} has {longest} tokens, the model takes {config.positions} and "
                "one more that only follows; cut its text."
            )


def _check_shared(questions: Sequence[Question], shared: Sequence[int], reuse: bool) -> None:
    if any(shared) and not reuse:
        raise ValueError("evaluate: shared tokens are reused; leave `shared` out, or `reuse` on.")
    for i, (question, count) in enumerate(zip(questions, shared, strict=True)):
        if not 0 <= count < len(question.prompt):
            raise ValueError(
                f"evaluate: item {i} shares {count} tokens of its prompt of "
                f"{len(question.prompt)}; want at least one of its own."
            )


def _batches(
    lengths: Sequence[int], batch_tokens: int, behind: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Every item once, as (width, rows, indices of at most so many items), wide ones first.

    An item takes `width` tokens for its own and `behind` more.
    """
    buckets = np.searchsorted(WIDTHS, lengths)
    for bucket in sorted(set(buckets), reverse=True):
        members = np.flatnonzero(buckets == bucket)
        rows = max(1, batch_tokens // (WIDTHS[bucket] + behind))
        for i in range(0, len(members), rows):
            yield WIDTHS[bucket], rows, members[i : i + rows]


def _pad(rows: Sequence[Sequence[int]], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as (count, width), zeros behind, and their lengths; further rows have one."""
    ids, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return ids, lengths


def _filled(choices: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    return [*choices, *[[0]] * (count - len(choices))]
