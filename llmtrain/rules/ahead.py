"""Checks what samples ahead of training, and what is recorded or replayed. Each rule yields lines with value, rule and
remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.rules.case import Case, Rules, samples


def _ahead(case: Case) -> Iterator[str]:
    r, timeout_s = case.config.rollout, case.config.engine.timeout_s
    if r.placement != "ahead":
        if r.max_staleness:
            yield (
                f"rollout.max_staleness={r.max_staleness}: needs rollout.placement=ahead, whose processes sample while "
                "the ranks train; set it, or max_staleness=0"
            )
        if r.inflight != "finish":
            yield f"rollout.inflight={r.inflight}: in step no weights come while it samples; remove it"
        yield from _unread(case)
        return
    if not r.max_staleness:
        yield "rollout.max_staleness=0: must be at least 1 with rollout.placement=ahead; raise it or use colocated"
    if not r.workers:
        yield "rollout.workers=0: must be at least 1 with rollout.placement=ahead; raise it or use colocated"
    if case.config.data.curriculum is not None:
        yield (
            f"rollout.max_staleness={r.max_staleness}: not with data.curriculum, which chooses prompts by the rewards "
            "of earlier ones, that are not there yet; use colocated or separate, or remove the curriculum"
        )
    if r.generator == "vllm":
        yield from _served(case)
    elif r.verify == "probe":
        yield (
            "rollout.verify=probe: not with rollout.placement=ahead, whose workers have other weights before a probe "
            "is back; set checksum, which compares all weights when a worker has loaded them, or off"
        )
    if case.world_size > 1 and 2 * r.deadline_s >= timeout_s:
        yield (
            f"rollout.deadline_s={r.deadline_s:g}: must be below half of engine.timeout_s={timeout_s} on several "
            "ranks, which wait for the first in a collective while it waits for a worker, and again for who does its "
            "work; lower it or raise timeout_s"
        )


def _served(case: Case) -> Iterator[str]:
    """Yields a line for what a worker with a vLLM server cannot do."""
    r = case.config.rollout
    if r.verify != "off":
        yield (
            f"rollout.verify={r.verify}: must be off with rollout.placement=ahead and rollout.generator=vllm: a probe "
            "comes back too late, and the server holds weights joined and packed; set off: each answer is refused that "
            "is not of the version which was sent"
        )
    if r.inflight != "finish":
        yield (
            f"rollout.inflight={r.inflight}: must be finish with rollout.generator=vllm, whose server takes weights "
            "between answers alone; set finish, or use native"
        )


def _unread(case: Case) -> Iterator[str]:
    """Yields a line for each key that is set, and that nothing reads where no process samples ahead."""
    r = case.config.rollout
    for name in ("deadline_s", "restarts"):
        if (value := getattr(r, name)) != type(r).model_fields[name].default:
            yield f"rollout.{name}={value:g}: is read with rollout.placement=ahead alone, not {r.placement}; remove it"


def _replay(case: Case) -> Iterator[str]:
    r = case.config.rollout
    if r.replay is None:
        return
    if case.missing(r.replay):
        yield f"rollout.replay={r.replay}: does not exist; give an existing path or make it first"
    if r.record:
        yield f"rollout.record=true: rollout.replay={r.replay} is a record already; remove one of them"
    if r.placement == "separate":
        yield "rollout.placement=separate: nobody samples with rollout.replay; use colocated"


AHEAD_RULES: Rules = ((samples, _ahead), (samples, _replay))
