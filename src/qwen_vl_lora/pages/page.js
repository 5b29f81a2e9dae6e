"use strict";
(() => {
  const list = document.getElementById("cards");
  const cards = Array.from(list.children, (element) => ({
    element,
    data: element.dataset,
    facets: new Set(element.dataset.facets.split(" ")),
    text: Array.from(element.querySelectorAll(".id, dd.text"), (part) => part.textContent)
      .join(" ").toLowerCase().replace(/\s+/g, " "),
  }));
  const filter = document.getElementById("filter");
  const sort = document.getElementById("sort");
  const shown = document.getElementById("shown");
  const buttons = document.querySelectorAll("button[data-facet]");

  const show = () => {
    const wanted = filter.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
    const facets = Array.from(buttons, (button) => button)
      .filter((button) => button.ariaPressed === "true" && button.dataset.facet)
      .map((button) => button.dataset.facet);
    let count = 0;
    for (const card of cards) {
      const hit = wanted.every((word) => card.text.includes(word)) && facets.every((facet) => card.facets.has(facet));
      if (card.element.hidden === hit) card.element.hidden = !hit;
      count += hit;
    }
    shown.textContent = shown.dataset.text.replace("{shown}", count).replace("{all}", cards.length);
    document.getElementById("none").hidden = count > 0 || !cards.length;
  };

  // One button of a group is pressed; pressing it again releases it.
  const press = (group, facet) => {
    for (const button of buttons) {
      if (button.dataset.group === group) button.ariaPressed = String(button.dataset.facet === facet);
    }
  };
  for (const button of buttons) {
    button.disabled = false;
    button.addEventListener("click", () => {
      press(button.dataset.group, button.ariaPressed === "true" ? "" : button.dataset.facet);
      show();
    });
  }

  filter.addEventListener("input", show);
  const byName = new Intl.Collator(document.documentElement.lang, { numeric: true });
  sort.addEventListener("change", () => {
    const [key, way] = sort.value.split(" ");
    const sign = way === "down" ? -1 : 1;
    const compare = key === "id"
      ? (a, b) => byName.compare(a.data.id, b.data.id)
      : (a, b) => sign * (a.data[key] - b.data[key]) || a.data.rank - b.data.rank;
    cards.sort(compare);
    list.append(...cards.map((card) => card.element));
  });
  const dense = document.getElementById("dense");
  dense.addEventListener("click", () => {
    dense.ariaPressed = String(list.classList.toggle("dense"));
  });

  // A link to a card that the filter hides shows all cards again.
  const arrive = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target === null || !list.contains(target)) return;
    if (target.hidden) {
      filter.value = "";
      new Set(Array.from(buttons, (button) => button.dataset.group)).forEach((group) => press(group, ""));
      show();
    }
    target.scrollIntoView();
  };
  addEventListener("hashchange", arrive);

  const enlarged = document.getElementById("enlarged");
  let open = null;
  const enlarge = (button) => {
    const picture = button.querySelector("img");
    const words = button.closest("article, figure").querySelector(".words");
    open = button;
    enlarged.querySelector("img").src = picture.src;
    enlarged.querySelector("img").alt = picture.alt;
    enlarged.querySelector(".words").replaceChildren(...Array.from(words.cloneNode(true).childNodes));
    if (!enlarged.open) enlarged.showModal();
  };
  const step = (way) => {
    const others = Array.from(document.querySelectorAll(".cards .zoom")).filter((zoom) => !zoom.closest("[hidden]"));
    const card = document.getElementById(open.closest("[data-card]").dataset.card);
    const place = others.indexOf(card.querySelector(".zoom"));
    if (others.length) enlarge(others[(place + way + others.length) % others.length]);
  };
  for (const button of document.querySelectorAll(".zoom")) {
    button.disabled = false;
    button.addEventListener("click", () => enlarge(button));
  }
  for (const button of enlarged.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => step(Number(button.dataset.step)));
  }
  enlarged.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  enlarged.addEventListener("click", (event) => {
    if (event.target === enlarged) enlarged.close();
  });

  const tools = document.querySelector(".tools");
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = !cards.length;
  show();
  arrive();
})();
