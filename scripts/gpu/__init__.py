"""What runs on a lent GPU machine, in one command of ten minutes: `python3 -m scripts.gpu FOLDER` (docs/gpu-run.md)."""
