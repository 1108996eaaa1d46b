"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // No button that sends the data to anybody.
  const config = {
    displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const size = (figure) => ({ ...figure.layout, autosize: true });

  for (const element of document.querySelectorAll("[data-chart]")) {
    const figure = data.charts[element.dataset.chart];
    Plotly.newPlot(element, figure.data, size(figure), config);
  }

  // One large histogram for the row that is chosen.
  for (const element of document.querySelectorAll("[data-histogram]")) {
    const key = element.dataset.histogram;
    const items = data.histograms[key];
    const select = document.querySelector(`[data-picks="${key}"]`);
    const rows = [...document.querySelectorAll(`[data-chooses="${key}"] tbody tr`)];
    if (!items.length) continue;

    const show = (index) => {
      const item = items[index];
      const starts = item.counts.map((_, i) => item.start + i * item.width);
      const total = item.counts.reduce((sum, count) => sum + count, 0);
      const bars = {
        type: "bar",
        x: starts.map((start) => start + item.width / 2),
        y: item.counts,
        width: item.width,
        marker: { color: "#1f6fb2", line: { width: 0 } },
        customdata: starts.map((start, i) => [start, start + item.width, (100 * item.counts[i]) / Math.max(total, 1)]),
        hovertemplate: "%{customdata[0]:.4g} to %{customdata[1]:.4g}<br>%{y:,} values, %{customdata[2]:.3g} %<extra></extra>",
      };
      const layout = structuredClone(data.charts[`histogram-${key}`].layout);
      layout.shapes = item.marks.map(([x]) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "#c2410c", width: 2 },
      }));
      layout.annotations = item.marks.filter(([, text]) => text).map(([x, text], i) => {
        const isRight = x > item.ends[0] + 0.75 * (item.ends[1] - item.ends[0]);
        return {
          x, y: 1 - 0.1 * i, yref: "paper", text: `${text} ${x.toPrecision(4)}`, showarrow: false, yanchor: "top",
          xanchor: isRight ? "right" : "left", xshift: isRight ? -6 : 6, font: { color: "#c2410c" },
          bgcolor: "rgba(255,255,255,.85)",
        };
      });
      // From below one, so that a single value shows.
      layout.yaxis.range = [Math.log10(0.6), Math.log10(Math.max(...item.counts, 1)) + 0.15];
      const margin = 0.02 * (item.ends[1] - item.ends[0]);
      layout.xaxis.range = [item.ends[0] - (item.start < 0 ? margin : 0), item.ends[1] + margin];
      Plotly.react(element, [bars], size({ layout }), config);
      select.value = String(index);
      for (const row of rows) row.classList.toggle("chosen", Number(row.dataset.index) === index);
    };

    select.addEventListener("change", () => show(Number(select.value)));
    for (const row of rows) row.addEventListener("click", () => show(Number(row.dataset.index)));
    for (const button of document.querySelectorAll(`[data-for="${key}"]`)) {
      button.addEventListener("click", () =>
        show((Number(select.value) + Number(button.dataset.step) + items.length) % items.length));
    }
    show(0);
  }

  // Sorting: by number where all cells of a column are numbers, else by text.
  const value = (row, column) => row.cells[column].textContent.trim();
  const parsed = (text) => (text === "∞" ? Infinity : text === "−∞" ? -Infinity : text === "" || text === "–" ? NaN : parseFloat(text));
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const falling = head.getAttribute("aria-sort") === "ascending";
      const sign = falling ? -1 : 1;
      const numeric = head.classList.contains("number");
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
        const [p, q] = [parsed(x), parsed(y)];
        return Number.isNaN(p) - Number.isNaN(q) || (p === q ? 0 : sign * (p < q ? -1 : 1));
      });
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      table.tBodies[0].append(...rows);
    }));
  }
  document.documentElement.dataset.ready = "yes";
})();
