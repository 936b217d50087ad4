"""One process that tokenises a corpus; ranks as torchrun's. Run by `test_shard_cache.py`.

With `kill` it kills itself while it writes its third shard. With `together` two processes wait for each other in the
first shard that each of them writes, so that neither can do all before the other has started. With `shared` they do so
in the cache of all runs.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.processes import PATIENCE

TOGETHER, SHARED = "together", "shared"


def main(corpus: str, folder: str, how: str = "") -> None:
    from tinylm.commandline.terminal import make_console
    from tinylm.dataset.shards import shard_cache
    from tinylm.dataset.shards.shared_cache import shared_cache
    from tinylm.system.runtime import setup_runtime
    from tinylm.tokenizer.tokenizer import Tokenizer
    from tinylm.trainer.run.stage import Stage
    from tinylm.trainer.stage_data import load_texts
    from tinylm.trainer.train_pretrain import PretrainSettings

    written: list[str] = []
    write_shard = shard_cache.write_shard

    def write(parts, tokenizer, target, *rest) -> None:
        def delayed():
            for part in parts:
                yield part
                if how == "kill" and len(written) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                if how in (TOGETHER, SHARED) and not written:
                    wait_for_both(Path(os.environ["MEETING"]))

        write_shard(delayed(), tokenizer, target, *rest)
        written.append(target.name)

    shard_cache.write_shard = write
    runtime = setup_runtime("cpu", "float32")
    settings = PretrainSettings(
        data_path=corpus, output_dir=f"{folder}/out", max_seq_len=32, validation_fraction=0.2, seed=42
    )
    tokenizer = Tokenizer.load(f"{folder}/tokenizer")
    runtime.barrier()
    try:
        cache = shared_cache() if how == SHARED else None
        data = load_texts(Stage("pretrain", settings, runtime, make_console(False)), tokenizer, 1, cache)
        result = {"written": written, "fingerprints": [part.fingerprint for part in data if part is not None]}
    except ValueError as error:
        result = {"error": str(error)}
    Path(folder, f"result.{runtime.rank}.json").write_text(json.dumps(result))
    runtime.barrier()


def wait_for_both(folder: Path) -> None:
    """Until two processes have called this, which each say so with a file."""
    (folder / f"writes.{os.environ['RANK']}").touch()
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("writes.*"))) < 2:
        assert time.monotonic() < end, "the other process has not begun to write"
        time.sleep(0.01)
