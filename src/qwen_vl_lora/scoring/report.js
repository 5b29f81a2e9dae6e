"use strict";
(() => {
  const list = document.getElementById("cards");
  const cards = Array.from(list.children, (element) => ({
    element,
    text: (element.dataset.id + " " + element.textContent).toLowerCase().replace(/\s+/g, " "),
    id: element.dataset.id,
    tuned: Number(element.dataset.tuned),
    gain: Number(element.dataset.gain),
    rank: Number(element.dataset.rank),
  }));
  const filter = document.getElementById("filter");
  const sort = document.getElementById("sort");
  const orders = {
    lowest: (a, b) => a.rank - b.rank,
    gains: (a, b) => b.gain - a.gain || a.rank - b.rank,
    losses: (a, b) => a.gain - b.gain || a.rank - b.rank,
    id: (a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }),
  };
  const show = () => {
    const wanted = filter.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const hit = wanted.every((word) => card.text.includes(word));
      card.element.hidden = !hit;
      count += hit;
    }
    document.getElementById("shown").textContent = count + " of " + cards.length + " shown";
    document.getElementById("none").hidden = count > 0;
  };
  filter.addEventListener("input", show);
  sort.addEventListener("change", () => {
    cards.sort(orders[sort.value]);
    list.append(...cards.map((card) => card.element));
  });
  const tools = document.querySelector(".tools");
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  // Closed sections would be missing on paper.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((item) => (item.open = true)));
  show();
})();
