/** Light or dark: as the system, unless somebody chose. The choice is kept. */

import { byId } from "./dom.js";

const NAME = "pennyweight theme";
const CHOICES = ["auto", "light", "dark"];

function show(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

function kept() {
  const choice = localStorage.getItem(NAME);
  return CHOICES.includes(choice) ? choice : "auto";
}

const select = byId("theme");
select.value = kept();
show(select.value);
select.addEventListener("change", () => {
  localStorage.setItem(NAME, select.value);
  show(select.value);
});
