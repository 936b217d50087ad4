"""Coverage-guided fuzzing of the parsers that are pure Python, with atheris (libFuzzer for Python).

    pip install atheris
    python -m tests.fuzz.coverage json -runs=200000

The good files that `tests.fuzz.run` damages are the corpus it starts from, and the same mutations are tried beside
libFuzzer's own. Random damage finds what lies near good files. libFuzzer keeps the inputs that reach new branches and
goes on from them, so it also finds what takes three coincidences. It sees only instrumented Python, and has wheels for
few systems; so it stands beside `tests.fuzz.run`, which needs nothing but the tests' own libraries.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import atheris

from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_pickle, mutate_pth

with atheris.instrument_imports(include=["tinylm", "pickletools", "zipfile"]):
    import yaml

    from tests.fuzz.targets import make_seeds
    from tinylm.checkpoint.original_pth import read_pth
    from tinylm.checkpoint.weights_file import read_header
    from tinylm.commandline.strict_yaml import parse_yaml
    from tinylm.files.untrusted import parse_json
    from tinylm.model.hf_config import config_from_hf
    from tinylm.tokenizer.tokenizer_json import check_definition

FOLDER = Path(tempfile.mkdtemp())


def file_of(data: bytes) -> Path:
    path = FOLDER / "input.pth"
    path.write_bytes(data)
    return path


def read_config(data: bytes) -> None:
    if isinstance(value := parse_json(data), dict):
        config_from_hf(value)


def read_program(program: bytes) -> None:
    """The pickle machine, with the program in an archive that is in order otherwise."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(64))
    read_pth(file_of(packed.getvalue()))


PARSERS: dict[str, Callable[[bytes], object]] = {
    "json": parse_json,
    "config": read_config,
    "tokenizer": lambda data: check_definition(parse_json(data)),
    "header": lambda data: read_header(file_of(len(data).to_bytes(8, "little") + data)),
    "zip": lambda data: read_pth(file_of(data)),
    "pickle": read_program,
    "yaml": lambda data: parse_yaml(data.decode("utf-8"), yaml.safe_load),
}


def seed_of(name: str, good: Path) -> bytes:
    """A good input for a parser."""
    if name == "pickle":
        with zipfile.ZipFile(good / "pth" / "model.pth") as archive:
            return next(archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
    weights = (good / "model" / "model.safetensors").read_bytes()
    files = {"json": "model/lineage.json", "config": "yarn/config.json", "tokenizer": "model/tokenizer.json"}
    files |= {"zip": "pth/model.pth", "yaml": "data/run.yaml"}
    return (
        weights[8 : 8 + int.from_bytes(weights[:8], "little")]
        if name == "header"
        else (good / files[name]).read_bytes()
    )


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Half the time libFuzzer's mutation, half the time one that knows the format."""
    own = {"zip": mutate_pth, "pickle": mutate_pickle, "yaml": mutate_bytes}.get(name, mutate_json)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        try:
            return own(rng, data)[:max_size]
        except Exception:  # what is no longer well-formed can only be damaged blindly
            return atheris.Mutate(data, max_size)

    return mutate


def main() -> None:
    """Fuzz one parser; what libFuzzer is told follows its name. An error that is not ours ends it, with its input."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        raise SystemExit(f"usage: python -m tests.fuzz.coverage {{{','.join(PARSERS)}}} [-runs=N] [-seed=N]")
    name = sys.argv.pop(1)
    parser, good, corpus = PARSERS[name], FOLDER / "good", FOLDER / "corpus"
    corpus.mkdir()
    make_seeds(good)
    (corpus / "good").write_bytes(seed_of(name, good))

    def one_input(data: bytes) -> None:
        try:
            parser(data)
        except (ValueError, OSError, yaml.YAMLError):
            pass

    atheris.Setup([*sys.argv, "-max_len=65536", str(corpus)], one_input, custom_mutator=mutator(name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
