"""What the models of a study cost: rows of benchmark.json that fit it, and training in its runs."""

from dataclasses import dataclass
from statistics import median

from kit.results import Study, in_table_order
from kit.runs import edited


@dataclass
class Cost:
    """By name: params, flops (FlopCounterMode's), inference (ms an image), training (seconds an
    epoch), memory (MB). None: not measured."""

    values: dict[str, float | None]
    ratios: dict[str, float | None]  # how many times the baseline's that is
    training_spread: tuple[float, float] | None  # of the training ratio, over seeds
    inference_spread: tuple[float, float] | None  # p10 / p90 of the baseline to p90 / p10


def measured(study: Study, rows: list[dict]) -> dict[str, dict]:
    """{model: its row}, measured the published way (eager, with PyTorch's default flags; on a CPU
    that is fp32) at this study's width and images, and batch 64, or else the largest."""
    result = study.result
    own = (result["width"], "x".join(map(str, result["image"])), len(result["classes"]))
    rows = [
        row for row in rows
        if row["mode"] == "eager" and row["precision"] in ("default", "fp32")
        and (row["width"], row["image"], row["classes"]) == own
    ]  # fmt: skip
    # Times are compared on one machine: that of the runs, or else that of most rows.
    machines = [(row["device"], row["torch"]) for row in rows]
    of_runs = {(run.result["device"], run.env["torch"]) for run in study.all_runs}
    machine = max(machines, key=lambda m: (m in of_runs, machines.count(m)), default=None)
    rows = [row for row, its in zip(rows, machines, strict=True) if its == machine]
    published = "default" if "default" in {row["precision"] for row in rows} else "fp32"
    rows = [row for row in rows if row["precision"] == published]
    sizes = {row["batch_size"] for row in rows}
    size = 64 if 64 in sizes else max(sizes, default=64)
    return {row["model"]: row for row in rows if row["batch_size"] == size}


def by_other_code(study: Study, costs: dict[str, dict]) -> dict[str, list[str]]:
    """{model: scripts that were edited between its runs and its row}, as far as that is known."""
    found = {}
    for model, row in costs.items():
        of_row = row["sha256"]
        codes = [run.circumstances["code"] for run in study.runs.get(model, [])]
        scripts = {
            name for code in codes if code for name in edited(of_row, code) if name in of_row
        }
        found |= {model: sorted(scripts)} if scripts else {}
    return found


def relative(study: Study, costs: dict) -> dict[str, Cost]:
    """Of every model that was trained or timed, the baseline first if it is there."""
    found, base, baseline, base_row = {}, {}, {}, costs.get("baseline")
    for model in in_table_order(study.runs.keys() | costs.keys()):
        row = costs.get(model, {})
        results = {seed: run.result for seed, run in study.by_seed(model).items()}
        memory = [result.get("peak_memory_mb") for result in results.values()]
        values = {
            "params": next(iter(results.values()), row)["params"],
            "flops": row.get("flops_aten"),
            "inference": row.get("ms_per_image"),
            "training": median(map(seconds_per_epoch, results.values())) if results else None,
            "memory": median(memory) if memory and all(memory) else None,
        }
        if model == "baseline":
            base, baseline = values, results
        ratios = {k: v / base[k] if v and base.get(k) else None for k, v in values.items()}
        by_seed = [  # on one device in one mode
            seconds_per_epoch(own) / seconds_per_epoch(baseline[seed])
            for seed, own in results.items()
            if seed in baseline and all(own[k] == baseline[seed][k] for k in ("device", "mode"))
        ]
        ratios["training"] = median(by_seed) if by_seed else None
        if {r["device"] for r in results.values()} != {r["device"] for r in baseline.values()}:
            ratios["memory"] = None
        over_seeds = (min(by_seed), max(by_seed)) if by_seed else None
        p10, p90 = "ms_per_image_p10", "ms_per_image_p90"
        timed = base_row and row and (row[p10] / base_row[p90], row[p90] / base_row[p10])
        found[model] = Cost(values, ratios, over_seeds, timed or None)
    return found


def seconds_per_epoch(result: dict) -> float:
    return result["train_seconds"] / result["epochs_run"]
