"use strict";

// --- tables -----------------------------------------------------------------------------------------------------------------

// A click on a column's name sorts the rows by it, a second click the other way round. Empty cells stay at the end.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return sign * (Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference);
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const value = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(value(a), value(b), order === "ascending" ? 1 : -1));
    table.tBodies[0].append(...rows);
  });
}

// What is wider than its box scrolls: a keyboard can reach it, and above a table a line says so.
const isWide = (box) => box.scrollWidth > box.clientWidth + 1;
function hints() {
  for (const box of document.querySelectorAll("figure, pre, .output_subarea, .formula")) isWide(box) ? (box.tabIndex = 0) : box.removeAttribute("tabindex");
  for (const box of document.querySelectorAll(".scroll")) box.previousElementSibling.hidden = !isWide(box);
}
for (const box of document.querySelectorAll(".scroll")) box.insertAdjacentHTML("beforebegin", '<p class="hint" hidden>wider than the page: scroll sideways →</p>');
hints();
addEventListener("resize", hints);
document.addEventListener("toggle", hints, true); // of details, such as folded code

// --- notebooks --------------------------------------------------------------------------------------------------------------

// One click opens the code of all cells, the next one closes it again.
const button = document.getElementById("code");
button?.addEventListener("click", () => {
  const open = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", open);
  button.textContent = open ? "Hide all code" : "Show all code";
  for (const cell of document.querySelectorAll("details.code")) cell.open = open;
});

// The contents stand open beside a wide page, and closed above a narrow one, where a choice closes them again.
const contents = document.querySelector("details.contents"), narrow = matchMedia("(max-width: 70rem)");
if (contents) {
  contents.open = !narrow.matches;
  narrow.addEventListener("change", () => (contents.open = !narrow.matches));
  contents.addEventListener("click", (event) => event.target.closest("a") && (contents.open = !narrow.matches));
}

// --- the start --------------------------------------------------------------------------------------------------------------

// Of the leaderboards, one for each model, the chosen one is shown; without scripts they stand below each other.
const chosen = document.getElementById("board");
function board() {
  for (const part of document.querySelectorAll(".board")) part.hidden = part.id !== chosen.value;
  hints();
}
if (chosen) {
  chosen.closest("[hidden]").hidden = false;
  chosen.addEventListener("change", board);
  board();
}
