r"""Fine-tuning of low-rank adapters.

python -m experiments.finetune --config=configs/finetune.py:quickstart   14 tasks on SmolLM2-135M:
    40 min on 2 cores
python -m experiments.finetune --config=configs/finetune.py:mine --config.data.mine.source=FILE \
    --config.data.mine.text=question --config.data.mine.answer=answer    your own data: 1 to 7
    min for 100 steps on 2 cores
python -m experiments.finetune --config=configs/finetune.py:qwen2.5-7b --config.plan=true
python -m experiments.finetune --config=configs/finetune.py:llama3.1-8b  at the scale of the paper;
    never run, for want of such machines
python -m experiments.finetune --config=configs/finetune.py:qwen2.5-0.5b
    The PAVE papers' model. Never run: no hub was at hand.
python -m experiments.finetune --config=configs/finetune.py:smoke        2 tasks, 4 steps, 30 s

Adapters are written to WORKDIR/ID/adapter as PEFT writes them. A run that was stopped goes on from
its last checkpoint, to the same bits. --config.plan=true prints what memory a device needs, and
trains nothing. FILE is jsonl, json, csv, tsv or parquet; OWNER/NAME[:SPLIT] of a data set works.
"""

from ml_collections import ConfigDict

# `sizes` is what the model's config.json says of its architecture, so that a plan needs no hub.
PAPER = {
    "qwen2.5-7b": dict(
        name="Qwen/Qwen2.5-7B",
        template="chatml",
        sizes=dict(
            model_type="qwen2",
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=False,
        ),
    ),
    "llama3.1-8b": dict(
        name="meta-llama/Llama-3.1-8B",
        template="llama3",
        sizes=dict(
            model_type="llama",
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            rope_theta=5e5,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
            tie_word_embeddings=False,
        ),
    ),
    "qwen2.5-0.5b": dict(
        name="Qwen/Qwen2.5-0.5B",
        template="chatml",
        sizes=dict(
            model_type="qwen2",
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
    ),
}
# How the PAVE papers train their reference model.
PAVE = dict(
    lora=dict(targets=("query", "key", "value")),
    train="b",
    steps=400,
    batch=2,
    rate=1e-5,
    decay=0.5,
    warmup=0.03,
    sharding="none",
)
SIZES = ("quickstart", "mine", *PAPER, "smoke")


def source(source="", text="text", answer="answer", labels=(), instruction=""):
    # labels: the words that whole numbers in the answer column stand for.
    return dict(source=source, text=text, answer=answer, labels=labels, instruction=instruction)


# Data sets of the published study (arXiv 2505.13425), by hub id, with training rows.
FAMILIES = {
    "phrasebank": source(
        "takala/financial_phrasebank/sentences_50agree:train",
        "sentence",
        "label",
        ("negative", "neutral", "positive"),
        "What is the sentiment of this financial sentence: negative, neutral or positive?",
    ),
    "twitter-sentiment": source(
        "zeroshot/twitter-financial-news-sentiment:train",
        "text",
        "label",
        ("bearish", "bullish", "neutral"),
        "Is this financial tweet bearish, bullish or neutral?",
    ),
    "german-credit": source("TheFinAI/flare-german:train", "query", "answer"),
    "australian-credit": source("TheFinAI/flare-australian:train", "query", "answer"),
    "pubmedqa": source(
        "qiaojin/PubMedQA/pqa_labeled:train",
        "question",
        "final_decision",
        instruction="Answer yes, no or maybe.",
    ),
    "wikidoc": source(
        "medalpaca/medical_meadow_wikidoc_patient_information:train",
        "input",
        "output",
        instruction="Answer this question truthfully.",
    ),
    "gsm8k": source(
        "openai/gsm8k/main:train", "question", "answer", instruction="Solve this problem."
    ),
}


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/finetune.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke, paper = size == "smoke", size in PAPER
    config = ConfigDict(
        dict(
            workdir=f"runs/finetune-{size}",
            # A material, a folder or .gguf file, or OWNER/NAME of the hub. The matrices of the
            # frozen model are kept in dtype.
            model=dict(
                name=PAPER[size]["name"] if paper else "SmolLM2-135M-Instruct",
                dtype="bfloat16",
                sizes=PAPER[size]["sizes"] if paper else {},  # for a plan; {}: of the model itself
            ),
            template=PAPER[size]["template"] if paper else "plain",
            # Names in learnware_jax.dock.labelled.LABELLED, or a role ("dock", "unseen").
            tasks={"quickstart": ("dock",), "smoke": ("recurrences", "arithmetic")}.get(size, ()),
            data=FAMILIES if paper else dict(mine=source()),
            examples=16 if smoke else 100_000 if paper else 2000,
            # "answer": the loss is that of the answer and its end; "text": of every token.
            learn="answer",
            lora=dict(
                rank=16 if paper else 4,
                alpha=32.0 if paper else 8.0,
                targets=("query", "key", "value", "out") if paper else ("query", "value"),
                # Of A; adapters of one seed share their A at the start.
                seed=0,
            ),
            train="ab",  # or "b": A stays as it is
            steps=4 if smoke else 2000 if paper else 100,
            batch=2 if smoke else 16 if paper else 8,
            accumulate=1,
            rate=2e-4 if paper else 5e-3,
            warmup=0.1,
            final=0.1,
            clip=1.0,
            decay=0.0,
            widths=(512, 1024, 2048) if paper else (16, 32, 48, 64, 96, 128, 160),
            # Operands of products; sums, adapters and the optimiser are float32.
            dtype="bfloat16",
            # True: less memory, a third more work.
            remat=paper,
            # "data": rows over all devices; "full": the frozen model is cut over them too.
            sharding="full" if paper else "none",
            # Adapters trained at once, in one program, for accelerators. All have this rate and
            # seed; slm.finetune.Run takes one of each an adapter.
            together=1,
            checkpoint_every=2 if smoke else 50,
            seed=0,
            plan=False,
            devices=0,  # that a plan is for; 0: as many as there are
        )
    )
    if size == "qwen2.5-0.5b":
        config.update(PAVE)
    return config
