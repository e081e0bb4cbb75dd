"""The results as a markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return [*lines, ""] if len(lines) > 2 else []


def number(value: float | None, digits: int = 4) -> str:
    """With as many digits as mean something; "-" for none."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.1f}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if interval is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def _goals(goals: Iterable[Mapping[str, Any]]) -> list[str]:
    verdicts = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        (
            goal["goal"], goal["where"], goal["limit"], _with_interval(goal["measured"], goal["interval"]),
            verdicts[goal["reached"]], goal["note"],
        )
        for goal in goals
    ]  # fmt: skip
    return _table(("goal", "where", "asked", "measured (95%)", "reached", "note"), rows)


def _ratio(entry: Mapping[str, Any], other: str) -> str:
    found = entry.get(other)
    return "-" if found is None else _with_interval(found["p50_ratio"], found["p50_ratio_ci"])


def _contenders(data: Mapping[str, Any]) -> list[str]:
    rows = []
    through = any("over_direct" in entry for entry in data["contenders"].values())
    for name, entry in data["contenders"].items():
        rows.append(
            (
                f"{name} (C0)" if name == data.get("c0") else name,
                entry["samples"],
                _with_interval(entry["p50_us"], entry["p50_ci_us"]),
                _with_interval(entry["p99_us"], entry["p99_ci_us"]),
                _ratio(entry, "over_c0"),
                _ratio(entry, "over_p0"),
                number(entry["loop_cpu_us"]),
                number(entry["process_cpu_us"]),
                *([_over_direct(entry)] if through else []),
            )
        )
    head = (
        "contender",
        "samples",
        "p50 us",
        "p99 us",
        "over C0",
        "over P0",
        "CPU of the caller, us",
        "of the process, us",
        *(["over direct infer, p50"] if through else []),
    )
    return _table(head, rows)


def _over_direct(entry: Mapping[str, Any]) -> str:
    found = entry.get("over_direct")
    if found is None:
        return "-"
    return f"{_ratio(entry, 'over_direct')}, {_with_interval(found['p50_added_us'], found['p50_added_ci_us'])} us more"


def _overview(sections: Mapping[str, Any]) -> list[str]:
    """The table of the field: medians only."""
    columns = (
        "p0", "to_thread asyncio", "slot latency asyncio", "slot latency uvloop", "slot balanced asyncio",
        "slot efficient asyncio", "arrays latency asyncio",
    )  # fmt: skip
    rows = []
    for name, section in sections.items():
        if name.startswith("latency/") and section["status"] == "ok" and "contenders" in section["data"]:
            found = section["data"]["contenders"]
            medians = [number(found[each]["p50_us"]) if each in found else "-" for each in columns]
            rows.append((name.split("/", 1)[1], number(found[section["data"]["c0"]]["p50_us"]), *medians))
    return _table(("p50, us", "C0", *columns), rows)


def _rates(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, entry in data["contenders"].items():
        over, first = entry["over_c0"], entry["over_c_depth_1"]
        rows.append(
            (
                name,
                number(entry["items_per_s"]),
                _with_interval(over["ratio"], over["ratio_ci"]),
                _with_interval(first["ratio"], first["ratio_ci"]),
            )
        )
    return _table(("contender", "items/s", "over the faster C loop", "over the C loop with one in flight a lane"), rows)


def _devices(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, number(entry["rows_per_s"]), _with_interval(entry["over_one"]["ratio"], entry["over_one"]["ratio_ci"]))
        for name, entry in data["contenders"].items()
    ]
    return _table(("contender", "rows/s", "over one device"), rows)


def _saturated(data: Mapping[str, Any]) -> list[str]:
    """Rates, and where the time of single rows goes."""
    lines = _rates(data)
    if "us_per_row" in data:
        lines += _table(("single rows", "us a row"), [(name, number(us)) for name, us in data["us_per_row"].items()])
    if "sampled" in data:
        shares = [(f"`{name}`", f"{100 * share:.1f}%") for name, share in data["sampled"]["shares"].items()]
        lines += _table((f"in which function ({data['sampled']['samples']} samples)", "share"), shares)
    return lines


def _arrivals(data: Mapping[str, Any]) -> list[str]:
    batch = data["one_batch"]
    rows = []
    for name, entry in data["arrivals"].items():
        over = entry["p99_over_batch"]
        times = (_with_interval(entry[f"p{q}_us"], entry[f"p{q}_ci_us"]) for q in (50, 99))
        rates = (number(entry["saturated_rows_per_s"]), number(entry["offered_rows_per_s"]))
        late = (number(entry["began_late_p99_us"]), entry["calls"], entry["lost"])
        rows.append((name, *rates, *times, _with_interval(over["ratio"], over["ratio_ci"]), *late))
    head = (
        "arrivals", "saturated rows/s", "offered rows/s", "p50 us", "p99 us", "p99 over one batch",
        "begun late, p99 us", "requests in all", "without an answer",
    )  # fmt: skip
    note = f"One full batch in C, alone on the GPU: p50 {_with_interval(batch['p50_us'], batch['p50_ci_us'])} us."
    return [*_table(head, rows), note, ""]


def _policy(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (kind, _with_interval(entry["rows_per_s"], entry["rows_per_s_ci"]), number(entry["ns_per_row"]))
        for kind, entry in data["kinds"].items()
    ]
    return [*_table(("requests of one row", "rows/s", "ns a row"), rows), f"By {data['clock']}.", ""]


def _clients(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for loop, found in data.items():
        for way, entry in found["ways"].items():
            over = entry["over_bare_futures"]
            ratio = _with_interval(over["ratio"], over["ratio_ci"])
            rows.append((loop, way, number(entry["requests_per_s"]), ratio))
    return _table(("loop", "way", "requests/s", "over bare futures"), rows)


def _many_clients(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for where, found in data.items():
        if isinstance(found, dict):
            for way, entry in found["ways"].items():
                over, cpu = found["over"].get(way), number(entry.get("server_cpu_us"))
                ratio = _with_interval(over["ratio"], over["ratio_ci"]) if over else "-"
                p99 = _with_interval(over["p99_ratio"], over["p99_ratio_ci"]) if over else "-"
                times = (number(entry["p50_us"]), number(entry["p99_us"]))
                rows.append((where, found["clients"], way, number(entry["requests_per_s"]), *times, ratio, p99, cpu))
    head = (
        "where", "clients", "way", "requests/s", "p50 us", "p99 us", "ours over it, requests/s", "p99",
        "server's CPU, us",
    )  # fmt: skip
    return [*_table(head, rows), *_plain(data)]


def _loop_hold(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for mode, found in data["modes"].items():
        kinds = {**found["callbacks"], "submit beyond launch": found["submit_beyond_launch"], **found["at_once"]}
        for kind, each in kinds.items():
            if each["samples"]:
                figures = (number(each[name]) for name in ("p50_us", "p99_us", "max_us"))
                rows.append((mode, kind.replace("_", " "), each["samples"], *figures))
    launch = data["launch_in_c"]
    note = f"Launch in C: p50 {number(launch['p50_us'])}, p99 {number(launch['p99_us'])} us; an empty callback takes "
    note += f"{number(data['idle_callback']['p50_us'])} us when it is timed like this."
    return [*_table(("mode", "callback", "samples", "p50 us", "p99 us", "max us"), rows), note, ""]


def _plain(data: Mapping[str, Any]) -> list[str]:
    """Numbers of a section that has no table of its own."""
    rows = []
    for name, value in data.items():
        if isinstance(value, (int, float)):
            rows.append((name.replace("_", " "), number(value, 5)))
        elif isinstance(value, dict) and "bytes" in value:
            rows.append((name, number(value["bytes"] / (1 << 20), 5) + " MiB"))
        elif isinstance(value, dict) and "bare_ms" in value:
            ratio = _with_interval(value["ratio"], value["ratio_ci"])
            times = f"bare {number(value['bare_ms'])} ms, ours {number(value['ours_ms'])} ms"
            rows.append((name.replace("_", " "), f"{times}, ratio {ratio}"))
    return _table(("figure", "value"), rows)


def _section(name: str, data: Mapping[str, Any]) -> list[str]:
    if name == "clients":
        return _clients(data)
    if name.startswith("serving_clients"):
        return _many_clients(data)
    if name == "loop_hold":
        return _loop_hold(data)
    if name == "policy":
        return _policy(data)
    if name.startswith("batcher/") and "contenders" in data:
        return _saturated(data)
    if "arrivals" in data:
        return _arrivals(data)
    if name == "multi_device" and "contenders" in data:
        return _devices(data)
    if name == "lanes" and "contenders" in data:
        return _rates(data)
    if "contenders" in data:
        return _contenders(data)
    if "figures" in data:
        return _plain({**data, **data["figures"]})
    return _plain(data)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page."""
    machine, sections = results["machine"], results["sections"]
    lines = ["# Benchmark run", ""]
    facts = {name: value for name, value in machine.items() if name != "versions" and value is not None}
    facts |= {name: value for name, value in machine["versions"].items() if value is not None}
    lines += _table(("machine", ""), facts.items())
    lines += [f"Settings: {results['settings']}; {number(results['seconds'])} s in all.", ""]
    if results["goals"]:
        lines += ["## Goals", "", *_goals(results["goals"])]
    overview = _overview(sections)
    if overview:
        lines += ["## One request at a time", "", *overview]
    for name, section in sections.items():
        lines += [f"## {name}", ""]
        if section["status"] == "ok":
            lines += [*_section(name, section["data"]), f"{number(section['seconds'])} s.", ""]
        else:
            lines += [f"{section['status']}: {section['error']}", ""]
    return "\n".join(lines)
