"""What determines each of those that teach, by which it is found: of plain configurations, without torch."""

from typing import Any


def determining(plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What determines each of those that teach, and its logits, in a plain configuration.

    Of a teacher or a member: its own options, data, threads, and the seed where it is trained. How a loaded one would
    be trained, and when it is asked, does not count. Of an assistant: the chain before it, too, and when that is asked.
    """
    teacher = plain["teacher"]
    common, seed = {"data": plain["data"], "threads": plain.get("threads")}, plain.get("seed")

    def of(own: dict[str, Any], seed: Any) -> dict[str, Any]:
        if own.get("checkpoint") is None:
            return {"teacher": own, **common, "seed": seed}
        return {"teacher": {**own, "trainer": {"accelerator": own["trainer"]["accelerator"]}}, **common}

    def named(key: str) -> list[tuple[str, dict[str, Any]]]:
        return [(name, model) for place in teacher.get(key, {}).values() for name, model in place.items()]

    if "members" in teacher:
        found = {
            f"teacher.members.{name}": of(
                {"checkpoint": None, **{key: value for key, value in member.items() if key != "seed"}},
                member.get("seed", seed),
            )
            for name, member in named("members")
        }
    else:
        found = {"teacher": of({k: v for k, v in teacher.items() if k not in ("online", "assistants")}, seed)}
    before: dict[str, Any] = {"first": dict(found), "combine": teacher.get("combine")}
    for name, assistant in named("assistants"):
        before = {"assistant": assistant, "before": before, **common, "seed": seed, "online": teacher.get("online")}
        found[f"teacher.assistants.{name}"] = before
    return found
