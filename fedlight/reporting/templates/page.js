// Tables that a reader can sort (a click on a column's head) and filter (words that a row must hold).
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

  const filter = table.closest("section").querySelector(".filter");
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
