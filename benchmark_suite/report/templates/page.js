"use strict";

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/** What a cell is sorted by: a number where it holds one, else its text; null where it is empty. */
function order(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.order !== undefined) return Number(cell.dataset.order);
  return cell.textContent.trim() || null;
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return collator.compare(one, other);
}

function sort(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  // Numbers are mostly read from the best down, names from A.
  const first = header.classList.contains("number") ? "descending" : "ascending";
  const second = first === "ascending" ? "descending" : "ascending";
  const direction = header.getAttribute("aria-sort") === first ? second : first;
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [left, right] = [order(one, column), order(other, column)];
    // Empty cells stay at the bottom either way.
    if (left === null || right === null) return (left === null) - (right === null);
    return sign * compare(left, right);
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  table.tBodies[0].append(...rows);
}

/** Keep the rows that hold every word, in any column. */
function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const table of document.querySelectorAll("table")) {
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      const held = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => held.includes(word));
    }
    const left = rows.filter((row) => !row.hidden).length;
    const count = table.closest("section").querySelector(".count");
    count.textContent = words.length ? `${left} of ${rows.length} rows` : "";
  }
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
const input = document.getElementById("filter");
input.addEventListener("input", () => filter(input.value));
// A browser keeps the text of a field over a reload, but not the rows it hid.
filter(input.value);
