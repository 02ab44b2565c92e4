// Tables that a reader can sort (a click on a column's head) and filter (words that a row must hold); columns that are
// the same in every row, or of less weight where a table is too wide, are hidden until the reader asks for them. Curves
// name their points under the pointer, and a picture of the gallery is enlarged by a click.
const byValue = (column, direction) => (a, b) => {
  const [x, y] = [a, b].map(row => row.cells[column].dataset.value);
  if (x === "" || y === "") return (x === "") - (y === "");
  const difference = x - y;
  return direction * (Number.isNaN(difference) ? x.localeCompare(y, "en", {numeric: true}) : difference);
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...[...body.rows].sort(byValue(column, direction)));
  }));

  const section = table.closest("section");
  const unfold = section.querySelector(".unfold");
  const constant = heads.filter(head => head.hidden);
  const show = (head, shown) => {
    for (const row of table.rows) row.cells[head.cellIndex].hidden = !shown;
  };
  const minor = heads.filter(head => head.dataset.minor !== undefined && !head.hidden)
    .sort((a, b) => a.dataset.minor - b.dataset.minor);
  let unfolded = false;
  const fold = () => {
    minor.forEach(head => show(head, true));
    constant.forEach(head => show(head, unfolded));
    const box = table.parentElement;
    for (const head of minor) {
      if (unfolded || box.scrollWidth <= box.clientWidth) break;
      show(head, false);
    }
    const count = heads.filter(head => head.hidden).length;
    unfold.textContent = unfolded ? "Fewer columns" : `${count} more column${count === 1 ? "" : "s"}`;
    unfold.hidden = !unfolded && !count;
  };
  unfold.addEventListener("click", () => { unfolded = !unfolded; fold(); });
  window.addEventListener("resize", fold);
  table.closest("details")?.addEventListener("toggle", fold);
  fold();

  const filter = section.querySelector(".filter");
  if (!filter) continue;
  const shown = filter.querySelector("output");
  filter.querySelector("input").addEventListener("input", event => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of body.rows) {
      const text = [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${body.rows.length} rows`;
  });
}

const REACH = 24;  // pixels from the pointer to a point
const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
const ring = Object.assign(document.createElement("span"), {className: "ring"});
tip.setAttribute("role", "status");
document.body.append(tip);

for (const chart of document.querySelectorAll(".chart")) {
  const points = JSON.parse(chart.dataset.curves).flatMap(([name, curve]) => curve.map(point => [name, ...point]));
  const leave = () => { tip.hidden = true; ring.remove(); };
  const point = event => {
    const box = chart.getBoundingClientRect();
    const distance = ([, x, y]) => Math.hypot(
      box.left + x / 1000 * box.width - event.clientX, box.top + y / 1000 * box.height - event.clientY);
    let nearest = null;
    for (const one of points) if (nearest === null || distance(one) < distance(nearest)) nearest = one;
    if (nearest === null || distance(nearest) > REACH) return leave();
    const [name, x, y, text] = nearest;
    const same = points.filter(one => one[1] === x && one[2] === y);
    tip.textContent = same.length > 1 ? same.map(one => `${one[0]}\n${one[3]}`).join("\n") : `${name}\n${text}`;
    tip.hidden = false;
    Object.assign(ring.style, {left: `${x / 10}%`, top: `${y / 10}%`});
    chart.append(ring);
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    const above = event.clientY + 14 + tip.offsetHeight > window.innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above ? event.clientY - 14 - tip.offsetHeight : event.clientY + 14}px`;
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", leave);
}
window.addEventListener("scroll", () => { tip.hidden = true; ring.remove(); }, {passive: true});

const enlarged = document.querySelector(".enlarged");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    enlarged.replaceChildren(button.firstElementChild.cloneNode());
    enlarged.showModal();
  });
}
enlarged.addEventListener("click", () => enlarged.close());
