"""lyuzlion/Tiny-Language-Model's command line for talking with a model; the command is tinylm/commands/chat.py.

python inference.py --model_path out/dpo
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)  # where tinylm is, installed or not

from tinylm.commandline.exit_status import run_main  # noqa: E402
from tinylm.commands.chat import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(main, advice=""))
