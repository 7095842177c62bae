"""The language-model paths timed side by side with torch, PEFT, and with each other.

python -m experiments.bench_slm --config=configs/bench_slm.py            SmolLM2-135M: 20 min
python -m experiments.bench_slm --config=configs/bench_slm.py:smoke      a tiny random model: 20 s

torch, transformers and peft are measured where they can be imported; nothing is downloaded for
them: they get our numbers, and one thread or all, whichever proves faster. First calls, which
compile, are left out and shown apart.
"""

from ml_collections import ConfigDict

# As in a config.json; a random model of these sizes.
TINY = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def get_config(size="full"):
    if size not in ("full", "smoke"):
        raise ValueError(f"configs/bench_slm.py: got {size!r}; want full or smoke.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/bench_slm-{size}",
            # A material, file, folder or OWNER/NAME; or sizes of a random one, if there are any.
            model=dict(name="SmolLM2-135M-Instruct", dtype="float32", sizes=TINY if smoke else {}),
            lora=dict(rank=8, alpha=16.0, targets=("query", "key", "value", "out")),
            rate=1e-3,
            # Rows and tokens of a training step and of a forward pass.
            batch=2 if smoke else 8,
            tokens=16 if smoke else 64,
            decode=dict(
                batches=(2,) if smoke else (1, 8),
                prompt=8 if smoke else 32,
                new=6 if smoke else 32,
            ),
            # Adapters in one program, with rows for each.
            stack=dict(
                adapters=3 if smoke else 8,
                batch=2,
                dtypes=("float32",) if smoke else ("float32", "bfloat16"),
            ),
            choice=dict(
                questions=4 if smoke else 8,
                prompt=16 if smoke else 64,
                choices=(2,) if smoke else (4, 8),
                tokens=3,
                batch_tokens=64 if smoke else 512,
            ),
            # The side of the square matrices whose product is the measure of the chip.
            product=256 if smoke else 2048,
            repeats=3 if smoke else 5,
            seed=0,
        )
    )
