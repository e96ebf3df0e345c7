"""The page's only script: a reading line that names every curve's value under the pointer or finger."""

from __future__ import annotations

SCRIPT = """
const suffixes = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
function short(value) {
  if (value === null) return "–";
  const [scale, suffix] = Math.abs(value) >= 1e4 ? suffixes.find(([s]) => Math.abs(value) >= s) : [1, ""];
  return +(value / scale).toPrecision(4) + suffix;
}
function nearest(shares, at) {
  let low = 0, high = shares.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (shares[middle] > at) high = middle; else low = middle;
  }
  return Math.abs(shares[low] - at) < Math.abs(shares[high] - at) ? low : high;
}
function line(text, name, colour) {
  const row = document.createElement("div"), label = document.createElement("b");
  label.className = "c" + colour;
  label.textContent = name;
  row.append(label, text);
  return row;
}
for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const plot = figure.querySelector(".plot"), cursor = plot.querySelector(".cursor");
  const {low, high, curves} = JSON.parse(figure.dataset.curves), tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.append(tip);
  plot.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.display = "none"; });
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    tip.replaceChildren(line(short(low + at * (high - low)) + " " + figure.dataset.axis, "", 0));
    for (const [name, colour, shares, values] of curves) {
      const index = nearest(shares, at);
      if (Math.abs(shares[index] - at) < 0.03) tip.append(line(" " + short(values[index]), name, colour));
    }
    tip.hidden = false;
    cursor.style.display = "block";
    cursor.style.left = at * box.width + "px";
    const right = at * box.width + 12;
    tip.style.left = (at > 0.5 ? right - 24 - tip.offsetWidth : right) + "px";
    tip.style.top = "4px";
  });
}
"""
