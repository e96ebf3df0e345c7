"""The page's script: other axes, smoothing, a reading line with every curve's value, curves that stand out.

It draws curves anew from the page's data; all numbers and names around them come ready with it (`chart.Page`).
"""

from __future__ import annotations

SCRIPT = """
(() => {
const source = document.getElementById("data");
if (!source) return;
const data = JSON.parse(source.textContent), W = data.width, H = data.height;
const figures = [...document.querySelectorAll("figure[data-chart]")];
const shares = [0, 1 / 60, 1 / 24, 1 / 10, 1 / 4];
let axis = Object.keys(data.axes)[0], smoothing = 1;
const suffixes = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
function short(value) {
  if (value === null) return "–";
  if (Math.abs(value) >= 1e15) return value.toExponential(3);
  const [scale, suffix] = Math.abs(value) >= 1e4 ? suffixes.find(([s]) => Math.abs(value) >= s) : [1, ""];
  return +(value / scale).toPrecision(4) + suffix;
}
function below(list, at) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] > at) high = middle; else low = middle;
  }
  return low;
}
function across(step, run) {
  const knots = data.knots[run], at = data.axes[axis].at[run];
  if (knots.length === 1) return at[0];
  const left = below(knots, step), part = (step - knots[left]) / (knots[left + 1] - knots[left]);
  return Math.round(at[left] + Math.min(1, Math.max(0, part)) * (at[left + 1] - at[left]));
}
function up(value, side) {
  const log = side.log ? v => Math.log10(Math.max(v, side.low * 1e-3)) : v => v;
  const share = (log(value) - log(side.low)) / (log(side.high) - log(side.low));
  return Math.round((1 - Math.min(1.05, Math.max(-.05, share))) * H);
}
function smooth(values, reach) {
  if (!reach) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, at) => {
    const before = Math.min(reach, at), stop = Math.min(values.length, at + before + 1);
    return (sums[stop] - sums[at - before]) / (stop - at + before);
  });
}
function draw(figure) {
  const chart = data.charts[figure.dataset.chart], side = chart.up[figure.side];
  chart.curves.forEach((curve, number) => {
    const group = figure.querySelectorAll(".plot g[data-run]")[number];
    curve.at = curve.x.map(step => across(step, curve.run));
    curve.shown = curve.smooth ? smooth(curve.y, Math.floor(curve.y.length * shares[smoothing] / 2)) : curve.y;
    const line = values => values.map((value, index) => curve.at[index] + " " + up(value, side));
    const points = line(curve.shown);
    group.querySelector(".curve").setAttribute("d", "M" + points.join("L"));
    const dots = group.querySelector(".dots"), envelope = group.querySelector(".envelope");
    if (dots) dots.setAttribute("d", points.map(point => "M" + point + "h0").join(""));
    if (envelope) {
      const outline = line(curve.high).concat(line(curve.low).reverse());
      envelope.setAttribute("d", "M" + outline.join("L") + "Z");
    }
  });
}
function drawAround(figure) {
  const side = data.charts[figure.dataset.chart].up[figure.side];
  figure.querySelector(".up").innerHTML = side.numbers;
  figure.querySelector(".ends").innerHTML = side.ends;
  figure.querySelector(".back").innerHTML = side.back;
  figure.querySelector(".scale").textContent = figure.side;
}
function drawAxis(figure) {
  const shown = data.axes[axis];
  figure.querySelector(".across").innerHTML = shown.across;
  figure.querySelector(".mark").setAttribute("d", shown.lines);
  for (const old of figure.querySelectorAll(".top b")) old.remove();
  figure.querySelector(".top").insertAdjacentHTML("beforeend", shown.marks);
}
function line(text, name, colour) {
  const row = document.createElement("div"), label = document.createElement("b");
  label.className = "c" + colour;
  label.textContent = name;
  row.append(label, text);
  return row;
}
function read(figure) {
  const plot = figure.querySelector(".plot"), cursor = plot.querySelector(".cursor");
  const chart = data.charts[figure.dataset.chart], tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.append(tip);
  plot.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.display = "none"; });
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), {low, high, name} = data.axes[axis];
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    tip.replaceChildren(line(short(low + at * (high - low)) + " " + name, "", 0));
    for (const curve of chart.curves.slice(0, 12)) {
      const left = below(curve.at, at * W), next = Math.min(left + 1, curve.at.length - 1);
      const index = Math.abs(curve.at[left] - at * W) < Math.abs(curve.at[next] - at * W) ? left : next;
      if (Math.abs(curve.at[index] / W - at) < .03)
        tip.append(line(" " + short(curve.shown[index]), curve.name, curve.colour));
    }
    tip.hidden = false;
    cursor.style.display = "block";
    cursor.style.left = at * box.width + "px";
    const right = at * box.width + 12;
    tip.style.left = (at > .5 ? right - 24 - tip.offsetWidth : right) + "px";
    tip.style.top = "4px";
  });
}
for (const figure of figures) {
  const button = figure.querySelector(".scale"), sides = data.charts[figure.dataset.chart].up;
  figure.side = button ? button.textContent : "linear";
  if (button) button.addEventListener("click", () => {
    figure.side = figure.side === "log" ? "linear" : "log";
    drawAround(figure);
    draw(figure);
  });
  draw(figure);
  read(figure);
}
const controls = document.querySelector(".controls");
controls.hidden = false;
for (const button of controls.querySelectorAll("button")) button.addEventListener("click", () => {
  axis = button.dataset.axis;
  for (const one of controls.querySelectorAll("button")) one.setAttribute("aria-pressed", one === button);
  for (const figure of figures) { drawAxis(figure); draw(figure); }
});
controls.querySelector("input").addEventListener("input", event => {
  smoothing = +event.target.value;
  figures.forEach(draw);
});
document.addEventListener("pointerover", event => {
  const run = event.target.closest(".ends [data-run],tr[data-run],a.dot[data-run]")?.dataset.run;
  document.body.classList.toggle("dim", run !== undefined && document.body.classList.contains("several"));
  for (const one of document.querySelectorAll(".lit")) one.classList.remove("lit");
  if (run === undefined) return;
  for (const one of document.querySelectorAll('[data-run="' + run + '"]')) one.classList.add("lit");
});
})();
"""
