"""What a comparison leaves: a table, plots, a grid of the same prompts, and one HTML file with all of it."""

from __future__ import annotations

import base64
import csv
import html
import json
from pathlib import Path
from statistics import mean
from typing import Any

from distill.comparison import claims as claimed
from distill.files import written_whole

COST = "training_minutes"  # the column of what training cost
COSTS = ("seconds_per_image", COST)
Cell = tuple[float, float, float] | None  # mean, lowest and highest; None where nothing is known
TITLES = {"fid_shapes": "FID (shapes judge)", "alignment": "alignment", "seconds_per_image": "seconds per image",
          COST: "device minutes of training"}  # fmt: skip


def write(
    results: list[dict[str, Any]],
    columns: list[str],
    prompts: list[str],
    folder: str | Path,
    command: str,
    claims: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Writes `table.md`, `table.csv`, `quality.png`, `grid.png` and `report.html`.

    Args:
        results: rows as `compare` returns them.
        columns: what the tables show of each; plots show the first two.
        prompts: of the images that were kept.
        folder: where to.
        command: that made it.
        claims: judged orderings, for a table of their own.

    Returns:
        The rows of the table: means over training seeds, with the lowest and highest.
    """
    folder, table = Path(folder), summary(results, columns)
    with written_whole(folder / "table.md") as part:
        part.write_text(markdown(table, columns) + ("\n" + claimed.markdown(claims) if claims else ""))
    with written_whole(folder / "table.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "steps", "seeds", *(f"{c}{end}" for c in columns for end in ("", "_low", "_high"))])
        for row in table:
            writer.writerow(
                [row["name"], row["steps"], row["seeds"], *(v for c in columns for v in row[c] or ("", "", ""))]
            )
    for name, figure in (
        ("quality", pareto(table, [c for c in columns if c not in COSTS][:2])),
        ("grid", grid(results, prompts)),
    ):
        with written_whole(folder / f"{name}.png") as part:
            figure.savefig(part, dpi=110, format="png")
    with written_whole(folder / "report.html") as part:
        part.write_text(page(results, table, columns, prompts, folder, command, claims))
    return table


def summary(results: list[dict[str, Any]], columns: list[str]) -> list[dict[str, Any]]:
    """A row per name and number of steps: each metric as mean, lowest and highest over training seeds; the bootstrap's
    bounds where there is one seed.
    """
    table = []
    for name, steps in dict.fromkeys((row["name"], row["steps"]) for row in results):
        some = [row for row in results if (row["name"], row["steps"]) == (name, steps)]
        cells = {column: _spread(some, column) for column in columns}
        table.append({"name": name, "steps": steps, "seeds": len(some), **cells})
    return table


def _spread(rows: list[dict[str, Any]], column: str) -> Cell:
    values = [value for row in rows if (value := _value(row, column)) is not None]
    if len(values) < len(rows):
        return None
    if len(rows) == 1 and f"{column}_interval" in rows[0]:
        low, high = rows[0][f"{column}_interval"]
        return values[0], low, high
    return mean(values), min(values), max(values)


def _value(row: dict[str, Any], column: str) -> float | None:
    """A metric, as far as it is known; what training cost is of what the comparison trained."""
    if column == COST:
        return float(row["training"]["device_seconds"]) / 60 if "training" in row else None
    return float(row[column]) if column in row else None


def markdown(table: list[dict[str, Any]], columns: list[str]) -> str:
    """The table, each cell the mean with its lowest and highest."""
    lines = [f"| name | steps | seeds | {' | '.join(columns)} |", "|---|" + "---|" * (len(columns) + 2)]
    for row in table:
        cells = [" ".join(filter(None, _cell(row[c]))) for c in columns]
        lines.append(f"| {row['name']} | {row['steps']} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Cell) -> tuple[str, str]:
    """A mean, and its bounds where there are any."""
    if value is None:
        return "-", ""
    mean_value, low, high = value
    return f"{mean_value:.4g}", f"({low:.4g} to {high:.4g})" if low < high else ""


def pareto(table: list[dict[str, Any]], metrics: list[str]) -> Any:
    """Two metrics against steps, seconds per image and, where there is any, minutes of training; a line per name."""
    from matplotlib.figure import Figure

    costs = ["steps", *(cost for cost in COSTS if any(row.get(cost) for row in table))]
    figure = Figure(figsize=(4 + 5 * len(costs), 3.5 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(costs), squeeze=False)
    for line, metric in zip(axes, metrics, strict=True):
        for axis, across in zip(line, costs, strict=True):
            names = list(dict.fromkeys(row["name"] for row in table))
            for number, name in enumerate(names):
                rows = [
                    row for row in table if row["name"] == name and row[metric] and (across == "steps" or row[across])
                ]
                x = [row["steps"] if across == "steps" else row[across][0] for row in rows]
                y = [row[metric][0] for row in rows]
                error = [[max(row[metric][0] - row[metric][1], 0) for row in rows],
                         [max(row[metric][2] - row[metric][0], 0) for row in rows]]  # fmt: skip
                axis.errorbar(x, y, yerr=error, marker="ov"[number // 10 % 2], capsize=2, label=name,
                              color=f"C{number % 10}", linestyle=("-", "--")[number // 10 % 2])  # fmt: skip
            axis.set(
                xscale="linear" if across == COST else "log",
                xlabel=TITLES.get(across, across),
                ylabel=TITLES.get(metric, metric),
            )
            if across == "steps":
                axis.minorticks_off()
                counts = sorted({row["steps"] for row in table})
                axis.set_xticks(counts, labels=[str(count) for count in counts])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def grid(results: list[dict[str, Any]], prompts: list[str], columns: int = 8) -> Any:
    """The first images of every row, one under the other: the same prompts, the same noise."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    shown = _shown(results)
    figure = Figure(figsize=(columns * 1.0 + 2.5, len(shown) * 1.0 + 0.6), layout="constrained")
    axes = figure.subplots(max(len(shown), 1), columns, squeeze=False)
    for line, row in zip(axes, shown, strict=False):
        for index, axis in enumerate(line):
            file = Path(row["images"]) / f"{index:02d}.png"
            axis.set(xticks=[], yticks=[])
            if file.is_file():
                axis.imshow(imread(file))
        line[0].set_ylabel(f"{row['name']}\n{row['steps']}", rotation=0, ha="right", va="center", fontsize=8)
    for axis, prompt in zip(axes[0], prompts, strict=False):
        axis.set_title("\n".join(_wrapped(prompt, 18)), fontsize=5)
    return figure


def _shown(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every entry and number of steps the first row whose images are here; those measured elsewhere have none."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for row in results:
        if Path(row["images"]).is_dir():
            first.setdefault((row["name"], row["steps"]), row)
    return list(first.values())


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def page(
    results: list[dict[str, Any]],
    table: list[dict[str, Any]],
    columns: list[str],
    prompts: list[str],
    folder: Path,
    command: str,
    claims: list[dict[str, Any]],
) -> str:
    """One HTML file that needs nothing else: a table that sorts, plots, and two rows side by side."""
    images = {f"{row['name']}, {row['steps']} steps": _pictures(Path(row["images"])) for row in _shown(results)}
    about = f"{results[0]['samples']} images a row, seed {results[0]['seed']}, against {results[0]['reference']}"
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("name", "steps", "seeds", *columns))
    body = ""
    for row in table:
        cells = f"<td>{html.escape(row['name'])}</td><td>{row['steps']}</td><td>{row['seeds']}</td>"
        cells += "".join(
            f'<td data-value="{(row[c] or [""])[0]}">{mean_value} <small>{bounds}</small></td>'
            for c in columns
            for mean_value, bounds in (_cell(row[c]),)
        )
        body += f"<tr>{cells}</tr>\n"
    return PAGE.format(
        command=html.escape(command), about=html.escape(about), head=head, body=body,
        plot=_encoded(folder / "quality.png"), claims=_claims(claims),
        data=json.dumps({"images": images, "prompts": prompts}).replace("</", "<\\/"),
    )  # fmt: skip


def _claims(claims: list[dict[str, Any]]) -> str:
    """A second table, of the judged orderings; nothing where there are none."""
    if not claims:
        return ""
    head = "".join(f"<th>{title}</th>" for title in claimed.COLUMNS)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in claimed.cells(claim)) for claim in claims)
    return f"<h2>Claims</h2>\n<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _pictures(folder: Path) -> list[str]:
    return [_encoded(file) for file in sorted(folder.glob("*.png"))]


def _encoded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>distill compare</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th {{ cursor: pointer; text-align: left; border-bottom: 2px solid #444; }}
td {{ border-bottom: 1px solid #ddd; padding: .2rem .6rem .2rem 0; }}
small {{ color: #777; }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }}
.pairs img {{ width: 6rem; image-rendering: pixelated; }}
.plot {{ width: 100%; }}
</style></head><body>
<h1>distill compare</h1>
<p><code>{command}</code><br>{about}. A cell is the mean over training seeds with the lowest and highest;
of a single run the 95 % interval of a bootstrap, where there is one. Click a title to sort.</p>
<table id="table"><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
<img class="plot" alt="quality against steps and seconds" src="{plot}">
{claims}
<h2>Side by side</h2>
<p><select id="left"></select> <select id="right"></select></p>
<div class="pairs" id="pairs"></div>
<script>
const data = {data};
document.querySelectorAll("#table th").forEach((title, column) => title.addEventListener("click", () => {{
  const body = document.querySelector("#table tbody"), rows = [...body.rows];
  const value = row => {{
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
    return text === "" || isNaN(text) ? text : Number(text);
  }};
  const up = title.dataset.up !== "1";
  rows.sort((a, b) => {{
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown comes last
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  }});
  title.dataset.up = up ? "1" : "0";
  rows.forEach(row => body.appendChild(row));
}}));
const names = Object.keys(data.images), sides = ["left", "right"].map(id => document.getElementById(id));
sides.forEach((side, index) => {{
  names.forEach(name => side.add(new Option(name, name)));
  side.selectedIndex = Math.min(index, names.length - 1);
  side.addEventListener("change", show);
}});
function show() {{
  const pairs = document.getElementById("pairs");
  pairs.replaceChildren(...data.prompts.map((prompt, index) => {{
    const box = document.createElement("div"), text = document.createElement("div");
    for (const side of sides) {{
      const image = document.createElement("img");
      image.src = (data.images[side.value] ?? [])[index] ?? "";
      image.alt = side.value + ": " + prompt;
      box.append(image, " ");
    }}
    text.textContent = prompt;
    box.append(text);
    return box;
  }}));
}}
show();
</script></body></html>
"""
