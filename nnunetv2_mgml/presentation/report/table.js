"use strict";
// Sortable tables: every head of a table.sortable becomes a button. Cells carry their value in data-key.
(function () {
  document.documentElement.classList.add("js");

  function compare(a, b, numeric) {
    if (numeric) {
      // cells without a value go last in either order, see sort()
      return Number(a) - Number(b);
    }
    return a.localeCompare(b, "en", {numeric: true});
  }

  function sort(table, column, descending) {
    const body = table.tBodies[0];
    const entries = Array.from(body.rows, (row) => ({row, key: row.cells[column].dataset.key}));
    const filled = entries.filter((entry) => entry.key !== "");
    const empty = entries.filter((entry) => entry.key === "");
    const numeric = filled.every((entry) => !Number.isNaN(Number(entry.key)));
    filled.sort((a, b) => (descending ? -1 : 1) * compare(a.key, b.key, numeric));
    for (const entry of filled.concat(empty)) {
      body.append(entry.row);
    }
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column, heads) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, descending);
      });
    });
  }
})();
