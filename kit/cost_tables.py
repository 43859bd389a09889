"""What models cost, in tables: parameters, FLOPs, time and memory, each beside the baseline's."""

from kit.findings import Cost, Findings
from kit.results import in_table_order
from kit.tables import Lines, label, table


def cost_table(f: Findings) -> Lines:
    """What was measured, each model beside the baseline."""
    if "baseline" not in f.relative:
        return []
    timed = next(iter(f.costs.values()), None)
    fast = next(iter(f.fastest.values()), None)
    columns = {
        "params": ("parameters", ",.0f", ""),
        "flops": ("FLOPs", ",.0f", ""),
        "eager": (f"inference, {how(timed)}", "#.3g", " ms/image"),
        "fast": (f"inference, {how(fast)}", "#.3g", " ms/image"),
        "training": ("training", ".1f", " s an epoch"),
        "memory": ("memory", ",.0f", " MB"),
    }
    measured = {
        name: column
        for name, column in columns.items()
        if any(cost.values[name] is not None for cost in f.relative.values())
    }
    rows = []
    for model, cost in f.relative.items():
        cells = [label(f.study, model)]
        for name, (_, form, unit) in measured.items():
            value, ratio = cost.values[name], cost.ratios[name]
            if ratio is None or model == "baseline":
                cell = "-" if value is None else f"{value:{form}}{unit}"
            elif name in ("params", "flops"):
                cell = f"{100 * (ratio - 1):+.2f} %"
            else:
                cell = training_ratio(cost) if name == "training" else f"{ratio:.2f}x"
            cells.append(cell)
        rows.append(cells)
    lines = [*table(["model", *(column[0] for column in measured.values())], rows), ""]
    lines += [
        "The baseline as measured, every other model beside it. FLOPs: of convolutions and matrix "
        "products (FlopCounterMode); they leave out what gates mostly do, which is to read and "
        "write memory and to launch kernels. Training: median over seeds of the time of an epoch "
        "over that of the baseline's run with the same seed (lowest to highest), with whatever "
        "else the machine was doing. Memory: the most that the training process held; on a CPU "
        "that counts PyTorch itself.",
    ]
    sayings = [saying for model in f.relative if (saying := illusion(f, model))]
    return [*lines, *(["", *sayings] if sayings else [])]


def training_ratio(cost: Cost) -> str:
    """Of the baseline's training time: the median over seeds, and the range."""
    if cost.ratios["training"] is None:
        return "-"
    low, high = cost.training_spread
    return f"{cost.ratios['training']:.2f}x" + (f" ({low:.2f} to {high:.2f})" if low < high else "")


def how(row: dict | None) -> str:
    return f"{row['mode']} {row['precision']}" if row else ""


def illusion(f: Findings, model: str) -> str:
    """FLOPs beside measured time, in words; empty for a model that was not timed."""
    cost = f.relative[model]
    if model == "baseline" or not (cost.ratios["flops"] and cost.ratios["eager"]):
        return ""
    words = {"eager": f"inference time ({how(f.costs[model])})"}
    if cost.ratios["fast"]:
        words["fast"] = f"({how(f.fastest[model])})"
    times = [f"{100 * (cost.ratios[name] - 1):+.0f} % {what}" for name, what in words.items()]
    if cost.ratios["training"]:
        low, high = (100 * (bound - 1) for bound in cost.training_spread)
        times.append(
            f"{100 * (cost.ratios['training'] - 1):+.0f} % training time ({low:+.0f} to {high:+.0f}"
            " over seeds)"
        )
    flops = 100 * (cost.ratios["flops"] - 1)
    return f"- `{model}`: {flops:+.2f} % FLOPs; measured {', '.join(times)}."


def mode_section(rows: list[dict]) -> Lines:
    """Inference time of every model in every mode that was measured."""
    if not rows:
        return []
    models = in_table_order({row["model"] for row in rows})
    keys = ("width", "batch_size", "precision", "mode")
    variants = {}  # (width, batch size, precision, mode) -> model -> row
    for row in rows:
        variants.setdefault(tuple(row[key] for key in keys), {})[row["model"]] = row
    cells = []
    for variant, by_model in variants.items():
        base = by_model.get("baseline")
        share = f"{base['tflops']:#.3g} ({100 * base['share_of_ceiling']:.0f} %)" if base else "-"
        cells.append(
            [*map(str, variant), *(time_cell(by_model.get(m), base) for m in models), share]
        )
    return [
        "## Inference time in every mode",
        "",
        *table(["width", "batch", "precision", "mode", *models, "baseline's TFLOP/s"], cells),
        "",
        "ms/image, median over batches, and how many times that of the baseline; of single images "
        "the latency: p50 / p90 / p99. TFLOP/s beside what one large matrix product or convolution "
        "reaches on the same device. Modes: see modes.py; `eager` in fp32 is the published way.",
        "",
    ]


def time_cell(row: dict | None, base: dict | None) -> str:
    if row is None:
        return "-"
    if row["batch_size"] == 1:
        return " / ".join(f"{row[f'ms_per_image{p}']:#.3g}" for p in ("", "_p90", "_p99"))
    ratio = f" ({row['ms_per_image'] / base['ms_per_image']:.2f}x)" if base else ""
    return f"{row['ms_per_image']:#.3g}" + ("" if row is base else ratio)
