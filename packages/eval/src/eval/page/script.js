// Sort a table by the column whose header is pressed; copy a command. The page is complete without.
"use strict";

document.querySelectorAll("table.sortable thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const body = header.closest("table").tBodies[0];
    const descending = header.getAttribute("aria-sort") === "ascending";
    header.parentElement.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[header.cellIndex].dataset.sort;
    const compare = (a, b) => {
      if (a === "" || b === "") return Number(a === "") - Number(b === "");  // nothing comes last
      const numeric = !isNaN(a) && !isNaN(b);
      const order = numeric ? Number(a) - Number(b) : a.localeCompare(b);
      return descending ? -order : order;
    };
    const rows = Array.from(body.rows).sort((a, b) => compare(value(a), value(b)));
    body.append(...rows);
  });
});

document.querySelectorAll("button.copy").forEach((button) => {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);  // no clipboard for a page opened from a file
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
});
