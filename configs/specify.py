r"""One specification of any number of texts or embedded rows, read in pieces.

python -m experiments.specify --config=configs/specify.py:quickstart --config.data=FILE \
    [--config.dock=DOCK] [--config.workdir=FOLDER]
    10 s for 100,000 embedded rows (npy) on 2 cores; texts take as long as their embedding.
python -m experiments.specify --config=configs/specify.py:smoke      600 questions, 15 s

FILE is jsonl, csv, tsv, parquet or plain text (one text a line; --config.column names the column of
texts where it cannot be guessed); or npy, with one embedded text a row, made by `encoder` with
`max_tokens` and `dtype`; or json, which is read whole. OWNER/NAME[/CONFIG][:SPLIT] of a data set is
read from the local mirror or the cache if it is there, and else as a stream from the hub. A text
that is repeated counts every time.

With a dock, the specification is made with the dock's encoder and kernel, and can be compared with
its learnwares; without, with the settings below.

Written to the workdir: rkme.safetensors, the specification, with at most half as many points as
rows, and results.json. While the run lasts, stream.safetensors holds what a stopped run goes on
from: with the same command it ends with the same bits. It contains embedded rows, as private as the
texts, and is deleted when the run is done; delete it yourself after a run that you give up. No text
is written anywhere.

Memory does not depend on the number of rows: 1.05 GiB with the encoder at 100,000 embedded rows and
at 500,000 (npy, 17 s), and stream.safetensors has at most 76 MB. The devices of one machine share
the embedding of texts.
"""

from ml_collections import ConfigDict

from configs import build

SIZES = ("quickstart", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/specify.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/specify-{size}",
            # A file, a data set of the hub, or a task of the catalogue.
            data="fiqa" if smoke else "",
            column="",
            dock="",
            specification=build.specification(smoke),
            # Rows that are kept, and to which points are fitted.
            capacity=32_768,
            # Places at which the mean embedding of all rows is kept; out of the first piece of
            # texts (if texts are sorted, shuffling them helps), or of all of an npy file.
            anchors=256,
            # Texts that are embedded, or rows that are read, at once.
            piece=128 if smoke else 1024,
            # Between two writings of what a stopped run goes on from.
            save_seconds=60.0,
            seed=0,
        )
    )
