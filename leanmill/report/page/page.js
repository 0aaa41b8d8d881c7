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

  // One cursor for all charts, since they share the axis of steps.
  const show = (step) => {
    for (const { data, cursor, at, outputs } of charts) {
      const [first, last] = data.x;
      cursor.hidden = false;
      cursor.style.left = `${(100 * (step - first)) / (last - first)}%`;
      at.textContent = `step ${Math.round(step).toLocaleString("en-US")}`;
      data.series.forEach(({ x, y }, index) => {
        outputs[index].textContent = write[data.style](y[nearest(x, step)]);
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
      show(steps[index]);
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      go(nearest(steps, first + ((last - first) * (event.clientX - box.left)) / box.width));
    });
    plot.addEventListener("pointerleave", rest);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(steps[index]); });
    plot.addEventListener("blur", rest);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: steps.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      go(moves[event.key]);
    });
  }

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
