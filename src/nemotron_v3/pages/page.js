
"use strict";
(async () => {
  const root = document.documentElement;
  const find = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // ---- theme: the system's until the button is pressed
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const applyTheme = () => { root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light"); };
  applyTheme();

  // ---- tabs
  const tabs = find('[role="tab"]');
  const panels = find('[role="tabpanel"]');
  let shown = 0;
  const show = (number) => {
    shown = number;
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", i === number);
      tab.tabIndex = i === number ? 0 : -1;
    });
    panels.forEach((panel, i) => panel.classList.toggle("shown", i === number));
    tabs[number].scrollIntoView({ block: "nearest", inline: "nearest" });
    drawPanel(panels[number]);
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => show(i));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = (i + move + tabs.length) % tabs.length;
      show(next);
      tabs[next].focus();
    });
  });

  // ---- the page's age, where a running run should have written it anew
  const written = Number(document.body.dataset.written);
  const refreshed = Number(document.body.dataset.refreshed);
  const tellAge = () => {
    const age = Date.now() / 1000 - written;
    const told = document.getElementById("told");
    if (!refreshed || !told || age < 3 * refreshed) return;
    told.dataset.first ??= told.textContent;
    const length = age < 7200 ? `${Math.round(age / 60)} min` : `${(age / 3600).toFixed(1)} h`;
    told.textContent = `${told.dataset.first} This page is ${length} old, and the run should have `
      + "written it anew: load it again, or write it with nemotron-v3 report.";
  };
  tellAge();
  setInterval(tellAge, 60000);

  // ---- data and library, which are packed
  const unpack = async (id) => {
    const raw = atob(document.getElementById(id).textContent);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  let charts = [];
  let axis = "step";
  const ranges = {}; // that all curves over the same thing show; absent for all of it
  let ready = false;

  // ---- fewer points where the width cannot show them: the least and the greatest of a stretch
  const within = (x, low, high) => {
    let from = 0, to = x.length;
    if (low !== null) {
      from = x.findIndex((value) => value >= low);
      from = from < 0 ? x.length : from;
      to = x.findIndex((value) => value > high);
      to = to < 0 ? x.length : to;
      from = Math.max(0, from - 1);
      to = Math.min(x.length, to + 1);
    }
    return [from, to];
  };
  const thin = (x, y, pixels, range) => {
    const [from, to] = within(x, ...(range ?? [null, null]));
    const count = to - from;
    const stretches = Math.max(200, Math.floor(pixels));
    if (count <= 2 * stretches) return [x.slice(from, to), y.slice(from, to)];
    const keptX = [], keptY = [];
    for (let s = 0; s < stretches; s++) {
      const start = from + Math.floor(s * count / stretches);
      const stop = from + Math.floor((s + 1) * count / stretches);
      let least = -1, greatest = -1, gap = -1;
      for (let i = start; i < stop; i++) {
        if (y[i] === null) { if (gap < 0) gap = i; continue; }
        if (least < 0 || y[i] < y[least]) least = i;
        if (greatest < 0 || y[i] > y[greatest]) greatest = i;
      }
      const kept = new Set([least, greatest, gap, s ? -1 : start, s === stretches - 1 ? stop - 1 : -1]);
      for (const i of [...kept].filter((i) => i >= 0).sort((a, b) => a - b)) { keptX.push(x[i]); keptY.push(y[i]); }
    }
    return [keptX, keptY];
  };

  // ---- one chart
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star", "triangle-down"];
  const overTokens = (chart) => axis === "tokens" && (chart.lines ?? chart.frames ?? []).some((data) => data.tokens);
  const axisOf = (data) => (axis === "tokens" && data.tokens ? data.tokens : data.step);

  const layout = (chart, width) => {
    const line = { gridcolor: colour("rule"), linecolor: colour("rule"), zerolinecolor: colour("rule"), automargin: true };
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 50, r: 12, t: 10, b: 40 },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("rule"), font: { color: colour("ink") } },
      legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", font: { size: width < 500 ? 11 : 12 } },
      showlegend: true,
      xaxis: { ...line, title: { text: plain(overTokens(chart) ? "tokens" : chart.x ?? "step"), standoff: 6 }, nticks: width < 500 ? 5 : 9, exponentformat: "SI" },
      yaxis: { ...line, title: { text: plain(chart.unit ?? ""), standoff: 6 }, exponentformat: "power" },
    };
  };

  const linesOf = (chart, width) => {
    let next = 0;
    return chart.lines.map((data) => {
      const number = data.colour ?? next++;
      const [x, y] = thin(axisOf(data), data.y, width, ranges[chart.x]);
      const few = data.look === "points" || y.length === 1;
      return {
        type: "scatter", x, y, name: plain(data.name), connectgaps: false,
        mode: few ? "lines+markers" : "lines",
        opacity: data.look === "faint" ? 0.35 : 1,
        line: {
          color: colour(`c${number % 8}`), width: data.look === "faint" ? 1 : 2,
          dash: data.look === "faint" ? "solid" : DASHES[number % 8],
        },
        marker: { symbol: SYMBOLS[number % 8], size: 7 },
        hovertemplate: `%{y:${chart.form}}`,
      };
    });
  };

  const drawLines = (chart, width) => {
    const traces = linesOf(chart, width);
    const shape = layout(chart, width);
    if (chart.log) {
      const values = traces.flatMap((trace) => trace.y).filter((value) => value > 0);
      const decades = Math.log10(Math.max(...values) / Math.min(...values));
      // Within few decades 2 and 5 are told as well.
      Object.assign(shape.yaxis, { type: "log", tickformat: "~g", dtick: decades < 2 ? "D2" : Math.ceil(decades / 6) });
    } else if (chart.zero) {
      shape.yaxis.rangemode = "tozero";
    }
    if (ranges[chart.x]) shape.xaxis.range = ranges[chart.x];
    if (chart.log_x) Object.assign(shape.xaxis, { type: "log", dtick: 1 });
    else if (Math.max(...traces.flatMap((trace) => trace.x)) <= 10) shape.xaxis.dtick = 1;
    shape.showlegend = traces.length > 1;
    return [traces, shape];
  };

  const drawHeat = (chart, width) => {
    const frame = chart.frames[chart.frame ?? 0];
    const values = frame.z.flat().filter((value) => value !== null);
    const low = chart.low ?? Math.min(...values.slice(0, 100000));
    const high = chart.high ?? Math.max(...values.slice(0, 100000));
    const diverging = chart.scale === "diverging";
    const scale = diverging
      ? [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]]
      : "Cividis";
    const trace = {
      type: "heatmap", x: axisOf(frame), y: frame.rows.map(plain), z: frame.z, zmin: low, zmax: high,
      colorscale: scale, hoverongaps: false,
      colorbar: { title: { text: plain(chart.unit), side: "right" }, thickness: 12, len: 1, outlinewidth: 0 },
      hovertemplate: `${plain(chart.rows)} %{y}<br>${axis} %{x}<br>${plain(chart.unit)} %{z:.4~g}<extra></extra>`,
    };
    const shape = layout(chart, width);
    shape.hovermode = "closest";
    shape.showlegend = false;
    shape.yaxis = { ...shape.yaxis, title: { text: plain(chart.rows), standoff: 6 }, type: "category", autorange: "reversed", showgrid: false, nticks: 16 };
    shape.xaxis.showgrid = false;
    return [[trace], shape];
  };

  const drawBars = (chart, width) => {
    const traces = chart.bars.map((bar, i) => ({
      type: "bar", name: plain(bar.name), x: chart.names.map(plain), y: bar.y,
      marker: { color: colour(`c${i % 8}`), pattern: { shape: ["", "/", ".", "x", "-", "\\", "+", "|"][i % 8], fillmode: "overlay", fgcolor: colour("paper"), fgopacity: 0.6, size: 7 } },
      hovertemplate: `%{y:${chart.form}}`,
      texttemplate: chart.names.length * chart.bars.length <= 12 ? `%{y:${chart.form}}` : undefined,
      textposition: "outside", cliponaxis: false,
    }));
    const shape = layout(chart, width);
    shape.xaxis = { automargin: true, type: "category", tickangle: width < 500 ? -40 : "auto" };
    shape.showlegend = traces.length > 1;
    // Names may be long and stand aslant, where a legend would be below.
    Object.assign(shape.legend, { y: 1.06, yanchor: "bottom" });
    shape.margin.t = traces.length > 1 ? 48 : 24;
    return [traces, shape];
  };

  const DRAW = { lines: drawLines, heat: drawHeat, bars: drawBars };
  const CONFIG = { displayModeBar: false };

  const draw = (figure) => {
    const chart = charts[Number(figure.dataset.chart)];
    const plot = figure.querySelector(".plot");
    const width = plot.clientWidth || 800;
    const [traces, shape] = DRAW[chart.kind](chart, width);
    const hidden = plot.data ? plot.data.map((trace) => trace.visible) : [];
    traces.forEach((trace, i) => { if (hidden[i] !== undefined) trace.visible = hidden[i]; });
    if (chart.kind === "heat") {
      const rows = chart.frames[chart.frame ?? 0].rows.length;
      plot.style.height = `${Math.min(440, Math.max(170, 100 + 14 * rows))}px`;
    }
    const first = !plot.data;
    plot.busy = true;
    // The sizes are the style sheet's, which differ on paper and after a window was resized.
    Object.assign(shape, { width, height: plot.clientHeight || 320 });
    const done = Plotly.react(plot, traces, shape, CONFIG).then(() => { plot.busy = false; });
    if (first) {
      plot.on("plotly_relayout", (change) => follow(chart, plot, change));
    }
    return done;
  };

  // A curve that is looked at closer takes the others along, and shows points that were left out.
  const follow = (chart, plot, change) => {
    if (chart.kind !== "lines" || chart.log_x || plot.busy) return;
    let next;
    if ("xaxis.range[0]" in change) next = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map(Number);
    else if (change["xaxis.range"]) next = change["xaxis.range"].map(Number);
    else if (!change["xaxis.autorange"]) return;
    if (JSON.stringify(next) === JSON.stringify(ranges[chart.x])) return;
    if (next) ranges[chart.x] = next;
    else delete ranges[chart.x];
    all.hidden = Object.keys(ranges).length === 0;
    find("figure[data-chart]", panels[shown]).forEach((figure) => {
      const other = charts[Number(figure.dataset.chart)];
      if (other.kind === "lines" && other.x === chart.x && figure.querySelector(".plot").data) draw(figure);
    });
  };

  const drawPanel = (panel) => {
    if (!ready) return Promise.resolve();
    return Promise.all(find("figure[data-chart]", panel).map(draw));
  };
  const redraw = () => Promise.all(find("figure[data-chart]").filter((f) => f.querySelector(".plot").data).map(draw));

  const all = document.getElementById("all");
  const showAll = () => {
    for (const name of Object.keys(ranges)) delete ranges[name];
    all.hidden = true;
    return redraw();
  };

  // ---- choices above a chart: a logarithmic axis, a router
  const offerChoices = (figure) => {
    const chart = charts[Number(figure.dataset.chart)];
    const place = figure.querySelector(".choices");
    if (chart.kind === "lines" && chart.log !== null && chart.log !== undefined) {
      const button = document.createElement("button");
      button.type = "button";
      const name = () => {
        button.textContent = "log";
        button.setAttribute("aria-pressed", chart.log);
        button.style.fontWeight = chart.log ? "600" : "400";
      };
      name();
      button.addEventListener("click", () => { chart.log = !chart.log; name(); draw(figure); });
      place.append(button);
    }
    if (chart.kind === "heat" && chart.frames.length > 1) {
      const select = document.createElement("select");
      select.setAttribute("aria-label", chart.title);
      chart.frames.forEach((frame, i) => {
        const option = document.createElement("option");
        option.value = i;
        option.textContent = frame.name;
        select.append(option);
      });
      select.addEventListener("change", () => { chart.frame = Number(select.value); draw(figure); });
      place.append(select);
    }
  };

  show(0);
  try {
    charts = JSON.parse(await unpack("data")).charts;
    const library = document.createElement("script");
    library.textContent = await unpack("library");
    document.head.append(library);
  } catch (error) {
    const told = document.createElement("p");
    told.className = "notice";
    told.textContent = `The curves could not be drawn (${error}). The tables hold their figures.`;
    document.querySelector("header").append(told);
    root.classList.add("nojs");
    return;
  }
  ready = true;
  find("figure[data-chart]").forEach(offerChoices);
  const controls = document.querySelector(".controls");
  controls.hidden = false;
  const axes = document.getElementById("axis");
  const counted = charts.some((chart) => (chart.lines ?? chart.frames ?? []).some((data) => data.tokens));
  axes.parentElement.hidden = !counted;
  axes.addEventListener("change", () => { axis = axes.value; showAll(); });
  all.addEventListener("click", showAll);
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
    redraw();
  });
  dark.addEventListener("change", () => { applyTheme(); redraw(); });
  await drawPanel(panels[shown]);

  let resized = 0;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => drawPanel(panels[shown]), 150);
  });

  // ---- paper: all parts, in light colours, at the width that they have there
  let before = null;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    root.classList.add("paper");
    panels.forEach((panel) => panel.classList.add("shown"));
    find("figure[data-chart]").forEach((figure) => draw(figure));
  });
  addEventListener("afterprint", () => {
    root.dataset.theme = before;
    root.classList.remove("paper");
    show(shown);
    redraw();
  });
  root.dataset.ready = "true";
})();
