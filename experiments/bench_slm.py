"""Benchmark of language models: training, decoding and scoring beside torch, PEFT and other ways.

Example: python -m experiments.bench_slm --config=configs/bench_slm.py:smoke
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_slm")

import functools
import importlib.util
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.common import say, write_json
from experiments.models import open_model
from learnware_jax import figures
from learnware_jax.slm import evaluate, finetune, lora
from learnware_jax.slm.decoder import Adapter, Config, forward, generate, init_params, logits
from learnware_jax.slm.weights import IN_FOLDER, read_config

PEERS = ("torch", "transformers", "peft")
DTYPES = ("float32", "bfloat16")


class Way(NamedTuple):
    """One way to do a piece of work."""

    name: str
    call: Callable[[], Any]  # returns when the work is done
    operations: float = 0.0  # products with the model's own matrices; 0: not counted
    dtype: str = ""  # of their operands
    threads: int = 0  # of torch; 0: it has no part in this


class Bench:
    """Results so far; every piece of work adds rows, and is printed and written as it ends."""

    def __init__(self, config: ConfigDict):
        self.repeats, self.file = config.repeats, Path(config.workdir) / "results.json"
        self.products = {dtype: _product(config.product, dtype) for dtype in DTYPES}
        device = jax.devices()[0]
        self.output = {
            "model": config.model.name,
            "device": device.device_kind,
            "platform": device.platform,
            "cores": cores(),
            "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
            "rows": [],
            "ratios": [],
            "checks": {},
        }

    def measure(self, work: str, tokens: int, ways: list[Way]) -> None:
        """Time ways side by side: every round calls each once, in an order that turns.

        In the same rounds the product of large matrices is timed, for the fractions of it. Ratios
        are taken within a round.
        """
        say(f"{work}: {', '.join(way.name for way in ways)}.")
        counted = {way.dtype for way in ways if way.operations}
        calls = {way.name: way.call for way in ways}
        calls |= {dtype: self.products[dtype][0] for dtype in counted}
        names, first = list(calls), {name: _times(call) for name, call in calls.items()}
        times = {name: [] for name in names}
        for turn in range(self.repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(_times(calls[name]))
        seconds = {name: np.array([wall for wall, _ in taken]) for name, taken in times.items()}
        busy = {name: np.array([cpu for _, cpu in taken]) for name, taken in times.items()}
        for way in ways:
            taken = seconds[way.name]
            row = {
                "work": work,
                "way": way.name,
                "tokens": tokens,
                "tokens_per_second": _spread(tokens / taken),
                "tokens_per_cpu_second": _spread(tokens / busy[way.name]),
                # What the first call took beyond another: compilation, or a kept program's loading.
                "compile_seconds": max(0.0, first[way.name][0] - float(np.median(taken))),
                "seconds": taken.tolist(),
                "torch_threads": way.threads,
                "load": os.getloadavg()[0],
            }
            shown = ""
            if way.operations:
                rate = self.products[way.dtype][1] / seconds[way.dtype]
                row["gflops_of_product"] = _spread(rate / 1e9)
                row["fraction_of_product"] = _spread(way.operations / taken / rate)
                shown = f"{row['fraction_of_product']['median']:6.2f} of {way.dtype} product"
            self.output["rows"].append(row)
            spread = row["tokens_per_second"]
            print(
                f"{work:32} {way.name:28} {spread['median']:9.1f} tokens/s "
                f"({spread['low']:.1f} to {spread['high']:.1f}), compiled in "
                f"{row['compile_seconds']:.1f} s {shown}",
                flush=True,
            )
        for of, to in itertools.combinations(calls, 2):
            if of not in DTYPES and to not in DTYPES:
                row = {
                    "work": work,
                    "of": of,
                    "to": to,
                    "times_as_fast": _spread(seconds[to] / seconds[of]),
                    # What a busy machine changes less: the processor's time of all threads.
                    "times_as_fast_by_cpu_seconds": _spread(busy[to] / busy[of]),
                }
                self._print_ratio(row)
                self.output["ratios"].append(row)
        write_json(self.file, self.output)

    def _print_ratio(self, row: dict) -> None:
        work, of, to = row["work"], row["of"], row["to"]
        spread, busy = row["times_as_fast"], row["times_as_fast_by_cpu_seconds"]["median"]
        print(
            f"{work:32} {of} is {spread['median']:.2f} times ({spread['low']:.2f} to "
            f"{spread['high']:.2f}) as fast as {to}; {busy:.2f} by CPU-seconds",
            flush=True,
        )

    def check(self, name: str, value: float) -> None:
        """A number that tells whether two ways did the same work."""
        self.output["checks"][name] = float(value)
        print(f"{name}: {value:.4g}", flush=True)
        write_json(self.file, self.output)


def _times(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call: of the clock, and of the processor, over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def torch_way(name: str, call: Callable[[], Any], *numbers: Any) -> Way:
    """A way of torch with one thread or all, whichever proves faster here.

    Where others use the machine, its threads may wait for each other for hundreds of milliseconds
    at every operation.
    """
    import torch

    def threaded(threads):
        torch.set_num_threads(threads)
        return call()

    say(f"Choosing the threads of {name}.")
    found = {}
    for threads in {1, cores()}:
        threaded(threads)
        found[threads] = _times(functools.partial(threaded, threads))[0]
    best = min(found, key=found.get)
    return Way(name, functools.partial(threaded, best), *numbers, threads=best)


def cores() -> int:
    """Processors that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count()


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "low": float(np.min(values)),
        "high": float(np.max(values)),
    }


def _product(side: int, dtype: str) -> tuple[Callable[[], Any], float]:
    """A product of square matrices with float32 sums, and its operations."""
    x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(
        lambda a: jnp.matmul(a, a, precision=precision, preferred_element_type=jnp.float32)
    )
    return lambda: product(x).block_until_ready(), 2 * side**3


def opened(config: ConfigDict) -> tuple[Any, Config]:
    """Parameters in float32, of the model named or random ones of the sizes given."""
    sizes = config.model.sizes.to_dict()
    if not sizes:
        model = open_model(config.model)
        return model.params, model.config
    model = read_config(sizes)
    return init_params(jax.random.key(config.seed), model, scale=0.3), model


def stored(params: Any, dtype: str) -> Any:
    """Parameters with their matrices kept in `dtype`."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embed") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def state_dict(params: Any, config: Config) -> dict[str, np.ndarray]:
    """The tensors that transformers has for these parameters, in float32."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys, array = [key.key for key in path], np.asarray(leaf, np.float32)
        ending = "bias" if keys[-1] == "bias" else "weight"
        matrix = keys[-1] == "kernel"
        if keys[0] == "layers":
            for i, layer in enumerate(array):
                name = f"model.layers.{i}.{IN_FOLDER[keys[1]]}.{ending}"
                tensors[name] = layer.T if matrix else layer
        else:
            tensors[f"{IN_FOLDER[keys[0]]}.{ending}"] = array.T if matrix else array
    if config.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def torch_model(params: Any, config: Config):
    """The same Llama in transformers, from memory; nothing is looked up."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.scaling is not None or config.qk_norm or config.attention_bias or config.windows:
        raise ValueError("bench_slm: only a plain Llama can be measured beside torch.")
    settings = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.feedforward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        rms_norm_eps=config.epsilon,
        max_position_embeddings=config.positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(settings).eval()
    tensors = {
        # copy: ours may not be written to, nor need they lie in torch's order.
        name: torch.from_numpy(np.array(array, order="C"))
        for name, array in state_dict(params, config).items()
    }
    model.load_state_dict(tensors, strict=True)
    return model


def make_settings(config: ConfigDict, batch: int, dtype: str) -> finetune.Settings:
    """Training at a constant rate, with clipping; every token of a row is learned."""
    return finetune.Settings(
        steps=1000,
        batch=batch,
        warmup=0.0,
        final=1.0,
        clip=1.0,
        decay=0.0,
        train="ab",
        accumulate=1,
        widths=(config.tokens,),
        dtype=dtype,
        remat=False,
    )


def make_batch(rng, config: ConfigDict, model: Config, rows: int, adapters: int) -> finetune.Batch:
    """Random rows for each adapter of a stack."""
    ids = rng.integers(0, model.vocabulary, (adapters, rows, config.tokens))
    texts = [[finetune.Text(row.tolist(), 1) for row in part] for part in ids]
    return finetune.make_batch(texts, make_settings(config, rows, "float32"))


def make_adapter(config: ConfigDict, model: Config) -> Adapter:
    """The adapter that all ways begin with."""
    settings = config.lora
    return lora.init_adapter(
        jax.random.key(config.seed),
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=tuple(settings.targets),
    )


def matrix_numbers(params: Any, config: Config) -> int:
    """Numbers in the matrices that every token is multiplied with."""
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    ]
    return sum(kernels) + (params["embed"].size if config.tied else 0)


class Training:
    """Steps of our own on one stack of adapters; every call makes one."""

    def __init__(self, params, model, adapter, batch, config, dtype):
        many, rows = batch.ids.shape[0], batch.ids.shape[2]
        settings = make_settings(config, rows, dtype)
        self.params, self.batch = params, jax.device_put(batch)
        self.rate = jnp.full(many, config.rate, jnp.float32)
        self.options = {"config": model, "settings": settings}
        self.state = finetune.init_state(lora.stack([adapter] * many), settings)
        self.losses = []

    def __call__(self) -> None:
        self.state, metrics = finetune.step(
            self.state, self.batch, self.rate, self.params, **self.options
        )
        self.losses.append(float(metrics.loss.mean()))


class PeftTraining:
    """The same steps by torch and PEFT on the same numbers."""

    def __init__(self, params, model, adapter, batch, config, autocast):
        import peft
        import safetensors.torch
        import torch

        files = lora.to_peft(adapter, base="", dtype="float32")
        settings = peft.LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            target_modules=[IN_FOLDER[name].split(".")[1] for name in config.lora.targets],
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(torch_model(params, model), settings).train()
        tensors = safetensors.torch.load(files[lora.WEIGHTS_FILE])
        peft.set_peft_model_state_dict(self.model, tensors)
        self.trained = [x for x in self.model.parameters() if x.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.rate, weight_decay=0.0)
        self.ids = torch.from_numpy(batch.ids[0, 0].astype(np.int64))
        self.autocast, self.losses = autocast, []

    def __call__(self) -> None:
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(loss.item())


def training(bench: Bench, both: dict, model: Config, config: ConfigDict, peers: bool) -> None:
    """Steps of one adapter, with operands of both types, and PEFT's."""
    rng = np.random.default_rng(config.seed)
    batch = make_batch(rng, config, model, config.batch, 1)
    adapter = make_adapter(config, model)
    tokens = config.batch * config.tokens
    # Forward, and the derivative by what comes in: the matrices themselves are not trained.
    operations = 4.0 * tokens * matrix_numbers(both["float32"], model)
    made = {f"ours {d}": Training(both[d], model, adapter, batch, config, d) for d in DTYPES}
    ways = [
        Way(name, call, operations, dtype)
        for (name, call), dtype in zip(made.items(), DTYPES, strict=True)
    ]
    if peers:
        for dtype, name in (("float32", "PEFT float32"), ("bfloat16", "PEFT bfloat16 autocast")):
            autocast = dtype == "bfloat16"
            made[name] = PeftTraining(both["float32"], model, adapter, batch, config, autocast)
            ways.append(torch_way(name, made[name], operations, dtype))
    bench.measure(f"LoRA step, {config.batch} x {config.tokens}", tokens, ways)
    for name, call in made.items():
        bench.check(f"loss at first, {name}", call.losses[0])
        bench.check(f"loss after {config.repeats} steps, {name}", call.losses[config.repeats])


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def scores(params: Any, ids: Any, *, config: Config, dtype: str) -> Any:
    """Scores of the next token at every position."""
    hidden, _ = forward(params, ids, config=config, dtype=dtype)
    return logits(params, hidden, config=config, dtype=dtype)


def passing(bench: Bench, both: dict, model: Config, config: ConfigDict, peers: bool) -> None:
    """Forward passes with logits at every token."""
    shape = (config.batch, config.tokens)
    ids = np.random.default_rng(config.seed).integers(0, model.vocabulary, shape)
    tokens = ids.size
    operations = 2.0 * tokens * matrix_numbers(both["float32"], model)

    def ours(dtype):
        return scores(both[dtype], ids, config=model, dtype=dtype).block_until_ready()

    ways = [
        Way(f"ours {dtype}", functools.partial(ours, dtype), operations, dtype) for dtype in DTYPES
    ]
    if peers:
        import torch

        peer, given = torch_model(both["float32"], model), torch.from_numpy(ids)

        def theirs(autocast):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return peer(input_ids=given, use_cache=False).logits

        for dtype, name in (("float32", "torch float32"), ("bfloat16", "torch bfloat16 autocast")):
            call = functools.partial(theirs, dtype == "bfloat16")
            ways.append(torch_way(name, call, operations, dtype))
    bench.measure(f"forward, {config.batch} x {config.tokens}", tokens, ways)
    wanted = np.asarray(ways[0].call())
    for way in ways[1:]:
        found = way.call()
        found = np.asarray(found.float() if way.name.startswith("torch") else found)
        bench.check(f"greatest difference of logits, {way.name}", np.abs(found - wanted).max())


def decoding(bench: Bench, both: dict, model: Config, config: ConfigDict, peers: bool) -> None:
    """Greedy decoding with a cache, to a fixed number of new tokens."""
    settings = config.decode
    rng = np.random.default_rng(config.seed)
    peer = torch_model(both["float32"], model) if peers else None
    for rows in settings.batches:
        ids = rng.integers(0, model.vocabulary, (rows, settings.prompt))
        lengths = np.full(rows, settings.prompt, np.int32)

        def ours(dtype, ids=ids, lengths=lengths):
            # No token is -1: none ends a row.
            options = {"config": model, "steps": settings.new, "end": -1, "dtype": dtype}
            return np.asarray(generate(both[dtype], ids.astype(np.int32), lengths, **options))

        ways = [Way(f"ours {dtype}", functools.partial(ours, dtype)) for dtype in DTYPES]
        if peer is not None:
            import torch

            def theirs(ids=ids):
                given = torch.from_numpy(ids)
                found = peer.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=settings.new,
                    do_sample=False,
                )
                return found[:, settings.prompt :].numpy()

            ways.append(torch_way("torch float32", theirs))
        bench.measure(f"decoding, batch {rows}", rows * settings.new, ways)
        for way in ways[1:]:
            same = (way.call() == ways[0].call()).mean()
            bench.check(f"share of tokens as ours float32, batch {rows}, {way.name}", same)


def stacking(bench: Bench, both: dict, model: Config, config: ConfigDict) -> None:
    """Many adapters in one program, and one after another."""
    many, rows = config.stack.adapters, config.stack.batch
    batch = make_batch(np.random.default_rng(config.seed), config, model, rows, many)
    adapter = make_adapter(config, model)
    for dtype in config.stack.dtypes:
        made = functools.partial(Training, both[dtype], model, adapter)
        together = made(batch, config, dtype)
        alone = [
            made(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), config, dtype)
            for i in range(many)
        ]

        def one_by_one(alone=alone):
            for call in alone:
                call()

        work = f"{many} adapters, {rows} x {config.tokens} each, {dtype}"
        ways = [Way("in one step", together), Way("one after another", one_by_one)]
        bench.measure(work, many * rows * config.tokens, ways)
        apart = together.losses[-1] - np.mean([call.losses[-1] for call in alone])
        bench.check(f"difference of the last mean losses, {dtype}", abs(apart))


def choosing(bench: Bench, both: dict, model: Config, config: ConfigDict) -> None:
    """Scores of answers after one prompt, and each after a prompt of its own."""
    settings, rng = config.choice, np.random.default_rng(config.seed)
    none = jax.tree.map(lambda x: x[None], make_adapter(config, model))  # B is zero

    def tokens(count):
        return rng.integers(0, model.vocabulary, count).tolist()

    for count in settings.choices:
        questions = [
            evaluate.Question(
                tokens(settings.prompt), [tokens(settings.tokens) for _ in range(count)]
            )
            for _ in range(settings.questions)
        ]

        def score(reuse, questions=questions):
            return evaluate.choice_scores(
                both["float32"],
                model,
                questions,
                adapters=none,
                batch_tokens=settings.batch_tokens,
                reuse=reuse,
            )

        ways = [
            Way("after one prompt", functools.partial(score, True)),
            Way("each after its own prompt", functools.partial(score, False)),
        ]
        given = settings.questions * (settings.prompt + count * settings.tokens)
        bench.measure(f"{count} choices", given, ways)
        apart = np.abs(ways[0].call() - ways[1].call()).max()
        bench.check(f"greatest difference in nats, {count} choices", apart)


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words."""
    model = "a random model" if config.model.sizes.to_dict() else config.model.name
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    return {
        "model": model,
        "peers": f"not measured, for want of {', '.join(absent)}" if absent else ", ".join(PEERS),
        "next": "bench_pave --config=configs/bench_pave.py:smoke",
    }


def run(config: ConfigDict) -> dict:
    """Measure everything; lines are printed as they come and written to workdir/results.json."""
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if jax.devices()[0].platform != "cpu":
        absent = [f"an accelerator for them (here JAX has {jax.devices()[0].device_kind} alone)"]
    if absent:
        say(f"torch and PEFT are not measured, for want of {', '.join(absent)}.")
    params, model = opened(config)
    both = {dtype: stored(params, dtype) for dtype in DTYPES}
    bench = Bench(config)
    training(bench, both, model, config, not absent)
    passing(bench, both, model, config, not absent)
    decoding(bench, both, model, config, not absent)
    stacking(bench, both, model, config)
    choosing(bench, both, model, config)
    print(figures.save(draw(bench.output["ratios"]), bench.file.with_name("speed"))[0])
    print(bench.file)
    return bench.output


def draw(ratios: list[dict]):
    """A figure of how many times as fast one way is as another, for every work."""
    marks = [
        figures.Dot(
            f"{row['work']}: {row['of']} to {row['to']}",
            *(row["times_as_fast"][end] for end in ("median", "low", "high")),
        )
        for row in ratios
    ]
    return figures.dots([("", marks)], label="times as fast", zero=1.0)
