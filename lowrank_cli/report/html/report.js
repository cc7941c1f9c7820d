"use strict";
/* The switch of the theme, values on hover, and the browser of predictions. Text from runs is only ever textContent. */

const root = document.documentElement;

(function theme() {
  const button = document.getElementById("theme");
  const names = ["system", "light", "dark"];
  let saved = "system";
  try { saved = localStorage.getItem("lrk-theme") || "system"; } catch { /* storage may be off for files */ }
  function apply(name) {
    if (name === "system") delete root.dataset.theme; else root.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    try { localStorage.setItem("lrk-theme", name); } catch { /* the choice lasts for this page */ }
    saved = name;
  }
  apply(names.includes(saved) ? saved : "system");
  button.hidden = false;
  button.addEventListener("click", () => apply(names[(names.indexOf(saved) + 1) % names.length]));
})();

(function values() {
  const REACH = 28; // px around a mark
  const tip = document.getElementById("tip");
  let active = null;

  function show(mark) {
    if (mark === active) return;
    if (active) active.classList.remove("active");
    active = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("active");
    tip.textContent = mark.dataset.tip;
    const box = mark.getBoundingClientRect();
    const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 8), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
  }

  function nearest(chart, x, y) {
    let best = null, distance = REACH;
    for (const mark of chart.querySelectorAll("circle[data-tip]")) {
      const box = mark.getBoundingClientRect();
      const away = Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
      if (away < distance) { best = mark; distance = away; }
    }
    return best;
  }

  function over(event) {
    const chart = event.target.closest && event.target.closest("svg.chart");
    show(chart ? event.target.closest("[data-tip]") || nearest(chart, event.clientX, event.clientY) : null);
  }
  document.addEventListener("pointermove", over);
  document.addEventListener("pointerdown", over);
  document.addEventListener("scroll", () => show(null), { passive: true });
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("keydown", (event) => {
    const chart = document.activeElement && document.activeElement.closest("svg.chart");
    if (event.key === "Escape") show(null);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!chart || !step) return;
    const marks = [...chart.querySelectorAll("[data-tip]")];
    if (!marks.length) return;
    event.preventDefault();
    show(marks[(marks.indexOf(active) + step + marks.length) % marks.length]);
  });
})();

(function predictions() {
  const PAGE = 20; // answers

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function marked(text, query) {
    const lower = text.toLowerCase(), parts = [];
    let from = 0;
    for (let at = query ? lower.indexOf(query) : -1; at >= 0; at = lower.indexOf(query, from)) {
      parts.push(text.slice(from, at), make("mark", {}, text.slice(at, at + query.length)));
      from = at + query.length;
    }
    return [...parts, text.slice(from)];
  }

  function browse(section) {
    const rows = JSON.parse(document.getElementById(section.dataset.rows).textContent);
    const judged = rows.some((row) => row[4] !== null);
    let verdict = null, query = "", page = 0;

    const search = make("input", { type: "search", placeholder: "Search prompts and answers" });
    search.setAttribute("aria-label", "Search prompts and answers");
    const count = make("span", { className: "count" });
    count.setAttribute("role", "status");
    const filters = [["All", null], ["Right", true], ["Wrong", false]].map(([name, value]) => {
      const share = value === null ? rows.length : rows.filter((row) => row[4] === value).length;
      const button = make("button", { type: "button" }, `${name} ${share}`);
      button.addEventListener("click", () => { verdict = value; page = 0; draw(); });
      return [button, value];
    });
    const previous = make("button", { type: "button" }, "Previous"), next = make("button", { type: "button" }, "Next");
    previous.addEventListener("click", () => { page -= 1; draw(); });
    next.addEventListener("click", () => { page += 1; draw(); });
    search.addEventListener("input", () => { query = search.value.toLowerCase(); page = 0; draw(); });

    const body = make("tbody");
    const names = [["at", "#"], ["prompt", "prompt"], ["answer", "answer"], ["expected", "expected"]];
    if (judged) names.push(["verdict", "verdict"]);
    const head = make("thead", {}, make("tr", {}, ...names.map(([className, text]) => {
      const cell = make("th", { className }, text);
      cell.scope = "col";
      return cell;
    })));
    section.append(
      make("div", { className: "tools" }, search, ...(judged ? filters.map(([button]) => button) : [])),
      make("table", { className: "answers" }, head, body),
      make("div", { className: "tools" }, previous, next, count),
    );

    function draw() {
      const kept = rows.filter((row) =>
        (verdict === null || row[4] === verdict) &&
        (!query || [row[1], row[2], row[3]].some((text) => text !== null && text.toLowerCase().includes(query))));
      const from = page * PAGE, shown = kept.slice(from, from + PAGE);
      body.replaceChildren(...shown.map(([at, prompt, answer, expected, right]) => {
        const cells = [
          make("td", { className: "at" }, String(at)),
          make("td", { className: "prompt" }, ...marked(prompt, query)),
          make("td", { className: "answer" }, ...(answer === null ? ["–"] : marked(answer, query))),
          make("td", { className: "expected" }, ...marked(expected, query)),
        ];
        cells[2].dataset.name = "answer";
        cells[3].dataset.name = "expected";
        if (judged) cells.push(make("td", { className: `verdict ${right ? "right" : "wrong"}` }, right ? "✓ right" : "✗ wrong"));
        return make("tr", {}, ...cells);
      }));
      for (const [button, value] of filters) button.setAttribute("aria-pressed", String(value === verdict));
      previous.disabled = page === 0;
      next.disabled = from + PAGE >= kept.length;
      count.textContent = kept.length
        ? `${from + 1}–${from + shown.length} of ${kept.length}`
        : "No answer fits the search";
    }
    draw();
  }

  /* A table is made when it is first seen, so a page of a hundred runs opens at once. */
  for (const section of document.querySelectorAll(".predictions")) {
    const fold = section.closest("details.run");
    if (!fold || fold.open) browse(section);
    else fold.addEventListener("toggle", () => browse(section), { once: true });
  }
})();
