"""What a study's models cost: matching rows of benchmark.json, and training in its runs."""

from dataclasses import dataclass
from operator import itemgetter
from statistics import median

from kit.results import Study, in_table_order
from kit.runs import edited


@dataclass
class Cost:
    """Keys: params, flops (FlopCounterMode's), inference and fastest (ms/image, eager and in the
    fastest mode), training (s/epoch), memory (MB). None: not measured."""

    values: dict[str, float | None]
    ratios: dict[str, float | None]  # relative to the baseline's
    inference_spread: tuple[float, float] | None  # p10 / baseline's p90, p90 / baseline's p10


def measured(study: Study, rows: list[dict], fastest: bool = False) -> dict[str, dict]:
    """{model: its row} for this study's width and images, at batch size 64 or the largest.

    As published: eager, with PyTorch's default flags (fp32 on a CPU).
    fastest: in the compiled or captured mode and precision that are fastest for the baseline.
    """
    result = study.result
    own = (result["width"], "x".join(map(str, result["image"])), len(result["classes"]))
    rows = [row for row in rows if (row["width"], row["image"], row["classes"]) == own]
    # Compare times from one machine: the runs' own, or else the one with most rows.
    machines = [(row["device"], row["torch"]) for row in rows]
    of_runs = {(run.result["device"], run.env["torch"]) for run in study.all_runs}
    machine = max(machines, key=lambda m: (m in of_runs, machines.count(m)), default=None)
    rows = [row for row, its in zip(rows, machines, strict=True) if its == machine]
    rows = [row for row in rows if (row["mode"] != "eager") == fastest]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    rows = [row for row in rows if row["batch_size"] == size]
    way = "eager", "default" if "default" in {row["precision"] for row in rows} else "fp32"
    if fastest:
        baselines = [row for row in rows if row["model"] == "baseline"]
        best = min(baselines, key=lambda row: row["ms_per_image"], default={})
        way = best.get("mode"), best.get("precision")
    return {row["model"]: row for row in rows if (row["mode"], row["precision"]) == way}


def by_other_code(study: Study, costs: dict[str, dict]) -> dict[str, list[str]]:
    """{model: scripts edited between its runs and its row}, as far as is known."""
    found = {}
    for model, row in costs.items():
        codes = [run.env["sha256"] for run in study.runs.get(model, [])]
        if scripts := {name for code in codes for name in edited(row["sha256"], code)}:
            found[model] = sorted(scripts)
    return found


def relative(study: Study, costs: dict, fastest: dict) -> dict[str, Cost]:
    """Costs of every trained or timed model, the baseline first if present. Training times only if
    every run is known to have had its GPU to itself."""
    found, base, base_row = {}, {}, costs.get("baseline")
    device = itemgetter("device", "precision", "mode")
    one_device = len({device(run.result) for run in study.all_runs}) == 1
    alone = one_device and all(run.env.get("shared_gpu") is False for run in study.all_runs)
    for model in in_table_order(study.runs.keys() | costs.keys()):
        row, results = costs.get(model, {}), [run.result for run in study.runs.get(model, [])]
        memory = [result["peak_memory_mb"] for result in results]
        epoch = [result["train_seconds"] / result["epochs_run"] for result in results]  # seconds
        values = {
            "params": (results[0] if results else row)["params"],
            "flops": row.get("flops_aten"),
            "inference": row.get("ms_per_image"),
            "fastest": fastest.get(model, {}).get("ms_per_image"),
            "training": median(epoch) if epoch and alone else None,
            "memory": median(memory) if one_device and memory and all(memory) else None,
        }
        base = values if model == "baseline" else base
        ratios = {k: v / base[k] if v and base.get(k) else None for k, v in values.items()}
        p10, p90 = "ms_per_image_p10", "ms_per_image_p90"
        timed = base_row and row and (row[p10] / base_row[p90], row[p90] / base_row[p10])
        found[model] = Cost(values, ratios, timed or None)
    return found
