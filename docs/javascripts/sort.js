// Tables in <div class="sortable">: a click on a heading sorts by its column, a second one the other way round.
// The first row is what all others are compared with, and stays.
document$.subscribe(() => {
  for (const table of document.querySelectorAll(".sortable table")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.style.cursor = "pointer";
      head.tabIndex = 0;
      const sort = () => {
        const up = head.getAttribute("aria-sort") === "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const [first, ...rows] = body.rows;
        rows.sort((a, b) => compare(a.cells[column].textContent, b.cells[column].textContent, up));
        body.append(first, ...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});

// Numbers by value, whatever follows them; what is no number comes last both ways.
function compare(a, b, up) {
  const [left, right] = [a, b].map((text) => parseFloat(text.replaceAll(",", "").replace("\u2212", "-")));
  if (Number.isNaN(left) && Number.isNaN(right)) return up ? a.localeCompare(b) : b.localeCompare(a);
  if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) ? 1 : -1;
  return up ? left - right : right - left;
}
