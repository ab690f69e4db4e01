"""The first call in a fresh process: what a kernel costs that is compiled when it is first needed, and one that is not.

    python -m bench.cold_start            native and Triton in turn, on a GPU; prints JSON, fails above the bar

Each process imports torch and tlkernels, makes its tensors and waits for the GPU; then the clock starts. Triton has an
empty cache each time, as on a new machine, and once more the one that it has just filled.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

BAR = 10.0
"""Times the native first call that Triton's takes with an empty cache, at the least."""


def _first_call(loss: str, impl: str) -> dict[str, float]:
    """Time the first and the second forward and backward in this process."""
    import torch

    import tlkernels as tlk

    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn_like(x) if loss == "distillation" else torch.randint(4096, (1024,), device="cuda")
    torch.cuda.synchronize()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        getattr(tlk, loss)(x, other, impl=impl).backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return dict(zip(("first", "second"), times, strict=True))


def _in_a_fresh_process(loss: str, impl: str, cache: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-m", "bench.cold_start", loss, impl],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(run.stdout)
    return found


def main(arguments: list[str]) -> int:
    """Measure, print, and return whether a native first call is too slow."""
    import torch

    if not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 2
    if arguments:
        print(json.dumps(_first_call(*arguments)))
        return 0
    found: dict[str, Any] = {}
    for loss in ("cross_entropy", "distillation"):
        with tempfile.TemporaryDirectory() as cache:
            ways = {
                name: _in_a_fresh_process(loss, name.split()[0], cache) for name in ("native", "triton", "triton again")
            }
        found[loss] = {**ways, "ratio": ways["triton"]["first"] / ways["native"]["first"]}
    print(json.dumps(found, indent=1))
    return int(any(each["ratio"] < BAR for each in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
