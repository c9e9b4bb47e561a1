"use strict";
// Sort a table by a column: numbers by their data-v, text otherwise; empty cells go last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const th = button.closest("th"), table = th.closest("table"), body = table.tBodies[0];
    const at = [...th.parentNode.children].indexOf(th);
    const down = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && th.dataset.first === "up");
    for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "ascending" : "descending");
    const value = (row) => { const c = row.children[at]; return c.dataset.v === undefined ? c.textContent.trim() : c.dataset.v; };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const n = Number(x) - Number(y);
      return (Number.isNaN(n) ? x.localeCompare(y) : n) * (down ? 1 : -1);
    });
    body.append(...rows);
  });
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy).textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); button.textContent = "Selected"; }
  });
}
// Point at a name in a legend: the other lines step back.
for (const item of document.querySelectorAll(".legend li[data-arm]")) {
  const lines = () => item.closest("figure").querySelectorAll(".draw [class^=arm-]");
  item.addEventListener("mouseenter", () => { for (const g of lines()) g.classList.toggle("dim", !g.classList.contains(item.dataset.arm)); });
  item.addEventListener("mouseleave", () => { for (const g of lines()) g.classList.remove("dim"); });
}
for (const button of document.querySelectorAll(".filters button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of button.parentNode.children) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(on));
    for (const row of document.querySelectorAll("[data-verdict]")) row.hidden = on && row.dataset.verdict !== button.dataset.show;
  });
}
