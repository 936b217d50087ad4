"""Speed, measured beside transformers in one run: `python -m benchmarks.train_step`, `python -m
benchmarks.decode`."""
