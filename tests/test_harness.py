"""Our models in lm-evaluation-harness: against its own models with torch, and against our loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_harness
from fixtures.make_harness import instances
from numpy.testing import assert_allclose

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from learnware_jax.slm import evaluate, lora  # noqa: E402
from learnware_jax.slm.decoder import Adapter, forward, logits  # noqa: E402
from learnware_jax.slm.harness import harness_model  # noqa: E402
from learnware_jax.slm.weights import load_model  # noqa: E402

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
NOTHING = Adapter({}, {}, jnp.zeros(1))
PROSE = (
    "The harbour woke slowly that morning. Two boats had come in before dawn, and the men were "
    "already on the quay, sorting the catch into boxes and covering them with ice.",
    "Bread needs very little: flour, water, salt and time. Fold the dough a few times during the "
    "first two hours, then leave it in a cool place overnight, and bake it in the morning.",
)
SIZES = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "eos_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose tokens are bytes and pieces of words, with their blanks in front."""
    import safetensors.numpy
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    home = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "config.json").write_text(json.dumps(SIZES))
    rng, tensors = np.random.default_rng(0), {}
    shapes = {"model.embed_tokens": (320, 32), "lm_head": (320, 32)}
    for layer in range(2):
        for name, shape in (
            ("self_attn.q_proj", (32, 32)),
            ("self_attn.k_proj", (16, 32)),
            ("self_attn.v_proj", (16, 32)),
            ("self_attn.o_proj", (32, 32)),
            ("mlp.gate_proj", (48, 32)),
            ("mlp.up_proj", (48, 32)),
            ("mlp.down_proj", (32, 48)),
        ):
            shapes[f"model.layers.{layer}.{name}"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(32, np.float32)
    tensors["model.norm.weight"] = np.ones(32, np.float32)
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, home / "model.safetensors", {"format": "pt"})
    return home


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def ours(model):
    return harness_model(model, batch_tokens=256)


def ask(lm, kind, arguments):
    return getattr(lm, kind)(instances(kind, arguments))


def pairs():
    """Contexts and continuations whose border is easy to get wrong, and texts that are cut."""
    found = [
        ("The boats", " had come in"),
        ("The boats ", "had come in"),  # the blank goes to the continuation
        ("The boats  \n", "had come in"),
        ("The bo", "ats had"),  # a border within a piece
        ("sor", "ting"),
        ("", "Bread needs"),
        ("x", "y"),
        ("naïve café – ", "ß"),  # noqa: RUF001
        (PROSE[0] + PROSE[1], " in the morning."),
        ("Fold.", " " + PROSE[1][:130]),
    ]
    for question in ("Where are the boats?", "What does bread need?", "Two"):
        found += [(f"Question: {question}\nAnswer:", f" {a}") for a in ("salt", "quay", "cold ice")]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_stored_numbers_of_the_harness(kind):
    """On tokens that are words, with one before every text."""
    stored = json.loads(make_harness.FIXTURE.read_text())["llama"][kind]
    lm = harness_model(load_model(make_harness.FOLDER / "llama"), batch_tokens=256)
    found, wanted = ask(lm, kind, [tuple(each) for each, _ in stored]), [x for _, x in stored]
    if kind == "generate_until":
        assert found == wanted
        return
    if kind == "loglikelihood":
        assert [x[1] for x in found] == [x[1] for x in wanted]
        found, wanted = ([x[0] for x in each] for each in (found, wanted))
    assert_allclose(found, wanted, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def theirs(folder):
    """HFLM on the same files."""
    pytest.importorskip("torch")
    return make_harness.reference(folder)


def test_log_likelihoods_equal_those_of_torch_and_of_our_loop(ours, theirs, model):
    wanted, found = (ask(lm, "loglikelihood", pairs()) for lm in (theirs, ours))
    assert_allclose([x[0] for x in found], [x[0] for x in wanted], rtol=0, atol=1e-3)
    assert [x[1] for x in found] == [x[1] for x in wanted]
    items = [("Question: Two\nAnswer:", [" salt", " quay", " cold ice"])]
    questions = [
        evaluate.Question(
            *(model.tokenizer.encode(context).ids, [model.tokenizer.encode(c).ids for c in choices])
        )
        for context, choices in items
    ]
    scores = evaluate.choice_scores(model.params, model.config, questions, adapters=NOTHING)
    assert_allclose(scores[0, 0], [x[0] for x in found[-3:]], rtol=0, atol=1e-4)


def test_rolling_log_likelihoods_equal_those_of_torch(ours, theirs):
    texts = [("Two boats",), (PROSE[0][:90],), (PROSE[0] + PROSE[1],), (PROSE[1] * 3,), ("",)]
    wanted, found = (ask(lm, "loglikelihood_rolling", texts) for lm in (theirs, ours))
    assert_allclose(found, wanted, rtol=0, atol=1e-3)
    assert found[-1] == 0


def test_answers_equal_those_of_torch(ours, theirs):
    prompts = ["Two boats", "Bread needs very", PROSE[0]]
    kinds = [
        {"until": [], "max_gen_toks": 12},
        {"until": ["\n"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 12},
    ]
    arguments = [(prompt, kind) for kind in kinds for prompt in prompts]
    wanted, found = (ask(lm, "generate_until", arguments) for lm in (theirs, ours))
    assert found == wanted
    stop = found[0][3:5]
    arguments = [(prompts[0], {"until": stop, "max_gen_toks": 12})]
    assert ask(ours, "generate_until", arguments) == ask(theirs, "generate_until", arguments)
    assert ask(ours, "generate_until", arguments) == [found[0].split(stop)[0]]


# Without torch.


def test_order_repetition_and_batches_do_not_matter(ours, model):
    order = np.random.default_rng(0).integers(0, len(pairs()), 40)
    wanted = ask(ours, "loglikelihood", pairs())
    found = ask(harness_model(model), "loglikelihood", [pairs()[i] for i in order])
    assert_allclose([x[0] for x in found], [wanted[i][0] for i in order], rtol=0, atol=1e-4)
    assert ask(ours, "loglikelihood", []) == ask(ours, "loglikelihood_rolling", []) == []


def test_an_adapter_acts_as_merged_parameters(model):
    rng = np.random.default_rng(0)
    adapter = lora.init_adapter(jax.random.key(0), model.config, rank=2, alpha=4.0)
    b = {n: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32) for n, x in adapter.b.items()}
    adapter = adapter._replace(b=b)
    merged = model._replace(params=lora.merge(model.params, adapter))
    own = [("Two boats", " had"), ("Two boats", " were already"), ("Bread", " had")]
    plain, changed, wanted = (
        [x[0] for x in ask(lm, "loglikelihood", own)]
        for lm in (
            harness_model(model),
            harness_model(model, adapter=adapter),
            harness_model(merged),
        )
    )
    assert_allclose(changed, wanted, rtol=0, atol=1e-4)
    assert np.abs(np.subtract(plain, wanted)).max() > 0.1


def test_a_rolling_log_likelihood_is_the_sum_over_all_tokens(ours, model):
    text = PROSE[0][:90]
    ids = [model.end, *model.tokenizer.encode(text).ids]
    hidden, _ = forward(model.params, jnp.array([ids]), config=model.config)
    scores = np.asarray(logits(model.params, hidden, config=model.config), np.float64)[0]
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    wanted = scores[np.arange(len(ids) - 1), ids[1:]].sum()
    [found] = ask(ours, "loglikelihood_rolling", [(text,)])
    assert_allclose(found, wanted, rtol=0, atol=1e-3)
    # Which is that of the text behind nothing.
    assert_allclose(ask(ours, "loglikelihood", [("", text)])[0][0], wanted, rtol=0, atol=1e-3)


def test_generated_texts_are_answers(ours, model):
    prompts = ["Two boats", "Bread needs very"]
    tokens = evaluate.answers(
        model.params,
        model.config,
        [model.tokenizer.encode(prompt).ids for prompt in prompts],
        adapters=NOTHING,
        steps=12,
        end=model.end,
        batch_tokens=256,
    )
    wanted = [model.tokenizer.decode(ids) for ids in tokens[0]]
    # Every name of the length is known, and what does not matter to greedy decoding.
    for settings in (
        {"max_gen_toks": 12},
        {"max_new_tokens": 12, "until": None, "do_sample": False, "temperature": 1.0},
        {"max_tokens": 12, "max_gen_toks": None, "top_p": 0.9, "temperature": 0, "num_beams": 1},
        {"max_completion_tokens": 12, "until": ""},
    ):
        assert ask(ours, "generate_until", [(prompt, settings) for prompt in prompts]) == wanted


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_sample": True, "temperature": 0.0}, "only greedy decoding is done"),
        ({"temperature": 0.5}, "got {'temperature': 0.5}; only greedy decoding is done"),
        ({"num_beams": 4}, "got {'num_beams': 4}; only greedy decoding is done"),
        ({"repetition_penalty": 1.2}, "whatever is not among until, do_sample, temperature, top_p"),
        ({"max_gen_toks": 96}, "96 tokens are asked for, and the model takes 96 in all; set a low"),
        ({}, "256 tokens are asked for"),
    ],
)
def test_what_cannot_be_generated(ours, settings, message):
    with pytest.raises(ValueError, match=f"generate_until: .*{message}"):
        ask(ours, "generate_until", [("Two boats", {"max_gen_toks": 3}), ("Two boats", settings)])


def test_what_cannot_be_scored(ours):
    for continuation, count in (("", 0), ("~" * 97, 97)):
        with pytest.raises(ValueError, match=f"continuation of request 1 has {count} tokens"):
            ask(ours, "loglikelihood", [("a", "b"), ("a", continuation)])


def test_a_whole_task_gives_the_accuracy_of_our_loop(ours, model, tmp_path):
    """From its file on, without network: the task's prompts, metrics and mean are lm_eval's."""
    rng = np.random.default_rng(3)
    words = sorted(set(" ".join(PROSE).split()))
    docs = [
        {
            "question": f"What of {rng.choice(words)} and {rng.choice(words)}?",
            "choices": [" ".join(rng.choice(words, n)) for n in rng.permutation([1, 2, 3, 4])],
            "gold": int(rng.integers(4)),
        }
        for _ in range(24)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{tmp_path / "docs.jsonl"}"}}
  cache_dir: "{tmp_path / "cache"}"
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=ours, tasks=["tiny"], task_manager=manager)
    results = found["results"]["tiny"]

    def tokens(text):
        return model.tokenizer.encode(text).ids

    questions = [
        evaluate.Question(
            tokens(f"Question: {doc['question']}\nAnswer:"),
            [tokens(f" {choice}") for choice in doc["choices"]],
        )
        for doc in docs
    ]
    [scores] = evaluate.choice_scores(model.params, model.config, questions, adapters=NOTHING)
    gold = np.array([doc["gold"] for doc in docs])
    sizes = np.array([[len(choice) for choice in doc["choices"]] for doc in docs])
    wanted = evaluate.accuracy(scores.argmax(1) == gold)
    assert 0 < wanted.value < 1
    assert_allclose(results["acc,none"], wanted.value, rtol=1e-12)
    assert_allclose(results["acc_stderr,none"], wanted.stderr, rtol=1e-9)
    normed = evaluate.accuracy((scores / sizes).argmax(1) == gold)
    assert_allclose(results["acc_norm,none"], normed.value, rtol=1e-12)
    assert wanted != normed
    # And item by item.
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(r[0][0]) for r in sample["resps"]] for sample in samples]
    assert_allclose(likelihoods, scores, rtol=0, atol=1e-3)
