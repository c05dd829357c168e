"use strict";
// Draws every panel with Plotly in the page's theme, and the 3-D view of the unit sphere and its image under K.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const narrow = matchMedia("(max-width: 40rem)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (index) => index === null ? css("--soft") : css(`--c${index % 8}`);
  const fade = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
  const mix = (hex, other, share) => "#" + [1, 3, 5].map((i) => Math.round(share * parseInt(hex.slice(i, i + 2), 16) + (1 - share) * parseInt(other.slice(i, i + 2), 16)).toString(16).padStart(2, "0")).join("");
  const config = { responsive: true, displayModeBar: false };
  const LEGEND = 46;  // two rows of it are within a plot's usual height

  function merge(base, changes) {
    const result = { ...base };
    for (const [key, value] of Object.entries(changes)) {
      const nested = value && typeof value === "object" && !Array.isArray(value);
      result[key] = nested ? merge(result[key] || {}, value) : value;
    }
    return result;
  }

  function layoutOf(panel, choice) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    const font = getComputedStyle(document.body).fontFamily;
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: font, color: css("--ink"), size: 13 },
      margin: { l: 52, r: 12, t: 18, b: 76 }, xaxis: axis, yaxis: axis, hoverlabel: { font: { family: font }, namelength: -1 },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0 }, bargap: 0.3, bargroupgap: 0.06,
    };
    const layout = merge(base, panel.layout);
    if (panel.chosen_axis) layout[panel.chosen_axis] = merge(layout[panel.chosen_axis], { title: { text: panel.names[choice] || choice } });
    for (const name of ["xaxis", "yaxis"]) layout[name] = merge(layout[name], { title: { font: { size: 13, color: css("--soft") }, standoff: 8 } });
    for (const shape of layout.shapes || []) shape.line.color = css("--soft");
    if (layout.annotations) {
      layout.annotations = layout.annotations.map((note) => ({ ...note, font: { size: narrow.matches ? 8 : 10, color: css("--soft") } }));
    }
    return layout;
  }

  // A colour is a method; RL's bars have a light, hatched one, and where a line joins methods it has none of theirs.
  function paint(trace) {
    const each = (change) => Array.isArray(trace.palette) ? trace.palette.map((index) => change(color(index))) : change(color(trace.palette === undefined ? 0 : trace.palette));
    const own = each((hex) => hex), line = Array.isArray(trace.palette) ? css("--soft") : own;
    const painted = merge(trace, {});
    if (trace.band) painted.fillcolor = fade(own, trace.band);
    else if (trace.type === "heatmap") painted.colorbar = { ...trace.colorbar, outlinewidth: 0, thickness: 12 };
    else if (trace.type === "bar") {
      const light = each((hex) => mix(hex, css("--card"), 0.35)), hatched = trace.protocol === "rl";
      painted.marker = { color: hatched ? light : own, line: { color: own, width: 1.2 } };
      if (hatched) painted.marker.pattern = { shape: "/", solidity: 0.2, size: 7, fgcolor: own, bgcolor: light };
      if (trace.error_y) painted.error_y = { ...trace.error_y, color: css("--ink") };
    } else {
      if (trace.outlined) painted.marker = { ...trace.marker, color: css("--card"), line: { ...trace.marker.line, color: css("--ink") } };
      else painted.marker = { ...trace.marker, color: trace.shade ? mix(own, css("--card"), trace.shade) : own };
      painted.line = { ...trace.line, color: line };
      if (trace.error_y) painted.error_y = { ...trace.error_y, color: line };
    }
    return painted;
  }

  // A name in lines of so many characters: a legend's, which the drawing library would cut off or give all the room to.
  function lines(name, length) {
    const found = [""];
    for (const word of name.split(" ")) {
      const last = found[found.length - 1];
      if (last && last.length + word.length >= length) found.push(word);
      else found[found.length - 1] = last ? `${last} ${word}` : word;
    }
    return found;
  }

  // Traces with wrapped names, and how high their legend is below the plot: entries fill its width row by row.
  function legend(box, traces) {
    const room = Math.max(240, box.clientWidth - 40), length = Math.floor((room - 60) / 7);
    const named = traces.map((trace) => trace.showlegend === false || !trace.name ? trace : { ...trace, name: lines(trace.name, length).join("<br>") });
    const names = [...new Set(named.filter((trace) => trace.showlegend !== false && trace.name).map((trace) => trace.name))];
    const split = names.map((name) => name.split("<br>"));
    const widest = Math.max(0, ...split.flat().map((text) => 60 + 7.4 * text.length));
    const columns = Math.max(1, Math.floor(room / widest)), tallest = Math.max(1, ...split.map((texts) => texts.length));
    return { named, height: Math.ceil(names.length / columns) * (6 + 17 * tallest) };
  }

  function draw(id) {
    const panel = data.panels[id];
    const box = document.getElementById(id);
    if (!box) return;
    const select = document.getElementById(`choose-${id}`);
    const choice = select ? select.value : Object.keys(panel.choices)[0];
    const title = panel.titles[choice] || panel.title, note = document.getElementById(`note-${id}`), paper = document.getElementById(`paper-${id}`);
    document.getElementById(`heading-${id}`).textContent = title;
    box.setAttribute("aria-label", title);
    if (paper) paper.hidden = title !== panel.title;  // the paper's figure is of the first choice
    if (note) note.textContent = panel.notes[choice] || "";
    const { named, height } = legend(box, panel.choices[choice]), layout = layoutOf(panel, choice);
    box.style.height = "";
    box.style.height = `${box.clientHeight + Math.max(0, height - LEGEND)}px`;
    layout.legend = { ...layout.legend, maxheight: height + 20 };
    Plotly.react(box, named.map(paint), layout, config);
  }

  // ---- the unit sphere and its image under K

  const POINTS = 41;
  const grid = Array.from({ length: POINTS * POINTS }, (_, i) => {
    const height = Math.PI * Math.floor(i / POINTS) / (POINTS - 1), turn = 2 * Math.PI * (i % POINTS) / (POINTS - 1);
    return [Math.cos(turn) * Math.sin(height), Math.sin(turn) * Math.sin(height), Math.cos(height)];
  });
  const faces = { i: [], j: [], k: [] };
  for (let row = 0; row < POINTS - 1; row++) {
    for (let column = 0; column < POINTS - 1; column++) {
      const corner = row * POINTS + column;
      for (const [a, b, c] of [[corner, corner + POINTS, corner + 1], [corner + 1, corner + POINTS, corner + POINTS + 1]]) {
        faces.i.push(a);
        faces.j.push(b);
        faces.k.push(c);
      }
    }
  }
  const solid = (axes) => ["x", "y", "z"].reduce((out, name, k) => ({ ...out, [name]: grid.map((p) => axes[k] * p[k]) }), { ...faces });

  function cage() {
    const line = { x: [], y: [], z: [] };
    const add = (...p) => ["x", "y", "z"].forEach((name, k) => line[name].push(p[k]));
    for (let circle = 0; circle < 6; circle++) {
      for (let i = 0; i <= 48; i++) {
        const turn = 2 * Math.PI * i / 48, angle = Math.PI * circle / 6;
        add(Math.cos(angle) * Math.sin(turn), Math.sin(angle) * Math.sin(turn), Math.cos(turn));
      }
      add(null, null, null);
    }
    for (const level of [-0.66, -0.33, 0, 0.33, 0.66]) {
      for (let i = 0; i <= 48; i++) {
        const turn = 2 * Math.PI * i / 48, radius = Math.sqrt(1 - level * level);
        add(radius * Math.cos(turn), radius * Math.sin(turn), level);
      }
      add(null, null, null);
    }
    return line;
  }

  class View {
    constructor(root) {
      this.methods = data.geometry[root.dataset.suite];
      this.names = Object.keys(this.methods);
      this.sides = ["left", "right"].map((side, i) => ({
        select: root.querySelector(`select[data-side=${side}]`), scene: root.querySelector(`.scene[data-side=${side}]`),
        reading: root.querySelector(`.reading[data-side=${side}]`), axes: null, palette: i,
      }));
      this.range = root.querySelector("input");
      this.output = root.querySelector("output");
      this.button = root.querySelector(".play");
      this.timer = null;
      const { order, pair } = data.methods[root.dataset.suite];
      this.order = order;
      this.reach = Math.max(1, ...Object.values(this.methods).flat().filter(Boolean).map((one) => one.semi_axes[0]));
      this.sides[0].select.value = this.names.includes(pair[0]) ? pair[0] : this.names[0];
      this.sides[1].select.value = this.names.includes(pair[1]) ? pair[1] : this.names[this.names.length - 1];
      this.range.max = Math.max(...Object.values(this.methods).map((row) => row.length)) - 1;
      this.range.addEventListener("input", () => { this.pause(); this.show(); });
      for (const side of this.sides) side.select.addEventListener("change", () => this.show());
      this.button.addEventListener("click", () => this.timer ? this.pause() : this.play());
      this.draw();
    }

    snapshot(side) { return this.methods[side.select.value][Number(this.range.value)] || null; }

    draw() {
      for (const side of this.sides) {
        const found = this.snapshot(side);
        side.axes = found ? found.semi_axes : [0, 0, 0];
        Plotly.react(side.scene, this.traces(side), this.layout(), config);
      }
      if (!this.linked) this.link();
      this.read();
    }

    traces(side) {
      const own = color(this.order.indexOf(side.select.value));
      return [
        { type: "scatter3d", mode: "lines", ...cage(), line: { color: fade(css("--soft"), 0.55), width: 1.4 }, hoverinfo: "skip", showlegend: false },
        { type: "mesh3d", ...solid(side.axes), color: own, opacity: 1, hoverinfo: "skip", flatshading: false,
          lighting: { ambient: 0.5, diffuse: 0.9, specular: 0.35, roughness: 0.5, fresnel: 0.15 }, lightposition: { x: 2000, y: 500, z: 3000 } },
      ];
    }

    layout() {
      const axis = { visible: false, range: [-1.05 * this.reach, 1.05 * this.reach] };
      return { margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", showlegend: false, uirevision: "kept",
        scene: { xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "cube", dragmode: "orbit", camera: { eye: { x: 0.95, y: 0.95, z: 0.6 } } } };
    }

    link() {
      this.linked = true;
      this.sides.forEach((side, i) => side.scene.on("plotly_relayout", (event) => {
        const camera = event["scene.camera"];
        if (camera && !this.turning) {
          this.turning = true;
          Plotly.relayout(this.sides[1 - i].scene, { "scene.camera": camera }).then(() => { this.turning = false; });
        }
      }));
    }

    read() {
      const index = Number(this.range.value);
      const known = Object.values(this.methods).map((row) => row[index]).find(Boolean);
      this.output.textContent = `after ${index + 1}. ${known ? known.task : "task"}`;
      this.range.setAttribute("aria-valuetext", this.output.textContent);
      for (const side of this.sides) {
        const found = this.snapshot(side);
        side.reading.innerHTML = found
          ? `r<sub>e</sub>(K) = <b>${found.rank.toFixed(1)}</b> · r<sub>e</sub> of the three drawn = <b>${found.drawn_rank.toFixed(2)}</b><br>semi-axes ${found.semi_axes.map((axis) => axis.toFixed(2)).join(" · ")} · λ₁ = ${found.largest.toLocaleString("en", { maximumSignificantDigits: 3 })} · the three hold ${(100 * found.share).toFixed(0)} % of tr K`
          : "missing: no policy of this run at the end of the task";
      }
    }

    show() {
      this.read();
      const from = this.sides.map((side) => side.axes);
      const to = this.sides.map((side) => { const found = this.snapshot(side); return found ? found.semi_axes : [0, 0, 0]; });
      const began = performance.now(), turn = (this.turn = (this.turn || 0) + 1);
      const step = (now) => {
        if (turn !== this.turn) return;
        const share = still.matches ? 1 : Math.min(1, (now - began) / 600), eased = share * share * (3 - 2 * share);
        this.sides.forEach((side, i) => {
          side.axes = share < 1 ? from[i].map((a, k) => a + eased * (to[i][k] - a)) : to[i];
          Plotly.react(side.scene, this.traces(side), { ...this.layout(), ...(side.scene.layout && { scene: side.scene.layout.scene }) });
        });
        if (share < 1) requestAnimationFrame(step);
      };
      requestAnimationFrame(step);
    }

    play() {
      this.button.textContent = "❚❚";
      this.button.setAttribute("aria-label", "Pause");
      const next = () => { this.range.value = Number(this.range.value) >= Number(this.range.max) ? 0 : Number(this.range.value) + 1; this.show(); };
      next();
      this.timer = setInterval(next, 1500);
    }

    pause() {
      clearInterval(this.timer);
      this.timer = null;
      this.button.textContent = "▶";
      this.button.setAttribute("aria-label", "Play through the tasks");
    }
  }

  // ---- the page

  const drawn = Object.keys(data.panels).filter((id) => document.getElementById(id));
  for (const select of document.querySelectorAll("select[data-panel]")) select.addEventListener("change", () => draw(select.dataset.panel));
  const views = [];
  const redraw = () => { drawn.forEach(draw); views.forEach((view) => view.draw()); };

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch (error) { /* storage may be forbidden: the choice lasts for this visit */ }
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);

  if (data.refresh) {
    const live = document.getElementById("live");
    live.addEventListener("click", () => live.setAttribute("aria-pressed", String(live.getAttribute("aria-pressed") !== "true")));
    setInterval(() => { if (live.getAttribute("aria-pressed") === "true") location.reload(); }, 1000 * data.refresh);
  }
  // one figure at a time, so that the page can be read and scrolled while it fills
  const jobs = drawn.map((id) => () => draw(id));
  document.querySelectorAll(".geometry").forEach((root) => jobs.push(() => views.push(new View(root))));
  const work = () => {
    const job = jobs.shift();
    if (job) {
      try { job(); } catch (error) { console.error(error); }  // the others are drawn all the same
      setTimeout(work);
    } else {
      document.documentElement.dataset.ready = "true";
    }
  };
  work();
})();
