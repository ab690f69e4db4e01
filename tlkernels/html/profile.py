"""The page of a profile: its head, and the data of its sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tlkernels.bench.compare import LEAST
from tlkernels.html.page import Page, Section
from tlkernels.profiling.compare import OWN
from tlkernels.profiling.report import meaning

Json = Mapping[str, Any]

STEP = Section("step", "The step", "Steps without synchronisation or a profiler.", "profile_step")
PHASES = Section(
    "phases",
    "Where the step goes",
    "Phases of the same part have one colour, and their backward is hatched.",
    "profile_phases",
)
HARDWARE = Section(
    "hardware",
    "Use of the hardware",
    "The operations of matrix products, against the rate at which this machine multiplies large matrices. What a step "
    "computes twice, as with activation checkpointing, counts twice.",
    "profile_hardware",
)
MEMORY = Section(
    "memory",
    "Memory",
    "The peak of memory within each phase, in a step of its own.",
    "profile_memory",
)
LOSSES = Section(
    "losses",
    "The loss alone",
    "Each loss on the loop's own batch, forward and backward, by each implementation. Errors are relative, in the "
    "2-norm, against float64, of drawn rows where there are many. A result is wrong, and has no speed-up, if its error "
    "is over twice that of PyTorch and a rounding. Where the loss takes what a linear layer computes, that layer and "
    "the loss are also compared with linear_cross_entropy.",
    "profile_losses",
)
BETTER = Section(
    "better",
    "Would a better loss help?",
    "The loop's own steps, in turns with each implementation of the loss, and Amdahl's law: how much faster a step can "
    "become if only its loss does.",
    "profile_better",
)
BEFORE = Section(
    "before",
    "Against the earlier profile",
    "A figure changed if the quartiles of the two profiles do not overlap and the medians differ by more than "
    f"{100 * LEAST:.0f} %; memory has no quartiles, so only the latter counts.",
    "profile_before",
)


def page(result: Json, before: Json | None) -> Page:
    """Return the page of a profile.json, which compares it with the earlier profile `before`.

    Raises:
        ValueError: `before` is no profile.
    """
    if before is not None and before.get("kind") != "profile":
        raise ValueError(f"before: expected a result of kind 'profile', got {before.get('kind')!r}")
    sections = [STEP, PHASES, HARDWARE, MEMORY, LOSSES, BETTER]
    return Page(
        title="tlkernels profile",
        lead=f"Where a training step goes on {_device(result)}, and whether a better loss would help.",
        facts=[(name, text) for name, text in _facts(result, before) if text],
        sections=[*sections, BEFORE] if before else sections,
        data={
            **result,
            "sentences": meaning(result),
            "amdahl": _amdahl(result),
            "before": _before(before, result) if before else None,
        },
        scripts=["profile_common"],
    )


def _device(result: Json) -> str:
    return str(result["machine"]["processor"] if result["device"] == "cpu" else result["device"])


def _facts(result: Json, before: Json | None) -> Sequence[tuple[str, str]]:
    machine = result["machine"]
    gpu = "" if result["device"] == "cpu" else f"{result['device']}; "
    isa = f"kernels for {machine['isa']}" if machine["isa"] else "no compiled kernels"
    versions = _versions(result)
    return (
        ("Machine", f"{gpu}{machine['processor']}, {_count(machine['threads'], 'thread')}, {isa}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("Measured", _run(result)),
        (
            "How",
            f"{_count(result['step']['rounds'], 'step')} without synchronisation or a profiler give the time of a step "
            f"and its quartiles; further steps count operations, measure memory, and {result['traced_step']['steps']} "
            "run under torch.profiler; the loss is computed alone on the loop's own batch",
        ),
        (
            "Timeline",
            "trace.json.gz, beside profile.json. Open it at ui.perfetto.dev (Open trace file; it stays in the "
            'browser): the line "phases of the step" has the phases, and a search for tlkernels:: finds our losses',
        ),
        ("Compared with", _run(before) if before else ""),
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _run(result: Json) -> str:
    commit = result["machine"]["commit"]
    return f"{result['date'][:16].replace('T', ' ')} UTC, {f'commit {commit}' if commit else 'no commit'}"


def _versions(result: Json) -> Mapping[str, str | None]:
    return {"python": result["machine"]["python"], **result["machine"]["packages"]}


def _amdahl(result: Json) -> dict[str, Any] | None:
    """Return the bound of a step's speed-up over the baseline, and the speed-up of the loss alone by each way.

    None where the time of the loss alone is not known, or is that of the step.
    """
    steps = result["step_speedups"]
    if result["bound"] is None or (steps and steps[OWN]["expected"] is None):
        return None
    bound = result["bound"] * (steps[OWN]["expected"] if steps else 1.0)
    expected = {name: way["expected"] for name, way in steps.items()}
    # Amdahl's law is step = 1 / (1 / bound + (1 - 1 / bound) / kernel), here solved for the kernel.
    kernels = {
        name: step * (bound - 1) / (bound - step)
        for name, step in expected.items()
        if step is not None and step < bound
    }
    return {"bound": bound, "kernels": kernels}


def _before(before: Json, result: Json) -> dict[str, Any]:
    then, now = ({row["name"]: row for row in run["phases"]} for run in (before, result))
    return {
        "changes": list(_changes(before, result)),
        "phases": [
            {"name": name, "then": then.get(name, {}).get("seconds"), "now": now.get(name, {}).get("seconds")}
            for name in dict.fromkeys([*now, *then])
        ],
        "differences": _differences(before, result),
    }


def _changes(before: Json, result: Json) -> Iterator[dict[str, Any]]:
    """Yield what both profiles have: seconds and speed-ups with their quartiles, and bytes."""
    then, now = before["step"]["seconds"], result["step"]["seconds"]
    yield _change("time of the step", "time", then, now, ("slower", "faster"))
    for name, way in result["step_speedups"].items():
        earlier = before["step_speedups"].get(name)
        if earlier and name != result["baseline"] == before["baseline"]:
            what = f"speed-up of the step by {name} over {result['baseline']}"
            yield _change(what, "times", earlier["speedup"], way["speedup"], ("faster", "slower"))
    if before["peak_bytes"] is not None and result["peak_bytes"] is not None:
        old, new = ([run["peak_bytes"]] * 3 for run in (before, result))
        yield _change("peak memory", "bytes", old, new, ("more memory", "less memory"))


def _change(
    what: str, form: str, then: Sequence[float], now: Sequence[float], words: tuple[str, str]
) -> dict[str, Any]:
    more = now[0] > then[2] and now[1] > (1 + LEAST) * then[1]
    less = now[2] < then[0] and now[1] < (1 - LEAST) * then[1]
    word = words[0] if more else words[1] if less else ""
    return {
        "what": what,
        "form": form,
        "then": then,
        "now": now,
        "word": word,
        "worse": word in ("slower", "more memory"),
    }


def _differences(before: Json, result: Json) -> list[str]:
    then, now = _described(before), _described(result)
    return [
        f"{name}: {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in dict.fromkeys([*now, *then])
        if then.get(name) != now.get(name)
    ]


def _described(result: Json) -> dict[str, Any]:
    """Return what is known of the machine and the versions."""
    machine = {key: result["machine"][key] for key in ("processor", "threads", "isa")}
    described = {"device": result["device"], **machine, **_versions(result)}
    return {name: value for name, value in described.items() if value is not None}
