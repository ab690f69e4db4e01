"""Tests and measurements on a lent GPU machine, in ten minutes: `python3 -m scripts.gpu FOLDER` (docs/gpu-run.md)."""
