"use strict";

for (const slider of document.querySelectorAll(".compare input")) {
  slider.addEventListener("input", () => slider.closest(".compare").style.setProperty("--at", `${slider.value}%`));
}

const shown = (cell) => cell.dataset.v ?? cell.textContent;

function compare(a, b) {
  const [x, y] = [shown(a), shown(b)];
  const numbers = [x, y].map((text) => (text.trim() === "" || text === "–" ? NaN : Number(text)));
  const missing = numbers.map(Number.isNaN);
  if (!missing[0] && !missing[1]) return numbers[0] - numbers[1];
  if (missing[0] !== missing[1]) return missing[0] ? 1 : -1;
  return x.localeCompare(y);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const at = head.cellIndex;
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a.cells[at], b.cells[at]));
    body.append(...rows);
  });
}

for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  const count = document.querySelector(`[data-count="${input.dataset.filter}"]`);
  const filter = () => {
    const query = input.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(query);
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  input.addEventListener("input", filter);
  filter();
}
