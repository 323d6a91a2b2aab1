"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const withAlpha = (hex, alpha) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${alpha})`;
  };

  const paintTrace = (trace) => {
    const own = color(trace.meta.color);
    if (trace.meta.role === "band") {
      return { ...trace, fillcolor: withAlpha(own, 0.16) };
    }
    if (trace.meta.role === "bar") {
      const pattern = { ...trace.marker.pattern, fgcolor: color("paper"), fgopacity: 0.7 };
      return {
        ...trace,
        marker: { ...trace.marker, color: own, pattern },
        error_x: trace.error_x && { ...trace.error_x, color: color("ink"), thickness: 1.5 },
      };
    }
    if (trace.meta.role === "heatmap") {
      return {
        ...trace,
        colorscale: [[0, color("low")], [1, color("high")]],
        colorbar: { ...trace.colorbar, outlinecolor: color("rule") },
      };
    }
    if (trace.meta.role === "diverging") {
      return {
        ...trace,
        colorscale: [[0, color("below")], [0.5, color("low")], [1, color("high")]],
        colorbar: { ...trace.colorbar, outlinecolor: color("rule") },
      };
    }
    if (trace.meta.role === "dots") {
      return {
        ...trace,
        marker: { ...trace.marker, color: own },
        error_x: { ...trace.error_x, color: own, thickness: 1.5 },
      };
    }
    if (trace.meta.role === "box") {
      return {
        ...trace,
        line: { ...trace.line, color: own },
        fillcolor: withAlpha(own, 0.2),
        marker: { ...trace.marker, color: own },
      };
    }
    return {
      ...trace,
      line: { ...trace.line, color: own },
      marker: { ...trace.marker, color: own, line: { color: own, width: 2 } },
    };
  };

  const paintAxis = (axis) => ({
    ...axis,
    gridcolor: color("grid"),
    linecolor: color("rule"),
    tickcolor: color("rule"),
  });

  const paintLayout = (layout) => ({
    ...layout,
    paper_bgcolor: "rgba(0, 0, 0, 0)",
    plot_bgcolor: "rgba(0, 0, 0, 0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink") },
    hoverlabel: { bgcolor: color("raised"), bordercolor: color("rule"), font: { color: color("ink") } },
    modebar: { bgcolor: "rgba(0, 0, 0, 0)", color: color("muted"), activecolor: color("ink") },
    xaxis: paintAxis(layout.xaxis),
    yaxis: paintAxis(layout.yaxis),
    shapes: (layout.shapes || []).map((shape) => ({
      ...shape,
      line: { ...shape.line, color: color("muted") },
    })),
    annotations: (layout.annotations || []).map((note) => ({
      ...note,
      font: { color: color("muted"), size: 11 },
    })),
  });

  const config = {
    displaylogo: false,
    responsive: true,
    displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
  };

  const drawOne = ([id, figure]) => {
    Plotly.react(id, figure.data.map(paintTrace), paintLayout(figure.layout), config);
  };

  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");

  // The root says in data-drawn which theme every plot is drawn in, and "no" while there are plots to come.
  let waiting = [];
  let began = theme();
  const begin = () => {
    began = theme();
    root.dataset.drawn = "no";
    waiting = Object.entries(figures);
  };
  const finish = () => {
    waiting.forEach(drawOne);
    waiting = [];
    root.dataset.drawn = began;
  };

  // One plot after another, so that the page can be read and scrolled while there are plots to come.
  const next = () => {
    const first = waiting.shift();
    if (first) {
      drawOne(first);
      setTimeout(next, 0);
    } else {
      root.dataset.drawn = began;
    }
  };

  const draw = () => {
    const idle = waiting.length === 0;
    begin();
    if (idle) setTimeout(next, 0);
  };

  const remembered = () => {
    try {
      return localStorage.getItem("keelnorm-theme");
    } catch {
      return null; // a page opened from a file may have no storage
    }
  };

  const choose = (chosen) => {
    root.dataset.theme = chosen;
    try {
      localStorage.setItem("keelnorm-theme", chosen);
    } catch {
      // the choice then lasts as long as the page
    }
    draw();
  };

  if (remembered()) root.dataset.theme = remembered();
  document.getElementById("theme").addEventListener("click", () => {
    choose(theme() === "dark" ? "light" : "dark");
  });
  dark.addEventListener("change", draw);

  // On paper everything is open, light, and as wide as the sheet.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((each) => {
      each.dataset.wasOpen = each.open;
      each.open = true;
    });
    begin();
    finish();
  });
  window.addEventListener("afterprint", () => {
    document.querySelectorAll("details").forEach((each) => {
      each.open = each.dataset.wasOpen === "true";
    });
    draw();
  });

  draw();
})();
