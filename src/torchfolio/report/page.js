"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll(".card")];
  const search = by("search"), family = by("family"), status = by("status");

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const fits = words.every((word) => card.dataset.text.includes(word))
        && (!family.value || card.dataset.family === family.value)
        && (!status.value || card.dataset.status === status.value);
      card.hidden = !fits;
      shown += fits;
    }
    by("found").textContent = shown === cards.length ? "" : `${shown} of ${cards.length}`;
    by("none").hidden = shown > 0;
  }

  search.addEventListener("input", filter);
  family.addEventListener("change", filter);
  status.addEventListener("change", filter);
  by("clear").addEventListener("click", () => {
    search.value = family.value = status.value = "";
    filter();
    search.focus();
  });

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !typing) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && event.target === search) {
      search.value = "";
      filter();
    }
  });

  const root = document.documentElement;
  const stored = (() => { try { return localStorage.getItem("torchfolio-theme"); } catch { return null; } })();
  if (stored) root.dataset.theme = stored;
  by("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("torchfolio-theme", root.dataset.theme); } catch { /* a page from disk may have no storage */ }
  });

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
