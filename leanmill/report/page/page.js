"use strict";
(() => {
  const values = JSON.parse(document.getElementById("values").textContent);

  const significant = (value) => String(Number(value.toPrecision(4)));
  const write = {
    number: significant,
    scientific: (value) => (value === 0 ? "0" : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")),
    percent: (value) => `${Number((100 * value).toPrecision(3))}%`,
    count: (value) => {
      for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
        if (Math.abs(value) >= 0.9995 * size) return Number((value / size).toPrecision(3)) + suffix;
      return significant(value);
    },
  };

  // Index of the entry of the ascending list xs that is nearest to x.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => ({
    data: values.charts[figure.dataset.chart],
    plot: figure.querySelector(".plot"),
    cursor: figure.querySelector(".cursor"),
    at: figure.querySelector(".at"),
    outputs: [...figure.querySelectorAll(".legend output")],
    resting: [...figure.querySelectorAll(".legend output")].map((output) => output.textContent),
  }));

  const place = {
    step: (x) => `step ${Math.round(x).toLocaleString("en-US")}`,
    tokens: (x) => `${write.count(x)} tokens`,
    time: (x) => {
      const minutes = Math.round(x / 60);
      return x < 60 ? `${Math.round(x)}s` : minutes < 60 ? `${minutes}m` : `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
    },
  };

  // One cursor for all charts that share an axis.
  const show = (axis, where) => {
    for (const { data, cursor, at, outputs } of charts) {
      if (data.axis !== axis) continue;
      const [first, last] = data.x;
      cursor.hidden = false;
      cursor.style.left = `${(100 * (where - first)) / (last - first)}%`;
      at.textContent = place[axis](where);
      data.series.forEach(({ x, y }, index) => {
        outputs[index].textContent = write[data.style](y[nearest(x, where)]);
      });
    }
  };
  const rest = () => {
    for (const { cursor, at, outputs, resting } of charts) {
      cursor.hidden = true;
      at.textContent = "";
      outputs.forEach((output, index) => { output.textContent = resting[index]; });
    }
  };

  for (const { data, plot } of charts) {
    const [first, last] = data.x;
    const steps = data.series.reduce((longest, { x }) => (x.length > longest.length ? x : longest), []);
    let index = steps.length - 1;
    const go = (to) => {
      index = Math.max(0, Math.min(steps.length - 1, to));
      show(data.axis, steps[index]);
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      go(nearest(steps, first + ((last - first) * (event.clientX - box.left)) / box.width));
    });
    plot.addEventListener("pointerleave", rest);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(data.axis, steps[index]); });
    plot.addEventListener("blur", rest);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: steps.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      go(moves[event.key]);
    });
  }

  // Heatmaps: a cell is read out under the pointer or moved to with the arrows, as `page/heat.py` words it.
  const heats = [...document.querySelectorAll("[data-heat]")].map((figure) => ({
    data: values.heats[figure.dataset.heat],
    plot: figure.querySelector(".plot"),
    svg: figure.querySelector(".plot svg"),
    cell: figure.querySelector(".cell"),
    out: figure.querySelector(".read-out"),
  }));
  const describe = (data, row, column) =>
    `${significant(data.cells[row][column])} at ${data.names[0]} ${data.rows[row]}, ${data.names[1]} ${data.columns[column]}`;
  const extremes = (data) => {
    let low = null, high = null;
    data.cells.forEach((cells, row) => cells.forEach((value, column) => {
      if (value === null) return;
      if (low === null || value < data.cells[low[0]][low[1]]) low = [row, column];
      if (high === null || value > data.cells[high[0]][high[1]]) high = [row, column];
    }));
    return low === null ? "no values yet" : `smallest ${describe(data, ...low)}; largest ${describe(data, ...high)}`;
  };
  for (const heat of heats) {
    let at = [0, 0];
    const size = () => [heat.data.rows.length, heat.data.columns.length];
    const leave = () => {
      heat.cell.hidden = true;
      heat.out.textContent = extremes(heat.data);
    };
    const go = (row, column) => {
      const [height, width] = size();
      at = [Math.max(0, Math.min(height - 1, row)), Math.max(0, Math.min(width - 1, column))];
      heat.cell.hidden = false;
      heat.cell.style.cssText =
        `left:${(100 * at[1]) / width}%;top:${(100 * at[0]) / height}%;width:${100 / width}%;height:${100 / height}%`;
      const value = heat.data.cells[at[0]][at[1]];
      heat.out.textContent = value === null ? "no value" : describe(heat.data, ...at);
    };
    heat.plot.addEventListener("pointermove", (event) => {
      const box = heat.plot.getBoundingClientRect(), [height, width] = size();
      go(Math.floor((height * (event.clientY - box.top)) / box.height), Math.floor((width * (event.clientX - box.left)) / box.width));
    });
    heat.plot.addEventListener("pointerleave", leave);
    heat.plot.addEventListener("focus", () => { if (heat.plot.matches(":focus-visible")) go(...at); });
    heat.plot.addEventListener("blur", leave);
    heat.plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (!(event.key in moves)) return;
      event.preventDefault();
      go(at[0] + moves[event.key][0], at[1] + moves[event.key][1]);
    });
    heat.show = (data) => {
      heat.data = data;
      const width = data.columns.length > 64 ? 1 : 0.94, found = new Map();
      data.cells.forEach((cells, y) => cells.forEach((value, x) => {
        if (value === null) return;
        const index = data.edges.filter((edge) => edge <= value).length;
        found.set(index, `${found.get(index) || ""}M${x} ${y}h${width}v0.94h-${width}z`);
      }));
      heat.svg.setAttribute("viewBox", `0 0 ${data.columns.length} ${data.rows.length}`);
      heat.svg.replaceChildren(...[...found].map(([index, d]) => {
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("class", data.palette + index);
        path.setAttribute("d", d);
        return path;
      }));
      leave();
    };
  }
  const layer = document.getElementById("layer");
  if (layer)
    layer.addEventListener("change", () => {
      const shown = values.layers[Number(layer.value)];
      for (const heat of heats) {
        const id = heat.plot.closest("[data-heat]").dataset.heat;
        if (id in shown) heat.show(shown[id]);
      }
    });

  const select = document.getElementById("site");
  if (!select) return;
  const log = document.getElementById("log-counts");
  const histogram = document.getElementById("histogram");
  const rows = [...document.querySelectorAll("[data-site]")];
  const draw = () => {
    const site = values.sites[Number(select.value)];
    const heights = site.histogram.map((n) => (log.checked ? Math.log10(1 + n) : n));
    const top = Math.max(...heights, 1e-9);
    const bars = heights.map((h, i) => (h ? `M${(i + 0.08).toFixed(2)} 1000V${(1000 - (1000 * h) / top).toFixed(1)}h0.84V1000Z` : ""));
    histogram.querySelector(".bars").setAttribute("d", bars.join(""));
    histogram.setAttribute("aria-label", site.text);
    document.getElementById("histogram-text").textContent = site.text;
    const labels = document.getElementById("histogram-axis").children;
    [site.low, (site.low + site.high) / 2, site.high].forEach((value, i) => { labels[i].textContent = significant(value); });
    rows.forEach((row) => row.classList.toggle("chosen", row.dataset.site === select.value));
  };
  select.addEventListener("change", draw);
  log.addEventListener("change", draw);
  for (const row of rows)
    row.addEventListener("click", () => { select.value = row.dataset.site; draw(); });
  draw();
})();
