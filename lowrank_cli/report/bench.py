"""The tables of ``bench.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lowrank_cli.report import number_format, tables
from lowrank_cli.runs import Run

#: Method → decoding speed that its paper reports, relative to another method, by that method and the number of beams.
Published = Mapping[str, Mapping[tuple[str, int], float]]


def shown(run: Run, published: Published) -> list[RenderableType]:
    """Tables of a finished benchmark, next to ``published`` speeds; none for another run."""
    if not run.done or not (run.path / "bench.json").is_file():
        return []
    record = run.read_json("bench.json")
    if record["bench"]["measure"] == "serve":
        return [_served(record, count) for count in record["bench"]["tenants"]]
    if "memory" not in record:
        return [_times(record), *(Text(note, style="dim") for note in record.get("notes", []))]
    memory = Text(f"memory: {record['memory']}", style="dim")
    if record["bench"]["measure"] == "train":
        return [_steps(record), memory]
    settings = dict.fromkeys((row["beams"], row["tenants"]) for row in record["rows"])
    return [*(_table(record, *setting) for setting in settings), *_pairs(record, published), memory]


def _pairs(record: dict[str, Any], published: Published) -> list[RenderableType]:
    """Methods against those that their papers compare them with, alone in the batch."""
    table = tables.Fitted("against the paper's baselines", ["speed of", "beams", "here", "published"], leave_out=[])
    for pair in record["pairs"]:
        reference = published.get(pair["method"].split()[0], {}).get((pair["to"], pair["beams"]))
        if reference and not pair["tenants"]:
            name = f"{pair['method']} / {pair['to']}"
            table.rows.append([name, str(pair["beams"]), f"{pair['ratio']:.3f}", f"{reference:.3f}"])
    return [table] if table.rows else []


def _times(record: dict[str, Any]) -> tables.Fitted:
    """Of a kind that measures nothing but time."""
    columns = ["what", "ms", f"× {record['rows'][0]['reference']}", "quartiles", "CPU ms", "CPU ×"]
    rounds = record["bench"]["rounds"]
    heading = f"{record['title']}, {rounds} round{'s' * (rounds > 1)}"
    table = tables.Fitted(heading, columns, leave_out=["CPU ms", "CPU ×", "quartiles"])
    for row in record["rows"]:
        low, high = row["time_ratio_quartiles"]
        times = [f"{row['ms']:.2f}", f"{row['time_ratio']:.3f}", f"{low:.3f}–{high:.3f}"]
        table.rows.append([row["method"], *times, f"{row['cpu_ms']:.2f}", f"{row['cpu_ratio']:.3f}"])
    return table


def _served(record: dict[str, Any], tenants: int) -> tables.Fitted:
    """Of requests to servers with so many adapters."""
    bench = record["bench"]
    heading = (
        f"serve: {tenants} adapter{'s' * (tenants > 1)}, {bench['requests']} requests, {bench['prompt_length']} prompt "
        f"tokens, {bench['new_tokens']} new ones, {bench['max_rows']} at a time, {bench['rounds']} rounds"
    )
    against = {"vllm_ratio": "× vLLM", "vllm_cpu_ratio": "CPU × vLLM"}
    against = {key: title for key, title in against.items() if any(key in row for row in record["rows"])}
    columns = ["method", "requests/s", "answered/s", "tokens/s", "× base", "ms/token p50", "p95", "p99"]
    columns += ["first token p50", "p95 ", "p99 ", "CPU ms/token", *against.values()]
    table = tables.Fitted(heading, columns, leave_out=["p99 ", "p99", "answered/s", "p95 ", "p95"])
    for row in record["rows"]:
        if row["tenants"] == tenants:
            cells = [
                row["method"],
                "all" if row["rate"] is None else f"{row['rate']:g}",
                f"{row['requests_per_second']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio']:.3f}",
                *(f"{row[f'ms_per_token_p{share}']:.1f}" for share in (50, 95, 99)),
                *(number_format.duration(row[f"first_token_ms_p{share}"] / 1000) for share in (50, 95, 99)),
                f"{row['cpu_ms_per_token']:.1f}",
                *(f"{row[key]:.3f}" if key in row else "" for key in against),
            ]
            table.rows.append(cells)
    return table


def _table(record: dict[str, Any], beams: int, tenants: int | None) -> tables.Fitted:
    bench = record["bench"]
    heading = (
        f"{bench['measure']}: {bench['batch_size']} × {bench['prompt_length']} prompt tokens, "
        f"{bench['new_tokens']} new ones, {beams} beam{'s' * (beams > 1)}, {bench['rounds']} rounds"
    )
    if tenants:
        heading += f", {tenants} adapter{'s' * (tenants > 1)} in the batch"
    speed, cost = ["tokens/s", "× base", "quartiles", "steps only"], ["ms/token", "p95", "first token"]
    against = {"vllm_step_ratio": "× vLLM", "vllm_cpu_step_ratio": "CPU × vLLM"}
    shown = {key: title for key, title in against.items() if any(key in row for row in record["rows"])}
    columns = ["method", *speed, *cost, "memory", "adapter", *shown.values()]
    table = tables.Fitted(heading, columns, leave_out=["first token", "p95", "adapter", "memory", "ms/token"])
    for row in record["rows"]:
        if (row["beams"], row["tenants"]) == (beams, tenants):
            low, high = row["ratio_quartiles"]
            cells = [
                row["method"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio']:.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{1 / row['step_ratio']:.3f}",
                f"{row['ms_per_token']:.2f}",
                f"{row['ms_per_token_p95']:.2f}",
                number_format.duration(row["first_token_seconds"]),
                number_format.size(row["peak_memory_bytes"]),
                number_format.size(row["adapter_bytes"]),
                *(f"{row[key]:.3f}" if key in row else "" for key in shown),
            ]
            table.rows.append(cells)
    return table


def _steps(record: dict[str, Any]) -> tables.Fitted:
    bench = record["bench"]
    heading = (
        f"train: forward and backward, {record['data']}, {bench['rounds']} rounds; time against the frozen model's own "
        f"step{', time and memory of a step against PEFT' if 'peft_ratio' in record['rows'][0] else ''}"
    )
    against = ["× peft", "CPU × peft", "memory × peft"] if "peft_ratio" in record["rows"][0] else []
    columns = ["method", "× base", "with dev steps", "quartiles", "CPU time", "ms/step"]
    columns += ["saved", "step", "memory", "adapters", *against]
    table = tables.Fitted(heading, columns, leave_out=["adapters", "memory", "quartiles", "ms/step", "saved"])
    for row in record["rows"]:
        low, high = row["step_ratio_quartiles"]
        cells = [
            row["method"],
            f"{row['step_ratio']:.3f}",
            f"{row.get('step_ratio_with_dev', row['step_ratio']):.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{row['cpu_ratio']:.3f}",
            f"{row['ms_per_step']:.1f}",
            number_format.size(row["saved_bytes"]),
            number_format.size(row["step_memory_bytes"]),
            number_format.size(row["peak_memory_bytes"]),
            number_format.size(row["adapters_bytes"]),
            *(f"{row[key]:.3f}" for key in ("peft_ratio", "peft_cpu_ratio", "peft_memory_ratio") if key in row),
        ]
        table.rows.append(cells)
    return table
