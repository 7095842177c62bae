"""Models as lm-evaluation-harness takes them (package lm_eval, in the extra "eval").

Texts become tokens as in its own HFLM, so that numbers agree: blanks at the end of a context go to
the continuation, both are encoded together, and what is too long is cut on the left. A text without
a context follows the token before texts, or else the one that ends them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.evaluate import WIDTHS, Question, answers, score_choices
from learnware_jax.slm.lora import stack
from learnware_jax.slm.weights import Model

# In lm_eval's order of precedence; 256 tokens if a request has none of them.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# With which greedy decoding is what it is without them.
HARMLESS = ("until", "do_sample", "temperature", "top_p", "top_k", *LENGTHS)


def harness_model(
    model: Model,
    *,
    adapter: Adapter | None = None,
    dtype: str = "float32",
    batch_tokens: int = 1024,
) -> Any:
    """The model, with an adapter if one is given, as an `lm_eval.api.model.LM`.

    For example `lm_eval.simple_evaluate(harness_model(load_model(folder)), tasks=["arc_easy"])`.
    Batches hold about `batch_tokens` tokens.
    """
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  # an extra

    class HarnessModel(Requests, TemplateLM):
        """What lm_eval asks for is in `Requests`, how it splits texts in `TemplateLM`."""

    return HarnessModel(model, adapter, dtype, batch_tokens)


class Requests:
    """Answers to the three kinds of requests; to be mixed into `lm_eval.api.model.TemplateLM`."""

    def __init__(self, model: Model, adapter: Adapter | None, dtype: str, batch_tokens: int):
        super().__init__()
        if adapter is None:  # one that changes nothing
            adapter = Adapter({}, {}, jnp.float32(0))
        self.model, self.adapters = model, stack([adapter])
        self.dtype, self.batch_tokens = dtype, batch_tokens
        self.max_length = model.config.positions

    @property
    def eot_token_id(self) -> int:
        return self.model.end

    @property
    def prefix_token_id(self) -> int:
        return self.model.end if self.model.start is None else self.model.start

    @property
    def tokenizer_name(self) -> str:
        return f"{self.model.name} {self.model.tokenizer_sha256}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Tokens of a text; the token before texts is not doubled where the text has it."""
        ids = self.model.tokenizer.encode(string, add_special_tokens=False).ids
        if self.model.start is None or add_special_tokens is False:
            return ids
        mark = self.model.tokenizer.decode([self.model.start], skip_special_tokens=False)
        if add_special_tokens is None and string.startswith(mark):
            return ids
        return [self.model.start, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Of (anything, tokens of the context, of the continuation) each."""
        behind = defaultdict(list)  # requests by what they follow
        for i, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"loglikelihood: the continuation of request {i} has {len(continuation)} "
                    f"tokens; want 1 to {self.max_length}."
                )
            # The last token is never an input.
            whole = [*(context or [self.prefix_token_id]), *continuation][-self.max_length - 1 :]
            behind[tuple(whole[: -len(continuation)])].append(i)
        parts = defaultdict(list)  # by lengths: little padding, few programs
        for prompt, members in behind.items():
            longest = max(len(requests[i][2]) for i in members)
            # All that follows one prompt is in memory at once, so a part of it is.
            most = max(1, self.batch_tokens // longest)
            shape = tuple(np.searchsorted(WIDTHS, (len(prompt), longest)))
            for i in range(0, len(members), most):
                parts[shape].append((prompt, members[i : i + most]))
        found: list[Any] = [None] * len(requests)
        for part in parts.values():
            scores = score_choices(
                self.model.params,
                self.model.config,
                [Question(prompt, [requests[i][2] for i in members]) for prompt, members in part],
                adapters=self.adapters,
                dtype=self.dtype,
                batch_tokens=self.batch_tokens,
            )
            for row, (_, members) in enumerate(part):
                for column, i in enumerate(members):
                    at = 0, row, column
                    found[i] = float(scores.likelihood[at]), bool(scores.greedy[at])
        for (texts, *_), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, token after token, in windows where they are longer than the model."""
        # An extra, as above.
        from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
            get_rolling_token_windows,
            make_disjoint_window,
        )

        windows, owners = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first text of `until`, the end token or `max_gen_toks`."""
        alike = defaultdict(list)  # requests by the number of tokens they ask for
        for i, request in enumerate(requests):
            alike[_generated(request.args[1])].append(i)
        found = [""] * len(requests)
        for steps, members in alike.items():
            room = self.max_length - steps
            if room < 1:
                raise ValueError(
                    f"generate_until: {steps} tokens are asked for, and the model takes "
                    f"{self.max_length} in all; set a lower max_gen_toks."
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            tokens = answers(
                self.model.params,
                self.model.config,
                [prompt or [self.prefix_token_id] for prompt in prompts],
                adapters=self.adapters,
                steps=steps,
                end=self.model.end,
                dtype=self.dtype,
                batch_tokens=self.batch_tokens,
            )
            for i, ids in zip(members, tokens[0], strict=True):
                text, until = self.model.tokenizer.decode(ids), requests[i].args[1].get("until")
                for stop in [until] if isinstance(until, str) else until or []:
                    text = text.split(stop)[0] if stop else text
                found[i] = text
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def _generated(settings: dict) -> int:
    """How many tokens a request asks for. ValueError unless it asks for greedy decoding."""
    warm = settings.get("do_sample") is None and float(settings.get("temperature") or 0) > 0
    other = {
        name: value
        for name, value in settings.items()
        if name not in HARMLESS and (name, value) != ("num_beams", 1)
    }
    if settings.get("do_sample") or warm or other:
        raise ValueError(
            f"generate_until: got {settings}; only greedy decoding is done: leave out do_sample, "
            f"temperature and whatever is not among {', '.join(HARMLESS)}."
        )
    return int(next((settings[n] for n in LENGTHS if settings.get(n) is not None), 256))
