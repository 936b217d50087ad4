"""lyuzlion/Tiny-Language-Model's command line for LoRA; the recipe is tinylm/trainer/train_lora.py.

cd trainer && torchrun --nproc_per_node=4 train_lora.py
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where tinylm is, installed or not

from tinylm.commandline.exit_status import run_main  # noqa: E402
from tinylm.trainer.train_lora import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(main))
