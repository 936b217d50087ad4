"""One process that tokenises a corpus: `python shard_worker.py CORPUS FOLDER [kill | late]`, ranks as torchrun's.

With `kill` it kills itself while it writes its third shard. With `late` each file takes a while, so that of two
processes neither can do all before the other has started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

LATE = "late"


def main(corpus: str, folder: str, how: str = "") -> None:
    import torch.distributed as dist

    from tinylm.commandline.terminal import make_console
    from tinylm.dataset.shards import shard_cache
    from tinylm.system.runtime import setup_runtime, shutdown_runtime
    from tinylm.tokenizer.tokenizer import Tokenizer
    from tinylm.trainer.run.stage import Stage
    from tinylm.trainer.run.train_settings import TrainSettings
    from tinylm.trainer.stage_data import load_texts

    written: list[str] = []
    write_shard = shard_cache.write_shard

    def write(parts, tokenizer, target, bad_rows) -> None:
        def delayed():
            for part in parts:
                yield part
                if how == "kill" and len(written) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == LATE:
                    time.sleep(0.3)

        write_shard(delayed(), tokenizer, target, bad_rows)
        written.append(target.name)

    shard_cache.write_shard = write
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo", os.environ["RENDEZVOUS"], rank=rank, world_size=world_size)
    runtime = setup_runtime("cpu", "float32")
    settings = TrainSettings(
        data_path=corpus, output_dir=f"{folder}/out", max_seq_len=32, validation_fraction=0.2, seed=42
    )
    tokenizer = Tokenizer.load(f"{folder}/tokenizer")
    runtime.barrier()
    try:
        data = load_texts(Stage("pretrain", settings, runtime, make_console(False)), tokenizer, 1)
        result = {"written": written, "fingerprints": [part.fingerprint for part in data if part is not None]}
    except ValueError as error:
        result = {"error": str(error)}
    Path(folder, f"result.{rank}.json").write_text(json.dumps(result))
    runtime.barrier()
    shutdown_runtime()


if __name__ == "__main__":
    main(*sys.argv[1:])
