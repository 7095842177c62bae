"""Fine-tuning against NumPy, against itself cut and stacked in other ways, killed, and sharded."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny import CONFIG

from learnware_jax.slm import finetune, lora
from learnware_jax.slm.decoder import forward, init_params, logits, param_shapes
from learnware_jax.slm.finetune import Run, Settings, Text

SETTINGS = Settings(
    steps=20,
    batch=4,
    warmup=0.1,
    final=0.1,
    clip=1.0,
    decay=0.01,
    train="ab",
    accumulate=1,
    widths=(16,),
    dtype="float32",
    remat=False,
)


@functools.cache
def params():
    return init_params(jax.random.key(0), CONFIG, scale=0.3)


@functools.cache
def adapters(*seeds):
    """A stack of new ones."""
    return lora.stack(
        [lora.init_adapter(jax.random.key(s), CONFIG, rank=2, alpha=4.0) for s in seeds]
    )


def toy(count=9, seed=0):
    """Texts of 10 to 16 random tokens, of which the last 5 to 8 are learned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 17, count)
    return [Text(rng.integers(1, 97, n).tolist(), int(n - rng.integers(5, 9))) for n in lengths]


def run(*seeds, settings=SETTINGS, rates=(0.02, 0.01, 0.005)):
    """Each adapter learns texts of its own: of one seed, always the same."""
    texts = tuple(toy(5 + 2 * seed, seed) for seed in seeds)
    return Run(texts, tuple(rates[seed] for seed in seeds), seeds, settings)


def train(run, state=None, start=None, **kwargs):
    """The last state and the losses."""
    start = adapters(*run.seeds) if start is None else start
    losses = []

    def report(done, state, metrics, tokens):
        losses.append(metrics.loss)

    kwargs = {"report": report} | kwargs
    return finetune.train(params(), CONFIG, start, run, state=state, **kwargs), np.array(losses)


@functools.cache
def trained(*seeds):
    return train(run(*seeds))


def assert_same_bits(found, wanted):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert_array_equal(a, b)


# Batches.


@pytest.mark.parametrize("count, batch", [(32, 2), (200, 4), (3, 4), (1, 5)])
def test_every_epoch_has_every_row_once(count, batch):
    texts, settings = toy(count), SETTINGS._replace(steps=96, batch=batch)
    plan = list(finetune.schedule(texts, settings, seed=3))
    assert len(plan) == 96 and all(rows.shape == (batch,) for rows in plan)
    for stretch in range(1, 7):
        seen = np.bincount(np.concatenate(plan[: 16 * stretch]), minlength=count)
        assert seen.max() - seen.min() <= 1
        assert seen.sum() == 16 * stretch * batch
    if count == 32:  # a stretch is an epoch
        assert_array_equal(seen, 6)


def test_no_batch_has_a_text_twice_where_there_are_few():
    texts, settings = toy(8), SETTINGS._replace(steps=40)
    for two in zip(*[finetune.schedule(texts, settings, seed=1)] * 2, strict=True):
        assert sorted(np.concatenate(two)) == list(range(8))


def test_a_schedule_depends_on_the_seed_and_the_settings_alone():
    texts, settings = toy(40), SETTINGS._replace(steps=37)
    first, again, other, shorter = (
        [rows.tolist() for rows in finetune.schedule(texts, s, seed)]
        for s, seed in ((settings, 3), (settings, 3), (settings, 4), (SETTINGS, 3))
    )
    assert first == again and first != other
    assert shorter == first[:20]


def test_batches_hold_texts_of_like_length():
    texts = [Text([1] * n, 1) for n in np.random.default_rng(0).permutation(np.arange(2, 66))]
    plan = list(finetune.schedule(texts, SETTINGS._replace(steps=16), seed=0))
    spans = sorted(sorted(len(texts[i].ids) for i in rows) for rows in plan)
    assert spans == [list(range(n, n + 4)) for n in range(2, 66, 4)]
    assert [min(len(texts[i].ids) for i in rows) for rows in plan] != list(range(2, 66, 4))


def test_a_batch_by_hand():
    parts = [
        [Text([5, 6, 7], 1), Text([8, 9, 1, 2, 3], 2)],
        [Text([4, 4], 1), Text([1, 2, 3, 4, 5, 6], 5)],
    ]
    batch = finetune.make_batch(parts, SETTINGS._replace(batch=2, accumulate=2, widths=(2, 6, 8)))
    ids = [[5, 6, 7, 0, 0, 0], [8, 9, 1, 2, 3, 0], [4, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    at = [[0, 1, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    target = [[6, 7, 0, 0], [1, 2, 3, 0], [4, 0, 0, 0], [6, 0, 0, 0]]
    weight = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    for found, wanted in zip(batch, (ids, at, target, weight), strict=True):
        assert_array_equal(found, np.reshape(wanted, (2, 2, 1, -1)))
    one = finetune.make_batch(parts, SETTINGS._replace(batch=2, widths=(16,)))
    assert one.ids.shape == (2, 1, 2, 16) and one.at.shape == (2, 1, 2, 4)
    assert finetune.make_batch(
        [[parts[1][0]]], SETTINGS._replace(batch=1, widths=(2,))
    ).at.shape == ((1, 1, 1, 1))
    with pytest.raises(ValueError, match="a text has 6 tokens, the widest batch 5; cut the texts"):
        finetune.make_batch(parts, SETTINGS._replace(batch=2, widths=(2, 5)))


# Losses and steps.


@functools.cache
def exact():
    """Texts, and in float64 the sum of the cross-entropies of their learned tokens, one by one."""
    adapter, texts, total = jax.tree.map(lambda x: x[0], trained(0)[0].adapter), toy(4), 0.0
    for ids, first in texts:
        padded = np.array([ids + [0] * (16 - len(ids))])
        hidden, _ = jax.jit(forward, static_argnames="config")(
            params(), padded, config=CONFIG, adapter=adapter
        )
        scores = np.asarray(logits(params(), hidden, config=CONFIG), np.float64)[0]
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= scores[np.arange(first - 1, len(ids) - 1), ids[first:]].sum()
    return adapter, texts, total


@pytest.mark.parametrize("chunk, parts", [(4096, 0), (12, 3), (1, 8)])
def test_the_loss_is_the_cross_entropy_of_the_learned_tokens(monkeypatch, chunk, parts):
    """Four rows of eight places: in chunks of 12 positions the last chunk is short of one place."""
    monkeypatch.setattr(finetune, "CHUNK", chunk)
    adapter, texts, wanted = exact()
    batch = jax.tree.map(lambda x: x[0, 0], finetune.make_batch([texts], SETTINGS))

    def loss(params, adapter, batch):
        return finetune.loss_sum(params, adapter, batch, config=CONFIG, settings=SETTINGS)

    steps = re.findall(r"length=(\d+)", str(jax.make_jaxpr(loss)(params(), adapter, batch)))
    assert steps == [str(CONFIG.layers), *([str(parts)] if parts else [])]
    found, count = jax.jit(loss)(params(), adapter, batch)
    assert_allclose(found, wanted, rtol=1e-6)
    assert count == sum(len(ids) - first for ids, first in texts)


def first_steps(settings, count=3, monkeypatch=None):
    """States and metrics of some steps with few and many learned tokens."""
    state = finetune.init_state(trained(0)[0].adapter, settings)
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        # The halves of a batch differ by much in what is learned.
        texts = [Text(rng.integers(1, 97, 16).tolist(), first) for first in (15, 14, 9, 8)]
        batch = finetune.make_batch([texts], settings)
        state, metrics = finetune.step(
            state, batch, jnp.array([0.02]), params(), config=CONFIG, settings=settings
        )
        found.append((state.adapter, metrics))
    return found


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4, "remat": True}])
def test_parts_and_remat_change_nothing(changes):
    changed = jax.tree.leaves(first_steps(SETTINGS._replace(**changes)))
    for found, wanted in zip(changed, jax.tree.leaves(first_steps(SETTINGS)), strict=True):
        assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_a_chunked_loss_trains_in_the_same_way(monkeypatch):
    wanted = jax.tree.leaves(first_steps(SETTINGS))
    monkeypatch.setattr(finetune, "CHUNK", 12)
    settings = SETTINGS._replace(widths=(16, 99))  # another value, so that it is traced again
    for found, want in zip(jax.tree.leaves(first_steps(settings)), wanted, strict=True):
        assert_allclose(found, want, rtol=2e-5, atol=2e-6)


def test_the_first_step_of_adam_goes_by_the_rate():
    """m / sqrt(v) is a sign at first: B, which is zero, moves by rate / warm-up steps."""
    start = adapters(0)
    states = []
    train(run(0), report=lambda done, state, *_: states.append(state))
    for b in states[0].adapter.b.values():
        assert_allclose(np.abs(b), 0.02 / 2, rtol=1e-3)
    # Where B is zero, A has no gradient and only decays.
    for name, a in states[0].adapter.a.items():
        assert_allclose(a, start.a[name] * (1 - 0.01 * 0.02 / 2), rtol=1e-6)
    assert [int(state.step[0]) for state in states] == list(range(1, 21))


def test_a_stack_learns_what_each_learns_alone():
    together, losses = trained(0, 1, 2)
    for k in range(3):
        alone, own = trained(k)
        assert_allclose(losses[:, k], own[:, 0], rtol=0, atol=1e-5)
        pairs = zip(jax.tree.leaves(together.adapter), jax.tree.leaves(alone.adapter), strict=True)
        for found, wanted in pairs:
            assert_allclose(found[k], wanted[0], rtol=0, atol=1e-5)
    assert len({float(x) for x in losses[0]}) == 3


def test_b_alone_leaves_a_as_it_is():
    start = adapters(0)
    state, losses = train(run(0, settings=SETTINGS._replace(train="b")))
    assert_same_bits(state.adapter.a, start.a)
    assert all(np.abs(b).min() > 0 for b in state.adapter.b.values())
    assert losses[-1] < losses[0]
    whole = trained(0)[0].adapter
    assert all(np.abs(whole.a[name] - start.a[name]).max() > 1e-3 for name in start.a)


def test_what_is_repeated_is_learned():
    """Four texts twenty times: the loss falls by more than half."""
    texts = (toy(4, seed=7),)
    _, losses = train(Run(texts, (0.05,), (0,), SETTINGS), start=adapters(0))
    assert losses[-1] < losses[0] / 2


def test_the_adapter_that_was_given_is_as_it_was():
    start = lora.init_adapter(jax.random.key(5), CONFIG, rank=2, alpha=4.0)
    start = lora.stack([start])
    copy = jax.tree.map(np.array, start)
    state = finetune.init_state(start, SETTINGS)
    before = jax.tree.map(np.array, state)
    last, _ = train(run(0), state=state, start=start)
    assert np.abs(last.adapter.a["query"] - start.a["query"]).max() > 1e-3
    assert_same_bits(start, copy)
    assert_same_bits(state, before)


def test_report_gets_steps_and_tokens():
    told = []
    train(run(0), report=lambda done, state, metrics, tokens: told.append((done, tokens)))
    texts = toy(5, 0)
    plan = finetune.schedule(texts, SETTINGS, 0)
    assert told == [
        (done, sum(len(texts[i].ids) for i in rows)) for done, rows in enumerate(plan, 1)
    ]


def test_a_loss_that_is_not_finite_stops_the_run():
    seen = []
    broken = run(0, 1, 2, rates=(0.02, 1e30, 0.02))
    message = (
        r"loss of adapter 1 is (nan|inf) and .* at step 2 of 20, at a rate of 1e\+30; lower th"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(broken, report=lambda done, *_: seen.append(done))
    assert seen == [1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "got steps=0; want at least 1"),
        ({"batch": 0}, "got batch=0; want at least 1"),
        ({"warmup": 1.0}, "got warmup=1.0; want at least 0 and below 1"),
        ({"warmup": -0.1}, "got warmup=-0.1"),
        ({"final": 1.5}, "got final=1.5; want 0 to 1"),
        ({"clip": 0.0}, "got clip=0.0; want a positive number"),
        ({"clip": float("nan")}, "got clip=nan"),
        ({"decay": -1.0}, "got decay=-1.0; want 0 or more"),
        ({"train": "a"}, "got train='a'; want 'b' or 'ab'"),
        ({"accumulate": 3}, "got accumulate=3; want a divisor of batch=4"),
        ({"accumulate": 0}, "got accumulate=0"),
        ({"widths": ()}, r"got widths=\(\); want increasing numbers of tokens, 2 or more"),
        ({"widths": (16, 8)}, r"got widths=\(16, 8\)"),
        ({"widths": (8, 8)}, r"got widths=\(8, 8\)"),
        ({"widths": (1, 8)}, r"got widths=\(1, 8\)"),
        ({"dtype": "float16"}, "got dtype='float16'; want 'float32' or 'bfloat16'"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    finetune.check_settings(SETTINGS)
    with pytest.raises(ValueError, match=f"finetune: {message}"):
        finetune.check_settings(SETTINGS._replace(**changes))
    with pytest.raises(ValueError, match=message):
        train(run(0, settings=SETTINGS._replace(**changes)))


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "lessons is empty; want at least one example"),
        (
            [Text([1, 2], 1), Text([1, 2], 0)],
            "example 1 of lessons has 2 tokens, learned from 0 on",
        ),
        ([Text([1, 2], 2)], "example 0 of lessons has 2 tokens, learned from 2 on; want a prompt"),
        ([Text([1] * 17, 1)], "has 17 tokens, learned from 1 on; .* at most 16 tokens in all"),
    ],
)
def test_texts_that_cannot_be_learned(texts, message):
    with pytest.raises(ValueError, match=f"finetune: .*{message}"):
        finetune.check_texts(texts, SETTINGS, name="lessons")
    with pytest.raises(ValueError, match=message.replace("lessons", "the texts")):
        train(run(0)._replace(texts=(texts,)))


# Checkpoints.


def keep(folder, every, digest="own"):
    """A report that writes checkpoints."""

    def report(done, state, metrics, tokens):
        if done % every == 0:
            finetune.save_checkpoint(folder, state, digest)

    return report


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    train(run(0), report=keep(folder, 5))
    return folder


@pytest.fixture
def folder(checkpoints, tmp_path):
    """Two checkpoints, at 15 and 20 of 20 steps, to be spoiled."""
    shutil.copytree(checkpoints, tmp_path / "run")
    return tmp_path / "run"


def load(folder, digest="own"):
    return finetune.load_checkpoint(folder, finetune.init_state(adapters(0), SETTINGS), digest)


def test_the_newest_two_checkpoints_are_kept_and_read_bit_by_bit(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["15", "20"]
    assert_same_bits(load(folder), trained(0)[0])
    assert jax.tree.structure(load(folder)) == jax.tree.structure(trained(0)[0])
    assert load(folder / "nothing") is None


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, seeds):
    def stop(done, state, *_):
        if done == 10:
            finetune.save_checkpoint(tmp_path, state, "own")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run(*seeds), report=stop)
    like = finetune.init_state(adapters(*seeds), SETTINGS)
    state = finetune.load_checkpoint(tmp_path, like, "own")
    assert state.step.tolist() == [10] * len(seeds)
    last, losses = train(run(*seeds), state=state)
    assert len(losses) == 10
    assert_same_bits(last, trained(*seeds)[0])
    assert train(run(*seeds), state=last)[1].size == 0  # nothing is left to do


def test_a_damaged_checkpoint_is_refused_by_name(folder):
    files = [path for path in (folder / "20").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        if path.name == "manifest.json":
            continue
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else ():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=f"{path} is damaged; delete {folder / '20'} to"):
                load(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"{path} is missing; delete {folder / '20'} to go on"):
            load(folder)
        path.write_bytes(whole)
    assert load(folder).step == 20


def test_a_damaged_manifest_is_refused(folder):
    path = folder / "20" / "manifest.json"
    whole = path.read_bytes()
    for at in (0, 3, whole.index(b"files") + 1, whole.index(b"own"), len(whole) // 2, -1):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"load_checkpoint: {folder / '20'}"):
            load(folder)
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=f"load_checkpoint: {path} is damaged"):
        load(folder)


def test_a_checkpoint_without_its_manifest_does_not_count(folder):
    (folder / "20" / "manifest.json").unlink()
    state = load(folder)
    assert state.step == 15
    last, _ = train(run(0), state=state, report=keep(folder, 5))  # over what was left there
    assert_same_bits(last, trained(0)[0])
    assert_same_bits(load(folder), last)


def test_a_checkpoint_of_another_run_is_refused(folder):
    with pytest.raises(
        ValueError, match=f"{folder / '20'} is of a run with another model, data or"
    ):
        load(folder, digest="other")


def test_a_digest_is_of_all_that_the_result_depends_on():
    own = run(0, 1)
    changes = [
        own._replace(texts=own.texts[::-1]),
        own._replace(
            texts=(own.texts[0], [*own.texts[1][:-1], own.texts[1][-1]._replace(first=1)])
        ),
        own._replace(rates=(0.02, 0.02)),
        own._replace(seeds=(0, 2)),
        own._replace(settings=SETTINGS._replace(decay=0.0)),
    ]
    start = adapters(0, 1)
    halves = jax.tree.map(lambda x: x.astype("bfloat16"), params())
    digests = [each.digest("abc", params(), CONFIG, start) for each in [own, *changes]]
    digests += [
        own.digest("abd", params(), CONFIG, start),
        own.digest("abc", halves, CONFIG, start),
        own.digest("abc", params(), CONFIG._replace(theta=9.0), start),
        own.digest("abc", params(), CONFIG, adapters(0, 2)),
    ]
    assert len(set(digests)) == len(digests)
    arrays = own._replace(
        texts=tuple([Text(np.array(i), np.int64(f)) for i, f in t] for t in own.texts)
    )
    assert arrays.digest("abc", params(), CONFIG, start) == digests[0]


# Other processes.


def child(folder, die_at):
    """What a killed process runs: a checkpoint every five steps, and the last state's bits."""
    own, folder = run(0), Path(folder)
    state = load(folder / "checkpoints")
    print(0 if state is None else state.step[0])
    save = keep(folder / "checkpoints", 5)

    def report(done, *rest):
        save(done, *rest)
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    last, _ = train(own, state=state, report=report)
    np.savez(folder / "last.npz", *jax.tree.leaves(last))


def start(call, **environment):
    command = [sys.executable, "-c", f"import test_finetune\ntest_finetune.{call}"]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    begin = functools.partial(
        start,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    killed = begin(f"child({str(tmp_path / 'killed')!r}, 12)")
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "last.npz").exists()
    again = begin(f"child({str(tmp_path / 'killed')!r}, 0)")
    whole = begin(f"child({str(tmp_path / 'whole')!r}, 0)")
    assert [process.communicate()[0].split() for process in (whole, again)] == [["0"], ["10"]]
    assert whole.returncode == again.returncode == 0
    found, wanted = (np.load(tmp_path / name / "last.npz") for name in ("killed", "whole"))
    assert len(wanted.files) == len(jax.tree.leaves(trained(0)[0]))
    for name in wanted.files:
        assert found[name].tobytes() == wanted[name].tobytes()


def sharded():
    """Losses on one device and on eight, and where the parameters lie."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    own = run(0, 1, settings=SETTINGS._replace(batch=16, steps=4, accumulate=2))
    found = {"one": train(own)[1].tolist()}
    for name, fully in (("copied", False), ("cut", True)):
        placed = finetune.shard_params(params(), mesh, fully=fully)
        losses = []
        state = finetune.train(
            placed,
            CONFIG,
            adapters(0, 1),
            own,
            mesh=mesh,
            report=lambda done, state, metrics, tokens, to=losses: to.append(metrics.loss.tolist()),
        )
        found[name] = losses
        found[f"{name} shapes"] = {
            jax.tree_util.keystr(path): [
                len(leaf.addressable_shards),
                leaf.addressable_shards[0].data.shape,
            ]
            for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
        }
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.adapter))
    batch = finetune.make_batch([t[:8] for t in (toy(8), toy(8, 1))], SETTINGS._replace(batch=8))
    rows = finetune.shard_batch(batch, mesh)
    found["rows"] = [x.addressable_shards[0].data.shape for x in rows]
    deep = CONFIG._replace(layers=64)  # more than a norm is wide
    specs = finetune.param_shardings(param_shapes(deep), mesh, fully=True)
    found["deep"] = [
        list(s.spec) for s in (specs["layers"]["norm_attention"]["scale"], specs["embed"])
    ]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def on_eight():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    process = start("sharded()", XLA_FLAGS=flags)
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output)


@pytest.mark.parametrize("name", ["copied", "cut"])
def test_eight_devices_give_the_losses_of_one(on_eight, name):
    assert np.shape(on_eight["one"]) == (4, 2)
    assert on_eight["one"][0] != on_eight["one"][3]
    assert_allclose(on_eight[name], on_eight["one"], rtol=0, atol=1e-5)


def test_parameters_and_rows_are_cut(on_eight):
    cut = on_eight["cut shapes"]
    whole = {
        jax.tree_util.keystr(path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params())
    }
    assert on_eight["copied shapes"] == {name: [8, shape] for name, shape in whole.items()}
    for name, shape in whole.items():
        count, part = cut[name]
        assert count == 8 and 8 * np.prod(part) == np.prod(shape)
        # Neither layers nor 97 tokens are cut.
        assert all(p == n for p, n in zip(part, shape, strict=True) if n in (2, 97))
    assert cut["['embed']"] == [8, [97, 4]]
    assert cut["['layers']['gate']['kernel']"] == [8, [2, 32, 6]]
    assert on_eight["rows"] == [[2, 1, 1, 16], *[[2, 1, 1, 8]] * 3]
    assert on_eight["deep"] == [[None, "data"]] * 2
