"""Do the published settings need the model at every step? Measured on development tasks.

Example: python -m experiments.families --config=configs/families.py:development
"""

import hashlib
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save

from experiments.common import say, write_json
from experiments.vectors import Reference, batches_of, row_gradients, space_of, texts_of
from learnware_jax.dock.labelled import load_examples
from learnware_jax.dock.store import write_file
from learnware_jax.specification import pave

WAYS = ("fitted", "linear", "quarter")


def develop(reference: Reference, fit: pave.Settings, config: ConfigDict) -> dict:
    """Parameter vectors by the published settings, through the model and without it.

    For two halves of every development task and each target: the vector of `pave.fit`, and those of
    the loss made linear at the start, for all steps and a quarter of them.
    """
    found, seconds = {}, {"through the model": [], "gradients": [], "linear": []}
    for target in ("answers", "prompts"):
        for name in config.development:
            for part in ("train", "user"):
                examples = load_examples(name, part, config.learnware_rows // 2)
                texts = texts_of(reference, [(e.text, e.answer) for e in examples], target)
                file = Path(config.workdir) / "development" / f"{name}-{part}-{target}.safetensors"
                digest = _digest(reference, texts, target, fit, config)
                if not file.exists() or _metadata(file).get("digest") != digest:
                    vectors, taken = _developed(reference, texts, fit, config)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_file(
                        file,
                        save(vectors, {"seconds": json.dumps(taken), "digest": digest}),
                        where="develop",
                    )
                    say(f"{file.stem}: {taken}")
                found[target, name, part] = load_file(file)
                for way, taken in json.loads(_metadata(file)["seconds"]).items():
                    seconds[way].append(taken)
    output = {"fit": config.fit.to_dict(), "rows": config.learnware_rows // 2, "targets": {}}
    for target in ("answers", "prompts"):
        halves = {
            part: {
                way: np.stack([found[target, name, part][way] for name in config.development])
                for way in WAYS
            }
            for part in ("train", "user")
        }
        tables = {way: halves["train"][way] @ halves["user"][way].T for way in WAYS}
        output["targets"][target] = {
            "cosine_to_fitted": {
                way: [
                    float(a @ b)
                    for part in halves.values()
                    for a, b in zip(part["fitted"], part[way], strict=True)
                ]
                for way in ("linear", "quarter")
            },
            "cosines_between_halves": {way: t.round(4).tolist() for way, t in tables.items()},
            "same_order": {
                way: float(np.mean(np.argsort(tables[way], 0) == np.argsort(tables["fitted"], 0)))
                for way in ("linear", "quarter")
            },
        }
    output["seconds"] = {way: float(np.median(taken)) for way, taken in seconds.items()}
    write_json(Path(config.workdir) / "development.json", output)
    print(json.dumps(output, indent=1))
    return output


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


def _digest(reference, texts, target, fit, config) -> str:
    content = [space_of(reference, target), texts, fit, config.reference.together, config.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _developed(reference, texts, fit, config):
    b = reference.adapter.b
    order = pave.draw_rows(jax.random.key(config.seed), len(texts), fit)
    begin = time.perf_counter()
    [(_, rows)] = batches_of(texts, config.reference.widths, len(texts))
    through = pave.fit(reference.loss, b, rows, order, settings=fit)
    vectors = {"fitted": np.asarray(pave.flatten(through.change))}
    fitted = time.perf_counter()
    gradients, weights = row_gradients(reference, texts, together=config.reference.together)
    passed = time.perf_counter()
    loss = pave.linear_loss(gradients, weights)
    for way, settings in (("linear", fit), ("quarter", fit._replace(steps=fit.steps // 4))):
        order = pave.draw_rows(jax.random.key(config.seed), len(texts), settings)
        change = pave.fit(loss, b, jnp.arange(len(texts)), order, settings=settings).change
        vectors[way] = np.asarray(pave.flatten(change))
    taken = np.diff([begin, fitted, passed, time.perf_counter()])
    return vectors, dict(
        zip(("through the model", "gradients", "linear"), map(float, taken), strict=True)
    )
